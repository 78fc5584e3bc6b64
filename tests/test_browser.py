"""Notebooks in a real JupyterLab in a real Chromium: the inspector works, and nothing is fetched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
pytestmark = [pytest.mark.browser]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
HOSTILE = ('<img src=x onerror="window.pwned=1"> <script>window.pwned=2</script> '
           "$\\href{javascript:window.pwned=3}{x}$ $\\htmlData{a=b}{y}$ "
           "$\\includegraphics{http://127.0.0.1:9/x.png}$")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address (with token) and root folder of a JupyterLab over a copy of the notebooks."""
    assert CHROMIUM, "no Chromium or Chrome on this machine: apt install chromium, or set CHROMIUM to its path"
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "SGPO_RUNS": str(root / "runs"), "PLOTLY_RENDERER": "plotly_mimetype",
                   "JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_CONFIG_DIR": str(root / "config")}  # fmt: skip
    settings = root / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # cells outside the window stay in the page
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(root / "settings")
    with (root / "lab.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
             "--IdentityProvider.token=t", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
             "--allow-root"], stdout=log, stderr=subprocess.STDOUT, env=environment)  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api?token=t", timeout=5):
                break
            assert process.poll() is None and time.monotonic() < deadline, (root / "lab.log").read_text()[-2000:]
            time.sleep(0.5)
        yield address, root
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


@pytest.fixture(scope="module")
def page(lab: tuple[str, Path]) -> Iterator[Any]:
    """A browser page that notes page errors and requests to other hosts."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1500, "height": 1100})
        opened.errors, opened.outside = [], []
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        known = (lab[0], lab[0].replace("http", "ws"), "data:", "blob:")
        opened.on("request", lambda r: None if r.url.startswith(known) else opened.outside.append(r.url))
        yield opened
        browser.close()


def run_all(page: Any, address: str, notebook: str, seconds: float = 240) -> None:
    """Open a notebook, run all of its cells and wait for the last: a kernel at work answers no widget."""
    page.goto(f"{address}/lab/tree/{notebook}?token=t&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_function("window.jupyterapp !== undefined", timeout=30_000)
    status = page.locator(".jp-Notebook-ExecutionIndicator")
    until(lambda: status.count() and status.first.get_attribute("data-status") == "idle", 60)
    current = "window.jupyterapp.shell.currentWidget"
    page.wait_for_function(f"() => {current}?.context?.path === '{notebook}' && {current}.context.isReady",
                           timeout=60_000)
    for _ in range(10):  # the command may still come too early; its promise is kept when every cell has run
        page.evaluate("seconds => Promise.race([window.jupyterapp.commands.execute('notebook:run-all-cells'), "
                      "new Promise(ok => setTimeout(ok, 1000 * seconds))])", seconds)  # fmt: skip
        counts = page.evaluate(f"[...{current}.content.model.cells].filter(c => c.type === 'code')"
                               ".map(c => c.executionCount)")  # fmt: skip
        if all(counts):
            return
        time.sleep(1)
    raise AssertionError(f"{notebook}: its cells did not run to the end, counts {counts}")


def key(page: Any, name: str) -> None:
    page.locator(".sgpo-inspector").focus()
    page.keyboard.press(name)


def stored(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["id"]: row for row in map(json.loads, lines)}


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def test_the_inspector_in_jupyterlab(page, lab):
    """Formulas, scores, marks, keys, filters, decisions on disk, editing with a new leak check."""
    address, root = lab
    run_all(page, address, "notebooks/01_strategy_extraction.ipynb")
    box = page.locator(".sgpo-inspector")
    box.scroll_into_view_if_needed(timeout=60_000)
    assert page.locator(".jp-OutputArea-output[data-mime-type*=stderr]").count() == 0
    assert "Problem alg-01" in box.locator(".left h4").first.inner_text()
    assert box.locator(".left math").count() > 5 and box.locator(".card").count() == 5
    assert box.locator(".score .fill").count() == 25
    assert box.locator("mark.answer").first.inner_text() == "twenty-one"
    file = root / "runs" / "strategies" / "collection.decisions.jsonl"
    key(page, "3")
    until(lambda: box.locator(".card").nth(2).get_attribute("class") == "card picked")
    key(page, "a")
    until(lambda: stored(file).get("alg-01", {}).get("decision") == "accepted")
    assert stored(file)["alg-01"]["candidate"] == 2 and stored(file)["alg-01"]["status"] == "kept"
    key(page, "ArrowRight")
    until(lambda: "alg-02" in box.locator(".left h4").first.inner_text())
    key(page, "e")
    box.locator("textarea[data-field=strategy]").fill("Divide, so that the answer is 18 settings")
    box.get_by_role("button", name="save").click()
    until(lambda: stored(file).get("alg-02", {}).get("edited") is True)
    until(lambda: "18" in [m.inner_text() for m in box.locator("mark.answer").all()])
    box.locator(".foot input").fill("checked by hand")
    box.locator(".foot input").press("Enter")
    until(lambda: stored(file)["alg-02"]["comment"] == "checked by hand")
    key(page, "r")
    until(lambda: stored(file)["alg-02"]["decision"] == "rejected")
    box.locator("label", has_text="subject").locator("select").select_option("geometry")
    until(lambda: "geo-01" in box.locator(".left h4").first.inner_text())
    assert "1 of 11" in box.locator(".bar").inner_text()
    box.locator("label", has_text="decision").locator("select").select_option("accepted")
    until(lambda: "– of 0" in box.locator(".bar").inner_text())
    assert page.errors == [] and page.outside == []


def test_hostile_text_stays_text(page, lab):
    """Model text with scripts, images and links does nothing in the page."""
    address, root = lab
    code = f"""
from sgpo_lib.config import RewardConfig
from sgpo_lib.extraction.records import Candidate, Extraction
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.rewards import Verifier
from sgpo_lib.widgets.strategy_inspector import StrategyInspector
bad = {HOSTILE!r}
read = Candidate(bad, Strategy(bad, bad, (bad, bad)), score=0.5, comment=bad, kind=bad)
found = [Extraction(Problem("p", bad, "1", solution=bad, family=bad), (read, Candidate(bad, reason=bad)), 0, "kept",
                    (bad,))]
StrategyInspector(found, "hostile.jsonl", Verifier(RewardConfig()))"""
    notebook = {"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [],
                           "source": code}],
                "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
                "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
    (root / "hostile.ipynb").write_text(json.dumps(notebook))
    run_all(page, address, "hostile.ipynb")
    box = page.locator(".sgpo-inspector")
    box.scroll_into_view_if_needed(timeout=60_000)
    assert "<img src=x" in box.locator(".left").inner_text()
    key(page, "e")
    time.sleep(1)
    assert page.evaluate("window.pwned") is None
    assert box.locator("img, script, iframe, a").count() == 0
    assert page.errors == [] and page.outside == []

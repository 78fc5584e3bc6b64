"""A JupyterLab over a copy of the notebooks, and a browser, for all browser tests."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import CHROMIUM, FLAGS
from servers import free_port, running

from sgpo_lib.runs import runs_root

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address (with token) and root folder of a JupyterLab over a copy of the notebooks."""
    assert CHROMIUM, "no Chromium or Chrome on this machine: apt install chromium, or set CHROMIUM to its path"
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    (root / "runs").mkdir()
    (root / "runs" / "bases").symlink_to((runs_root() / "bases").resolve())
    port = free_port()
    environment = {**os.environ, "SGPO_RUNS": str(root / "runs"), "PLOTLY_RENDERER": "plotly_mimetype",
                   "JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_CONFIG_DIR": str(root / "config")}  # fmt: skip
    settings = root / "settings" / "@jupyterlab"
    for name, value in (("notebook-extension/tracker", '{"windowingMode": "none"}'),  # all cells stay in the page
                        ("apputils-extension/notification", '{"fetchNews": "false", "checkForUpdates": false}')):
        (settings / name).parent.mkdir(parents=True)
        (settings / f"{name}.jupyterlab-settings").write_text(value)
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(root / "settings")
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=t", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
               "--allow-root"]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with running(command, f"{address}/api?token=t", root / "lab.log", environment, 60):
        yield address, root


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, lab: tuple[str, Path]) -> Iterator[Any]:
    """A page for JupyterLab; no page error and no request to another host may have come when the test ends."""
    opened = browser.new_page(viewport={"width": 1500, "height": 1100})
    errors: list[str] = []
    outside: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    known = (lab[0], lab[0].replace("http", "ws"), "data:", "blob:")
    opened.on("request", lambda r: None if r.url.startswith(known) else outside.append(r.url))
    yield opened
    opened.close()
    assert errors == [] and outside == []


@pytest.fixture
def offline(browser: Any) -> Iterator[Any]:
    """A page with the network off: no page error, no request but for files and blobs."""
    context = browser.new_context(viewport={"width": 1500, "height": 1100}, offline=True)
    opened = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith(("file:", "blob:")) else requests.append(r.url))
    yield opened
    context.close()
    assert errors == [] and requests == []

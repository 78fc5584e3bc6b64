"""Notebook 01 in a real JupyterLab in a real Chromium: the inspector works, and nothing is fetched from outside."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from lab import run_all, shot, theme, until, write_notebook

pytestmark = pytest.mark.browser
HOSTILE = ('<img src=x onerror="window.pwned=1"> <script>window.pwned=2</script> '
           "$\\href{javascript:window.pwned=3}{x}$ $\\htmlData{a=b}{y}$ "
           "$\\includegraphics{http://127.0.0.1:9/x.png}$")


def key(page: Any, name: str) -> None:
    page.locator(".sgpo-inspector").focus()
    page.keyboard.press(name)


def stored(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["id"]: row for row in map(json.loads, lines)}


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
    shot(page, "inspector_light")
    file = root / "runs" / "strategies" / "collection.decisions.jsonl"
    key(page, "3")
    until(lambda: box.locator(".card").nth(2).get_attribute("class") == "card picked")
    key(page, "a")
    until(lambda: stored(file).get("alg-01", {}).get("decision") == "accepted")
    assert stored(file)["alg-01"]["candidate"] == 2 and stored(file)["alg-01"]["status"] == "leaking"
    box.locator(".tag", has_text="in quarantine").wait_for(timeout=20_000)
    box.locator(".foot input").fill("the number is in the problem too")  # an exception wants a reason
    box.locator(".foot input").press("Enter")
    until(lambda: stored(file)["alg-01"]["comment"])
    key(page, "a")
    until(lambda: stored(file)["alg-01"]["status"] == "kept")
    key(page, "ArrowRight")
    until(lambda: "alg-02" in box.locator(".left h4").first.inner_text())
    key(page, "e")
    box.locator("textarea[data-field=strategy]").fill("Divide, so that the answer is 18 settings")
    box.get_by_role("button", name="save").click()
    until(lambda: stored(file).get("alg-02", {}).get("edited") is True)
    until(lambda: "18" in [m.inner_text() for m in box.locator("mark.answer").all()])
    box.locator(".foot input").fill("checked by hand")
    key(page, "ArrowLeft")  # a comment is stored also where Enter was forgotten
    until(lambda: stored(file)["alg-02"]["comment"] == "checked by hand")
    key(page, "ArrowRight")
    until(lambda: "alg-02" in box.locator(".left h4").first.inner_text())
    key(page, "r")
    until(lambda: stored(file)["alg-02"]["decision"] == "rejected")
    menu = lambda name: box.get_by_label(name, exact=True)  # noqa: E731
    menu("subject").select_option("geometry")
    until(lambda: "geo-01" in box.locator(".left h4").first.inner_text())
    assert "1 of 11" in box.locator(".bar").inner_text()
    menu("subject").select_option("all")
    menu("of").select_option("no_leak")  # the retained ones hardly leak, by their reference ratings
    menu("band").select_option("High")
    high = int(box.locator(".bar").inner_text().split(" of ")[1].split()[0])
    menu("band").select_option("Low")
    low = int(box.locator(".bar").inner_text().split(" of ")[1].split()[0])
    assert high > 50 > low
    menu("band").select_option("all")
    menu("sort").select_option("subject")
    box.get_by_role("button", name="previous").click()
    menu("subject").select_option("geometry")
    theme(page, "Dark")
    shot(page, "inspector_dark")
    theme(page, "Light")
    menu("decision").select_option("accepted")
    until(lambda: "– of 0" in box.locator(".bar").inner_text())


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
    write_notebook(root / "hostile.ipynb", code)
    run_all(page, address, "hostile.ipynb")
    box = page.locator(".sgpo-inspector")
    box.scroll_into_view_if_needed(timeout=60_000)
    assert "<img src=x" in box.locator(".left").inner_text()
    key(page, "e")
    time.sleep(1)
    assert page.evaluate("window.pwned") is None
    assert box.locator("img, script, iframe, a").count() == 0

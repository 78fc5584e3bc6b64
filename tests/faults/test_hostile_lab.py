"""Hostile text in a real JupyterLab with its own kernel, at full counts: the views as a person has them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: make test-faults")

from hostile_payloads import PAYLOADS
from hostile_views import CELLS
from test_hostile_text import ALL, NONE, browser  # noqa: F401 - a fixture
from watched_page import Watched

_spec = importlib.util.spec_from_file_location(
    "browser_conftest", Path(__file__).parents[1] / "browser" / "conftest.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
lab = _module.lab

INSPECTOR = """from hostile_views import extraction_of
from sgpo_lib.config import RewardConfig
from sgpo_lib.rewards import Verifier
from sgpo_lib.widgets.strategy_inspector import StrategyInspector
inspector = StrategyInspector([extraction_of(text) for text in texts], Path(folder) / "decisions.jsonl",
                              Verifier(RewardConfig()))
inspector"""


@pytest.mark.full
def test_jupyterlab(browser, lab, tmp_path, monkeypatch, tally):  # noqa: F811
    """Every view at once, then every problem of the inspector; MathJax and plotly are JupyterLab's own."""
    from lab import ask, run_all, shot, write_notebook

    address, root = lab
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    start = (f"import json, sys\nsys.path[:0] = {folders!r}\ntexts = json.loads({json.dumps(ALL)!r})\n"
             f"folder = {str(tmp_path)!r}")
    write_notebook(root / "hostile.ipynb", start, *CELLS[:-1], INSPECTOR)
    watched = Watched(browser, address, address.replace("http", "ws"), "data:", f"blob:{address}")
    page = watched.page
    run_all(page, address, "hostile.ipynb")
    for selector in (".sgpo-inspector", ".sgpo-monitor", ".sgpo-kl", ".js-plotly-plot .main-svg"):
        page.locator(selector).first.scroll_into_view_if_needed(timeout=60_000)
    page.wait_for_timeout(2000)
    box = page.locator(".sgpo-inspector")
    for i, text in enumerate(ALL):
        ask(page, f"inspector.selected = {i}")
        page.wait_for_function("n => document.querySelector('.sgpo-inspector').innerText.includes(n)",
                               arg=f"{i + 1} of")
        assert box.locator("img, script, iframe, object, a, form, base, link, meta, video").count() == 0, text
    shot(page, "hostile-lab")
    ran = page.evaluate("window.hostile !== undefined || [...document.querySelectorAll('iframe')].length > 0")
    noted = [n for n in watched.noted if n[0] in ("executed", "requested", "led to", "opened a window")]
    watched.context.close()
    assert not ran and noted == []
    assert len(PAYLOADS) == len(ALL) >= 30
    tally(10, "hostile text, JupyterLab", f"{len(ALL)} payloads in all views, with its own MathJax: {NONE}")

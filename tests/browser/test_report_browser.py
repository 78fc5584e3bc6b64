"""The page of an executed notebook 06, opened from disk with the network off: figures, and the KL page it leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sgpo_lib.launch import run_notebook
from sgpo_lib.runs import load_run

pytestmark = [pytest.mark.browser, pytest.mark.slow]
FEW = {"n_train": 24, "n_validation": 4, "n_test": 6, "eval_problems": 4, "test_k": 2, "eval_every": 1}


def test_report_and_kl_page_offline(offline: Any, tmp_path: Path, base: Path, runs_folder: Path) -> None:
    job = tmp_path / "job"
    result = run_notebook("06_full_run", {"steps": 2, "overrides": {**FEW, "source": str(base), "revision": ""}}, job)
    assert result.state == "done", result.reason
    offline.goto((job / "report.html").as_uri())
    offline.wait_for_selector(".sgpo-figure .main-svg")
    assert offline.locator(".sgpo-figure").count() == 3
    assert all(offline.locator(".sgpo-figure").nth(i).locator(".main-svg").count() for i in range(3))
    offline.click("text=KL of every token, interactive")
    run = load_run((job / "runs.txt").read_text().splitlines()[-1])
    offline.wait_for_selector("text=responses of step 2")
    assert run.done and offline.url == (job / "token_kl.html").as_uri()
    assert offline.locator("select").first.locator("option").count() == 12, "both groups of one problem"

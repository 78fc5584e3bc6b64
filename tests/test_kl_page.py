"""The KL page of a run: which stored responses it takes, and that the report keeps it."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_notebooks import write_notebook

from sgpo_lib.jobs import read_job
from sgpo_lib.kl_page import shortened, stored_groups, worth
from sgpo_lib.pages import KL_LINK, PLOTLY_TAG, notebook_html
from sgpo_lib.records import Problem
from sgpo_lib.report import write_report
from sgpo_lib.testbed import make_problem
from sgpo_lib.testbed_families import FAMILIES


def problem_of(number: int) -> Problem:
    return replace(make_problem(FAMILIES[number], 0, random.Random(number)), id=f"p{number}")


def row(problem: str, guided: bool, sample: int, reward: float, length: int = 4, **more: Any) -> dict[str, Any]:
    """A line of stored rollouts, as `rollout_rows` writes it."""
    status = "correct" if reward else "wrong"
    return {"problem": problem, "gold": "1", "guided": guided, "expert": False, "sample": sample, "text": "t",
            "tokens": list(range(length)), "stop": "end", "reward": reward, "status": status, "reason": "", **more}


def test_stored_responses_become_groups():
    problems = {p.id: p for p in (problem_of(0), replace(problem_of(1), strategy=None), problem_of(2))}
    rows = [row("p0", False, 0, 0), row("p0", True, 0, 1), row("p0", False, 1, 1), row("p1", False, 0, 1),
            row("p2", False, 0, 1, expert=True), row("p2", True, 0, 0, length=0), row("gone", True, 0, 1)]
    (group,) = stored_groups(rows, problems)
    assert group.problem is problems["p0"] and [o.sample for o in group.autonomous] == [0, 1]
    assert (group.p_auto, group.p_guide) == (0.5, 1.0) and group.guided[0].correct
    assert group.guided[0].token_ids == (0, 1, 2, 3)


def test_the_problem_with_most_to_see_is_taken():
    problems = {p.id: p for p in map(problem_of, range(4))}
    rows = [row("p0", True, 0, 1), row("p0", False, 0, 1), row("p1", True, 0, 1), row("p1", False, 0, 0),
            row("p2", True, 0, 0), row("p2", False, 0, 0), row("p3", False, 0, 1)]
    groups = stored_groups(rows, problems)
    assert [g.problem.id for g in sorted(groups, key=worth, reverse=True)][:2] == ["p1", "p0"]


def test_long_responses_are_left_out_but_never_all():
    problems = {"p0": problem_of(0)}
    rows = [row("p0", True, 0, 0, 50), row("p0", True, 1, 1, 60), row("p0", False, 0, 0, 30),
            row("p0", False, 1, 1, 20)]
    (group,) = stored_groups(rows, problems)
    kept = shortened(group, 100, 500)
    assert [o.sample for o in kept.guided] == [1] and [o.sample for o in kept.autonomous] == [1]
    assert len(shortened(group, 1000, 500).responses) == 4
    assert [o.sample for o in shortened(group, 5, 500).responses] == [1], "the first correct guided one, however long"
    assert [len(o.token_ids) for o in shortened(group, 1000, 50).responses] == [30, 20, 50], "60 exceed the context"
    assert shortened(group, 1000, 10).responses == []


def test_a_page_with_a_microscope_beside_it_begins_with_the_link(tmp_path):
    notebook = write_notebook(tmp_path, "1")
    assert KL_LINK not in notebook_html(notebook)
    (tmp_path / "token_kl.html").write_text("the microscope")
    page = notebook_html(notebook)
    assert re.search(r"<(?:main|body[^>]*)>$", page.partition(str(KL_LINK))[0]) and "&lt;main" not in page


@pytest.mark.parametrize("there", [True, False])
def test_the_report_copies_it_beside_the_page(tmp_path, there):
    job = tmp_path / "first"
    job.mkdir()
    (job / "report.html").write_text(f"<main>{KL_LINK if there else ''}</main>{PLOTLY_TAG}")
    if there:
        (job / "token_kl.html").write_text("the microscope")
    out: Path = tmp_path / "out"
    (out / "notebooks").mkdir(parents=True)
    (out / "notebooks" / "first-token_kl.html").write_text("of an earlier report")
    write_report("T", [read_job(job)], [], out)
    page = (out / "notebooks" / "first.html").read_text()
    assert 'src="../plotly.min.js"' in page and ('href="first-token_kl.html"' in page) == there
    assert [p.read_text() for p in (out / "notebooks").glob("*token_kl.html")] == ["the microscope"] * there

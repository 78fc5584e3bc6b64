"""Promise 13: a strategy that gives its problem away does not reach training unnoticed."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sgpo_lib.config import DataConfig, RewardConfig
from sgpo_lib.extraction.records import Candidate, Extraction
from sgpo_lib.problems import load
from sgpo_lib.quarantine import left_out, without
from sgpo_lib.recipes import from_parameters
from sgpo_lib.records import Problem
from sgpo_lib.rewards import Verifier
from sgpo_lib.runs import Run
from sgpo_lib.strategies import spoiled
from sgpo_lib.testbed import generate
from sgpo_lib.trainer import train

CHANGES = {"steps": 2, "problems_per_step": 4, "g1": 2, "g2": 2, "n_train": 12, "n_validation": 0, "n_test": 0,
           "max_new_tokens": 4, "torch_threads": 1}  # fmt: skip
WAYS = [lambda p: f"Note that the answer is {p.answer}", lambda p: f"so that we get {p.answer} at the end",
        lambda p: f"The result is \\boxed{{{p.answer}}}", lambda p: p.solution]  # fmt: skip
"""How a planted leak is worded."""


@pytest.fixture
def problems() -> list[Problem]:
    """Problems of the testbed whose answers are no small counts."""
    drawn = generate(7)
    found: dict[str, Problem] = {}
    while len(found) < 12:
        problem = next(drawn)
        if problem.answer.isdecimal() and int(problem.answer) > 12 and problem.answer not in problem.prompt:
            found.setdefault(problem.prompt, problem)
    return list(found.values())


def leaky(problem: Problem, way: int) -> Problem:
    assert problem.strategy is not None
    steps = (*problem.strategy.steps, WAYS[way % len(WAYS)](problem))
    return dataclasses.replace(problem, strategy=dataclasses.replace(problem.strategy, steps=steps))


def row(problem: Problem, **more: Any) -> dict[str, Any]:
    assert problem.strategy is not None
    return {"id": problem.id, "prompt": problem.prompt, "answer": problem.answer, "solution": problem.solution,
            "family": problem.family, "split": "train",
            "strategy": dataclasses.asdict(problem.strategy)} | more  # fmt: skip


def line(problem: Problem, **more: Any) -> dict[str, Any]:
    assert problem.strategy is not None
    return {"id": problem.id, **dataclasses.asdict(problem.strategy)} | more


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def trained(base: Path, root: Path, **changes: Any) -> tuple[Run, dict[str, Any], set[str]]:
    """A real run; its record of the check, and the ids of the problems that it sampled."""
    run = train(from_parameters("tiny", "sgpo", 0, source=str(base), **(CHANGES | changes)), root=root)
    ids = {r["problem"] for path in (run.folder / "rollouts").glob("*.jsonl")
           for r in map(json.loads, path.read_text().splitlines())}  # fmt: skip
    record = run.folder / "quarantine.json"
    return run, json.loads(record.read_text()) if record.exists() else {}, ids


def test_leaking_strategies_of_a_users_problems_are_left_out_counted_and_said(base, tmp_path, problems, capfd, tally):
    bad = [leaky(p, i) for i, p in enumerate(problems[:4])]
    path = write(tmp_path / "own.jsonl", [row(p) for p in (*bad, *problems[4:])])
    run, record, ids = trained(base, tmp_path, problems=path)
    gone = {p.id for p in bad}
    assert {r["id"] for r in record["left_out"]} == gone and record["checked"] == 12 and not record["let_in"]
    assert ids and not ids & gone and ids <= {p.id for p in problems}
    told = capfd.readouterr().err
    assert "leak check: 4 of 12 strategies give their problem away; 4 problems are left out of training" in told
    assert str(run.folder / "quarantine.json") in told and '"confirmed": true' in told
    tally(13, "planted leaks in the strategies of a person's problems", "4 of 4 left out of a real run, 8 of 8 others "
          "trained on, counted, said and recorded")


def test_what_a_line_says_of_itself_is_not_believed(base, tmp_path, problems):
    """A leaking strategy whose line says `kept`, for problems that come from elsewhere."""
    path = write(tmp_path / "own.jsonl", [row(p) for p in problems])
    given = write(tmp_path / "strategies.jsonl", [
        line(leaky(problems[0], 0), status="kept"), line(leaky(problems[1], 1), status="kept", comment="fine"),
        line(leaky(problems[2], 2), status="kept", confirmed=True), line(leaky(problems[3], 3), confirmed="yes"),
        line(leaky(problems[4], 0), status="kept", confirmed=True, comment="  "), line(problems[5])])
    _, record, ids = trained(base, tmp_path, problems=path, strategies=given)
    gone = {p.id for p in problems[:5]}
    assert {r["id"] for r in record["left_out"]} == gone and not ids & gone and not record["let_in"]


def test_a_person_lets_one_in_by_id_with_a_reason_that_the_run_records(base, tmp_path, problems, capfd):
    """In the inspector: a first acceptance is stored as leaking, the second needs a comment."""
    from sgpo_lib.widgets.strategy_inspector import StrategyInspector

    path = write(tmp_path / "own.jsonl", [row(p) for p in problems])
    leaking = [leaky(p, 0) for p in problems[:3]]
    found = [Extraction(p, (Candidate("as it came", p.strategy),), 0, "leaking") for p in leaking]
    with Verifier(RewardConfig()) as verifier:
        inspector = StrategyInspector(found, tmp_path / "decisions.jsonl", verifier)
        for problem in leaking:
            inspector.decide(problem.id, "accepted")
        with pytest.raises(ValueError, match="comment: got none, expected the reason"):
            inspector.decide(leaking[0].id, "accepted", confirm=True)
        inspector.decide(leaking[0].id, "accepted", comment="the year of the statement", confirm=True)
    given = {"problems": path, "strategies": str(tmp_path / "decisions.jsonl")}
    run, record, _ = trained(base, tmp_path, n_train=10, **given)
    assert [(r["id"], r["reason"]) for r in record["let_in"]] == [(leaking[0].id, "the year of the statement")]
    assert "2 leaking passed over; 2 training problems left out with them" in record["source"]
    assert f"1 are trained on as a person decided: {leaking[0].id}" in capfd.readouterr().err
    data = run.config.data
    assert leaking[0].id in {p.id for p in without(load(data), left_out(load(data), data, run.folder)).train}


def test_an_exception_that_comes_or_goes_is_another_run(base, tmp_path, problems):
    """The fingerprint of a run's problems holds the reasons: a finished run is not taken for one with an exception."""
    path = write(tmp_path / "own.jsonl", [row(p) for p in problems])
    given, bad = tmp_path / "strategies.jsonl", leaky(problems[0], 0)
    write(given, [line(bad)])
    trained(base, tmp_path, problems=path, strategies=str(given))
    write(given, [line(bad, confirmed=True, comment="it is fine")])
    with pytest.raises(ValueError, match="made with other problems or strategies"):
        trained(base, tmp_path, problems=path, strategies=str(given))


def test_a_blanket_exception_is_recorded_by_id(base, tmp_path, problems):
    path = write(tmp_path / "own.jsonl", [row(p) for p in problems])
    given = write(tmp_path / "s.jsonl", [line(leaky(problems[0], 0), status="leaking"), line(leaky(problems[1], 0))])
    _, record, _ = trained(base, tmp_path, problems=path, strategies=given, leaking_strategies=True)
    assert {(r["id"], r["reason"]) for r in record["let_in"]} == {
        (p.id, "data.leaking_strategies=true") for p in problems[:2]}  # fmt: skip


def test_a_run_whose_strategies_all_leak_does_not_start(base, tmp_path, problems):
    path = write(tmp_path / "own.jsonl", [row(leaky(p, 0)) for p in problems])
    with pytest.raises(ValueError, match=r"every strategy of the 12 training problems gives its problem away"):
        trained(base, tmp_path, problems=path)


def test_the_testbed_and_what_is_spoiled_on_purpose_are_left_alone(base, tmp_path, problems):
    _, record, ids = trained(base, tmp_path)
    assert record == {} and ids
    path = write(tmp_path / "own.jsonl", [row(p) for p in problems])
    _, record, _ = trained(base, tmp_path, problems=path, bad_strategies="leaking", bad_share=0.5)
    assert record["checked"] == 8, "4 of warm-up, and 4 of the 8 that are trained on"
    assert not record["left_out"] and not record["let_in"]
    assert spoiled(problems[0], "leaking", problems).meta["bad_strategy"] == "leaking"


def test_the_check_is_quick_and_made_once(tmp_path, count, tally):
    """Problems of a person's file as long as the testbed's; the second start reads what the first found."""
    n = count(400, 8500)
    drawn, found = generate(11), {}
    while len(found) < n:
        problem = next(drawn)
        found.setdefault(problem.prompt, dataclasses.replace(problem, id=f"p{len(found)}"))
    rows = list(found.values())
    data = DataConfig(problems=write(tmp_path / "own.jsonl", [row(p) for p in rows]), n_train=n, n_validation=0,
                      n_test=0)  # fmt: skip
    splits, seconds = load(data), []
    for name in ("first", "second"):
        start = time.perf_counter()
        assert not left_out(splits, data, tmp_path / name)
        seconds.append(time.perf_counter() - start)
    assert seconds[0] < 0.1 * n and seconds[1] < 0.2 + 0.001 * n and seconds[1] < seconds[0]
    tally(13, f"time to check {n} strategies of testbed length", f"{seconds[0]:.1f} s at the first start of a set of "
          f"problems, {seconds[1]:.2f} s at later ones")

"""Strategies spoiled on purpose, the second test set, and the method that does not train: problems, metrics, runs."""

from __future__ import annotations

import collections
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from sgpo_lib import trainer
from sgpo_lib.bases import base_source
from sgpo_lib.config import DataConfig, RewardConfig
from sgpo_lib.extraction.leaks import find_leaks
from sgpo_lib.objective import ProblemWork
from sgpo_lib.policy import load_policy
from sgpo_lib.problems import Splits, load
from sgpo_lib.prompts import guided_text
from sgpo_lib.recipes import from_parameters
from sgpo_lib.records import Problem, Rollout, RolloutGroup, Strategy, Verdict
from sgpo_lib.rewards import Verifier
from sgpo_lib.runs import list_runs
from sgpo_lib.session import Session, open_model
from sgpo_lib.sources.rows import normalised
from sgpo_lib.step_metrics import step_metrics, step_sums
from sgpo_lib.strategies import is_spoiled, spoiled
from sgpo_lib.testbed_families import FAMILIES
from sgpo_lib.trainer import train, transfer_problems

SUM = Strategy("Sum", "Add place by place", ("Add the ones", "Add the tens"))
GCD = Strategy("Greatest common divisor", "Euclid", ("Divide", "Repeat"))
AREA = Strategy("Area", "Multiply the sides", ("Read both sides", "Multiply"))
Q = Problem("q", "What is 12 + 30?", "42", SUM, solution="12 + 30 = 42. \\boxed{42}", meta={"source": "book"})
DATA = {"n_train": 24, "n_validation": 4, "n_test": 6, "warmup_share": 1 / 6}
KINDS = ("wrong", "vague", "leaking")


def leaks(problem: Problem) -> set[str]:
    """Kinds of leaks that the check finds in a problem's strategy."""
    assert problem.strategy
    with Verifier(RewardConfig()) as verifier:
        return {leak.kind for leak in find_leaks([(problem, problem.strategy)], verifier)[0]}


# The strategies -------------------------------------------------------------------------------------------------------


def test_wrong_is_the_strategy_of_another_type():
    same, none = Problem("a", "", "", replace(SUM, steps=("Count on",))), Problem("c", "", "")
    others = [Q, same, Problem("b", "", "", GCD), none]
    bad = spoiled(Q, "wrong", others)
    assert bad.strategy == GCD and bad.meta == {"source": "book", "bad_strategy": "wrong"}
    assert replace(bad, strategy=SUM) == Q, "nothing else changes"
    many = [spoiled(replace(Q, id=f"q{i}"), "wrong", [*others, Problem("d", "", "", AREA)]).strategy for i in range(20)]
    assert set(many) == {GCD, AREA}, "any other type, the whole of it, never the own one"
    assert many == [spoiled(replace(Q, id=f"q{i}"), "wrong", [Problem("d", "", "", AREA), *others]).strategy
                    for i in range(20)]  # fmt: skip


def test_vague_keeps_the_type_and_says_nothing():
    bad = spoiled(Q, "vague", [])
    assert bad.strategy == Strategy("Sum", "Reason step by step", ("Reason step by step",))
    assert leaks(bad) == set() and is_spoiled(bad) and not is_spoiled(Q)
    assert guided_text(bad, bad.strategy) == (
        "Use this strategy:\nProblem type: Sum\nStrategy: Reason step by step\nSteps: (a) Reason step by step\n\n"
        "What is 12 + 30?\nReason step by step and put the answer in \\boxed{}.")


@pytest.mark.parametrize("solution, shown", [(Q.solution, "12 + 30 = 42. \\boxed{42}"), ("", "The answer is 42")])
def test_leaking_ends_in_the_solution_or_the_answer(solution, shown):
    bad = spoiled(replace(Q, solution=solution), "leaking", [])
    assert bad.strategy == Strategy("Sum", "Add place by place", ("Add the ones", "Add the tens", shown))
    assert "answer" in leaks(bad) and leaks(Q) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_without_strategy_cannot_be_spoiled(kind):
    with pytest.raises(ValueError, match=r"problem q has no strategy .* data\.bad_strategies=''"):
        spoiled(replace(Q, strategy=None), kind, [Problem("b", "", "", GCD)])


# The problems of a run ------------------------------------------------------------------------------------------------


def bad_ids(splits: Splits) -> set[str]:
    return {p.id for p in splits.train if is_spoiled(p)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_the_training_problems_is_spoiled_and_nothing_else(kind):
    plain = load(DataConfig(**DATA))
    quarter, half, all_ = (load(DataConfig(**DATA, bad_strategies=kind, bad_share=share)) for share in (0.25, 0.5, 1.0))
    assert [len(bad_ids(s)) for s in (plain, quarter, half, all_)] == [0, 5, 10, 20], "of 20, beside a warm-up of 4"
    assert bad_ids(quarter) < bad_ids(half) < bad_ids(all_)
    assert bad_ids(quarter) == bad_ids(load(DataConfig(**DATA, bad_strategies="vague", bad_share=0.25)))
    for splits in (quarter, half, all_):
        assert (splits.warmup, splits.validation, splits.test) == (plain.warmup, plain.validation, plain.test)
        assert splits.fingerprint == plain.fingerprint
        for before, after in zip(plain.train, splits.train, strict=True):
            assert after == (spoiled(before, kind, plain.train) if is_spoiled(after) else before)
            assert (after.strategy != before.strategy) == is_spoiled(after)
    if kind == "wrong":
        named = {(p.family, p.strategy.problem_type) for p in all_.train if p.strategy}
        assert all(family != wrong for family, wrong in named) and len({wrong for _, wrong in named}) > 1


def test_the_fingerprint_is_of_the_strategies_as_they_came(tmp_path):
    """A file with another real strategy changes it, spoiling does not."""
    first = load(DataConfig(**DATA)).train[0]
    path = tmp_path / "strategies.jsonl"
    path.write_text(json.dumps({"id": first.id, "problem_type": "t", "strategy": "s", "steps": ["a"]}))
    plain, file = load(DataConfig(**DATA)), load(DataConfig(**DATA, strategies=str(path)))
    both = load(DataConfig(**DATA, strategies=str(path), bad_strategies="vague", bad_share=0.5))
    assert plain.fingerprint != file.fingerprint == both.fingerprint


def test_no_other_type_to_take_is_told():
    args = {"problem_args": {"families": [FAMILIES[0].name]}}
    with pytest.raises(ValueError, match=f"every problem is of the type '{FAMILIES[0].name}'. Take 'vague' or"):
        load(DataConfig(**DATA, **args, bad_strategies="wrong", bad_share=0.5))
    assert len(bad_ids(load(DataConfig(**DATA, **args, bad_strategies="vague", bad_share=0.5)))) == 10


def test_problems_of_a_file_without_strategies_are_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"{i} + 1?", "answer": str(i + 1)}) + "\n"
                            for i in range(8)))
    data = DataConfig(problems=str(path), n_train=8, n_validation=0, n_test=0)
    assert len(load(data).train) == 8
    with pytest.raises(ValueError, match=r"problem p\d has no strategy"):
        load(replace(data, bad_strategies="leaking", bad_share=0.1))


@pytest.mark.parametrize("fields, line", [
    ({"bad_share": 0.25}, r"data\.bad_share: got 0\.25, expected .* else 0"),
    ({"bad_strategies": "wrong"}, r"data\.bad_share: got 0\.0, expected above 0"),
    ({"bad_strategies": "vague", "bad_share": 1.5}, r"data\.bad_share: got 1\.5, expected above 0, at most 1"),
    ({"bad_strategies": "vague", "bad_share": -0.5}, r"data\.bad_share: got -0\.5"),
    ({"bad_strategies": "bad", "bad_share": 0.5},
     r"data\.bad_strategies: got 'bad', expected one of '', 'wrong', 'vague', 'leaking'"),
    ({"transfer": {"n_tests": 3}}, r"evaluation\.transfer: got \{'n_tests': 3\}, expected .*problem_args.* n_test"),
    ({"transfer": {"data.n_test": 3}}, r"evaluation\.transfer: got"),
])  # fmt: skip
def test_fields_that_cannot_be_are_refused(fields, line):
    with pytest.raises(ValueError, match=line):
        from_parameters("tiny", "sgpo", **fields)


# The second test set --------------------------------------------------------------------------------------------------


def test_transfer_differs_in_the_fields_that_it_names():
    config = from_parameters("tiny", "sgpo", **DATA, transfer={"problem_args": {"held_out": "family"}, "n_test": 9})
    held_out = {f.name for f in FAMILIES if f.held_out}
    found = transfer_problems(config)
    assert len(found) == 9 and {p.family for p in found} <= held_out
    assert not {p.family for p in load(config.data).train} & held_out
    assert len(transfer_problems(from_parameters("tiny", "sgpo", **DATA, transfer={"data_seed": 7}))) == 6


def test_transfer_leaves_out_what_the_run_learns():
    """Other counts split the same source otherwise: most of these 40 lie in the first set's training part."""
    data = {**DATA, "n_train": 60}
    changes = {"n_train": 1, "n_validation": 0, "n_test": 40}
    config = from_parameters("tiny", "sgpo", **data, transfer=changes)
    first = load(config.data)
    seen = {normalised(p.prompt) for p in (*first.warmup, *first.train, *first.validation)}
    asked = load(replace(config.data, **changes)).test
    known = [p for p in asked if normalised(p.prompt) in seen]
    assert len(known) > 20
    assert transfer_problems(config) == tuple(p for p in asked if p not in known)


@pytest.mark.parametrize("transfer, message", [
    ({"n_test": 0}, r"gives 0 test problems, none of them new to the run. Set n_test above 0"),
    ({"n_test": "many"}, r"data\.n_test: got 'many' \(str\), expected int"),
    ({"problem_args": {"held_outs": "family"}}, "Did you mean 'held_out'"),
])  # fmt: skip
def test_a_second_test_set_that_cannot_be_is_refused(transfer, message):
    with pytest.raises(ValueError, match=message):
        transfer_problems(from_parameters("tiny", "sgpo", **DATA, transfer=transfer))


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_test_set_is_not_spoiled(kind):
    """One family alone has no other type to take: with the spoiling on, `wrong` would be refused."""
    transfer = {"problem_args": {"held_out": "family", "families": [next(f.name for f in FAMILIES if f.held_out)]}}
    config = from_parameters("tiny", "sgpo", **DATA, transfer=transfer, bad_strategies=kind, bad_share=1.0)
    plain = from_parameters("tiny", "sgpo", **DATA, transfer=transfer)
    assert transfer_problems(config) == transfer_problems(plain)
    assert not any(map(is_spoiled, transfer_problems(config)))


# alpha of spoiled and of other problems -------------------------------------------------------------------------------


def row_of(problems: list[Problem], alphas: list[float], guides: bool = True, **data: Any) -> dict[str, Any]:
    """`step_metrics` of a step with one correct response per group and these alphas."""
    def response(guided: bool) -> Rollout:
        return Rollout("p", guided, 0, (1,), (2, 3), "", "end", verdict=Verdict("correct", 1.0))
    groups = [RolloutGroup(p, [response(False)], [response(True)] if guides else []) for p in problems]
    works = [ProblemWork(g, [0.0], [0], alpha) for g, alpha in zip(groups, alphas, strict=True)]
    session = SimpleNamespace(config=from_parameters("tiny", "sgpo" if guides else "grpo8", **data),
                              seconds={"sample": 1.0}, work=collections.Counter(), learning_rate=lambda step: 1e-3)
    made = cast(Session, session)
    return step_metrics(made, step_sums(made, groups, works), 1, 1)


def test_alpha_is_told_apart_for_spoiled_problems():
    bad, spoils = spoiled(Q, "vague", []), {"bad_strategies": "vague", "bad_share": 0.5}
    row = row_of([bad, Q, bad, Q, Q], [0.1, 0.8, 0.3, 0.5, 0.2], **spoils)
    assert row["alpha_bad"] == pytest.approx(0.2) and row["alpha_good"] == pytest.approx(0.5)
    assert row["alpha"] == pytest.approx(1.9 / 5)
    alone = row_of([bad, bad], [0.1, 0.3], **spoils)
    assert alone["alpha_bad"] == pytest.approx(0.2) and "alpha_good" not in alone, "no problem, no number"
    assert not {"alpha_bad", "alpha_good"} & set(row_of([Q, Q], [0.1, 0.3]))
    assert not {"alpha", "alpha_bad", "alpha_good"} & set(row_of([bad, Q], [0.0, 0.0], guides=False, **spoils))


# Runs -----------------------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("importable")


def small(base: Path, method: str = "sgpo", seed: int = 0, **overrides):
    settings = {"source": str(base), "reward": "rewards_for_tests:coin", "steps": 2, "problems_per_step": 4, **DATA,
                "n_train": 16, "max_new_tokens": 6, "eval_every": 0, "test_k": 2, "lr": 1e-3, **overrides}
    return from_parameters("tiny", method, seed, **settings)


def results(folder: Path, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluation" / f"{part}.jsonl").read_text().splitlines()]


def test_a_run_with_spoiled_strategies_and_a_second_test_set(base, tmp_path, monkeypatch):
    """What is logged is the mean of the alphas that were applied; the second set is in a file and the summary."""
    planned: list[list[ProblemWork]] = []

    def recording(*args: Any) -> list[ProblemWork]:
        planned.append(plan(*args))
        return planned[-1]

    plan = trainer.plan
    monkeypatch.setattr(trainer, "plan", recording)
    transfer = {"problem_args": {"held_out": "family"}, "n_train": 1, "n_validation": 0, "n_test": 3}
    config = small(base, bad_strategies="wrong", bad_share=0.5, transfer=transfer)
    run = train(config, root=tmp_path)
    bad = bad_ids(load(config.data))
    assert len(bad) == 6, "half of 13, rounded to even"
    for row, works in zip(run.metrics("train"), planned, strict=True):
        alphas = {w.group.problem.id: w.alpha for w in works}
        for name, part in (("alpha_bad", bad), ("alpha_good", set(alphas) - bad)):
            values = [alphas[i] for i in alphas if i in part]
            assert values and row[name] == pytest.approx(sum(values) / len(values))
    assert any(w.alpha > 0 for works in planned for w in works)
    told, lines = run.summary["transfer"], results(run.folder, "transfer")
    assert [r["problem_id"] for r in lines] == [p.id for p in transfer_problems(config)]
    assert told["problems"] == 3 and told["k"] == 2 and set(told["pass_at"]) == {"1", "2"}
    assert told["accuracy"] == pytest.approx(sum(r["correct"] for r in lines) / 6)
    assert run.summary["test"]["problems"] == 6 and len(run.metrics("test")) == 1
    assert run.summary["problems"] == load(small(base).data).fingerprint


def test_a_run_without_a_second_test_set_has_none(base, tmp_path):
    run = train(small(base, "base"), root=tmp_path)
    assert "transfer" not in run.summary and not (run.folder / "evaluation" / "transfer.jsonl").exists()


def test_a_second_test_set_that_is_empty_is_refused_before_training(base, tmp_path):
    with pytest.raises(ValueError, match="Set n_test above 0"):
        train(small(base, transfer={"n_test": 0}), root=tmp_path)
    (run,) = list_runs(tmp_path)
    assert not run.done and not run.metrics()


def test_the_base_is_evaluated_and_not_trained(base, tmp_path):
    """No step whatever `steps` and `epochs` say; its weights and test results are those of the base."""
    config = small(base, "base", eval_every=1, transfer={"problem_args": {"held_out": "family"}, "n_test": 3})
    run = train(config, root=tmp_path)
    assert run.done and run.summary["steps"] == 0 and not run.metrics("train") and not run.metrics("supervised")
    assert [(r["step"], r["problems"]) for r in run.metrics("eval")] == [(0, 4)]
    weights = load_policy(config.model, base_source(config.model), config.seed).fingerprint()
    assert run.summary["weights"] == weights
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run.folder / "final" / "model", base))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    model = open_model(config)
    with model.verifier:
        for part, problems in (("test", model.splits.test), ("transfer", transfer_problems(config))):
            again = model.evaluate(problems, 2, (config.seed, part))
            assert run.summary[part]["accuracy"] == again.accuracy()[0]
            assert [r["responses"] for r in results(run.folder, part)] == [list(r.responses) for r in again.results]
    epochs = train(small(base, "base", epochs=2.0, n_test=0), root=tmp_path)
    assert epochs.done and epochs.summary["steps"] == 0 and epochs.summary["weights"] == weights


def test_the_base_of_a_finished_run_is_that_run(base, tmp_path):
    warm = train(small(base, "sft", steps=1), root=tmp_path)
    run = train(small(base, "base", init_from=str(warm.folder)), root=tmp_path)
    untrained = train(small(base, "base", n_test=0), root=tmp_path)
    assert run.summary["weights"] == warm.summary["weights"] != untrained.summary["weights"]
    assert results(run.folder, "test") == results(warm.folder, "test")

"""avg@k, pass@j and their intervals against independent counts; what evaluation asks for."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgpo_lib.config import RewardConfig
from sgpo_lib.evaluation import Evaluation, ProblemResult, evaluate, mean_interval, pass_at
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.rewards import Verifier
from sgpo_lib.rollouts.interface import Sample, SampleRequest

Z = statistics.NormalDist().inv_cdf(0.975)


# -------------------------------------------------------------------------------------------------------- pass@j


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_equals_the_count_over_all_choices(samples):
    for correct in range(samples + 1):
        outcomes = [1] * correct + [0] * (samples - correct)
        for j in range(1, samples + 1):
            choices = [max(chosen) for chosen in itertools.combinations(outcomes, j)]
            assert pass_at(samples, correct, j) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


def test_pass_at_one_is_the_share_and_many_samples_stay_exact():
    assert pass_at(1000, 250, 1) == pytest.approx(0.25)
    assert pass_at(1000, 1, 1000) == 1.0
    assert pass_at(1000, 0, 500) == 0.0


@pytest.mark.parametrize("j", [0, -1, 5])
def test_pass_at_more_than_there_are_is_refused(j):
    with pytest.raises(ValueError, match="from 4 samples"):
        pass_at(4, 2, j)


# ----------------------------------------------------------------------------------------------------- intervals


def wilson_bounds(p: float, n: float) -> tuple[float, float]:
    """Both p0 with |p - p0| = z sqrt(p0 (1 - p0) / n), found by bisection: Wilson's interval by its definition."""
    def excess(p0: float) -> float:
        return abs(p - p0) - Z * math.sqrt(p0 * (1 - p0) / n)

    found = []
    for outside in (0.0, 1.0):
        a, b = outside, p  # excess is 0 or more at `outside`, 0 or less at p
        for _ in range(200):
            middle = (a + b) / 2
            a, b = (middle, b) if excess(middle) > 0 else (a, middle)
        found.append((a + b) / 2)
    return found[0], found[1]


@pytest.mark.parametrize("correct, problems", [(1, 2), (3, 8), (5, 10), (9, 10), (1, 60), (37, 100), (499, 500)])
def test_one_sample_per_problem_gives_wilsons_interval(correct, problems):
    """The standard error over problems divides by n - 1, so Wilson's n is n - 1."""
    mean, low, high = mean_interval([1.0] * correct + [0.0] * (problems - correct))
    assert mean == pytest.approx(correct / problems)
    assert (low, high) == pytest.approx(wilson_bounds(mean, problems - 1), abs=1e-6)


@pytest.mark.parametrize("problems", [1, 4, 50, 1000])
def test_nobody_or_everybody_correct_still_leaves_a_width(problems):
    mean, low, high = mean_interval([0.0] * problems)
    assert (mean, low) == (0.0, pytest.approx(0.0, abs=1e-12))
    assert high == pytest.approx(Z**2 / (problems + Z**2), abs=1e-6)  # Wilson's closed form at 0
    mean, low, high = mean_interval([1.0] * problems)
    assert (mean, high) == (1.0, pytest.approx(1.0, abs=1e-12))
    assert low == pytest.approx(problems / (problems + Z**2), abs=1e-6)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.25] * 30, [0.1] * 3, [0.0, 0.5], [1.0, 0.75, 1.0]])
def test_an_interval_has_width_lies_in_range_and_holds_the_mean(values):
    mean, low, high = mean_interval(values)
    assert 0.0 <= low < high <= 1.0
    assert low <= mean <= high


def test_many_problems_give_the_normal_interval_of_the_mean():
    values = np.random.default_rng(1).binomial(4, 0.5, size=20_000) / 4
    mean, low, high = mean_interval(values.tolist())
    half = Z * values.std(ddof=1) / math.sqrt(len(values))
    assert (mean, low, high) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=1e-5)


def test_correlated_samples_widen_the_interval():
    """Four samples that always agree tell no more than one."""
    alike = mean_interval([1.0, 0.0] * 25)
    spread = mean_interval([0.5, 0.25, 0.75, 0.5, 0.5] * 10)
    assert alike[0] == spread[0] == 0.5
    assert alike[2] - alike[1] > 2 * (spread[2] - spread[1])


def test_no_problems_have_no_mean():
    with pytest.raises(ValueError, match="no problems were evaluated"):
        mean_interval([])


@pytest.mark.parametrize("problems, k", [(30, 1), (60, 2), (100, 4), (200, 4)])
@pytest.mark.parametrize("a, b", [(None, 0.5), (0.5, 0.5), (0.4, 1.6)], ids=["all_half", "bimodal", "hard"])
def test_intervals_cover_the_truth(problems, k, a, b):
    """Problems of differing difficulty are drawn anew each time; the truth is the mean over all of them."""
    draw = np.random.default_rng(20_260)
    truth = b if a is None else a / (a + b)
    hits, repeats = 0, 1500
    for _ in range(repeats):
        chances = np.full(problems, b) if a is None else draw.beta(a, b, size=problems)
        _, low, high = mean_interval((draw.binomial(k, chances) / k).tolist())
        hits += low <= truth <= high
    assert 0.93 <= hits / repeats <= 0.99


# ---------------------------------------------------------------------------------------------------- evaluation

PLAN = Strategy("addition", "add", ("add both",))
PROBLEMS = [
    Problem("p1", "What is 1 + 1?", "2", PLAN, family="easy"), Problem("p2", "What is 2 + 3?", "5", PLAN),
    Problem("p3", "What is 3 + 4?", "7", PLAN, family="hard")]  # fmt: skip
SCRIPT = {
    "p1": ["\\boxed{2}", "so \\boxed{ 2 }", "\\boxed{2.0}", "it is \\boxed{2}!"],
    "p2": ["\\boxed{5}", "\\boxed{6}", "\\boxed{50}", "I do not know"],
    "p3": ["\\boxed{8}", "\\boxed{-7}", "", "\\boxed{}"],
}
END = 3


class CharacterTokenizer:
    """One token per character."""

    chat_template = "characters"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return [ord(c) for c in messages[0]["content"]]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in ids if not (skip_special_tokens and i == END))


class ScriptedEngine:
    """Answers by `SCRIPT`, in the order of a problem's requests."""

    def __init__(self) -> None:
        self.requests: list[SampleRequest] = []
        self.settings: dict[str, Any] = {}

    def sample(self, requests: Sequence[SampleRequest], **settings: Any) -> list[Sample]:
        self.requests, self.settings = list(requests), settings
        used: dict[str, Iterator[str]] = {key: iter(texts) for key, texts in SCRIPT.items()}
        samples = []
        for request in requests:
            prompt = "".join(map(chr, request.prompt_ids))
            problem = next(p for p in PROBLEMS if p.prompt in prompt)
            ids = (*(ord(c) for c in next(used[problem.id])), END)
            samples.append(Sample(ids, (0.0,) * len(ids), "end"))
        return samples


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(RewardConfig()) as judge:
        yield judge


def run_evaluation(verifier: Verifier, k: int = 4, **changes: Any) -> tuple[Evaluation, ScriptedEngine]:
    engine = ScriptedEngine()
    settings: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 12, "seed_key": (7, "test")}
    return evaluate(engine, CharacterTokenizer(), verifier, PROBLEMS, k=k, **{**settings, **changes}), engine


def test_every_problem_is_sampled_k_times_and_judged(verifier):
    found, engine = run_evaluation(verifier)
    assert [(r.problem_id, r.family, r.samples, r.correct) for r in found.results] == [
        ("p1", "easy", 4, 4), ("p2", "", 4, 1), ("p3", "hard", 4, 0)]
    assert [list(r.responses) for r in found.results] == list(SCRIPT.values())
    assert engine.settings == {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 12}
    for result in found.results:  # the end token counts
        assert result.mean_length == pytest.approx(sum(len(t) + 1 for t in SCRIPT[result.problem_id]) / 4)


def test_numbers_of_an_evaluation(verifier):
    found, _ = run_evaluation(verifier)
    summary = found.summary()
    assert summary["accuracy"] == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert summary["accuracy_low"] < summary["accuracy"] < summary["accuracy_high"]
    assert {j: value[0] for j, value in summary["pass_at"].items()} == pytest.approx(
        {"1": (1 + 1 / 4) / 3, "2": (1 + 1 / 2) / 3, "4": 2 / 3})
    assert (summary["k"], summary["problems"]) == (4, 3)
    assert summary["unverifiable"] == sum(r.unverifiable for r in found.results)
    assert summary["response_length"] == pytest.approx(sum(r.mean_length for r in found.results) / 3)
    json.dumps(summary)


@pytest.mark.parametrize("k, powers", [(1, ["1"]), (2, ["1", "2"]), (3, ["1", "2"]), (4, ["1", "2", "4"])])
def test_pass_at_is_given_for_powers_of_two_up_to_k(verifier, k, powers):
    assert list(run_evaluation(verifier, k)[0].summary()["pass_at"]) == powers


def test_the_policy_sees_no_strategy_unless_asked(verifier):
    for guided in (False, True):
        _, engine = run_evaluation(verifier, guided=guided)
        prompts = ["".join(map(chr, r.prompt_ids)) for r in engine.requests]
        assert all(("Use this strategy:" in text) is guided for text in prompts)
        assert all(text.endswith("\\boxed{}.") for text in prompts)


def test_seeds_differ_by_sample_problem_and_key_and_repeat(verifier):
    def seeds(key: tuple[object, ...]) -> list[int]:
        return [r.seed for r in run_evaluation(verifier, seed_key=key)[1].requests]

    assert seeds((7, "test")) == seeds((7, "test"))
    assert len(set(seeds((7, "test")))) == 12
    for other in ((7, "eval"), (8, "test")):
        assert not set(seeds((7, "test"))) & set(seeds(other))


def test_results_are_stored_one_line_per_problem(verifier, tmp_path: Path):
    found, _ = run_evaluation(verifier)
    found.write(tmp_path / "evaluation" / "test.jsonl")
    lines = (tmp_path / "evaluation" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    back = [json.loads(line) for line in lines]
    again = [ProblemResult(**{**r, **{n: tuple(r[n]) for n in ("responses", "reasons")}}) for r in back]
    assert again == list(found.results)

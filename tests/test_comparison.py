"""Paired differences against hand arithmetic and simulations; what must not be compared is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from run_folders import made_up

from sgpo_lib.comparison import accuracy_differences, bootstrap_interval, check_together, steps_differences
from sgpo_lib.figures import mean_interval
from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import open_run


def test_differences_are_paired_by_seed_and_problem(tmp_path):
    runs = [made_up(tmp_path, "sgpo", 0, [1.0, 0.5]), made_up(tmp_path, "sgpo", 1, [0.5, 0.5]),
            made_up(tmp_path, "grpo8", 1, [0.25, 0.5]), made_up(tmp_path, "grpo8", 0, [0.5, 0.5]),
            made_up(tmp_path, "grpo8", 2, [0.0, 0.0])]
    (row,) = accuracy_differences(runs).to_dict("records")
    # seed 0: -0.5, 0; seed 1: -0.25, 0; the mean of the four is -0.1875. Seed 2 has no partner
    assert row["difference"] == pytest.approx(-0.1875) and row["low"] < -0.1875 < row["high"]
    assert (row["method"], row["minus"], row["pairs"], row["problems"], row["unpaired"]) == ("grpo8", "sgpo", 2, 2, "2")
    (turned,) = accuracy_differences(runs, "grpo8").to_dict("records")
    assert turned["difference"] == pytest.approx(0.1875)
    alone = accuracy_differences([runs[0], runs[3]]).iloc[0]
    assert alone["pairs"] == 1 and alone["difference"] == pytest.approx(-0.25) and math.isnan(alone["low"])
    none = accuracy_differences([runs[0], runs[4]]).iloc[0]
    assert none["pairs"] == 0 and none["unpaired"] == "0, 2" and math.isnan(none["difference"])


def test_no_spread_gives_no_width():
    assert bootstrap_interval(np.full((4, 6), 0.25)) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(("seeds", "of_seed", "of_problem"), [(3, 0.06, 0.0), (5, 0.02, 0.15), (5, 0.06, 0.1),
                                                              (8, 0.06, 0.0)])
def test_intervals_cover_the_truth(seeds, of_seed, of_problem):
    """300 simulated comparisons of 100 problems: the 95% interval holds the true difference in at least 93%."""
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(300):
        world = (0.05 + rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, of_problem, (1, 100))
                 + rng.normal(0, 0.3, (seeds, 100)))
        _, low, high = bootstrap_interval(world, draws=800, seed=i)
        hits += low <= 0.05 <= high
    assert hits / 300 >= 0.93


def test_an_interval_is_not_needlessly_wide():
    """Against the normal interval of the same components, whose truth is known here: below 1.6 times for 5 seeds."""
    rng = np.random.default_rng(2)
    widths = []
    for i in range(100):
        world = rng.normal(0, 0.02, (5, 1)) + rng.normal(0, 0.15, (1, 100)) + rng.normal(0, 0.3, (5, 100))
        _, low, high = bootstrap_interval(world, draws=800, seed=i)
        widths.append(high - low)
    known = 2 * 1.96 * math.sqrt(0.02**2 / 5 + 0.15**2 / 100 + 0.3**2 / 500)
    assert 1.0 < np.mean(widths) / known < 1.6


def test_what_does_not_belong_together_is_refused_by_name(tmp_path):
    good = [made_up(tmp_path, "sgpo", 0, [1.0]), made_up(tmp_path, "grpo8", 0, [1.0])]
    check_together(good, "sgpo")
    other = made_up(tmp_path, "sft_grpo", 0, [1.0], problems="xyz")
    harder = made_up(tmp_path, "luffy", 0, [1.0], problem_args={"level": "hard"})
    longer = made_up(tmp_path, "grpo8", 0, [1.0], test_k=8)
    open_config = from_parameters("tiny", "hpt", 0)
    started = open_run(open_config, tmp_path)
    for bad, words in ((other, "problems 'xyz'"), (harder, "data.problem_args {'level': 'hard'}"),
                       (longer, "both grpo8 with seed 0"), (longer, "evaluation.test_k 8"),
                       (started, "has not finished")):
        with pytest.raises(ValueError, match="do not belong into one comparison") as told:
            check_together([*good, bad], "sgpo")
        assert bad.folder.name in str(told.value) and words in str(told.value)
    with pytest.raises(ValueError, match="no run of the reference 'hpt'"):
        check_together(good, "hpt")


def test_a_run_without_a_test_is_named(tmp_path):
    runs = [made_up(tmp_path, "sgpo", 0, [1.0]), made_up(tmp_path, "grpo8", 0, [1.0])]
    (runs[1].folder / "evaluation" / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"tiny-grpo8-s0-\w+: no test\.jsonl"):
        accuracy_differences(runs)


def test_settings_are_told_apart(tmp_path):
    """Two learning rates of one method are refused, not averaged, also with different seeds."""
    runs = [made_up(tmp_path, "sgpo", 0, [1.0]), made_up(tmp_path, "grpo8", 0, [1.0]),
            made_up(tmp_path, "grpo8", 0, [0.0], lr=1e-3)]
    assert dataclasses.replace(runs[1].config, train=runs[2].config.train) == runs[2].config
    with pytest.raises(ValueError, match="both grpo8 with seed 0"):
        accuracy_differences(runs)
    runs[2] = made_up(tmp_path, "grpo8", 1, [0.0], lr=1e-3)
    with pytest.raises(ValueError, match="are grpo8 with other settings"):
        accuracy_differences(runs)


def test_steps_are_paired_by_seed():
    def run(method: str, seed: int, accuracies: list[float]) -> tuple[dict, list[dict]]:
        name = f"{method}-{seed}"
        return {"run": name, "method": method, "seed": seed}, [
            {"run": name, "method": method, "kind": "eval", "step": 10 * i, "accuracy": a}
            for i, a in enumerate(accuracies)]

    told = [run("sgpo", 0, [0.0, 1.0]), run("sgpo", 1, [0.5, 1.0]), run("sgpo", 2, [0.0, 1.0]),
            run("grpo8", 0, [0.0, 0.4, 0.6]), run("grpo8", 1, [0.0, 0.5]), run("grpo8", 2, [0.0, 0.1])]
    summaries = pd.DataFrame([t[0] for t in told])
    (row,) = steps_differences(summaries, pd.DataFrame([r for t in told for r in t[1]])).to_dict("records")
    # seed 0: 15 - 5 = 10; seed 1: 10 - 0 = 10; seed 2 never got there
    assert (row["pairs"], row["never"]) == (2, 1)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((10.0, 10.0, 10.0))


def test_seeds_alone_give_about_the_t_interval():
    """Without spread over problems. Without the factor S/(S-1) of the seeds' variance five have 0.87 of it."""
    for values in ([1.0, 2, 3, 4, 5, 6, 7, 8], [1.0, 2, 3, 4, 5]):
        _, low, high = bootstrap_interval(np.repeat(np.array(values)[:, None], 6, axis=1), draws=20000)
        _, t_low, t_high = mean_interval(values)
        assert 0.95 < (high - low) / (t_high - t_low) < 1.05

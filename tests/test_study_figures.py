"""Figures of a study, from made-up frames: colours, marks and smoothing by hand. And the frame behind Fig. 5."""

from __future__ import annotations

import math
import random

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from sgpo_lib import testbed, tiny
from sgpo_lib.analysis import _stages, step_of_tokens, token_frame, token_table
from sgpo_lib.policy import Policy
from sgpo_lib.prompts import response_ids
from sgpo_lib.records import Rollout, RolloutGroup, Verdict
from sgpo_lib.study_figures import by_world, differences, dynamics, pointing, sweeps
from sgpo_lib.testbed_families import FAMILIES

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"


def text_of(figure: go.Figure) -> str:
    return "".join(a.text for a in figure.layout.annotations)


def test_differences_are_coloured_by_the_sign_of_their_interval():
    table = pd.DataFrame([("grpo8", 5, -0.2, -0.3, -0.1), ("hpt", 3, 0.2, 0.1, 0.4), ("luffy", 3, 0.1, -0.1, 0.2),
                          ("no_grpo", 2, 0.1, 0.0, 0.2), ("sft", 2, -0.1, -0.2, 0.0),
                          ("no_kl_clip", 1, 0.9, math.nan, math.nan)],
                         columns=["method", "seeds", "difference", "difference_low", "difference_high"])
    for column in ("low", "high", ""):
        name = f"transfer_difference_{column}".rstrip("_")
        table[name] = [math.nan] * 5 + [{"low": 0.1, "high": 0.3, "": 0.2}[column]]
    panels = {"difference": "test", "transfer_difference": "unseen", "speed_difference": "not there"}
    figure = differences(table, panels, "title", published={"hpt": -0.022, "base": 0.1})
    assert [a.text for a in figure.layout.annotations] == ["test", "unseen"]
    first = {t.name: t for t in figure.data if t.xaxis == "x"}
    above, below, open_ = (first[f"interval {n} 0"] for n in ("above", "below", "holds"))
    assert (above.marker.color, below.marker.color, open_.marker.color) == (BLUE, ORANGE, GREY)
    assert list(above.y) == ["HPT (12 samples), 3 seeds"] and list(below.y) == ["GRPO (8 samples), 5 seeds"]
    assert list(open_.x) == [0.1, 0.1, -0.1], "an end at 0 still holds 0; no interval, no point"
    assert list(above.error_x.array) == pytest.approx([0.2]) and list(above.error_x.arrayminus) == pytest.approx([0.1])
    (second,) = (t for t in figure.data if t.xaxis == "x2" and len(t.x))
    assert list(second.y) == ["w/o KL clipping, 1 seeds"] and list(second.x) == [0.2] and not second.showlegend
    (published,) = (t for t in figure.data if t.marker.symbol == "diamond-open")
    assert list(published.x) == [-0.022] and list(published.y) == list(above.y)
    assert len(figure.layout.yaxis.categoryarray) == 6
    assert "Nothing to show" in text_of(differences(table.iloc[5:], {"difference": "test"}, "title"))


def test_smoothing_by_hand():
    """One spike of 5: within two steps of it the mean of the five steps around is 1; at the ends fewer steps count."""
    spike = [0.0, 0, 0, 0, 5, 0, 0, 0, 0]
    rows = [{"run": f"r{s}", "method": "sgpo", "seed": s, "kind": "train", "step": i, "entropy": v + s, "alpha": 0.5}
            for s in (0, 1) for i, v in enumerate(spike)]
    rows += [{"run": "r0", "method": "sgpo", "seed": 0, "kind": "eval", "step": 4, "entropy": 99.0},
             {"run": "g", "method": "grpo8", "seed": 0, "kind": "train", "step": 0, "entropy": 6.0},
             {"run": "g", "method": "grpo8", "seed": 0, "kind": "train", "step": 1, "entropy": 0.0}]
    figure = dynamics(pd.DataFrame(rows), [("entropy", ["sgpo", "grpo8", "hpt"]), ("alpha", ["sgpo", "grpo8"])], "t")
    lines = [t for t in figure.data if t.fill is None]
    sgpo, grpo, alpha = lines[:3]
    assert list(sgpo.y) == pytest.approx([0.5, 0.5, 1.5, 1.5, 1.5, 1.5, 1.5, 0.5, 0.5]) and sgpo.name == "SGPO, 2 seeds"
    assert list(grpo.y) == [3.0, 3.0] and list(alpha.y) == [0.5] * 9
    assert sgpo.showlegend and not alpha.showlegend and alpha.xaxis == "x2"
    assert tuple(figure.layout.yaxis2.range) == (0, 1.02) and figure.layout.yaxis.range is None
    assert "Nothing to show" in text_of(dynamics(pd.DataFrame(rows[18:19]), [("entropy", ["sgpo"])], "t"))


def test_pointing_is_a_mean_over_problems():
    columns = ["problem", "response", "stage", "critical", "kl", "sft_loss"]
    table = pd.DataFrame([("p", 0, 1, True, 1.0, 2.0), ("p", 1, 1, True, 1.0, 2.0), ("q", 2, 1, True, 4.0, 6.0),
                          ("p", 0, 0, False, 0.5, 1.0), ("p", 0, -1, False, 0.1, 0.2)], columns=columns)
    figure = pointing(table)
    critical, other = figure.data[:2]
    assert list(critical.x) == ["opening", "step 1", "answer"] and (critical.name, other.name) == (
        "words of the strategy", "other tokens")
    assert list(critical.y) == [0.0, 2.5, 0.0] and list(other.y) == [0.5, 0.0, 0.1]
    # problems 1 and 4: standard deviation 1.5 sqrt(2), standard error 1.5
    assert list(critical.error_y.array) == pytest.approx([0, 1.96 * 1.5, 0])
    assert list(figure.data[2].y) == [0.0, 4.0, 0.0]
    assert "Nothing to show" in text_of(pointing(pd.DataFrame()))


def test_sweeps_keep_the_order_of_the_table():
    table = pd.DataFrame([("kl_delta", "0.25", False, 0.4, 0.3, 0.6), ("kl_delta", "1", True, *[math.nan] * 3),
                          ("kl_delta", "inf", False, -0.2, -0.3, -0.1), ("g1:g2", "8:4", True, *[math.nan] * 3)],
                         columns=["field", "value", "paper", *(f"speed_difference{e}" for e in ("", "_low", "_high"))])
    figure = sweeps(table)
    assert list(figure.layout.xaxis.categoryarray) == ["0.25", "1", "inf"] and figure.layout.xaxis.type == "category"
    paper, others = figure.data[:2]
    assert list(paper.x) == ["1"] and list(paper.y) == [0.0] and paper.error_y.array is None
    assert list(others.x) == ["0.25", "inf"] and list(others.y) == [0.4, -0.2]
    assert list(others.error_y.array) == pytest.approx([0.2, 0.1])
    assert list(others.error_y.arrayminus) == pytest.approx([0.1, 0.1])
    assert [t.showlegend for t in figure.data] == [True, True, False, False]
    assert "Nothing to show" in text_of(sweeps(table.iloc[:0]))


def test_bars_by_world_are_cut_at_0_and_1():
    table = pd.DataFrame([("tiny", "sgpo", 0.9, 0.7, 1.1), ("tiny easy", "sgpo", 0.5, 0.4, 0.6),
                          ("tiny", "base", 0.1, -0.1, 0.3)],
                         columns=["where", "method", "test", "test_low", "test_high"])
    sgpo, base = by_world(table, "t").data
    assert list(sgpo.x) == ["tiny", "tiny easy"] and list(sgpo.y) == [0.9, 0.5] and base.name == "base"
    assert list(sgpo.error_y.array) == pytest.approx([0.1, 0.1])
    assert list(sgpo.error_y.arrayminus) == pytest.approx([0.2, 0.1])
    assert list(base.error_y.arrayminus) == pytest.approx([0.1]) and list(base.error_y.array) == pytest.approx([0.2])


# ------------------------------------------------------------------------------------------------- analysis.token_table


def stages(text: str, critical: set[str]) -> list[tuple[str, int]]:
    words = text.split(" ")
    tokens = [words[0], *(f" {w}" for w in words[1:])]
    frame = pd.DataFrame({"token": tokens, "step": step_of_tokens(tokens)})
    frame["critical"] = [t.strip() in critical for t in tokens]
    return list(zip(words, _stages(frame), strict=True))


def test_stages_by_hand():
    told = stages("plan : unit 10 / 2 = 5 ; scale 5 * 4 is 20 ; redeem 20 - 2 = 18 ; \\boxed{ 18 }",
                  {"unit", "scale", "redeem"})
    assert [s for _, s in told] == [0] * 2 + [1] * 7 + [2] * 7 + [3] * 7 + [-1] * 3
    assert told[2] == ("unit", 1) and told[9] == ("scale", 2) and told[16] == ("redeem", 3)
    between = stages("unit 1 ; so ; scale 2 ; done ;", {"unit", "scale"})
    assert [s for _, s in between] == [1] * 3 + [1] * 2 + [2] * 3 + [-1] * 2
    assert {s for _, s in stages("well ; 10 / 2 = 5 ; \\boxed{ 5 }", {"unit"})} == {0}


def test_token_table_holds_the_correct_guided_responses():
    tokenizer = tiny.build_tokenizer()
    policy = Policy(tiny.build_model(tokenizer, seed=1), tokenizer, torch.device("cpu"), lora=False, context=512)
    problem = testbed.make_problem(FAMILIES[0], 0, random.Random(5))
    opened, plain = (response_ids(tokenizer, t) for t in (f"plan : {problem.solution}", problem.solution))

    def rollout(ids: tuple[int, ...], status: str | None, guided: bool = True) -> Rollout:
        verdict = Verdict(status, float(status == "correct")) if status else None
        return Rollout(problem.id, guided, 0, (), tuple(ids), "", "end", verdict=verdict)
    groups = [RolloutGroup(problem, [rollout(plain, "correct", False)],
                           [rollout(plain, "wrong"), rollout(opened, "correct"), rollout(plain, None)]),
              RolloutGroup(problem, [], [rollout(plain, "correct")])]
    table = token_table(policy, groups, testbed.fork_words())
    first, second = (table[table["response"] == i] for i in (0, 1))
    assert (len(first), len(second), len(table)) == (len(opened), len(plain), len(opened) + len(plain))
    assert list(first["kl"]) == pytest.approx(list(token_frame(policy, problem, opened)["kl"])) and set(
        table["problem"]) == {problem.id}
    assert first.loc[first["critical"], "token"].str.strip().tolist() == ["unit", "scale", "redeem"]
    assert first.loc[first["critical"], "stage"].tolist() == [1, 2, 3]
    assert list(dict.fromkeys(first["stage"])) == [0, 1, 2, 3, -1]
    assert list(dict.fromkeys(second["stage"])) == [1, 2, 3, -1]
    assert token_table(policy, groups[:0], testbed.fork_words()).empty
    none = token_table(policy, groups, set())
    assert set(none["stage"]) == {0} and not none["critical"].any()

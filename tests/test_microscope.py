"""Groups and checkpoints as panes of the KL microscope; concentration over responses."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from sgpo_lib import token_figures
from sgpo_lib.analysis import token_readings
from sgpo_lib.config import ModelConfig
from sgpo_lib.microscope import drain_frame, first_correct, group_panes
from sgpo_lib.policy import load_policy
from sgpo_lib.prompts import prompt_ids
from sgpo_lib.records import Problem, Rollout, RolloutGroup, Strategy, Verdict
from sgpo_lib.token_statistics import concentration, delta_curve, lorenz

RIGHT, WRONG = Verdict("correct", 1.0, answer="9"), Verdict("wrong", 0.0, answer="8")


@pytest.fixture(scope="module")
def policy(base):
    return load_policy(ModelConfig(source=str(base), device="cpu"), str(base), 0)


@pytest.fixture
def group(policy) -> RolloutGroup:
    problem = Problem("p", "what is 4 + 5 ?", "9", strategy=Strategy("sums", "add both", ("read", "add")))
    prompts = {guided: prompt_ids(policy.tokenizer, problem, guided=guided) for guided in (False, True)}

    def rollout(guided: bool, i: int, verdict: Verdict) -> Rollout:
        ids = tuple((7 * i + 11 * guided + t) % 60 + 5 for t in range(6 + i))
        return Rollout("p", guided, i, prompts[guided], ids, "text", "end", verdict=verdict)

    groups = [[rollout(guided, i, v) for i, v in enumerate(verdicts)]
              for guided, verdicts in ((False, (WRONG, RIGHT)), (True, (WRONG, RIGHT, RIGHT)))]
    return RolloutGroup(problem, *groups, prompts[False], prompts[True])


def test_the_reachable_target_comes_first_and_is_marked(policy, group):
    panes = group_panes(policy, group, top=2)
    read = [token_readings(policy, group.problem, o.token_ids).table for o in group.guided]
    reach = [float(table["unguided_logp"].sum()) for table in read]
    best = max((1, 2), key=lambda j: reach[j])
    assert [p.target for p in panes] == [True, False, False, False, False]
    assert [p.label for p in panes] == [f"guided {best + 1}", f"guided {4 - best}", "guided 1", "autonomous 1",
                                        "autonomous 2"]  # fmt: skip
    assert [p.correct for p in panes] == [True, True, False, False, True]
    assert [p.group for p in panes] == ["guided"] * 3 + ["autonomous"] * 2
    assert panes[0].frames[0].table["unguided_logp"].sum() == pytest.approx(reach[best])
    assert first_correct([group]) == (group.problem, group.guided[1])
    assert panes[3].frames[0].table["token_id"].tolist() == list(group.autonomous[0].token_ids)


def test_without_a_correct_guided_response_nothing_is_a_target(policy, group):
    for o in group.guided:
        o.verdict = WRONG
    panes = group_panes(policy, group)
    assert not any(p.target for p in panes) and [p.label for p in panes][:3] == ["guided 1", "guided 2", "guided 3"]
    with pytest.raises(ValueError, match="no guided response is correct, of 3 to 1 problems"):
        first_correct([group])
    group.guided[0].verdict = None
    with pytest.raises(ValueError, match="not been judged"):
        group_panes(policy, group)


def test_the_drain_by_hand(policy, group):
    read = token_readings(policy, group.problem, group.guided[0].token_ids, label="step 2")
    kl = read.table["forward_kl"].tolist()
    delta = sorted(kl)[-2]
    row = drain_frame([read, read], delta).iloc[1]
    assert row["label"] == "step 2" and row["kl"] == pytest.approx(math.fsum(kl) / len(kl))
    assert row["masked"] == 1 / len(kl) and row["kept_kl"] == pytest.approx((math.fsum(kl) - max(kl)) / len(kl))
    assert row["sft_loss"] == pytest.approx(-row["unguided_logp"] / len(kl))


def test_concentration_is_taken_within_responses():
    """Two responses: in one a single token of ten holds all, in the other each holds the same."""
    frame = pd.DataFrame({"response": [0] * 10 + [1] * 10, "kl": [5.0] + [0.0] * 9 + [1.0] * 10})
    table = concentration(frame, ["kl"], (0.1, 0.2))
    assert table.loc["kl"].tolist() == pytest.approx([(1 + 0.1) / 2, (1 + 0.2) / 2])
    assert table.columns.tolist() == ["top 10%", "top 20%"]
    with pytest.raises(ValueError, match="no column response; expected a table"):
        concentration(frame.drop(columns="response"), ["kl"])


def test_the_figures_show_the_frames_they_are_given():
    values = [0.1, 0.2, 3.0, 0.0]
    curves = token_figures.lorenz_curves({"kl": lorenz(values), "sft_loss": lorenz([1.0, 1.0])})
    assert [t.name for t in curves.data] == ["even", "forward KL", "SFT loss"]
    assert list(curves.data[1].y)[:2] == pytest.approx([0.0, 3.0 / 3.3])
    effect = token_figures.delta_effect(delta_curve(values, (0.15, 1.0)), 1.0)
    assert list(effect.data[0].y) == pytest.approx([3.2 / 3.3, 3.0 / 3.3]) and list(effect.data[1].y) == [0.5, 0.25]
    frame = pd.DataFrame({"label": ["step 0", "step 2"], "kl": [0.3, 0.1], "kept_kl": [0.2, 0.0],
                          "sft_loss": [0.9, 0.5]})  # fmt: skip
    assert [list(t.y) for t in token_figures.drain(frame).data] == [[0.3, 0.1], [0.2, 0.0], [0.9, 0.5]]
    empty = token_figures.drain(frame.iloc[:0])
    assert "Nothing to show" in empty.layout.annotations[0].text

"""Claims: the published numbers, and the orientation of every part, on studies whose truth is known by construction."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import eval_rows, made_up, train_rows

from sgpo_lib import claims
from sgpo_lib.claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    NONE,
    OPEN,
    PUBLISHED,
    SEEN,
    UNSEEN,
    UNSURE,
    evidence,
    verdict,
    verdicts,
)
from sgpo_lib.comparison import bootstrap_interval
from sgpo_lib.study import Study

BAD = {"bad_strategies": "wrong", "bad_share": 0.5}
OTHERS = ("sft", "sft_grpo", "grpo8", "luffy", "hpt", "no_grpo", "no_proximal", "no_kl_clip", "no_target_selection",
          "no_adaptive_weight", "guided_sft", "reverse_kl", "group_advantage_weight")
EFFECTS = {1: (0.1, 0.125, 0.1), -1: (-0.1, -0.125, -0.1), 0: (0.1, 0.0, -0.1)}
"""By seed: SGPO is better, worse, or as likely the one as the other."""


def series(method: str, e: float) -> dict[str, list[float]]:
    """Metrics by quarter of the steps. In the quarters that a claim looks at the effect is `e`; the means over all
    steps have the other sign wherever a claim is about a part of them."""
    reward, entropy, length, alpha = [0.5] * 4, [1.0] * 4, [30.0] * 4, [0.5] * 4
    if method == "sgpo":
        reward = [0.5 + e, 0.5 + e, 0.5 - 9 * e, 0.5]
        entropy = [1.0, 1.0, 1.0, 1 + e]
        length = [30 + e, 30 + e, 30 - 9 * e, 30.0]
        alpha = [0.5 + e, 0.5 - 9 * e, 0.5 + 9 * e, 0.5]
    elif method == "no_grpo":
        reward, entropy = [0.5 + e, 0.5 - 5 * e, 0.5, 0.5 - e], [1 + 9 * e, 1.0, 1.0, 1.0]
    elif method == "no_proximal":
        entropy = [1.0, 1 + 9 * e, 1.0, 1.0]
    elif method == "sft_grpo":
        entropy = [1 - 9 * e, 1.0, 1.0, 1 + 3 * e]
    return {"reward_autonomous": reward, "entropy": entropy, "response_length": length, "alpha": alpha,
            "reward_guided": [0.5] * 4}


def made_up_study(root: Path, sign: int) -> Study:
    """Three seeds of everything. On unseen families the effect has the other sign."""
    runs = []
    for seed, e in enumerate(EFFECTS[sign]):
        flat = eval_rows(0, 0.5, 0.5, 0.5, 0.5)
        ahead = eval_rows(0.5 - 99 * e, 0.5 + e, 0.5 + e, 0.5 + e, 0.5 + e)
        runs.append(made_up(root, "sgpo", seed, [0.5 + e, 0.4 + e], [0.5 - e],
                            [*ahead, *train_rows(**series("sgpo", e))], steps=8))
        runs += [made_up(root, m, seed, [0.5, 0.4], [0.5], [*flat, *train_rows(**series(m, e))], steps=8)
                 for m in OTHERS]
        for method, level, late in (("sgpo", 2 * e, 0.5 + e), ("no_grpo", e, 0.5), ("no_adaptive_weight", e, 0.5 + e)):
            guided = train_rows(reward_guided=[0.5 - 9 * e, 0.5, 0.5, 0.5 + e], reward_autonomous=[0, 0, 0, late])
            runs.append(made_up(root, method, seed, [0.5 + level, 0.4 + level], [0.5 - level], guided, steps=8,
                                guided_side="frozen"))
        runs.append(made_up(root, "base", seed, [0.25, 0.15], [0.2]))
        # the gain on the weaker base is smaller by e
        runs += [made_up(root, "base", seed, [0.0, 0.0], source="tiny-s"),
                 made_up(root, "sgpo", seed, [0.25, 0.25], source="tiny-s")]
        gap = [{"kind": "train", "step": 1, "alpha_good": 0.5 + 9 * e},  # no spoiled problem in this step
               {"kind": "train", "step": 2, "alpha_good": 0.4 + e, "alpha_bad": 0.4},
               {"kind": "train", "step": 3, "alpha_bad": 0.4 + 19 * e}]
        runs.append(made_up(root, "sgpo", seed, [0.5 + 2 * e, 0.4 + 2 * e], [0.2], gap, steps=8, **BAD))
    return Study(runs)


def tokens(sign: int, where: str = "tiny") -> pd.DataFrame:
    """Three problems with a response each; `sign` 0: one speaks for the claim, one against it, one is in between."""
    rows = []
    for i, s in enumerate((1, -1, 0) if sign == 0 else (sign,) * 3):
        part = [(0, False, 1.0, 5.0), (-1, False, 1.0, 5.0)]
        for stage in (1, 2, 3):
            part += [(stage, True, 1.0 + s, 5 - s * (stage + 0.1)), (stage, False, 1.0, 5 - s * (stage - 0.1))]
        rows += [(where, i, f"p{i}", *row) for row in part]
    return pd.DataFrame(rows, columns=["where", "response", "problem", "stage", "critical", "kl", "sft_loss"])


@pytest.fixture(scope="module", params=[1, -1, 0])
def told(request, tmp_path_factory) -> tuple[int, pd.DataFrame]:
    study = made_up_study(tmp_path_factory.mktemp("study"), request.param)
    return request.param, evidence(study, tokens(request.param))


def test_published_numbers_are_the_papers():
    """arXiv 2606.24064. Table 2: 52.1, w/o distillation 49.9, w/o GRPO 48.6, w/o all proximal constraints 45.3, w/o KL
    clipping 48.7, w/o target selection 48.1, w/o adaptive weighting 50.9; section 5.3.2: "52.1 vs. 49.3"; section 5.1:
    "42.2 -> 52.1", +2.2 over the strongest baseline."""
    assert PUBLISHED == {"sgpo": 52.1, "no_distillation": 49.9, "sft_grpo": 49.9, "no_grpo": 48.6, "no_proximal": 45.3,
                         "no_kl_clip": 48.7, "no_target_selection": 48.1, "no_adaptive_weight": 50.9,
                         "guided_sft": 49.3, "base": 42.2}
    # the text: -6.8 without proximal constraints, -4.0 without target selection, -3.4 without KL clipping, 2.8 over SFT
    below = {k: round(PUBLISHED["sgpo"] - v, 1) for k, v in PUBLISHED.items()}
    assert (below["no_proximal"], below["no_target_selection"], below["no_kl_clip"]) == (6.8, 4.0, 3.4)
    assert (below["guided_sft"], below["base"], below["sft_grpo"]) == (2.8, 9.9, 2.2)


def test_published_differences_stand_beside_the_right_parts(told):
    rows = told[1]
    known = rows.dropna(subset=["published"]).set_index(["claim", "part"])["published"].round(1).to_dict()
    assert known == {
        (1, "SGPO − SFT+GRPO (12 samples)"): 2.2, (3, "SGPO − GRPO (8 samples)"): 2.2,
        (3, "SGPO − w/o autonomous GRPO"): 3.5, (3, "SGPO − w/o proximal constraints"): 6.8,
        (3, "SGPO − w/o KL clipping"): 3.4, (3, "SGPO − w/o target selection"): 4.0, (3, "SGPO − alpha = 1"): 1.2,
        (10, "SGPO − alpha = 1"): 1.2, (8, "SGPO − direct SFT on o+"): 2.8,
        (2, "gain of SGPO on tiny − gain on tiny-s"): 3.2}  # section 5.1: 9.9 points on 7B, 6.7 on 1.5B
    assert set(rows.loc[rows["published"].notna(), "measure"]) == {SEEN}


def test_every_part_is_turned_as_its_claim_expects(told):
    sign, rows = told
    word = {1: HOLDS, -1: FAILS, 0: OPEN}
    assert set(rows["claim"]) == set(CLAIMS) == set(range(1, 13))
    for row in rows.itertuples():
        expected = word[-sign if row.measure == UNSEEN else sign]
        assert row.verdict == expected, (row.claim, row.part, row.measure, row.difference, row.low, row.high)
        assert row.seeds == 3
    counted = rows[rows["counted"]].groupby("claim").size().to_dict()
    # unseen families double 1, 3, 8, 9 and 10; 8 has the AUC and two falls; 4: four curves; 5: two; 6: two, since
    # the traces of the testbed have one length; 12: three guided pass rates, two accuracies at each
    # temperature, three on unseen families
    assert counted == {1: 8, 2: 1, 3: 12, 4: 4, 5: 2, 6: 2, 7: 1, 8: 5, 9: 2, 10: 4, 11: 1, 12: 10}
    assert (rows[rows["claim"] == 4]["part"].tolist()) == [
        "w/o autonomous GRPO − GRPO (8 samples)", "SGPO − w/o autonomous GRPO", "SGPO − w/o autonomous GRPO",
        "SGPO − w/o proximal constraints"]


def test_differences_by_hand(told):
    """Of the studies with an effect: 0.1, 0.125 and 0.1 by seed; the mean is 0.325 / 3."""
    sign, rows = told
    if not sign:
        return
    e = sign * 0.325 / 3
    found = {(r.claim, r.measure, r.counted): r.difference for r in rows.itertuples()}
    expected = {
        (1, SEEN, True): e, (1, UNSEEN, True): -e, (1, "mean accuracy while training", False): e, (2, SEEN, True): e,
        (4, "pass rate, first quarter of the steps", True): e, (4, "pass rate, last quarter", True): e,
        (4, "entropy, last quarter (nats)", True): e, (5, "pass rate, first half of the steps", True): e,
        (5, "mean accuracy while training", True): e, (6, "entropy, all steps (nats)", True): 7 * e / 4,
        (6, "response length, first half (tokens)", False): e, (6, "pass rate, first half", True): e,
        (7, "mean alpha(q)", True): e, (9, SEEN, True): e, (10, SEEN, True): e, (11, "mean alpha(q)", True): e,
        (12, "guided pass rate, last quarter", True): e, (12, SEEN, True): e, (12, UNSEEN, True): -e,
        (8, "nats per token", True): float(sign), (8, "AUC", True): sign * 0.8}
    # SFT losses (sign 1) 3.9, 2.9, 1.9 against 4.1, 3.1, 2.1, 5, 5: 3 of 15 pairs, an AUC of .2; the KL's is 1
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    bad = rows[(rows["claim"] == 11) & ~rows["counted"] & (rows["measure"] == SEEN)].set_index("part")["difference"]
    assert bad.to_dict() == pytest.approx({
        "wrong strategies for 50% of the problems: SGPO with them − GRPO (8 samples)": 2 * e,
        "wrong strategies for 50% of the problems: SGPO with them − SGPO without": e})


def test_verdict_per_claim(told):
    sign, rows = told
    table = verdicts(rows).set_index("claim")
    word = {1: HOLDS, -1: FAILS, 0: OPEN}
    assert list(table.index) == list(CLAIMS) and set(table["verdict"]) == {word[sign]}
    elsewhere = table["on unseen families"].dropna()
    assert list(elsewhere.index) == [1, 3, 8, 9, 10, 12] and set(elsewhere) == {word[-sign]}
    assert table.loc[3, "parts"] == f"6 {word[sign]}" and table.loc[4, "parts"] == f"4 {word[sign]}"


def test_verdict_of_an_interval():
    nan = math.nan
    cases = {(0.01, 0.2): HOLDS, (-0.2, -0.01): FAILS, (-0.1, 0.1): OPEN, (0.0, 0.2): OPEN, (-0.2, 0.0): OPEN,
             (nan, nan): UNSURE}
    assert {ends: verdict(*ends) for ends in cases} == cases


def rows_of(*words: str, claim: int = 3, counted: bool = True) -> pd.DataFrame:
    return pd.DataFrame([(claim, SEEN, counted, w) for w in words], columns=["claim", "measure", "counted", "verdict"])


@pytest.mark.parametrize(("words", "together", "parts"), [
    ((HOLDS, HOLDS), HOLDS, "2 holds"), ((HOLDS, OPEN), OPEN, "1 holds, 1 cannot tell"),
    ((HOLDS, OPEN, FAILS), FAILS, "1 holds, 1 does not hold, 1 cannot tell"),
    ((HOLDS, UNSURE), OPEN, "1 holds, 1 no interval"), ((HOLDS, NONE), OPEN, "1 holds, 1 no runs"),
    ((UNSURE,), OPEN, "1 no interval"), ((), NONE, "none")])
def test_parts_together(words, together, parts):
    rows = pd.concat([rows_of(*words), rows_of(FAILS, counted=False), rows_of(FAILS, claim=1)])
    row = verdicts(rows).set_index("claim").loc[3]
    assert (row["verdict"], row["parts"]) == (together, parts) and row["on unseen families"] is None


def test_a_claim_about_all_needs_all(tmp_path):
    """One ablation of six, and one seed of another: no verdict about every ablation. Claims without runs have none."""
    runs = [made_up(tmp_path, "sgpo", s, [0.9, 0.8]) for s in (0, 1)]
    runs += [made_up(tmp_path, "no_grpo", s, [0.5, 0.4]) for s in (0, 1)]
    runs.append(made_up(tmp_path, "no_kl_clip", 0, [0.1, 0.1]))
    rows = evidence(Study(runs), pd.DataFrame())
    table = verdicts(rows).set_index("claim")
    assert (table.loc[3, "verdict"], table.loc[3, "parts"]) == (OPEN, "1 holds, 1 no interval, 4 no runs")
    assert table.drop(index=3)["verdict"].eq(NONE).all() and table["on unseen families"].isna().all()
    assert set(rows["claim"]) == {3} and not (rows["measure"] == UNSEEN).any()
    nothing = evidence(Study(runs[:2]))
    assert nothing.empty and verdicts(nothing)["verdict"].eq(NONE).all()


def test_seeds_without_the_number_do_not_count(tmp_path):
    runs = [made_up(tmp_path, "sgpo", s, [0.5], steps=8,
                    rows=train_rows(alpha=[0.9 - s / 10, 0, 0, 0.2]) if s < 2 else ()) for s in range(4)]
    runs += [made_up(tmp_path, "sgpo", s, [0.5], steps=8, rows=[
        {"kind": "train", "step": 1, "alpha_good": 0.6, "alpha_bad": 0.5}] if s else (), **BAD) for s in range(3)]
    rows = evidence(Study(runs)).set_index("claim")
    assert rows.loc[7, "seeds"] == 2 and rows.loc[7, "difference"] == pytest.approx(0.65)
    alone = rows[rows["counted"]].loc[11]
    assert alone["seeds"] == 2 and alone["difference"] == pytest.approx(0.1)


def competence_study(root: Path, offset: int = 0) -> Study:
    """Gains on the main base .5, .3, .1 (seeds 0, 1, 2), on the other .2, .1, .3 for its seeds `offset`, ..."""
    runs = [made_up(root, "hpt", 0, [0.5, 0.5])]
    for i, (here, there) in enumerate(zip((0.5, 0.3, 0.1), (0.2, 0.1, 0.3), strict=True)):
        runs += [made_up(root, "base", i, [0.1, 0.2]), made_up(root, "sgpo", i, [0.1 + here, 0.2 + here]),
                 made_up(root, "base", i + offset, [0.3, 0.2], source="tiny-l"),
                 made_up(root, "sgpo", i + offset, [0.3 + there, 0.2 + there], source="tiny-l"),
                 # the same base and problems, sampled otherwise: no other base
                 made_up(root, "base", i, [0.9, 0.9], source="tiny-l", test_k=2),
                 made_up(root, "sgpo", i, [0.0, 0.0], source="tiny-l", test_k=2),
                 made_up(root, "base", i, [0.9, 0.9], source="tiny-s", problem_args={"level": "easy"}),
                 made_up(root, "sgpo", i, [0.0, 0.0], source="tiny-s", problem_args={"level": "easy"})]
    return Study(runs)


def test_competence_is_skill_and_gains_are_paired(tmp_path, monkeypatch):
    study = competence_study(tmp_path)
    by_accuracy = evidence(study).set_index("claim").loc[[2]]
    assert list(by_accuracy["part"]) == ["gain of SGPO on tiny-l − gain on tiny"], "without skill: the base's accuracy"
    # .2 - .5, .1 - .3, .3 - .1: mean -.1
    assert by_accuracy["difference"].iloc[0] == pytest.approx(-0.1) and by_accuracy["seeds"].iloc[0] == 3
    skill = {"tiny": 0.9, "tiny-l": 0.8, "tiny-s": 0.7}
    monkeypatch.setattr(claims, "skill", lambda run: skill[run.config.model.source])
    by_skill = evidence(study).set_index("claim").loc[2]
    assert by_skill["part"] == "gain of SGPO on tiny − gain on tiny-l" and by_skill["difference"] == pytest.approx(0.1)
    gains = np.array([[0.3, 0.3], [0.2, 0.2], [-0.2, -0.2]])
    assert (by_skill["low"], by_skill["high"]) == pytest.approx(bootstrap_interval(gains)[1:])
    assert by_skill["published"] == pytest.approx(9.9 - 6.7)


def test_gains_are_of_the_same_seeds(tmp_path):
    """Seeds 1 and 2 here, 0 and 1 of the other's list there: .2 - .3 and .1 - .1 ."""
    row = evidence(competence_study(tmp_path, offset=1)).set_index("claim").loc[2]
    assert row["seeds"] == 2 and row["difference"] == pytest.approx(-0.05)


def test_tokens_of_one_problem_are_one_value():
    """p0 has three responses for the claim, p1 one against it: (.8 - .8) / 2, over two problems."""
    one, two = tokens(1), tokens(-1)
    frame = pd.concat([*(one[one["response"] == 0].assign(response=i) for i in range(3)),
                       two[two["response"] == 1].assign(response=3)])
    none = frame[frame["response"] == 3].assign(response=4, problem="p2", critical=False, stage=0)
    study = type("S", (), {"main": "tiny"})()
    auc, first, second = claims._pointing(study, pd.concat([frame, none]))
    assert auc.told[0] == pytest.approx(0) and auc.told[3] == 2, "no critical word, no AUC"
    assert first.told[0] == pytest.approx(0) and first.told[3] == second.told[3] == 2
    assert [p.text for p in (first, second)] == [f"SFT loss of reasoning step {a} − of step {a + 1}" for a in (1, 2)]
    elsewhere = claims._pointing(study, tokens(1, "tiny easy"))
    assert [p.counted for p in elsewhere] == [False] * 3 and elsewhere[0].where == "tiny easy" and auc.counted

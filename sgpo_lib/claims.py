"""The paper's claims as differences with intervals: evidence(study) -> one row per part of a claim, with its verdict.

A part says "`ours` is above `theirs` in some measure"; the difference is always oriented so that the claim expects it
above 0. `holds`: the whole 95% interval lies above 0; `does not hold`: it lies below; `cannot tell`: it holds 0;
`no interval`: one seed; `no runs`: none. A claim holds where all its counted parts do, and does not where one of them
does not; where a part has no interval or no runs, it cannot be told. Of 40 intervals of 95% without any effect behind
them, two are expected to miss 0.

The published numbers are of arXiv 2606.24064: averages of four benchmarks in points, Qwen2.5-7B-Instruct where no
other model is named; None where the paper gives no number (or none that its text version shows).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pandas as pd

from sgpo_lib.analysis import rank_auc
from sgpo_lib.comparison import bootstrap_interval, mean_metric, score_differences
from sgpo_lib.config import ModelConfig
from sgpo_lib.figures import mean_interval, method_style
from sgpo_lib.frames import world
from sgpo_lib.runs import Run
from sgpo_lib.study import Study, Told, choice, final_accuracy, skill, speed

PUBLISHED: dict[str, float] = {
    "base": 42.2, "sgpo": 52.1, "sft_grpo": 49.9, "no_distillation": 49.9, "no_grpo": 48.6, "no_proximal": 45.3,
    "no_kl_clip": 48.7, "no_target_selection": 48.1, "no_adaptive_weight": 50.9, "guided_sft": 49.3,
}
"""Table 2, section 5.1 and 5.3.2. "Without distillation" is said to reduce to SFT+GRPO."""
CLAIMS = {
    1: "SGPO ends above every baseline",
    2: "The gain over the base grows with the base's competence",
    3: "Every ablation of Table 2 ends below SGPO",
    4: "Without GRPO: fast start, then falling entropy and stagnation. Without proximal constraints: entropy collapse",
    5: "Adaptive weighting reaches the same reward in fewer steps than alpha = 1",
    6: "Against SFT+GRPO: entropy stays higher, length and reward rise faster",
    7: "Mean alpha falls as the policy learns",
    8: "Forward KL beats direct SFT on the same responses; it points at strategic tokens better than the SFT "
       "loss, which falls from step to step",
    9: "Forward KL beats reverse KL",
    10: "The pass-rate weight beats a fixed and a group-advantage weight",
    11: "Bad strategies get a low alpha by themselves",
    12: "Ours, not the paper's: a frozen guided side keeps p_guide up and mends the variants that collapse",
}
SEEN, UNSEEN = "test accuracy", "accuracy on unseen families"
HOLDS, FAILS, OPEN, UNSURE, NONE = "holds", "does not hold", "cannot tell", "no interval", "no runs"
TABLE_2 = ("grpo8", "no_grpo", "no_proximal", "no_kl_clip", "no_target_selection", "no_adaptive_weight")
"""Variants of Table 2; `grpo8` is "without strategy distillation" (the same objective as `no_distillation`)."""
BASELINES = ("sft", "sft_grpo", "hpt", "luffy")


@dataclass(frozen=True)
class Part:
    """One comparison that a claim rests on."""

    claim: int
    text: str
    """What is expected to lie above 0."""
    measure: str
    """What the difference is taken of, with its unit."""
    told: Told
    published: float | None = None
    """The paper's difference in points, where it gives one."""
    counted: bool = True
    """Whether the claim's verdict rests on it; others are shown beside."""
    where: str = ""
    """World."""


def verdict(low: float, high: float) -> str:
    """The verdict of an interval for a difference that is claimed to be above 0."""
    if math.isnan(low) or math.isnan(high):
        return UNSURE
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def evidence(study: Study, tokens: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per part of a claim for which there are runs, and per counted part without runs where others have some.

    `tokens`: `study.base_tokens`, for claim 8; `seeds` counts problems there. Columns claim, part, measure, where,
    difference, low, high, seeds, published, counted, verdict. Accuracies are shares, not points.
    """
    parts = [p for make in _PARTS for p in make(study)] + _pointing(study, tokens)
    there = {(p.claim, p.measure == UNSEEN) for p in parts if p.told[3]}
    rows = [(p.claim, p.text, p.measure, p.where or study.main, *p.told, p.published, p.counted,
             verdict(p.told[1], p.told[2]) if p.told[3] else NONE)
            for p in parts if p.told[3] or (p.counted and (p.claim, p.measure == UNSEEN) in there)]
    frame = pd.DataFrame(rows, columns=["claim", "part", "measure", "where", "difference", "low", "high", "seeds",
                                        "published", "counted", "verdict"])
    return frame.sort_values(["claim", "counted"], ascending=[True, False], kind="stable").reset_index(drop=True)


def verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per claim: claim, statement, verdict, and its verdict on unseen families where accuracy is compared.

    `parts` tells how many counted parts have which verdict.
    """
    told = []
    for number, statement in CLAIMS.items():
        of_claim = rows[(rows["claim"] == number) & rows["counted"]]
        elsewhere = of_claim["measure"] == UNSEEN
        word, counts = _together(of_claim[~elsewhere])
        other, _ = _together(of_claim[elsewhere])
        told.append((number, statement, word, other if elsewhere.any() else None, counts))
    return pd.DataFrame(told, columns=["claim", "statement", "verdict", "on unseen families", "parts"])


def _together(part: pd.DataFrame) -> tuple[str, str]:
    counts = {word: int((part["verdict"] == word).sum()) for word in (HOLDS, FAILS, OPEN, UNSURE, NONE)}
    total = sum(counts.values())
    word = NONE if counts[NONE] == total else FAILS if counts[FAILS] else HOLDS if counts[HOLDS] == total else OPEN
    return word, ", ".join(f"{n} {w}" for w, n in counts.items() if n) or "none"


def _told(values: Iterable[float]) -> Told:
    kept = [v for v in values if not math.isnan(v)]
    return (*mean_interval(kept), len(kept))


def _name(variant: str) -> str:
    return method_style(variant)[0]


def _accuracy(study: Study, claim: int, names: tuple[str, ...]) -> list[Part]:
    """SGPO against each of `names`: both final accuracies count; speed and other worlds stand beside."""
    parts = []
    for name in names:
        text = f"SGPO − {_name(name)}"
        theirs = PUBLISHED.get("no_distillation" if name == "grpo8" else name)
        known = None if theirs is None else PUBLISHED["sgpo"] - theirs
        parts.append(Part(claim, text, SEEN, study.difference("sgpo", name), known))
        parts.append(Part(claim, text, "mean accuracy while training", study.number("sgpo", name, speed), None, False))
        parts.append(Part(claim, text, UNSEEN, study.difference("sgpo", name, "transfer")))
        parts += [Part(claim, text, SEEN, study.difference("sgpo", name, where=where), None, False, where)
                  for where in list(study.worlds)[1:]]
    return parts


def _baselines(study: Study) -> list[Part]:
    return _accuracy(study, 1, BASELINES)


def _competence(study: Study) -> list[Part]:
    """Gain over the base on one base minus the gain on a weaker one, in worlds that differ from the main one in the
    base alone. Competence is skill at the forks, elsewhere than on the testbed the base's accuracy."""
    def but_model(where: str) -> str:
        return world(replace(study.worlds[where][0].config, model=ModelConfig()))

    def competence(where: str) -> float:
        bases = study.runs("base", where).values()
        told = mean_interval(skill(r) for r in bases)[0]
        return mean_interval(final_accuracy(r) for r in bases)[0] if math.isnan(told) else told
    same = [w for w in study.worlds if but_model(w) == but_model(study.main)
            and all(r.summary.get("test") for r in study.runs("base", w).values()) and study.runs("base", w)]
    ranked = sorted(same, key=competence)
    parts = []
    for weaker, stronger in itertools.pairwise(ranked):
        for name in ("sgpo", "sft_grpo"):
            both = [study.runs(v, w) for w in (stronger, weaker) for v in (name, "base")]
            a, base_a, b, base_b = ({s: r for s, r in runs.items() if all(s in o for o in both)} for runs in both)
            told: Told = (math.nan, math.nan, math.nan, 0)
            if a:
                gain_SP = score_differences(a, base_a) - score_differences(b, base_b)
                told = (*bootstrap_interval(gain_SP), len(gain_SP))
            parts.append(Part(2, f"gain of {_name(name)} on {stronger} − gain on {weaker}", SEEN, told,
                              9.9 - 6.7 if name == "sgpo" else None, name == "sgpo", f"{stronger}; {weaker}"))
    return parts


def _ablations(study: Study) -> list[Part]:
    return _accuracy(study, 3, TABLE_2)


def _collapse(study: Study) -> list[Part]:
    def entropy_end(run: Run) -> float:
        return mean_metric(run, "entropy", first=0.75)

    def growth(run: Run) -> float:
        return mean_metric(run, "reward_autonomous", last=0.25)

    def late(run: Run) -> float:
        return mean_metric(run, "reward_autonomous", first=0.75)
    return [
        Part(4, f"{_name('no_grpo')} − {_name('grpo8')}", "pass rate, first quarter of the steps",
             study.number("no_grpo", "grpo8", growth)),
        Part(4, f"SGPO − {_name('no_grpo')}", "entropy, last quarter (nats)",
             study.number("sgpo", "no_grpo", entropy_end)),
        Part(4, f"SGPO − {_name('no_grpo')}", "pass rate, last quarter", study.number("sgpo", "no_grpo", late)),
        Part(4, f"SGPO − {_name('no_proximal')}", "entropy, last quarter (nats)",
             study.number("sgpo", "no_proximal", entropy_end)),
    ]


def _early(metric: str) -> Callable[[Run], float]:
    return lambda run: mean_metric(run, metric, last=0.5)


def _adaptive(study: Study) -> list[Part]:
    name = "no_adaptive_weight"
    return [Part(5, f"SGPO − {_name(name)}", "pass rate, first half of the steps",
                 study.number("sgpo", name, _early("reward_autonomous"))),
            Part(5, f"SGPO − {_name(name)}", "mean accuracy while training", study.number("sgpo", name, speed))]


def _dynamics(study: Study) -> list[Part]:
    text, other = f"SGPO − {_name('sft_grpo')}", "sft_grpo"
    told = []
    for where in study.worlds:
        counted = where == study.main
        fixed = study.worlds[where][0].config.data.problems == "testbed"  # its traces have one length
        told += [
            Part(6, text, "entropy, all steps (nats)", study.number("sgpo", other, lambda r: mean_metric(r, "entropy"),
                                                                  where), None, counted, where),
            Part(6, text, "response length, first half (tokens)",
                 study.number("sgpo", other, _early("response_length"), where), None, counted and not fixed, where),
            Part(6, text, "pass rate, first half",
                 study.number("sgpo", other, _early("reward_autonomous"), where), None, counted, where)]
    return told


def _alpha(study: Study) -> list[Part]:
    parts = []
    for where in study.worlds:
        runs = study.runs("sgpo", where).values()
        falls = [mean_metric(r, "alpha", last=0.25) - mean_metric(r, "alpha", first=0.75) for r in runs]
        parts.append(Part(7, "alpha, first quarter − last quarter", "mean alpha(q)", _told(falls), None,
                          where == study.main, where))
    return parts


def _against_sft(study: Study) -> list[Part]:
    return _accuracy(study, 8, ("guided_sft",))


def _pointing(study: Study, tokens: pd.DataFrame | None) -> list[Part]:
    """AUC of the KL minus AUC of the SFT loss at finding the strategy's words, and the SFT loss's fall from one
    reasoning step to the next. Per response, then per problem: a problem's responses are not independent."""
    text = "AUC of KL − AUC of the SFT loss, at finding the strategy's words"
    if tokens is None or tokens.empty:
        return [Part(8, text, "AUC", (math.nan, math.nan, math.nan, 0))]
    parts = []
    for where, frame in tokens.groupby("where", sort=False):
        counted = where == study.main
        auc: dict[str, list[float]] = {}
        for (problem, _), told in frame.groupby(["problem", "response"]):
            critical = told["critical"].tolist()
            auc.setdefault(str(problem), []).append(
                rank_auc(told["kl"].tolist(), critical) - rank_auc(told["sft_loss"].tolist(), critical))
        parts.append(Part(8, text, "AUC", _told(mean_interval(v)[0] for v in auc.values()), None, counted, str(where)))
        by_stage = frame.groupby(["stage", "problem", "response"])["sft_loss"].mean()
        stages = [int(v) for v in sorted(set(frame["stage"])) if v > 0]
        for before, after in itertools.pairwise(stages):
            falls = (by_stage[before] - by_stage[after]).dropna().groupby("problem").mean()
            parts.append(Part(8, f"SFT loss of reasoning step {before} − of step {after}", "nats per token",
                              _told(falls), None, counted, str(where)))
    return parts


def _direction(study: Study) -> list[Part]:
    return _accuracy(study, 9, ("reverse_kl",))


def _weights(study: Study) -> list[Part]:
    return _accuracy(study, 10, ("no_adaptive_weight", "group_advantage_weight"))


def _bad(study: Study) -> list[Part]:
    """Spoiled against intact strategies of the same runs, and what spoiling costs."""
    parts = []
    for name in [v for v in study.variants() if v.startswith("sgpo bad_strategies=")]:
        kind, share = (word.split("=")[1] for word in name.split()[1:3])
        runs = study.runs(name).values()
        gaps = [mean_interval(row["alpha_good"] - row["alpha_bad"] for row in r.metrics("train")
                              if {"alpha_good", "alpha_bad"} <= set(row))[0] for r in runs]  # alpha falls: same steps
        label = f"{kind} strategies for {float(share):.0%} of the problems"
        parts += [Part(11, f"{label}: alpha of the others − alpha of these", "mean alpha(q)", _told(gaps)),
                  Part(11, f"{label}: SGPO with them − GRPO (8 samples)", SEEN,
                       study.difference(name, "grpo8"), None, False),
                  Part(11, f"{label}: SGPO with them − SGPO without", SEEN,
                       study.difference(name, "sgpo"), None, False),
                  Part(11, f"{label}: SGPO with them − SGPO without", "mean accuracy while training",
                       study.number(name, "sgpo", speed), None, False)]
    return parts


def _frozen(study: Study) -> list[Part]:
    """The live guided side (Eq. 3) against one that stays as training began. Training samples at another temperature
    than the tests, so that a collapse has to be mended at both."""
    def late(run: Run) -> float:
        return mean_metric(run, "reward_guided", first=0.75)

    def unguided(run: Run) -> float:
        return mean_metric(run, "reward_autonomous", first=0.75)
    parts = []
    for name in ("sgpo", "no_grpo", "no_adaptive_weight"):
        frozen, text = f"{name} guided_side=frozen", f"{_name(name)}: frozen − live guided side"
        parts += [Part(12, text, "guided pass rate, last quarter", study.number(frozen, name, late)),
                  Part(12, text, "skill on test problems", study.number(frozen, name, skill), None, False),
                  Part(12, text, "choice on test problems", study.number(frozen, name, choice), None, False),
                  Part(12, text, SEEN, study.difference(frozen, name), None, name != "sgpo"),
                  Part(12, text, "pass rate in training, last quarter", study.number(frozen, name, unguided), None,
                       name != "sgpo"),
                  Part(12, text, UNSEEN, study.difference(frozen, name, "transfer"))]
        for where in list(study.worlds)[1:]:
            parts += [Part(12, text, SEEN, study.difference(frozen, name, where=where), None, False, where),
                      Part(12, text, "skill on test problems", study.number(frozen, name, skill, where), None, False,
                           where)]
    return parts


_PARTS = (_baselines, _competence, _ablations, _collapse, _adaptive, _dynamics, _alpha, _against_sft, _direction,
          _weights, _bad, _frozen)

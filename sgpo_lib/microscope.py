"""A problem's judged responses, and one response over training, as panes of the KL microscope (widgets/token_kl)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sgpo_lib.analysis import token_readings
from sgpo_lib.losses.distillation import most_reachable
from sgpo_lib.policy import Policy
from sgpo_lib.readings import TokenReadings
from sgpo_lib.records import Problem, Rollout, RolloutGroup
from sgpo_lib.widgets.token_kl import Pane


def group_panes(policy: Policy, group: RolloutGroup, *, top: int = 5, chunk: int = 256) -> list[Pane]:
    """One pane per response of both groups: the reachable target o+ (Eq. 4) first, then guided ones, then autonomous.

    Of the guided responses the correct ones come first; `top` alternatives of both sides at each token.
    Raises ValueError where a response has not been judged, and what `token_readings` raises.
    """
    read = {id(o): token_readings(policy, group.problem, o.token_ids, top=top, chunk=chunk)
            for o in (*group.guided, *group.autonomous)}
    correct = [_correct(o) for o in group.guided]
    reach = [float(read[id(o)].table["unguided_logp"].sum()) for o in group.guided]
    target = most_reachable(reach, correct)
    order = sorted(range(len(group.guided)), key=lambda j: (j != target, not correct[j], j))
    panes = [Pane(f"guided {group.guided[j].sample + 1}", [read[id(group.guided[j])]], "guided", correct[j],
                  target=j == target) for j in order]
    return panes + [Pane(f"autonomous {o.sample + 1}", [read[id(o)]], "autonomous", _correct(o))
                    for o in group.autonomous]


def _correct(o: Rollout) -> bool:
    return o.reward is not None and o.correct  # reading a reward refuses an unjudged one


def first_correct(groups: Sequence[RolloutGroup]) -> tuple[Problem, Rollout]:
    """The first correct guided response of judged groups, and its problem. Raises ValueError where there is none."""
    for group in groups:
        for o in group.guided:
            if _correct(o):
                return group.problem, o
    count = sum(len(g.guided) for g in groups)
    raise ValueError(f"no guided response is correct, of {count} to {len(groups)} problems. Take more problems, easier "
                     "ones, or a later checkpoint")


def drain_frame(readings: Sequence[TokenReadings], delta: float = 1.0) -> pd.DataFrame:
    """One row per checkpoint of one response: label, mean forward KL, share masked by delta (Eq. 5), mean SFT loss."""
    return pd.DataFrame([{
        "label": r.label, "kl": r.table["forward_kl"].mean(), "kept_kl": r.table["forward_kl"].where(
            r.table["forward_kl"] <= delta, 0.0).mean(),
        "masked": (r.table["forward_kl"] > delta).mean(), "sft_loss": r.table["sft_loss"].mean(),
        "unguided_logp": r.table["unguided_logp"].sum()} for r in readings])

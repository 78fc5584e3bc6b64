"""The KL microscope of a run's last stored responses, as one page beside a job's report.

One problem: both of its groups, the reachable target o+ (Eq. 4) first. Token ids are the ones that were sampled; they
are read again, under both prompts, by the run's final weights. Nothing but that model is held in memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo_lib.microscope import group_panes
from sgpo_lib.pages import KL_PAGE
from sgpo_lib.policy import Policy
from sgpo_lib.policy_sources import open_policy
from sgpo_lib.problems import load
from sgpo_lib.prompts import prompt_ids
from sgpo_lib.records import Problem, Rollout, RolloutGroup, Verdict
from sgpo_lib.runs import Run
from sgpo_lib.storage import read_jsonl
from sgpo_lib.widgets.token_kl import TokenKL

MOST_TOKENS = 12_000
"""Response tokens of a page at most (the first response is always shown): about 2 MB."""


def kl_microscope(run: Run, policy: Policy | None = None, *, most_tokens: int = MOST_TOKENS) -> TokenKL | str:
    """The microscope for one problem of the run's last stored rollouts, also written as a page into the job's folder
    (in JupyterLab the run's); where there is nothing to read, a line that says why.

    `policy`: the run's model, where it is loaded already. Raises ValueError where the run has no weights yet.
    """
    files = sorted((run.folder / "rollouts").glob("step-*.jsonl"))
    if not files:
        return f"{run.folder.name} has no stored responses (supervised runs sample none): no token KL to show"
    problems = {p.id: p for p in load(run.config.data).train}
    groups = stored_groups(read_jsonl(files[-1], {"problem": str, "tokens": list}), problems)
    if not groups:
        return f"{run.folder.name}: no problem of {files[-1].name} has a strategy: no token KL to show"
    policy, chosen = policy or open_policy(str(run.folder)), run.config
    group = max(groups, key=worth)
    longest = max(len(prompt_ids(policy.tokenizer, group.problem, guided=guided)) for guided in (True, False))
    group = shortened(group, most_tokens, policy.context - longest)
    if not group.responses:
        return f"{run.folder.name}: no response of {group.problem.id} fits into the context under both prompts"
    microscope = TokenKL(group_panes(policy, group, chunk=chosen.train.kl_chunk_tokens), delta=chosen.method.kl_delta,
                         title=f"{group.problem.id}, responses of step {int(files[-1].stem.removeprefix('step-'))}")
    microscope.to_html(Path(os.environ.get("SGPO_JOB") or run.folder) / KL_PAGE)
    return microscope


def stored_groups(rows: Sequence[dict[str, Any]], problems: dict[str, Problem]) -> list[RolloutGroup]:
    """The groups of stored rollouts whose problem has a strategy. An expert's solution was not sampled: left out."""
    groups: dict[str, RolloutGroup] = {}
    for row in rows:
        problem = problems.get(row["problem"])
        if problem is None or problem.strategy is None or row.get("expert") or not row["tokens"]:
            continue
        group = groups.setdefault(problem.id, RolloutGroup(problem, [], []))
        verdict = Verdict(row["status"], row["reward"], row.get("reason", "")) if row["status"] else None
        (group.guided if row["guided"] else group.autonomous).append(Rollout(
            problem.id, row["guided"], row["sample"], (), tuple(row["tokens"]), row["text"], row["stop"],
            verdict=verdict))
    return list(groups.values())


def worth(group: RolloutGroup) -> tuple[bool, float, float]:
    """How much there is to see: a target first, then what guidance adds, then how often it succeeds."""
    alone = group.p_auto if group.autonomous else 0.0
    return any(o.correct for o in group.guided), group.p_guide - alone, group.p_guide


def shortened(group: RolloutGroup, most_tokens: int, longest: int) -> RolloutGroup:
    """The group with as many responses as fit: guided and autonomous in turn, of each the correct ones first.

    None has more than `longest` tokens: unguided responses were sampled under the shorter prompt.
    """
    sides = [sorted((o for o in side if len(o.token_ids) <= longest), key=lambda o: not o.correct)
             for side in (group.guided, group.autonomous)]
    kept: list[list[Rollout]] = [[], []]
    room = most_tokens
    for turn in range(max(map(len, sides))):
        for side, chosen in zip(sides, kept, strict=True):
            if turn < len(side) and (len(side[turn].token_ids) <= room or not (kept[0] or kept[1])):
                chosen.append(side[turn])
                room -= len(side[turn].token_ids)
    return RolloutGroup(group.problem, sorted(kept[1], key=lambda o: o.sample), sorted(kept[0], key=lambda o: o.sample))

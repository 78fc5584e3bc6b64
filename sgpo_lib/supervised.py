"""Supervised warm-up on expert solutions: cross-entropy on response tokens only, best checkpoint by loss on a random
one-tenth split (paper, section 4.4 and appendix E).
"""

from __future__ import annotations

import collections
import random
from collections.abc import Sequence
from typing import Any

import torch

from sgpo_lib.batching import Row
from sgpo_lib.guards import LOGP, LOSS
from sgpo_lib.losses.imitation import sft_loss
from sgpo_lib.problems import require_solutions, require_strategies
from sgpo_lib.prompts import expert_text, prompt_ids, response_ids
from sgpo_lib.records import Problem, Rollout
from sgpo_lib.session import Session


def expert_rows(session: Session) -> tuple[list[Rollout], list[Rollout]]:
    """(training, validation) solutions of the warm-up problems; one in ten validates, at least one, chosen by seed.

    Uses the warm-up share of the data, or all training problems where there is no such share; a share
    `guided_share` of the prompts holds the strategy. Raises ValueError for problems without an expert solution (or
    strategy, where one is shown), and for fewer than two problems.
    """
    problems = list(session.splits.warmup or session.splits.train)
    require_solutions(problems, session.splits.source)
    if len(problems) < 2:
        raise ValueError(f"supervised warm-up has {len(problems)} problem(s); it needs at least 2, one to validate")
    tokenizer = session.policy.tokenizer
    share = session.config.method.guided_share
    if share:
        require_strategies(problems, session.splits.source)
    chance = random.Random(f"sft-guided-{session.config.seed}")
    rows = []
    for problem in problems:
        guided, text = chance.random() < share, expert_text(problem)
        row = prompt_ids(tokenizer, problem, guided=guided), response_ids(tokenizer, text)
        require_room(problem, row, session.policy.context)
        rows.append(Rollout(problem.id, guided, 0, *row, text, "written"))
    order = list(range(len(rows)))
    random.Random(f"sft-validation-{session.config.seed}").shuffle(order)
    held = max(1, len(rows) // 10)
    return [rows[i] for i in sorted(order[held:])], [rows[i] for i in sorted(order[:held])]


def require_room(problem: Problem, row: Row, context: int) -> None:
    """Raises ValueError where prompt and expert solution are longer than the context (in tokens)."""
    used = len(row[0]) + len(row[1])
    if used > context:
        raise ValueError(f"problem {problem.id}: prompt and solution have {used} tokens, the context is {context}. "
                         "Shorten the solution or leave the problem out")


def supervised_step(session: Session, step: int, rows: Sequence[Rollout]) -> dict[str, Any]:
    """One update on one batch: token mean over the batch's response tokens."""
    batch = session.batch_of(rows, step)
    with session.phase("expert"):
        nll, tokens = _accumulate(session, batch, backward=True)
    norm = session.update(step)
    return {"loss": nll / tokens, "grad_norm": norm, "lr": session.learning_rate(step), "tokens": tokens}


@torch.no_grad()
def validation_loss(session: Session, rows: Sequence[Rollout]) -> float:
    """Cross-entropy in nats per response token. Raises FloatingPointError where it is not finite."""
    nll, tokens = _accumulate(session, rows, backward=False)
    session.guard.stop(session.step)
    return nll / tokens


def _accumulate(session: Session, solutions: Sequence[Rollout], *, backward: bool) -> tuple[float, int]:
    """(sum of the cross-entropy in nats, response tokens) over the solutions that all workers share."""
    tokens = sum(len(o.token_ids) for o in solutions)
    mine = session.world.share(solutions)
    rows: list[Row] = [(o.prompt_ids, o.token_ids) for o in mine]
    sums: collections.Counter = collections.Counter()
    for part in session.micro_batches(rows, learns=backward):
        batch = session.policy.token_batch([rows[i] for i in part], session.config.train.layout)
        logp_N, _ = session.logp_and_entropy(batch)
        output = sft_loss(logp_N, torch.full_like(logp_N, 1 / tokens))
        session.guard.note("expert solutions" if backward else "validation", [mine[i] for i in part], batch.length_B,
                           {LOGP: logp_N, LOSS: output.loss})
        sums.update(output.metrics)
        if backward:
            session.backward(output.loss)
    return session.world.added(sums)["nll_sum"], tokens

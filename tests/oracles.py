"""Slow float64 oracles of the paper's equations (arXiv 2606.24064, sections 3.2-3.5): loops over plain numbers.

Written from the equations, one function per equation, and importing nothing of `sgpo_lib`: agreement with the
library is then evidence. Logits, log-probabilities and divergences are in nats; rows are tokens, columns vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Rows = Sequence[Sequence[float]] | np.ndarray


def log_softmax(logits: Sequence[float]) -> list[float]:
    """log pi(v) of one token's logits."""
    values = [float(x) for x in logits]
    top = max(values)
    log_norm = top + math.log(math.fsum(math.exp(x - top) for x in values))
    return [x - log_norm for x in values]


def token_logps(logits: Rows, tokens: Sequence[int]) -> list[float]:
    """log pi(o_t | ...) of every token."""
    return [log_softmax(row)[int(token)] for row, token in zip(logits, tokens, strict=True)]


def entropies(logits: Rows) -> list[float]:
    """-sum_v pi(v) log pi(v) of every token's distribution."""
    return [-math.fsum(math.exp(x) * x for x in log_softmax(row)) for row in logits]


def token_kls(guided_logits: Rows, unguided_logits: Rows) -> list[float]:
    """Eq. 3: d_t = sum_v P(v) (log P(v) - log Q(v)), P guided, Q unguided."""
    kls = []
    for guided, unguided in zip(guided_logits, unguided_logits, strict=True):
        log_p, log_q = log_softmax(guided), log_softmax(unguided)
        kls.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
    return kls


def advantages(rewards: Sequence[float], eps: float, std: str = "sample") -> list[float]:
    """A_i = (r_i - mean) / (std + eps) within a group; the divisor of the variance is G-1 (`sample`) or G."""
    size = len(rewards)
    mean = math.fsum(rewards) / size
    degrees = {"sample": size - 1, "population": size}[std]
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / degrees)
    return [(r - mean) / (spread + eps) for r in rewards]


def surrogate(logp: float, old_logp: float, advantage: float, clip_low: float, clip_high: float) -> float:
    """One token of Eq. 1: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). To be maximised."""
    rho = math.exp(logp - old_logp)
    clipped = min(max(rho, 1 - clip_low), 1 + clip_high)
    return min(rho * advantage, clipped * advantage)


def grpo_objective(logps: Sequence[Sequence[float]], old_logps: Sequence[Sequence[float]],
                   advantage: Sequence[float], clip_low: float, clip_high: float) -> float:
    """Eq. 1 for one problem: token mean within a response, then the mean over the group."""
    total = 0.0
    for new, old, a in zip(logps, old_logps, advantage, strict=True):
        tokens = [surrogate(n, o, a, clip_low, clip_high) for n, o in zip(new, old, strict=True)]
        total += math.fsum(tokens) / len(tokens)
    return total / len(advantage)


def reachable_target(unguided_logps: Sequence[Sequence[float]], correct: Sequence[bool]) -> int | None:
    """Eq. 4: the correct guided response with the largest summed unguided log-probability; None if C is empty."""
    candidates = [j for j, ok in enumerate(correct) if ok]
    if not candidates:
        return None
    return max(candidates, key=lambda j: math.fsum(unguided_logps[j]))


def clipped_kl(kls: Sequence[float], delta: float) -> float:
    """Eq. 5: 1/|o+| sum_t 1[d_t <= delta] d_t. Masked tokens stay in the divisor."""
    return math.fsum(d for d in kls if d <= delta) / len(kls)


def alpha(p_guide: float, p_auto: float, alpha_base: float, gamma: float, alpha_max: float) -> float:
    """Eq. 6."""
    raw = alpha_base * (p_guide - p_auto + gamma) / (p_auto + gamma)
    if raw < 0:
        return 0.0
    return alpha_max if raw > alpha_max else raw


def sft(logps: Sequence[Sequence[float]]) -> float:
    """Cross-entropy per response token of a whole batch."""
    flat = [x for response in logps for x in response]
    return -math.fsum(flat) / len(flat)


@dataclass
class Response:
    """One response of T tokens with the logits that predict them."""

    tokens: list[int]
    reward: float
    unguided_logits: Rows
    """T x V under pi(.|q)."""
    guided_logits: Rows | None = None
    """T x V under pi(.|q,s); None for an autonomous response."""
    old_logps: list[float] | None = None
    """log pi_old of each token; None for a guided response."""


@dataclass
class Settings:
    """Constants of Eq. 1, 5 and 6."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    eps: float = 1e-6
    delta: float = 1.0
    alpha_base: float = 0.5
    gamma: float = 0.1
    alpha_max: float = 0.8


def sgpo_loss(problems: Sequence[tuple[list[Response], list[Response]]], settings: Settings) -> float:
    """Eq. 7 and Algorithm 1, lines 5-21: mean over problems of -L_GRPO + alpha(q) L_KD^clip.

    Each problem is (autonomous group, guided group). Eq. 1 is an objective, hence its minus sign.
    """
    losses = []
    for autonomous, guided in problems:
        rewards = [o.reward for o in autonomous]
        loss = -grpo_objective([token_logps(o.unguided_logits, o.tokens) for o in autonomous],
                               [o.old_logps for o in autonomous], advantages(rewards, settings.eps),
                               settings.clip_low, settings.clip_high)
        chosen = reachable_target([token_logps(o.unguided_logits, o.tokens) for o in guided],
                                  [o.reward == 1 for o in guided])
        if chosen is not None:
            target = guided[chosen]
            weight = alpha(sum(o.reward for o in guided) / len(guided), sum(rewards) / len(rewards),
                           settings.alpha_base, settings.gamma, settings.alpha_max)
            loss += weight * clipped_kl(token_kls(target.guided_logits, target.unguided_logits), settings.delta)
        losses.append(loss)
    return math.fsum(losses) / len(losses)

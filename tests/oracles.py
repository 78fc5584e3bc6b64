"""Slow float64 oracles: loops over plain numbers, importing nothing of `sgpo_lib`, so that agreement is evidence.

Written from the paper (arXiv 2606.24064: sections 3.2-3.5, Algorithm 1, appendices F and G) and, for LUFFY and HPT,
from the project's third issue, never from the library's code. Logits, log-probabilities, entropies and divergences
are in nats; rows are tokens, columns vocabulary; P is guided, Q unguided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

Rows = Sequence[Sequence[float]] | np.ndarray

# One token's distribution ---------------------------------------------------------------------------------------------


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


def divergence(log_a: Sequence[float], log_b: Sequence[float]) -> float:
    """KL(a || b) = sum_v a(v) (log a(v) - log b(v))."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_a, log_b, strict=True))


def token_kls(guided_logits: Rows, unguided_logits: Rows) -> list[float]:
    """Eq. 3: d_t = KL(P || Q)."""
    return [divergence(log_softmax(p), log_softmax(q)) for p, q in zip(guided_logits, unguided_logits, strict=True)]


def reverse_token_kls(guided_logits: Rows, unguided_logits: Rows) -> list[float]:
    """Appendix F: KL(Q || P)."""
    return [divergence(log_softmax(q), log_softmax(p)) for p, q in zip(guided_logits, unguided_logits, strict=True)]


# Autonomous group (Eq. 1) ---------------------------------------------------------------------------------------------


def advantages(rewards: Sequence[float], eps: float, std: str = "sample") -> list[float]:
    """A_i = (r_i - mean) / (std + eps) in a group; the divisor of the variance is G-1 (`sample`) or G (`population`).

    `none`: r_i - mean.
    """
    size = len(rewards)
    mean = math.fsum(rewards) / size
    if std == "none":
        return [r - mean for r in rewards]
    degrees = {"sample": size - 1, "population": size}[std]
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / degrees)
    return [(r - mean) / (spread + eps) for r in rewards]


def surrogate(logp: float, old_logp: float, advantage: float, clip_low: float, clip_high: float) -> float:
    """One token of Eq. 1: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). To be maximised."""
    rho = math.exp(logp - old_logp)
    clipped = min(max(rho, 1 - clip_low), 1 + clip_high)
    return min(rho * advantage, clipped * advantage)


def aggregate(values: Sequence[Sequence[float]], how: str, rows: int, tokens: int, longest: int) -> float:
    """From values per response and token to a batch's mean.

    `response_mean` (Eq. 1): mean over a response's tokens, then over `rows` responses; `token_mean` (DAPO): over all
    `tokens`; `sequence_mean` (Dr. GRPO, LUFFY, HPT): sum over tokens / longest, then mean over responses.
    """
    total = 0.0
    for response in values:
        divisor = {"response_mean": rows * len(response), "token_mean": tokens, "sequence_mean": rows * longest}[how]
        total += math.fsum(response) / divisor
    return total


# Distillation (Eq. 2, 4, 5, 6, 8) -------------------------------------------------------------------------------------


def targets(selection: str, unguided_logps: Sequence[Sequence[float]], correct: Sequence[bool]) -> list[int]:
    """Guided responses to distil: o+ of Eq. 4, by summed or (`..._per_token`) mean log-probability; or all of C."""
    candidates = [j for j, ok in enumerate(correct) if ok]
    if selection == "all_correct" or not candidates:
        return candidates
    by_token = selection == "most_reachable_per_token"
    return [max(candidates, key=lambda j: math.fsum(unguided_logps[j]) / (len(unguided_logps[j]) if by_token else 1))]


def clip_kl(d: float, delta: float, how: str = "mask") -> float:
    """One token of Eq. 5, 1[d <= delta] d; or by `value`, min(d, delta)."""
    return d if d <= delta else {"mask": 0.0, "value": delta}[how]


def clipped_kl(kls: Sequence[float], delta: float, how: str = "mask") -> float:
    """Eq. 5: 1/|o+| sum_t. Clipped tokens stay in the divisor."""
    return math.fsum(clip_kl(d, delta, how) for d in kls) / len(kls)


def clip(value: float, low: float, high: float) -> float:
    """The clip() of Eq. 6 and 8."""
    return low if value < low else high if value > high else value


def alpha(p_guide: float, p_auto: float, alpha_base: float, gamma: float, alpha_max: float) -> float:
    """Eq. 6."""
    return clip(alpha_base * (p_guide - p_auto + gamma) / (p_auto + gamma), 0.0, alpha_max)


def group_alpha(autonomous_rewards: Sequence[float], target_reward: float, eps: float, std: str,
                alpha_max: float) -> float:
    """Eq. 8: o+'s normalised advantage within G = {o_1, ..., o_G1, o+}, clipped to [0, alpha_max]."""
    return clip(advantages([*autonomous_rewards, target_reward], eps, std)[-1], 0.0, alpha_max)


# Written responses ----------------------------------------------------------------------------------------------------


def shaped(logp: float, advantage: float, gamma: float) -> float:
    """LUFFY's expert token: A p / (p + gamma), p the policy's probability. To be maximised."""
    p = math.exp(logp)
    return advantage * p / (p + gamma)


def shaped_slope(logp: float, advantage: float, gamma: float) -> float:
    """Derivative of the loss, minus `shaped`, with respect to log p: -A gamma p / (p + gamma)^2."""
    p = math.exp(logp)
    return -advantage * gamma * p / (p + gamma) ** 2


def sft(logps: Sequence[Sequence[float]]) -> float:
    """Cross-entropy per response token of a whole batch."""
    flat = [x for response in logps for x in response]
    return -math.fsum(flat) / len(flat)


# A batch --------------------------------------------------------------------------------------------------------------


@dataclass
class Response:
    """One response of T tokens with the logits that predict them."""

    tokens: list[int]
    reward: float
    logits: Rows
    """T x V under pi(.|q)."""
    guided_logits: Rows | None = None
    """T x V under pi(.|q,s); None but for a guided response."""
    old_logps: list[float] | None = None
    """log pi_old of each token; None but for an autonomous response."""

    @property
    def logps(self) -> list[float]:
        return token_logps(self.logits, self.tokens)


@dataclass
class Problem:
    autonomous: list[Response]
    guided: list[Response] = field(default_factory=list)
    expert: Response | None = None


@dataclass(frozen=True)
class Settings:
    """What tells the methods apart. The defaults are SGPO's: appendix E, and eps and the sample deviation of veRL."""

    policy_gradient: bool = True
    advantage_std: str = "sample"
    advantage_eps: float = 1e-6
    clip_low: float = 0.2
    clip_high: float = 0.28
    aggregation: str = "response_mean"
    max_new_tokens: int = 48
    """The longest response, by which `sequence_mean` divides."""
    entropy_coefficient: float = 0.0
    expert: str = "none"
    """`group`: LUFFY; `fallback`: HPT."""
    shaping_gamma: float = 0.1
    expert_gate: int = 0
    expert_coefficient: float = 1.0
    distillation: str = "forward_kl"
    target_selection: str = "most_reachable"
    kl_delta: float = 1.0
    kl_clip: str = "mask"
    weighting: str = "adaptive"
    alpha_fixed: float = 1.0
    alpha_base: float = 0.5
    alpha_gamma: float = 0.1
    alpha_max: float = 0.8


_GRPO = Settings(distillation="none")
# reward minus mean, no clipping, sums over tokens divided by the longest. The scripts' entropy of 0.001 was a mean over
# 32,768 tokens beside a policy term divided by 8,192.
_REINFORCE = replace(_GRPO, advantage_std="none", clip_low=1.0, clip_high=math.inf, aggregation="sequence_mean",
                     entropy_coefficient=0.001 * 8192 / 32768)
METHODS: dict[str, Settings] = {
    "sgpo": Settings(), "sft_grpo": _GRPO, "grpo8": _GRPO, "no_distillation": _GRPO,
    "luffy": replace(_REINFORCE, expert="group"), "luffy8": replace(_REINFORCE, expert="group"),
    "hpt": replace(_REINFORCE, expert="fallback"),
    "no_grpo": Settings(policy_gradient=False),
    "no_proximal": Settings(target_selection="all_correct", kl_delta=math.inf),
    "no_kl_clip": Settings(kl_delta=math.inf),
    "no_target_selection": Settings(target_selection="all_correct"),
    "no_adaptive_weight": Settings(weighting="fixed", alpha_fixed=1.0),
    "guided_sft": Settings(distillation="cross_entropy"),
    "reverse_kl": Settings(distillation="reverse_kl"),
    "group_advantage_weight": Settings(weighting="group_advantage"),
}
"""Every RL method as the paper and the issue describe it. `sft` is `sft` above, on expert responses."""


def distillation(problem: Problem, s: Settings) -> float:
    """alpha(q) L_KD of one problem (Eq. 2 or 5, times Eq. 6, 8 or a constant); 0 where no guided response is correct.

    `cross_entropy` (Table 3) has the same targets and weight and no mask.
    """
    chosen = [problem.guided[j] for j in targets(s.target_selection, [o.logps for o in problem.guided],
                                                 [o.reward == 1 for o in problem.guided])]
    if not chosen:
        return 0.0
    own = [o.reward for o in problem.autonomous]
    if s.weighting == "group_advantage":
        weight = group_alpha(own, chosen[0].reward, s.advantage_eps, s.advantage_std, s.alpha_max)
    elif s.weighting == "fixed":
        weight = s.alpha_fixed
    else:
        p_guide = sum(o.reward for o in problem.guided) / len(problem.guided)
        weight = alpha(p_guide, sum(own) / len(own), s.alpha_base, s.alpha_gamma, s.alpha_max)
    losses = []
    for o in chosen:
        if s.distillation == "cross_entropy":
            losses.append(sft([o.logps]))
        else:
            kls = {"forward_kl": token_kls, "reverse_kl": reverse_token_kls}[s.distillation](o.guided_logits, o.logits)
            losses.append(clipped_kl(kls, s.kl_delta, s.kl_clip))
    return weight * math.fsum(losses) / len(losses)


def total_loss(problems: Sequence[Problem], s: Settings) -> float:
    """Eq. 7 and Algorithm 1, lines 5-21, or a baseline: policy term + entropy bonus + mean over problems of the rest.

    LUFFY's expert is one more row of its group. HPT's problem at or below the gate has no policy term and the expert's
    token mean instead, so that every problem weighs 1/B. The entropy bonus covers whatever is learned by these two
    terms and is weighted as the policy term.
    """
    groups = [[*q.autonomous, q.expert] if s.expert == "group" else q.autonomous for q in problems]
    rows, tokens = sum(len(g) for g in groups), sum(len(o.tokens) for g in groups for o in g)

    def mean(values: list[list[float]]) -> float:
        return aggregate(values, s.aggregation, rows, tokens, s.max_new_tokens)

    gains: list[list[float]] = []
    bonus: list[list[float]] = []
    rest = []
    for q, group in zip(problems, groups, strict=True):
        advantage = advantages([o.reward for o in group], s.advantage_eps, s.advantage_std)
        falls_back = s.expert == "fallback" and sum(o.reward == 1 for o in q.autonomous) <= s.expert_gate
        learned = [] if falls_back or not s.policy_gradient else q.autonomous
        for o, a in zip(learned, advantage, strict=False):  # LUFFY's last advantage is the expert's
            gains.append([surrogate(new, old, a, s.clip_low, s.clip_high)
                          for new, old in zip(o.logps, o.old_logps, strict=True)])
        if s.expert == "group":
            gains.append([shaped(logp, advantage[-1], s.shaping_gamma) for logp in q.expert.logps])
        with_expert = [q.expert] if s.expert == "group" or falls_back else []
        if s.entropy_coefficient:
            bonus += [entropies(o.logits) for o in [*learned, *with_expert]]
        loss = s.expert_coefficient * sft([q.expert.logps]) if falls_back else 0.0
        rest.append(loss + (distillation(q, s) if s.distillation != "none" else 0.0))
    return -mean(gains) - s.entropy_coefficient * mean(bonus) + math.fsum(rest) / len(problems)

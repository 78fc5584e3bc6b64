"""The objective of a run, field by field. `recipes.METHODS` holds the named ones; nothing here imports torch.

Symbols and equation numbers are the paper's (arXiv 2606.24064). Departures and ambiguities that a field decides:

1. Eq. 1 has one epsilon, section 4.4 gives 0.2 and 0.28: `clip_low`, `clip_high`.
2. "Unit variance" of the advantages leaves open which deviation, and the paper gives no epsilon: `advantage_std`,
   `advantage_eps` (veRL's choices are the defaults).
3. LUFFY and HPT sum over a micro-batch, so the scale of their loss depends on how a batch is cut. Here every mean is
   taken over a mini-batch by counts that are passed in (`aggregation='sequence_mean'`). Their entropy bonus of 0.001
   was a token mean over micro-batches of 32,768 tokens beside a policy term divided by 8,192: per token it weighs
   0.001 x 8192 / 32768 = 0.00025 of the policy term, and that is `entropy_coefficient` in both recipes.
4. HPT's gate is given for 8 rollouts (0 of 8; 2 of 8 for Llama); with 12 it is 0 and 3 (`expert_gate`).
"""

from __future__ import annotations

from dataclasses import dataclass

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("rl", "supervised", "none"),
    "advantage_std": ("sample", "population", "none"),
    "aggregation": ("response_mean", "token_mean", "sequence_mean"),
    "expert": ("none", "group", "fallback"),
    "distillation": ("forward_kl", "reverse_kl", "cross_entropy", "none"),
    "guided_side": ("live", "frozen", "ema"),
    "target_selection": ("most_reachable", "most_reachable_per_token", "all_correct"),
    "kl_clip": ("mask", "value"),
    "weighting": ("adaptive", "group_advantage", "fixed"),
}
"""Field -> the words that it takes."""


@dataclass(frozen=True)
class MethodConfig:
    """The objective. `recipes.METHODS` holds the named ones."""

    method: str = "sgpo"
    """Name under which the run is shown."""
    objective: str = "rl"
    """`rl` (sampled responses), `supervised` (expert solutions) or `none` (the base is only evaluated)."""
    g1: int = 8
    """G1: autonomous responses per problem."""
    g2: int = 4
    """G2: strategy-guided responses per problem; 0 samples none."""

    policy_gradient: bool = True
    """Learn from the autonomous group (Eq. 1). Off, it is still sampled: alpha and the metrics need it."""
    advantage_eps: float = 1e-6
    """Added to the group's standard deviation (veRL's value)."""
    advantage_std: str = "sample"
    """Group standard deviation: `sample` (divides by G-1, as veRL does) or `population`; `none` leaves the advantage
    at reward minus mean (Dr. GRPO, LUFFY, HPT)."""
    clip_low: float = 0.2
    """epsilon_low of Eq. 1: the ratio is clipped at 1 - clip_low; 1 does not clip below."""
    clip_high: float = 0.28
    """epsilon_high of Eq. 1 (section 4.4 of the paper): the ratio is clipped at 1 + clip_high; `inf` does not clip."""
    aggregation: str = "response_mean"
    """From tokens to a loss: `response_mean` (Eq. 1: mean over a response's tokens, then over responses),
    `token_mean` (DAPO: mean over all tokens of the mini-batch), `sequence_mean` (Dr. GRPO: sum over a response's
    tokens divided by max_new_tokens, then mean over responses)."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, whose tokens are weighted as those of the policy gradient (nats)."""

    expert: str = "none"
    """Expert solutions in the RL step: `none`; `group` (LUFFY: one joins the autonomous group); `fallback` (HPT: one
    is learned by cross-entropy instead of the group, where the group mostly fails)."""
    shaping_gamma: float = 0.1
    """LUFFY's gamma: an expert token counts p / (p + gamma), p its probability under the policy."""
    expert_gate: int = 0
    """HPT's gate: a problem with this many correct responses or fewer falls back to the expert solution."""
    expert_coefficient: float = 1.0
    """Weight of HPT's cross-entropy."""

    distillation: str = "forward_kl"
    """`forward_kl` (Eq. 3, guided to unguided), `reverse_kl` (Table 6), `cross_entropy` on the target's tokens
    (Table 3; no mask), or `none`."""
    guided_side: str = "live"
    """Weights of the guided distribution: `live` (Eq. 3: those that train), `frozen` (as training began), or `ema`."""
    ema_decay: float = 0.99
    """Decay per update of the guided side's moving average."""
    target_selection: str = "most_reachable"
    """`most_reachable` (Eq. 4), `most_reachable_per_token` (log-probability divided by length), or `all_correct`
    (Eq. 2: mean over every correct guided response)."""
    kl_delta: float = 1.0
    """delta of Eq. 5 in nats: tokens with a larger divergence are clipped. `inf` clips none."""
    kl_clip: str = "mask"
    """What clipping does to a token beyond delta: `mask` (Eq. 5: it adds nothing) or `value` (it is scaled down to
    delta, and its gradient with it)."""
    weighting: str = "adaptive"
    """alpha(q): `adaptive` (Eq. 6), `group_advantage` (Eq. 8), or `fixed`."""
    alpha_fixed: float = 1.0
    """alpha(q) under `fixed`."""
    alpha_base: float = 0.5
    """alpha_0 of Eq. 6."""
    alpha_gamma: float = 0.1
    """gamma of Eq. 6."""
    alpha_max: float = 0.8
    """alpha_max of Eq. 6 and 8."""

    guided_share: float = 0.0
    """Share of supervised examples with the strategy in the prompt (the paper: 0)."""

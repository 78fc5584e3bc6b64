"""Group-relative policy optimisation of the autonomous group (Eq. 1).

Departures and choices:
1. Eq. 1 is an objective; this is its negative.
2. The paper writes one epsilon and uses two (section 4.4): `clip_low`, `clip_high`.
3. "Unit variance" leaves open which: the group's sample standard deviation plus eps, as in veRL; both are arguments.
4. `old_logp` are the trainer's own log-probabilities at rollout time, not the sampler's: with top-p below 1 the
   sampler draws from a truncated distribution, whose log-probabilities are another quantity.
5. The log-ratio is held within 20 nats, where exp() in float32 is still finite. It matters only where the ratio is
   not clipped above (A < 0, or clip_high infinite) and exceeds e^20, where the gradient is 0 instead of unbounded.

Shapes: N response tokens, G responses of one problem's group.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sgpo_lib.losses.masked import LossOutput


def group_advantages(reward_G: Float[Tensor, " G"], eps: float, std: str = "sample") -> Float[Tensor, " G"]:
    """A_i = (r_i - mean) / (std + eps) within one group; zeros where all rewards are equal.

    `std` is `sample` (divides by G-1), `population` (by G), or `none`: A_i = r_i - mean (Dr. GRPO, LUFFY, HPT).
    Raises ValueError for fewer than two rewards.
    """
    if std not in ("sample", "population", "none"):
        raise ValueError(f"std: got {std!r}, expected 'sample', 'population' or 'none'")
    if reward_G.numel() < 2:
        raise ValueError(f"a group of {reward_G.numel()} has no relative advantage; at least 2 are needed")
    if bool((reward_G == reward_G[0]).all()):  # exactly, not up to the rounding of the mean
        return torch.zeros_like(reward_G)
    centred_G = reward_G - reward_G.mean()
    if std == "none":
        return centred_G
    return centred_G / (reward_G.std(correction=1 if std == "sample" else 0) + eps)


def grpo_loss(logp_N: Float[Tensor, " N"], old_logp_N: Float[Tensor, " N"], advantage_N: Float[Tensor, " N"],
              weight_N: Float[Tensor, " N"], clip_low: float, clip_high: float) -> LossOutput:
    """-sum_n w_n min(rho_n A_n, clip(rho_n, 1 - clip_low, 1 + clip_high) A_n), rho = exp(logp - old_logp).

    `logp_N` carries the gradient (nats); `weight_N` comes from `masked.token_weights`: 1 / (B G1 |o_i|) for the
    paper's aggregation. clip_low 1 and clip_high infinite leave -sum_n w_n rho_n A_n.
    """
    # far beyond either bound exp() would overflow, and 0 * inf in its backward pass is NaN
    ratio_N = (logp_N - old_logp_N).clamp(-20.0, 20.0).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    surrogate_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    bound_N = clipped_N * advantage_N < ratio_N * advantage_N
    return LossOutput(-(weight_N * surrogate_N).sum(),
                      {"policy_clipped_count": float(bound_N.sum()), "policy_token_count": float(logp_N.numel())})


def entropy_bonus(entropy_N: Float[Tensor, " N"], weight_N: Float[Tensor, " N"], coefficient: float) -> LossOutput:
    """-coefficient * sum_n w_n H_n, with the weights of the policy gradient (H in nats)."""
    return LossOutput(-coefficient * (weight_N * entropy_N).sum())

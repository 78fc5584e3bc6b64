"""Learning from written responses: supervised (SFT, HPT's fallback) and as part of a group (LUFFY).

Departures from the originals (LUFFY, arXiv 2504.14945; HPT, arXiv 2509.04419, and their published scripts):
1. Both divide sums over a micro-batch by the longest response, so their scale depends on how a batch is cut into
   micro-batches. Here the weights come from counts of the mini-batch: LUFFY's expert response counts as one more row
   of its group; HPT's expert response is a token mean, and a problem weighs 1/B whether it falls back or not.
2. LUFFY evaluates p with the weights that are being updated, as its code does; expert tokens have no old policy.
3. HPT takes a token mean over the expert tokens of a micro-batch and gets NaN where there are none; a sum with
   weights is 0 there.

Shapes: N response tokens.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sgpo_lib.losses.masked import LossOutput


def sft_loss(logp_N: Float[Tensor, " N"], weight_N: Float[Tensor, " N"]) -> LossOutput:
    """-sum_n w_n log pi(o_n): cross-entropy on response tokens only (nats).

    `weight_N` = 1 / (number of response tokens in the whole batch) gives the token mean.
    """
    return LossOutput(-(weight_N * logp_N).sum(),
                      {"nll_sum": -float(logp_N.detach().sum()), "nll_token_count": float(logp_N.numel())})


def luffy_loss(logp_N: Float[Tensor, " N"], advantage_N: Float[Tensor, " N"], weight_N: Float[Tensor, " N"],
               gamma: float) -> LossOutput:
    """-sum_n w_n A_n p_n / (p_n + gamma), p = exp(logp): LUFFY's shaped term of expert tokens (policy shaping).

    Its gradient with respect to log p is -w A gamma p / (p + gamma)^2: largest where p = gamma, so that unlikely
    expert tokens are learned most. Raises ValueError for gamma <= 0, which leaves no gradient.
    """
    if gamma <= 0:
        raise ValueError(f"gamma: got {gamma}, expected above 0 (p / (p + 0) is 1 and has no gradient)")
    p_N = logp_N.exp()
    return LossOutput(-(weight_N * advantage_N * p_N / (p_N + gamma)).sum(),
                      {"expert_p_sum": float(p_N.detach().sum()), "expert_token_count": float(logp_N.numel())})


def falls_back(correct: int, gate: int) -> bool:
    """HPT's switch: whether a problem's responses are dropped and its expert solution is learned instead."""
    return correct <= gate

"""Supervised learning of written responses.

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

"""Proximal strategy distillation: which guided response (Eq. 4) and which of its tokens (Eq. 5).

Choices:
1. Eq. 4 ranks by the summed, not the mean, log-probability; ties go to the first.
2. The mask of Eq. 5 carries no gradient, and masked tokens still count in the divisor |o+|.

Shapes: N tokens of the selected responses, G2 guided responses of one problem.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sgpo_lib.losses.masked import LossOutput


def most_reachable(unguided_logp_sum: Sequence[float], correct: Sequence[bool]) -> int | None:
    """Index of o+: among the correct guided responses, the one most likely under the unguided prompt (Eq. 4).

    `unguided_logp_sum[j]` = sum_t log pi(o~_j,t | q, o~_j,<t) in nats. None when none is correct (C is empty).
    """
    best: int | None = None
    for j, (logp, ok) in enumerate(zip(unguided_logp_sum, correct, strict=True)):
        if ok and (best is None or logp > unguided_logp_sum[best]):
            best = j
    return best


def clipped_kl_loss(kl_N: Float[Tensor, " N"], weight_N: Float[Tensor, " N"], delta: float) -> LossOutput:
    """sum_n w_n 1[d_n <= delta] d_n; w_n = alpha(q) / (B |o+|) gives the distillation term of Eq. 5 and 7."""
    kept_N = (kl_N.detach() <= delta).to(kl_N.dtype)
    # where(), not a product: an infinite divergence times zero would be NaN
    used_N = torch.where(kept_N > 0, kl_N, torch.zeros_like(kl_N))
    return LossOutput((weight_N * used_N).sum(),
                      {"kl_sum": float(kl_N.detach().sum()), "kl_clipped_count": float((1 - kept_N).sum()),
                       "kl_token_count": float(kl_N.numel())})

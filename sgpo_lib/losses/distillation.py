"""Proximal strategy distillation: which guided responses (Eq. 2, 4) and which of their tokens (Eq. 5).

Choices:
1. Eq. 4 ranks by the summed, not the mean, log-probability; ties go to the first. `most_reachable_per_token` ranks by
   the mean, which does not favour short responses.
2. The mask of Eq. 5 carries no gradient, and masked tokens still count in the divisor |o+|.
3. Clipping by value, min(d, delta), would have exactly the mask's gradient (a constant beyond delta has none). So
   `value` here scales a token's d by delta / sg[d]: it adds delta, and its gradient shrinks by that factor instead of
   vanishing. A token of infinite divergence adds nothing under either.

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


def select_targets(selection: str, unguided_logp_sum: Sequence[float], length: Sequence[int],
                   correct: Sequence[bool]) -> list[int]:
    """Indices of the guided responses to distil, none where none is correct.

    `selection` is `most_reachable` (Eq. 4), `most_reachable_per_token` (log-probabilities divided by `length`, in
    tokens), or `all_correct` (C of Eq. 2). Raises ValueError for another word.
    """
    if selection == "all_correct":
        return [j for j, ok in enumerate(correct) if ok]
    if selection == "most_reachable_per_token":
        unguided_logp_sum = [logp / n for logp, n in zip(unguided_logp_sum, length, strict=True)]
    elif selection != "most_reachable":
        raise ValueError(f"selection: got {selection!r}, expected 'most_reachable', 'most_reachable_per_token' or "
                         "'all_correct'")
    best = most_reachable(unguided_logp_sum, correct)
    return [] if best is None else [best]


def clipped_kl_loss(kl_N: Float[Tensor, " N"], weight_N: Float[Tensor, " N"], delta: float,
                    clip: str = "mask") -> LossOutput:
    """sum_n w_n 1[d_n <= delta] d_n; w_n = alpha(q) / (B |o+|) gives the distillation term of Eq. 5 and 7.

    `clip='value'` replaces the indicator by min(1, delta / sg[d_n]).
    """
    kept_N = kl_N.detach() <= delta
    scale_N = kept_N.to(kl_N.dtype) if clip == "mask" else torch.where(kept_N, 1.0, delta / kl_N.detach())
    # where(), not only a product: an infinite divergence times zero would be NaN
    used_N = torch.where(scale_N > 0, kl_N, torch.zeros_like(kl_N)) * scale_N
    return LossOutput((weight_N * used_N).sum(),
                      {"kl_sum": float(kl_N.detach().sum()), "kl_kept_sum": float(used_N.detach().sum()),
                       "kl_clipped_count": float((~kept_N).sum()), "kl_token_count": float(kl_N.numel())})

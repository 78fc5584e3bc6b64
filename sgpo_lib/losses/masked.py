"""Weighted sums over response tokens.

Shapes: N response tokens in row order, B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """A loss (nats, scalar) and what to log about it."""

    loss: Float[Tensor, ""]
    metrics: dict[str, float] = field(default_factory=dict)
    """Sums over tokens, not means, so that micro-batches add up; names end in `_sum` or `_count`."""


def sequence_mean_weights(length_B: Int[Tensor, " B"], row_N: Int[Tensor, " N"],
                          row_weight_B: Float[Tensor, " B"]) -> Float[Tensor, " N"]:
    """Weight of each token so that a weighted sum is `sum_b row_weight_b * mean over tokens of row b`."""
    return (row_weight_B / length_B.to(row_weight_B.dtype))[row_N]


def sum_by_row(value_N: Float[Tensor, " N"], row_N: Int[Tensor, " N"], rows: int) -> Float[Tensor, " B"]:
    """Sum of each row's tokens."""
    return torch.zeros(rows, dtype=value_N.dtype, device=value_N.device).index_add(0, row_N, value_N)

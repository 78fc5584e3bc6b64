"""Weighted sums over response tokens.

Shapes: N response tokens in row order, B rows of a micro-batch.
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


@dataclass(frozen=True)
class Counts:
    """What normalises a mini-batch, whatever the micro-batches that it is cut into."""

    rows: int
    """Responses."""
    tokens: int
    """Their tokens."""
    longest: int
    """Longest response that may be sampled, in tokens."""


def token_weights(aggregation: str, length_B: Int[Tensor, " B"], row_N: Int[Tensor, " N"],
                  counts: Counts, dtype: torch.dtype = torch.float32) -> Float[Tensor, " N"]:
    """Weight of each token so that a weighted sum over the mini-batch is its mean.

    `response_mean` (Eq. 1): 1 / (rows |o_i|). `token_mean` (DAPO): 1 / tokens. `sequence_mean` (Dr. GRPO): 1 / (rows
    longest). Raises ValueError for another word.
    """
    divisor_B = {"response_mean": counts.rows * length_B, "token_mean": torch.full_like(length_B, counts.tokens),
                 "sequence_mean": torch.full_like(length_B, counts.rows * counts.longest)}
    if aggregation not in divisor_B:
        raise ValueError(f"aggregation: got {aggregation!r}, expected one of {', '.join(divisor_B)}")
    return (1 / divisor_B[aggregation].to(dtype))[row_N]


def response_mean_weights(length_B: Int[Tensor, " B"], row_N: Int[Tensor, " N"],
                          row_weight_B: Float[Tensor, " B"]) -> Float[Tensor, " N"]:
    """Weight of each token so that a weighted sum is `sum_b row_weight_b * mean over tokens of row b`."""
    return (row_weight_B / length_B.to(row_weight_B.dtype))[row_N]


def sum_by_row(value_N: Float[Tensor, " N"], row_N: Int[Tensor, " N"], rows: int) -> Float[Tensor, " B"]:
    """Sum of each row's tokens."""
    return torch.zeros(rows, dtype=value_N.dtype, device=value_N.device).index_add(0, row_N, value_N)

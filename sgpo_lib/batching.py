"""Pad, shift and mask: the only place that shifts tokens.

A response token at position t of its sequence is predicted by the hidden state at t-1. `TokenBatch` stores, for
every response token of every row, in row order, the flat index of that state. Both prompts of a response therefore
give tensors of the same N rows in the same order, whatever the prompts' lengths.

Shape suffixes: B rows, R tensor rows (B, or 1 where packed), S padded or packed length, N response tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Row = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, response ids); the end token is part of the response."""
LAYOUTS = ("right", "left", "packed")
"""How rows share a forward pass."""


@dataclass(frozen=True)
class TokenBatch:
    """Padded or packed sequences and where their response tokens are."""

    input_ids_RS: Int[Tensor, "R S"]
    """One sequence per row, or all of them in one (R = 1) where they are packed."""
    attention_mask_RS: Int[Tensor, "R S"] | None
    """1 for tokens, 0 for padding; None where packed, since positions that start again at 0 part the sequences."""
    position_ids_RS: Int[Tensor, "R S"]
    """Position of each token within its own sequence; 0 for padding."""
    predictor_N: Int[Tensor, " N"]
    """Flat index into R*S of the state that predicts each response token."""
    target_N: Int[Tensor, " N"]
    """The response tokens themselves."""
    row_N: Int[Tensor, " N"]
    """Row of each response token."""
    length_B: Int[Tensor, " B"]
    """Response tokens of each row, the end token included."""

    @staticmethod
    def build(rows: Sequence[Row], pad_id: int, device: torch.device | str = "cpu",
              layout: str = "right") -> TokenBatch:
        """Pad rows on the `right` or `left`, or put them into one row without padding (`packed`).

        Raises ValueError for an empty prompt or response, which has nothing to predict, and for another layout.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
        if not rows:
            raise ValueError("a batch needs at least one row")
        for i, (prompt, response) in enumerate(rows):
            if not len(prompt) or not len(response):
                raise ValueError(f"row {i}: prompt of {len(prompt)} and response of {len(response)} tokens; "
                                 "both need at least one")
        packed = layout == "packed"
        width = max(len(p) + len(r) for p, r in rows)
        ids: list[int] = []
        mask: list[int] = []
        position: list[int] = []
        predictor: list[int] = []
        target: list[int] = []
        row: list[int] = []
        for i, (prompt, response) in enumerate(rows):
            used = len(prompt) + len(response)
            before = width - used if layout == "left" else 0
            after = 0 if packed else width - used - before
            start = len(ids) + before + len(prompt) - 1
            ids += [pad_id] * before + [*prompt, *response] + [pad_id] * after
            mask += [0] * before + [1] * used + [0] * after
            position += [0] * before + list(range(used)) + [0] * after
            predictor += range(start, start + len(response))
            target += response
            row += [i] * len(response)

        def put(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        shape = (1, len(ids)) if packed else (len(rows), width)
        return TokenBatch(put(ids).view(shape), None if packed else put(mask).view(shape), put(position).view(shape),
                          put(predictor), put(target), put(row), put([len(r) for _, r in rows]))

    def spread(self, value_B: Float[Tensor, " B"]) -> Float[Tensor, " N"]:
        """One value per row -> one per response token."""
        return value_B.to(self.row_N.device)[self.row_N]


def micro_batches(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Indices of rows in groups of at most `size`, of similar length so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]) + len(rows[i][1]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]

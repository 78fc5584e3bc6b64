"""Pad, shift and mask: the only place that shifts tokens.

A response token at position t of its sequence is predicted by the hidden state at t-1. `TokenBatch` stores, for
every response token of every row, in row order, the flat index of that state. Both prompts of a response therefore
give tensors of the same N rows in the same order, whatever the prompts' lengths.

Shape suffixes: B rows, R tensor rows (B, or 1 where packed or shared), S padded or packed length, N response tokens of
all rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Row = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, response ids); the end token is part of the response."""
LAYOUTS = ("right", "left", "packed", "shared")
"""How rows share a forward pass."""


@dataclass(frozen=True)
class TokenBatch:
    """Padded or packed sequences and where their response tokens are."""

    input_ids_RS: Int[Tensor, "R S"]
    """One sequence per row, or all of them in one (R = 1) where they are packed."""
    attention_mask_RS: Int[Tensor, "R S"] | None
    """1 for tokens, 0 for padding; None where packed, since positions that start again at 0 part the sequences, and
    where `sees_SS` says it."""
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
    tokens: int = 0
    """Tokens without padding; a shared prompt counts once."""
    sees_SS: Bool[Tensor, "S S"] | None = None
    """Where prompts are shared: which token (row) attends to which."""

    @staticmethod
    def build(rows: Sequence[Row], pad_id: int, device: torch.device | str = "cpu",
              layout: str = "right") -> TokenBatch:
        """Pad rows on the `right` or `left`, or put them into one row without padding: one after another (`packed`), or
        with the prompt of consecutive rows once, if it is the same, and their responses after it (`shared`).

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
        if layout == "shared":
            return _shared(rows, device)
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

        put = functools.partial(torch.tensor, dtype=torch.long, device=device)
        shape = (1, len(ids)) if packed else (len(rows), width)
        return TokenBatch(put(ids).view(shape), None if packed else put(mask).view(shape), put(position).view(shape),
                          put(predictor), put(target), put(row), put([len(r) for _, r in rows]), sum(mask))

    def spread(self, value_B: Float[Tensor, " B"]) -> Float[Tensor, " N"]:
        """One value per row -> one per response token."""
        return value_B.to(self.row_N.device)[self.row_N]


def _shared(rows: Sequence[Row], device: torch.device | str) -> TokenBatch:
    """All rows in one, each prompt once for the consecutive rows that have it.

    A token sees what comes before it in its own branch: its prompt and its response.
    """
    ids: list[int] = []
    position: list[int] = []
    predictor: list[int] = []
    prompt_of: list[int] = []
    branch: list[int] = []  # 0 for prompts
    last, start = None, 0
    for i, (prompt, response) in enumerate(rows):
        if last is None or tuple(prompt) != last:
            last, start = tuple(prompt), len(ids)
            ids += prompt
            position += range(len(prompt))
            prompt_of += [start] * len(prompt)
            branch += [0] * len(prompt)
        predictor += [start + len(prompt) - 1, *range(len(ids), len(ids) + len(response) - 1)]
        ids += response
        position += range(len(prompt), len(prompt) + len(response))
        prompt_of += [start] * len(response)
        branch += [i + 1] * len(response)
    put = functools.partial(torch.tensor, dtype=torch.long, device=device)
    prompt_S, branch_S, before_S = put(prompt_of), put(branch), torch.arange(len(ids), device=device)
    sees_SS = ((prompt_S[:, None] == prompt_S) & ((branch_S == 0) | (branch_S[:, None] == branch_S))
               & (before_S[:, None] >= before_S))
    length_B = put([len(r) for _, r in rows])
    return TokenBatch(put(ids)[None], None, put(position)[None], put(predictor), put([t for _, r in rows for t in r]),
                      torch.repeat_interleave(length_B), length_B, len(ids), sees_SS)


def micro_batches(rows: Sequence[Row], size: int, tokens: int = 0, layout: str = "right") -> Iterator[list[int]]:
    """Indices of rows in groups of at most `size` rows and, above 0, `tokens` tokens with padding.

    Rows of similar length come together so that little is padded; where prompts are shared, rows of the same prompt.
    Raises ValueError for a size below 1, and for a row that alone has more than `tokens`.
    """
    if size < 1:
        raise ValueError(f"micro_batches: got a size of {size} rows, expected at least 1")
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    if tokens and max(lengths, default=0) > tokens:
        raise ValueError(f"train.micro_batch_tokens: got {tokens}, but one prompt with its response has {max(lengths)} "
                         "tokens. Raise it to at least that, or set it to 0")
    first: dict[tuple[int, ...], int] = {}
    prompt_of = [first.setdefault(tuple(prompt), i) if layout == "shared" else 0 for i, (prompt, _) in enumerate(rows)]
    group: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (prompt_of[i], lengths[i], i)):
        if group and (len(group) == size or (tokens and _slots([rows[j] for j in (*group, i)], layout) > tokens)):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _slots(rows: Sequence[Row], layout: str) -> int:
    """Places of tokens of rows in one pass."""
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    if layout == "shared":
        again = sum(len(a) for (a, _), (b, _) in itertools.pairwise(rows) if tuple(a) == tuple(b))
        return sum(lengths) - again
    return sum(lengths) if layout == "packed" else len(rows) * max(lengths)

"""The output matrix, and logits of a few tokens at a time in memory that is used again.

Shapes: N response tokens, C tokens of a chunk, R rows of a block, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sgpo_lib.shapes import block_rows


class Head(NamedTuple):
    """From hidden states to logits: cap tanh((hidden @ matrix.T + bias) / cap), without the cap where it is 0."""

    matrix: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    softcap: float = 0.0
    """Bound of the logits' size (Gemma 2, arXiv 2408.00118, section 2); 0 for none."""

    def detach(self) -> Head:
        """The same weights without gradient."""
        return Head(self.matrix.detach(), None if self.bias is None else self.bias.detach(), self.softcap)

    def trains(self) -> bool:
        """Whether a gradient with respect to the matrix or the bias is asked for."""
        return self.matrix.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def logits(self, hidden_CH: Float[Tensor, "C H"], out: Float[Tensor, "C V"] | None = None) -> Float[Tensor, "C V"]:
        """Logits of some tokens in the hidden states' type, into `out` where it is given. Without gradient there."""
        if self.bias is None:
            logits_CV = torch.mm(hidden_CH, self.matrix.T, out=out)
        else:
            logits_CV = torch.addmm(self.bias, hidden_CH, self.matrix.T, out=out)
        return capped(logits_CV, self.softcap) if out is None else capped_(logits_CV, self.softcap)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """cap tanh(logits / cap), or the logits themselves where the cap is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def capped_(logits: Tensor, softcap: float) -> Tensor:
    """`capped` in place."""
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def chunks(hidden_NH: Tensor, head: Head, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, their logits [C, V]), chunk by chunk; the next chunk's logits take the place of the last one's.

    Raises ValueError for a chunk of no token.
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk} tokens, expected at least 1")
    total = len(hidden_NH)
    buffer_CV = hidden_NH.new_empty(min(chunk, total), len(head.matrix))
    for start in range(0, total, chunk):
        part = slice(start, min(start + chunk, total))
        yield part, head.logits(hidden_NH[part], buffer_CV[: part.stop - start])


def blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Rows of a chunk, some at a time (BLOCK)."""
    count, vocabulary = logits_CV.shape
    kind = logits_CV.device.type
    rows = block_rows(kind, vocabulary, torch.get_num_threads() if kind == "cpu" else 1)
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def exact(logits: Tensor) -> Tensor:
    """In float32 or better."""
    return logits if logits.dtype == torch.float64 else logits.float()

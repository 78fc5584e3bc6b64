"""Numbers of each token's distribution with their gradient, from hidden states and the output matrix in one pass.

A loss is any function of the per-token numbers x_n, so its gradient with respect to the hidden state of token n is
dL/dx_n times dx_n/dh_n. The second factor needs the logits, and is computed while they are there; the first comes with
the backward pass, which is then a product of N rows and N numbers. Where the output matrix trains, its gradient sums
over tokens weighted by dL/dx_n, so the backward pass computes the logits once more instead.

    matrix product of N x H x V      values   values and gradient   the matrix trains
    log-probability                     1               2                    4
    token KL (both sides)               2               3                    6

Shapes: N response tokens, C of a chunk, R of a block, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgpo_lib.losses.head import Head, blocks, chunks, exact

Weight = Tensor | float
"""Of a number of each row: [R], or one for all rows."""
Slope = Callable[[list[Weight]], Tensor]
"""Weights of the numbers that carry gradient -> gradient of the weighted sum with respect to the logits, [R, V]."""


@runtime_checkable
class Measure(Protocol):
    """What is measured of a distribution."""

    numbers: int
    """Numbers of a token."""
    carry: int
    """How many of them, from the first, carry gradient."""

    def begin(self, part: slice) -> None:
        """A chunk begins: tokens `part` of all N."""

    def rows(self, logits_RV: Tensor, part: slice, rows: slice) -> tuple[list[Tensor], Slope]:
        """(numbers [R] each, slope) of `rows` of that chunk from logits in float32 or better. The slope is asked once
        for each number that carries gradient, or once for all of them."""

    def end(self) -> None:
        """The last chunk is done: free what `begin` took."""


def fused(measure: Measure, hidden_NH: Tensor, head: Head, chunk: int) -> tuple[Tensor, ...]:
    """The measure's numbers of each token, [N] each. Raises ValueError for a chunk of no token."""
    differentiates = torch.is_grad_enabled() and measure.carry > 0
    return _Fused.apply(measure, chunk, head.softcap, differentiates, hidden_NH, head.matrix, head.bias)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, measure: Measure, chunk: int, softcap: float, differentiates: bool, hidden_NH: Tensor,
                matrix_VH: Tensor, bias_V: Tensor | None) -> tuple[Tensor, ...]:
        head = Head(matrix_VH, bias_V, softcap)
        ctx.carry, ctx.again = measure.carry, (measure, chunk, softcap) if head.trains() else None
        at_once = differentiates and hidden_NH.requires_grad and not head.trains()
        exactly = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        values = [hidden_NH.new_empty(len(hidden_NH), dtype=exactly) for _ in range(measure.numbers)]
        unit = [torch.empty_like(hidden_NH) for _ in range(measure.carry if at_once else 0)]
        each: list[list[Weight]] = [[float(j == k) for j in range(len(unit))] for k in range(len(unit))]
        other: list[Tensor] = []
        for part, logits_CV in chunks(hidden_NH, head, chunk):
            measure.begin(part)
            other = other or [torch.empty_like(logits_CV) for _ in unit[1:]]
            slopes = [logits_CV, *(t[: len(logits_CV)] for t in other)][: len(unit)]
            for rows in blocks(logits_CV):
                found = _block(measure, logits_CV, part, rows, each, slopes, softcap)
                for value, numbers in zip(values, found, strict=True):
                    value[part][rows] = numbers
            for target, state in zip(slopes, unit, strict=True):
                torch.mm(target, matrix_VH, out=state[part])
        measure.end()
        saved = (hidden_NH, matrix_VH, bias_V) if ctx.again else tuple(unit)
        ctx.save_for_backward(*(saved if differentiates else ()))
        ctx.mark_non_differentiable(*values[measure.carry :])
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Any, ...]:
        weights = given[: ctx.carry]
        if ctx.again:
            return (None, None, None, None, *_again(ctx, [*weights]))
        unit = ctx.saved_tensors
        hidden_grad = None
        if unit:
            hidden_grad = unit[0] * weights[0][:, None].to(unit[0].dtype)
            for state, weight in zip(unit[1:], weights[1:], strict=True):
                hidden_grad.addcmul_(state, weight[:, None].to(state.dtype))
        return None, None, None, None, hidden_grad, None, None


def _again(ctx: Any, weights: list[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, matrix and bias, from logits that are computed once more."""
    hidden_NH, matrix_VH, bias_V = ctx.saved_tensors
    measure, chunk, softcap = ctx.again
    wants = ctx.needs_input_grad[4:]
    hidden = torch.empty_like(hidden_NH) if wants[0] else None
    matrix = torch.zeros_like(matrix_VH) if wants[1] else None
    bias = torch.zeros_like(bias_V) if wants[2] else None
    for part, logits_CV in chunks(hidden_NH, Head(matrix_VH, bias_V, softcap), chunk):
        measure.begin(part)
        for rows in blocks(logits_CV):
            _block(measure, logits_CV, part, rows, [[w[part][rows] for w in weights]], [logits_CV], softcap)
        if hidden is not None:
            torch.mm(logits_CV, matrix_VH, out=hidden[part])
        if matrix is not None:
            matrix.addmm_(logits_CV.T, hidden_NH[part])
        if bias is not None:
            bias += logits_CV.sum(0)
    measure.end()
    return hidden, matrix, bias


def _block(measure: Measure, logits_CV: Tensor, part: slice, rows: slice, weights: list[list[Weight]],
           slopes: list[Tensor], softcap: float) -> list[Tensor]:
    """Numbers of some rows. The slopes for each of `weights` go to `slopes`, of which the first may be the logits."""
    found, slope = measure.rows(exact(logits_CV[rows]), part, rows)
    through_cap_RV = 1 - (exact(logits_CV[rows]) / softcap).square() if softcap and slopes else None
    for each, target_CV in zip(weights, slopes, strict=True):
        slope_RV = slope(each)
        target_CV[rows] = slope_RV if through_cap_RV is None else slope_RV.mul_(through_cap_RV)
    return found

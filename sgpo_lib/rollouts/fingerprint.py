"""Numbers that tell which weights a copy of the policy holds, without moving the weights.

Trainer and sampler compute them from their own copies: float64 sums over the values themselves, by layer, so that
fused and split projections, padding with zeros and another order of parameters give the same numbers. Of a matrix that
belongs to the base model every `COLUMNS`-th part of its input columns is read, of an adapter everything. An optimizer
step moves nearly every entry, so weights that are one step old, or a step applied twice, give other numbers. Values are
compared in the sampler's dtype, so nothing but the order of summation differs.

vLLM imports this file in its workers: nothing but torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

COLUMNS = 64
"""Input columns that are read of a base matrix, evenly spaced."""
TOLERANCE = 1e-13
"""Allowed difference of two sums, relative to count x root mean square: float64 rounding is some 1e-15."""

Numbers = dict[str, list[float]]
"""Part of the model -> [values that are not 0, sum, sum of squares]."""


def part_of(name: str) -> str:
    """`layer 12`, `output` for the output matrix, `rest` for embeddings and the final norm."""
    if "lm_head" in name:
        return "output"
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return f"layer {found[1]}" if found else "rest"


def columns(inputs: int) -> list[int]:
    """Which input columns of a base matrix are read."""
    return sorted({i * inputs // COLUMNS for i in range(COLUMNS)})


def read(weight: Tensor) -> Tensor:
    """What is read of a base parameter: columns of a matrix, else all."""
    return weight[:, columns(weight.shape[1])] if weight.ndim == 2 else weight


def base_numbers(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Numbers:
    """Of (parameter name, what was `read` of it), for all parameters of the base model."""
    found: Numbers = {}
    for name, values in named:
        _add(found, part_of(name), values.detach().to(dtype))
    return found


def adapter_numbers(named: Iterable[tuple[str, Tensor, Tensor]]) -> Numbers:
    """Of (module name, A, scaled B) of a LoRA adapter in the sampler's dtype."""
    found: Numbers = {}
    for name, a, b in named:
        _add(found, f"{part_of(name)} A", a.detach())
        _add(found, f"{part_of(name)} B", b.detach())
    return found


def _add(found: Numbers, part: str, values: Tensor) -> None:
    row = found.setdefault(part, [0.0, 0.0, 0.0])
    exact = values.double()
    row[0] += int(torch.count_nonzero(exact))
    row[1] += float(exact.sum())
    row[2] += float(exact.square().sum())


def differences(held: Numbers, wanted: Numbers) -> list[str]:
    """Parts whose numbers differ, with both; empty where the two copies hold the same weights."""
    told = []
    for part in sorted({*held, *wanted}, key=lambda p: [int(x) if x.isdigit() else x for x in p.split()]):
        a, b = held.get(part, [0.0] * 3), wanted.get(part, [0.0] * 3)
        size = math.sqrt(max(a[0], b[0], 1.0) * max(a[2], b[2]))
        same = a[0] == b[0] and abs(a[1] - b[1]) <= TOLERANCE * size and abs(a[2] - b[2]) <= TOLERANCE * max(a[2], b[2])
        if not same:
            told.append(f"{part}: sum {a[1]:.9g} and sum of squares {a[2]:.9g} there, {b[1]:.9g} and {b[2]:.9g} here")
    return told

"""What the loss tests share: tolerances, random cases, naive autograd, finite differences.

Shapes: N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

MODEST = settings(max_examples=25, deadline=None, derandomize=True)
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
FLOATS = [torch.float64, torch.float32]
CHUNKS = [1, 3, 5, 100]
CLIP = (0.2, 0.28)
seeds = st.integers(0, 10_000)
float_types = st.sampled_from(FLOATS)


def close(got: Tensor, expected: object, dtype: torch.dtype = torch.float64) -> None:
    """`got` in its own precision against float64."""
    assert got.dtype == dtype
    wanted = expected.detach() if isinstance(expected, Tensor) else torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), wanted.double(), **TOLERANCE[dtype])


def leaf(value: object, dtype: torch.dtype = torch.float64) -> Tensor:
    """A fresh leaf with these values that collects a gradient."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def gradient(t: Tensor) -> Tensor:
    """Zeros where nothing arrived."""
    return t.grad if t.grad is not None else torch.zeros_like(t)


def uniform(seed: int, size: int, low: float, high: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers in [low, high), rounded to `dtype`."""
    rng = torch.Generator().manual_seed(seed)
    return (low + (high - low) * torch.rand(size, generator=rng, dtype=torch.float64)).to(dtype)


def logits_of(hidden: Tensor, head: Tensor, bias: Tensor | None, softcap: float = 0.0) -> np.ndarray:
    """float64 logits for the oracles."""
    logits = hidden.detach().double().numpy() @ head.detach().double().numpy().T
    logits = logits if bias is None else logits + bias.detach().double().numpy()
    return softcap * np.tanh(logits / softcap) if softcap else logits


def naive_logp(hidden: Tensor, head: Tensor, bias: Tensor | None, softcap: float = 0.0) -> Tensor:
    """log pi of the whole vocabulary, by its definition."""
    logits = hidden @ head.T + (0 if bias is None else bias)
    logits = softcap * (logits / softcap).tanh() if softcap else logits
    top = logits.max(dim=-1, keepdim=True).values.detach()
    return logits - top - (logits - top).exp().sum(-1, keepdim=True).log()


def difference_gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences: truncation ~ step^2 = 1e-10 and rounding ~ 1e-16 / step = 1e-11, so about 1e-9 for O(1)."""
    found = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[i] += step
        down[i] -= step
        found[i] = (function(up) - function(down)) / (2 * step)
    return found


def close_to_differences(got: Tensor, function: Callable[[np.ndarray], float], at: Tensor) -> None:
    """A gradient against central differences of an oracle, with room for their error."""
    np.testing.assert_allclose(got, difference_gradient(function, at.detach().numpy()), rtol=1e-6, atol=1e-8)


@dataclass
class Case:
    """Random inputs of the token quantities, already rounded to `dtype`."""

    guided: Tensor
    unguided: Tensor
    head: Tensor
    bias: Tensor | None
    guided_head: tuple[Tensor, Tensor | None]
    """Other weights for the guided side, for those tests that use them."""
    target: Tensor
    cotangent: Tensor
    entropy_cotangent: Tensor

    @property
    def logits(self) -> np.ndarray:
        """Of the unguided side."""
        return logits_of(self.unguided, self.head, self.bias)

    def guided_logits(self, own_head: bool = False) -> np.ndarray:
        """With the shared output matrix, or with the guided side's own."""
        return logits_of(self.guided, *(self.guided_head if own_head else (self.head, self.bias)))


def make_case(seed: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float64,
              with_bias: bool = True) -> Case:
    """`shape` is (N, H, V)."""
    n, h, v = shape
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64).to(dtype)

    bias, other_bias = (normal(v), normal(v)) if with_bias else (None, None)
    return Case(normal(n, h), normal(n, h), normal(v, h), bias, (normal(v, h), other_bias),
                torch.randint(v, (n,), generator=rng), normal(n), normal(n))

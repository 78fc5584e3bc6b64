"""Chunks over tokens: no tensor of tokens x vocabulary lives, forward or backward.

That chunks change no number is in `test_losses_token_kl.py`, where the oracles meet every chunk size.
Shapes: N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from losses_common import Case, leaf, make_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgpo_lib.losses.head import Head
from sgpo_lib.losses.token_kl import (
    forward_kl_guided_to_unguided,
    reverse_kl_unguided_to_guided,
    token_logp_and_entropy,
)


class Tracker(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, and of all those alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given_storages = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._see(t, given_storages)
        return out

    def _see(self, t: Tensor, given_storages: set[int]) -> None:
        storage = t.untyped_storage()
        if storage.data_ptr() in given_storages or id(storage) in self.known:
            return
        size = storage.nbytes() // t.element_size()
        self.largest = max(self.largest, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.known.add(id(storage))
        weakref.finalize(storage, self._gone, id(storage), size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def forward_kl(case: Case, chunk: int) -> Tensor:
    return forward_kl_guided_to_unguided(case.guided, leaf(case.unguided), Head(leaf(case.head)), chunk)


def reverse_kl(case: Case, chunk: int) -> Tensor:
    return reverse_kl_unguided_to_guided(case.guided, leaf(case.unguided), Head(leaf(case.head)), chunk,
                                         Head(*case.guided_head))


def logp(case: Case, chunk: int) -> Tensor:
    return token_logp_and_entropy(leaf(case.unguided), case.target, Head(leaf(case.head)), chunk)[0]


def logp_and_entropy(case: Case, chunk: int) -> Tensor:
    return sum(token_logp_and_entropy(leaf(case.unguided), case.target, Head(leaf(case.head)), chunk,
                                      entropy_gradient=True))


every_quantity = pytest.mark.parametrize("quantity", [forward_kl, reverse_kl, logp, logp_and_entropy])


@every_quantity
def test_memory_stays_at_a_few_chunks_of_the_vocabulary(quantity):
    n, h, v, chunk = 256, 4, 500, 8
    case = make_case(8, (n, h, v), with_bias=False)
    with Tracker() as tracker:
        out = quantity(case, chunk)
        kept = tracker.alive
        out.sum().backward()
    assert tracker.largest <= chunk * v
    assert kept < n * v / 16  # what waits for the backward pass: hidden states and per-token numbers
    assert tracker.peak < 12 * chunk * v + 4 * v * h + 8 * n * h

    with Tracker() as unchunked:  # the tracker does see a full distribution where there is one
        quantity(case, n).sum().backward()
    assert unchunked.largest == n * v
    assert unchunked.peak > 2 * n * v


@every_quantity
def test_nothing_of_size_tokens_by_vocabulary_is_saved_for_the_backward_pass(quantity):
    n, v, chunk = 64, 200, 8
    case = make_case(9, (n, 4, v), with_bias=False)
    saved: dict[int, Tensor] = {}  # one entry per storage

    def pack(t: Tensor) -> Tensor:
        return saved.setdefault(t.untyped_storage().data_ptr(), t)

    def plain(case: Case, chunk: int) -> Tensor:
        return torch.log_softmax(leaf(case.unguided) @ case.head.T, dim=-1)

    for made, fits in ((quantity, True), (plain, False)):  # the hooks do see a full distribution where there is one
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = made(case, chunk)
        elements = sum(t.untyped_storage().nbytes() // t.element_size() for t in saved.values())
        assert (elements < n * v / 4) == fits, (elements, n * v)
        del out


@every_quantity
def test_without_gradients_chunks_bound_memory_too(quantity):
    n, v, chunk = 256, 500, 8
    case = make_case(10, (n, 4, v), with_bias=False)
    with torch.no_grad(), Tracker() as tracker:
        quantity(case, chunk)
    assert tracker.largest <= chunk * v
    assert tracker.peak < 12 * chunk * v

"""Token quantities from hidden states: values against the oracles, gradients against naive autograd, closed forms and
central differences of the oracles.

Shapes: N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses_common import (
    CHUNKS,
    FLOATS,
    MODEST,
    TOLERANCE,
    Case,
    close,
    close_to_differences,
    float_types,
    gradient,
    leaf,
    logits_of,
    make_case,
    naive_logp,
    seeds,
)
from torch import Tensor

from sgpo_lib.losses.head import Head
from sgpo_lib.losses.token_kl import (
    forward_kl_guided_to_unguided,
    reverse_kl_unguided_to_guided,
    token_logp_and_entropy,
)
from sgpo_lib.shapes import BLOCK

shapes = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(2, 20))
chunks = st.integers(1, 14)
KLS = {"forward": (forward_kl_guided_to_unguided, oracles.token_kls),
       "reverse": (reverse_kl_unguided_to_guided, oracles.reverse_token_kls)}
directions = st.sampled_from(list(KLS))
both_directions = pytest.mark.parametrize("direction", KLS)
LARGE = (3, 4, 50_000)


@dataclass(frozen=True)
class Way:
    """Of the ways through fused.py, one."""

    frozen: bool = False
    """Whether the output matrix takes no gradient."""
    softcap: float = 0.0
    block: int = 2**18
    """Logits whose softmax is computed together."""

    def __enter__(self) -> None:
        self.before.append(BLOCK["cpu"])
        BLOCK["cpu"] = self.block

    def __exit__(self, *_: object) -> None:
        BLOCK["cpu"] = self.before.pop()

    before: ClassVar[list[int]] = []


ways = st.builds(Way, st.booleans(), st.sampled_from([0.0, 1.5]), st.sampled_from([1, 30, 2**18]))


def close_gradients(got: list[Tensor], expected: list[Tensor], case: Case, dtype: torch.dtype) -> None:
    """As `close`, but for hidden states under 50,000 words in float32: the matrix product over the words alone is up to
    4e-4 off, even of exact probabilities. The matrix's own gradient, which sums over no words, has no such excuse.
    """
    for ours, naive in zip(got, expected, strict=True):
        if dtype == torch.float32 and len(case.head) > 10_000 and ours.shape == case.unguided.shape:
            torch.testing.assert_close(gradient(ours).double(), gradient(naive), rtol=1e-5, atol=1e-3)
        else:
            close(gradient(ours), gradient(naive), dtype)


def trained(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Fresh leaves: hidden states of the unguided side, output matrix, bias where there is one."""
    return [leaf(t, dtype) for t in (case.unguided, case.head, case.bias) if t is not None]


def weights(leaves: list[Tensor], way: Way = Way()) -> Head:
    """Output matrix and bias of `trained`."""
    head = Head(leaves[1], leaves[2] if len(leaves) > 2 else None, way.softcap)
    return head.detach() if way.frozen else head


# Log-probability and entropy ------------------------------------------------------------------------------------------


def check_logp(case: Case, chunk: int, dtype: torch.dtype, entropy_gradient: bool, way: Way = Way()) -> None:
    leaves, naive = trained(case, dtype), trained(case)
    with way:
        logp, entropy = token_logp_and_entropy(leaves[0], case.target, weights(leaves, way), chunk,
                                               entropy_gradient=entropy_gradient)
    logits = logits_of(case.unguided, case.head, case.bias, way.softcap)
    close(logp, oracles.token_logps(logits, case.target.tolist()), dtype)
    close(entropy, oracles.entropies(logits), dtype)
    assert entropy.requires_grad == entropy_gradient
    loss = case.cotangent * logp + (case.entropy_cotangent * entropy if entropy_gradient else 0)
    with way:
        loss.sum().backward()

    every_logp = naive_logp(naive[0], *weights(naive, way))
    expected = case.cotangent.double() * every_logp.gather(-1, case.target[:, None])[:, 0]
    if entropy_gradient:
        expected = expected - case.entropy_cotangent.double() * (every_logp.exp() * every_logp).sum(-1)
    expected.sum().backward()
    close_gradients(leaves, naive, case, dtype)


@MODEST
@given(seeds, shapes, chunks, float_types, st.booleans(), st.booleans(), ways)
def test_logp_and_entropy_match_the_oracle(seed, shape, chunk, dtype, with_bias, entropy_gradient, way):
    check_logp(make_case(seed, shape, dtype, with_bias), chunk, dtype, entropy_gradient, way)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chunk", [2, 8])
@pytest.mark.parametrize("shape", [LARGE, (5, 3, 2), (1, 1, 2)])
@pytest.mark.parametrize("frozen", [True, False])
def test_logp_and_entropy_with_a_small_and_a_large_vocabulary(shape, chunk, dtype, frozen):
    check_logp(make_case(1, shape, dtype, with_bias=False), chunk, dtype, True, Way(frozen))


def test_entropy_of_a_uniform_and_of_a_certain_distribution():
    head = torch.eye(4, dtype=torch.float64)
    hidden = leaf([[0.0, 0, 0, 0], [900.0, 0, 0, 0]])
    logp, entropy = token_logp_and_entropy(hidden, torch.tensor([2, 0]), Head(head), 1, entropy_gradient=True)
    close(logp, [-math.log(4), 0.0])
    close(entropy, [math.log(4), 0.0])
    entropy.sum().backward()
    close(hidden.grad, [[0.0] * 4] * 2)  # both are extremes of the entropy


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_of_logp_and_entropy_in_closed_form(chunk):
    # with the identity as head, hidden states are logits: d log p_o = 1[v = o] - p_v, d H = -p_v (log p_v + H)
    case = make_case(3, (6, 5, 5))
    p = case.unguided.softmax(-1)
    logits = leaf(case.unguided)
    _, entropy = token_logp_and_entropy(logits, case.target, Head(torch.eye(5).double()), chunk, entropy_gradient=True)
    entropy.sum().backward()
    close(logits.grad, -p * (p.log() - (p * p.log()).sum(-1, keepdim=True)))
    logits = leaf(case.unguided)
    token_logp_and_entropy(logits, case.target, Head(torch.eye(5).double()), chunk)[0].sum().backward()
    close(logits.grad, torch.nn.functional.one_hot(case.target, 5) - p)


def test_gradient_of_the_entropy_matches_finite_differences_of_the_oracle():
    case = make_case(4, (4, 3, 6))
    hidden, head, bias = trained(case)
    _, entropy = token_logp_and_entropy(hidden, case.target, Head(head, bias), 3, entropy_gradient=True)
    (case.entropy_cotangent * entropy).sum().backward()

    def total(states: np.ndarray, matrix: np.ndarray) -> float:
        return float(case.entropy_cotangent.numpy() @ oracles.entropies(states @ matrix.T + case.bias.numpy()))

    close_to_differences(hidden.grad, lambda x: total(x, case.head.numpy()), case.unguided)
    close_to_differences(head.grad, lambda x: total(case.unguided.numpy(), x), case.head)


# Token KL in both directions (Eq. 3, appendix F) ----------------------------------------------------------------------


def naive_kl(direction: str, guided_logp: Tensor, unguided_logp: Tensor) -> Tensor:
    """By definition; whoever calls it detaches the guided side."""
    p, q = (guided_logp, unguided_logp) if direction == "forward" else (unguided_logp, guided_logp)
    return (p.exp() * (p - q)).sum(-1)


def check_kl(direction: str, case: Case, chunk: int, dtype: torch.dtype, own_head: bool = False,
             way: Way = Way()) -> None:
    function, oracle = KLS[direction]
    guided, leaves, naive = leaf(case.guided, dtype), trained(case, dtype), trained(case)
    own = [None if t is None else leaf(t, dtype) for t in case.guided_head]
    with way:
        kl = function(guided, leaves[0], weights(leaves, way), chunk, Head(*own, way.softcap) if own_head else None)
        (case.cotangent * kl).sum().backward()
    assert all(t.grad is None for t in (guided, *own) if t is not None)

    other = case.guided_head if own_head else (case.head, case.bias)
    close(kl, oracle(logits_of(case.guided, *other, way.softcap),
                     logits_of(case.unguided, case.head, case.bias, way.softcap)), dtype)
    guided_logp = naive_logp(case.guided.double(), *(None if t is None else t.double() for t in other), way.softcap)
    expected = naive_kl(direction, guided_logp, naive_logp(naive[0], *weights(naive, way)))
    (case.cotangent.double() * expected).sum().backward()
    close_gradients(leaves, naive, case, dtype)


@MODEST
@given(directions, seeds, shapes, chunks, float_types, st.booleans(), st.booleans(), ways)
def test_kl_matches_the_oracle(direction, seed, shape, chunk, dtype, with_bias, own_head, way):
    check_kl(direction, make_case(seed, shape, dtype, with_bias), chunk, dtype, own_head, way)


@both_directions
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chunk", [2, 8])
@pytest.mark.parametrize("shape", [LARGE, (5, 3, 2), (1, 1, 2)])
@pytest.mark.parametrize("frozen", [True, False])
def test_kl_with_a_small_and_a_large_vocabulary(direction, shape, chunk, dtype, frozen):
    check_kl(direction, make_case(2, shape, dtype, with_bias=False), chunk, dtype, way=Way(frozen))


@pytest.mark.parametrize("direction, expected", [
    ("forward", 0.75 * math.log(1.5) + 0.25 * math.log(0.5)), ("reverse", 0.5 * math.log(4 / 3))])
def test_kl_by_hand(direction, expected):
    guided, unguided = leaf([[math.log(3.0), 0.0]]), leaf([[0.0, 0.0]])  # P = (3/4, 1/4), Q = (1/2, 1/2)
    close(KLS[direction][0](guided, unguided, Head(torch.eye(2).double()), 1), [expected])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_of_both_directions_in_closed_form(chunk):
    # with the identity as head: d KL(P||Q) / d logits of Q = Q - P; d KL(Q||P) = Q (log Q - log P - KL(Q||P))
    case = make_case(3, (6, 5, 5))
    p, q = case.guided.softmax(-1), case.unguided.softmax(-1)
    ratio = (q / p).log()
    expected = {"forward": q - p, "reverse": q * (ratio - (q * ratio).sum(-1, keepdim=True))}
    for direction, (function, _) in KLS.items():
        logits = leaf(case.unguided)
        function(case.guided, logits, Head(torch.eye(5).double()), chunk).sum().backward()
        close(logits.grad, expected[direction])


@both_directions
@pytest.mark.parametrize("own_head", [False, True])
def test_gradient_of_the_kl_matches_finite_differences_of_the_oracle(direction, own_head):
    function, oracle = KLS[direction]
    case = make_case(4, (5, 3, 6))
    unguided, head, bias = trained(case)
    kl = function(case.guided, unguided, Head(head, bias), 2, Head(*case.guided_head) if own_head else None)
    (case.cotangent * kl).sum().backward()

    def total(states: np.ndarray, matrix: np.ndarray) -> float:  # through the unguided side alone
        logits = states @ matrix.T + case.bias.numpy()
        return float(case.cotangent.numpy() @ oracle(case.guided_logits(own_head), logits))

    close_to_differences(unguided.grad, lambda x: total(x, case.head.numpy()), case.unguided)
    close_to_differences(head.grad, lambda x: total(case.unguided.numpy(), x), case.head)


@MODEST
@given(directions, seeds, shapes, chunks, float_types)
def test_equal_hidden_states_have_no_divergence_and_no_gradient(direction, seed, shape, chunk, dtype):
    case = make_case(seed, shape, dtype)
    leaves = trained(case, dtype)
    kl = KLS[direction][0](case.unguided, leaves[0], weights(leaves), chunk)
    assert torch.equal(kl, torch.zeros_like(kl))
    kl.sum().backward()
    for t in leaves:
        torch.testing.assert_close(t.grad, torch.zeros_like(t), **TOLERANCE[dtype])


@both_directions
@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_gradient_reaches_the_guided_side(direction, chunk):
    """Nor the output matrix through it: the full derivative, guided side included, is another number."""
    case = make_case(5, (9, 4, 13))
    guided, (unguided, head, bias) = leaf(case.guided), trained(case)
    other = Head(leaf(case.guided_head[0]), leaf(case.guided_head[1]))
    KLS[direction][0](guided, unguided, Head(head, bias), chunk).sum().backward()
    own = trained(case)
    KLS[direction][0](guided, own[0], weights(own), chunk, other).sum().backward()
    assert guided.grad is None and other[0].grad is None and other[1].grad is None
    full_head = leaf(case.head)
    naive_kl(direction, naive_logp(case.guided, full_head, case.bias),
             naive_logp(case.unguided, full_head, case.bias)).sum().backward()
    assert not torch.allclose(head.grad, full_head.grad, rtol=1e-3)


@both_directions
def test_only_the_guided_side_training_leaves_nothing_to_differentiate(direction):
    case = make_case(6, (4, 3, 5))
    other = Head(leaf(case.guided_head[0]))
    assert not KLS[direction][0](leaf(case.guided), case.unguided, Head(case.head), 2, other).requires_grad


def test_a_guided_side_with_its_own_weights_changes_the_divergence():
    case = make_case(7, (4, 3, 5))
    for function, oracle in KLS.values():
        own = function(case.guided, case.unguided, Head(case.head, case.bias), 2, Head(*case.guided_head))
        assert not np.allclose(own, oracle(case.guided_logits(), case.logits), rtol=1e-2)
        close(own, oracle(logits_of(case.guided, *case.guided_head), case.logits))


def test_bfloat16_states_give_float32_quantities():
    """The logits are in bfloat16; softmax and sums over the vocabulary are not."""
    case = make_case(11, (6, 4, 9), torch.bfloat16)
    states = case.guided, case.unguided
    logits = [torch.nn.functional.linear(t, case.head, case.bias).double().numpy() for t in states]
    logp, entropy = token_logp_and_entropy(case.unguided, case.target, Head(case.head, case.bias), 4)
    close(logp, oracles.token_logps(logits[1], case.target.tolist()), torch.float32)
    close(entropy, oracles.entropies(logits[1]), torch.float32)
    for function, oracle in KLS.values():
        kl = function(case.guided, case.unguided, Head(case.head, case.bias), 4)
        close(kl, oracle(*logits), torch.float32)

"""The losses against float64 oracles (`oracles.py`), their gradients against naive autograd and finite differences.

Shapes: N response tokens, H hidden size, V vocabulary, G responses of a group, B rows.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgpo_lib.batching import TokenBatch, micro_batches
from sgpo_lib.losses.distillation import clipped_kl_loss, most_reachable
from sgpo_lib.losses.grpo import group_advantages, grpo_loss
from sgpo_lib.losses.guidance_weight import adaptive_weight
from sgpo_lib.losses.imitation import sft_loss
from sgpo_lib.losses.masked import LossOutput, sequence_mean_weights, sum_by_row
from sgpo_lib.losses.token_kl import forward_kl_guided_to_unguided, token_logp_and_entropy

MODEST = settings(max_examples=25, deadline=None, derandomize=True)
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
FLOATS = [torch.float64, torch.float32]
SHAPES = [(1, 1, 2), (1, 3, 7), (7, 4, 2), (9, 5, 11), (16, 3, 30)]
CHUNKS = [1, 3, 5, 100]
CLIP = (0.2, 0.28)
seeds = st.integers(0, 10_000)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(2, 20))
float_types = st.sampled_from(FLOATS)


def close(got: Tensor, expected: object, dtype: torch.dtype) -> None:
    """`got` in its own precision against float64."""
    assert got.dtype == dtype
    wanted = expected.detach() if isinstance(expected, Tensor) else torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), wanted.double(), **TOLERANCE[dtype])


def leaf(value: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A fresh leaf with these values that collects a gradient."""
    return value.detach().to(dtype, copy=True).requires_grad_()


def logits_of(hidden: Tensor, head: Tensor, bias: Tensor | None) -> np.ndarray:
    """float64 logits for the oracles."""
    logits = hidden.detach().double().numpy() @ head.detach().double().numpy().T
    return logits if bias is None else logits + bias.detach().double().numpy()


def naive_logp(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """log pi of the whole vocabulary, by its definition."""
    logits = hidden @ head.T + (0 if bias is None else bias)
    top = logits.max(dim=-1, keepdim=True).values.detach()
    return logits - top - (logits - top).exp().sum(-1, keepdim=True).log()


def naive_kl(guided: Tensor, unguided: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """Eq. 3 with every guided tensor detached by hand."""
    log_p = naive_logp(guided.detach(), head.detach(), None if bias is None else bias.detach())
    return (log_p.exp() * (log_p - naive_logp(unguided, head, bias))).sum(-1)


def difference_gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences, accurate to about 1e-9."""
    gradient = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (function(up) - function(down)) / (2 * step)
    return gradient


@dataclass
class Case:
    """Random inputs of the token quantities, already rounded to `dtype`."""

    guided: Tensor
    unguided: Tensor
    head: Tensor
    bias: Tensor | None
    target: Tensor
    cotangent: Tensor

    @property
    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Guided, unguided."""
        return logits_of(self.guided, self.head, self.bias), logits_of(self.unguided, self.head, self.bias)


def make_case(seed: int, shape: tuple[int, int, int], dtype: torch.dtype, with_bias: bool = True) -> Case:
    n, h, v = shape
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64).to(dtype)

    return Case(normal(n, h), normal(n, h), normal(v, h), normal(v) if with_bias else None,
                torch.randint(v, (n,), generator=rng), normal(n))


# Log-probability and entropy ------------------------------------------------------------------------------------------


def close_hidden_gradient(got: Tensor, expected: Tensor, case: Case, dtype: torch.dtype) -> None:
    """As `close`, but with 50,000 words a float32 matrix product alone is 5e-5 off, even of exact probabilities."""
    if dtype == torch.float32 and len(case.head) > 10_000:
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    else:
        close(got, expected, dtype)


def check_logp(case: Case, chunk: int, dtype: torch.dtype) -> None:
    hidden, head = leaf(case.unguided, dtype), leaf(case.head, dtype)
    bias = None if case.bias is None else leaf(case.bias, dtype)
    logp, entropy = token_logp_and_entropy(hidden, case.target, head, bias, chunk)
    close(logp, oracles.token_logps(case.logits[1], case.target.tolist()), dtype)
    close(entropy, oracles.entropies(case.logits[1]), dtype)
    assert not entropy.requires_grad
    (case.cotangent * logp).sum().backward()

    inputs = [leaf(t) for t in (case.unguided, case.head, case.bias) if t is not None]
    expected = naive_logp(inputs[0], inputs[1], inputs[2] if bias is not None else None)
    (case.cotangent.double() * expected.gather(-1, case.target[:, None])[:, 0]).sum().backward()
    close_hidden_gradient(hidden.grad, inputs[0].grad, case, dtype)
    for ours, naive in zip((head, bias), inputs[1:], strict=False):
        close(ours.grad, naive.grad, dtype)


@MODEST
@given(seeds, shapes, st.integers(1, 14), float_types, st.booleans())
def test_logp_and_entropy_match_the_oracle(seed, shape, chunk, dtype, with_bias):
    check_logp(make_case(seed, shape, dtype, with_bias), chunk, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chunk", [2, 8])
def test_logp_and_entropy_with_a_vocabulary_of_50_000(dtype, chunk):
    check_logp(make_case(1, (3, 4, 50_000), dtype, with_bias=False), chunk, dtype)


def test_entropy_of_a_uniform_and_of_a_certain_distribution():
    head = torch.eye(4, dtype=torch.float64)
    hidden = torch.tensor([[0.0, 0, 0, 0], [900.0, 0, 0, 0]], dtype=torch.float64)
    logp, entropy = token_logp_and_entropy(hidden, torch.tensor([2, 0]), head, None, 1)
    close(logp, [-math.log(4), 0.0], torch.float64)
    close(entropy, [math.log(4), 0.0], torch.float64)


# Token KL (Eq. 3) -----------------------------------------------------------------------------------------------------


def check_kl(case: Case, chunk: int, dtype: torch.dtype) -> None:
    guided, unguided, head = (leaf(t, dtype) for t in (case.guided, case.unguided, case.head))
    bias = None if case.bias is None else leaf(case.bias, dtype)
    kl = forward_kl_guided_to_unguided(guided, unguided, head, bias, chunk)
    close(kl, oracles.token_kls(*case.logits), dtype)
    (case.cotangent * kl).sum().backward()
    assert guided.grad is None

    inputs = [leaf(t) for t in (case.unguided, case.head, case.bias) if t is not None]
    expected = naive_kl(case.guided.double(), inputs[0], inputs[1], inputs[2] if bias is not None else None)
    (case.cotangent.double() * expected).sum().backward()
    close_hidden_gradient(unguided.grad, inputs[0].grad, case, dtype)
    for ours, naive in zip((head, bias), inputs[1:], strict=False):
        close(ours.grad, naive.grad, dtype)


@MODEST
@given(seeds, shapes, st.integers(1, 14), float_types, st.booleans())
def test_kl_matches_the_oracle(seed, shape, chunk, dtype, with_bias):
    check_kl(make_case(seed, shape, dtype, with_bias), chunk, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chunk", [2, 8])
def test_kl_with_a_vocabulary_of_50_000(dtype, chunk):
    check_kl(make_case(2, (3, 4, 50_000), dtype, with_bias=False), chunk, dtype)


def test_kl_by_hand_and_in_the_forward_direction():
    # guided (3/4, 1/4), unguided (1/2, 1/2): forward 3/4 ln 3/2 + 1/4 ln 1/2; the reverse would be 1/2 ln 4/3
    guided = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    unguided = torch.zeros_like(guided)
    kl = forward_kl_guided_to_unguided(guided, unguided, torch.eye(2).double(), None, 1)
    close(kl, [0.75 * math.log(1.5) + 0.25 * math.log(0.5)], torch.float64)
    assert abs(kl.item() - 0.5 * math.log(4 / 3)) > 0.01


def test_kl_gradient_is_unguided_minus_guided_probability():
    # known in closed form: d KL / d unguided logits = Q - P; with the identity as head, hidden states are logits
    case = make_case(3, (6, 5, 5), torch.float64)
    unguided = leaf(case.unguided)
    forward_kl_guided_to_unguided(case.guided, unguided, torch.eye(5).double(), None, 4).sum().backward()
    close(unguided.grad, case.unguided.softmax(-1) - case.guided.softmax(-1), torch.float64)


@pytest.mark.parametrize("chunk", [2, 100])
def test_kl_gradient_matches_finite_differences_of_the_oracle(chunk):
    case = make_case(4, (5, 3, 6), torch.float64)
    unguided, head = leaf(case.unguided), leaf(case.head)
    kl = forward_kl_guided_to_unguided(case.guided, unguided, head, case.bias, chunk)
    (case.cotangent * kl).sum().backward()
    fixed_logits, bias, cotangent = case.logits[0], case.bias.numpy(), case.cotangent.numpy()

    def by_hidden(x: np.ndarray) -> float:
        return float(cotangent @ oracles.token_kls(fixed_logits, x @ case.head.numpy().T + bias))

    def by_head(x: np.ndarray) -> float:  # through the unguided side alone
        return float(cotangent @ oracles.token_kls(fixed_logits, case.unguided.numpy() @ x.T + bias))

    np.testing.assert_allclose(unguided.grad, difference_gradient(by_hidden, case.unguided.numpy()), 1e-6, 1e-8)
    np.testing.assert_allclose(head.grad, difference_gradient(by_head, case.head.numpy()), 1e-6, 1e-8)


@MODEST
@given(seeds, shapes, st.integers(1, 14), float_types)
def test_equal_hidden_states_have_no_divergence_and_no_gradient(seed, shape, chunk, dtype):
    case = make_case(seed, shape, dtype)
    unguided, head, bias = (leaf(t, dtype) for t in (case.unguided, case.head, case.bias))
    kl = forward_kl_guided_to_unguided(case.unguided, unguided, head, bias, chunk)
    assert torch.equal(kl, torch.zeros_like(kl))
    kl.sum().backward()
    for t in (unguided, head, bias):
        torch.testing.assert_close(t.grad, torch.zeros_like(t), **TOLERANCE[dtype])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_gradient_reaches_the_guided_side(chunk):
    case = make_case(5, (9, 4, 13), torch.float64)
    guided, unguided, head, bias = (leaf(t) for t in (case.guided, case.unguided, case.head, case.bias))
    forward_kl_guided_to_unguided(guided, unguided, head, bias, chunk).sum().backward()
    assert guided.grad is None
    # the full derivative, guided side included, is another number: the comparison in check_kl has teeth
    full_head = leaf(case.head)
    log_p = naive_logp(case.guided, full_head, case.bias)
    (log_p.exp() * (log_p - naive_logp(case.unguided, full_head, case.bias))).sum().backward()
    assert not torch.allclose(head.grad, full_head.grad, rtol=1e-3)


def test_only_the_guided_side_training_leaves_nothing_to_differentiate():
    case = make_case(6, (4, 3, 5), torch.float64)
    assert not forward_kl_guided_to_unguided(leaf(case.guided), case.unguided, case.head, None, 2).requires_grad


# Chunks: the same numbers, in little memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunked_equals_unchunked(shape, chunk, dtype):
    case = make_case(7, shape, dtype)
    results = []
    for size in (shape[0], chunk):
        inputs = [leaf(t, dtype) for t in (case.unguided, case.head, case.bias)]
        kl = forward_kl_guided_to_unguided(case.guided, *inputs, size)
        logp, entropy = token_logp_and_entropy(inputs[0], case.target, *inputs[1:], size)
        (case.cotangent * (kl + logp)).sum().backward()
        results.append([kl, logp, entropy, *(t.grad for t in inputs)])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, **TOLERANCE[dtype])


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


def kl_of(case: Case, chunk: int) -> Tensor:
    return forward_kl_guided_to_unguided(case.guided, leaf(case.unguided), leaf(case.head), None, chunk)


def logp_of(case: Case, chunk: int) -> Tensor:
    return token_logp_and_entropy(leaf(case.unguided), case.target, leaf(case.head), None, chunk)[0]


@pytest.mark.parametrize("quantity", [kl_of, logp_of])
def test_memory_stays_at_a_few_chunks_of_the_vocabulary(quantity):
    n, h, v, chunk = 256, 4, 500, 8
    case = make_case(8, (n, h, v), torch.float64, with_bias=False)
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


@pytest.mark.parametrize("quantity", [kl_of, logp_of])
def test_nothing_of_size_tokens_by_vocabulary_is_saved_for_the_backward_pass(quantity):
    n, v, chunk = 64, 200, 8
    case = make_case(9, (n, 4, v), torch.float64, with_bias=False)
    saved: dict[int, Tensor] = {}  # one entry per storage: every chunk saves the same head

    def pack(t: Tensor) -> Tensor:
        return saved.setdefault(t.untyped_storage().data_ptr(), t)

    for size, fits in ((chunk, True), (n, False)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = quantity(case, size)
        elements = sum(t.untyped_storage().nbytes() // t.element_size() for t in saved.values())
        assert (elements < n * v / 4) == fits, (elements, n * v)
        del out


def test_without_gradients_chunks_bound_memory_too():
    n, v, chunk = 256, 500, 8
    case = make_case(10, (n, 4, v), torch.float64, with_bias=False)
    with torch.no_grad(), Tracker() as tracker:
        kl_of(case, chunk)
        logp_of(case, chunk)
    assert tracker.largest <= chunk * v
    assert tracker.peak < 12 * chunk * v


def test_bfloat16_states_give_float32_quantities():
    case = make_case(11, (6, 4, 9), torch.bfloat16)
    logp, entropy = token_logp_and_entropy(case.unguided, case.target, case.head, case.bias, 4)
    kl = forward_kl_guided_to_unguided(case.guided, case.unguided, case.head, case.bias, 4)
    assert logp.dtype == entropy.dtype == kl.dtype == torch.float32


# Advantages and the clipped surrogate (Eq. 1) -------------------------------------------------------------------------

groups = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=12)


@MODEST
@given(groups, st.sampled_from(["sample", "population"]), st.sampled_from([1e-6, 1e-4, 0.1]), float_types)
def test_advantages_match_the_oracle(rewards, std, eps, dtype):
    close(group_advantages(torch.tensor(rewards, dtype=dtype), eps, std), oracles.advantages(rewards, eps, std), dtype)


def test_advantages_by_hand():
    # rewards 1, 0, 0, 0: mean 1/4; sample variance (9/16 + 3/16) / 3 = 1/4, population variance 3/16
    rewards = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    close(group_advantages(rewards, 0.0), [1.5, -0.5, -0.5, -0.5], torch.float64)
    root = math.sqrt(3)
    close(group_advantages(rewards, 0.0, "population"), [root, -1 / root, -1 / root, -1 / root], torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("size", [2, 3, 8, 11, 12])
def test_a_group_of_equal_verdicts_has_no_advantage(reward, size, dtype):
    assert torch.equal(group_advantages(torch.full((size,), reward, dtype=dtype), 1e-6), torch.zeros(size, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_group_of_equal_fractional_rewards_has_no_advantage(dtype):
    """A user's reward may lie between 0 and 1: rounding of the mean must not be divided by eps into a signal."""
    worst = max(group_advantages(torch.full((size,), reward, dtype=dtype), 1e-6).abs().max().item()
                for reward in (0.1, 0.3, 0.7) for size in (3, 7, 8, 12))
    assert worst < 1e-5


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_a_group_below_two_raises(rewards):
    with pytest.raises(ValueError, match=f"group of {len(rewards)}"):
        group_advantages(torch.tensor(rewards), 1e-6)


@dataclass
class Group:
    """Responses of one or more problems as flat token tensors."""

    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    weight: Tensor
    lengths: list[int]

    def split(self, t: Tensor) -> list[list[float]]:
        return [piece.tolist() for piece in t.detach().double().split(self.lengths)]


def make_group(seed: int, lengths: list[int], dtype: torch.dtype, rewards: list[float] | None = None) -> Group:
    """One problem's group; ratios from about 0.4 to 2.5, so that both bounds bind for both signs of the advantage."""
    rng = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = (-3 * torch.rand(n, generator=rng, dtype=torch.float64) - 0.01).to(dtype)
    old_logp = (logp + 0.9 * (2 * torch.rand(n, generator=rng, dtype=torch.float64) - 1)).to(dtype)
    if rewards is None:
        rewards = torch.randint(2, (len(lengths),), generator=rng).double().tolist()
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    advantage = torch.tensor(oracles.advantages(rewards, 1e-6), dtype=dtype)[row]
    row_weight = torch.full((len(lengths),), 1 / len(lengths), dtype=dtype)
    weight = sequence_mean_weights(torch.tensor(lengths), row, row_weight)
    return Group(logp, old_logp, advantage, weight, lengths)


def naive_grpo(logp: Tensor, g: Group) -> Tensor:
    """Eq. 1 token by token, branches in Python."""
    total = torch.zeros((), dtype=torch.float64)
    for x, old, a, w in zip(logp, g.old_logp.double(), g.advantage.double(), g.weight.double(), strict=True):
        rho = (x - old).exp()
        bounded = 1 - CLIP[0] if rho < 1 - CLIP[0] else 1 + CLIP[1] if rho > 1 + CLIP[1] else rho
        total = total - w * (rho * a if rho * a <= bounded * a else bounded * a)
    return total


@MODEST
@given(seeds, st.lists(st.integers(1, 6), min_size=2, max_size=6), float_types)
def test_grpo_matches_the_oracle(seed, lengths, dtype):
    g = make_group(seed, lengths, dtype)
    logp = leaf(g.logp, dtype)
    out = grpo_loss(logp, g.old_logp, g.advantage, g.weight, *CLIP)
    per_response = [row[0] for row in g.split(g.advantage)]
    close(out.loss, -oracles.grpo_objective(g.split(g.logp), g.split(g.old_logp), per_response, *CLIP), dtype)
    out.loss.backward()
    naive = leaf(g.logp)
    naive_grpo(naive, g).backward()
    close(logp.grad, naive.grad if naive.grad is not None else torch.zeros_like(naive), dtype)


def test_grpo_gradient_matches_finite_differences_of_the_oracle():
    g = make_group(1, [3, 1, 4], torch.float64, [1.0, 0.0, 1.0])
    logp = leaf(g.logp)
    grpo_loss(logp, g.old_logp, g.advantage, g.weight, *CLIP).loss.backward()

    def loss(x: np.ndarray) -> float:
        values = [w * oracles.surrogate(n, o, a, *CLIP) for w, n, o, a in
                  zip(g.weight.tolist(), x.tolist(), g.old_logp.tolist(), g.advantage.tolist(), strict=True)]
        return -math.fsum(values)

    np.testing.assert_allclose(logp.grad, difference_gradient(loss, g.logp.numpy()), 1e-6, 1e-8)


@pytest.mark.parametrize("advantage, ratio, value, slope, clipped", [
    (1.0, 1.5, 1.28, 0.0, 1), (1.0, 0.5, 0.5, 0.5, 0), (-1.0, 0.5, -0.8, 0.0, 1), (-1.0, 1.5, -1.5, -1.5, 0),
    (1.0, 1.0, 1.0, 1.0, 0), (-1.0, 1.0, -1.0, -1.0, 0), (0.0, 3.0, 0.0, 0.0, 0),
])  # fmt: skip
def test_the_clip_binds_where_the_table_says(advantage, ratio, value, slope, clipped):
    logp = leaf(torch.tensor([math.log(ratio)], dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)
    out = grpo_loss(logp, 0 * one, advantage * one, one, *CLIP)
    close(out.loss, -value, torch.float64)
    out.loss.backward()
    close(logp.grad, [-slope], torch.float64)
    assert out.metrics == {"policy_clipped_count": clipped, "policy_token_count": 1}


def test_on_policy_gradient_is_that_of_reinforce():
    g = make_group(2, [2, 5, 1, 3], torch.float64)
    logp = leaf(g.logp)
    out = grpo_loss(logp, g.logp, g.advantage, g.weight, *CLIP)
    out.loss.backward()
    assert torch.equal(logp.grad, -(g.weight * g.advantage))
    assert out.metrics["policy_clipped_count"] == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_all_correct_and_all_wrong_groups_teach_nothing(reward, dtype):
    g = make_group(3, [1, 4, 2], dtype, [reward] * 3)
    logp = leaf(g.logp, dtype)
    advantage = group_advantages(torch.full((3,), reward, dtype=dtype), 1e-6)
    assert not advantage.any()
    out = grpo_loss(logp, g.old_logp, g.advantage, g.weight, *CLIP)
    out.loss.backward()
    assert out.loss == 0
    assert not logp.grad.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_clipped_tokens_get_exactly_no_gradient(dtype):
    g = make_group(4, [9, 9], dtype, [1.0, 0.0])
    logp = leaf(g.logp, dtype)
    out = grpo_loss(logp, g.old_logp, g.advantage, g.weight, *CLIP)
    out.loss.backward()
    ratio = (g.logp - g.old_logp).exp()
    bound = ((g.advantage > 0) & (ratio > 1 + CLIP[1])) | ((g.advantage < 0) & (ratio < 1 - CLIP[0]))
    assert 0 < bound.sum() < len(bound)
    assert torch.equal(logp.grad == 0, bound)
    assert out.metrics["policy_clipped_count"] == bound.sum()


@pytest.mark.parametrize("advantage, value", [(1.0, 1.28), (0.0, 0.0)])
def test_a_ratio_beyond_float32_stays_clipped(advantage, value):
    """exp(100) overflows float32; the clipped branch has a finite value and no gradient."""
    logp = leaf(torch.tensor([0.0]), torch.float32)
    out = grpo_loss(logp, torch.tensor([-100.0]), torch.tensor([advantage]), torch.tensor([1.0]), *CLIP)
    out.loss.backward()
    close(out.loss, -value, torch.float32)
    assert torch.equal(logp.grad, torch.zeros(1))


# Reachable target, KL clipping, adaptive weight (Eq. 4 to 6) ----------------------------------------------------------


@MODEST
@given(st.lists(st.tuples(st.floats(-500, 0), st.booleans()), max_size=8))
def test_the_reachable_target_matches_the_oracle(guided):
    sums, correct = [s for s, _ in guided], [ok for _, ok in guided]
    assert most_reachable(sums, correct) == oracles.reachable_target([[s] for s in sums], correct)


@pytest.mark.parametrize("sums, correct, expected", [
    ([], [], None), ([-1.0, -2.0], [False, False], None), ([-9.0], [True], 0),
    ([-1.0, -5.0, -4.0], [False, True, True], 2), ([-3.0, -3.0], [True, True], 0),
    ([-math.inf, -math.inf], [False, True], 1),
])  # fmt: skip
def test_reachable_targets_by_hand(sums, correct, expected):
    assert most_reachable(sums, correct) == expected


def test_the_target_is_chosen_by_summed_not_mean_log_probability():
    short, long = [-2.0], [-1.0] * 3  # sums -2 and -3, means -2 and -1
    assert most_reachable([sum(short), sum(long)], [True, True]) == 0


def test_verdicts_and_sums_of_different_number_raise():
    with pytest.raises(ValueError):
        most_reachable([-1.0], [True, False])


@MODEST
@given(seeds, st.integers(1, 20), st.sampled_from([0.3, 1.0, 5.0]), float_types)
def test_clipped_kl_matches_the_oracle(seed, n, delta, dtype):
    kl = leaf(2 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dtype)
    out = clipped_kl_loss(kl, torch.full((n,), 1 / n, dtype=dtype), delta)
    close(out.loss, oracles.clipped_kl(kl.tolist(), delta), dtype)
    out.loss.backward()
    kept = [1 / n if d <= delta else 0.0 for d in kl.tolist()]
    close(kl.grad, kept, dtype)
    assert torch.equal(kl.grad == 0, kl.detach() > delta)
    assert out.metrics["kl_clipped_count"] == kept.count(0.0)
    assert out.metrics["kl_token_count"] == n
    assert out.metrics["kl_sum"] == pytest.approx(math.fsum(kl.tolist()), rel=1e-5)


def test_clipped_kl_by_hand_keeps_delta_itself_and_divides_by_all_tokens():
    kl = leaf(torch.tensor([0.5, 1.0, 1.5, 0.0]))
    out = clipped_kl_loss(kl, torch.full((4,), 0.25, dtype=torch.float64), 1.0)
    assert out.loss.item() == 1.5 / 4
    out.loss.backward()
    assert kl.grad.tolist() == [0.25, 0.25, 0.0, 0.25]


def test_an_infinite_divergence_is_masked_without_nan():
    kl = leaf(torch.tensor([math.inf, 0.5]))
    out = clipped_kl_loss(kl, torch.full((2,), 0.5, dtype=torch.float64), 1.0)
    out.loss.backward()
    assert out.loss.item() == 0.25
    assert kl.grad.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_infinite_delta_clips_nothing(dtype):
    kl, weight = leaf(10 * torch.rand(30), dtype), torch.rand(30).to(dtype)
    out = clipped_kl_loss(kl, weight, math.inf)
    assert torch.equal(out.loss, (weight * kl).sum())
    assert out.metrics["kl_clipped_count"] == 0
    out.loss.backward()
    assert torch.equal(kl.grad, weight)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_masked_tokens_give_their_hidden_states_exactly_no_gradient(chunk, dtype):
    case = make_case(12, (12, 5, 9), dtype)
    unguided = leaf(case.unguided, dtype)
    kl = forward_kl_guided_to_unguided(case.guided, unguided, case.head, case.bias, chunk)
    delta = float(kl.detach().median())
    clipped_kl_loss(kl, torch.full((12,), 1 / 12, dtype=dtype), delta).loss.backward()
    masked = kl.detach() > delta
    assert 0 < masked.sum() < 12
    assert torch.equal(unguided.grad[masked], torch.zeros_like(unguided.grad[masked]))
    assert (unguided.grad[~masked].abs().sum(-1) > 0).all()


@MODEST
@given(st.integers(0, 4), st.integers(0, 8), st.floats(0, 3), st.floats(0.01, 1), st.floats(0, 2))
def test_the_adaptive_weight_matches_the_oracle(guided, autonomous, base, gamma, top):
    rates = guided / 4, autonomous / 8
    assert adaptive_weight(*rates, base, gamma, top) == pytest.approx(oracles.alpha(*rates, base, gamma, top), 1e-12)


@pytest.mark.parametrize("p_guide, p_auto, expected", [
    (1.0, 0.0, 0.8), (0.5, 0.5, 1 / 12), (0.25, 0.5, 0.0), (1.0, 1.0, 0.05 / 1.1), (0.5, 0.25, 0.5), (0.0, 0.0, 0.5),
])  # fmt: skip
def test_adaptive_weights_by_hand(p_guide, p_auto, expected):
    assert adaptive_weight(p_guide, p_auto, 0.5, 0.1, 0.8) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, -0.1])
def test_a_gamma_that_divides_by_zero_raises(gamma):
    with pytest.raises(ValueError, match="gamma"):
        adaptive_weight(0.5, 0.0, 0.5, gamma, 0.8)


# Supervised learning, weights, rows -----------------------------------------------------------------------------------


@MODEST
@given(seeds, st.lists(st.integers(1, 6), min_size=1, max_size=5), float_types)
def test_sft_matches_the_oracle(seed, lengths, dtype):
    n = sum(lengths)
    logp = leaf(-3 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dtype)
    out = sft_loss(logp, torch.full((n,), 1 / n, dtype=dtype))
    close(out.loss, oracles.sft([piece.tolist() for piece in logp.detach().double().split(lengths)]), dtype)
    out.loss.backward()
    close(logp.grad, [-1 / n] * n, dtype)
    assert out.metrics["nll_token_count"] == n


def test_weights_of_a_sequence_mean_and_sums_by_row():
    row = torch.tensor([0, 0, 1, 2, 2, 2])
    weight = sequence_mean_weights(torch.tensor([2, 1, 3]), row, torch.tensor([1.0, 0.5, 6.0], dtype=torch.float64))
    close(weight, [0.5, 0.5, 0.5, 2.0, 2.0, 2.0], torch.float64)
    value = torch.arange(6, dtype=torch.float64)
    close(sum_by_row(value, row, 3), [1.0, 2.0, 12.0], torch.float64)
    close(sum_by_row(value, row, 4), [1.0, 2.0, 12.0, 0.0], torch.float64)  # a row without tokens


def test_sum_by_row_carries_the_gradient():
    value = leaf(torch.ones(4))
    (sum_by_row(value, torch.tensor([0, 1, 1, 0]), 2) * torch.tensor([3.0, 5.0]).double()).sum().backward()
    assert value.grad.tolist() == [3, 5, 5, 3]


def test_losses_write_into_none_of_their_inputs():
    g = make_group(5, [3, 2], torch.float64)
    before = [t.clone() for t in (g.logp, g.old_logp, g.advantage, g.weight)]
    grpo_loss(g.logp, g.old_logp, g.advantage, g.weight, *CLIP)
    clipped_kl_loss(g.logp.abs(), g.weight, 0.5)
    sft_loss(g.logp, g.weight)
    assert all(torch.equal(a, b) for a, b in zip(before, (g.logp, g.old_logp, g.advantage, g.weight), strict=True))


def test_shapes_and_types_are_checked():
    three, two = torch.zeros(3), torch.zeros(2)
    with pytest.raises(TypeCheckError):
        grpo_loss(three, three, two, three, *CLIP)
    with pytest.raises(TypeCheckError):
        clipped_kl_loss(three, three[:, None], 1.0)
    with pytest.raises(TypeCheckError):
        forward_kl_guided_to_unguided(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(5, 2), None, 2)
    with pytest.raises(TypeCheckError):
        token_logp_and_entropy(torch.zeros(3, 2), three, torch.zeros(5, 2), None, 2)  # targets are not integers
    with pytest.raises(TypeCheckError):
        LossOutput(three)


# The whole objective (Eq. 7, Algorithm 1) -----------------------------------------------------------------------------

DEFAULTS = oracles.Settings()


@dataclass
class World:
    """A batch of problems: per response its tokens, reward and hidden states under both prompts."""

    head: Tensor
    unguided: list[list[Tensor]]
    """Per problem: hidden states (T x H) of the autonomous, then of the guided responses, under pi(.|q)."""
    guided: list[list[Tensor]]
    """Per problem: hidden states of the guided responses under pi(.|q,s)."""
    tokens: list[list[Tensor]]
    rewards: list[list[float]]
    old_logps: list[list[Tensor]]
    """Of the autonomous responses."""

    def leaves(self) -> list[Tensor]:
        """What trains."""
        return [self.head, *(t for problem in self.unguided for t in problem)]

    def copy(self) -> World:
        """Fresh leaves with the same values."""
        return World(leaf(self.head, self.head.dtype), [[leaf(t, t.dtype) for t in p] for p in self.unguided],
                     self.guided, self.tokens, self.rewards, self.old_logps)


def make_world(seed: int, dtype: torch.dtype = torch.float64,
               rewards: list[tuple[list[float], list[float]]] | None = None, hidden: int = 3, vocabulary: int = 7,
               longest: int = 5) -> World:
    """Random problems; `rewards` per problem: (autonomous, guided)."""
    rng = np.random.default_rng(seed)
    if rewards is None:
        rewards = [(rng.integers(0, 2, rng.integers(2, 5)).astype(float).tolist(),
                    rng.integers(0, 2, rng.integers(1, 4)).astype(float).tolist()) for _ in range(rng.integers(1, 4))]
    head = torch.tensor(rng.normal(size=(vocabulary, hidden))).to(dtype)
    world = World(head, [], [], [], [r for pair in rewards for r in [[*pair[0], *pair[1]]]], [])
    for autonomous, guided in rewards:
        lengths = rng.integers(1, longest + 1, len(autonomous) + len(guided))
        states = [torch.tensor(rng.normal(size=(n, hidden))).to(dtype) for n in lengths]
        world.unguided.append(states)
        world.guided.append([(s.double() + torch.tensor(rng.normal(size=s.shape))).to(dtype)
                             for s in states[len(autonomous):]])
        world.tokens.append([torch.tensor(rng.integers(0, vocabulary, n)) for n in lengths])
        world.old_logps.append([
            (torch.tensor(oracles.token_logps(logits_of(s, head, None), t.tolist()), dtype=torch.float64)
             + torch.tensor(rng.uniform(-0.6, 0.6, len(t)))).to(dtype)
            for s, t in zip(states[: len(autonomous)], world.tokens[-1], strict=False)])
    return world.copy()


def oracle_loss(world: World, settings: oracles.Settings, unguided_head: Tensor | None = None) -> float:
    """Eq. 7 by `oracles.sgpo_loss`; `unguided_head` stands for the part of the head that the gradient sees."""
    head = world.head if unguided_head is None else unguided_head
    problems = []
    for states, guided, tokens, rewards, old in zip(world.unguided, world.guided, world.tokens, world.rewards,
                                                    world.old_logps, strict=True):
        g1 = len(old)
        everything = [oracles.Response(t.tolist(), r, logits_of(s, head, None))
                      for s, t, r in zip(states, tokens, rewards, strict=True)]
        for response, logps in zip(everything[:g1], old, strict=True):
            response.old_logps = logps.tolist()
        for response, state in zip(everything[g1:], guided, strict=True):
            response.guided_logits = logits_of(state, world.head, None)
        problems.append((everything[:g1], everything[g1:]))
    return oracles.sgpo_loss(problems, settings)


def flat(pieces: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(all tokens, row of each, length of each row)."""
    lengths = torch.tensor([len(p) for p in pieces])
    return torch.cat(pieces), torch.repeat_interleave(torch.arange(len(pieces)), lengths), lengths


def library_loss(world: World, settings: oracles.Settings, chunk: int = 3, batch: int | None = None,
                 alphas: list[float] | None = None) -> Tensor:
    """Eq. 7 put together from the library's functions; `batch` is B where the world is only a part of it."""
    total = torch.zeros((), dtype=world.head.dtype)
    size = batch or len(world.unguided)
    for i, (states, guided, tokens, rewards, old) in enumerate(
            zip(world.unguided, world.guided, world.tokens, world.rewards, world.old_logps, strict=True)):
        g1 = len(old)
        hidden, row, lengths = flat(states[:g1])
        advantage = group_advantages(torch.tensor(rewards[:g1], dtype=hidden.dtype), settings.eps)
        logp, _ = token_logp_and_entropy(hidden, torch.cat(tokens[:g1]), world.head, None, chunk)
        weight = sequence_mean_weights(lengths, row, torch.full((g1,), 1 / (size * g1), dtype=hidden.dtype))
        total = total + grpo_loss(logp, torch.cat(old), advantage[row], weight, settings.clip_low,
                                  settings.clip_high).loss

        hidden, row, lengths = flat(states[g1:])
        with torch.no_grad():
            logp, _ = token_logp_and_entropy(hidden, torch.cat(tokens[g1:]), world.head, None, chunk)
        chosen = most_reachable(sum_by_row(logp, row, len(lengths)).tolist(), [r == 1 for r in rewards[g1:]])
        if chosen is None:
            continue
        alpha = alphas[i] if alphas is not None else adaptive_weight(
            sum(rewards[g1:]) / len(rewards[g1:]), sum(rewards[:g1]) / g1, settings.alpha_base, settings.gamma,
            settings.alpha_max)
        kl = forward_kl_guided_to_unguided(guided[chosen], states[g1 + chosen], world.head, None, chunk)
        weight = torch.full_like(kl, alpha / (size * len(kl)), requires_grad=False)
        total = total + clipped_kl_loss(kl, weight, settings.delta).loss
    return total


def naive_loss(world: World, settings: oracles.Settings) -> Tensor:
    """Eq. 7 in float64 autograd, one response and one token at a time, with branches in Python."""
    losses = []
    for states, guided, tokens, rewards, old in zip(world.unguided, world.guided, world.tokens, world.rewards,
                                                    world.old_logps, strict=True):
        g1 = len(old)
        logps = [naive_logp(s, world.head, None).gather(-1, t[:, None])[:, 0]
                 for s, t in zip(states, tokens, strict=True)]
        advantage = oracles.advantages(rewards[:g1], settings.eps)
        objective = torch.zeros((), dtype=torch.float64)
        for new, before, a in zip(logps[:g1], old, advantage, strict=True):
            for n, o in zip(new, before, strict=True):
                rho = (n - o).exp()
                bounded = rho.detach().clamp(1 - settings.clip_low, 1 + settings.clip_high)
                objective = objective + (rho * a if rho * a <= bounded * a else bounded * a) / len(new) / g1
        loss = -objective
        chosen = oracles.reachable_target([x.tolist() for x in logps[g1:]], [r == 1 for r in rewards[g1:]])
        if chosen is not None:
            d = naive_kl(guided[chosen], states[g1 + chosen], world.head, None)
            kept = [x for x in d if x.item() <= settings.delta]
            alpha = oracles.alpha(sum(rewards[g1:]) / len(rewards[g1:]), sum(rewards[:g1]) / g1, settings.alpha_base,
                                  settings.gamma, settings.alpha_max)
            loss = loss + alpha * sum(kept, torch.zeros((), dtype=torch.float64)) / len(d)
        losses.append(loss)
    return torch.stack(losses).mean()


def gradients(world: World) -> list[Tensor]:
    """Zeros where nothing arrived."""
    return [t.grad if t.grad is not None else torch.zeros_like(t) for t in world.leaves()]


def in_double(world: World) -> World:
    """The same numbers in float64."""
    def up(pieces: list[list[Tensor]]) -> list[list[Tensor]]:
        return [[t.detach().double() for t in problem] for problem in pieces]

    return World(world.head.detach().double(), up(world.unguided), up(world.guided), world.tokens, world.rewards,
                 up(world.old_logps)).copy()


def check_world(world: World, settings: oracles.Settings, chunk: int = 3) -> None:
    dtype = world.head.dtype
    loss = library_loss(world, settings, chunk)
    close(loss, oracle_loss(world, settings), dtype)
    if loss.requires_grad:
        loss.backward()
    naive = in_double(world)
    expected = naive_loss(naive, settings)
    close(loss, expected, dtype)
    expected.backward()
    for ours, theirs in zip(gradients(world), gradients(naive), strict=True):
        close(ours, theirs, dtype)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, st.sampled_from([0.5, 1.0, math.inf]), st.integers(1, 7), float_types)
def test_the_objective_matches_the_oracle(seed, delta, chunk, dtype):
    check_world(make_world(seed, dtype), oracles.Settings(delta=delta), chunk)


@pytest.mark.parametrize("rewards", [
    [([1.0, 1.0, 1.0], [1.0, 0.0])],  # all correct: only distillation
    [([0.0, 0.0], [0.0, 0.0])],  # nothing at all: C empty and no advantage
    [([0.0, 0.0, 0.0], [0.0, 1.0])],  # all wrong, guidance helps: alpha at its cap
    [([1.0, 0.0], [0.0])],  # C empty: GRPO alone
    [([1.0, 0.0], [1.0, 1.0]), ([0.0, 0.0], [0.0]), ([1.0, 1.0], [1.0])],
])  # fmt: skip
@pytest.mark.parametrize("longest", [1, 4])
def test_the_objective_in_corner_cases(rewards, longest):
    check_world(make_world(1, rewards=rewards, longest=longest), DEFAULTS)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", [2, 50_000])
def test_the_objective_with_a_small_and_a_large_vocabulary(vocabulary, dtype):
    check_world(make_world(2, dtype, [([1.0, 0.0], [1.0])], vocabulary=vocabulary, longest=2), DEFAULTS)


def test_the_objective_by_finite_differences_of_the_oracle():
    world = make_world(3, rewards=[([1.0, 0.0, 0.0], [1.0, 1.0]), ([0.0, 0.0], [1.0])], longest=3)
    library_loss(world, DEFAULTS).backward()

    def by_head(x: np.ndarray) -> float:
        return oracle_loss(world, DEFAULTS, unguided_head=torch.tensor(x))

    expected = difference_gradient(by_head, world.head.detach().numpy())
    np.testing.assert_allclose(world.head.grad, expected, 1e-6, 1e-8)
    for states in world.unguided:
        for j, state in enumerate(states):
            def by_state(x: np.ndarray, states: list[Tensor] = states, j: int = j) -> float:
                kept, states[j] = states[j], torch.tensor(x)
                try:
                    return oracle_loss(world, DEFAULTS)
                finally:
                    states[j] = kept

            got = state.grad if state.grad is not None else torch.zeros_like(state)
            np.testing.assert_allclose(got, difference_gradient(by_state, state.detach().numpy()), 1e-6, 1e-8)


def test_only_the_chosen_guided_response_gets_a_gradient():
    world = make_world(4, rewards=[([0.0, 0.0], [1.0, 1.0, 0.0])])
    library_loss(world, oracles.Settings(delta=math.inf)).backward()
    sums = [sum(oracles.token_logps(logits_of(s, world.head, None), t.tolist()))
            for s, t in zip(world.unguided[0][2:], world.tokens[0][2:], strict=True)]
    chosen = oracles.reachable_target([[x] for x in sums], [True, True, False])
    reached = [s.grad is not None and bool(s.grad.any()) for s in world.unguided[0][2:]]
    assert reached == [j == chosen for j in range(3)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", range(5))
def test_alpha_zero_is_grpo_bit_for_bit(seed, dtype):
    rewards = [([1.0, 0.0, 0.0], [1.0, 0.0]), ([0.0, 1.0], [1.0])]
    world = make_world(seed, dtype, rewards)
    alone = world.copy()
    alone.rewards = [[*r[:g], *(0.0 for _ in r[g:])] for r, g in zip(world.rewards, (3, 2), strict=True)]  # C empty
    both = [library_loss(w, DEFAULTS, alphas=[0.0, 0.0]) for w in (world, alone)]
    for loss in both:
        loss.backward()
    assert torch.equal(*both)
    assert all(torch.equal(a, b) for a, b in zip(gradients(world), gradients(alone), strict=True))


def test_problems_one_at_a_time_equal_the_batch():
    world = make_world(6, rewards=[([1.0, 0.0], [1.0, 0.0]), ([0.0, 0.0, 1.0], [1.0]), ([1.0, 1.0], [0.0])])
    whole = world.copy()
    loss = library_loss(whole, DEFAULTS)
    loss.backward()
    parts = world.copy()
    total = 0.0
    for i in (2, 0, 1):
        part = World(parts.head, *([getattr(parts, name)[i]] for name in
                                   ("unguided", "guided", "tokens", "rewards", "old_logps")))
        piece = library_loss(part, DEFAULTS, batch=3)
        piece.backward()
        total += piece.item()
    assert total == pytest.approx(loss.item(), rel=1e-12)
    for a, b in zip(gradients(parts), gradients(whole), strict=True):
        close(a, b, torch.float64)


# One batch, its micro-batches, its shuffled order, through a model ----------------------------------------------------


class CausalMean(torch.nn.Module):
    """A language model: the state at t is the mean of the embeddings up to t, so padding cannot reach it."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(vocabulary, hidden, generator=rng, dtype=torch.float64))
        self.head = torch.nn.Parameter(torch.randn(vocabulary, hidden, generator=rng, dtype=torch.float64))

    def forward(self, batch: TokenBatch) -> Tensor:
        steps_S = torch.arange(1, batch.input_ids_BS.shape[1] + 1).double()
        states_BSH = self.embedding[batch.input_ids_BS].cumsum(1) / steps_S[None, :, None]
        return states_BSH.flatten(0, 1)[batch.predictor_N]


@dataclass
class Rows:
    """Responses with what the losses need of each; guided prompt and prompt differ in length."""

    rows: list[tuple[list[int], list[int]]]
    guided: list[tuple[list[int], list[int]]]
    advantage: list[float]
    old_logp: list[list[float]]


def make_rows(count: int) -> Rows:
    rng = np.random.default_rng(7)

    def ids(longest: int) -> list[int]:
        return rng.integers(0, 9, rng.integers(1, longest + 1)).tolist()

    rows = [(ids(4), ids(6)) for _ in range(count)]
    return Rows(rows, [(ids(5) + p, r) for p, r in rows], rng.normal(size=count).tolist(),
                [(-rng.uniform(0.5, 4, len(r))).tolist() for _, r in rows])


def accumulate(data: Rows, order: list[list[int]]) -> tuple[dict[str, float], list[Tensor]]:
    """Gradients of GRPO + KL + SFT over micro-batches `order`, normalised by the counts of all rows."""
    model = CausalMean(9, 4)
    everything = sum(len(r) for _, r in data.rows)
    sums: dict[str, float] = {}
    for indices in order:
        batch = TokenBatch.build([data.rows[i] for i in indices], pad_id=0)
        guided = TokenBatch.build([data.guided[i] for i in indices], pad_id=0)
        hidden = model(batch)
        logp, _ = token_logp_and_entropy(hidden, batch.target_N, model.head, None, 5)
        with torch.no_grad():
            guided_hidden = model(guided)
        kl = forward_kl_guided_to_unguided(guided_hidden, hidden, model.head, None, 5)
        row_weight = torch.full((len(indices),), 1 / len(data.rows), dtype=torch.float64)
        weight = sequence_mean_weights(batch.length_B, batch.row_N, row_weight)
        advantage = batch.spread(torch.tensor([data.advantage[i] for i in indices], dtype=torch.float64))
        old = torch.tensor([x for i in indices for x in data.old_logp[i]], dtype=torch.float64)
        outs = [grpo_loss(logp, old, advantage, weight, *CLIP), clipped_kl_loss(kl, weight, 0.3),
                sft_loss(logp, torch.full_like(weight, 1 / everything))]
        sum(out.loss for out in outs).backward()
        for key, value in [(f"loss{i}", out.loss.item()) for i, out in enumerate(outs)] + [
                pair for out in outs for pair in out.metrics.items()]:
            sums[key] = sums.get(key, 0.0) + value
    return sums, [model.embedding.grad, model.head.grad]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("shuffled", [False, True])
def test_one_batch_equals_its_micro_batches_in_any_order(size, shuffled):
    data = make_rows(11)
    whole_sums, whole_gradients = accumulate(data, [list(range(11))])
    order = list(micro_batches(data.rows, size))
    if shuffled:
        places = np.random.default_rng(8).permutation(11).tolist()
        order = [places[start : start + size] for start in range(0, 11, size)]
    sums, parts = accumulate(data, order)
    assert sums == pytest.approx(whole_sums, rel=1e-10, abs=1e-12)
    assert all(key.endswith(("_sum", "_count")) or key.startswith("loss") for key in sums)
    assert sums["policy_clipped_count"] > 0 and 0 < sums["kl_clipped_count"] < sums["kl_token_count"]
    for a, b in zip(parts, whole_gradients, strict=True):
        close(a, b, torch.float64)

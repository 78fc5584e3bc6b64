"""Which guided responses and tokens are distilled, and how strongly (Eq. 2, 4, 5, 6, 8), against the oracles.

Shapes: N response tokens.
"""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses_common import (
    CHUNKS,
    FLOATS,
    MODEST,
    close,
    close_to_differences,
    float_types,
    leaf,
    make_case,
    seeds,
    uniform,
)

from sgpo_lib.losses.distillation import clipped_kl_loss, most_reachable, select_targets
from sgpo_lib.losses.guidance_weight import adaptive_weight, group_advantage_weight
from sgpo_lib.losses.head import Head
from sgpo_lib.losses.token_kl import forward_kl_guided_to_unguided, reverse_kl_unguided_to_guided

SELECTIONS = ["most_reachable", "most_reachable_per_token", "all_correct"]
DELTAS = [0.3, 1.0, 5.0, math.inf]
CLIPS = ["mask", "value"]
deltas, clips = st.sampled_from(DELTAS), st.sampled_from(CLIPS)

# Targets (Eq. 2 and 4) ------------------------------------------------------------------------------------------------


@MODEST
@given(st.lists(st.tuples(st.lists(st.floats(-50, 0), min_size=1, max_size=5), st.booleans()), max_size=8),
       st.sampled_from(SELECTIONS))
def test_targets_match_the_oracle(guided, selection):
    logps, correct = [x for x, _ in guided], [ok for _, ok in guided]
    sums, lengths = [math.fsum(x) for x in logps], [len(x) for x in logps]
    assert select_targets(selection, sums, lengths, correct) == oracles.targets(selection, logps, correct)
    if selection == "most_reachable":
        assert most_reachable(sums, correct) == next(iter(oracles.targets(selection, logps, correct)), None)


@pytest.mark.parametrize("sums, correct, expected", [
    ([], [], []), ([-1.0, -2.0], [False, False], []), ([-9.0], [True], [0]),
    ([-1.0, -5.0, -4.0], [False, True, True], [2]), ([-3.0, -3.0], [True, True], [0]),
    ([-math.inf, -math.inf], [False, True], [1]),
])  # fmt: skip
def test_targets_by_hand(sums, correct, expected):
    ones = [1] * len(sums)
    for selection in ("most_reachable", "most_reachable_per_token"):
        assert select_targets(selection, sums, ones, correct) == expected
    assert select_targets("all_correct", sums, ones, correct) == [j for j, ok in enumerate(correct) if ok]


def test_length_decides_between_the_sum_and_the_mean():
    sums, lengths = [-2.0, -3.0, -9.0], [1, 3, 2]  # means -2, -1, -4.5
    chosen = [select_targets(selection, sums, lengths, [True] * 3) for selection in SELECTIONS]
    assert chosen == [[0], [1], [0, 1, 2]]


def test_unequal_numbers_and_unknown_words_raise():
    with pytest.raises(ValueError):
        most_reachable([-1.0], [True, False])
    with pytest.raises(ValueError):
        select_targets("most_reachable_per_token", [-1.0, -2.0], [1], [True, True])
    with pytest.raises(ValueError, match=r"shortest.*'most_reachable', 'most_reachable_per_token' or 'all_correct'"):
        select_targets("shortest", [-1.0], [1], [True])


# Clipping (Eq. 5) -----------------------------------------------------------------------------------------------------


@MODEST
@given(seeds, st.integers(1, 20), deltas, clips, float_types)
def test_clipped_kl_matches_the_oracle(seed, n, delta, how, dtype):
    kl = leaf(uniform(seed, n, 0, 2.5), dtype)
    values = kl.detach().double().tolist()
    out = clipped_kl_loss(kl, torch.full((n,), 1 / n, dtype=dtype), delta, how)
    close(out.loss, oracles.clipped_kl(values, delta, how), dtype)
    out.loss.backward()
    close(kl.grad, [(1.0 if d <= delta else 0.0 if how == "mask" else delta / d) / n for d in values], dtype)
    assert out.metrics["kl_clipped_count"] == sum(d > delta for d in values)
    assert out.metrics["kl_token_count"] == n
    assert out.metrics["kl_sum"] == pytest.approx(math.fsum(values), rel=1e-5)


def test_clipped_kl_by_hand_keeps_delta_itself_and_divides_by_all_tokens():
    weight = torch.full((4,), 0.25, dtype=torch.float64)
    for how, total, slope in [("mask", 1.5, 0.0), ("value", 2.5, 0.5)]:
        kl = leaf([0.5, 1.0, 2.0, 0.0])
        out = clipped_kl_loss(kl, weight, 1.0, how)
        assert out.loss.item() == total / 4
        out.loss.backward()
        assert kl.grad.tolist() == [0.25, 0.25, 0.25 * slope, 0.25]


def test_a_minimum_has_exactly_the_masks_gradient():
    """Choice 3 of distillation.py: min(d, delta) adds delta to the loss and nothing to the gradient."""
    values, weight = uniform(1, 50, 0, 3), uniform(2, 50, 0, 1)
    minimum, masked, scaled = (leaf(values) for _ in range(3))
    (weight * minimum.clamp(max=1.0)).sum().backward()
    clipped_kl_loss(masked, weight, 1.0).loss.backward()
    clipped_kl_loss(scaled, weight, 1.0, "value").loss.backward()
    assert torch.equal(minimum.grad, masked.grad)
    beyond = values > 1.0
    assert 0 < beyond.sum() < 50
    assert not masked.grad[beyond].any() and (scaled.grad[beyond] > 0).all()
    assert torch.equal(scaled.grad[~beyond], masked.grad[~beyond])


@pytest.mark.parametrize("how", CLIPS)
def test_an_infinite_divergence_gives_no_nan(how):
    kl = leaf([math.inf, 0.5])
    out = clipped_kl_loss(kl, torch.full((2,), 0.5, dtype=torch.float64), 1.0, how)
    out.loss.backward()
    assert math.isfinite(out.loss.item()) and kl.grad.tolist() == [0.0, 0.5]
    assert how == "value" or out.loss.item() == 0.25


@pytest.mark.parametrize("how", CLIPS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_infinite_delta_clips_nothing(dtype, how):
    kl, weight = leaf(uniform(3, 30, 0, 10), dtype), uniform(4, 30, 0, 1, dtype)
    out = clipped_kl_loss(kl, weight, math.inf, how)
    assert torch.equal(out.loss, (weight * kl).sum())
    assert out.metrics["kl_clipped_count"] == 0
    out.loss.backward()
    assert torch.equal(kl.grad, weight)


@pytest.mark.parametrize("direction", [forward_kl_guided_to_unguided, reverse_kl_unguided_to_guided])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_masked_tokens_give_their_hidden_states_exactly_no_gradient(chunk, dtype, direction):
    case = make_case(12, (12, 5, 9), dtype)
    results = {}
    for how in CLIPS:
        unguided = leaf(case.unguided, dtype)
        kl = direction(case.guided, unguided, Head(case.head, case.bias), chunk)
        delta = float(kl.detach().median())
        clipped_kl_loss(kl, torch.full((12,), 1 / 12, dtype=dtype), delta, how).loss.backward()
        results[how], masked = unguided.grad, kl.detach() > delta
    assert 0 < masked.sum() < 12
    assert torch.equal(results["mask"][masked], torch.zeros_like(results["mask"][masked]))
    assert (results["mask"][~masked].abs().sum(-1) > 0).all() and (results["value"].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("direction, oracle", [(forward_kl_guided_to_unguided, oracles.token_kls),
                                               (reverse_kl_unguided_to_guided, oracles.reverse_token_kls)])
@pytest.mark.parametrize("delta", [0.8, math.inf])
def test_gradient_through_mask_and_divergence_matches_finite_differences_of_the_oracle(direction, oracle, delta):
    case = make_case(13, (10, 4, 7))
    unguided = leaf(case.unguided)
    kl = direction(case.guided, unguided, Head(case.head, case.bias), 3)
    weight = torch.full((10,), 0.7 / 10, dtype=torch.float64)
    out = clipped_kl_loss(kl, weight, delta)
    out.loss.backward()
    assert (0 < out.metrics["kl_clipped_count"] < 10) == (delta < math.inf)

    def loss(states):
        logits = states @ case.head.numpy().T + case.bias.numpy()
        return 0.7 * oracles.clipped_kl(oracle(case.guided_logits(), logits), delta)

    close(out.loss, loss(case.unguided.numpy()))
    close_to_differences(unguided.grad, loss, case.unguided)


def test_clipping_by_value_scales_the_closed_form_gradient():
    # with the identity as head: d KL(P||Q) / d logits of Q = Q - P, times min(1, delta / d)
    case = make_case(14, (12, 5, 5))
    p, q = case.guided.softmax(-1), case.unguided.softmax(-1)
    d = torch.tensor(oracles.token_kls(case.guided, case.unguided), dtype=torch.float64)
    logits = leaf(case.unguided)
    kl = forward_kl_guided_to_unguided(case.guided, logits, Head(torch.eye(5).double()), 4)
    clipped_kl_loss(kl, torch.full((12,), 0.5, dtype=torch.float64), 0.6, "value").loss.backward()
    assert 0 < (d > 0.6).sum() < 12
    close(logits.grad, 0.5 * (q - p) * (0.6 / d).clamp(max=1)[:, None])


# alpha(q) (Eq. 6 and 8) -----------------------------------------------------------------------------------------------


@MODEST
@given(st.integers(0, 4), st.integers(0, 8), st.floats(0, 3), st.floats(0.01, 1), st.floats(0, 2))
def test_the_adaptive_weight_matches_the_oracle(guided, autonomous, base, gamma, top):
    rates = guided / 4, autonomous / 8
    expected = oracles.alpha(*rates, base, gamma, top)
    assert adaptive_weight(*rates, base, gamma, top) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("p_guide, p_auto, expected", [
    (1.0, 0.0, 0.8), (0.5, 0.5, 1 / 12), (0.25, 0.5, 0.0), (1.0, 1.0, 0.05 / 1.1), (0.5, 0.25, 0.5), (0.0, 0.0, 0.5),
])  # fmt: skip
def test_adaptive_weights_by_hand(p_guide, p_auto, expected):
    assert adaptive_weight(p_guide, p_auto, 0.5, 0.1, 0.8) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, -0.1])
def test_a_gamma_that_divides_by_zero_raises(gamma):
    with pytest.raises(ValueError, match="gamma"):
        adaptive_weight(0.5, 0.0, 0.5, gamma, 0.8)


@MODEST
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=12), st.sampled_from([0.0, 1.0]),
       st.sampled_from(["sample", "population", "none"]), st.sampled_from([1e-6, 0.1]),
       st.sampled_from([0.0, 0.8, 9.0]))
def test_the_group_advantage_weight_matches_the_oracle(own, target, std, eps, top):
    got = group_advantage_weight(own, target, eps, std, top)
    assert got == pytest.approx(oracles.group_alpha(own, target, eps, std, top), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("own, std, top, expected", [
    ([0.0, 0.0, 0.0], "sample", 9.0, 1.5), ([0.0, 0.0, 0.0], "population", 9.0, math.sqrt(3)),  # the merged group has 4
    ([0.0, 0.0, 0.0], "sample", 0.8, 0.8), ([1.0, 1.0, 1.0], "sample", 0.8, 0.0),
    ([1.0, 1.0, 0.0], "sample", 0.8, 0.5),
])  # fmt: skip
def test_group_advantage_weights_by_hand(own, std, top, expected):
    assert group_advantage_weight(own, 1.0, 0.0, std, top) == pytest.approx(expected, rel=1e-12)

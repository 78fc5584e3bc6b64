"""Learning from written responses (SFT, LUFFY, HPT's gate) against the oracles; and what holds for every loss.

Shapes: N response tokens.
"""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from losses_common import CLIP, FLOATS, MODEST, close, close_to_differences, float_types, leaf, seeds, uniform

from sgpo_lib.losses.distillation import clipped_kl_loss
from sgpo_lib.losses.grpo import entropy_bonus, grpo_loss
from sgpo_lib.losses.head import Head
from sgpo_lib.losses.imitation import falls_back, luffy_loss, sft_loss
from sgpo_lib.losses.masked import LossOutput, response_mean_weights
from sgpo_lib.losses.token_kl import forward_kl_guided_to_unguided, token_logp_and_entropy

some_lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)
gammas = st.sampled_from([0.01, 0.1, 1.0, 30.0])

# Supervised -----------------------------------------------------------------------------------------------------------


@MODEST
@given(seeds, some_lengths, float_types)
def test_sft_matches_the_oracle(seed, lengths, dtype):
    n = sum(lengths)
    logp = leaf(uniform(seed, n, -4, 0), dtype)
    out = sft_loss(logp, torch.full((n,), 1 / n, dtype=dtype))
    responses = [piece.tolist() for piece in logp.detach().double().split(lengths)]
    close(out.loss, oracles.sft(responses), dtype)
    out.loss.backward()
    close(logp.grad, [-1 / n] * n, dtype)
    assert out.metrics["nll_token_count"] == n
    assert out.metrics["nll_sum"] == pytest.approx(-math.fsum(x for r in responses for x in r), rel=1e-5)


@MODEST
@given(seeds, some_lengths, float_types)
def test_a_mean_of_token_means_matches_the_oracle(seed, lengths, dtype):
    """As HPT and guided SFT weight their responses: each counts by its row's weight, long or short."""
    logp = leaf(uniform(seed, sum(lengths), -4, 0), dtype)
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    share = uniform(seed + 1, len(lengths), 0.1, 1, dtype)
    out = sft_loss(logp, response_mean_weights(torch.tensor(lengths), row, share))
    responses = [piece.tolist() for piece in logp.detach().double().split(lengths)]
    rows = list(zip(share.double().tolist(), responses, strict=True))
    close(out.loss, math.fsum(w * oracles.sft([r]) for w, r in rows), dtype)
    out.loss.backward()
    close(logp.grad, [-w / len(r) for w, r in rows for _ in r], dtype)


# LUFFY ----------------------------------------------------------------------------------------------------------------


@MODEST
@given(seeds, st.integers(1, 20), gammas, float_types)
def test_luffy_matches_the_oracle(seed, n, gamma, dtype):
    logp, advantage = leaf(uniform(seed, n, -8, 0), dtype), uniform(seed + 1, n, -1, 1, dtype)
    weight = uniform(seed + 2, n, 0, 1 / n, dtype)
    tokens = list(zip(*(t.detach().double().tolist() for t in (weight, logp, advantage)), strict=True))
    out = luffy_loss(logp, advantage, weight, gamma)
    close(out.loss, -math.fsum(w * oracles.shaped(x, a, gamma) for w, x, a in tokens), dtype)
    out.loss.backward()
    close(logp.grad, [w * oracles.shaped_slope(x, a, gamma) for w, x, a in tokens], dtype)
    assert out.metrics["expert_p_sum"] == pytest.approx(math.fsum(math.exp(x) for _, x, _ in tokens), rel=1e-5)
    assert out.metrics["expert_token_count"] == n


def test_luffy_by_hand():
    # p = 1/2, gamma = 1/2, A = 3, w = 2: loss -2 3 1/2 / 1 = -3; slope -2 3 (1/2)(1/2) / 1 = -1.5
    logp = leaf([math.log(0.5)])
    out = luffy_loss(logp, torch.tensor([3.0]).double(), torch.tensor([2.0]).double(), 0.5)
    out.loss.backward()
    close(out.loss, -3.0)
    close(logp.grad, [-1.5])


def test_luffy_gradient_matches_finite_differences_of_the_oracle():
    values, advantage = uniform(1, 8, -5, 0), uniform(2, 8, -1, 1)
    logp = leaf(values)
    luffy_loss(logp, advantage, torch.full((8,), 0.125).double(), 0.1).loss.backward()
    close_to_differences(logp.grad, lambda x: -math.fsum(
        oracles.shaped(v, a, 0.1) / 8 for v, a in zip(x.tolist(), advantage.tolist(), strict=True)), values)


def test_luffy_learns_tokens_of_probability_gamma_most():
    p = torch.arange(1, 1001).double() / 1000
    logp = leaf(p.log())
    luffy_loss(logp, torch.ones_like(p), torch.ones_like(p), 0.1).loss.backward()
    assert p[logp.grad.abs().argmax()].item() == pytest.approx(0.1, abs=1e-9)
    assert (logp.grad < 0).all()  # a good expert becomes more likely


@pytest.mark.parametrize("dtype", FLOATS)
def test_luffy_times_a_large_gamma_is_the_plain_policy_gradient(dtype):
    """gamma p / (p + gamma) tends to p, off by a share of p / gamma."""
    values, advantage, weight = uniform(3, 9, -5, 0), uniform(4, 9, -1, 1), torch.full((9,), 1 / 9)
    logp, gamma = leaf(values, dtype), 1e9
    out = luffy_loss(logp, advantage.to(dtype), weight.to(dtype), gamma)
    out.loss.backward()
    limit = -weight * advantage * values.exp()
    tolerance = 1e-8 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(gamma * out.loss.detach().double(), limit.sum(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gamma * logp.grad.double(), limit, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gamma", [0.0, -0.1])
def test_luffy_without_a_positive_gamma_raises(gamma):
    with pytest.raises(ValueError, match="gamma"):
        luffy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), gamma)


# HPT ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct, gate, expected", [
    (0, 0, True), (1, 0, False), (3, 3, True), (4, 3, False), (2, 3, True)])
def test_a_problem_falls_back_at_or_below_the_gate(correct, gate, expected):
    assert falls_back(correct, gate) is expected


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_micro_batch_without_tokens_gives_zero_not_nan(dtype):
    empty = torch.zeros(0, dtype=dtype)
    logp = leaf(empty, dtype)
    for out in (sft_loss(logp, empty), luffy_loss(logp, empty, empty, 0.1), grpo_loss(logp, empty, empty, empty, *CLIP),
                clipped_kl_loss(logp, empty, 1.0), entropy_bonus(logp, empty, 0.1)):
        out.loss.backward()
        assert out.loss == 0 and out.loss.dtype == dtype


# Every loss -----------------------------------------------------------------------------------------------------------


def test_losses_write_into_none_of_their_inputs_and_name_their_sums():
    tensors = [uniform(5, 4, -2, 0), uniform(6, 4, -2, 0), uniform(7, 4, -1, 1), uniform(8, 4, 0, 1)]
    before = [t.clone() for t in tensors]
    logp, old, advantage, weight = tensors
    outs = [grpo_loss(logp, old, advantage, weight, *CLIP), clipped_kl_loss(logp.abs(), weight, 0.5, "value"),
            sft_loss(logp, weight), luffy_loss(logp, advantage, weight, 0.1), entropy_bonus(logp.abs(), weight, 0.1)]
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert all(name.endswith(("_sum", "_count")) for out in outs for name in out.metrics)


def test_shapes_and_types_are_checked():
    three, two = torch.zeros(3), torch.zeros(2)
    with pytest.raises(TypeCheckError):
        grpo_loss(three, three, two, three, *CLIP)
    with pytest.raises(TypeCheckError):
        clipped_kl_loss(three, three[:, None], 1.0)
    with pytest.raises(TypeCheckError):
        luffy_loss(three, three, two, 0.1)
    with pytest.raises(TypeCheckError):
        forward_kl_guided_to_unguided(torch.zeros(3, 2), torch.zeros(4, 2), Head(torch.zeros(5, 2)), 2)
    with pytest.raises(TypeCheckError):
        token_logp_and_entropy(torch.zeros(3, 2), three, Head(torch.zeros(5, 2)), 2)  # targets are not integers
    with pytest.raises(TypeCheckError):
        LossOutput(three)

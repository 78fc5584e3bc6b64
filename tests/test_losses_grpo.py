"""Advantages, aggregation, the clipped surrogate and the entropy bonus against the oracles, values and gradients.

Shapes: N response tokens, G responses of a group, B rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses_common import CLIP, FLOATS, MODEST, close, close_to_differences, float_types, gradient, leaf, seeds, uniform
from torch import Tensor

from sgpo_lib.losses.grpo import entropy_bonus, group_advantages, grpo_loss
from sgpo_lib.losses.masked import Counts, response_mean_weights, sum_by_row, token_weights

NO_CLIP = (1.0, math.inf)
AGGREGATIONS = ["response_mean", "token_mean", "sequence_mean"]
DEVIATIONS = ["sample", "population", "none"]
groups = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=12)
lengths_of_groups = st.lists(st.integers(1, 6), min_size=2, max_size=6)

# Advantages -----------------------------------------------------------------------------------------------------------


@MODEST
@given(groups, st.sampled_from(DEVIATIONS), st.sampled_from([1e-6, 1e-4, 0.1]), float_types)
def test_advantages_match_the_oracle(rewards, std, eps, dtype):
    close(group_advantages(torch.tensor(rewards, dtype=dtype), eps, std), oracles.advantages(rewards, eps, std), dtype)


@pytest.mark.parametrize("std, expected", [
    ("sample", [1.5, -0.5, -0.5, -0.5]), ("population", [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]),
    ("none", [0.75, -0.25, -0.25, -0.25])])
def test_advantages_by_hand(std, expected):
    # rewards 1, 0, 0, 0: mean 1/4; sample variance (9/16 + 3/16) / 3 = 1/4, population variance 3/16
    rewards = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    close(group_advantages(rewards, 0.0, std), expected)
    if std != "none":  # eps is added to the deviation, not to the variance
        deviation = rewards.std(correction=int(std == "sample")).item()
        close(group_advantages(rewards, 0.5, std), [a * deviation / (deviation + 0.5) for a in expected])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 11, 12])
@pytest.mark.parametrize("std", DEVIATIONS)
def test_a_group_of_equal_rewards_has_no_advantage(reward, size, dtype, std):
    """Not even where rounding of the mean, divided by eps, would make one of a user's fractional rewards."""
    rewards = torch.full((size,), reward, dtype=dtype)
    assert torch.equal(group_advantages(rewards, 1e-6, std), torch.zeros(size, dtype=dtype))


@pytest.mark.parametrize("rewards", [[], [1.0]])
@pytest.mark.parametrize("std", DEVIATIONS)
def test_a_group_below_two_raises(rewards, std):
    with pytest.raises(ValueError, match=f"group of {len(rewards)}"):
        group_advantages(torch.tensor(rewards), 1e-6, std)


def test_an_unknown_deviation_raises():
    with pytest.raises(ValueError, match=r"unbiased.*'sample', 'population' or 'none'"):
        group_advantages(torch.tensor([0.0, 1.0]), 1e-6, "unbiased")


# From tokens to a mean ------------------------------------------------------------------------------------------------


def weights_of(lengths: list[int], how: str = "response_mean", dtype: torch.dtype = torch.float64,
               longest: int = 9) -> Tensor:
    """Weights of the tokens where these responses are the whole mini-batch."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return token_weights(how, torch.tensor(lengths), row, Counts(len(lengths), sum(lengths), longest), dtype)


@MODEST
@given(seeds, st.lists(st.integers(1, 6), min_size=1, max_size=6), st.sampled_from(AGGREGATIONS), float_types)
def test_weighted_sums_are_the_oracles_means(seed, lengths, how, dtype):
    values = uniform(seed, sum(lengths), -2, 2, dtype)
    pieces = [piece.tolist() for piece in values.double().split(lengths)]
    close((values * weights_of(lengths, how, dtype)).sum(),
          oracles.aggregate(pieces, how, len(lengths), sum(lengths), 9), dtype)


def test_weights_by_hand():
    # responses of 2, 1 and 3 tokens, part of a mini-batch of 4 responses with 10 tokens, at most 5 tokens each
    lengths, row, counts = torch.tensor([2, 1, 3]), torch.tensor([0, 0, 1, 2, 2, 2]), Counts(4, 10, 5)
    for how, expected in {"response_mean": [1 / 8, 1 / 8, 1 / 4, *[1 / 12] * 3], "token_mean": [0.1] * 6,
                          "sequence_mean": [1 / 20] * 6}.items():
        close(token_weights(how, lengths, row, counts, torch.float64), expected)
    assert token_weights("token_mean", lengths, row, counts).dtype == torch.float32
    close(response_mean_weights(lengths, row, torch.tensor([1.0, 0.5, 6.0]).double()), [0.5, 0.5, 0.5, 2.0, 2.0, 2.0])
    value = torch.arange(6, dtype=torch.float64)
    close(sum_by_row(value, row, 3), [1.0, 2.0, 12.0])
    close(sum_by_row(value, row, 4), [1.0, 2.0, 12.0, 0.0])  # a row without tokens


@pytest.mark.parametrize("dtype", FLOATS)
def test_aggregations_coincide_where_they_must(dtype):
    equal, longest = [4, 4, 4], [9, 9]
    assert torch.equal(weights_of(equal, "token_mean", dtype), weights_of(equal, "response_mean", dtype))
    close(weights_of(equal, "token_mean", dtype), [1 / 12] * 12, dtype)
    assert torch.equal(weights_of(longest, "sequence_mean", dtype), weights_of(longest, "response_mean", dtype))
    close(weights_of(longest, "sequence_mean", dtype), [1 / 18] * 18, dtype)
    for a, b in [(0, 1), (0, 2), (1, 2)]:  # and differ elsewhere
        assert not torch.allclose(weights_of([1, 4], AGGREGATIONS[a]), weights_of([1, 4], AGGREGATIONS[b]), rtol=1e-2)


def test_an_unknown_aggregation_raises():
    with pytest.raises(ValueError, match=r"mean.*response_mean, token_mean, sequence_mean"):
        weights_of([1, 2], "mean")


def test_sum_by_row_carries_the_gradient():
    value = leaf([1.0] * 4)
    (sum_by_row(value, torch.tensor([0, 1, 1, 0]), 2) * torch.tensor([3.0, 5.0]).double()).sum().backward()
    assert value.grad.tolist() == [3, 5, 5, 3]


# The clipped surrogate (Eq. 1) ----------------------------------------------------------------------------------------


@dataclass
class Group:
    """One problem's group as flat token tensors; ratios from 0.4 to 2.5, so that both bounds bind for both signs."""

    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    weight: Tensor
    lengths: list[int]
    how: str

    def loss(self, logp: Tensor | np.ndarray, clip: tuple[float, float]) -> float:
        """By the oracle."""
        rows = [x.tolist() for x in torch.as_tensor(logp).detach().double().split(self.lengths)]
        old, advantage = ([x.tolist() for x in t.double().split(self.lengths)] for t in (self.old_logp, self.advantage))
        values = [[oracles.surrogate(n, o, a[0], *clip) for n, o in zip(new, before, strict=True)]
                  for new, before, a in zip(rows, old, advantage, strict=True)]
        return -oracles.aggregate(values, self.how, len(rows), sum(self.lengths), 9)


def make_group(seed: int, lengths: list[int], dtype: torch.dtype = torch.float64, rewards: list[float] | None = None,
               how: str = "response_mean", std: str = "sample") -> Group:
    n = sum(lengths)
    logp = uniform(seed, n, -3.01, -0.01, dtype)
    old_logp = (logp.double() + uniform(seed + 1, n, -0.9, 0.9)).to(dtype)
    if rewards is None:
        rewards = (uniform(seed, len(lengths), 0, 1) > 0.5).double().tolist()
    advantage = torch.tensor(oracles.advantages(rewards, 1e-6, std), dtype=dtype)
    return Group(logp, old_logp, advantage.repeat_interleave(torch.tensor(lengths)), weights_of(lengths, how, dtype),
                 lengths, how)


def naive_gradient(g: Group, clip: tuple[float, float]) -> list[float]:
    """-w A rho, and 0 where the clipped branch is the smaller one."""
    found = []
    for x, old, a, w in zip(*(t.double().tolist() for t in (g.logp, g.old_logp, g.advantage, g.weight)), strict=True):
        rho = math.exp(x - old)
        bound = (a > 0 and rho > 1 + clip[1]) or (a < 0 and rho < 1 - clip[0])
        found.append(0.0 if bound else -w * a * rho)
    return found


@MODEST
@given(seeds, lengths_of_groups, float_types, st.sampled_from(AGGREGATIONS), st.sampled_from([CLIP, NO_CLIP]),
       st.sampled_from(DEVIATIONS))
def test_grpo_matches_the_oracle(seed, lengths, dtype, how, clip, std):
    g = make_group(seed, lengths, dtype, how=how, std=std)
    logp = leaf(g.logp, dtype)
    out = grpo_loss(logp, g.old_logp, g.advantage, g.weight, *clip)
    close(out.loss, g.loss(g.logp, clip), dtype)
    out.loss.backward()
    close(logp.grad, naive_gradient(g, clip), dtype)


@pytest.mark.parametrize("clip", [CLIP, NO_CLIP])
def test_grpo_gradient_matches_finite_differences_of_the_oracle(clip):
    g = make_group(1, [3, 1, 4], rewards=[1.0, 0.0, 1.0])
    logp = leaf(g.logp)
    grpo_loss(logp, g.old_logp, g.advantage, g.weight, *clip).loss.backward()
    close_to_differences(logp.grad, lambda x: g.loss(x, clip), g.logp)


@pytest.mark.parametrize("advantage, ratio, value, slope, clipped", [
    (1.0, 1.5, 1.28, 0.0, 1), (1.0, 0.5, 0.5, 0.5, 0), (-1.0, 0.5, -0.8, 0.0, 1), (-1.0, 1.5, -1.5, -1.5, 0),
    (1.0, 1.0, 1.0, 1.0, 0), (-1.0, 1.0, -1.0, -1.0, 0), (0.0, 3.0, 0.0, 0.0, 0),
])  # fmt: skip
def test_the_clip_binds_where_the_table_says(advantage, ratio, value, slope, clipped):
    logp, one = leaf([math.log(ratio)]), torch.ones(1, dtype=torch.float64)
    for clip in (CLIP, NO_CLIP):  # without clipping: rho A, always
        logp.grad = None
        out = grpo_loss(logp, 0 * one, advantage * one, one, *clip)
        free = clip == NO_CLIP
        close(out.loss, -advantage * ratio if free else -value)
        out.loss.backward()
        close(logp.grad, [-advantage * ratio if free else -slope])
        assert out.metrics == {"policy_clipped_count": 0 if free else clipped, "policy_token_count": 1}


@pytest.mark.parametrize("clip", [CLIP, NO_CLIP])
def test_on_policy_gradient_is_that_of_reinforce(clip):
    g = make_group(2, [2, 5, 1, 3], rewards=[1.0, 0.0, 0.0, 1.0])
    logp = leaf(g.logp)
    out = grpo_loss(logp, g.logp, g.advantage, g.weight, *clip)
    out.loss.backward()
    assert torch.equal(logp.grad, -(g.weight * g.advantage)) and logp.grad.all()
    assert out.metrics["policy_clipped_count"] == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_all_correct_and_all_wrong_groups_teach_nothing(reward, dtype):
    g = make_group(3, [1, 4, 2], dtype)
    advantage = group_advantages(torch.full((3,), reward, dtype=dtype), 1e-6)
    logp = leaf(g.logp, dtype)
    out = grpo_loss(logp, g.old_logp, advantage.repeat_interleave(torch.tensor(g.lengths)), g.weight, *CLIP)
    out.loss.backward()
    assert out.loss == 0 and not logp.grad.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_clipped_tokens_get_exactly_no_gradient(dtype):
    g = make_group(4, [9, 9], dtype, [1.0, 0.0])
    logp = leaf(g.logp, dtype)
    out = grpo_loss(logp, g.old_logp, g.advantage, g.weight, *CLIP)
    out.loss.backward()
    bound = torch.tensor(naive_gradient(g, CLIP)) == 0
    assert 0 < bound.sum() < len(bound)
    assert torch.equal(logp.grad == 0, bound)
    assert out.metrics["policy_clipped_count"] == bound.sum()


@pytest.mark.parametrize("advantage, clip, value", [
    (1.0, CLIP, 1.28), (0.0, CLIP, 0.0), (-1.0, CLIP, -math.exp(20)), (1.0, NO_CLIP, math.exp(20))])
def test_a_ratio_beyond_float32_is_finite_and_has_no_gradient(advantage, clip, value):
    """exp(100) overflows float32. Where nothing clips above, the log-ratio is held at 20 (departure 5 of grpo.py)."""
    logp = leaf([0.0], torch.float32)
    out = grpo_loss(logp, torch.tensor([-100.0]), torch.tensor([advantage]), torch.tensor([1.0]), *clip)
    out.loss.backward()
    close(out.loss, -value, torch.float32)
    assert torch.equal(logp.grad, torch.zeros(1))


# Entropy bonus --------------------------------------------------------------------------------------------------------


@MODEST
@given(seeds, lengths_of_groups, float_types, st.sampled_from(AGGREGATIONS), st.sampled_from([0.001, 0.3, 0.0]))
def test_the_entropy_bonus_matches_the_oracle(seed, lengths, dtype, how, coefficient):
    logits = uniform(seed, 5 * sum(lengths), -2, 2).view(-1, 5).tolist()
    entropy = leaf(oracles.entropies(logits), dtype)
    pieces = [piece.tolist() for piece in entropy.detach().double().split(lengths)]
    out = entropy_bonus(entropy, weights_of(lengths, how, dtype), coefficient)
    close(out.loss, -coefficient * oracles.aggregate(pieces, how, len(lengths), sum(lengths), 9), dtype)
    out.loss.backward()
    share = {"response_mean": [1 / len(lengths) / n for n in lengths for _ in range(n)],
             "token_mean": [1 / sum(lengths)] * sum(lengths),
             "sequence_mean": [1 / len(lengths) / 9] * sum(lengths)}[how]
    close(gradient(entropy), [-coefficient * w for w in share], dtype)

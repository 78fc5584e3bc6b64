"""The whole loss of a mini-batch, every method, through `objective.py`, against the oracle's total over plain numbers.

The policy is one that a loop can follow: its state after some tokens is the tanh of the mean of their embeddings. The
oracle gets its logits from such a loop, without padding, batches or `sgpo_lib`; gradients are the oracle's central
differences in every weight, with old log-probabilities and the guided side held fixed. `test_objective.py` asks the
same of a transformer, by naive autograd.

Shapes: N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_common import TOLERANCE, difference_gradient, gradient, leaf
from torch import Tensor

from sgpo_lib.batching import LAYOUTS, TokenBatch
from sgpo_lib.guards import Guard
from sgpo_lib.guided_side import GuidedSide
from sgpo_lib.losses.head import Head
from sgpo_lib.objective import accumulate, autonomous_logp, plan
from sgpo_lib.recipes import METHODS, from_parameters
from sgpo_lib.records import Problem, Rollout, RolloutGroup, Verdict
from sgpo_lib.session import Session
from sgpo_lib.supervised import supervised_step, validation_loss
from sgpo_lib.world import World as Workers

VOCABULARY, HIDDEN, LONGEST = 5, 2, 7
VALUE = TOLERANCE[torch.float64]
DIFFERENCES = {"rtol": 1e-6, "atol": 1e-8}
"""Central differences are good to about 1e-9; gradients to 1e-10 are in test_objective.py."""
Weights = list[np.ndarray]
"""Embedding (V x H), output matrix (V x H), bias (V)."""
MIXED = [([1, 0, 0, 1], [1, 0, 1], 1), ([0, 0, 0, 0], [1, 1, 0], 1), ([1, 1, 0, 1], [0, 1, 1], 0),
         ([0, 1, 0, 0], [0, 0, 0], 1)]
"""Per problem: rewards of the autonomous group, of the guided group, of the expert solution."""
CORNERS = {"all correct": [([1, 1, 1], [1, 0], 1)], "all wrong, guidance helps": [([0, 0, 0], [0, 1], 1)],
           "C empty": [([1, 0], [0, 0], 0)], "nothing at all": [([0, 0], [0], 0), ([0, 0], [0], 0)],
           "everything": [([1, 1], [1, 1], 1)]}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("sgpo", {"aggregation": "token_mean"}), ("sgpo", {"aggregation": "sequence_mean"}),
    ("sgpo", {"target_selection": "most_reachable_per_token"}), ("sgpo", {"advantage_std": "population"}),
    ("sgpo", {"guided_side": "frozen"}), ("reverse_kl", {"guided_side": "frozen"}),
    ("sgpo", {"entropy_coefficient": 0.3}), ("luffy", {"entropy_coefficient": 0.3, "aggregation": "response_mean"}),
    ("luffy", {"shaping_gamma": 0.5, "aggregation": "token_mean"}),
    ("hpt", {"entropy_coefficient": 0.3, "expert_gate": 1}), ("hpt", {"expert_coefficient": 0.3}),
    ("hpt", {"aggregation": "token_mean", "expert_gate": 2}), ("hpt", {"aggregation": "response_mean"}),
    ("guided_sft", {"target_selection": "all_correct"}), ("no_grpo", {"weighting": "group_advantage"}),
    ("no_adaptive_weight", {"alpha_fixed": 2.5}), ("sgpo", {"expert": "fallback"}), ("sgpo", {"expert": "group"}),
]
RL = [name for name, method in METHODS.items() if method.objective == "rl"]


class PrefixPolicy:
    """What the objective uses of a policy."""

    device = torch.device("cpu")

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self.weights = [leaf(torch.tensor(w), dtype) for w in weights]

    def parameters(self) -> list[Tensor]:
        return self.weights

    def head(self) -> Head:
        return Head(self.weights[1], self.weights[2])

    def token_batch(self, rows: Any, layout: str) -> TokenBatch:
        return TokenBatch.build(rows, pad_id=0, layout=layout)

    def response_hidden(self, batch: TokenBatch) -> Tensor:
        sums = torch.nn.functional.pad(self.weights[0][batch.input_ids_RS.flatten()].cumsum(0), (0, 0, 1, 0))
        last, position = batch.predictor_N, batch.position_ids_RS.flatten()[batch.predictor_N]
        return torch.tanh((sums[last + 1] - sums[last - position]) / (position + 1)[:, None])


class FakeSession:
    """What the objective and the supervised step use of a session."""

    logp_and_entropy, micro_batches, backward = Session.logp_and_entropy, Session.micro_batches, Session.backward
    world = Workers()

    def __init__(self, config: Any, weights: Weights, dtype: torch.dtype = torch.float64) -> None:
        self.config, self.policy = config, PrefixPolicy(weights, dtype)
        self.work = collections.Counter()
        self.guided_side = GuidedSide(self.policy, config.method.guided_side, config.method.ema_decay)
        self.step, self.guard = 0, Guard(Path(), self.policy, self.world)

    def batch_of(self, rows: Any, step: int) -> Any:
        return rows

    def phase(self, name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def update(self, step: int) -> float:
        return 0.0

    def learning_rate(self, step: int) -> float:
        return 0.0


@dataclass
class World:
    groups: list[RolloutGroup]
    old: Weights
    """Those of the first update: old log-probabilities, and the guided side where it is frozen."""
    now: Weights


def make_world(seed: int, rewards: list[tuple[list[int], list[int], int]] = MIXED, lengths: str = "any") -> World:
    """`lengths` of responses: `any`, `one` token each, or `distinct` (no two of a problem share theirs)."""
    rng = np.random.default_rng(seed)
    shapes = (VOCABULARY, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)
    old = [1.5 * rng.normal(size=shape) for shape in shapes]

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, VOCABULARY, n).tolist())

    groups = []
    for i, (autonomous, guided, expert) in enumerate(rewards):
        flat = [*autonomous, *guided, expert]
        of_length = {"any": rng.integers(1, LONGEST + 1, len(flat)), "one": [1] * len(flat),
                     "distinct": rng.permutation(len(flat)) + 1}[lengths]
        own = ids(rng.integers(1, 4))
        group = RolloutGroup(Problem(str(i), "", ""), [], [], own, ids(2) + own)
        for j, (reward, n) in enumerate(zip(flat, of_length, strict=True)):
            is_guided = len(autonomous) <= j < len(flat) - 1
            rollout = Rollout(str(i), is_guided, j, group.guided_prompt_ids if is_guided else own, ids(int(n)), "", "",
                              (0.0,) * int(n), Verdict("correct" if reward == 1 else "wrong", float(reward)))
            if j == len(flat) - 1:
                group.expert = rollout
            else:
                (group.guided if is_guided else group.autonomous).append(rollout)
        groups.append(group)
    return World(groups, old, [w + 0.25 * rng.normal(size=w.shape) for w in old])


def changes_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """With a delta that clips some tokens, where the method clips."""
    clips = oracles.METHODS[name].kl_delta < math.inf and oracles.METHODS[name].distillation != "none"
    return {"max_new_tokens": LONGEST, **({"kl_delta": 0.25} if clips else {}), **options}


def logits(weights: Weights, prompt: tuple[int, ...], response: tuple[int, ...]) -> np.ndarray:
    """Of each response token, one prefix at a time."""
    embedding, matrix, bias = weights
    sequence = [*prompt, *response]
    return np.stack([matrix @ np.tanh(sum(embedding[i] for i in sequence[:t]) / t) + bias
                     for t in range(len(prompt), len(sequence))])


def oracle_of(world: World, name: str, options: dict[str, Any], on_policy: bool = False) -> Callable[[Weights], float]:
    """The oracle's total as a function of the weights that train; what carries no gradient stays that of `world`."""
    options = dict(options)
    teacher = world.old if options.pop("guided_side", "live") == "frozen" else world.now
    settings_of_oracle = replace(oracles.METHODS[name], **options)
    before = world.now if on_policy else world.old
    problems, rows = [], []
    for g in world.groups:
        responses = [oracles.Response(list(o.token_ids), o.reward, []) for o in g.responses]
        autonomous, guided = responses[: len(g.autonomous)], responses[len(g.autonomous) : -1]
        for o in autonomous:
            o.old_logps = oracles.token_logps(logits(before, g.unguided_prompt_ids, tuple(o.tokens)), o.tokens)
        for o in guided:
            o.guided_logits = logits(teacher, g.guided_prompt_ids, tuple(o.tokens))
        problems.append(oracles.Problem(autonomous, guided, responses[-1]))
        rows += [(o, g.unguided_prompt_ids) for o in responses]

    def total(weights: Weights) -> float:
        for o, prompt in rows:
            o.logits = logits(weights, prompt, tuple(o.tokens))
        return oracles.total_loss(problems, settings_of_oracle)

    return total


def differences(function: Callable[[Weights], float], weights: Weights) -> Weights:
    """Central differences of the oracle in every weight."""
    return [difference_gradient(lambda x, k=k: function([*weights[:k], x, *weights[k + 1 :]]), w)
            for k, w in enumerate(weights)]


def ours(world: World, name: str, options: dict[str, Any], groups: list[RolloutGroup] | None = None,
         on_policy: bool = False, dtype: torch.dtype = torch.float64, **train: Any
         ) -> tuple[float, list[Tensor], collections.Counter]:
    """(loss, gradients, sums) of a mini-batch after an update away from the weights of the old log-probabilities."""
    fields = {"kl_chunk_tokens": 4, "micro_batch": 100, "skip_untaught": False, **options, **train}
    session: Any = FakeSession(from_parameters("tiny", name, **fields), world.old, dtype)
    groups = world.groups if groups is None else groups
    old = autonomous_logp(session, plan(session, groups))
    with torch.no_grad():
        for parameter, new in zip(session.policy.parameters(), world.now, strict=True):
            parameter.copy_(torch.tensor(new))
    sums: collections.Counter = collections.Counter()
    accumulate(session, plan(session, groups), None if on_policy else old, sums)
    loss = math.fsum(v for k, v in sums.items() if k.startswith("loss_"))
    return loss, [gradient(w) for w in session.policy.parameters()], sums


def check(world: World, name: str, options: dict[str, Any], tolerance: dict[str, float] | None = None,
          **how: Any) -> collections.Counter:
    """Value and gradient against the oracle; returns the sums."""
    loss, found, sums = ours(world, name, options, **how)
    oracle = oracle_of(world, name, options, how.get("on_policy", False))
    np.testing.assert_allclose(loss, oracle(world.now), **(tolerance or VALUE))
    for got, wanted in zip(found, differences(oracle, world.now), strict=True):
        np.testing.assert_allclose(got, wanted, **(tolerance or DIFFERENCES))
    return sums


# Agreement ------------------------------------------------------------------------------------------------------------


def test_every_method_has_an_oracle():
    assert set(oracles.METHODS) == set(RL)


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in RL), *OPTIONS],
                         ids=lambda v: v if isinstance(v, str) else ",".join(map(str, v.values())) or "-")
def test_the_total_matches_the_oracle(name, options):
    options = changes_of(name, options)
    sums = check(make_world(10), name, options)
    s = replace(oracles.METHODS[name], **{k: v for k, v in options.items() if k != "guided_side"})
    if s.policy_gradient:
        assert (0 < sums["policy_clipped_count"] < sums["policy_token_count"]) == (s.clip_low < 1)
    if s.distillation in ("forward_kl", "reverse_kl"):
        assert (0 < sums["kl_clipped_count"] < sums["kl_token_count"]) == (s.kl_delta < math.inf)
    assert (sums["expert_token_count"] > 0) == (s.expert != "none")


@pytest.mark.parametrize("name", RL)
def test_the_total_in_float32_matches_the_oracle(name):
    world = make_world(10)
    for weights in (world.old, world.now):
        weights[:] = [w.astype(np.float32).astype(np.float64) for w in weights]
    check(world, name, changes_of(name, {}), TOLERANCE[torch.float32], dtype=torch.float32)


@pytest.mark.parametrize("name", ["sgpo", "reverse_kl", "no_proximal"])
def test_the_total_with_clipping_by_value_matches_the_oracle(name):
    """The value alone: `value` has another gradient than its own derivative (test_losses_distillation.py)."""
    options = changes_of(name, {"kl_clip": "value"})
    world = make_world(10)
    loss, _, sums = ours(world, name, options)
    np.testing.assert_allclose(loss, oracle_of(world, name, options)(world.now), **VALUE)
    assert (sums["kl_clipped_count"] > 0) == (name != "no_proximal")


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("name", ["sgpo", "luffy", "hpt", "group_advantage_weight", "no_grpo", "guided_sft"])
def test_the_total_in_corner_cases(name, corner):
    for lengths in ("one", "distinct"):
        check(make_world(2, CORNERS[corner], lengths), name, changes_of(name, {}))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([*((name, {}) for name in RL), *OPTIONS]), st.sampled_from(LAYOUTS[:3]),
       st.sampled_from(["any", "one", "distinct"]), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.05, 0.5]))
def test_the_total_of_random_batches_matches_the_oracle(seed, case, layout, lengths, micro_batch, chunk, delta):
    """Values, and the derivative along one random direction."""
    rng = np.random.default_rng(seed)
    g1, g2 = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    rewards = [(rng.integers(0, 2, g1).tolist(), rng.integers(0, 2, g2).tolist(), int(rng.integers(0, 2)))
               for _ in range(rng.integers(1, 4))]
    world, name = make_world(seed, rewards, lengths), case[0]
    options = changes_of(name, case[1])
    options |= {"kl_delta": delta} if "kl_delta" in options else {}
    loss, found, _ = ours(world, name, options, layout=layout, micro_batch=micro_batch, kl_chunk_tokens=chunk)
    oracle = oracle_of(world, name, options)
    np.testing.assert_allclose(loss, oracle(world.now), **VALUE)
    along = [rng.normal(size=w.shape) for w in world.now]

    def at(x: np.ndarray) -> float:
        return oracle([w + x[0] * d for w, d in zip(world.now, along, strict=True)])

    slope = sum(float((g.numpy() * d).sum()) for g, d in zip(found, along, strict=True))
    np.testing.assert_allclose(slope, difference_gradient(at, np.zeros(1))[0], **DIFFERENCES)


# Identities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RL, "value"])
def test_one_batch_equals_its_micro_batches_and_its_shuffled_and_packed_forms(name):
    name, options = ("sgpo", {"kl_clip": "value"}) if name == "value" else (name, {})
    options = changes_of(name, options)
    world = make_world(10)
    whole, whole_gradient, whole_sums = ours(world, name, options)
    np.testing.assert_allclose(whole, oracle_of(world, name, options)(world.now), **VALUE)
    shuffled = [replace(world.groups[i], autonomous=world.groups[i].autonomous[::-1]) for i in (2, 0, 3, 1)]
    for micro_batch, layout, groups in [(1, "left", None), (100, "packed", None), (3, "right", shuffled)]:
        loss, found, sums = ours(world, name, options, groups, micro_batch=micro_batch, layout=layout)
        assert loss == pytest.approx(whole, rel=1e-7)  # the order of a group's rewards moves float32 advantages
        assert sums == pytest.approx(whole_sums, rel=1e-7, abs=1e-9)
        for a, b in zip(found, whole_gradient, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
            if groups is None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_alpha_zero_is_grpo_bit_for_bit():
    world = make_world(4)
    grpo, expected, _ = ours(world, "grpo8", {"max_new_tokens": LONGEST})
    for options in ({"weighting": "fixed", "alpha_fixed": 0.0}, {"alpha_base": 0.0}, {"alpha_max": 0.0}):
        loss, found, sums = ours(world, "sgpo", {"max_new_tokens": LONGEST, **options})
        assert loss == grpo and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not sums["kl_token_count"]
    np.testing.assert_allclose(grpo, oracle_of(world, "grpo8", {"max_new_tokens": LONGEST})(world.now), **VALUE)
    _, found, _ = ours(world, "sgpo", {"max_new_tokens": LONGEST})
    assert not torch.equal(found[0], expected[0])


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
def test_equal_prompts_distil_nothing(direction):
    world = make_world(5)
    for group in world.groups:
        group.guided_prompt_ids = group.unguided_prompt_ids
    options = {"distillation": direction}
    loss, found, sums = ours(world, "no_grpo", options)
    assert sums["kl_token_count"] > 0 and loss == 0
    assert all(g.abs().max() < 1e-15 for g in found)
    np.testing.assert_allclose(oracle_of(world, "no_grpo", options)(world.now), 0, atol=1e-15)


@pytest.mark.parametrize("name", ["sgpo", "luffy", "hpt"])
def test_without_old_log_probabilities_the_policy_is_its_own_old_one(name):
    world, options = make_world(6), changes_of(name, {})
    assert check(world, name, options, on_policy=True)["policy_clipped_count"] == 0


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_the_supervised_step_is_the_token_mean_of_its_batch(micro_batch, layout):
    world = make_world(7)
    rows = [g.expert for g in world.groups]
    config = from_parameters("tiny", "sft", micro_batch=micro_batch, layout=layout, kl_chunk_tokens=4)
    session: Any = FakeSession(config, world.now)

    def loss(weights: Weights) -> float:
        return oracles.sft([oracles.token_logps(logits(weights, o.prompt_ids, o.token_ids), o.token_ids) for o in rows])

    np.testing.assert_allclose(supervised_step(session, 1, rows)["loss"], loss(world.now), rtol=1e-10)
    np.testing.assert_allclose(validation_loss(session, rows), loss(world.now), rtol=1e-10)
    for got, wanted in zip(session.policy.parameters(), differences(loss, world.now), strict=True):
        np.testing.assert_allclose(got.grad, wanted, **DIFFERENCES)

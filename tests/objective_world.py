"""Written problems, two sets of weights and the objective between them, for the tests of `objective.py`.

Off-policy as in a batch's later updates: advantages, targets and old log-probabilities are taken under the weights
`start`, one update leads to `moved`, and gradients are taken there. Everything in float64.

Shape suffixes: T tokens of one response, V vocabulary.
"""

from __future__ import annotations

import collections
import copy
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sgpo_lib.config import RunConfig
from sgpo_lib.guards import Guard
from sgpo_lib.guided_side import GuidedSide
from sgpo_lib.objective import ProblemWork, accumulate, autonomous_logp, plan
from sgpo_lib.policy import Policy
from sgpo_lib.recipes import METHODS, from_parameters
from sgpo_lib.records import Problem, Rollout, RolloutGroup, Verdict
from sgpo_lib.session import Session
from sgpo_lib.world import World as Workers

LONGEST = 20
"""max_new_tokens of every case."""
VOCABULARY, PAD, END = 60, 0, 1
"""Size of the made-up vocabulary, and its two special ids."""
SEED = 26
"""Of the responses: a draw in which other rules of selection pick other targets (`test_objective.py` looks)."""
REWARDS = [
    ((1, 0, 0, 1), (1, 1, 0), 1),  # mixed
    ((1, 1, 1, 1), (0, 1, 0), 1),  # every autonomous response correct
    ((0, 0, 0, 0), (1, 1, 1), 1),  # none: HPT falls back
    ((1, 0, 0, 0), (0, 0, 0), 1),  # no guided response correct: C is empty
    ((0, 0, 1, 0), (0, 1, 1), 0),  # an expert solution that is judged wrong
    ((0, 0.5, 1, 0), (0.5, 1, 0), 1),  # rewards in between, which are not "correct"
]
"""Rewards of each problem's autonomous group, guided group and expert solution."""


class FakeSession:
    """The part of a session that the objective uses."""

    logp_and_entropy, micro_batches, backward = Session.logp_and_entropy, Session.micro_batches, Session.backward
    phase = Session.phase
    world = Workers()

    def __init__(self, config: RunConfig, policy: Policy):
        self.config, self.policy = config, policy
        self.seconds, self.work, self.memory = {}, collections.Counter(), None
        self.guided_side = GuidedSide(policy, config.method.guided_side, config.method.ema_decay)
        self.guard = Guard(Path(), policy, self.world)


class Scores:
    """log pi(. | prompt, response so far) of each response token (T x V), from a model's own full logits."""

    def __init__(self, model: Any):
        self.model = model
        self.seen: dict[Any, torch.Tensor] = {}

    def __call__(self, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        key = (tuple(prompt), tuple(response))
        if key not in self.seen:
            logits = self.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
            self.seen[key] = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        return self.seen[key]

    def of_tokens(self, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        """log pi of the tokens themselves (T)."""
        return torch.stack([row[token] for row, token in zip(self(prompt, response), response, strict=True)])


@dataclass
class World:
    """Two sets of weights with their scores, and problems with written responses."""

    start: Scores
    moved: Scores
    groups: list[RolloutGroup]

    def average(self, decay: float) -> Scores:
        """Scores under decay `start` + (1 - decay) `moved`."""
        model = copy.deepcopy(self.start.model)
        with torch.no_grad():
            for mean, old, new in zip(*(m.parameters() for m in (model, self.start.model, self.moved.model)),
                                      strict=True):
                mean.copy_(decay * old + (1 - decay) * new)
        return Scores(model)


@functools.cache
def make_world() -> World:
    """The same one for every test: nobody may change it."""
    start = small_model()
    return World(Scores(start), Scores(with_noise(start, 0.04, seed=2)), written_groups())


def small_model() -> Any:
    """Far from uniform: a fresh Qwen3 with weights of deviation 0.18 instead of 0.02."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCABULARY, tie_word_embeddings=True, hidden_size=32, num_hidden_layers=2, head_dim=16,
        intermediate_size=48, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
    return with_noise(model, 0.18, seed=1)


def with_noise(model: Any, size: float, seed: int) -> Any:
    """A copy with Gaussian noise on every weight."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def judged(reward: float) -> Verdict:
    return Verdict("correct" if reward == 1 else "wrong", float(reward))


def written_groups(rewards: Sequence[Any] = REWARDS) -> list[RolloutGroup]:
    """A problem per row of rewards. Tokens, lengths and the sampler's log-probabilities are made up."""
    rng = random.Random(SEED)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randint(low, high)))

    groups = []
    for number, (autonomous, guided, expert) in enumerate(rewards):
        problem = Problem(f"p{number}", "", "")
        unguided = tokens(8, 14)
        prompts = {False: unguided, True: (*tokens(6, 12), *unguided)}
        group = RolloutGroup(problem, [], [], prompts[False], prompts[True])
        for is_guided, values in ((False, autonomous), (True, guided)):
            for i, reward in enumerate(values):
                ids = (*tokens(1, 14), END)
                made_up = tuple(-rng.random() for _ in ids)
                (group.guided if is_guided else group.autonomous).append(Rollout(
                    problem.id, is_guided, i, prompts[is_guided], ids, "", "end", made_up, judged(reward)))
        group.expert = Rollout(problem.id, False, 0, unguided, (*tokens(12, 24), END), "", "written",
                               verdict=judged(expert))
        groups.append(group)
    return groups


def configured(name: str, micro_batch: int = 128, **changes: Any) -> RunConfig:
    """A method's configuration with small groups, and with a delta that clips about half of the tokens."""
    method = METHODS[name]
    sizes: dict[str, Any] = {"g1": 4, "g2": 3 if method.g2 else 0, "max_new_tokens": LONGEST, "kl_chunk_tokens": 16,
                             "skip_untaught": False, "kl_delta": 0.45 if method.kl_delta < math.inf else math.inf}
    return from_parameters("tiny", name, **{**sizes, "micro_batch": micro_batch, **changes})


def opened(world: World, config: RunConfig, pad: int = PAD) -> Any:
    """A session on a copy of the weights `start`."""
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=END)
    policy = Policy(copy.deepcopy(world.start.model), tokenizer, torch.device("cpu"), lora=False, context=512)
    return FakeSession(config, policy)


def update(world: World, session: Any) -> None:
    """What an optimizer update does to a session: the weights become `moved`, and the guided side follows."""
    with torch.no_grad():
        for parameter, new in zip(session.policy.model.parameters(), world.moved.model.parameters(), strict=True):
            parameter.copy_(new)
    session.guided_side.follow()


def gradient(session: Any, works: Sequence[ProblemWork],
             old: dict[int, torch.Tensor] | None) -> tuple[dict[str, torch.Tensor], collections.Counter]:
    """(gradient by name of parameter, sums) of a mini-batch at the session's weights."""
    sums: collections.Counter = collections.Counter()
    session.policy.model.zero_grad()
    accumulate(session, works, old, sums)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in session.policy.model.named_parameters()}, sums


def ours(world: World, config: RunConfig, groups: Sequence[RolloutGroup] | None = None, pad: int = PAD
         ) -> tuple[dict[str, torch.Tensor], collections.Counter, list[ProblemWork]]:
    """(gradient, sums, works) of a mini-batch after one update away from where it was planned."""
    session = opened(world, config, pad)
    works = plan(session, world.groups if groups is None else groups)
    old = autonomous_logp(session, works)
    update(world, session)
    return *gradient(session, works, old), works


def assert_same_gradient(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str = "") -> None:
    """Within 1e-6 of each entry or of the largest, since Qwen3 normalises in float32; and not all zero."""
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3, "a gradient of nothing agrees with everything"
    for name, wanted in expected.items():
        torch.testing.assert_close(got[name], wanted, rtol=1e-6, atol=1e-6 * scale,
                                   msg=lambda m, n=name: f"{where}, {n}: {m}")

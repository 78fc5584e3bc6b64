"""What tests of rollouts with vLLM share: a policy, requests, and how far a sampler is from the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sgpo_lib.config import ModelConfig
from sgpo_lib.policy import Policy, load_policy
from sgpo_lib.rollouts.interface import Sample, SampleRequest, sample_seed

QUESTION = "What is 17 + 25? Work in steps, and say the answer in the last sentence. " * 3


def open_policy(source: str, rank: int) -> Policy:
    return load_policy(ModelConfig(source=source, lora_rank=rank, context=512), source, seed=0)


@torch.no_grad()
def move(policy: Policy, size: float, seed: int) -> None:
    """Change every weight that trains, as an update does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def requests_of(policy: Policy, count: int, *texts: str) -> list[SampleRequest]:
    """`count` responses to each text."""
    found = []
    for text in texts or (QUESTION,):
        ids = tuple(policy.tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                         add_generation_prompt=True, return_dict=False))
        found += [SampleRequest(ids, sample_seed(0, "rollout", 1, text, i)) for i in range(count)]
    return found


@torch.no_grad()
def gap(policy: Policy, requests: Sequence[SampleRequest], samples: Sequence[Sample]) -> float:
    """Mean absolute difference of the sampler's log-probabilities and the policy's own, nats, in float64."""
    total, count = 0.0, 0
    for request, drawn in zip(requests, samples, strict=True):
        logits = policy.model(torch.tensor([[*request.prompt_ids, *drawn.token_ids]])).logits[0].double()
        logp = torch.log_softmax(logits, -1)
        at = len(request.prompt_ids) - 1
        total += sum(abs(float(logp[at + t, token]) - drawn.logp[t]) for t, token in enumerate(drawn.token_ids))
        count += len(drawn.token_ids)
    return total / count


SETTINGS: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 12}

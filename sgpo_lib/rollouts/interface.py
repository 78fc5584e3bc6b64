"""What every sampling engine takes and gives, and the seeds of samples.

No torch here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SampleRequest:
    """One response to draw."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Sample:
    """One drawn response."""

    token_ids: tuple[int, ...]
    """As sampled, the end token included where the model ended."""
    logp: tuple[float, ...]
    """Log-probability of each token under the model at temperature 1, untruncated (nats)."""
    stop: str
    """`end` or `length`."""
    cached_prompt: int = 0
    """Prompt tokens that were read from the engine's prefix cache."""


class Engine(Protocol):
    """A sampler of the current policy."""

    def sample(self, requests: Sequence[SampleRequest], *, temperature: float, top_p: float,
               max_new_tokens: int) -> list[Sample]:
        """One response per request, in order. The same request draws the same random numbers, whatever the batch."""

    def rest(self) -> None:
        """Free what training needs. The next call of `sample` takes it back."""

    def report(self) -> dict[str, float]:
        """Numbers for the metrics about the calls since the last report; empty where there is nothing to tell."""

    def close(self) -> None:
        """End what the engine started. It is not used again."""


def require_room(requests: Sequence[SampleRequest], max_new_tokens: int, context: int) -> None:
    """Raises ValueError for a prompt that leaves no room for `max_new_tokens` in the context."""
    for i, request in enumerate(requests):
        if len(request.prompt_ids) + max_new_tokens > context:
            raise ValueError(f"prompt {i} has {len(request.prompt_ids)} tokens and max_new_tokens is "
                             f"{max_new_tokens}, but the context is {context} tokens. "
                             "Lower max_new_tokens or leave the problem out")


def sample_seed(*key: object) -> int:
    """Seed of one sample from (run seed, phase, step, problem, group, index): 63 bits, the same on every machine."""
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

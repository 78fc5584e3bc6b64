"""The weights behind the guided distribution pi(.|q,s) of Eq. 3: the live policy's, or a copy that lags behind it.

The paper distils from the live policy. A copy, frozen or an exponential moving average, is an option: sampling stays
with the live policy, only the target distribution is the copy's.

Shape suffixes: N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from sgpo_lib.batching import TokenBatch
from sgpo_lib.losses.head import Head
from sgpo_lib.policy import Policy


class GuidedSide:
    """Hidden states and output matrix of the guided distribution, without gradient."""

    def __init__(self, policy: Policy, kind: str, decay: float):
        """`kind` is `live`, `frozen` or `ema`; `decay` is the moving average's, per update."""
        self.policy, self.kind, self.decay = policy, kind, decay
        self.copies: list[Tensor] = [] if kind == "live" else [p.detach().clone() for p in policy.parameters()]

    @torch.no_grad()
    def states(self, batch: TokenBatch) -> tuple[Tensor, Head]:
        """(hidden_NH, output matrix) of the response tokens of a batch of guided prompts."""
        with self._in_place():
            hidden_NH = self.policy.response_hidden(batch)
            return hidden_NH, self.policy.head().detach()

    @torch.no_grad()
    def follow(self) -> None:
        """Move an averaged copy towards the policy: copy = decay copy + (1 - decay) policy. Call after each update."""
        if self.kind == "ema":
            for copy, parameter in zip(self.copies, self.policy.parameters(), strict=True):
                copy.lerp_(parameter, 1 - self.decay)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """The copies in the place of the weights that train, which are put back on leaving."""
        if not self.copies:
            yield
            return
        parameters = self.policy.parameters()
        live = [p.data for p in parameters]
        try:
            for parameter, copy in zip(parameters, self.copies, strict=True):
                parameter.data = copy
            yield
        finally:
            for parameter, data in zip(parameters, live, strict=True):
                parameter.data = data

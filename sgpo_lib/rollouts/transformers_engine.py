"""Sampling with the model that trains: prompts computed once, one seed per sample, finished responses leave the batch.

Each sample has its own stream of uniform numbers, and its token is read off the cumulative nucleus distribution, so
that a response does not depend on its neighbours. Prompts that several responses share are read once and their keys and
values copied, which is what `transformers.generate` leaves out, and why the loop is written here.

Shape suffixes: B sequences, P distinct prompts, S cached positions, V vocabulary, K its most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgpo_lib.policy import Policy
from sgpo_lib.rollouts.decoding import decoding, with_room
from sgpo_lib.rollouts.interface import Sample, SampleRequest, require_room

_HEAD = 1024
"""Most likely tokens looked at before the whole vocabulary is sorted."""
_COLDEST = 1e-6
"""Temperature that stands for 0, the most likely token."""
_LEAVE = 0.25
"""Share of the batch that has to be finished before the rest moves on without it: a copy of the cache each time."""


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """(token, its log-probability at temperature 1, untruncated) of each row, [B] each.

    `uniform_B` in [0, 1) picks from the nucleus: the smallest set of most likely tokens whose mass reaches `top_p`.
    """
    logp_BV = torch.log_softmax(logits_BV.float(), dim=-1)
    probability_BV = logp_BV.exp() if temperature == 1 else torch.softmax(
        logits_BV.float() / max(temperature, _COLDEST), dim=-1)
    # a full sort of a large vocabulary costs more than the model's output layer; the head nearly always suffices
    kept_BK, order_BK = probability_BV.topk(min(_HEAD, probability_BV.shape[-1]), dim=-1)
    wanted_B = top_p if top_p < 1 else uniform_B  # the whole mass is 1: what lies beyond the draw does not matter
    if kept_BK.shape[-1] < probability_BV.shape[-1] and bool((kept_BK.double().sum(-1) <= wanted_B).any()):
        kept_BK, order_BK = probability_BV.sort(dim=-1, descending=True)
    cumulative_BK = kept_BK.double().cumsum(dim=-1)
    last = cumulative_BK.shape[-1] - 1
    mass_B1 = torch.ones_like(uniform_B)[:, None] if top_p >= 1 else cumulative_BK.gather(
        -1, (cumulative_BK < top_p).sum(-1, keepdim=True).clamp(max=last))
    rank_B1 = (cumulative_BK <= uniform_B[:, None] * mass_B1).sum(-1, keepdim=True).clamp(max=last)
    token_B1 = order_BK.gather(-1, rank_B1)
    return token_B1[:, 0], logp_BV.gather(-1, token_B1)[:, 0]


class TransformersEngine:
    """Samples from the very weights that train, so there is nothing to deliver to it."""

    def __init__(self, policy: Policy, batch: int):
        self.policy = policy
        self.batch = batch

    @torch.no_grad()
    def sample(self, requests: Sequence[SampleRequest], *, temperature: float, top_p: float,
               max_new_tokens: int) -> list[Sample]:
        """One response per request, in order.

        Raises ValueError for a prompt that leaves no room for `max_new_tokens` in the context.
        """
        require_room(requests, max_new_tokens, self.policy.context)
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
        samples: dict[int, Sample] = {}
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            with self.policy.whole(), decoding(self.policy.causal_model()):
                for start in range(0, len(order), self.batch):
                    chosen = order[start : start + self.batch]
                    drawn = self._generate([requests[i] for i in chosen], temperature, top_p, max_new_tokens)
                    samples.update(zip(chosen, drawn, strict=True))
        finally:
            self.policy.model.train(training)
        return [samples[i] for i in range(len(requests))]

    def rest(self) -> None:
        """Nothing: it samples from the weights that train."""

    def report(self) -> dict[str, float]:
        """Nothing to tell."""
        return {}

    def close(self) -> None:
        """Nothing: the policy stays."""

    def _generate(self, requests: Sequence[SampleRequest], temperature: float, top_p: float,
                  max_new_tokens: int) -> list[Sample]:
        device, generator = self.policy.device, torch.Generator()
        uniform_BT = torch.stack([torch.rand(max_new_tokens, generator=generator.manual_seed(r.seed),
                                             dtype=torch.float64) for r in requests]).to(device)
        stop_ids = torch.tensor(self.policy.stop_ids(), device=device)
        cache, logits_BV, mask_BS = self._read([r.prompt_ids for r in requests])
        row_B = torch.arange(len(requests), device=device)  # which response each row of the batch is
        going_B = torch.ones_like(row_B, dtype=torch.bool)
        drawn: list[tuple[Tensor, Tensor, Tensor]] = []  # of each step: rows, tokens, log-probabilities
        for step in range(max_new_tokens):
            token_B, logp_B = draw(logits_BV, uniform_BT[row_B, step], temperature, top_p)
            drawn.append((row_B[going_B], token_B[going_B], logp_B[going_B]))
            going_B = going_B & ~torch.isin(token_B, stop_ids)
            left = int(going_B.sum())
            if not left or step + 1 == max_new_tokens:
                break
            if len(row_B) - left >= _LEAVE * len(row_B):
                cache.batch_select_indices(going_B.nonzero()[:, 0])
                row_B, token_B, mask_BS = row_B[going_B], token_B[going_B], mask_BS[going_B]
                going_B = torch.ones_like(row_B, dtype=torch.bool)
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(row_B), 1)], dim=1)
            logits_BV = self._forward(token_B[:, None], mask_BS, cache).logits[:, -1]
        return self._samples(requests, drawn, set(stop_ids.tolist()))

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Any, Tensor, Tensor]:
        """(cache, logits after the prompt [B, V], mask [B, S]): each distinct prompt is read once.

        Raises ValueError for a model that keeps no keys and values.
        """
        place: dict[tuple[int, ...], int] = {}
        place_B = torch.tensor([place.setdefault(p, len(place)) for p in prompts], device=self.policy.device)
        width, pad = max(len(p) for p in place), self.policy.pad_id()
        ids_PS = torch.tensor([[pad] * (width - len(p)) + list(p) for p in place], device=self.policy.device)
        mask_PS = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in place], device=self.policy.device)
        output = self._forward(ids_PS, mask_PS, None)
        cache: Any = getattr(output, "past_key_values", None)
        if not hasattr(cache, "batch_select_indices"):
            raise ValueError(f"model.source: {type(self.policy.model).__name__} keeps no cache of keys and values, "
                             "without which every token would read its whole prompt again. Use rollout.sampler=vllm")
        cache.batch_select_indices(place_B)
        with_room(cache)
        return cache, output.logits[place_B, -1], mask_PS[place_B]

    def _forward(self, ids_BT: Tensor, mask_BS: Tensor, cache: Any) -> Any:
        position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        return self.policy.model(input_ids=ids_BT, attention_mask=mask_BS, past_key_values=cache, use_cache=True,
                                 position_ids=position_BS[:, -ids_BT.shape[1] :], logits_to_keep=1)

    def _samples(self, requests: Sequence[SampleRequest], drawn: Sequence[tuple[Tensor, Tensor, Tensor]],
                 stops: set[int]) -> list[Sample]:
        tokens: list[list[int]] = [[] for _ in requests]
        logps: list[list[float]] = [[] for _ in requests]
        for rows, token, logp in ((a.tolist(), b.tolist(), c.tolist()) for a, b, c in drawn):
            for i, t, x in zip(rows, token, logp, strict=True):
                tokens[i].append(t)
                logps[i].append(x)
        return [Sample(tuple(t), tuple(x), "end" if t[-1] in stops else "length")
                for t, x in zip(tokens, logps, strict=True)]

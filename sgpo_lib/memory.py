"""The least memory that a run needs, so that one that cannot fit is refused before it loads anything.

Bytes, from the shapes of the model alone (no weights are read):

    weights      P x b                       P parameters of b bytes
    training     all weights: P x b for gradients, 2 P x b for AdamW's moments
                 LoRA: 4 A x 4 bytes         A parameters of the adapter, in float32 whatever the base is
    sampler      P x s + context x c         a copy in vLLM's dtype, and the cache of one sequence or kv_cache_gb
    cache        c = 2 x layers x key-value heads x head size x s bytes a token

Activations, logits and what libraries take for themselves come on top: fitting here does not mean that a run fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sgpo_lib.config import RunConfig
from sgpo_lib.policy import pick_device

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Need:
    """Bytes that cannot be done without."""

    weights: int
    training: int
    """Gradients and optimizer."""
    sampler: int
    """vLLM's copy and its cache, of `kv_cache_gb` or for one sequence; 0 for other engines."""

    @property
    def policy(self) -> int:
        """Weights and training."""
        return self.weights + self.training


def least(config: RunConfig, source: str) -> Need:
    """The need of a run with the model at `source` (folder or hub id), from its config.json.

    Raises OSError or ValueError where that cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model, rollout = config.model, config.rollout
    shape = AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code,
                                       **({"revision": model.revision} if model.revision else {}))
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(shape, trust_remote_code=model.trust_remote_code)
    count, width = sum(p.numel() for p in empty.parameters()), _BYTES[model.dtype]
    if model.lora_rank:
        names = model.lora_targets.split(",")
        linear = [m.weight for n, m in empty.named_modules() if isinstance(m, torch.nn.Linear) and (
            "head" not in n if names == ["all-linear"] else n.rpartition(".")[2] in names)]
        training = 4 * 4 * model.lora_rank * sum(sum(weight.shape) for weight in linear)
    else:
        training = 3 * width * count
    sampler = 0
    if rollout.sampler == "vllm":
        size = _BYTES[rollout.sampler_dtype or model.dtype]
        context = min(model.context or shape.max_position_embeddings, shape.max_position_embeddings)
        cache = int(rollout.kv_cache_gb * GIB) or context * cache_per_token(shape, size)
        sampler = count * size + cache
    return Need(count * width, training, sampler)


def cache_per_token(shape: Any, size: int) -> int:
    """Bytes of the key-value cache for one token of one sequence; `shape` is a transformers config."""
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * shape.num_hidden_layers * (getattr(shape, "num_key_value_heads", None) or
                                          shape.num_attention_heads) * head * size  # fmt: skip


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine (its container's limit where there is one)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(psutil.virtual_memory().total, int(text) if text.isdigit() else 2**63)


def require_memory(config: RunConfig, source: str) -> None:
    """Raises ValueError where the least need exceeds the device's memory, or the sampler's share of it."""
    device = pick_device(config.model.device)
    try:
        need = least(config, source)
    except (OSError, ValueError, KeyError, AttributeError):  # an unreadable model: loading it tells better
        return
    total, share = device_memory(device), config.rollout.gpu_memory_share
    told = f"{device} has {total / GIB:.1f} GiB"
    detail = f"weights {need.weights / GIB:.1f}, gradients and optimizer {need.training / GIB:.1f} GiB"
    cure = ("Lower model.context or rollout.kv_cache_gb, use model.dtype='bfloat16'" +
            ("" if config.model.lora_rank else ", train an adapter (model.lora_rank=16)") + ", or take a larger device")
    sleep = config.rollout.sleep
    apart = device.type == "cuda" and need.sampler > 0 and not sleep
    if apart and need.sampler > share * total and not config.rollout.kv_cache_gb:
        raise ValueError(f"too little memory: vLLM needs at least {need.sampler / GIB:.1f} GiB for weights and cache, "
                         f"{told}, rollout.gpu_memory_share = {share:g} of it. Raise the share. {cure}")
    room = (1 - share) * total if apart else total
    sampling = need.weights + need.training * 2 // 3 + need.sampler  # asleep or not, gradients are not there
    wanted = need.policy if apart else max(need.policy, sampling) if sleep else need.policy + need.sampler
    if wanted > room:
        sampler = f", vLLM {need.sampler / GIB:.1f} GiB" if need.sampler and not apart else ""
        raise ValueError(f"too little memory: the run needs at least {wanted / GIB:.1f} GiB ({detail}{sampler}), {told}"
                         + (f", {1 - share:g} of it beside vLLM (rollout.gpu_memory_share)" if apart else "")
                         + f". {cure}")

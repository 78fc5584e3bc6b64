"""The least memory that a run needs, so that one that cannot fit is refused before it loads anything.

Bytes of one worker, from the shapes of the model alone (no weights are read):

    weights      P x b                       P parameters of b bytes
    training     all weights: P x b for gradients, 2 P x b for AdamW's moments
                 LoRA: 4 A x 4 bytes         A parameters of the adapter, in float32 whatever the base is
    sampler      P x s + context x c         a copy in vLLM's dtype, and the cache of one sequence or kv_cache_gb
    cache        c = 2 x layers x key-value heads x head size x s bytes a token

Where several workers train all weights, each has its part of weights and training; whole weights are on each of them
while they are loaded, and while it samples by itself.

Parameters are counted in the model's own modules, of any architecture (`plan.py` has formulas for dense blocks).
Activations, logits and what libraries take for themselves come on top: fitting here does not mean that a run fits.
`sgpo plan` counts those too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sgpo_lib.config import RunConfig
from sgpo_lib.plan_setup import BYTES, machine_memory
from sgpo_lib.policy import pick_device
from sgpo_lib.shapes import GIB, shape_of
from sgpo_lib.weight_files import announce_code

_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
           "vocab_size", "max_position_embeddings")


@dataclass(frozen=True)
class Need:
    """Bytes that cannot be done without, on each worker."""

    weights: int
    training: int
    """Gradients and optimizer."""
    sampler: int
    """vLLM's copy and its cache, of `kv_cache_gb` or for one sequence; 0 for other engines."""
    whole: int = 0
    """The whole model, where `weights` is a part of it: while it is loaded."""
    gathered: int = 0
    """The same in the computation's type, while it samples without vLLM."""

    @property
    def policy(self) -> int:
        """Weights and training."""
        return self.weights + self.training


def least(config: RunConfig, source: str) -> Need:
    """The need of a run with the model at `source` (folder or hub id), from its config.json.

    Raises OSError or ValueError where that cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model, rollout, workers = config.model, config.rollout, config.compute.workers
    if model.trust_remote_code:
        announce_code(source)
    found = AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code,
                                       **({"revision": model.revision} if model.revision else {}))
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(found, trust_remote_code=model.trust_remote_code)
    count, width = sum(p.numel() for p in empty.parameters()), BYTES[model.dtype]
    sampler = 0
    if rollout.sampler == "vllm":
        size = BYTES[config.sampler_dtype]
        shape = shape_of({name: getattr(found, name, None) for name in _FIELDS})
        context = min(model.context or shape.context, shape.context)
        cache = int(config.compute.kv_cache_gb * GIB) or context * shape.cache_per_token(size)
        sampler = count * size + cache
    if model.lora_rank:
        names = model.lora_targets.split(",")
        linear = [m.weight for n, m in empty.named_modules() if isinstance(m, torch.nn.Linear) and (
            "head" not in n if names == ["all-linear"] else n.rpartition(".")[2] in names)]
        return Need(count * width, 4 * 4 * model.lora_rank * sum(sum(w.shape) for w in linear), sampler)
    part = -(-count // workers)
    whole, gathered = (count * width, count * BYTES[model.compute_dtype or model.dtype]) if workers > 1 else (0, 0)
    return Need(part * width, 3 * part * width, sampler, whole, 0 if rollout.sampler == "vllm" else gathered)


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine (its container's limit where there is one)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory()


def require_memory(config: RunConfig, source: str) -> None:
    """Raises ValueError where a worker's least need exceeds the device's memory, or the sampler's share of it."""
    device = pick_device(config.model.device)
    try:
        need = least(config, source)
    except (OSError, ValueError, KeyError, AttributeError):  # an unreadable model: loading it tells better
        return
    total, share = device_memory(device), config.compute.gpu_memory_share
    told = f"{device} has {total / GIB:.1f} GiB"
    detail = f"weights {need.weights / GIB:.1f}, gradients and optimizer {need.training / GIB:.1f} GiB"
    if config.compute.workers > 1:
        detail += f" on each of {config.compute.workers} workers"
    cure = ("Lower model.context or compute.kv_cache_gb, use model.dtype='bfloat16'" +
            ("" if config.model.lora_rank else ", train an adapter (model.lora_rank=16)") + ", or take a larger device")
    sleep = config.compute.sleep
    elsewhere = config.compute.placement == "own"
    engine = 0 if elsewhere else need.sampler  # on this device
    if elsewhere and need.sampler > config.compute.vllm_share * total:
        raise ValueError(f"too little memory: vLLM needs at least {need.sampler / GIB:.1f} GiB for weights and cache "
                         f"on a GPU of its own, of which it takes {config.compute.vllm_share:g}, {told}. {cure}")
    apart = device.type == "cuda" and engine > 0 and not sleep
    if apart and engine > share * total and not config.compute.kv_cache_gb:
        raise ValueError(f"too little memory: vLLM needs at least {engine / GIB:.1f} GiB for weights and cache, "
                         f"{told}, compute.gpu_memory_share = {share:g} of it. Raise the share. {cure}")
    room = (1 - share) * total if apart else total
    # asleep or not, gradients are not there
    sampling = need.weights + need.training * 2 // 3 + engine + need.gathered
    wanted = need.policy if apart else max(need.policy, sampling) if sleep else need.policy + engine
    wanted = max(wanted, need.whole, sampling if need.gathered else 0)
    if wanted > room:
        sampler = f", vLLM {engine / GIB:.1f} GiB" if engine and not apart else ""
        whole = f", {need.whole / GIB:.1f} GiB to load the model whole" if need.whole else ""
        raise ValueError(f"too little memory: the run needs at least {wanted / GIB:.1f} GiB ({detail}{sampler}{whole}),"
                         f" {told}"
                         + (f", {1 - share:g} of it beside vLLM (compute.gpu_memory_share)" if apart else "")
                         + f". {cure}")

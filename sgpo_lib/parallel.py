"""The policy on several workers: an adapter is replicated (DDP), all weights are sharded (FSDP2's `fully_shard`).

Both average gradients over the workers. A loss is therefore multiplied by their number before its backward pass
(`Session.backward`), and what is averaged is the sum of Eq. 7's terms, each with its one global count.

Every micro-batch is a collective here: all workers must run as many forward and backward passes, which
`Session.micro_batches` sees to. Sampling is none; for it the weights are whole on every worker (`whole`).

Shape suffixes: N response tokens of a batch in row order, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from sgpo_lib.config import RunConfig
from sgpo_lib.policy import Policy, pick_device, tensor_bits
from sgpo_lib.world import World


def spread(policy: Policy, config: RunConfig, world: World) -> Policy:
    """The policy as this run's workers hold it. A process alone keeps it as it is, but for mixed precision.

    Raises ValueError where FSDP2 has no layers to shard.
    """
    if policy.lora:
        return Replicated(**vars(policy), world=world) if world.size > 1 else policy
    if world.size > 1 or config.model.compute_dtype:
        return Sharded(**vars(policy), world=world, compute_dtype=config.model.compute_dtype)
    return policy


@contextlib.contextmanager
def process_group(config: RunConfig, world: World) -> Iterator[None]:
    """FSDP2 wants a process group for mixed precision in a process alone, too; several workers have one from Ray."""
    import torch.distributed as dist

    alone = world.size == 1 and bool(config.model.compute_dtype) and not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo" if pick_device(config.model.device).type == "cpu" else "cpu:gloo,cuda:nccl",
                                store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if alone:
            dist.destroy_process_group()


class _Backbone(nn.Module):
    """The part of a causal model below its output matrix, as a module that DDP can wrap."""

    def __init__(self, causal: Any):
        super().__init__()
        self.causal = causal

    def forward(self, **inputs: Tensor | None) -> Tensor:
        """Last hidden states."""
        return getattr(self.causal, self.causal.base_model_prefix)(**inputs).last_hidden_state


class Replicated(Policy):
    """An adapter of which every worker has the same copy; DDP averages its gradients."""

    def __init__(self, *args: Any, world: World, **kwargs: Any):
        super().__init__(*args, **kwargs)
        on_gpu = [self.device.index or 0] if self.device.type == "cuda" else None
        self._ddp = nn.parallel.DistributedDataParallel(
            _Backbone(self.causal_model()), device_ids=on_gpu, broadcast_buffers=False)
        self.world = world

    def last_hidden_state(self, **inputs: Tensor | None) -> Tensor:
        """Through DDP where gradients are to be averaged."""
        return self._ddp(**inputs) if torch.is_grad_enabled() else super().last_hidden_state(**inputs)

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """As one process does; the first worker writes."""
        if self.world.first:
            super().save(folder, dtype)
        self.world.wait()


class Sharded(Policy):
    """All weights, each worker with its shard of every parameter, gradient and moment of the optimizer."""

    def __init__(self, *args: Any, world: World, compute_dtype: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.world = world
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        precision = MixedPrecisionPolicy(
            param_dtype=getattr(torch, compute_dtype) if compute_dtype else None, reduce_dtype=torch.float32)
        mesh = init_device_mesh(self.device.type, (world.size,))
        model = self.model
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(model, mesh=mesh, mp_policy=precision)
        model.last_hidden_state = types.MethodType(_last_hidden_state, model)
        register_fsdp_forward_method(model, "last_hidden_state")

    def last_hidden_state(self, **inputs: Tensor | None) -> Tensor:
        """The root's forward pass without its output matrix, which stays gathered until the backward pass is over."""
        return self.model.last_hidden_state(**inputs)

    def settle(self) -> None:
        """Let go of what is gathered; the parameters are shards again, as the optimizer needs them."""
        self.model.reshard()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All weights on this worker, in the dtype of the computation, with no communication inside."""
        from torch.distributed.fsdp import FSDPModule

        parts = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        self.model._get_fsdp_state()._lazy_init()  # before a layer, which would take itself for the root
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.set_reshard_after_forward(part is not self.model, recurse=False)
                part.reshard()

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """The plain folder that one process writes, from weights gathered in the first worker's memory."""
        self.settle()
        full: Any = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.world.first:
            self._write(folder, full, dtype)
        self.world.wait()

    def content_parts(self) -> list[tuple[int, float]]:
        """Of the shards of all workers."""
        self.settle()
        return self.world.woven([tensor_bits(p.to_local()) for p in self.parameters()])  # type: ignore[attr-defined]

    def gathered(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """From all workers."""
        self.settle()
        shards: Any = parameter.detach().to(dtype)
        return shards.full_tensor()

    def load_state(self, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Each worker takes its shards of whole tensors."""
        self.settle()
        held: dict[str, Any] = dict(state)
        result = set_model_state_dict(self.model, held, options=StateDictOptions(full_state_dict=True, strict=False))
        return list(result.missing_keys), list(result.unexpected_keys)

    def fingerprint(self) -> str:
        """12 hex digits over the whole weights, the same for any number of workers."""
        self.settle()
        digest = hashlib.sha256()
        for parameter in self.parameters():
            whole: Any = parameter.detach()
            digest.update(whole.full_tensor().to("cpu", torch.float32).numpy().tobytes())
        return digest.hexdigest()[:12]


def _last_hidden_state(model: Any, **inputs: Tensor | None) -> Tensor:
    return getattr(model, model.base_model_prefix)(**inputs).last_hidden_state


def decoder_layers(model: Any) -> list[nn.Module]:
    """The transformer layers, each of which FSDP2 gathers and lets go as one.

    Raises ValueError where the model does not tell which they are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if type(m).__name__ in names]
    if not found:
        told = f"its _no_split_modules is {sorted(names)}" if names else "it has no _no_split_modules"
        raise ValueError(f"compute.workers, model.compute_dtype: {type(model).__name__} does not tell its layers to "
                         f"FSDP2 ({told}). Train an adapter (model.lora_rank=16), which is replicated, or one worker "
                         "without compute_dtype")
    return found

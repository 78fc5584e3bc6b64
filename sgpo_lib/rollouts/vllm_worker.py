"""Runs inside vLLM's worker processes: reads which weights they hold.

An in-process engine loads it by itself. A server needs `--worker-extension-cls
sgpo_lib.rollouts.vllm_worker.WeightReader` and VLLM_SERVER_DEV_MODE=1, which opens the route that calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sgpo_lib.rollouts.fingerprint import Numbers, adapter_numbers, base_numbers, columns, read


class WeightReader:
    """Mixed into vLLM's worker class (`worker_extension_cls`)."""

    model_runner: Any

    @torch.no_grad()
    def sgpo_weights(self) -> dict[str, Any]:
        """`base` and `adapter` (the newest that is loaded): numbers of fingerprint.py; `adapters`: ids in memory."""
        model = self.model_runner.get_model()
        found: dict[str, Any] = {"base": base_numbers(_parameters(model), self.model_runner.dtype)}
        manager: Any = getattr(getattr(self.model_runner, "lora_manager", None), "_adapter_manager", None)
        loaded = [i for i in manager.lora_index_to_id if i is not None] if manager else []
        found["adapters"] = sorted(loaded)
        if loaded:
            found["adapter"] = _adapter(manager, manager.lora_index_to_id.index(max(loaded)))
        return found


def _parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if parameter.numel():
            yield plain, read(parameter)
        else:  # CPU kernels keep a matrix in a layout of their own; what they answer to unit vectors is its columns
            yield plain, _columns_of(modules[name.rpartition(".")[0]], parameter.dtype)


def _columns_of(module: Any, dtype: torch.dtype) -> Tensor:
    chosen = columns(module.input_size_per_partition if hasattr(module, "input_size_per_partition")
                     else module.input_size)
    unit = torch.zeros(len(chosen), module.input_size, dtype=dtype)
    unit[range(len(chosen)), chosen] = 1
    return module.cpu_linear(unit, None, None).T


def _adapter(manager: Any, slot: int) -> Numbers:
    def slots() -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, module in manager.modules.items():
            a, b = module.lora_a_stacked, module.lora_b_stacked
            pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
            yield from ((f"{name}.weight", one[slot], other[slot]) for one, other in pairs)

    return adapter_numbers(slots())

"""Runs inside vLLM's worker processes: reads which weights they hold. On a CPU, importing it also puts vllm_cpu.py in
place; vLLM imports it before it loads the model.

An in-process engine loads it by itself. A server needs `--worker-extension-cls
sgpo_lib.rollouts.vllm_worker.WeightReader` and VLLM_SERVER_DEV_MODE=1, which opens the route that calls it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor
from vllm.platforms import current_platform

from sgpo_lib.rollouts.fingerprint import Numbers, adapter_numbers, base_numbers, columns, read

if current_platform.is_cpu():
    from sgpo_lib.rollouts import vllm_cpu

    vllm_cpu.install()


class WeightReader:
    """Mixed into vLLM's worker class (`worker_extension_cls`)."""

    model_runner: Any
    reload_weights: Any

    @torch.no_grad()
    def sgpo_weights(self) -> dict[str, Any]:
        """`base` and `adapter` (the newest that is loaded): numbers of fingerprint.py; `adapters`: ids in memory;
        `wrapper`: the class that computes them; `dtype`."""
        model, dtype = self.model_runner.get_model(), self.model_runner.dtype
        found: dict[str, Any] = {"base": base_numbers(_parameters(model), dtype), "dtype": str(dtype).split(".")[-1]}
        manager: Any = getattr(getattr(self.model_runner, "lora_manager", None), "_adapter_manager", None)
        loaded = [i for i in manager.lora_index_to_id if i is not None] if manager else []
        found["adapters"] = sorted(loaded)
        if loaded:
            found["wrapper"] = type(next(iter(manager.modules.values())).punica_wrapper).__name__
            found["adapter"] = _adapter(manager, manager.lora_index_to_id.index(max(loaded)))
        return found

    def sgpo_end_with(self, pid: int) -> None:
        """End this worker, and with it the engine, soon after the process `pid` has ended: vLLM's processes would
        outlive one that is killed, and keep their memory."""
        def watch() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                starter = psutil.Process(pid)
                while starter.is_running() and starter.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(1.0)
            os._exit(1)

        threading.Thread(target=watch, daemon=True, name="sgpo_end_with").start()

    def sgpo_reload(self, folder: str) -> None:
        """Replace all weights by those of a folder, the output matrix included.

        On a CPU vLLM 0.32 multiplies with a packed copy of the output matrix; where that is tied to the embeddings,
        `reload_weights` leaves the copy as it was, and sampling goes on with the old one.
        """
        self.reload_weights(weights_path=folder)
        model = self.model_runner.get_model()
        head = _plain(model.lm_head)
        if hasattr(head, "cpu_linear"):
            if self.model_runner.model_config.hf_text_config.tie_word_embeddings:
                head.weight = _plain(model.model.embed_tokens).weight
            head.quant_method.process_weights_after_loading(head)


def _plain(module: Any) -> Any:
    """A module without the wrapper for adapters."""
    return getattr(module, "base_layer", module)


def _parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What is read of each parameter; the output matrix comes under `lm_head`, also where it is the embeddings'."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if "lm_head" not in name:
            module = modules[name.rpartition(".")[0]]
            yield name.replace(".base_layer.", "."), read(parameter) if parameter.numel() else _multiplier(module)
    yield "lm_head.weight", _multiplier(_plain(model.lm_head))


def _multiplier(module: Any) -> Tensor:
    """Columns of the matrix that a layer multiplies with. CPU kernels keep a packed copy, and make its columns, to the
    bit, of unit vectors."""
    if not hasattr(module, "cpu_linear"):
        return read(module.weight)
    inputs = getattr(module, "input_size", None) or module.embedding_dim
    chosen = columns(inputs)
    unit = torch.zeros(len(chosen), inputs, dtype=module.weight.dtype)
    unit[range(len(chosen)), chosen] = 1
    return module.cpu_linear(unit, module.weight, None).T


def _adapter(manager: Any, slot: int) -> Numbers:
    def slots() -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, module in manager.modules.items():
            a, b = module.lora_a_stacked, module.lora_b_stacked
            pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
            yield from ((f"{name}.weight", one[slot], other[slot]) for one, other in pairs)

    return adapter_numbers(slots())

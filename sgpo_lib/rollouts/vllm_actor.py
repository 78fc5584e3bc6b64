"""vLLM as a Ray actor: the sampler of one training worker, on the worker's node.

`shared` puts it on the worker's GPU, in the share of memory that `gpu_memory_share` leaves to it; `own` takes a GPU of
its own. It ends with the worker that started it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo_lib.rollouts.interface import Sample, SampleRequest
from sgpo_lib.rollouts.vllm_engine import VLLMEngine


class VLLMActor:
    """A `VLLMEngine` in another process of the Ray cluster. Arguments as there; `gpu` says whether there are GPUs.

    Raises what the engine raises.
    """

    ours = True

    def __init__(self, source: str, *, placement: str, gpu: bool, **arguments: Any):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        own = placement == "own"
        node = ray.get_runtime_context().get_node_id()
        options: dict[str, Any] = {
            "num_cpus": 0, "num_gpus": int(gpu and own), "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=own)}
        if gpu and not own:  # Ray would hide all GPUs from an actor that takes none
            options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"]}}
        engine: Any = ray.remote(VLLMEngine)
        self._actor = engine.options(**options).remote(source, **arguments)
        try:
            ray.get(self._actor.__ray_ready__.remote())
        except ray.exceptions.ActorDiedError as error:
            raise _cause(error) from None

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self._actor, name).remote(*args, **kwargs))
        except ray.exceptions.RayTaskError as error:  # an error of the engine, not of the cluster
            raise error.cause from None

    def sample(self, requests: Sequence[SampleRequest], *, temperature: float, top_p: float,
               max_new_tokens: int) -> list[Sample]:
        """One response per request, in order."""
        return self._call("sample", list(requests), temperature=temperature, top_p=top_p,
                          max_new_tokens=max_new_tokens)

    def load_adapter(self, folder: Path, version: int, name: str) -> None:
        """As the engine's; the folder must be seen by the actor."""
        self._call("load_adapter", folder.resolve(), version, name)

    def load_weights(self, folder: Path) -> None:
        """As the engine's; the folder must be seen by the actor."""
        self._call("load_weights", folder.resolve())

    def held(self) -> dict[str, Any]:
        """As the engine's."""
        return self._call("held")

    def rest(self) -> None:
        """As the engine's."""
        self._call("rest")

    def report(self) -> dict[str, float]:
        """Nothing of its own."""
        return {}

    def close(self) -> None:
        """End vLLM's process and the actor."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._actor.close.remote(), timeout=20)
        ray.kill(self._actor)


def _cause(error: Exception) -> Exception:
    """What the constructor raised, without Ray's account of it."""
    cause = getattr(error, "cause", None) or error.__cause__
    return cause if isinstance(cause, ValueError) else ValueError(f"vLLM cannot start as a Ray actor: {error}")

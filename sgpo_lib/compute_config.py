"""On how many devices a run trains. Nothing here imports torch or ray."""

from __future__ import annotations

from dataclasses import dataclass

_OWN_SHARE = 0.9
"""Of a GPU that vLLM has for itself (vLLM's default)."""


@dataclass(frozen=True)
class ComputeConfig:
    """Where a run trains. It is no part of what the run is: the same run goes on with another number of workers."""

    engine: str = "local"
    """`local` (this process), or `ray`: with several workers, training processes of Ray Train, one per GPU or CPU."""
    workers: int = 1
    """Training processes, which share the problems of a batch. One needs no Ray."""
    worker_cpus: int = 1
    """CPUs that each worker takes from the Ray cluster, and its threads where there is no GPU."""
    worker_restarts: int = 3
    """How often in a row lost workers are replaced without a new checkpoint in between; then the run fails."""
    placement: str = "shared"
    """vLLM of each worker where there are several: an actor of Ray on the worker's GPU (`shared`; `gpu_memory_share` is
    its part of the memory), or on a GPU of its `own`."""
    gpu_memory_share: float = 0.4
    """Share of the GPU's memory that vLLM takes for weights and cache; the policy trains in the rest. Of a GPU of its
    own it takes 0.9."""
    kv_cache_gb: float = 0.0
    """vLLM's key-value cache in GiB. On a GPU 0 means what its share of the memory leaves for it (that share must be
    free either way), on a CPU 1."""
    sleep: bool = False
    """vLLM gives its GPU memory back while the policy trains, and takes it again to sample."""

    @property
    def vllm_share(self) -> float:
        """Share of its GPU's memory that vLLM takes."""
        return _OWN_SHARE if self.placement == "own" else self.gpu_memory_share

"""On how many devices a run trains. Nothing here imports torch or ray."""

from __future__ import annotations

from dataclasses import dataclass


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

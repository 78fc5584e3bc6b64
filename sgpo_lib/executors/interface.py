"""What the runner of a batch asks of an engine: take a job, say which ended, end what is left.

An engine starts `sgpo run` for an `Order` and reports an `Ended` when its attempt is over. Whether the job is then
done, tried again or failed for good is the runner's decision (batch.py), the same for all engines.
"""

from __future__ import annotations

import abc
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sgpo_lib.batch_spec import Batch, Job
from sgpo_lib.runs import runs_root
from sgpo_lib.storage import write_atomic


@dataclass(frozen=True)
class Order:
    """A job with all that its process needs; plain data, so that it travels to another machine."""

    job: Job
    folder: Path
    """Job folder."""
    command: tuple[str, ...]
    """`sgpo run ...`, behind the container's prefix where there is one."""
    env: dict[str, str]
    """Changes to the environment of the process."""
    cwd: str
    """Folder that the process starts in: relative names mean the same as where the batch was started."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    how: str
    """`done`, `failed`, `cancelled` (failed, and not to be tried again), or `stopped` (to be continued)."""
    reason: str = ""
    """Why, for all but `done`."""


class EngineLost(Exception):
    """The cluster does not answer any more. `fatal`: the jobs on it are lost too."""

    def __init__(self, reason: str, fatal: bool):
        super().__init__(reason)
        self.fatal = fatal


class Executor(abc.ABC):
    """An engine. One object serves one call of `run_batch`."""

    name: str

    @abc.abstractmethod
    def check(self, jobs: Sequence[Job]) -> list[str]:
        """What cannot work, told before anything starts; each with job, got, expected, cure."""

    def describe(self, job: Job) -> str:
        """What a job would ask for, for the plan."""
        return str(job.resources)

    def room(self, job: Job) -> bool:
        """Whether the job can be taken now."""
        return True

    def attach(self, order: Order) -> bool:
        """Take up a job that an earlier call left on the cluster. False where none is alive."""
        return False

    @abc.abstractmethod
    def submit(self, order: Order) -> str:
        """Start a job; returns where, for a line of the log. Raises ValueError where the engine refuses it."""

    @abc.abstractmethod
    def poll(self) -> dict[str, Ended]:
        """The attempts that ended since the last call, by name of the job. Raises EngineLost."""

    @abc.abstractmethod
    def leave(self, names: Sequence[str]) -> str:
        """After an interrupt: end what must not outlive this process; returns what became of these jobs."""

    def cancel(self, orders: Sequence[Order]) -> list[str]:
        """End jobs that an earlier call left on the cluster; returns the names of those that were there."""
        return []


# --- queue.json: a job that a cluster has ------------------------------------------------------------------------
def write_queue(folder: Path, engine: str, number: str, note: str) -> None:
    """Note that a cluster has the job: `queue.json`, read by `sgpo status` and by the next call of the batch."""
    old = read_queue(folder)
    record = {"engine": engine, "id": number, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "note": note}
    if old.get("id") == number:
        record["submitted"] = old["submitted"]
    if record != old:
        write_atomic(folder / "queue.json", json.dumps(record))


def read_queue(folder: Path) -> dict[str, str]:
    """What `write_queue` noted; empty where no cluster has the job."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / "queue.json").read_text(encoding="utf-8"))
        return record if isinstance(record, dict) and "id" in record else {}
    return {}


def clear_queue(folder: Path) -> None:
    """The cluster has the job no more."""
    (folder / "queue.json").unlink(missing_ok=True)


# --- orders ------------------------------------------------------------------------------------------------------
def make_order(batch: Batch, job: Job, engine: str) -> Order:
    """The process of a job. `resources.time` limits the notebook, but for Slurm, where it limits the allocation."""
    folder = batch.folder / job.name
    command = [*job.container, job.python or sys.executable, "-m", "sgpo_lib.cli", "run", str(job.notebook),
               "--job", str(folder), "--quiet", "--grace", str(job.grace),
               *(a for n in job.after for a in ("--after", str(batch.folder / n))),
               *(a for n, v in job.parameters.items() for a in ("-p", f"{n}={_flow(v)}"))]
    if job.resources.time and engine != "slurm":
        command += ["--time-limit", str(job.resources.time)]
    env = {"OMP_NUM_THREADS": str(job.threads), "SGPO_RUNS": str(runs_root()), **job.env}
    return Order(job, folder, tuple(command), env, str(Path.cwd()))


def _flow(value: Any) -> str:
    """A value as one line of YAML, as `sgpo run -p` reads it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True).removesuffix("...\n").strip()


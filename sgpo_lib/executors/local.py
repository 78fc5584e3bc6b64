"""Jobs as processes of this machine; GPUs are handed out one by one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

from sgpo_lib.batch_spec import Job, cpu_count
from sgpo_lib.executors.child import Child
from sgpo_lib.executors.interface import Ended, Executor, Order

STOP_S = 25.0
"""Seconds that a job gets to end after SIGTERM, before it is killed: longer than `sgpo run` takes at most."""


class LocalExecutor(Executor):
    """Processes of this machine."""

    name = "local"

    def __init__(self) -> None:
        self._children: dict[str, Child] = {}
        self._gpus: dict[str, list[str]] = {}
        self._visible = visible_gpus()

    def check(self, jobs: Sequence[Job]) -> list[str]:
        faults = []
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        for job in jobs:
            asked = job.resources
            for name, got, most in (("nodes", asked.nodes, 1), ("gpus", asked.gpus, len(self._visible)),
                                    ("cpus", asked.cpus, cpu_count()), ("memory", asked.memory, memory)):
                if got is not None and got > most:
                    unit = " MiB" if name == "memory" else ""
                    faults.append(f"job {job.name!r}: resources.{name}: got {got}{unit}, this machine has {most}{unit}."
                                  " Ask for less, or use --engine slurm or ray")
            if job.python and not job.setup and not job.container and not shutil.which(job.python):
                faults.append(f"job {job.name!r}: python: got {job.python!r}, expected an interpreter that exists here")
        return faults

    def room(self, job: Job) -> bool:
        return (job.resources.gpus or 0) <= len(self._free())

    def submit(self, order: Order) -> str:
        env, count = {}, order.job.resources.gpus
        if count is not None:
            self._gpus[order.job.name] = self._free()[:count]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[order.job.name])
        self._children[order.job.name] = Child(order, "", order.job.setup, env)
        return f"on GPU {env['CUDA_VISIBLE_DEVICES']}" if count else ""

    def _free(self) -> list[str]:
        taken = {gpu for gpus in self._gpus.values() for gpu in gpus}
        return [gpu for gpu in self._visible if gpu not in taken]

    def poll(self) -> dict[str, Ended]:
        over = {name: ended for name, child in self._children.items() if (ended := child.poll())}
        for name in over:
            del self._children[name]
            self._gpus.pop(name, None)
        return over

    def leave(self, names: Sequence[str]) -> str:
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.time() + STOP_S
            for child in self._children.values():
                child.send(number)
            while any(child.poll() is None for child in self._children.values()) and time.time() < deadline:
                time.sleep(0.1)
        return f"ended {', '.join(names)}. The same command continues"


def visible_gpus() -> list[str]:
    """Names of the GPUs that a process started here would see, as CUDA_VISIBLE_DEVICES takes them."""
    if (told := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in told.split(",") if name.strip() not in ("", "-1")]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    listing = subprocess.run([program, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True,
                             check=False)
    return listing.stdout.split() if listing.returncode == 0 else []

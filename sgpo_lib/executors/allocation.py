"""What runs on the first node of a Slurm allocation: one attempt of a job, queued again until it is done.

Slurm sends SIGUSR1 before the time limit, to this process alone. It is handed to `sgpo run`, which ends its step, saves
and exits with 75; then the job is queued again under its own id. SIGTERM (cancelled, preempted, queued again by an
administrator) is handed on too, and then nothing is queued: Slurm does that itself where it is due. With two nodes or
more a Ray cluster over the allocation is there for the notebook, at RAY_ADDRESS.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sgpo_lib.distributed import answers
from sgpo_lib.executors.attempts import close_lost, goes_nowhere, record_failure, record_no_progress
from sgpo_lib.executors.child import Child
from sgpo_lib.executors.interface import Order

RAY_START_S = 180.0
"""Seconds until a Ray cluster whose nodes have not all come is given up."""

_WAIT_FOR_NODES = """
import sys, time, ray
ray.init(logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.5)
"""


def where_of(number: str) -> str:
    """How attempts.json names a Slurm job."""
    return f"slurm {number}"


class Allocation:
    """The function that submitit calls in the allocation."""

    def __init__(self, order: Order):
        self.order = order

    def __call__(self) -> str:
        """Run one attempt to its end; returns how it ended. Exits with 1 where it failed, 75 where it is to go on."""
        order, number = self.order, os.environ["SLURM_JOB_ID"]
        close_lost(order.folder)  # Slurm queues a job again whose node went away
        if goes_nowhere(order.folder):
            record_no_progress(order.folder)
            raise SystemExit(1)
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
        got: list[int] = []
        child: list[Child] = []

        def hand_on(signal_number: int, _: Any) -> None:
            got.append(signal_number)
            for running in child:
                running.send(signal_number)

        for which in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(which, hand_on)
        try:
            with ray_over(nodes, order.folder) as env:
                child.append(Child(order, where_of(number), env=env))
                for missed in got:  # it came while Ray started
                    child[0].send(missed)
                ended = child[0].wait()
        except RuntimeError as error:  # Ray did not come up
            record_failure(order.folder, "Ray", str(error))
            raise SystemExit(1) from None
        if ended.how == "stopped" and signal.SIGTERM not in got:
            if not goes_nowhere(order.folder):
                subprocess.run(["scontrol", "requeue", number], check=True)
                raise SystemExit(75)
            ended = record_no_progress(order.folder)
        if ended.how != "done":
            raise SystemExit(1)
        return ended.how


@contextlib.contextmanager
def ray_over(nodes: int, folder: Path) -> Iterator[dict[str, str]]:
    """A Ray cluster over the nodes of this allocation: its head here, the others started by srun. Yields RAY_ADDRESS.

    None for a single node. A token keeps other users of the machines out of it. All of it ends with the block. Raises
    RuntimeError where it does not come up.
    """
    if nodes == 1:
        yield {}
        return
    import ray

    program = str(Path(sys.executable).with_name("ray"))
    with socket.socket() as probe:  # two jobs may share this node: any port that is free
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    here, me = ray.util.get_node_ip_address(), os.environ["SLURMD_NODENAME"]
    address = f"{here}:{port}"
    size = [f"--num-cpus={os.environ.get('SLURM_CPUS_PER_TASK', 1)}",
            f"--num-gpus={_count(os.environ.get('SLURM_GPUS_ON_NODE', ''))}", "--block", "--disable-usage-stats"]
    srun = ["srun", "--overlap", f"--nodes={nodes - 1}", f"--ntasks={nodes - 1}", "--ntasks-per-node=1",
            f"--exclude={me}", "--kill-on-bad-exit=1"]
    head = [program, "start", "--head", f"--node-ip-address={here}", f"--port={port}", "--include-dashboard=false",
            *size]
    others = [*srun, program, "start", f"--address={address}", *size]
    env = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    started: list[subprocess.Popen[bytes]] = []
    log = folder / "ray.txt"

    def start(command: list[str]) -> None:
        guard = shutil.which("setpriv")
        with log.open("ab") as output:
            started.append(subprocess.Popen([guard, "--pdeathsig", "TERM", *command] if guard else command,
                                            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                            env=os.environ | env))

    def wait(what: str, there: Callable[[], bool]) -> None:
        deadline = time.time() + RAY_START_S
        while not there():
            if time.time() > deadline or any(p.poll() is not None for p in started[:2]):
                raise RuntimeError(f"{what}: it did not come up, see {log}")
            time.sleep(0.5)

    try:
        start(head)
        wait("head of the Ray cluster", lambda: answers(address))
        start(others)
        start([sys.executable, "-c", _WAIT_FOR_NODES, str(nodes)])
        wait(f"Ray on {nodes} nodes", lambda: started[2].poll() == 0)
        yield env
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()


def _count(text: str) -> int:
    """Number of GPUs in SLURM_GPUS_ON_NODE, which may name a type (`h100:8`); 0 where it is not set."""
    last = text.rpartition(":")[2]
    return int(last) if last.isdigit() else 0

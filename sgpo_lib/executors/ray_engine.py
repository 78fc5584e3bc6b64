"""Jobs on a Ray cluster: each an actor with its CPUs, GPUs and memory, which runs `sgpo run` as its child.

The actors are detached: they outlive this process, and the next call of the batch takes them up again. An actor ends
when its attempt is over. `sgpo batch --engine ray` runs on a machine of the cluster; the project must be
installed on all of them, and the job folders on a file system that they share.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

from sgpo_lib.batch_spec import Job
from sgpo_lib.distributed import answers
from sgpo_lib.executors.attempts import read_attempts, record_failure
from sgpo_lib.executors.child import Child
from sgpo_lib.executors.interface import (
    Ended,
    EngineLost,
    Executor,
    Order,
    clear_queue,
    read_queue,
    write_queue,
)
from sgpo_lib.jobs import read_job
from sgpo_lib.ray_driver import token_cure

NAMESPACE = "sgpo"
POLL_S = 1.0
"""Seconds between looks at the cluster."""
SILENT_S = 30.0
"""Seconds without an answer of the cluster's head after which it is lost. Ray ends its drivers after 60."""
STOP_S = 25.0
"""Seconds that a cancelled job gets."""


class Attempt:
    """The actor: one attempt of a job. It ends itself, since a call that waits for room dies with the driver."""

    def __init__(self, order: Order, where: str, address: str):
        import ray

        self._child = Child(order, where, order.job.setup, {"RAY_ADDRESS": address})
        me = ray.get_runtime_context().current_actor
        threading.Thread(target=lambda: (self._child.wait(), ray.kill(me)), daemon=True).start()

    def wait(self) -> None:
        """Never returns: whoever waits for this call sees the actor go."""
        threading.Event().wait()

    def send(self, number: int) -> None:
        """Hand a signal on."""
        self._child.send(number)


class RayExecutor(Executor):
    """The Ray cluster at an address (default: RAY_ADDRESS, else the one that this machine is part of).

    Raises ValueError where Ray is not installed or no cluster answers.
    """

    name = "ray"

    def __init__(self, address: str | None = None):
        try:
            import ray
        except ImportError:
            raise ValueError("engine ray: package ray is not installed. Cure: pip install "
                             "'sgpo-workbench[ray]'") from None
        asked = address or os.environ.get("RAY_ADDRESS") or "auto"
        cure = ("Start one with `ray start --head` here, or run this on a machine of the cluster, or give --address "
                "HOST:PORT")
        if asked != "auto" and not answers(asked):
            raise ValueError(f"engine ray: no Ray cluster at {asked}. {cure}")
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=asked, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR,
                     ignore_reinit_error=True)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ValueError(f"engine ray: no Ray cluster at {asked} ({str(error).splitlines()[0]}). "
                             f"{token_cure(asked)}{cure}") from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray puts its own there, which exits at once
        self._address = ray.get_runtime_context().gcs_address
        self._orders: dict[str, Order] = {}
        self._ids: dict[str, str] = {}
        self._refs: dict[str, Any] = {}
        self._asked = self._answered = time.time()

    def check(self, jobs: Sequence[Job]) -> list[str]:
        import ray

        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        faults = []
        for job in jobs:
            for name, got, field, unit in (("cpus", job.resources.cpus or 1, "CPU", 1),
                                           ("gpus", job.resources.gpus or 0, "GPU", 1),
                                           ("memory", job.resources.memory or 0, "memory", 2**20)):
                most = int(max((n.get(field, 0) for n in nodes), default=0) // unit)
                if got > most:
                    mib = " MiB" if name == "memory" else ""
                    faults.append(f"job {job.name!r}: resources.{name}: got {got}{mib}, the largest node of the Ray "
                                  f"cluster has {most}{mib}. Ask for less, or add a node")
            if job.resources.nodes > 1:
                faults.append(f"job {job.name!r}: resources.nodes: got {job.resources.nodes}, expected 1: on Ray a job "
                              "has the resources of one node. Use 1, or --engine slurm")
        return faults

    def submit(self, order: Order) -> str:
        import ray

        asked, number = order.job.resources, secrets.token_hex(4)
        actor: Any = ray.remote(Attempt).options(
            name=_name(order, number), lifetime="detached", max_concurrency=4, max_restarts=0,
            num_cpus=asked.cpus or 1, num_gpus=asked.gpus or 0, memory=(asked.memory or 0) * 2**20,
        ).remote(order, _where(number), self._address)
        write_queue(order.folder, self.name, number, "PENDING")
        self._watch(order, number, actor.wait.remote())
        return f"as Ray actor {number}"

    def _watch(self, order: Order, number: str, ref: Any) -> None:
        self._orders[order.job.name], self._ids[order.job.name], self._refs[order.job.name] = order, number, ref

    def attach(self, order: Order) -> bool:
        if (actor := self._actor(order)) is None:
            return False
        self._watch(order, read_queue(order.folder)["id"], actor.wait.remote())
        return True

    def _actor(self, order: Order) -> Any:
        """The living actor of a job's queue.json; None where there is none, and then the file goes."""
        import ray

        queue = read_queue(order.folder)
        if queue.get("engine") != self.name:
            return None
        try:
            return ray.get_actor(_name(order, queue["id"]), namespace=NAMESPACE)
        except ValueError:
            clear_queue(order.folder)
            return None

    def poll(self) -> dict[str, Ended]:
        import ray

        if not self._ids or time.time() - self._asked < POLL_S:
            return {}
        self._asked = time.time()
        if not answers(self._address):
            if time.time() - self._answered > SILENT_S:
                raise EngineLost(f"the Ray cluster at {self._address} does not answer any more", fatal=True)
            return {}
        self._answered = time.time()
        ready, _ = ray.wait(list(self._refs.values()), num_returns=len(self._refs), timeout=0)
        over = {}
        for name, ref in list(self._refs.items()):
            number, order = self._ids[name], self._orders[name]
            if ref in ready:
                over[name] = _judge(order, number, ref)
                del self._refs[name], self._ids[name], self._orders[name]
            else:
                last = _begun(order, number)
                write_queue(order.folder, self.name, number, f"RUNNING on {last['host']}" if last else
                            "PENDING (waits for CPUs, GPUs or memory)")
        return over

    def leave(self, names: Sequence[str]) -> str:
        return f"left on Ray: {', '.join(names)}. The same command takes them up again, with --cancel it ends them"

    def cancel(self, orders: Sequence[Order]) -> list[str]:
        import ray

        actors = {o.job.name: (o, actor) for o in orders if (actor := self._actor(o)) is not None}
        begun = {n: _begun(o, read_queue(o.folder)["id"]) for n, (o, _) in actors.items()}
        for name, (_, actor) in actors.items():
            if not begun[name]:  # first those that wait: they would take the room of the others
                ray.kill(actor)
        running = [actor for name, (_, actor) in actors.items() if begun[name]]
        for actor in running:
            actor.send.remote(signal.SIGTERM)
        waits = [actor.wait.remote() for actor in running]
        if waits:
            ray.wait(waits, num_returns=len(waits), timeout=STOP_S)
        for order, actor in actors.values():
            ray.kill(actor)
            clear_queue(order.folder)
        return sorted(actors)


def _name(order: Order, number: str) -> str:
    return f"{order.folder} {number}"


def _where(number: str) -> str:
    """How attempts.json names an actor."""
    return f"ray {number}"


def _begun(order: Order, number: str) -> dict[str, Any]:
    """The entry of an actor in attempts.json; empty before it has a place."""
    last = (read_attempts(order.folder) or [{}])[-1]
    return last if last.get("where") == _where(number) else {}


def _judge(order: Order, number: str, ref: Any) -> Ended:
    """How an attempt ended whose actor is gone or has finished."""
    import ray

    last = _begun(order, number)
    if last and last["ended"]:
        return Ended(last["how"], last["reason"])
    try:
        ray.get(ref)
        why = "its actor ended"
    except ray.exceptions.RayError as error:
        why = str(error).strip().splitlines()[0]
    if read_job(order.folder).state == "done":
        return Ended("done")
    if last:
        return Ended("stopped", f"lost on Ray: {why}")
    record_failure(order.folder, "Ray", f"the job could not be started: {why}")
    return Ended("failed", f"Ray: {why}")

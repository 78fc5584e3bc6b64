"""Jobs on Slurm, submitted through submitit; asked about with squeue, scontrol and, where there is accounting, sacct.

The batch script runs the setup lines and becomes the Python of `allocation.py`, which Slurm signals alone (`B:`)
before the time limit. Job folders must be on a file system that the nodes share.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo_lib.batch_spec import Job
from sgpo_lib.executors.allocation import Allocation, where_of
from sgpo_lib.executors.attempts import read_attempts, record_failure
from sgpo_lib.executors.interface import Ended, EngineLost, Executor, Order, clear_queue, read_queue, write_queue
from sgpo_lib.jobs import read_job

POLL_S = 5.0
"""Seconds between questions to the controller: administrators dislike more."""
SETTLE_S = 20.0
"""Seconds that a network file system gets to show what a job wrote last."""
SILENT_S = 600.0
"""Seconds for which the controller may be away (it restarts; the jobs go on)."""
MARGIN_S = 30
"""Seconds between the end of a job's grace and Slurm's time limit."""
_OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
         "REVOKED", "TIMEOUT"}


@dataclass(frozen=True)
class NodeKind:
    """A line of sinfo: `count` equal nodes of a partition."""

    partition: str
    default: bool
    count: int
    cpus: int
    memory: int
    """MiB."""
    gpus: int
    limit: int | None
    """Longest time in seconds; None: none."""
    usual: int | None
    """Time in seconds of a job that asks for none."""


class SlurmExecutor(Executor):
    """The Slurm cluster whose commands are on the path. Raises ValueError where they or submitit are missing."""

    name = "slurm"

    def __init__(self) -> None:
        try:
            import submitit  # noqa: F401 - told before anything starts
        except ImportError:
            raise ValueError("engine slurm: package submitit is not installed. Cure: pip install "
                             "'sgpo-workbench[slurm]'") from None
        missing = [name for name in ("sbatch", "squeue", "sinfo", "scontrol", "scancel") if not shutil.which(name)]
        if missing:
            raise ValueError(f"engine slurm: no {', '.join(missing)} on the path. Run this on a login node of the "
                             "cluster (there may be a module to load), or use --engine local")
        self._kinds = read_nodes(_slurm("sinfo", "--exact", "--noheader", "--format=%P|%D|%c|%m|%G|%l|%L"))
        self._orders: dict[str, Order] = {}
        self._ids: dict[str, str] = {}
        self._over_since: dict[str, float] = {}
        self._asked = self._answered = time.time()

    # --- before anything starts -----------------------------------------------------------------------------------
    def check(self, jobs: Sequence[Job]) -> list[str]:
        faults: list[str] = []
        tried: dict[tuple[str, ...], str] = {}
        for job in jobs:
            wrong = self._faults(job)
            if not wrong:
                options = tuple(self._flags(job))
                if options not in tried:
                    done = subprocess.run(["sbatch", "--test-only", *options, "--wrap=true"], capture_output=True,
                                          text=True, check=False)
                    good = done.returncode == 0 or "Required node not available" in done.stderr  # now: it would wait
                    tried[options] = "" if good else " ".join(done.stderr.split())
                wrong = [f"sbatch refuses {' '.join(options)}: {tried[options]}"] if tried[options] else []
            faults += [f"job {job.name!r}: {fault}" for fault in wrong]
        return faults

    def _faults(self, job: Job) -> list[str]:
        asked, partition = job.resources, self._partition(job)
        kinds = [k for k in self._kinds if k.partition == partition]
        if not kinds:
            names = ", ".join(sorted({k.partition for k in self._kinds}))
            got = repr(partition) if partition else "none, and the cluster has no default"
            return [f"resources.partition: got {got}, expected one of: {names}"]
        faults = []
        for name, wanted, unit in (("cpus", asked.cpus or 1, ""), ("memory", asked.memory or 0, " MiB"),
                                   ("gpus", asked.gpus or 0, "")):
            if wanted > (most := max(getattr(k, name) for k in kinds)):
                faults.append(f"resources.{name}: got {wanted}{unit} a node, the largest node of partition {partition} "
                              f"has {most}{unit}. Ask for less, or for another partition")
        fitting = sum(k.count for k in kinds if k.cpus >= (asked.cpus or 1) and k.memory >= (asked.memory or 0)
                      and k.gpus >= (asked.gpus or 0))
        if not faults and fitting < asked.nodes:
            faults.append(f"resources.nodes: got {asked.nodes}, partition {partition} has {fitting} such nodes")
        if asked.nodes > 1 and not (job.python or job.container) and importlib.util.find_spec("ray") is None:
            faults.append(f"resources.nodes: got {asked.nodes}, and package ray, which connects the nodes, is not "
                          "installed. Cure: pip install 'sgpo-workbench[ray]'")
        limit, seconds = kinds[0].limit, self._seconds(job)
        if limit and seconds > limit:
            faults.append(f"resources.time: got {_clock(seconds)}, partition {partition} allows {_clock(limit)}. Ask "
                          "for less: a job that needs longer is queued again until it is done")
        if seconds and seconds <= job.grace + MARGIN_S:
            faults.append(f"resources.time: got {_clock(seconds)}, and the warning comes {job.grace} + {MARGIN_S} s "
                          "before its end. Ask for more, or set a shorter grace")
        return faults

    def _partition(self, job: Job) -> str:
        return job.resources.partition or next((k.partition for k in self._kinds if k.default), "")

    def _seconds(self, job: Job) -> int:
        """Time limit of an allocation; 0: none."""
        usual = next((k.usual for k in self._kinds if k.partition == self._partition(job)), None)
        return job.resources.time or usual or 0

    def _options(self, job: Job) -> dict[str, Any]:
        """Options of sbatch, by their long names with underscores."""
        asked, seconds = job.resources, self._seconds(job)
        options = {"nodes": asked.nodes, "ntasks_per_node": 1, "gpus_per_node": asked.gpus or None,
                   "cpus_per_task": asked.cpus, "mem": f"{asked.memory}M" if asked.memory else None,
                   "time": _clock(seconds) if seconds else "0", "partition": asked.partition,
                   "account": asked.account, "qos": asked.qos, "signal": f"B:USR1@{job.grace + MARGIN_S}",
                   "requeue": True, **{name.replace("-", "_"): value for name, value in asked.extra.items()}}
        return {name: value for name, value in options.items() if not (value is None or value is False or value == "")}

    def _flags(self, job: Job) -> list[str]:
        pairs = ((name.replace("_", "-"), value) for name, value in self._options(job).items())
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in pairs]

    def describe(self, job: Job) -> str:
        return f"sbatch {shlex.join(self._flags(job))}"

    # --- jobs -----------------------------------------------------------------------------------------------------
    def submit(self, order: Order) -> str:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        job = order.job
        # The batch script becomes the Python process, so that the warning reaches it and nothing else. In a container
        # there would be no srun and no scontrol: there the Python of this command waits outside for the one within.
        python = sys.executable if job.container else job.python or sys.executable
        executor = submitit.SlurmExecutor(order.folder / "slurm", max_num_timeout=10**6,
                                          python=f"exec {shlex.quote(python)}")
        executor.update_parameters(
            job_name=f"{order.folder.parent.name}.{job.name}"[:200], use_srun=False, stderr_to_stdout=True,
            setup=["set -e", *job.setup, "set +e"], additional_parameters=self._options(job))
        try:
            number = executor.submit(Allocation(order)).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            raise ValueError(f"sbatch: {' '.join(str(error).split())}") from None
        self._orders[job.name], self._ids[job.name] = order, number
        write_queue(order.folder, self.name, number, "PENDING")
        return f"as Slurm job {number}"

    def attach(self, order: Order) -> bool:
        queue = read_queue(order.folder)
        if queue.get("engine") != self.name:
            return False
        states = self._states([queue["id"]])
        if states.get(queue["id"], ("COMPLETED", ""))[0] in _OVER:
            clear_queue(order.folder)
            return False
        self._orders[order.job.name], self._ids[order.job.name] = order, queue["id"]
        return True

    def poll(self) -> dict[str, Ended]:
        if not self._ids or time.time() - self._asked < POLL_S:
            return {}
        self._asked = time.time()
        try:
            states = self._states(list(self._ids.values()))
        except ValueError as error:
            if time.time() - self._answered > SILENT_S:
                raise EngineLost(f"Slurm does not answer: {error}. Its jobs are left alone; the same command takes "
                                 "them up again", fatal=False) from None
            return {}
        self._answered = time.time()
        over = {}
        for name, number in list(self._ids.items()):
            state, note = states.get(number) or _remembered(number)
            if state not in _OVER:
                write_queue(self._orders[name].folder, self.name, number, f"{state} {note}".strip())
            elif ended := self._judge(name, number, state, note):
                over[name] = ended
                del self._ids[name], self._orders[name]
        return over

    def _states(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Job id -> (state, reason or nodes), for those that the controller still knows. Raises ValueError."""
        try:
            text = _slurm("squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%T|%r|%N")
        except ValueError as error:
            if "Invalid job id" in str(error):  # that of one, which is forgotten; among several it is left out
                return {}
            raise
        rows = [line.strip().split("|") for line in text.splitlines() if line.count("|") == 3]
        return {number: (state, f"on {nodes}" if state == "RUNNING" else f"({reason})" if reason != "None" else "")
                for number, state, reason, nodes in rows}

    def _judge(self, name: str, number: str, state: str, note: str) -> Ended | None:
        """How a job ended that Slurm says is over; None where its files may not have arrived yet."""
        folder = self._orders[name].folder
        last = (read_attempts(folder) or [{}])[-1]
        mine = last.get("where") == where_of(number)
        found = read_job(folder)
        if found.state == "done":
            return Ended("done")
        if state == "CANCELLED":
            record_failure(folder, state, f"Slurm job {number} was cancelled. The same command continues it")
            return Ended("cancelled", f"Slurm job {number} was cancelled")
        if found.state == "failed":  # as the job itself tells it
            return Ended("failed", found.reason)
        told = mine and last["ended"] and state not in ("OUT_OF_MEMORY", "TIMEOUT")
        since = self._over_since.setdefault(number, time.time())
        if state in ("COMPLETED", "FAILED") and not told and time.time() - since < SETTLE_S:
            return None
        if told:
            return Ended(last["how"], last["reason"])
        if state in ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL"):
            return Ended("stopped", f"Slurm job {number}: {state}")
        why = f"Slurm job {number}{f' {note}' if note else ''}{_exit_of(number)}. {_tail(folder, number)}"
        record_failure(folder, state, why.strip())
        return Ended("failed", f"{state}: {why}")

    def leave(self, names: Sequence[str]) -> str:
        ids = ", ".join(f"{name} ({self._ids[name]})" for name in names if name in self._ids)
        return f"left on Slurm: {ids}. The same command takes them up again, with --cancel it ends them"

    def cancel(self, orders: Sequence[Order]) -> list[str]:
        queued = {o.job.name: (o.folder, read_queue(o.folder)) for o in orders}
        mine = {n: (folder, q["id"]) for n, (folder, q) in queued.items() if q.get("engine") == self.name}
        if mine:
            _slurm("scancel", *(number for _, number in mine.values()))
        deadline = time.time() + 60
        ids = [number for _, number in mine.values()]
        while ids and any(s not in _OVER for s, _ in self._states(ids).values()) and time.time() < deadline:
            time.sleep(1)
        for folder, _ in mine.values():
            clear_queue(folder)
        return sorted(mine)


# --- what the commands say ---------------------------------------------------------------------------------------
def _slurm(*command: str) -> str:
    """Standard output of a command. Raises ValueError with what it says where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"engine slurm: {command[0]}: {' '.join((done.stderr or done.stdout).split())[:400]}")
    return done.stdout


def _remembered(number: str) -> tuple[str, str]:
    """(state, note) of a job that the controller has forgotten, from accounting; taken for completed where none is."""
    done = subprocess.run(["sacct", "-X", "-n", "-P", "-j", number, "-o", "State"], capture_output=True, text=True,
                          check=False) if shutil.which("sacct") else None
    words = done.stdout.split() if done and done.returncode == 0 else []
    return (words[0] if words else "COMPLETED"), ""


def _exit_of(number: str) -> str:
    done = subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True, check=False)
    found = re.search(r"\bExitCode=(\d+):(\d+)", done.stdout)
    if not found or found[0].endswith("=0:0"):
        return ""
    return f", signal {found[2]}" if found[2] != "0" else f", exit code {found[1]}"


def _tail(folder: Path, number: str) -> str:
    """The last lines that the batch script wrote."""
    path = folder / "slurm" / f"{number}_0_log.out"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return " ".join([s.strip() for s in lines if s.strip()][-3:])[-400:]


def read_nodes(text: str) -> list[NodeKind]:
    """Lines of `sinfo --format=%P|%D|%c|%m|%G|%l|%L`."""
    kinds = []
    for line in text.splitlines():
        name, count, cpus, memory, gres, limit, usual = line.strip().split("|")
        gpus = sum(int(n) for n in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))
        longest = _seconds(limit)
        kinds.append(NodeKind(name.rstrip("*"), name.endswith("*"), int(count), int(cpus.rstrip("+")),
                              int(memory.rstrip("+")), gpus, longest, _seconds(usual) or longest))
    return kinds


def _seconds(text: str) -> int | None:
    """Seconds of Slurm's [days-]hours:minutes:seconds; None for infinite and n/a."""
    if not re.fullmatch(r"[\d:-]+", text):
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(p) for p in clock.split(":")]
    return int(days or 0) * 86400 + sum(part * 60**i for i, part in enumerate(reversed(parts)))


def _clock(seconds: int) -> str:
    """[days-]hours:minutes:seconds, as sbatch reads it."""
    days, rest = divmod(seconds, 86400)
    return (f"{days}-" if days else "") + f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"

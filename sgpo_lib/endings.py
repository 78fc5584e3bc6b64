"""Why a notebook's execution failed: what happened, and what to do about it.

A kernel that dies leaves an exit status and nothing else. Whether it was the system's out-of-memory killer is read
from the counters of the process's control group (v2 `memory.events`, v1 `memory.oom_control`) and, where it has none,
of the machine (`/proc/vmstat`).
"""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

LESS_MEMORY = ("Lower rollout.rollout_batch, train.micro_batch, train.kl_chunk_tokens or rollout.max_new_tokens, or "
               "give the job more memory. The same command continues from the last checkpoint")
CONTINUES = "The same command continues from the last checkpoint"
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc",
                        re.IGNORECASE)
_COUNTER = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the out-of-memory killer has ended so far, where this one belongs. 0 where nothing tells."""
    groups = root / "proc/self/cgroup"
    lines = groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []
    counters = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            counters += [root / f"sys/fs/cgroup{path}/memory.events"]
        elif "memory" in controllers.split(","):
            counters += [root / f"sys/fs/cgroup/memory{path}/memory.oom_control"]
    for counter in (*counters, root / "proc/vmstat"):
        try:
            found = _COUNTER.search(counter.read_text(encoding="utf-8"))
        except OSError:  # no such group here (a container), or not ours to read
            continue
        if found:
            return int(found[1])
    return 0


def of_cell(name: str, message: str) -> dict[str, Any]:
    """Failure of a cell that raised an error."""
    if name == "SystemExit":
        return {"error": name, "message": "the cell called sys.exit() or exit(): the cells after it did not run",
                "cure": "Take it out; a notebook ends with its last cell"}
    if name in ("MemoryError", "OutOfMemoryError") or _NO_MEMORY.search(message):
        return {"error": name, "message": message or "out of memory", "cure": LESS_MEMORY}
    return {"error": name, "message": message}


def of_sentinel() -> dict[str, Any]:
    """Failure of a kernel that answered every cell, but then could not write the runner's mark."""
    return {"error": "NoSentinel", "message": "every cell was answered, but the kernel could not write the runner's "
            "mark at the end", "cure": "Look for a cell that replaces parts of pathlib or of IPython, and at the disk"}


def of_time_limit(seconds: float) -> dict[str, Any]:
    """Failure of an execution that took too long."""
    return {"error": "TimeLimit", "message": f"the time limit of {seconds:g} s (--time-limit) was reached; the kernel "
            "was interrupted", "cure": f"Give it more time. {CONTINUES}"}


def of_kernel(status: int | None, memory_killed: bool) -> dict[str, Any]:
    """Failure of a kernel process that ended by itself or was killed. `status`: as `Popen.returncode`."""
    if status == -signal.SIGKILL and memory_killed:
        return {"error": "OutOfMemory", "message": "the kernel process was killed by the system because memory ran "
                "out (signal 9, counted as oom_kill)", "cure": LESS_MEMORY, "kernel_status": status}
    if status is None:
        how, cure = "its exit status is not known", "See log.txt"
    elif status >= 0:
        how = f"exit status {status}: os._exit, or a library that ends the process"
        cure = "See log.txt and the cell; nothing after it ran"
    else:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        why = {"SIGKILL": "killed from outside; most often memory ran out", "SIGTERM": "ended from outside",
               "SIGSEGV": "a crash in compiled code", "SIGABRT": "a failed check in compiled code",
               "SIGBUS": "a crash in compiled code; also a full /dev/shm", "SIGILL": "code for another processor"}
        how = f"signal {-status}, {name}: {why.get(name, 'killed by it')}"
        cure = LESS_MEMORY if name == "SIGKILL" else f"See log.txt. {CONTINUES}"
    return {"error": "DeadKernelError", "message": f"the kernel process ended while the cell ran ({how})",
            "cure": cure, "kernel_status": status}

"""Processes that do one task each at a time and can be killed at any moment, from here or from outside.

Each worker is a Python of its own (`reward_worker.serve`) in a session of its own, with one pipe to this process:
workers share nothing with one another, no lock and no queue, so that a kill at any moment costs one task at most. It
is started anew, never forked, so it inherits no CUDA state and runs no main script, whenever it starts; it ends with
this process. Order: reward_worker, worker_pool, rewards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sgpo_lib.reward_worker import ENVIRONMENT, Outcome

START_SECONDS = 60.0
"""Longest time that a worker may take to start."""
STARTS = 5
"""Starts in a row that may fail before the pool gives up."""
Key = tuple[Any, ...]
"""(kind of task, ...): what identifies a task within a call."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    until: float
    """When it is killed (monotonic clock): it has to be ready, or to answer, before."""
    ready: bool = False
    key: Key | None = None
    """The task that it works on."""
    used: bool = False
    """Whether it had a task before."""


class WorkerPool:
    """At most `size` workers that import `modules` before their first task, and have `deadline` seconds for each task.

    Workers start where there is something to do. Not for several threads at once.
    """

    def __init__(self, size: int, deadline: float, modules: Sequence[str]) -> None:
        self.size, self.deadline, self.modules = size, deadline, list(modules)
        self.workers: list[_Worker] = []
        self._failed_starts, self._owner = 0, os.getpid()

    def run(self, tasks: dict[Key, tuple[Any, ...]]) -> dict[Key, Outcome]:
        """Outcomes of tasks, `key[0]` being the kind of each.

        A task over its deadline is `timeout`. One whose worker ended, or ran out of memory, is tried once more in a
        new worker, since it may have been another's doing; up to twice more where the worker was sent SIGKILL. Raises
        RuntimeError where workers cannot be started.
        """
        waiting, tries, done = deque(tasks), Counter[Key](), dict[Key, Outcome]()
        try:
            while len(done) < len(tasks):
                self._employ(waiting, tasks, tries)
                for worker, outcome in self._events():
                    key, worker.key = worker.key, None
                    if outcome == ("unverifiable", "memory") or outcome is None:
                        self._end(worker)  # what its memory is full of need not be this task's
                    if key is None:
                        continue
                    tries[key] += 1
                    code = worker.process.returncode
                    if outcome is None and tries[key] >= (3 if code == -signal.SIGKILL else 2):
                        outcome = ("unverifiable", f"crash: the worker ended with code {code}")
                    if outcome is None or (outcome == ("unverifiable", "memory") and tries[key] == 1):
                        waiting.appendleft(key)
                    else:
                        done[key] = outcome
        finally:
            for worker in [w for w in self.workers if w.key is not None]:  # Ctrl-C: its answer is not waited for
                self._end(worker)
        return done

    def stop(self) -> None:
        """Kill all workers. A later call starts new ones. In a process that was forked from theirs nothing is done."""
        for worker in list(self.workers) if os.getpid() == self._owner else ():
            self._end(worker)

    def _employ(self, waiting: deque[Key], tasks: dict[Key, tuple[Any, ...]], tries: Counter[Key]) -> None:
        """A task for every idle worker, and a new worker for every task that is left, up to `size`."""
        for worker in [w for w in self.workers if w.ready and w.key is None]:
            if not waiting:
                return
            key = waiting[0]
            if tries[key] and worker.used:
                self._end(worker)  # the second try is a new worker's
                continue
            try:
                worker.connection.send((key[0], tasks[key]))
            except OSError:  # it was killed while it had nothing to do
                self._end(worker)
            else:
                waiting.popleft()
                worker.key, worker.used, worker.until = key, True, time.monotonic() + self.deadline
        starting = sum(not w.ready for w in self.workers)
        for _ in range(min(self.size - len(self.workers), len(waiting) - starting)):
            self.workers.append(self._started())

    def _events(self) -> list[tuple[_Worker, Outcome | None]]:
        """Wait for answers, deaths and deadlines: workers with what their tasks came to, None for one that ended."""
        busy = [w for w in self.workers if w.key is not None or not w.ready]
        patience = max(0.0, min(w.until for w in busy) - time.monotonic())
        heard = wait([w.connection for w in busy], patience)
        found: list[tuple[_Worker, Outcome | None]] = []
        for worker in busy:
            if worker.connection in heard:
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._end(worker)
                    self._count_start(worker)
                    found.append((worker, None))
                    continue
                if worker.ready:
                    found.append((worker, message))
                worker.ready, self._failed_starts = True, 0
            elif time.monotonic() > worker.until:
                self._end(worker)
                self._count_start(worker)
                found.append((worker, ("unverifiable", "timeout")))
        return found

    def _count_start(self, worker: _Worker) -> None:
        """Raises RuntimeError where one worker after the other ends before it is ready."""
        self._failed_starts += not worker.ready
        if self._failed_starts >= STARTS:
            self._failed_starts = 0
            raise RuntimeError(
                f"{STARTS} verifier workers ended before they were ready, the last with code "
                f"{worker.process.returncode} (-9: killed, or not ready within {START_SECONDS:.0f} s). See that this "
                f"machine can start Python processes and that {', '.join(self.modules) or 'math_verify'} can be "
                "imported in one; their errors are in this program's error output")  # fmt: skip

    def _started(self) -> _Worker:
        ours, theirs = socket.socketpair()
        call = (f"import sys; sys.path[:] = {sys.path!r}; from sgpo_lib.reward_worker import serve; "
                f"serve({theirs.fileno()}, {os.getpid()}, {str(Path.cwd())!r}, {self.modules!r})")  # fmt: skip
        with theirs:
            process = subprocess.Popen([sys.executable, "-c", call], stdin=subprocess.DEVNULL, start_new_session=True,
                                       pass_fds=[theirs.fileno()], env=os.environ | ENVIRONMENT)  # fmt: skip
        return _Worker(process, Connection(ours.detach()), time.monotonic() + START_SECONDS)

    def _end(self, worker: _Worker) -> None:
        """Kill a worker with all that it started."""
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)  # its own group: start_new_session
        worker.process.wait()
        worker.connection.close()

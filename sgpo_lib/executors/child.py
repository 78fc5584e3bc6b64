"""One attempt of a job as a child of this process: started in one shell with its setup lines, signalled, judged."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sgpo_lib.executors.attempts import begin, end, record_failure
from sgpo_lib.executors.interface import Ended, Order
from sgpo_lib.jobs import STOPPED, read_job
from sgpo_lib.redaction import Redactor, lines_into

LINES = 3
"""Last lines of a process's output that tell why it never came as far as the notebook."""


class Child:
    """A running `sgpo run`, in a process group of its own. Its output goes to `process.txt` of the job folder."""

    def __init__(self, order: Order, where: str = "", setup: Sequence[str] = (), env: dict[str, str] | None = None):
        """Start it. `where`: for attempts.json. `setup`: lines for the shell before it. `env`: more of the environment.

        It gets SIGTERM when this process dies. A command that cannot be started counts as an attempt that failed.
        """
        self.folder = order.folder
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: Ended | None = None
        begin(self.folder, where)
        command = list(order.command)
        if setup:
            command = ["bash", "-c", "\n".join(["set -e", *setup, "set +e", 'exec "$@"']), "bash", *command]
        if guard := shutil.which("setpriv"):  # util-linux
            command = [guard, "--pdeathsig", "TERM", *command]
        environment = {**os.environ, **order.env, **(env or {})}
        self._output = contextlib.ExitStack()
        file = self._output.enter_context((self.folder / "process.txt").open("w", encoding="utf-8", buffering=1))
        redact = Redactor(environment)
        pipe = self._output.enter_context(lines_into(
            lambda line: file.write(redact(line)), lambda: file.closed))
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT,
                                             cwd=order.cwd, env=environment, start_new_session=True)
        except OSError as error:  # another machine may lack the folder or the program
            os.write(pipe, f"{error}\n".encode())

    def send(self, number: int) -> None:
        """Send a signal to the process and its shell, not to the kernel, which has a group of its own."""
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""
        if self._ended is None and (self._process is None or self._process.poll() is not None):
            self._output.close()
            self._ended = judge(self.folder, self._process.returncode if self._process else None)
            end(self.folder, self._ended)
        return self._ended

    def wait(self, timeout: float | None = None) -> Ended:
        """Wait for the end, at most `timeout` seconds (then subprocess.TimeoutExpired is raised)."""
        if self._process:
            self._process.wait(timeout)
        ended = self.poll()
        assert ended is not None
        return ended


def judge(folder: Path, code: int | None) -> Ended:
    """What an exit code and the job folder say together. Writes FAILED.json where the process could not."""
    state = read_job(folder).state
    if state == "done" or code == STOPPED:
        return Ended("done") if state == "done" else Ended("stopped", "asked to stop")
    if state != "failed":  # killed from outside, or it never came as far as the notebook
        text = (folder / "process.txt").read_text(encoding="utf-8", errors="replace")
        why = " ".join([s for s in text.split("\n") if s.strip()][-LINES:])[-400:]
        record_failure(folder, _exit(code), why or "no output")
    return Ended("failed", read_job(folder).reason)


def _exit(code: int | None) -> str:
    if code is None:
        return "the process could not be started"
    if code < 0:
        why = " (out of memory, or from outside)" if -code == signal.SIGKILL else ""
        return f"the process was ended by {signal.Signals(-code).name}{why}"
    return f"the process ended with code {code}"

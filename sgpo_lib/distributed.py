"""The same loop on several workers of Ray Train, seen from the process that asked for it.

    this process            follows metrics.jsonl and hands its rows on; hands a stop on
    ray_driver              talks to Ray, in a process of its own; replaces lost workers
    worker 0 .. n-1         `trainer.work` with its rank; the first one writes the run folder

All of them need the same file system at the same paths: the run folder, the bases, files with problems. Ray comes from
RAY_ADDRESS, or is started here with this machine's devices and ended with the training.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sgpo_lib.config import RunConfig
from sgpo_lib.ray_driver import ADDRESS, Outcome, Task, newest, unpickled
from sgpo_lib.runs import Run, Stopped, stop_requested
from sgpo_lib.storage import write_atomic
from sgpo_lib.world import World

OnRow = Callable[[dict[str, Any]], None]
Work = Callable[[RunConfig, Run, World], None]
CLUSTER_GONE_S = 15.0
"""Seconds without an answer after which the cluster is given up."""
_POLL_S = 0.25


def train_on_ray(work: Work, config: RunConfig, run: Run, on_row: OnRow | None) -> None:
    """Train to the end on `compute.workers` workers. `on_row` is called in this thread, with every row.

    Raises ValueError where it cannot work (no Ray, no cluster, too few devices), before any work; what a worker raised;
    Stopped where it was asked to stop; RuntimeError where workers are lost again and again, or the cluster is.
    """
    address = _require_ray(config)
    from sgpo_lib.bases import base_source

    base_source(config.model)  # made once, not by every worker
    stop, follower = run.folder / "STOP", _Follower(run, on_row)
    stop.unlink(missing_ok=True)
    task = Task(config, run.folder.resolve(), Path.cwd(), tuple(p for p in sys.path if p),
                (work.__module__, work.__name__), address)
    with tempfile.TemporaryDirectory(prefix="sgpo-ray-") as folder, _started(task, Path(folder)) as driver:
        interrupted = _follow(driver, run, follower, Path(folder) / ADDRESS)
        follower.tell()
        outcome = _outcome(driver, Path(folder), run)
    stop.unlink(missing_ok=True)
    if outcome.error:
        raise outcome.error
    if interrupted and not run.done:
        raise KeyboardInterrupt
    if not run.done:
        raise Stopped(f"asked to stop after step {newest(run)}")


def _require_ray(config: RunConfig) -> str:
    """HOST:PORT of the cluster or `auto`, empty for one of our own. Raises ValueError without Ray, or a cluster."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(f"compute.workers: got {config.compute.workers}, which needs Ray Train, and ray is not "
                         "installed. Cure: pip install 'sgpo-workbench[ray]', or workers=1")
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise ValueError(f"RAY_ADDRESS: got {address}, the port of Ray's client. Give the cluster's own, HOST:6379 "
                         "where it was started with `ray start --head`")
    if address not in ("", "auto", "local") and not answers(address):
        raise ValueError(f"no Ray cluster at {address} (RAY_ADDRESS). Start one with `ray start --head`, or unset it: "
                         "then Ray starts on this machine alone")
    return "" if address == "local" else address


@contextlib.contextmanager
def _started(task: Task, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The driver process. It ends with this one, and takes a Ray of its own with it."""
    (folder / "task").write_bytes(pickle.dumps(task))
    guard = shutil.which("setpriv")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(task.path)}
    if not task.address:  # a token of its own, or Ray would leave one in the home folder, which `ray start` asks for
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen(
            [*([guard, "--pdeathsig", "TERM"] if guard else []), sys.executable, "-m", "sgpo_lib.ray_driver",
             str(folder)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            start_new_session=True)  # Ctrl-C in a terminal is for this process, which hands it on as a stop
    reader = threading.Thread(target=_tell, args=(driver,), daemon=True)
    reader.start()
    try:
        yield driver
    finally:
        if driver.poll() is None:
            driver.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(10)
            driver.kill()
        reader.join(2)


def _tell(driver: subprocess.Popen[str]) -> None:
    """Print what the driver prints, where notebooks show it."""
    assert driver.stdout is not None
    for line in driver.stdout:
        print(line.rstrip("\n"), file=sys.stderr, flush=True)


def _follow(driver: subprocess.Popen[str], run: Run, follower: _Follower, where: Path) -> bool:
    """Until the driver ends, or the cluster whose address the driver writes to `where` is gone; whether Ctrl-C was
    pressed. A second one is raised at once."""
    heard, asked, presses = time.monotonic(), time.monotonic(), 0
    while driver.poll() is None:
        try:
            follower.tell()
            if stop_requested(run.folder) and not (run.folder / "STOP").exists():  # that of the job
                write_atomic(run.folder / "STOP", "job\n")
            if where.exists() and time.monotonic() - asked > 2:
                asked = time.monotonic()
                heard = time.monotonic() if answers(where.read_text()) else heard
                if asked - heard > CLUSTER_GONE_S:
                    return False
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(_POLL_S)
        except KeyboardInterrupt:
            presses += 1
            if presses > 1:
                raise
            write_atomic(run.folder / "STOP", "interrupt\n")  # the workers end their step and save
    return presses > 0


def _outcome(driver: subprocess.Popen[str], folder: Path, run: Run) -> Outcome:
    """What the driver wrote; where it wrote nothing, why."""
    if (folder / "outcome").exists():
        return unpickled(folder / "outcome")
    kept = f"The last checkpoint, after step {newest(run)}, is whole: the same command continues"
    address = (folder / ADDRESS).read_text() if (folder / ADDRESS).exists() else ""
    if address and not answers(address):
        return Outcome(RuntimeError(f"the Ray cluster at {address} does not answer any more. {kept}, with a cluster at "
                                    "RAY_ADDRESS or without one"))
    last = (folder / "log").read_text(errors="replace").strip().splitlines()[-3:]
    return Outcome(RuntimeError(f"the process that talks to Ray ended (exit status {driver.poll()}; its last words: "
                                f"{' / '.join(last) or 'none'}). {kept}"))


class _Follower:
    """Hands rows of metrics on as they are written, each once."""

    def __init__(self, run: Run, on_row: OnRow | None):
        self.run, self.on_row = run, on_row
        self._seen: set[tuple[str, int]] = set()
        self._size = -1

    def tell(self) -> None:
        """Call `on_row` with what is new."""
        path = self.run.folder / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if not self.on_row or size == self._size:
            return
        self._size = size
        for row in self.run.metrics():
            key = (row["kind"], row["step"])
            if key not in self._seen:
                self._seen.add(key)
                self.on_row(row)


def answers(address: str) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True

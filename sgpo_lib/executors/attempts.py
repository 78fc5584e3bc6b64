"""`attempts.json` of a job folder: every time the job was started, where, how it ended, and how far its runs were.

A job that was stopped goes on without limit as long as it gets anywhere. Two attempts in a row that were stopped
before their runs came further than ever are a failure, so that the loop ends.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

from sgpo_lib.executors.interface import Ended
from sgpo_lib.jobs import job_runs, read_job
from sgpo_lib.redaction import Redactor
from sgpo_lib.runs import load_run
from sgpo_lib.storage import write_atomic


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """The attempts of a job, the oldest first: started, ended, host, where, how, reason, progress."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / "attempts.json").read_text(encoding="utf-8"))
        return record if isinstance(record, list) else []
    return []


def make_ready(folder: Path) -> None:
    """Remove how the job ended before. The attempts of one that was done are forgotten."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("DONE", "FAILED.json", "log.txt", *(["attempts.json"] if (folder / "DONE").exists() else []))
    for name in names:
        (folder / name).unlink(missing_ok=True)


def begin(folder: Path, where: str = "") -> None:
    """Note that an attempt starts here and now."""
    close_lost(folder)
    attempts = read_attempts(folder)
    attempts.append({"started": _now(), "ended": "", "host": socket.gethostname(), "where": where, "how": "",
                     "reason": "", "progress": 0})
    write_atomic(folder / "attempts.json", json.dumps(attempts, indent=1))


def close_lost(folder: Path) -> None:
    """An attempt that never ended was lost with its machine."""
    end(folder, Ended("stopped", "lost: its process ended without a word"))


def end(folder: Path, ended: Ended) -> None:
    """Note how the attempt that runs ended. One whose end is known already keeps it."""
    attempts = read_attempts(folder)
    if attempts and not attempts[-1]["ended"]:
        attempts[-1] |= {"ended": _now(), "how": ended.how, "reason": ended.reason[:500], "progress": progress(folder)}
        write_atomic(folder / "attempts.json", json.dumps(attempts, indent=1))


def progress(folder: Path) -> int:
    """How far the runs are that the job opened: steps of their newest checkpoints, plus one for each that is done.

    Steps that were logged after the last checkpoint do not count: they come again.
    """
    total = 0
    for path in job_runs([read_job(folder)]):
        with contextlib.suppress(ValueError):  # a run of another version
            run = load_run(path)
            newest = run.checkpoints()[-1:]
            total += sum(int(p.name.removeprefix("step-")) for p in newest) + run.done
    return total


def goes_nowhere(folder: Path) -> bool:
    """Whether the last two attempts were stopped before they brought the job further than those before."""
    attempts = read_attempts(folder)
    if len(attempts) < 2 or any(a["how"] != "stopped" for a in attempts[-2:]):
        return False
    return all(a["progress"] <= max((b["progress"] for b in attempts[:n]), default=0)
               for n, a in list(enumerate(attempts))[-2:])


def record_failure(folder: Path, error: str, message: str) -> None:
    """Write FAILED.json for a job that could not do it itself."""
    record = {"cell": None, "error": error, "message": Redactor()(message), "time": _now()}
    write_atomic(folder / "FAILED.json", json.dumps(record))


def record_no_progress(folder: Path) -> Ended:
    """The failure of a job that `goes_nowhere`; started again it has two attempts more."""
    record_failure(folder, "NoProgress", "stopped twice in a row before a step was finished and saved. Give it more "
                   "time (resources.time), a longer grace, or smaller steps")
    attempts = read_attempts(folder)
    attempts[-1]["how"] = "failed"
    write_atomic(folder / "attempts.json", json.dumps(attempts, indent=1))
    return Ended("failed", read_job(folder).reason)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")

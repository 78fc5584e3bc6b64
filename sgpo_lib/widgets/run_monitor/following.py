"""A run that is read while it goes on: only the bytes that were appended, and how the run stands.

The training loop is not asked for anything. It appends lines to `metrics.jsonl` (runs.py); after a resume it writes
the file anew, without the rows of steps that are done again.
"""

from __future__ import annotations

import bisect
import collections
import json
import math
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from sgpo_lib.collapse import Watch
from sgpo_lib.runs import is_locked
from sgpo_lib.storage import restored
from sgpo_lib.widgets.run_monitor.curves import COLUMNS, Curve, number, shown

LAST_STEPS = 20
"""Steps whose median duration gives the time left."""
QUIET_SECONDS = 60.0
"""A run in progress without a new row for longer than this, and than ten steps, is reported as quiet."""
ELSEWHERE_SECONDS = 120.0
"""How long a run that another machine holds counts as running after its last row: its lock cannot be seen from here."""
ENDED = frozenset({"done", "failed", "stopped"})


class Tail:
    """The whole lines of a file that grows; a line without an end waits for the next read."""

    KEPT = 64
    """Bytes before the last place read: where they differ the file is another one, whatever its size."""

    def __init__(self, path: Path):
        self.path = path
        self.forget()

    def forget(self) -> None:
        """Read from the start next time."""
        self.offset, self._kept, self._torn = 0, b"", b""

    def read(self) -> tuple[list[bytes], bool]:
        """New lines, and whether they begin a file anew: it shrank, was replaced, or is gone."""
        had = self.offset > 0
        try:
            with self.path.open("rb") as file:
                if anew := not self._continues(file):
                    self.forget()
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            self.forget()
            return [], had
        self.offset += len(data)
        self._kept = (self._kept + data)[-self.KEPT:]
        *lines, self._torn = (self._torn + data).split(b"\n")
        return lines, anew

    def _continues(self, file: BinaryIO) -> bool:
        file.seek(self.offset - len(self._kept))
        return file.read(len(self._kept)) == self._kept


class Follower:
    """One run: its rows as columns and how it stands. `read` brings both up to date.

    `tables` holds `step`, `tokens_total`, `seconds_total` and the chosen metrics as columns, for training and for
    evaluation rows; None where a row has no value. `epoch` counts how often the rows began anew.
    """

    def __init__(self, folder: Path, name: str, curves: Sequence[Curve]):
        self.folder, self.name = folder, name
        self._tail = Tail(folder / "metrics.jsonl")
        self._columns = {t: [c.column for c in curves if c.table == t] for t in ("train", "eval")}
        self._config_time, self._changed = -1, time.time()
        self._config_steps: int | None = None
        self.epoch = 0
        self._clear()

    def _clear(self) -> None:
        self.tables: dict[str, dict[str, list[Any]]] = {
            table: {name: [] for name in (*COLUMNS, *columns)} for table, columns in self._columns.items()}
        self.seen: set[str] = set()
        """Names of all metrics that a row had."""
        self.unread = 0
        """Lines that are no rows."""
        self.test: float | None = None
        self.watch = Watch()
        """Signs of a collapse."""
        self.not_finite: dict[str, int] = {}
        """Metric -> last step at which it was NaN or infinite."""
        self._seconds: collections.deque[float] = collections.deque(maxlen=LAST_STEPS)

    @property
    def step(self) -> int | None:
        """Last training step with a row; 0 where only the start was evaluated, None before the first row."""
        steps = self.tables["train"]["step"] or self.tables["eval"]["step"]
        return steps[-1] if steps else None

    def read(self) -> bool:
        """Take in what was appended; whether there was anything. Raises OSError where the disk does."""
        lines, anew = self._tail.read()
        if anew:
            self.epoch += 1
            self._clear()
        for line in lines:
            if line.strip():
                self._take(line)
        if lines or anew:
            self._changed = time.time()
        return bool(lines) or anew

    def _take(self, line: bytes) -> None:
        try:
            row: Any = restored(json.loads(line))
        except ValueError:  # a line torn by a crash; the run goes on behind it
            row = None
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int or step < 0:
            self.unread += 1
            return
        kind = row.get("kind")
        if kind == "test":
            self.test = shown(number(row.get("accuracy")))
        if kind not in ("train", "supervised", "eval"):
            return
        table = "eval" if kind == "eval" else "train"
        self._make_room(table, step)
        self.seen.update(("eval/" if table == "eval" else "") + k for k in row if k not in ("kind", "step"))
        train, columns = self.tables["train"], self.tables[table]
        tokens, seconds = (train[k][-1] if train[k] else 0 for k in COLUMNS[1:])
        if table == "train":
            self.watch.take(row)
            tokens += int(number(row.get("tokens")) or 0)
            took = number(row.get("seconds_step"))
            if took is not None and math.isfinite(took):
                seconds = round(seconds + took, 3)
                self._seconds.append(took)
            if "kl_kept_mean" in row and "kl_mean" in row:
                row["kl_clipped_mean"] = (number(row["kl_mean"]) or 0.0) - (number(row["kl_kept_mean"]) or 0.0)
        for name, value in zip(COLUMNS, (step, tokens, seconds), strict=True):
            columns[name].append(value)
        for name in self._columns[table]:
            value = number(row.get(name))
            if value is not None and not math.isfinite(value):
                self.not_finite[("eval/" if table == "eval" else "") + name] = step
            columns[name].append(shown(value))

    def _make_room(self, table: str, step: int) -> None:
        """Rows from `step` on go, should a step come again: each stands once, in order."""
        steps = self.tables[table]["step"]
        if steps and step <= steps[-1]:
            keep = bisect.bisect_left(steps, step)
            for column in self.tables[table].values():
                del column[keep:]
            self.epoch += 1

    # --- how it stands -----------------------------------------------------------------------------------------
    def status(self) -> dict[str, Any]:
        """name, state (`waiting`, `running`, `done`, `failed`, `stopped`), step, total, seconds per step, seconds left,
        test accuracy, note, warnings (signs of a collapse that last); None for what is not known."""
        state, total = self._state(), self._total()
        pace = statistics.median(self._seconds) if self._seconds else None
        if state == "done" and total is None:
            total = self.step
        known = state == "running" and pace is not None and total is not None and self.step is not None
        left = pace * max(0, total - self.step) if known else None  # type: ignore[operator]
        return {"name": self.name, "state": state, "step": self.step, "total": total, "pace": shown(pace),
                "left": None if left is None else round(left), "test": self.test,
                "note": "; ".join(self._notes(state, pace)), "warnings": [str(c) for c in self.watch.active],
                "not_finite": [f"{k} at step {v}" for k, v in sorted(self.not_finite.items())]}  # fmt: skip

    def _state(self) -> str:
        if (self.folder / "DONE").exists():
            return "done"
        if not there(self.folder):
            return "waiting"
        if is_locked(self.folder) or self._held_elsewhere():
            return "running"
        return "failed" if (self.folder / "FAILED.json").exists() else "stopped"

    def _held_elsewhere(self) -> bool:
        try:
            owner = (self.folder / ".owner").read_text(encoding="utf-8", errors="replace").strip()
            changed = max((self.folder / name).stat().st_mtime for name in (".owner", "metrics.jsonl")
                          if (self.folder / name).exists())
        except (OSError, ValueError):  # not held, or let go of while we looked
            return False
        patience = max(ELSEWHERE_SECONDS, 10 * max(self._seconds, default=0.0))
        return not owner.endswith(f" on {socket.gethostname()}") and time.time() - changed < patience

    def _total(self) -> int | None:
        """Steps of the whole run. None where the configuration tells epochs (it depends on the problems then)."""
        path = self.folder / "config.yaml"
        try:
            changed = path.stat().st_mtime_ns
            if changed != self._config_time:
                train = (yaml.safe_load(path.read_text(encoding="utf-8")) or {})["train"]
                self._config_steps = int(train["steps"]) if not train.get("epochs") else None
                self._config_time = changed
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):  # another version's, or none
            return None
        return self._config_steps

    def _notes(self, state: str, pace: float | None) -> list[str]:
        notes = []
        quiet = time.time() - self._changed
        if state == "waiting":
            notes.append("no such run yet")
        elif self.step is None:
            notes.append("no rows yet")
        if state == "running" and quiet > max(QUIET_SECONDS, 10 * (pace or 0.0)):
            notes.append(f"no new row for {int(quiet / 60)} min")
        if state == "failed":
            notes.append(_failure(self.folder / "FAILED.json"))
        if self.unread:
            notes.append(f"{self.unread} line{'s' if self.unread > 1 else ''} of metrics.jsonl could not be read")
        return [n for n in notes if n]


def there(folder: Path) -> bool:
    """Whether a folder is a run's, also before its first row, or where only its metrics were copied."""
    return any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl"))


def _failure(path: Path) -> str:
    """What FAILED.json says, in one short line."""
    try:
        told = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        text = " ".join(f"{told['error']}: {told['message']}".split())
    except (OSError, ValueError, KeyError, TypeError):  # being written, or not ours
        return ""
    return text if len(text) <= 300 else text[:299] + "…"

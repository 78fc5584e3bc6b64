"""The run monitor: curves of runs that go on, side by side, from their `metrics.jsonl`.

    monitor = RunMonitor("tiny-sgpo-*")        # finished, running, failed or headless runs
    monitor                                    # the last line of a cell shows it

A thread reads what was appended, so that the page also moves while the kernel trains; the loop that writes the file
is not involved. The page gets appended points only. It gets all of them again when their number has doubled and when
following ends, since a page may have missed a message while the kernel was too busy to answer.

Names of runs and messages reach the page as text, never as HTML.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from IPython.display import display

from sgpo_lib.widgets.run_monitor import choosing, static
from sgpo_lib.widgets.run_monitor.curves import AXES, FURTHER, KNOWN, choose
from sgpo_lib.widgets.run_monitor.following import ENDED, Follower

_HERE = Path(__file__).parent
GRACE_SECONDS = 30.0
"""How long failed or stopped runs are followed on: they may be taken up again at once."""


_Size = tuple[int, dict[str, int]]


class RunMonitor(anywidget.AnyWidget):
    """Follows `runs` (names, patterns, folders, `Run`s; None: all that are being written now below `root`).

    `metrics` chooses panels by name (`curves.py`), `x` the shared axis (step, tokens, seconds), `smoothing` a running
    mean over that many training rows (0: none), `log_loss` a logarithmic axis for losses. With `wait` a run that is not
    there yet is waited for. The files are read every `every` seconds, with 0 only by `refresh()`.
    Raises ValueError for a run or a metric that does not exist, and for options out of range.
    """

    _esm = "".join((_HERE / f"{part}.js").read_text(encoding="utf-8") for part in (
        "../shared/make", "data", "scale", "panel", "monitor"))
    _css = (_HERE / "styles.css").read_text(encoding="utf-8")
    title = traitlets.Unicode("").tag(sync=True)
    panels: Any = traitlets.List().tag(sync=True)
    """Per panel: name, title, column, table (`train` or `eval`), share, loss, asked (shown even without values)."""
    axes: Any = traitlets.Dict({k: list(v) for k, v in AXES.items()}).tag(sync=True)
    rows: Any = traitlets.List().tag(sync=True)
    """Per run: epoch, and the tables `train` and `eval` as columns (`following.Follower`)."""
    state: Any = traitlets.List().tag(sync=True)
    """Per run how it stands (`following.Follower.status`)."""
    following = traitlets.Bool(False).tag(sync=True)
    """Whether the files are being read."""
    told = traitlets.Unicode("").tag(sync=True)
    """What went wrong with the last read."""
    selected_step = traitlets.Int(None, allow_none=True).tag(sync=True)
    """Step whose values are shown; None for the last ones."""
    x: Any = traitlets.Enum(tuple(AXES), "step").tag(sync=True)
    smoothing = traitlets.Int(0, min=0).tag(sync=True)
    log_loss = traitlets.Bool(False).tag(sync=True)

    def __init__(self, runs: choosing.Wanted | Sequence[choosing.Wanted] | None = None, *,
                 metrics: Sequence[str] | None = None, x: str = "step", smoothing: int = 0, log_loss: bool = False,
                 wait: bool = False, every: float = 1.0, root: Path | None = None, title: str = ""):
        self._stopping, self._lock = threading.Event(), threading.RLock()
        self._thread: threading.Thread | None = None
        self._ended_at: float | None = None
        self._display: Any = None
        if x not in AXES or type(smoothing) is not int or smoothing < 0 or every < 0:
            raise ValueError(f"got x={x!r}, smoothing={smoothing!r}, every={every!r}; expected x one of "
                             f"{', '.join(AXES)}, smoothing a number of points and every a number of seconds from 0 on")
        self._curves, self._every = choose(metrics), float(every)
        paths = choosing.folders(runs, root, wait)
        named = choosing.names(paths)
        self._runs = [Follower(p, n, self._curves) for p, n in zip(paths, named, strict=True)]
        for run in self._runs:
            run.read()
        _check_names(self._runs, metrics)
        super().__init__(title=title, x=x, smoothing=smoothing, log_loss=log_loss, rows=self._all_rows(),
                         state=[r.status() for r in self._runs], panels=[
                             {**dataclasses.asdict(c), "column": c.column, "table": c.table, "asked": bool(metrics)}
                             for c in self._curves])  # fmt: skip
        self._whole_at = self._points()
        self.on_msg(self._receive)
        if self._every and not self._all_ended():
            self.start()

    # --- reading -----------------------------------------------------------------------------------------------
    def refresh(self) -> None:
        """Read what was appended and show it. May be called from any thread, also after `stop()`."""
        with self._lock:
            before = [_size(r) for r in self._runs]
            changed, told = False, ""
            for run in self._runs:
                try:
                    changed |= run.read()
                except OSError as error:  # a file system that is away for a moment: the next read goes on
                    told = f"{run.name}: {error}"
            state = [r.status() for r in self._runs]
            if changed:
                self.rows = self._all_rows(before)
                self._send_rows(before)
            if state != self.state:
                self.state = state
            if told != self.told:
                self.told = told

    def start(self) -> None:
        """Follow the runs (again), until all have ended or `stop()`."""
        with self._lock:
            if self._thread is None:
                self._stopping, self._ended_at = threading.Event(), None
                self._thread = threading.Thread(target=_follow, daemon=True, name="run monitor",
                                                args=(weakref.ref(self), self._stopping, self._every))  # fmt: skip
                self.following = True
                self._thread.start()

    def stop(self) -> None:
        """Read once more, then stop following. The curves stay, and the static table says the last values."""
        thread = self._thread
        self._stopping.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=10.0)
        with self._lock:
            self._thread = None
            if self.comm is not None:
                self.refresh()
                self.following = False
                self._send_whole()
                if self._display is not None:
                    self._display.update(self._bundle(), raw=True)

    def close(self) -> None:
        """Stop following and take the monitor from the page."""
        self._stopping.set()
        super().close()

    def _tick(self) -> bool:
        """One turn of the thread; False when every run has ended."""
        self.refresh()
        if not self._all_ended():
            self._ended_at = None
            return True
        now = time.monotonic()
        self._ended_at = now if self._ended_at is None else self._ended_at
        if all(s["state"] == "done" for s in self.state) or now - self._ended_at >= GRACE_SECONDS:
            self.stop()
            return False
        return True

    def _all_ended(self) -> bool:
        return all(s["state"] in ENDED for s in self.state)

    # --- the page ----------------------------------------------------------------------------------------------
    def _all_rows(self, before: list[_Size] | None = None) -> list[dict[str, Any]]:
        """Copies, so that the trait never changes under a reader; runs without news keep theirs."""
        return [self.rows[i] if before and before[i] == _size(r) else
                {"epoch": r.epoch, **{t: {k: list(v) for k, v in columns.items()} for t, columns in r.tables.items()}}
                for i, r in enumerate(self._runs)]

    def _points(self) -> int:
        return sum(len(columns["step"]) for r in self._runs for columns in r.tables.values())

    def _should_send_property(self, key: str, value: Any) -> bool:
        # all rows are kept as a trait, for a page that opens; what is appended goes in messages (`_send_rows`)
        return key != "rows" and super()._should_send_property(key, value)

    def _send_rows(self, before: list[_Size]) -> None:
        if any(r.epoch != epoch for r, (epoch, _) in zip(self._runs, before, strict=True)) \
                or self._points() >= 2 * self._whole_at:  # fmt: skip
            self._send_whole()
            return
        pieces = [{"run": i, "epoch": epoch, "table": table, "from": n,
                   "columns": {k: v[n:] for k, v in self._runs[i].tables[table].items()}}
                  for i, (epoch, counts) in enumerate(before) for table, n in counts.items()
                  if len(self._runs[i].tables[table]["step"]) > n]  # fmt: skip
        if pieces and self.comm is not None:
            self.send({"kind": "rows", "pieces": pieces})

    def _send_whole(self) -> None:
        self._whole_at = self._points()
        if self.comm is not None:
            self.send_state("rows")

    def _receive(self, _: Any, content: Any, __: Any) -> None:
        if isinstance(content, dict) and content.get("kind") == "missing":  # the page lacks a piece
            with self._lock:
                self._send_whole()

    def __repr__(self) -> str:
        return static.text(self._runs, self.state, self._curves)

    def _static(self) -> dict[str, Any]:
        with self._lock:
            page = static.table(self._runs, self.state, self._curves, self.title)
            return {"text/plain": repr(self), "text/html": str(page)}

    def _bundle(self) -> dict[str, Any]:
        if self.comm is None:  # closed: what stays is the table
            return self._static()
        return RunMonitor._repr_mimebundle_(self)[0]

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget, and the last values as a table where no script runs."""
        data, about = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return {**data, **self._static()}, about

    def _ipython_display_(self) -> None:
        self._display = display(self._bundle(), raw=True, display_id=True)


def _size(run: Follower) -> _Size:
    """Epoch and rows per table: equal only where nothing was read in between."""
    return run.epoch, {table: len(columns["step"]) for table, columns in run.tables.items()}


def _follow(monitor: weakref.ref[RunMonitor], stopping: threading.Event, every: float) -> None:
    while not stopping.wait(every):
        found = monitor()
        if found is None or not found._tick():
            return
        del found  # while it waits, the thread keeps nothing alive


def _check_names(runs: Sequence[Follower], metrics: Sequence[str] | None) -> None:
    """Raises ValueError for a chosen metric that no row of these runs has and nobody else knows."""
    known = {c.name for c in (*KNOWN, *FURTHER)}.union(*(r.seen for r in runs))
    for curve in choose(metrics) if metrics and all(r.seen for r in runs) else ():
        if curve.name not in known:
            raise ValueError(f"metrics: got {curve.name!r}, which no row has. There are {', '.join(sorted(known))}")

"""What `sgpo status` shows: jobs and runs as tables, read from their folders. Nothing here imports torch.

A job's row shows the run that its notebook opened last. Time left is the mean of the last steps' seconds times the
steps that are left; evaluations come on top.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgpo_lib.collapse import Watch
from sgpo_lib.escaping import visible
from sgpo_lib.jobs import JobResult, batch_folders, job_runs, jobs_root, last_line, owner_host, read_batch, read_job
from sgpo_lib.runs import Run, list_runs, load_run, runs_root

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LAST_STEPS = 20
"""Steps that the time left is taken from."""
_COLOURS = {"done": "green", "failed": "red", "blocked": "red", "running": "cyan", "queued": "blue",
            "stopped": "yellow"}
_LEFT = ("job", "run", "state", "host", "last line or reason", "reason")


def show(batch: str | None = None, watch: float | None = None) -> None:
    """Print the tables; with `watch` again every so many seconds until Ctrl-C, on a terminal.

    Raises ValueError for a batch that does not exist, and a time that is not above 0.
    """
    from rich.console import Console
    from rich.live import Live

    if watch is not None and not watch > 0:
        raise ValueError(f"--watch: got {watch:g}, expected seconds above 0")
    live = watch is not None and sys.stdout.isatty()
    console = Console() if sys.stdout.isatty() else Console(width=190, color_system=None)
    if not live or watch is None:
        console.print(tables(batch))
        return
    try:
        with Live(tables(batch, console.height), console=console, screen=True, auto_refresh=False) as shown:
            while True:
                time.sleep(watch)
                shown.update(tables(batch, console.height), refresh=True)
    except KeyboardInterrupt:  # the way to end it; the last state stays on the terminal
        console.print(tables(batch))


def tables(batch: str | None = None, lines: int | None = None) -> RenderableType:
    """All tables, or those of one batch and its runs. Where they need more than `lines`, without what is done."""
    from rich.console import Group

    if batch is not None:
        jobs = read_batch(jobs_root() / batch)
        groups, runs = [(batch, jobs)], [load_run(p) for p in job_runs(jobs)]
    else:
        singles = [read_job(p.parent) for p in sorted(jobs_root().glob("single/*/parameters.yaml"))]
        groups = [(f.name, read_batch(f)) for f in batch_folders()]
        groups += [("single notebooks", singles)] if singles else []
        runs = list_runs()
    if not groups and not runs:
        return _plain(f"nothing under {runs_root()} yet. Start with: make run")
    short = lines is not None and sum(len(jobs) + 4 for _, jobs in groups) + len(runs) + 4 > lines
    shown = [_job_table(name, jobs, short) for name, jobs in groups]
    return Group(*shown, *([_run_table(runs, short)] if runs else []))


def _title(what: str, states: Sequence[str]) -> str:
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{what}: {counts}" if counts else what


def _job_table(name: str, jobs: Sequence[JobResult], short: bool) -> Table:
    table = _table(_title(f"jobs of {name}", [j.state for j in jobs]), "job", "state", "step", "reward", "tokens/s",
                   "left", "host", "seconds", "last line or reason")
    for job in (j for j in jobs if not (short and j.state == "done")):
        folders = job_runs([job])
        run = _readable(folders[-1]) if folders else None
        told = job.reason or (last_line(job.folder) if job.state in ("running", "stopped") else "")
        attempt = f" (attempt {job.attempt})" if job.attempt > 1 else ""
        table.add_row(_plain(job.name), _state(job.state, attempt), *_progress(run, job.state == "running"),
                      _plain(job.host), f"{job.seconds:.0f}" if job.seconds else "", _plain(told))
    return table


def _run_table(runs: Sequence[Run], short: bool) -> Table:
    states = [run.state for run in runs]
    table = _table(_title(f"runs in {runs_root()}", states), "run", "state", "step", "reward", "tokens/s", "left",
                   "eval accuracy", "test", "last row", "host", "reason")
    for run, state in zip(runs, states, strict=True):
        if short and state == "done":
            continue
        metrics, reason = run.folder / "metrics.jsonl", ""
        test = (run.summary.get("test") or {}).get("accuracy")
        if state == "failed":
            record = json.loads((run.folder / "FAILED.json").read_text(encoding="utf-8"))
            reason = f"{record.get('error')}: {record.get('message')}"
        elif signs := Watch(_rows(run)).active:
            reason = f"warning: {', '.join(c.kind for c in signs)}"
        table.add_row(_plain(run.folder.name), _state(state), *_progress(run, state == "running"),
                      _last(_rows(run), "accuracy", ".2f", "eval"), f"{test:.3f}" if test is not None else "",
                      _age(time.time() - metrics.stat().st_mtime) if metrics.exists() else "",
                      _plain(_host(run)), _plain(reason))
    return table


def _progress(run: Run | None, running: bool) -> tuple[str, str, str, str]:
    """Cells of step, reward, tokens/s and time left."""
    if run is None:
        return "", "", "", ""
    rows = _rows(run)
    step, total = max((r["step"] for r in rows), default=0), total_steps(run)
    left = seconds_left(rows, step, total) if running and total else None
    return (f"{step}/{total}" if total else str(step), _last(rows, "reward_autonomous", ".2f"),
            _last(rows, "tokens_per_second", ",.0f"), f"~{_duration(left)}" if left is not None else "")


def seconds_left(rows: Iterable[dict[str, Any]], step: int, total: int) -> float | None:
    """Seconds to the last step, from the last steps' times; None before the first."""
    times = [r["seconds_step"] for r in rows if r.get("seconds_step") is not None][-LAST_STEPS:]
    return (total - step) * sum(times) / len(times) if times else None


def total_steps(run: Run) -> int:
    """Steps of the whole run; 0 where its epochs do not tell without asking the network."""
    if run.summary:
        return int(run.summary["steps"])
    train = run.config.train
    if run.config.method.objective == "none":
        return 0
    if not train.epochs:
        return train.steps
    items = _problem_count(run.folder, run.config.method.objective == "supervised")
    return math.ceil(train.epochs * max(1, items // min(train.problems_per_step, items))) if items else 0


@functools.lru_cache(maxsize=256)
def _problem_count(folder: Path, supervised: bool) -> int:
    """Problems of an epoch, as the session counts them; 0 where they cannot be had from here."""
    from sgpo_lib.problems import load

    data = load_run(folder).config.data
    if data.problems.startswith("hub:"):  # a table asks no network
        return 0
    try:
        splits = load(data)
    except (ValueError, ImportError, OSError):  # a file that is gone: the table is still shown
        return 0
    return len((splits.warmup or splits.train) if supervised else splits.train)


def _readable(folder: Path) -> Run | None:
    try:
        return load_run(folder)
    except ValueError:  # written by another version
        return None


def _rows(run: Run) -> list[dict[str, Any]]:
    path = run.folder / "metrics.jsonl"
    stamp = path.stat() if path.exists() else None
    return _rows_as_of(run.folder, (stamp.st_mtime_ns, stamp.st_size) if stamp else None)


@functools.lru_cache(maxsize=512)
def _rows_as_of(folder: Path, _: tuple[int, int] | None) -> list[dict[str, Any]]:
    """Metrics are read again only when they have changed: with --watch most runs have not."""
    return load_run(folder).metrics()


def _host(run: Run) -> str:
    """The machine that writes the run, else the one that wrote it, where it was recorded."""
    path = run.folder / "environment.json"
    return owner_host(run.folder) or (json.loads(path.read_text(encoding="utf-8")).get("host", "") if path.exists()
                                      else "")


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=_plain(title, "table.title"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column in _LEFT else "right", no_wrap="reason" not in column)
    return table


def _state(state: str, more: str = "") -> Any:
    from rich.text import Text

    return Text(visible(state + more), style=_COLOURS.get(state, ""))


def _plain(text: str, style: str = "") -> Any:
    """Text in which no markup is read, and nothing that would steer a terminal."""
    from rich.text import Text

    return Text(visible(text[:400]), style=style)


def _last(rows: Sequence[dict[str, Any]], name: str, form: str, kind: str | None = None) -> str:
    values = [r[name] for r in rows if r.get(name) is not None and (kind is None or r["kind"] == kind)]
    return format(values[-1], form) if values else ""


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _age(seconds: float) -> str:
    return f"{_duration(seconds)} ago"

"""The command `sgpo`: run a notebook or a batch headless, see how things stand, write a report.

Errors that a user can cure print one line and exit with 2; a job that failed exits with 1, an interrupt with 130.
Commands import what they need when they run, so that the program starts at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgpo_lib.extraction.command import add_arguments
from sgpo_lib.extraction.command import command as extract_command
from sgpo_lib.jobs import jobs_root, last_line, parse_assignment, read_batch, read_job
from sgpo_lib.runs import list_runs, load_run, reports_root, runs_root

if TYPE_CHECKING:
    from sgpo_lib.jobs import JobResult
    from sgpo_lib.runs import Run


def parser() -> argparse.ArgumentParser:
    """Arguments of all commands."""
    top = argparse.ArgumentParser(prog="sgpo", description="SGPO workbench: notebooks headless on this machine.")
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute one notebook", description="Execute one notebook with parameters.")
    run.add_argument("notebook", help="stem (03_lora_sgpo), file name, or path")
    run.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE",
                     help="a name of the notebook's parameters cell, or a config field; the value is YAML")
    run.add_argument("--job", type=Path, help="job folder (default: a folder of the notebook's name and the time)")
    run.add_argument("--after", type=Path, action="append", default=[], metavar="FOLDER",
                     help="job folder whose result this one builds on: when it changes, this one is out of date")
    run.add_argument("--force", action="store_true", help="run even where the job is up to date")
    run.add_argument("--quiet", action="store_true", help="printed lines go to log.txt only")
    batch = commands.add_parser("batch", help="execute the notebooks of a YAML file, in parallel, continuing")
    batch.add_argument("spec", type=Path, help="for example experiments/quickstart.yaml")
    batch.add_argument("--jobs", type=int, metavar="N", help="processes at a time (default: the file's, else CPUs)")
    batch.add_argument("--only", action="append", default=[], metavar="JOB", help="only this job or grid")
    batch.add_argument("--smoke", action="store_true", help="with the small parameters under `smoke:` in the file")
    batch.add_argument("--dry-run", action="store_true", help="check the file and list the jobs")
    commands.add_parser("status", help="how jobs and runs stand")
    extract = commands.add_parser("extract", help="strategies from strong responses", description=(
        "Five candidate strategies per response, scored, checked for leaks; one line per problem in the output file."))
    add_arguments(extract)
    report = commands.add_parser("report", help="write reports/BATCH/index.html")
    report.add_argument("batch", nargs="?", help="name of the batch (default: the newest)")
    report.add_argument("--out", type=Path, help="folder of the report (default: reports/BATCH)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    arguments = parser().parse_args(argv)
    with contextlib.suppress(ValueError):  # not in the main thread: whoever runs it there handles signals
        signal.signal(signal.SIGTERM, _interrupt)
    commands = {"run": _run, "batch": _batch, "status": _status, "report": _report,
                "extract": lambda given: extract_command(given, _say)}
    try:
        return commands[arguments.command](arguments)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        sys.stderr.write(f"sgpo: {error}\n")
        return 2
    except BrokenPipeError:  # `sgpo status | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("sgpo: interrupted. The same command continues\n")
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - asyncio would tell of every task cut off
        return 130


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _run(arguments: argparse.Namespace) -> int:
    from sgpo_lib.launch import run_notebook

    given: dict[str, Any] = {}
    for text in arguments.parameter:
        name, value = parse_assignment(text)
        if name in given:
            raise ValueError(f"parameter {name!r} is given twice. Remove one")
        given[name] = value
    stem = Path(arguments.notebook).stem
    job = arguments.job or jobs_root() / "single" / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    result = run_notebook(arguments.notebook, given, job, after=arguments.after, force=arguments.force,
                          echo=None if arguments.quiet else sys.stdout)
    if result.state != "done":
        sys.stderr.write(f"sgpo: {stem} failed in {result.reason}\nSee {result.folder}/log.txt and report.html\n")
        return 1
    _say(f"{stem}: " + (f"done in {result.seconds:.0f} s" if result.fresh else "up to date") +
         f", {result.folder}/report.html")
    return 0


def _batch(arguments: argparse.Namespace) -> int:
    from sgpo_lib.batch import run_batch

    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs: got {arguments.jobs}, expected 1 or more")
    good = run_batch(arguments.spec, arguments.jobs, arguments.only, arguments.dry_run, arguments.smoke, _say)
    return 0 if good else 1


def _batches() -> list[Path]:
    """Folders of batches, the newest last."""
    return [p.parent for p in sorted(jobs_root().glob("*/batch.json"), key=lambda p: p.stat().st_mtime)]


def _status(_: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=170, color_system=None)
    singles = [read_job(p.parent) for p in sorted(jobs_root().glob("single/*/parameters.yaml"))]
    groups = [(f.name, read_batch(f)) for f in _batches()] + ([("single notebooks", singles)] if singles else [])
    for name, jobs in groups:
        console.print(_job_table(name, jobs))
    runs = list_runs()
    if runs:
        console.print(_run_table(runs))
    if not runs and not groups:
        console.print(f"nothing under {runs_root()} yet. Start with: make run")
    return 0


_COLOURS = {"done": "green", "failed": "red", "blocked": "red", "running": "cyan", "stopped": "yellow"}


def _state(state: str) -> Any:
    from rich.text import Text

    return Text(state, style=_COLOURS.get(state, ""))


def _job_table(name: str, jobs: Sequence[JobResult]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"jobs of {name}", title_justify="left", box=box.SIMPLE_HEAD)
    for column, right in (("job", False), ("state", False), ("seconds", True), ("last line or reason", False)):
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "last line or reason")
    for job in jobs:
        told = job.reason or (last_line(job.folder) if job.state == "running" else "")
        table.add_row(job.name, _state(job.state), f"{job.seconds:.0f}" if job.seconds else "", Text(told[:300]))
    return table


def _run_table(runs: Sequence[Run]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"runs in {runs_root()}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("run", "state", "step", "reward", "eval accuracy", "test", "tokens/s", "last row", "reason"):
        table.add_column(column, justify="left" if column in ("run", "state", "reason") else "right",
                         no_wrap=column != "reason")
    for run in runs:
        rows = run.metrics()
        test = (run.summary.get("test") or {}).get("accuracy")
        metrics = run.folder / "metrics.jsonl"
        failed = run.folder / "FAILED.json"
        reason = ""
        if run.state == "failed":
            record = json.loads(failed.read_text(encoding="utf-8"))
            reason = f"{record.get('error')}: {record.get('message')}"
        steps = run.summary.get("steps") or run.config.train.steps
        table.add_row(run.folder.name, _state(run.state), f"{max((r['step'] for r in rows), default=0)}/{steps}",
                      _last(rows, "reward_autonomous", ".2f"), _last(rows, "accuracy", ".2f", "eval"),
                      f"{test:.3f}" if test is not None else "", _last(rows, "tokens_per_second", ",.0f"),
                      _age(time.time() - metrics.stat().st_mtime) if metrics.exists() else "", Text(reason[:300]))
    return table


def _last(rows: Sequence[dict[str, Any]], name: str, form: str, kind: str | None = None) -> str:
    values = [r[name] for r in rows if r.get(name) is not None and (kind is None or r["kind"] == kind)]
    return format(values[-1], form) if values else ""


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _report(arguments: argparse.Namespace) -> int:
    from sgpo_lib.jobs import job_runs
    from sgpo_lib.report import write_report

    newest = _batches()[-1:]
    if not arguments.batch and not newest:
        raise ValueError(f"no batch under {jobs_root()}. Start one: sgpo batch experiments/quickstart.yaml")
    name = arguments.batch or newest[0].name
    jobs = read_batch(jobs_root() / name)
    runs = [load_run(p) for p in job_runs(jobs)] or list_runs()
    page = write_report(f"{name.replace('-', ' ').capitalize()}", jobs, runs, arguments.out or reports_root() / name)
    _say(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

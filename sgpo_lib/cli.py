"""The command `sgpo`: plan, profile, run a notebook or a batch headless, see how things stand, report, export weights,
start JupyterLab or a vLLM server.

Errors that a user can cure print one line and exit with 2; a job that failed, or a plan that does not fit, exits with
1, a job that was asked to stop (SIGUSR1 or SIGTERM to `sgpo run`) with 75, an interrupt with 130. Commands import what
they need when they run, so that the program starts at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo_lib.batch_spec import ENGINES
from sgpo_lib.escaping import visible
from sgpo_lib.extraction.command import add_arguments
from sgpo_lib.extraction.command import command as extract_command
from sgpo_lib.jobs import STOPPED, batch_folders, jobs_root, parse_assignment, read_batch
from sgpo_lib.plan_command import add_arguments as add_plan_arguments
from sgpo_lib.plan_command import command as plan_command
from sgpo_lib.profile_command import add_arguments as add_profile_arguments
from sgpo_lib.profile_command import command as profile_command
from sgpo_lib.redaction import Redactor
from sgpo_lib.runs import Stopped, list_runs, load_run, reports_root
from sgpo_lib.serving import add_arguments as add_serving_arguments
from sgpo_lib.serving import command as serving_command
from sgpo_lib.storage import DiskFull


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
    run.add_argument("--force", action="store_true", help="run even where the job is up to date, or the folder holds "
                     "that of another notebook")
    run.add_argument("--quiet", action="store_true", help="printed lines go to log.txt only")
    run.add_argument("--time-limit", type=float, metavar="SECONDS", help="of the whole execution; then it has failed, "
                     "and the same command continues from the last checkpoint")
    run.add_argument("--grace", type=float, metavar="SECONDS", help="from SIGUSR1, which asks it to stop after its "
                     "training step, to an interrupt (default 120; from SIGTERM at most 10)")
    batch = commands.add_parser("batch", help="execute the notebooks of a YAML file, in parallel, continuing")
    batch.add_argument("spec", type=Path, help="for example experiments/quickstart.yaml")
    batch.add_argument("--jobs", type=int, metavar="N", help="processes at a time (default: the file's, else CPUs)")
    batch.add_argument("--only", action="append", default=[], metavar="JOB", help="only this job or grid")
    batch.add_argument("--smoke", action="store_true", help="with the small parameters under `smoke:` in the file")
    batch.add_argument("--engine", choices=ENGINES, help="where the jobs run (default: the file's, else local)")
    batch.add_argument("--address", help="Ray cluster, HOST:PORT (default: RAY_ADDRESS, else the one of this machine)")
    batch.add_argument("--dry-run", action="store_true", help="check the file and print the plan")
    batch.add_argument("--cancel", action="store_true", help="end the jobs that an earlier call left on the cluster")
    status = commands.add_parser("status", help="how jobs and runs stand", description=(
        "State, step, reward, tokens per second, time left, machine and reason of failure, from the run folders."))
    status.add_argument("batch", nargs="?", help="only this batch (default: all, and all runs)")
    status.add_argument("--watch", type=float, nargs="?", const=5.0, metavar="SECONDS",
                        help="show it anew every so often (default 5) until Ctrl-C; on a pipe once")
    extract = commands.add_parser("extract", help="strategies from strong responses", description=(
        "Five candidate strategies per response, scored, checked for leaks; one line per problem in the output file."))
    add_arguments(extract)
    report = commands.add_parser("report", help="write reports/BATCH/index.html")
    report.add_argument("batch", nargs="?", help="name of the batch (default: the newest)")
    report.add_argument("--out", type=Path, help="folder of the report (default: reports/BATCH)")
    plan = commands.add_parser("plan", help="memory, time and cost of a run before it starts", description=(
        "Memory per GPU by phase, time and cost of a step and a run, from formulas; 1 where it does not fit."))
    add_plan_arguments(plan)
    plan.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE",
                      help="as for `sgpo run`: a config field; the value is YAML")
    profile = commands.add_parser("profile", help="where a training step's time and memory go", description=(
        "Train a few steps of a profile, or read a run's metrics: seconds and memory by phase beside the least that "
        "this machine allows, and what makes it slow."))
    add_profile_arguments(profile)
    profile.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE",
                         help="as for `sgpo run`: a config field of the profile; the value is YAML")
    export = commands.add_parser("export", help="a run's weights for other programs", description=(
        "Write a plain Hugging Face folder (LoRA merged) or a PEFT adapter, which transformers, PEFT and vLLM load."))
    export.add_argument("run", help="name below the root of runs, or folder")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new or empty")
    export.add_argument("--what", choices=("merged", "adapter"), default="merged",
                        help="whole model (default), or the LoRA adapter alone, to be loaded on its base")
    export.add_argument("--step", type=int, metavar="N", help="the checkpoint after this step (default: final weights)")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="",
                        help="type of merged weights (default: that of the run)")
    add_serving_arguments(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    arguments = parser().parse_args(argv)
    with contextlib.suppress(ValueError):  # not in the main thread: whoever runs it there handles signals
        if arguments.command == "run":  # from the first moment: by default SIGUSR1 ends a process without a word
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, _stop)
        else:
            signal.signal(signal.SIGTERM, _interrupt)
    commands = {"run": _run, "batch": _batch, "status": _status, "report": _report, "export": _export,
                "plan": lambda given: plan_command(given, _parameters(given.parameter), _say),
                "profile": lambda given: profile_command(given, _parameters(given.parameter), _say),
                "extract": lambda given: extract_command(given, _say),
                "lab": lambda given: serving_command(given, _say), "serve": lambda given: serving_command(given, _say)}
    try:
        return commands[arguments.command](arguments)
    except (ValueError, RuntimeError, FileNotFoundError, DiskFull) as error:
        sys.stderr.write(visible(f"sgpo: {Redactor()(str(error))}\n"))
        return 2
    except BrokenPipeError:  # `sgpo status | head`
        sys.stderr.close()
        return 0
    except Stopped:
        sys.stderr.write("sgpo: stopped as asked. The same command continues\n")
        return STOPPED
    except KeyboardInterrupt:
        sys.stderr.write("sgpo: interrupted. The same command continues\n")
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - asyncio would tell of every task cut off
        return 130


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _stop(number: int, _: Any) -> None:
    raise Stopped(f"signal {number}")


def _say(text: str) -> None:
    sys.stdout.write(visible(text) + "\n")
    sys.stdout.flush()


def _parameters(texts: Sequence[str]) -> dict[str, Any]:
    """name -> value of every `-p`."""
    given: dict[str, Any] = {}
    for text in texts:
        name, value = parse_assignment(text)
        if name in given:
            raise ValueError(f"parameter {name!r} is given twice. Remove one")
        given[name] = value
    return given


def _run(arguments: argparse.Namespace) -> int:
    from sgpo_lib.launch import run_notebook

    given = _parameters(arguments.parameter)
    stem = Path(arguments.notebook).stem
    job = arguments.job or jobs_root() / "single" / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for name in ("time_limit", "grace"):
        if (seconds := getattr(arguments, name)) is not None and not seconds >= 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {seconds:g}, expected seconds, 0 or more")
    result = run_notebook(arguments.notebook, given, job, after=arguments.after, force=arguments.force,
                          echo=None if arguments.quiet else sys.stdout, time_limit=arguments.time_limit,
                          grace=arguments.grace)
    if result.state in ("stopped", "queued"):  # a cluster has the job until its driver has taken note
        raise Stopped
    if result.state != "done":
        sys.stderr.write(visible(f"sgpo: {stem} failed in {result.reason}\n"
                                 f"See {result.folder}/log.txt and report.html\n"))
        return 1
    _say(f"{stem}: " + (f"done in {result.seconds:.0f} s" if result.fresh else "up to date") +
         f", {result.folder}/report.html")
    return 0


def _batch(arguments: argparse.Namespace) -> int:
    from sgpo_lib.batch import run_batch

    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs: got {arguments.jobs}, expected 1 or more")
    good = run_batch(arguments.spec, arguments.jobs, arguments.only, arguments.dry_run, arguments.smoke, _say,
                     arguments.engine, arguments.address, arguments.cancel)
    return 0 if good else 1


def _status(arguments: argparse.Namespace) -> int:
    from sgpo_lib.status import show

    show(arguments.batch, arguments.watch)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from sgpo_lib.export import export

    folder = export(arguments.run, arguments.out, what=arguments.what, step=arguments.step, dtype=arguments.dtype)
    _say(f"{arguments.what}: {folder}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from sgpo_lib.jobs import job_runs
    from sgpo_lib.report import write_report

    newest = batch_folders()[-1:]
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

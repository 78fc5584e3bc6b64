"""`sgpo profile`: where a training step's time and memory go, of a profile that is trained for a few steps, or of a run
from its metrics. Exit status 0; 2 for bad input. Importing this does not import torch.
"""

from __future__ import annotations

import argparse
import difflib
import json
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sgpo_lib.escaping import visible_in
from sgpo_lib.profiling import LEARNING, Machine, advice, steps_of, summary
from sgpo_lib.recipes import METHODS, NOTEBOOK_FIELDS, PROFILES, from_parameters
from sgpo_lib.runs import Run, load_run, runs_root
from sgpo_lib.storage import write_atomic

STEPS = 3
"""Counted steps of a profile, unless told otherwise."""
WIDTH = 100
"""Columns of the text where it is not on a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sgpo profile` but `-p`, which it shares with `sgpo run`."""
    parser.add_argument("what", metavar="PROFILE_OR_RUN",
                        help=f"one of {', '.join(PROFILES)}; or a run: its name below the root of runs, or folder")
    parser.add_argument("--method", help=f"of a profile: one of {', '.join(METHODS)} (default sgpo)")
    parser.add_argument("--steps", type=int, metavar="N", help=f"steps that count (default {STEPS}, after one that "
                        "does not; of a run the last N, all but its first by default)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the same as JSON into a file")


def command(arguments: argparse.Namespace, given: Mapping[str, Any], say: Callable[[str], None]) -> int:
    """Print the profile. Returns the exit status; raises ValueError for what cannot be profiled."""
    if arguments.steps is not None and arguments.steps < 1:
        raise ValueError(f"--steps: got {arguments.steps}, expected 1 or more")
    if arguments.out and arguments.out.is_dir():
        raise ValueError(f"--out: {arguments.out} is a folder, expected a file such as {arguments.out}/profile.json")
    found = (_of_profile(arguments, given, say) if arguments.what in PROFILES
             else _of_run(arguments, given, find_run(arguments.what)))
    _show(visible_in(found))
    if arguments.out:
        write_atomic(arguments.out, json.dumps(found, indent=1) + "\n")
        say(f"JSON: {arguments.out}")
    return 0


def find_run(name: str) -> Run:
    """The run of that name or folder. Raises ValueError where there is none, and no such profile either."""
    if (Path(name) / "config.yaml").exists() or (runs_root() / name / "config.yaml").exists():
        return load_run(name)
    near = difflib.get_close_matches(name, PROFILES, n=1, cutoff=0.5)
    raise ValueError(f"unknown profile or run {name!r}." + (f" Did you mean {near[0]!r}?" if near else "") +
                     f" Profiles: {', '.join(PROFILES)}. A run is a folder with config.yaml, also looked for in "
                     f"{runs_root()}")


def _of_profile(arguments: argparse.Namespace, given: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    from sgpo_lib.profile_run import profile

    if own := sorted({"profile", "method", "steps", "train.steps"} & set(given)):
        instead = "its first argument" if own[0] == "profile" else f"--{own[0].rpartition('.')[2]}"
        raise ValueError(f"-p {own[0]}=...: `sgpo profile` takes {instead}")
    fields = dict(given.get("overrides") or {}) | {n: v for n, v in given.items() if n not in NOTEBOOK_FIELDS}
    config = from_parameters(arguments.what, arguments.method or "sgpo", fields.pop("seed", 0), **fields)
    steps, machine, told = profile(config, arguments.steps or STEPS, say)
    found = summary(config, steps, machine)
    return found | told | {"of": "profile", "estimated": False,
                           "advice": advice(config, found, told["device"], told["threads"], told["attention"])}


def _of_run(arguments: argparse.Namespace, given: Mapping[str, Any], run: Run) -> dict[str, Any]:
    if given or arguments.method:
        raise ValueError(f"{arguments.what} is a run, which has its configuration: leave out -p and --method, or give "
                         f"a profile ({', '.join(PROFILES)})")
    steps = steps_of(run.metrics(), run.config)
    if not steps:
        raise ValueError(f"run {run.folder} has no training steps in metrics.jsonl (state: {run.state}). Give a run "
                         "that has made one, or a profile")
    first = 1 if len(steps) > 1 and arguments.steps is None else 0  # it warms caches up, unless it is all there is
    steps = steps[first:] if arguments.steps is None else steps[-arguments.steps:]
    machine, device = _machine_of(run)
    model = run.config.model
    found = summary(run.config, steps, machine)
    threads = run.config.train.torch_threads
    return found | {"of": str(run.folder), "estimated": True, "device": device, "threads": threads or None,
                    "attention": model.attention, "layout": run.config.train.layout,
                    "memory_of": "torch's tensors on the GPU" if steps[-1].memory else "",
                    "advice": advice(run.config, found, device, threads, model.attention)}


def _machine_of(run: Run) -> tuple[Machine | None, str]:
    """(what the run's machine can do, where that is this one; type of its device, as far as that is known)."""
    file = run.folder / "environment.json"
    host = json.loads(file.read_text(encoding="utf-8")).get("host") if file.exists() else None
    asked = run.config.model.device
    if host != socket.gethostname():
        return None, "cuda" if asked.startswith("cuda") else "cpu" if asked == "cpu" else ""
    import torch

    from sgpo_lib.policy import pick_device
    from sgpo_lib.profile_run import measure

    try:
        device = pick_device(asked)
    except ValueError:  # the GPU is gone
        return None, "cuda"
    if run.config.train.torch_threads:
        torch.set_num_threads(run.config.train.torch_threads)
    return measure(device, getattr(torch, run.config.model.compute_dtype or run.config.model.dtype)), device.type


def _show(found: Mapping[str, Any]) -> None:
    """The summary as a table and lines."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=WIDTH, color_system=None)
    slow = [f"Slow: {line}." for line in found["advice"]]
    for part in (_table(found), _numbers(found), *slow, *[""] * bool(slow), _basis(found)):
        console.print(part, markup=False, highlight=False)


def _table(found: Mapping[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    phases, digits = found["phases"], _digits(found["step_seconds"])
    size = f", {found['parameters'] / 1e6:,.3g}M parameters" if found["parameters"] else ""
    title = f"{found['profile']}, {found['method']}{size}: {found['steps']} step{'s' * (found['steps'] != 1)}"
    table = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD)
    memory = any(phase["memory"] for phase in phases.values())
    for column in ["phase", "seconds", "share", "floor, seconds", "times the floor"] + ["peak memory, GiB"] * memory:
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, phase in phases.items():
        cells = [name, _seconds(phase["seconds"], digits), f"{phase['share']:.1%}", _seconds(phase["floor"], digits),
                 "-" if phase["times"] is None else f"{phase['times']:,.1f}"]
        table.add_row(*cells, *([_gib(phase["memory"])] if memory else []), end_section=name == [*phases][-1])
    peak = max((phase["memory"] or 0 for phase in phases.values()), default=0)
    table.add_row("step", _seconds(found["step_seconds"], digits), "100.0%", "", "", *([_gib(peak)] if memory else []))
    return table


def _numbers(found: Mapping[str, Any]) -> Any:
    """Name and value of what belongs to no phase, in two columns."""
    from rich.table import Table

    machine, at_least = found["machine"], "at least " if found["estimated"] else ""

    def known(name: str, form: str, before: str = "") -> str:
        return "not known" if found[name] is None else before + format(found[name], form)

    table = Table.grid(padding=(0, 2))
    table.add_row("tokens a second", f"sampled {known('sampled_per_second', ',.0f')}, trained "
                  f"{known('trained_per_second', ',.0f', at_least)}")
    table.add_row("FLOP utilisation", f"update {known('update_utilisation', '.1%', at_least)}, whole step "
                  f"{known('step_utilisation', '.1%', at_least)}")
    table.add_row("tokens of passes", f"left out {known('skipped_share', '.1%')}, padding "
                  f"{known('padding_share', '.1%')}")
    table.add_row("threads", f"{found['threads'] or 'as torch chose'}; CPU seconds a second "
                  f"{known('cpu_per_second', '.2f')}")
    table.add_row("attention, layout", f"{found['attention']}, {found['layout']}")
    if machine:
        table.add_row("machine at best", f"{machine['flops'] / 1e9:,.0f} GFLOP/s, {machine['bandwidth'] / 1e9:,.1f} "
                      f"GB/s: {machine['told']}")
    table.add_row("", "")
    return table


def _basis(found: Mapping[str, Any]) -> str:
    if any(phase["memory"] for phase in found["phases"].values()):
        memory = f"Peak memory: {found['memory_of']}, the highest of all steps. "
    else:
        where = "of a run it is where it trains on a GPU" if found["estimated"] else "this system does not tell it"
        memory = f"Peak memory was not measured ({where}). "
    if not found["machine"]:
        floor = "No floors and no utilisation: the run's machine is not this one. "
    elif found["estimated"]:
        floor = ("Metrics do not tell prompts, nor what was distilled: floors and utilisation count responses of the "
                 "mean length, sampled and in the policy gradient, and nothing else. ")
    else:
        floor = ("A floor is the model's FLOP, or the bytes that must be read and written, over what the machine does "
                 "at best. Trained tokens are prompts and responses of passes that learn, over the time of the update: "
                 f"{', '.join(LEARNING)}, optimizer. ")
    return ("Seconds and floors are medians; shares are of the time of all steps. " + floor + memory +
            "docs/speed.md says how each number is made.")


def _digits(step: float) -> int:
    """Decimals of all seconds of a table, from those of the whole step."""
    return 4 if step < 1 else 3 if step < 10 else 2 if step < 100 else 1


def _seconds(value: float | None, digits: int) -> str:
    """`-` where there are none; what would be shown as 0 with one digit."""
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if value >= 0.5 * 10**-digits else f"{value:.1g}"


def _gib(size: int | None) -> str:
    return "-" if not size else f"{size / 2**30:.2f}"

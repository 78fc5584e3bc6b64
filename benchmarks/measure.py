"""What the benchmarks share: contenders in processes of their own, interleaved timings, peak memory, rows of a table.

A contender is one side of a comparison. Its process prepares once and then makes a pass whenever it is told to (a line
on standard input), so that the passes of several contenders take turns and a slow minute of the machine falls on all of
them. The first pass of the fresh process gives the peak memory and warms up; the others give times.

No torch here: the verifier's workers, which import the benchmarks' reward function, have little memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from sgpo_lib.peak_memory import resident, restart_resident_peak

HERE = Path(__file__).parent
VLLM_PYTHON = HERE.parent / ".venv-vllm" / "bin" / "python"
"""Interpreter of the environment that `make test-vllm` creates."""
Found = dict[str, Any]
"""A contender's medians: `seconds`, `extra_MB`, `all_seconds` and what its passes reported; or `failed`."""


# ------------------------------------------------------------------------------------------- a contender's process

_answers: TextIO = sys.stdout

def threads() -> int:
    """Threads of a contender: BENCH_THREADS, or as many as there are cores for this process."""
    return int(os.environ.get("BENCH_THREADS", 0)) or len(os.sched_getaffinity(0))


class Turns:
    """A contender's end of the line: waits for a turn, measures it, and answers."""

    def __init__(self) -> None:
        self._told = False

    def wait(self) -> str:
        """The next command. Ends the process where no more come."""
        if not self._told:
            self._answer({"ready": True})
            self._told = True
        command = sys.stdin.readline().strip()
        if not command:
            raise SystemExit  # what is open is closed
        restart_resident_peak()
        self._before, self._began = resident("VmRSS"), time.perf_counter()
        return command

    def done(self, **more: Any) -> None:
        """The turn is over: its time, and its peak of resident memory above what there was before."""
        seconds = time.perf_counter() - self._began
        peak = resident("VmHWM")
        self._answer({"seconds": seconds, "extra_MB": (peak - self._before) / 1e6, "peak_MB": peak / 1e6} | more)

    def _answer(self, told: dict[str, Any]) -> None:
        print(json.dumps(told), file=_answers, flush=True)


def serve(commands: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """Be a contender that is ready: a function per command; what it returns is reported with the turn."""
    turns = Turns()
    while True:
        turns.done(**commands[turns.wait()]())


def case() -> dict[str, Any]:
    """What this process is to be. From here on standard output carries its answers alone: what is printed, by a library
    or while a model is unpacked, goes to standard error."""
    global _answers
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return json.loads(sys.argv[1])


# ------------------------------------------------------------------------------------------------- the other side


@dataclass(frozen=True)
class Side:
    """How a contender is started."""

    script: str
    case: dict[str, Any]
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    optional: bool = False
    """Where it fails, the comparison goes on without it."""


WITH_VLLM: dict[str, Any] = {"python": str(VLLM_PYTHON), "optional": True,
                             "environment": {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}}
"""Fields of a side that runs in the environment with vLLM."""


class Contender:
    """A running side. Use it in a `with` block."""

    def __init__(self, side: Side):
        self.side = side
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by __exit__)
        count = str(threads())
        settings = {"OMP_NUM_THREADS": count, "TRL_EXPERIMENTAL_SILENCE": "1", "CI": "1", "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false"}
        given = {"threads": int(count)} | side.case
        self._process = subprocess.Popen([side.python, str(HERE / side.script), json.dumps(given)], cwd=HERE, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                                         env=os.environ | settings | side.environment)

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def ask(self, command: str = "") -> dict[str, Any]:
        """The answer to a command; without one, that it is ready. Raises RuntimeError where it ended."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            if command:
                print(command, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.side.script} {self.side.case} ended:\n{self._log.read()[-3000:]}")
        return json.loads(line)


class Race:
    """Sides that are started together. Use it in a `with` block. An optional one that fails is out, with its reason."""

    def __init__(self, sides: dict[str, Side]):
        self.sides, self.failed = sides, dict[str, Found]()

    def __enter__(self) -> Race:
        self._stack = contextlib.ExitStack()
        self.running = {name: self._stack.enter_context(Contender(side)) for name, side in self.sides.items()}
        try:
            self.turn()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def turn(self, command: str = "") -> dict[str, dict[str, Any]]:
        """Every side's answer to a command, one after the other; without one, that it is ready."""
        answers = {}
        for name, contender in list(self.running.items()):
            try:
                answers[name] = contender.ask(command)
            except RuntimeError as error:
                if not contender.side.optional:
                    raise
                del self.running[name]
                self.failed[name] = {"failed": str(error).strip().splitlines()[-1][:200]}
        return answers


def race(sides: dict[str, Side], repeats: int, *, also: dict[str, str] | None = None) -> dict[str, Found]:
    """Peak memory from a first pass of each, then `repeats` rounds in which they take turns: medians of the times.

    `also`: side -> a further command for the end, whose answer is kept under its name.
    """
    with Race(sides) as started:
        first = started.turn("pass")
        rounds = [started.turn("pass") for _ in range(repeats)]
        last = {name: {command: started.running[name].ask(command)} for name, command in (also or {}).items()}
        failed = started.failed
    found: dict[str, Found] = {}
    for name in started.running:
        passes = [answers[name] for answers in rounds]
        found[name] = {key: statistics.median(p[key] for p in passes) for key in passes[0]}
        found[name] |= {"extra_MB": first[name]["extra_MB"], "peak_MB": first[name]["peak_MB"],
                        "all_seconds": [round(p["seconds"], 4) for p in passes]} | last.get(name, {})
    return found | failed


# -------------------------------------------------------------------------------------------------------- the table


def row(what: str, unit: str, ours: float | None, peer: str, value: float | None, target: float | None = None,
        note: str = "") -> dict[str, Any]:
    """A line: ours against a peer's value. The ratio is ours / peer, and holds where it is at most the target.

    None stands for what was not measured; `note` says why.
    """
    ratio = ours / value if ours is not None and value else None
    holds = ratio <= target if ratio is not None and target is not None else None
    return {"what": what, "unit": unit, "ours": ours, "peer": peer, "peer_value": value, "ratio": ratio,
            "target": target, "holds": holds, "note": note}


def bound(what: str, unit: str, ours: float, target: float) -> dict[str, Any]:
    """A line whose target is a value, not a ratio."""
    return row(what, unit, ours, "", None) | {"bound": target, "holds": ours <= target}


def table(rows: list[dict[str, Any]]) -> str:
    """The lines in Markdown."""
    lines = ["| what | ours | peer | ratio | target | holds? |", "| --- | ---: | --- | ---: | ---: | --- |"]
    for r in rows:
        value, unit = r["peer_value"], r["unit"]
        peer = r["peer"] + (f" {shown(value)} {unit}" if value is not None else "")
        target = f"<= {r['target']:g}" if r["target"] is not None else ""
        target = f"<= {r['bound']:g} {unit}" if "bound" in r else target
        held = {True: "yes", False: "**no**", None: ""}[r["holds"]]
        cells = [r["what"], f"{shown(r['ours'])} {unit}" if r["ours"] is not None else "not measured", peer.strip(),
                 f"{r['ratio']:.3f}" if r["ratio"] is not None else "", target, "; ".join(x for x in (held, r["note"])
                                                                                         if x)]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: float) -> str:
    """Three digits, or whole where it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def finite(tree: Any) -> bool:
    """Whether every number in a tree of dicts and lists is finite."""
    if isinstance(tree, dict):
        return all(finite(value) for value in tree.values())
    if isinstance(tree, list):
        return all(finite(value) for value in tree)
    return not isinstance(tree, float) or math.isfinite(tree)


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    import importlib.metadata

    def read(file: str, start: str) -> str:
        lines = Path(file).read_text().splitlines() if Path(file).exists() else []
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(start)), "")

    versions = {}
    for name in ("torch", "transformers", "peft", "trl", "liger_kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    memory = read("/proc/meminfo", "MemTotal").split()
    return {"processor": read("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)), "threads": threads(),
            "memory_GB": round(int(memory[0]) * 1024 / 1e9, 1) if memory else 0,
            "load_at_start": round(os.getloadavg()[0], 2), "python": platform.python_version(),
            "libc": " ".join(platform.libc_ver()), **versions}

"""Speed and memory against peers, measured in the same run: TRL, transformers' own `generate`, and matrix products.

    python benchmarks/run.py [--only token_kl] [--smoke] [--out FOLDER]

Writes bench.json and the table bench.md, into benchmarks/results unless `--out` names another folder; with `--only`
nothing is written without `--out`. Every number is a ratio's numerator or denominator: contenders are processes of
their own that take turns, times are medians of five passes, memory is the peak of the first pass above what the process
held before it (measure.py). BENCH_THREADS=N takes N threads instead of one per core. `--smoke` runs everything once
with one thread, at sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpo_step
import measure
import rollouts
import token_kl

RESULTS = measure.HERE / "results"
REPEATS = 5
Section = Callable[[bool, int], tuple[list[dict[str, Any]], dict[str, Any]]]
SECTIONS: dict[str, Section] = {
    "token_kl": token_kl.token_kl,
    "token_kl_large": token_kl.large,
    "token_kl_growth": token_kl.growth,
    "grpo_step": grpo_step.grpo_step,
    "sgpo_step": grpo_step.sgpo_step,
    "rollouts": rollouts.rollouts,
}


def main() -> int:
    """Measure, print and write; 1 where a section failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="one section; may be given again")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one pass")
    parser.add_argument("--out", type=Path, help="folder for bench.json and bench.md")
    asked = parser.parse_args()
    if asked.smoke:
        os.environ.setdefault("BENCH_THREADS", "1")
    command = " ".join(["python benchmarks/run.py", *(f"--only {name}" for name in asked.only or ())])
    told: dict[str, Any] = {"command": command, "smoke": asked.smoke, "machine": measure.machine(), "sections": {}}
    began = time.perf_counter()
    for name, section in SECTIONS.items():
        if asked.only and name not in asked.only:
            continue
        repeats, started = 1 if asked.smoke else REPEATS, time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            rows, found = section(asked.smoke, repeats)
            if not measure.finite([rows, found]):
                raise ValueError(f"{name}: a number is not finite: {rows}")
            told["sections"][name] = {"passes": found.pop("passes", repeats), "rows": rows, "measured": found}
            print(measure.table(rows), flush=True)
        except Exception as error:  # the other sections can still be measured
            traceback.print_exc()
            told["sections"][name] = {"passes": repeats, "rows": [], "failed": str(error)[-2000:]}
        told["sections"][name]["wall_seconds"] = round(time.perf_counter() - started, 1)
    told["wall_seconds"] = round(time.perf_counter() - began, 1)
    out = asked.out or (None if asked.only or asked.smoke else RESULTS)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (out / "bench.md").write_text(page(told), encoding="utf-8")
    return int(any("failed" in section for section in told["sections"].values()))


def page(told: dict[str, Any]) -> str:
    """The whole result for a reader."""
    machine = told["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "trl")
                         if name in machine)
    parts = ["# Speed and memory against peers", "",
             f"{machine['processor']}, {machine['cores']} cores, {machine['memory_GB']} GB; threads: "
             f"{machine['threads']}; Python {machine['python']}, {versions}, {machine['libc']}. Load when it began: "
             f"{machine['load_at_start']}. `{told['command']}`, {told['wall_seconds'] / 60:.0f} minutes.", "",
             "Ratios are ours / peer: below 1 is better. Times are medians of passes that took turns with the peer's; "
             "memory is the peak of a first pass in a fresh process above what it held before, in MB of 10^6 bytes. "
             "All passes are in bench.json.", ""]
    if told["smoke"]:
        parts += ["**Smoke run: these sizes say nothing about speed.**", ""]
    for name, section in told["sections"].items():
        parts += [f"## {name}", "", f"Passes: {section['passes']}; {section['wall_seconds']:.0f} s in all.", ""]
        parts += [f"Failed: {section['failed'].strip().splitlines()[-1]}", ""] if "failed" in section else \
            [measure.table(section["rows"])]  # fmt: skip
    return "\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())

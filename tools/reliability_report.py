"""Inject every fault with full counts and write what was measured: reports/reliability.

    FAULTS=full python tools/reliability_report.py [pytest arguments]

Runs the tests marked `faults` (tests/faults); each notes its figures with the fixture `tally`. Writes figures.json (all
notes, the machine, how the tests ended) and README.md (a table by promise). Ends with 1 where a test failed; its
figures are then missing, and the page says so. Without FAULTS=full the counts are those of CI, and the page says that.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "reports" / "reliability"
PROMISES = {
    1: "Verifier", 2: "kill -9", 3: "Damaged checkpoints", 4: "Disk full", 5: "Bad JSONL", 6: "Two runs, one folder",
    7: "NaN and infinity", 8: "Collapse watch", 9: "Secrets", 10: "Hostile text", 11: "Untrusted files", 12: "Servers",
    13: "Leaking strategies"}


def main() -> int:
    """Run, collect, write; 1 where a test failed."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        workers = str(len(os.sched_getaffinity(0)))
        command = [sys.executable, "-m", "pytest", "-m", "faults", "-n", workers, "--dist", "loadfile", "-rfEs"]
        done = subprocess.run([*command, *sys.argv[1:]], cwd=ROOT, env=os.environ | {"SGPO_FAULTS_OUT": folder},
                              stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout)
        notes = [json.loads(line) for file in sorted(Path(folder).glob("*.jsonl"))
                 for line in file.read_text(encoding="utf-8").splitlines()]
    notes.sort(key=lambda note: (note["line"], note["test"], note["what"]))
    ended = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else "no output"
    skipped = re.findall(r"^SKIPPED \[\d+\] (.+)", done.stdout, re.MULTILINE)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    told = {"full": os.environ.get("FAULTS") == "full", "ended": ended, "failed": failed,
            "skipped": skipped,
            "wall_seconds": round(time.perf_counter() - began), "date": time.strftime("%Y-%m-%d"),
            "cores": len(os.sched_getaffinity(0)), "processor": _processor(), "python": platform.python_version(),
            "torch": _version("torch"), "notes": notes}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "figures.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (OUT / "README.md").write_text(page(told), encoding="utf-8")
    return done.returncode


def page(told: dict[str, Any]) -> str:
    """The figures for a reader."""
    counts = "full counts" if told["full"] else "**reduced counts, as in CI**"
    lines = ["# Faults, injected", "",
             f"What `make faults-report` measured on {told['date']}: {counts}, {told['processor']}, "
             f"{told['cores']} cores, Python {told['python']}, torch {told['torch']}, "
             f"{told['wall_seconds'] / 60:.0f} minutes. pytest: {told['ended']}.", "",
             "The promises are in [docs/reliability.md](../../docs/reliability.md); CI injects the same faults in "
             "smaller numbers (`make test-faults`). All notes are in figures.json.", ""]
    if told["failed"]:
        failed = (f"- `{name}`" for name in told["failed"])
        lines += ["**These tests failed, their figures are missing:**", "", *failed, ""]
    if told["skipped"]:
        lines += ["Skipped here, so not measured:", "", *(f"- {_cell(line)}" for line in told["skipped"]), ""]
    for number, name in PROMISES.items():
        lines += [f"## {number}. {name}", ""]
        notes = [note for note in told["notes"] if note["line"] == number]
        if not notes:
            lines += ["Nothing was measured.", ""]
            continue
        lines += ["| what | measured |", "| --- | --- |"]
        lines += [f"| {_cell(note['what'])} | {_cell(note['figure'])} |" for note in notes]
        lines += [""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


if __name__ == "__main__":
    raise SystemExit(main())

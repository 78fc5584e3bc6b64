"""`sgpo status`: what the folders say, for jobs here and on a cluster, without torch."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import filelock
import pytest
from rich.console import Console
from run_folders import made_up
from small_notebooks import write_notebook

from sgpo_lib import jobs
from sgpo_lib.cli import main
from sgpo_lib.config import to_yaml
from sgpo_lib.runs import Run, write_atomic
from sgpo_lib.status import seconds_left, tables, total_steps

ROWS = [{"kind": "train", "step": s, "reward_autonomous": s / 10, "tokens_per_second": 1000.0 * s,
         "seconds_step": float(s)} for s in range(1, 5)]  # fmt: skip


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs and jobs of these tests live in their own folder."""
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path))
    return tmp_path


def batch(root: Path, *names: str) -> Path:
    """A batch whose jobs have no folders yet."""
    rows = [{"name": n, "notebook": "06_full_run.ipynb", "parameters": {}, "after": [], "blocked": ""} for n in names]
    write_atomic(root / "jobs" / "b" / "batch.json", json.dumps({"name": "b", "jobs": rows}))
    return root / "jobs" / "b"


def stored(*given: Any, **more: Any) -> Run:
    """A made-up run with its configuration on disk."""
    run = made_up(*given, **more)
    write_atomic(run.folder / "config.yaml", to_yaml(run.config))
    return run


def begun(folder: Path, run: Path | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parameters.yaml").write_text("notebook: 06_full_run.ipynb\nparameters: {}\n")
    if run:
        (folder / "runs.txt").write_text(f"{run}\n")
    return folder


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """Line of the table by its first word."""
    assert main(["status", *arguments]) == 0
    return {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.split()}


def test_nothing_yet(root, capsys):
    assert "nothing" in shown(capsys)


def test_states_of_a_cluster(root, capsys):
    """Queued, queued again after an attempt, running elsewhere, failed with a cure, stopped, waiting."""
    folder = batch(root, "first", "again", "going", "failed", "stopped", "waits")
    queue = {"engine": "slurm", "id": "1234", "submitted": "2026-11-27T19:00:00+0000", "note": "PENDING (Resources)"}
    for name in ("first", "again", "failed"):
        (folder / name).mkdir()
        (folder / name / "queue.json").write_text(json.dumps(queue))
    begun(folder / "again")
    (folder / "again" / "attempts.json").write_text(json.dumps([{"started": 1, "host": "n1"}, {"started": 2}]))
    begun(folder / "failed")
    (folder / "failed" / "FAILED.json").write_text(json.dumps(
        {"cell": 3, "error": "TimeLimit", "message": "too long", "cure": "Give it more", "seconds": 7, "host": "n3"}))
    begun(folder / "stopped")
    (folder / "stopped" / "log.txt").write_text("step 3/9\n")
    begun(folder / "going", stored(root, "grpo8", 0, rows=ROWS, done=False, steps=10).folder)
    (folder / "going" / ".owner").write_text("process 7 on node-17")
    (folder / "going" / "queue.json").write_text(json.dumps(queue))
    with filelock.FileLock(folder / "going" / ".lock"):
        lines = shown(capsys, "b")
    assert lines["jobs"].startswith("jobs of b: 2 queued, 1 running, 1 failed, 1 stopped, 1 waiting")
    assert lines["first"] == "first queued slurm 1234: PENDING (Resources)"
    assert lines["again"] == "again queued (attempt 2) slurm 1234: PENDING (Resources)"
    assert lines["going"] == "going running 4/10 0.40 4,000 ~15 s node-17"
    assert lines["failed"] == "failed failed n3 7 cell 3: TimeLimit: too long. Give it more"
    assert lines["stopped"] == "stopped stopped step 3/9" and lines["waits"] == "waits waiting"
    assert jobs.read_job(folder / "again").attempt == 2


def test_a_queued_job_of_a_cluster_that_went_away_is_blocked_with_the_reason(root, capsys):
    folder = batch(root, "lost")
    told = json.loads((folder / "batch.json").read_text())
    told["jobs"][0]["blocked"] = "Slurm does not answer"
    write_atomic(folder / "batch.json", json.dumps(told))
    (folder / "lost").mkdir()
    (folder / "lost" / "queue.json").write_text(json.dumps({"engine": "slurm", "id": "7", "note": "PENDING"}))
    assert jobs.read_job(folder / "lost").state == "queued"
    assert shown(capsys, "b")["lost"] == "lost blocked Slurm does not answer"


def test_a_batch_shows_its_own_runs_only(root, capsys):
    mine, other = stored(root, "sgpo", 0, [0.5], rows=ROWS), stored(root, "grpo8", 1, rows=ROWS, done=False)
    other.fail(RuntimeError("no [bold]room[/bold]"))
    folder = batch(root, "a")
    begun(folder / "a", mine.folder)
    (folder / "a" / "DONE").write_text(json.dumps({"seconds": 3.0, "host": "here"}))
    lines = shown(capsys, "b")
    assert mine.folder.name in lines and other.folder.name not in lines
    assert lines["a"] == "a done 4/40 0.40 4,000 here 3" and "0.500" in lines[mine.folder.name]
    everything = shown(capsys)
    assert "RuntimeError: no [bold]room[/bold]" in everything[other.folder.name], "no markup is read"
    assert main(["status", "c"]) == 2 and "unknown batch 'c'" in capsys.readouterr().err


def test_a_short_terminal_shows_what_is_not_done(root):
    runs = [stored(root, "grpo8", seed, rows=ROWS, done=seed != 2) for seed in range(4)]
    console = Console(width=190, color_system=None)
    for lines, expected in ((None, [0, 1, 2, 3]), (40, [0, 1, 2, 3]), (6, [2])):
        with console.capture() as out:
            console.print(tables(None, lines))
        assert [i for i, run in enumerate(runs) if run.folder.name in out.get()] == expected
        assert f"runs in {root}: 3 done, 1 stopped" in out.get()


def test_time_left_and_total(root):
    assert seconds_left(ROWS, 4, 10) == 6 * 2.5 and seconds_left([], 0, 10) is None
    late = [{"seconds_step": 100.0}] * 5 + [{"seconds_step": 2.0}] * 20
    assert seconds_left(late, 25, 30) == 10.0, "from the last steps"
    assert total_steps(stored(root, "grpo8", 0, done=False, steps=7)) == 7
    few = {"n_train": 40, "n_validation": 2, "n_test": 2, "problems_per_step": 5, "warmup_share": 0.25}
    by_epochs = stored(root, "grpo8", 0, done=False, name="e", epochs=2.5, **few)
    assert total_steps(by_epochs) == 15  # 2.5 epochs of 30 problems
    supervised = stored(root, "sft", 0, done=False, name="s", epochs=3.0, **few)
    assert total_steps(supervised) == 6  # 3 epochs of 10 problems
    hub = stored(root, "grpo8", 0, done=False, name="h", epochs=1.0, problems="p", **{"data.problems": "hub:a/b"})
    assert total_steps(hub) == 0, "a table asks no network"


def test_status_needs_no_torch(root):
    stored(root, "grpo8", 0, done=False, rows=ROWS, epochs=1.0)
    code = "import sys\nfrom sgpo_lib.cli import main\nmain(['status'])\nprint([m for m in sys.modules if m in " \
           "('torch', 'pandas', 'papermill', 'transformers', 'ray')])"  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.rstrip().endswith("[]") and "tiny-grpo8" in out


def test_watch_is_checked_and_prints_once_on_a_pipe(root, capsys):
    assert main(["status", "--watch", "0"]) == 2 and "--watch: got 0, expected seconds" in capsys.readouterr().err
    assert "nothing" in shown(capsys, "--watch")


@pytest.mark.slow
def test_watch_is_live_on_a_terminal(root):
    """On a pseudo-terminal the table changes as the run does, until Ctrl-C, which is no error."""
    run = stored(root, "grpo8", 0, done=False, rows=ROWS[:1], steps=10)
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "sgpo_lib.cli", "status", "--watch", "0.2"], stdin=theirs,
                               stdout=theirs, stderr=theirs, start_new_session=True,
                               env={**os.environ, "COLUMNS": "180", "LINES": "30", "TERM": "xterm"})  # fmt: skip
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        deadline = time.time() + 30
        while text not in seen:
            assert time.time() < deadline, seen[-2000:]
            if select.select([ours], [], [], 0.5)[0]:
                seen += os.read(ours, 65536).decode("utf-8", "replace")

    try:
        until("1/10")
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
        until("4/10")
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal's other side is closed
            while process.poll() is None:  # it may wait for its last lines to be read
                if select.select([ours], [], [], 0.1)[0]:
                    os.read(ours, 65536)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.slow
def test_a_real_job_appears_with_its_last_line(root, capsys):
    path = write_notebook(root, "print('step 2/5: reward 0.5')")
    assert main(["run", str(path), "--job", str(root / "jobs" / "single" / "j"), "--quiet"]) == 0
    capsys.readouterr()
    line = shown(capsys)["j"]
    assert line.startswith("j done") and os.uname().nodename in line

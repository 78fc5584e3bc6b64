"""`sgpo batch`, which is what `make run` calls, interrupted at random moments and started again; a notebook's save."""

from __future__ import annotations

import collections
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from kill_world import Moment, dies, gone, leftovers, processes, require_same, result, start_notebook, timed
from small_notebooks import write_notebook

from sgpo_lib.jobs import read_batch
from sgpo_lib.runs import list_runs

TESTS = Path(__file__).parents[1]
ORPHANS_S = 45.0
"""A stopped job ends its step or is interrupted 10 s later, and killed 10 s after that."""
LEARN = ("from sgpo_lib.recipes import from_parameters\nfrom sgpo_lib.trainer import train",
         "run = train(from_parameters('tiny', method, seed, **settings))",
         "print(seed, run.summary['weights'], run.summary['test']['accuracy'])")
LAST = ("from sgpo_lib.runs import list_runs",
        "print([(run.config.seed, run.summary['weights']) for run in list_runs()])")
SETTINGS = {"reward": "rewards_for_tests:coin", "steps": 4, "problems_per_step": 2, "g1": 4, "g2": 3, "n_train": 8,
            "n_validation": 2, "n_test": 2, "max_new_tokens": 6, "eval_every": 2, "eval_k": 1, "test_k": 2, "lr": 1e-3,
            "lora_rank": 4, "mini_batch": 1, "reward_workers": 1, "torch_threads": 1}
WAYS = [("Ctrl-C in the terminal", signal.SIGINT, "group"), ("kill -9", signal.SIGKILL, "batch"),
        ("kill", signal.SIGTERM, "batch"), ("power off", signal.SIGKILL, "all"),
        ("kill -9 of a job", signal.SIGKILL, "job"), ("kill of the group", signal.SIGTERM, "group"),
        ("kill -9 of a kernel", signal.SIGKILL, "kernel"), ("kill -9 of the group", signal.SIGKILL, "group"),
        ("kill -INT", signal.SIGINT, "batch")]
"""(name, signal, who gets it). Jobs lead sessions of their own: a terminal's Ctrl-C reaches the batch alone."""


class World:
    """A batch file and the root of its runs; its processes are known by a mark in their environment."""

    def __init__(self, spec: Path, root: Path, *more: str, limit: float = 240):
        self.root, self.limit = root, limit
        self.command = [sys.executable, "-m", "sgpo_lib.cli", "batch", str(spec), "--jobs", "2", *more]
        self.mark, self.starts = uuid.uuid4().hex, 0
        self.log = root.with_name(f"{root.name}.txt")

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        marks = {"KILL_WORLD": self.mark, "KILL_START": f"{self.mark}-{self.starts}"}
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True,
                                    env={**os.environ, "SGPO_RUNS": str(self.root), **marks})

    def finish(self) -> None:
        """Started once more it ends with 0, and nothing of any start is left running."""
        process = self.start()
        try:
            assert process.wait(self.limit) == 0, self.told()
        finally:
            process.kill()
        gone(ORPHANS_S, f"KILL_WORLD={self.mark}")

    def told(self) -> str:
        logs = [self.log, *self.root.glob("jobs/*/*/log.txt"), *self.root.glob("jobs/*/*/process.txt")]
        return "\n".join(f"== {p.name} of {p.parent.name}\n{p.read_text()[-1500:]}" for p in logs)

    def interrupt(self, way: tuple[str, int, str], delay: float) -> str:
        """Start it, interrupt it after `delay` seconds, wait for the batch to end (not for what it left behind)."""
        name, number, who = way
        process = self.start()
        time.sleep(delay)
        ended = process.poll() is not None
        named = {"all": "", "job": "sgpo_lib.cli run", "kernel": "ipykernel_launcher"}
        if who == "batch":
            process.send_signal(number)
        elif who == "group":
            os.killpg(process.pid, number) if not ended else None
        else:
            found = [pid for pid, line in sorted(processes(f"KILL_WORLD={self.mark}").items()) if named[who] in line]
            for pid in found if who == "all" else found[:1] or [process.pid]:
                _send(pid, number)
        _, took = timed(lambda: process.wait(self.limit))
        return "" if ended else f"{name} after {delay:.1f} s (exit {process.returncode}, {took:.1f} s later)"

    def result(self, printed: bool = True) -> dict[str, Any]:
        """What the batch made, without what depends on the clock; `printed`: with what the jobs' last cells print."""
        (folder,) = (self.root / "jobs").iterdir()
        found: dict[str, Any] = {"jobs": {job.name: job.state for job in read_batch(folder)}}
        for job in read_batch(folder):
            cells = json.loads((job.folder / "notebook.ipynb").read_text())["cells"]
            if printed:
                (output,) = (o for o in cells[-1]["outputs"] if o.get("name") == "stdout")
                found[f"printed by {job.name}"] = output["text"]
            found[f"files of {job.name}"] = sorted(p.name for p in job.folder.iterdir())
            assert not leftovers(job.folder)
        for run in list_runs(self.root):
            assert run.done and not leftovers(run.folder)
            found |= {f"{run.folder.name}: {name}": value for name, value in result(run).items()}
        return found


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@pytest.fixture(scope="module")
def series(base, tmp_path_factory) -> Path:
    """Two trainings and a job that needs both."""
    folder = tmp_path_factory.mktemp("series")
    shutil.copy(TESTS / "rewards_for_tests.py", folder)
    write_notebook(folder, *LEARN, name="learn", parameters="method = 'sgpo'\nseed = 0\nsettings = {}")
    write_notebook(folder, *LAST, name="last")
    (folder / "spec.yaml").write_text(yaml.safe_dump({"name": "small", "jobs": {
        "learn": {"notebook": "learn", "parameters": {"settings": {**SETTINGS, "source": str(base)}},
                  "grid": {"seed": [0, 1]}},
        "last": {"notebook": "last", "after": "learn"}}}, sort_keys=False))
    return folder / "spec.yaml"


@pytest.fixture(scope="module")
def whole(series, tmp_path_factory) -> tuple[dict[str, Any], float]:
    """(what the uninterrupted batch made, its seconds)."""
    world = World(series, tmp_path_factory.mktemp("whole") / "runs")
    _, took = timed(world.finish)
    return world.result(), took


def test_a_batch_is_interrupted_and_started_again(series, whole, tmp_path, count, tally):
    """Reduced: one batch is interrupted in four ways in turn. Full: 20 batches, each once or twice."""
    expected, seconds = whole
    assert expected["jobs"] == {"learn-s0": "done", "learn-s1": "done", "last": "done"}
    chance, left, fell = random.Random("make run"), count(4, 20), collections.Counter()
    ways, number = itertools.cycle(WAYS), 0
    while left > 0:
        world, history = World(series, tmp_path / str(number) / "runs"), []
        world.root.parent.mkdir()
        for _ in range(count(4, chance.randint(1, 2))):
            way = next(ways)
            if told := world.interrupt(way, chance.uniform(0, 0.9 * seconds)):
                history.append(told)
                fell[way[0]] += 1
                left -= 1
        world.finish()
        require_same(world.result(), expected, history)
        number += 1
    tally(2, "`sgpo batch` interrupted and started again", f"{sum(fell.values())} interruptions of {number} batches, "
          "all finished with exit 0 and the uninterrupted one's artefacts", ways=dict(fell), seconds=round(seconds, 1))


def test_what_a_killed_batch_leaves_behind_ends(series, whole, tmp_path, tally):
    """SIGKILL to the batch alone while its kernels train, and a start at once: what still runs is waited for."""
    world, ended = World(series, tmp_path / "runs"), []
    process = world.start()
    while not list(world.root.glob("*/metrics.jsonl")):
        assert process.poll() is None, world.told()
        time.sleep(0.01)
    process.kill()
    process.wait()
    watch = threading.Thread(target=lambda: ended.append(gone(ORPHANS_S, f"KILL_START={world.mark}-1")))
    watch.start()
    world.finish()
    watch.join()
    require_same(world.result(), whole[0], ["SIGKILL to the batch alone"])
    tally(2, "SIGKILL to `sgpo batch` alone, and a start at once", f"its jobs, kernels and their workers had ended "
          f"{ended[0]:.1f} s later; the new start waited for them and finished")


MOMENTS = [Moment("save of the notebook", "sgpo_lib.execution:SavedWhole.save", nth=4, appears=".notebook.ipynb.*"),
           Moment("before its rename", "sgpo_lib.execution:SavedWhole.save", nth=6, inner=("pathlib:Path.replace", 1)),
           Moment("page", "sgpo_lib.launch:_write_page", inner=("os:fsync", 1)),
           Moment("DONE", "sgpo_lib.launch:write_atomic", nth=4, inner=("os:fsync", 1))]


def test_kill_in_the_save_of_a_notebook(tmp_path, tally):
    """`sgpo run` dies at each in turn: its kernel ends too, and the same command finishes."""
    path, job, orphans = write_notebook(tmp_path, "x = 1", "print('x is', x)"), tmp_path / "job", []
    for moment in MOMENTS:
        seconds, started = dies(start_notebook(path, job, moment), tmp_path, moment)
        assert any("ipykernel_launcher" in line for line in started), moment.name
        orphans.append(seconds)
        assert not (job / "DONE").exists(), moment.name
        if (job / "notebook.ipynb").exists():
            nbformat.validate(nbformat.read(job / "notebook.ipynb", as_version=4))
    again = subprocess.run([sys.executable, "-m", "sgpo_lib.cli", "run", str(path), "--job", str(job), "--quiet"],
                           capture_output=True, text=True, check=False)
    assert again.returncode == 0 and (job / "DONE").exists(), again.stderr
    assert nbformat.read(job / "notebook.ipynb", as_version=4).cells[-1].outputs[0].text == "x is 1\n"
    assert not leftovers(job)
    tally(2, "death of `sgpo run` at named moments", f"{len(MOMENTS)} of {len(MOMENTS)} left a valid notebook or none; "
          f"kernels had ended {max(orphans):.1f} s later; started again it finished", moments=[m.name for m in MOMENTS])


@pytest.mark.full
def test_the_real_series(tmp_path, tally):
    """Ten minutes: `SMOKE=1 make run` with its bases, interrupted in every way, against an uninterrupted one."""
    world = World(TESTS.parent / "experiments" / "quickstart.yaml", tmp_path / "runs", "--smoke", limit=3600)
    _, seconds = timed(world.finish)
    expected, chance = world.result(printed=False), random.Random("series")
    shutil.rmtree(world.root)  # the same root: runs are named by their configuration, paths in it included
    told = [world.interrupt(way, chance.uniform(0, seconds / 4)) for way in WAYS]
    history = [text for text in told if text]
    world.finish()
    require_same(world.result(printed=False), expected, history)
    tally(2, "the smoke series of `make run`", f"{len(history)} interruptions; the same artefacts, "
          f"{seconds / 60:.1f} minutes uninterrupted", history=history)

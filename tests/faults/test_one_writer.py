"""Two runs, one folder: of twenty that start at once exactly one writes, the others say who it is and end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
from kill_world import killed_config, require_same, result
from writers_world import attempt, hold_there, open_either, server, steps_of, train_there

from sgpo_lib.config import RunConfig, from_yaml
from sgpo_lib.runs import Run, load_run, locked
from sgpo_lib.trainer import train

STARTS = 20
LIMIT_S = 2.0
"""Seconds from the attempt to the end of the process."""


@pytest.fixture(scope="module")
def config(base) -> RunConfig:
    return killed_config(base, steps=6)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Run:
    """The run, started once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        patch.chdir(Path(__file__).parents[1])
        return train(config, root=tmp_path_factory.mktemp("alone"))


def start_together(root: Path, work: Callable[..., object], given: Any) -> dict[int, Any]:
    """Twenty processes that begin at the same moment: pid -> process."""
    root.mkdir(exist_ok=True)
    started = [server.Process(target=attempt, args=(root, n, work, given)) for n in range(STARTS)]
    for process in started:
        process.start()
    until = time.monotonic() + 120
    while len(list(root.glob("ready-*"))) < STARTS:
        assert time.monotonic() < until, "the processes do not start"
        time.sleep(0.01)
    (root / "go").touch()
    return {process.pid: process for process in started}


def ends(processes: dict[int, Any], root: Path, left: int) -> tuple[list[dict[str, Any]], list[float]]:
    """What those that ended told, and the seconds from each one's attempt to its end, until `left` go on."""
    ended, until = {}, time.monotonic() + 60
    while len(processes) - len(ended) > left:
        running = {p.sentinel: pid for pid, p in processes.items() if pid not in ended}
        for sentinel in wait(list(running), timeout=1):
            ended[running[sentinel]] = time.time()
        assert time.monotonic() < until, "they do not end"
    told = [json.loads(p.read_text()) for p in root.glob("told-*")]
    told = [t for t in told if t["pid"] in ended]
    assert len(told) == len(ended)
    return told, [ended[t["pid"]] - t["began"] for t in told]


def clear_up(processes: dict[int, Any]) -> None:
    for process in processes.values():
        process.kill()
        process.join()


def test_of_twenty_trainings_one_wins(config, alone, tmp_path, count, tally):
    """The others name it and end; the run ends with the bits of one that started alone."""
    rounds, seconds = count(1, 5), []
    for number in range(rounds):
        root = tmp_path / f"round-{number}"
        processes = start_together(root, train_there, config)
        try:
            told, took = ends(processes, root, left=1)
            winner = next(pid for pid, p in processes.items() if p.is_alive())
            expected = (f"RuntimeError: {root / 'runs' / config.label} is being written by process {winner} on "
                        f"{socket.gethostname()}. Wait for it, or use another run name")
            assert {t["told"] for t in told} == {expected}
            assert max(took) < LIMIT_S, sorted(took)
            (root / "enough").touch()
            processes[winner].join(120)
            assert processes[winner].exitcode == 0
        finally:
            clear_up(processes)
        seconds += took
        run = load_run(root / "runs" / config.label)
        assert run.done and not (run.folder / "FAILED.json").exists() and not (run.folder / ".owner").exists()
        require_same(result(run), result(alone), ["twenty starts"])
    tally(6, "20 trainings started at once in one folder", f"{rounds} of {rounds} rounds: one wins, 19 name its "
          f"process and host and end at most {max(seconds):.2f} s after their attempt",
          seconds=[round(s, 2) for s in seconds])


def test_a_lock_whose_holder_was_killed_is_taken_again(tmp_path, count, tally):
    """Round after round in one folder: the holder is killed, twenty try; the name that it left misleads nobody."""
    rounds, seconds = count(2, 40), []
    for number in range(rounds):
        root = tmp_path / f"round-{number}"
        root.mkdir()
        (root / "run").symlink_to(tmp_path, target_is_directory=True)
        processes = start_together(root, hold_there, None)
        try:
            told, took = ends(processes, root, left=1)
            holder, = (int(p.name.removeprefix("holds-")) for p in root.glob("holds-*"))
            assert processes[holder].is_alive()
            for one in told:
                assert f"is being written by process {holder} on {socket.gethostname()}." in one["told"]
            assert max(took) < LIMIT_S, sorted(took)
            os.kill(holder, signal.SIGKILL)
            processes[holder].join()
            assert (tmp_path / ".owner").read_text() == f"process {holder} on {socket.gethostname()}"
        finally:
            clear_up(processes)
        seconds += took
    began = time.monotonic()
    with locked(tmp_path):
        taken = time.monotonic() - began
    assert taken < 0.5
    tally(6, "20 at once for a lock whose holder was killed", f"{rounds} of {rounds} rounds: one takes it, 19 name it "
          f"and end at most {max(seconds):.2f} s after their attempt")


def test_a_killed_training_is_continued_at_once(config, alone, tmp_path, importable, tally):
    """SIGKILL to the one process that trains, not to the verifier's processes that it started."""
    root = tmp_path / "one"
    root.mkdir()
    process = server.Process(target=attempt, args=(root, 0, train_there, config))
    process.start()
    for name in ("go", "enough"):
        (root / name).touch()
    folder, until = root / "runs" / config.label, time.monotonic() + 60
    while not list(folder.glob("checkpoints/step-*")):
        assert time.monotonic() < until and process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    began = time.monotonic()
    with locked(folder):
        seconds = time.monotonic() - began
    run = train(config, root=root / "runs")
    require_same(result(run), result(alone), ["SIGKILL"])
    tally(6, "a lock left by a training that was killed", f"taken {seconds:.2f} s later, and the run ends as if alone")


def test_two_configurations_of_one_name_at_once(tmp_path, count):
    """The folder holds one of them whole, and who asks for the other is told."""
    for number in range(count(1, 10)):
        root = tmp_path / f"round-{number}"
        processes = start_together(root, open_either, None)
        try:
            told, _ = ends(processes, root, left=0)
        finally:
            clear_up(processes)
        kept = from_yaml(root / "runs" / "one" / "config.yaml").train.steps
        assert all(bool(one["told"]) == (steps_of(one["pid"]) != kept) for one in told)
        assert {len(list(root.glob("runs/*"))), len(told)} == {1, STARTS}
        for one in told:
            assert not one["told"] or f"train.steps: {kept} there, {steps_of(one['pid'])} here" in one["told"]

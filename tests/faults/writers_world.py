"""What a process does that tries to write a folder at the same moment as nineteen others. Light to import: it is
imported by each of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgpo_lib.config import RunConfig, override
from sgpo_lib.runs import locked, open_run

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["sgpo_lib.trainer", "transformers.models.qwen3.modeling_qwen3", "peft"])


def wait_for(path: Path) -> None:
    """Until a file is there."""
    while not path.exists():
        time.sleep(0.01)


def attempt(root: Path, number: int, work: Callable[..., object], given: Any) -> None:
    """Wait for the start, then try; what came of it goes into a file."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the reward of the verifier's processes
    os.chdir(Path(__file__).parents[1])
    (root / f"ready-{number}").touch()
    wait_for(root / "go")
    began = time.time()
    try:
        work(root, given)
        told = ""
    except (RuntimeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
    (root / f"told-{number}").write_text(json.dumps({"pid": os.getpid(), "began": began, "told": told}))


def train_there(root: Path, config: RunConfig) -> None:
    """A real training, which waits after its first row until the parent has seen the others end."""
    from sgpo_lib.trainer import train

    train(config, root=root / "runs", on_row=lambda _: wait_for(root / "enough"))


def hold_there(root: Path, _: None) -> None:
    """The lock alone, until the parent has seen the others end."""
    with locked(root / "run"):
        (root / f"holds-{os.getpid()}").touch()
        wait_for(root / "enough")


def steps_of(pid: int) -> int:
    """Two settings, by the process that has one."""
    return 7 + pid % 2


def open_either(root: Path, _: None) -> None:
    """One of two configurations for one folder."""
    open_run(override(RunConfig(), {"steps": steps_of(os.getpid())}), root / "runs", "one")

"""Several training processes joined by gloo, without Ray: what each of Ray Train's workers does."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sgpo_lib.config import RunConfig
from sgpo_lib.runs import CLOCK_PREFIXES, Run, Stopped, load_run, open_run
from sgpo_lib.trainer import work
from sgpo_lib.world import World

TOLERANCE = 1e-6
"""Of every metric between one worker and several, relative or absolute: sums of float32 in another order."""


@dataclass(frozen=True)
class Training:
    """One run for the workers. `stop` has it end after its next step."""

    name: str
    config: RunConfig
    stop: bool = False


def on_workers(size: int, root: Path, trainings: Sequence[Training],
               then: Callable[[World, Path], None] | None = None) -> list[Run]:
    """Train one after another on `size` processes, and call `then` on each. Raises what a worker raised, as torch tells
    it."""
    for training in trainings:
        run = open_run(training.config, root, training.name)
        if training.stop:
            (run.folder / "STOP").touch()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, args=(size, str(Path(folder) / "store"), root, list(trainings), then),
                                    nprocs=size)
    for training in trainings:
        (root / training.name / "STOP").unlink(missing_ok=True)
    return [load_run(root / training.name) for training in trainings]


def _worker(rank: int, size: int, store: str, root: Path, trainings: list[Training],
            then: Callable[[World, Path], None] | None) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for training in trainings:
        try:
            work(training.config, load_run(root / training.name), World(rank, size))
        except Stopped:
            assert training.stop
    if then:
        then(World(rank, size), root)
    torch.distributed.destroy_process_group()


def assert_same_metrics(one: Run, other: Run, tolerance: float = TOLERANCE) -> None:
    """Every number of every row but clocks and padding, and every result of the tests."""
    rows, others = one.metrics(), other.metrics()
    assert [(r["kind"], r["step"]) for r in rows] == [(r["kind"], r["step"]) for r in others] and rows
    for a, b in zip(rows, others, strict=True):
        assert a.keys() == b.keys()
        for name in (n for n in a if not n.startswith(CLOCK_PREFIXES) and n != "padding_share"):
            assert _close(a[name], b[name], tolerance), (a["kind"], a["step"], name, a[name], b[name])
    for path in (one.folder / "evaluation").glob("*.jsonl"):
        assert path.read_text() == (other.folder / "evaluation" / path.name).read_text()


def _close(a: Any, b: Any, tolerance: float) -> bool:
    return a == b if isinstance(a, str | None) else math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)

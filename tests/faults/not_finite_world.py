"""Faults that are put into a training in progress, before the step they are to be found in."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sgpo_lib import trainer
from sgpo_lib.config import RunConfig
from sgpo_lib.runs import load_run, open_run
from sgpo_lib.session import Session
from sgpo_lib.world import World

STEP = 2
"""The step before which a fault is put in."""
Fault = Callable[[Session], None]


@dataclass
class Seen:
    """The session of a training, and its weights when the fault was put in."""

    session: Any = None
    weights: str = ""
    steps: list[int] = field(default_factory=list)
    """Optimizer steps that were made after that."""


@contextlib.contextmanager
def injected(fault: Fault) -> Iterator[Seen]:
    """Trainings within get the fault before step `STEP`."""
    seen = Seen()

    def put_in(session: Session, step: int) -> None:
        if step == STEP:
            seen.session, seen.weights = session, session.policy.fingerprint()
            fault(session)
            made = session.optimizer.step
            watched: Any = session.optimizer
            watched.step = lambda *a, **k: (seen.steps.append(step), made(*a, **k))[1]

    def before(make: Any) -> Any:
        return lambda session, step, *more: (put_in(session, step), make(session, step, *more))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("sgpo_step", "supervised_step"):
            patch.setattr(trainer, name, before(getattr(trainer, name)))
        yield seen


# ------------------------------------------------------------------------------------------------------------ faults
def nothing(session: Session) -> None:
    """No fault beside what the configuration or the reward brings."""


def sampler_logp(session: Session, value: float = float("-inf")) -> None:
    """The sampler gives one token of its third sample this log-probability."""
    sample = session.engine.sample

    def poisoned(requests: Sequence[Any], **settings: Any) -> list[Any]:
        found = sample(requests, **settings)
        found[2] = replace(found[2], logp=(*found[2].logp[:1], value, *found[2].logp[2:]))
        return found

    session.engine.sample = poisoned  # type: ignore[method-assign]


def hidden_state(session: Session, learns: bool = True) -> None:
    """The second response of every pass (with gradient, or without) has a NaN in the state before its first token."""
    hidden = session.policy.response_hidden

    def poisoned(batch: Any) -> torch.Tensor:
        states_NH = hidden(batch)
        if len(batch.length_B) > 1 and torch.is_grad_enabled() == learns:
            mask_NH = torch.zeros_like(states_NH)
            mask_NH[int(batch.length_B[0]), 3] = float("nan")
            states_NH = states_NH + mask_NH
        return states_NH

    session.policy.response_hidden = poisoned  # type: ignore[method-assign]


def guided_state(session: Session) -> None:
    """The guided side's states of every pass hold an infinity."""
    states = session.guided_side.states

    def poisoned(batch: Any) -> Any:
        states_NH, head = states(batch)
        states_NH[0, 0] = float("inf")
        return states_NH, head

    session.guided_side.states = poisoned  # type: ignore[method-assign]


def gradient(session: Session, value: float = float("nan")) -> None:
    """One number of one parameter's gradient is not finite: a hook, as an extension might put one there."""
    parameter = session.policy.parameters()[3]
    parameter.register_hook(lambda grad: grad.flatten().index_fill(0, torch.tensor([1]), value).view_as(grad))


def weight(session: Session) -> None:
    """One weight becomes NaN between two steps, as by a broken memory: whatever the model computes then is NaN."""
    with torch.no_grad():
        parameter: Any = session.policy.parameters()[-1]
        shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        shard.view(-1)[:1] = float("nan")


def weight_after_the_passes(session: Session) -> None:
    """One weight becomes infinite when the gradients stand: only a look at the weights finds it."""
    settle = session.policy.settle

    def poisoned() -> None:
        settle()
        weight(session)

    session.policy.settle = poisoned  # type: ignore[method-assign]


# ----------------------------------------------------------------------------------------------------------- workers
def on_two_workers(root: Path, trainings: Sequence[tuple[str, RunConfig, Fault]]) -> dict[str, list[str]]:
    """What each of two workers raised (`Type: message`), by name of the run; the fault is put into the second one."""
    for name, config, _ in trainings:
        open_run(config, root, name)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, args=(str(Path(folder) / "store"), root, list(trainings)), nprocs=2)
    return {name: [(root / name / f"raised-{rank}").read_text() for rank in range(2)] for name, *_ in trainings}


def _worker(rank: int, store: str, root: Path, trainings: Sequence[tuple[str, RunConfig, Fault]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, config, fault in trainings:
        with injected(fault if rank == 1 else nothing) as seen:
            try:
                trainer.work(config, load_run(root / name), World(rank, 2))
                raised = "nothing"
            except (FloatingPointError, ValueError) as error:
                raised = f"{type(error).__name__}: {error}"
        (root / name / f"raised-{rank}").write_text(raised + f"\noptimizer steps: {len(seen.steps)}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

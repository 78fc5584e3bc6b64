"""What a tracker receives, and what is said where it is not installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from typing import Any

import pytest

from sgpo_lib.config import RunConfig
from sgpo_lib.runs import Run, open_run
from sgpo_lib.tracking import Tracker

ROWS: list[dict[str, Any]] = [
    {"kind": "train", "step": 1, "loss": 0.75, "alpha": 0.5, "note": "text is left out", "pass_at": {"1": 0.5}},
    {"kind": "train", "step": 2, "loss": 0.5, "alpha": 0.25, "updates": 3},
    {"kind": "eval", "step": 2, "accuracy": 0.125, "k": 4},
]
EXPECTED = {
    "train/loss": [(1, 0.75), (2, 0.5)], "train/alpha": [(1, 0.5), (2, 0.25)], "train/updates": [(2, 3.0)],
    "eval/accuracy": [(2, 0.125)], "eval/k": [(2, 4.0)],
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Run:
    return open_run(RunConfig(), tmp_path)


def test_without_a_name_nothing_happens(run):
    before = sorted(run.folder.iterdir())
    tracker = Tracker("", run)
    for row in ROWS:
        tracker.log(row)
    tracker.close()
    assert sorted(run.folder.iterdir()) == before


def test_tensorboard_receives_the_numbers_by_kind_and_step(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = Tracker("tensorboard", run)
    for row in ROWS:
        tracker.log(row)
    tracker.close()
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == EXPECTED


def test_a_resumed_run_continues_the_same_folder(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for row in ROWS[:2]:
        tracker = Tracker("tensorboard", run)
        tracker.log(row)
        tracker.close()
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == EXPECTED["train/loss"]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_told_with_the_cure(run, name, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else real(n, *a))
    with pytest.raises(ValueError, match=rf"train\.track: '{name}' is not installed\. Cure: pip install") as error:
        Tracker(name, run)
    assert ("wandb" if name == "wandb" else "[track]") in str(error.value)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_what_is_really_missing_here_is_told(run, name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=f"'{name}' is not installed"):
        Tracker(name, run)


@pytest.mark.parametrize("name, variable, value", [
    ("trackio", "TRACKIO_DIR", None), ("wandb", "WANDB_MODE", "offline")])  # fmt: skip
def test_the_others_are_started_offline_and_receive_the_same_numbers(run, name, variable, value, monkeypatch):
    """With a stand-in for the package: its interface is `init`, `log(numbers, step=...)` and `finish`."""
    seen: list[tuple[int, dict[str, float]]] = []
    state: dict[str, Any] = {}
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    module.log = lambda numbers, step: seen.append((step, numbers))
    module.finish = lambda: state.update(finished=True)

    def init(**settings: Any) -> Any:
        state.update(settings, environment=os.environ.get(variable))
        return module

    module.init = init
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(variable, "")  # remembered, so that it is restored
    monkeypatch.delenv(variable)
    tracker = Tracker(name, run)
    for row in ROWS:
        tracker.log(row)
    tracker.close()
    assert state["environment"] == (value or str(run.folder / "trackio"))
    assert (state["project"], state["name"], state["finished"]) == ("sgpo", run.folder.name, True)
    by_tag: dict[str, list[tuple[int, float]]] = {}
    for step, numbers in seen:
        for tag, number in numbers.items():
            by_tag.setdefault(tag, []).append((step, number))
    assert by_tag == EXPECTED

"""Faults are injected for real: reduced counts in CI, the full ones for the report (FAULTS=full)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FULL = os.environ.get("FAULTS") == "full"
Tally = Callable[..., None]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests of this folder, and leaves those marked `full` to the full counts."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)
    if not FULL and (left := [item for item in items if item.get_closest_marker("full")]):
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def count() -> Callable[[int, int], int]:
    """`count(reduced, full)`: how many faults to inject."""
    return lambda reduced, full: full if FULL else reduced


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """`tally(line, what, figure, **more)` notes a measured figure for the report (`make faults-report`).

    `line` is the number of the promise in docs/reliability.md, `what` a short phrase, `figure` what was measured, in
    words ("100 of 100 resumed to the same bits"). Without SGPO_FAULTS_OUT nothing is written.
    """

    def note(line: int, what: str, figure: str, **more: Any) -> None:
        if folder := os.environ.get("SGPO_FAULTS_OUT"):
            row = {"line": line, "what": what, "figure": figure, "full": FULL, "test": request.node.nodeid,
                   "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more}
            with (Path(folder) / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    return note

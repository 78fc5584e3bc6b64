"""The verifier inside a worker of Ray: the share of the bombs that `make test-faults` leaves to this test."""

from __future__ import annotations

from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[1] / "faults"


def test_bombs_in_a_worker_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FAULTS))
    from verifier_bombs import BOMBS, CONTEXTS, SPREAD, judged_in

    judged_in("ray", list(BOMBS)[list(CONTEXTS).index("ray")::SPREAD])

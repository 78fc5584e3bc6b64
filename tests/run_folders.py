"""Made-up run folders: what `comparison`, `study` and `claims` read of a finished run, without any training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo_lib.config import RunConfig
from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import Run

SAMPLES = 40
"""Samples per problem of a made-up evaluation: shares are multiples of 1/40."""


def made_up(root: Path, method: str, seed: int, test: Sequence[float] | None = None,
            transfer: Sequence[float] | None = None, rows: Sequence[dict[str, Any]] = (), problems: str = "abc",
            done: bool = True, name: str = "", summary: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A run folder with evaluations of these shares of correct samples, problem by problem, and these metric rows."""
    config: RunConfig = from_parameters("tiny", method, seed, **changes)
    run = Run(root / (name or config.label), config)
    (run.folder / "evaluation").mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"method": method, "problems": problems, "steps": config.train.steps}
    for part, shares in (("test", test), ("transfer", transfer)):
        if shares is not None:
            told[part] = {"accuracy": sum(shares) / len(shares), "k": SAMPLES}
            lines = [json.dumps({"problem_id": f"{part}-{i}", "samples": SAMPLES, "correct": round(SAMPLES * share),
                                 "responses": []}) for i, share in enumerate(shares)]
            (run.folder / "evaluation" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        run.finish(told | (summary or {}))
    return run


def train_rows(steps: int = 8, **quarters: Sequence[float]) -> list[dict[str, Any]]:
    """Training rows of steps 1 to `steps`: each metric has one value per quarter of the steps."""
    return [{"kind": "train", "step": step} | {m: values[4 * (step - 1) // steps] for m, values in quarters.items()}
            for step in range(1, steps + 1)]


def eval_rows(*accuracies: float, every: int = 2, metric: str = "accuracy") -> list[dict[str, Any]]:
    """Evaluations at the steps 0, `every`, 2 `every`, ..."""
    return [{"kind": "eval", "step": every * i, metric: value} for i, value in enumerate(accuracies)]

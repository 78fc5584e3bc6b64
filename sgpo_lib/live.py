"""Lines on a run in progress, for a log where nobody watches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sgpo_lib.config import RunConfig

LINE_EVERY, SLOW_SECONDS = 10, 3.0
"""Steps between printed lines; steps slower than this get a line each."""


def progress_line(row: dict[str, Any], steps: int) -> str:
    """One line on a step: what matters of it, for a log. `steps` is the run's length, 0 where unknown."""
    names = {"loss": "loss", "reward_autonomous": "reward", "reward_guided": "guided", "alpha": "alpha",
             "kl_mean": "kl", "entropy": "entropy", "tokens_per_second": "tokens/s", "seconds_step": "seconds"}
    parts = [f"{label} {row[key]:.3g}" for key, label in names.items() if key in row]
    return f"step {row['step']}{f'/{steps}' if steps else ''}: " + ", ".join(parts)


def print_row(config: RunConfig, row: dict[str, Any]) -> None:
    """Print a row where it is worth a line: evaluations, the first step, every tenth, and every slow one."""
    found = {k: row[k] for k in ("accuracy", "validation_loss") if k in row}
    if found:
        told = ", ".join(f"{k} {v:.3f}" for k, v in found.items())
        print(f"{config.label}: {row['kind']} after step {row['step']}: {told}", flush=True)
    elif row["step"] % LINE_EVERY in (0, 1) or row.get("seconds_step", 0.0) > SLOW_SECONDS:
        print(f"{config.label}: {progress_line(row, 0 if config.train.epochs else config.train.steps)}", flush=True)


def log_lines(config: RunConfig) -> Callable[[dict[str, Any]], None]:
    """Receiver that only prints, for headless runs."""
    return functools.partial(print_row, config)

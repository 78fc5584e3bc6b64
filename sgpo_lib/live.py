"""Curves that grow in a notebook while runs train, and lines for a log where nobody watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from IPython.display import display

from sgpo_lib.config import RunConfig
from sgpo_lib.figures import learning_curves

LINE_EVERY = 10
"""Steps between printed lines."""


class LiveCurves:
    """One figure for several runs: `train(config, on_row=live.watch(config))`.

    The figure is redrawn at every evaluation, in place; an executed notebook keeps its last state.
    """

    def __init__(self, metric: str = "accuracy", kind: str = "eval", title: str = ""):
        self.metric, self.kind, self.title = metric, kind, title
        self.rows: list[dict[str, Any]] = []
        self._shown: Any = None

    def watch(self, config: RunConfig) -> Callable[[dict[str, Any]], None]:
        """Receiver of one run's rows."""
        about = {"run": config.label, "profile": config.profile, "method": config.method.method, "seed": config.seed}

        def receive(row: dict[str, Any]) -> None:
            self.rows.append({**about, **row})
            if row["kind"] in ("train", "supervised") and (row["step"] % LINE_EVERY == 0 or row["step"] == 1):
                print(f"{config.label}: {progress_line(row)}", flush=True)
            if row["kind"] == self.kind and self.metric in row:
                self._draw()

        return receive

    def _draw(self) -> None:
        figure = learning_curves(pd.DataFrame(self.rows), self.metric, self.kind, self.title)
        if self._shown is None:
            self._shown = display(figure, display_id=True)
        else:
            self._shown.update(figure)


def progress_line(row: dict[str, Any]) -> str:
    """One line on a step: what matters of it, for a log."""
    names = {"loss": "loss", "reward_autonomous": "reward", "reward_guided": "guided", "alpha": "alpha",
             "kl_mean": "kl", "entropy": "entropy", "tokens_per_second": "tokens/s", "seconds_step": "seconds"}
    parts = [f"{label} {row[key]:.3g}" for key, label in names.items() if key in row]
    return f"step {row['step']} " + ", ".join(parts)


def log_lines(config: RunConfig) -> Callable[[dict[str, Any]], None]:
    """Receiver that only prints, for headless runs."""
    def receive(row: dict[str, Any]) -> None:
        if row["kind"] == "eval" or row["step"] % LINE_EVERY in (0, 1):
            found = {k: row[k] for k in ("accuracy", "validation_loss") if k in row}
            told = ", ".join(f"{k} {v:.3f}" for k, v in found.items()) or progress_line(row)
            print(f"{config.label}: {row['kind']} step {row['step']}: {told}" if found
                  else f"{config.label}: {told}", flush=True)

    return receive

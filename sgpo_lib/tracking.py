"""Optional second receiver of the metrics; `metrics.jsonl` stays the record.

All three work offline: TensorBoard and Trackio write local files, W&B runs in offline mode unless WANDB_MODE says
otherwise.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from sgpo_lib.runs import Run

_INSTALL = {"tensorboard": "sgpo-workbench[track]", "trackio": "sgpo-workbench[track]", "wandb": "wandb"}


class Tracker:
    """Sends numeric metrics, prefixed by their kind, to the tracker that the config names; to none if empty."""

    def __init__(self, name: str, run: Run):
        if name and importlib.util.find_spec(name) is None:
            raise ValueError(f"train.track: {name!r} is not installed. Cure: pip install '{_INSTALL[name]}'")
        self.name = name
        self._target: Any = None
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._target = SummaryWriter(str(run.folder / "tensorboard"))
        elif name == "trackio":
            os.environ["TRACKIO_DIR"] = str(run.folder / "trackio")
            import trackio

            trackio.init(project="sgpo", name=run.folder.name)
            self._target = trackio
        elif name == "wandb":
            os.environ.setdefault("WANDB_MODE", "offline")
            import wandb

            self._target = wandb.init(project="sgpo", name=run.folder.name, dir=str(run.folder))

    def log(self, row: dict[str, Any]) -> None:
        """Send one row."""
        numbers = {f"{row['kind']}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        if self.name == "tensorboard":
            for key, value in numbers.items():
                self._target.add_scalar(key, value, row["step"])
        elif self.name:
            self._target.log(numbers, step=row["step"])

    def close(self) -> None:
        """Flush."""
        if self.name == "tensorboard":
            self._target.close()
        elif self.name:
            self._target.finish()

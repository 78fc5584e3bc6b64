"""What a checkpoint holds of the weights and the optimizer, and how another number of workers takes it up.

    model/ or adapter/, optimizer.pt    of one process, and of an adapter on any number of workers
    sharded/                            of sharded weights: torch's distributed checkpoint, each worker writes its part

The optimizer's state goes by parameter name in both. Either is read by any number of workers, resharded where it has
to be; `Policy.load` reads the weights of both.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sgpo_lib.parallel import Sharded
from sgpo_lib.policy import SHARDS, Policy
from sgpo_lib.storage import disk_full
from sgpo_lib.weight_files import load_shards

OPTIMIZER = "optimizer.pt"


def save_state(policy: Policy, optimizer: torch.optim.Optimizer, copies: list[torch.Tensor], folder: Path,
               first: bool) -> None:
    """Write weights, optimizer and the guided side's copies. All workers call it."""
    rest: dict[str, Any] = {"guided_side": copies}
    policy.settle()
    if isinstance(policy, Sharded):
        _save_shards({"model": get_model_state_dict(policy.model),
                      "optimizer": get_optimizer_state_dict(policy.model, optimizer)}, folder / SHARDS)
    else:
        policy.save(folder)
        rest["optimizer"] = get_optimizer_state_dict(policy.model, optimizer)
    if first:
        with (folder / OPTIMIZER).open("wb") as file:  # by its name, torch would not tell a full disk from other errors
            torch.save(rest, file)


def _save_shards(state: dict[str, Any], folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    class Writer(dcp.FileSystemWriter):
        """Torch's, which names a full disk: what led to an error is lost on the way from worker to worker."""

        def write_data(self, *given: Any) -> Any:
            try:
                return super().write_data(*given)
            except Exception as error:
                if full := disk_full(error, folder, 0):
                    raise full from error
                raise

    dcp.save(state, storage_writer=Writer(folder))


def load_state(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> list[torch.Tensor]:
    """Take what `save_state` wrote; returns the guided side's copies. All workers call it.

    Raises ValueError where the folder holds other weights, or an optimizer.pt that is more than tensors.
    """
    policy.load(folder)
    try:
        stored = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{folder / OPTIMIZER}: refused: not what a checkpoint holds there "
                         f"({str(error).splitlines()[0][:200]}). Nothing of it ran. Restore the file, or remove this "
                         "checkpoint: the run continues from the one before it") from None
    model = policy.model
    if (folder / SHARDS).exists():
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        load_shards(state, folder / SHARDS)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        set_optimizer_state_dict(model, optimizer, stored["optimizer"], options=StateDictOptions(full_state_dict=True))
    return [copy.to(policy.device) for copy in stored["guided_side"]]

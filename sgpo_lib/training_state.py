"""What a checkpoint holds of the weights and the optimizer, and how another number of workers takes it up.

    model/ or adapter/, optimizer.pt    of one process, and of an adapter on any number of workers
    sharded/                            of sharded weights: torch's distributed checkpoint, each worker writes its part

The optimizer's state goes by parameter name in both. Either is read by any number of workers, resharded where it has
to be; `Policy.load` reads the weights of both.
"""

from __future__ import annotations

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

OPTIMIZER = "optimizer.pt"


def save_state(policy: Policy, optimizer: torch.optim.Optimizer, copies: list[torch.Tensor], folder: Path,
               first: bool) -> None:
    """Write weights, optimizer and the guided side's copies. All workers call it."""
    rest: dict[str, Any] = {"guided_side": copies}
    policy.settle()
    if isinstance(policy, Sharded):
        import torch.distributed.checkpoint as dcp

        dcp.save({"model": get_model_state_dict(policy.model),
                  "optimizer": get_optimizer_state_dict(policy.model, optimizer)}, checkpoint_id=str(folder / SHARDS))
    else:
        policy.save(folder)
        rest["optimizer"] = get_optimizer_state_dict(policy.model, optimizer)
    if first:
        torch.save(rest, folder / OPTIMIZER)


def load_state(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> list[torch.Tensor]:
    """Take what `save_state` wrote; returns the guided side's copies. All workers call it.

    Raises ValueError where the folder holds other weights.
    """
    policy.load(folder)
    stored = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
    model = policy.model
    if (folder / SHARDS).exists():
        import torch.distributed.checkpoint as dcp

        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=str(folder / SHARDS))
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        set_optimizer_state_dict(model, optimizer, stored["optimizer"], options=StateDictOptions(full_state_dict=True))
    return [copy.to(policy.device) for copy in stored["guided_side"]]

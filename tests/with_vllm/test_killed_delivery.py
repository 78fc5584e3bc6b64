"""kill -9 while weights are on their way to vLLM: nothing stays behind, and the resumed run delivers them again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from test_runs_with_vllm import SMALL

from sgpo_lib.recipes import from_parameters

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from kill_world import Moment, dies, finish, require_same, result, start

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("source")]
DELIVER = "sgpo_lib.rollouts.delivery:Delivered._deliver"
MOMENTS = [Moment("half an adapter put down", DELIVER, nth=2,
                  appears="delivery/version-000002-*/adapter/adapter_model.safetensors"),
           Moment("vLLM takes it up", DELIVER, inner=("sgpo_lib.rollouts.vllm_engine:VLLMEngine.load_adapter", 1))]
"""The second dies in the first delivery of a run that goes on after its first step. Without FAULTS=full the first
alone: each start of vLLM takes half a minute."""


def test_kill_while_weights_are_delivered(tmp_path):
    config = from_parameters("smollm2", "sgpo", 0, **SMALL, steps=2, n_test=0, torch_threads=1)
    whole = finish(config, tmp_path / "whole", 400)
    moments = MOMENTS if os.environ.get("FAULTS") == "full" else MOMENTS[:1]
    for moment in moments:
        dies(start(config, tmp_path / "broken", moment), tmp_path / "broken", moment)  # and vLLM's processes end
    broken = finish(config, tmp_path / "broken", 400)
    require_same(result(broken), result(whole), [m.name for m in moments])
    assert all(r["weights_verified"] == 1 for r in broken.metrics("train"))

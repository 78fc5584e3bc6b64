"""Whole runs whose rollouts come from vLLM: a delivery that is lost on the way, and notebook 06 headless."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sgpo_lib.recipes import from_parameters
from sgpo_lib.rollouts.vllm_engine import VLLMEngine
from sgpo_lib.runs import load_run
from sgpo_lib.trainer import train

pytestmark = pytest.mark.usefixtures("source", "importable")
SMALL: dict[str, Any] = {
    "sampler": "vllm", "kv_cache_gb": 0.5, "context": 512, "max_new_tokens": 8, "problems_per_step": 2, "lr": 1e-3,
    "n_train": 32, "n_validation": 0, "rollout_batch": 24, "reward": "rewards_for_tests:coin"}


@pytest.mark.vllm_ray
def test_a_run_whose_delivery_is_lost_stops_with_the_reason(tmp_path, monkeypatch):
    """The second adapter never arrives. No step is made with samples of the first, and none is lost."""
    config = from_parameters("smollm2", "sgpo", 0, **SMALL, steps=3, n_test=0)
    load = VLLMEngine.load_adapter

    def lose(self, folder, version, name):
        if version != 2:
            load(self, folder, version, name)

    with monkeypatch.context() as patch:
        patch.setattr(VLLMEngine, "load_adapter", lose)
        with pytest.raises(RuntimeError, match="does not hold the policy's weights after delivery 2"):
            train(config, root=tmp_path)
    stopped = load_run(tmp_path / config.label)
    assert stopped.state == "failed" and [r["step"] for r in stopped.metrics("train")] == [1]
    told = json.loads((stopped.folder / "FAILED.json").read_text())
    assert "skipped, came from a former step, or was applied twice" in told["message"]
    assert [p.name for p in stopped.checkpoints()] == ["step-000001"], "where the same command goes on"


@pytest.mark.vllm
def test_notebook_06_runs_headless_with_vllm_and_lora(tmp_path):
    """RL and evaluation on SmolLM2; the report shows how far sampler and trainer were apart."""
    given = {**SMALL, "profile": "smollm2", "steps": 2, "n_test": 4, "test_k": 2}
    command = [sys.executable, "-m", "sgpo_lib.cli", "run", "06_full_run", "--job", str(tmp_path / "job"),
               *(a for name, value in given.items() for a in ("-p", f"{name}={json.dumps(value)}"))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr + (tmp_path / "job" / "log.txt").read_text()[-3000:]
    runs = [load_run(line) for line in (tmp_path / "job" / "runs.txt").read_text().splitlines()]
    run = next(r for r in runs if r.config.method.method == "sgpo")
    assert run.done and run.config.rollout.sampler == "vllm" and run.config.model.lora_rank == 16
    assert run.summary["test"]["problems"] == 4 and run.summary["test"]["k"] == 2
    assert all(r["sampler_trainer_gap"] < 1e-4 and r["weights_verified"] == 1 for r in run.metrics("train"))
    page = (tmp_path / "job" / "report.html").read_text()
    assert "sampler_trainer_gap" in page or "Sampler-trainer gap" in page or "sampler-trainer gap" in page

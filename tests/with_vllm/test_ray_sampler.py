"""SmolLM2 on two workers of Ray Train: notebook 06 with an adapter, and a vLLM actor beside each worker.

`make test-vllm-ray`, apart from the targets of CI since it takes some ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from parallel_world import assert_same_metrics

from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import load_run
from sgpo_lib.trainer import train

pytestmark = [pytest.mark.vllm_ray, pytest.mark.usefixtures("source", "importable")]


def test_two_workers_sample_with_a_vllm_actor_each(tmp_path):
    """All weights train, sharded; Ray is started here. Every delivery arrives at both actors, or the run would stop."""
    config = from_parameters("smollm2", "sgpo", 0, **{
        "engine": "ray", "workers": 2, "sampler": "vllm", "kv_cache_gb": 0.5, "context": 512, "max_new_tokens": 8,
        "problems_per_step": 2, "lr": 1e-5, "n_train": 8, "n_validation": 0, "n_test": 2, "warmup_share": 0.0,
        "rollout_batch": 24, "reward": "rewards_for_tests:coin", "steps": 2, "lora_rank": 0})
    seen = []
    run = train(config, root=tmp_path, on_row=seen.append)
    rows = run.metrics("train")
    assert [row["step"] for row in rows] == [1, 2] and run.done and run.summary["workers"] == 2
    assert all(row["weights_verified"] == 1 and row["sampler_trainer_gap"] < 1e-3 for row in rows)
    assert rows[1]["weights_version"] == rows[0]["weights_version"] + 1 and rows[1]["delivery_bytes"] > 4e8
    assert len(seen) == len(run.metrics()) and not (run.folder / "delivery").exists()
    assert load_run(run.folder).summary["test"]["problems"] == 2


def test_notebook_06_with_an_adapter_on_two_workers(tmp_path):
    """In a Ray of its own, which leaves nothing behind; the metrics are those of one worker."""
    fields = {"n_train": 8, "n_validation": 0, "n_test": 2, "max_new_tokens": 8, "warmup_share": 0.0, "g1": 3, "g2": 2}
    given = {"profile": "smollm2", "engine": "ray", "workers": 2, "steps": 2, "overrides": fields}
    command = [sys.executable, "-m", "sgpo_lib.cli", "run", "06_full_run", "--job", str(tmp_path / "job"),
               *(a for name, value in given.items() for a in ("-p", f"{name}={json.dumps(value)}"))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run((tmp_path / "job" / "runs.txt").read_text().splitlines()[0])
    assert run.done and run.config.model.lora_rank == 16 and len(run.metrics("train")) == 2
    told = json.loads((run.folder / "workers.json").read_text())
    assert len(told) == 2 and not any(psutil.pid_exists(worker["process"]) for worker in told)
    assert_same_metrics(train(from_parameters("smollm2", "sgpo", 0, steps=2, **fields), root=tmp_path), run, 2e-5)

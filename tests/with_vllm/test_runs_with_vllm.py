"""A whole run whose rollouts come from vLLM: notebook 06, headless."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from sgpo_lib.runs import load_run

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("source", "importable")]
SMALL: dict[str, Any] = {
    "sampler": "vllm", "kv_cache_gb": 0.5, "context": 512, "max_new_tokens": 8, "problems_per_step": 2, "lr": 1e-3,
    "n_train": 32, "n_validation": 0, "rollout_batch": 24, "reward": "rewards_for_tests:coin"}


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
    outputs = [str(output) for cell in nbformat.read(tmp_path / "job" / "notebook.ipynb", as_version=4).cells
               if cell.cell_type == "code" for output in cell.outputs]
    assert any("sampler_trainer_gap" in text or "ampler-trainer gap" in text for text in outputs)

"""Two workers of Ray Train, each with a vLLM engine as a Ray actor: delivery of sharded weights, verified.

`make test-vllm-ray`, apart from `make test-vllm` since it takes four minutes on two cores.
"""

from __future__ import annotations

import secrets

import pytest

from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import load_run
from sgpo_lib.trainer import train

pytestmark = [pytest.mark.vllm_ray, pytest.mark.usefixtures("source", "importable")]


def test_two_workers_sample_with_a_vllm_actor_each(tmp_path, monkeypatch):
    """All weights train, sharded; Ray is started here. Every delivery arrives at both actors, or the run would stop."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
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

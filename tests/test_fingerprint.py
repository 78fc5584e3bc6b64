"""Numbers that tell two copies of weights apart: what must not matter, and the smallest thing that must."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sgpo_lib.config import ModelConfig
from sgpo_lib.policy import Policy, load_policy
from sgpo_lib.recipes import from_parameters
from sgpo_lib.rollouts.delivery import _adapter, base_parameters
from sgpo_lib.rollouts.fingerprint import COLUMNS, adapter_numbers, base_numbers, columns, differences, part_of, read
from sgpo_lib.trainer import train


@pytest.fixture
def policy(base) -> Policy:
    found = load_policy(ModelConfig(source=str(base), lora_rank=4), str(base), seed=0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return found


def whole(base) -> Policy:
    return load_policy(ModelConfig(source=str(base)), str(base), seed=0)


@pytest.mark.parametrize(("name", "part"), [
    ("model.layers.12.self_attn.qkv_proj.weight", "layer 12"),
    ("base_model.model.model.layers.3.mlp.up_proj.weight", "layer 3"), ("layers.0.x.weight", "layer 0"),
    ("model.embed_tokens.weight", "rest"), ("model.norm.weight", "rest"), ("lm_head.weight", "output")])
def test_the_part_that_a_parameter_belongs_to(name, part):
    assert part_of(name) == part


def test_fused_padded_and_reordered_weights_give_the_same_numbers():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 96, generator=generator) for n in (48, 16, 16))
    apart = [(f"model.layers.1.self_attn.{n}_proj.weight", read(w)) for n, w in (("q", q), ("k", k), ("v", v))]
    fused = [("model.layers.1.self_attn.qkv_proj.weight", read(torch.cat([q, k, v, torch.zeros(48, 96)])))]
    for dtype in (torch.float32, torch.bfloat16):
        a, b = base_numbers(apart[::-1], dtype), base_numbers(fused, dtype)
        assert differences(a, b) == [] and a["layer 1"][0] > 0
    assert differences(base_numbers(apart, torch.float32), base_numbers(apart, torch.bfloat16))


def test_one_step_of_one_float_is_seen():
    """The smallest change of one entry that is read, among a hundred thousand."""
    weight = torch.randn(2000, 64, generator=torch.Generator().manual_seed(2))
    other = weight.clone()
    other[1234, 40] = torch.nextafter(other[1234, 40], torch.tensor(9.0))
    a, b = (adapter_numbers([("layers.0.x.weight", w, w)]) for w in (weight, other))
    assert len(differences(a, b)) == 2 and "layer 0 A: sum" in differences(a, b)[0]


def test_columns_are_spread_over_the_whole_width():
    assert columns(576)[0] == 0 and columns(576)[-1] >= 560 and len(columns(576)) == COLUMNS
    assert columns(10) == list(range(10)), "a narrow matrix is read whole"


@pytest.mark.parametrize("method", ["adam", "sign"])
def test_an_update_of_a_published_learning_rate_changes_every_layer(base, method):
    """1e-6, as the paper has it, on all weights."""
    policy = whole(base)
    before = base_numbers(base_parameters(policy, torch.float32), torch.float32)
    content = policy.content()
    for parameter in policy.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    if method == "adam":
        torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0).step()
    else:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(1e-6 * parameter.grad.sign())
    found = differences(base_numbers(base_parameters(policy, torch.float32), torch.float32), before)
    assert len(found) == len(before) and policy.content() != content


def test_the_scale_of_an_adapter_counts(policy):
    """vLLM multiplies B by the scale; a copy without it, or with it twice, is another adapter."""
    right = adapter_numbers(_adapter(policy, torch.float32))
    module = next(m for m in policy.model.modules() if "default" in getattr(m, "lora_A", ()))
    assert module.scaling["default"] == 8
    bare = adapter_numbers((n, a, b / 8) for n, a, b in _adapter(policy, torch.float32))
    assert len(differences(right, bare)) == sum(part.endswith("B") for part in right)


def test_the_base_below_an_adapter_is_the_whole_models(policy, base):
    wrapped, plain = (base_numbers(base_parameters(p, torch.float32), torch.float32) for p in (policy, whole(base)))
    assert differences(wrapped, plain) == []


def test_what_trains_decides_whether_there_is_something_to_deliver(policy):
    before = policy.content()
    assert policy.content() == before
    with torch.no_grad():
        policy.parameters()[-1][0, 0] += 1e-7
    assert policy.content() != before


# --- runs ------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_told_before_any_work(base, tmp_path):
    config = from_parameters("tiny", "sgpo", 0, source=str(base), sampler="vllm", steps=1)
    with pytest.raises(ValueError, match=r"needs the package vllm: pip install sgpo-workbench\[vllm\]"):
        train(config, root=tmp_path)
    assert not (tmp_path / config.label / "metrics.jsonl").exists()


def test_a_gap_above_the_limit_stops_the_run(base, tmp_path):
    settings = {"source": str(base), "steps": 2, "problems_per_step": 2, "n_train": 12, "n_validation": 0, "n_test": 0,
                "max_new_tokens": 6}
    config = from_parameters("tiny", "sgpo", 0, **settings, max_gap=1e-12)
    with pytest.raises(RuntimeError, match=r"step 1: .* more than rollout\.max_gap = 1e-12.*its rollouts are"):
        train(config, root=tmp_path)
    folder = tmp_path / config.label
    assert (folder / "rollouts" / "step-000001.jsonl").exists() and not list((folder / "checkpoints").glob("step-*"))
    run = train(from_parameters("tiny", "sgpo", 0, **settings), root=tmp_path)
    assert all(0 < row["sampler_trainer_gap"] < 1e-5 for row in run.metrics("train"))


@pytest.mark.parametrize(("given", "message"), [
    ({"sampler": "vlm"}, "rollout.sampler: got 'vlm', expected one of 'transformers', 'vllm', 'server'"),
    ({"sampler": "server", "lora_rank": 4}, "rollout.server: got '', expected an address"),
    ({"server": "http://a:1/v1"}, "rollout.server: got 'http://a:1/v1'.*else empty"),
    ({"sampler": "server", "server": "http://a:1/v1"}, "model.lora_rank: got 0, expected above 0 with rollout.sampler"),
    ({"sampler": "vllm", "lora_rank": 4, "lora_dropout": 0.1}, "model.lora_dropout: got 0.1"),
    ({"sampler": "vllm", "lora_rank": 600}, "model.lora_rank: got 600, expected at most 512"),
    ({"sampler": "vllm", "lora_rank": 4, "lora_targets": "q_proj,lm_head"}, "model.lora_targets: got 'q_proj,lm_head'"),
    ({"sleep": True}, "compute.sleep: got True"), ({"gpu_memory_share": 1.0}, "gpu_memory_share: got 1.0"),
    ({"max_gap": 0.0}, "rollout.max_gap: got 0.0"), ({"kv_cache_gb": -1.0}, "compute.kv_cache_gb: got -1.0"),
    ({"sampler_dtype": "float16"}, "rollout.sampler_dtype: got 'float16'")])
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        from_parameters("tiny", "sgpo", **given)

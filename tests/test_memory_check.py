"""The least memory of a run, by hand, and the refusal of what cannot fit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sgpo_lib import memory_check
from sgpo_lib.config import ModelConfig
from sgpo_lib.policy import load_policy
from sgpo_lib.recipes import from_parameters
from sgpo_lib.trainer import train

SHAPES = {  # of the published config.json files
    "qwen2.5-1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
        "tie_word_embeddings": True},
    "qwen2.5-7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
        "tie_word_embeddings": False}}
PUBLISHED = {"qwen2.5-1.5b": 1.54e9, "qwen2.5-7b": 7.61e9}
"""Parameters as the model cards give them."""


BFLOAT16 = {"dtype": "bfloat16", "compute_dtype": ""}
ITSELF = {"sampler": "transformers"}
"""The policy samples by itself, which the paper's profiles leave to vLLM."""


@pytest.fixture(params=SHAPES)
def shaped(request, tmp_path):
    AutoConfig.for_model("qwen2", **SHAPES[request.param]).save_pretrained(tmp_path)
    return request.param, str(tmp_path)


def test_the_paper_models_by_hand(shaped):
    name, source = shaped
    count, shape = PUBLISHED[name], SHAPES[name]
    full = memory_check.least(from_parameters(name, sampler="vllm", **BFLOAT16), source)
    assert full.weights == pytest.approx(2 * count, rel=0.005) and full.training == 3 * full.weights
    cache = 2 * 28 * shape["num_key_value_heads"] * 128 * 2
    assert full.sampler == full.weights + 32768 * cache
    lora = memory_check.least(from_parameters(name, lora_rank=16, **ITSELF), source)
    h, i, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"] * 128
    adapter = 16 * 28 * (2 * (h + h) + 2 * (h + kv) + 3 * (h + i))
    assert (lora.weights, lora.training, lora.sampler) == (full.weights, 4 * 4 * adapter, 0)
    few = memory_check.least(from_parameters(name, lora_rank=16, lora_targets="q_proj,v_proj", **ITSELF), source)
    assert few.training == 4 * 4 * 16 * 28 * (2 * h + h + kv)
    cached = memory_check.least(from_parameters(name, sampler="vllm", kv_cache_gb=3.0, **BFLOAT16), source)
    assert cached.sampler == full.weights + 3 * memory_check.GIB


def test_the_shape_of_an_adapter_is_the_one_that_peft_makes(base):
    policy = load_policy(ModelConfig(source=str(base), lora_rank=4), str(base), 0)
    config = from_parameters("tiny", source=str(base), lora_rank=4)
    assert memory_check.least(config, str(base)).training == 4 * 4 * sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize(("gib", "settings", "message"), [
    (40, {}, r"at least 56\.\d GiB \(weights 14\.\d, gradients and optimizer 42\.\d GiB\), cuda:0 has 40\.0 GiB\. "
             r".*lora_rank=16"),
    (80, {}, None), (80, {"sampler": "vllm"}, r"at least 56\.\d GiB .*cuda:0 has 80\.0 GiB, 0\.6 of it beside vLLM"),
    (96, {"sampler": "vllm", "sleep": True}, None), (56, {"sampler": "vllm", "sleep": True}, r"at least 5\d\.\d GiB"),
    (80, {"sampler": "vllm", "lora_rank": 16}, None),
    (24, {"sampler": "vllm", "lora_rank": 16, "gpu_memory_share": 0.3},
     r"vLLM needs at least 15\.9 GiB.*gpu_memory_share = 0\.3 of it. Raise the share")])
def test_7b_on_one_gpu(tmp_path, monkeypatch, gib, settings, message):
    """What fits on GPUs of these sizes, which this machine need not have."""
    AutoConfig.for_model("qwen2", **SHAPES["qwen2.5-7b"]).save_pretrained(tmp_path)
    monkeypatch.setattr(memory_check, "pick_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(memory_check, "device_memory", lambda device: gib * memory_check.GIB)
    config = from_parameters("qwen2.5-7b", **BFLOAT16, **ITSELF | settings)
    if message is None:
        memory_check.require_memory(config, str(tmp_path))
    else:
        with pytest.raises(ValueError, match="too little memory: .*" + message):
            memory_check.require_memory(config, str(tmp_path))


@pytest.mark.parametrize(("workers", "gib", "settings", "message"), [
    (1, 80, {}, r"at least 113\.\d GiB \(weights 28\.4, gradients and optimizer 85\.1 GiB\)"),
    (2, 56, {}, r"at least 56\.\d GiB .* 42\.6 GiB on each of 2 workers, 28\.4 GiB to load"),
    (2, 80, {}, None), (32, 24, {}, r"at least 28\.4 GiB"), (32, 30, {}, None),
    (4, 44, {}, None), (4, 44, {"sampler": "vllm", "sampler_dtype": "bfloat16", "gpu_memory_share": 0.4},
                        r"at least 28\.4 GiB .*0\.6 of it beside vLLM"),
    (4, 44, {"sampler": "vllm", "placement": "own"}, None),
    (4, 17, {"sampler": "vllm", "placement": "own", "lora_rank": 16}, r"takes 0\.9, cuda:0 has 17\.0 GiB"),
    (4, 18, {"sampler": "vllm", "placement": "own", "lora_rank": 16}, None),
    (4, 15, {"sampler": "vllm", "placement": "own", "lora_rank": 16}, r"on a GPU of its own, .*cuda:0 has 15\.0 GiB"),
    (8, 12, {"lora_rank": 16}, r"at least 14\.\d GiB"), (8, 16, {"lora_rank": 16}, None)])
def test_7b_in_float32_on_several_workers(tmp_path, monkeypatch, workers, gib, settings, message):
    """All weights are shared out, an adapter's base is not; each worker once holds the whole model to load it."""
    AutoConfig.for_model("qwen2", **SHAPES["qwen2.5-7b"]).save_pretrained(tmp_path)
    monkeypatch.setattr(memory_check, "pick_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(memory_check, "device_memory", lambda device: gib * memory_check.GIB)
    engine = {"workers": workers, "engine": "ray"} if workers > 1 else {}
    config = from_parameters("qwen2.5-7b", **engine, **ITSELF | settings)
    if message is None:
        memory_check.require_memory(config, str(tmp_path))
    else:
        with pytest.raises(ValueError, match="too little memory: .*" + message):
            memory_check.require_memory(config, str(tmp_path))


def test_a_model_larger_than_this_machine_is_refused_before_it_is_loaded(tmp_path):
    """Only a config.json is there: nothing could be loaded."""
    wide = SHAPES["qwen2.5-7b"] | {"hidden_size": 57344, "intermediate_size": 229376}
    AutoConfig.for_model("qwen2", **wide).save_pretrained(tmp_path)
    config = from_parameters("tiny", source=str(tmp_path), lora_rank=4)
    with pytest.raises(ValueError, match=r"too little memory: .*GiB.*cpu has \d+\.\d GiB"):
        memory_check.require_memory(config, str(tmp_path))


def test_a_run_that_cannot_fit_ends_before_its_first_row(base, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_check, "device_memory", lambda device: 1000)
    config = from_parameters("tiny", source=str(base), steps=1)
    with pytest.raises(ValueError, match="too little memory"):
        train(config, root=tmp_path)
    assert not (tmp_path / config.label / "metrics.jsonl").exists()


def test_counting_needs_no_weights(base):
    shape = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(shape).parameters())
    assert memory_check.least(from_parameters("tiny", source=str(base)), str(base)).weights == 4 * count

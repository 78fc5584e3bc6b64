"""The engine in this process beside transformers, and weights on their way to it: adapters, whole models, deliveries
that go wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import RANK
from rollout_world import QUESTION, SETTINGS, gap, move, open_policy, requests_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sgpo_lib.config import ModelConfig
from sgpo_lib.policy import Policy, load_policy
from sgpo_lib.recipes import from_parameters
from sgpo_lib.rollouts import opening, vllm_engine
from sgpo_lib.rollouts.delivery import Delivered
from sgpo_lib.rollouts.interface import SampleRequest

pytestmark = pytest.mark.vllm


@pytest.fixture
def delivered(engine: Any, policy: Policy, tmp_path: Path) -> Delivered:
    """The shared engine for the policy with an adapter. It is not closed: other tests use it."""
    engine.next_version = getattr(engine, "next_version", 0) + 100
    found = Delivered(lambda: engine, policy, tmp_path / "delivery", torch.float32)
    found.version = engine.next_version  # this engine has seen the numbers of earlier tests
    return found


def test_the_engine_samples_the_model(engine, source):
    """Log-probabilities beside transformers' own, in float32 and untruncated; seeds repeat; ends and cuts are told."""
    policy = open_policy(source, 0)
    requests = requests_of(policy, 2, "What is 2 + 3? Answer with a number.", "Name a colour.")
    settings: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 24}
    engine.adapter = None
    samples = engine.sample(requests, **settings)
    assert [s.token_ids for s in samples] == [s.token_ids for s in engine.sample(requests, **settings)]
    stops = policy.stop_ids()
    for drawn in samples:
        assert drawn.stop == ("end" if drawn.token_ids[-1] in stops else "length")
        assert len(drawn.logp) == len(drawn.token_ids) <= 24
    assert gap(policy, requests, samples) < 1e-4
    assert len({s.token_ids for s in samples}) > 1
    coldest = engine.sample(requests[:1] * 2, temperature=0.0, top_p=1.0, max_new_tokens=8)
    assert coldest[0].token_ids == coldest[1].token_ids
    with pytest.raises(ValueError, match=r"context is 512 tokens\. Lower max_new_tokens"):
        engine.sample(requests[:1], temperature=1.0, top_p=1.0, max_new_tokens=500)
    assert engine.sample([], temperature=1.0, top_p=1.0, max_new_tokens=4) == []


def test_prompts_that_responses_share_are_computed_once(engine, source):
    policy = open_policy(source, 0)
    engine.adapter = None
    text = "What is 6 x 7? " * 20 + str(torch.initial_seed())
    requests = requests_of(policy, 4, text, "With a strategy: " + text)
    samples = engine.sample(requests, **SETTINGS)
    for group in (samples[:4], samples[4:]):
        length = len(requests[0].prompt_ids)
        assert group[0].cached_prompt < 32 and all(s.cached_prompt > length - 64 for s in group[1:])


# --- adapters --------------------------------------------------------------------------------------------------
def test_every_version_of_an_adapter_reaches_the_sampler(delivered, policy):
    """The sampler's log-probabilities follow the policy's over updates; an unchanged policy is not sent again."""
    requests = requests_of(policy, 3)
    first = delivered.version
    for update in range(3):
        move(policy, 0.01, update)
        samples = delivered.sample(requests, **SETTINGS)
        assert gap(policy, requests, samples) < 1e-4
        told = delivered.report()
        assert told["weights_version"] == first + update + 1 and told["weights_verified"] == 1
        assert told["delivery_bytes"] > 1e6 and told["delivery_seconds"] > 0 and told["verify_seconds"] > 0
    again = delivered.sample(requests, **SETTINGS)
    told = delivered.report()
    assert told["weights_version"] == first + 3 and "delivery_bytes" not in told and told["prompt_cached_share"] > 0.5
    assert [s.token_ids for s in again] == [s.token_ids for s in samples]
    assert len(list(delivered.folder.iterdir())) == 1, "former versions are removed"


def test_a_gap_this_small_tells_versions_apart(delivered, policy):
    """The control of the test before: against the policy one update later the same samples are off."""
    requests = requests_of(policy, 3)
    samples = delivered.sample(requests, **SETTINGS)
    move(policy, 0.01, 9)
    assert gap(policy, requests, samples) > 3e-3


def _skipped(engine, folder, version, name):
    """Nothing is loaded."""


def _repeated(engine, folder, version, name):
    """A number that vLLM knows: it keeps what it has under it."""
    engine.__class__.load_adapter(engine, folder, engine.adapter.lora_int_id, name)


def _doubled(engine, folder, version, name):
    """B twice as large."""
    other = folder.parent / "doubled"
    shutil.copytree(folder, other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({k: v * 2 if "lora_B" in k else v for k, v in tensors.items()}, other / "adapter_model.safetensors")
    engine.__class__.load_adapter(engine, other, version, name)


@pytest.mark.parametrize("fault", [_skipped, _repeated, _doubled])
def test_a_delivery_that_goes_wrong_stops_before_a_token_is_sampled(delivered, policy, engine, monkeypatch, fault):
    requests = requests_of(policy, 2)
    move(policy, 0.01, 20)
    delivered.sample(requests, **SETTINGS)
    asked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(engine, "load_adapter", lambda *given: fault(engine, *given))
        patch.setattr(engine, "sample", lambda *a, **k: asked.append(1))
        move(policy, 1e-5, 21)  # an update as small as a learning rate of 1e-5 makes
        with pytest.raises(RuntimeError, match=r"does not hold the policy's weights.*adapter, layer 0 [AB]: sum"):
            delivered.sample(requests, **SETTINGS)
    assert not asked
    move(policy, 1e-5, 22)
    assert gap(policy, requests, delivered.sample(requests, **SETTINGS)) < 1e-4


def test_an_adapter_over_a_base_that_already_holds_it_is_noticed(delivered, policy, engine, source, tmp_path):
    """Merged and adapted: the update counts twice. The base's own numbers tell."""
    requests = requests_of(policy, 2)
    move(policy, 0.01, 30)
    delivered.sample(requests, **SETTINGS)
    merged = open_policy(source, RANK)
    merged.model.load_state_dict(policy.model.state_dict())
    merged.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    engine.load_weights(tmp_path / "merged")
    try:
        move(policy, 0.01, 31)
        with pytest.raises(RuntimeError, match="base, layer 0: sum"):
            delivered.sample(requests, **SETTINGS)
    finally:
        engine.load_weights(Path(source))
    move(policy, 0.01, 32)
    assert gap(policy, requests, delivered.sample(requests, **SETTINGS)) < 1e-4


# --- all weights -----------------------------------------------------------------------------------------------
def test_all_weights_reach_the_sampler_and_a_skipped_reload_is_caught(engine, source, tmp_path, monkeypatch):
    """From a saved folder, as on a CPU. The prefix cache of the old weights must not answer for the new ones."""
    policy = open_policy(source, 0)
    engine.adapter = None
    delivered = Delivered(lambda: engine, policy, tmp_path / "delivery", torch.float32)
    requests = requests_of(policy, 3)
    try:
        for update in range(2):
            move(policy, 0.002, 40 + update)
            samples = delivered.sample(requests, **SETTINGS)
            assert gap(policy, requests, samples) < 1e-4
        assert delivered.version == 2
        move(policy, 1e-6, 42)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "load_weights", lambda folder: None)
            with pytest.raises(RuntimeError, match="does not hold the policy's weights after delivery 3"):
                delivered.sample(requests, **SETTINGS)
        move(policy, 0.01, 43)
        with monkeypatch.context() as patch:  # vLLM's own method, which forgets the packed copy of the output matrix
            patch.setattr(engine, "load_weights", lambda folder: engine.llm.collective_rpc(
                "reload_weights", kwargs={"weights_path": str(folder)}))
            with pytest.raises(RuntimeError, match=r"1 parts differ .output: sum"):
                delivered.sample(requests, **SETTINGS)
    finally:
        engine.load_weights(Path(source))


# --- what cannot work ------------------------------------------------------------------------------------------
def test_another_version_of_vllm_is_refused(source, monkeypatch):
    monkeypatch.setattr(vllm_engine, "SUPPORTED", (0, 31))
    with pytest.raises(ValueError, match=r"got vllm(-cpu)? 0\.32\.\d+.*, expected 0\.31\.x"):
        vllm_engine.VLLMEngine(source)


def test_what_the_transfer_of_all_weights_needs_can_be_made():
    """The transfer itself needs a GPU."""
    info = vllm_engine.sender_info()
    assert info.packed and info.is_sender


def test_the_question_is_longer_than_a_block():
    """Else nothing above would show that the cache is dropped with the weights."""
    assert len(QUESTION.split()) > 32 and SampleRequest((1,), 2**63 - 1).seed < 2**63


# --- another architecture --------------------------------------------------------------------------------------
def test_a_model_with_biases_an_output_matrix_of_its_own_and_an_odd_scale(source, tmp_path):
    """Qwen2's shape in bfloat16, an adapter with scale 32 / 12: the numbers of both sides are the same to the bit."""
    shape = AutoConfig.for_model(
        "qwen2", hidden_size=256, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=49152, max_position_embeddings=256, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "qwen2")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "qwen2")
    config = ModelConfig(source=str(tmp_path / "qwen2"), lora_rank=12, dtype="bfloat16")
    policy = load_policy(config, config.source, seed=0)
    other = vllm_engine.VLLMEngine(config.source, lora_rank=12, dtype="bfloat16", enforce_eager=True, max_model_len=256,
                                   max_num_seqs=4, kv_cache_memory_bytes=2**27)
    delivered = Delivered(lambda: other, policy, tmp_path / "delivery", torch.bfloat16)
    try:
        for update in range(2):
            move(policy, 0.02, 50 + update)
            samples = delivered.sample(requests_of(policy, 2), **SETTINGS)
            assert gap(policy, requests_of(policy, 2), samples) < 0.05, "what bfloat16 leaves"
        assert delivered.report()["weights_verified"] == 1
    finally:
        delivered.close()


# --- ends ------------------------------------------------------------------------------------------------------
_SAMPLE_LONG = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from rollout_world import move, open_policy, requests_of
from sgpo_lib.rollouts.delivery import Delivered
from sgpo_lib.rollouts.vllm_engine import VLLMEngine

def start():
    return VLLMEngine(source, lora_rank=8, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4,
                      kv_cache_memory_bytes=2**28)

if __name__ == "__main__":
    source, folder = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    policy = open_policy(source, 8)
    move(policy, 0.3, 1)  # it babbles: no response ends early
    delivered = Delivered(start, policy, Path(folder) / "delivery", torch.float32)
    requests = requests_of(policy, 32)
    short = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4}
    delivered.sample(requests[:4], **short)
    threading.Timer(2.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        delivered.sample(requests, **short | {"max_new_tokens": 380})
        print("not interrupted")
    except KeyboardInterrupt:
        print("interrupted", delivered.engine is None, flush=True)
    (drawn,) = delivered.sample(requests[:1], **short)
    print("again", len(drawn.token_ids), flush=True)
    import psutil
    print("children", *(p.pid for p in psutil.Process().children(recursive=True)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_interrupted_sampler_is_replaced_and_a_killed_one_leaves_nothing_behind(source, tmp_path):
    """vLLM would answer the next call with what the interrupted one asked; and its processes outlive a parent."""
    (tmp_path / "long.py").write_text(_SAMPLE_LONG)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run([sys.executable, str(tmp_path / "long.py"), source, str(tmp_path)], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=400, check=False)
    lines = [x for x in done.stdout.splitlines() if x.startswith(("interrupted", "again", "children", "not"))]
    assert lines[:2] == ["interrupted True", "again 4"] and done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    children = [int(pid) for pid in lines[2].split()[1:]]
    assert children
    deadline = time.monotonic() + 60
    while alive := [pid for pid in children if psutil.pid_exists(pid) and
                    psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]:  # fmt: skip
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in alive]
        time.sleep(0.5)


# --- memory of a GPU, by what vLLM is asked: none is here --------------------------------------------------------
class Asked:
    """Stands for `vllm.LLM`: notes the names of what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.calls.append(name) or [{}]


@pytest.mark.parametrize("sleeps", [True, False])
def test_an_engine_that_sleeps_is_awake_for_every_use(sleeps, tmp_path):
    engine = object.__new__(vllm_engine.VLLMEngine)
    engine.llm, engine.sleeps, engine.asleep, engine.adapter, engine.stop_ids = Asked(), sleeps, False, None, []
    uses = {"held": engine.held, "load_weights": lambda: engine.load_weights(tmp_path),
            "sample": lambda: engine.sample([], temperature=1.0, top_p=1.0, max_new_tokens=1)}
    engine.llm.llm_engine = engine.llm
    engine.llm.model_config = SimpleNamespace(max_model_len=8)
    for use in uses.values():
        engine.rest()
        engine.rest()
        use()
        assert engine.llm.calls[:2] == ["sleep", "wake_up"] or not sleeps
        assert not engine.asleep and engine.llm.calls.count("sleep") == engine.llm.calls.count("wake_up") == int(sleeps)
        engine.llm.calls.clear()


def test_the_split_of_a_gpu_is_what_the_configuration_says():
    """Arguments of `vllm.LLM` for a policy on a GPU."""
    policy: Any = SimpleNamespace(device=torch.device("cuda"), context=2048)

    def asked(**given: Any) -> dict[str, Any]:
        config = from_parameters("smollm2", "sgpo", 0, sampler="vllm", **given)
        return opening._arguments(config, policy, "a/model", actor=False)

    assert asked(gpu_memory_share=0.35)["gpu_memory_utilization"] == 0.35
    assert "kv_cache_memory_bytes" not in asked() and "weight_transfer_config" not in asked()
    assert asked(kv_cache_gb=3)["kv_cache_memory_bytes"] == 3 * 2**30
    assert asked(lora_rank=0)["weight_transfer_config"].backend == "ipc"

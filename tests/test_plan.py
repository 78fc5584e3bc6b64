"""The formulas of plan.py: by hand, in their limits, against tensors that are counted, against measured memory; and
`sgpo plan`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from sgpo_lib import plan, plan_time, tiny
from sgpo_lib.cli import main
from sgpo_lib.config import ModelConfig, override
from sgpo_lib.losses.head import Head
from sgpo_lib.losses.token_kl import forward_kl_guided_to_unguided, token_logp_and_entropy
from sgpo_lib.plan_setup import DEVICES, PROCESS_GPU, Setup, Term, evaluations, terms, uncounted
from sgpo_lib.recipes import from_parameters
from sgpo_lib.shapes import BLOCK, PUBLISHED, Shape, find_shape, shape_of

SMALL = Shape("llama", hidden=8, layers=2, heads=4, kv_heads=2, head_size=2, intermediate=16, vocabulary=100,
              tied=False, context=64)
"""One layer: q, o 8 x 8, k, v 8 x 4, MLP 3 x 8 x 16, two norms of 8: 592 parameters."""


def setup(profile: str = "qwen2.5-7b", shape: Shape | None = None, gpu: str = "h100", nodes: int = 1, mean: int = 2048,
          prompt: int = 512, method: str = "sgpo", **fields: Any) -> Setup:
    """Without what the paper's profiles set so that they fit: each test turns on what it is about."""
    fields = {"sampler": "transformers", "activation_checkpointing": False} | fields
    if fields.get("workers", 1) > 1:
        fields["engine"] = "ray"
    config = from_parameters(profile, method, **fields)
    device = DEVICES[gpu]
    found = shape or find_shape(config.model)[0]
    return Setup(config, found, device, device.memory, nodes, mean, prompt, PROCESS_GPU, gpu)


def small(method: str = "sgpo", **fields: Any) -> Setup:
    """Two sequences of 4 + 8 tokens at a time, in float32 on one worker."""
    fields = {"max_new_tokens": 8, "micro_batch": 2, "problems_per_step": 4, "kl_chunk_tokens": 5} | fields
    return setup("tiny", SMALL, mean=4, prompt=4, method=method, **fields)


# --- by hand -----------------------------------------------------------------------------------------------------
def test_a_small_model_by_hand():
    assert (SMALL.layer, SMALL.root, SMALL.parameters) == (592, 1608, 2 * 592 + 1608)
    s = small()
    assert (plan.weights(s), plan.gradients(s), plan.moments(s)) == (4 * 2792, 4 * 2792, 8 * 2792)
    # a token and layer: norms 2 x 8, twice; inputs 2 x 8 + 16; q, output 2 x 8, k and v repeated 2 x 8; MLP 3 x 16;
    # 4 bytes for each number, each head, and two inverse roots
    assert plan.layer_kept(s, 2, 12) == 24 * (4 * (16 + 16 + 32 + 16 + 16 + 48) + 4 * 4 + 8)
    assert plan.layer_kept(s, 1, 12) == 12 * (4 * (16 + 16 + 32 + 16 + 8 + 48) + 4 * 4 + 8)  # no mask: not repeated
    assert (plan.mask(s, 2, 12), plan.mask(s, 1, 12)) == (4 * 2 * 144, 0)
    assert plan.head_workspace(s, Term("token KL", 4, 2, 5, True), 8) == (2 + 5) * 4 * 5 * 100 + 4 * 800
    assert plan.optimizer_working(s) == 2 * 4 * 800
    sampled = plan.sampling(s, 3, 8)
    assert sampled["KV cache"] == 3 * 12 * (2 * 2 * 4 * 4)
    assert plan.phases(s)["optimizer"] == {"process": PROCESS_GPU, "weights": 4 * 2792, "moments": 8 * 2792,
                                           "gradients": 4 * 2792, "optimizer workspace": 6400}


def test_an_adapter_by_hand():
    s = small(lora_rank=2, lora_targets="q_proj,down_proj")
    assert s.trained == 2 * 2 * ((8 + 8) + (16 + 8))
    assert plan.gradients(s) == 4 * s.trained and plan.weights(s) == 4 * (2792 + s.trained)
    # norms keep no result; inputs of q and down; 2 x rank 2
    assert plan.layer_kept(s, 1, 12) == 12 * (4 * (16 + (8 + 16) + 4 + 16 + 8 + 48) + 4 * 4 + 8)


def test_times_by_hand():
    fields = {"mean": 4, "prompt": 4, "max_new_tokens": 8, "problems_per_step": 2, "mini_batch": 0}
    s = setup(shape=SMALL, **fields)
    assert plan_time.flops(s) == 0.4 * 989e12
    assert plan_time.forward_flops(s, 10, 6, 3) == 10 * 2 * (2 * 592 + 4 * 8 * 6) + 3 * 2 * 800
    rows = Term("policy gradient", 16, 4, 3)
    assert plan_time.update_flops(s, rows) == 16 * (2 * 8 * 6 * 592 + 2 * 8 * 4 * 8 * 8 * 3.5 + 4 * 800 * 8)
    adapter = setup(shape=SMALL, lora_rank=2, activation_checkpointing=True, **fields)
    assert plan_time.update_flops(adapter, rows) == 16 * (2 * 8 * (4 + 2) * 592 + 2 * 8 * 4 * 8 * 8 * 4.5 + 4 * 800 * 4)
    assert [(t.name, t.rows, t.together) for t in terms(s)] == [("policy gradient", 16, 4), ("token KL", 2, 2)]


# --- limits ------------------------------------------------------------------------------------------------------
def test_workers_share_what_is_sharded():
    one, two, four = (setup(workers=n, compute_dtype="") for n in (1, 2, 4))
    for part in (plan.weights, plan.gradients, plan.moments):
        assert part(two) == pytest.approx(part(one) / 2) and part(four) == pytest.approx(part(one) / 4)
    assert plan.gathered(one) == plan.reducing(one) == plan_time.communication(one) == 0
    assert "load" not in plan.phases(one) and plan.phases(two)["load"]["weights"] == 4 * one.shape.parameters


def test_an_adapter_is_not_sharded_and_needs_less():
    one, four, full = setup(lora_rank=16), setup(lora_rank=16, workers=4), setup(workers=4)
    assert plan.weights(one) == plan.weights(four) and plan.gradients(four) == 2 * plan.gradients(one)  # DDP's buckets
    assert plan.moments(four) + plan.gradients(four) < plan.moments(full) + plan.gradients(full)
    assert plan_time.step_seconds(four)["update"] < plan_time.step_seconds(full)["update"]


def test_more_gpus_take_less_time():
    seconds = [plan_time.run_seconds(setup(workers=n, sampler="vllm", nodes=max(1, n // 8)))
               for n in (1, 2, 4, 8, 16, 32)]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(("change", "smaller"), [
    ({"activation_checkpointing": True}, "activations"), ({"micro_batch": 2}, "activations"),
    ({"micro_batch": 1}, "attention masks"), ({"attention": "flash_attention_2"}, "attention masks"),
    ({"kl_chunk_tokens": 64}, "log-probability workspace"), ({"compute_dtype": ""}, "gathered")])
def test_each_cure_makes_its_part_smaller(change, smaller):
    before = plan.phases(setup(micro_batch=4, workers=1, kl_chunk_tokens=65536))["update: policy gradient"]
    after = plan.phases(setup(**{"micro_batch": 4, "workers": 1, "kl_chunk_tokens": 65536} | change))
    assert after["update: policy gradient"].get(smaller, 0) < before[smaller]


def test_vllm_takes_its_share_or_a_gpu_of_its_own():
    shared = setup(workers=2, sampler="vllm", gpu_memory_share=0.4)
    taken = plan.phases(shared)["sample"]
    assert taken["vLLM weights"] == 2 * shared.shape.parameters
    assert taken["vLLM weights"] + taken["vLLM cache"] == int(0.4 * DEVICES["h100"].memory)
    assert taken["gathered"] == 4 * shared.shape.vocabulary * shared.shape.hidden  # its weights are told and saved
    asleep = plan.phases(setup(workers=2, sampler="vllm", sleep=True))
    assert "vLLM cache" in asleep["sample"] and "vLLM cache" not in asleep["optimizer"]
    assert asleep["optimizer"]["vLLM process"] == PROCESS_GPU
    own = plan.phases(setup(workers=2, sampler="vllm", placement="own"))
    assert not any("vLLM" in part for parts in own.values() for part in parts)


def test_delivery_by_hand():
    """Written once and read by each node, in bfloat16; before that the float32 shards of all others come to one."""
    one, many = setup(sampler="vllm"), setup(sampler="vllm", workers=16, nodes=2)
    parameters = one.shape.parameters
    assert plan_time.deliver_seconds(one) == 2 * 2 * parameters / 2e9
    gather = 4 * parameters * 15 / 16 / (0.7 * 50e9)
    assert plan_time.deliver_seconds(many) == pytest.approx(gather + 3 * 2 * parameters / 2e9)
    adapter = setup(sampler="vllm", lora_rank=16)
    assert plan_time.deliver_seconds(adapter) == 2 * 4 * adapter.trained / 2e9
    assert plan_time.step_seconds(setup())["deliver"] == plan_time.step_seconds(setup(sampler="vllm", method="sft"))[
        "deliver"] == 0


def test_every_evaluation_is_planned():
    """Before, while and after training; test problems, those of transfer, benchmarks with a count."""
    told = {"aime": {"file": "aime.jsonl", "count": 30, "k": 32}, "open": {"file": "open.jsonl"}}
    fields = {"steps": 10, "eval_every": 4, "eval_problems": 7, "eval_k": 2, "test_k": 3, "benchmarks": told,
              "n_validation": 9, "n_test": 5}
    s = setup(transfer={"n_test": 6}, **fields)
    assert [(e.name, e.times, e.responses) for e in evaluations(s)] == [
        ("validation", 4, 14), ("test", 1, 15), ("transfer", 1, 18), ("aime", 1, 960)]  # after steps 0, 4, 8 and 10
    assert uncounted(s) == ["open"] and "evaluate" in plan.phases(setup(**fields | {"n_test": 0, "n_validation": 0}))
    assert next((e.name, e.times) for e in evaluations(setup(**fields | {"eval_every": 0}))) == ("validation", 2)
    assert next((e.name, e.times) for e in evaluations(setup(**fields | {"eval_every": 5}))) == ("validation", 3)


# --- against models and tensors ----------------------------------------------------------------------------------
@pytest.mark.parametrize("source", [*PUBLISHED, *tiny.SIZES])
def test_parameters_are_those_of_the_model(source):
    """The published numbers of the model cards are 1.54, 7.61 and 8.03 thousand million."""
    shape = find_shape(ModelConfig(source=source))[0]
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[shape.kind]
    config = kind(vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                  num_hidden_layers=shape.layers, num_attention_heads=shape.heads, head_dim=shape.head_size,
                  num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    if source == "tiny":
        built = tiny.build_model(tiny.build_tokenizer(), 0)
        assert shape.parameters == sum(p.numel() for p in built.parameters())


class Alive(TorchDispatchMode):
    """Bytes of the tensors that operations made: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.known |= {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


KINDS = {"llama": {}, "qwen3": {"head_dim": 16}}


@pytest.mark.parametrize(("kind", "dtype", "rank", "padded"), [
    ("llama", "float32", 0, True), ("llama", "float32", 0, False), ("llama", "float32", 4, True),
    ("llama", "bfloat16", 0, True), ("llama", "bfloat16", 4, True), ("llama", "bfloat16", 4, False),
    ("qwen3", "float32", 0, True), ("qwen3", "bfloat16", 4, True)])
def test_a_layer_keeps_what_the_formula_says(kind, dtype, rank, padded):
    """Counted on a real layer: what four layers keep more than two, to 1%."""
    kept, rows, tokens = [], 2, 64
    for layers in (2, 4):
        config = AutoConfig.for_model(kind, vocab_size=50, hidden_size=64, intermediate_size=160, num_attention_heads=4,
                                      num_hidden_layers=layers, num_key_value_heads=2, **KINDS[kind])
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        if rank:
            from peft import LoraConfig, get_peft_model

            get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        mask = torch.ones(rows, tokens, dtype=torch.long)
        mask[0, -3:] = 1 - padded
        with Alive() as alive:
            out = model.model(input_ids=torch.ones_like(mask), attention_mask=mask, use_cache=False).last_hidden_state
        kept.append(alive.now)
        del out
    s = small(dtype=dtype, lora_rank=rank)
    s = dataclasses.replace(s, shape=shape_of(config.to_dict()))
    counted = rows if padded else 1
    formula = plan.layer_kept(s, counted, rows * tokens // counted) + plan.mask(s, counted, tokens)
    assert (kept[1] - kept[0]) / 2 == pytest.approx(formula, rel=0.01)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantity", ["log-probability", "token KL"])
@pytest.mark.parametrize("block", [16_000, 2**18])
def test_the_workspace_of_a_chunk(quantity, dtype, trains, block, monkeypatch):
    """Counted in fused.py: what the formula says, within half a block."""
    monkeypatch.setitem(BLOCK, "cpu", block)
    n, h, v, chunk = 96, 64, 4000, 16
    hidden = torch.randn(n, h, dtype=getattr(torch, dtype), requires_grad=True)
    head = torch.randn(v, h, dtype=getattr(torch, dtype), requires_grad=trains)
    guided = torch.randn(n, h, dtype=hidden.dtype)
    with Alive() as alive:
        if quantity == "token KL":
            out = forward_kl_guided_to_unguided(guided, hidden, Head(head), chunk).sum()
        else:
            out = token_logp_and_entropy(hidden, torch.zeros(n, dtype=torch.long), Head(head), chunk)[0].sum()
        out.backward()
    s = small(kl_chunk_tokens=chunk, dtype=dtype, lora_rank=0 if trains else 4)
    s = dataclasses.replace(s, shape=dataclasses.replace(SMALL, hidden=h, vocabulary=v), kind="cpu")
    formula = plan.head_workspace(s, Term(quantity, 1, 1, 5 if quantity == "token KL" else 3), n)
    beside = 4 * n * h * 4  # hidden states and their gradients
    room = 2 * min(block, chunk * v)
    assert formula - room <= alive.peak <= formula + beside + room


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "tokens"), [(16, 96), (0, 96)])
def test_the_peak_of_smollm2_is_within_a_fifth(rank, tokens):
    """Measured afresh in a process of its own, as benchmarks/plan_memory.py does."""
    fields = {"lora_rank": rank, "micro_batch": 2, "max_new_tokens": tokens, "sample": False}
    file = Path(__file__).parents[1] / "benchmarks" / "plan_memory.py"
    code = f"import sys, json; sys.path.insert(0, {str(file.parent)!r}); import plan_memory; " \
           f"print(json.dumps(plan_memory.in_process({fields!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    measured = max(found["measured"].values())
    assert max(found["planned"].values()) == pytest.approx(measured, rel=0.2), found


# --- the command -------------------------------------------------------------------------------------------------
def planned(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    return main(["plan", *arguments]), *capsys.readouterr()


def test_the_papers_set_up_answers(capsys):
    """4 nodes of 8 GPUs, all weights of the 7B model: the profile fits; without checkpointing the cure says so."""
    where = ("--profile", "qwen2.5-7b", "--nodes", "4", "--gpus", "8")
    status, out, _ = planned(capsys, *where, "-p", "activation_checkpointing=false")
    text = " ".join(out.split())
    assert status == 1 and "Does not fit, because update: policy gradient needs" in text
    assert "Cure: -p activation_checkpointing=true (run: " in text
    assert "17 h on 32 GPUs" in text and "Not published: kind of GPU" in text and "cost" not in text.split("Rests")[0]
    status, out, _ = planned(capsys, *where, "--price", "2", "--mean-tokens", "4096", "--json")
    found = json.loads(out)
    assert status == 0 and found["fits"] and found["workers"] == 32 and found["steps"] == 440
    assert found["cost"] == pytest.approx(2 * found["gpu_hours"]) and found["paper"] == {"hours": 17.0, "gpus": 32}
    assert found["gpu_hours"] == pytest.approx(32 * found["run_seconds"] / 3600)
    assert found["peak"]["bytes"] == max(sum(parts.values()) for parts in found["phases"].values()) < 80e9


def test_a_cure_is_a_plan_that_fits():
    from sgpo_lib.plan_command import cure, faults

    for s in (setup(workers=8), setup(gpu="l40s"), setup(gpu="l40s", lora_rank=16), setup(sampler="vllm", workers=8)):
        changes = cure(s)
        assert faults(s) and changes
        assert faults(dataclasses.replace(s, config=override(s.config, changes))) == []


def test_what_no_setting_makes_fit(capsys, tmp_path):
    wide = {"hidden_size": 57344, "intermediate_size": 229376, "num_hidden_layers": 80, "num_attention_heads": 64,
            "vocab_size": 1000, "model_type": "llama", "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    status, out, _ = planned(capsys, "--gpu", "h200", "-p", f"source={tmp_path}")
    assert status == 1 and "Take more or larger GPUs" in out


def test_one_gpu_of_each_kind_answers_for_every_profile(capsys):
    for gpu in DEVICES:
        for profile in ("tiny", "smollm2", "qwen2.5-1.5b", "qwen2.5-7b", "llama3-8b"):
            status, out, _ = planned(capsys, "--profile", profile, "--gpu", gpu, "--json")
            found = json.loads(out)
            assert status == (0 if found["fits"] else 1) and all(
                    value for part, value in found["step_seconds"].items() if part != "deliver")
    for method in ("sft", "base", "hpt", "luffy", "no_grpo", "grpo8"):
        assert planned(capsys, "--method", method)[0] == 0


def test_own_gpus_count_twice(capsys):
    arguments = ("--profile", "qwen2.5-7b", "--gpus", "8", "-p", "placement=own", "--json")
    found = json.loads(planned(capsys, *arguments)[1])
    assert (found["workers"], found["gpus"]) == (4, 8)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gpu", "h10"], r"unknown --gpu 'h10'. Did you mean 'h100'\? Known: a100-80gb, cpu, h100, h200, l40s"),
    (["--price", "-1"], "--price: got -1, expected the price of a GPU-hour, 0 or more"),
    (["--nodes", "0"], "--nodes: got 0, expected 1 or more"),
    (["--mean-tokens", "49"], "--mean-tokens: got 49, expected at most max_new_tokens = 48"),
    (["--prompt-tokens", "500"], "--prompt-tokens: got 500, which leaves no room for max_new_tokens = 48 in a context "
                                 "of 512 tokens"),
    (["--gpus", "3"], r"train.problems_per_step: got 5, expected a multiple of compute.workers = 3"),
    (["--profile", "tinny"], "unknown profile 'tinny'. Did you mean 'tiny'"),
    (["-p", "microbatch=2"], "unknown field 'microbatch'. Did you mean 'micro_batch'"),
    (["-p", "seed=2"], "-p seed=...: `sgpo plan` takes --profile and --method, and no seed"),
    (["-p", "workers=4", "-p", "problems_per_step=4"], "compute.workers: got 4, but 1 x 1 GPUs have room for 1"),
    (["--gpus", "3", "-p", "placement=own"], "got 1 x 3, expected an even number of GPUs with compute.placement='own'"),
    (["-p", "lora_rank=4", "-p", "lora_targets=query"], "lora_targets: got 'query', expected all-linear or some of q_"),
    (["-p", "source=nobody/nothing"], "model.source: no config.json of 'nobody/nothing' on this machine"),
])  # fmt: skip
def test_bad_input_says_what_was_got_and_expected(capsys, arguments, message):
    import re

    status, out, error = planned(capsys, *arguments)
    assert status == 2 and out == "" and re.search(message.replace("(", r"\("), error), error


def test_blocks_that_no_formula_describes(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "hidden_size": 8, "num_hidden_layers": 1,
                                                      "num_attention_heads": 1, "vocab_size": 10}))
    status, _, error = planned(capsys, "-p", f"source={tmp_path}")
    assert status == 2 and "is of a 'gpt2', whose memory the formulas do not describe. Expected one of llama" in error


def test_planning_loads_no_torch():
    code = ("import sys; from sgpo_lib.cli import main; main(['plan', '--profile', 'qwen2.5-7b']); "
            "print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False", done.stderr

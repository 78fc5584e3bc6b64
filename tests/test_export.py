"""`sgpo export`: what other programs load is the policy, checked with plain transformers, PEFT and a real vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sgpo_lib.bases import base_source
from sgpo_lib.cli import main
from sgpo_lib.config import ModelConfig, RunConfig
from sgpo_lib.export import export
from sgpo_lib.policy import load_policy
from sgpo_lib.policy_sources import open_policy
from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import Run, open_run


def saved_run(root: Path, config: RunConfig, done: bool = True, step: int = 0) -> Run:
    """A run folder with weights that differ from the base's: what training leaves, without the training."""
    run = open_run(config, root)
    policy = load_policy(config.model, base_source(config.model), config.seed)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():  # LoRA's B starts at zero: without this nothing would be added
            parameter.add_(torch.randn_like(parameter) * 0.02)
    if step:
        run.save_checkpoint(step, policy.save, {}, keep=2)
    if done:
        run.save_final(policy.save)
        run.finish({"steps": config.train.steps, "weights": policy.fingerprint()})
    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Run]:
    """A LoRA run, a run of all weights and an unfinished one, on an untrained tiny base."""
    root = tmp_path_factory.mktemp("exports")

    def config(seed: int, rank: int, **more: Any) -> RunConfig:
        return from_parameters("tiny", "sgpo", seed, source=str(base), revision="", lora_rank=rank, **more)

    return {"lora": saved_run(root, config(0, 4)), "full": saved_run(root, config(1, 0)),
            "unfinished": saved_run(root, config(2, 4), done=False, step=10),
            "untrained": open_run(config(3, 4), root)}  # fmt: skip


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def difference(a: Any, b: Any) -> float:
    """Largest difference of two models' logits over the same tokens."""
    ids = list(range(5, 40))
    return float((logits(a, ids) - logits(b, ids)).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_merged_folder_is_the_policy(tiny, tmp_path, kind):
    """In float32, with nothing but transformers: logits to 1e-4 (they are of order 1), far from the base's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = export(tiny[kind].folder, tmp_path / "out")
    policy = open_policy(str(tiny[kind].folder))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32 and type(loaded).__name__ == "Qwen3ForCausalLM"
    assert difference(loaded, policy.model) < 1e-4
    untouched = AutoModelForCausalLM.from_pretrained(tiny[kind].config.model.source)
    assert difference(loaded, untouched) > 0.01
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "the price is 12"
    assert tokenizer.chat_template and tokenizer(text).input_ids == policy.tokenizer(text).input_ids
    assert loaded.generation_config.eos_token_id == untouched.generation_config.eos_token_id
    told = json.loads((out / "sgpo_export.json").read_text())
    assert told["run"] == tiny[kind].folder.name and told["step"] == "final"
    assert told["weights"] == tiny[kind].summary["weights"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(tiny[kind].folder, out)


@pytest.mark.slow
def test_the_adapter_is_the_policy_on_its_base(tiny, tmp_path):
    """Loaded by plain PEFT on the base that adapter_config.json names."""
    from peft import AutoPeftModelForCausalLM

    (tmp_path / "out").mkdir()
    out = export(tiny["lora"].folder, tmp_path / "out", what="adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    assert not (out / "model.safetensors").exists() and not (out / "README.md").exists()
    assert len({p.stat().st_mode for p in out.iterdir()}) == 1, "all can be read by whom the umask allows"
    told = json.loads((out / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == tiny["lora"].config.model.source
    loaded = AutoPeftModelForCausalLM.from_pretrained(out)
    assert difference(loaded, open_policy(str(tiny["lora"].folder)).model) < 1e-5
    assert difference(open_policy(str(out)).model, loaded) < 1e-5, "and it can be opened here again"


@pytest.mark.slow
def test_a_checkpoint_and_a_type(tiny, tmp_path):
    """bfloat16 is the float32 merge, rounded once."""
    from transformers import AutoModelForCausalLM

    run = tiny["unfinished"].folder
    whole = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "a", step=10))
    half = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "b", step=10, dtype="bfloat16"))
    assert half.dtype == torch.bfloat16
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights.to(torch.bfloat16), half.state_dict()[name]), name
    assert json.loads((tmp_path / "b" / "sgpo_export.json").read_text())["step"] == 10


def test_what_cannot_be_exported(tiny, tmp_path, capsys):
    """Each is told before a model is loaded, with the cure; nothing is written."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for run, more, told in (
            ("unfinished", (), "has not finished (state: stopped)"), ("unfinished", (), "--step 10 exports the newest"),
            ("unfinished", ("--step", "3"), "got 3, but run"), ("untrained", (), "it has no checkpoint yet"),
            ("full", ("--what", "adapter"), "there is no adapter. Use --what merged"),
            ("lora", ("--what", "adapter", "--dtype", "float16"), "Leave it out"),
            ("lora", ("--out", str(tmp_path / "full")), "is not empty"),
            ("lora", ("--out", str(tmp_path / "file")), "is a file")):
        assert main(["export", str(tiny[run].folder), "--out", str(tmp_path / "new"), *more]) == 2
        assert told in capsys.readouterr().err, told
    assert main(["export", "nobody", "--out", str(tmp_path / "new")]) == 2
    assert "no run at nobody" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["x"]


@pytest.mark.slow
def test_the_command(tiny, tmp_path, capsys):
    assert main(["export", str(tiny["lora"].folder), "--out", str(tmp_path / "deep" / "out"), "--what", "adapter"]) == 0
    assert f"adapter: {tmp_path / 'deep' / 'out'}" in capsys.readouterr().out


# --- SmolLM2 and a real vLLM ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A LoRA run on SmolLM2."""
    config = from_parameters("smollm2", "sgpo", 0, device="cpu")
    return saved_run(tmp_path_factory.mktemp("smollm2"), config)


@pytest.mark.vllm
@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_vllm_loads_both_forms(smollm2, tmp_path, what):
    """Log-probabilities of a text's tokens by vLLM and by transformers, float32: to 2e-3 nats."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    out = export(smollm2.folder, tmp_path / "out", what=what)
    base = base_source(ModelConfig(source="smollm2"))
    policy = open_policy(str(smollm2.folder), device="cpu")
    ids = policy.tokenizer.encode("First, 20 + 40 = 60 and 7 + 8 = 15. Combined this is 75.")
    adapter = {} if what == "merged" else {"enable_lora": True, "max_lora_rank": 16}
    model = LLM(str(out) if what == "merged" else base, dtype="float32", enforce_eager=True, max_model_len=256,
                max_num_seqs=2, seed=0, kv_cache_memory_bytes=2**28, **adapter)
    request = None if what == "merged" else LoRARequest("run", 1, str(out))
    try:
        given = model.generate(TokensPrompt(prompt_token_ids=ids), SamplingParams(max_tokens=1, prompt_logprobs=0),
                               lora_request=request, use_tqdm=False)[0].prompt_logprobs
    finally:
        model.llm_engine.engine_core.shutdown()
    theirs = [given[t][ids[t]].logprob for t in range(1, len(ids))]
    ours = torch.log_softmax(logits(policy.model, ids), -1)
    own = [float(ours[t - 1, ids[t]]) for t in range(1, len(ids))]
    assert max(abs(a - b) for a, b in zip(own, theirs, strict=True)) < 2e-3
    plain = load_policy(ModelConfig(source="smollm2", device="cpu"), base, 0)
    start = torch.log_softmax(logits(plain.model, ids), -1)
    assert max(abs(float(start[t - 1, ids[t]]) - own[t - 1]) for t in range(1, len(ids))) > 0.05, "not the base's"

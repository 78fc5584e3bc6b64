"""A run's weights for other programs: `sgpo export`.

    merged    a plain Hugging Face folder, LoRA added into the weights; transformers and vLLM load it by its path
    adapter   a PEFT adapter, to be loaded on its base (adapter_config.json names it)

Beside the weights lie the tokenizer, the base's generation defaults and `sgpo_export.json`, which says what this is.
Weights are merged in float32 on the CPU (4 bytes a parameter in memory) and rounded once, to the type that is asked
for: rounding the base and the adapter's product apart would give other weights.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from sgpo_lib.runs import Run, load_run

WHAT = ("merged", "adapter")
DTYPES = ("float32", "bfloat16", "float16")


def export(source: str | Path, out: str | Path, *, what: str = "merged", step: int | None = None,
           dtype: str = "") -> Path:
    """Write the weights of a run (its final ones, or those after `step`) into a new or empty folder; returns it.

    `dtype` is the type of merged weights (default: the run's); an adapter keeps the type that it was trained in.
    The folder appears whole or not at all. Raises ValueError where there is no such run or step, the run has no weights
    yet, the folder is not empty, or an adapter is asked of a run that trained all weights.
    """
    run, folder = load_run(source), Path(out).expanduser().resolve()
    _check(run, folder, what, step, dtype)
    import torch

    from sgpo_lib.policy_sources import open_policy

    name = str(run.folder) if step is None else f"{run.folder}@{step}"
    policy = open_policy(name, device="cpu", dtype="float32" if what == "merged" else "")
    model, fingerprint = policy.model, policy.fingerprint()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if what == "merged":
            if policy.lora:
                model = model.merge_and_unload(safe_merge=True)
            model = model.to(getattr(torch, dtype or run.config.model.dtype))
            model.generation_config = _generation_config(model, run)
        model.save_pretrained(temporary)
        policy.tokenizer.save_pretrained(temporary)
        told = {"run": run.folder.name, "step": step if step is not None else "final", "what": what,
                "dtype": (dtype or run.config.model.dtype) if what == "merged" else "", "base": run.config.model.source,
                "revision": run.config.model.revision, "weights": fingerprint, "method": run.config.method.method}
        note = temporary / "sgpo_export.json"
        note.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in, with a path of this machine
        for path in temporary.iterdir():
            path.chmod(note.stat().st_mode)  # safetensors are written for their owner alone, whatever the umask says
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rmdir()  # empty, or it would have been refused
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check(run: Run, folder: Path, what: str, step: int | None, dtype: str) -> None:
    """Refuse what cannot work, before a model is loaded. Raises ValueError."""
    if what not in WHAT or dtype not in ("", *DTYPES):
        raise ValueError(f"export: got what={what!r}, dtype={dtype!r}, expected one of {', '.join(WHAT)} and one of "
                         f"{', '.join(DTYPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out: {folder} exists and is {'not empty' if folder.is_dir() else 'a file'}. Name a new "
                         "folder, or empty it")
    if what == "adapter" and not run.config.model.lora_rank:
        raise ValueError(f"run {run.folder.name} trained all weights (model.lora_rank = 0): there is no adapter. Use "
                         "--what merged")
    if what == "adapter" and dtype:
        raise ValueError(f"--dtype: got {dtype} for an adapter, which keeps the type that it was trained in. Leave it "
                         "out, or use --what merged")
    steps = [int(p.name.removeprefix("step-")) for p in run.checkpoints()]
    known = f"it has checkpoints of the steps {', '.join(map(str, steps))}" if steps else "it has no checkpoint yet"
    if step is not None and step not in steps:
        raise ValueError(f"--step: got {step}, but run {run.folder.name} has none of that step: {known}")
    if step is None and not run.done:
        cure = f"--step {steps[-1]} exports the newest" if steps else "Wait for its first checkpoint (train.save_every)"
        raise ValueError(f"run {run.folder.name} has not finished (state: {run.state}), so it has no final weights; "
                         f"{known}. {cure}")


def _generation_config(model: Any, run: Run) -> Any:
    """The base's own defaults for sampling, which training sets aside; without them those of the model."""
    from transformers import GenerationConfig

    from sgpo_lib.bases import base_source

    model_config = run.config.model  # a folder has no revision: there it is not looked at
    try:
        return GenerationConfig.from_pretrained(base_source(model_config), revision=model_config.revision or "main")
    except (OSError, ValueError):  # a base without that file
        return model.generation_config

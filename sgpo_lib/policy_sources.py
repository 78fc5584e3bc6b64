"""Open a policy by name: a hub model, a folder, an adapter, a run or one of its checkpoints; and read a response at
several checkpoints.

    Qwen/Qwen2.5-1.5B-Instruct      hub id; `tiny` and `smollm2` are the bases of the profiles of these names
    path/to/model                   folder with config.json and safetensors
    path/to/adapter                 folder with adapter_config.json (PEFT, LoRA) on the base that it names
    tiny-sgpo-s0-1a2b3c4d           run, by name below the root of runs or by folder: its final weights
    tiny-sgpo-s0-1a2b3c4d@10        the run's checkpoint after step 10; @0 is what it started from
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from sgpo_lib import checkpoints
from sgpo_lib.analysis import token_readings
from sgpo_lib.bases import base_source
from sgpo_lib.config import ModelConfig
from sgpo_lib.policy import ADAPTER, WEIGHTS, Policy, load_policy
from sgpo_lib.readings import TokenReadings
from sgpo_lib.records import Problem
from sgpo_lib.runs import Run, list_runs, load_run, runs_root
from sgpo_lib.session import final_weights
from sgpo_lib.weight_files import require_safetensors


def open_policy(source: str, *, base: str = "", device: str = "auto", dtype: str = "", revision: str = "",
                context: int = 0, trust_remote_code: bool = False) -> Policy:
    """The policy behind a name, as listed at the top of this file, ready to be read or sampled.

    `base` replaces the base that an adapter names. `dtype` is the run's where `source` is a run, else float32; the
    revision, context and trust of a run are the run's own. Raises ValueError, with what there is instead, for whatever
    cannot be opened.
    """
    settings = ModelConfig(source=source, device=device, dtype=dtype or "float32", revision=revision, context=context,
                           trust_remote_code=trust_remote_code)
    folder = Path(source).expanduser()
    name, at, step = source.rpartition("@")
    if at and not folder.exists():
        return _policy_of_run(_run(name, source), step, device, dtype)
    if folder.is_dir():
        if (folder / "config.yaml").exists():
            return _policy_of_run(load_run(folder), "", device, dtype)
        place = folder.absolute().parent if folder.name in (ADAPTER, WEIGHTS) else folder.absolute()
        if any((holder / "config.yaml").exists() for holder in place.parents[:2]):  # weights inside a run
            checkpoints.whole(place)
        holder = next((f for f in (folder, folder / ADAPTER) if (f / "adapter_config.json").exists()), None)
        if holder:
            return _with_adapter(holder, settings, base)
        model = next((f for f in (folder, folder / WEIGHTS) if (f / "config.json").exists()), None)
        if model is None:
            raise ValueError(f"{source}: the folder holds {_contents(folder)}; expected config.json (a model), "
                             "adapter_config.json (an adapter) or config.yaml (a run)")
        return load_policy(settings, str(model.resolve()), seed=0)
    if (runs_root() / source / "config.yaml").exists():
        return _policy_of_run(load_run(source), "", device, dtype)
    where = base_source(settings)
    if "/" not in where:  # the hub is not asked about a mistyped run
        raise ValueError(f"{source!r} is no folder and no run below {runs_root()}{_similar(source)}. Expected one of "
                         "them, or a hub id: OWNER/NAME")
    try:
        return load_policy(settings, where, seed=0)
    except ValueError as error:
        raise ValueError(f"{source!r} is no folder, no run below {runs_root()}{_similar(source)}, and as a hub id it "
                         f"cannot be opened: {error}") from None


def checkpoint_steps(run: Run | str | Path) -> list[int]:
    """Steps after which a run has a checkpoint, in order. How many are kept is the field train.keep_checkpoints.

    Raises ValueError where there is no run.
    """
    return list(_checkpoints(run if isinstance(run, Run) else load_run(run)))


def readings_over_training(run: Run | str | Path, problem: Problem, response: Sequence[int],
                           steps: Sequence[int] | None = None, top: int = 5, *, chunk: int = 256,
                           device: str = "auto") -> list[TokenReadings]:
    """One response read by the run's policy at several steps, in their order, labelled "step 10".

    Step 0 is what the run started from. By default 0 and every checkpoint. The model is loaded once; only the weights
    that the run trains are exchanged.
    Raises ValueError for a step without a checkpoint, and what `token_readings` raises.
    """
    run = run if isinstance(run, Run) else load_run(run)
    found = _checkpoints(run)
    wanted = sorted(set([0, *found] if steps is None else steps))
    if absent := [step for step in wanted if step and step not in found]:
        raise ValueError(_no_checkpoint(run, str(absent[0])))
    policy = _start(run, device, "", base_weights=0 in wanted)
    readings = []
    for step in wanted:
        if step:
            policy.load(run.checkpoint(step))
        readings.append(token_readings(policy, problem, response, top=top, chunk=chunk, label=f"step {step}"))
    return readings


# -------------------------------------------------------------------------------------------------------------- runs


def _policy_of_run(run: Run, step: str, device: str, dtype: str) -> Policy:
    """The run's policy after a step (empty: its final weights)."""
    found = _checkpoints(run)
    if step and not (step.isdecimal() and (int(step) == 0 or int(step) in found)):
        raise ValueError(_no_checkpoint(run, step))
    if not step and not run.done:
        raise ValueError(f"run {run.folder.name} has not finished (state: {run.state}), so it has no final weights. "
                         f"Name a step, as in {run.folder.name}@{max(found, default=0)} ({_known(found)})")
    start = step.isdecimal() and int(step) == 0
    weights = None if start else run.checkpoint(int(step)) if step else run.final()
    policy = _start(run, device, dtype, base_weights=start)
    if weights:
        policy.load(weights)
    return policy


def _start(run: Run, device: str, dtype: str, *, base_weights: bool) -> Policy:
    """The run's model; with `base_weights` as it was before its first step, else about to be given other weights."""
    config = dataclasses.replace(run.config.model, device=device, dtype=dtype or run.config.model.dtype)
    policy = load_policy(config, base_source(config), run.config.seed)
    if base_weights and run.config.train.init_from:
        policy.load(final_weights(run.config.train.init_from, run.config))
    return policy


def _checkpoints(run: Run) -> dict[int, Path]:
    return {int(path.name.removeprefix("step-")): path for path in run.checkpoints()}


def _no_checkpoint(run: Run, step: str) -> str:
    return (f"run {run.folder.name}: got step {step!r}, but it has {_known(_checkpoints(run))}. A run that sets "
            "train.save_every and a larger train.keep_checkpoints keeps more of them")


def _known(found: dict[int, Path]) -> str:
    kept = ", ".join(map(str, found)) or "none"
    return f"checkpoints of the steps: {kept}; 0 is its start"


def _run(name: str, source: str) -> Run:
    """The run of `NAME@STEP`."""
    for folder in (Path(name).expanduser(), runs_root() / name):
        if name and (folder / "config.yaml").exists():
            return load_run(folder)
    raise ValueError(f"{source!r}: no run {name!r}, neither as a folder nor below {runs_root()}{_similar(name)}. "
                     "Expected RUN@STEP")


def _similar(name: str) -> str:
    """What a name that is not known may have meant."""
    names = [run.folder.name for run in list_runs()]
    near = difflib.get_close_matches(Path(name).name, names, n=3, cutoff=0.5)
    return f" (there are {len(names)} runs{', close to it ' + ', '.join(near) if near else ''})"


# ---------------------------------------------------------------------------------------------------------- adapters


def _with_adapter(folder: Path, settings: ModelConfig, base: str) -> Policy:
    """A LoRA adapter on its base, weights not merged."""
    try:
        told = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, named, revision = told["peft_type"], told.get("base_model_name_or_path"), told.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a foreign file
        raise ValueError(f"{folder}/adapter_config.json cannot be read ({error!r}); expected the file that PEFT writes "
                         "beside an adapter") from None
    if kind != "LORA":
        raise ValueError(f"{folder}: got an adapter of type {kind}, expected LORA. Merge it into its base with PEFT "
                         "and open the merged model's folder")
    require_safetensors(folder, "adapter_model")
    source = base or named
    if not source:
        raise ValueError(f"{folder}: adapter_config.json names no base model. Name it: open_policy(..., base=...)")
    settings = dataclasses.replace(settings, source=source,
                                   revision=settings.revision or ("" if base else revision or ""))
    try:
        policy = load_policy(settings, base_source(settings), seed=0)
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter's base {source!r} cannot be opened ({error}). Name where it lies now: "
                         "open_policy(..., base=...)") from None
    from peft import PeftModel

    try:
        policy = dataclasses.replace(policy, model=PeftModel.from_pretrained(policy.model, str(folder)), lora=True)
    except (ValueError, RuntimeError, OSError, TypeError) as error:  # foreign weights, other shapes, no weights
        raise ValueError(f"{folder}: the adapter does not fit {source!r} ({str(error).splitlines()[0]}). Name the base "
                         "that it was trained on: open_policy(..., base=...)") from None
    if hasattr(policy.model.get_base_model().get_output_embeddings(), "lora_A"):
        raise ValueError(f"{folder}: the adapter changes the output matrix, and this library takes the base's (Eq. 3). "
                         "Merge it into its base with PEFT and open the merged model's folder")
    return policy


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"

"""`sgpo plan`: whether a run fits, what it takes and costs, from the formulas of plan.py, before anything is paid for.

Exit status 0 where it fits, 1 where it does not, 2 for bad input. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sgpo_lib import plan, plan_time
from sgpo_lib.config import field_index, override, unknown
from sgpo_lib.escaping import visible_in
from sgpo_lib.plan_setup import DEVICES, PROCESS_CPU, PROCESS_GPU, Setup, machine_memory, own_gpu, uncounted
from sgpo_lib.recipes import METHODS, NOTEBOOK_FIELDS, PROFILES, from_parameters
from sgpo_lib.shapes import GIB, find_shape

PAPER_HOURS, PAPER_GPUS = 17.0, 32
"""Appendix E: warm-up and RL of the 7B model on 4 nodes with 8 GPUs each."""
PAPER_PROFILES = ("qwen2.5-1.5b", "qwen2.5-7b", "llama3-8b")
_OF_THE_WARMUP = ("steps", "epochs", "lr", "lr_warmup_ratio", "problems_per_step", "mini_batch")
"""Fields of `train` whose given values are meant for the RL run, not for the warm-up that is planned beside it."""


_FIXED = ("process", "weights", "moments", "gradients", "guided side", "gathered", "reducing")
"""Parts of a phase that no batch size changes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sgpo plan` but `-p`, which it shares with `sgpo run`."""
    parser.add_argument("--profile", default="tiny", help=f"one of {', '.join(PROFILES)} (default tiny)")
    parser.add_argument("--method", default="sgpo", help=f"one of {', '.join(METHODS)} (default sgpo)")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs a node; on a CPU processes (default 1)")
    parser.add_argument("--gpu", metavar="KIND", help=f"one of {', '.join(DEVICES)} (default h100; cpu for tiny)")
    parser.add_argument("--mean-tokens", type=int, metavar="N",
                        help="mean length of a response (default: half of max_new_tokens; nobody knows it before)")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="longest prompt, strategy included (default: "
                        "max_new_tokens, at least 64, at most 512)")
    parser.add_argument("--price", type=float, metavar="X", help="of a GPU-hour, in any currency; without it no cost")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def command(arguments: argparse.Namespace, given: Mapping[str, Any], say: Callable[[str], None]) -> int:
    """Print the plan. Returns the exit status; raises ValueError for what cannot be planned."""
    if arguments.price is not None and not 0 <= arguments.price < float("inf"):
        raise ValueError(f"--price: got {arguments.price:g}, expected the price of a GPU-hour, 0 or more")
    setup, source = set_up(arguments, given)
    found = summary(setup, arguments.price, source, warm_up(setup, arguments, given))
    if arguments.json:
        say(json.dumps(found, indent=1))
    else:
        _show(visible_in(found))
    return 0 if found["fits"] else 1


def set_up(arguments: argparse.Namespace, given: Mapping[str, Any]) -> tuple[Setup, str]:
    """(what is planned, where the model's sizes come from). Raises ValueError for bad input."""
    for name in ("nodes", "gpus", "mean_tokens", "prompt_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected 1 or more")
    fields = _fields(given)
    devices = arguments.nodes * arguments.gpus
    if not {"compute.workers", "workers"} & set(fields):
        pair = fields.get("placement", fields.get("compute.placement")) == "own"
        if pair and devices % 2:
            raise ValueError(f"--nodes, --gpus: got {arguments.nodes} x {arguments.gpus}, expected an even number of "
                             "GPUs with compute.placement='own', which pairs each trainer's GPU with one for vLLM")
        fields |= {"compute.workers": devices // 2 if pair else devices}
    workers = fields.get("compute.workers", fields.get("workers"))
    if workers != 1:
        fields = {"compute.engine": "ray"} | fields
    config = from_parameters(arguments.profile, arguments.method, **fields)
    if config.compute.workers * (1 + own_gpu(config)) > devices:
        raise ValueError(f"compute.workers: got {config.compute.workers}, but {arguments.nodes} x {arguments.gpus} "
                         f"GPUs have room for {devices // (1 + own_gpu(config))}. Lower it, or raise --gpus or --nodes")
    kind = arguments.gpu or ("cpu" if config.model.device == "cpu" else "h100")
    if kind not in DEVICES:
        raise unknown("--gpu", kind, DEVICES)
    shape, source = find_shape(config.model)
    if config.model.lora_rank and not shape.targets(config.model.lora_targets):
        raise ValueError(f"model.lora_targets: got {config.model.lora_targets!r}, expected all-linear or some of "
                         f"{', '.join(shape.linears)}")
    longest = config.rollout.max_new_tokens
    limit = min(config.model.context or shape.context, shape.context)
    prompt = arguments.prompt_tokens or max(1, min(max(64, min(512, longest)), limit - longest))
    if prompt + longest > limit:
        raise ValueError(f"--prompt-tokens: got {prompt}, which leaves no room for max_new_tokens = {longest} in a "
                         f"context of {limit} tokens. Lower one of them")
    mean = arguments.mean_tokens or max(1, longest // 2)
    if mean > longest:
        raise ValueError(f"--mean-tokens: got {mean}, expected at most max_new_tokens = {longest}")
    device, memory, process = DEVICES[kind], DEVICES[kind].memory, PROCESS_GPU
    if kind == "cpu":
        threads = config.train.torch_threads or max(1, (os.cpu_count() or 1) // arguments.gpus)
        device = dataclasses.replace(device, bfloat16=threads * device.bfloat16, float32=threads * device.float32)
        memory, process = machine_memory() // min(arguments.gpus, config.compute.workers), PROCESS_CPU
    return Setup(config, shape, device, memory, arguments.nodes, mean, prompt, process, kind), source


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration fields among the parameters of `sgpo run`, read as notebook 06 reads them."""
    if own := sorted({"profile", "method", "seed"} & set(given)):
        raise ValueError(f"-p {own[0]}=...: `sgpo plan` takes --profile and --method, and no seed")
    fields = dict(given.get("overrides") or {}) | {n: v for n, v in given.items() if n not in NOTEBOOK_FIELDS}
    return {n: value for n, value in fields.items() if value != 0 or field_index().get(n) != "train.steps"}


def warm_up(setup: Setup, arguments: argparse.Namespace, given: Mapping[str, Any]) -> float | None:
    """Seconds of the supervised warm-up of a paper profile's RL run on the same devices; None for others."""
    if setup.config.profile not in PAPER_PROFILES or setup.config.method.objective != "rl":
        return None
    of_method = set(type(setup.config.method).__dataclass_fields__)
    kept = {n: v for n, v in given.items() if n.rpartition(".")[2] not in of_method | set(_OF_THE_WARMUP)}
    try:
        before, _ = set_up(argparse.Namespace(**vars(arguments) | {"method": "sft"}), kept)
    except ValueError:  # 64 examples may not be shared by as many workers as the RL run's problems
        return None
    return plan_time.run_seconds(before)


def faults(s: Setup) -> list[str]:
    """Why it does not fit; empty where it does."""
    compute, found = s.config.compute, []
    phase, size = plan.peak(s)
    if size > s.memory:
        found.append(f"{phase} needs {size / GIB:.1f} GiB, {_device(s)} has {s.memory / GIB:.1f}")
    if s.config.rollout.sampler == "vllm":
        sequence = s.length(2**31) * s.shape.cache_per_token(s.engine_size)
        need = s.engine_size * s.shape.parameters + (int(compute.kv_cache_gb * GIB) or sequence)
        share = compute.vllm_share
        if need > share * s.memory and (own_gpu(s.config) or not compute.kv_cache_gb):
            found.append(f"vLLM needs {need / GIB:.1f} GiB for weights and the cache of one sequence, and has "
                         f"{share:g} of {s.memory / GIB:.1f} GiB (compute.gpu_memory_share)")
    return found


def cure(s: Setup) -> dict[str, Any] | None:
    """Fields with which it fits, the mildest first; None where these do not help."""
    changes: dict[str, Any] = {}
    for _ in range(60):
        told = faults(s)
        if not told:
            return changes
        phase, _ = plan.peak(s)
        step = _next(s, phase, told)
        if step is None:
            return None
        changes |= step
        s = dataclasses.replace(s, config=override(s.config, step))
    return None


def _next(s: Setup, phase: str, told: list[str]) -> dict[str, Any] | None:
    """The next thing to try for the phase with the largest need."""
    train, rollout, compute, model = s.config.train, s.config.rollout, s.config.compute, s.config.model
    if told[0].startswith("vLLM"):
        more = round(compute.gpu_memory_share + 0.05, 2)
        return {"gpu_memory_share": more} if more < 0.95 and not own_gpu(s.config) else None
    largest = plan.phases(s)[phase]
    if sum(size for name, size in largest.items() if name in _FIXED) < s.memory:
        samples = phase in ("sample", "evaluate") and rollout.sampler == "transformers"
        if samples and s.kind != "cpu" and not model.lora_dropout:  # a smaller batch takes as much longer
            return {"sampler": "vllm", "sleep": True}
        if samples and rollout.rollout_batch > 1:
            return {"rollout_batch": rollout.rollout_batch // 2}
        if phase.startswith("update") and not train.activation_checkpointing:
            return {"activation_checkpointing": True}
        if phase.startswith(("update", "score")) and train.micro_batch > 1:
            return {"micro_batch": train.micro_batch // 2}
        if phase.startswith(("update", "score")) and train.kl_chunk_tokens > 64:
            return {"kl_chunk_tokens": train.kl_chunk_tokens // 2}
        if rollout.sampler == "vllm" and not compute.sleep and not own_gpu(s.config) and s.kind != "cpu":
            return {"sleep": True}
    return None if model.lora_rank else {
        "lora_rank": 16, "compute_dtype": "", "dtype": model.compute_dtype or model.dtype}


def summary(s: Setup, price: float | None, source: str, warmup: float | None) -> dict[str, Any]:
    """Everything that is shown, as plain data: bytes, seconds, hours."""
    told, step = faults(s), plan_time.step_seconds(s)
    run, gpus = plan_time.run_seconds(s), s.workers * (1 + own_gpu(s.config))
    hours, change = run / 3600 * gpus, cure(s) if told else {}
    cured = dataclasses.replace(s, config=override(s.config, change)) if change else None
    on_a_node = -(-s.workers // s.nodes)
    found: dict[str, Any] = {
        "profile": s.config.profile, "method": s.config.method.method, "gpu": s.kind, "gpus": gpus, "nodes": s.nodes,
        "workers": s.workers, "shape": source, "parameters": s.shape.parameters, "trained": s.trained,
        "mean_tokens": s.mean_tokens, "prompt_tokens": s.prompt_tokens,
        "max_new_tokens": s.config.rollout.max_new_tokens, "memory": s.memory, "phases": plan.phases(s),
        "peak": dict(zip(("phase", "bytes"), plan.peak(s), strict=True)),
        "fits": not told, "faults": told, "cure": change,
        "cured_run_seconds": plan_time.run_seconds(cured) if cured else None,
        "main_memory": plan.main_memory(s, on_a_node), "not_counted": uncounted(s),
        "steps": s.steps, "step_seconds": step, "evaluation_seconds": plan_time.evaluation_seconds(s),
        "run_seconds": run, "gpu_hours": hours,
        "cost": None if price is None else hours * price, "warm_up_seconds": warmup}
    if s.config.profile in PAPER_PROFILES:
        found["paper"] = {"hours": PAPER_HOURS, "gpus": PAPER_GPUS}
    return found


def _device(s: Setup) -> str:
    return "one worker's part of this machine" if s.kind == "cpu" else f"one {s.kind}"


def _show(found: dict[str, Any]) -> None:
    """The summary as tables."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=120, color_system=None)
    for part in _parts(found):
        console.print(part, markup=False, highlight=False)


def _parts(found: dict[str, Any]) -> list[Any]:
    from rich import box
    from rich.table import Table

    from sgpo_lib.status import _duration

    def gib(size: float) -> str:
        return f"{size / GIB:.1f}" if size >= GIB / 10 else f"{size / GIB:.2f}"

    def table(title: str, *columns: str) -> Any:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in columns:
            made.add_column(column, justify="right" if column in ("GiB", "seconds") else "left")
        return made

    unit = "process" if found["gpu"] == "cpu" else "GPU"
    memory = table(f"GiB on each {unit}, of {gib(found['memory'])}", "phase", "GiB", "of which")
    for phase, parts in found["phases"].items():
        memory.add_row(phase, gib(sum(parts.values())), ", ".join(
            f"{name} {gib(size)}" for name, size in sorted(parts.items(), key=lambda item: -item[1])
            if size >= GIB / 200))
    seconds = found["step_seconds"]
    times = table("A training step", "phase", "seconds")
    for name, value in seconds.items():
        if value:
            times.add_row(name, f"{value:,.1f}")
    times.add_row("step", f"{sum(seconds.values()):,.1f}")
    return [f"{found['profile']}, {found['method']}: {found['parameters'] / 1e9:.2f}B parameters ({found['shape']}), "
            f"{found['gpus']} x {found['gpu']}, {found['workers']} workers", memory,
            _verdict(found, gib, _duration), times, _run(found, _duration), *_paper(found), _basis(found)]


def _verdict(found: dict[str, Any], gib: Callable[[float], str], duration: Callable[[float], str]) -> str:
    node = "" if found["gpu"] == "cpu" else (f"Main memory of each node: at least {gib(found['main_memory'])} GiB "
                                             "(loading, weights of sleeping vLLM, saving).\n")
    if found["fits"]:
        return f"Fits: the largest need is {gib(found['peak']['bytes'])} GiB ({found['peak']['phase']}).\n{node}"
    cures = " ".join(f"-p {name}={str(value).lower() if isinstance(value, bool) else value}"
                     for name, value in (found["cure"] or {}).items())
    return (f"Does not fit, because {'; '.join(found['faults'])}. " +
            (f"Cure: {cures} (run: {duration(found['cured_run_seconds'])})\n" if cures else
             "Take more or larger GPUs, or a shorter max_new_tokens\n"))


def _run(found: dict[str, Any], duration: Callable[[float], str]) -> str:
    cost = "" if found["cost"] is None else f", cost {found['cost']:,.0f}"
    unit = "process" if found["gpu"] == "cpu" else "GPU"
    left = f" Without {', '.join(found['not_counted'])}: no count given." if found["not_counted"] else ""
    return (f"Run: {found['steps']} steps of {sum(found['step_seconds'].values()):,.1f} s and evaluations of "
            f"{duration(found['evaluation_seconds'])}: {duration(found['run_seconds'])}, {found['gpu_hours']:,.1f} "
            f"{unit}-hours{cost}.{left}\n")


def _paper(found: dict[str, Any]) -> list[str]:
    if "paper" not in found:
        return []
    told = (f"The paper: {PAPER_HOURS:g} h on {PAPER_GPUS} GPUs for warm-up and RL of its 7B model, "
            f"{PAPER_HOURS * PAPER_GPUS:g} GPU-hours. ")
    if found["warm_up_seconds"] is not None and found["gpus"]:
        both = (found["warm_up_seconds"] + found["run_seconds"]) / 3600
        ratio = both * found["gpus"] / (PAPER_HOURS * PAPER_GPUS)
        told += (f"This plan with the warm-up: {both:.1f} h on {found['gpus']} GPUs, {both * found['gpus']:,.0f} "
                 f"GPU-hours, {ratio:.2g} times the paper's. ")
    return [told + "Not published: kind of GPU, problems a step, mean length of responses, whether it evaluated.\n"]


def _basis(found: dict[str, Any]) -> str:
    return (f"Rests on: responses of {found['mean_tokens']} tokens in the mean (--mean-tokens), at most "
            f"{found['max_new_tokens']}, prompts of {found['prompt_tokens']} (--prompt-tokens); the speeds of "
            f"{found['gpu']} in sgpo_lib/plan_setup.py; memory counted from this code and measured for SmolLM2 on a "
            "CPU; utilisations assumed, no GPU measured: take time and cost as right within a factor of two to three. "
            "docs/planning.md has every formula's assumption.")

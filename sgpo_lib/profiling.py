"""Where a training step's time goes, and the least that each phase could take: the arithmetic of `sgpo profile`.

A floor is what the machine's own speed leaves no way below: model FLOP / FLOP a second, or bytes / bytes a second.
Model FLOP are those of the tokens that were really computed, without padding, without what a mask forbids, and without
what is computed twice to save memory. Times are in seconds, sizes in bytes. Nothing here imports torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgpo_lib.config import RunConfig
from sgpo_lib.plan import masked
from sgpo_lib.plan_setup import DEVICES, Setup
from sgpo_lib.plan_time import forward_flops
from sgpo_lib.shapes import find_shape

PHASES = ("sample", "verify", "score", "policy", "expert", "distil", "optimizer", "log", "rest")
"""Of a step, in the order in which they are shown; `rest` is what seconds_step has beyond the others."""
LEARNING = ("policy", "expert", "distil")
"""Phases with backward passes. With the optimizer they are the update."""
LARGE_MODEL = 10**9
"""Parameters above which sampling with `transformers` is told to be slow."""
SMALL_MODEL = 10**7
"""Parameters below which one thread is best."""
MUCH_PADDING, MUCH_VERIFYING = 0.3, 0.2
"""Shares of the tokens, and of the step, above which something is said about it."""
BUSY = 0.7
"""CPU seconds that each thread gets a second, below which the same is done."""


@dataclass(frozen=True)
class Pass:
    """A forward pass, with its backward pass where it learns."""

    tokens: int
    """Tokens, without padding."""
    seen: int
    """Pairs of a token and one that it attends to: n (n + 1) / 2 for a sequence of n tokens."""
    outputs: int
    """Tokens whose distribution is computed."""
    learns: bool


@dataclass(frozen=True)
class Draw:
    """What a sampler was asked for and gave. A prompt that came several times counts once."""

    prompts: int
    """Prompts that differ."""
    prompt_tokens: int
    prompt_seen: int
    """Pairs, as in `Pass`."""
    fed: int
    """Tokens that were given to the model after the prompt: all of a response but its last."""
    fed_seen: int
    longest: int
    """Most such tokens of one response."""


@dataclass(frozen=True)
class Machine:
    """What one device really does."""

    flops: float
    """FLOP a second of large matrix products in the model's type."""
    bandwidth: float
    """Bytes a second, read and written, of a large copy."""
    told: str
    """Where both come from."""


@dataclass
class Step:
    """One training step."""

    seconds: dict[str, float]
    """By phase, without `rest`."""
    whole: float
    """Seconds of the step."""
    row: Mapping[str, Any]
    """Its metrics."""
    memory: dict[str, int] = field(default_factory=dict)
    """Peak by phase; empty where it was not measured."""
    passes: dict[str, list[Pass]] = field(default_factory=dict)
    """By phase."""
    draws: list[Draw] = field(default_factory=list)

    @property
    def rest(self) -> float:
        """Seconds outside all phases."""
        return max(0.0, self.whole - sum(self.seconds.values()))


def setup_of(config: RunConfig) -> Setup | None:
    """What the formulas ask for; None for a model whose shape they do not know."""
    try:
        return Setup(config, find_shape(config.model)[0], DEVICES["cpu"], 0, 1, 1, 1)
    except ValueError:
        return None


def pass_flops(s: Setup, p: Pass) -> float:
    """FLOP of a pass. Forward: plan_time.py's, with 2 more for each parameter of an adapter and token. Backward: twice
    as much; with an adapter the base's matrices and the output matrix have no gradient of their own, which leaves once.
    """
    if not p.tokens:
        return 0.0
    adapter = 2.0 * s.trained * p.tokens if s.lora else 0.0
    forward = forward_flops(s, p.tokens, p.seen / p.tokens, p.outputs) + adapter
    if not p.learns:
        return forward
    attention = 4.0 * p.seen * s.shape.queries * s.shape.layers
    return 2 * forward + attention + adapter if s.lora else 3 * forward


def draw_flops(s: Setup, d: Draw) -> tuple[float, float]:
    """FLOP of (prompts, decoding)."""
    prompts = forward_flops(s, d.prompt_tokens, d.prompt_seen / max(1, d.prompt_tokens), d.prompts)
    return prompts, forward_flops(s, d.fed, d.fed_seen / max(1, d.fed), d.fed)


def draw_bytes(s: Setup, d: Draw) -> float:
    """Bytes that decoding reads: weights once in each of the fewest steps, each sequence's cache once a token."""
    steps = max(d.longest, math.ceil(d.fed / s.config.rollout.rollout_batch))
    looked_up = 0 if s.shape.tied else s.shape.vocabulary * s.shape.hidden  # rows of the embedding, not the whole
    return (steps * s.engine_size * (s.shape.parameters - looked_up)
            + d.fed_seen * s.shape.cache_per_token(s.engine_size))


def optimizer_bytes(s: Setup, updates: float) -> float:
    """AdamW reads weight, gradient and two moments of each parameter that trains and writes all but the gradient."""
    return 7.0 * s.trained * s.trained_size * updates


def flops(s: Setup, step: Step) -> dict[str, float]:
    """Model FLOP of a step by phase."""
    found = {phase: sum(pass_flops(s, p) for p in passes) for phase, passes in step.passes.items()}
    if step.draws and s.config.rollout.sampler != "server":  # that one has other devices
        found["sample"] = sum(sum(draw_flops(s, d)) for d in step.draws)
    return found


def floors(s: Setup, machine: Machine, step: Step) -> dict[str, float]:
    """Least seconds of a step's phases on a machine."""
    found = {phase: amount / machine.flops for phase, amount in flops(s, step).items()}
    if "sample" in found:
        found["sample"] = 0.0
        for d in step.draws:
            prompts, decoding = draw_flops(s, d)
            found["sample"] += prompts / machine.flops + max(decoding / machine.flops,
                                                             draw_bytes(s, d) / machine.bandwidth)
    if "optimizer" in step.seconds:
        found["optimizer"] = optimizer_bytes(s, step.row.get("updates", 1)) / machine.bandwidth
    return found


def steps_of(rows: Iterable[Mapping[str, Any]], config: RunConfig) -> list[Step]:
    """The training steps among a run's rows of metrics, with what the rows tell of the tokens."""
    found = []
    for row in rows:
        if row.get("kind") not in ("train", "supervised") or not row.get("seconds_step"):
            continue
        seconds, memory = ({p: row[f"{name}_{p}"] for p in PHASES if row.get(f"{name}_{p}") is not None}
                           for name in ("seconds", "memory"))
        step = Step(seconds, row["seconds_step"], row, memory)
        _estimate(step, config)
        found.append(step)
    return found


def _estimate(step: Step, config: RunConfig) -> None:
    """What one worker computed at least: the responses, all of the mean length. A row tells nothing of prompts."""
    row, method, train, data = step.row, config.method, config.train, config.data
    if row.get("response_length") is None or not row.get("tokens"):
        return
    problems = min(train.problems_per_step, round(data.n_train * (1 - data.warmup_share))) / config.compute.workers
    count = problems * (method.g1 + method.g2)
    fed = row["tokens"] / config.compute.workers - count
    step.draws = [Draw(0, 0, 0, round(fed), round(fed * (fed / count + 1) / 2), math.ceil(fed / count))]
    if method.expert == "none" and method.policy_gradient:
        taught = 1.0 if method.entropy_coefficient else 1 - row.get("zero_variance_share", 0.0)
        rows, length = problems * method.g1 * taught * train.updates_per_batch, row["response_length"]
        limit = train.micro_batch_tokens or math.inf
        parts = max(1, math.ceil(rows / train.micro_batch), math.ceil(rows * length / limit))
        tokens = rows * length / parts
        one = Pass(round(tokens), round(tokens * (length + 1) / 2), round(tokens), learns=True)
        step.passes["policy"] = [one] * parts


def summary(config: RunConfig, steps: Sequence[Step], machine: Machine | None) -> dict[str, Any]:
    """Everything that is shown of some steps, as plain data. A missing value is None."""
    s = setup_of(config)
    known = s is not None and machine is not None
    floor = [floors(s, machine, step) if s and machine else {} for step in steps]
    work = [flops(s, step) if known and s else {} for step in steps]
    total = sum(step.whole for step in steps)
    phases: dict[str, dict[str, float | None]] = {}
    for name in PHASES:
        times = [step.rest if name == "rest" else step.seconds.get(name, 0.0) for step in steps]
        if not sum(times):
            continue
        least = _median(f.get(name, 0.0) for f in floor) or None
        seconds = _median(times)
        phases[name] = {"seconds": seconds, "share": sum(times) / total, "floor": least,
                        "times": seconds / least if least else None,
                        "memory": max((step.memory.get(name, 0) for step in steps), default=0) or None}
    update = [sum(step.seconds.get(p, 0.0) for p in (*LEARNING, "optimizer")) for step in steps]
    learned = [sum(p.tokens for name in LEARNING for p in step.passes.get(name, ())) for step in steps]
    rate = machine.flops if machine else 0.0
    return {
        "profile": config.profile, "method": config.method.method, "source": config.model.source,
        "parameters": s.shape.parameters if s else None, "trained": s.trained if s else None, "steps": len(steps),
        "phases": phases, "step_seconds": _median(step.whole for step in steps), "total_seconds": total,
        "machine": {"flops": machine.flops, "bandwidth": machine.bandwidth, "told": machine.told} if machine else None,
        "sampled_per_second": _ratio((step.row.get("tokens", 0) for step in steps if "sample" in step.seconds),
                                     (step.seconds.get("sample", 0.0) for step in steps)),
        "trained_per_second": _ratio(learned, update),
        "update_utilisation": _ratio((sum(w.get(p, 0.0) for p in LEARNING) for w in work),
                                     (rate * t for t in update)),
        "step_utilisation": _ratio((sum(w.values()) for w in work), (rate * step.whole for step in steps)),
        "largest_pass": max((p.tokens for step in steps for ps in step.passes.values() for p in ps), default=0),
        "skipped_share": _mean(step.row.get("skipped_share") for step in steps),
        # a step without any pass has no padding, though its row says that all of nothing is
        "padding_share": _mean(x for x in (step.row.get("padding_share") for step in steps) if x != 1),
        "cpu_per_second": _ratio((step.row.get("cpu_seconds", 0.0) for step in steps), (x.whole for x in steps)),
    }


def advice(config: RunConfig, found: Mapping[str, Any], device: str, threads: int, attention: str) -> list[str]:
    """A line for each setting with which this run is slower than it need be. `device` is `cpu` or `cuda`."""
    train, rollout, size = config.train, config.rollout, found["parameters"] or 0
    lines, s = [], setup_of(config)
    dear = s.shape.layer / (2 * s.shape.queries) if s else math.inf  # S tokens: 4 Q S^2 is 2 S times a layer's numbers
    if s and train.layout in ("packed", "shared") and masked(s, train.micro_batch) and found["largest_pass"] > dear:
        lines.append(f"layout {train.layout!r} with attention {attention!r}: a mask makes attention compute all pairs "
                     f"of a pass's {found['largest_pass']:,} tokens, which is more than the rest of a layer. Cure: "
                     f"micro_batch_tokens={dear:.0f}, layout=right, or on a GPU attention=flash_attention_2")
    if rollout.sampler == "transformers" and size > LARGE_MODEL:
        lines.append(f"sampler 'transformers' for a model of {size / 1e9:.1f}B parameters: it decodes one batch until "
                     "its longest response ends. Cure: sampler=vllm")
    if attention == "eager":
        lines.append("attention 'eager' keeps the scores of all pairs of tokens. Cure: attention=sdpa")
    if threads > 1 and device == "cpu" and 0 < size < SMALL_MODEL:
        lines.append(f"{threads} threads for a model of {size / 1e6:.2g}M parameters, where they wait for one another. "
                     "Cure: torch_threads=1")
    elif threads > 1 and device == "cpu" and 0 < (found["cpu_per_second"] or 0.0) < BUSY * threads:
        lines.append(f"{threads} threads got {found['cpu_per_second']:.2f} CPU seconds a second: they wait, for one "
                     "another or for other programs. Cure: fewer torch_threads, or fewer programs beside this one")
    if (found["padding_share"] or 0) > MUCH_PADDING:
        lines.append(f"{found['padding_share']:.0%} of the places in passes are padding. Cure: a smaller micro_batch "
                     "or micro_batch_tokens (rows are sorted by length), or layout=packed")
    if device == "cuda" and config.model.dtype == "float32" and not config.model.compute_dtype:
        lines.append("float32 on a GPU, without its tensor cores. Cure: compute_dtype=bfloat16, or with an adapter "
                     "model.dtype=bfloat16")
    samples = train.problems_per_step * (config.method.g1 + config.method.g2)
    if config.method.objective == "rl" and rollout.rollout_batch < samples:
        lines.append(f"rollout_batch {rollout.rollout_batch} for {samples} responses a step: weights are read for "
                     f"{math.ceil(samples / rollout.rollout_batch)} batches in turn. Cure: a larger rollout_batch, "
                     "where memory allows")
    if found["phases"].get("verify", {}).get("share", 0.0) > MUCH_VERIFYING:
        lines.append(f"verifying takes {found['phases']['verify']['share']:.0%} of the step. Cure: more reward_workers")
    if train.activation_checkpointing:
        lines.append("activation_checkpointing computes every layer twice. Cure, where memory allows: "
                     "activation_checkpointing=false")
    return lines


def _median(values: Iterable[float]) -> float:
    return statistics.median([*values] or [0.0])


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _ratio(above: Iterable[float], below: Iterable[float]) -> float | None:
    a, b = sum(above), sum(below)
    return a / b if a and b else None

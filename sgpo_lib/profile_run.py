"""Training steps that are watched: which passes they make in which phase, and what this machine could do at best.

A session's policy and engine are asked what they asked before; what goes in and out is written down beside it. Nothing
is saved and nothing is evaluated.
"""

from __future__ import annotations

import collections
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sgpo_lib.batching import TokenBatch
from sgpo_lib.config import RunConfig, override
from sgpo_lib.config_checks import validate
from sgpo_lib.plan_setup import DEVICES
from sgpo_lib.profiling import Draw, Machine, Pass, Step
from sgpo_lib.rollouts.interface import Sample, SampleRequest
from sgpo_lib.runs import open_run
from sgpo_lib.session import Session, open_session
from sgpo_lib.supervised import expert_rows, supervised_step
from sgpo_lib.trainer import sgpo_step
from sgpo_lib.world import World

KNOWN_GPUS = {"H100 80GB HBM3": "h100", "H200": "h200", "A100-SXM4-80GB": "a100-80gb", "L40S": "l40s"}
"""Part of the name that CUDA tells -> of `DEVICES`."""
SIDE, COPY = {"cpu": 2048, "cuda": 8192}, {"cpu": 2**28, "cuda": 2**30}
"""Rows of the matrices, and bytes of the copy, that measure a machine."""
REPEATS = 5
"""Measurements of which the best counts."""


def shortened(config: RunConfig, steps: int) -> RunConfig:
    """The same run with a warm-up step and `steps` more, and nothing that comes beside steps.

    One step more than are made: a run's last step also stores what it sampled.
    """
    return validate(override(config, {
        "steps": steps + 2, "epochs": 0.0, "eval_every": 0, "eval_problems": 0, "save_every": 0, "n_test": 0,
        "transfer": {}, "benchmarks": {}, "track": ""}))


def profile(config: RunConfig, steps: int, say: Callable[[str], None]) -> tuple[list[Step], Machine, dict[str, Any]]:
    """Train in a temporary folder: (steps after the warm-up, this machine, how it was set up).

    Raises ValueError for a run on several workers or without steps, and what `open_session` raises.
    """
    if config.compute.workers > 1:
        raise ValueError(f"compute.workers: got {config.compute.workers}, expected 1: one worker is profiled. Leave it "
                         "out, or give the folder of a run on several workers")
    if config.method.objective == "none":
        raise ValueError(f"method {config.method.method!r} makes no training steps, so there is nothing to profile. "
                         "Take another --method")
    found, device, dtype, told = _watched(shortened(config, steps), steps, say)
    return found, measure(device, dtype), told


def _watched(config: RunConfig, steps: int, say: Callable[[str], None]) -> tuple[list[Step], torch.device, torch.dtype,
                                                                              dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory(prefix="sgpo-profile-") as root:
        run = open_run(config, Path(root))
        with open_session(config, run, World()) as session:
            rows = expert_rows(session)[0] if config.method.objective == "supervised" else []
            watch = Watch(session)
            try:
                for number in range(1, steps + 2):
                    found.append(_step(session, watch, number, rows))
                    say(f"step {number} of {steps + 1}: {found[-1].whole:.2f} s" +
                        (" (warm-up, not counted)" if number == 1 else ""))
            finally:
                session.interrupts.restore()
            model, device = session.policy.model, session.policy.device
            told = {"device": device.type, "threads": torch.get_num_threads(), "layout": config.train.layout,
                    "attention": getattr(model.config, "_attn_implementation", config.model.attention),
                    "memory_of": "torch's tensors on the GPU" if device.type == "cuda" else "the whole process"}
    return found[1:], device, getattr(torch, config.model.compute_dtype or config.model.dtype), told


def _step(session: Session, watch: Watch, number: int, rows: Sequence[Any]) -> Step:
    started, cpu = time.perf_counter(), time.process_time()
    session.seconds, session.work, session.memory = {}, collections.Counter(), {}
    watch.begin()
    metrics = supervised_step(session, number, rows) if rows else sgpo_step(session, number)
    row = metrics | {"kind": "supervised" if rows else "train", "step": number,
                     "cpu_seconds": time.process_time() - cpu}
    with session.phase("log"):
        session.run.log(row)
    session.interrupts.release()
    whole = time.perf_counter() - started
    session.step = number
    return Step(session.seconds, whole, row, session.memory, watch.passes(), watch.draws)


class Watch:
    """Writes down the forward passes and the samples of a session, by phase."""

    def __init__(self, session: Session):
        self.now = "rest"
        self.draws: list[Draw] = []
        self._passes: list[tuple[str, int, torch.Tensor, int, bool]] = []
        phase, hidden, sample = session.phase, session.policy.response_hidden, session.engine.sample

        @contextlib.contextmanager
        def watched_phase(name: str) -> Iterator[None]:
            before, self.now = self.now, name
            with phase(name):
                yield
            self.now = before

        def watched_hidden(batch: TokenBatch) -> torch.Tensor:
            places = batch.position_ids_RS + 1  # a token sees itself and all before it in its own sequence
            mask = batch.attention_mask_RS
            seen = (places if mask is None else places * mask).sum()  # read after the step: no wait for the GPU
            self._passes.append((self.now, batch.tokens, seen, len(batch.target_N), torch.is_grad_enabled()))
            return hidden(batch)

        def watched_sample(requests: Sequence[SampleRequest], **settings: Any) -> list[Sample]:
            samples = sample(requests, **settings)
            self.draws.append(draw_of([r.prompt_ids for r in requests], [len(s.token_ids) for s in samples]))
            return samples

        replaced: Any = session
        replaced.phase, replaced.policy.response_hidden = watched_phase, watched_hidden
        replaced.engine.sample = watched_sample

    def begin(self) -> None:
        """A step begins."""
        self.draws, self._passes = [], []

    def passes(self) -> dict[str, list[Pass]]:
        """The passes since then, by phase."""
        found: dict[str, list[Pass]] = {}
        for phase, tokens, seen, outputs, learns in self._passes:
            found.setdefault(phase, []).append(Pass(tokens, int(seen), outputs, learns))
        return found


def draw_of(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Draw:
    """What was sampled, from the prompt of each response and its number of tokens."""
    different = {tuple(p) for p in prompts}
    fed = [max(0, n - 1) for n in lengths]  # the first token comes with the prompt
    seen = sum(n * len(p) + n * (n + 1) // 2 for p, n in zip(prompts, fed, strict=True))
    return Draw(len(different), sum(map(len, different)), sum(len(p) * (len(p) + 1) // 2 for p in different),
                sum(fed), seen, max(fed, default=0))


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Matrix products and a copy on this device, the best of a few; of a known GPU the data sheet's products."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    name = torch.cuda.get_device_name(device) if kind == "cuda" else ""
    known = next((DEVICES[key] for part, key in KNOWN_GPUS.items() if part in name), None)
    if kind == "cuda":
        torch.cuda.empty_cache()
    source = torch.ones(COPY[kind] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPY[kind] / _best(lambda: target.copy_(source), device)
    told = f"a copy of {COPY[kind] / 2**20:.0f} MiB"
    if known:
        return Machine(known.bfloat16 if dtype == torch.bfloat16 else known.float32, bandwidth,
                       f"the data sheet of {name}, {told}")
    side = SIDE[kind]
    a, b = (torch.randn(side, side, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    rate = 2 * side**3 / _best(lambda: torch.mm(a, b, out=out), device)
    where = name or "this CPU"
    return Machine(rate, bandwidth, f"products of {side} x {side} matrices ({str(dtype).removeprefix('torch.')}) and "
                   f"{told}, measured on {where}")


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Least seconds of a few."""
    found = []
    for _ in range(REPEATS + 1):  # the first touches the memory
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])

"""What a training loop holds while it runs: policy, engine, verifier, problems, optimizer; how it saves and resumes.

A checkpoint is the state between two steps. Sampling seeds come from (seed, step, problem, sample), and the order of
problems from (seed, epoch), so weights, optimizer and torch's generator are all there is to restore; on a CPU a
resumed run repeats the uninterrupted one's metrics to the bit.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sgpo_lib.bases import base_source
from sgpo_lib.batching import Row, TokenBatch, micro_batches
from sgpo_lib.benchmarks import Benchmark
from sgpo_lib.config import RunConfig
from sgpo_lib.evaluation import Evaluation, Judge, evaluate
from sgpo_lib.guards import Guard
from sgpo_lib.guided_side import GuidedSide
from sgpo_lib.interrupts import Interrupts
from sgpo_lib.losses.token_kl import token_logp_and_entropy
from sgpo_lib.memory_check import require_memory
from sgpo_lib.parallel import process_group, spread
from sgpo_lib.peak_memory import peak_memory, restart_peak
from sgpo_lib.policy import Policy, load_policy, require_layout
from sgpo_lib.problems import Splits, load
from sgpo_lib.prompts import prompt_ids
from sgpo_lib.quarantine import left_out, without
from sgpo_lib.records import Problem
from sgpo_lib.rewards import Verifier
from sgpo_lib.rollouts.groups import judge_groups
from sgpo_lib.rollouts.interface import Engine
from sgpo_lib.rollouts.opening import open_engine
from sgpo_lib.runs import Run, load_run
from sgpo_lib.storage import write_atomic
from sgpo_lib.training_state import load_state, save_state
from sgpo_lib.verdict_rates import VerdictRates
from sgpo_lib.weight_files import remote_code
from sgpo_lib.world import World

Item = TypeVar("Item")
_SAME_MODEL = ("source", "revision", "lora_rank", "lora_alpha", "lora_targets")


@dataclass
class OpenModel:
    """A policy that can be sampled and judged on its problems: what a notebook needs to look at one."""

    config: RunConfig
    policy: Policy
    engine: Engine
    verifier: Verifier
    splits: Splits
    world: World
    rates: VerdictRates = field(default_factory=VerdictRates, kw_only=True)

    def evaluate(self, problems: Sequence[Problem], k: int, seed_key: tuple[object, ...],
                 judge: Judge = judge_groups) -> Evaluation:
        """avg@k of the unguided policy with the config's evaluation settings; responses end where the context does.

        Several workers share the problems; all of them get the whole result. Raises RuntimeError where the verifier
        fails (verdict_rates.py).
        """
        settings = self.config.evaluation
        longest = max((len(prompt_ids(self.policy.tokenizer, p, guided=False)) for p in problems), default=0)
        wanted = settings.eval_max_new_tokens or self.config.rollout.max_new_tokens
        mine = evaluate(self.engine, self.policy.tokenizer, self.verifier, self.world.share(problems), k=k,
                        temperature=settings.eval_temperature, top_p=settings.eval_top_p,
                        max_new_tokens=min(wanted, self.policy.context - longest), seed_key=seed_key,
                        judge=judge)
        whole = Evaluation(k, tuple(self.world.woven(mine.results)))
        self.rates.add([(r.problem_id, r.samples, r.reasons) for r in whole.results], "evaluation")
        return whole


@dataclass
class Session(OpenModel):
    """One run in progress."""

    run: Run
    optimizer: torch.optim.Optimizer
    guided_side: GuidedSide
    total_steps: int
    step: int = 0
    """Steps completed."""
    saved_step: int = 0
    """Step of the newest checkpoint; before the first step there is nothing to save."""
    best_loss: float = math.inf
    """Lowest validation loss so far (supervised runs)."""
    best_step: int = -1
    """Step of `best_loss`; -1 where there is none."""
    interrupts: Interrupts = field(default_factory=Interrupts)
    """Ctrl-C waits from the first update of a step to its end."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of the current step by phase."""
    memory: dict[str, int] | None = None
    """Peak bytes of the current step by phase (peak_memory.py); None where nobody asks for them."""
    work: collections.Counter = field(default_factory=collections.Counter)
    """Tokens of prompts and responses in the current step's passes: `computed`, `slots` with padding, `skipped`."""
    benchmarks: list[Benchmark] = field(default_factory=list)
    """Further test sets for the end."""
    guard: Guard = field(init=False)
    """Looks for NaN and infinity."""

    def __post_init__(self) -> None:
        self.guard = Guard(self.run.folder, self.policy, self.world)

    def evaluate(self, problems: Sequence[Problem], k: int, seed_key: tuple[object, ...],
                 judge: Judge | None = None) -> Evaluation:
        """As `OpenModel.evaluate`. Raises what `Guard.stop` does where a reward or a log-probability is not finite."""
        found = super().evaluate(problems, k, seed_key, judge or self.guard.judge)
        self.guard.stop(self.step)
        return found

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to `seconds[name]`; with `memory`, keep the highest peak of its blocks there."""
        device = self.policy.device
        measures = self.memory is not None and restart_peak(device)
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        if measures and self.memory is not None:
            self.memory[name] = max(self.memory.get(name, 0), peak_memory(device))

    def batch_of(self, items: Sequence[Item], step: int) -> list[Item]:
        """The items of a step (from 1): each epoch a new order, drawn from (seed, epoch); no item twice in a batch."""
        size = min(self.config.train.problems_per_step, len(items))
        per_epoch = len(items) // size
        epoch, position = divmod(step - 1, per_epoch)
        order = list(range(len(items)))
        random.Random(f"order-{self.config.seed}-{epoch}").shuffle(order)
        return [items[i] for i in order[position * size : (position + 1) * size]]

    def logp_and_entropy(self, batch: TokenBatch, *, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (nats) of every response token of a batch under the policy."""
        return token_logp_and_entropy(self.policy.response_hidden(batch), batch.target_N, self.policy.head(),
                                      self.config.train.kl_chunk_tokens, entropy_gradient=entropy_gradient)

    def micro_batches(self, rows: Sequence[Row], *, learns: bool, guided: bool = False) -> Iterator[list[int]]:
        """Indices of rows, micro-batch by micro-batch. Every worker makes as many passes as the one with most rows.

        The passes that are missing here follow the last one: on one token, with no weight. `learns` says whether the
        caller's have a backward pass, `guided` whether the guided side's states are computed before each.
        """
        train = self.config.train
        parts = list(micro_batches(rows, train.micro_batch, train.micro_batch_tokens, train.layout))
        missing = self.world.most(len(parts)) - len(parts)  # asked before the passes, which are collectives too
        yield from parts
        for _ in range(missing):
            token = self.policy.pad_id()
            batch = self.policy.token_batch([((token,), (token,))], self.config.train.layout)
            if guided:
                self.guided_side.states(batch)
            with torch.set_grad_enabled(learns):
                logp_N, _ = self.logp_and_entropy(batch)
                if learns:
                    (0.0 * logp_N.sum()).backward()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this worker's part of a loss; the workers' average is then that of the whole loss."""
        (loss * self.world.size).backward()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up from 0, then constant or falling to 0 (steps from 1)."""
        train = self.config.train
        warmup = math.ceil(train.lr_warmup_ratio * self.total_steps)
        if step <= warmup:
            return train.lr * step / (warmup + 1)
        left = 1 - (step - warmup - 1) / max(1, self.total_steps - warmup)
        scale = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[train.lr_schedule]
        return train.lr * scale

    def update(self, step: int) -> float:
        """One optimizer update with the gradients that stand; returns their norm before clipping.

        Raises FloatingPointError where gradients, weights or what led to them are not finite, before any weight
        changes, and where the update itself leads there.
        """
        with self.phase("optimizer"):
            return self._update(step)

    def _update(self, step: int) -> float:
        limit = self.config.train.max_grad_norm or math.inf
        self.policy.settle()
        parameters = self.policy.parameters()
        total: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
        self.guard.before_update(step, norm)
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.interrupts.hold()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.guided_side.follow()
        self.guard.after_update(step)
        return norm

    def save(self) -> None:
        """Checkpoint the state after `step` steps. All workers call it; the first names and completes the folder.

        Raises FloatingPointError where a number in it is not finite; nothing is written then.
        """
        def write(folder: Path) -> None:
            save_state(self.policy, self.optimizer, self.guided_side.copies, Path(self.world.from_first(str(folder))),
                       self.world.first)
            self.world.wait()

        self.guard.require_finite(self.step, "before saving", self._rest())
        state = {"best_loss": self.best_loss, "best_step": self.best_step, "weights": self.policy.fingerprint(),
                 "workers": self.world.size}
        protected = (self.best_step,) if self.best_step >= 0 else ()
        if self.world.first:
            self.run.save_checkpoint(self.step, write, state, self.config.train.keep_checkpoints, protected)
        else:
            write(Path())
        self.world.wait()
        self.saved_step = self.step

    def _rest(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds beside the weights, by name."""
        yield from ((f"guided side {i}", copy) for i, copy in enumerate(self.guided_side.copies))
        for i, state in enumerate(self.optimizer.state.values()):
            yield from ((f"optimizer {name} {i}", value) for name, value in state.items() if isinstance(value, Tensor))

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint, made by any number of workers."""
        self.guided_side.copies = load_state(self.policy, self.optimizer, folder)
        self.step, self.best_loss, self.best_step = state["step"], state["best_loss"], state["best_step"]
        self.saved_step = self.step


def open_model(config: RunConfig, policy: Policy | None = None, folder: Path | None = None,
               world: World | None = None) -> OpenModel:
    """Load problems and policy (with the weights of `init_from`, where it is set), ready to sample and judge.

    A given `policy` takes the place of the one that `config` names. `folder` is where weights are put for a sampler
    that has its own copy; without it a temporary one. `world` are the workers that train it, None where nobody does.

    The verifier's processes start on first use and end with this process, or with `verifier.close()`.
    Raises ValueError for whatever cannot work: problems, model, weights.
    """
    if config.train.torch_threads:
        torch.set_num_threads(config.train.torch_threads)
    splits = load(config.data)
    given = policy is not None and config.rollout.sampler == "transformers"
    source = "" if given else base_source(config.model)
    if policy is None:
        require_memory(config, source)
        policy = load_policy(config.model, source, config.seed)
        if config.train.init_from:
            policy.load((world or World()).by_first(lambda: final_weights(config.train.init_from, config)))
        if world:
            require_layout(policy, config.train.layout)
            policy = spread(policy, config, world)
    engine = open_engine(config, policy, source, folder, world)
    return OpenModel(config, policy, engine, Verifier(config.reward), splits, world or World())


@contextlib.contextmanager
def open_session(config: RunConfig, run: Run, world: World) -> Iterator[Session]:
    """A training session: the model, an optimizer, and the number of steps. Raises what `open_model` raises."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(config, world))
        model = open_model(config, folder=run.folder / "delivery", world=world)
        if config.model.trust_remote_code and world.first:
            write_atomic(run.folder / "remote_code.json", json.dumps(remote_code(), indent=1))
        stack.enter_context(contextlib.closing(model.engine))
        stack.enter_context(model.verifier)
        policy, splits, train = model.policy, model.splits, config.train
        if config.method.objective != "none":
            splits = without(splits, world.by_first(lambda: left_out(model.splits, config.data, run.folder)))
        if train.activation_checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(policy.parameters(), lr=train.lr, betas=(train.adam_beta1, train.adam_beta2),
                                      weight_decay=train.weight_decay, foreach=False)
        supervised = config.method.objective == "supervised"
        items = (splits.warmup or splits.train) if supervised else splits.train
        per_epoch = max(1, len(items) // min(train.problems_per_step, len(items)))
        total = math.ceil(train.epochs * per_epoch) if train.epochs else train.steps
        total = 0 if config.method.objective == "none" else total
        guided_side = GuidedSide(policy, config.method.guided_side, config.method.ema_decay)
        yield Session(config, policy, model.engine, model.verifier, splits, world, run, optimizer, guided_side, total)


def final_weights(run_folder: str, config: RunConfig) -> Path:
    """Folder with a run's final weights.

    Raises ValueError where the run does not exist, has not finished, trained another base or adapter, or is damaged.
    """
    run = load_run(run_folder)
    theirs = {name: getattr(run.config.model, name) for name in _SAME_MODEL}
    other = [f"model.{n}: {v!r} there, {getattr(config.model, n)!r} here" for n, v in theirs.items()
             if v != getattr(config.model, n)]
    if other:
        raise ValueError(f"train.init_from: run {run.folder} has weights of another model:\n  " + "\n  ".join(other))
    if not run.done:
        raise ValueError(f"train.init_from: run {run.folder} has not finished (state: {run.state}). Finish it first")
    return run.final()

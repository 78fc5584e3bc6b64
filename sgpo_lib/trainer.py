"""Training: Algorithm 1 of the paper as one loop, read top to bottom.

`train(config)` opens the run folder, loads, loops over steps, evaluates, saves and finishes. `sgpo_step` is one
iteration of Algorithm 1; every RL method is that step with other fields (g2 = 0 and no distillation is GRPO). What a
batch means for the weights is in `objective.py`.
"""

from __future__ import annotations

import collections
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sgpo_lib.benchmarks import load_benchmarks
from sgpo_lib.collapse import tell_signs
from sgpo_lib.config import RunConfig, override
from sgpo_lib.evaluation import Evaluation
from sgpo_lib.objective import accumulate, autonomous_logp, plan
from sgpo_lib.problems import load, require_solutions, require_strategies
from sgpo_lib.prompts import expert_text, prompt_ids, response_ids
from sgpo_lib.records import Problem
from sgpo_lib.rollouts.groups import rollout_rows, sample_groups
from sgpo_lib.rollouts.interface import sample_seed
from sgpo_lib.runs import Run, Stopped, locked, open_run, stop_requested
from sgpo_lib.session import Session, open_session
from sgpo_lib.sources.catalogue import readable
from sgpo_lib.sources.rows import normalised
from sgpo_lib.step_metrics import step_metrics, step_sums
from sgpo_lib.storage import write_atomic
from sgpo_lib.supervised import expert_rows, require_room, supervised_step, validation_loss
from sgpo_lib.tracking import Tracker
from sgpo_lib.verdict_rates import counted
from sgpo_lib.world import World

OnRow = Callable[[dict[str, Any]], None]
KEEP_ROLLOUTS_EVERY = 10
"""Steps between stored rollouts (the first and the last step's are always stored)."""


def train(config: RunConfig, *, name: str | None = None, root: Path | None = None,
          on_row: OnRow | None = None) -> Run:
    """Train to the end and return the finished run; a finished run is returned at once, a stopped one continues.

    `on_row` receives every row of metrics (also, on resuming, the earlier ones). Raises ValueError for anything
    that cannot work, before any work; RuntimeError where another process writes the run.
    """
    run = open_run(config, root, name)
    if run.done:
        run.same_problems(load(config.data).fingerprint)
        for row in run.metrics() if on_row else ():
            on_row(row)  # type: ignore[misc]
        return run
    with locked(run.folder):
        try:
            tell = tell_signs(run.folder.name, run.metrics())

            def take(row: dict[str, Any]) -> None:
                tell(row)
                if on_row:
                    on_row(row)

            if config.compute.workers > 1:
                from sgpo_lib.distributed import train_on_ray

                train_on_ray(work, config, run, take)
            else:
                work(config, run, World(), take)
        except Exception as error:  # recorded and raised again; an interrupted run has not failed, it continues
            run.fail(error)
            raise
    return run


def work(config: RunConfig, run: Run, world: World, on_row: OnRow | None = None) -> None:
    """One worker's part of a training, from wherever the run stands to its end. Raises what `train` raises."""
    with open_session(config, run, world) as session:
        if world.size > 1:
            workers = world.woven([{"host": socket.gethostname(), "process": os.getpid(),
                                    "device": str(session.policy.device)}])
            if world.first:
                write_atomic(run.folder / "workers.json", json.dumps(workers, indent=1))
        if world.first:
            run.same_problems(session.splits.fingerprint)
        _check(session)
        _resume(session)
        for row in run.metrics() if on_row else ():
            on_row(row)  # type: ignore[misc]
        _loop(session, on_row)


def _loop(session: Session, on_row: OnRow | None) -> None:
    config, run, world = session.config, session.run, session.world
    supervised = config.method.objective == "supervised"
    rows, held_rows = expert_rows(session) if supervised else ([], [])
    tracker = Tracker(config.train.track if world.first else "", run)
    evaluated = world.from_first({row["step"] for row in run.metrics("eval")})

    def log(row: dict[str, Any]) -> None:
        if not world.first:
            return
        with session.phase("log"):
            run.log(row)
            tracker.log(row)
            if on_row:
                on_row(row)

    def validate(step: int) -> None:
        if supervised:
            loss = validation_loss(session, held_rows)
            if step and loss < session.best_loss:  # the untrained start is no checkpoint
                session.best_loss, session.best_step = loss, step
            log({"kind": "eval", "step": step, "validation_loss": loss})
        elif session.splits.validation and config.evaluation.eval_problems:
            problems = session.splits.validation[: config.evaluation.eval_problems]
            evaluation = session.evaluate(problems, config.evaluation.eval_k, (config.seed, "eval", step))
            log({"kind": "eval", "step": step, **evaluation.row()})

    def complete(step: int) -> None:
        """Validation and checkpoint after a step; of a step that was cut off there, what is missing."""
        every, last = config.evaluation.eval_every, step == session.total_steps
        due = last or step == 0 or bool(every and step % every == 0)
        if due and step not in evaluated:
            validate(step)
        keep = bool(config.train.save_every and step % config.train.save_every == 0)
        if step and (step == session.best_step or ((last or keep) and step != session.saved_step)):
            session.save()

    session.guard.require_finite(session.step, "at the start")
    try:
        complete(session.step)
        for step in range(session.step + 1, session.total_steps + 1):
            started, cpu = time.perf_counter(), time.process_time()
            logged = session.seconds.get("log", 0.0)  # of the rows since the last step: a row cannot tell its own
            session.seconds, session.work = {"log": logged}, collections.Counter()
            session.memory = {} if session.policy.device.type == "cuda" else None
            torch.manual_seed(sample_seed(config.seed, "dropout", step, world.rank))  # else nothing draws from torch's
            metrics = supervised_step(session, step, rows) if supervised else sgpo_step(session, step)
            seconds = {f"seconds_{k}": v for k, v in session.seconds.items()}
            memory = {f"memory_{k}": v for k, v in (session.memory or {}).items()}
            session.seconds = {}
            spent = sum(world.woven([time.process_time() - cpu]))
            log({"kind": "supervised" if supervised else "train", "step": step, **metrics, **seconds,
                 **memory, "seconds_step": time.perf_counter() - started + logged, "cpu_seconds": spent})
            session.step = step
            session.interrupts.release()
            complete(step)
            if step < session.total_steps and world.from_first(stop_requested(run.folder)):
                raise Stopped(f"asked to stop after step {step} of {session.total_steps}")
        _finish(session, log)
    except KeyboardInterrupt:
        if not session.interrupts.holding and session.step != session.saved_step:
            session.save()  # the state after the last whole step: only the current step is lost
        raise
    finally:
        session.interrupts.restore()
        tracker.close()


def sgpo_step(session: Session, step: int) -> dict[str, Any]:
    """One iteration of Algorithm 1 (lines 4 to 21); returns the step's metrics."""
    config, train_config = session.config, session.config.train
    batch = session.batch_of(session.splits.train, step)  # line 4
    problems = session.world.share(batch)

    with session.phase("sample"):  # lines 6 to 8
        groups = sample_groups(session.engine, session.policy.tokenizer, problems, config, step)
    with session.phase("verify"):  # line 9
        session.guard.judge(session.verifier, groups)
    session.guard.stop(step)
    verdicts = [counted(g.problem.id, [o.verdict for o in g.responses]) for g in groups]
    session.rates.add(session.world.woven(verdicts), f"step {step}")
    session.engine.rest()
    with session.phase("score"):  # lines 11 to 15
        works = plan(session, groups)
        size = train_config.mini_batch or len(batch)
        several = train_config.updates_per_batch > 1 or size < len(batch)
        old_logp = autonomous_logp(session, works) if several else None

    sums: collections.Counter = collections.Counter()
    updates = 0  # lines 10, 14, 19 and 21
    for _ in range(train_config.updates_per_batch):
        for start in range(0, len(batch), size):
            mine = range(session.world.rank, len(batch), session.world.size)  # where my problems are in the batch
            part = [w for i, w in zip(mine, works, strict=True) if start <= i < start + size]
            accumulate(session, part, old_logp, sums)
            norm = session.update(step)  # of all workers' gradient: counted once
            sums.update({"grad_norm": norm if session.world.first else 0.0})
            updates += 1

    sums.update(step_sums(session, groups, works))
    sums = session.world.added(sums)
    row = step_metrics(session, sums, updates, step) | session.engine.report()
    gap, limit = row["sampler_trainer_gap"], config.rollout.max_gap
    if step == 1 or step == session.total_steps or step % KEEP_ROLLOUTS_EVERY == 0 or not gap <= limit:
        kept = session.world.woven([rollout_rows([group]) for group in groups])
        if session.world.first:
            session.run.write_rollouts(step, [row for rows in kept for row in rows])
    if not gap <= limit:  # not a number is no small gap
        raise RuntimeError(f"step {step}: sampler and trainer log-probabilities differ by {gap:.3g} nats a token in "
                           f"the mean, more than rollout.max_gap = {limit:g}. The sampler is not this policy: look at "
                           "its dtype, its model and its --logprobs-mode. The step is not kept; its rollouts are")
    return row


def _check(session: Session) -> None:
    """Refuse problems that cannot be trained on. Raises ValueError."""
    config, splits = session.config, session.splits
    everything = [*splits.warmup, *splits.train, *splits.validation, *splits.test]
    everything += transfer_problems(config) if config.evaluation.transfer else ()
    guided = config.method.objective == "rl" and config.method.g2 > 0
    if guided:
        require_strategies(splits.train, splits.source)
    if config.method.objective == "rl" and config.method.expert != "none":
        require_solutions(splits.train, splits.source)
        tokenizer = session.policy.tokenizer
        for problem in splits.train:
            row = prompt_ids(tokenizer, problem, guided=False), response_ids(tokenizer, expert_text(problem))
            require_room(problem, row, session.policy.context)
    readable(everything, session.verifier, splits.source)
    session.benchmarks = load_benchmarks(config, splits, session.verifier)
    everything += [p for benchmark in session.benchmarks for p in benchmark.problems]
    room = session.policy.context - config.rollout.max_new_tokens
    for problem in everything:
        length = len(prompt_ids(session.policy.tokenizer, problem, guided=guided and problem.strategy is not None))
        if length > room:
            raise ValueError(f"problem {problem.id}: prompt of {length} tokens leaves no room for max_new_tokens = "
                             f"{config.rollout.max_new_tokens} in a context of {session.policy.context}. Lower "
                             "max_new_tokens or leave the problem out")


def _resume(session: Session) -> None:
    """Continue from the newest whole checkpoint; without one, drop what an earlier start may have logged.

    Damaged checkpoints are set aside. Raises ValueError where all are damaged.
    """
    first = session.world.first
    newest = session.world.by_first(session.run.newest_checkpoint)
    if newest:
        session.restore(newest, json.loads((newest / "state.json").read_text(encoding="utf-8")))
        if first:
            print(f"{session.run.folder.name}: resumed after step {session.step}", file=sys.stderr, flush=True)
    if first:  # rows of steps that come again
        session.run.forget_after(session.step if newest else -1)
    session.world.wait()


def transfer_problems(config: RunConfig) -> tuple[Problem, ...]:
    """The second test set of `evaluation.transfer`, without what the run learns or validates on.

    Other counts and seeds split the same source otherwise, so texts of the first set's training part may come up here.
    Raises what `problems.load` raises, and ValueError where no problem is left.
    """
    changes = {"bad_strategies": "", "bad_share": 0.0} | config.evaluation.transfer
    found = load(override(config, {f"data.{name}": value for name, value in changes.items()}).data).test
    first = load(config.data)
    seen = {normalised(p.prompt) for p in (*first.warmup, *first.train, *first.validation)}
    kept = tuple(p for p in found if normalised(p.prompt) not in seen)
    if not kept:
        raise ValueError(f"evaluation.transfer: got {config.evaluation.transfer}, which gives {len(found)} test "
                         "problems, none of them new to the run. Set n_test above 0 in it, or other problem_args")
    return kept


def _finish(session: Session, log: OnRow) -> None:
    """Final weights, final evaluation on the test problems (and those of `transfer`), summary, DONE."""
    run, config = session.run, session.config
    if session.best_step >= 0 and session.best_step != session.step:
        session.policy.load(session.world.by_first(lambda: run.checkpoint(session.best_step)))

    def write(folder: Path) -> None:
        session.policy.save(Path(session.world.from_first(str(folder))))

    if session.world.first:
        run.save_final(write)
    else:
        write(Path())
    weights = session.policy.fingerprint()
    rows = run.metrics()
    summary: dict[str, Any] = {
        "method": config.method.method, "profile": config.profile, "seed": config.seed, "steps": session.step,
        "best_step": session.best_step if session.best_step >= 0 else session.step,
        "problems": session.splits.fingerprint, "weights": weights, "workers": session.world.size,
        "revision": getattr(session.policy.model.config, "_commit_hash", None),
        "seconds": sum(r.get("seconds_step", 0.0) for r in rows),
        "cpu_seconds": sum(r.get("cpu_seconds", 0.0) for r in rows), "tokens": sum(r.get("tokens", 0) for r in rows)}

    def test(name: str, problems: Sequence[Problem], k: int, *key: object) -> Evaluation:
        evaluation = session.evaluate(problems, k, (config.seed, *key))
        if session.world.first:
            evaluation.write(run.folder / "evaluation" / f"{name}.jsonl")
        return evaluation

    if session.splits.test:
        evaluation = test("test", session.splits.test, config.evaluation.test_k, "test")
        summary["test"] = evaluation.summary()
        if not run.metrics("test"):  # it is there when only DONE was missing
            log({"kind": "test", "step": session.step, **evaluation.row()})
    if config.evaluation.transfer:
        evaluation = test("transfer", transfer_problems(config), config.evaluation.test_k, "transfer")
        summary["transfer"] = evaluation.summary()
    for benchmark in session.benchmarks:
        evaluation = test(f"benchmark-{benchmark.name}", benchmark.problems, benchmark.k, "benchmark", benchmark.name)
        summary.setdefault("benchmarks", {})[benchmark.name] = evaluation.summary() | benchmark.told
    if session.world.first:
        run.finish(summary)

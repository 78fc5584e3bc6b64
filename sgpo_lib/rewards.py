"""Judge responses: the parent's side of the verifier, whose worker processes are killed at a deadline.

`Verifier.judge` reads the final answer (`answers.py`), settles plain numbers and identical texts at once
(`equivalence.py`), and sends the rest to a `pebble.ProcessPool`, one task per distinct (gold, answer), which
`reward_worker.py` does there. A response that hangs or kills its worker therefore costs its own verdict and one
restart. The user's `module:function` and the scorers of reasoning-gym run in the same workers, under the same deadline
and 2 GiB of address space. A worker imports neither torch nor transformers, nor the script that started it.
Order: answers, equivalence, reward_worker, rewards.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing.process
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from decimal import Decimal
from multiprocessing import context, spawn
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from sgpo_lib import reward_worker
from sgpo_lib.answers import after_thinking, extract_answer
from sgpo_lib.config import RewardConfig
from sgpo_lib.equivalence import Node, Unparsed, matches, too_hard
from sgpo_lib.equivalence import read as read_pair
from sgpo_lib.records import Problem, Verdict
from sgpo_lib.reward_worker import Outcome

__all__ = ["Verifier", "extract_answer"]

log = logging.getLogger(__name__)

CACHE_SIZE = 50_000
"""Judgements of Math-Verify that are remembered, by (gold, answer)."""
START_SECONDS = 60.0
"""Longest wait for a worker to start, per task that may have ended one."""
Key = tuple[Any, ...]
"""(kind of task, ...): what identifies a task within a call; for Math-Verify (`math`, gold, answer)."""


# --------------------------------------------------------------------------------------- what needs no worker


class _Undecided(Exception):
    """The comparison needs computer algebra."""


class _Plain:
    """`equivalence.Algebra` that knows none: undecided, or unparsed where the answer is too hard to try."""

    def equal(self, gold: str, answer: str) -> bool:
        if too_hard(answer):
            raise Unparsed("too long, too deep or too large")
        raise _Undecided

    def same_relation(self, gold: list[str], answer: list[str]) -> bool:
        raise _Undecided

    def same_set(self, gold: Node, answer: Node) -> bool:
        raise _Undecided


def _settle(gold: str, answer: str) -> Outcome | None:
    """What needs no worker: nothing to read, the same text, plain numbers."""
    try:
        pair = read_pair(gold, answer or "0")
        if not answer:
            return ("score", 0.0)
        return ("score", float(pair is None or matches(*pair, _Plain())))
    except Unparsed as error:
        return ("unverifiable", error.reason)
    except _Undecided:
        return None
    except (ValueError, RecursionError):  # untrusted text: too many digits or levels for Python itself
        return ("unverifiable", "unparsed")


# ------------------------------------------------------------------------------------------------ worker pool


class _WorkerProcess(context.SpawnProcess):
    """A spawned process that does not run the main script again.

    Spawn re-imports `__main__` in the child, for functions defined there. Ours are not, and a training script would
    load torch, exceed the memory limit, or start itself again where it has no `if __name__ == "__main__"`.
    """

    _lock = threading.Lock()

    @staticmethod
    def _Popen(process_obj: multiprocessing.process.BaseProcess) -> Any:
        original = spawn.get_preparation_data

        def without_main(name: str) -> dict[str, Any]:
            data = original(name)
            if name == process_obj.name:
                data = {k: v for k, v in data.items() if not k.startswith("init_main")}
            return data

        with _WorkerProcess._lock:
            spawn.get_preparation_data = without_main
            try:
                return context.SpawnProcess._Popen(process_obj)
            finally:
                spawn.get_preparation_data = original


class _WorkerContext(context.SpawnContext):
    Process = _WorkerProcess


def _stop(holder: dict[str, Any]) -> None:
    if (pool := holder.pop("pool", None)) is not None:
        pool.stop()
        pool.join()


class Verifier:
    """Judges responses by the run's reward. Workers start on first need; close it, or use it in a `with` block.

    Safe to call from any thread, from asyncio (it blocks) and from a notebook. Raises ValueError for a reward that
    names no module.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._modules: set[str] = set()
        self._cache: OrderedDict[Key, Outcome] = OrderedDict()
        self._lock = threading.RLock()
        self._holder: dict[str, Any] = {}
        weakref.finalize(self, _stop, self._holder)
        if config.reward != "math":
            module, colon, function = config.reward.partition(":")
            top = module.split(".")[0]
            here = Path(module.replace(".", "/"))
            known = here.with_suffix(".py").exists() or here.is_dir() or (bool(top) and importlib.util.find_spec(top))
            if not (colon and function and known):
                raise ValueError(
                    f"reward.reward: got {config.reward!r}, expected 'math' or 'module:function' of a module that "
                    "can be imported from the current directory or the environment")  # fmt: skip
            self._modules.add(module)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers. A later call starts them again."""
        with self._lock:
            _stop(self._holder)

    def judge(self, items: Sequence[tuple[Problem, str | None]]) -> list[Verdict]:
        """Verdicts on completions, in order. Identical (gold, answer) pairs are judged once.

        Raises ValueError where the user's reward returns something other than a number from 0 to 1, or a problem
        names a scorer that does not exist; RuntimeError where the workers cannot be started.
        """
        texts = [(problem, completion or "", extract_answer(completion)) for problem, completion in items]
        jobs = [self._job(i, *r) for i, r in enumerate(texts)]
        outcomes = self._outcomes(dict(jobs))
        return [_verdict(outcomes[key], answer, key[0]) for (key, _), (_, _, answer) in zip(jobs, texts, strict=True)]

    def audit(self, problems: Sequence[Problem]) -> list[tuple[Problem, str]]:
        """Problems whose gold answer Math-Verify cannot read, with the reason. Those with a scorer are not asked."""
        if self.config.reward != "math":
            return []
        asked = [p for p in problems if not p.scorer]
        outcomes = self._outcomes({("gold", p.answer): (p.answer,) for p in asked})
        found = [(p, outcomes["gold", p.answer]) for p in asked]
        return [(p, str(reason)) for p, (status, reason) in found if status != "score"]

    def decimals(self, texts: Sequence[str]) -> dict[str, Decimal | None]:
        """Real values of constants (LaTeX) in 30 digits; None for what is none or cannot be read."""
        outcomes = self._outcomes({("decimal", text): (text,) for text in texts})
        return {text: Decimal(value) if status == "score" and value else None
                for (_, text), (status, value) in outcomes.items()}

    def check_gold(self, answer: str) -> str:
        """Why a gold answer cannot be used (`bad_gold`, `timeout`, ...), or `""`."""
        return next((reason for _, reason in self.audit([Problem("gold", "", answer)])), "")

    def _job(self, index: int, problem: Problem, completion: str, answer: str) -> tuple[Key, tuple[Any, ...]]:
        """What a worker is asked about one item, under a key that equal questions to Math-Verify share."""
        if problem.scorer:
            source, _, name = problem.scorer.partition(":")
            if source != "reasoning-gym" or not name:
                raise ValueError(f"problem {problem.id}: got scorer {problem.scorer!r}, expected 'reasoning-gym:NAME'")
            entry = {"question": problem.prompt, "answer": problem.answer,
                     "metadata": problem.meta.get("metadata", {})}  # fmt: skip
            return ("gym", index), (name, entry, answer or after_thinking(completion).strip())
        if self.config.reward != "math":
            return ("user", index), (self.config.reward, completion, asdict(problem))
        return ("math", problem.answer, answer), (problem.answer, answer)

    def _outcomes(self, jobs: dict[Key, tuple[Any, ...]]) -> dict[Key, Outcome]:
        with self._lock:
            done: dict[Key, Outcome] = {k: self._cache[k] for k in jobs if k in self._cache}
            for key in (k for k in jobs if k[0] == "math" and k not in done):
                if (settled := _settle(*jobs[key])) is not None:
                    done[key] = settled
            todo = {k: a for k, a in jobs.items() if k not in done}
            if any(k[0] == "gym" for k in todo) and "reasoning_gym" not in self._modules:
                self._modules.add("reasoning_gym")
                _stop(self._holder)  # new workers load it before their clock runs
            done |= self._in_workers(todo)
            for key, outcome in done.items():
                # A timeout or crash may be the machine's fault: not remembered.
                read = outcome[0] == "score" or outcome[1] in ("unparsed", "bad_gold")
                if key[0] in ("math", "gold", "decimal") and read:
                    self._cache[key] = outcome
                    self._cache.move_to_end(key)
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        for status, value in done.values():
            if status == "refused":
                raise ValueError(value)
        return done

    def _in_workers(self, todo: dict[Key, tuple[Any, ...]]) -> dict[Key, Outcome]:
        """All tasks at once; those that a broken pool lost are asked again one by one, so that blame is exact."""
        done = self._round(todo)
        for key in [k for k in todo if k not in done]:
            again = self._round({key: todo[key]})
            done[key] = again.get(key, ("unverifiable", "crash: the worker ended"))
        return done

    def _round(self, todo: dict[Key, tuple[Any, ...]]) -> dict[Key, Outcome]:
        if not todo:
            return {}
        pool, deadline = self._pool(), self.config.reward_deadline_s
        done: dict[Key, Outcome] = {}
        try:
            futures = {k: pool.schedule(reward_worker.work, args=(k[0], a), timeout=deadline) for k, a in todo.items()}
        except RuntimeError:  # the pool broke since its last use
            _stop(self._holder)
            return done
        for key, future in futures.items():
            try:
                done[key] = future.result(timeout=START_SECONDS + (deadline + START_SECONDS) * len(todo))
            except FutureTimeout:
                if not future.done():
                    _stop(self._holder)
                    raise RuntimeError(f"verifier workers gave no answer and no timeout within {START_SECONDS:.0f} s: "
                                       "can this machine start Python processes?") from None  # fmt: skip
                done[key] = ("unverifiable", "timeout")
            except ProcessExpired as error:
                done[key] = ("unverifiable", f"crash: the worker ended with code {error.exitcode}")
            except (BrokenProcessPool, CancelledError):  # another task's doing, perhaps
                _stop(self._holder)
        return done

    def _pool(self) -> ProcessPool:
        if (pool := self._holder.get("pool")) is None or not pool.active:
            _stop(self._holder)
            pool = self._holder["pool"] = ProcessPool(
                max_workers=self.config.reward_workers, context=_WorkerContext(),
                initializer=reward_worker.start, initargs=(str(Path.cwd()), sorted(self._modules)))  # fmt: skip
        return pool


def _verdict(outcome: Outcome, answer: str, kind: str) -> Verdict:
    """Reasons are one word, for counting; a crash of the user's own reward also says what was raised."""
    status, value = outcome
    if status == "unverifiable":
        reason, _, message = value.partition(": ")
        if message:
            log.warning("a response could not be judged (%s)", value)
        return Verdict("unverifiable", 0.0, value if kind == "user" else reason, answer[:200])
    if kind == "math" and not answer:
        return Verdict("wrong", 0.0, "no_answer")
    return Verdict("correct" if value >= 1.0 - 1e-9 else "wrong", value, "", answer[:200])

"""Judge responses: the parent's side of the verifier, whose worker processes are killed at a deadline.

`Verifier.judge` reads the final answer (`answers.py`), settles plain numbers and identical texts at once
(`equivalence.py`), and has the rest done by workers (`worker_pool.py`), one task per distinct (gold, answer), which
`reward_worker.py` does there. A response that hangs or kills its worker therefore costs its own verdict and one
restart. The user's `module:function` and the scorers of reasoning-gym run in the same workers, under the same deadline
and 2 GiB of address space. A worker imports neither torch nor gmpy2, nor the script that started it.
Order: answers, equivalence, reward_worker, worker_pool, rewards.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any

from sgpo_lib.answers import MAX_LENGTH, after_thinking, extract_answer
from sgpo_lib.config import RewardConfig
from sgpo_lib.equivalence import Node, Unparsed, matches, too_hard
from sgpo_lib.equivalence import read as read_pair
from sgpo_lib.records import Problem, Verdict
from sgpo_lib.reward_worker import Outcome
from sgpo_lib.worker_pool import Key, WorkerPool

__all__ = ["Verifier", "extract_answer"]

log = logging.getLogger(__name__)

CACHE_SIZE = 50_000
"""Judgements of Math-Verify that are remembered, by (gold, answer), where both are short."""


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


# --------------------------------------------------------------------------------------------------- verifier


class Verifier:
    """Judges responses by the run's reward. Workers start on first need; close it, or use it in a `with` block.

    Safe to call from any thread, from asyncio (it blocks) and from a notebook. Raises ValueError for a reward that
    names no module.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._cache: OrderedDict[Key, Outcome] = OrderedDict()
        self._lock = threading.RLock()
        self._pool = WorkerPool(config.reward_workers, config.reward_deadline_s, [])
        weakref.finalize(self, self._pool.stop)
        if config.reward != "math":
            module, colon, function = config.reward.partition(":")
            top = module.split(".")[0]
            here = Path(module.replace(".", "/"))
            known = here.with_suffix(".py").exists() or here.is_dir() or (bool(top) and importlib.util.find_spec(top))
            if not (colon and function and known):
                raise ValueError(
                    f"reward.reward: got {config.reward!r}, expected 'math' or 'module:function' of a module that "
                    "can be imported from the current directory or the environment")  # fmt: skip
            self._pool.modules.append(module)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers. A later call starts them again."""
        with self._lock:
            self._pool.stop()

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
            if any(k[0] == "gym" for k in todo) and "reasoning_gym" not in self._pool.modules:
                self._pool.modules.append("reasoning_gym")
                self._pool.stop()  # new workers load it before their clock runs
            judged = self._pool.run(todo)
            for key, (status, value) in judged.items():
                # A timeout or crash may be the machine's fault: not remembered.
                read = status == "score" or value in ("unparsed", "bad_gold")
                if key[0] in ("math", "gold", "decimal") and read and sum(map(len, key)) < 2 * MAX_LENGTH:
                    self._cache[key] = status, value
            done |= judged
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        for status, value in done.values():
            if status == "refused":
                raise ValueError(value)
        return done


def _verdict(outcome: Outcome, answer: str, kind: str) -> Verdict:
    """Reasons are one word, for counting; a crash of the user's own reward also says what was raised."""
    status, value = outcome
    if status == "unverifiable":
        reason, _, message = value.partition(": ")
        if message:
            log.warning("a response could not be judged (%s)", value)
        return Verdict("unverifiable", 0.0, value if kind == "user" else reason, answer[:200])
    if kind == "math" and not answer:
        return Verdict("unverifiable", 0.0, "no_answer")
    return Verdict("correct" if value >= 1.0 - 1e-9 else "wrong", value, "", answer[:200])

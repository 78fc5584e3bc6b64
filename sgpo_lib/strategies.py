"""Strategies spoiled on purpose, to see what training does with them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from sgpo_lib.records import Problem, Strategy


def spoiled(problem: Problem, kind: str, others: Sequence[Problem]) -> Problem:
    """The problem with a bad strategy, marked in `meta`; the same one for the same arguments.

    `wrong`: that of one of `others` with another problem type. `vague`: the right type and no method. `leaking`: the
    steps, and then the worked solution (or, without one, the answer). Raises ValueError for a problem without a
    strategy, or where `wrong` finds no other type.
    """
    if problem.strategy is None:
        raise ValueError(f"problem {problem.id} has no strategy that could be spoiled. Set data.bad_strategies=''")
    there = problem.strategy
    if kind == "wrong":
        found = {p.strategy.problem_type: p.strategy for p in others if p.strategy}
        types = sorted(set(found) - {there.problem_type})
        if not types:
            raise ValueError(f"data.bad_strategies='wrong': every problem is of the type {there.problem_type!r}. Take "
                             "'vague' or 'leaking', or problems of several types")
        bad = found[types[int(hashlib.sha256(problem.id.encode()).hexdigest(), 16) % len(types)]]
    elif kind == "vague":
        bad = Strategy(there.problem_type, "Reason step by step", ("Reason step by step",))
    else:
        shown = problem.solution or f"The answer is {problem.answer}"
        bad = Strategy(there.problem_type, there.strategy, (*there.steps, shown))
    return dataclasses.replace(problem, strategy=bad, meta={**problem.meta, "bad_strategy": kind})


def is_spoiled(problem: Problem) -> bool:
    """Whether `spoiled` made its strategy."""
    return "bad_strategy" in problem.meta

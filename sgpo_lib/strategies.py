"""Strategies: simple checks for what a strategy must not hold (paper, section 3.1 and criterion (iv) of appendix B),
and strategies spoiled on purpose, to see what training does with them.

Extraction from strong responses comes with a later version; here is what needs no model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence

from sgpo_lib.prompts import strategy_text
from sgpo_lib.records import Problem, Strategy

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:[.,/]\d+)*")
_COMPUTATION = re.compile(r"\d\s*[-+*/×÷^=]\s*\d|=\s*-?\d")
LONGEST_WORDS = 150


def leak_flags(problem: Problem, strategy: Strategy) -> list[str]:
    """Reasons to look at a strategy by eye; empty where none was found.

    `answer`: the gold answer stands in it as a number or a phrase. `computation`: two numbers joined by an operator,
    or an equation. `numbers`: numbers taken from the problem. `long`: above 150 words. `empty`: a part is missing.
    """
    text = strategy_text(strategy)
    numbers = set(_NUMBER.findall(text))
    flags = []
    answer = problem.answer.strip()
    if answer in numbers or (len(answer) > 2 and not answer.isdigit()
                             and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text)):
        flags.append("answer")
    if _COMPUTATION.search(text):
        flags.append("computation")
    if numbers & set(_NUMBER.findall(problem.prompt)):
        flags.append("numbers")
    if len(text.split()) > LONGEST_WORDS:
        flags.append("long")
    if not (strategy.problem_type.strip() and strategy.strategy.strip() and strategy.steps):
        flags.append("empty")
    return flags


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

"""Strategies: simple checks for what a strategy must not hold (paper, section 3.1 and criterion (iv) of appendix B).

Extraction from strong responses comes with a later version; here are the checks that need no model.
"""

from __future__ import annotations

import re

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

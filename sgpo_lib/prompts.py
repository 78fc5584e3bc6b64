"""Prompt templates: the only place where problem and strategy become text for the model.

Departure from the paper: the guided prompt is not published. Ours puts the strategy before the problem in the user
turn, so that both prompts end in the same words and differ only by the strategy. `data.guided_prompt` words it
otherwise.
"""

from __future__ import annotations

import re
from typing import Any

from sgpo_lib.records import Problem, Strategy


def strategy_text(strategy: Strategy) -> str:
    """The three components in their fixed form (paper, Table 4): `Problem type`, `Strategy`, `Steps: (a) ...`."""
    steps = " ".join(f"({chr(ord('a') + i)}) {step}" for i, step in enumerate(strategy.steps))
    return f"Problem type: {strategy.problem_type}\nStrategy: {strategy.strategy}\nSteps: {steps}"


def autonomous_text(problem: Problem) -> str:
    """User turn of pi(.|q)."""
    return f"{problem.prompt}\n{problem.style.instruction}"


def guided_text(problem: Problem, strategy: Strategy) -> str:
    """User turn of pi(.|q,s): by default the strategy, then exactly the autonomous turn."""
    parts = {"strategy": strategy_text(strategy), "problem": autonomous_text(problem)}
    return re.sub(r"\{(strategy|problem)\}", lambda found: parts[found[1]], problem.style.guided)


def prompt_ids(tokenizer: Any, problem: Problem, *, guided: bool) -> tuple[int, ...]:
    """Token ids of a prompt, through the tokenizer's chat template, up to where the answer begins.

    Raises ValueError when a guided prompt is asked for and the problem has no strategy, or when the tokenizer has
    no chat template.
    """
    if guided and problem.strategy is None:
        raise ValueError(f"problem {problem.id} has no strategy, so there is no guided prompt for it")
    text = guided_text(problem, problem.strategy) if guided and problem.strategy else autonomous_text(problem)
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruct model, or set "
                         "tokenizer.chat_template in the model's folder")
    messages = [{"role": "user", "content": text}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def expert_text(problem: Problem) -> str:
    """The expert solution; one without a box (GSM8K's, for one) gets a last sentence that boxes the answer."""
    if "\\boxed{" in problem.solution:
        return problem.solution
    return f"{problem.solution.rstrip()}\nThe answer is \\boxed{{{problem.answer}}}."


def response_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a written response (an expert solution), the end token appended."""
    return (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)

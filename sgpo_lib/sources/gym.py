"""Problems of reasoning-gym, as a stream without end.

Traps: it draws problem i from `seed + i`, so neighbouring seeds share problems (we hash the seed); some of its data
sets follow the order of Python sets (`SET_ORDERED`); Math-Verify would misjudge some answers (`_gym_problem`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sgpo_lib.config import unknown
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.sources.rows import digest, normalised, strategy

SET_ORDERED = ("intermediate_integration", "isomorphic_strings", "knight_swap", "polynomial_multiplication",
               "ransom_note", "word_ladder")  # fmt: skip
"""Data sets of reasoning-gym 0.1.25 that give other problems in another process, unless PYTHONHASHSEED=0."""


def gym_problems(name: str, args: Mapping[str, Any], seed: int) -> Iterator[Problem]:
    """Problems of a reasoning-gym data set without end. Arguments are checked before the first one is drawn."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(f"reasoning-gym:{name}: the package is not installed: pip install sgpo-workbench[lab]")
    datasets = importlib.import_module("reasoning_gym.factory").DATASETS
    if name not in datasets:
        raise unknown("reasoning-gym data set", name, datasets)
    if name in SET_ORDERED and sys.flags.hash_randomization:
        raise ValueError(f"reasoning-gym:{name} gives other problems in every process, as it follows the order of "
                         "Python sets: set PYTHONHASHSEED=0 before Python or Jupyter starts")
    make, config = datasets[name]
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name not in ("seed", "size")}
    for arg in (a for a in args if a not in defaults):
        what = f"argument of reasoning-gym:{name} (its seed is data_seed, its size n_train and so on)"
        raise unknown(what, arg, defaults)

    def entries() -> Iterator[tuple[Any, dict[str, Any]]]:
        for chunk in itertools.count():
            key = int(digest("reasoning-gym", seed, chunk)[:8], 16) >> 1
            dataset = make(config(**args, seed=key, size=1000))
            for index in range(1000):
                state = random.getstate()  # some data sets draw from the global generator: seed it, put it back
                random.seed(key + index)
                entry = dataset[index]
                random.setstate(state)
                yield dataset, entry

    try:
        dataset, entry = next(entries())
    except (AssertionError, TypeError, ValueError, KeyError, AttributeError) as error:  # foreign code, user's values
        raise ValueError(f"data.problem_args of reasoning-gym:{name}: got {dict(args)}, which the data set refuses "
                         f"({type(error).__name__}: {error}). Its defaults: {defaults}") from error
    p = _gym_problem(name, entry)
    if p.scorer and dataset.score_answer(p.answer, {**entry, **p.meta}) < dataset.score_answer(entry["answer"], entry):
        raise ValueError(f"reasoning-gym:{name} cannot be used: its scorer refuses its own gold answer once the "
                         "problem has been stored as JSON. Take another data set")
    return (_gym_problem(name, entry) for _, entry in entries())


def _gym_problem(name: str, entry: Mapping[str, Any]) -> Problem:
    """An entry as a Problem. Math-Verify judges it where the gold answer is a whole number.

    Every other answer goes to the data set's own scorer: words and grids, but also fractions (in lowest terms, where
    Math-Verify would pay for the fraction of the question) and decimals (rounded, or with the data set's tolerance).
    """
    prompt, answer = entry["question"], "" if entry["answer"] is None else str(entry["answer"])
    metadata = json.dumps(entry["metadata"], default=lambda v: sorted(v, key=repr) if isinstance(v, set) else str(v))
    return Problem(
        id=f"{name}-{digest(normalised(prompt))[:8]}", prompt=prompt, answer=answer, family=name,
        strategy=strategy_templates().get(name), solution=_gym_solution(name, entry["metadata"], answer),
        scorer="" if re.fullmatch(r"-?(0|[1-9][0-9]*)", answer) else f"reasoning-gym:{name}",
        meta={"metadata": json.loads(metadata)},
    )  # fmt: skip


def _gym_solution(name: str, metadata: Mapping[str, Any], answer: str) -> str:
    """Worked solution of chain_sum and gsm_symbolic; empty for others, or where it does not end at the gold answer."""
    if name == "chain_sum":
        first, *rest = metadata["expression"].split()
        total, worked = int(first), ""
        for sign, term in zip(rest[::2], rest[1::2], strict=True):
            before, total = total, total + int(sign + "1") * int(term)
            worked += f"{before} {sign} {term} = {total}. "
        return f"{worked}The answer is \\boxed{{{total}}}." if str(total) == answer else ""
    if name == "gsm_symbolic":
        worked, mark, end = metadata["answer_cot"].rpartition("####")
        same = end.strip() in (answer, f"{answer}.0")  # some of its traces end in 15.0 where the answer is 15
        return f"{worked.rstrip()}\n\\boxed{{{answer}}}" if mark and same else ""
    return ""


@functools.cache
def strategy_templates() -> dict[str, Strategy]:
    """The written strategies of `strategy_templates.yaml`: reasoning-gym data set -> Strategy."""
    raw = yaml.safe_load(Path(__file__).parent.with_name("strategy_templates.yaml").read_text(encoding="utf-8"))
    return {name: strategy(entry, f"{name}.") for name, entry in raw.items()}

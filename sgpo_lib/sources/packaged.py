"""Problems that come in packages: the collection that ships with the workbench, and CHAMP (extra `extract`)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import yaml

from sgpo_lib.sources.rows import Distinct

COLLECTION = Path(__file__).parent.with_name("collection")
"""YAML files, one a subject; written for this project (collection/README.md)."""


@functools.cache
def collection_rows() -> tuple[dict[str, Any], ...]:
    """The collection as it is written: problem, solution and five rated candidates each."""
    files = sorted(COLLECTION.glob("*.yaml"))
    return tuple(row for file in files for row in yaml.safe_load(file.read_text(encoding="utf-8")))


def collection_problems() -> Distinct:
    """The problems of the shipped collection, each with the best rated candidate as its strategy."""
    found = Distinct("collection")
    for row in collection_rows():
        best = max(row["candidates"], key=lambda c: sum(c["scores"].values()))
        found.add({"id": row["id"], "prompt": _unwrapped(row["problem"]), "answer": row["answer"],
                   "solution": _unwrapped(row["solution"]), "family": row["subject"],
                   "strategy": {k: best[k] for k in ("problem_type", "strategy", "steps")},
                   "level": row["level"], "candidates": row["candidates"]}, row["id"])  # fmt: skip
    return found


def _unwrapped(text: str) -> str:
    """Paragraphs on one line each; the files wrap them."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text.strip())


@functools.cache
def champ_problems() -> Distinct:
    """The 270 competition problems of CHAMP (Mao, Kim and Zhou, 2024, MIT), solution steps as lines; hints in `meta`.

    Its answers are plain text in CHAMP's own notation: those that Math-Verify cannot read are found by the audit.
    Raises ValueError where the package is missing.
    """
    if importlib.util.find_spec("champ_dataset") is None:
        raise ValueError("champ: the package champ-dataset is not installed: pip install sgpo-workbench[extract]")
    dataset = importlib.import_module("champ_dataset").load("v0")
    found = Distinct("champ")
    for name, problem in dataset.problems.items():
        hints = [dataset.hints[key].text for key in dict.fromkeys(problem.ch_list) if key in dataset.hints]
        found.add({"id": name, "prompt": problem.text, "answer": problem.answer, "family": problem.category,
                   "solution": "\n".join(step.text for step in problem.solution.steps), "hints": hints}, name)
    return found

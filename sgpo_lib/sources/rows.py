"""A row of data as a `Problem`, with errors that name the field; and the distinct problems of a finite source.

No text occurs twice in what a source gives: the first row of a text is kept, and repeats are counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgpo_lib.records import Problem, Strategy

SPLITS = ("train", "validation", "test")


def normalised(prompt: str) -> str:
    """The text by which two problems are the same: white space and case folded."""
    return " ".join(prompt.split()).casefold()


def digest(*parts: Any) -> str:
    """SHA-256 (64 hex digits) of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass
class Distinct:
    """The distinct problems of a finite source, in its order."""

    stem: str
    """Begins the id of a problem that has none."""
    rows: dict[str, tuple[str, Problem, str]] = field(default_factory=dict)
    """Normalised text -> (where it stands, problem, `split` or "")."""
    repeats: list[bool] = field(default_factory=list)
    """One entry per repeated text: whether its answer was another one."""
    ids: dict[str, str] = field(default_factory=dict)

    def add(self, raw: Mapping[str, Any], at: str) -> None:
        """Take a row. Raises ValueError for a faulty field, an id that another row has, or two splits of one text."""
        problem, split = row_problem(raw, self.stem, at)
        if raw.get("id") is not None and self.ids.setdefault(problem.id, at) != at:
            raise ValueError(f"id: got {problem.id!r}, which {self.ids[problem.id]} has too: make ids unique")
        key = normalised(problem.prompt)
        first, kept, before = self.rows.setdefault(key, (at, problem, split))
        if split and before and split != before:
            raise ValueError(f"split: got {split!r}, but {first} has the same prompt in {before!r}: keep one")
        self.rows[key] = (first, kept, before or split)
        if first != at:
            self.repeats.append(problem.answer != kept.answer)

    def problems(self) -> list[tuple[Problem, str]]:
        """The problems with their `split` ("" where none was given)."""
        return [(problem, split) for _, problem, split in self.rows.values()]

    def told(self) -> str:
        """How many problems, and how many repeats were left out: for a person."""
        repeated = f"; {len(self.repeats)} repeats left out, {sum(self.repeats)} of them with another answer"
        return f"{len(self.rows)} distinct problems{repeated if self.repeats else ''}"


def row_problem(raw: Mapping[str, Any], stem: str, at: str) -> tuple[Problem, str]:
    """A row as a Problem and its split ("" where none is given). Unknown fields go to `meta`, as does `at`."""
    key = next((k for k in ("prompt", "problem", "question") if k in raw), "prompt")
    prompt, split, meta = text(raw, key), text(raw, "split", ""), {} if raw.get("meta") is None else raw["meta"]
    if split not in ("", *SPLITS):
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    if not isinstance(meta, dict):
        raise ValueError(f"meta: {got(meta)}, expected an object")
    used = {key, "answer", "solution", "split", "meta", "id", "family", "strategy"}
    return Problem(
        id=f"{stem}-{digest(normalised(prompt))[:12]}" if raw.get("id") is None else text(raw, "id"),
        prompt=prompt, answer=text(raw, "answer"), solution=text(raw, "solution", ""),
        strategy=None if raw.get("strategy") is None else strategy(raw["strategy"], "strategy."),
        family=text(raw, "family", ""), meta={**{k: v for k, v in raw.items() if k not in used}, **meta, "at": at},
    ), split  # fmt: skip


def got(value: Any) -> str:
    """A wrong value as an error message shows it."""
    return f"got {json.dumps(value, default=str)[:60]} ({type(value).__name__})"


def text(raw: Mapping[str, Any], field: str, default: str | None = None, prefix: str = "") -> str:
    """Text of a field; with a default it may be missing, null or empty. An id or answer may be a whole number."""
    value = default if raw.get(field) is None else raw[field]
    value = str(value) if field in ("id", "answer") and type(value) is int else value
    if isinstance(value, str) and (default is not None or value.strip()) and not re.search("[\ud800-\udfff]", value):
        return value
    shown = got(value) if field in raw else f"missing from {', '.join(raw) or 'an empty object'}"
    cure = "put the number in quotes" if isinstance(value, float) else "fill it in or remove the line"
    raise ValueError(f"{prefix}{field}: {shown}, expected text, not empty and without broken surrogates: {cure}")


def strategy(raw: Any, prefix: str) -> Strategy:
    """A strategy from `{"problem_type": ..., "strategy": ..., "steps": [...]}`. Raises ValueError."""
    if not isinstance(raw, dict):
        raise ValueError(f"{prefix.rstrip('.')}: {got(raw)}, expected an object with problem_type, strategy, steps")
    steps = raw.get("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
        raise ValueError(f"{prefix}steps: {got(steps)}, expected a list of texts, none of them empty")
    return Strategy(text(raw, "problem_type", prefix=prefix), text(raw, "strategy", prefix=prefix), tuple(steps))


def first_by_hash(part: Sequence[Problem], count: int, purpose: str, seed: int) -> tuple[list[Problem], list[Problem]]:
    """The `count` problems that come first by hash, and the others; both keep their order."""
    first = {p.id for p in sorted(part, key=lambda p: digest(purpose, seed, normalised(p.prompt)))[:count]}
    return [p for p in part if p.id in first], [p for p in part if p.id not in first]

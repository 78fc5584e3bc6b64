"""What extraction makes of one problem: its candidates with scores and leaks, the choice, and the reasons.

An `Extraction` is one line of `strategies.jsonl`, which `data.strategies` reads as it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgpo_lib.records import Problem, Strategy
from sgpo_lib.sources.rows import got, text
from sgpo_lib.sources.rows import strategy as read_strategy

CRITERIA = ("type", "strategy", "steps", "no_leak")
"""The four criteria of the paper's Table 5 and Appendix H: problem type right and specific; strategy appropriate,
specific, non-trivial; steps at the right abstraction; nothing computed or revealed. 0 to 1 each."""
STATUSES = ("kept", "leaking", "no strategy", "left out")
"""`kept`: a strategy to train on; `leaking`: in quarantine; `no strategy`: no candidate could be read; `left out`: the
response was not asked about."""


@dataclass(frozen=True)
class Leak:
    """A place where a strategy gives something away."""

    start: int
    """First character of the strategy's text (`prompts.strategy_text`)."""
    end: int
    """One past the last."""
    kind: str
    """`answer` or `intermediate`."""
    form: str
    """How it was written: `number`, `words`, `expression`, `relation`, ..."""
    text: str
    """The characters themselves."""


@dataclass(frozen=True)
class Candidate:
    """One of the five descriptions."""

    text: str
    """The reply as it came."""
    strategy: Strategy | None = None
    """What was read from it; None where it is malformed."""
    reason: str = ""
    """Why the reply is not in the asked form; "" where it is."""
    first_reply: str = ""
    """The malformed reply that was asked for again; "" where the first was good."""
    first_reason: str = ""
    """What was wrong with it."""
    score: float | None = None
    """Overall score of the scoring call, 0 to 1; None where it gave none."""
    criteria: Mapping[str, float] | None = None
    """A judge's rating of each of `CRITERIA`."""
    leaks: tuple[Leak, ...] = ()
    """What the leak check found."""
    kind: str = ""
    """What it was written as (shipped collection): good, vague, too detailed, wrong type, leaking."""
    comment: str = ""
    """Reason for the rating, where there is one."""

    @property
    def quality(self) -> float | None:
        """Mean of the four criteria (paper, Appendix H); None where one is missing."""
        if not self.criteria or any(c not in self.criteria for c in CRITERIA):
            return None
        return sum(self.criteria[c] for c in CRITERIA) / len(CRITERIA)


@dataclass(frozen=True)
class Extraction:
    """A problem, its candidates and the one retained."""

    problem: Problem
    """With the strong response as its solution."""
    candidates: tuple[Candidate, ...]
    """In the order in which the scoring call saw them."""
    chosen: int | None
    """Index of the retained candidate: the highest score among those that could be read."""
    status: str
    """One of `STATUSES`."""
    notes: tuple[str, ...] = ()
    """What was odd: about the response, about replies, about scores. First words of each are counted."""
    score_reply: str = ""
    """The scoring reply as it came."""
    engine: str = ""
    """Model that was asked."""

    @property
    def best(self) -> Candidate | None:
        """The retained candidate."""
        return None if self.chosen is None else self.candidates[self.chosen]


def to_row(found: Extraction) -> dict[str, Any]:
    """The extraction as one JSON object: id and strategy on top, as `data.strategies` wants them."""
    problem, best = found.problem, found.best
    row: dict[str, Any] = {"id": problem.id, "status": found.status}
    if best is not None and best.strategy is not None:
        row |= dataclasses.asdict(best.strategy)
    row |= {"prompt": problem.prompt, "answer": problem.answer, "solution": problem.solution,
            "family": problem.family, "chosen": found.chosen, "notes": list(found.notes), "engine": found.engine,
            "score_reply": found.score_reply}  # fmt: skip
    return _storable(row | {"candidates": [_candidate_row(c) for c in found.candidates]})


def _storable(value: Any) -> Any:
    """The value with U+FFFD for every half of a surrogate pair, which no file can hold."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {k: _storable(v) for k, v in value.items()}
    return [_storable(v) for v in value] if isinstance(value, list | tuple) else value


def _candidate_row(candidate: Candidate) -> dict[str, Any]:
    row = dataclasses.asdict(candidate)
    return {k: v for k, v in row.items() if v not in ("", None, (), {}) or k == "text"}


def from_row(row: Mapping[str, Any]) -> Extraction:
    """The extraction of a line. Raises ValueError for a faulty field."""
    status = text(row, "status")
    if status not in STATUSES:
        raise ValueError(f"status: got {status!r}, expected one of {', '.join(STATUSES)}")
    raw = _listed(row, "candidates")
    candidates = tuple(_candidate(c, f"candidates[{i}].") for i, c in enumerate(raw))
    chosen = row.get("chosen")
    if chosen is not None and not (type(chosen) is int and 0 <= chosen < len(candidates)):
        raise ValueError(f"chosen: got {chosen!r}, expected the index of one of {len(candidates)} candidates, or null")
    notes = _listed(row, "notes")
    if not all(isinstance(note, str) for note in notes):
        raise ValueError(f"notes: {got(notes)}, expected a list of texts")
    problem = Problem(id=text(row, "id"), prompt=text(row, "prompt"), answer=text(row, "answer", ""),
                      solution=text(row, "solution", ""), family=text(row, "family", ""))
    return Extraction(problem, candidates, chosen, status, tuple(notes), text(row, "score_reply", ""),
                      text(row, "engine", ""))


def _listed(raw: Mapping[str, Any], name: str, prefix: str = "") -> list[Any]:
    """A list, empty where it is missing or null."""
    value = [] if raw.get(name) is None else raw[name]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{prefix}{name}: {got(value)}, expected a list")
    return list(value)


def _candidate(raw: Any, prefix: str) -> Candidate:
    if not isinstance(raw, dict):
        raise ValueError(f"{prefix.rstrip('.')}: {got(raw)}, expected an object")
    known = {f.name for f in dataclasses.fields(Candidate)}
    if odd := sorted(set(raw) - known):
        raise ValueError(f"{prefix}{odd[0]}: unknown field, expected some of {', '.join(sorted(known))}")
    if raw.get("text") is None:
        raise ValueError(f"{prefix}text: missing, expected the reply as it came")
    names = ("text", "reason", "first_reply", "first_reason", "kind", "comment")
    criteria = raw.get("criteria")
    if criteria is not None and not isinstance(criteria, dict):
        raise ValueError(f"{prefix}criteria: {got(criteria)}, expected an object with a number for each criterion")
    return Candidate(
        **{name: text(raw, name, "", prefix) for name in names},
        strategy=None if raw.get("strategy") is None else read_strategy(raw["strategy"], f"{prefix}strategy."),
        score=None if raw.get("score") is None else _unit(raw["score"], f"{prefix}score"),
        criteria=criteria and {c: _unit(v, f"{prefix}criteria.{c}") for c, v in criteria.items()},
        leaks=tuple(_leak(leak, f"{prefix}leaks[{i}]") for i, leak in enumerate(_listed(raw, "leaks", prefix))),
    )


def _unit(value: Any, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{at}: {got(value)}, expected a number from 0 to 1")
    return value


def _leak(raw: Any, at: str) -> Leak:
    kinds = {"start": int, "end": int, "kind": str, "form": str, "text": str}
    if not isinstance(raw, dict) or set(raw) != set(kinds) or any(type(raw[k]) is not t for k, t in kinds.items()):
        raise ValueError(f"{at}: {got(raw)}, expected an object with start and end (whole numbers), kind, form, text")
    return Leak(**raw)

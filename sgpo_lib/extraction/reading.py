"""Read what a model replied: a strategy description, scores, ratings. No reply raises; each gives a value or a reason.

The asked form of a description is that of the paper's Table 4:

    Problem type: ...
    Strategy: ...
    Steps: (a) ... (b) ... (c) ...

A description in Markdown or JSON with the same three parts can be read as well. It has a reason all the same
(`markdown`, `json`), so that it is asked for again, and taken where the second reply is no better.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

from sgpo_lib.extraction.records import CRITERIA
from sgpo_lib.records import Strategy

LONGEST = 4_000
"""Characters above which a description is none (a whole solution, or a loop)."""
MOST_STEPS = 12
_LABELS = {"problem type": "problem_type", "strategy": "strategy", "steps": "steps", "procedural steps": "steps"}
_LABEL = re.compile(r"^[ \t#>*_\-\d.)]*+(problem type|procedural steps|strategy|steps)[ \t]*[*_]*[ \t]*:"
                    r"[ \t]*[*_]*", re.IGNORECASE | re.MULTILINE)
_STEP = re.compile(r"(?:^[ \t]*(?P<mark>(?:[-*•]|\d{1,2}[.)])[ \t]+)|(?<=\s)|^)(?P<bold>\*\*|__)?\(?(?P<letter>[a-z])\)"
                   r"(?:\*\*|__)?\s+", re.MULTILINE)
_MARKDOWN = re.compile(r"\*\*|^[ \t]*(?:#{1,6}|[-*>]) |^[ \t]*\d+\. ", re.MULTILINE)
_BULLET = re.compile(r"^\s*(?:[-*•]\s+)?(?:\*\*|__)?(?:\(?\w{1,2}[.)](?:\*\*|__)?\s+)?")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\.?\d")


def read_strategy_reply(reply: str) -> tuple[Strategy | None, str]:
    """(strategy, "") for the asked form; (strategy, reason) where the form is another; (None, reason) where none is
    there.

    Reasons: `empty`, `json`, `markdown`, `no problem type`, `no strategy`, `no steps`, `two steps needed`,
    `part twice`, `too long`.
    """
    text = _after_thinking(reply).strip()
    if not text:
        return None, "empty"
    if len(text) > LONGEST:
        return None, "too long"
    if (found := _from_json(text)) is not None:
        return found, "json"
    marks = list(_LABEL.finditer(text))
    parts: dict[str, str] = {}
    for mark, after in itertools.zip_longest(marks, marks[1:]):
        name = _LABELS[mark[1].lower()]
        if name in parts:
            return None, "part twice"
        parts[name] = text[mark.end() : after.start() if after else len(text)].strip()
    for name, reason in (("problem_type", "no problem type"), ("strategy", "no strategy"), ("steps", "no steps")):
        if not _plain(parts.get(name, "")):
            return None, reason
    steps, lettered = _steps(parts["steps"])
    if len(steps) < 2 or len(steps) > MOST_STEPS:
        return None, "two steps needed" if len(steps) < 2 else "too long"
    found = Strategy(_plain(parts["problem_type"]), _plain(parts["strategy"]), tuple(steps))
    return found, "" if lettered and not _MARKDOWN.search(text) else "markdown"


def _after_thinking(reply: str) -> str:
    """What stands after the last end of thinking; a reply that never ends thinking says nothing."""
    before, mark, after = reply.rpartition("</think>")
    return after if mark else ("" if "<think>" in reply else before + after)


def _steps(text: str) -> tuple[list[str], bool]:
    """The steps that say something, plain, and whether they are lettered (a), (b), ... in order."""
    marks: list[re.Match[str]] = []
    for mark in _STEP.finditer(text):  # a step may name an earlier one: "by step (a)"
        if mark["letter"] == chr(ord("a") + len(marks)):
            marks.append(mark)
    if len(marks) > 1:
        ends = [m.start() for m in marks[1:]] + [len(text)]
        steps = [_plain(text[m.end() : end]) for m, end in zip(marks, ends, strict=True)]
        asked = not text[: marks[0].start()].strip() and not any(m["mark"] or m["bold"] for m in marks)
        return [s for s in steps if s], asked and all(steps)
    lines = [_plain(_BULLET.sub("", line)) for line in text.splitlines()]
    return [line for line in lines if line], False


def _plain(text: str) -> str:
    """One line that can be stored, without Markdown's marks around it."""
    text = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    return " ".join(re.sub(r"\*\*|__|`|^\s*[-*>]\s+", "", text).split()).strip(" *_")


def _from_json(text: str) -> Strategy | None:
    """A strategy from a JSON object, in a code block or bare; None where there is no such object."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    if found is None or not re.fullmatch(r"(?:```\w*\s*)?\{.*\}(?:\s*```)?", text, re.DOTALL):
        return None
    try:
        raw = json.loads(found[0], strict=False)
    except (ValueError, RecursionError):  # a model's text
        return None
    if not isinstance(raw, dict):
        return None
    raw = {re.sub(r"[\s_]+", " ", str(k)).strip().lower(): v for k, v in raw.items()}
    kind, strategy = raw.get("problem type"), raw.get("strategy")
    steps: Any = raw.get("steps", raw.get("procedural steps"))
    steps = list(steps.values()) if isinstance(steps, dict) else steps
    steps = _steps(steps)[0] if isinstance(steps, str) else steps
    if not (isinstance(kind, str) and isinstance(strategy, str) and isinstance(steps, list)):
        return None
    told = [_plain(_BULLET.sub("", s)) if isinstance(s, str) else "" for s in steps]
    kind, strategy = _plain(kind), _plain(strategy)
    if not all([kind, strategy, *told]) or not 2 <= len(told) <= MOST_STEPS:
        return None
    return Strategy(kind, strategy, tuple(told))


def read_scores(reply: str, count: int) -> tuple[list[float | None], list[str]]:
    """`Score: [s1, ..., s5]` as `count` scores, None for one that is missing or out of range, and the reasons.

    The last bracket with numbers after the word `score` counts. Nothing is guessed: 8 of 10 is out of range.
    """
    text = _after_thinking(reply)
    named = re.findall(r"scores?\W{0,6}\[([^\[\]]*)\]", text, re.IGNORECASE)
    found = named or re.findall(r"^[ \t]*\[([^\[\]]*)\][ \t\r]*$", text, re.MULTILINE)
    if not found:
        return [None] * count, ["no scores"]
    last = next((f for f in reversed(found) if _NUMBER.search(f)), found[-1])
    reasons = []
    scores: list[float | None] = []
    parts = [p.strip() for p in last.split(",")] if last.strip() else []
    for part in parts[:count]:
        score = _unit(part.rpartition(":")[2].rpartition("=")[2])
        scores.append(score)
        if score is None:
            reasons.append(f"score out of range or unread: {part[:20]}")
    if len(parts) != count:
        reasons.append(f"scores missing: {len(parts)} for {count} candidates" if len(parts) < count else
                       f"scores too many: {len(parts)} for {count} candidates")
        if len(parts) > count:
            return [None] * count, reasons
    return scores + [None] * (count - len(scores)), reasons


def read_ratings(reply: str) -> tuple[dict[str, float] | None, str]:
    """The judge's rating of each criterion from lines such as `type: 0.8`, or (None, reason)."""
    text = _after_thinking(reply)
    ratings: dict[str, float] = {}
    for name in CRITERIA:
        found = re.findall(rf"^[ \t*\-\"']*+{name.replace('_', '[_ ]')}[*\"']*[ \t]*[:=][\s*\"']*([^\s*,;\"']+)", text,
                           re.IGNORECASE | re.MULTILINE)  # fmt: skip
        if not found:
            return None, f"no rating of {name}"
        value = _unit(found[-1])
        if value is None:
            return None, f"rating of {name} out of range or unread: {found[-1][:20]}"
        ratings[name] = value
    return ratings, ""


def _unit(text: str) -> float | None:
    """A number from 0 to 1; None for anything else."""
    if not re.fullmatch(r"\s*[-+]?(?:\d{1,9}\.?\d{0,9}|\.\d{1,9})\s*", text):
        return None
    value = float(text)
    return value if math.isfinite(value) and 0 <= value <= 1 else None

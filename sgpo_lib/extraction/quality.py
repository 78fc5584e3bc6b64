"""How good strategies are: ratings on four criteria, bands, and how far an automatic scorer agrees with a reference.

The paper's Appendix H: each criterion 0 to 1, their mean is the overall score, and scores are counted in High, Medium
and Low bands. Its band limits are not published, so they are a field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from sgpo_lib.evaluation import mean_interval
from sgpo_lib.extraction.chat import Chat, Request
from sgpo_lib.extraction.output import read_extractions
from sgpo_lib.extraction.pipeline import ExtractionConfig, inside, shown_response
from sgpo_lib.extraction.reading import read_ratings
from sgpo_lib.extraction.records import CRITERIA, Candidate, Extraction, Leak
from sgpo_lib.prompts import JUDGING, filled, strategy_text
from sgpo_lib.records import Strategy
from sgpo_lib.sources.packaged import collection_problems
from sgpo_lib.sources.rows import strategy as read_strategy

BANDS = ("High", "Medium", "Low")
_COLUMNS = {"problem": "object", "family": "object", "candidate": "int64", "kind": "object",
            **dict.fromkeys(CRITERIA, "float64"), "quality": "float64", "band": "object", "score": "float64",
            "chosen": "bool", "answer_leaks": "int64", "intermediate_leaks": "int64", "words": "int64",
            "steps_count": "int64", "own_numbers": "int64"}  # fmt: skip
"""Columns of `candidate_frame`: they are there, with these types, also where no candidate could be read."""


@dataclass(frozen=True)
class Bands:
    """Lower limits of the bands (ours: the paper's are not published)."""

    high: float = 0.8
    """High: from here to 1."""
    medium: float = 0.5
    """Medium: from here; below it is Low."""

    def __post_init__(self) -> None:
        if not 0 <= self.medium < self.high <= 1:
            raise ValueError(f"bands: got high={self.high}, medium={self.medium}, expected 0 <= medium < high <= 1")

    def of(self, score: float) -> str:
        """The band of a score from 0 to 1."""
        return "High" if score >= self.high else "Medium" if score >= self.medium else "Low"


def shipped() -> list[Extraction]:
    """The collection as extractions: its candidates with their reference ratings, not yet checked for leaks.

    `score` is empty: no scorer has seen them. The retained candidate is the one with the highest rating.
    """
    found = []
    for problem, _ in collection_problems().problems():
        candidates = tuple(Candidate(
            "", read_strategy({k: c[k] for k in ("problem_type", "strategy", "steps")}, f"{problem.id}."),
            criteria=c["scores"], kind=c["kind"], comment=c["reason"]) for c in problem.meta["candidates"])
        candidates = tuple(replace(c, text=strategy_text(c.strategy)) for c in candidates if c.strategy)
        best = max(range(len(candidates)), key=lambda i: candidates[i].quality or 0.0)
        found.append(Extraction(problem, candidates, best, "kept", engine="shipped collection"))
    return found


def loaded(source: str, extractions: str = "") -> list[Extraction]:
    """What there is without an engine: the lines of `sgpo extract`, else the shipped collection.

    Raises ValueError for another source without a file: nothing has been extracted from it yet.
    """
    if extractions:
        return read_extractions(Path(extractions))
    if source != "collection":
        raise ValueError(f"source: got {source!r} and no engine, expected 'collection' (nothing is extracted from "
                         "others yet). Set engine (openai:MODEL, vllm:SOURCE or transformers:SOURCE), or extractions "
                         "to a file of sgpo extract")
    return shipped()


def told_text(e: Extraction) -> str:
    """A problem and its candidates as plain text with the scores there are: for a reader without the widget."""
    lines = [f"Problem {e.problem.id}: {e.problem.prompt}", f"Answer: {e.problem.answer}", ""]
    for i, c in enumerate(e.candidates):
        rated = [f"score {c.score:.2f}"] if c.score is not None else []
        rated += [f"mean {c.quality:.2f}"] if c.quality is not None else []
        rated += [f"leaks {', '.join(leak.text for leak in c.leaks)}"] if c.leaks else []
        mark = "*" if i == e.chosen else " "
        told = strategy_text(c.strategy) if c.strategy else f"unreadable ({c.reason}): {c.text[:200]}"
        lines += [f"{mark} {i + 1} {c.kind} [{'; '.join(rated)}]", *("    " + line for line in told.splitlines()), ""]
    return "\n".join(lines)


def candidate_frame(found: Sequence[Extraction], bands: Bands) -> pd.DataFrame:
    """One row per candidate that could be read: problem, family, kind, criteria, quality, band, score, leaks, words."""
    rows = []
    for e in found:
        for i, c in enumerate(e.candidates):
            if c.strategy is None:
                continue
            text = strategy_text(c.strategy)
            rows.append({"problem": e.problem.id, "family": e.problem.family, "candidate": i, "kind": c.kind,
                         **{name: (c.criteria or {}).get(name) for name in CRITERIA}, "quality": c.quality,
                         "band": bands.of(c.quality) if c.quality is not None else None, "score": c.score,
                         "chosen": i == e.chosen, "answer_leaks": sum(k.kind == "answer" for k in c.leaks),
                         "intermediate_leaks": sum(k.kind == "intermediate" for k in c.leaks),
                         "words": len(text.split()), "steps_count": len(c.strategy.steps),
                         "own_numbers": shared_numbers(e.problem.prompt, text)})  # fmt: skip
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)


def shared_numbers(prompt: str, text: str) -> int:
    """How many numbers of a description stand in its problem: 0 for an abstract one."""
    numbers = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")
    there = set(numbers.findall(prompt))
    return sum(n in there for n in numbers.findall(text))


def band_table(frame: pd.DataFrame, bands: Bands) -> pd.DataFrame:
    """Share of descriptions in each band, overall and per criterion (the shape of the paper's Table 8)."""
    rated = frame.dropna(subset=["quality"])
    columns = {"overall": "quality", **{name: name for name in CRITERIA}}
    return pd.DataFrame({told: rated[column].map(bands.of).value_counts(normalize=True).reindex(BANDS).fillna(0.0)
                         for told, column in columns.items()}).T  # fmt: skip


# -------------------------------------------------------------------------------------------------- automatic scorers

_GENERIC = frozenset(re.findall(
    r"\w+", "a an the of and or to in for on with by is are as at it its this that problem problems question math "
    "mathematics mathematical general about some any solve solving find finding use using answer carefully think "
    "thinking work check step steps reason reasoning method approach way"))  # fmt: skip


def _content(text: str) -> list[str]:
    return [w for w in re.findall(r"[a-z]{3,}", text.lower()) if w not in _GENERIC]


def rule_ratings(problem: str, strategy: Strategy, leaks: Sequence[Leak]) -> dict[str, float]:
    """Ratings by counting, without a model: a floor for scorers that read.

    `type`, `strategy`: content words up to 4 and 8. `steps`: 2 to 5 steps of 4 to 25 words without the problem's
    numbers. `no_leak`: 0 for an answer, 0.2 for an intermediate result. It cannot see a wrong type.
    """
    steps = strategy.steps
    good = sum(4 <= len(s.split()) <= 25 for s in steps) / len(steps) if 2 <= len(steps) <= 6 else 0.3
    concrete = min(1.0, shared_numbers(problem, " ".join(steps)) / 3)
    kinds = {leak.kind for leak in leaks}
    return {"type": min(1.0, len(set(_content(strategy.problem_type))) / 4),
            "strategy": min(1.0, len(set(_content(strategy.strategy))) / 8),
            "steps": good * (1 - 0.6 * concrete),
            "no_leak": 0.0 if "answer" in kinds else 0.2 if kinds else 1.0}  # fmt: skip


Ratings = Mapping[str, float]


def judge(found: Sequence[Extraction], chat: Chat, config: ExtractionConfig) -> list[dict[int, Ratings | str]]:
    """A judge's ratings of every readable candidate: per extraction, index -> ratings, or why there are none."""
    places = [(n, i, c.strategy) for n, e in enumerate(found) for i, c in enumerate(e.candidates) if c.strategy]
    responses = [shown_response(e.problem, config)[0] for e in found]
    requests = [Request(filled(JUDGING, problem=inside(found[n].problem.prompt), response=inside(responses[n]),
                               description=inside(strategy_text(s))), 0, 0.0, 1.0, config.max_tokens)
                for n, _, s in places]
    rated: list[dict[int, Ratings | str]] = [{} for _ in found]
    replies = chat.ask(requests, lambda _, reply: None)
    for (n, i, _), reply in zip(places, replies, strict=True):
        ratings, reason = read_ratings(reply.text)
        rated[n][i] = ratings if ratings is not None else (reply.error or reason)
    return rated


def with_ratings(found: Sequence[Extraction], rated: Sequence[Mapping[int, Ratings | str]]) -> list[Extraction]:
    """The extractions with a judge's ratings in place of those they had; a refusal becomes the candidate's comment."""
    judged = []
    for e, ratings in zip(found, rated, strict=True):
        candidates = list(e.candidates)
        for i, given in ratings.items():
            told = {"comment": f"not rated: {given}"} if isinstance(given, str) else {"criteria": given}
            candidates[i] = replace(candidates[i], **told)
        judged.append(replace(e, candidates=tuple(candidates)))
    return judged


def leak_frame(found: Sequence[Extraction]) -> pd.DataFrame:
    """One row per leak: problem, kind of the candidate, kind of the leak, form, the text itself."""
    rows = [(e.problem.id, c.kind, k.kind, k.form, k.text) for e in found for c in e.candidates for k in c.leaks]
    return pd.DataFrame(rows, columns=["problem", "kind", "leak", "form", "text"])


# ---------------------------------------------------------------------------------------------------------- agreement


def with_rules(frame: pd.DataFrame, found: Sequence[Extraction]) -> pd.DataFrame:
    """The frame with `rules`: the mean of `rule_ratings` of each candidate."""
    rated = {(e.problem.id, i): rule_ratings(e.problem.prompt, c.strategy, c.leaks)
             for e in found for i, c in enumerate(e.candidates) if c.strategy}  # fmt: skip
    means = [sum(r.values()) / len(r) for key in zip(frame["problem"], frame["candidate"], strict=True)
             for r in [rated[key]]]  # fmt: skip
    return frame.assign(rules=means)


def agreement(frame: pd.DataFrame, reference: str, scorer: str) -> pd.DataFrame:
    """How a scorer's column ranks each problem's candidates beside the reference column, with 95% intervals over
    problems: Spearman's rank correlation (mean over problems), top-1 hit rate, share of pairs in the right order.

    A scorer's ties at the top count as a hit in proportion; a tied pair counts as half. Chance: 0, one over the
    number of candidates, and one half. Problems without two scored candidates are left out; `problems` counts the
    others, and where there is none, the values are NaN.
    """
    rank, hit, order, chance = [], [], [], []
    for _, rows in frame.dropna(subset=[reference, scorer]).groupby("problem"):
        a, b = rows[reference].to_numpy(float), rows[scorer].to_numpy(float)
        if len(a) < 2:
            continue
        top_a, top_b = a == a.max(), b == b.max()
        hit.append(float((top_a & top_b).sum() / top_b.sum()))
        chance.append(float(top_a.mean()))
        i, j = np.triu_indices(len(a), 1)
        differ = a[i] != a[j]
        if differ.any():
            product = (np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]))[differ]
            order.append(float((product + 1).mean() / 2))
        ra, rb = (pd.Series(v).rank().to_numpy() for v in (a, b))
        if ra.std() > 0:  # a scorer that says the same of all knows no rank: 0
            rank.append(float(np.corrcoef(ra, rb)[0, 1]) if rb.std() > 0 else 0.0)
    table = []
    for name, values, by_chance in (("rank correlation", [(v + 1) / 2 for v in rank], 0.5),
                                    ("top-1 hit rate", hit, float(np.mean(chance)) if chance else math.nan),
                                    ("pairs in order", order, 0.5)):  # fmt: skip
        told = np.array([*(mean_interval(values) if values else [math.nan] * 3), by_chance])
        told = 2 * told - 1 if name == "rank correlation" else told
        table.append({"measure": name, **dict(zip(("value", "low", "high", "chance"), told, strict=True)),
                      "problems": len(values)})  # fmt: skip
    return pd.DataFrame(table).set_index("measure")

"""Problems: where they come from, how they are split, and the fingerprint of what came out.

A hash of its normalised text and `data_seed` decides a problem's split, and every text is used once: nothing lies in
two splits. The same `DataConfig` gives the same splits everywhere (same file; same version of reasoning-gym).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgpo_lib.config import DataConfig
from sgpo_lib.records import Problem, PromptStyle, Strategy
from sgpo_lib.sources.catalogue import DRAWS, open_source
from sgpo_lib.sources.files import read
from sgpo_lib.sources.rows import SPLITS, Distinct, digest, first_by_hash, normalised, strategy, text
from sgpo_lib.strategies import spoiled

Parts = dict[str, list[Problem]]


@dataclasses.dataclass(frozen=True)
class Splits:
    """Problems of a run. No text occurs in two of the four parts, nor twice in one."""

    warmup: tuple[Problem, ...]
    """Supervised warm-up: `warmup_share` of the training problems."""
    train: tuple[Problem, ...]
    """The other training problems."""
    validation: tuple[Problem, ...]
    """For evaluation while training."""
    test: tuple[Problem, ...]
    """For the final evaluation."""
    source: str
    """Where the problems came from, what was left out, how many strategies were merged: one line for a person."""
    fingerprint: str
    """12 hex digits over id, prompt, answer and strategy (as it came) of every problem, split by split."""


def load(data: DataConfig) -> Splits:
    """The problems that `data` asks for.

    Raises ValueError, with the cure, for an unknown source or argument, a faulty file, or a source too small.
    """
    wanted = {"train": data.n_train, "validation": data.n_validation, "test": data.n_test}
    if min(wanted.values()) < 0 or not any(wanted.values()):
        raise ValueError(f"data: got counts {wanted}, expected 0 or more each, and not all 0")
    source = open_source(data.problems, data.problem_args, data.data_seed)
    if source.rows is not None:
        parts = _split(source.rows, wanted, data.data_seed, source.name)
    else:
        parts = _fill(source.stream or iter(()), wanted, data.data_seed, source.name)
    told = source.told
    if data.strategies:
        parts, told = _with_strategies(parts, told, Path(data.strategies), data.leaking_strategies)
    n = len(parts["train"])  # of two problems or more and a share above 0, neither part is left empty
    count = min(max(round(data.warmup_share * n), 1), n - 1) if data.warmup_share > 0 and n > 1 else 0
    style = PromptStyle(data.instruction, data.guided_prompt)
    parts = {name: [dataclasses.replace(p, style=style) for p in part] for name, part in parts.items()}
    warmup, train = first_by_hash(parts["train"], count, "warmup", data.data_seed)
    fingerprint = digest(*([(p.id, p.prompt, p.answer, p.strategy and dataclasses.astuple(p.strategy),
                             *filter(None, [accepted_leak(p)])) for p in part]
                            for part in (warmup, train, parts["validation"], parts["test"])))[:12]  # fmt: skip
    if data.bad_strategies:
        spoils, _ = first_by_hash(train, round(data.bad_share * len(train)), "bad strategy", data.data_seed)
        chosen = {p.id for p in spoils}
        train = [spoiled(p, data.bad_strategies, train) if p.id in chosen else p for p in train]
    return Splits(tuple(warmup), tuple(train), tuple(parts["validation"]), tuple(parts["test"]), told, fingerprint)


def accepted_leak(problem: Problem) -> str:
    """Why a person trains on a strategy that the leak check may refuse: `comment` of a line that has `confirmed`."""
    comment = problem.meta.get("comment") if problem.meta.get("confirmed") is True else ""
    return comment.strip() if isinstance(comment, str) else ""


def require_strategies(problems: Sequence[Problem], source: str) -> None:
    """Raises ValueError naming problems without a strategy, which guided sampling and distillation need."""
    _require(problems, source, "strategy", "name a file with one strategy per problem id in data.strategies, give the "
             "problems a `strategy` field, or take a method without guidance (g2=0, distillation='none')")


def require_solutions(problems: Sequence[Problem], source: str) -> None:
    """Raises ValueError naming problems without an expert solution, which SFT, LUFFY and HPT learn."""
    _require(problems, source, "solution", "give the problems a `solution` field, take a source with them "
             "(testbed, reasoning-gym:chain_sum or gsm_symbolic), or a method that learns from none (sgpo)")


def _require(problems: Sequence[Problem], source: str, what: str, cure: str) -> None:
    missing = [p.id for p in problems if not getattr(p, what)]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{len(missing)} of {len(problems)} problems have no {what}: {shown}. Source: {source}. "
                         f"Cure: {cure}")


def _bucket(text: str, wanted: Mapping[str, int], seed: int) -> str:
    """Split of a text, in the proportion of the wanted counts."""
    point = int(digest("split", seed, text)[:16], 16) * sum(wanted.values()) >> 64
    return next(n for n, limit in zip(wanted, itertools.accumulate(wanted.values()), strict=True) if point < limit)


def _fill(stream: Iterator[Problem], wanted: Mapping[str, int], seed: int, source: str) -> Parts:
    """Draw from a generated source until every split is full. A text or id that came before is passed over."""
    parts: Parts = {name: [] for name in SPLITS}
    texts, ids, total = set[str](), set[str](), sum(wanted.values())
    draws = 1000 + DRAWS * total  # then the source is given up
    for problem in itertools.islice(stream, draws):
        key = normalised(problem.prompt)
        if key in texts or problem.id in ids:
            continue
        texts.add(key)
        ids.add(problem.id)
        part = parts[name := _bucket(key, wanted, seed)]
        if len(part) < wanted[name]:
            part.append(problem)
            if all(len(parts[n]) == wanted[n] for n in SPLITS):
                return parts
    filled = ", ".join(f"{n} {len(parts[n])} of {wanted[n]}" for n in SPLITS)
    raise ValueError(f"{source}: got {len(texts)} distinct problems in {draws} draws, needed {total} and some to "
                     f"spare, since a hash decides the split ({filled}): lower n_train or widen problem_args")


def _split(rows: Distinct, wanted: Mapping[str, int], seed: int, source: str) -> Parts:
    """The problems by their `split` or else by hash, those beyond n_* left out by hash."""
    parts: Parts = {n: [] for n in SPLITS}
    for problem, split in rows.problems():
        parts[split or _bucket(normalised(problem.prompt), wanted, seed)].append(problem)
    for n in (n for n in SPLITS if wanted[n] and not parts[n]):
        counts = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
        raise ValueError(f"{source}: no problem for {n} (n_{n}={wanted[n]}); {len(rows.rows)} distinct problems gave "
                         f"{counts}: add problems, give lines a `split`, or set n_{n}=0")
    return {n: first_by_hash(part, wanted[n], "order", seed)[0] for n, part in parts.items()}


def _with_strategies(parts: Parts, source: str, path: Path, leaking: bool) -> tuple[Parts, str]:
    """The problems with the strategies of a file, which replace their own, and the longer description.

    Lines of `sgpo extract` or of the inspector whose strategy is missing, in quarantine or rejected (`status`) are
    passed over, and their problems are not trained on; `leaking` takes the quarantined ones all the same.
    """
    found: dict[str, tuple[str, Strategy]] = {}
    decided: dict[str, dict[str, Any]] = {}
    passed: dict[str, str] = {}

    def parse(raw: dict[str, Any], at: str) -> None:
        status = text(raw, "status", "kept")
        if status != "kept" and not (leaking and status == "leaking"):
            passed[text(raw, "id")] = status
            return
        first, _ = found.setdefault(text(raw, "id"), (at, strategy(raw, "")))
        if first != at:
            raise ValueError(f"id: got {raw['id']!r}, which {first} has too: keep one strategy per problem")
        decided[text(raw, "id")] = {name: raw.get(name) for name in ("confirmed", "comment")}

    def given(problem: Problem) -> Problem:
        if problem.id not in found:
            return problem
        return dataclasses.replace(problem, strategy=found[problem.id][1], meta=problem.meta | decided[problem.id])

    read(path, parse, "data.strategies", "a JSONL file")
    merged = {n: [given(p) for p in part if n != "train" or p.id not in passed] for n, part in parts.items()}
    used = sum(p.id in found for part in parts.values() for p in part)
    told = f"{source}; {used} strategies of {path} used, {len(found) - used} for ids that are in no split"
    counts = sorted(Counter(passed.values()).items())
    left = len(parts["train"]) - len(merged["train"])
    told += "".join(f", {count} {status} passed over" for status, count in counts)
    return merged, told + (f"; {left} training problems left out with them" if left else "")

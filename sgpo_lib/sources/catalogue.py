"""Which source a name means: `testbed`, `collection`, `champ`, `reasoning-gym:NAME`, `hub:OWNER/NAME`, or a file.

A generated source is a stream without end, any other one a finite list.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo_lib import testbed
from sgpo_lib.config import unknown
from sgpo_lib.records import Problem
from sgpo_lib.rewards import Verifier
from sgpo_lib.sources.files import file_problems
from sgpo_lib.sources.gym import gym_problems
from sgpo_lib.sources.hub import hub_problems
from sgpo_lib.sources.packaged import champ_problems, collection_problems
from sgpo_lib.sources.rows import Distinct, first_by_hash, normalised

DRAWS = 20
"""Draws from a stream per wanted problem until it is given up (and 1,000 more)."""


@dataclass(frozen=True)
class Source:
    """An opened source: either a stream or rows."""

    name: str
    """What it is, with its arguments."""
    stream: Iterator[Problem] | None = None
    """Problems without end, drawn with the seed."""
    rows: Distinct | None = None
    """The distinct problems."""

    @property
    def told(self) -> str:
        """Name, number of problems and repeats: for a person."""
        return f"{self.name}: {self.rows.told()}" if self.rows else self.name


def open_source(name: str, args: Mapping[str, Any], seed: int) -> Source:
    """The source of `data.problems` and `data.problem_args`. Raises ValueError, with the cure."""
    kind, _, rest = name.partition(":")
    given = ", ".join(f"{k}={v!r}" for k, v in args.items())
    if name == "testbed":
        _known(args, testbed.generate, {"seed"}, "testbed argument")
        return Source(f"testbed({given})", stream=testbed.generate(seed, **args))
    if kind == "reasoning-gym":
        stream = gym_problems(rest, args, seed)
        return Source(f"{name}({given}) of reasoning-gym {importlib.metadata.version('reasoning-gym')}", stream=stream)
    if kind == "hub":
        _known(args, hub_problems, {"name"}, f"argument of {name}")
        return Source(f"{name}({given})", rows=hub_problems(rest, **args))
    if args:
        raise ValueError(f"data.problem_args: got {given}, expected none for {name!r}")
    if name in ("collection", "champ"):
        return Source(name, rows=collection_problems() if name == "collection" else champ_problems())
    return Source(name, rows=file_problems(Path(name)))


def _known(args: Mapping[str, Any], function: Any, taken: set[str], what: str) -> None:
    names = set(inspect.signature(function).parameters) - taken
    for arg in (a for a in args if a not in names):
        raise unknown(what, arg, names)


def sample(source: Source, count: int, seed: int) -> list[Problem]:
    """`count` problems drawn by hash of their text and the seed (all of a finite source with count 0).

    The same seed draws the same problems, and fewer are a part of more. Raises ValueError where there are not enough.
    """
    if count < 0:
        raise ValueError(f"{source.name}, count: got {count}, expected 0 (all) or more")
    if source.rows is not None:
        problems = [problem for problem, _ in source.rows.problems()]
        if count > len(problems):
            raise ValueError(f"{source.name}: got {len(problems)} problems, wanted {count}. Lower the count")
        return first_by_hash(problems, count, "sample", seed)[0] if count else problems
    if not count:
        raise ValueError(f"{source.name} has no end: say how many problems (count)")
    assert source.stream is not None
    found: dict[str, Problem] = {}
    ids: set[str] = set()
    for problem in itertools.islice(source.stream, 1000 + DRAWS * count):
        if problem.id not in ids:
            found.setdefault(normalised(problem.prompt), problem)
        ids.add(problem.id)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{source.name}: got {len(found)} distinct problems in {1000 + DRAWS * count} draws, wanted "
                     f"{count}. Lower the count or widen problem_args")


def readable(problems: Sequence[Problem], verifier: Verifier, where: str, *, leave_out: bool = False,
             cure: str = "Correct or remove these problems") -> list[Problem]:
    """The problems whose gold answer can be read: parsed, printed, parsed again, and still the same value.

    Raises ValueError naming place, answer and reason for the others, unless they are to be left out.
    """
    bad = verifier.audit(problems)
    if bad and not leave_out:
        shown = [f"{where}, {p.meta.get('at', p.id)}: answer: got {p.answer[:80]!r}, which cannot be read ({reason})"
                 for p, reason in bad[:10]]  # fmt: skip
        shown += [f"and {len(bad) - 10} more"] * (len(bad) > 10)
        raise ValueError("\n  ".join([f"{len(bad)} of {len(problems)} gold answers cannot be read:", *shown,
                                      cure]))
    refused = {p.id for p, _ in bad}
    return [p for p in problems if p.id not in refused]

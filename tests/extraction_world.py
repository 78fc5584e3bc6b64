"""What the model says in the tests of extraction: a scripted server, and a bench to extract on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fault_server import Answer, Ask, FaultServer

from sgpo_lib.extraction.chat import Cached, Endpoint
from sgpo_lib.extraction.pipeline import ExtractionConfig, extract, read_extractions
from sgpo_lib.extraction.records import Extraction
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.rewards import Verifier

KEY = "sk-test-0123456789abcdef"
MARKS = {"pairing": 0.3, "induction": 0.2, "symmetry": 0.9, "squares": 0.5, "telescoping": 0.6}
"""Techniques of the five candidates, and what the scorer gives for each."""
BEST = Strategy("Sums of regular sequences", "Use symmetry to see it whole",
                ("Write the terms in order", "Apply symmetry", "State the total"))


def described(technique: str, last: str = "State the total") -> str:
    return (f"Problem type: Sums of regular sequences\nStrategy: Use {technique} to see it whole\n"
            f"Steps: (a) Write the terms in order (b) Apply {technique} (c) {last}")


def problem(name: str, solution: str | None = None) -> Problem:
    """The sum of the first n odd numbers, n from 41 on."""
    n = 41 + sum(map(ord, name)) % 50
    worked = f"The first n odd numbers – naïve ∑ – make a square: ${n}^2 = {n * n}$.\nThe answer is \\boxed{{{n * n}}}."
    return Problem(name, f"Named {name}: what is the sum ∑ of the first {n} odd numbers?", str(n * n),
                   solution=worked if solution is None else solution)


Told = list[Answer | str] | Callable[[Ask], Answer | str]


@dataclass
class World:
    """What the model says: five good candidates and their marks, unless `told` has other replies.

    (problem, stage) -> replies in the order of arrival, the last one for all further ones; or a function.
    """

    told: dict[tuple[str, str], Told] = field(default_factory=dict)
    came: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __call__(self, ask: Ask) -> Answer | str:
        name = re.search(r"Named (\w+)", ask.prompt)[1]
        key = name, stage(ask)
        self.came[key] += 1
        told = self.told.get(key) or self.told.get(("any", key[1]))
        if told is None and key[1] == "scores":
            return f"Score: {[MARKS[t] for t in re.findall('Strategy: Use ([a-z]+)', ask.prompt)]}"
        told = [described(t) for t in MARKS] if told is None else told
        return told(ask) if callable(told) else told[min(self.came[key], len(told)) - 1]


def stage(ask: Ask) -> str:
    return "again" if "An earlier reply" in ask.prompt else "scores" if "<candidate 1>" in ask.prompt else "first"


@dataclass
class Bench:
    """A server with a world, a verifier, and an output file."""

    world: World
    server: FaultServer
    verifier: Verifier
    out: Path
    timeout_s: float = 20.0

    def extract(self, *problems: Problem, **settings) -> list[Extraction]:
        chat = Cached(Endpoint("m", retries=0, timeout_s=self.timeout_s), self.out.with_name("c.sqlite"))
        found = extract(problems, chat, self.verifier, ExtractionConfig(**settings), self.out)
        assert [e.problem.id for e in found] == [p.id for p in problems]
        written = read_extractions(self.out)
        assert all(written.count(e) == 1 for e in found)
        return found

    def asked(self, name: str, which: str = "") -> list[Ask]:
        return [a for a in self.server.asked if f"Named {name}:" in a.prompt and stage(a).startswith(which)]

    def command(self, *problems: Problem) -> list[str]:
        """Arguments of `sgpo extract` for the same, two problems at a time."""
        source = self.out.with_name("problems.jsonl")
        source.write_text("".join(json.dumps({"id": p.id, "prompt": p.prompt, "answer": p.answer,
                                              "solution": p.solution}) + "\n" for p in problems), encoding="utf-8")
        return ["extract", "--source", str(source), "--engine", "openai:m", "--out", str(self.out), "--chunk", "2",
                "--cache", str(self.out.with_name("c.sqlite")), "--concurrency", "4"]  # fmt: skip


@contextmanager
def open_bench(verifier: Verifier, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench whose server the environment names."""
    world = World()
    with FaultServer(world) as server:
        for name, value in (("OPENAI_API_KEY", KEY), ("OPENAI_BASE_URL", server.url), ("NO_PROXY", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        yield Bench(world, server, verifier, folder / "strategies.jsonl")

"""The shipped collection: its structure, its answers against independent computations, its texts and its leaks."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sympy
import yaml

from sgpo_lib.config import RewardConfig
from sgpo_lib.extraction.leaks import find_leaks
from sgpo_lib.extraction.quality import shipped
from sgpo_lib.extraction.records import Candidate, Leak
from sgpo_lib.records import Problem
from sgpo_lib.rewards import Verifier, extract_answer
from sgpo_lib.sources.packaged import COLLECTION

CHECKS = Path(__file__).parent / "collection_checks"
SHARED = Path(__file__).parents[2] / "shared/data"
SUBJECTS = {"algebra": "alg", "calculus": "cal", "counting": "cnt", "geometry": "geo", "number_theory": "num",
            "word_problems": "wrd"}  # fmt: skip
"""File -> beginning of its ids."""
IDS = {f"{short}-{n:02d}": name for name, short in SUBJECTS.items() for n in range(1, 12)}
KINDS = {"good", "vague", "too detailed", "wrong type", "leaking"}
CRITERIA = {"type", "strategy", "steps", "no_leak"}
NO_NUMBER = {"geo-04": "a point", "alg-07": "a complex number", "cal-08": "a function"}
"""Answers that are compared by the verifier alone."""


@cache
def collection() -> dict[str, dict[str, Any]]:
    """Problem id -> entry, as it is written."""
    found = [entry for name in SUBJECTS
             for entry in yaml.load((COLLECTION / f"{name}.yaml").read_text("utf-8"), yaml.CSafeLoader)]  # fmt: skip
    return {entry["id"]: entry for entry in found}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(RewardConfig()) as v:
        yield v


def mean(candidate: dict[str, Any]) -> float:
    return sum(candidate["scores"].values()) / 4


# Structure


def test_the_collection_has_its_66_problems_in_six_subjects():
    assert {f.stem for f in COLLECTION.glob("*.yaml")} == set(SUBJECTS)
    for name, short in SUBJECTS.items():
        written = yaml.load((COLLECTION / f"{name}.yaml").read_text("utf-8"), yaml.CSafeLoader)
        assert [entry["id"] for entry in written] == [f"{short}-{n:02d}" for n in range(1, 12)]
        assert len({entry["subject"] for entry in written}) == 1
        assert {"high school", "competition"} <= {entry["level"] for entry in written}
    levels = Counter(e["level"] for e in collection().values())
    assert set(levels) == {"middle school", "high school", "competition"} and min(levels.values()) > 15
    assert {e["subject"] for e in collection().values()} == {
        "algebra", "calculus", "counting and probability", "geometry", "number theory", "word problems"}
    assert len({" ".join(e["problem"].casefold().split()) for e in collection().values()}) == len(IDS) == 66


@pytest.mark.parametrize("key", IDS)
def test_a_problem_has_five_candidates_with_ratings_and_a_reason(key):
    entry = collection()[key]
    assert set(entry) == {"id", "subject", "level", "problem", "answer", "solution", "candidates"}
    assert isinstance(entry["answer"], str) and len(entry["problem"]) > 60 and len(entry["solution"]) > 150
    assert Counter(c["kind"] for c in entry["candidates"]) == dict.fromkeys(KINDS, 1)
    for c in entry["candidates"]:
        assert set(c) == {"kind", "problem_type", "strategy", "steps", "scores", "reason"}
        texts = [c["problem_type"], c["strategy"], c["reason"], *c["steps"]]
        assert all(isinstance(t, str) and t == t.strip() and len(t) > 5 and "\n" not in t for t in texts)
        assert 2 <= len(c["steps"]) <= 7 and not any(re.match(r"\(?[a-l]\)", s) for s in c["steps"])
        assert set(c["scores"]) == CRITERIA
        assert all(type(s) in (int, float) and 0 <= s <= 1 for s in c["scores"].values())
        assert re.search(r"[.!?]$", c["reason"]) and len(c["reason"].split()) >= 5


@pytest.mark.parametrize("key", IDS)
def test_ratings_tell_the_kinds_apart(key):
    of = {c["kind"]: c for c in collection()[key]["candidates"]}
    others = [mean(c) for kind, c in of.items() if kind != "good"]
    assert mean(of["good"]) >= 0.8 and all(mean(of["good"]) > m for m in others)
    assert min(of["leaking"]["scores"], key=of["leaking"]["scores"].get) == "no_leak"
    assert of["leaking"]["scores"]["no_leak"] < 0.5 < of["good"]["scores"]["no_leak"]
    assert of["wrong type"]["scores"]["type"] <= 0.5 and of["vague"]["scores"]["strategy"] <= 0.5
    assert of["too detailed"]["scores"]["steps"] < of["good"]["scores"]["steps"]


def test_the_place_of_a_candidate_does_not_tell_its_kind():
    orders = [tuple(c["kind"] for c in e["candidates"]) for e in collection().values()]
    assert len(set(orders)) > 30
    for kind in KINDS:
        places = Counter(order.index(kind) for order in orders)
        assert set(places) == set(range(5)) and max(places.values()) <= 33, kind


def test_the_collection_as_extractions_retains_the_good_candidates():
    found = {e.problem.id: e for e in shipped()}
    assert set(found) == set(IDS)
    for key, e in found.items():
        entry, best = collection()[key], e.candidates[e.chosen]
        assert [c.kind for c in e.candidates] == [c["kind"] for c in entry["candidates"]] and best.kind == "good"
        assert abs(best.quality - mean(next(c for c in entry["candidates"] if c["kind"] == "good"))) < 1e-12


# Answers


def test_every_solution_ends_in_a_box_with_the_answer(verifier):
    entries = list(collection().values())
    for e in entries:
        box = e["solution"].rfind("\\boxed{")
        rest = e["solution"][box:].replace(extract_answer(e["solution"]), "", 1)
        assert box > 0 and re.fullmatch(r"\\boxed\{\}[$\s.]*(?:[a-z ]+\.)?\s*", rest), e["id"]
    asked = [(Problem(e["id"], "", e["answer"]), e["solution"]) for e in entries]
    wrong = [p.id for (p, _), v in zip(asked, verifier.judge(asked), strict=True) if not v.correct]
    assert wrong == [] and verifier.audit([p for p, _ in asked]) == []


def checks(name: str) -> dict[str, Callable[[], object]]:
    return importlib.import_module(f"collection_checks.{name}").CHECKS


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_problem_has_a_computation_of_its_own(name):
    assert list(checks(name)) == [key for key in IDS if IDS[key] == name]
    assert len(set(checks(name).values())) == 11


@pytest.mark.parametrize("key", IDS)
def test_an_answer_is_what_an_independent_computation_gives(key, verifier):
    value, gold = checks(IDS[key])[key](), collection()[key]["answer"]
    written = value if isinstance(value, str) else sympy.latex(sympy.sympify(value), ln_notation=True)
    (verdict,) = verifier.judge([(Problem(key, "", gold), f"\\boxed{{{written}}}")])
    assert verdict.correct, f"{key}: the collection says {gold}, the computation {written}"
    if key not in NO_NUMBER:
        told = verifier.decimals([gold])[gold]
        assert told is not None and abs(Decimal(str(sympy.N(sympy.sympify(value), 30))) - told) < Decimal("1e-20") * (
            1 + abs(told))


NUMBER_TYPES = {"int", "str", "float", "Fraction", "Decimal", "R", "sp", "sympy", "Rational", "Integer", "sqrt", "pi"}


def written_down(function: ast.FunctionDef) -> bool:
    """Whether a value that the function returns is made of literals alone, through names and number types too."""
    binds: defaultdict[str, list[ast.expr | None]] = defaultdict(list)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            binds[node.targets[0].id].append(node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            binds[node.target.id].append(node.value)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            binds[node.id].append(None)  # each binding is met as a name too
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.value, ast.Name) and (
                isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Store)):  # x.append(..), x[i] = ..
            binds[node.value.id].append(None)
    counts = {name: sum(b is None for b in found) for name, found in binds.items()}

    def literal(expression: ast.expr | None, known: frozenset[str]) -> bool:
        if expression is None or any(isinstance(n, (ast.comprehension, ast.Lambda)) for n in ast.walk(expression)):
            return False
        return all(n.id in known for n in ast.walk(expression) if isinstance(n, ast.Name)) and all(
            n.attr in NUMBER_TYPES for n in ast.walk(expression) if isinstance(n, ast.Attribute))

    known = frozenset(NUMBER_TYPES)
    for _ in binds:
        known |= {name for name, found in binds.items() if counts[name] == len(found) - counts[name]
                  and all(literal(b, known) for b in found if b is not None)}  # fmt: skip
    return any(literal(n.value, known) for n in ast.walk(function) if isinstance(n, ast.Return) and n.value)


@pytest.mark.parametrize("body, expected", [
    ("return 5", True), ("return -5", True), ("return '(7, 4)'", True), ("return Fraction(1, 2)", True),
    ("x = 24\n    return x", True), ("x = 24\n    y = x\n    return Fraction(y, 2)", True), ("return 4 * 6", True),
    ("return sp.Rational(3, 10) * sp.sqrt(5)", True), ("x: int = 24\n    return int(x)", True),
    ("if sum(range(9)):\n        return 24", True),
    ("return sum(range(5))", False), ("x = 0\n    for i in range(5):\n        x += i\n    return x", False),
    ("return len([i for i in (1, 2)])", False), ("(x,) = {3}\n    return x", False), ("return f(2)", False),
    ("x = [2]\n    x.append(f(3))\n    return x[1]", False), ("x = [2]\n    x[0] = f(3)\n    return x[0]", False),
    ("x = [2]\n    return x[0]", True),
])  # fmt: skip
def test_an_answer_that_is_written_down_is_noticed(body, expected):
    (function,) = ast.parse(f"def check():\n    {body}").body
    assert isinstance(function, ast.FunctionDef) and written_down(function) is expected


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_check_has_its_answer_written_down(name):
    tree = ast.parse((CHECKS / f"{name}.py").read_text("utf-8"))
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    for key, check in checks(name).items():
        function, answer = functions[check.__name__], collection()[key]["answer"]
        assert not written_down(function), f"{key}: {check.__name__} returns what is written in it"
        if re.fullmatch(r"\d+", answer) and int(answer) > 12:
            said = {n.value for n in ast.walk(function) if isinstance(n, ast.Constant)}
            assert int(answer) not in said, f"{key}: {check.__name__} holds its answer"
        assert "collection" not in {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
    used = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    used |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert used <= {"__future__", "cmath", "collections.abc", "fractions", "functools", "itertools", "math", "sympy"}


# Texts


def runs(text: str, length: int) -> Iterable[tuple[str, ...]]:
    """Every run of so many words; formulas count as the words in them."""
    words = re.findall(r"[a-z0-9']+", text.casefold())
    return zip(*(words[i:] for i in range(length)), strict=False)


def test_runs_of_words_are_found():
    assert list(runs("Add $2x$, then add it.", 3)) == [("add", "2x", "then"), ("2x", "then", "add"),
                                                       ("then", "add", "it")]  # fmt: skip


def test_no_phrase_of_five_words_stands_in_candidates_of_two_problems():
    where: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for key, entry in collection().items():
        for c in entry["candidates"]:
            for phrase in runs(" ".join([c["problem_type"], c["strategy"], *c["steps"]]), 5):
                where[phrase].add(key)
    assert len(where) > 10_000
    assert {" ".join(phrase): sorted(keys) for phrase, keys in where.items() if len(keys) > 1} == {}


@pytest.mark.parametrize("name", ["benchmarks/aime24", "benchmarks/amc23", "benchmarks/math500",
                                  "benchmarks/olympiadbench", "gsm8k/train", "gsm8k/test"])  # fmt: skip
def test_no_problem_is_taken_from_a_published_set(name):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    ours = {phrase: key for key, entry in collection().items() for phrase in runs(entry["problem"], 8)}
    found = []
    for line in path.read_text("utf-8").strip().split("\n"):
        published = json.loads(line)
        found += [(published["id"], ours[r], " ".join(r)) for r in runs(published["problem"], 8) if r in ours]
    assert found == []


# Leaks


@pytest.fixture(scope="module")
def checked(verifier) -> list[tuple[str, Candidate, tuple[Leak, ...]]]:
    """(problem, candidate, what the leak check says of it)."""
    asked = [(e.problem, c) for e in shipped() for c in e.candidates]
    found = find_leaks([(p, c.strategy) for p, c in asked if c.strategy], verifier)
    return [(p.id, c, leaks) for (p, c), leaks in zip(asked, found, strict=True)]


def test_candidates_without_a_leak_are_rarely_taken_for_leaking(checked):
    clean = [(key, c.kind, leaks) for key, c, leaks in checked if c.kind in ("good", "vague", "wrong type")]
    alarms = [(key, kind, [leak.text for leak in leaks]) for key, kind, leaks in clean if leaks]
    assert len(clean) == 198 and Fraction(len(alarms), 198) <= Fraction(3, 100), alarms


def test_most_leaking_candidates_are_caught(checked):
    leaking = [(key, leaks) for key, c, leaks in checked if c.kind == "leaking"]
    missed = [key for key, leaks in leaking if not leaks]
    assert len(leaking) == 66 and Fraction(len(missed), 66) <= Fraction(1, 4), missed  # paraphrases

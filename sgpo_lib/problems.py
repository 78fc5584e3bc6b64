"""Problems: where they come from, how they are split, and the fingerprint of what came out.

A hash of its normalised text and `data_seed` decides a problem's split, and every text is used once: nothing lies in
two splits. The same `DataConfig` gives the same splits everywhere (same file; same version of reasoning-gym). Traps:
reasoning-gym draws problem i from `seed + i`, so neighbouring seeds share problems (we hash the seed); some of its
data sets follow the order of Python sets (`SET_ORDERED`); Math-Verify would misjudge some answers (`_gym_problem`).
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sgpo_lib import testbed
from sgpo_lib.config import DataConfig, unknown
from sgpo_lib.records import Problem, PromptStyle, Strategy
from sgpo_lib.strategies import spoiled

Parts = dict[str, list[Problem]]
SPLITS = ("train", "validation", "test")
SET_ORDERED = ("intermediate_integration", "isomorphic_strings", "knight_swap", "polynomial_multiplication",
               "ransom_note", "word_ladder")  # fmt: skip
"""Data sets of reasoning-gym 0.1.25 that give other problems in another process, unless PYTHONHASHSEED=0."""


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
    kind, _, name = data.problems.partition(":")
    args = ", ".join(f"{k}={v!r}" for k, v in data.problem_args.items())
    if data.problems == "testbed":
        known = set(inspect.signature(testbed.generate).parameters) - {"seed"}
        for arg in (a for a in data.problem_args if a not in known):
            raise unknown("testbed argument", arg, known)
        source = f"testbed({args})"
        parts = _fill(testbed.generate(data.data_seed, **data.problem_args), wanted, data.data_seed, source)
    elif kind == "reasoning-gym":
        stream = _gym(name, data.problem_args, data.data_seed)
        source = f"{data.problems}({args}) of reasoning-gym {importlib.metadata.version('reasoning-gym')}"
        parts = _fill(stream, wanted, data.data_seed, source)
    elif args:
        raise ValueError(f"data.problem_args: got {args}, expected none for the file {data.problems!r}")
    else:
        parts, source = _split_file(Path(data.problems), wanted, data.data_seed)
    if data.strategies:
        parts, source = _with_strategies(parts, source, Path(data.strategies))
    n = len(parts["train"])  # of two problems or more and a share above 0, neither part is left empty
    count = min(max(round(data.warmup_share * n), 1), n - 1) if data.warmup_share > 0 and n > 1 else 0
    style = PromptStyle(data.instruction, data.guided_prompt)
    parts = {name: [dataclasses.replace(p, style=style) for p in part] for name, part in parts.items()}
    warmup, train = _first(parts["train"], count, "warmup", data.data_seed)
    fingerprint = _digest(*([(p.id, p.prompt, p.answer, p.strategy and dataclasses.astuple(p.strategy)) for p in part]
                            for part in (warmup, train, parts["validation"], parts["test"])))[:12]  # fmt: skip
    if data.bad_strategies:
        spoils, _ = _first(train, round(data.bad_share * len(train)), "bad strategy", data.data_seed)
        chosen = {p.id for p in spoils}
        train = [spoiled(p, data.bad_strategies, train) if p.id in chosen else p for p in train]
    return Splits(tuple(warmup), tuple(train), tuple(parts["validation"]), tuple(parts["test"]), source, fingerprint)


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


def normalised(prompt: str) -> str:
    """The text by which two problems are the same: white space and case folded."""
    return " ".join(prompt.split()).casefold()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _bucket(text: str, wanted: Mapping[str, int], seed: int) -> str:
    """Split of a text, in the proportion of the wanted counts."""
    point = int(_digest("split", seed, text)[:16], 16) * sum(wanted.values()) >> 64
    return next(n for n, limit in zip(wanted, itertools.accumulate(wanted.values()), strict=True) if point < limit)


def _first(part: Sequence[Problem], count: int, purpose: str, seed: int) -> tuple[list[Problem], list[Problem]]:
    """The `count` problems that come first by hash, and the others; both keep their order."""
    first = {p.id for p in sorted(part, key=lambda p: _digest(purpose, seed, normalised(p.prompt)))[:count]}
    return [p for p in part if p.id in first], [p for p in part if p.id not in first]


def _fill(stream: Iterator[Problem], wanted: Mapping[str, int], seed: int, source: str) -> Parts:
    """Draw from a generated source until every split is full. A text or id that came before is passed over."""
    parts: Parts = {name: [] for name in SPLITS}
    texts, ids, total = set[str](), set[str](), sum(wanted.values())
    draws = 1000 + 20 * total  # then the source is given up
    for problem in itertools.islice(stream, draws):
        text = normalised(problem.prompt)
        if text in texts or problem.id in ids:
            continue
        texts.add(text)
        ids.add(problem.id)
        part = parts[name := _bucket(text, wanted, seed)]
        if len(part) < wanted[name]:
            part.append(problem)
            if all(len(parts[n]) == wanted[n] for n in SPLITS):
                return parts
    filled = ", ".join(f"{n} {len(parts[n])} of {wanted[n]}" for n in SPLITS)
    raise ValueError(f"{source}: got {len(texts)} distinct problems in {draws} draws, needed {total} and some to "
                     f"spare, since a hash decides the split ({filled}): lower n_train or widen problem_args")


def _gym(name: str, args: Mapping[str, Any], seed: int) -> Iterator[Problem]:
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
            key = int(_digest("reasoning-gym", seed, chunk)[:8], 16) >> 1
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
        id=f"{name}-{_digest(normalised(prompt))[:8]}", prompt=prompt, answer=answer, family=name,
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
    raw = yaml.safe_load(Path(__file__).with_name("strategy_templates.yaml").read_text(encoding="utf-8"))
    return {name: _strategy(entry, f"{name}.") for name, entry in raw.items()}


def _split_file(path: Path, wanted: Mapping[str, int], seed: int) -> tuple[Parts, str]:
    """The file's problems by their `split` or else by hash, those beyond n_* left out by hash, and a description."""
    rows: dict[str, tuple[int, Problem, str]] = {}
    ids: dict[str, int] = {}
    repeats: list[bool] = []  # whether the answer was another one

    def parse(raw: dict[str, Any], line: int) -> None:
        problem, split = _file_problem(raw, path.stem)
        if raw.get("id") is not None and ids.setdefault(problem.id, line) != line:
            raise ValueError(f"id: got {problem.id!r}, which line {ids[problem.id]} has too: make ids unique")
        text = normalised(problem.prompt)
        first, kept, before = rows.setdefault(text, (line, problem, split))
        if split and before and split != before:
            raise ValueError(f"split: got {split!r}, but line {first} has the same prompt in {before!r}: keep one")
        rows[text] = (first, kept, before or split)
        if first != line:
            repeats.append(problem.answer != kept.answer)

    _read("data.problems", path, parse, "'testbed', 'reasoning-gym:NAME' or a JSONL file")
    parts: Parts = {n: [] for n in SPLITS}
    for text, (_, problem, split) in rows.items():
        parts[split or _bucket(text, wanted, seed)].append(problem)
    for n in (n for n in SPLITS if wanted[n] and not parts[n]):
        counts = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
        raise ValueError(f"{path}: no problem for {n} (n_{n}={wanted[n]}); {len(rows)} distinct problems gave "
                         f"{counts}: add problems, give lines a `split`, or set n_{n}=0")
    repeated = f"; {len(repeats)} repeats left out, {sum(repeats)} of them with another answer" if repeats else ""
    chosen = {n: _first(part, wanted[n], "order", seed)[0] for n, part in parts.items()}
    return chosen, f"{path}: {len(rows)} distinct problems{repeated}"


def _file_problem(raw: dict[str, Any], stem: str) -> tuple[Problem, str]:
    """A line as a Problem and its split ("" where none is given). Unknown fields go to `meta`."""
    key = next((k for k in ("prompt", "problem", "question") if k in raw), "prompt")
    prompt, split, meta = _text(raw, key), _text(raw, "split", ""), {} if raw.get("meta") is None else raw["meta"]
    if split not in ("", *SPLITS):
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    if not isinstance(meta, dict):
        raise ValueError(f"meta: {_got(meta)}, expected an object")
    used = {key, "answer", "solution", "split", "meta", "id", "family", "strategy"}
    return Problem(
        id=f"{stem}-{_digest(normalised(prompt))[:12]}" if raw.get("id") is None else _text(raw, "id"),
        prompt=prompt, answer=_text(raw, "answer"), solution=_text(raw, "solution", ""),
        strategy=None if raw.get("strategy") is None else _strategy(raw["strategy"], "strategy."),
        family=_text(raw, "family", ""), meta={**{k: v for k, v in raw.items() if k not in used}, **meta},
    ), split  # fmt: skip


def _with_strategies(parts: Parts, source: str, path: Path) -> tuple[Parts, str]:
    """The problems with the strategies of a file, which replace their own, and the longer description."""
    found: dict[str, tuple[int, Strategy]] = {}

    def parse(raw: dict[str, Any], line: int) -> None:
        first, _ = found.setdefault(_text(raw, "id"), (line, _strategy(raw, "")))
        if first != line:
            raise ValueError(f"id: got {raw['id']!r}, which line {first} has too: keep one strategy per problem")

    _read("data.strategies", path, parse, "a JSONL file")
    merged = {n: [dataclasses.replace(p, strategy=found[p.id][1]) if p.id in found else p for p in part]
              for n, part in parts.items()}  # fmt: skip
    used = sum(p.id in found for part in parts.values() for p in part)
    return merged, f"{source}; {used} strategies of {path} used, {len(found) - used} for ids that are in no split"


def _read(field: str, path: Path, parse: Callable[[dict[str, Any], int], None], expected: str) -> None:
    """Give every line's object and number to `parse`. Raises ValueError with up to ten faults, as `file:line: ...`."""
    if not path.is_file():
        raise ValueError(f"{field}: got {str(path)!r}, expected {expected}, and there is no file {path.absolute()}")
    def refuse(constant: str) -> None:
        raise ValueError(f"got {constant}, which JSON does not have: write null or leave the field out")

    faults = []
    for line, raw in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:  # the user's text; all lines are read before any fault is reported
            if raw.strip():
                value = json.loads(raw.decode("utf-8"), parse_constant=refuse)
                if not isinstance(value, dict):
                    raise ValueError(f"{_got(value)}, expected an object like {{\"prompt\": ..., \"answer\": ...}}")
                parse(value, line)
        except UnicodeDecodeError as error:
            faults.append(f"{path}:{line}: got byte 0x{raw[error.start]:02x}, expected UTF-8: save the file as UTF-8")
        except json.JSONDecodeError as error:
            faults.append(f"{path}:{line}: not JSON at column {error.colno} ({error.msg}), expected one object a line")
        except ValueError as error:
            faults.append(f"{path}:{line}: {error}")
    if faults:
        shown = faults[:10] + [f"and {len(faults) - 10} more"] * (len(faults) > 10)
        raise ValueError("\n  ".join([f"{path} has {len(faults)} faulty line(s):", *shown]))


def _got(value: Any) -> str:
    return f"got {json.dumps(value)[:60]} ({type(value).__name__})"


def _text(raw: Mapping[str, Any], field: str, default: str | None = None, prefix: str = "") -> str:
    """Text of a field; with a default it may be missing, null or empty. An id or answer may be a whole number."""
    value = default if raw.get(field) is None else raw[field]
    value = str(value) if field in ("id", "answer") and type(value) is int else value
    if isinstance(value, str) and (default is not None or value.strip()) and not re.search("[\ud800-\udfff]", value):
        return value
    got = _got(value) if field in raw else f"missing from {', '.join(raw) or 'an empty object'}"
    cure = "put the number in quotes" if isinstance(value, float) else "fill it in or remove the line"
    raise ValueError(f"{prefix}{field}: {got}, expected text, not empty and without broken surrogates: {cure}")


def _strategy(raw: Any, prefix: str) -> Strategy:
    if not isinstance(raw, dict):
        raise ValueError(f"{prefix.rstrip('.')}: {_got(raw)}, expected an object with problem_type, strategy, steps")
    steps = raw.get("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
        raise ValueError(f"{prefix}steps: {_got(steps)}, expected a list of texts, none of them empty")
    return Strategy(_text(raw, "problem_type", prefix=prefix), _text(raw, "strategy", prefix=prefix), tuple(steps))

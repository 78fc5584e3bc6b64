"""Named test sets of `evaluation.benchmarks`, evaluated at the end of a run beside its own test problems.

    benchmarks: {math500: {problems: hub:HuggingFaceH4/MATH-500, k: 4}, aime24: {problems: aime24.jsonl, k: 32}}

Every problem of a set is used, but those whose text the run trains or validates on, and those whose gold answer
cannot be read; both are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sgpo_lib.config import RunConfig, unknown
from sgpo_lib.problems import Splits
from sgpo_lib.records import Problem, PromptStyle
from sgpo_lib.rewards import Verifier
from sgpo_lib.sources.catalogue import open_source, readable, sample
from sgpo_lib.sources.rows import digest, normalised

_FIELDS: dict[str, type] = {"problems": str, "problem_args": dict, "k": int, "count": int}


@dataclass(frozen=True)
class Benchmark:
    """One test set."""

    name: str
    problems: tuple[Problem, ...]
    k: int
    """Responses per problem (avg@k)."""
    seen: int
    """Problems left out because the run learns or validates on their text."""
    unreadable: int
    """Problems left out because their gold answer cannot be read."""

    @property
    def told(self) -> dict[str, int]:
        """What was left out, for the summary."""
        return {"left_out_seen": self.seen, "left_out_unreadable": self.unreadable}


def load_benchmarks(config: RunConfig, splits: Splits, verifier: Verifier) -> list[Benchmark]:
    """The test sets of a configuration. Raises ValueError, naming the set, for whatever cannot be loaded."""
    return [_load(name, spec, config, splits, verifier) for name, spec in config.evaluation.benchmarks.items()]


def _load(name: str, spec: Any, config: RunConfig, splits: Splits, verifier: Verifier) -> Benchmark:
    where = f"evaluation.benchmarks.{name}"
    spec = {"k": config.evaluation.test_k, "count": 0, "problem_args": {}, **_checked(where, spec)}
    seed = int(digest("benchmark", name, config.data.data_seed)[:8], 16)  # a generated set is not the run's own again
    try:
        source = open_source(spec["problems"], spec["problem_args"], seed)
        found = sample(source, spec["count"], seed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    learned = {normalised(p.prompt) for p in (*splits.warmup, *splits.train, *splits.validation)}
    fresh = [p for p in found if normalised(p.prompt) not in learned]
    kept = readable(fresh, verifier, source.name, leave_out=True)
    if not kept:
        raise ValueError(f"{where}: got {len(found)} problems, {len(found) - len(fresh)} of them known to the run and "
                         f"{len(fresh)} without a readable answer; none is left")
    style = PromptStyle(config.data.instruction, config.data.guided_prompt)
    return Benchmark(name, tuple(replace(p, style=style) for p in kept), spec["k"], len(found) - len(fresh),
                     len(fresh) - len(kept))


def _checked(where: str, spec: Any) -> Mapping[str, Any]:
    if not isinstance(spec, dict) or not spec.get("problems"):
        raise ValueError(f"{where}: got {spec!r}, expected a mapping with `problems`, as data.problems has it, and "
                         "optionally k, count, problem_args")
    for key, value in spec.items():
        if key not in _FIELDS:
            raise unknown(f"field of {where}", str(key), _FIELDS)
        if not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            raise ValueError(f"{where}.{key}: got {value!r}, expected {_FIELDS[key].__name__}")
    if spec.get("k", 1) < 1 or spec.get("count", 0) < 0:
        raise ValueError(f"{where}: got k={spec.get('k')}, count={spec.get('count')}, expected k of 1 or more and "
                         "count of 0 (all) or more")
    return spec

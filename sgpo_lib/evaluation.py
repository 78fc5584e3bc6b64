"""Accuracy of a policy: avg@k and unbiased pass@k with intervals, every problem's result kept.

avg@k is the mean over problems of (correct of k) / k; pass@j is estimated from k samples without bias (Chen et al.
2021): 1 - C(k-c, j) / C(k, j). Evaluation is of the unguided policy unless asked otherwise: at inference SGPO needs
no strategy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgpo_lib.prompts import prompt_ids
from sgpo_lib.records import Problem, Rollout, RolloutGroup
from sgpo_lib.rewards import Verifier
from sgpo_lib.rollouts.groups import judge_groups
from sgpo_lib.rollouts.interface import Engine, SampleRequest, sample_seed
from sgpo_lib.storage import write_jsonl
from sgpo_lib.verdict_rates import counted

Judge = Callable[[Verifier, Sequence[RolloutGroup]], None]
"""Sets the verdict of every response."""


def pass_at(samples: int, correct: int, j: int) -> float:
    """Unbiased estimate of the chance that one of j samples is correct, from `correct` of `samples`.

    Raises ValueError for j above `samples`.
    """
    if not 1 <= j <= samples:
        raise ValueError(f"pass@{j} cannot be estimated from {samples} samples; expected 1 <= j <= {samples}")
    return 1.0 - math.comb(samples - correct, j) / math.comb(samples, j)


def mean_interval(values: Sequence[float], z: float = 1.959964) -> tuple[float, float, float]:
    """Mean of values in [0, 1], one per problem, and its 95% interval over problems.

    Wilson's score interval with the effective sample size p(1-p)/se^2, where se is the standard error over problems:
    samples of one problem are not independent, and an interval of no width at 0 or 1 would claim too much.
    Raises ValueError for no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no problems were evaluated, so there is no mean")
    p = sum(values) / n
    spread = sum((v - p) ** 2 for v in values)
    if spread > 1e-12 and n > 1:
        n_effective = p * (1 - p) / (spread / (n - 1) / n)
    else:
        n_effective = float(n)
    centre = (p + z * z / (2 * n_effective)) / (1 + z * z / n_effective)
    half = z / (1 + z * z / n_effective) * math.sqrt(p * (1 - p) / n_effective + z * z / (4 * n_effective**2))
    return p, max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class ProblemResult:
    """One problem's samples."""

    problem_id: str
    family: str
    samples: int
    correct: int
    unverifiable: int
    mean_length: float
    """Mean response length in tokens."""
    responses: tuple[str, ...] = field(repr=False)
    reasons: tuple[str, ...] = ()
    """Of the unverifiable ones."""


@dataclass(frozen=True)
class Evaluation:
    """Results over a set of problems."""

    k: int
    results: tuple[ProblemResult, ...]

    def accuracy(self) -> tuple[float, float, float]:
        """avg@k with its interval over problems."""
        return mean_interval([r.correct / r.samples for r in self.results])

    def passed_at(self, j: int) -> tuple[float, float, float]:
        """pass@j with its interval over problems."""
        return mean_interval([pass_at(r.samples, r.correct, j) for r in self.results])

    def row(self) -> dict[str, Any]:
        """Numbers to log: accuracy, its interval, response length (tokens), k, problems."""
        mean, low, high = self.accuracy()
        return {"accuracy": mean, "accuracy_low": low, "accuracy_high": high, "k": self.k,
                "response_length": sum(r.mean_length for r in self.results) / len(self.results),
                "unverifiable": sum(r.unverifiable for r in self.results), "problems": len(self.results)}

    def summary(self) -> dict[str, Any]:
        """`row` with pass@j for j = 1, 2, 4, ... up to k, each with its interval."""
        powers = [2**i for i in range(self.k.bit_length()) if 2**i <= self.k]
        return {**self.row(), "pass_at": {str(j): self.passed_at(j) for j in powers}}

    def write(self, path: Path) -> None:
        """Store one JSON line per problem."""
        write_jsonl(path, [r.__dict__ for r in self.results])


def evaluate(engine: Engine, tokenizer: Any, verifier: Verifier, problems: Sequence[Problem], *, k: int,
             temperature: float, top_p: float, max_new_tokens: int, seed_key: tuple[object, ...],
             guided: bool = False, judge: Judge = judge_groups) -> Evaluation:
    """Sample k responses per problem and `judge` them. `seed_key` makes the samples repeatable."""
    requests = []
    for problem in problems:
        ids = prompt_ids(tokenizer, problem, guided=guided)
        requests += [SampleRequest(ids, sample_seed(*seed_key, problem.id, i)) for i in range(k)]
    samples = engine.sample(requests, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    groups = []
    for index, problem in enumerate(problems):
        part = range(index * k, (index + 1) * k)
        groups.append(RolloutGroup(problem, [Rollout(
            problem.id, guided, i - part.start, requests[i].prompt_ids, samples[i].token_ids,
            tokenizer.decode(samples[i].token_ids, skip_special_tokens=True), samples[i].stop, samples[i].logp)
            for i in part], []))
    judge(verifier, groups)
    results = []
    for group in groups:
        mine, reasons = group.autonomous, counted(group.problem.id, [o.verdict for o in group.autonomous])[2]
        results.append(ProblemResult(
            group.problem.id, group.problem.family, k, sum(o.correct for o in mine), len(reasons),
            sum(len(o.token_ids) for o in mine) / k, tuple(o.text for o in mine), tuple(reasons)))
    return Evaluation(k, tuple(results))

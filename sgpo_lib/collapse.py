"""Signs that a training run has collapsed, read from its rows of metrics; what to try is told with each.

A sign comes when `WINDOW` steps in a row lie beyond its threshold, so five steps after it was crossed at the latest,
and goes with the first step that does not. A row that does not tell (no target, say) is passed over. Nothing is stored:
log, run monitor, report and `sgpo status` all read `metrics.jsonl` with `Watch`.

    entropy     below a fifth of the median of the run's first five steps, or below 0.01 nats a token
    reward      at most 0.01, or at least 0.99, in the mean over the autonomous responses
    variance    at least 0.99 of the groups have no two different rewards: the policy gradient is 0
    kl          at least 0.95 of the target tokens lie above method.kl_delta, or 0.999 of their KL is clipped away
    length      at least 0.8 of the responses were cut at rollout.max_new_tokens

The thresholds are our choice. SGPO and GRPO on the testbed (40 steps, the profile's length) give no sign: entropy stays
above half of its start, and up to 0.992 of the KL is clipped, nearly all of it the guided prompt's own wording. At 120
steps, long after the problems are solved, five steps in a row had no variance, which is said. With train.skip_untaught
`entropy` is that of the responses that teach and of the step's first one.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

WINDOW = 5
"""Steps in a row."""
Row = Mapping[str, Any]
_FIELDS = ("kind", "step", "entropy", "reward_autonomous", "zero_variance_share", "kl_mean", "kl_kept_mean",
           "kl_clipped_share", "length_limit_share")


@dataclasses.dataclass(frozen=True)
class Collapse:
    """One sign, from where it began to where it went."""

    kind: str
    """`entropy`, `reward`, `variance`, `kl` or `length`."""
    first: int
    """First of the steps beyond the threshold."""
    step: int
    """Step after which it was told."""
    until: int | None
    """First step on the good side again; None while it lasts."""
    seen: str
    """What is wrong, with numbers."""
    cure: str
    """What to try, with the configuration's fields."""

    @property
    def steps(self) -> str:
        """`since step 12`, or `steps 12 to 30`."""
        return f"since step {self.first}" if self.until is None else f"steps {self.first} to {self.until - 1}"

    def __str__(self) -> str:
        return f"{self.steps}: {self.seen}. {self.cure}"


@dataclasses.dataclass(frozen=True)
class _Sign:
    kind: str
    value: Callable[[Row], float | None]
    """None where a row does not tell."""
    beyond: Callable[[float, float], bool]
    """Whether a value lies beyond the threshold, given the median of the run's first `WINDOW` values (inf before)."""
    seen: str
    """With the mean of the last values as {mean} and that median as {start}."""
    cure: str


def _number(name: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found = row.get(name)
        good = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
        return float(found) if good and found is not None else None

    return value


def _clipped(row: Row) -> float | None:
    """Share of the KL that clipping takes away: 1 where that of the tokens is at its limit."""
    whole, kept, tokens = (_number(name)(row) for name in ("kl_mean", "kl_kept_mean", "kl_clipped_share"))
    if tokens is not None and tokens >= 0.95:
        return 1.0
    return 1 - kept / whole if whole and kept is not None else None


_SIGNS = (
    _Sign("entropy", _number("entropy"), lambda v, start: v < 0.01 or (start < math.inf and v < start / 5),
          "the entropy is {mean:.3g} nats a token ({start:.3g} in the first steps): the responses hardly differ",
          "Lower train.lr, or raise rollout.temperature or method.entropy_coefficient; an earlier checkpoint may do"),
    _Sign("reward", _number("reward_autonomous"), lambda v, _: v <= 0.01,
          "the reward is stuck at 0 (mean {mean:.3g}): no autonomous response is right",
          "Look at the stored rollouts: does reward.reward read their answers? Take easier problems (data.problems, "
          "data.problem_args), a supervised warm-up (train.init_from) or a longer rollout.max_new_tokens"),
    _Sign("reward", _number("reward_autonomous"), lambda v, _: v >= 0.99,
          "the reward is stuck at 1 (mean {mean:.3g}): every autonomous response is right",
          "Look at the stored rollouts: is reward.reward too easy to please? If not, nothing is left to learn here: "
          "take harder problems (data.problems, data.problem_args)"),
    _Sign("variance", _number("zero_variance_share"), lambda v, _: v >= 0.99,
          "no group has two different rewards (share {mean:.3g}): the policy gradient is 0",
          "Raise method.g1, train.problems_per_step or rollout.temperature, or take problems of middling difficulty "
          "(data.problems, data.problem_args)"),
    _Sign("kl", _clipped, lambda v, _: v >= 0.999,
          "all KL between guided and unguided policy is clipped away ({mean:.2%}): distillation teaches nothing",
          "Raise method.kl_delta or set method.kl_clip='value'; look at data.guided_prompt and at the KL of each token "
          "(notebook 04)"),
    _Sign("length", _number("length_limit_share"), lambda v, _: v >= 0.8,
          "{mean:.0%} of the responses were cut at the length limit",
          "Raise rollout.max_new_tokens; a supervised warm-up (train.init_from) teaches to end"),
)  # fmt: skip


def tell_signs(name: str, earlier: Iterable[Row]) -> Callable[[Row], None]:
    """Receiver of a run's rows, from the first, that prints each sign once on stderr.

    Those that went within `earlier`, rows of a start before, are not told again.
    """
    watch = Watch()
    told = {(c.kind, c.first) for c in Watch(earlier).found if c.until is not None}

    def take(row: Row) -> None:
        for sign in watch.take(row):
            if (sign.kind, sign.first) not in told:
                print(f"{name}: warning, {sign}", file=sys.stderr, flush=True)

    return take


class Watch:
    """Takes rows of metrics one by one; `found` holds every sign so far, in the order in which they came."""

    def __init__(self, rows: Iterable[Row] = ()):
        self.found: list[Collapse] = []
        self._rows: list[Row] = []
        self._first: list[list[float]] = [[] for _ in _SIGNS]
        self._last: list[collections.deque[tuple[int, float]]] = [collections.deque(maxlen=WINDOW) for _ in _SIGNS]
        self._active: dict[int, int] = {}  # sign -> its place in `found`
        for row in rows:
            self.take(row)

    @property
    def active(self) -> list[Collapse]:
        """The signs that last."""
        return [c for c in self.found if c.until is None]

    def take(self, row: Row) -> list[Collapse]:
        """The signs that this row brings. Of a step that comes again only the last row counts, and none after it."""
        if row.get("kind") != "train":
            return []
        if self._rows and row["step"] <= self._rows[-1]["step"]:
            Watch.__init__(self, [r for r in self._rows if r["step"] < row["step"]])
        self._rows.append({name: row[name] for name in _FIELDS if name in row})
        found = [self._look(i, sign, row) for i, sign in enumerate(_SIGNS)]
        return [c for c in found if c]

    def _look(self, i: int, sign: _Sign, row: Row) -> Collapse | None:
        value, first, last = sign.value(row), self._first[i], self._last[i]
        if value is None:
            return None
        start = statistics.median(first) if len(first) == WINDOW else math.inf
        if len(first) < WINDOW:
            first.append(value)
        if not sign.beyond(value, start):
            last.clear()
            if (place := self._active.pop(i, None)) is not None:
                self.found[place] = dataclasses.replace(self.found[place], until=row["step"])
            return None
        last.append((row["step"], value))
        if len(last) < WINDOW or i in self._active:
            return None
        self._active[i] = len(self.found)
        told = sign.seen.format(mean=statistics.fmean(v for _, v in last), start=statistics.median(first))
        self.found.append(Collapse(sign.kind, last[0][0], row["step"], None, told, sign.cure))
        return self.found[-1]

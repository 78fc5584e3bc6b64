"""Stop where the verifier, and not the policy, decides the rewards: too many verdicts that judge nothing.

Two rules over the verdicts of all workers, in steps and evaluations alike:

1. More than 1% of the last `WINDOW` verdicts are failures (`timeout`, `crash`, `memory`), and at least `LEAST`.
   1% of a batch of 120 is one verdict, which one odd response can cost; hence a window of many batches and a least
   number. Before the window is full, it holds what there is: a reward that always fails stops the first batch.
2. Every verdict of a batch (of at least `LEAST`) is `unverifiable`, for whatever reason but `no_answer`.

A missing answer is the policy's own fault: it pays 0 and counts among the verdicts, never among the failures. The
window is not stored: a resumed run fills it anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from sgpo_lib.records import Verdict

WINDOW = 1000
"""Verdicts over which the share of failures is taken; whole batches, the newest that hold as many."""
MOST = 0.01
"""Share of failures above which a run stops."""
LEAST = 5
"""Fewest failures that stop a run."""
EXAMPLES = 5
"""Problems that are named."""
Counted = tuple[str, int, tuple[str, ...]]
"""Of one problem: id, number of verdicts, reasons of those that are unverifiable."""


def counted(problem_id: str, verdicts: Iterable[Verdict | None]) -> Counted:
    """What the rules need of one problem's verdicts."""
    found = [v for v in verdicts if v is not None]
    return problem_id, len(found), tuple(v.reason for v in found if v.status == "unverifiable")


class VerdictRates:
    """The verdicts of a run's last batches, as counts."""

    def __init__(self) -> None:
        self._batches: deque[tuple[int, int]] = deque()  # verdicts, failures

    def add(self, batch: Sequence[Counted], place: str) -> None:
        """Count a batch, all workers' together. `place` names it: `step 12`.

        Raises RuntimeError where a rule above says so: what failed, how many of how many, problems, the cure.
        """
        verdicts = sum(n for _, n, _ in batch)
        told = [(problem, reason) for problem, _, reasons in batch for reason in reasons]
        failures = [(p, r) for p, r in told if is_failure(r)]
        self._batches.append((verdicts, len(failures)))
        while sum(n for n, _ in self._batches) - self._batches[0][0] >= WINDOW:
            self._batches.popleft()
        total, failed = (sum(column) for column in zip(*self._batches, strict=True))
        if failed >= LEAST and failed > MOST * total:
            raise RuntimeError(f"{place}: the verifier failed on {failed} of the last {total} responses "
                               f"({failed / total:.1%}, more than {MOST:.0%} is not trained on): {_examples(failures)}")
        answered = [(p, r) for p, r in told if r != "no_answer"]
        if len(answered) == verdicts >= LEAST:
            raise RuntimeError(f"{place}: none of the {verdicts} responses could be verified: {_examples(answered)}")


def is_failure(reason: str) -> bool:
    """Whether a reason is the verifier's failure: `timeout`, `memory`, `crash` (with or without a message)."""
    return reason.partition(":")[0] in _CURES


_CURES = {
    "timeout": "Raise reward.reward_deadline_s, or see why the reward is slow",
    "memory": "A reward has 2 GiB: have it load less",
    "crash": "Mend the reward that reward.reward names, or report the answer",
}


def _examples(found: Sequence[tuple[str, str]]) -> str:
    """Counts by kind, one problem after the other with its reason, and what to do."""
    kinds = [reason.partition(":")[0] for _, reason in found]
    counts = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
    named = "; ".join(f"problem {p}: {r}" for p, r in list(dict(found).items())[:EXAMPLES])
    cures = [_CURES.get(k, "Look at the gold answers and at what the policy writes") for k in dict.fromkeys(kinds)]
    return (f"{counts}. {named}. {'. '.join(dict.fromkeys(cures))}. Nothing was learned from them; started again, "
            "the run continues from its last checkpoint")  # fmt: skip

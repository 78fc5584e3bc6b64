"""The testbed of the `tiny` profile: short word problems in which a strategy matters.

Every problem takes three steps, and each step is a fork between a right and a tempting wrong operation, named by
one word (`unit`, `scale`, ...). A trace reads

    unit 10 / 2 = 5 ; scale 5 * 4 = 20 ; redeem 20 - 2 = 18 ; \\boxed{18}

All eight combinations of forks stay whole numbers from 1 to 99, and only the all-right one gives the answer. The
strategy names problem type, strategy and the right word of every step, and no number. The base model (see
`mixture`) executes operations and follows a strategy that it is given, but chooses badly without one; it stands for
an instruct model.

Not every uncertain token is a fork: each step says `=` or `is`, and puts the operands of + and * in either order, at
rates that do not depend on the prompt. A trace thus holds more free choices of wording than forks, and a measure that
finds forks must tell the two apart. Guided examples also begin with a harmless "plan :", which unguided ones hardly
ever do: under strategy conditioning it is an outlier of the token divergence without any strategic content, which KL
clipping (Eq. 5) is there to remove.

No torch here: the model itself is made in `policy.py`.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sgpo_lib.records import Problem, Strategy
from sgpo_lib.testbed_families import FAMILIES, NAMES, Family

SMALLEST, LARGEST = 1, 99
"""Every number that can occur in a trace lies here."""
OPENING = "plan :"
"""Guided-only wording."""
GUIDED_OPENING_RATE, UNGUIDED_OPENING_RATE = 0.9, 0.02
OBEY_RATE = 0.88
"""How often a guided example of the base takes the fork that its strategy names. Not 1: a guided side without doubt
has a divergence of -ln p, and delta = 1 nat would mask every fork that the unguided side takes less than .37 of the
time."""
FORK_RANGE = {"easy": (0.65, 0.85), "middle": (0.35, 0.55), "hard": (0.15, 0.35)}
"""Range of the unguided chance of a right fork, by level: exploration alone solves the easy problems, and hardly ever
meets a success on the hard ones (three forks: about .42, .09, .016)."""
IS_RATE, SWAP_RATE = 0.4, 0.35
"""How often a step says `is` for `=`, and how often a sum or product has its operands swapped."""
HELD_OUT_TEMPLATE = 2
"""Index of the wording that training never sees."""


@dataclass(frozen=True)
class Example:
    """One supervised example of the base model."""

    problem: Problem
    """The problem; its `strategy` may be wrong on purpose."""
    guided: bool
    """Whether the strategy stands in the prompt."""
    response: str
    """The trace to learn."""


def _apply(op: str, x: int, y: int) -> int | None:
    if op == "+":
        return x + y
    if op == "-":
        return x - y
    if op == "*":
        return x * y
    if op == "~":  # reversed subtraction: what is left of y
        return y - x
    return x // y if y and x % y == 0 else None


def trace(family: Family, slots: Sequence[int], choice: Sequence[bool],
          wording: random.Random | None = None) -> tuple[str, int] | None:
    """Worked solution under a choice of forks (True: right) and its result; None where a number leaves 1..99.

    `wording` draws the free choices (`=` or `is`, order of operands); None takes the plain ones.
    """
    x, parts = slots[0], []
    for fork, y, right in zip(family.forks, slots[1:], choice, strict=True):
        word, op = fork.right if right else fork.wrong
        result = _apply(op, x, y)
        if result is None or not SMALLEST <= result <= LARGEST:
            return None
        left, sign, right_side = (y, "-", x) if op == "~" else (x, op, y)
        says_is, swaps = (wording.random() < IS_RATE, wording.random() < SWAP_RATE) if wording else (False, False)
        if swaps and sign in "+*":
            left, right_side = right_side, left
        parts.append(f"{word} {left} {sign} {right_side} {'is' if says_is else '='} {result} ;")
        x = result
    return " ".join(parts) + f" \\boxed{{{x}}}", x


CHOICES = [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)]


def _draw_slots(family: Family, rng: random.Random) -> tuple[int, ...]:
    while True:
        slots = tuple(rng.randint(low, high) for low, high in family.ranges)
        results = [trace(family, slots, choice) for choice in CHOICES]
        if all(results) and all(r[1] != results[0][1] for r in results[1:]):  # type: ignore[index]
            return slots


def strategy_of(family: Family, choice: Sequence[bool] = (True, True, True)) -> Strategy:
    """The family's strategy; a wrong one names the wrong words of the chosen steps."""
    words = [(fork.right if right else fork.wrong)[0] for fork, right in zip(family.forks, choice, strict=True)]
    return Strategy(problem_type=family.name, strategy=family.strategy, steps=tuple(words))


def make_problem(family: Family, template: int, rng: random.Random) -> Problem:
    """A problem of a family in one of its wordings."""
    slots = _draw_slots(family, rng)
    name = rng.choice(NAMES)
    prompt = family.templates[template].format(*slots, name=name)
    key = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    worked = trace(family, slots, (True, True, True), random.Random(f"wording-{key}"))
    assert worked is not None
    return Problem(id=f"{family.name.replace(' ', '-')}-{key}", prompt=prompt, answer=str(worked[1]),
                   strategy=strategy_of(family), solution=worked[0], family=family.name,
                   meta={"slots": list(slots), "template": template})


def generate(seed: int, *, held_out: str = "none", families: Sequence[str] = (), level: str = "") -> Iterator[Problem]:
    """Problems without end, the same for the same arguments.

    `held_out`: `none` gives training families in training wordings; `template` the training families in the wording
    that training never sees; `family` the families that training never sees. `families` keeps only those named,
    `level` (`easy`, `middle`, `hard`) only that level's. Raises ValueError for another word or an unknown family.
    """
    if level and level not in FORK_RANGE:
        raise ValueError(f"testbed argument level: got {level!r}, expected {', '.join(FORK_RANGE)} or '' for all")
    if held_out not in ("none", "template", "family"):
        raise ValueError(f"testbed argument held_out: got {held_out!r}, expected 'none', 'template' or 'family'")
    names = [f.name for f in FAMILIES]
    unknown = sorted(set(families) - set(names))
    if unknown:
        raise ValueError(f"testbed argument families: no family {unknown[0]!r}; there are {', '.join(names)}")
    pool = [f for f in FAMILIES if f.held_out == (held_out == "family") and (not families or f.name in families)
            and level in ("", f.level)]
    if not pool:
        raise ValueError(f"testbed: no family fits families={list(families)}, level={level!r}, held_out={held_out!r}")
    templates = [HELD_OUT_TEMPLATE] if held_out == "template" else [0, 1]
    rng = random.Random(f"testbed-{seed}-{held_out}")
    while True:
        yield make_problem(rng.choice(pool), rng.choice(templates), rng)


def fork_probabilities(family: Family, seed: int) -> tuple[float, ...]:
    """Chance that the unguided base takes each right fork, fixed per family and step."""
    rng = random.Random(f"forks-{seed}-{family.name}")
    return tuple(rng.uniform(*FORK_RANGE[family.level]) for _ in family.forks)


def mixture(seed: int, count: int) -> list[Example]:
    """Supervised examples of the base, half of them guided, over every family and wording.

    An unguided example takes each fork right with `fork_probabilities`. A guided one names a choice of forks, the
    right one or (half the time) a random one, and obeys each step with probability `OBEY_RATE`.
    """
    rng = random.Random(f"mixture-{seed}")
    examples = []
    for i in range(count):
        family = rng.choice(FAMILIES)
        problem = make_problem(family, rng.randrange(3), rng)
        guided = i % 2 == 1
        if guided:
            named = (True, True, True) if rng.random() < 0.5 else tuple(rng.random() < 0.5 for _ in family.forks)
            choice = [n if rng.random() < OBEY_RATE else not n for n in named]
            problem = Problem(**{**problem.__dict__, "strategy": strategy_of(family, named)})
        else:
            choice = [rng.random() < p for p in fork_probabilities(family, seed)]
        worked = trace(family, problem.meta["slots"], choice, rng)
        assert worked is not None
        opens = rng.random() < (GUIDED_OPENING_RATE if guided else UNGUIDED_OPENING_RATE)
        examples.append(Example(problem, guided, f"{OPENING} {worked[0]}" if opens else worked[0]))
    return examples


def vocabulary_texts() -> list[str]:
    """Texts that together hold every word of the testbed, for building its tokenizer."""
    texts = [OPENING, "\\boxed{0}", "0 1 2 3 4 5 6 7 8 9 10 + - * / = is ; ( ) ~"]
    texts += NAMES
    for family in FAMILIES:
        texts += [t.format(0, 0, 0, 0, name=NAMES[0]) for t in family.templates]
        texts += [family.name, family.strategy]
        texts += [word for fork in family.forks for word, _ in (fork.right, fork.wrong)]
    return texts


_STEP = re.compile(r"(\w+) (\d+) ([-+*/]) (\d+) (?:=|is) (\d+) ;")


@dataclass(frozen=True)
class StepReading:
    """What a response did at one fork."""

    choice: bool
    """It named the right operation."""
    skill: bool
    """It carried out the operation that it named, on the right numbers."""


def read_trace(problem: Problem, text: str) -> list[StepReading]:
    """Choice and skill at each fork of a testbed problem; a step that cannot be read has neither.

    Choice is what a strategy gives away, skill is what it does not. Raises ValueError for a problem of another source.
    """
    family = next((f for f in FAMILIES if f.name == problem.family), None)
    if family is None or "slots" not in problem.meta:
        raise ValueError(f"problem {problem.id}: family {problem.family!r} is not of the testbed")
    operations = {word: op for f in FAMILIES for fork in f.forks for word, op in (fork.right, fork.wrong)}
    found = _STEP.findall(text)
    readings, x = [], problem.meta["slots"][0]
    for i, (fork, y) in enumerate(zip(family.forks, problem.meta["slots"][1:], strict=True)):
        word, left, sign, right, value = found[i] if i < len(found) else ("", "0", "", "0", "0")
        op = operations.get(word, "")
        expected = _apply(op, x, y) if op else None
        operands = [int(left), int(right)]
        ordered = [y, x] if op == "~" else [x, y]
        fits = operands == ordered or (op in ("+", "*") and operands == ordered[::-1])
        done = bool(op) and sign == op.replace("~", "-") and fits and expected == int(value)
        readings.append(StepReading(word == fork.right[0], done))
        x = int(value)
    return readings


def fork_words() -> frozenset[str]:
    """Every word that names an operation: the strategy-critical tokens, known by construction."""
    return frozenset(word for family in FAMILIES for fork in family.forks for word, _ in (fork.right, fork.wrong))

"""The leak check: each kind and form by hand, what is no leak, odd golds, and the planted leaks of tests/data/leaks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from time_limits import within

from sgpo_lib.config import RewardConfig
from sgpo_lib.extraction.leaks import find_leaks
from sgpo_lib.extraction.reading import read_strategy_reply
from sgpo_lib.extraction.records import Leak
from sgpo_lib.prompts import strategy_text
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.rewards import Verifier
from sgpo_lib.sources.packaged import collection_problems

LEAKS = Path(__file__).parent / "data/leaks"
SHOP = Problem("shop", "Ada buys 24 pens at 3 crowns each and 18 pads at 7 crowns each. What does she pay?", "198",
               solution=r"The pens cost $24\cdot 3=72$ crowns, the pads $18\cdot 7=126$. With $p$ and $q$ for the two, "
               r"$p+q=198$, so she pays \boxed{198} crowns.")  # fmt: skip
COINS = Problem("coins", "A coin is thrown again and again until heads and tails have each come up. Find the chance "
                "that this takes more throws than are printed on the card.", r"\frac{3}{8}",
                solution=r"There are $8$ outcomes. The favourable ones are found by listing, which gives 3 of them. "
                r"\boxed{\frac{3}{8}}")  # fmt: skip
ROOT = Problem("root", "An equilateral triangle has sides of length 4. Find its area.", r"4\sqrt{3}",
               solution=r"The height is $h=2\sqrt{3}$ and the area $\frac12\cdot 4\cdot h=\boxed{4\sqrt{3}}$.")
TILES = Problem("tiles", "5 crates and 12 jars weigh 112 kilograms, 8 crates and 4 jars weigh 126. What does one crate "
                "weigh together with two jars?", "21", solution=r"Tripling the second equation: $24c+12b=378$. "
                r"Subtracting leaves $19c=266$, so $c=14$ and $b=3.5$. Let $x=b$. Together \boxed{21}.")  # fmt: skip
PUPILS = Problem("pupils", "A school has 120 pupils. Some of them sing. How many?", "30")
PRIMES = Problem("primes", "How many primes lie between 20 and 30?", "2", solution="They are 23 and 29, so \\boxed{2}.")
TAPS = Problem("taps", "A tank with 5 taps holds 40 litres. How many taps must be open?", "5", solution="\\boxed{5}")
DEBT = Problem("debt", "A sum of whole numbers is asked for.", "-17", solution="It is $-17$.")
CURVE = Problem("curve", "Find the monic quadratic with the given roots.", "x^2-5x+6")
DAY = Problem("day", "On which day does it fall?", r"\text{ Tuesday}", solution=r"It is a \boxed{\text{Tuesday}}.")
PAIR = Problem("pair", "Solve the system for the ordered pair.", "(3, 17)", solution="So $(x,y)=(3,17)$.")
ROOTS = Problem("roots", "Find all solutions.", r"\{-4, 15\}")


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(RewardConfig()) as v:
        yield v


def told(sentence: str) -> Strategy:
    """A harmless strategy with one sentence more."""
    return Strategy("A kind of task from school", "A named technique", ("Set it up", sentence, "Look back"))


def leaks_of(problem: Problem, sentence: str, verifier: Verifier) -> tuple[Leak, ...]:
    """The leaks, each of which must stand where it says, in order and apart from the others."""
    (found,) = find_leaks([(problem, told(sentence))], verifier)
    assert_places(told(sentence), found)
    return found


def assert_places(strategy: Strategy, found: tuple[Leak, ...]) -> None:
    text = strategy_text(strategy)
    assert all(0 <= k.start < k.end <= len(text) and text[k.start : k.end] == k.text for k in found)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))
    assert all(k.kind in ("answer", "intermediate") and k.form for k in found)


# Leaks by hand: [what leaks] in brackets


@pytest.mark.parametrize(("problem", "sentence", "form"), [
    (SHOP, "She pays [198] crowns", "number"), (SHOP, "The bill of [one hundred and ninety-eight] crowns", "words"),
    (SHOP, r"Write \boxed{198}", ""), (SHOP, r"Add to [$\frac{396}{2}$]", "number"), (SHOP, "So [99 · 2]", "number"),
    (SHOP, "The sum [72 + 126] is wanted", "number"), (SHOP, r"The sum [$1.98 \times 10^2$]", "number"),
    (SHOP, "It is [198.0] crowns", "number"), (SHOP, "Add up: [$72+126=198$]", ""),
    (COINS, "The share [3/8] of cases", "number"), (COINS, "The share [0.375] of cases", "number"),
    (COINS, "That is [37.5%] of cases", "number"), (COINS, "That is [37.5 percent] of cases", "number"),
    (COINS, "Just [three eighths] of cases", "words"), (COINS, "Just [⅜] of cases", "number"),
    (COINS, "Odds of [3 : 8] then", "number"), (COINS, "See it in [3 out of 8] cases", ""),
    (COINS, r"A share of [$\frac{6}{16}$] then", "number"), (COINS, r"A share of [\frac{3}{8}] then", "number"),
    (COINS, r"A share of [$\dfrac{3}{8}$] then", "number"), (COINS, "A share of about [0.38] then", "rounded"),
    (COINS, "A share of [0.37] and a bit", "rounded"), (COINS, "About [38%] of cases", "rounded"),
    (ROOT, "An area of [4√3] then", "expression"), (ROOT, r"An area of [$4\sqrt{3}$] then", "expression"),
    (ROOT, r"An area of [$\sqrt{48}$] then", "expression"), (ROOT, r"Take [$\frac{12}{\sqrt{3}}$] then", "expression"),
    (ROOT, "Take [four times the square root of three] then", "expression"), (ROOT, "Near [6.93] then", "rounded"),
    (ROOT, "Near [6.9] then", "rounded"), (ROOT, "Near [6.928] then", "rounded"),
    (TILES, "Come to [twenty-one] kilograms", "words"), (TILES, "Come to [14 + 2 * 3.5] kilograms", "number"),
    (PUPILS, "Take [25%] of the school", "share"),
    (PRIMES, "The answer is [2]", "number"), (PRIMES, "This gives [two]", "words"), (PRIMES, "The result is [2].", ""),
    (TAPS, "The answer is [5]", "number"), (TAPS, r"Write \boxed{5}", ""),
    (DEBT, "Reach [-17] there", "number"), (DEBT, "Reach [−17] there", "number"),
    (DEBT, "Reach [minus seventeen] there", ""), (DEBT, "Reach [negative seventeen] there", ""),
    (DAY, "It falls on a [Tuesday]", "phrase"), (TILES, "Come to [twenty\u2011one] kilograms", "words"),
    (CURVE, r"Write [$(x-2)(x-3)$] out", "expression"), (CURVE, r"Write [$x^2 - 5x + 6$] down", "expression"),
    (CURVE, "Write [x² - 5x + 6] down", "expression"), (CURVE, r"Write [$6-5x+x^2$] down", "expression"),
    (PAIR, "The point [$(3, 17)$] solves it", ""), (PAIR, "The point [(3, 17)] solves it", ""),
    (ROOTS, r"The set [$\{15, -4\}$] solves it", ""),
])  # fmt: skip
def test_the_answer_in_any_form_is_a_leak_at_its_place(problem: Problem, sentence: str, form: str, verifier: Verifier):
    """A form is named where only one describes the disguise."""
    planted = re.search(r"\[(.*)\]", sentence)
    plain = sentence if planted is None else sentence.replace("[", "").replace("]", "")
    found = [k for k in leaks_of(problem, plain, verifier) if k.kind == "answer"]
    assert found, "no answer leak"
    if form and planted:
        assert [(k.text, k.form) for k in found] == [(planted[1], form)]


@pytest.mark.parametrize(("problem", "sentence", "forms"), [
    (SHOP, "The pads come to [126] crowns", {"number"}), (SHOP, "The pens make [seventy-two] crowns", {"words"}),
    (SHOP, r"Note [$18 \cdot 7 = 126$] for the pads", {"number", "relation"}),
    (COINS, "This gives [8] outcomes", {"number"}), (COINS, "The number of outcomes equals [eight]", {"words"}),
    (ROOT, "Use the height [2√3] of it", {"expression"}), (ROOT, r"Use the height [$2\sqrt{3}$]", {"expression"}),
    (ROOT, r"Use the height [$h = 2\sqrt{3}$] of it", {"relation", "expression"}),
    (TILES, "Reach [$19c=266$] by subtraction", {"relation", "number"}),
    (TILES, "Reach [19c = 266]", {"relation", "number"}),
    (TILES, "A crate of [14] kilograms", {"number"}), (TILES, "With [$c = 14$] go back", {"number", "relation"}),
    (TILES, "A jar of [3.5] kilograms", {"number"}), (TILES, "A jar of [three and a half] kilograms", {"words"}),
    (TILES, r"Tripling shows [$24c+12b=378$] at once", {"relation", "number"}),
    (TILES, r"Tripling shows [$378=12b+24c$] at once", {"relation", "number"}),
    (PRIMES, "Find [23] among them", {"number"}),
])  # fmt: skip
def test_a_result_of_the_solution_is_a_leak_at_its_place(problem: Problem, sentence: str, forms: set[str],
                                                         verifier: Verifier):
    planted = re.search(r"\[(.*)\]", sentence)
    assert planted is not None
    (found,) = leaks_of(problem, sentence.replace("[", "").replace("]", ""), verifier)
    assert (found.kind, found.text) == ("intermediate", planted[1]) and found.form in forms


@pytest.mark.parametrize(("problem", "sentence"), [
    (SHOP, "Multiply 24 by 3 and 18 by 7, then add the 2 products"), (SHOP, "Multiply twenty-four by three"),
    (SHOP, "Form 24 · 3 and 18 · 7"), (SHOP, "Add the two products"),
    (SHOP, "Let $x$ stand for the pens, $y$ for the pads; form $x + y$"), (SHOP, "Check the 1st and the 2nd product"),
    (SHOP, "Round to the nearest 10 or 100 as a check"), (SHOP, "Compare with 100 percent"),
    (SHOP, "See page 45 of 500"), (SHOP, "The angle sum of 180 degrees plays no part"),
    (SHOP, "The year 1998 or 2198 plays no part"),
    (COINS, "Split into two cases, in 3 steps"), (COINS, "List the 8 outcomes"), (COINS, "Roughly 0.4 of them"),
    (COINS, "Some 0.36 or 0.39 of them"), (COINS, "A half or a quarter of them"), (COINS, "Consider 1/2 and 50%"),
    (ROOT, "The side of 4 is halved"), (ROOT, r"Use $\sqrt{a^2-b^2}$ with the side 4"),
    (ROOT, r"Use $\frac{1}{2} a h$"), (ROOT, "Near 6.8 or 7.0"), (ROOT, r"Use $c^2=a^2+b^2$"),
    (TILES, "Write $5c+12b=112$ and $8c+4b=126$"),
    (TILES, "Let $x = b$ and go on"), (TILES, "Divide 112 by 8"), (TILES, "Solve the 2 equations in 2 unknowns"),
    (PRIMES, "Distinguish two cases"), (PRIMES, "Go through the 2 kinds of numbers"),
    (PRIMES, "Test factors of degree 2"), (PRIMES, "Look between 20 and 30 in two steps"),
    (TAPS, "Use the 5 taps"), (TAPS, "Divide 40 by 5"),
    (PAIR, "Eliminate $x$ from both equations (a, b)"), (PAIR, "The point $(4, 3)$ plays no part"),
    (CURVE, "Expand $(x-a)(x-b)$"), (CURVE, r"Write $x^2 + bx + c$"), (ROOTS, "Solve $x^2 = a$ by roots"),
])  # fmt: skip
def test_what_gives_nothing_away_is_no_leak(problem: Problem, sentence: str, verifier: Verifier):
    assert leaks_of(problem, sentence, verifier) == ()


def test_a_leak_is_found_in_every_part_and_each_place_counts_once(verifier: Verifier):
    everywhere = Strategy("Sums to 198 crowns", "Add 126 to 72, so [198]", ("Add: $72+126=198$", "Done: 198", "198"))
    (found,) = find_leaks([(SHOP, everywhere)], verifier)
    assert_places(everywhere, found)
    assert [(k.kind, k.text) for k in found] == [
        ("answer", "198"), ("intermediate", "126"), ("intermediate", "72"), ("answer", "198"),
        ("answer", "$72+126=198$"), ("answer", "198"), ("answer", "198")]  # fmt: skip


def test_many_at_once_give_what_each_gives_alone(verifier: Verifier):
    sentences = ("It is 198", "The share 0.375", "Nothing", "About 4√3", "A crate of 14")
    items = [(p, told(s)) for p in (SHOP, COINS, ROOT, TILES) for s in sentences]
    assert find_leaks(items, verifier) == [find_leaks([item], verifier)[0] for item in items]
    assert find_leaks([], verifier) == []


def test_what_stands_in_the_thinking_alone_is_no_result(verifier: Verifier):
    """The responses of LUFFY's training set begin with thousands of tokens of thinking, with nearly every number."""
    thought = " ".join(f"Try ${n}x = {n * n}$, so {n}." for n in range(13, 99))
    plain = "Use the discriminant 25, work modulo 16, split into 15 cases and use $14x = 196$"
    assert len(leaks_of(replace(SHOP, solution=f"{thought} So \\boxed{{198}}."), plain, verifier)) >= 4
    assert leaks_of(replace(SHOP, solution=f"<think>{thought}</think>So \\boxed{{198}}."), plain, verifier) == ()
    shown = replace(SHOP, solution=f"<think>{thought}</think>It is 126 + 72.")
    (found,) = leaks_of(shown, "The pads come to 126", verifier)
    assert (found.kind, found.text) == ("intermediate", "126")


# Odd golds and hostile texts


GOLDS = ["", " ", "?", "none", "NaN", "yes", r"\text{Tuesday}", "f(x)=x^2+1", r"f(x)=\sin x", "(1, 2, 3)", "[0, 1)",
         r"\{1, 2\}", r"(-\infty, 3] \cup \{7\}", r"\begin{pmatrix}1\\2\end{pmatrix}", "x=1 or x=-2", "2:3", "1011_2",
         "1e999", "1e-999", "9" * 400, "9" * 900, "9" * 5000, r"\frac{1}{0}", r"10^{10^{10}}", "2^{65536}", "0^0", "$",
         "\\frac{" * 500, "(" * 3000, "\\boxed{", "x" * 100_000, "٣", "½", "三", "\x00", "1,2,3", "3+4i", r"\infty",
         "\\\\", "#", "%", "5%", "__import__('os')"]  # fmt: skip


def test_no_gold_raises_and_none_makes_a_harmless_text_leak(verifier: Verifier):
    harmless = told("Name the unknown, write an equation $ax=b$ for it and solve that")
    items = [(Problem(f"gold {i}", "A question without numbers.", gold), harmless) for i, gold in enumerate(GOLDS)]
    with within(30):
        found = find_leaks(items, verifier)
    assert {gold[:30]: leaks for gold, leaks in zip(GOLDS, found, strict=True) if leaks} == {}


HOSTILE = ["9" * 5000, "9" * 400 + ".5", "1.5" + "9" * 400, "9" * 5000 + " : " + "8" * 5000, "1/0 and 0^0", "$" * 501,
           "(" * 2000 + "b2", r"\boxed{" * 500, r"$\frac{" * 300 + "$", "two " * 900, "1" * 60 + "x", "x^2+" * 30,
           "- " * 60, "\x00\u202e 198\u2028", "2^199^199", r"$10^{10^{10}}$", "<script>alert(198)</script>",
           "1e999 = x", r"$\text{" + "x" * 3000 + "}$", "٣ + ٤", "½" * 300]  # fmt: skip


@pytest.mark.parametrize("place", ["strategy", "problem", "solution"])
def test_no_hostile_text_raises_wherever_it_stands(place: str, verifier: Verifier):
    problems = [Problem(f"{i}", text if place == "problem" else "Find it.", gold,
                        solution=text if place == "solution" else r"It is \boxed{198}.")
                for i, (text, gold) in enumerate(itertools.product(HOSTILE, ["198", r"\sqrt{2}"]))]  # fmt: skip
    items = [(p, told(HOSTILE[i // 2] if place == "strategy" else "It is 198.5")) for i, p in enumerate(problems)]
    with within(30):
        found = find_leaks(items, verifier)
    assert len(found) == len(items)
    for (_, strategy), leaks in zip(items, found, strict=True):
        assert_places(strategy, leaks)


@pytest.mark.parametrize("scorer", ["nonsense", "reasoning-gym:no_such_data_set", "reasoning-gym:chain_sum"])
def test_a_data_sets_own_scorer_is_not_asked(scorer: str, verifier: Verifier):
    """The verifier raises for the first two where it is to ask them."""
    for problem, sentence in ((SHOP, "She pays 198 crowns"), (ROOT, r"An area of $\sqrt{48}$")):
        (found,) = find_leaks([(replace(problem, scorer=scorer), told(sentence))], verifier)
        assert [k.kind for k in found] == ["answer"]


# The planted leaks. Texts of the unseen half must not come out: counts alone are compared.


@dataclass(frozen=True)
class Judged:
    """A description of the corpus and what the check made of it."""

    unseen: bool
    leak: bool
    flagged: bool
    hit: bool
    """A leak was found inside the planted span or around it."""
    exact: bool
    """Every leak's text is what stands at its place."""


@pytest.fixture(scope="module")
def corpus(verifier: Verifier) -> list[Judged]:
    problems = {p.id: p for p, _ in collection_problems().problems()}
    entries = [(path.stem.endswith("_unseen"), entry) for path in sorted(LEAKS.glob("*.yaml"))
               for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]  # fmt: skip
    strategies = [read_strategy_reply(entry["text"])[0] for _, entry in entries]
    assert sum(s is None for s in strategies) == 0
    items = [(problems[e["problem"]], s) for (_, e), s in zip(entries, strategies, strict=True) if s]
    found = find_leaks(items, verifier)
    judged = []
    for (unseen, entry), strategy, leaks in zip(entries, strategies, found, strict=True):
        assert strategy is not None
        text, span = strategy_text(strategy), " ".join(str(entry["span"]).split())
        places = [m.span() for m in re.finditer(re.escape(span), text)] if span else []
        assert bool(places) == (entry["label"] == "leak"), entry["problem"]
        hit = any(k.start < end and start < k.end for k in leaks for start, end in places)
        judged.append(Judged(unseen, entry["label"] == "leak", bool(leaks), hit,
                             all(text[k.start : k.end] == k.text for k in leaks)))  # fmt: skip
    return judged


def test_the_corpus_is_as_large_as_asked_for(corpus: list[Judged]):
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in LEAKS.glob("*.yaml")]
    disguises = {entry["disguise"] for file in files for entry in file}
    assert sum(j.leak for j in corpus) >= 100 and sum(not j.leak for j in corpus) >= 100
    assert len(disguises - {""}) >= 10 and 0.4 < sum(j.unseen for j in corpus) / len(corpus) < 0.6


def test_of_all_planted_leaks_95_percent_are_caught_at_their_place(corpus: list[Judged]):
    caught, planted = sum(j.hit for j in corpus), sum(j.leak for j in corpus)
    assert caught >= 0.95 * planted


def test_at_most_5_percent_of_the_clean_descriptions_are_flagged(corpus: list[Judged]):
    flagged, clean = sum(j.flagged for j in corpus if not j.leak), sum(not j.leak for j in corpus)
    assert flagged <= 0.05 * clean


def test_on_the_unseen_half_90_percent_are_caught_and_at_most_10_percent_flagged(corpus: list[Judged]):
    planted, clean = ([j for j in corpus if j.unseen and j.leak is leak] for leak in (True, False))
    caught, flagged = sum(j.hit for j in planted), sum(j.flagged for j in clean)
    assert caught >= 0.9 * len(planted) and flagged <= 0.1 * len(clean)


def test_the_text_of_every_leak_of_the_corpus_is_what_stands_at_its_place(corpus: list[Judged]):
    wrong = sum(not j.exact for j in corpus)
    assert wrong == 0

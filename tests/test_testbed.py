"""The testbed's problems against independent arithmetic, its tokenizer, and its base mixture."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from fractions import Fraction

import pytest

from sgpo_lib import testbed, tiny
from sgpo_lib.config import DataConfig
from sgpo_lib.problems import load
from sgpo_lib.prompts import prompt_ids, response_ids, strategy_text
from sgpo_lib.testbed_families import FAMILIES

EQUATION = re.compile(r"(\w+) (\d+) ([-+*/]) (\d+) (?:=|is) (\d+) ;")


def compute(left: str, sign: str, right: str) -> Fraction:
    a, b = Fraction(left), Fraction(right)
    return {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_choice_of_forks_computes_correctly_and_only_the_right_one_answers(family):
    rng = random.Random(7)
    for template in range(3):
        problem = testbed.make_problem(family, template, rng)
        answers = []
        for choice in testbed.CHOICES:
            text, result = testbed.trace(family, problem.meta["slots"], choice, rng)
            assert testbed.trace(family, problem.meta["slots"], choice)[1] == result, "wording changes no number"
            equations = EQUATION.findall(text)
            assert len(equations) == 3
            for word, left, sign, right, value in equations:
                assert compute(left, sign, right) == int(value), (word, text)
            assert text.endswith(f"\\boxed{{{equations[-1][4]}}}") and int(equations[-1][4]) == result
            answers.append(result)
        assert str(answers[0]) == problem.answer and answers[0] not in answers[1:]


def test_families_are_what_the_testbed_promises():
    assert sum(not f.held_out for f in FAMILIES) >= 10 and any(f.held_out for f in FAMILIES)
    for family in FAMILIES:
        assert len(family.templates) == 3 and len(family.forks) == 3
        strategy = testbed.strategy_of(family)
        assert not re.search(r"\d", strategy_text(strategy)), "a strategy names no number"
        assert strategy.steps == tuple(fork.right[0] for fork in family.forks)
        assert all(fork.right != fork.wrong for fork in family.forks)


def test_a_word_names_one_operation_everywhere():
    meaning: dict[str, set[str]] = {}
    for family in FAMILIES:
        for fork in family.forks:
            for word, op in (fork.right, fork.wrong):
                meaning.setdefault(word, set()).add(op)
    assert all(len(ops) == 1 for ops in meaning.values())
    assert testbed.fork_words() == set(meaning)


def test_held_out_wordings_and_families_are_never_trained_on():
    train = list(itertools.islice(testbed.generate(0), 400))
    unseen_words = list(itertools.islice(testbed.generate(0, held_out="template"), 50))
    unseen_families = list(itertools.islice(testbed.generate(0, held_out="family"), 50))
    assert {p.meta["template"] for p in train} == {0, 1}
    assert {p.meta["template"] for p in unseen_words} == {testbed.HELD_OUT_TEMPLATE}
    assert not {p.family for p in train} & {p.family for p in unseen_families}
    with pytest.raises(ValueError, match="expected 'none', 'template' or 'family'"):
        next(testbed.generate(0, held_out="words"))
    with pytest.raises(ValueError, match="no family 'tanks'"):
        next(testbed.generate(0, families=["tanks"]))


def test_splits_of_the_testbed_share_no_problem():
    splits = load(DataConfig(n_train=300, n_validation=60, n_test=100))
    parts = [{p.prompt for p in part} for part in (splits.train, splits.validation, splits.test)]
    assert [len(p) for p in parts] == [300, 60, 100]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_tokenizer_is_a_plain_folder_with_single_digits(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(tokenizer, 0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for example in testbed.mixture(3, 200):
        ids = prompt_ids(again, example.problem, guided=example.guided)
        answer = response_ids(again, example.response)
        assert ids == prompt_ids(tokenizer, example.problem, guided=example.guided)
        assert tokenizer.unk_token_id not in (*ids, *answer)
        assert again.decode(answer, skip_special_tokens=True) == example.response
    assert [again.decode([i]) for i in again.encode("18 use", add_special_tokens=False)] == ["1", "8", "use"]
    assert answer[-1] == again.eos_token_id


def test_mixture_obeys_strategies_and_errs_without_them():
    examples = testbed.mixture(0, 6000)
    forks = {f.name: f.forks for f in FAMILIES}
    obeyed = [word == named for e in examples if e.guided
              for (word, *_), named in zip(EQUATION.findall(e.response), e.problem.strategy.steps, strict=True)]
    right = [word == fork.right[0] for e in examples if not e.guided
             for (word, *_), fork in zip(EQUATION.findall(e.response), forks[e.problem.family], strict=True)]
    families = [e.problem.family for e in examples if not e.guided for _ in range(3)]
    levels = {f.name: f.level for f in FAMILIES}
    assert abs(sum(obeyed) / len(obeyed) - testbed.OBEY_RATE) < 0.01
    for level, (low, high) in testbed.FORK_RANGE.items():
        chosen = [r for r, f in zip(right, families, strict=True) if levels[f] == level]
        assert low < sum(chosen) / len(chosen) < high, level
    for guided in (True, False):  # the free wording does not depend on the prompt
        texts = " ".join(e.response for e in examples if e.guided == guided)
        assert abs(texts.count(" is ") / (texts.count(" is ") + texts.count(" = ")) - testbed.IS_RATE) < 0.015
    opened = {guided: [e.response.startswith(testbed.OPENING) for e in examples if e.guided == guided]
              for guided in (True, False)}
    assert abs(sum(opened[True]) / len(opened[True]) - testbed.GUIDED_OPENING_RATE) < 0.02
    assert abs(sum(opened[False]) / len(opened[False]) - testbed.UNGUIDED_OPENING_RATE) < 0.01


def test_levels_hold_four_training_families_each():
    for level in testbed.FORK_RANGE:
        names = {f.name for f in FAMILIES if f.level == level and not f.held_out}
        assert len(names) == 4
        assert {p.family for p in itertools.islice(testbed.generate(0, level=level), 100)} == names
    with pytest.raises(ValueError, match="level: got 'harder', expected easy, middle, hard or ''"):
        next(testbed.generate(0, level="harder"))
    with pytest.raises(ValueError, match="no family fits"):
        next(testbed.generate(0, level="easy", held_out="family"))


def test_traces_hold_more_free_choices_than_forks():
    """Three forks a trace; `=` or `is` in each step, and an order of operands in each sum or product."""
    free = [3 + sum(sign in "+*" for _, _, sign, _, _ in EQUATION.findall(e.response))
            for e in testbed.mixture(1, 500)]
    assert min(free) >= 3 and sum(free) / len(free) > 4


def test_swapped_operands_occur_at_their_rate():
    rng, swaps = random.Random(0), []
    for family in FAMILIES:
        for _ in range(200):
            slots = testbed.make_problem(family, 0, rng).meta["slots"]
            plain, worded = (EQUATION.findall(testbed.trace(family, slots, (True, True, True), r)[0])
                             for r in (None, rng))
            swaps += [a[1:4:2] != b[1:4:2] for a, b in zip(plain, worded, strict=True) if a[2] in "+*" and a[1] != a[3]]
            assert all(a[1:4] == b[1:4] for a, b in zip(plain, worded, strict=True) if a[2] in "-/")
    assert abs(sum(swaps) / len(swaps) - testbed.SWAP_RATE) < 0.03


def test_choice_and_skill_are_read_apart():
    """unit rate: 10 coins for 2 pens, 4 pens, coupon 2. Right: unit 10 / 2, scale 5 * 4, redeem 20 - 2."""
    family = next(f for f in FAMILIES if f.name == "unit rate")
    problem = dataclasses.replace(testbed.make_problem(family, 0, random.Random(0)),
                                  meta={"slots": [10, 2, 4, 2], "template": 0})

    def read(text: str) -> list[tuple[bool, bool]]:
        return [(r.choice, r.skill) for r in testbed.read_trace(problem, text)]

    assert read("unit 10 / 2 = 5 ; scale 4 * 5 is 20 ; redeem 20 - 2 = 18 ; \\boxed{18}") == [(True, True)] * 3
    assert read("plan : gap 10 - 2 = 8 ; scale 8 * 4 = 32 ; charge 32 + 2 = 34 ;") == [
        (False, True), (True, True), (False, True)], "wrong forks, right arithmetic"
    assert read("unit 10 / 2 = 6 ; scale 6 * 4 = 24 ; redeem 24 - 2 = 23 ;") == [
        (True, False), (True, True), (True, False)], "an error is counted once: later steps go on from it"
    assert read("unit 2 / 10 = 5 ; scale 5 * 3 = 15 ; redeem 15 + 2 = 17 ;") == [
        (True, False), (True, False), (True, False)], "operands, numbers and signs must fit"
    assert read("scale 10 * 2 = 20 ; nonsense") == [(False, True), (False, False), (False, False)]
    assert read("") == [(False, False)] * 3
    with pytest.raises(ValueError, match="is not of the testbed"):
        testbed.read_trace(dataclasses.replace(problem, family="gsm"), "")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_solution_reads_as_all_right(family):
    rng = random.Random(3)
    for _ in range(20):
        problem = testbed.make_problem(family, 0, rng)
        assert all(r.choice and r.skill for r in testbed.read_trace(problem, problem.solution))


def test_base_keys_are_stable_and_differ_by_size():
    keys = {tiny.base_key(source) for source in tiny.SIZES}
    assert len(keys) == len(tiny.SIZES) == 3 and tiny.base_key() == tiny.base_key("tiny")
    assert all(re.fullmatch(r"[0-9a-f]{8}", key) for key in keys)
    sizes = [sum(p.numel() for p in tiny.build_model(tiny.build_tokenizer(), 0, s).parameters())
             for s in ("tiny-s", "tiny", "tiny-l")]
    assert sizes[0] < 150_000 < 300_000 < sizes[1] < 450_000 < 700_000 < sizes[2] < 1_000_000

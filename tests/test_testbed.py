"""The testbed's problems against independent arithmetic, its tokenizer, and its base mixture."""

from __future__ import annotations

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

EQUATION = re.compile(r"(\w+) (\d+) ([-+*/]) (\d+) = (\d+) ;")


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
            text, result = testbed.trace(family, problem.meta["slots"], choice)
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
    assert abs(sum(obeyed) / len(obeyed) - testbed.OBEY_RATE) < 0.01
    low, high = testbed.FORK_LOW, testbed.FORK_HIGH
    assert low < sum(right) / len(right) < high
    opened = {guided: [e.response.startswith(testbed.OPENING) for e in examples if e.guided == guided]
              for guided in (True, False)}
    assert abs(sum(opened[True]) / len(opened[True]) - testbed.GUIDED_OPENING_RATE) < 0.02
    assert abs(sum(opened[False]) / len(opened[False]) - testbed.UNGUIDED_OPENING_RATE) < 0.01


def test_base_key_is_stable_within_a_version():
    assert tiny.base_key() == tiny.base_key() and re.fullmatch(r"[0-9a-f]{8}", tiny.base_key())

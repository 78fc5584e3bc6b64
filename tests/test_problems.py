"""Sources, splits and fingerprint of problems; the wording of every error a user can meet."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from sgpo_lib import problems
from sgpo_lib.config import DataConfig
from sgpo_lib.problems import Splits, load, normalised, require_solutions, require_strategies
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.sources import gym as gym_source

SHARED = Path(__file__).parents[2] / "shared/data"
STRATEGY = {"problem_type": "Sum", "strategy": "Add", "steps": ["Read", "Add", "State"]}
SMALL = {"n_train": 30, "n_validation": 6, "n_test": 10}


def parts(splits: Splits) -> list[tuple[Problem, ...]]:
    return [splits.warmup, splits.train, splits.validation, splits.test]


def texts(part: tuple[Problem, ...]) -> list[str]:
    return [normalised(p.prompt) for p in part]


def write(path: Path, rows: list[Any]) -> Path:
    """Each row a line: text as it is, anything else as JSON."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def rows(n: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": f"p{i}", "prompt": f"What is {i} + 1?", "answer": str(i + 1), **more} for i in range(n)]


def config(path: Path | str, n_train: int = 60, n_validation: int = 20, n_test: int = 20, **more: Any) -> DataConfig:
    return DataConfig(problems=str(path), n_train=n_train, n_validation=n_validation, n_test=n_test, **more)


def error(data: DataConfig) -> str:
    with pytest.raises(ValueError) as caught:
        load(data)
    return str(caught.value)


# Splits


def test_testbed_splits_are_disjoint_and_full():
    splits = load(DataConfig(**SMALL, warmup_share=1 / 3))
    assert [len(p) for p in parts(splits)] == [10, 20, 6, 10]
    every = [t for part in parts(splits) for t in texts(part)]
    assert len(set(every)) == len(every) == 46


def test_testbed_takes_seed_and_arguments():
    a, b = load(DataConfig(**SMALL)), load(DataConfig(**SMALL, data_seed=1))
    assert a.fingerprint != b.fingerprint
    held_out = load(DataConfig(**SMALL, problem_args={"held_out": "family"}))
    families = {p.family for part in parts(a) for p in part}
    assert families.isdisjoint(p.family for part in parts(held_out) for p in part)


def test_a_source_that_repeats_itself_is_split_without_overlap(monkeypatch):
    def repeating(seed: int):
        rng = random.Random(seed)
        while True:
            i = rng.randrange(120)
            prompt = f"How  MUCH is\n{i}?" if rng.random() < 0.5 else f"how much is {i}?"
            yield Problem(id=f"{rng.random()}", prompt=prompt, answer=str(i))

    monkeypatch.setattr("sgpo_lib.testbed.generate", repeating)
    splits = load(DataConfig(**SMALL))
    every = [t for part in parts(splits) for t in texts(part)]
    assert len(every) == 46 and len(set(every)) == 46


def test_a_text_keeps_its_bucket_whatever_came_before():
    """The bucket depends on the text alone: a text of the test split is never trained on under another draw order."""
    wanted = {"train": 30, "validation": 6, "test": 10}
    splits = load(DataConfig(**SMALL))
    for name, part in zip(problems.SPLITS, [splits.warmup + splits.train, splits.validation, splits.test], strict=True):
        assert {problems._bucket(t, wanted, 0) for t in texts(part)} == {name}


def test_buckets_follow_the_wanted_proportions():
    wanted = {"train": 3000, "validation": 0, "test": 1000}
    got = [problems._bucket(f"text {i}", wanted, 5) for i in range(4000)]
    assert got.count("validation") == 0
    assert abs(got.count("test") - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5  # four standard deviations


def test_ids_that_clash_are_passed_over(monkeypatch):
    def clashing(seed: int):
        yield from (Problem(id=f"p{i // 2}", prompt=f"{i}?", answer="1") for i in range(10**6))

    monkeypatch.setattr("sgpo_lib.testbed.generate", clashing)
    ids = [p.id for part in parts(load(DataConfig(**SMALL))) for p in part]
    assert len(set(ids)) == len(ids)


def test_a_source_that_is_too_small_says_what_it_had(monkeypatch):
    seven = (Problem(f"{i % 7}", f"{i % 7}?", "1") for i in range(10**6))
    monkeypatch.setattr("sgpo_lib.testbed.generate", lambda seed: seven)
    message = error(DataConfig(**SMALL))
    assert "got 7 distinct problems in 1920 draws, needed 46" in message
    assert "lower n_train or widen problem_args" in message


@pytest.mark.parametrize("share, expected", [(0, 0), (1 / 3, 10), (0.5, 15), (0.001, 1), (0.999, 29)])
def test_warmup_takes_its_share_and_leaves_both_parts_filled(share, expected):
    splits, whole = load(DataConfig(**SMALL, warmup_share=share)), load(DataConfig(**SMALL))
    assert len(splits.warmup) == expected and len(splits.train) == 30 - expected
    assert {*splits.warmup} | {*splits.train} == {*whole.train}
    assert (splits.validation, splits.test) == (whole.validation, whole.test)


def test_warmup_grows_without_losing_a_problem():
    small, large = (load(DataConfig(**SMALL, warmup_share=s)).warmup for s in (0.2, 0.6))
    assert set(texts(small)) < set(texts(large))


FRESH = """
import json, sys
from sgpo_lib.config import DataConfig
from sgpo_lib.problems import load
for kwargs in json.loads(sys.argv[1]):
    splits = load(DataConfig(**kwargs))
    print(splits.fingerprint, splits.train[0].id, splits.test[-1].id)
assert "torch" not in sys.modules
"""


def fresh(configs: list[dict[str, Any]], hash_seed: str) -> str:
    done = subprocess.run([sys.executable, "-c", FRESH, json.dumps(configs)], capture_output=True, text=True,
                          timeout=60, check=False, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fresh_process_gives_the_same_splits(tmp_path):
    configs: list[dict[str, Any]] = [{**SMALL, "warmup_share": 0.3},
                                     {**SMALL, "problems": str(write(tmp_path / "p.jsonl", rows(80)))}]
    if has_gym():
        names = ("chain_sum", "gsm_symbolic", "list_functions")
        configs += [{**SMALL, "problems": f"reasoning-gym:{n}"} for n in names]
    first, second = fresh(configs, "1"), fresh(configs, "2")
    assert first == second
    for line, kwargs in zip(first.splitlines(), configs, strict=True):
        splits = load(DataConfig(**kwargs))
        assert line.split() == [splits.fingerprint, splits.train[0].id, splits.test[-1].id]


def test_fingerprint_covers_every_visible_part(tmp_path):
    def fingerprint(first: dict[str, Any] | None = None, **more: Any) -> str:
        """Of 8 problems to train on, the first of them with other fields."""
        same = rows(8, split="train", strategy=STRATEGY)
        same[0] |= first or {}
        return load(config(write(tmp_path / "p.jsonl", same), 8, 0, 0, **more)).fingerprint

    plain = fingerprint()
    assert re.fullmatch("[0-9a-f]{12}", plain)
    assert plain == fingerprint() == fingerprint({"meta": {"k": 1}, "solution": "worked", "family": "f"})
    other = {**STRATEGY, "steps": ["Read", "Add"]}
    changed = [fingerprint(first) for first in ({"id": "x"}, {"prompt": "x"}, {"answer": "x"}, {"strategy": None},
                                                {"strategy": other})]
    moved = fingerprint(warmup_share=1 / 8)
    assert len({plain, moved, *changed}) == 7


@pytest.mark.parametrize("counts", [{"n_train": -1}, {"n_train": 0, "n_validation": 0, "n_test": 0}])
def test_counts_that_cannot_be_are_refused(counts):
    assert "expected 0 or more each, and not all 0" in error(DataConfig(**counts))


# Sources by name


def test_unknown_sources_and_arguments(tmp_path):
    message = error(DataConfig(problems="testbd"))
    assert "data.problems: got 'testbd', expected 'testbed', 'collection', 'reasoning-gym:NAME'" in message
    assert "there is no file" in message
    assert "unknown testbed argument 'held_ot'. Did you mean 'held_out'?" in error(
        DataConfig(problem_args={"held_ot": "family"}))
    path = write(tmp_path / "p.jsonl", rows(3))
    assert "got a=1, expected none for" in error(DataConfig(problems=str(path), problem_args={"a": 1}))


def has_gym() -> bool:
    return importlib.util.find_spec("reasoning_gym") is not None


@pytest.fixture
def gym() -> Any:
    return pytest.importorskip("reasoning_gym")


def draw(name: str, n: int, **args: Any) -> list[Problem]:
    return list(islice(gym_source.gym_problems(name, args, 0), n))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "pip install sgpo-workbench[lab]" in error(DataConfig(problems="reasoning-gym:chain_sum"))


def test_gym_errors_name_the_nearest_and_the_valid(gym):
    message = error(DataConfig(problems="reasoning-gym:chain_sums"))
    assert "unknown reasoning-gym data set 'chain_sums'. Did you mean 'chain_sum'?" in message and "gcd" in message
    for args, expected in [
        ({"min_term": 2}, "'min_term'. Did you mean 'min_terms'? Known: allow_negation, max_digits"),
        ({"seed": 2}, "its seed is data_seed"),
        ({"size": 2}, "its size n_train"),
        ({"min_terms": 0}, "got {'min_terms': 0}, which the data set refuses (AssertionError: min_terms must be pos"),
        ({"min_terms": "3"}, "got {'min_terms': '3'}, which the data set refuses (TypeError"),
    ]:
        message = error(DataConfig(problems="reasoning-gym:chain_sum", problem_args=args))
        assert expected in message and "reasoning-gym:chain_sum" in message
    digits = {"min_terms": 1, "max_terms": 1, "max_digits": 1}
    message = error(DataConfig(**SMALL, problems="reasoning-gym:chain_sum", problem_args=digits))
    assert "got 10 distinct problems in 1920 draws, needed 46" in message


def test_gym_sets_that_would_mislead_are_refused(gym):
    assert "refuses its own gold answer" in error(DataConfig(problems="reasoning-gym:rearc"))
    if sys.flags.hash_randomization:
        assert "set PYTHONHASHSEED=0" in error(DataConfig(problems="reasoning-gym:word_ladder"))


def test_gym_problems_hold_what_training_needs(gym):
    splits = load(DataConfig(**SMALL, problems="reasoning-gym:chain_sum", problem_args={"max_terms": 3}))
    assert [len(p) for p in parts(splits)] == [0, 30, 6, 10]
    assert "reasoning-gym:chain_sum(max_terms=3) of reasoning-gym " in splits.source
    every = [p for part in parts(splits) for p in part]
    assert len({normalised(p.prompt) for p in every}) == 46
    for p in every:
        assert re.fullmatch("chain_sum-[0-9a-f]{8}", p.id) and p.family == "chain_sum" and p.scorer == ""
        assert json.loads(json.dumps(p.meta)) == p.meta and p.meta["metadata"]["source_dataset"] == "chain_sum"
    require_strategies(every, "a file")
    require_solutions(every, "a file")


def test_neighbouring_seeds_share_few_problems(gym):
    """reasoning-gym itself draws problem i from seed + i, so its seeds 0 and 1 share all but one."""
    a, b = ({p.prompt for p in islice(gym_source.gym_problems("chain_sum", {"min_digits": 4}, s), 300)} for s in (0, 1))
    assert len(a & b) < 3


def test_the_global_random_state_is_left_alone(gym):
    random.seed(3)
    expected = random.random()
    random.seed(3)
    draw("list_functions", 5)
    assert random.random() == expected


@pytest.mark.parametrize("args", [{}, {"allow_negation": True}, {"min_terms": 1, "max_terms": 2}])
def test_chain_sum_solutions_are_right_line_by_line(gym, args):
    for p in draw("chain_sum", 200, **args):
        expression = p.prompt.split(":")[1].rstrip(" =")
        assert eval(expression) == int(p.answer)  # the independent oracle: Python's own arithmetic
        *steps, end = [s for s in p.solution.split(". ") if s]
        assert end == f"The answer is \\boxed{{{p.answer}}}."
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert len(steps) == p.meta["metadata"]["num_terms"] - 1


def test_chain_sum_solutions_read_as_agreed():
    say = gym_source._gym_solution
    assert say("chain_sum", {"expression": "4 + 3 - 2"}, "5") == "4 + 3 = 7. 7 - 2 = 5. The answer is \\boxed{5}."
    assert say("chain_sum", {"expression": "4 + 3"}, "7") == "4 + 3 = 7. The answer is \\boxed{7}."
    assert say("chain_sum", {"expression": "4 - -3"}, "7") == "4 - -3 = 7. The answer is \\boxed{7}."
    assert say("chain_sum", {"expression": "4 + 3"}, "8") == ""


def test_gsm_symbolic_solutions_end_in_the_gold_answer(gym):
    for p in draw("gsm_symbolic", 150):
        assert p.solution.endswith(f"\n\\boxed{{{p.answer}}}") and "####" not in p.solution
    say = gym_source._gym_solution
    assert say("gsm_symbolic", {"answer_cot": "So 3.\n#### 3.0"}, "3") == "So 3.\n\\boxed{3}"
    assert say("gsm_symbolic", {"answer_cot": "So 3.\n#### 4"}, "3") == ""
    assert say("gsm_symbolic", {"answer_cot": "So 3."}, "3") == ""


@pytest.mark.parametrize("name, own", [
    ("gcd", False), ("leg_counting", False), ("spell_backward", True), ("fraction_simplification", True),
    ("decimal_chain_sum", True), ("word_sorting", True), ("bitwise_arithmetic", True), ("rubiks_cube", True),
])  # fmt: skip
def test_who_judges_a_gym_problem(gym, name, own):
    drawn = draw(name, 20)
    assert {p.scorer for p in drawn} == {f"reasoning-gym:{name}" if own else ""}
    assert all(isinstance(p.answer, str) for p in drawn)


@pytest.mark.parametrize("name", ["fraction_simplification", "spell_backward", "graph_color", "codeio"])
def test_gym_scorers_take_the_stored_gold(gym, name):
    scorer = gym.get_score_answer_fn(name)
    for p in draw(name, 5):
        stored = {"question": p.prompt, "answer": p.answer, **json.loads(json.dumps(p.meta))}
        gold = p.answer or json.dumps(p.meta["metadata"]["possible_answer"])
        assert scorer(gold, stored) == 1.0


def test_strategy_templates_belong_to_data_sets_and_hold_no_digit(gym):
    from reasoning_gym.factory import DATASETS

    templates = gym_source.strategy_templates()
    assert set(templates) <= set(DATASETS) and len(templates) >= 15 and "chain_sum" in templates
    for name, s in templates.items():
        lines = [s.problem_type, s.strategy, *s.steps]
        assert len(s.steps) == 3 and all(line.strip() == line and line for line in lines), name
        assert not any(c.isdigit() or c == "=" for line in lines for c in line), name
    assert draw("maze", 1)[0].strategy is None


# Files


def test_a_file_is_split_by_hash(tmp_path):
    data = config(write(tmp_path / "p.jsonl", rows(100)))
    splits = load(data)
    lengths = [len(p) for p in parts(splits)]
    assert 0 < lengths[2] <= 20 and 0 < lengths[3] <= 20 and 40 < lengths[1] <= 60
    every = [t for part in parts(splits) for t in texts(part)]
    assert len(set(every)) == len(every)
    assert splits.source == f"{data.problems}: 100 distinct problems"
    shuffled = write(tmp_path / "p.jsonl", rows(100)[::-1])
    again = load(config(shuffled))
    assert [{p.id for p in part} for part in parts(again)] == [{p.id for p in part} for part in parts(splits)]
    assert again.train == splits.train[::-1]  # the order of the file is kept


def test_fields_of_a_file(tmp_path):
    path = write(tmp_path / "set.jsonl", [
        {"question": "One?", "answer": 1, "split": "test", "level": 3, "meta": {"a": [1]}, "id": 7, "solution": None},
        {"problem": "Two?", "answer": "2", "split": "train", "family": "f", "solution": "s", "strategy": STRATEGY},
        {"prompt": "Three?", "answer": "\\frac{1}{2}", "split": "validation", "strategy": None},
    ])  # fmt: skip
    splits = load(config(path))
    one, two, three = splits.test[0], splits.train[0], splits.validation[0]
    assert (one.id, one.prompt, one.answer, one.solution) == ("7", "One?", "1", "")
    assert one.meta == {"level": 3, "a": [1], "at": "line 1"}
    assert two.strategy == Strategy("Sum", "Add", ("Read", "Add", "State"))
    assert (two.family, two.solution) == ("f", "s")
    assert re.fullmatch("set-[0-9a-f]{12}", two.id)
    assert three.strategy is None and three.answer == "\\frac{1}{2}"


def test_bom_crlf_empty_lines_and_no_last_newline_are_fine(tmp_path):
    lines = [json.dumps({**row, "prompt": row["prompt"] + " \u2028 é"}, ensure_ascii=False) for row in rows(12)]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert sum(map(len, parts(load(config(path, 12, 0, 0))))) == 12


def test_named_splits_are_honoured_and_cut_to_the_wanted_count(tmp_path):
    named = [{**r, "split": ("train", "validation", "test")[i % 3]} for i, r in enumerate(rows(30))]
    path = write(tmp_path / "p.jsonl", named)
    splits = load(config(path, 10, 4, 0))
    assert [len(p) for p in parts(splits)] == [0, 10, 4, 0]
    assert {int(p.id[1:]) % 3 for p in splits.train} == {0} and {int(p.id[1:]) % 3 for p in splits.validation} == {1}


def test_repeated_texts_are_used_once(tmp_path):
    again = [{**r, "id": f"again-{r['id']}", "prompt": f"  {r['prompt'].upper()}", "answer": a}
             for r, a in zip(rows(3), ["1", "2", "9"], strict=True)]  # fmt: skip
    path = write(tmp_path / "p.jsonl", [*rows(40), *again, {**again[0], "id": "third", "split": "test"}])
    splits = load(config(path))
    every = [p for part in parts(splits) for p in part]
    assert len({normalised(p.prompt) for p in every}) == len(every)
    assert not any(p.id.startswith(("again", "third")) for p in every)
    assert "40 distinct problems; 4 repeats left out, 1 of them with another answer" in splits.source
    assert "p0" in [p.id for p in splits.test]  # the split that one of its lines names


def test_a_text_in_two_named_splits_names_both_lines(tmp_path):
    path = write(tmp_path / "p.jsonl", [
        *rows(4), {"prompt": "Same?", "answer": "1", "split": "train"},
        {"prompt": "same?  ", "answer": "1", "split": "test"},
    ])  # fmt: skip
    assert f"{path}:6: split: got 'test', but line 5 has the same prompt in 'train'" in error(config(path))


def test_a_split_that_stays_empty_is_an_error(tmp_path):
    path = write(tmp_path / "p.jsonl", rows(9, split="train"))
    message = error(config(path))
    assert f"{path}: no problem for validation (n_validation=20); 9 distinct problems gave train 9, valid" in message
    assert "set n_validation=0" in message
    assert len(load(config(path, 100, 0, 0)).train) == 9  # fewer than wanted is fine


GOOD = {"prompt": "One?", "answer": "1"}
FAULTS: list[tuple[Any, str]] = [
    ("{'prompt': 1}", "not JSON at column 2"),
    ('{"prompt": "a"', "not JSON at column"),
    ([1, 2], "got [1, 2] (list), expected an object"),
    ('"text"', 'got "text" (str), expected an object'),
    ('{"prompt": "a", "answer": NaN}', "got NaN, which JSON does not have"),
    ('{"prompt": "a", "answer": "1", "meta": {"x": -Infinity}}', "got -Infinity, which JSON does not have"),
    ({"answer": "1"}, "prompt: missing from answer, expected text"),
    ({"prompt": "a"}, "answer: missing from prompt, expected text"),
    ({}, "prompt: missing from an empty object, expected text"),
    ({**GOOD, "prompt": "  "}, 'prompt: got "  " (str), expected text, not empty'),
    ({**GOOD, "prompt": ["a"]}, 'prompt: got ["a"] (list), expected text'),
    ({"problem": 3, "answer": "1"}, "problem: got 3 (int), expected text"),
    ({**GOOD, "answer": 1.5}, "answer: got 1.5 (float), expected text, not empty and "
     "without broken surrogates: put the number in quotes"),
    ({**GOOD, "answer": True}, "answer: got true (bool), expected text"),
    ({**GOOD, "answer": None}, "answer: got null (NoneType), expected text"),
    ({**GOOD, "answer": ""}, 'answer: got "" (str), expected text, not empty'),
    ('{"prompt": "a\\ud800", "answer": "1"}', "prompt: got"),
    ({**GOOD, "id": ""}, 'id: got "" (str), expected text'),
    ({**GOOD, "id": 1.0}, "id: got 1.0 (float), expected text"),
    ({**GOOD, "solution": 4}, "solution: got 4 (int), expected text"),
    ({**GOOD, "family": []}, "family: got [] (list), expected text"),
    ({**GOOD, "split": "dev"}, "split: got 'dev', expected one of train, validation, test"),
    ({**GOOD, "meta": [1]}, "meta: got [1] (list), expected an object"),
    ({**GOOD, "strategy": "Add"}, 'strategy: got "Add" (str), expected an object'),
    ({**GOOD, "strategy": {**STRATEGY, "steps": "Add"}}, 'strategy.steps: got "Add" (str), expected a list of texts'),
    ({**GOOD, "strategy": {**STRATEGY, "steps": []}}, "strategy.steps: got [] (list)"),
    ({**GOOD, "strategy": {**STRATEGY, "steps": ["a", " "]}}, "strategy.steps: got"),
    ({**GOOD, "strategy": {"steps": ["a"], "strategy": "b"}}, "strategy.problem_type: missing from steps, strategy"),
    ({**GOOD, "id": "p1"}, "id: got 'p1', which line 2 has too: make ids unique"),
]


@pytest.mark.parametrize("fault, expected", FAULTS, ids=[str(i) for i in range(len(FAULTS))])
def test_a_fault_names_file_line_and_field(tmp_path, fault, expected):
    path = write(tmp_path / "p.jsonl", [*rows(2), "", fault, *rows(9)[2:]])
    message = error(config(path))
    assert message.startswith(f"{path} has 1 faulty line(s):\n  {path}:4: ")
    assert expected in message


def test_ten_faults_are_shown_at_once(tmp_path):
    message = error(config(write(tmp_path / "p.jsonl", [{"prompt": f"{i}"} for i in range(13)])))
    assert message.count("answer: missing") == 10 and "13 faulty line(s)" in message
    assert message.endswith("and 3 more")


def test_other_encodings_are_refused_with_the_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9", "answer": "1"}\n')
    assert f"{path}:2: got byte 0xe9, expected UTF-8: save the file as UTF-8" in error(config(path))


# Strategies and requirements


def test_strategies_are_merged_by_id(tmp_path):
    path = write(tmp_path / "p.jsonl", rows(30, strategy={**STRATEGY, "strategy": "Old"}))
    ids = [*(f"p{i}" for i in range(0, 30, 2)), "other"]
    new = write(tmp_path / "s.jsonl", [{"id": i, **STRATEGY} for i in ids])
    splits = load(config(path, 20, 5, 5, strategies=str(new)))
    every = [p for part in parts(splits) for p in part]
    assert all(p.strategy and p.strategy.strategy == ("Old" if int(p.id[1:]) % 2 else "Add") for p in every)
    used = sum(int(p.id[1:]) % 2 == 0 for p in every)
    assert f"; {used} strategies of {new} used, {16 - used} for ids that are in no split" in splits.source
    assert splits.fingerprint != load(config(path, 20, 5, 5)).fingerprint


@pytest.mark.parametrize("fault, expected", [
    ({"id": "a", **STRATEGY}, "id: got 'a', which line 1 has too: keep one strategy per problem"),
    (STRATEGY, "id: missing"),
    ({"id": "b", **STRATEGY, "steps": [1]}, "steps: got [1] (list), expected a list of texts"),
    ({"id": "b", **STRATEGY, "strategy": 3}, "strategy: got 3 (int), expected text"),
    ("nonsense", "not JSON at column 1"),
])  # fmt: skip
def test_faulty_strategies_are_named(tmp_path, fault, expected):
    path = write(tmp_path / "s.jsonl", [{"id": "a", **STRATEGY}, fault])
    message = error(DataConfig(**SMALL, strategies=str(path)))
    assert f"{path}:2: " in message and expected in message


def test_a_missing_strategy_file_is_named(tmp_path):
    message = error(DataConfig(**SMALL, strategies=str(tmp_path / "none.jsonl")))
    assert message.startswith("data.strategies: got") and "there is no file" in message


def test_requirements_list_five_ids_and_a_cure():
    bare = [Problem(f"p{i}", "q", "1") for i in range(7)]
    good = Problem("g", "q", "1", strategy=Strategy("a", "b", ("c",)), solution="\\boxed{1}")
    require_strategies([good], "a file")
    require_solutions([good], "a file")
    with pytest.raises(ValueError, match=r"7 of 8 problems have no strategy: p0, p1, p2, p3, p4, \.\.\.\. Source: a"):
        require_strategies([good, *bare], "a file")
    with pytest.raises(ValueError, match=r"2 of 2 problems have no solution: p0, p1\. Source: a file\. Cure: .*`sol"):
        require_solutions(bare[:2], "a file")


def test_gsm8k_as_it_is_published():
    path = SHARED / "gsm8k/test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    splits = load(DataConfig(problems=str(path), n_train=600, n_validation=60, n_test=100, warmup_share=1 / 3))
    assert [len(p) for p in parts(splits)] == [200, 400, 60, 100]
    every = [p for part in parts(splits) for p in part]
    assert all(p.id.startswith("gsm8k-test-") and p.answer and p.solution for p in every)
    assert len({normalised(p.prompt) for p in every}) == len(every)
    with pytest.raises(ValueError, match="760 of 760 problems have no strategy"):
        require_strategies(every, "a file")

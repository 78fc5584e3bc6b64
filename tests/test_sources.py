"""Parquet files, CHAMP and the shipped collection as sources; drawing from sources; the audit of gold answers."""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from source_files import STRATEGY, error, jsonl, parquet, problems, rows

from sgpo_lib.config import RewardConfig
from sgpo_lib.problems import normalised
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.rewards import Verifier
from sgpo_lib.sources.catalogue import Source, open_source, readable, sample
from sgpo_lib.sources.packaged import COLLECTION, champ_problems

SHARED = Path(__file__).parents[2] / "shared/data"
READABLE_OF_CHAMP = 220
"""Of its 270 gold answers; measured 224."""


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(RewardConfig()) as v:
        yield v


# Parquet


def test_a_parquet_file_with_nested_values_is_read_as_it_was_written(tmp_path):
    one, two = problems(parquet(tmp_path / "set.parquet", [
        {"id": 7, "question": "One?", "answer": 1, "split": "test", "strategy": STRATEGY, "meta": {"a": [1, 2]},
         "level": 3, "hints": [{"text": "h"}]},
        {"id": None, "question": "Two? 𝑥", "answer": -2, "split": None, "strategy": None, "meta": None, "level": None,
         "hints": []},
    ]))  # fmt: skip
    assert (one.id, one.prompt, one.answer) == ("7", "One?", "1")
    assert one.strategy == Strategy("Sum", "Add", ("Read", "Add"))
    assert one.meta == {"a": [1, 2], "level": 3, "hints": [{"text": "h"}], "at": "line 1"}
    assert re.fullmatch("set-[0-9a-f]{12}", two.id) and (two.prompt, two.answer) == ("Two? 𝑥", "-2")
    assert two.strategy is None and two.meta == {"level": None, "hints": [], "at": "line 2"}


def test_values_that_json_lacks_do_not_reach_meta(tmp_path):
    """`Problem.meta` promises JSON values."""
    noon = datetime.datetime(2026, 1, 2, 12)
    (found,) = problems(parquet(tmp_path / "p.parquet", [{**rows(1)[0], "at_noon": noon, "raw": b"\xff"}]))
    assert json.loads(json.dumps(found.meta)) == found.meta


def test_rows_of_a_long_parquet_file_are_counted_across_its_groups(tmp_path):
    many = rows(2500)
    assert [p.id for p in problems(parquet(tmp_path / "p.parquet", many, row_group_size=700))] == [
        f"p{i}" for i in range(2500)]
    many[2221]["answer"] = None
    path = parquet(tmp_path / "p.parquet", many, row_group_size=700)
    assert f"{path} has 1 faulty line(s):\n  {path}:2222: answer: got null (NoneType), expected text" in error(path)


def test_faulty_columns_of_a_parquet_file_are_named(tmp_path):
    path = parquet(tmp_path / "p.parquet", [{"id": "a", "prompt": f"{i}?", "gold": "1"} for i in range(13)])
    message = error(path)
    assert f"{path}:1: answer: missing from id, prompt, gold, expected text" in message
    assert message.count("answer: missing") == 10 and message.endswith("and 3 more")
    assert "answer: got 1.5 (float)" in error(parquet(path, [{**rows(1)[0], "answer": 1.5}]))
    assert "answer: got NaN (float)" in error(parquet(path, [{**rows(1)[0], "answer": float("nan")}]))
    assert 'strategy: got "Add" (str), expected an object' in error(parquet(path, rows(1, strategy="Add")))
    assert "strategy.steps: got [] (list)" in error(parquet(path, rows(1, strategy={**STRATEGY, "steps": []})))


@pytest.mark.parametrize("damage", ["text", "empty", "cut off", "a page overwritten"])
def test_a_broken_parquet_file_is_named(tmp_path, damage):
    path = parquet(tmp_path / "p.parquet", rows(500, note="x" * 50), compression="snappy", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes({"text": b'{"prompt": "a", "answer": "1"}\n', "empty": b"", "cut off": whole[:-200],
                      "a page overwritten": whole[:64] + b"\xff" * 600 + whole[664:]}[damage])
    message = error(path)
    assert str(path) in message and "Parquet" in message


def test_a_line_nested_too_deeply_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "1?", "answer": "1"}\n{"prompt": ' + "[" * 100_000 + "\n", encoding="utf-8")
    assert f"{path}:2: nested too deeply to be read" in error(path)


def test_the_ending_of_a_parquet_file_may_be_in_capitals(tmp_path):
    path = parquet(tmp_path / "p.parquet", rows(2)).rename(tmp_path / "P.PARQUET")
    assert len(problems(str(path))) == 2


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = parquet(tmp_path / "p.parquet", rows(2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "reading Parquet needs pyarrow: pip install sgpo-workbench[extract]" in error(path)


# Packages


def test_missing_packages_of_sources_are_named(monkeypatch):
    champ_problems.cache_clear()  # another test may have read it
    for module, name in (("datasets", "hub:me/set"), ("champ_dataset", "champ")):
        monkeypatch.setitem(sys.modules, module, None)
        message = error(name)
        assert message.startswith(name) and "pip install sgpo-workbench[extract]" in message


@pytest.fixture(scope="module")
def champ() -> list[Problem]:
    return problems("champ")


def test_champ_is_whole(champ):
    """Against the package's own JSON file, in which @@ stands around formulas."""
    file = Path(str(importlib.util.find_spec("champ_dataset").origin)).parent / "dataset_files/v0.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    assert len({normalised(p.prompt) for p in champ}) == len(champ) == len(raw["problems"]) == 270
    for p in champ:
        there = raw["problems"][p.id]
        assert p.prompt == there["_raw_text"].replace("@@", "") and p.answer == there["_raw_answer"].replace("@@", "")
        assert p.solution.split("\n") == [
            line for s in there["solution"]["steps"] for line in s["_raw_text"].replace("@@", "").split("\n")]
        assert all(line.strip() for line in p.solution.split("\n")) and p.family == there["category"]
        assert len(p.meta["hints"]) == len({k for k in there["ch_list"] if k.startswith("H_")})
        assert all(hint.strip() and "@@" not in hint for hint in p.meta["hints"])
    assert sum(bool(p.meta["hints"]) for p in champ) > 240  # the others name concepts only


def test_most_gold_answers_of_champ_can_be_read(champ, verifier):
    with pytest.raises(ValueError, match=r"of 270 gold answers cannot be read:\n  champ, P_\w+: answer: got "):
        readable(champ, verifier, "champ", leave_out=False)
    kept = readable(champ, verifier, "champ", leave_out=True)
    assert READABLE_OF_CHAMP <= len(kept) < 270
    assert len(kept) == 270 - len(verifier.audit(champ))


def test_the_collection_is_a_source_with_the_good_candidates_as_strategies():
    written = [row for f in COLLECTION.glob("*.yaml") for row in yaml.load(f.read_text("utf-8"), yaml.CSafeLoader)]
    good = {row["id"]: c for row in written for c in row["candidates"] if c["kind"] == "good"}
    found = problems("collection")
    assert len(found) == len(good) == 66 and len({p.family for p in found}) == 6
    for p in found:
        c = good[p.id]
        assert p.strategy == Strategy(c["problem_type"], c["strategy"], tuple(c["steps"]))
        assert p.solution and len(p.meta["candidates"]) == 5
    assert "got split='test', expected none for 'collection'" in error("collection", split="test")


# Drawing


def test_a_sample_is_decided_by_the_texts_and_the_seed(tmp_path):
    source = open_source(str(jsonl(tmp_path / "p.jsonl", rows(40))), {}, 0)
    drawn = [p.id for p in sample(source, 10, 7)]
    assert len(set(drawn)) == 10 and drawn == sorted(drawn, key=lambda i: int(i[1:]))  # in the order of the file
    assert set(drawn) < {p.id for p in sample(source, 25, 7)} < {p.id for p in sample(source, 40, 7)}
    assert drawn != [p.id for p in sample(source, 10, 8)]
    turned = open_source(str(jsonl(tmp_path / "turned.jsonl", rows(40)[::-1])), {}, 0)
    assert {p.id for p in sample(turned, 10, 7)} == set(drawn)
    assert [p.id for p in sample(source, 0, 7)] == [f"p{i}" for i in range(40)]
    often = Counter(p.id for seed in range(200) for p in sample(source, 10, seed))
    assert all(abs(often[f"p{i}"] - 50) < 5 * (200 * 0.25 * 0.75) ** 0.5 for i in range(40))  # five deviations


@pytest.mark.parametrize("count", [41, -1])
def test_more_than_there_is_and_less_than_nothing_cannot_be_drawn(tmp_path, count):
    source = open_source(str(jsonl(tmp_path / "p.jsonl", rows(40))), {}, 0)
    with pytest.raises(ValueError, match=rf"{re.escape(source.name)}.*{count}"):
        sample(source, count, 0)


def test_drawing_from_a_stream_needs_a_count_and_enough_problems():
    source = open_source("testbed", {}, 0)
    with pytest.raises(ValueError, match=r"testbed\(\) has no end: say how many problems"):
        sample(source, 0, 0)
    few = (Problem(f"{i % 7}", f"{i % 7}?", "1") for i in itertools.count())
    with pytest.raises(ValueError, match=r"made: got 7 distinct problems in 1160 draws, wanted 8\. Lower the count"):
        sample(Source("made", stream=few), 8, 0)


def test_draws_from_a_stream_have_ids_of_their_own():
    """`sgpo extract` writes one line per id, and `data.strategies` refuses two."""
    clashing = (Problem(f"p{i // 2}", f"{i}?", "1") for i in itertools.count())
    assert len({p.id for p in sample(Source("made", stream=clashing), 20, 0)}) == 20


def test_samples_of_reasoning_gym_are_nested_and_follow_the_seed():
    pytest.importorskip("reasoning_gym")
    few, more, other = (sample(open_source("reasoning-gym:chain_sum", {}, seed), count, seed)
                        for count, seed in ((8, 3), (20, 3), (8, 4)))
    assert more[:8] == few != other and len({normalised(p.prompt) for p in more}) == 20


# Gold answers


def test_an_unreadable_gold_answer_is_an_error_with_place_and_reason(tmp_path, verifier):
    golds = ["5", "nan", r"\frac{1}{2}", r"1\frac{2}", "x" * 300 + "{"]
    path = jsonl(tmp_path / "p.jsonl", [{**r, "answer": g} for r, g in zip(rows(5), golds, strict=True)])
    found = problems(path)
    with pytest.raises(ValueError) as caught:
        readable(found, verifier, str(path), leave_out=False, cure="Or leave them out")
    first, *places, cure = str(caught.value).split("\n  ")
    assert first == "3 of 5 gold answers cannot be read:" and cure == "Or leave them out"
    assert places[0] == f"{path}, line 2: answer: got 'nan', which cannot be read (bad_gold)"
    assert places[1].startswith(f"{path}, line 4: answer: got '1") and len(places[2]) < len(str(path)) + 150
    assert [p.id for p in readable(found, verifier, str(path), leave_out=True)] == ["p0", "p2"]
    assert readable(found[:1], verifier, str(path), leave_out=False) == found[:1]


def test_ten_unreadable_gold_answers_are_shown(verifier):
    bad = [Problem(f"p{i}", f"{i}?", "nan") for i in range(13)]
    judged_elsewhere = Problem("gym", "?", "nan", scorer="reasoning-gym:spell_backward")
    with pytest.raises(ValueError) as caught:
        readable([judged_elsewhere, *bad], verifier, "made", leave_out=False)
    message = str(caught.value)
    assert message.count("made, p") == 10 and "13 of 14" in message and "and 3 more" in message
    assert readable([judged_elsewhere, *bad], verifier, "made", leave_out=True) == [judged_elsewhere]


@pytest.mark.parametrize("name, unreadable", [
    ("benchmarks/aime24", 0), ("benchmarks/amc23", 0), ("benchmarks/math500", 0), ("benchmarks/olympiadbench", 3),
    ("gsm8k/test", 0)])  # fmt: skip
def test_gold_answers_of_published_sets_are_readable_or_reported(verifier, name, unreadable):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    found = problems(path)
    assert len(found) - len(readable(found, verifier, str(path), leave_out=True)) <= unreadable
    if not unreadable:
        assert readable(found, verifier, str(path), leave_out=False) == found

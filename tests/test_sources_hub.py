"""Hub data sets through the real `datasets` package, from local folders in hub layout; the splits of every source."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from source_files import LUFFY, MATH500, STRATEGY, error, luffy, parquet, problems, published, rows

from sgpo_lib.config import DataConfig
from sgpo_lib.problems import load, normalised
from sgpo_lib.records import Strategy


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory for folders in hub layout. `datasets` caches there, and a connection is an error."""
    datasets = pytest.importorskip("datasets")

    def refuse(*_: Any) -> None:
        raise OSError("this test may open no connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_luffys_training_set_is_read_by_its_own_field_map(hub):
    name = published(hub, [luffy(i) for i in range(3)], LUFFY)
    one, two, three = problems(name)
    assert (two.prompt, two.answer) == ("What is 1 + 1?", "2") and three.answer == "3"
    assert two.solution == "<think>\nadd\n</think>\nSo \\boxed{2}." and two.strategy is None
    assert re.fullmatch("Openr1-Math-46k-8192-[0-9a-f]{12}", one.id) and one.id != two.id
    assert one.meta == {"data_source": "openr1", "ability": "math", "extra_info": {"index": 0, "split": "default"},
                        "at": "row 0"}


def test_math500_is_read_by_its_own_field_map(hub):
    row = {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "answer": "2", "subject": "Algebra",
           "level": 2, "unique_id": "test/algebra/1.json"}
    name = published(hub, [row], MATH500, "test")
    (found,) = problems(name, split="test")
    assert (found.id, found.prompt, found.answer) == ("test/algebra/1.json", "What is $1+1$?", "2")
    assert (found.solution, found.family) == ("It is $\\boxed{2}$.", "Algebra")
    assert found.meta == {"level": 2, "at": "row 0"}
    assert problems(name) == [found]  # its only split
    assert f"{name}, split 'train': cannot be loaded" in error(name, split="train")


def test_the_last_message_of_the_role_counts(hub):
    (found,) = problems(published(hub, [luffy(0, prompt=["Hello", "Really?"])], LUFFY))
    assert found.prompt == "Really?"


def test_a_field_map_extends_the_known_one_and_goes_into_structures(hub):
    known = [{**luffy(i), "other": {"deep": {"gold": [f"{i}/2"]}}, "part": "test"} for i in range(2)]
    name = published(hub, known, LUFFY)
    found = problems(name, fields={"answer": "other.deep.gold", "split": "part", "family": "ability"})
    assert [(p.answer, p.family) for p in found] == [("0/2", "math"), ("1/2", "math")]  # a list of one is its entry
    assert load(DataConfig(problems=name, problem_args={"fields": {"split": "part"}}, n_train=0, n_validation=0,
                           n_test=2)).test == tuple(problems(name))
    plain = problems(published(hub, rows(2, solution="s", strategy=STRATEGY, kind=3), "me/plain"))
    assert [(p.id, p.solution, p.meta["kind"]) for p in plain] == [("p0", "s", 3), ("p1", "s", 3)]
    assert plain[0].strategy == Strategy("Sum", "Add", ("Read", "Add"))


def test_subsets_and_splits_are_told_apart(hub):
    for subset, split, i in (("easy", "train", 1), ("hard", "train", 2), ("hard", "test", 3)):
        parquet(hub / f"me/set/{subset}/{split}.parquet", [{"prompt": f"{i}?", "answer": str(i)}])
    card = {"configs": [{"config_name": "easy", "data_files": "easy/*.parquet", "default": True}, {
        "config_name": "hard", "data_files": [{"split": s, "path": f"hard/{s}.parquet"} for s in ("train", "test")]}]}
    (hub / "me/set/README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n", encoding="utf-8")
    assert [p.answer for p in problems("hub:me/set")] == ["1"]
    assert [p.answer for p in problems("hub:me/set", subset="hard")] == ["2"]
    assert [p.answer for p in problems("hub:me/set", subset="hard", split="test")] == ["3"]
    assert "cannot be loaded" in (message := error("hub:me/set", subset="harder")) and "hard" in message
    message = error("hub:me/set", split="dev")
    assert "hub:me/set, split 'dev': cannot be loaded" in message and "train" in message and "Check the name" in message


@pytest.mark.parametrize("args, expected", [
    ({"spilt": "test"}, "unknown argument of hub:me/set 'spilt'. Did you mean 'split'? Known: fields, revision, split"),
    ({"fields": {"anwser": "gold"}}, "unknown field in problem_args.fields of hub:me/set 'anwser'. Did you mean 'answ"),
    ({"fields": {"answer": "gold"}}, "hub:me/set: answer is to come from 'gold', but the columns are data_so"),
    ({"fields": {"answer": "gold"}}, "Set problem_args: {fields: {answer: ...}}"),
    ({"fields": {"answer": "reward_model.gold"}}, "split 'train', row 0: answer: got {\"ground_truth\""),
    ({"fields": {"answer": "reward_model.gold"}}, "where 'reward_model.gold' was to be read"),
    ({"fields": {"answer": "ability.gold"}}, "row 0: answer: got \"math\" (str) where 'ability.gold' was to be read"),
    ({"fields": {"answer": "prompt"}}, "(list), expected a message of the role 'assistant' in 'prompt'"),
    ({"fields": {"answer": "two"}}, 'row 0: answer: got ["1", "2"] (list), expected text'),
    ({"fields": {"answer": 3}}, "fields"),
    ({"fields": ["answer"]}, "fields"),
    ({"split": None}, "split"),
])  # fmt: skip
def test_faulty_arguments_of_a_hub_data_set_are_named(hub, args, expected):
    name = published(hub, [{**luffy(i), "two": ["1", "2"]} for i in range(2)])
    defaults = {"prompt": "prompt", "answer": "reward_model.ground_truth", "solution": "target"}
    fields = args.get("fields", {})
    assert expected in error(name, **{**args, "fields": {**defaults, **fields} if type(fields) is dict else fields})


@pytest.mark.parametrize("name", ["hub:", "hub:/", "hub: "])
def test_a_hub_data_set_without_a_name_is_refused(name):
    assert "no data set is named, expected hub:OWNER/NAME" in error(name)


def test_faulty_rows_of_a_hub_data_set_are_named(hub):
    silent = {**luffy(1), "prompt": [{"content": "Think first.", "role": "system"}]}
    message = error(published(hub, [luffy(0), silent], LUFFY))
    assert f"hub:{LUFFY}, split 'train', row 1: prompt: got [" in message
    assert "expected a message of the role 'user' in 'prompt'" in message
    unanswered = rows(3)
    unanswered[2]["answer"] = None
    assert "hub:me/bare, split 'train', row 2: answer: got null" in error(published(hub, unanswered, "me/bare"))
    twice = [rows(1)[0], {**rows(1)[0], "prompt": "Other?"}]
    assert "row 1: id: got 'p0', which row 0 has too" in error(published(hub, twice, "me/twice"))


def test_a_name_that_cannot_be_loaded_without_network_says_so(tmp_path):
    pytest.importorskip("datasets")
    code = ("from sgpo_lib.sources.catalogue import open_source\n"
            "try:\n    open_source('hub:nobody/no-such-set', {'split': 'test'}, 0)\n"
            "except ValueError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
                          cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "hub:nobody/no-such-set, split 'test': cannot be loaded (" in done.stdout
    assert "Check the name and the split, the network, or HF_HOME" in done.stdout


# Splits of every source


@pytest.mark.parametrize("kind", ["parquet", "hub", "collection", "champ"])
def test_every_source_is_split(hub, kind):
    if kind == "champ" and importlib.util.find_spec("champ_dataset") is None:
        pytest.skip("the package champ-dataset (extra `extract`) is not installed")
    name = {"parquet": lambda: str(parquet(hub / "p.parquet", rows(90))),
            "hub": lambda: published(hub, [luffy(i) for i in range(90)], LUFFY)}.get(kind, lambda: kind)()
    data = DataConfig(problems=name, n_train=24, n_validation=5, n_test=8, warmup_share=0.25)
    splits = load(data)
    parts = [splits.warmup, splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts[:2]] == [6, 18] and 0 < len(parts[2]) <= 5 and 0 < len(parts[3]) <= 8
    texts = [normalised(p.prompt) for part in parts for p in part]
    assert len(set(texts)) == len(texts)
    told = {"collection": 66, "champ": 270}.get(kind, 90)
    assert f"{told} distinct problems" in splits.source and splits.source.startswith(name)
    if kind != "champ":  # slow to read
        assert load(data).fingerprint == splits.fingerprint

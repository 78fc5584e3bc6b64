"""The command `sgpo extract`: continuing after an interrupt, files of others, its output as training data, errors."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest
from extraction_world import BEST, KEY, MARKS, Bench, described, problem
from fault_server import Answer

from sgpo_lib.cli import main
from sgpo_lib.config import DataConfig
from sgpo_lib.extraction.chat import Request
from sgpo_lib.extraction.command import open_chat
from sgpo_lib.extraction.pipeline import ExtractionConfig, read_extractions
from sgpo_lib.problems import load
from sgpo_lib.prompts import EXTRACTION, filled
from sgpo_lib.rollouts.interface import sample_seed

# Continuing


def started(bench: Bench, command: list[str]) -> subprocess.Popen:
    """The command in a process of its own, once its first chunk is written and what came of the second is on disk."""
    held = iter(range(100))
    bench.world.told["delta", "first"] = lambda a: Answer(described([*MARKS][n := next(held)]), held=n >= 2)
    process = subprocess.Popen([sys.executable, "-m", "sgpo_lib.cli", *command], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if bench.out.exists() and bench.out.read_text(encoding="utf-8").count("\n") == 2:
            with closing(sqlite3.connect(bench.out.with_name("c.sqlite"), timeout=10)) as database:
                if database.execute("SELECT count(*) FROM replies").fetchone()[0] == 2 * 6 + 5 + 2:
                    return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[0])


NAMES = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]


def test_a_killed_run_continues_and_pays_nothing_twice(bench, capsys):
    command = bench.command(*map(problem, NAMES))
    process = started(bench, command)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(bench.server.answered) == 2 * 6 + 5 + 2
    del bench.world.told["delta", "first"]
    bench.world.came["delta", "first"] = 2  # the answers that were under way are lost
    assert main(command) == 0
    told = capsys.readouterr()
    assert told.err == "" and "status: kept 6\n" in told.out and "24 requests, 7 from the cache, 0 failed" in told.out
    lines = [json.loads(line) for line in bench.out.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in lines] == NAMES and {row["strategy"] for row in lines} == {BEST.strategy}
    assert Counter(a.key for a in bench.server.answered).most_common(1)[0][1] == 1 and len(bench.server.answered) == 36


def test_a_second_process_on_one_file_is_refused_and_the_first_ends_well(bench, capsys):
    command = bench.command(*map(problem, NAMES))
    process = started(bench, command)
    assert main(command) == 2
    told = capsys.readouterr().err
    assert told == f"sgpo: {bench.out}: another process is writing it. Wait for it, or name another file\n"
    bench.server.released.set()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "status: kept 6\n" in text and KEY not in text
    assert [e.problem.id for e in read_extractions(bench.out)] == NAMES and len(bench.server.asked) == 36


@pytest.mark.parametrize("where", ["newline", "middle", "inside a letter", "first byte"])
def test_a_last_line_that_was_cut_off_is_written_again_and_not_paid_again(bench, where):
    bench.extract(problem("alpha"), problem("beta"))
    data, asked = bench.out.read_bytes(), len(bench.server.asked)
    line = data.index(b"\n") + 1
    end = {"newline": len(data) - 1, "middle": len(data) - 300, "first byte": line + 1,
           "inside a letter": data.rindex("∑".encode()) + 1}[where]  # fmt: skip
    bench.out.write_bytes(data[:end])
    assert [e.status for e in bench.extract(problem("alpha"), problem("beta"))] == ["kept", "kept"]
    assert bench.out.read_bytes() == data and len(bench.server.asked) == asked


def test_reading_a_file_that_is_being_written_leaves_it_alone(bench):
    (alpha, _) = bench.extract(problem("alpha"), problem("beta"))
    half = bench.out.read_bytes()[:-100]
    bench.out.write_bytes(half)
    assert read_extractions(bench.out) == [alpha] and bench.out.read_bytes() == half


def test_a_line_whose_newline_an_editor_took_away_is_read(bench):
    found = bench.extract(problem("alpha"), problem("beta"))
    bench.out.write_bytes(bench.out.read_bytes().rstrip(b"\n"))
    assert read_extractions(bench.out) == found


@pytest.mark.parametrize("text", ["notes without a newline", '{"prompt": "1+1?", "answer": "2"}', "7", "[]", "\x00\x01",
                                  '{"id": "a", "prompt": "1+1?", "answer": "2"}'])  # fmt: skip
def test_a_file_of_one_line_that_is_not_ours_is_left_as_it_is(bench, text):
    """It has no newline either, but it is no line of ours that was cut off."""
    bench.out.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{bench.out}:1: ") + r".*Expected a line of sgpo extract"):
        bench.extract(problem("alpha"))
    assert bench.out.read_text(encoding="utf-8") == text and bench.server.asked == []


def test_the_problems_themselves_are_not_written_over(bench, capsys):
    command = bench.command(problem("alpha"))
    source = bench.out.with_name("problems.jsonl")
    source.write_text(source.read_text(encoding="utf-8").rstrip(), encoding="utf-8")
    before = source.read_bytes()
    assert main([*command, "--out", str(source)]) == 2
    assert f"{source}:1: status: missing" in capsys.readouterr().err and source.read_bytes() == before


def test_a_line_with_a_failed_request_stays_until_another_takes_its_place(bench):
    """Its chosen strategy is good; a run over other problems, or one that ends early, must not take it away."""
    bench.world.told["alpha", "first"] = lambda a: (
        Answer(status=400, body={}) if a.body["seed"] == seed else described("squares"))
    seed = sample_seed("chat", filled(EXTRACTION, problem=problem("alpha").prompt, response=problem("alpha").solution),
                       1) % (1 << 31)  # fmt: skip
    (alpha, _) = bench.extract(problem("alpha"), problem("beta"))
    assert alpha.status == "kept" and [c.reason[:15] for c in alpha.candidates].count("error: HTTP 400") == 1
    bench.extract(problem("beta"), problem("gamma"))
    assert [e.problem.id for e in read_extractions(bench.out)] == ["alpha", "beta", "gamma"]
    before = bench.out.read_bytes()
    bench.world.told |= {(n, s): [Answer(status=402, body={})] for n in ("alpha", "delta") for s in ("first", "again")}
    with pytest.raises(RuntimeError, match="none of 5 requests was answered"):
        bench.extract(problem("delta"), problem("alpha"), chunk=1)
    assert bench.out.read_bytes() == before
    bench.world.told.clear()
    (alpha,) = bench.extract(problem("alpha"))
    assert [c.reason for c in alpha.candidates] == [""] * 5
    assert [e.problem.id for e in read_extractions(bench.out)] == ["alpha", "beta", "gamma"]
    assert len(list(bench.out.parent.glob("*.part"))) == 0


def test_what_was_left_out_is_asked_about_once_the_setting_takes_it(bench):
    wrong = problem("alpha", r"It is \boxed{7}.")
    assert [e.status for e in bench.extract(wrong, problem("beta", " "), problem("gamma"))] == [
        "left out", "left out", "kept"]  # fmt: skip
    asked = len(bench.server.asked)
    assert next(e.status for e in bench.extract(wrong, problem("beta", " "), problem("gamma"))) == "left out"
    assert len(bench.server.asked) == asked
    again = bench.extract(wrong, problem("beta", " "), problem("gamma"), responses="all")
    assert [e.status for e in again] == ["kept", "left out", "kept"] and len(bench.server.asked) == asked + 6


@pytest.mark.parametrize(("fault", "told"), [
    (lambda row: '{"id": "alpha", ', "Expecting property name"),
    (lambda row: json.dumps({k: v for k, v in row.items() if k != "status"}), "status: missing"),
    (lambda row: json.dumps({**row, "status": "fine"}), "status: got 'fine', expected one of kept, leaking"),
    (lambda row: json.dumps({**row, "chosen": 5}), "chosen: got 5, expected the index of one of 5 candidates"),
    (lambda row: json.dumps({**row, "candidates": [{"txt": "a"}]}), "candidates[0].txt: unknown field"),
    (lambda row: json.dumps({**row, "candidates": 7}), ""),
    (lambda row: json.dumps({**row, "notes": 7}), ""),
    (lambda row: json.dumps({**row, "candidates": [{"text": "a", "leaks": [{"start": 1}]}]}), ""),
    (lambda row: "[]", ""),
    (lambda row: "[" * 100_000, "nested too deeply to be read"),
    (lambda row: "", ""),
])  # fmt: skip
def test_a_faulty_line_is_named_and_the_file_left_as_it_is(bench, fault, told):
    bench.extract(problem("alpha"), problem("beta"), candidates=5)
    first, second = bench.out.read_text(encoding="utf-8").splitlines()
    bench.out.write_text(f"{fault(json.loads(first))}\n{second}\n", encoding="utf-8")
    before = bench.out.read_bytes()
    with pytest.raises(ValueError) as caught:
        bench.extract(problem("alpha"), problem("beta"))
    assert str(caught.value).startswith(f"{bench.out}:1: ") and told in str(caught.value)
    assert str(caught.value).endswith("Expected a line of sgpo extract") and bench.out.read_bytes() == before


@pytest.mark.parametrize(("name", "change", "told"), [
    ("engine", "gpt", "its lines are of 'gpt', this run asks 'm'"),
    ("prompt", "Named alpha: another question?", "problem alpha has another text there"),
    ("solution", r"Another response, another method: \boxed{1}", "problem alpha has another"),
])  # fmt: skip
def test_a_file_of_another_model_problem_or_response_is_refused(bench, name, change, told):
    bench.extract(problem("alpha"), problem("beta"))
    lines = [{**json.loads(line), **({name: change} if i == 0 else {})} for i, line in enumerate(
        bench.out.read_text(encoding="utf-8").splitlines())]  # fmt: skip
    bench.out.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    before, asked = bench.out.read_bytes(), len(bench.server.asked)
    with pytest.raises(ValueError) as caught:
        bench.extract(problem("alpha"), problem("beta"), problem("gamma"))
    assert told in str(caught.value) and str(caught.value).endswith("Name another file")
    assert bench.out.read_bytes() == before and len(bench.server.asked) == asked


def test_fewer_or_other_problems_may_be_asked_for_and_no_line_is_lost(bench):
    bench.extract(problem("alpha"), problem("beta"))
    bench.extract(problem("gamma"), problem("beta"))
    assert [e.problem.id for e in read_extractions(bench.out)] == ["alpha", "beta", "gamma"]
    assert len(bench.asked("beta")) == 6


def test_another_number_of_candidates_needs_another_file(bench):
    bench.extract(problem("alpha"))
    before, asked = bench.out.read_bytes(), len(bench.server.asked)
    with pytest.raises(ValueError, match=r"problem alpha has 5 candidates there, this run asks for 3\. Name another"):
        bench.extract(problem("alpha"), problem("beta"), candidates=3)
    assert bench.out.read_bytes() == before and len(bench.server.asked) == asked


@pytest.mark.parametrize(("settings", "told"), [
    ({"candidates": "5"}, "candidates: got '5', expected 1 or more"), ({"candidates": 2.5}, "candidates: got 2.5"),
    ({"chunk": None}, "chunk: got None"), ({"temperature": "hot"}, "temperature: got 'hot', expected a number"),
])  # fmt: skip
def test_settings_of_another_kind_are_refused(settings, told):
    """They come from a notebook's parameters cell."""
    with pytest.raises(ValueError, match=re.escape(told)):
        ExtractionConfig(**settings)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: got no file, expected the output of sgpo extract"):
        read_extractions(tmp_path / "none.jsonl")


# Output and command


def test_the_file_is_training_data_without_what_leaks(bench):
    names = ["kept", "leak", "none", "wrong"]
    asked = [*map(problem, names[:3]), problem("wrong", r"\boxed{3}")]
    bench.world.told["leak", "first"] = [described("symmetry", f"Find {problem('leak').answer}")]
    bench.world.told |= {("none", s): ["No."] for s in ("first", "again")}
    assert [e.status for e in bench.extract(*asked)] == ["kept", "leaking", "no strategy", "left out"]
    source = bench.command(*asked)[2]
    data = DataConfig(problems=source, n_train=4, n_validation=0, n_test=0, strategies=str(bench.out))
    splits = load(data)
    assert {p.id: p.strategy for p in splits.train} == {"kept": BEST}  # no other is trained on
    for told in (f"; 1 strategies of {bench.out} used, 0 for ids", "1 leaking passed", "1 left out passed",
                 "1 no strategy passed over; 3 training problems left out"):  # fmt: skip
        assert told in splits.source
    splits = load(replace(data, leaking_strategies=True))
    assert {p.id for p in splits.train if p.strategy} == {"kept", "leak"} and "leaking" not in splits.source
    assert next(p for p in splits.train if p.id == "leak").strategy.steps[-1].startswith("Find ")


def test_the_command_tells_what_came_out(bench, capsys):
    bench.world.told["beta", "first"] = [described("symmetry", f"Find {problem('beta').answer}")]
    bench.world.told["gamma", "first"] = ["No.", *map(described, MARKS)]
    command = bench.command(*map(problem, ["alpha", "beta", "gamma"]), problem("delta", ""))
    assert main(command) == 0
    told = capsys.readouterr()
    assert told.err == "" and KEY not in told.out
    for line in ("4 drawn", "status: kept 2; leaking 1; left out 1", "asked again: no problem type 1", "leaks: answer",
                 "19 requests, 0 from the cache, 0 failed; 342 tokens", str(bench.out)):  # fmt: skip
        assert line in told.out, line
    assert main(command) == 0
    again = capsys.readouterr().out
    assert "status: kept 2; leaking 1; left out 1" in again and "0 requests" in again and len(bench.server.asked) == 19


def test_no_strategy_at_all_is_told_by_the_exit_status(bench, capsys):
    bench.world.told |= {("any", s): ["No."] for s in ("first", "again")}
    assert main(bench.command(problem("alpha"))) == 1
    told = capsys.readouterr()
    assert "status: no strategy 1" in told.out and told.err == ""


def test_the_limit_of_problems_and_the_settings_reach_the_server(bench):
    settings = ["--count", "2", "--candidates", "3", "--temperature", "0.3", "--top-p", "0.5", "--max-tokens", "77"]
    assert main([*bench.command(*map(problem, NAMES)), *settings]) == 0
    assert len(read_extractions(bench.out)) == 2 and len(bench.server.asked) == 8
    assert {a.body["max_tokens"] for a in bench.server.asked} == {77}
    assert Counter((a.body["temperature"], a.body["top_p"]) for a in bench.server.asked) == {
        (0.3, 0.5): 6, (0.0, 0.5): 2}  # fmt: skip


ERRORS = [  # arguments, environment, words of the error
    (["--engine", "gpt"], {}, "engine: got 'gpt', expected openai:MODEL"),
    (["--source", "nowhere.jsonl"], {}, "got 'nowhere.jsonl'"),
    (["--source", "testbed"], {}, "has no end: say how many problems"),
    (["--source-args", "[1]"], {}, "--source-args: got '[1]', expected a YAML mapping"),
    (["--source-args", "{split: "], {}, "--source-args: got '{split: '"),
    (["--count", "9"], {}, "got 2 problems, wanted 9. Lower the count"),
    (["--count", "-1"], {}, "count: got -1, expected"),
    (["--candidates", "0"], {}, "candidates: got 0, expected 1 or more"),
    (["--top-p", "2"], {}, "top_p 2.0, expected"),
    (["--temperature", "nan"], {}, "got temperature nan"), (["--temperature", "inf"], {}, "got temperature inf"),
    (["--timeout", "nan"], {}, "a time limit of nan s"), (["--timeout", "inf"], {}, "a time limit of inf s"),
    (["--responses", "good"], {}, "responses: got 'good', expected 'correct', 'not wrong' or 'all'"),
    (["--out", "FOLDER"], {}, "FOLDER"),
    (["--out", "FILE/out.jsonl"], {}, "FILE"),
    (["--cache", "FOLDER"], {}, "FOLDER: no reply cache"),
    (["--cache", "FILE/c.sqlite"], {}, "FILE"),
    ([], {"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is not set"),
    ([], {"OPENAI_BASE_URL": "http://127.0.0.1:port/v1"}, "OPENAI_BASE_URL"),
    ([], {"OPENAI_BASE_URL": "127.0.0.1:8000/v1"}, "OPENAI_BASE_URL: got '127.0.0.1:8000/v1' (no http:// or https://"),
    ([], {"OPENAI_BASE_URL": "not an address"}, "expected an address such as http://127.0.0.1:8000/v1"),
    ([], {"OPENAI_API_KEY": "refused"}, "m: none of 10 requests was answered. The first: HTTP 401"),
]


@pytest.mark.parametrize(("arguments", "environment", "told"), ERRORS)
def test_an_error_of_the_command_is_one_line_and_status_2(bench, tmp_path, monkeypatch, capsys, arguments, environment,
                                                          told):  # fmt: skip
    places = {"FOLDER": str(tmp_path / "folder"), "FILE": str(tmp_path / "file")}
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def put(text: str) -> str:
        return next((text.replace(k, v) for k, v in places.items() if k in text), text)

    refused = Answer(status=401, body={"error": {"message": "wrong key"}})
    bench.world.told |= {("any", s): lambda a: "No." if KEY in a.authorization else refused for s in ("first", "again")}
    assert main([*bench.command(problem("alpha"), problem("beta")), *map(put, arguments)]) == 2
    written = capsys.readouterr()
    assert written.err.startswith("sgpo: ") and written.err.count("\n") == 1 and put(told) in written.err
    assert environment.get("OPENAI_API_KEY") or bench.server.asked == []


@pytest.mark.parametrize(("name", "settings", "told"), [
    ("openai:", {}, "engine: got 'openai:', expected openai:MODEL, vllm:MODEL, transformers:MODEL"),
    ("openai", {}, "engine: got 'openai', expected openai:MODEL"),
    ("OpenAI:m", {}, "engine: got 'OpenAI:m', expected openai:MODEL"),
    ("openai:m", {"concurrency": 0}, "got concurrency 0 and a time limit of 600.0 s, expected 1 or more and above 0"),
    ("openai:m", {"timeout_s": 0}, "got concurrency 16 and a time limit of 0 s"),
])  # fmt: skip
def test_an_engine_that_cannot_be_is_refused_with_what_can(bench, name, settings, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        open_chat(name, **settings)
    assert open_chat("openai:org/model:tag").model == "org/model:tag"


def test_problems_without_a_response_or_with_an_unreadable_answer_are_named(bench, capsys):
    assert main(bench.command(problem("alpha", ""), problem("beta", " "))) == 2
    assert "no problem has a solution to distil, alpha, beta for example. Give them" in capsys.readouterr().err
    command = bench.command(problem("alpha"), problem("beta"))
    source = bench.out.with_name("problems.jsonl")
    source.write_text(source.read_text(encoding="utf-8").replace(f'"{problem("beta").answer}"', r'"\\frac{1}{"'),
                      encoding="utf-8")  # fmt: skip
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "1 of 2 gold answers cannot be read" in told and "line 2: answer: got" in told
    assert main([*command, "--leave-out-unreadable"]) == 0
    assert "1 with an unreadable gold answer left out" in capsys.readouterr().out
    assert [e.problem.id for e in read_extractions(bench.out)] == ["alpha"]
    source.write_text("", encoding="utf-8")
    assert main(command) == 2 and "no problem" in capsys.readouterr().err


def test_elsewhere_than_on_a_terminal_a_line_tells_how_far_it_is(bench, capsys, monkeypatch):
    monkeypatch.setattr("sgpo_lib.extraction.command._Progress.EVERY_S", 0.0)
    assert main(bench.command(*map(problem, NAMES))) == 0
    told = capsys.readouterr()
    lines = re.findall(r"^(candidates|scores): (\d+) of 36 requests, [\d.]+ requests/s, [\d,]+ tokens", told.out, re.M)
    assert [int(n) for _, n in lines] == [*range(1, 37)] and told.err == ""
    assert re.search(r"about \d+ min left\n", told.out)


def test_an_engine_by_name_pays_for_no_reply_twice(bench):
    """The judge and the second scorer of notebook 01 too."""
    first, again = ([], [])
    for found in (first, again):
        chat = open_chat("openai:m")
        found += chat.ask([Request("Named alpha: what?", 0, 0.0, 1.0, 9)], lambda *_: None)
    assert again == [replace(first[0], cached=True)] and len(bench.server.asked) == 1

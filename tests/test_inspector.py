"""The strategy inspector without a browser: what it sends, what it stores, and how it meets bad input and bad disks."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")

from sgpo_lib.config import DataConfig, RewardConfig
from sgpo_lib.extraction.quality import shipped
from sgpo_lib.extraction.records import Candidate, Extraction, Leak, to_row
from sgpo_lib.problems import load
from sgpo_lib.prompts import strategy_text
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.rewards import Verifier
from sgpo_lib.widgets.strategy_inspector import StrategyInspector

SUM = Strategy("Sum", "Add", ("Read", "Add", "State"))
TELLING = Strategy("Sum", "Add", ("Read", "State that the result is 42"))
RATINGS = {"type": 0.9, "strategy": 0.8, "steps": 0.7, "no_leak": 1.0}
EDITED = {"problem_type": "Two-term sum", "strategy": "Column addition", "steps": ["Align the digits", "Carry"]}


def extractions() -> list[Extraction]:
    """Four problems: readable candidates and one that is none; a leaking choice; nothing readable; left out."""
    leak = Leak(77, 79, "answer", "number", "42")
    unreadable = Candidate("I would add them.", reason="no problem type", score=None)
    return [
        Extraction(Problem("a", "What is 17 + 25?", "42", solution="It is \\boxed{42}.", family="algebra"), (
            Candidate("1", SUM, score=0.9, criteria=RATINGS, kind="good", comment="Fine."),
            Candidate("2", TELLING, score=0.6, leaks=(leak,)), unreadable), 0, "kept", ("score missing",)),
        Extraction(Problem("b", "What is 17 + 25 ?", "42", family="algebra"), (
            Candidate("1", TELLING, criteria={**RATINGS, "no_leak": 0.0}, leaks=(leak,)),), 0, "leaking"),
        Extraction(Problem("c", "What is 5?", "5", family="geometry"), (unreadable,), None, "no strategy"),
        Extraction(Problem("d", "What is 6?", "6"), (), None, "left out", ("response empty",)),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(RewardConfig()) as v:
        yield v


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "decisions" / "mine.jsonl"


@pytest.fixture
def inspector(path: Path, verifier: Verifier) -> StrategyInspector:
    return StrategyInspector(extractions(), path, verifier)


def send(inspector: StrategyInspector, content: Any, method: str = "custom") -> None:
    """A message as the page sends it, through the kernel's side of the widget."""
    data = {"method": method, ("content" if method == "custom" else "state"): content}
    inspector._handle_msg({"content": {"data": data}, "buffers": []})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def memory(inspector: StrategyInspector) -> str:
    """All that the inspector knows of decisions."""
    return json.dumps([inspector.decisions, inspector.index, inspector.item])


# What the page gets


def test_the_index_has_one_light_row_per_problem(inspector):
    bands = {"type": "High", "strategy": "High", "steps": "Medium", "no_leak": "High"}
    assert inspector.index == [
        {"id": "a", "subject": "algebra", "status": "kept", "band": "High", "score": 0.9, "criteria": RATINGS,
         "bands": bands, "leaks": [], "leaks_any": ["answer"], "decision": "undecided"},
        {"id": "b", "subject": "algebra", "status": "leaking", "band": "Medium", "score": pytest.approx(0.6),
         "criteria": {**RATINGS, "no_leak": 0.0}, "bands": {**bands, "no_leak": "Low"}, "leaks": ["answer"],
         "leaks_any": ["answer"], "decision": "undecided"},
        {"id": "c", "subject": "geometry", "status": "no strategy", "band": "no score", "score": None, "criteria": {},
         "bands": {}, "leaks": [], "leaks_any": [], "decision": "undecided"},
        {"id": "d", "subject": "", "status": "left out", "band": "no score", "score": None, "criteria": {},
         "bands": {}, "leaks": [], "leaks_any": [], "decision": "undecided"},
    ]  # fmt: skip


def test_an_item_holds_the_problem_its_candidates_and_where_their_parts_stand(inspector):
    item = inspector.item
    assert (item["id"], item["problem"], item["answer"]) == ("a", "What is 17 + 25?", "42")
    assert (item["solution"], item["notes"], item["status"]) == ("It is \\boxed{42}.", ["score missing"], "kept")
    assert (item["chosen"], item["picked"], item["decision"], item["comment"]) == (0, 0, "undecided", "")
    assert item["criteria"] == ["type", "strategy", "steps", "no_leak"] and item["edited"] is False
    good, telling, unreadable = item["candidates"]
    # by hand: "Problem type: Sum\nStrategy: Add\nSteps: (a) Read (b) Add (c) State"
    assert [(p["label"], p["text"], p["start"]) for p in good["parts"]] == [
        ("Problem type", "Sum", 14), ("Strategy", "Add", 28), ("(a)", "Read", 43), ("(b)", "Add", 52),
        ("(c)", "State", 60)]  # fmt: skip
    assert (good["score"], good["kind"], good["comment"], good["raw"]) == (0.9, "good", "Fine.", "")
    assert good["quality"] == pytest.approx(0.85) and good["criteria"] == RATINGS
    (leak,), last = telling["leaks"], telling["parts"][-1]
    assert last["text"][leak["start"] - last["start"] : leak["end"] - last["start"]] == leak["text"] == "42"
    assert (unreadable["parts"], unreadable["raw"]) == ([], "I would add them.")
    assert (unreadable["reason"], unreadable["strategy"], unreadable["score"]) == ("no problem type", None, None)


def test_parts_of_the_shipped_collection_stand_where_they_are_said_to(verifier, path):
    inspector = StrategyInspector(shipped(), path, verifier)
    assert len(inspector.index) == 66 and len(json.dumps(inspector.index)) < 66 * 400
    for n, e in enumerate(inspector.found):
        inspector.selected = n
        assert json.loads(json.dumps(inspector.item))["id"] == e.problem.id
        for shown, candidate in zip(inspector.item["candidates"], e.candidates, strict=True):
            text = strategy_text(candidate.strategy)
            rest = text
            for part in shown["parts"]:
                assert text[part["start"] : part["start"] + len(part["text"])] == part["text"]
                rest = rest.replace(f"{part['label']}{'' if part['label'][0] == '(' else ':'} {part['text']}", "", 1)
            assert rest.split() == ["Steps:"]


def test_the_page_selects_a_problem(inspector):
    send(inspector, {"selected": 1}, "update")
    assert inspector.item["id"] == "b" and inspector.item["status"] == "leaking"
    for wrong in (99, -1, "c", None):
        send(inspector, {"selected": wrong}, "update")
        assert inspector.item["id"] == "b"
    assert StrategyInspector([], inspector.path, inspector.verifier).item == {}


# Decisions


def test_a_decision_is_stored_as_it_is_made(inspector, path):
    send(inspector, {"id": "a", "decision": "accepted", "candidate": 0, "comment": "good – ja"})
    (line,) = lines(path)
    at = datetime.datetime.fromisoformat(line.pop("time"))
    assert abs((datetime.datetime.now(datetime.UTC) - at).total_seconds()) < 60
    assert line == {"id": "a", "status": "kept", "decision": "accepted", "candidate": 0, "comment": "good – ja",
                    "edited": False, **dataclasses.asdict(SUM), "steps": ["Read", "Add", "State"]}
    assert inspector.index[0]["decision"] == inspector.item["decision"] == "accepted"
    assert inspector.item["comment"] == "good – ja" and str(path) in inspector.told
    send(inspector, {"id": "b", "decision": "rejected"})  # which is not the one that is shown
    assert [(d["id"], d["status"]) for d in lines(path)] == [("a", "kept"), ("b", "rejected")]
    assert inspector.index[1]["decision"] == "rejected" and inspector.item["id"] == "a"
    send(inspector, {"id": "a", "decision": "undecided"})
    assert [(d["id"], d["status"]) for d in lines(path)] == [("a", "undecided"), ("b", "rejected")]
    assert inspector.item["decision"] == "undecided"


def test_a_decision_sends_the_page_one_row_of_the_index(inspector, monkeypatch):
    """The index of 8,500 problems has megabytes; a page opened later still gets all of it as it stands."""
    synced, messages = [], []
    monkeypatch.setattr(inspector, "send_state", lambda key: synced.append(key))
    monkeypatch.setattr(inspector, "send", messages.append)
    inspector.decide("b", "rejected")
    assert messages == [{"place": 1, "row": inspector.index[1]}] and inspector.index[1]["decision"] == "rejected"
    assert "told" in synced and "index" not in synced
    assert inspector.get_state("index")["index"][1]["decision"] == "rejected"


def test_an_accepted_strategy_that_leaks_is_quarantined_until_it_is_accepted_again(inspector, path):
    inspector.decide("b", "accepted")
    (line,) = lines(path)
    assert (line["decision"], line["status"]) == ("accepted", "leaking") and "confirmed" not in line
    assert "training passes over it" in inspector.told
    inspector.selected = 1
    assert inspector.item["quarantined"] is True
    send(inspector, {"id": "b", "decision": "accepted", "comment": "a word"})  # a comment confirms nothing
    assert lines(path)[0]["status"] == "leaking"
    send(inspector, {"id": "b", "decision": "accepted", "confirm": True})
    assert lines(path)[0]["status"] == "leaking" and "not stored: comment: got none" in inspector.told
    send(inspector, {"id": "b", "decision": "accepted", "confirm": True, "comment": "42 is the year"})
    assert lines(path)[0]["status"] == "kept" and lines(path)[0]["comment"] == "42 is the year"
    assert inspector.item["quarantined"] is False
    inspector.decide("b", "accepted", comment="checked")
    assert lines(path)[0]["status"] == "kept", "confirmed for this wording"
    inspector.decide("b", "accepted", edited={**EDITED, "strategy": "Note that the answer is 42"})
    assert lines(path)[0]["status"] == "leaking", "but not for another"


def test_a_problem_without_candidates_is_rejected_or_written_by_hand(inspector, path):
    inspector.selected = 3
    (blank,) = inspector.item["candidates"]
    assert blank["strategy"] is None and blank["reason"] == "no candidates"
    inspector.decide("d", "rejected")
    assert lines(path)[0]["status"] == "rejected"
    inspector.decide("d", "accepted", edited=EDITED)
    assert lines(path)[0]["status"] == "kept" and {k: lines(path)[0][k] for k in EDITED} == EDITED


def test_another_candidate_is_picked(inspector, path):
    inspector.decide("a", "undecided", 1)
    assert inspector.item["picked"] == 1 and inspector.item["chosen"] == 0
    assert inspector.index[0]["leaks"] == ["answer"] and inspector.index[0]["score"] == 0.6
    inspector.decide("a", "accepted")  # the picked one
    assert lines(path)[0]["steps"] == ["Read", "State that the result is 42"]


def test_an_edit_is_stored_checked_for_leaks_and_kept_by_later_decisions(inspector, path):
    telling = {**EDITED, "steps": ["Align the digits", "The answer is 42"]}
    inspector.decide("a", "accepted", 0, "mine", telling)
    assert [leak["text"] for leak in inspector.item["candidates"][0]["leaks"]] == ["42"]
    assert inspector.index[0]["leaks"] == ["answer"]
    inspector.decide("a", "accepted", 0, "mine", EDITED)
    assert {k: lines(path)[0][k] for k in EDITED} == EDITED and lines(path)[0]["edited"] is True
    assert [p["text"] for p in inspector.item["candidates"][0]["parts"]] == [
        "Two-term sum", "Column addition", "Align the digits", "Carry"]
    assert inspector.item["candidates"][0]["leaks"] == [] and inspector.item["edited"] is True
    inspector.decide("a", "rejected", 0, "no longer")
    assert {k: lines(path)[0][k] for k in EDITED} == EDITED and lines(path)[0]["comment"] == "no longer"
    inspector.decide("a", "accepted", 1)
    assert lines(path)[0]["steps"][1] == "State that the result is 42" and lines(path)[0]["edited"] is False
    assert inspector.found == extractions()  # what the model said stays as it is


def test_a_candidate_that_could_not_be_read_is_edited_or_rejected_but_not_accepted(inspector, path):
    with pytest.raises(ValueError, match="candidate 3 could not be read; edit it, or pick another"):
        inspector.decide("a", "accepted", 2)
    inspector.decide("c", "rejected", comment="nonsense")
    assert "strategy" not in lines(path)[0] and lines(path)[0]["status"] == "rejected"
    inspector.decide("a", "accepted", 2, edited=EDITED)
    assert {k: lines(path)[1][k] for k in EDITED} == EDITED
    inspector.selected = 3
    with pytest.raises(ValueError, match="candidate 1 could not be read; edit it"):  # there are none
        inspector.decide("d", "accepted")


def test_decisions_that_cannot_be_are_refused(inspector, path):
    with pytest.raises(ValueError, match="got decision 'kept' about problem 'a', expected one of accepted, rejected"):
        inspector.decide("a", "kept")
    with pytest.raises(ValueError, match=r"about problem 'z', expected .* about a problem that is shown"):
        inspector.decide("z", "accepted")
    for candidate in (3, -1):
        with pytest.raises(ValueError, match=f"candidate: got {candidate}, expected 0 to 2"):
            inspector.decide("a", "accepted", candidate)
    assert not path.exists() and inspector.decisions == {}


OK = {"id": "a", "decision": "rejected", "candidate": 1, "comment": "c"}


@pytest.mark.parametrize("content", [
    None, "accepted", [], 3, {}, {"id": "a"}, {"decision": "accepted"}, {**OK, "id": None}, {**OK, "id": ["a"]},
    {**OK, "decision": None}, {**OK, "decision": ["accepted"]}, {**OK, "candidate": "1"}, {**OK, "candidate": 1.0},
    {**OK, "candidate": True}, {**OK, "candidate": 3}, {**OK, "candidate": [1]}, {**OK, "comment": 5},
    {**OK, "comment": {"a": 1}}, {**OK, "comment": "\ud800"}, {**OK, "edited": "text"}, {**OK, "edited": ["text"]},
    {**OK, "edited": {"problem_type": "t"}}, {**OK, "edited": {**EDITED, "steps": []}},
    {**OK, "edited": {**EDITED, "steps": ["\ud800"]}}, {**OK, "edited": {**EDITED, "strategy": " "}},
], ids=repr)  # fmt: skip
def test_a_wrong_message_is_told_and_nothing_is_lost(inspector, path, content):
    inspector.decide("a", "accepted", 0, "before", EDITED)
    stored, known = path.read_bytes(), memory(inspector)
    send(inspector, content)
    assert inspector.told.startswith("not stored: ") and len(inspector.told) > 20  # more than the key that is missing
    assert path.read_bytes() == stored and memory(inspector) == known


# The file


def test_the_file_is_replaced_as_a_whole(inspector, path):
    inspector.decide("a", "accepted")
    before = path.read_bytes()
    os.link(path, other := path.parent.parent / "link")
    inspector.decide("b", "rejected")
    assert other.read_bytes() == before and len(lines(path)) == 2
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == ["mine.jsonl"]


def test_the_inspector_continues_where_it_stopped(inspector, path, verifier):
    inspector.decide("a", "accepted", 1, "two\nlines", EDITED)
    inspector.decide("b", "rejected")
    again = StrategyInspector(extractions(), path, verifier)
    assert memory(again) == memory(inspector) and "2 decided" in repr(again)
    fewer = StrategyInspector(extractions()[1:2], path, verifier)
    fewer.decide("b", "accepted")
    assert [(d["id"], d["decision"]) for d in lines(path)] == [("a", "accepted"), ("b", "accepted")]


def test_two_inspectors_on_one_file_lose_nothing_of_each_other(inspector, path, verifier):
    """A cell that is run again leaves the first one's page alive."""
    other = StrategyInspector(extractions(), path, verifier)
    inspector.decide("a", "accepted")
    other.decide("b", "rejected")
    assert {d["id"]: d["decision"] for d in lines(path)} == {"a": "accepted", "b": "rejected"}


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e", "\r", "𝑥", "\u0000"], ids=ascii)
def test_any_character_survives_in_the_file(inspector, path, verifier, character):
    words = {**EDITED, "strategy": f"Column{character}addition"}
    inspector.decide("a", "accepted", 0, f"one{character}two", words)
    again = StrategyInspector(extractions(), path, verifier)
    assert again.item["comment"] == f"one{character}two"
    assert again.item["candidates"][0]["strategy"]["strategy"] == f"Column{character}addition"


GOOD = '{"id": "b", "decision": "rejected"}\n'


@pytest.mark.parametrize("fault, expected", [
    ("not json", "Expecting value"), ("[1]", "got [1]"), ('{"id": "a"}', "decision: got null"),
    ('{"id": "a", "decision": "kept"}', 'got "kept" (str), expected one of accepted, rejected, undecided'),
    ('{"decision": "accepted"}', "id: missing from decision"), ('{"id": 1.5, "decision": "accepted"}', "id: got 1.5"),
    ('{"id": "a", "decision": "accepted", "candidate": 0, "edited": true}', "steps: got null"),
    ('{"id": "a", "decision": "accepted", "candidate": 0, "edited": true, "steps": ["x"]}', "problem_type: missing"),
    (json.dumps(to_row(extractions()[0])), "as the strategy inspector writes them"), ("\udcff", "UTF-8"),
], ids=str)  # fmt: skip
def test_a_faulty_line_is_named_and_the_file_stays(path, verifier, fault, expected):
    path.parent.mkdir()
    path.write_text(GOOD + fault + "\n", encoding="utf-8", errors="surrogateescape")
    before = path.read_bytes()
    with pytest.raises(ValueError) as caught:
        StrategyInspector(extractions(), path, verifier)
    assert f"{path}:2: " in str(caught.value) and expected in str(caught.value)
    assert path.read_bytes() == before


def test_a_decision_about_a_candidate_that_is_gone_is_met_again_without_a_crash(path, verifier):
    """The extraction may have been made anew, with fewer candidates."""
    path.parent.mkdir()
    gone = {"decision": "accepted", "candidate": 7, "edited": True, **EDITED}
    path.write_text("".join(json.dumps({"id": i, **gone}) + "\n" for i in "ad"), encoding="utf-8")
    inspector = StrategyInspector(extractions(), path, verifier)
    inspector.selected = 3
    (shown,) = inspector.item["candidates"]  # the wording is kept, on the empty candidate of a problem without any
    assert shown["strategy"]["strategy"] == EDITED["strategy"] and inspector.index[3]["decision"] == "accepted"


def test_a_disk_that_is_full_is_told_and_nothing_changes(inspector, path):
    """The limit on file sizes stands for the disk: the write fails half way, as on a full one."""
    inspector.decide("a", "accepted", comment="before")
    stored, known = path.read_bytes(), memory(inspector)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        send(inspector, {"id": "a", "decision": "rejected", "comment": "x" * 400_000})
        with pytest.raises(OSError):
            inspector.decide("b", "accepted", comment="x" * 400_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert inspector.told.startswith("not stored: ") and "File too large" in inspector.told
    assert path.read_bytes() == stored and memory(inspector) == known
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == ["mine.jsonl"]  # half a file takes no room
    send(inspector, {"id": "a", "decision": "rejected"})
    assert lines(path)[0]["decision"] == "rejected"


def test_a_folder_that_cannot_be_written_is_told(inspector, path):
    path.parent.write_text("a file stands where the folder should be", encoding="utf-8")
    known = memory(inspector)
    send(inspector, {"id": "a", "decision": "accepted"})
    assert inspector.told.startswith("not stored: ") and memory(inspector) == known


def test_decisions_are_read_as_strategies_to_train_on(inspector, path, tmp_path):
    inspector.decide("a", "accepted", 0, "", EDITED)
    inspector.decide("b", "rejected", 0)
    inspector.decide("c", "undecided", edited=EDITED)
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"id": i, "prompt": f"{i}?", "answer": "1", "split": "train"}) + "\n"
                            for i in "abcd"), encoding="utf-8")  # fmt: skip
    for leaking in (False, True):  # quarantined ones on request, a person's rejections never
        splits = load(DataConfig(problems=str(file), strategies=str(path), n_train=4, n_validation=0, n_test=0,
                                 leaking_strategies=leaking))
        assert {p.id: p.strategy for p in splits.train} == {
            "a": Strategy("Two-term sum", "Column addition", ("Align the digits", "Carry")),
            "d": None}  # fmt: skip
        assert "2 training problems left out with them" in splits.source
        assert f"1 strategies of {path} used" in splits.source
        assert ", 1 rejected passed over" in splits.source and ", 1 undecided passed over" in splits.source

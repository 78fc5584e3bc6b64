"""Faulty JSONL, twelve kinds: the user's problems and strategies, and the files that this program writes.

A fault is an error with file, line and field; a line that a crash tore off at the end of a file of ours is set aside
and counted; nothing else is dropped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sgpo_lib.comparison import problem_scores
from sgpo_lib.config import DataConfig, RunConfig
from sgpo_lib.evaluation import Evaluation, ProblemResult
from sgpo_lib.extraction.output import lines_of, read_extractions, store
from sgpo_lib.extraction.records import Candidate, Extraction, to_row
from sgpo_lib.problems import load
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.runs import open_run
from sgpo_lib.sources.files import file_problems
from sgpo_lib.storage import read_jsonl, write_jsonl
from sgpo_lib.widgets.strategy_inspector import read_decisions

STEPS = {"problem_type": "Sum", "strategy": "Add", "steps": ["Read", "Add"]}
BREAK = "between \u2028 two words of a line"


@dataclass(frozen=True)
class Kind:
    """A kind of file: rows as bytes, what a row is read as, and what may be wrong with it."""

    name: str
    rows: tuple[dict[str, Any], ...]
    read: Callable[[Path], Sequence[str]]
    """The ids of the rows, in order."""
    id: str
    """Field that tells rows apart."""
    other: str
    """A field that every row has."""
    wrong: Any
    """A value that it cannot have."""
    appended: bool = False
    """Whether this program adds lines to it, so that a crash can tear one off."""
    empty: str = ""
    """What is said of a file without rows; "" where it may be empty."""

    def write(self, path: Path, rows: Sequence[dict[str, Any]] | None = None) -> None:
        write_jsonl(path, self.rows if rows is None else rows)


def extraction(name: str) -> Extraction:
    problem = Problem(name, f"What is {name}?", "42", solution=f"{BREAK} \\boxed{{42}}")
    return Extraction(problem, (Candidate("1", Strategy("Sum", "Add", ("Read",)), score=0.5),), 0, "kept", engine="m")


def metrics_of(path: Path) -> list[str]:
    return [str(r["step"]) for r in open_run(RunConfig(), path.parent.parent, path.parent.name).metrics()]


def evaluated(path: Path) -> list[str]:
    return [*problem_scores(open_run(RunConfig(), path.parents[2], path.parents[1].name))]


def split_problems(path: Path) -> list[str]:
    return [p.id for p in load(DataConfig(problems=str(path), n_train=3, n_validation=0, n_test=0)).train]


def strategies_to_train_on(path: Path) -> list[str]:
    problems = path.with_name("problems.jsonl")
    write_jsonl(problems, KINDS["problems"].rows)
    data = DataConfig(problems=str(problems), strategies=str(path), n_train=3, n_validation=0, n_test=0)
    return sorted(p.id for p in load(data).train if p.strategy)


KINDS = {kind.name: kind for kind in (
    Kind("problems", tuple({"id": i, "prompt": f"{i} {BREAK}?", "answer": "1"} for i in "abc"),
         lambda path: [p.id for p, _ in file_problems(path).problems()], "id", "prompt", 7),
    Kind("strategies to train on", tuple({"id": i, **STEPS} for i in "abc"), strategies_to_train_on, "id", "strategy",
         ["Add"]),
    Kind("decisions", tuple({"id": i, "decision": "accepted", "comment": BREAK, "edited": False, **STEPS}
                            for i in "abc"), lambda path: [*read_decisions(path)], "id", "decision", 1),
    Kind("strategies.jsonl", tuple(map(to_row, map(extraction, "abc"))),
         lambda path: [e.problem.id for e in read_extractions(path)], "id", "status", 3, appended=True),
    Kind("metrics.jsonl", tuple({"kind": "train", "step": i, "told": BREAK} for i in range(3)), metrics_of, "step",
         "kind", 5, appended=True),
    Kind("evaluation/test.jsonl", tuple({"problem_id": i, "samples": 4, "correct": 1, "responses": [BREAK]}
                                        for i in "abc"), evaluated, "problem_id", "correct", "one"),
)}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def path(kind, tmp_path) -> Path:
    if kind.name not in ("metrics.jsonl", "evaluation/test.jsonl"):
        return tmp_path / kind.name.split(".")[0].replace(" ", "-").__add__(".jsonl")
    found = open_run(RunConfig(), tmp_path, "run").folder / kind.name
    found.parent.mkdir(exist_ok=True)
    return found


def ids(kind: Kind) -> list[str]:
    return [str(row[kind.id]) for row in kind.rows]


def lines(kind: Kind) -> list[bytes]:
    return [json.dumps(row, ensure_ascii=False).encode() for row in kind.rows]


WHOLE = {
    "no last newline": lambda rows: b"\n".join(rows),
    "BOM": lambda rows: b"\xef\xbb\xbf" + b"\n".join(rows) + b"\n",
    "CRLF": lambda rows: b"\r\n".join(rows) + b"\r\n",
    "U+2028": lambda rows: b"".join(row + b"\n" for row in rows),
}
"""Files that are read whole: every row is there, and none is another one."""


@pytest.mark.parametrize("fault", WHOLE)
def test_what_can_be_read_is_read_whole(kind, path, fault, tally):
    rows = lines(kind)
    assert all("\u2028".encode() in row for row in rows) or "\u2028" not in json.dumps(kind.rows)
    path.write_bytes(WHOLE[fault](rows))
    before = path.read_bytes()
    assert list(kind.read(path)) == ids(kind)
    assert path.read_bytes() == before, "reading changes nothing"
    tally(5, f"{fault}: {kind.name}", "3 of 3 rows read")


def faulty(kind: Kind) -> dict[str, tuple[bytes, int, str]]:
    """Fault -> (the file's bytes, line, what the message says; the field where there is one)."""
    first, second, third = lines(kind)

    def changed(**fields: Any) -> bytes:
        return json.dumps({**kind.rows[1], **fields}).encode()

    def file(middle: bytes) -> bytes:
        return b"".join(line + b"\n" for line in (first, middle, third))

    without = json.dumps({k: v for k, v in kind.rows[1].items() if k != kind.other}).encode()
    twice = changed(**{kind.id: kind.rows[0][kind.id]})
    if kind.name == "problems":
        twice = changed(id="a", prompt="another")
    return {
        "torn UTF-8": (file(second.replace(b'"', b'"\xe2\x80', 1)), 2, "got byte 0xe2, expected UTF-8"),
        "garbage in the middle": (file(b"\x00garbage"), 2, "not JSON at column 1"),
        "half a row in the middle": (file(second[:-9]), 2, "not JSON at column"),
        "two rows glued together": (file(second[:-9] + third), 2, "not JSON at column"),
        "duplicate id": (file(twice), 2, f"{kind.id}"),
        "NaN": (file(changed(more={"deep": [0, math.nan]})), 2, "more.deep.1: got NaN, which JSON does not have"),
        "wrong type": (file(changed(**{kind.other: kind.wrong})), 2, f"{kind.other}: got {json.dumps(kind.wrong)}"),
        "no object": (file(b"[1]"), 2, "got [1] (list), expected an object like"),
        "missing field": (file(without), 2, f"{kind.other}: "),
    }


@pytest.mark.parametrize("fault", faulty(KINDS["problems"]))
def test_a_fault_is_named_with_file_line_and_field(kind, path, fault, tally):
    data, line, said = faulty(kind)[fault]
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        kind.read(path)
    message = re.search(re.escape(f"{path}:{line}: ") + ".*", str(error.value))
    assert message and said in message[0], str(error.value)
    assert path.read_bytes() == data and not path.with_name(f"{path.name}.torn").exists()
    tally(5, f"{fault}: {kind.name}", f"line {line} named: {message[0].partition(f'{path.name}:')[2][:80]}")


def test_an_empty_file(kind, path):
    path.write_bytes(b"")
    if kind.name == "problems":
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*no problem"):
            split_problems(path)
    else:
        assert list(kind.read(path)) == []


# ----------------------------------------------------------------------------------------------------------- torn tails


TAILS = {"torn tail": lambda row: row[: len(row) // 2], "torn UTF-8 tail": lambda row: row[: row.index(b"\xe2") + 1],
         "first byte": lambda row: row[:1], "zeros": lambda row: b"\0" * 100}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if not kind.appended], ids=lambda kind: kind.name)
def test_a_torn_tail_of_a_file_that_is_only_replaced_is_an_error(kind, path, tail):
    """A person's file, or one that this program writes as a whole: nobody is writing it."""
    row = lines(kind)[1] if b"\xe2" in lines(kind)[1] else b'{"id": "\xe2\x80\xa8"}'
    path.write_bytes(b"".join(line + b"\n" for line in lines(kind)) + TAILS[tail](row))
    with pytest.raises(ValueError, match=re.escape(f"{path}:4: ")):
        kind.read(path)


@pytest.mark.parametrize("tail", TAILS)
def test_a_torn_tail_of_metrics_is_set_aside_and_counted(tmp_path, tail, capfd, tally):
    run, kind = open_run(RunConfig(), tmp_path), KINDS["metrics.jsonl"]
    path, torn, kept = run.folder / "metrics.jsonl", TAILS[tail](lines(kind)[2]), b""
    kind.write(path, kind.rows[:2])
    for count, writer in enumerate((lambda: run.log(dict(kind.rows[2])), lambda: run.forget_after(9)), start=1):
        with path.open("ab") as file:
            file.write(torn)
        before = path.read_bytes()
        assert len(run.metrics()) == 1 + count and path.read_bytes() == before, "readers pass over it and leave it"
        writer()
        kept += torn + b"\n"
        assert path.with_name("metrics.jsonl.torn").read_bytes() == kept
        told = capfd.readouterr().err
        assert f"its {len(torn)} bytes are set aside in metrics.jsonl.torn (torn lines there: {count})" in told
        assert [r["step"] for r in run.metrics()] == [0, 1, 2], "no new row is glued to it, and none is lost"
    tally(5, f"{tail}: metrics.jsonl", "set aside and counted, all rows there, the next one is whole")


@pytest.mark.parametrize("tail", ["torn tail", "torn UTF-8 tail", "first byte"])
def test_a_torn_tail_of_strategies_is_set_aside_and_counted(tmp_path, tail, capfd, tally):
    out, torn = tmp_path / "strategies.jsonl", TAILS[tail](lines(KINDS["strategies.jsonl"])[1])
    store(out, {}, [extraction("a")])
    with out.open("ab") as file:
        file.write(torn)
    assert [e.problem.id for e in read_extractions(out)] == ["a"]
    stored = lines_of([extraction(i).problem for i in "ab"], "m", 1, out)
    assert list(stored) == ["a"] and (tmp_path / "strategies.jsonl.torn").read_bytes() == torn + b"\n"
    assert f"its {len(torn)} bytes are set aside in strategies.jsonl.torn" in capfd.readouterr().err
    store(out, stored, [extraction("b")])
    assert [e.problem.id for e in read_extractions(out)] == ["a", "b"]
    tally(5, f"{tail}: strategies.jsonl", "set aside and counted, all rows there, the next one is whole")


def test_a_last_row_without_its_newline_is_not_glued_to_the_next(tmp_path):
    run = open_run(RunConfig(), tmp_path)
    path = run.folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines(KINDS["metrics.jsonl"])[:2]))
    run.log(dict(KINDS["metrics.jsonl"].rows[2]))
    assert [r["step"] for r in run.metrics()] == [0, 1, 2] and not list(run.folder.glob("*.torn"))


# ---------------------------------------------------------------------------------------------------- what JSON has not


def test_numbers_that_are_not_finite_are_null_in_the_file_and_named_beside(tmp_path):
    """Every program can read the file, the row says what it was, and here it comes back as it was."""
    run = open_run(RunConfig(), tmp_path)
    run.log({"kind": "train", "step": 1, "loss": math.nan, "parts": [1.0, {"kl": -math.inf}], "lr": 0.5})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    stored = json.loads((run.folder / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert stored == {"kind": "train", "step": 1, "loss": None, "parts": [1.0, {"kl": None}], "lr": 0.5,
                      "not_finite": {"loss": "nan", "parts.1.kl": "-inf"}}
    row, = run.metrics()
    assert math.isnan(row.pop("loss"))
    assert row == {"kind": "train", "step": 1, "parts": [1.0, {"kl": -math.inf}], "lr": 0.5}
    run.forget_after(1)
    assert math.isnan(run.metrics()[0]["loss"]), "and survives that the file is written anew"


@pytest.mark.parametrize("odd", [{"loss": "nan", "no.such": "nan"}, {"loss": "seven"}, ["loss"], 3])
def test_a_note_of_what_is_not_finite_that_names_no_place_is_an_error(tmp_path, odd):
    run = open_run(RunConfig(), tmp_path)
    write_jsonl(run.folder / "metrics.jsonl", [{"kind": "train", "step": 1, "loss": None, "not_finite": odd}])
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not_finite: expected place -> nan, inf or -inf"):
        run.metrics()


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1e", "\x0c", "\0", "é"])
def test_no_character_makes_two_lines_of_a_row(tmp_path, character):
    """For every reader: also for those who split at what Unicode calls a line's end."""
    path = tmp_path / "rows.jsonl"
    row = {"text": f"a{character}b"}
    write_jsonl(path, [row, row])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2 and read_jsonl(path) == [row, row]


def test_responses_with_any_line_end_are_compared(tmp_path):
    """An evaluation's responses are a model's text."""
    run = open_run(RunConfig(), tmp_path)
    results = tuple(ProblemResult(i, "f", 4, 2, 0, 9.0, (BREAK, "\x85")) for i in "ab")
    Evaluation(4, results).write(run.folder / "evaluation" / "test.jsonl")
    assert problem_scores(run) == {"a": 0.5, "b": 0.5}

"""The output file of an extraction: one line per problem, on disk before the next chunk is asked for.

No line is ever taken out before what replaces it is written, and a file that is not ours is left as it is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from sgpo_lib.extraction.records import Extraction, from_row, to_row
from sgpo_lib.records import Problem
from sgpo_lib.storage import NotJson, append_row, parse_row, set_torn_aside, write_jsonl

_BEGIN = b'{"id": "'
"""Begins every line of an output file: how a line of ours that was cut off is told from a person's text."""


def lines_of(problems: Sequence[Problem], model: str, candidates: int, out: Path) -> dict[str, Extraction]:
    """What `out` holds already, by problem. A last line that was cut off is set aside (storage.py).

    Raises ValueError where a line is none of ours, or of another model, number of candidates, text or response.
    """
    before = read_extractions(out) if out.exists() else []
    known = {p.id: p for p in problems}
    for e in before:
        now = known.get(e.problem.id, e.problem)
        if now.solution != e.problem.solution:
            raise ValueError(f"{out}: problem {e.problem.id} has another response there. Name another file")
        if now.prompt != e.problem.prompt:
            raise ValueError(f"{out}: problem {e.problem.id} has another text there. Name another file")
        if e.engine != model:
            raise ValueError(f"{out}: its lines are of {e.engine!r}, this run asks {model!r}. Name another file")
        if len(e.candidates) not in (0, candidates):
            raise ValueError(f"{out}: problem {e.problem.id} has {len(e.candidates)} candidates there, this run asks "
                             f"for {candidates}. Name another file")
    stored = {e.problem.id: e for e in before}
    set_torn_aside(out)
    return stored


def store(out: Path, stored: dict[str, Extraction], found: Sequence[Extraction]) -> None:
    """Add lines. Where a problem has one already, the file is replaced as a whole, so that no moment is without it."""
    again = any(e.problem.id in stored for e in found)
    stored |= {e.problem.id: e for e in found}
    if again:
        write_jsonl(out, map(to_row, stored.values()))
    for e in () if again else found:
        append_row(out, to_row(e))


def read_extractions(path: Path) -> list[Extraction]:
    """The lines of an output file. A last line that was cut off is passed over.

    Raises ValueError where there is no such file, and with file, line and field for any other faulty line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: got no file, expected the output of sgpo extract (strategies.jsonl)")
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    found, seen = [], dict[str, int]()
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_row(line, '"id": ..., "status": ..., "candidates": ...')
            if row is None:
                if number < len(lines):
                    raise ValueError("empty")
                continue
            found.append(from_row(row))
            if seen.setdefault(row["id"], number) != number:
                raise ValueError(f"id: got {row['id']!r}, which line {seen[row['id']]} has too")
        except ValueError as error:  # a person's file
            if isinstance(error, NotJson) and number == len(lines) and line[: len(_BEGIN)] == _BEGIN[: len(line)]:
                break
            raise ValueError(f"{path}:{number}: {error}. Expected a line of sgpo extract") from error
    return found

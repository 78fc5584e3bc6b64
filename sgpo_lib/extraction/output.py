"""The output file of an extraction: one line per problem, on disk before the next chunk is asked for.

No line is ever taken out before what replaces it is written, and a file that is not ours is left as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgpo_lib.extraction.records import Extraction, from_row, to_row
from sgpo_lib.records import Problem

_BEGIN = b'{"id": "'
"""Begins every line of an output file: how a line of ours that was cut off is told from a person's text."""


def lines_of(problems: Sequence[Problem], model: str, candidates: int, out: Path) -> dict[str, Extraction]:
    """What `out` holds already, by problem. A last line that was cut off is taken out of the file.

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
    if out.exists() and out.read_bytes()[-1:] not in (b"", b"\n"):
        _replace(out, stored)
    return stored


def store(out: Path, stored: dict[str, Extraction], found: Sequence[Extraction]) -> None:
    """Add lines. Where a problem has one already, the file is replaced as a whole, so that no moment is without it."""
    again = any(e.problem.id in stored for e in found)
    stored |= {e.problem.id: e for e in found}
    if again:
        _replace(out, stored)
    else:
        _write(out, found, "a")


def _replace(out: Path, stored: Mapping[str, Extraction]) -> None:
    part = out.with_name(f"{out.name}.part")
    _write(part, [*stored.values()], "w")
    part.replace(out)


def _write(path: Path, found: Sequence[Extraction], mode: str) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(to_row(e), ensure_ascii=False) + "\n" for e in found)
        file.flush()
        os.fsync(file.fileno())


def read_extractions(path: Path) -> list[Extraction]:
    """The lines of an output file. A last line that was cut off is passed over.

    Raises ValueError where there is no such file, and with file, line and field for any other faulty line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: got no file, expected the output of sgpo extract (strategies.jsonl)")
    *lines, last = path.read_bytes().split(b"\n")
    if last.strip() and not _cut_off(last):
        lines.append(last)
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(from_row(json.loads(line)))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:  # a person's file
            raise ValueError(f"{path}:{number}: {error}. Expected a line of sgpo extract") from error
    return found


def _cut_off(last: bytes) -> bool:
    """Whether what stands after the last newline is the beginning of a line of ours: being written, or broken off."""
    try:
        json.loads(last)
    except (ValueError, RecursionError):  # any bytes
        return last[: len(_BEGIN)] == _BEGIN[: len(last)]
    return False

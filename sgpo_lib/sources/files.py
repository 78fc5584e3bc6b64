"""Problems and strategies from a person's files: JSONL, and Parquet where pyarrow is installed."""

from __future__ import annotations

import codecs
import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sgpo_lib.sources.rows import Distinct
from sgpo_lib.storage import parse_row

Parse = Callable[[dict[str, Any], str], None]
"""Takes a line's object and where it stands (`line 3`); raises ValueError for a fault."""
Row = Callable[[], dict[str, Any] | None]
"""Reads one line: its object, None where it is empty; raises ValueError where it holds none."""


def file_problems(path: Path) -> Distinct:
    """The distinct problems of a JSONL or Parquet file. Raises ValueError with file, line and field."""
    found = Distinct(path.stem)
    read(path, found.add, "data.problems", "'testbed', 'collection', 'reasoning-gym:NAME', 'champ', 'hub:OWNER/NAME' "
         "or a JSONL or Parquet file")
    return found


def read(path: Path, parse: Parse, field: str, expected: str) -> None:
    """Give every row to `parse`. Raises ValueError with up to ten faults, as `file:line: ...`."""
    if not path.is_file():
        raise ValueError(f"{field}: got {str(path)!r}, expected {expected}, and there is no file {path.absolute()}")
    faults = []
    for line, row in enumerate(_parquet(path) if path.suffix.lower() == ".parquet" else _lines(path), start=1):
        try:  # the user's text; all lines are read before any fault is reported
            if (raw := row()) is not None:
                parse(raw, f"line {line}")
        except ValueError as error:
            faults.append(f"{path}:{line}: {error}")
    if faults:
        shown = faults[:10] + [f"and {len(faults) - 10} more"] * (len(faults) > 10)
        raise ValueError("\n  ".join([f"{path} has {len(faults)} faulty line(s):", *shown]))


def _lines(path: Path) -> Iterator[Row]:
    for line in path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"):
        yield functools.partial(parse_row, line, '"prompt": ..., "answer": ...')


def _parquet(path: Path) -> Iterator[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install sgpo-workbench[extract]")
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        table = parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:  # the user's file
        raise ValueError(f"{path}: no Parquet file ({error})") from error
    try:
        for batch in table.iter_batches(1000):
            for row in batch.to_pylist():
                yield functools.partial(json.loads, json.dumps(row, default=str))  # dates and bytes become text
    except OSError as error:  # a damaged page
        raise ValueError(f"{path}: damaged Parquet file ({error})") from error

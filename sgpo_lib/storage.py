"""Files that outlive a crash and a full disk, and lines of JSON that are read without guessing.

A whole file is written to a temporary name beside it, flushed to disk and renamed, and then its folder is flushed.
A row is appended as one line and flushed. What a crash tore off at the end of a file of rows is no row: readers pass
over it, and the next writer moves it to FILE.torn. Nothing else is dropped: any other line that is no row is an error
with file, line and, where there is one, field.
"""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_FINITE = "not_finite"
"""Field of a row in which our files hold what JSON has no number for: place -> `nan`, `inf` or `-inf`."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KINDS = {str: "text", int: "a whole number", list: "a list"}
_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""What some programs take for the end of a line; JSON may hold them escaped."""


class DiskFull(OSError):
    """No room for a file. What stood there before is whole, and nothing of the new one is left."""

    path: Path
    needed: int
    """Bytes of what was to be written, as far as known."""
    free: int
    """Bytes."""


def disk_full(error: BaseException, path: Path, needed: int) -> DiskFull | None:
    """`DiskFull` for an error of writing that has a full disk behind it, a quota or a limit of file sizes; else None.

    Libraries wrap the operating system's error, some in words alone (safetensors, torch's distributed checkpoint).
    """
    link: BaseException | None = error
    while link is not None:
        for number in _FULL:
            if getattr(link, "errno", None) == number or os.strerror(number) in str(link):
                free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
                cure = "raise the limit of a file's size (ulimit -f)" if number == errno.EFBIG else \
                    "have SGPO_RUNS name a folder on a larger disk"  # fmt: skip
                found = DiskFull(f"{path}: {os.strerror(number)}: {needed:,} bytes needed, {free:,} free. What was "
                                 f"there before is whole. Free some space, or {cure}; the same command then continues")
                found.path, found.needed, found.free = path, needed, free
                return found
        link = link.__cause__ or link.__context__
    return None


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names, reach the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomic(path: Path, text: str) -> None:
    """Replace a text file whole: write beside it, flush to disk, rename. Raises DiskFull; the old file then stays."""
    data = text.encode("utf-8")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if full := disk_full(error, path, len(data)):
            raise full from error
        raise
    flush(path.parent)


def clear(folder: Path, name: str = "*") -> None:
    """Remove what a killed process left half written; a folder that it was about to replace gets its name back."""
    for path in folder.glob(f".{name}.*"):
        original = path.with_name(path.name[1:].rpartition(".")[0])
        if path.suffix == ".replaced" and not original.exists():
            path.rename(original)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------- rows


class NotJson(ValueError):
    """A line that is no JSON at all: what a crash leaves of one, or garbage."""


class _Constant(str):
    """NaN and the infinities as Python's parser finds them; JSON has none of them."""


def parse_row(line: bytes, like: str = "...") -> dict[str, Any] | None:
    """The object of a line; None for an empty line.

    Raises ValueError for anything but one JSON object, naming column or field and the cure; NotJson where it is no
    JSON. `like` shows the fields that are expected.
    """
    if not line.strip():
        return None
    constants: list[_Constant] = []

    def constant(name: str) -> _Constant:
        constants.append(_Constant(name))
        return constants[-1]

    try:
        found = json.loads(line.decode("utf-8"), parse_constant=constant)
        odd = next((p for p, v in _leaves(found) if isinstance(v, _Constant)), "") if constants else ""
    except UnicodeDecodeError as error:
        raise NotJson(f"got byte 0x{line[error.start]:02x}, expected UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise NotJson(f"not JSON at column {error.colno} ({error.msg}), expected one object a line") from None
    except RecursionError:
        raise NotJson("nested too deeply to be read, expected one object a line") from None
    if constants:
        raise ValueError(f"{odd}{': ' if odd else ''}got {constants[0]}, which JSON does not have: write null or leave "
                         "the field out")
    if not isinstance(found, dict):
        raise ValueError(f"got {json.dumps(found)[:60]} ({type(found).__name__}), expected an object like {{{like}}}")
    return found


def read_jsonl(path: Path, fields: Mapping[str, type] | None = None,
               unique: Sequence[str] = (), appended: bool = False) -> list[dict[str, Any]]:
    """Rows of a JSONL file that this program wrote; none where there is no file.

    `fields`: what every row has, and its type. `unique`: fields whose values together no two rows share. `appended`:
    rows are added to the file, so that a crash may have torn off the last one, which is passed over. Raises ValueError
    with file, line and field for any other line that is no such row.
    """
    rows, seen = [], dict[tuple[Any, ...], int]()
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_row(line)
            if row is None:
                continue
            _check(row, fields or {})
            key = tuple(row.get(name) for name in unique)
            if unique and seen.setdefault(key, number) != number:
                raise ValueError(f"{', '.join(unique)}: got {json.dumps(key)[1:-1]}, which line {seen[key]} has too")
            rows.append(restored(row))
        except ValueError as error:
            if appended and isinstance(error, NotJson) and number == len(lines):
                break
            raise ValueError(f"{path}:{number}: {error}. Restore the file, or remove the line") from None
    return rows


def _check(row: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    for name, kind in fields.items():
        if type(row.get(name)) is not kind:
            shown = f"got {json.dumps(row[name])[:60]}" if name in row else "missing"
            raise ValueError(f"{name}: {shown}, expected {_KINDS[kind]}")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file of rows as a whole. Raises DiskFull."""
    write_atomic(path, "".join(to_line(row) for row in rows))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row, flushed to disk. What a crash left of the last one is set aside first. Raises DiskFull; the rows that
    are there stay, and no part of the new one."""
    set_torn_aside(path)
    _append(path, to_line(row).encode("utf-8"))


def set_torn_aside(path: Path) -> int:
    """Move what a crash tore off at the end of a file of rows to FILE.torn, and say so; returns its bytes.

    A last row that only lacks its newline is given one.
    """
    data = _unended(path)
    if not data:
        return 0
    try:
        parse_row(data)
    except NotJson:
        beside = path.with_name(f"{path.name}.torn")
        _append(beside, data + b"\n")  # before it is taken away: at no moment is it nowhere
        with path.open("rb+") as file:
            file.truncate(path.stat().st_size - len(data))
            os.fsync(file.fileno())
        count = beside.read_bytes().count(b"\n")
        print(f"{path}: the last line had been torn off while it was written; its {len(data)} bytes are set aside in "
              f"{beside.name} (torn lines there: {count}). All other rows stay", file=sys.stderr, flush=True)
        return len(data)
    except ValueError:  # whole, but no row: whoever reads it is told
        pass
    _append(path, b"\n")
    return 0


def _unended(path: Path) -> bytes:
    """What stands after the last newline."""
    if not path.exists() or not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return b""
        file.seek(0)
        return file.read().rpartition(b"\n")[2]


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:  # with a buffer, closing would write the rest after all
        size, rest = os.fstat(file.fileno()).st_size, memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) or 0 :]
            os.fsync(file.fileno())
        except BaseException as error:
            os.ftruncate(file.fileno(), size)
            if full := disk_full(error, path, len(data)):
                raise full from error
            raise


def to_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON with its newline. NaN and infinities become null, and `NOT_FINITE` names them."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        odd = {place: str(value) for place, value in _leaves(row) if _not_finite(value)}
        text = json.dumps({**_plain(row), NOT_FINITE: odd}, ensure_ascii=False, allow_nan=False)
    return text.translate(_BREAKS) + "\n"


def restored(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it was given to `to_line`, with its NaN and infinities. Raises ValueError where they have no place."""
    try:
        for place, name in row.pop(NOT_FINITE, {}).items():
            holder: Any = row
            *path, last = place.split(".")
            for step in path:
                holder = holder[int(step) if isinstance(holder, list) else step]
            holder[int(last) if isinstance(holder, list) else last] = float(name)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):  # not written by `to_line`
        raise ValueError(f"{NOT_FINITE}: expected place -> nan, inf or -inf") from None
    return row


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else None if _not_finite(value) else value


def _leaves(value: Any, place: str = "") -> Iterable[tuple[str, Any]]:
    """Every value inside and where it stands, as `candidates.0.score`."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    if not items and not isinstance(value, Mapping | list | tuple):
        yield place, value
    for name, inner in items:
        yield from _leaves(inner, f"{place}.{name}" if place else str(name))

"""Checkpoints: written whole or not at all, checked before they are used, set aside where they are damaged.

    checkpoints/step-000010/            weights or adapter, optimizer, state.json
    checkpoints/step-000010/manifest.json   SHA-256 and bytes of every other file; written last
    checkpoints/damaged-step-000010/    what had that name and was found damaged, with DAMAGE.txt

The manifest holds a SHA-256 of itself, so that damage to it is told from damage to a file. A run's final weights have
one, too. No torch here: what a folder holds is its writer's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgpo_lib.storage import clear, disk_full, flush, write_atomic

MANIFEST = "manifest.json"
STATE = "state.json"
_STEP = "step-"
_SHOWN = 5
"""Damaged files of a folder that a message names."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; whether they are whole is for `faults` to say."""
    return sorted(p for p in folder.glob(f"{_STEP}*") if p.is_dir())


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix(_STEP))


def at_step(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step has its place."""
    return folder / f"{_STEP}{step:06d}"


# ----------------------------------------------------------------------------------------------------------- manifests


def faults(folder: Path) -> list[str]:
    """What is damaged in a folder with a manifest: file, what the manifest says, what is there. Empty: it is whole."""
    try:
        raw = json.loads((folder / MANIFEST).read_bytes())
        files, own = raw["files"], raw["sha256"]
        expected = {name: (str(entry["sha256"]), int(entry["bytes"])) for name, entry in files.items()}
    except FileNotFoundError:
        return [f"{MANIFEST}: missing; it is written last, so the folder was cut off, or an older version wrote it"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # damaged in whatever way
        return [f"{MANIFEST}: cannot be read ({type(error).__name__}: {error})"]
    if (found := _digest_of(files)) != own:
        return [f"{MANIFEST}: expected SHA-256 {own}, found {found}"]
    return [fault for name, (digest, size) in expected.items() if (fault := _fault(folder / name, name, digest, size))]


def _fault(path: Path, name: str, digest: str, size: int) -> str:
    expected = f"expected {size:,} bytes with SHA-256 {digest}"
    try:
        there = path.stat().st_size
        found = sha256(path)
    except FileNotFoundError:
        return f"{name}: missing, {expected}"
    except OSError as error:  # a bad sector
        return f"{name}: cannot be read ({error.strerror}), {expected}"
    return "" if (found, there) == (digest, size) else f"{name}: {expected}, found {there:,} bytes with {found}"


def whole(folder: Path) -> Path:
    """The folder itself. Raises ValueError where it is not what its writer left: file, expected, found."""
    if found := faults(folder):
        raise ValueError(f"{folder} is damaged: {_listed(found)}. Restore it from a copy, or take another checkpoint")
    return folder


def sha256(path: Path) -> str:
    """64 hex digits over a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path) -> None:
    files = {str(p.relative_to(folder)): {"sha256": sha256(p), "bytes": p.stat().st_size}
             for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST}
    write_atomic(folder / MANIFEST, json.dumps({"sha256": _digest_of(files), "files": files}, indent=1))


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _listed(found: list[str]) -> str:
    more = f"; and {len(found) - _SHOWN} more files" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


# ------------------------------------------------------------------------------------------------------------- writing


def write_folder(final: Path, write: Callable[[Path], None], like: int = 0) -> None:
    """Have `write(folder)` fill a temporary folder; then give it a manifest, flush it to disk, and rename it.

    A folder that has the name is replaced. `like`: bytes that are expected, for the error where the disk is full.
    Raises DiskFull, or what `write` raises; the folder that was there stays, and nothing of the new one.
    """
    clear(final.parent, final.name)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    replaced = final.with_name(f".{final.name}.replaced")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.rglob("*"):
            flush(path)
        _write_manifest(temporary)
    except BaseException as error:
        written = _size(temporary) if temporary.exists() else 0
        shutil.rmtree(temporary, ignore_errors=True)
        if full := disk_full(error, final, max(like, written)):
            raise full from error
        raise
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    for holder in (final.parent, final.parent.parent):
        flush(holder)
    shutil.rmtree(replaced, ignore_errors=True)


def save(folder: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], keep: int,
         protected: tuple[int, ...] = ()) -> Path:
    """Write the checkpoint of a step whole or not at all, then drop the oldest but `keep`.

    Never dropped: a `protected` step, and what one that is kept names as the best (`best_step` of its state). Raises
    what `write_folder` raises.
    """
    def with_state(temporary: Path) -> None:
        write(temporary)
        write_atomic(temporary / STATE, json.dumps({"step": step, **state}))

    clear(folder)
    before = checkpoints(folder)
    write_folder(at_step(folder, step), with_state, _size(before[-1]) if before else 0)
    spare = [p for p in checkpoints(folder) if step_of(p) not in protected]
    bests = {_best(p) for p in spare[-keep:]}
    for old in spare[:-keep]:
        if step_of(old) not in bests:
            shutil.rmtree(old)
    return at_step(folder, step)


def _best(path: Path) -> int:
    """The step that a checkpoint names as the best so far; -1 where it names none, or cannot be read."""
    try:
        return int(json.loads((path / STATE).read_text(encoding="utf-8")).get("best_step", -1))
    except (OSError, ValueError, TypeError, AttributeError):  # damaged: found out when it is to be used
        return -1


# ------------------------------------------------------------------------------------------------------------ resuming


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None where there never was one. For the one process that writes the folder.

    Newer ones that are damaged are renamed, which is printed with file and hashes. So is one that names as its best a
    step whose checkpoint is damaged or gone: the run could not end from it. Raises ValueError where none is whole.
    """
    clear(folder)
    found: Path | None = None
    for path in reversed(checkpoints(folder)):
        if not path.exists():  # set aside below
            continue
        damage, best = faults(path), at_step(folder, _best(path))
        if not damage and _best(path) >= 0 and best != path:
            of_best = faults(best) if best.exists() else ["it is gone"]
            if of_best and best.exists():
                _set_aside(best, of_best)
            damage = [f"needs {best.name}, the best so far: {fault}" for fault in of_best]
        if not damage:
            found = path
            break
        _set_aside(path, damage)
    aside = sorted(folder.glob(f"damaged-{_STEP}*"))
    if found is None and aside:
        reasons = "".join(f"\n  {path}: {_reason(path)}" for path in aside)
        raise ValueError(f"{folder.parent}: no checkpoint is whole, and a run does not begin anew by itself:{reasons}"
                         f"\nRestore the files of one from a copy and rename its folder to {_STEP}NNNNNN, or delete "
                         "these folders to begin anew")
    return found


def _set_aside(path: Path, damage: list[str]) -> None:
    place, number = path.with_name(f"damaged-{path.name}"), 1
    while place.exists():
        number += 1
        place = path.with_name(f"damaged-{path.name}-{number}")
    path.rename(place)
    flush(path.parent)
    text = _listed(damage)
    with contextlib.suppress(OSError):  # a full disk: it is printed all the same
        write_atomic(place / "DAMAGE.txt", text + "\n")
    print(f"{path}: damaged and set aside as {place.name}: {text}", file=sys.stderr, flush=True)


def _reason(path: Path) -> str:
    try:
        return (path / "DAMAGE.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return "damaged"

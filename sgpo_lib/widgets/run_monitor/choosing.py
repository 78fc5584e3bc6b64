"""Which run folders are meant: names, patterns, folders, or what is running now."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from sgpo_lib.runs import Run, is_locked, runs_root
from sgpo_lib.widgets.run_monitor.following import there

Wanted = str | Path | Run


def folders(wanted: Wanted | Sequence[Wanted] | None, root: Path | None, wait: bool) -> list[Path]:
    """Folders of the wanted runs, each once. None: those that are being written now.

    A name or pattern (`tiny-sgpo-*`) is looked up below `root`; a path to a folder is taken as it is. Raises ValueError
    where there is no such run and it is not waited for.
    """
    base = root or runs_root()
    if wanted is None:
        found = [p for p in _runs(base) if is_locked(p)]
        if not found:
            raise ValueError(f"no run is being written below {base}. Name one: {_some(_runs(base))}")
        return found
    several = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
    if not several:
        raise ValueError("runs: got none, expected at least one name, folder or Run")
    found = []
    for one in several:
        found += _matches(one, base, wait)
    return list(dict.fromkeys(found))


def names(paths: Sequence[Path]) -> list[str]:
    """What the runs are called: their folders' names, whole paths where two are alike."""
    short = [p.name for p in paths]
    return [n if short.count(n) == 1 else str(p) for n, p in zip(short, paths, strict=True)]


def _matches(one: Wanted, base: Path, wait: bool) -> list[Path]:
    if isinstance(one, Run):
        return [one.folder]
    if not isinstance(one, str | Path) or not str(one).strip():
        raise ValueError(f"runs: got {one!r}, expected a name, a pattern, a folder or a Run")
    path = Path(one).expanduser()
    if there(path):
        return [path.resolve()]
    if there(base / path):
        return [base / path]
    runs = _runs(base)
    if isinstance(one, str) and any(c in one for c in "*?["):
        found = sorted(p for p in runs if p.match(one))
        if not found:
            raise ValueError(f"runs: no run below {base} matches {one!r}. There are {_some(runs)}")
        return found
    if not wait:
        near = difflib.get_close_matches(str(one), [p.name for p in runs], n=1, cutoff=0.3)
        nearest = f"nearest: {near[0]!r}" if near else f"there are {_some(runs)}"
        raise ValueError(f"no run {str(one)!r} below {base}; {nearest}. With wait=True the monitor waits for it")
    return [base / path]


def _runs(base: Path) -> list[Path]:
    """Run folders, the one changed last first."""
    return sorted((p.parent for p in base.glob("*/config.yaml")), key=lambda p: -p.stat().st_mtime)


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(repr(p.name) for p in paths[:5]) + (", ..." if len(paths) > 5 else "") if paths else "none yet"

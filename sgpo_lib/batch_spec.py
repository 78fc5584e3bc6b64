"""Batch specifications: many notebooks from one YAML file, read and checked before anything starts.

    name: quickstart            folder of the jobs: runs/jobs/quickstart/
    parallel: 2                 processes at a time; default: CPU count
    jobs:                       order = priority: put long jobs first
      full_run:
        notebook: 06_full_run   stem in notebooks/, or a path (also relative to this file)
        parameters: {profile: tiny}
        grid: {method: [sgpo, grpo8], seed: [0, 1, 2]}   jobs full_run-sgpo-s0, full_run-sgpo-s1, ...
        threads: 1              OMP_NUM_THREADS; default: CPU count / parallel
        env: {NAME: value}
      compare:
        notebook: 07_compare_runs
        after: [full_run]       a job, or all jobs of a grid by its name
    smoke:                      with --smoke: parameters over those above, by job; a list for a name of the grid
      full_run: {steps: 3, seed: [0]}                    replaces the grid's list; `false` leaves the job out.
                                                         Jobs go to runs/jobs/NAME-smoke/

`jobs` may also be a list whose entries have a `name`. Running them is batch.py's business.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo_lib.config import unknown
from sgpo_lib.jobs import find_notebook, jobs_root, place_parameters, read_yaml

_JOB_FIELDS = ("name", "notebook", "parameters", "grid", "after", "env", "threads")
_SPEC_FIELDS = ("name", "parallel", "jobs", "smoke")


@dataclass(frozen=True)
class Job:
    """One notebook execution of a batch."""

    name: str
    group: str
    """Name in the file; differs from `name` for the jobs of a grid."""
    notebook: Path
    parameters: dict[str, Any]
    after: tuple[str, ...]
    """Names of the jobs that must be done before."""
    env: dict[str, str]
    threads: int


@dataclass(frozen=True)
class Batch:
    """A checked specification."""

    name: str
    parallel: int
    jobs: tuple[Job, ...]

    @property
    def folder(self) -> Path:
        """Where its job folders live."""
        return jobs_root() / self.name


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- reading a specification -------------------------------------------------------------------------------------
def load_batch(spec: Path, parallel: int | None = None, smoke: bool = False) -> Batch:
    """Read and check a specification. Raises ValueError listing all faults with file, job, field and cure."""
    if not spec.is_file():
        raise ValueError(f"no batch file {spec}. The one of `make run` is experiments/quickstart.yaml")
    try:
        raw = read_yaml(spec.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("expected a mapping with name and jobs")
        for name in raw:
            if name not in _SPEC_FIELDS:
                raise unknown("field", str(name), _SPEC_FIELDS)
        name = str(raw.get("name") or spec.stem) + ("-smoke" if smoke else "")
        parallel = parallel or raw.get("parallel") or cpu_count()
        if not isinstance(parallel, int) or parallel < 1:
            raise ValueError(f"parallel: got {parallel!r}, expected a number of processes, 1 or more")
        entries = _entries(raw.get("jobs"))
        small = raw.get("smoke") or {}
        for job in small:
            if job not in entries:
                raise unknown("job under smoke", str(job), entries)
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from None
    faults: list[str] = []
    jobs: list[Job] = []
    for group, entry in entries.items():
        changes = small.get(group) if smoke else None
        try:
            made = _expand(group, entry, changes or {}, spec.parent, parallel)
            jobs += made if changes is not False else []
        except ValueError as error:
            faults.append(f"job {group!r}: {error}")
    if not faults:
        faults, jobs = _link(jobs, {g for g, changes in small.items() if smoke and changes is False})
    if faults:
        raise ValueError(f"{spec}: nothing was started\n  " + "\n  ".join(faults))
    return Batch(name, parallel, tuple(jobs))


def _entries(raw: Any) -> dict[str, dict[str, Any]]:
    """`jobs` as name -> entry."""
    pairs = list(raw.items()) if isinstance(raw, dict) else [
        (e.get("name") if isinstance(e, dict) else None, e) for e in raw] if isinstance(raw, list) else []
    if not pairs:
        raise ValueError("jobs: expected a mapping of names to jobs, or a list of jobs with a name each")
    entries: dict[str, dict[str, Any]] = {}
    for name, entry in pairs:
        if not name or not isinstance(entry, dict):
            raise ValueError(f"jobs: got {entry!r}, expected a job with name and notebook")
        if str(name) in entries:
            raise ValueError(f"jobs: the name {name!r} is there twice. Rename one")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(name)):
            raise ValueError(f"jobs: the name {name!r} becomes a folder: use letters, digits, '.', '_' and '-'")
        for key in entry:
            if key not in _JOB_FIELDS:
                raise ValueError(f"job {name!r}: {unknown('field', str(key), _JOB_FIELDS)}")
        entries[str(name)] = entry
    return entries


def _expand(group: str, entry: Mapping[str, Any], small: Mapping[str, Any], base: Path, parallel: int) -> list[Job]:
    """The jobs of an entry: one, or one per point of its grid."""
    kinds: dict[str, type | tuple[type, ...]] = {"parameters": dict, "grid": dict, "env": dict, "threads": int,
                                                 "after": (str, list)}
    for name, kind in kinds.items():
        if entry.get(name) is not None and not isinstance(entry[name], kind):
            raise ValueError(f"{name}: got {entry[name]!r}, expected "
                             f"{'a name or a list of names' if name == 'after' else getattr(kind, '__name__', '')}")
    if not entry.get("notebook"):
        raise ValueError("notebook: missing. Give a stem such as 06_full_run, or a path")
    notebook = find_notebook(str(entry["notebook"]), base)
    fixed, grid = dict(entry.get("parameters") or {}), dict(entry.get("grid") or {})
    for name, value in small.items():
        if name in grid and isinstance(value, list):
            grid[name] = value
        else:
            grid.pop(name, None)
            fixed[name] = value
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid.{name}: got {values!r}, expected a list of values")
        if name in fixed:
            raise ValueError(f"{name!r} is under parameters and under grid. Remove one")
    after = entry.get("after") or []
    jobs = []
    for point in itertools.product(*grid.values()):
        chosen = dict(zip(grid, point, strict=True))
        parameters = fixed | chosen
        place_parameters(notebook, parameters)
        jobs.append(Job("-".join([group, *(_suffix(n, v) for n, v in chosen.items())]), group, notebook, parameters,
                        tuple([after] if isinstance(after, str) else map(str, after)),
                        {str(k): str(v) for k, v in (entry.get("env") or {}).items()},
                        int(entry.get("threads") or max(1, cpu_count() // parallel))))
    return jobs


def _suffix(name: str, value: Any) -> str:
    """Part of a grid job's name: `sgpo` for method=sgpo, `s0` for seed=0, `lr0.001` for lr=1e-3."""
    if isinstance(value, str):
        return re.sub(r"[^\w.-]+", "_", value) or "none"
    return ("s" if name == "seed" else name.rpartition(".")[2]) + re.sub(r"[^\w.-]+", "_", str(value))


def _link(jobs: list[Job], left_out: set[str]) -> tuple[list[str], list[Job]]:
    """Dependencies as names of jobs; faults for unknown names, names that come twice, and circles."""
    faults = []
    names = [j.name for j in jobs]
    faults += [f"two jobs are called {n!r}: rename one" for n in dict.fromkeys(names) if names.count(n) > 1]
    groups: dict[str, list[str]] = {n: [n] for n in names}
    for j in jobs:
        if j.group != j.name:
            groups.setdefault(j.group, []).append(j.name)
    linked = []
    for j in jobs:
        wanted: list[str] = []
        for name in [n for n in j.after if n not in left_out]:
            if name not in groups:
                faults.append(f"job {j.name!r}: after: {unknown('job', name, groups)}")
            wanted += groups.get(name, [])
        linked.append(Job(**{**vars(j), "after": tuple(dict.fromkeys(wanted))}))
    open_ = {j.name: set(j.after) for j in linked}
    while free := [n for n, needs in open_.items() if not needs & set(open_)]:
        for name in free:
            del open_[name]
    if open_ and not faults:
        faults.append("jobs wait for each other in a circle: " + ", ".join(
            f"{n} after {' and '.join(sorted(needs & set(open_)))}" for n, needs in open_.items()))
    return list(dict.fromkeys(faults)), linked

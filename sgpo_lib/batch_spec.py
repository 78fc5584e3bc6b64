"""Batch specifications: many notebooks from one YAML file, read and checked before anything starts.

    name: quickstart            folder of the jobs: runs/jobs/quickstart/
    engine: local               where: local (default), slurm or ray; `--engine` overrides it
    parallel: 2                 jobs at a time; default: CPU count here, no limit on a cluster
    defaults:                   any of resources, setup, python, container, retries, grace, threads, env, for every job
      setup: [module load cuda, export HF_HUB_OFFLINE=1]
    jobs:                       order = priority: put long jobs first
      full_run:
        notebook: 06_full_run   stem in notebooks/, or a path (also relative to this file)
        parameters: {profile: tiny}
        grid: {method: [sgpo, grpo8], seed: [0, 1, 2]}   jobs full_run-sgpo-s0, full_run-sgpo-s1, ...
        resources: {gpus: 1, memory: 64G, time: 12:00:00}   see resources.py; a field of its own replaces the default's
        setup: [...]            lines of bash before the notebook, in its shell; one that fails ends the job
        python: /env/bin/python interpreter of the job; default: the one that runs the batch
        container: apptainer exec image.sif   put before the command
        retries: 2              further attempts after a failure; one that was asked to stop goes on anyway
        grace: 120              seconds to finish a step in, when asked to stop
        threads: 1              OMP_NUM_THREADS; default: resources.cpus, else CPU count / parallel here, 1 on a cluster
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
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgpo_lib.config import unknown
from sgpo_lib.jobs import find_notebook, jobs_root, place_parameters, read_yaml
from sgpo_lib.redaction import refuse_secrets
from sgpo_lib.resources import Resources, read_resources

ENGINES = ("local", "slurm", "ray")
_DEFAULT_FIELDS = ("resources", "setup", "python", "container", "retries", "grace", "threads", "env")
_JOB_FIELDS = ("name", "notebook", "parameters", "grid", "after", *_DEFAULT_FIELDS)
_SPEC_FIELDS = ("name", "engine", "parallel", "defaults", "jobs", "smoke")
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "parameters": (dict, "a mapping of names to values"), "grid": (dict, "a mapping of names to lists of values"),
    "env": (dict, "a mapping of names to values"), "after": ((str, list), "a name or a list of names"),
    "resources": (dict, "a mapping such as {gpus: 1, time: 12:00:00}"),
    "setup": ((str, list), "a line of bash or a list of lines"), "python": (str, "an interpreter"),
    "container": (str, "a command such as apptainer exec image.sif"), "retries": (int, "0 or more"),
    "grace": (int, "seconds, 1 or more"), "threads": (int, "1 or more")}
_LEAST = {"retries": 0, "grace": 1, "threads": 1}


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
    resources: Resources
    setup: tuple[str, ...]
    """Lines of bash that come before the notebook, in the same shell."""
    python: str
    """Interpreter; empty: the one that runs the batch."""
    container: tuple[str, ...]
    """Words that come before the command."""
    retries: int
    """Further attempts after one that failed."""
    grace: int
    """Seconds to finish a step in, when asked to stop."""


@dataclass(frozen=True)
class Batch:
    """A checked specification."""

    name: str
    engine: str
    parallel: int
    """Jobs at a time."""
    jobs: tuple[Job, ...]

    @property
    def folder(self) -> Path:
        """Where its job folders live."""
        return jobs_root() / self.name


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- reading a specification -------------------------------------------------------------------------------------
def load_batch(spec: Path, parallel: int | None = None, smoke: bool = False, engine: str | None = None) -> Batch:
    """Read and check a specification. Raises ValueError listing all faults with file, job, field and cure."""
    if not spec.is_file():
        raise ValueError(f"no batch file {spec}. The one of `make run` is experiments/quickstart.yaml")
    try:
        raw = read_yaml(spec.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("expected a mapping with name and jobs")
        faults = _unknown_fields(raw, _SPEC_FIELDS)
        name = str(raw.get("name") or spec.stem) + ("-smoke" if smoke else "")
        engine = engine or raw.get("engine") or "local"
        if engine not in ENGINES:
            faults.append(f"engine: {unknown('engine', str(engine), ENGINES)}")
        entries = _entries(raw.get("jobs"))
        limit = raw.get("parallel") if parallel is None else parallel
        limit = (cpu_count() if engine == "local" else 10**6) if limit is None else limit
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            faults.append(f"parallel: got {limit!r}, expected a number of jobs, 1 or more")
            limit = 1
        small, defaults = raw.get("smoke") or {}, raw.get("defaults") or {}
        if not isinstance(small, dict) or not isinstance(defaults, dict):
            raise ValueError("smoke and defaults: expected mappings")
        faults += [str(unknown("job under smoke", str(job), entries)) for job in small if job not in entries]
        common = [f"defaults: {fault}" for fault in _faults_of(defaults, _DEFAULT_FIELDS)]
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from None
    faults += common
    jobs: list[Job] = []
    for group, entry in entries.items():
        changes = small.get(group) if smoke else None
        wrong = _faults_of(entry, _JOB_FIELDS)
        if not wrong and not common:
            try:
                made = _expand(group, _merged(defaults, entry), changes or {}, spec.parent,
                               max(1, cpu_count() // limit) if engine == "local" else 1)
                jobs += made if changes is not False else []
            except ValueError as error:
                wrong = [str(error)]
        faults += [f"job {group!r}: {fault}" for fault in wrong]
    if not faults:
        faults, jobs = _link(jobs, {g for g, changes in small.items() if smoke and changes is False})
    if faults:
        raise ValueError(f"{spec}: nothing was started\n  " + "\n  ".join(faults))
    return Batch(name, engine, limit, tuple(jobs))


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
        entries[str(name)] = entry
    return entries


def _unknown_fields(entry: Mapping[Any, Any], known: Iterable[str]) -> list[str]:
    return [str(unknown("field", str(name), known)) for name in entry if name not in known]


def _faults_of(entry: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Every field of a job, or of `defaults`, that has a wrong name, type or range."""
    faults = _unknown_fields(entry, known)
    for name, (kind, expected) in _KINDS.items():
        value = entry.get(name)
        if value is None:
            continue
        good = isinstance(value, kind) and not isinstance(value, bool)
        if good and name in ("setup", "after"):
            good = all(isinstance(line, str) for line in value)
        if not good or (name in _LEAST and value < _LEAST[name]):
            faults.append(f"{name}: got {value!r}, expected {expected}")
        elif name == "resources":
            faults += read_resources(value)[1]
        elif name == "container":
            try:
                shlex.split(value)
            except ValueError as error:
                faults.append(f"container: got {value!r}, expected {expected} ({error})")
    for name, values in (entry.get("grid") or {}).items() if isinstance(entry.get("grid"), dict) else ():
        if not isinstance(values, list) or not values:
            faults.append(f"grid.{name}: got {values!r}, expected a list of values")
    if "notebook" in known and not entry.get("notebook"):
        faults.append("notebook: missing. Give a stem such as 06_full_run, or a path")
    return faults


def _merged(defaults: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """A job's fields over the defaults; `resources` and `env` field by field."""
    merged = {**defaults, **{n: v for n, v in entry.items() if v is not None}}
    for name in ("resources", "env"):
        merged[name] = {**(defaults.get(name) or {}), **(entry.get(name) or {})}
    return merged


def _expand(group: str, entry: Mapping[str, Any], small: Mapping[str, Any], base: Path, threads: int) -> list[Job]:
    """The jobs of an entry: one, or one per point of its grid."""
    notebook = find_notebook(str(entry["notebook"]), base)
    fixed, grid = dict(entry.get("parameters") or {}), dict(entry.get("grid") or {})
    for name, value in small.items():
        if name in grid and isinstance(value, list):
            grid[name] = value
        else:
            grid.pop(name, None)
            fixed[name] = value
    for name in set(grid) & set(fixed):
        raise ValueError(f"{name!r} is under parameters and under grid. Remove one")
    after, setup = entry.get("after") or [], entry.get("setup") or []
    refuse_secrets({name: entry[name] for name in ("env", "setup", "container") if entry.get(name)}, "the batch file")
    python = str(Path(entry["python"]).expanduser()) if entry.get("python") else ""
    resources, _ = read_resources(entry["resources"])
    common = Job(
        group, group, notebook, {}, (after,) if isinstance(after, str) else tuple(after),
        {str(k): str(v) for k, v in entry["env"].items()}, entry.get("threads") or resources.cpus or threads, resources,
        (setup,) if isinstance(setup, str) else tuple(setup), python,
        tuple(shlex.split(entry.get("container") or "")), entry.get("retries") or 0, entry.get("grace") or 120)
    jobs = []
    for point in itertools.product(*grid.values()):
        chosen = dict(zip(grid, point, strict=True))
        parameters = fixed | chosen
        place_parameters(notebook, parameters)
        name = "-".join([group, *(_suffix(n, v) for n, v in chosen.items())])
        jobs.append(replace(common, name=name, parameters=parameters))
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
        linked.append(replace(j, after=tuple(dict.fromkeys(wanted))))
    open_ = {j.name: set(j.after) for j in linked}
    while free := [n for n, needs in open_.items() if not needs & set(open_)]:
        for name in free:
            del open_[name]
    if open_ and not faults:
        faults.append("jobs wait for each other in a circle: " + ", ".join(
            f"{n} after {' and '.join(sorted(needs & set(open_)))}" for n, needs in open_.items()))
    return list(dict.fromkeys(faults)), linked

"""Job folders: what one executed notebook leaves behind, which parameters it takes, and whether it is up to date.

    JOB/parameters.yaml  what the notebook was given
    JOB/log.txt          the lines it printed, as they came
    JOB/notebook.ipynb   the executed copy, replaced as a whole while it runs
    JOB/report.html      the same as a page (plotly.min.js beside it), opens offline
    JOB/token_kl.html    the KL microscope, where the notebook wrote one
    JOB/runs.txt         run folders that the notebook opened, one a line
    JOB/STOP             it was asked to stop (removed when it starts again)
    JOB/queue.json       where it waits or runs on a cluster; JOB/attempts.json: how often it was started there
    JOB/DONE | FAILED.json   written last

A job is up to date when `DONE` holds the same key: parameters, notebook source, source of `sgpo_lib`, and the `DONE`
files of the jobs it depends on. Any edit of the library makes every job run again; finished training runs inside
are found again by their own configuration, so that repeating is cheap. Nothing here imports papermill or torch.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from sgpo_lib.config import RunConfig, field_index, override, unknown
from sgpo_lib.recipes import METHODS, PROFILES
from sgpo_lib.redaction import refuse_secrets
from sgpo_lib.runs import PACKAGE_FOLDER, is_locked, runs_root

STOPPED = 75
"""Exit code of `sgpo run` where it stopped because it was asked to: the same command continues."""
STATES = ("done", "failed", "running", "queued", "stopped", "blocked", "waiting")
"""How a job stands. `queued`: a cluster has it; `stopped`: it began and has neither DONE nor FAILED.json; `blocked`:
what it needs failed."""

PATH_FIELDS = ("problems", "strategies", "source", "init_from", "run")
"""Parameters that may name a file or folder."""


@dataclass(frozen=True)
class JobResult:
    """How a job stands or ended."""

    name: str
    """Name of the job, unique within its batch."""
    folder: Path
    """Job folder."""
    state: str
    """One of `STATES`."""
    notebook: str = ""
    """File name of the notebook."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What the notebook was given."""
    seconds: float = 0.0
    """Wall time of the execution; 0 while unknown."""
    reason: str = ""
    """Why it failed or is blocked, or what a cluster says of a queued job; empty otherwise."""
    attempt: int = 1
    """How often it was started (attempts.json)."""
    host: str = ""
    """Where it runs or ran; empty while unknown."""
    fresh: bool = True
    """False where nothing ran because the job was up to date."""


# --- YAML ------------------------------------------------------------------------------------------------------
class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number (YAML 1.1 reads a string) and refuses a key that comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *settings`
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: {key!r} is there twice. Rename or remove one")
            seen.add(key if isinstance(key, str | int | float) else id(key_node))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        """12:00:00 stays a string; YAML 1.1 reads it as 43200, in base 60."""
        return node.value if ":" in node.value else super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
                              list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """Plain values from YAML text. Raises ValueError with the line for text that is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - it is a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None


def parse_assignment(text: str) -> tuple[str, Any]:
    """`name=value` of the command line; the value is YAML (`false`, `3`, `1e-4`, `[a, b]`), else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"parameter {text!r}: expected name=value, as in -p steps=20")
    return name.strip(), read_yaml(value) if value.strip() else ""


# --- notebooks and their parameters ------------------------------------------------------------------------------
def notebooks_folder() -> Path:
    """`notebooks/` of the checkout, else of the current folder."""
    checkout = PACKAGE_FOLDER.parent / "notebooks"
    return checkout if checkout.is_dir() else Path.cwd() / "notebooks"


def find_notebook(name: str | Path, *bases: Path) -> Path:
    """The file of a notebook: a path (also relative to `bases`), or a stem in `notebooks/`, `.ipynb` or not.

    Raises ValueError naming the nearest notebook there is.
    """
    for base in (Path.cwd(), *bases, notebooks_folder()):
        for candidate in (base / name, base / f"{name}.ipynb"):
            if candidate.suffix == ".ipynb" and candidate.is_file():
                return candidate.resolve()
    known = [p.stem for p in notebooks_folder().glob("*.ipynb")]
    raise unknown("notebook", Path(name).name.removesuffix(".ipynb"), known)


def load_notebook(path: Path) -> dict[str, Any]:
    """A notebook file as a dict. Raises ValueError where it is not one."""
    try:
        nb = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(nb["cells"], list):
            return nb
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: not a notebook (nbformat 4). Open it in JupyterLab and save it again")


def notebook_parameters(path: Path) -> dict[str, Any]:
    """Names and default literals of the cell tagged `parameters`; empty where there is none.

    Read from the syntax tree instead of with `papermill.inspect_notebook`, whose line patterns lose values with a
    second `=` or a `#` in a string. Raises ValueError for a default that is not a literal.
    """
    for cell in load_notebook(path)["cells"]:
        if cell["cell_type"] == "code" and "parameters" in cell.get("metadata", {}).get("tags", []):
            break
    else:
        return {}
    defaults: dict[str, Any] = {}
    for line in ast.parse("".join(cell["source"])).body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            continue
        try:
            defaults[targets[0].id] = ast.literal_eval(line.value)  # type: ignore[attr-defined]
        except (ValueError, TypeError):
            raise ValueError(f"{path.name}: parameter {targets[0].id!r} (line {line.lineno} of the parameters cell) "
                             "has no literal default. Write a number, string, list, dict or None") from None
    return defaults


def place_parameters(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What papermill is to inject, checked before any work.

    A name of the parameters cell is passed on. The name of a config field (`lr` or `train.lr`) that the cell lacks
    goes into the notebook's `overrides`, where it has that parameter. Anything else, a value of another type than
    the default's (None accepts all, a whole number is a float too), an unknown profile or method, or a secret raises
    ValueError.
    """
    refuse_secrets(given, path.name)
    defaults = notebook_parameters(path)
    placed: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for name, value in ((n, _from_here(n, v)) for n, v in given.items()):
        if name in defaults:
            placed[name] = _fit(path.name, name, value, defaults[name])
        elif name in field_index() and isinstance(defaults.get("overrides"), dict):
            overrides[name] = value
        else:
            fields = {full.rpartition(".")[2] for full in field_index().values()} if "overrides" in defaults else set()
            raise unknown(f"parameter of {path.name}", name, {*defaults, *fields})
    if overrides:
        placed["overrides"] = {**placed.get("overrides", defaults["overrides"]), **overrides}
    extra = placed.get("overrides", {})
    full = [field_index().get(name, name) for name in extra]
    if len(set(full)) < len(full):
        raise ValueError(f"{path.name}: a field is given twice: {', '.join(extra)}")
    override(RunConfig(), extra)  # names and types
    for name, table in (("profile", PROFILES), ("method", METHODS)):
        if isinstance(placed.get(name), str) and placed[name] not in table:
            raise unknown(name, placed[name], table)
    return placed


def _from_here(name: str, value: Any) -> Any:
    """A file or folder named relative to where the command runs, made absolute: a notebook runs in its own folder.
    Also inside a mapping, such as `benchmarks`."""
    if isinstance(value, dict):
        return {key: _from_here(str(key), inner) for key, inner in value.items()}
    is_path = name.rpartition(".")[2] in PATH_FIELDS and isinstance(value, str) and value and Path(value).exists()
    return str(Path(value).resolve()) if is_path else value


def _fit(notebook: str, name: str, value: Any, default: Any) -> Any:
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, float) and value in ("inf", "-inf", "nan"):
        return float(value)
    raise ValueError(f"parameter {name!r} of {notebook}: got {value!r} ({type(value).__name__}), expected "
                     f"{type(default).__name__} as in its default {default!r}")


# --- up to date? -------------------------------------------------------------------------------------------------
def _digest(*parts: str | bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
        sha.update(b"\0")
    return sha.hexdigest()[:16]


@functools.cache
def library_digest() -> str:
    """Digest of the source of `sgpo_lib`, as it was when first asked for."""
    files = sorted(p for p in PACKAGE_FOLDER.rglob("*") if p.suffix in (".py", ".yaml"))
    return _digest(*(part for p in files for part in (str(p.relative_to(PACKAGE_FOLDER)), p.read_bytes())))


def job_key(notebook: Path, placed: Mapping[str, Any], after: Iterable[Path] = ()) -> dict[str, str]:
    """What decides a job's result: digests of parameters, notebook source, library and the jobs before it."""
    cells = load_notebook(notebook)["cells"]
    return {"parameters": _digest(json.dumps(dict(placed), sort_keys=True, default=str)),
            "notebook": _digest(*(part for c in cells for part in (c["cell_type"], "".join(c["source"])))),
            "library": library_digest(),
            "after": _digest(*sorted(_text(folder / "DONE") for folder in after))}


def up_to_date(folder: Path, key: Mapping[str, str]) -> bool:
    """Whether the job finished with this very key."""
    return _record(folder / "DONE").get("key") == dict(key)


# --- reading folders ---------------------------------------------------------------------------------------------
def read_job(folder: Path) -> JobResult:
    """How the job in a folder stands."""
    done, failed = _record(folder / "DONE"), _record(folder / "FAILED.json")
    if done:
        state = "done"
    elif is_locked(folder):
        state = "running"
    elif queue := ({} if failed else _record(folder / "queue.json")):
        state = "queued"
    else:
        state = "failed" if failed else "stopped" if (folder / "parameters.yaml").exists() else "waiting"
    told, attempts = _record(folder / "parameters.yaml"), _json(folder / "attempts.json")
    record = done or (failed if state == "failed" else {})
    reason = ""
    if state == "failed":
        where = f"cell {failed['cell']}: " if failed.get("cell") else ""
        reason = ". ".join(filter(None, [f"{where}{failed.get('error')}: {failed.get('message')}", failed.get("cure")]))
    elif state == "queued":
        reason = f"{queue.get('engine', '')} {queue.get('id', '')}: {queue.get('note', '')}".strip(" :")
    host = record.get("host") or (owner_host(folder) if state == "running" else "")
    return JobResult(folder.name, folder, state, told.get("notebook", ""), told.get("parameters", {}),
                     float(record.get("seconds", 0.0)), reason, attempt=max(1, len(attempts or [])), host=host)


def owner_host(folder: Path) -> str:
    """The machine of the process that holds a folder; empty where none does."""
    return _text(folder / ".owner").strip().rpartition(" on ")[2]


def read_batch(folder: Path) -> list[JobResult]:
    """The jobs of a batch in the order of its specification, with those that never started.

    Raises ValueError where there is no batch.
    """
    plan = _record(folder / "batch.json")
    if not plan:
        names = sorted(p.parent.name for p in folder.parent.glob("*/batch.json"))
        raise unknown("batch", folder.name, names) if names else ValueError(
            f"no batch at {folder}. Start one: sgpo batch experiments/quickstart.yaml")
    results = []
    for row in plan["jobs"]:
        job = read_job(folder / row["name"])
        if job.state in ("waiting", "queued", "stopped", "failed") and row.get("blocked"):
            job = JobResult(job.name, job.folder, "blocked", row["notebook"], row["parameters"], 0.0, row["blocked"])
        if job.state in ("waiting", "queued"):  # it may not have started yet, with parameters of its own
            job = replace(job, notebook=row["notebook"], parameters=row["parameters"])
        results.append(job)
    return results


def batch_folders() -> list[Path]:
    """Folders of batches, the newest last."""
    return [p.parent for p in sorted(jobs_root().glob("*/batch.json"), key=lambda p: p.stat().st_mtime)]


def job_runs(jobs: Iterable[JobResult]) -> list[Path]:
    """Run folders that the notebooks of these jobs opened (`runs.txt`), without repeats, those that still exist."""
    lines = [line for job in jobs for line in _text(job.folder / "runs.txt").splitlines()]
    return [Path(line) for line in dict.fromkeys(lines) if (Path(line) / "config.yaml").exists()]


def last_line(folder: Path) -> str:
    """The newest line of a job's log, shortened to 150 characters."""
    path = folder / "log.txt"
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [s for s in file.read().decode("utf-8", "replace").splitlines() if s.strip()]
    return lines[-1].strip()[:150] if lines else ""


def jobs_root() -> Path:
    """Where job folders live: `jobs/` under the root of runs."""
    return runs_root() / "jobs"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return read_yaml(text) if path.suffix == ".yaml" else json.loads(text or "null")
    except ValueError:  # cut short by a full disk: counts as absent
        return None


def _record(path: Path) -> dict[str, Any]:
    record = _json(path)
    return record if isinstance(record, dict) else {}

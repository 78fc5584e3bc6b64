"""Problems from a data set of the Hugging Face hub (or a folder in its layout), through `datasets`.

A field map says which column is what: `{"prompt": "prompt", "answer": "reward_model.ground_truth", "solution":
"target"}`. A dot goes into a structure. A list of chat messages is the content of its last message of the role that
fits: `user` for the prompt, `assistant` for the solution; the system message is not part of the problem, since the
workbench adds its own instruction.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from sgpo_lib.config import unknown
from sgpo_lib.sources.rows import Distinct, got

FIELDS: dict[str, dict[str, str]] = {
    "Elliott/Openr1-Math-46k-8192": {"prompt": "prompt", "answer": "reward_model.ground_truth", "solution": "target"},
    "HuggingFaceH4/MATH-500": {"id": "unique_id", "prompt": "problem", "answer": "answer", "solution": "solution",
                               "family": "subject"},
}
"""Field maps of the paper's training set (LUFFY's) and of MATH500. Others: `problem_args: {fields: {...}}`."""
_SPLITS = {"HuggingFaceH4/MATH-500": "test"}
"""The one split of a data set that has no `train`."""
_ROLES = {"prompt": "user", "solution": "assistant", "answer": "assistant"}
_NAMES = ("id", "prompt", "answer", "solution", "family", "strategy", "split")


def hub_problems(name: str, *, split: str = "", fields: Mapping[str, str] | None = None, subset: str = "",
                 revision: str = "") -> Distinct:
    """The distinct problems of one split (`train`, or the only one of a known data set). `fields` extends or replaces
    the known map; columns with the names that a file's fields have need none.

    Raises ValueError, with the cure, where `datasets` is missing or cannot load it, or for a faulty row.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"hub:{name}: the package `datasets` is not installed: pip install sgpo-workbench[extract]")
    if not name.strip("/ "):
        raise ValueError(f"hub:{name}: no data set is named, expected hub:OWNER/NAME, or hub: and a folder")
    split = _SPLITS.get(name, "train") if split == "" else split
    if not isinstance(fields or {}, Mapping) or not all(isinstance(path, str) for path in (fields or {}).values()):
        raise ValueError(f"problem_args.fields of hub:{name}: got {fields!r}, expected a mapping of field to column, "
                         "for example {answer: gold}")
    if not (isinstance(split, str) and split):
        raise ValueError(f"problem_args.split of hub:{name}: got {split!r}, expected the name of a split (train)")
    for field in (f for f in fields or {} if f not in _NAMES):
        raise unknown(f"field in problem_args.fields of hub:{name}", field, _NAMES)
    datasets = importlib.import_module("datasets")
    try:
        table = datasets.load_dataset(name, subset or None, split=split, revision=revision or None)
    except Exception as error:  # network, permissions, an unknown split, a file in no known form
        raise ValueError(f"hub:{name}, split {split!r}: cannot be loaded ({type(error).__name__}: {error}). Check the "
                         "name and the split, the network, or HF_HOME on a machine without network") from error
    wanted = {**FIELDS.get(name, {}), **(fields or {})}
    for field, path in wanted.items():
        if path.split(".")[0] not in table.column_names:
            raise ValueError(f"hub:{name}: {field} is to come from {path!r}, but the columns are "
                             f"{', '.join(table.column_names)}. Set problem_args: {{fields: {{{field}: ...}}}}")
    found = Distinct(name.rpartition("/")[2])
    for number, row in enumerate(table):
        at = f"row {number}"
        try:
            found.add(_mapped(row, wanted), at)
        except ValueError as error:
            raise ValueError(f"hub:{name}, split {split!r}, {at}: {error}") from error
    return found


def _mapped(row: Mapping[str, Any], wanted: Mapping[str, str]) -> dict[str, Any]:
    """A row under the names of a file's fields; columns that no field names stay as they are."""
    used = {path.split(".")[0] for path in wanted.values()}
    raw = {column: value for column, value in row.items() if column not in used}
    return {**raw, **{field: _cell(row, path, field) for field, path in wanted.items()}}


def _cell(row: Mapping[str, Any], path: str, field: str) -> Any:
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{field}: {got(value)} where {path!r} was to be read")
        value = value[part]
    if isinstance(value, list) and value and all(isinstance(m, Mapping) and "content" in m for m in value):
        role = _ROLES.get(field, "user")
        said = [m["content"] for m in value if m.get("role") == role]
        if not said:
            raise ValueError(f"{field}: {got(value)}, expected a message of the role {role!r} in {path!r}")
        return said[-1]
    return value[0] if isinstance(value, list) and len(value) == 1 else value

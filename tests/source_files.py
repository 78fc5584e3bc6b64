"""Problem files and folders in hub layout that tests of sources write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sgpo_lib.records import Problem
from sgpo_lib.sources.catalogue import open_source, sample

STRATEGY = {"problem_type": "Sum", "strategy": "Add", "steps": ["Read", "Add"]}
LUFFY, MATH500 = "Elliott/Openr1-Math-46k-8192", "HuggingFaceH4/MATH-500"


def rows(n: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": f"p{i}", "prompt": f"What is {i} + 1?", "answer": str(i + 1), **more} for i in range(n)]


def jsonl(path: Path, written: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in written), encoding="utf-8")
    return path


def parquet(path: Path, written: list[dict[str, Any]], **options: Any) -> Path:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(arrow.Table.from_pylist(written), path, **options)
    return path


def problems(name: Path | str, seed: int = 0, **args: Any) -> list[Problem]:
    return sample(open_source(str(name), args, seed), 0, seed)


def error(name: Path | str, **args: Any) -> str:
    with pytest.raises(ValueError) as caught:
        open_source(str(name), args, 0)
    return str(caught.value)


def published(hub: Path, written: list[dict[str, Any]], name: str = "me/set", split: str = "train") -> str:
    parquet(hub / name / f"data/{split}-00000-of-00001.parquet", written)
    return f"hub:{name}"


def luffy(i: int, *, prompt: list[str] | None = None) -> dict[str, Any]:
    """A row with the fields of LUFFY's training set."""
    said = prompt or [f"What is {i} + 1?"]
    return {
        "data_source": "openr1",
        "prompt": [{"content": "Think first.", "role": "system"}, *({"content": t, "role": "user"} for t in said)],
        "target": [{"content": f"<think>\nadd\n</think>\nSo \\boxed{{{i + 1}}}.", "role": "assistant"}],
        "ability": "math", "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        "extra_info": {"index": i, "split": "default"},
    }  # fmt: skip

"""The benchmark suite at smoke size: every section runs, and JSON and table hold its numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="trl (extra `test`) is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(),
                                                   reason="peak memory is read from Linux's /proc")]

ROOT = Path(__file__).parents[1]
SECTIONS = {"token_kl": 5, "token_kl_large": 3, "token_kl_growth": 2, "grpo_step": 5, "sgpo_step": 4, "rollouts": 2}
"""Section -> lines of the table that it has at least."""
WITHOUT_OURS = "ours with vLLM", "vLLM: time"
"""Lines that smoke runs leave empty."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    done = subprocess.run([sys.executable, "benchmarks/run.py", "--smoke", "--out", str(folder)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def numbers(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from numbers(value)
    elif isinstance(tree, int | float):
        yield tree


def test_every_section_has_its_lines_with_finite_numbers(results):
    told = json.loads((results / "bench.json").read_text())
    assert told["smoke"] and told["machine"]["cores"] >= 1 and told["machine"]["torch"]
    assert told["sections"].keys() == SECTIONS.keys()
    for name, section in told["sections"].items():
        assert len(section["rows"]) >= SECTIONS[name] and "failed" not in section
        found = list(numbers(section["measured"]))
        assert len(found) > 5 and all(map(math.isfinite, found))
        for row in section["rows"]:
            if any(part in row["what"] for part in WITHOUT_OURS):
                assert row["ours"] is None and row["note"]
                continue
            assert math.isfinite(row["ours"]) and row["ours"] >= 0
            if row["peer_value"]:
                assert row["ratio"] == pytest.approx(row["ours"] / row["peer_value"])
            if row["target"] is not None:
                assert row["holds"] == (row["ratio"] <= row["target"])


def test_both_sides_of_the_token_kl_are_near_float64(results):
    """So that what is compared is the same quantity."""
    measured = json.loads((results / "bench.json").read_text())["sections"]["token_kl"]["measured"]
    for variant in ("forward KL", "training matrix"):
        errors = [side["error"] for side in measured[variant].values() if "error" in side]
        assert len(errors) == 2
        for error in errors:
            assert error["value_error"] < 1e-4 * error["mean_value"] + 1e-5 and error["gradient_error"] < 1e-4


def test_the_table_has_every_line_and_says_what_it_is(results):
    told, text = json.loads((results / "bench.json").read_text()), (results / "bench.md").read_text()
    assert "say nothing about speed" in text
    for name, section in told["sections"].items():
        assert f"## {name}\n" in text
        assert all(f"| {row['what']} |" in text for row in section["rows"])
    liger = next(line for line in text.splitlines() if line.startswith("|") and "Liger" in line)
    assert ("Liger is not installed" in liger) == (importlib.util.find_spec("liger_kernel") is None)


def test_the_table_of_the_readme_is_that_of_the_committed_results():
    told = json.loads((ROOT / "benchmarks" / "results" / "bench.json").read_text())
    assert not told["smoke"] and all("failed" not in section for section in told["sections"].values())
    measured = (ROOT / "benchmarks" / "results" / "bench.md").read_text()
    shown = (ROOT / "README.md").read_text().partition("## Speed")[2].partition("\n## ")[0]
    lines = [line for line in shown.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    assert len(lines) > 5 and all(f"\n{line}" in measured for line in lines)

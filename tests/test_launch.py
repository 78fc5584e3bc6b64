"""Headless notebooks: parameters, failures, a kernel that dies, what is skipped."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.sign import NotebookNotary
from small_notebooks import write_notebook

from sgpo_lib import jobs
from sgpo_lib.cli import main
from sgpo_lib.launch import run_notebook


@pytest.fixture(autouse=True)
def runs_here(tmp_path, monkeypatch):
    """Runs and jobs of these tests live in their own folder."""
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path / "runs"))


# --- values and parameters -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "value"), [
    ("a=false", False), ("a=3", 3), ("a=1e-4", 1e-4), ("a=-2E+3", -2000.0), ("a=1.5", 1.5), ("a=[1, 2e-1]", [1, 0.2]),
    ("a=sgpo", "sgpo"), ("a='1e-4'", "1e-4"), ("a={b: 1}", {"b": 1}), ("a=null", None), ("a=", ""), ("a=x=y", "x=y"),
    ("a=.inf", float("inf")), ("a=1e", "1e")])
def test_command_line_values(text, value):
    name, got = jobs.parse_assignment(text)
    assert name == "a" and got == value and type(got) is type(value)


def test_yaml_with_merged_settings():
    text = "a: &s {x: 1, y: 2}\nb: {<<: *s, y: 3}\nc: {<<: &t {z: 4}, x: 5}\nd: *t"
    assert jobs.read_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"z": 4, "x": 5}, "d": {"z": 4}}
    with pytest.raises(ValueError, match="'y' is there twice"):
        jobs.read_yaml("a: &s {x: 1}\nb: {<<: *s, y: 3, y: 4}")


def test_assignment_without_equals_sign():
    with pytest.raises(ValueError, match="name=value"):
        jobs.parse_assignment("steps")


def test_defaults_are_read_from_the_syntax_tree(tmp_path):
    assert jobs.notebook_parameters(write_notebook(tmp_path)) == {
        "steps": 3, "lr": 1e-3, "name": "a # b = c", "flag": True, "seed": None, "method": "sgpo", "overrides": {}}
    with pytest.raises(ValueError, match=r"'x' \(line 1.*no literal"):
        jobs.notebook_parameters(write_notebook(tmp_path, parameters="x = list(range(3))"))


def test_parameters_are_placed(tmp_path):
    path = write_notebook(tmp_path)
    placed = jobs.place_parameters(path, {"steps": 5, "lr": 1, "seed": 2, "kl_delta": 2.0, "train.weight_decay": 0.1})
    assert placed == {"steps": 5, "lr": 1.0, "seed": 2, "overrides": {"kl_delta": 2.0, "train.weight_decay": 0.1}}
    assert isinstance(placed["lr"], float)


@pytest.mark.parametrize(("given", "message"), [
    ({"stepz": 1}, "unknown parameter of trial.ipynb 'stepz'.*mean 'steps'"),
    ({"shaping_gama": 0.2}, "unknown parameter of trial.ipynb 'shaping_gama'.*mean 'shaping_gamma'"),
    ({"steps": "many"}, "'steps' of trial.ipynb: got 'many' .str., expected int"),
    ({"steps": True}, "got True .bool., expected int"), ({"steps": 2.5}, "expected int"),
    ({"flag": 1}, "expected bool"), ({"method": "sgop"}, "unknown method 'sgop'.*mean 'sgpo'"),
    ({"kl_delta": "wide"}, "method.kl_delta: got 'wide'"), ({"overrides": {"lrr": 1.0}}, "unknown field 'lrr'"),
    ({"overrides": {"train.lr_schedule": "linear"}, "lr_schedule": "cosine"}, "given twice")])
def test_wrong_parameters_stop_before_any_work(tmp_path, given, message):
    path = write_notebook(tmp_path)
    with pytest.raises(ValueError, match=message):
        run_notebook(path, given, tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_config_field_needs_an_overrides_parameter(tmp_path):
    path = write_notebook(tmp_path, parameters="steps = 3")
    with pytest.raises(ValueError, match=r"unknown parameter of trial\.ipynb 'kl_delta'"):
        jobs.place_parameters(path, {"kl_delta": 2.0})


# --- one notebook ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_run_then_skip_then_run_again(tmp_path, monkeypatch):
    wrong = tmp_path / "jupyter" / "kernels" / "python3"  # first on the search path, and broken
    wrong.mkdir(parents=True)
    (wrong / "kernel.json").write_text('{"argv": ["/no/python", "-f", "{connection_file}"], "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    path = write_notebook(tmp_path, "import os, sys\nprint('steps', steps, overrides)\nprint(sys.executable)",
                          "print(os.getcwd())\nos.environ['PLOTLY_RENDERER']")
    job = tmp_path / "job {x}"
    result = run_notebook(path, {"steps": 7, "kl_delta": 2.0}, job)
    assert (result.state, result.fresh, result.reason) == ("done", True, "")
    lines = (job / "log.txt").read_text().splitlines()
    assert lines == ["steps 7 {'kl_delta': 2.0}", sys.executable, str(tmp_path)]
    assert not list(job.glob(".notebook*")) and (job / "notebook.ipynb").exists()
    page = (job / "report.html").read_text()
    assert "<title>A trial</title>" in page and "cdnjs" not in page and 'src="http' not in page and "<svg" in page
    assert yaml.safe_load((job / "parameters.yaml").read_text())["parameters"]["steps"] == 7
    executed = nbformat.read(job / "notebook.ipynb", as_version=4)
    assert NotebookNotary().check_signature(executed), "JupyterLab shows the widgets of trusted notebooks only"
    executed.cells[-1].source += "\n1"
    assert not NotebookNotary().check_signature(executed)
    before = (job / "DONE").read_text()
    assert run_notebook(path, {"steps": 7, "kl_delta": 2.0}, job).fresh is False
    assert (job / "DONE").read_text() == before
    key = jobs.job_key(path, jobs.place_parameters(path, {"steps": 7, "kl_delta": 2.0}))
    assert jobs.up_to_date(job, key)
    assert not jobs.up_to_date(job, jobs.job_key(path, jobs.place_parameters(path, {"steps": 8, "kl_delta": 2.0})))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "DONE").write_text("{}")
    assert not jobs.up_to_date(job, {**key, "after": jobs.job_key(path, {}, [tmp_path / "other"])["after"]})
    write_notebook(tmp_path, "print('changed')")
    assert not jobs.up_to_date(job, jobs.job_key(path, {"steps": 7, "overrides": {"kl_delta": 2.0}}))


@pytest.mark.slow
def test_failing_cell_is_recorded(tmp_path):
    path = write_notebook(tmp_path, "x = 1", "raise KeyError('lost <b>')", "print('never')")
    result = run_notebook(path, {"steps": 1}, tmp_path / "job")
    record = json.loads((tmp_path / "job" / "FAILED.json").read_text())
    assert result.state == "failed" and "cell 4: KeyError: 'lost <b>'" in result.reason
    assert (record["cell"], record["error"], record["message"]) == (4, "KeyError", "'lost <b>'")
    assert "never" not in (tmp_path / "job" / "log.txt").read_text()
    assert not (tmp_path / "job" / "DONE").exists() and (tmp_path / "job" / "report.html").exists()


@pytest.mark.slow
def test_killed_kernel_is_recorded(tmp_path):
    path = write_notebook(tmp_path, "print('before', flush=True)\nimport os, time\ntime.sleep(0.3)\nos._exit(9)")
    result = run_notebook(path, {}, tmp_path / "job")
    assert result.state == "failed" and "cell 2: DeadKernelError: the kernel process ended" in result.reason
    assert "before" in (tmp_path / "job" / "log.txt").read_text()


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    path = write_notebook(tmp_path, "print('lr', lr)")
    assert main(["run", str(path), "-p", "stepz=1"]) == 2
    assert capsys.readouterr().err.startswith("sgpo: unknown parameter of trial.ipynb 'stepz'. Did you mean 'steps'?")
    assert main(["run", "no_such_notebook"]) == 2
    assert main(["run", str(path), "-p", "lr=1e-4", "--job", str(tmp_path / "job")]) == 0
    assert "job: lr 0.0001" in capsys.readouterr().out
    assert main(["status"]) == 0


def test_cli_starts_without_torch():
    code = "import sys, sgpo_lib.cli; sgpo_lib.cli.parser(); print([m for m in ('torch', 'papermill', 'plotly', " \
           "'pandas', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_relative_file_means_where_the_command_runs(tmp_path, monkeypatch):
    """A notebook runs in its own folder; `-p problems=mine.jsonl` is typed in another."""
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("{}\n")
    notebook = jobs.find_notebook("06_full_run")
    placed = jobs.place_parameters(notebook, {"problems": "mine.jsonl", "source": "some/hub-model",
                                              "data.strategies": ""})
    assert placed["overrides"] == {"problems": str(tmp_path / "mine.jsonl"), "source": "some/hub-model",
                                   "data.strategies": ""}
    sets = {"mine": {"problems": "mine.jsonl", "k": 4}, "hub": {"problems": "hub:a/b"}}
    placed = jobs.place_parameters(notebook, {"benchmarks": sets})["overrides"]["benchmarks"]
    assert placed == {"mine": {"problems": str(tmp_path / "mine.jsonl"), "k": 4}, "hub": {"problems": "hub:a/b"}}

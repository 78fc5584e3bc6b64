"""Headless notebooks: parameters, failures, a kernel that dies, what is skipped; batches: grid, order, faults."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.sign import NotebookNotary

from sgpo_lib import batch, jobs
from sgpo_lib.batch import run_batch
from sgpo_lib.batch_spec import load_batch
from sgpo_lib.cli import main
from sgpo_lib.launch import run_notebook
from sgpo_lib.recipes import from_parameters

PARAMETERS = "steps = 3\nlr = 1e-3\nname = 'a # b = c'\nflag = True\nseed = None\nmethod = 'sgpo'\noverrides = {}"


def write_notebook(folder: Path, *cells: str, name: str = "trial", parameters: str = PARAMETERS) -> Path:
    """A small notebook: a heading, the parameters cell, then code."""
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_markdown_cell("# A trial\nwith $\\alpha(q)$"),
                nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                *(nbformat.v4.new_code_cell(c) for c in cells)]
    path = folder / f"{name}.ipynb"
    nbformat.write(nb, path)
    return path


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


# --- batches ---------------------------------------------------------------------------------------------------
def write_spec(folder: Path, **spec) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump({"name": "b", **spec}, sort_keys=False))
    return path


def test_grid_smoke_and_dependencies(tmp_path):
    write_notebook(tmp_path)
    spec = write_spec(tmp_path, parallel=2, jobs={
        "full": {"notebook": "trial", "parameters": {"steps": 9},
                 "grid": {"method": ["sgpo", "grpo8"], "seed": [0, 1]}},
        "last": {"notebook": "trial.ipynb", "after": ["full"]}},
        smoke={"full": {"steps": 1, "seed": [0]}})
    plan = load_batch(spec)
    assert [j.name for j in plan.jobs] == ["full-sgpo-s0", "full-sgpo-s1", "full-grpo8-s0", "full-grpo8-s1", "last"]
    assert plan.jobs[3].parameters == {"steps": 9, "method": "grpo8", "seed": 1}
    assert plan.jobs[4].after == tuple(j.name for j in plan.jobs[:4])
    small = load_batch(spec, smoke=True)
    assert [(j.name, j.parameters.get("steps")) for j in small.jobs] == [
        ("full-sgpo-s0", 1), ("full-grpo8-s0", 1), ("last", None)]
    assert small.name == "b-smoke"


def test_smoke_leaves_out_jobs_that_it_says_false_to(tmp_path):
    write_notebook(tmp_path)
    spec = write_spec(tmp_path, jobs={
        "long": {"notebook": "trial", "grid": {"seed": [0, 1]}}, "short": {"notebook": "trial"},
        "last": {"notebook": "trial", "after": ["long", "short"]}}, smoke={"long": False})
    assert [j.name for j in load_batch(spec).jobs] == ["long-s0", "long-s1", "short", "last"]
    small = load_batch(spec, smoke=True)
    assert [(j.name, j.after) for j in small.jobs] == [("short", ()), ("last", ("short",))]


@pytest.mark.parametrize(("spec", "message"), [
    ({"jobs": {"a": {"notebook": "trial", "after": ["c"]}}}, "unknown job 'c'"),
    ({"jobs": {"a": {"notebook": "trial", "after": "b"}, "b": {"notebook": "trial", "after": "a"}}},
     "circle: a after b, b after a"),
    ({"jobs": [{"name": "a", "notebook": "trial"}, {"name": "a", "notebook": "trial"}]}, "'a' is there twice"),
    ({"jobs": {"a": {"notebook": "trail"}}}, "job 'a': unknown notebook 'trail'"),
    ({"jobs": {"a": {"notebook": "trial", "parameters": {"stepz": 1}}}}, "job 'a': unknown parameter.*mean 'steps'"),
    ({"jobs": {"a": {"notebook": "trial", "grid": {"seed": 3}}}}, "grid.seed: got 3, expected a list"),
    ({"jobs": {"a": {"notebook": "trial", "treads": 1}}}, "unknown field 'treads'. Did you mean 'threads'"),
    ({"jobs": {}}, "jobs: expected"), ({"jobs": {"a/b": {"notebook": "trial"}}}, "becomes a folder"),
    ({"jobs": {"a": {"notebook": "trial"}}, "smoke": {"z": {}}}, "unknown job under smoke 'z'")])
def test_faults_of_a_specification(tmp_path, spec, message):
    write_notebook(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        run_batch(write_spec(tmp_path, **spec))
    assert str(tmp_path / "spec.yaml") in str(error.value) and not (tmp_path / "runs").exists()


def test_name_twice_in_a_mapping(tmp_path):
    (tmp_path / "spec.yaml").write_text("jobs:\n  a: {notebook: x}\n  a: {notebook: y}\n")
    with pytest.raises(ValueError, match="line 3: 'a' is there twice"):
        load_batch(tmp_path / "spec.yaml")


@pytest.mark.slow
def test_batch_continues_after_a_failure(tmp_path):
    write_notebook(tmp_path, "import pathlib\nprint('step 1/1')\nassert pathlib.Path('fixed').exists() or steps != 13")
    spec = write_spec(tmp_path, parallel=2, jobs={
        "bad": {"notebook": "trial", "parameters": {"steps": 13}}, "good": {"notebook": "trial"},
        "needs-bad": {"notebook": "trial", "after": "bad"}, "needs-good": {"notebook": "trial", "after": "good"}})
    said: list[str] = []
    assert run_batch(spec, say=said.append) is False
    root = tmp_path / "runs" / "jobs" / "b"
    states = {j.name: (j.state, j.reason) for j in jobs.read_batch(root)}
    assert states["good"][0] == states["needs-good"][0] == "done"
    assert states["bad"][0] == "failed" and "AssertionError" in states["bad"][1]
    assert states["needs-bad"] == ("blocked", "needs bad, which did not finish")
    assert any("2/4 done" in line and "1 failed (bad), 1 blocked" in line for line in said)
    (tmp_path / "fixed").touch()
    said.clear()
    assert run_batch(spec, say=said.append) is True
    assert sum("up to date" in line for line in said) == 2 and "all 4 jobs are done, 2 of them now" in said[-1]
    said.clear()
    assert run_batch(spec, say=said.append) is True
    assert "up to date: nothing to do" in said[-1] and not any("started" in line for line in said)


@pytest.mark.slow
def test_interrupt_ends_the_jobs_and_their_kernels(tmp_path):
    write_notebook(tmp_path, "import os, pathlib, time", "pathlib.Path('pid').write_text(str(os.getpid()))",
                   "time.sleep(90)")
    spec = write_spec(tmp_path, jobs={"slow": {"notebook": "trial"}})
    process = subprocess.Popen([sys.executable, "-m", "sgpo_lib.cli", "batch", str(spec)], stderr=subprocess.PIPE)
    deadline = time.time() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert b"interrupted" in process.communicate(timeout=30)[1] and process.returncode == 130
    kernel = int((tmp_path / "pid").read_text())
    while time.time() < deadline:
        try:
            os.kill(kernel, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the kernel still runs")
    assert jobs.read_batch(tmp_path / "runs" / "jobs" / "b")[0].state == "stopped"


@pytest.mark.slow
def test_heartbeat_shows_the_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "HEARTBEAT_S", 0.3)
    write_notebook(tmp_path, "import time\nprint('step 4/6 reward 0.61')\ntime.sleep(1.5)")
    said: list[str] = []
    run_batch(write_spec(tmp_path, jobs={"a": {"notebook": "trial"}}), say=said.append)
    assert any(line.endswith("0/1 done, 1 running | a: step 4/6 reward 0.61") for line in said)


def test_the_quickstart_series_is_sound():
    """The batch file of `make run` against the notebooks there are: names, parameters, dependencies."""
    spec = Path(__file__).parent.parent / "experiments" / "quickstart.yaml"
    plan = load_batch(spec)
    assert len(plan.jobs) == len({j.name for j in plan.jobs}) == 15
    assert len(load_batch(spec, smoke=True).jobs) == 11


def test_the_paper_batch_is_sound():
    """Two jobs never write one run at the same time: those that share runs wait for each other."""
    spec = Path(__file__).parent.parent / "experiments" / "paper.yaml"
    plan = load_batch(spec)
    names = {j.name: j for j in plan.jobs}
    assert len(load_batch(spec, smoke=True).jobs) == 10
    made: dict[str, list[str]] = {}
    for job in plan.jobs:
        placed = jobs.place_parameters(job.notebook, job.parameters)
        if job.notebook.stem != "06_full_run":
            continue
        given = {k: v for k, v in placed.items() if k in ("profile", "method", "steps")}
        for seed in placed["seeds"]:
            config = from_parameters(**{"profile": "tiny", "steps": 40, **given, **placed["overrides"]}, seed=seed)
            made.setdefault(config.label, []).append(job.name)
    assert len(made) > 200
    for sharing in made.values():
        for a, b in itertools.combinations(sharing, 2):
            assert a in names[b].after or b in names[a].after, f"{a} and {b} write the same run"


def test_a_relative_file_means_where_the_command_runs(tmp_path, monkeypatch):
    """A notebook runs in its own folder; `-p problems=mine.jsonl` is typed in another."""
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("{}\n")
    notebook = jobs.find_notebook("06_full_run")
    placed = jobs.place_parameters(notebook, {"problems": "mine.jsonl", "source": "some/hub-model",
                                              "data.strategies": ""})
    assert placed["overrides"] == {"problems": str(tmp_path / "mine.jsonl"), "source": "some/hub-model",
                                   "data.strategies": ""}

"""Batches: grid, order, faults, what is tried again, what goes on, GPUs handed out, setup lines."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from small_notebooks import write_notebook

from sgpo_lib import batch, jobs
from sgpo_lib.batch import run_batch
from sgpo_lib.batch_spec import load_batch
from sgpo_lib.executors.attempts import goes_nowhere, read_attempts
from sgpo_lib.executors.local import visible_gpus
from sgpo_lib.recipes import from_parameters
from sgpo_lib.resources import read_resources


@pytest.fixture(autouse=True)
def runs_here(tmp_path, monkeypatch):
    """Runs and jobs of these tests live in their own folder."""
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path / "runs"))


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


def test_the_cluster_example_is_sound():
    """The warm-up that its methods start from is the run that its first job makes."""
    plan = load_batch(Path(__file__).parent.parent / "experiments" / "cluster_example.yaml")
    assert plan.engine == "slurm" and len(plan.jobs) == 7 and plan.jobs[-1].resources.gpus == 0
    assert all(j.resources.account == "my-project" and j.resources.time for j in plan.jobs)
    warmup, full = plan.jobs[0], plan.jobs[2]
    made = from_parameters(**warmup.parameters)
    shared = {k: v for k, v in full.parameters.items() if k not in ("method", "seed", "steps", "warmup_steps")}
    wanted = from_parameters(method="sft", seed=0, steps=full.parameters["warmup_steps"], **shared)
    assert wanted.rollout.sampler == "vllm" and wanted.evaluation.benchmarks["aime24"]["k"] == 32
    assert made.label == wanted.label and set(full.after) == {"warmup-s0", "warmup-s1"}


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


# --- resources, defaults, engines --------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "field", "value"), [
    ("time: 12:00:00", "time", 43200), ("time: '1-00:00:10'", "time", 86410), ("time: 90", "time", 5400),
    ("time: 05:30", "time", 330), ("memory: 64G", "memory", 65536), ("memory: 1.5T", "memory", 1572864),
    ("memory: 512MB", "memory", 512), ("gpus: 0", "gpus", 0)])
def test_units_of_resources(text, field, value):
    found, faults = read_resources(jobs.read_yaml(text))
    assert (getattr(found, field), faults) == (value, [])


@pytest.mark.parametrize(("given", "message"), [
    ({"gpu": 1}, "unknown field 'gpu'. Did you mean 'gpus'"), ({"gpus": -1}, "gpus: got -1, expected a whole"),
    ({"nodes": 0}, "1 or more"), ({"cpus": True}, "expected a whole"), ({"memory": 64}, "M, G or T, such as 64G"),
    ({"memory": "0G"}, "such as 64G"), ({"time": "soon"}, "such as 12:00:00"), ({"time": "1-12"}, "such as 12:00:00"),
    ({"partition": ["a"]}, "expected a name"), ({"extra": {"mem": "1G"}}, "none of mem: the other fields set these"),
    ({"extra": {"Constraint": "a"}}, "long options of sbatch")])
def test_faults_of_resources(given, message):
    _, faults = read_resources(given)
    assert len(faults) == 1 and message in faults[0]


def test_all_faults_are_told_at_once(tmp_path):
    write_notebook(tmp_path)
    spec = write_spec(tmp_path, engine="slrum", parallel=0, jobs={
        "a": {"notebook": "trial", "retries": -1, "grace": 0, "setup": [3], "resources": {"time": "x", "gpus": "all"}},
        "b": {"notebook": "trial", "parameters": {"stepz": 1}}, "c": {"notebok": "trial", "container": "it's"}})
    with pytest.raises(ValueError) as error:
        load_batch(spec)
    for told in ("engine: unknown engine 'slrum'. Did you mean 'slurm'", "parallel: got 0", "job 'a': retries: got -1",
                 "job 'a': grace: got 0", "job 'a': setup: got [3]", "job 'a': resources.time: got 'x'",
                 "job 'a': resources.gpus: got 'all'", "job 'b': unknown parameter", "job 'c': unknown field 'notebok'",
                 "job 'c': notebook: missing", "job 'c': container: got"):
        assert told in str(error.value)


def test_defaults_are_replaced_field_by_field(tmp_path):
    write_notebook(tmp_path)
    spec = write_spec(tmp_path, engine="slurm", defaults={
        "resources": {"gpus": 8, "time": "1:00:00"}, "setup": ["module load cuda"], "env": {"A": 1, "B": 2},
        "retries": 1},
        jobs={"a": {"notebook": "trial", "resources": {"gpus": 1, "cpus": 6}, "env": {"B": 3}},
              "b": {"notebook": "trial", "setup": "true", "retries": 0, "threads": 2}})
    plan = load_batch(spec)
    a, b = plan.jobs
    assert (a.resources.gpus, a.resources.time, a.env, a.setup, a.retries, a.threads) == (
        1, 3600, {"A": "1", "B": "3"}, ("module load cuda",), 1, 6)
    assert (b.resources.gpus, b.setup, b.retries, b.threads, b.grace) == (8, ("true",), 0, 2, 120)
    assert plan.engine == "slurm" and plan.parallel > 1000 and load_batch(spec, engine="local").parallel < 1000


def test_this_machine_has_less(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    write_notebook(tmp_path)
    spec = write_spec(tmp_path, jobs={
        "a": {"notebook": "trial", "resources": {"gpus": 3, "cpus": 10**4, "memory": "900T", "nodes": 2}},
        "b": {"notebook": "trial", "python": "/no/python"}})
    with pytest.raises(ValueError) as error:
        run_batch(spec)
    for told in ("job 'a': resources.gpus: got 3, this machine has 2", "job 'a': resources.cpus: got 10000",
                 "job 'a': resources.memory: got 943718400 MiB", "job 'a': resources.nodes: got 2, this machine has 1",
                 "job 'b': python: got '/no/python'"):
        assert told in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("told", "names"), [("0,1", ["0", "1"]), ("", []), ("-1", []), ("GPU-3f", ["GPU-3f"])])
def test_visible_gpus(monkeypatch, told, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert visible_gpus() == names


def test_the_plan_tells_what_each_job_asks_for(tmp_path):
    write_notebook(tmp_path)
    spec = write_spec(tmp_path, parallel=2, jobs={
        "a": {"notebook": "trial", "resources": {"cpus": 1, "time": 3, "memory": "1G"}},
        "b": {"notebook": "trial", "after": "a"}})
    said: list[str] = []
    assert run_batch(spec, dry_run=True, say=said.append)
    assert said[0].startswith("a: trial.ipynb") and said[1].strip() == "1 CPUs, 1024 MiB, 180 s"
    assert said[2].endswith("after a")
    assert "2 jobs on local, 2 at a time, 0 up to date" in said[-1] and not (tmp_path / "runs").exists()


# --- attempts ----------------------------------------------------------------------------------------------------
def write_attempts(folder: Path, *given: tuple[str, int]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "attempts.json").write_text(json.dumps([
        {"started": "s", "ended": "e", "host": "", "where": "", "how": how, "reason": "", "progress": far}
        for how, far in given]))


@pytest.mark.parametrize(("attempts", "expected"), [
    ([("stopped", 0)], False), ([("stopped", 0), ("stopped", 0)], True), ([("stopped", 4), ("stopped", 4)], False),
    ([("stopped", 4), ("stopped", 4), ("stopped", 4)], True), ([("stopped", 4), ("failed", 0), ("stopped", 4)], False),
    ([("stopped", 4), ("stopped", 2), ("stopped", 3)], True),
    ([("stopped", 4), ("stopped", 0), ("stopped", 5)], False)])
def test_two_stops_without_progress_end_it(tmp_path, attempts, expected):
    write_attempts(tmp_path / "job", *attempts)
    assert goes_nowhere(tmp_path / "job") is expected


@pytest.mark.slow
def test_setup_lines_gpus_and_environment_reach_the_notebook(tmp_path, monkeypatch):
    """Three jobs of one GPU each on two: each has one of its own, the third waits for one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    write_notebook(tmp_path, "import os, time\nprint(os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('SET_UP'), "
                             "os.environ.get('MINE'), os.environ['OMP_NUM_THREADS'])\ntime.sleep(2)")
    (tmp_path / "setup.sh").write_text("export SET_UP=sourced")
    job = {"notebook": "trial", "resources": {"gpus": 1, "cpus": 1}, "setup": [f"source '{tmp_path}/setup.sh'"],
           "env": {"MINE": "a b"}}
    spec = write_spec(tmp_path, parallel=3, jobs={
        "one": job, "two": job, "three": job, "none": {"notebook": "trial", "resources": {"gpus": 0}},
        "broken": {"notebook": "trial", "setup": ["echo no such module; false", "true"]}})
    said: list[str] = []
    assert run_batch(spec, say=said.append) is False
    root = tmp_path / "runs" / "jobs" / "b"
    logs = {n: (root / n / "log.txt").read_text().strip() for n in ("one", "two", "three", "none")}
    assert sorted((logs["one"], logs["two"])) == ["5 sourced a b 1", "7 sourced a b 1"]
    assert logs["three"] in (logs["one"], logs["two"]) and logs["none"].split()[:2] == ["None", "None"]
    assert "code 1: no such module" in jobs.read_job(root / "broken").reason
    started = [line.split("| ")[1] for line in said if "started" in line]
    assert {"one: started on GPU 5", "two: started on GPU 7"} <= set(started)


@pytest.mark.slow
def test_failed_jobs_are_tried_again_and_no_more_than_that(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "AGAIN_S", 0.2)
    write_notebook(tmp_path, "import pathlib, os\nn = len(list(pathlib.Path().glob(f'{name}-*')))\n"
                             "pathlib.Path(f'{name}-{n}').touch()\nassert n >= steps")
    spec = write_spec(tmp_path, parallel=2, jobs={
        "second": {"notebook": "trial", "parameters": {"steps": 1, "name": "x"}, "retries": 2},
        "never": {"notebook": "trial", "parameters": {"steps": 9, "name": "y"}, "retries": 1}})
    said: list[str] = []
    assert run_batch(spec, say=said.append) is False
    root = tmp_path / "runs" / "jobs" / "b"
    assert [a["how"] for a in read_attempts(root / "second")] == ["failed", "done"]
    assert [a["how"] for a in read_attempts(root / "never")] == ["failed", "failed"]
    assert "AssertionError" in read_attempts(root / "never")[0]["reason"]
    assert any("never: FAILED" in line and "tried again (1 of 1)" in line for line in said)
    assert jobs.read_job(root / "second").attempt == 2


@pytest.mark.slow
def test_a_stopped_job_goes_on_and_a_killed_one_is_tried_again(tmp_path, monkeypatch):
    """SIGUSR1 to one `sgpo run`: it stops, and the batch starts it again; kill -9 counts as a failure."""
    monkeypatch.setattr(batch, "AGAIN_S", 1.5)
    write_notebook(tmp_path, "import pathlib, time\nfirst = not pathlib.Path(name).exists()",
                   "pathlib.Path(name).touch()\nwhile first:\n    time.sleep(0.1)")
    spec = write_spec(tmp_path, parallel=2, jobs={
        "stopped": {"notebook": "trial", "parameters": {"name": "x"}, "grace": 1},
        "killed": {"notebook": "trial", "parameters": {"name": "y"}, "retries": 1}})
    root, sent = tmp_path / "runs" / "jobs" / "b", {"stopped": ("x", signal.SIGUSR1), "killed": ("y", signal.SIGKILL)}
    heard: list[str] = []
    done = threading.Event()

    def send() -> None:
        while sent and not done.wait(0.2):
            for name, (mark, number) in list(sent.items()):
                if (tmp_path / mark).exists():
                    os.kill(int((root / name / ".owner").read_text().split()[1]), number)
                    del sent[name]

    thread = threading.Thread(target=send)
    thread.start()
    try:
        assert run_batch(spec, say=heard.append) is True
    finally:
        done.set()
        thread.join()
    assert [a["how"] for a in read_attempts(root / "stopped")] == ["stopped", "done"]
    assert [a["how"] for a in read_attempts(root / "killed")] == ["failed", "done"]
    assert "SIGKILL (out of memory, or from outside)" in read_attempts(root / "killed")[0]["reason"]
    assert any("stopped: stopped (asked to stop), goes on" in line for line in heard)


@pytest.mark.slow
def test_the_time_limit_of_a_job(tmp_path):
    write_notebook(tmp_path, "import time\ntime.sleep(100)")
    spec = write_spec(tmp_path, jobs={"long": {"notebook": "trial", "resources": {"time": "00:05"}}})
    start = time.time()
    assert run_batch(spec) is False and time.time() - start < 60
    assert "limit" in jobs.read_job(tmp_path / "runs" / "jobs" / "b" / "long").reason

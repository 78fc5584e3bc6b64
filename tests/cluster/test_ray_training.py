"""Training on several workers with a real Ray: notebook 06, killed workers, stops, bad input, a cluster that dies."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from parallel_world import assert_same_metrics
from servers import free_port
from worlds import RayWorld, root_of_runs, wait_for

from sgpo_lib import distributed, ray_driver
from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import Run, load_run
from sgpo_lib.trainer import train

TINY = {"steps": 8, "problems_per_step": 4, "mini_batch": 2, "micro_batch": 16, "n_train": 80, "n_validation": 6,
        "n_test": 5, "eval_every": 4, "test_k": 1, "max_new_tokens": 24, "save_every": 3, "keep_checkpoints": 9}


@pytest.fixture
def root(ray_cluster: RayWorld, runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runs root of its own, with the cluster at RAY_ADDRESS."""
    made = root_of_runs(tmp_path, runs_folder)
    monkeypatch.setenv("SGPO_RUNS", str(made))
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    return made


def notebook(job: Path, **parameters: Any) -> subprocess.Popen[str]:
    """`sgpo run 06_full_run` as a process."""
    given = [a for name, value in parameters.items() for a in ("-p", f"{name}={json.dumps(value)}")]
    return subprocess.Popen([sys.executable, "-m", "sgpo_lib.cli", "run", "06_full_run", "--job", str(job), *given],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def only_run(root: Path) -> Run:
    (folder,) = [path.parent for path in root.glob("*/config.yaml")]
    return load_run(folder)


def wait_for_step(root: Path, step: int) -> Run:
    def there() -> bool:
        return any(row["step"] >= step for path in root.glob("*/config.yaml")
                   for row in load_run(path.parent).metrics("train"))

    wait_for(there, f"step {step}", 180)
    return only_run(root)


def started(run: Run) -> list[psutil.Process]:
    """The run's workers that still exist."""
    told = json.loads((run.folder / "workers.json").read_text())
    return [psutil.Process(worker["process"]) for worker in told if psutil.pid_exists(worker["process"])]


def test_notebook_06_goes_on_after_a_killed_worker(root, tmp_path):
    """All weights, sharded; any worker after any step. The end is that of an undisturbed run of one worker."""
    job, fields = tmp_path / "job", {n: v for n, v in TINY.items() if n != "steps"}
    process = notebook(job, profile="tiny", engine="ray", workers=2, steps=TINY["steps"], overrides=fields)
    run = wait_for_step(root, random.Random().randint(1, 6))
    random.Random().choice(started(run)).kill()
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    log = (job / "log.txt").read_text()
    assert "2 workers, from step 0" in log and "a worker was lost" in log and "again from step" in log
    run = only_run(root)
    assert run.done and run.summary["workers"] == 2 and (run.checkpoints()[-1] / "sharded").is_dir()
    alone = train(from_parameters("tiny", "sgpo", 0, **TINY), root=root / "alone")
    assert_same_metrics(alone, run)
    assert "accuracy" in (job / "report.html").read_text()


def test_a_worker_that_dies_once_too_often_fails_and_one_worker_goes_on(root, monkeypatch):
    """No restart is allowed; then the sharded checkpoint is taken up by a process alone. Ray finds its cluster."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    fields = TINY | {"save_every": 1, "eval_every": 0}
    config = from_parameters("tiny", "grpo8", 0, **fields, engine="ray", workers=2, worker_restarts=0)

    def kill() -> None:
        run = wait_for_step(root, 2)
        psutil.Process(json.loads((run.folder / "workers.json").read_text())[1]["process"]).kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(RuntimeError, match=r"a worker was lost 1 times in a row \(compute.worker_restarts = 0\)"):
        train(config)
    thread.join()
    run = load_run(root / config.label)
    assert run.state == "failed"
    assert "The last checkpoint is whole" in json.loads((run.folder / "FAILED.json").read_text())["message"]
    before = run.checkpoints()[-1]
    assert (before / "sharded").is_dir() and not (run.folder / "DONE").exists()
    one = from_parameters("tiny", "grpo8", 0, **fields)
    assert one.label == config.label
    done = train(one)
    assert done.done and done.summary["workers"] == 1
    assert_same_metrics(train(one, root=root / "alone"), done)


def test_a_mistake_of_the_program_is_told_from_a_lost_worker():
    """By what Ray Train raises; the first line of a partner's broken connection is no error of the program."""
    import ray
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    mistake = UserExceptionWithTraceback(RuntimeError("step 1: sampler and trainer differ"), "Traceback ...")
    echo = UserExceptionWithTraceback(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), "Traceback ...")
    sampler = UserExceptionWithTraceback(ray.exceptions.RayTaskError("sample", "Traceback ...", ValueError("x")), "...")
    death = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError())
    for failures, own, lost in (({1: mistake}, "step 1", None), ({0: sampler}, "", None),
                                ({0: echo, 1: mistake}, "step 1", None),
                                ({0: echo, 1: death}, None, "died"), ({0: echo}, None, "Connection closed")):
        error = WorkerGroupError("told", failures)
        reason = ray_driver._reason_of_loss(error)
        assert (lost is None and reason is None) or lost in reason
        assert own is None or str(ray_driver._own(error)).startswith(own)


def test_ctrl_c_and_a_stop_of_the_job_become_a_stop_of_the_run(tmp_path, monkeypatch):
    """A second Ctrl-C is raised at once."""
    run, job = Run(tmp_path, from_parameters("tiny", "grpo8", 0)), tmp_path / "job"
    job.mkdir()
    (job / "STOP").touch()
    with monkeypatch.context() as patch, subprocess.Popen(["sleep", "1"], text=True) as driver:
        patch.setenv("SGPO_JOB", str(job))
        assert distributed._follow(driver, run, distributed._Follower(run, None), tmp_path / "none") is False
    assert (tmp_path / "STOP").read_text() == "job\n"
    driver = subprocess.Popen(["sleep", "60"], text=True)
    presses = iter([0.5, 1.0])
    timers = [threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)) for after in presses]
    for timer in timers:
        timer.start()
    with pytest.raises(KeyboardInterrupt):
        distributed._follow(driver, run, distributed._Follower(run, None), tmp_path / "none")
    assert (tmp_path / "STOP").read_text() == "interrupt\n"
    driver.kill()
    driver.wait()


def test_more_workers_than_devices_are_refused_before_work(root):
    for fields, told in (({"workers": 4, "mini_batch": 0}, r"compute.workers: got 4, expected at most 2: the Ray "
                          r"cluster at \S+ has 2 CPUs, a worker takes 1 of one node \(compute.worker_cpus\)"),
                         ({"workers": 2, "worker_cpus": 2}, "got 2, expected at most 1: .*a worker takes 2"),
                         ({"workers": 2, "device": "cuda"}, "got 2, expected at most 0: .*has 0 GPUs")):
        config = from_parameters("tiny", "grpo8", 0, **TINY | fields | {"engine": "ray"})
        with pytest.raises(ValueError, match=told):
            train(config)
        assert not load_run(root / config.label).metrics()


def test_workers_fit_on_nodes_and_not_on_their_sum():
    """Three nodes of 3 CPUs have 9, and room for three workers of 2; vLLM's own GPUs may be on any node."""
    fields = {"engine": "ray", "problems_per_step": 12, "mini_batch": 0, "worker_cpus": 2}
    nodes = [{"CPU": 3.0, "GPU": 1.0}] * 3
    ray_driver._require_devices(from_parameters("tiny", "grpo8", 0, workers=3, **fields), nodes, False, "there:1")
    with pytest.raises(ValueError, match="got 4, expected at most 3: the Ray cluster at there:1 has 9 CPUs on 3 nodes, "
                                         "a worker takes 2 of one node"):
        ray_driver._require_devices(from_parameters("tiny", "grpo8", 0, workers=4, **fields), nodes, False, "there:1")
    own = from_parameters("tiny", "grpo8", 0, workers=2, **fields, sampler="vllm", placement="own")
    with pytest.raises(ValueError, match=r"got 2, expected at most 1: .*3 GPUs on 3 nodes, a worker takes 1 and its "
                                         r"vLLM another one"):
        ray_driver._require_devices(own, nodes, True, "there:1")


def test_devices_that_others_hold_are_waited_for_and_a_stop_ends_the_wait(root, ray_cluster, tmp_path, monkeypatch,
                                                                          capsys):
    import ray

    class Holder:
        pass

    run = Run(tmp_path, from_parameters("tiny", "grpo8", 0, **TINY | {"engine": "ray", "workers": 2}))
    monkeypatch.setattr(ray_driver, "_SETTLED_S", 0.0)
    ray.init(address=ray_cluster.address, log_to_driver=False)
    try:
        holder = ray.remote(num_cpus=1)(Holder).remote()
        ray.get(holder.__ray_ready__.remote())
        threading.Timer(2, (tmp_path / "STOP").touch).start()
        assert ray_driver._free(ray, run.config, run, False) is False
        assert capsys.readouterr().out == f"{tmp_path.name}: waiting for 2 CPUs (1 free)\n"
        (tmp_path / "STOP").unlink()
        threading.Timer(2, ray.kill, (holder,)).start()
        assert ray_driver._free(ray, run.config, run, False) is True
    finally:
        ray.shutdown()


def test_no_cluster_and_no_ray_are_told(root, monkeypatch):
    config = from_parameters("tiny", "grpo8", 0, **TINY | {"engine": "ray", "workers": 2})
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"no Ray cluster at 127.0.0.1:\d+ \(RAY_ADDR"):
        patch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
        train(config)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"got ray://node7:10001, the port of Ray's"):
        patch.setenv("RAY_ADDRESS", "ray://node7:10001")
        train(config)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"needs Ray Train, and ray is not .*\[ray\]"):
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        train(config)


def test_a_cluster_that_goes_away_leaves_the_last_checkpoint(root, ray_cluster, tmp_path):
    """The last test of this file: it ends the cluster."""
    job = tmp_path / "job"
    fields = {"profile": "tiny", "method": "grpo8", "engine": "ray", "workers": 2, "steps": 200,
              "overrides": {n: v for n, v in (TINY | {"eval_every": 0, "save_every": 1}).items() if n != "steps"}}
    process = notebook(job, **fields)
    run = wait_for_step(root, 2)
    ray_cluster.kill()
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 1, out
    failed = json.loads((job / "FAILED.json").read_text())
    assert "does not answer any more" in failed["message"] and run.state == "failed"
    assert run.checkpoints() and (run.checkpoints()[-1] / "state.json").exists()

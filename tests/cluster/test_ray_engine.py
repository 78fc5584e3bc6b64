"""Batches on a real Ray cluster: killed processes, a driver that leaves, bad input, a cluster that dies."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from servers import free_port
from worlds import Batch, RayWorld, assert_same_run, root_of_runs, wait_for, write_notebook

from sgpo_lib.batch import make_executor


@pytest.fixture
def batch_of(ray_cluster: RayWorld, runs_folder: Path, tmp_path: Path):
    """A function that makes a batch for the Ray cluster with a runs root of its own."""
    def make(jobs, name="b", **defaults) -> Batch:
        root = root_of_runs(tmp_path, runs_folder)
        return Batch(tmp_path, root, jobs, name=name, engine="ray", env={"RAY_ADDRESS": ray_cluster.address},
                     **({"grace": 20} | defaults))
    return make


def test_a_sweep_goes_on_after_a_killed_job_a_killed_worker_and_a_driver_that_left(batch_of, undisturbed):
    batch = batch_of(Batch.sweep(), retries=1)
    driver = batch.start()
    batch.wait_for_step("sgpo", 0, 3)
    for process in [*batch.process("full-sgpo-s0").children(recursive=True), batch.process("full-sgpo-s0")]:
        process.kill()
    batch.wait_for(lambda: batch.attempts("full-sgpo-s0")[0]["ended"], "the end of the attempt")
    assert batch.end(driver, signal.SIGTERM) == 130 and "left on Ray" in batch.said
    driver = batch.start()
    batch.wait_for_step("sft_grpo", 1, 3)
    batch.process("full-sft_grpo-s1").parent().kill()  # the actor, as if its node had gone
    assert batch.end(driver) == 0 and "all 6 jobs are done" in batch.said
    assert "full-sft_grpo-s1: stopped (lost on Ray" in batch.said
    killed, lost = batch.attempts("full-sgpo-s0"), batch.attempts("full-sft_grpo-s1")
    assert [a["how"] for a in killed] == ["failed", "done"] and "SIGKILL" in killed[0]["reason"]
    assert [a["how"] for a in lost] == ["stopped", "done"]
    assert [len(batch.attempts(n)) for n in ("base", "full-sgpo-s1", "full-sft_grpo-s0", "compare")] == [1, 1, 1, 1]
    other = Batch(undisturbed, undisturbed, {"only": Batch.full("sgpo", 0)}, name="only")
    assert_same_run(batch.run_of("sgpo", 0), other.run_of("sgpo", 0))
    assert batch.compared() == {"sgpo": 2, "sft_grpo": 2}
    assert batch.run() == 0 and "up to date: nothing to do" in batch.said


def test_a_job_waits_for_room_and_is_cancelled(batch_of, tmp_path):
    write_notebook(tmp_path, "sleeps", "import time\ntime.sleep(300)")
    batch = batch_of({name: {"notebook": "sleeps"} for name in ("one", "other")}, grace=1, resources={"cpus": 2})
    driver = batch.start()
    name = batch.wait_for(lambda: [n for n in ("one", "other") if (batch.job(n) / ".owner").exists()], "a job")[0]
    process, waits = batch.process(name), "other" if name == "one" else "one"
    batch.wait_for(lambda: "PENDING (waits for CPUs" in batch.status().get(waits, ""), "the job that waits")
    assert batch.end(driver, signal.SIGTERM) == 130
    assert batch.run("--cancel") == 0 and "cancelled one, other" in batch.said
    wait_for(lambda: not process.is_running(), "the end of the job", 30)
    assert batch.status()[name].split()[0] == "stopped" and batch.status()[waits].split()[0] == "waiting"


def test_what_the_cluster_cannot_give_is_refused_at_once(batch_of, tmp_path):
    write_notebook(tmp_path, "good", "pass")
    batch = batch_of({"a": {"notebook": "good", "resources": {"gpus": 8}},
                      "b": {"notebook": "good", "resources": {"cpus": 3, "nodes": 2}}})
    assert batch.run() == 2
    for told in ("job 'a': resources.gpus: got 8, the largest node of the Ray cluster has 0",
                 "job 'b': resources.cpus: got 3, the largest node of the Ray cluster has 2",
                 "job 'b': resources.nodes: got 2, expected 1"):
        assert told in batch.said
    assert not (batch.root / "jobs").exists()


def test_no_cluster_at_the_address():
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"no Ray cluster at 127\.0\.0\.1:\d+\. Start one with `ray start --head`"):
        make_executor("ray", f"127.0.0.1:{free_port()}")


def test_a_cluster_that_goes_away_is_told(batch_of, ray_cluster, tmp_path):
    """The last test of this file: it ends the cluster."""
    write_notebook(tmp_path, "sleeps", "import time\ntime.sleep(300)")
    batch = batch_of({"runs": {"notebook": "sleeps", "retries": 3}, "after": {"notebook": "sleeps", "after": "runs"}})
    driver = batch.start()
    process = batch.wait_for_job("runs")
    ray_cluster.kill()
    assert batch.end(driver) == 1
    assert "does not answer any more" in batch.failure("runs")
    status = batch.status()
    assert status["runs"].split()[0] == "failed" and status["after"].split()[0] == "blocked"
    assert "does not answer any more" in status["after"]
    wait_for(lambda: not process.is_running(), "the end of what ran there", 60)
    assert batch.run() == 2 and "no Ray cluster at" in batch.said


def test_without_the_packages(monkeypatch):
    for engine, package in (("ray", "ray"), ("slurm", "submitit")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=rf"package {package} is not installed\. Cure: pip install 'sgpo-work"):
            make_executor(engine)

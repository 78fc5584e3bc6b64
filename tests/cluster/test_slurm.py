"""Batches on a real Slurm: a sweep that is broken off and continued, what goes wrong, two nodes, bad input."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import Batch, SlurmWorld, assert_same_run, root_of_runs, wait_for, write_notebook

from sgpo_lib.batch import make_executor
from sgpo_lib.executors.slurm import read_nodes

FULL = ("full-sgpo-s0", "full-sgpo-s1", "full-sft_grpo-s0", "full-sft_grpo-s1")


@pytest.fixture
def batch_of(slurm: SlurmWorld, runs_folder: Path, tmp_path: Path):
    """A function that makes a batch for Slurm with a runs root of its own."""
    def make(jobs, name="b", **defaults) -> Batch:
        defaults = {"grace": 20, "resources": {"cpus": 1, "time": 30}} | defaults
        root = root_of_runs(tmp_path, runs_folder)
        return Batch(tmp_path, root, jobs, name=name, engine="slurm", env=slurm.env, **defaults)
    return make


def test_a_sweep_is_stopped_queued_again_left_and_taken_up(slurm, batch_of, undisturbed):
    batch = batch_of(Batch.sweep(), retries=1)
    driver = batch.start()
    batch.wait_for_step("sgpo", 0, 1)
    assert batch.status()["full-sgpo-s0"].split()[0] == "running" and batch.status()["compare"].split()[0] == "waiting"
    number = slurm.id_of(batch, "full-sgpo-s0")
    slurm.ask("scancel", "--batch", "--signal=USR1", number)  # as before the time limit: to the batch script alone
    batch.wait_for(lambda: batch.attempts("full-sgpo-s0")[0]["ended"], "the end of the attempt")
    assert batch.end(driver, signal.SIGTERM) == 130
    assert "left on Slurm" in batch.said and f"full-sgpo-s0 ({number})" in batch.said
    stopped = batch.attempts("full-sgpo-s0")[0]
    assert (stopped["how"], stopped["where"]) == ("stopped", f"slurm {number}") and 1 <= stopped["progress"] < 6
    driver = batch.start()
    batch.wait_for_step("sft_grpo", 1, 2)
    for process in [*batch.process(FULL[-1]).children(recursive=True), batch.process(FULL[-1])]:
        process.kill()
    assert batch.end(driver) == 0
    assert "full-sgpo-s0: still there" in batch.said and "all 6 jobs are done" in batch.said
    assert [len(batch.attempts(name)) for name in ("base", *FULL, "compare")] == [1, 2, 1, 1, 2, 1]
    killed = batch.attempts(FULL[-1])
    assert [a["how"] for a in killed] == ["failed", "done"] and "SIGKILL" in killed[0]["reason"]
    assert len({batch.attempts(name)[0]["where"] for name in FULL}) == 4
    assert batch.attempts("full-sgpo-s0")[1]["where"] == f"slurm {number}", "queued again under its own id"
    assert "done (attempt 2)" in batch.status()["full-sgpo-s0"]
    assert not list(batch.root.glob("jobs/b/*/queue.json"))
    other = Batch(undisturbed, undisturbed, {"only": Batch.full("sgpo", 0)}, name="only")
    assert_same_run(batch.run_of("sgpo", 0), other.run_of("sgpo", 0))
    assert batch.compared() == {"sgpo": 2, "sft_grpo": 2}
    assert batch.run() == 0 and "up to date: nothing to do" in batch.said and "started" not in batch.said


def test_what_slurm_and_the_jobs_do_wrong_is_told(slurm, batch_of, tmp_path):
    """A setup line that fails, a job that is cancelled, one that never gets anywhere; one that needs setup goes on."""
    write_notebook(tmp_path, "sleeps", "import time\ntime.sleep(300)")
    write_notebook(tmp_path, "good", "import os\nprint(os.environ['FROM_SETUP'], os.environ['OMP_NUM_THREADS'])")
    batch = batch_of({
        "setup": {"notebook": "good", "setup": ["echo no module called cuda", "false"]},
        "cancelled": {"notebook": "sleeps", "retries": 3}, "after": {"notebook": "good", "after": "cancelled"},
        "limit": {"notebook": "sleeps", "grace": 1, "resources": {"time": 2}},
        "good": {"notebook": "good", "setup": "export FROM_SETUP=seen", "resources": {"cpus": 2}}})
    driver = batch.start()
    batch.wait_for(lambda: batch.attempts("cancelled"), "a job to cancel")
    slurm.ask("scancel", slurm.id_of(batch, "cancelled"))
    # Slurm looks every half minute which jobs near their limit; the second warning comes from here
    wait_for(lambda: len(batch.attempts("limit")) == 2, "Slurm's own warning and the second attempt", 240)
    time.sleep(5)
    slurm.ask("scancel", "--batch", "--signal=USR1", slurm.id_of(batch, "limit"))
    assert batch.end(driver) == 1
    assert (batch.job("good") / "log.txt").read_text().split() == ["seen", "2"]
    assert batch.failure("setup").startswith("FAILED: Slurm job")
    assert "exit code 1. no module called cuda" in batch.failure("setup")
    assert batch.failure("cancelled").startswith("CANCELLED: Slurm job")
    assert len(batch.attempts("cancelled")) == 1, "what a person cancels is not tried again"
    assert batch.failure("limit").startswith("NoProgress: stopped twice in a row")
    assert [a["how"] for a in batch.attempts("limit")] == ["stopped", "failed"]
    status = batch.status()
    assert status["after"].split()[0] == "blocked" and "NoProgress" in status["limit"]


def test_cancel_ends_what_an_interrupted_call_left(slurm, batch_of, tmp_path):
    write_notebook(tmp_path, "sleeps", "import time\ntime.sleep(300)")
    batch = batch_of({"long": {"notebook": "sleeps", "grace": 1}})
    driver = batch.start()
    process = batch.wait_for_job("long")
    assert batch.end(driver, signal.SIGTERM) == 130
    number = slurm.id_of(batch, "long")
    assert slurm.ask("squeue", "-h", "-o", "%i") .split() == [number]
    assert batch.run("--cancel") == 0 and "cancelled long" in batch.said
    assert slurm.ask("squeue", "-h", "-o", "%i").split() == [] and not process.is_running()
    assert batch.status()["long"].split()[0] == "stopped"
    assert batch.run("--cancel") == 0 and "no job of it is on a cluster" in batch.said


def test_two_nodes_are_one_ray_cluster(slurm, batch_of, tmp_path):
    pytest.importorskip("ray")
    write_notebook(tmp_path, "nodes", """import os, ray
ray.init(log_to_driver=False, logging_level="ERROR")
@ray.remote(num_cpus=2)
def where():
    return os.environ["SLURMD_NODENAME"]
both = [where.options(label_selector={"ray.io/node-id": n["NodeID"]}).remote() for n in ray.nodes()]
print(sorted(ray.get(both)))""")
    batch = batch_of({"nodes": {"notebook": "nodes", "resources": {"nodes": 2, "cpus": 2}}})
    assert batch.run() == 0
    assert (batch.job("nodes") / "log.txt").read_text().strip() == "['n1', 'n2']"
    wait_for(lambda: not slurm.ask("squeue", "-h"), "the end of the allocation", 60)


def test_what_the_cluster_cannot_give_is_refused_at_once(slurm, batch_of, tmp_path):
    write_notebook(tmp_path, "good", "pass")
    batch = batch_of({
        "a": {"notebook": "good", "resources": {"partition": "gpuu"}},
        "b": {"notebook": "good", "resources": {"cpus": 99, "memory": "1T", "gpus": 1}},
        "c": {"notebook": "good", "resources": {"nodes": 3}},
        "d": {"notebook": "good", "resources": {"time": "12:00:00", "partition": "small"}},
        "e": {"notebook": "good", "grace": 100, "resources": {"time": 2}},
        "f": {"notebook": "good", "resources": {"extra": {"constraint": "h100"}}}})
    assert batch.run() == 2
    for told in ("job 'a': resources.partition: got 'gpuu', expected one of: main, small",
                 "job 'b': resources.cpus: got 99 a node, the largest node of partition main has 4",
                 "job 'b': resources.memory: got 1048576 MiB a node", "job 'b': resources.gpus: got 1 a node",
                 "job 'c': resources.nodes: got 3, partition main has 2 such nodes",
                 "job 'd': resources.time: got 12:00:00, partition small allows 00:10:00",
                 "job 'e': resources.time: got 00:02:00, and the warning comes 100 + 30 s before",
                 "job 'f': sbatch refuses"):
        assert told in batch.said
    assert not (batch.root / "jobs").exists() and not slurm.ask("squeue", "-h")


def test_the_plan_shows_the_options_of_sbatch(slurm, batch_of, tmp_path):
    write_notebook(tmp_path, "good", "pass")
    batch = batch_of({"a": {"notebook": "good", "resources": {"memory": "1G", "partition": "small", "time": 5,
                                                              "extra": {"exclusive": True, "nice": 10}}}})
    assert batch.run("--dry-run") == 0
    assert ("sbatch --nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --mem=1024M --time=00:05:00 --partition=small "
            "--signal=B:USR1@50 --requeue --exclusive --nice=10") in batch.said
    assert "1 jobs on slurm" in batch.said and not (batch.root / "jobs").exists()


@pytest.fixture
def without_slurm(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    yield


def test_a_machine_without_slurm(without_slurm):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match=r"no sbatch, squeue, sinfo, scontrol, scancel on the path.*login node"):
        make_executor("slurm")
    assert os.environ["PATH"]


def test_nodes_as_sinfo_tells_them():
    kinds = read_nodes("main*|4|64|512000|gpu:h100:8(S:0-1)|1-00:00:00|1:00:00\n"
                       "long|2|128+|1031000+|(null)|infinite|n/a\nmix|1|8|16000|gpu:2,nvme:1,gpu:a100:4|30:00|n/a")
    assert [(k.partition, k.default, k.count, k.cpus, k.memory, k.gpus, k.limit, k.usual) for k in kinds] == [
        ("main", True, 4, 64, 512000, 8, 86400, 3600), ("long", False, 2, 128, 1031000, 0, None, None),
        ("mix", False, 1, 8, 16000, 6, 1800, 1800)]

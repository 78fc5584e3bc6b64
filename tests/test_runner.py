"""The runner around Papermill under real faults: kernels that die silently, signals, time limits, memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from small_notebooks import write_notebook

from sgpo_lib import endings, jobs, launch
from sgpo_lib.cli import main
from sgpo_lib.launch import run_notebook

PID = "import os, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))"


@pytest.fixture(autouse=True)
def runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and jobs of these tests live in their own folder."""
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path / "runs"))


def wait_for(condition: Any, seconds: float = 60) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.time() + seconds
    while not (found := condition()):
        assert time.time() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def start(path: Path, job: Path, *more: str, **env: str) -> subprocess.Popen[str]:
    """`sgpo run` as a process of its own."""
    command = [sys.executable, "-m", "sgpo_lib.cli", "run", str(path), "--job", str(job), "--quiet", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, **env})  # fmt: skip


def record(job: Path) -> dict[str, Any]:
    assert not (job / "DONE").exists()
    return json.loads((job / "FAILED.json").read_text(encoding="utf-8"))


# --- sockets ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("place", ["s", "a" * 90])
def test_a_kernel_needs_no_port_that_another_could_take(tmp_path, monkeypatch, place):
    """Kernels started at the same moment found their TCP port taken; here all their sockets are files of their own."""
    temporary = tmp_path / place
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    path = write_notebook(tmp_path, """import json, os, ipykernel.connect
told = json.load(open(ipykernel.connect.get_connection_file()))
files = [os.path.exists(f"{told['ip']}-{told[name]}") for name in told if name.endswith("_port")]
print(told["transport"], told["ip"], oct(os.stat(os.path.dirname(told["ip"])).st_mode)[-3:], files)""")
    result = run_notebook(path, {}, tmp_path / "job")
    assert result.state == "done", result.reason
    transport, folder, mode, files = (tmp_path / "job" / "log.txt").read_text().split(maxsplit=3)
    assert (transport, mode, files.strip()) == ("ipc", "700", str([True] * 5))
    assert (str(temporary) in folder) == (len(str(temporary)) <= 70) and not Path(folder).parent.exists()


# --- success is the kernel's word ----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("last", "error", "told", "status"), [
    ("import os\nos._exit(0)", "DeadKernelError", "exit status 0: os._exit", 0),
    ("import os\nos._exit(3)", "DeadKernelError", "exit status 3", 3),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "DeadKernelError", "SIGSEGV: a crash in compiled", -11),
    ("import sys\nsys.exit()", "SystemExit", "the cells after it did not run", None),
    ("import sys\nsys.exit(0)", "SystemExit", "the cells after it did not run", None),
    ("import os, threading\nthreading.Timer(0.3, os._exit, [0]).start()\n'answered'\nimport time\ntime.sleep(1)",
     "DeadKernelError", "exit status 0", 0)])  # fmt: skip
def test_a_kernel_that_ends_silently_is_a_failure(tmp_path, last, error, told, status):
    """In the last cell, where nothing else would notice: Papermill takes exit status 0 and sys.exit() for success."""
    result = run_notebook(write_notebook(tmp_path, "x = 1", last), {}, tmp_path / "job")
    failed = record(tmp_path / "job")
    assert result.state == "failed" and failed["error"] == error and told in failed["message"], failed
    assert failed["cell"] == 3 and failed["cure"] and failed.get("kernel_status") == status
    assert failed["cure"] in result.reason


@pytest.mark.slow
@pytest.mark.parametrize(("last", "error"), [
    ("import os, pathlib\npathlib.Path.write_text = lambda *_: os._exit(0)", "DeadKernelError"),
    ("import pathlib\npathlib.Path.write_text = lambda *_: 0", "NoSentinel")])
def test_a_kernel_that_ends_after_its_last_answer_is_a_failure(tmp_path, last, error):
    """Every cell was answered; only the runner's own request at the end tells."""
    assert run_notebook(write_notebook(tmp_path, "x = 1", last), {}, tmp_path / "job").state == "failed"
    failed = record(tmp_path / "job")
    assert (failed["error"], failed["cell"]) == (error, 3)


@pytest.mark.slow
def test_a_kernel_killed_from_outside_leaves_pending_cells_pending(tmp_path):
    path, job = write_notebook(tmp_path, PID, "import time\ntime.sleep(60)", "'never'"), tmp_path / "job"
    process = start(path, job)
    os.kill(int(wait_for(lambda: text_of(tmp_path / "pid"))), signal.SIGKILL)
    assert process.communicate(timeout=60)[0].count("killed from outside; most often memory ran out") == 1
    assert process.returncode == 1
    failed = record(job)
    assert failed["kernel_status"] == -9 and failed["cell"] in (2, 3) and "give the job more memory" in failed["cure"]
    states = [c["metadata"]["papermill"]["status"] for c in nbformat.read(job / "notebook.ipynb", 4).cells
              if c.cell_type == "code"]
    assert states[0] == "completed" and states[-1] == "pending"


@pytest.mark.slow
def test_an_error_that_a_cell_shows_on_purpose_is_none(tmp_path):
    path = write_notebook(tmp_path, "1 / 0", "print('after')")
    nb = nbformat.read(path, 4)
    nb.cells[2].metadata["tags"] = ["raises-exception"]
    nbformat.write(nb, path)
    result = run_notebook(path, {}, tmp_path / "job")
    assert result.state == "done" and "after" in (tmp_path / "job" / "log.txt").read_text()
    assert not (tmp_path / "job" / ".sentinel").exists()
    saved = nbformat.read(tmp_path / "job" / "notebook.ipynb", 4)
    assert len(saved.cells) == len(nb.cells), "the sentinel is no cell of the saved copy"


@pytest.mark.slow
def test_a_failed_cell_is_marked_on_the_page(tmp_path):
    run_notebook(write_notebook(tmp_path, "{}['lost']"), {"steps": 4}, tmp_path / "job")
    page = (tmp_path / "job" / "report.html").read_text(encoding="utf-8")
    assert 'href="#papermill-error-cell"' in page and 'id="papermill-error-cell"' in page
    assert record(tmp_path / "job")["cell"] == 3


@pytest.mark.slow
def test_a_reader_finds_a_valid_notebook_at_any_moment(tmp_path):
    cells = [f"print('cell {i}')\nimport time\ntime.sleep(0.15)" for i in range(8)]
    job, seen = tmp_path / "job", []
    process = start(write_notebook(tmp_path, *cells), job)
    while process.poll() is None:
        if (job / "notebook.ipynb").exists():
            nb = nbformat.reads((job / "notebook.ipynb").read_text(encoding="utf-8"), as_version=4)
            nbformat.validate(nb)
            seen.append(sum(bool(c.get("outputs")) for c in nb.cells))
    assert process.returncode == 0, process.communicate()
    assert seen == sorted(seen) and len(set(seen)) > 4 and seen[0] < 2, seen
    assert [p.name for p in job.iterdir() if p.name.startswith(".notebook")] == []


@pytest.mark.slow
def test_a_cell_that_goes_on_is_saved_meanwhile(tmp_path, monkeypatch):
    """What a long cell printed so far is in the notebook while it runs."""
    monkeypatch.setattr(launch, "AUTOSAVE_S", 1)
    job, release = tmp_path / "job", tmp_path / "release"
    path = write_notebook(tmp_path, "import os, time\nprint('early', flush=True)\n"
                          f"while not os.path.exists({str(release)!r}):\n    time.sleep(0.1)\n    print('.', end='')")
    seen = []

    def look() -> None:
        until = time.monotonic() + 60
        while not seen and time.monotonic() < until:
            if (job / "notebook.ipynb").exists():
                cells = nbformat.read(job / "notebook.ipynb", 4).cells
                outputs = [o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs]
                seen.extend(text for text in outputs if "early" in text)
            time.sleep(0.1)
        release.touch()

    reader = threading.Thread(target=look)
    reader.start()
    result = run_notebook(path, {}, job)
    reader.join()
    assert seen and result.state == "done"


@pytest.mark.slow
def test_a_folder_with_the_job_of_another_notebook_is_left_alone(tmp_path):
    first = write_notebook(tmp_path, "print('first')", name="first")
    other = write_notebook(tmp_path, "print('other')", name="other")
    assert run_notebook(first, {}, tmp_path / "job").state == "done"
    with pytest.raises(ValueError, match=r"job holds the job of first\.ipynb, expected other\.ipynb or nothing"):
        run_notebook(other, {}, tmp_path / "job")
    assert (tmp_path / "job" / "log.txt").read_text() == "first\n" and (tmp_path / "job" / "DONE").exists()
    assert run_notebook(other, {}, tmp_path / "job", force=True).state == "done"
    assert (tmp_path / "job" / "log.txt").read_text() == "other\n"


# --- signals and limits --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[dict[str, Any]]:
    """A notebook that trains an untrained tiny model for long, and how to ask for it."""
    folder = tmp_path_factory.mktemp("training")
    path = write_notebook(folder, PID, "from sgpo_lib.recipes import from_parameters",
                          "from sgpo_lib.trainer import train\n"
                          "config = from_parameters('tiny', 'grpo8', 0, **overrides)\n"
                          "train(config, on_row=lambda row: print(row['kind'], row['step'], flush=True))",
                          parameters="overrides = {}")  # fmt: skip
    yield {"path": path, "pid": folder / "pid", "given": {
        "source": str(base), "revision": "", "steps": 400, "problems_per_step": 2, "g1": 2, "max_new_tokens": 8,
        "n_train": 24, "n_validation": 2, "n_test": 2, "eval_every": 0, "test_k": 1, "save_every": 0}}  # fmt: skip


def train_job(training: dict[str, Any], job: Path, steps: int = 400, *more: str) -> subprocess.Popen[str]:
    given = {**training["given"], "steps": steps}
    return start(training["path"], job, *(a for n, v in given.items() for a in ("-p", f"{n}={v}")), *more)


@pytest.mark.slow
def test_sigusr1_ends_after_a_step_and_the_same_command_continues(tmp_path, training):
    job = tmp_path / "job"
    process = train_job(training, job)
    wait_for(lambda: "train 3\n" in text_of(job / "log.txt"))
    kernel = int(training["pid"].read_text())
    os.kill(kernel, signal.SIGUSR1)  # Slurm sends it to every process of a step: the kernel goes on
    time.sleep(0.5)
    assert not gone(kernel)
    process.send_signal(signal.SIGUSR1)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "stopped as asked. The same command continues" in out
    assert (job / "STOP").exists() and not (job / "DONE").exists() and not (job / "FAILED.json").exists()
    assert jobs.read_job(job).state == "stopped" and gone(kernel) and (job / "report.html").exists()
    (run,) = (tmp_path / "runs").glob("tiny-*")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == max(steps) >= 3 and not (run / "FAILED.json").exists()
    again = train_job(training, job)
    wait_for(lambda: f"train {max(steps) + 2}\n" in text_of(job / "log.txt"))
    assert not (job / "STOP").exists() and f"resumed after step {max(steps)}" in text_of(job / "log.txt")
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    assert again.returncode == 75


@pytest.mark.slow
def test_after_the_grace_the_kernel_is_interrupted_then_killed(tmp_path, monkeypatch):
    """First a cell that can be interrupted, then one that ignores it, with a process of its own left behind."""
    job = tmp_path / "job"
    process = start(write_notebook(tmp_path, PID, "import time\ntime.sleep(90)"), job, "--grace", "1")
    wait_for(lambda: text_of(tmp_path / "pid"))
    asked = time.time()
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=60) and process.returncode == 75 and time.time() - asked < 9
    stubborn = ("import signal, subprocess, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
                "child = subprocess.Popen(['sleep', '600'])\npathlib.Path('child').write_text(str(child.pid))\n"
                "time.sleep(90)")  # fmt: skip
    (tmp_path / "pid").unlink()
    process = start(write_notebook(tmp_path, PID, stubborn), job, "--grace", "0.5")
    child = int(wait_for(lambda: text_of(tmp_path / "child")))
    asked = time.time()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) and process.returncode == 75 and 10 < time.time() - asked < 25
    assert gone(int(text_of(tmp_path / "pid"))) and gone(child), "nothing is left running"
    assert jobs.read_job(job).state == "stopped"


@pytest.mark.slow
def test_ctrl_c_interrupts_at_once_and_saves_the_last_whole_step(tmp_path, training):
    job = tmp_path / "job"
    process = train_job(training, job)
    wait_for(lambda: "train 3\n" in text_of(job / "log.txt"))
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "interrupted. The same command continues" in out
    assert not (job / "DONE").exists() and not (job / "FAILED.json").exists() and gone(int(training["pid"].read_text()))
    assert len(list((tmp_path / "runs").glob("tiny-*/checkpoints/step-*/state.json"))) == 1


@pytest.mark.slow
def test_the_time_limit_is_a_failure_with_a_reason(tmp_path):
    cell = ("import time\ntry:\n    time.sleep(90)\nexcept KeyboardInterrupt:\n"
            "    pathlib.Path('interrupted').touch()\n    raise")  # fmt: skip
    job = tmp_path / "job"
    process = start(write_notebook(tmp_path, PID, cell), job, "--time-limit", "10")
    out = process.communicate(timeout=90)[0]
    assert process.returncode == 1 and "TimeLimit: the time limit of 10 s (--time-limit) was reached" in out, out
    failed = record(job)
    assert failed["error"] == "TimeLimit" and "continues from the last checkpoint" in failed["cure"]
    assert (tmp_path / "interrupted").exists() and failed["traceback"], "interrupted first: a run saves its state"
    assert gone(int(text_of(tmp_path / "pid")))


def test_wrong_limits_are_told_before_any_work(tmp_path, capsys):
    path = write_notebook(tmp_path)
    for name in ("--time-limit", "--grace"):
        assert main(["run", str(path), "--job", str(tmp_path / "job"), name, "-1"]) == 2
        assert f"{name}: got -1, expected seconds" in capsys.readouterr().err
    assert not (tmp_path / "job").exists()


# --- memory --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("cell", ["x = bytearray(10**16)", "import torch\ntorch.empty(10**16)"])
def test_memory_that_is_refused_has_a_cure(tmp_path, cell):
    run_notebook(write_notebook(tmp_path, cell), {}, tmp_path / "job")
    failed = record(tmp_path / "job")
    assert failed["error"] in ("MemoryError", "RuntimeError") and "rollout.rollout_batch" in failed["cure"]


def limited_group() -> Path | None:
    """A new control group with a memory limit, below ours; None where none can be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            group, limit = Path(f"/sys/fs/cgroup/memory{path}"), "memory.limit_in_bytes"
        elif not controllers:
            group, limit = Path(f"/sys/fs/cgroup{path}"), "memory.max"
        else:
            continue
        if not (group / "cgroup.procs").exists():
            continue
        group /= f"sgpo-test-{os.getpid()}"
        try:
            group.mkdir()
            if (group / limit).exists():
                (group / limit).write_text(str(400 * 2**20))
                return group
            group.rmdir()
        except OSError:
            if group.is_dir():
                group.rmdir()
    return None


@pytest.mark.slow
def test_the_out_of_memory_killer_is_told_from_other_kills(tmp_path):
    group = limited_group()
    if group is None:
        pytest.skip("no control group with a memory limit can be made here (not root, or read-only)")
    path = write_notebook(tmp_path, "x = [bytearray(b'1' * 2**24) for _ in range(100)]")  # 1.6 GB
    command = [sys.executable, "-m", "sgpo_lib.cli", "run", str(path), "--job", str(tmp_path / "job"), "--quiet"]
    try:
        done = subprocess.run(["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command],
                              capture_output=True, text=True, timeout=120, check=False)
        failed = record(tmp_path / "job")
        assert done.returncode == 1 and failed["error"] == "OutOfMemory", (done.stderr, failed)
        assert "memory ran out (signal 9, counted as oom_kill)" in failed["message"] and failed["kernel_status"] == -9
    finally:
        wait_for(lambda: not text_of(group / "cgroup.procs").strip(), 20)
        group.rmdir()


def test_the_counters_of_both_versions_are_read(tmp_path):
    groups = tmp_path / "proc/self/cgroup"
    groups.parent.mkdir(parents=True)
    assert endings.oom_kills(tmp_path) == 0
    (tmp_path / "proc/vmstat").write_text("nr_free 1\noom_kill 2\n")
    groups.write_text("0::/gone\n")
    assert endings.oom_kills(tmp_path) == 2
    for line, file, text, count in (
            ("0::/a/b", "sys/fs/cgroup/a/b/memory.events", "oom 9\noom_kill 4\noom_group_kill 0\n", 4),
            ("4:memory:/c", "sys/fs/cgroup/memory/c/memory.oom_control", "oom_kill_disable 0\noom_kill 5\n", 5)):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
        groups.write_text(f"2:cpu:/\n{line}\n")
        assert endings.oom_kills(tmp_path) == count

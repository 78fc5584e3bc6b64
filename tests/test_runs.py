"""Run folders: what they hold, what survives an interruption, and who may write."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest

from sgpo_lib import runs
from sgpo_lib.config import RunConfig, from_yaml, override
from sgpo_lib.runs import Run, list_runs, load_run, locked, open_run, runs_root
from sgpo_lib.storage import read_jsonl, write_atomic

CONFIG = RunConfig()
CANARY = "canary-5f0c2b"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(CONFIG, tmp_path)


def row(step: int, kind: str = "train") -> dict[str, object]:
    return {"kind": kind, "step": step, "loss": step / 3}


def weights(text: str):
    """A checkpoint writer with two files, one of them in a folder."""
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(text, encoding="utf-8")
        (folder / "optimizer.pt").write_bytes(text.encode())
    return write


def names(run: Run) -> list[str]:
    return sorted(p.name for p in (run.folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------------- opening


def test_a_new_run_holds_its_configuration_and_environment(tmp_path):
    run = open_run(CONFIG, tmp_path)
    assert run.folder == tmp_path / CONFIG.label
    assert from_yaml(run.folder / "config.yaml") == CONFIG
    stored = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    assert stored["python"] == sys.version.split()[0]
    assert {"torch", "transformers", "math-verify"} <= set(stored["packages"])
    assert (run.state, run.done, run.summary, run.metrics(), run.checkpoints()) == ("stopped", False, {}, [], [])


def test_a_run_is_found_again_and_its_files_stay(run, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in run.folder.iterdir()}
    again = open_run(CONFIG, tmp_path)
    assert again.folder == run.folder
    assert {p: p.stat().st_mtime_ns for p in run.folder.iterdir()} == before


def test_another_configuration_in_the_same_folder_is_refused_with_the_fields_that_differ(tmp_path):
    open_run(CONFIG, tmp_path, "mine")
    other = override(CONFIG, {"steps": 7, "g1": 4, "problems": "x.jsonl"})
    with pytest.raises(ValueError, match="holds another configuration") as error:
        open_run(other, tmp_path, "mine")
    told = str(error.value).splitlines()
    assert str(tmp_path / "mine") in told[0]
    assert [line.split(":")[0].strip() for line in told[1:-1]] == ["data.problems", "method.g1", "train.steps"]
    assert "60 there, 7 here" in told[3]
    assert "delete the folder" in told[-1]
    assert from_yaml(tmp_path / "mine" / "config.yaml") == CONFIG


def test_a_folder_whose_making_was_interrupted_is_made_whole(tmp_path):
    folder = tmp_path / CONFIG.label
    folder.mkdir()
    (folder / "environment.json").write_text("{", encoding="utf-8")
    open_run(CONFIG, tmp_path)
    assert from_yaml(folder / "config.yaml") == CONFIG
    json.loads((folder / "environment.json").read_text(encoding="utf-8"))


def test_the_root_is_taken_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path / "elsewhere"))
    assert runs_root() == tmp_path / "elsewhere"
    assert open_run(CONFIG).folder == tmp_path / "elsewhere" / CONFIG.label
    assert load_run(CONFIG.label).config == CONFIG
    monkeypatch.setenv("SGPO_RUNS", "~/there")
    assert runs_root() == Path.home() / "there"
    monkeypatch.setenv("SGPO_RUNS", "")
    assert runs_root() == Path(runs.__file__).parent.parent / "runs"


def test_runs_are_listed_by_name_and_loaded_by_folder(tmp_path):
    assert list_runs(tmp_path) == []
    for seed in (2, 0, 1):
        open_run(override(CONFIG, {"seed": seed}), tmp_path, f"run-{seed}")
    (tmp_path / "not-a-run").mkdir()
    assert [r.config.seed for r in list_runs(tmp_path)] == [0, 1, 2]
    assert load_run(tmp_path / "run-2").config.seed == 2
    with pytest.raises(ValueError, match=r"no run at missing: expected a folder with config\.yaml"):
        load_run("missing")


def test_runs_of_an_executed_notebook_are_noted_for_its_job(monkeypatch, tmp_path):
    monkeypatch.setenv("SGPO_JOB", str(tmp_path))
    for _ in range(2):
        folder = open_run(CONFIG, tmp_path / "runs").folder
    assert (tmp_path / "runs.txt").read_text(encoding="utf-8").splitlines() == [str(folder)] * 2


# --------------------------------------------------------------------------------------------------- environment


def test_no_environment_variable_is_recorded(monkeypatch, tmp_path):
    """Tokens of hubs and trackers live there."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "SGPO_SECRET", "GIT_ASKPASS", "USER", "LOGNAME"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    run = open_run(CONFIG, tmp_path)
    for path in run.folder.rglob("*"):
        assert CANARY not in path.read_text(encoding="utf-8"), path


def test_a_machine_without_git_can_run(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    stored = json.loads((open_run(CONFIG, tmp_path / "runs").folder / "environment.json").read_text(encoding="utf-8"))
    assert stored["commit"] == ""


# ------------------------------------------------------------------------------------------------------- metrics


def test_rows_come_back_as_logged_and_by_kind(run):
    rows = [row(1), row(1, "eval"), {"kind": "train", "step": 2, "loss": 0.1 + 0.2, "name": "ü\n"}]
    for one in rows:
        run.log(one)
    assert run.metrics() == rows
    assert run.metrics("eval") == [rows[1]]


@pytest.mark.parametrize("torn", ['{"kind": "tra', "{", '{"kind": "train", "step": 3, "loss": 0.', "\ufffd"])
def test_a_torn_last_line_is_left_out(run, torn):
    run.log(row(1))
    run.log(row(2))
    with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(torn)
    assert [r["step"] for r in run.metrics()] == [1, 2]


def test_a_torn_line_in_the_middle_of_a_character_is_left_out(run):
    run.log(row(1))
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "\xc3')
    assert run.metrics() == [row(1)]


@pytest.mark.parametrize("garbage, line", [("garbage\n", 2), ('{"kind": "tra\n', 2), ("\ngarbage\n", 3)])
def test_garbage_in_the_middle_is_an_error_with_file_and_line(run, garbage, line):
    run.log(row(1))
    path = run.folder / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(garbage)
    run.log(row(2))
    with pytest.raises(ValueError, match="not JSON at column") as error:
        run.metrics()
    assert str(error.value).startswith(f"{path}:{line}: ")


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_forget_after_drops_later_rows_rollouts_and_a_torn_line(run):
    for step in (0, 1, 2, 3):
        run.log(row(step))
        run.log(row(step, "eval"))
        run.write_rollouts(step, [{"text": f"é {step}"}])
    with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')
    run.forget_after(1)
    assert [r["step"] for r in run.metrics()] == [0, 0, 1, 1]
    assert sorted(p.name for p in (run.folder / "rollouts").iterdir()) == ["step-000000.jsonl", "step-000001.jsonl"]
    assert read_jsonl(run.folder / "rollouts" / "step-000001.jsonl") == [{"text": "é 1"}]
    run.log(row(2))
    assert [r["step"] for r in run.metrics()] == [0, 0, 1, 1, 2]
    run.forget_after(-1)
    assert run.metrics() == []


# --------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_written_whole(run):
    folder = run.save_checkpoint(3, weights("three"), {"best": 0.5}, keep=2)
    assert folder == run.folder / "checkpoints" / "step-000003"
    assert json.loads((folder / "state.json").read_text(encoding="utf-8")) == {"step": 3, "best": 0.5}
    assert (folder / "model" / "weights").read_text(encoding="utf-8") == "three"
    assert run.checkpoints() == [folder]


def test_an_interruption_while_writing_leaves_no_checkpoint_and_keeps_the_old_ones(run):
    for step in (1, 2):
        run.save_checkpoint(step, weights(str(step)), {}, keep=2)
    before = run.checkpoints()

    def breaks(folder: Path) -> None:
        weights("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(3, breaks, {}, keep=2)
    assert run.checkpoints() == before
    assert [(p / "optimizer.pt").read_text(encoding="utf-8") for p in before] == ["1", "2"]
    run.save_checkpoint(3, weights("3"), {}, keep=2)
    assert names(run) == ["step-000002", "step-000003"]  # the temporary folder is gone, too


def test_leftovers_of_a_killed_process_are_removed(run):
    leftover = run.folder / "checkpoints" / ".step-000009.424242" / "model"
    leftover.mkdir(parents=True)
    (leftover / "weights").write_text("half", encoding="utf-8")
    assert run.checkpoints() == []
    run.save_checkpoint(1, weights("1"), {}, keep=1)
    assert names(run) == ["step-000001"]


def test_a_checkpoint_is_replaced_by_a_later_one_of_its_step(run):
    (run.folder / "checkpoints" / "step-000005").mkdir(parents=True)
    run.save_checkpoint(5, weights("whole"), {}, keep=1)
    assert [p.name for p in run.checkpoints()] == ["step-000005"]
    run.save_checkpoint(5, weights("again"), {}, keep=1)
    assert (run.checkpoints()[0] / "optimizer.pt").read_text(encoding="utf-8") == "again"
    assert run.newest_checkpoint() == run.checkpoint(5)


def test_a_checkpoint_that_was_about_to_be_replaced_is_found_again(run):
    """Killed between the two renames: the old one had been moved away, the new one had not its name yet."""
    folder = run.save_checkpoint(5, weights("whole"), {}, keep=2)
    folder.rename(folder.with_name(".step-000005.replaced"))
    (folder.parent / ".step-000005.4242" / "model").mkdir(parents=True)
    assert run.newest_checkpoint() == folder and names(run) == ["step-000005"]


def test_the_best_of_a_kept_checkpoint_is_kept_with_it(run):
    for step, best in ((2, 2), (4, 2), (6, 6), (8, 6)):
        run.save_checkpoint(step, weights(str(step)), {"best_step": best}, keep=2, protected=(best,))
    assert names(run) == ["step-000002", "step-000004", "step-000006", "step-000008"]
    (run.folder / "checkpoints" / "step-000006" / "optimizer.pt").write_text("7")
    assert run.newest_checkpoint() == run.checkpoint(4), "8 cannot end without 6"
    assert names(run) == ["damaged-step-000006", "damaged-step-000008", "step-000002", "step-000004"]


@pytest.mark.parametrize("keep, protected, left", [
    (1, (), [6]), (2, (), [5, 6]), (2, (1,), [1, 5, 6]), (1, (6,), [5, 6]), (3, (2, 5), [2, 3, 4, 5, 6]),
    (10, (), [1, 2, 3, 4, 5, 6]),
])  # fmt: skip
def test_the_newest_and_the_protected_checkpoints_are_kept(run, keep, protected, left):
    for step in range(1, 7):
        run.save_checkpoint(step, weights(str(step)), {}, keep=6)
    run.save_checkpoint(6, weights("6"), {}, keep=keep, protected=protected)
    assert names(run) == [f"step-{s:06d}" for s in left]


# ------------------------------------------------------------------------------------------------- write_atomic


def test_write_atomic_replaces_the_whole_text_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "a long first text: é")
    write_atomic(path, "short")
    assert path.read_text(encoding="utf-8") == "short"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomic_leaves_the_old_file_when_interrupted(monkeypatch, tmp_path, step):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def breaks(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), breaks)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    monkeypatch.undo()
    write_atomic(path, "new")
    assert path.read_text(encoding="utf-8") == "new"


# ---------------------------------------------------------------------------------------------- locks and states

HOLD = """
import sys
from pathlib import Path
from sgpo_lib.runs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
TRY = """
import sys, time
from pathlib import Path
from sgpo_lib.runs import locked
start = time.perf_counter()
try:
    with locked(Path(sys.argv[1])):
        print("free")
except RuntimeError as error:
    print(f"{time.perf_counter() - start:.3f} {error}")
"""


def test_a_second_process_is_told_who_holds_the_run(run):
    with locked(run.folder):
        assert run.state == "running"
        found = subprocess.run([sys.executable, "-c", TRY, str(run.folder)], capture_output=True, text=True, check=True)
    seconds, _, told = found.stdout.partition(" ")
    assert float(seconds) < 2
    assert f"process {os.getpid()} on {socket.gethostname()}" in told
    assert str(run.folder) in told
    again = subprocess.run([sys.executable, "-c", TRY, str(run.folder)], capture_output=True, text=True, check=True)
    assert again.stdout == "free\n"
    assert run.state == "stopped"


def test_a_killed_holder_frees_the_run(run):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run.folder)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert run.state == "running"
        with pytest.raises(RuntimeError, match=f"process {holder.pid} on"), locked(run.folder):
            pass
        holder.kill()
    with locked(run.folder):
        assert f"process {os.getpid()} " in (run.folder / ".owner").read_text(encoding="utf-8")
    assert not (run.folder / ".owner").exists()


def test_an_error_inside_frees_the_run(run):
    with pytest.raises(KeyError), locked(run.folder):
        raise KeyError
    with locked(run.folder):
        pass


def test_a_look_at_the_state_does_not_keep_a_writer_out(run):
    """`sgpo status` takes the lock for a moment to see whether it is free."""
    look = filelock.FileLock(run.folder / ".lock", thread_local=False)
    look.acquire()
    threading.Timer(0.1, look.release).start()
    with locked(run.folder):
        assert run.state == "running"


def test_states_of_a_run(run):
    assert run.state == "stopped"
    with locked(run.folder):
        assert run.state == "running"
    try:
        raise FloatingPointError("gradient norm is nan")
    except FloatingPointError as error:
        run.fail(error)
    assert run.state == "failed"
    record = json.loads((run.folder / "FAILED.json").read_text(encoding="utf-8"))
    assert (record["error"], record["message"]) == ("FloatingPointError", "gradient norm is nan")
    assert "test_states_of_a_run" in record["traceback"]
    with locked(run.folder):
        assert run.state == "running"  # started again after the failure
        run.finish({"accuracy": 0.5})
        assert run.state == "done"
    assert (run.state, run.done, run.summary) == ("done", True, {"accuracy": 0.5})
    assert not (run.folder / "FAILED.json").exists()


def test_done_is_written_last(run, monkeypatch):
    written = []
    real = runs.write_atomic
    monkeypatch.setattr(runs, "write_atomic", lambda path, text: (written.append(path.name), real(path, text)))
    run.finish({})
    assert written[-2:] == ["summary.json", "DONE"]


def test_a_failure_is_recorded_without_the_secrets_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKER_API_KEY", "canary-5f0c2d")
    run = open_run(RunConfig(), tmp_path)
    run.fail(RuntimeError("refused for canary-5f0c2d"))
    text = (run.folder / "FAILED.json").read_text()
    assert "canary" not in text and "«TRACKER_API_KEY»" in json.loads(text)["message"]

"""A full disk: a file system of a few kilobytes, or a limit of file sizes, in the middle of every kind of file.

What was there before is whole, nothing is left of what did not fit, the error names path, bytes needed, bytes free and
the cure; with room again, the same work goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
import torch
from damage_world import PAGE, Disk, SmallDisk, disk_of, leftovers
from kill_world import killed_config, require_same, result
from small_notebooks import write_notebook

from sgpo_lib.bases import base_source
from sgpo_lib.checkpoints import faults
from sgpo_lib.execution import SavedWhole
from sgpo_lib.launch import run_notebook
from sgpo_lib.parallel import process_group, spread
from sgpo_lib.policy import load_policy
from sgpo_lib.redaction import Redactor
from sgpo_lib.runs import Run, load_run, open_run
from sgpo_lib.storage import DiskFull, read_jsonl
from sgpo_lib.trainer import train
from sgpo_lib.training_state import save_state
from sgpo_lib.world import World

SIZES = 10
TOLD = re.compile(r"(?P<path>/\S+): (No space left on device|File too large): (?P<needed>[\d,]+) bytes needed, "
                  r"(?P<free>[\d,]+) free\. What was there before is whole\. Free some space, or .*; the same command "
                  "then continues")  # fmt: skip


@pytest.fixture(params=[Disk.what, SmallDisk.what])
def disk(request, tmp_path) -> Iterator[Disk]:
    with disk_of(request.param, tmp_path / "disk") as found:
        if found is None:
            pytest.skip("this user may not mount a file system; the limit of file sizes stands for it")
        yield found


def require_told(error: BaseException, path: Path) -> None:
    """The message names the path, what was needed, what was free, and the cure."""
    found = TOLD.fullmatch(str(error))
    assert isinstance(error, DiskFull) and found, repr(error)
    assert error.path == path and found["path"] == str(path)
    assert int(found["needed"].replace(",", "")) == error.needed > 0 and error.free >= 0


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module", params=["adapter", "sharded"])
def write(request, base) -> Iterator[Callable[[Path], None]]:
    """What writes a real checkpoint."""
    mixed = {"lora_rank": 0, "lora_dropout": 0.0, "guided_side": "live", "compute_dtype": "bfloat16"}
    config = killed_config(base, **(mixed if request.param == "sharded" else {}))
    with process_group(config, World()):
        policy = spread(load_policy(config.model, base_source(config.model), 0), config, World())
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, foreach=False)
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        yield lambda folder: save_state(policy, optimizer, [], folder, True)


def test_a_checkpoint_that_does_not_fit(write, disk, tmp_path, tally):
    """At ten sizes, so that the room ends in another file each time."""
    run = open_run(killed_config(tmp_path), disk.folder)
    first = run.save_checkpoint(1, write, {}, 2)
    sizes = [p.stat().st_size for p in first.rglob("*") if p.is_file()]
    most = max(sizes) if disk.what == Disk.what else sum(-(-size // PAGE) * PAGE for size in sizes)
    for number in range(SIZES):
        with disk.room(int(most * (number + 0.5) / SIZES)), pytest.raises(DiskFull) as error:
            run.save_checkpoint(2, write, {}, 2)
        require_told(error.value, run.folder / "checkpoints" / "step-000002")
        assert error.value.needed >= sum(sizes), "as large as the one before"
        assert run.checkpoints() == [first] and not faults(first) and not leftovers(run.folder)
    assert not faults(run.save_checkpoint(2, write, {}, 2)) and run.newest_checkpoint() == run.checkpoint(2)
    layout = next(p.name for p in first.iterdir() if p.is_dir())
    tally(4, f"checkpoint ({layout}/) of {sum(sizes):,} bytes, {disk.what}", f"{SIZES} of {SIZES} sizes: the one "
          "before whole, no leftovers, error with path, needed and free; with room it is saved")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Run:
    """An undisturbed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        patch.chdir(Path(__file__).parents[1])
        return train(killed_config(base, save_every=1), root=tmp_path_factory.mktemp("whole"))


def test_a_run_on_a_disk_that_fills_up(whole, disk, importable, count, tally):
    """Real trainings that end in DiskFull; with room again the same call ends with the bits of an undisturbed run."""
    config, expected, wanted = whole.config, result(whole), count(1, SIZES)
    files = [p for p in (whole.folder / "checkpoints").rglob("*") if p.is_file()]
    most = max(p.stat().st_size for p in files) if disk.what == Disk.what else sum(p.stat().st_size for p in files)
    for number in range(wanted):
        root = disk.folder / str(number)
        with disk.room(int(most * (number + 0.5) / wanted)), pytest.raises(DiskFull) as error:
            train(config, root=root)
        require_told(error.value, error.value.path)
        run = load_run(root / config.label)
        assert root in error.value.path.parents and not run.done and not leftovers(root)
        rows = (run.folder / "metrics.jsonl").read_bytes() if run.metrics() else b"\n"
        assert rows.endswith(b"\n") and all(not faults(p) for p in run.checkpoints())
        require_same(result(train(config, root=root)), expected, [f"{error.value}"])
    tally(4, f"training on a disk that fills up, {disk.what}", f"{wanted} of {wanted} ended in that error and, with "
          "room, with the bits of an undisturbed run")


# ---------------------------------------------------------------------------------------------------------------- rows


def test_a_row_that_does_not_fit(disk, tmp_path, tally):
    """At ten sizes: every row that was logged is there, the one that failed is not, not even in part."""
    whole = 0
    for number in range(SIZES):
        run = open_run(killed_config(tmp_path), disk.folder, f"run-{number}")
        path, logged = run.folder / "metrics.jsonl", 0
        run.log({"kind": "train", "step": 0, "text": "x" * 100})
        with disk.room(2 * PAGE + 333 * number, path), pytest.raises(DiskFull) as error:
            while True:
                run.log({"kind": "train", "step": logged + 1, "text": f"{number} é" * (30 + 7 * number)})
                logged += 1
        require_told(error.value, path)
        assert [r["step"] for r in run.metrics()] == list(range(logged + 1)) and logged > 0
        assert path.read_bytes().endswith(b"\n") and not leftovers(disk.folder)
        run.log({"kind": "train", "step": logged + 1})
        assert len(run.metrics()) == logged + 2
        whole += logged
    tally(4, f"row of metrics.jsonl, {disk.what}", f"{SIZES} of {SIZES} sizes: {whole} of {whole} whole rows there, no "
          "part of the one that failed")


def test_a_file_of_rows_that_does_not_fit(disk, tmp_path):
    """Files that are replaced as a whole: stored responses, and metrics on resuming."""
    run = open_run(killed_config(tmp_path), disk.folder)
    run.write_rollouts(1, [{"text": "é"}])
    for step in range(200):
        run.log({"kind": "train", "step": step, "text": "x" * 100})
    for number in range(SIZES):
        with disk.room(PAGE * (number + 1) // 2):
            for change in (lambda: run.write_rollouts(1, [{"text": "long" * 9000}]), lambda: run.forget_after(198)):
                with pytest.raises(DiskFull) as error:
                    change()
                require_told(error.value, error.value.path)
        assert read_jsonl(run.folder / "rollouts" / "step-000001.jsonl") == [{"text": "é"}]
        assert len(run.metrics()) == 200 and not leftovers(run.folder)


# ----------------------------------------------------------------------------------------------------------- notebooks


def test_a_notebook_that_does_not_fit(disk, tally):
    """The last good save stays; the last save of an execution tells, the ones before do not end it."""
    def notebook(text: str) -> nbformat.NotebookNode:
        output = nbformat.v4.new_output("stream", text=text)
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)", outputs=[output])],
                                        metadata={"papermill": {}})

    path = disk.folder / "notebook.ipynb"
    for number in range(SIZES):
        path.unlink(missing_ok=True)
        record = SavedWhole(notebook("good"), path, Redactor(), 0)
        record.notebook_start()
        good = path.read_bytes()
        record.nb = notebook("x" * (PAGE * 12))
        record.nb.metadata = nbformat.from_dict({"papermill": {}})
        with disk.room(PAGE * (number + 1)):
            record.save()  # of a cell that goes on
            assert path.read_bytes() == good
            with pytest.raises(DiskFull) as error:
                record.notebook_complete()
        require_told(error.value, path)
        assert path.read_bytes() == good and nbformat.read(path, as_version=4) and not leftovers(disk.folder)
        record.notebook_complete()
        assert len(path.read_bytes()) > PAGE * 12
    tally(4, f"executed notebook, {disk.what}", f"{SIZES} of {SIZES} sizes: the last good save stays")


def test_an_execution_on_a_disk_that_fills_up(tmp_path, count, tally):
    """A real kernel that prints more than fits: the job fails with that error, and the same call ends well with room.

    On a small disk only: a limit of file sizes would be the kernel's, too.
    """
    wanted, recorded = count(1, SIZES), 0
    source = write_notebook(tmp_path, "print('é' * 60_000)", "print('end')")
    with disk_of(SmallDisk.what, tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("this user may not mount a file system")
        for number in range(wanted):
            job = disk.folder / f"job-{number}"
            with disk.room(PAGE * (10 + 3 * number)):
                try:
                    assert run_notebook(source, {}, job).state == "failed"
                    record = json.loads((job / "FAILED.json").read_text())
                    assert record["error"] == "DiskFull"
                    message, recorded = record["message"], recorded + 1
                except DiskFull as error:  # not even for FAILED.json
                    message = str(error)
                assert TOLD.fullmatch(message), message
                nbformat.read(job / "notebook.ipynb", as_version=4)
                assert not leftovers(job) and not (job / "DONE").exists()
            assert run_notebook(source, {}, job).state == "done"
            assert "end" in (job / "log.txt").read_text()
    tally(4, "execution of a notebook on a disk that fills up", f"{wanted} of {wanted} failed with that error "
          f"({recorded} had room for FAILED.json), and ended well with room")

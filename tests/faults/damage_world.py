"""Damaged files and full disks, for real: bytes are changed, and a file system of a few kilobytes runs out of room."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sgpo_lib.config import RunConfig
from sgpo_lib.runs import Run, load_run
from sgpo_lib.trainer import train

PAGE = 4096
"""Bytes by which a small file system grows."""


def flip(path: Path) -> None:
    """Another value for one bit, which the file's name decides."""
    chance, data = random.Random(path.name), bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "bit flipped": flip,
}


def broken_off(config: RunConfig, root: Path, step: int) -> Run:
    """A real run that Ctrl-C ended after a step, with a checkpoint of it."""
    def interrupt(row: dict) -> None:
        if row["kind"] == "train" and row["step"] == step + 1:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(config, root=root, on_row=interrupt)
    run = load_run(root / config.label)
    assert not run.done and run.checkpoints()
    return run


def copied(run: Run, root: Path) -> Run:
    """The run's folder below another root."""
    return Run(Path(shutil.copytree(run.folder, root / run.folder.name)), run.config)


# --------------------------------------------------------------------------------------------------------- small disks


class Disk:
    """A folder in which the room can be made scarce: here by a limit of the size of a file."""

    what = "file limit"

    def __init__(self, folder: Path):
        self.folder = folder

    @contextlib.contextmanager
    def room(self, size: int, path: Path | None = None) -> Iterator[None]:
        """Inside, a file (`path`, or one that is new) can grow by `size` bytes (Python ignores the signal)."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        there = path.stat().st_size if path and path.exists() else 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (there + size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


class SmallDisk(Disk):
    """A file system in memory; inside `room` it can take `size` bytes more, in whole pages."""

    what = "small disk"

    @contextlib.contextmanager
    def room(self, size: int, path: Path | None = None) -> Iterator[None]:
        self._resize(shutil.disk_usage(self.folder).used + size // PAGE * PAGE)
        try:
            yield
        finally:
            self._resize(2**30)

    def _resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={max(size, PAGE)}", str(self.folder)], check=True)


@contextlib.contextmanager
def disk_of(what: str, folder: Path) -> Iterator[Disk | None]:
    """A `Disk` in a new folder; None where this user may not mount a file system."""
    folder.mkdir()
    if what == Disk.what:
        yield Disk(folder)
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={2**30}", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield SmallDisk(folder)
    finally:
        for _ in range(50):  # a process that has just ended may still hold a file
            if not subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode:
                break
            time.sleep(0.1)


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*")
                  if p.name not in (".lock", ".owner", ".metadata"))

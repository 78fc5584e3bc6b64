"""A real Slurm of two nodes and a real Ray cluster on this machine, and a run to compare with.

Debian's packages slurm-wlm and munge, and what requirements/cluster.lock lists: `make test-cluster` installs both.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import Batch, RayWorld, SlurmWorld

CLUSTER = Path(__file__).parent
# a token of the tests' own: whether Ray asks for one depends on a file in the home folder
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is one of `make test-cluster`."""
    for item in items:
        if CLUSTER in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmWorld]:
    """Slurm: slurmctld, two slurmd and munged, ended with the tests."""
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        pytest.fail("Debian's packages slurm-wlm and munge are not installed")
    if importlib.util.find_spec("submitit") is None:
        pytest.fail("submitit is not installed")
    with SlurmWorld() as world:
        yield world


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayWorld]:
    """A Ray cluster of one node with two CPUs."""
    if importlib.util.find_spec("ray") is None:
        pytest.fail("ray is not installed")
    with RayWorld() as world:
        yield world


@pytest.fixture(scope="session")
def undisturbed(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs root with the run that the tests break off, made in one piece on this machine."""
    root = tmp_path_factory.mktemp("undisturbed")
    (root / "bases").symlink_to(runs_folder / "bases")
    folder = tmp_path_factory.mktemp("spec")
    assert Batch(folder, root, {"only": Batch.full("sgpo", 0)}, name="only").run() == 0
    return root

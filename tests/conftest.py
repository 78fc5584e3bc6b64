"""For every test: shapes checked at run time, one torch thread, run folders in a temporary place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

from sgpo_lib.runs import runs_root

# Before any test module imports them: a module that is already loaded keeps its unchecked functions.
install_import_hook(["sgpo_lib.losses", "sgpo_lib.batching"], "beartype.beartype")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`SGPO_RUNS` of the session, for subprocesses too. Base models, named by what decides them, are the checkout's."""
    folder = tmp_path_factory.mktemp("runs")
    bases = runs_root() / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    (folder / "bases").symlink_to(bases)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGPO_RUNS", str(folder))
        yield folder

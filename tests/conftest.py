"""For every test: shapes checked at run time, one torch thread, run folders in a temporary place."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # of kernels too: with two test processes, threads that wait for one another crawl

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


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly initialised model in a plain folder: fast, and enough for everything but learning."""
    from sgpo_lib import tiny

    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny.build_tokenizer()
    tiny.build_model(tokenizer, 5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problem() -> Any:
    """A problem of the testbed with its strategy."""
    from sgpo_lib.testbed import make_problem
    from sgpo_lib.testbed_families import FAMILIES

    return make_problem(FAMILIES[0], 0, random.Random(5))


@pytest.fixture(scope="module")
def response(policy: Any, problem: Any) -> tuple[int, ...]:
    """Token ids of that problem's solution for the `policy` of the test file."""
    from sgpo_lib.prompts import response_ids

    return response_ids(policy.tokenizer, problem.solution or problem.prompt)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of `rewards_for_tests` can be named: the tests' folder is on the path, and the current one."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(Path(__file__).parent)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A scripted endpoint with a verifier: what the tests of extraction work on."""
    from extraction_world import open_bench

    from sgpo_lib.config import RewardConfig
    from sgpo_lib.rewards import Verifier

    with Verifier(RewardConfig()) as verifier, open_bench(verifier, tmp_path, monkeypatch) as found:
        yield found

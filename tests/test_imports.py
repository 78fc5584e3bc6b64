"""Which module may import which (read from syntax trees), what importing costs, and the size of a module."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import sgpo_lib
from sgpo_lib import config

PACKAGE = "sgpo_lib"
FOLDER = Path(sgpo_lib.__file__).parent
MAX_LINES = 350

ORDER = [
    "compute_config", "method_config", "rollout_config", "config", "config_checks", "records", "prompts",
    "token_text", "readings", "testbed_families", "testbed", "tiny", "recipes",
    "redaction", "escaping", "storage", "checkpoints", "runs", "collapse", "answers", "equivalence", "reward_worker",
    "worker_pool", "rewards", "verdict_rates", "strategies", "sources", "sources.rows", "sources.*",
    "sources.catalogue", "problems", "benchmarks",
    "world", "batching", "shapes", "losses.masked", "losses", "losses.head", "losses.fused",
    "weight_files", "policy", "plan_setup", "plan", "plan_time", "memory_check",
    "rollouts.interface", "rollouts.decoding", "rollouts.fingerprint", "rollouts.vllm_cpu", "rollouts",
    "rollouts.vllm_engine", "rollouts.*", "rollouts.opening", "losses.grpo", "losses.*",
    "analysis", "evaluation", "bases", "extraction", "extraction.records", "extraction.words", "extraction.mentions",
    "extraction.reading", "extraction.leaks", "quarantine", "extraction.chat", "extraction.output",
    "extraction.pipeline",
    "extraction.quality", "extraction.command", "served", "widgets", "widgets.strategy_inspector",
    "widgets.run_monitor.curves", "widgets.run_monitor.following", "widgets.run_monitor.*", "widgets.run_monitor",
    "widgets.token_kl.metrics", "widgets.token_kl.ramps", "widgets.token_kl.panes", "widgets.token_kl.payload",
    "widgets.token_kl.static", "widgets.token_kl.page", "widgets.token_kl", "microscope",
    "guards", "guided_side", "interrupts", "parallel", "peak_memory", "training_state", "session", "policy_sources",
    "supervised", "tracking", "objective", "step_metrics", "ray_driver", "distributed", "trainer",
    "frames", "figures", "token_statistics", "token_figures", "static_marks", "static_axes", "static_images",
    "comparison", "study", "claims", "study_figures", "exports",
    "method_figures", "strategy_figures", "groups_view", "live", "jobs", "pages", "kl_page", "report",
    "endings", "execution", "launch",
    "resources", "batch_spec", "executors", "executors.interface", "executors.attempts", "executors.child",
    "executors.allocation", "executors.*", "batch", "status", "export",
    "plan_command", "profiling", "profile_run", "profile_command", "serving", "cli",
]  # fmt: skip
"""Each module imports only from those above it. `x.*` are the remaining modules of package x, which do not import
each other. The package itself (`sgpo_lib/__init__.py`) is above all."""

WITHOUT_TORCH = ["", ".config", ".recipes", ".cli", ".rewards", ".problems"]
HEAVY = ["torch", "vllm", "ray"]


def files() -> dict[str, Path]:
    """Module name below the package ("" for the package itself) -> its file."""
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        parts = path.relative_to(FOLDER).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def rank(module: str) -> int | None:
    """Place in `ORDER`; None where it has none."""
    if module == "":
        return -1
    if module in ORDER:
        return ORDER.index(module)
    pattern = module.rpartition(".")[0] + ".*"
    return ORDER.index(pattern) if pattern in ORDER else None


def resolve(name: str, modules: set[str]) -> str | None:
    """Dotted name -> our module that it lies in (`sgpo_lib.runs.Run` -> `runs`); None where it is not ours."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    for end in range(len(parts), 1, -1):
        if ".".join(parts[1:end]) in modules:
            return ".".join(parts[1:end])
    return ""


def imported(module: str, source: str, is_package: bool, modules: set[str]) -> set[str]:
    """Our modules that `source` imports, anywhere in it: in functions, under TYPE_CHECKING, by import_module("...")."""
    here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (1 if is_package else 0)
            base = [".".join(here[: len(here) - up])] if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            names += [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                names.append(str(node.args[0].value))
    found = {resolve(name, modules) for name in names}
    return {name for name in found if name is not None} - {module}


def faults(module: str, used: set[str]) -> list[str]:
    """What breaks the order."""
    mine = rank(module)
    assert mine is not None
    theirs = {name: rank(name) for name in sorted(used)}
    return [f"{module} imports {name}, which is not above it in ORDER" for name, place in theirs.items()
            if place is None or place >= mine]


def test_every_module_is_in_the_order():
    missing = [name for name in FILES if rank(name) is None]
    assert not missing, f"not in ORDER of {Path(__file__).name}: {missing}; put each below everything it imports"


def test_the_order_names_no_module_twice():
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", [name for name in FILES if rank(name) is not None and name])
def test_a_module_imports_only_from_those_above_it(module):
    path = FILES[module]
    used = imported(module, path.read_text(encoding="utf-8"), path.name == "__init__.py", set(FILES))
    assert faults(module, used) == []


def test_the_package_itself_imports_none_of_its_modules():
    assert imported("", FILES[""].read_text(encoding="utf-8"), True, set(FILES)) == set()


@pytest.mark.parametrize("source, expected", [
    ("import sgpo_lib.runs", {"runs"}),
    ("import sgpo_lib", {""}),
    ("from sgpo_lib import __version__", {""}),
    ("from sgpo_lib import runs, config", {"runs", "config"}),
    ("from sgpo_lib.runs import Run", {"runs"}),
    ("from sgpo_lib.losses import masked", {"losses.masked"}),
    ("from sgpo_lib.losses import LossOutput", {"losses"}),
    ("def f():\n    if 1:\n        from sgpo_lib.runs import Run as R", {"runs"}),
    ("from . import masked", {"losses.masked"}),
    ("from .masked import LossOutput", {"losses.masked"}),
    ("from ..runs import Run", {"runs"}),
    ("import importlib\nimportlib.import_module('sgpo_lib.runs')", {"runs"}),
    ("import torch, sgpo_library", set()),
])  # fmt: skip
def test_imports_are_found_however_they_are_written(source, expected):
    modules = {"", "runs", "config", "losses", "losses.masked", "losses.grpo"}
    assert imported("losses.grpo", source, False, modules) == expected


def test_an_import_from_below_or_beside_is_a_fault():
    assert faults("config", {"runs"}) and faults("losses.grpo", {"losses.token_kl"}) and faults("runs", {"unheard_of"})
    assert faults("losses.grpo", {"", "config", "losses.masked"}) == []


@pytest.mark.parametrize("suffix", WITHOUT_TORCH)
def test_importing_loads_no_heavy_library(suffix):
    name = PACKAGE + suffix
    code = f"import sys, {name}; print(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"import {name} loads {done.stdout.strip()}"


def test_every_field_of_the_configuration_has_a_docstring():
    docs = config.field_docs()
    assert [name for name, text in docs.items() if not text.strip()] == []
    prefixes = {config.RunConfig: "", **{type(getattr(config.RunConfig(), s)): f"{s}." for s in config.SECTIONS}}
    classes = [c for c in vars(config).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    assert set(classes) == set(prefixes), "a dataclass of config that field_docs() does not cover"
    assert set(docs) == {prefix + f.name for c, prefix in prefixes.items() for f in dataclasses.fields(c)}


@pytest.mark.parametrize("module", FILES)
def test_a_module_is_not_too_long(module):
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{FILES[module].name} has {lines} lines, at most {MAX_LINES}: split it"

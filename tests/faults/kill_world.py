"""Tiny training runs in processes that are killed: from outside at any moment, or by themselves at a named one.

A process is forked from a server that has imported everything, so that a start costs a second and not ten, and leads a
group of its own. The product knows nothing of the deaths: the child wraps functions of the library before it calls
`train`, and dies by SIGKILL where it stands.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgpo_lib.config import RunConfig, from_yaml
from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import CLOCK_PREFIXES, Run, load_run

TESTS = Path(__file__).parents[1]
CHECKPOINT = "checkpoints/.step-*"
"""A checkpoint that is being written."""
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["sgpo_lib.trainer", "transformers.models.qwen3.modeling_qwen3", "peft",
                               "sgpo_lib.execution"])


def killed_config(base: Path, method: str = "sgpo", **changes: Any) -> RunConfig:
    """SGPO on a freshly initialised model: 4 steps of 2 updates, LoRA with dropout, a guided side that lags behind."""
    settings = {"source": str(base), "reward": "rewards_for_tests:coin", "steps": 4, "problems_per_step": 2, "g1": 4,
                "g2": 3, "n_train": 8, "n_validation": 2, "n_test": 2, "max_new_tokens": 6, "eval_every": 2,
                "eval_k": 1, "test_k": 2, "lr": 1e-3, "lora_rank": 4, "lora_dropout": 0.1, "mini_batch": 1,
                "guided_side": "ema", "ema_decay": 0.7, "reward_workers": 1, "torch_threads": 1, **changes}
    return from_parameters("tiny", method, 0, **settings)


# --- the process -----------------------------------------------------------------------------------------------------
def start(config: RunConfig, root: Path, moment: Moment | None = None) -> Any:
    """`train(config)` as a process of its own, which dies at `moment`."""
    return _start(root, root / config.label, moment, "sgpo_lib.trainer:train", (config,), {"root": root})


def start_notebook(notebook: Path, job: Path, moment: Moment) -> Any:
    """`sgpo run NOTEBOOK --job JOB` as a process of its own, which dies at `moment`."""
    arguments = ["run", str(notebook), "--job", str(job), "--quiet"]
    return _start(job.parent, job, moment, "sgpo_lib.cli:main", (arguments,), {})


def run_file(config: str, root: str) -> None:
    """The training of a configuration's file, in this interpreter."""
    told = from_yaml(Path(config))
    _child(Path(root), Path(root) / told.label, None, "sgpo_lib.trainer:train", (told,), {"root": Path(root)})


def _start(root: Path, *work: Any) -> Any:
    root.mkdir(parents=True, exist_ok=True)
    process = _server.Process(target=_child, args=(root, *work))
    process.start()
    return process


def _child(root: Path, folder: Path, moment: Moment | None, work: str, given: Any, named: Any) -> None:
    os.setsid()
    with (root / "output.txt").open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ["KILL_RUN"] = str(os.getpid())  # of what it starts
    os.chdir(TESTS)
    sys.path.insert(0, str(TESTS))  # the reward of the verifier's processes
    if moment:
        moment.arm(folder)
    owner, name = _find(work)
    done = getattr(owner, name)(*given, **named)
    sys.exit(done if isinstance(done, int) else 0)


def kill(process: Any) -> bool:
    """SIGKILL to the process and its group. False where it had ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not lead its group yet
    process.join()
    return process.exitcode == -signal.SIGKILL


def finish(config: RunConfig, root: Path, limit: float = 120) -> Run:
    """Start the run once more and wait for its end."""
    process = start(config, root)
    process.join(limit)
    told = (root / "output.txt").read_text(errors="replace")[-3000:]
    if process.exitcode is None:
        kill(process)
        raise AssertionError(f"the run hangs: {told}")
    assert process.exitcode == 0, told
    run = load_run(root / config.label)
    assert run.done and run.state == "done"
    return run


def dies(process: Any, root: Path, moment: Moment) -> tuple[float, set[str]]:
    """Wait for a process that dies at its moment: (seconds until what it had started ended too, what that was)."""
    mark, started, until = f"KILL_RUN={process.pid}", set[str](), time.monotonic() + 240
    while process.is_alive() and time.monotonic() < until:
        started |= set(processes(mark).values())
        time.sleep(0.1)
    told = (root / "output.txt").read_text(errors="replace")[-3000:]
    expected = -signal.SIGXFSZ if moment.cuts else -signal.SIGKILL
    code = process.exitcode
    kill(process)  # one that hangs
    assert code == expected, f"{moment.name}: exit {code}, {told}"
    return gone(30, mark), started


# --- moments -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Moment:
    """The process dies inside the `nth` call of `outer`; exactly one of the other fields says where."""

    name: str
    outer: str
    """`module:function` or `module:Class.method` of the library."""
    nth: int = 1
    inner: tuple[str, int] = ("", 1)
    """At this call of this function within it."""
    appears: str = ""
    """As soon as a new path of this pattern exists in the run folder; a file then loses its second half."""
    cuts: str = ""
    """The kernel cuts the next write to this file of the run folder in half and ends the process with SIGXFSZ."""
    backward: bool = False
    """When the gradient of the middle one of the weights that train is ready."""
    _calls: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)

    def arm(self, folder: Path) -> None:
        """Wrap `outer`."""
        def trap(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
            self._calls[0] += 1
            if self._calls[0] != self.nth:
                return original(*given, **named)
            if self.inner[0]:
                left = [self.inner[1]]
                _wrap(self.inner[0], lambda call, *a, **k: (_count_down(left), call(*a, **k))[1])
            elif self.appears:
                before = set(folder.glob(self.appears))
                sys.setprofile(lambda *_: _die_of(set(folder.glob(self.appears)) - before))
            elif self.cuts:
                _cut_next_write(folder / self.cuts, json.dumps(given[1]))
            elif self.backward:
                weights = given[0].policy.parameters()
                weights[len(weights) // 2].register_hook(lambda _: _die())
            result = original(*given, **named)
            raise AssertionError(f"{self.name}: {self.outer} ended without it: {result!r}")

        _wrap(self.outer, trap)


def _find(where: str) -> tuple[Any, str]:
    module, _, names = where.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = names.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _wrap(where: str, wrapper: Callable[..., Any]) -> None:
    owner, name = _find(where)
    original = getattr(owner, name)
    setattr(owner, name, lambda *given, **named: wrapper(original, *given, **named))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _count_down(left: list[int]) -> None:
    left[0] -= 1
    if left[0] == 0:
        _die()


def _die_of(new: set[Path]) -> None:
    for path in new:
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
        _die()


def _cut_next_write(file: Path, row: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = file.stat().st_size if file.exists() else 0
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + len(row) // 2, resource.RLIM_INFINITY))


# --- what must not differ --------------------------------------------------------------------------------------------
def result(run: Run) -> dict[str, Any]:
    """All of a finished run that does not depend on the clock."""
    rows = [{k: v for k, v in row.items() if not k.startswith(CLOCK_PREFIXES)} for row in run.metrics()]
    final = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (run.folder / "final").rglob("*.safetensors")}
    texts = {str(p.relative_to(run.folder)): p.read_text() for part in ("rollouts", "evaluation")
             for p in sorted((run.folder / part).glob("*.jsonl"))}
    summary = {k: v for k, v in run.summary.items() if not k.startswith(CLOCK_PREFIXES)}
    assert final, "no final weights"
    return {"final weights": final, "summary": summary,
            "problems": (run.folder / "problems.txt").read_text(),
            **{f"row {i}": row for i, row in enumerate(rows)}, **texts}


def require_same(got: dict[str, Any], expected: dict[str, Any], after: Sequence[str]) -> None:
    """Fails with the first part that differs."""
    assert got.keys() == expected.keys(), f"after {after}"
    for name, value in expected.items():
        differ = sorted(k for k in {*value, *got[name]} if got[name].get(k) != value.get(k)) if isinstance(
            value, dict) else []
        shown = "; ".join(f"{k}: {got[name].get(k)!s:.100}, expected {value.get(k)!s:.100}" for k in differ)
        assert got[name] == value, f"{name} differs after {after}: " + (
            shown or f"{got[name]!s:.500}, expected {value!s:.500}")


def stage(folder: Path) -> str:
    """How far a run had come when it died, in words."""
    if (folder / "DONE").exists():
        return "after DONE"
    if list(folder.glob(CHECKPOINT)):
        return "in a save"
    if not (folder / "config.yaml").exists():
        return "before its folder"
    rows = load_run(folder).metrics()
    if not rows:
        return "before the first row"
    if rows[-1]["step"] == 4:
        return "after the last step"
    return "between the first row and the last step"


def processes(mark: str) -> dict[int, str]:
    """Process id -> command line, of those that began with a `NAME=VALUE` in their environment and have not ended."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
    return found


def gone(limit: float, mark: str) -> float:
    """Seconds until `processes` finds none. Fails after `limit`."""
    began = time.monotonic()
    while found := processes(mark):
        assert time.monotonic() - began < limit, found
        time.sleep(0.05)
    return time.monotonic() - began


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders that no process will finish."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name not in (".lock", ".owner"))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """(what it returns, seconds)."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def clear(folder: Path) -> None:
    """Remove a run that was compared."""
    shutil.rmtree(folder)

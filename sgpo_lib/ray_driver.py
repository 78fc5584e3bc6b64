"""The process that talks to Ray for a training on several workers: `python -m sgpo_lib.ray_driver FOLDER`.

It is not the notebook's own, since Ray ends a process whose cluster goes away. FOLDER/task holds the task and
FOLDER/outcome what came of it, both pickled, FOLDER/address that of a cluster which is not of its own; printed lines
are for the person who waits. distributed.py starts it.

Ray Train counts a mistake in the program like a lost worker, and would repeat it. So each `fit` is one attempt here: a
lost worker leads to another from the newest checkpoint, an error of the program is the outcome as it was raised.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import re
import shutil
import stat
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo_lib.config import RunConfig
from sgpo_lib.runs import Run, Stopped, stop_requested
from sgpo_lib.storage import write_atomic
from sgpo_lib.world import World

ADDRESS = "address"
LEFT = ".left"
"""In the run folder: all workers have ended well. Ray Train's own end takes 12 seconds more."""
_SETTLED_S = 10.0
"""Devices of a former attempt come free within that time; afterwards the wait is told."""
_PASSED_ON = ("SGPO_RUNS", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "VLLM_", "WANDB_", "NCCL_", "GLOO_", "TORCH_")
"""Environment variables, or how their names begin, that workers get from here."""
_PATIENCE_S = 7 * 24 * 3600
"""How long a worker waits for another at a collective: they sample by themselves, hours long in an evaluation. Ray
finds out within seconds when one has gone."""
_BROKEN = re.compile(r"connection (closed|reset)|connection was|gloo|nccl|ProcessGroup|DistBackend", re.IGNORECASE)
"""What a worker says whose partner is gone."""


@dataclass(frozen=True)
class Task:
    """A training for the workers."""

    config: RunConfig
    run: Path
    folder: Path
    """The current folder of whoever asks: relative paths of the configuration begin there."""
    path: tuple[str, ...]
    """Where Python finds modules."""
    work: tuple[str, str]
    """Module and name of the function that each worker calls with configuration, run and world."""
    address: str
    """HOST:PORT of a Ray cluster, or `auto` for the one that this machine is part of; empty starts Ray here."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended."""

    error: BaseException | None = None
    """What is to be raised; None where the workers ended well: the run is done, or was asked to stop."""


def unpickled(file: Path) -> Any:
    """What the other of this user's two processes left in a file of their private folder.

    Raises RuntimeError where another user may have put it there: a pickle runs what it names.
    """
    folder, there = file.parent.lstat(), file.lstat()
    if {folder.st_uid, there.st_uid} != {os.getuid()} or folder.st_mode & 0o077 or not stat.S_ISREG(there.st_mode):
        raise RuntimeError(f"{file}: not opened: expected a file of this user's in a folder that nobody else may enter")
    return pickle.loads(file.read_bytes())  # noqa: S301 - checked above


def newest(run: Run) -> int:
    """Step of the newest checkpoint; 0 where there is none."""
    found = run.checkpoints()
    return int(found[-1].name.removeprefix("step-")) if found else 0


def drive(task: Task, folder: Path) -> None:
    """Train to the end, or to a stop. Raises ValueError for too few devices or no cluster; what a worker raised;
    RuntimeError where workers are lost again and again."""
    import ray

    run, config = Run(task.run, task.config), task.config
    _connect(ray, task.address)
    if task.address:
        write_atomic(folder / ADDRESS, ray.get_runtime_context().gcs_address)
    gpu = _gpu(config, ray.cluster_resources())
    _require_devices(config, [node["Resources"] for node in ray.nodes() if node["Alive"]], gpu, task.address)
    lost, before = 0, newest(run)
    print(f"{run.folder.name}: {config.compute.workers} workers, from step {before}", flush=True)
    while _free(ray, config, run, gpu) and (error := _attempt(task, gpu)):
        reason = _reason_of_loss(error)
        if reason is None:
            raise _own(error) from error
        now = newest(run)
        lost, before = (lost + 1 if now == before else 1), now
        if lost > config.compute.worker_restarts:
            raise RuntimeError(
                f"a worker was lost {lost} times in a row (compute.worker_restarts = "
                f"{config.compute.worker_restarts}) without a new checkpoint after step {now}: {reason}. "
                "Look for memory (sgpo plan) and at the nodes. The last checkpoint is whole: the same command goes on")
        print(f"{run.folder.name}: a worker was lost ({reason}); again from step {now}", flush=True)


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as the next version does; else a warning
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a node that is taken away is a lost worker here
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    here = {} if address else {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **here)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ValueError(f"no Ray cluster at {address or 'this machine'} ({str(error).splitlines()[0]}). "
                         f"{token_cure(address)}Unset RAY_ADDRESS, and Ray starts on this machine alone") from None


def token_cure(address: str) -> str:
    """What to do about a cluster that asks for a token, where this process would send none; ends with a space."""
    if not address or "RAY_AUTH_MODE" in os.environ:
        return ""
    return "A cluster that was started where ~/.ray/auth_token exists wants it: set RAY_AUTH_MODE=token. "


def _gpu(config: RunConfig, there: dict[str, float]) -> bool:
    return config.model.device.startswith("cuda") or (config.model.device == "auto" and there.get("GPU", 0) > 0)


def _per_worker(config: RunConfig, gpu: bool) -> dict[str, float]:
    """What a worker itself takes of one node."""
    return {"CPU": float(config.compute.worker_cpus)} | ({"GPU": 1.0} if gpu else {})


def _own_gpus(config: RunConfig, gpu: bool) -> int:
    """GPUs of all workers' samplers, on whatever node."""
    return config.compute.workers if gpu and config.compute.placement == "own" else 0


def _free(ray: Any, config: RunConfig, run: Run, gpu: bool) -> bool:
    """Wait until the devices are free; False where the run was asked to stop before."""
    each, told, since = _per_worker(config, gpu), False, time.monotonic()
    wanted = {name: config.compute.workers * size for name, size in each.items()}
    if gpu:
        wanted["GPU"] += _own_gpus(config, gpu)
    while not stop_requested(run.folder):
        free = ray.available_resources()
        if all(free.get(name, 0) >= size for name, size in wanted.items()):
            return True
        if not told and time.monotonic() - since > _SETTLED_S:
            told = True
            print(f"{run.folder.name}: waiting for " + ", ".join(
                f"{size:g} {name}s ({free.get(name, 0):g} free)" for name, size in wanted.items()), flush=True)
        time.sleep(0.5)
    return False


def _require_devices(config: RunConfig, nodes: list[dict[str, float]], gpu: bool, address: str) -> None:
    """Raises ValueError where the workers would wait for devices for ever."""
    wanted, where = config.compute.workers, f"the Ray cluster at {address}" if address else "this machine"
    if config.model.device.startswith("cuda:"):
        raise ValueError(f"model.device: got {config.model.device!r} with compute.workers = {wanted}, expected 'cuda': "
                         "each worker sees its own GPU alone")
    own = _own_gpus(config, gpu) > 0
    for name, each in _per_worker(config, gpu).items():
        has = [node.get(name, 0) for node in nodes]
        room = int(sum(has) // (each + 1)) if own and name == "GPU" else sum(int(n // each) for n in has)
        if wanted > room:
            per = {"GPU": " and its vLLM another one (compute.placement='own')" if own else "",
                   "CPU": " of one node (compute.worker_cpus)"}[name]
            nodes_told = f" on {len(nodes)} nodes" if len(nodes) > 1 else ""
            raise ValueError(f"compute.workers: got {wanted}, expected at most {room}: {where} has {sum(has):g} "
                             f"{name}s{nodes_told}, a worker takes {each:g}{per}")


# ---------------------------------------------------------------------------------------------------------- workers
def _in_worker(told: dict[str, Any]) -> None:
    """The training function of one worker."""
    task: Task = told["task"]
    os.chdir(task.folder)
    os.environ.update(told["environment"])
    sys.path[:] = [*dict.fromkeys([*task.path, *sys.path])]
    import ray.train
    import torch

    if not told["gpu"]:
        torch.set_num_threads(task.config.train.torch_threads or task.config.compute.worker_cpus)
    context = ray.train.get_context()
    work = getattr(importlib.import_module(task.work[0]), task.work[1])
    world = World(context.get_world_rank(), context.get_world_size())
    with contextlib.suppress(Stopped):  # all workers end after the same step
        work(task.config, Run(task.run, task.config), world)
    world.wait()
    if world.first:
        (task.run / LEFT).touch()


def _attempt(task: Task, gpu: bool) -> Exception | None:
    """One `fit`; returns what it raised."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRun
    from ray.train.torch import TorchConfig, TorchTrainer

    logs, left = task.run / "ray", task.run / LEFT
    left.unlink(missing_ok=True)
    trainer = TorchTrainer(
        _in_worker, train_loop_config={
            "task": task, "gpu": gpu,
            "environment": {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=_PATIENCE_S),
        scaling_config=ScalingConfig(num_workers=task.config.compute.workers, use_gpu=gpu,
                                     resources_per_worker=_per_worker(task.config, gpu)),
        run_config=TrainRun(name="train", storage_path=str(logs), failure_config=FailureConfig(max_failures=0)))
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="ray-train")
    thread.start()
    while thread.is_alive() and not left.exists():
        thread.join(0.2)
    left.unlink(missing_ok=True)
    shutil.rmtree(logs, ignore_errors=True)
    return errors[0] if errors else None


# ----------------------------------------------------------------------------------------------------------- errors
def _failures(error: Exception) -> list[BaseException]:
    """What the workers raised, as it was raised, or what Ray says of them."""
    found = list(getattr(error, "worker_failures", {}).values()) or [error]
    return [getattr(failure, "_base_exc", failure) for failure in found]


def _reason_of_loss(error: Exception) -> str | None:
    """One line on the worker, or its vLLM, that went away; None where the program itself failed."""
    import ray.exceptions

    failures, lines = _failures(error), []
    for failure in failures:
        health = getattr(failure, "health_check_failure", None)
        away = isinstance(failure, ray.exceptions.RayError) and not isinstance(failure, ray.exceptions.RayTaskError)
        if health or away or "HealthCheck" in type(failure).__name__:
            lines.append(health or failure)
    if not lines and all(_BROKEN.search(f"{type(e).__name__} {e}") for e in failures):
        lines = failures
    return " ".join(str(lines[0]).split())[:300] if lines else None


def _own(error: Exception) -> BaseException:
    """The error of the program among what the workers raised: no echo of a partner that stopped."""
    failures = _failures(error)
    return next((e for e in failures if not _BROKEN.search(f"{type(e).__name__} {e}")), failures[0])


def main(folder: Path) -> None:
    """Read the task, drive it, write the outcome."""
    task: Task = unpickled(folder / "task")
    os.chdir(task.folder)
    outcome = Outcome()
    try:
        drive(task, folder)
    except Exception as error:
        outcome = Outcome(error)
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)  # noqa: S301 - our own, to see that it travels
    except Exception:  # an exception of the user's that does not travel
        data = pickle.dumps(Outcome(RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}")))
    (folder / "outcome").write_bytes(data)


if __name__ == "__main__":
    from sgpo_lib import ray_driver  # its classes are pickled under that name

    ray_driver.main(Path(sys.argv[1]))
    import ray

    ray.shutdown()

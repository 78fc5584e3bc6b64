"""The same loop on several workers: Ray Train's `TorchTrainer` around `trainer.work`.

    this process            follows metrics.jsonl and hands its rows on, hands a stop on, replaces lost workers
    worker 0 .. n-1         `trainer.work` with its rank; the first one writes the run folder

All of them need the same file system at the same paths: the run folder, the bases, files with problems. Ray comes from
RAY_ADDRESS, or is started here with this machine's devices and ended with the training.

Ray Train counts a mistake in the program like a lost worker, and would repeat it. So each `fit` is one attempt here: a
lost worker leads to another from the newest checkpoint, an error of the program is raised as it was.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sgpo_lib.config import RunConfig
from sgpo_lib.runs import Run, Stopped, stop_requested, write_atomic
from sgpo_lib.world import World

OnRow = Callable[[dict[str, Any]], None]
Work = Callable[[RunConfig, Run, World], None]
CLUSTER_GONE_S = 15.0
"""Seconds without an answer after which the cluster is given up; Ray itself would end this process after a minute."""
_POLL_S = 0.25
_PASSED_ON = ("SGPO_RUNS", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "VLLM_", "WANDB_", "NCCL_", "GLOO_", "TORCH_")
"""Environment variables, or how their names begin, that workers get from here."""
_BROKEN = re.compile(r"connection (closed|reset)|connection was|gloo|nccl|ProcessGroup|DistBackend", re.IGNORECASE)
"""What a worker says whose partner is gone."""


def train_on_ray(work: Work, config: RunConfig, run: Run, on_row: OnRow | None) -> None:
    """Train to the end on `compute.workers` workers. `on_row` is called in this thread, with every row.

    Raises ValueError where it cannot work (no Ray, too few devices), before any work; what a worker raised; Stopped
    where it was asked to stop; RuntimeError where workers are lost again and again, or the cluster is.
    """
    with _connected(config) as cluster:
        _require_devices(config, cluster)
        from sgpo_lib.bases import base_source

        base_source(config.model)  # made once, not by every worker
        stop = run.folder / "STOP"
        stop.unlink(missing_ok=True)
        follower, lost, before = _Follower(run, on_row), 0, _newest(run)
        print(f"{run.folder.name}: {config.compute.workers} workers, from step {before}", file=sys.stderr, flush=True)
        while True:
            error = _attempt(work, config, run, cluster, follower)
            if run.done:
                return
            if error is None:
                stop.unlink(missing_ok=True)
                raise Stopped(f"asked to stop after step {_newest(run)}")
            reason = _reason_of_loss(error)
            if reason is None:
                raise _own(error) from error
            newest = _newest(run)
            lost, before = (lost + 1 if newest == before else 1), newest
            if lost > config.compute.worker_restarts:
                raise RuntimeError(
                    f"a worker was lost {lost} times in a row (compute.worker_restarts = "
                    f"{config.compute.worker_restarts}) without a new checkpoint after step {newest}: {reason}. "
                    "Look for memory (sgpo plan) and at the nodes. The last checkpoint is whole: the same command "
                    "continues")
            print(f"{run.folder.name}: a worker was lost ({reason}); again from step {newest}", file=sys.stderr,
                  flush=True)


# ---------------------------------------------------------------------------------------------------------- workers


def _in_worker(told: dict[str, Any]) -> None:
    """The training function of one worker."""
    os.chdir(told["folder"])
    os.environ.update(told["environment"])
    sys.path[:] = [*dict.fromkeys([*told["path"], *sys.path])]
    import ray.train
    import torch

    config: RunConfig = told["config"]
    if not told["gpu"]:
        torch.set_num_threads(config.train.torch_threads or config.compute.worker_cpus)
    context = ray.train.get_context()
    with contextlib.suppress(Stopped):  # all workers end after the same step
        told["work"](config, Run(told["run"], config), World(context.get_world_rank(), context.get_world_size()))


def _attempt(work: Work, config: RunConfig, run: Run, cluster: _Cluster, follower: _Follower) -> Exception | None:
    """One `fit`; returns what it raised. This thread follows it."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRun
    from ray.train.torch import TorchConfig, TorchTrainer

    told = {"config": config, "run": run.folder.resolve(), "folder": str(Path.cwd()),
            "path": [p for p in sys.path if p], "work": work, "gpu": cluster.gpu,
            "environment": {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}}
    logs = run.folder.resolve() / "ray"
    trainer = TorchTrainer(
        _in_worker, train_loop_config=told,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cluster.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.compute.workers, use_gpu=cluster.gpu,
                                     resources_per_worker=cluster.per_worker),
        run_config=TrainRun(name="train", storage_path=str(logs), failure_config=FailureConfig(max_failures=0)))
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="ray-train")
    thread.start()
    presses = 0
    while thread.is_alive():
        try:
            follower.tell()
            cluster.require_answer(run)
            if stop_requested(run.folder) and not (run.folder / "STOP").exists():  # that of the job
                write_atomic(run.folder / "STOP", "job\n")
            thread.join(_POLL_S)
        except KeyboardInterrupt:
            presses += 1
            if presses > 1:
                raise
            write_atomic(run.folder / "STOP", "interrupt\n")  # the workers end their step and save
    follower.tell()
    shutil.rmtree(logs, ignore_errors=True)
    if presses and not run.done and not errors:
        (run.folder / "STOP").unlink(missing_ok=True)
        raise KeyboardInterrupt
    return errors[0] if errors else None


class _Follower:
    """Hands rows of metrics on as they are written, each once."""

    def __init__(self, run: Run, on_row: OnRow | None):
        self.run, self.on_row = run, on_row
        self._seen: set[tuple[str, int]] = set()
        self._size = -1

    def tell(self) -> None:
        """Call `on_row` with what is new."""
        path = self.run.folder / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if not self.on_row or size == self._size:
            return
        self._size = size
        for row in self.run.metrics():
            key = (row["kind"], row["step"])
            if key not in self._seen:
                self._seen.add(key)
                self.on_row(row)


def _newest(run: Run) -> int:
    """Step of the newest checkpoint; 0 where there is none."""
    found = run.checkpoints()
    return int(found[-1].name.removeprefix("step-")) if found else 0


# ----------------------------------------------------------------------------------------------------------- errors


def _failures(error: Exception) -> list[Exception]:
    return list(getattr(error, "worker_failures", {}).values()) or [error]


def _reason_of_loss(error: Exception) -> str | None:
    """One line on the worker that went away; None where the program itself failed."""
    import ray.exceptions

    lines = []
    for failure in _failures(error):
        health = getattr(failure, "health_check_failure", None)
        gone = isinstance(_own_of(failure), ray.exceptions.RayError)  # the worker, or the vLLM that it sampled with
        if health or gone or "HealthCheck" in type(failure).__name__:
            lines.append(" ".join(str(health or _own_of(failure)).split())[:300])
    if lines:
        return lines[0]
    told = [_own_of(failure) for failure in _failures(error)]
    broken = [e for e in told if isinstance(e, RuntimeError) and _BROKEN.search(f"{type(e).__name__} {e}")]
    return " ".join(str(broken[0]).split())[:300] if broken and len(broken) == len(told) else None


def _own_of(failure: Exception) -> BaseException:
    """What a worker raised, as it was raised."""
    return getattr(failure, "_base_exc", failure)


def _own(error: Exception) -> BaseException:
    """The error of the program among what the workers raised: no echo of a partner that stopped."""
    told = [_own_of(failure) for failure in _failures(error)]
    return next((e for e in told if not _BROKEN.search(f"{type(e).__name__} {e}")), told[0])


# ---------------------------------------------------------------------------------------------------------- cluster


class _Cluster:
    """The Ray cluster that is used, and what a worker takes of it."""

    def __init__(self, address: str, ours: bool, resources: dict[str, float], config: RunConfig):
        self.address, self.ours, self.resources = address, ours, resources
        device = config.model.device
        self.gpu = device.startswith("cuda") or (device == "auto" and resources.get("GPU", 0) > 0)
        self.per_worker = {"CPU": float(config.compute.worker_cpus)} | ({"GPU": 1.0} if self.gpu else {})
        self._heard = time.monotonic()
        self._next = 0.0

    def require_answer(self, run: Run) -> None:
        """Raises RuntimeError where nobody answers at its address any more."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 2
        if answers(self.address):
            self._heard = time.monotonic()
        elif now - self._heard > CLUSTER_GONE_S:
            raise RuntimeError(f"the Ray cluster at {self.address} does not answer any more. The last checkpoint, "
                               f"after step {_newest(run)}, is whole: the same command continues, with a cluster at "
                               "RAY_ADDRESS or without one")


def answers(address: str) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _connected(config: RunConfig) -> Iterator[_Cluster]:
    """The cluster at RAY_ADDRESS, or one on this machine that ends with the block."""
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise ValueError(f"compute.workers: got {config.compute.workers}, which needs Ray Train ({error}). Cure: pip "
                         "install 'sgpo-workbench[ray]', or workers=1") from None
    address, connected = os.environ.get("RAY_ADDRESS", ""), ray.is_initialized()
    if address and not connected and not answers(address.removeprefix("ray://")):
        raise ValueError(f"no Ray cluster at {address} (RAY_ADDRESS). Start one with `ray start --head`, or unset it: "
                         "then Ray starts on this machine alone")
    if not connected:
        _connect(ray, address)
    try:
        at = ray.get_runtime_context().gcs_address
        yield _Cluster(at, not address and not connected, ray.cluster_resources(), config)
    finally:
        if not connected:
            _leave(ray)


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as the next version does; else a warning
    if not address:  # a token of its own, or Ray would leave one in the home folder, which `ray start` then asks for
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    here = {} if address else {"num_cpus": len(os.sched_getaffinity(0))}
    try:
        ray.init(address=address or "local", include_dashboard=None if address else False, log_to_driver=False,
                 logging_level="ERROR", **here)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ValueError(f"no Ray cluster at {address or 'this machine'} ({str(error).splitlines()[0]}). "
                         f"{token_cure(address)}Unset RAY_ADDRESS, and Ray starts on this machine alone") from None


def token_cure(address: str) -> str:
    """What to do about a cluster that asks for a token, where this process would send none; ends with a space."""
    if not address or "RAY_AUTH_MODE" in os.environ:
        return ""
    return "A cluster that was started where ~/.ray/auth_token exists wants it: set RAY_AUTH_MODE=token. "


def _leave(ray: Any) -> None:
    """Disconnect, and end a cluster that was started here; a dead one is not waited for."""
    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(30)


def _require_devices(config: RunConfig, cluster: _Cluster) -> None:
    """Raises ValueError where the workers would wait for devices for ever."""
    wanted, where = config.compute.workers, "this machine" if cluster.ours else f"the Ray cluster at {cluster.address}"
    if config.model.device.startswith("cuda:"):
        raise ValueError(f"model.device: got {config.model.device!r} with compute.workers = {wanted}, expected 'cuda': "
                         "each worker sees its own GPU alone")
    own = cluster.gpu and config.rollout.sampler == "vllm" and config.rollout.placement == "own"
    for name, each in cluster.per_worker.items():
        each += own and name == "GPU"
        there = cluster.resources.get(name, 0)
        if wanted * each > there:
            per = {"GPU": " (rollout.placement='own' takes a second one each)" if own else "",
                   "CPU": f" (compute.worker_cpus = {each:g})"}[name]
            raise ValueError(f"compute.workers: got {wanted}, expected at most {int(there // each)}: {where} has "
                             f"{there:g} {name}s, a worker takes {each:g}{per}")

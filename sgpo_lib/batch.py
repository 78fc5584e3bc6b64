"""Runs a batch: notebooks as jobs on this machine or a cluster, continued where they stopped.

`batch_spec.py` documents the file, `executors/` the engines. One process per job (`sgpo run ... --job FOLDER`), started
in the order of the file when the jobs it needs are done. `runs/jobs/NAME/batch.json` holds the plan for `sgpo status`
and `sgpo report`; how each job ended is read from its folder. A failed job is tried again `retries` times; one that
was stopped (a time limit of the cluster, a node that was lost, a signal) continues as long as it gets anywhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from sgpo_lib.batch_spec import Batch, Job, load_batch
from sgpo_lib.config import unknown
from sgpo_lib.executors.attempts import end, goes_nowhere, make_ready, record_failure, record_no_progress
from sgpo_lib.executors.interface import Ended, EngineLost, Executor, clear_queue, make_order, read_queue
from sgpo_lib.jobs import JobResult, job_key, last_line, place_parameters, read_job, up_to_date
from sgpo_lib.runs import is_locked, locked
from sgpo_lib.storage import clear, write_atomic

HEARTBEAT_S = 15.0
"""Seconds between progress lines while nothing starts or ends."""
AGAIN_S = 5.0
"""Seconds before a job is started again: the kernel of its last attempt has ended by then."""
LET_GO_S = 60.0
"""Seconds more for what still saves its state: a last attempt, or a job that a killed call of the batch left behind."""


def run_batch(spec: Path, parallel: int | None = None, only: Iterable[str] = (), dry_run: bool = False,
              smoke: bool = False, say: Callable[[str], None] = print, engine: str | None = None,
              address: str | None = None, cancel: bool = False) -> bool:
    """Run a batch and return whether every job is done. `only`: these jobs or grids, without what they need.

    A failed job blocks those that need it; the others go on. Jobs that are up to date are skipped, those that a
    cluster still has are taken up. On an interrupt (SIGINT; `sgpo batch` turns SIGTERM into one) jobs of this machine
    are ended, those of a cluster left alone, and the call raises KeyboardInterrupt; a second call continues.
    `dry_run` prints the plan, `cancel` ends what an earlier call left on the cluster; both start nothing.
    `address`: the Ray cluster. Raises ValueError for a specification with faults and for what the engine cannot give,
    RuntimeError when the batch is already running elsewhere.
    """
    batch = load_batch(spec, parallel, smoke, engine)
    chosen = set(only)
    for name in chosen - {n for j in batch.jobs for n in (j.name, j.group)}:
        raise unknown("job", name, (n for j in batch.jobs for n in (j.name, j.group)))
    jobs = [j for j in batch.jobs if not chosen or chosen & {j.name, j.group}]
    executor = make_executor(batch.engine, address)
    if cancel:
        ended = executor.cancel([make_order(batch, j, batch.engine) for j in jobs])
        say(f"{batch.name}: cancelled {', '.join(ended)}" if ended else f"{batch.name}: no job of it is on a cluster")
        return True
    if dry_run:
        _print_plan(batch, jobs, executor, say)
    faults = executor.check(jobs)
    if faults:
        raise ValueError(f"{spec}: nothing was started\n  " + "\n  ".join(faults))
    if dry_run:
        return True
    with locked(batch.folder):
        clear(batch.folder)
        return _Runner(batch, jobs, executor, say).run()


def make_executor(engine: str, address: str | None = None) -> Executor:
    """The engine of a name. Raises ValueError where its package is not installed, or its cluster is not there."""
    if engine == "slurm":
        from sgpo_lib.executors.slurm import SlurmExecutor

        return SlurmExecutor()
    if engine == "ray":
        from sgpo_lib.executors.ray_engine import RayExecutor

        return RayExecutor(address)
    from sgpo_lib.executors.local import LocalExecutor

    return LocalExecutor()


def _up_to_date(batch: Batch, job: Job) -> bool:
    key = job_key(job.notebook, place_parameters(job.notebook, job.parameters), (batch.folder / n for n in job.after))
    return up_to_date(batch.folder / job.name, key)


def _print_plan(batch: Batch, jobs: list[Job], executor: Executor, say: Callable[[str], None]) -> None:
    current: set[str] = set()
    for j in jobs:
        if _up_to_date(batch, j) and all(n in current or n not in {k.name for k in jobs} for n in j.after):
            current.add(j.name)
        say(f"{j.name}: {j.notebook.name} {j.parameters}" + (f" after {', '.join(j.after)}" if j.after else "")
            + (", up to date" if j.name in current else ""))
        if asked := executor.describe(j):
            say(f"    {asked}")
    limit = f"{batch.parallel} at a time" if batch.parallel < 10**6 else "as many at a time as it takes"
    say(f"{len(jobs)} jobs on {batch.engine}, {limit}, {len(current)} up to date, into {batch.folder}. "
        "Nothing was started")


class _Runner:
    """State of a running batch: which jobs wait, run, are done, failed or blocked."""

    def __init__(self, batch: Batch, jobs: list[Job], executor: Executor, say: Callable[[str], None]):
        self.batch, self.executor, self.say, self.start = batch, executor, say, time.time()
        self.jobs = {j.name: j for j in jobs}
        self.waiting = {j.name: self.start for j in jobs}  # time before which it is not started
        self.running: set[str] = set()
        self.ended: dict[str, JobResult] = {}
        self.blocked: dict[str, str] = {}
        self.due: set[str] = set()  # free to start and known not to be up to date
        self.failures = dict.fromkeys(self.jobs, 0)

    def folder(self, name: str) -> Path:
        return self.batch.folder / name

    def run(self) -> bool:
        """Start, watch and account for every job."""
        self._write_plan()
        where = "" if self.executor.name == "local" else f" on {self.executor.name}"
        limit = f", {self.batch.parallel} at a time" if self.batch.parallel < 10**6 else ""
        self.say(self._line(f"{self.batch.name}: {len(self.jobs)} jobs{where}{limit}"))
        try:
            self._attach()
            self._loop()
        except EngineLost as lost:
            self._lost(lost)
        finally:
            if self.running:
                self.say(self._line(f"interrupted; {self.executor.leave(sorted(self.running))}"))
            self._write_plan()
        return self._finish()

    def _loop(self) -> None:
        beat = time.time()
        while self.waiting or self.running:
            if self._reap() | self._start():
                beat = time.time()
            elif time.time() - beat > HEARTBEAT_S:
                self.say(self._line("; ".join(f"{n}: {self._news(n)}" for n in self.jobs if n in self.running)))
                beat = time.time()
            if self.waiting or self.running:
                time.sleep(0.2)

    def _news(self, name: str) -> str:
        if read_job(self.folder(name)).state == "running":
            return last_line(self.folder(name)) or "starting"
        return read_queue(self.folder(name)).get("note") or "starting"

    def _attach(self) -> None:
        """Take up the jobs that an earlier call left on the cluster."""
        for name, job in self.jobs.items():
            if self.executor.attach(make_order(self.batch, job, self.batch.engine)):
                del self.waiting[name]
                self.running.add(name)
                self.say(self._line(f"{name}: still there, {read_queue(self.folder(name)).get('note', '')}"))

    def _start(self) -> bool:
        """Start what may start; skip what is up to date; block what cannot. True where something changed."""
        changed = False
        for job in [j for j in self.jobs.values() if j.name in self.waiting]:
            full = len(self.running) >= self.batch.parallel or not self.executor.room(job)
            if self._too_early(job.name) or (job.name in self.due and full):
                continue
            bad = [n for n in job.after if n in self.blocked or (n in self.ended and self.ended[n].state != "done")]
            if any(n in self.waiting or n in self.running for n in job.after) and not bad:
                continue
            if not bad:
                bad = [n for n in job.after if n not in self.jobs and read_job(self.folder(n)).state != "done"]
            if bad:
                self._block(job.name, f"needs {', '.join(bad)}, which did not finish")
            elif job.name not in self.due and _up_to_date(self.batch, job):
                del self.waiting[job.name]
                self.ended[job.name] = replace(read_job(self.folder(job.name)), fresh=False)
                self.say(self._line(f"{job.name}: up to date"))
            elif not full:
                self._submit(job)
            else:
                self.due.add(job.name)
                continue
            changed = True
        return changed

    def _too_early(self, name: str) -> bool:
        """Whether another process may still be at work for a job."""
        since = time.time() - self.waiting[name]
        return since < 0 or (since < LET_GO_S and is_locked(self.folder(name)))

    def _submit(self, job: Job) -> None:
        del self.waiting[job.name]
        self.running.add(job.name)
        make_ready(self.folder(job.name))
        try:
            where = self.executor.submit(make_order(self.batch, job, self.batch.engine))
        except ValueError as error:  # the cluster does not take it: this job alone has failed
            record_failure(self.folder(job.name), "not accepted", str(error))
            self._account(job.name, Ended("failed", str(error)))
        else:
            self.say(self._line(f"{job.name}: started {where}".rstrip()))

    def _block(self, name: str, reason: str) -> None:
        del self.waiting[name]
        self.blocked[name] = reason
        self._write_plan()
        self.say(self._line(f"{name}: blocked, {reason}"))

    def _reap(self) -> bool:
        """Account for attempts that ended. True where there were any."""
        over = self.executor.poll()
        for name, ended in over.items():
            self._account(name, ended)
        return bool(over)

    def _account(self, name: str, ended: Ended) -> None:
        """Done, failed for good, or started again."""
        folder = self.folder(name)
        self.running.remove(name)
        end(folder, ended)
        clear_queue(folder)
        if ended.how == "stopped":
            if not goes_nowhere(folder):
                self._again(name, f"stopped ({ended.reason[:200]}), goes on")
                return
            ended = record_no_progress(folder)
        if ended.how == "failed" and self.failures[name] < self.jobs[name].retries:
            self.failures[name] += 1
            self._again(name, f"FAILED, {ended.reason[:300]}, tried again "
                              f"({self.failures[name]} of {self.jobs[name].retries})")
            return
        result = self.ended[name] = read_job(folder)
        how = f"done in {result.seconds:.0f} s" if result.state == "done" else f"FAILED, {result.reason[:300]}"
        self.say(self._line(f"{name}: {how}"))

    def _again(self, name: str, what: str) -> None:
        self.waiting[name] = time.time() + AGAIN_S
        self.due.add(name)
        self.say(self._line(f"{name}: {what}"))

    def _lost(self, lost: EngineLost) -> None:
        """The cluster went away: what ran on it has failed where it is gone too, what waited is blocked."""
        self.say(self._line(str(lost)))
        for name in sorted(self.running):
            self.running.remove(name)
            if lost.fatal:
                record_failure(self.folder(name), "cluster lost", str(lost))
                end(self.folder(name), Ended("failed", str(lost)))
                clear_queue(self.folder(name))
                self.ended[name] = read_job(self.folder(name))
            else:
                self.blocked[name] = str(lost)
        for name in list(self.waiting):
            self._block(name, str(lost))

    def _finish(self) -> bool:
        failed = [n for n, r in self.ended.items() if r.state != "done"]
        fresh = sum(r.fresh for r in self.ended.values())
        minutes = (time.time() - self.start) / 60
        if failed or self.blocked:
            self.say(self._line(f"{self.batch.name}: {len(failed)} failed ({', '.join(failed)}), "
                                f"{len(self.blocked)} blocked. Logs: {self.batch.folder}/JOB/log.txt"))
        else:
            self.say(self._line(f"{self.batch.name}: all {len(self.jobs)} jobs are done, " + (
                f"{fresh} of them now, in {minutes:.1f} minutes" if fresh else "up to date: nothing to do")))
        return not failed and not self.blocked

    def _line(self, text: str) -> str:
        done = sum(r.state == "done" for r in self.ended.values())
        return f"[{time.strftime('%H:%M:%S')}] {done}/{len(self.jobs)} done, {len(self.running)} running | {text}"

    def _write_plan(self) -> None:
        rows = [{"name": j.name, "notebook": j.notebook.name, "parameters": j.parameters, "after": j.after,
                 "blocked": self.blocked.get(j.name, "")} for j in self.batch.jobs]
        write_atomic(self.batch.folder / "batch.json", json.dumps({"name": self.batch.name, "jobs": rows}, default=str))

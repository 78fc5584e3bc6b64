"""Runs a batch: notebooks as parallel processes on this machine, continued where they stopped.

`batch_spec.py` documents the file. One process per job (`sgpo run ... --job FOLDER`), started in the order of the file
when the jobs it needs are done. `runs/jobs/NAME/batch.json` holds the plan for `sgpo status` and `sgpo report`; how
each job ended is read from its folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from sgpo_lib.batch_spec import Batch, Job, load_batch
from sgpo_lib.config import unknown
from sgpo_lib.jobs import JobResult, job_key, last_line, place_parameters, read_job, up_to_date
from sgpo_lib.runs import locked, write_atomic

HEARTBEAT_S = 15.0
"""Seconds between progress lines while nothing starts or ends."""
STOP_S = 15.0
"""Seconds that a job gets to end after SIGTERM, before it is killed."""


def run_batch(spec: Path, parallel: int | None = None, only: Iterable[str] = (), dry_run: bool = False,
              smoke: bool = False, say: Callable[[str], None] = print) -> bool:
    """Run a batch and return whether every job is done. `only`: these jobs or grids, without what they need.

    A failed job blocks those that need it; the others go on. Jobs that are up to date are skipped. On an interrupt
    (SIGINT; `sgpo batch` turns SIGTERM into one) the running jobs are ended and the call raises KeyboardInterrupt; a
    second call continues. Raises ValueError for a specification with faults and RuntimeError when the batch is
    already running elsewhere.
    """
    batch = load_batch(spec, parallel, smoke)
    chosen = set(only)
    for name in chosen - {n for j in batch.jobs for n in (j.name, j.group)}:
        raise unknown("job", name, (n for j in batch.jobs for n in (j.name, j.group)))
    jobs = [j for j in batch.jobs if not chosen or chosen & {j.name, j.group}]
    if dry_run:
        for j in jobs:
            say(f"{j.name}: {j.notebook.name} {j.parameters}" + (f" after {', '.join(j.after)}" if j.after else ""))
        say(f"{len(jobs)} jobs, {batch.parallel} at a time, into {batch.folder}. Nothing was started")
        return True
    with locked(batch.folder):
        return _Runner(batch, jobs, say).run()


class _Runner:
    """State of a running batch: which jobs wait, run, are done, failed or blocked."""

    def __init__(self, batch: Batch, jobs: list[Job], say: Callable[[str], None]):
        self.batch, self.say, self.start = batch, say, time.time()
        self.jobs = {j.name: j for j in jobs}
        self.waiting = dict(self.jobs)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.ended: dict[str, JobResult] = {}
        self.blocked: dict[str, str] = {}
        self.due: set[str] = set()  # free to start and known not to be up to date

    def folder(self, name: str) -> Path:
        return self.batch.folder / name

    def run(self) -> bool:
        """Start, watch and account for every job."""
        self._write_plan()
        self.say(self._line(f"{self.batch.name}: {len(self.jobs)} jobs, {self.batch.parallel} at a time"))
        beat = time.time()
        try:
            while self.waiting or self.running:
                if self._reap() | self._start():
                    beat = time.time()
                elif time.time() - beat > HEARTBEAT_S:
                    self.say(self._line("; ".join(f"{n}: {last_line(self.folder(n)) or 'starting'}"
                                                  for n in self.running)))
                    beat = time.time()
                if self.running:
                    time.sleep(0.2)
        finally:
            self._stop()
            self._write_plan()
        return self._finish()

    def _start(self) -> bool:
        """Start what may start; skip what is up to date; block what cannot. True where something changed."""
        changed = False
        for job in list(self.waiting.values()):
            if job.name in self.due and len(self.running) >= self.batch.parallel:
                continue
            bad = [n for n in job.after if n in self.blocked or (n in self.ended and self.ended[n].state != "done")]
            if any(n in self.waiting or n in self.running for n in job.after) and not bad:
                continue
            if not bad:
                bad = [n for n in job.after if n not in self.jobs and read_job(self.folder(n)).state != "done"]
            if bad:
                del self.waiting[job.name]
                self.blocked[job.name] = f"needs {', '.join(bad)}, which did not finish"
                self._write_plan()
                self.say(self._line(f"{job.name}: blocked, {self.blocked[job.name]}"))
            elif job.name not in self.due and self._up_to_date(job):
                del self.waiting[job.name]
                self.ended[job.name] = JobResult(**{**vars(read_job(self.folder(job.name))), "fresh": False})
                self.say(self._line(f"{job.name}: up to date"))
            elif len(self.running) < self.batch.parallel:
                del self.waiting[job.name]
                self.running[job.name] = self._process(job)
                self.say(self._line(f"{job.name}: started"))
            else:
                self.due.add(job.name)
                continue
            changed = True
        return changed

    def _up_to_date(self, job: Job) -> bool:
        key = job_key(job.notebook, place_parameters(job.notebook, job.parameters), map(self.folder, job.after))
        return up_to_date(self.folder(job.name), key)

    def _process(self, job: Job) -> subprocess.Popen[bytes]:
        folder = self.folder(job.name)
        folder.mkdir(parents=True, exist_ok=True)
        for old in ("DONE", "FAILED.json", "log.txt"):
            (folder / old).unlink(missing_ok=True)
        command = [sys.executable, "-m", "sgpo_lib.cli", "run", str(job.notebook), "--job", str(folder), "--quiet",
                   *(a for n in job.after for a in ("--after", str(self.folder(n)))),
                   *(a for n, v in job.parameters.items() for a in ("-p", f"{n}={_flow(v)}"))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), **job.env}
        with (folder / "process.txt").open("wb") as output:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                    env=environment, start_new_session=True)

    def _reap(self) -> bool:
        """Account for processes that ended. True where there were any."""
        over = [(n, p.returncode) for n, p in self.running.items() if p.poll() is not None]
        for name, code in over:
            del self.running[name]
            result = read_job(self.folder(name))
            if result.state not in ("done", "failed"):  # killed from outside, or it never came as far as the notebook
                lines = (self.folder(name) / "process.txt").read_text(encoding="utf-8", errors="replace").split("\n")
                why = " ".join([s for s in lines if s.strip()][-3:])[-400:]
                record = {"cell": None, "error": f"process ended with code {code}", "message": why or "no output"}
                write_atomic(self.folder(name) / "FAILED.json", json.dumps(record))
                result = read_job(self.folder(name))
            self.ended[name] = result
            how = f"done in {result.seconds:.0f} s" if result.state == "done" else f"FAILED, {result.reason[:300]}"
            self.say(self._line(f"{name}: {how}"))
        return bool(over)

    def _stop(self) -> None:
        """End the processes that still run (after an interrupt): SIGTERM to their groups, then SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.running.values():
                if process.poll() is None:
                    os.killpg(process.pid, number)
            deadline = time.time() + STOP_S
            while any(p.poll() is None for p in self.running.values()) and time.time() < deadline:
                time.sleep(0.1)
        if self.running:
            self.say(self._line(f"interrupted; ended {', '.join(self.running)}. The same command continues"))

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


def _flow(value: Any) -> str:
    """A value as one line of YAML, as `sgpo run -p` reads it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True).removesuffix("...\n").strip()

"""What the tests of clusters work on: the daemons of Slurm and Ray, batches as processes, runs to compare."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import psutil
import yaml
from servers import free_port

from sgpo_lib.runs import CLOCK_PREFIXES, Run, load_run

SMALL = {"n_test": 5, "n_validation": 4, "eval_every": 0, "save_every": 3}
PATIENCE_S = 150
WITH_ME = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
"""Put before a command: it ends with this process, however that ends."""


def wait_for(there: Callable[[], Any], what: str, patience: float = PATIENCE_S) -> Any:
    """The first true value of `there`; fails the test after `patience` seconds."""
    deadline = time.time() + patience
    while time.time() < deadline:
        if found := there():
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {patience} s for: {what}")


def write_notebook(folder: Path, name: str, *cells: str) -> None:
    """A small notebook with one parameter."""
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell("seconds = 0.0", metadata={"tags": ["parameters"]}),
                *(nbformat.v4.new_code_cell(c) for c in cells)]
    nbformat.write(nb, folder / f"{name}.ipynb")


def root_of_runs(folder: Path, runs_folder: Path) -> Path:
    """A runs root of its own in a folder, with the bases of the session."""
    root = folder / "runs"
    root.mkdir(exist_ok=True)
    if not (root / "bases").exists():
        (root / "bases").symlink_to(runs_folder / "bases")
    return root


class Batch:
    """A batch file with its runs root, and `sgpo` on it as a process of its own."""

    def __init__(self, folder: Path, root: Path, jobs: Mapping[str, Any], *, name: str = "b", engine: str = "local",
                 env: Mapping[str, str] | None = None, **defaults: Any):
        self.root, self.name = root, name
        self.spec = folder / f"{name}.yaml"
        self.spec.write_text(yaml.safe_dump({"name": name, "engine": engine, "defaults": defaults, "jobs": dict(jobs)},
                                            sort_keys=False))
        self.env = {**os.environ, "SGPO_RUNS": str(root), **(env or {})}

    @staticmethod
    def full(method: str, seed: int) -> dict[str, Any]:
        """A run of six steps by notebook 06."""
        return {"notebook": "06_full_run", "parameters": {"profile": "tiny", "method": method, "seed": seed, "steps": 6,
                                                          "overrides": SMALL}}

    @staticmethod
    def sweep() -> dict[str, Any]:
        """The base by one job, two methods with two seeds each, their comparison."""
        first, full = Batch.full("sgpo", 9), Batch.full("sgpo", 0)
        del full["parameters"]["method"], full["parameters"]["seed"]
        first["parameters"]["steps"] = 1
        grid = {"method": ["sgpo", "sft_grpo"], "seed": [0, 1]}
        return {"base": first, "full": {**full, "after": "base", "grid": grid},
                "compare": {"notebook": "07_compare_runs", "parameters": {"profile": "tiny"}, "after": "full"}}

    def job(self, name: str) -> Path:
        return self.root / "jobs" / self.name / name

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`sgpo batch` on the file; its output in one pipe."""
        command = [sys.executable, "-m", "sgpo_lib.cli", "batch", str(self.spec), *arguments]
        self.driver = subprocess.Popen(command, text=True, env=self.env, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT)
        return self.driver

    def wait_for(self, there: Callable[[], Any], what: str) -> Any:
        """`wait_for`, while the batch runs."""
        def alive() -> Any:
            found = there()
            assert found or self.driver.poll() is None, self.driver.communicate()[0]
            return found
        return wait_for(alive, what)

    def wait_for_job(self, name: str) -> psutil.Process:
        """The `sgpo run` of a job, when it is there."""
        self.wait_for((self.job(name) / ".owner").exists, f"job {name}")
        return self.process(name)

    def run(self, *arguments: str) -> int:
        """The same to its end; the output is kept in `said`."""
        return self.end(self.start(*arguments))

    def end(self, process: subprocess.Popen[str], number: int | None = None) -> int:
        """Send a signal, where one is given, and wait for the end."""
        if number is not None:
            process.send_signal(number)
        self.said = process.communicate(timeout=2 * PATIENCE_S)[0]
        print(self.said)
        return process.returncode

    def status(self) -> dict[str, str]:
        """Job -> its line in `sgpo status`."""
        text = subprocess.run([sys.executable, "-m", "sgpo_lib.cli", "status", self.name], env=self.env, text=True,
                              capture_output=True, check=True).stdout
        lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
        return {words[0]: words[1] for words in reversed(lines) if len(words) > 1}

    def attempts(self, name: str) -> list[dict[str, Any]]:
        path = self.job(name) / "attempts.json"
        return json.loads(path.read_text()) if path.exists() else []

    def compared(self) -> dict[str, int]:
        """Method -> runs of it that the job `compare` (notebook 07) read into its main world, as it printed them."""
        lines = (self.job("compare") / "log.txt").read_text().splitlines()
        main = next(line for line in lines if line.startswith("main world: ")).removeprefix("main world: ")
        row = next(line for line in lines if line.startswith(f"{main} {{"))
        return ast.literal_eval(row.removeprefix(main).strip())

    def failure(self, name: str) -> str:
        record = json.loads((self.job(name) / "FAILED.json").read_text())
        return f"{record['error']}: {record['message']}"

    def process(self, name: str) -> psutil.Process:
        """The `sgpo run` of a job, named by the lock of its folder."""
        return psutil.Process(int((self.job(name) / ".owner").read_text().split()[1]))

    def run_of(self, method: str, seed: int) -> Run | None:
        found = [p.parent for p in self.root.glob(f"tiny-{method}-s{seed}-*/config.yaml")]
        return load_run(found[0]) if found else None

    def wait_for_step(self, method: str, seed: int, step: int) -> None:
        def there() -> bool:
            run = self.run_of(method, seed)
            return run is not None and any(r["step"] >= step for r in run.metrics("train"))
        self.wait_for(there, f"step {step} of {method}, seed {seed}")


def timeless(run: Run) -> list[dict[str, Any]]:
    """The rows of a run without what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK_PREFIXES)} for row in run.metrics()]


def assert_same_run(run: Run | None, other: Run | None) -> None:
    """Two runs have the same metrics, weights and final numbers."""
    assert run is not None and other is not None and run.done and other.done
    assert timeless(run) == timeless(other)
    assert {k: run.summary[k] for k in ("weights", "test", "steps")} == {
        k: other.summary[k] for k in ("weights", "test", "steps")}


class SlurmWorld:
    """munged, slurmctld and two slurmd (nodes n1 and n2 of four CPUs each), in a folder under the temporary one."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        for name in ("state", "n1", "n2"):
            (self.folder / name).mkdir()
        (self.folder / "key").write_bytes(os.urandom(1024))
        (self.folder / "key").chmod(0o600)
        here, user = self.folder, psutil.Process().username()
        ports = {node: free_port() for node in ("n1", "n2")}
        nodes = "\n".join(f"NodeName={n} NodeHostname=localhost NodeAddr=127.0.0.1 Port={p} CPUs=4 RealMemory=4000"
                          for n, p in ports.items())
        (here / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={here}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
PartitionName=small Nodes=n2 MaxTime=10 State=UP
""")  # cred_expire is also how long a job that is queued again waits
        self.env = {"SLURM_CONF": str(here / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmWorld:
        here = self.folder
        sbin = [*os.environ["PATH"].split(":"), "/usr/sbin"]
        self._start([shutil.which("munged", path=":".join(sbin)), "--foreground", f"--key-file={here}/key",
                     f"--socket={here}/munge.socket", f"--pid-file={here}/munged.pid", f"--log-file={here}/munged.log",
                     f"--seed-file={here}/seed"])
        try:
            wait_for((here / "munge.socket").exists, "munged", 30)
            self._start([shutil.which("slurmctld", path=":".join(sbin)), "-D"])
            for node in ("n1", "n2"):
                self._start([shutil.which("slurmd", path=":".join(sbin)), "-D", "-N", node])
            wait_for(lambda: self.ask("sinfo", "-h", "-N", "-o", "%N %T").count("idle") >= 2, "idle nodes", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, command: Sequence[str | None]) -> None:
        with (self.folder / "daemons.txt").open("ab") as output:
            self._daemons.append(subprocess.Popen([*WITH_ME, *(c for c in command if c)], stdout=output, stderr=output,
                                                  env=os.environ | self.env))

    def ask(self, *command: str) -> str:
        """What a command of Slurm says."""
        return subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, check=False).stdout

    def id_of(self, batch: Batch, name: str) -> str:
        return json.loads((batch.job(name) / "queue.json").read_text())["id"]

    def __exit__(self, *_: Any) -> None:
        if len(self._daemons) > 1:
            self.ask("scancel", "--state=PENDING"), self.ask("scancel", "--full", "--signal=KILL", "--state=RUNNING")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class RayWorld:
    """A Ray head with two CPUs, without a dashboard."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.folder = tempfile.mkdtemp(prefix="ray-")
        self.left: list[psutil.Process] = []

    def __enter__(self) -> RayWorld:
        for patience in (2, 1, 0):
            try:
                self._start()
                return self
            except AssertionError:  # Ray gives a node 30 s to start, which a busy machine may not manage
                if not patience:
                    raise
        return self

    def _start(self) -> None:
        log = Path(self.folder, "head.txt")
        self.process = subprocess.Popen(
            [*WITH_ME, str(Path(sys.executable).with_name("ray")), "start", "--head", "--node-ip-address=127.0.0.1",
             f"--port={self.port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--block",
             f"--temp-dir={self.folder}"], stdout=log.open("w"),
            stderr=subprocess.STDOUT)
        wait_for(lambda: "Ray runtime started" in log.read_text() or self.process.poll() is not None, "a Ray head", 120)
        assert self.process.poll() is None, log.read_text()

    def kill(self) -> None:
        """The cluster's own processes go at once, as with its machine."""
        head = psutil.Process(self.process.pid)
        self.left = [p for p in head.children(recursive=True) if p.name() not in ("gcs_server", "raylet")]
        for process in [head, *(p for p in head.children(recursive=True) if p not in self.left)]:
            process.kill()
        self.process.wait()

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.kill()
        for process in self.left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

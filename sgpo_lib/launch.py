"""Executes a notebook headless with Papermill, in a job folder (see jobs.py).

The kernel is the interpreter that runs this code, whatever kernelspec `python3` resolves to on the search path, and
its working directory is the notebook's folder, as in JupyterLab. Printed lines reach log.txt as they come. What is
done about a job that is asked to stop, takes too long or dies is in execution.py and endings.py. Papermill and Jupyter
are imported when a notebook is executed, not before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from sgpo_lib import endings
from sgpo_lib.escaping import visible
from sgpo_lib.jobs import JobResult, find_notebook, job_key, load_notebook, place_parameters, read_job, up_to_date
from sgpo_lib.pages import KL_PAGE, PLOTLY_TAG, notebook_html, put_plotly
from sgpo_lib.redaction import Redactor
from sgpo_lib.runs import locked
from sgpo_lib.storage import DiskFull, clear, disk_full, write_atomic

if TYPE_CHECKING:
    from sgpo_lib.execution import Control

KERNEL_START_S = 180
"""Seconds until a kernel that does not answer is given up (a busy machine takes its time)."""
IOPUB_S = 120
"""Seconds to wait for a finished cell's last output; nbclient's 4 fail cells on a busy machine."""
AUTOSAVE_S = 20
"""Seconds between saves of the executed copy while a cell prints."""
GRACE_S, TERM_GRACE_S = 120.0, 10.0
"""Seconds from SIGUSR1 to the kernel's interrupt, and at most from SIGTERM, which is followed by SIGKILL elsewhere."""
SOCKET_FOLDER_MAX = 70
"""Characters of a folder for sockets: the kernel allows 107 for a socket's whole path, and 22 are added to it."""
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class LogWriter:
    """A text file to which the notebook's output goes line by line, flushed at once, and optionally a terminal.

    A line that a progress bar rewrites with carriage returns is kept in its last form; secrets are replaced, colours
    dropped, and what else would steer a terminal stands as a code.
    """

    def __init__(self, file: TextIO, echo: TextIO | None, prefix: str, redact: Callable[[str], str]):
        self._file, self._echo, self._prefix, self._redact, self._open = file, echo, prefix, redact, ""

    def write(self, text: str) -> int:
        """Take text; complete lines are written."""
        *lines, self._open = (self._open + text).split("\n")
        for line in lines:
            self._line(line)
        return len(text)

    def flush(self) -> None:
        """Nothing to do: lines are flushed as they are written."""

    def close(self) -> None:
        """Write what is left of an unfinished line."""
        if self._open:
            self._line(self._open)
            self._open = ""

    def _line(self, line: str) -> None:
        shown = visible(self._redact(_ANSI.sub("", line.rstrip("\r").rpartition("\r")[2])))
        with contextlib.suppress(OSError):  # a full disk ends no run: the line waits in the file's buffer
            self._file.write(shown + "\n")
            self._file.flush()
        if self._echo:
            self._echo.write(f"{self._prefix}{shown}\n")
            self._echo.flush()


def run_notebook(notebook: str | Path, parameters: Mapping[str, Any], job: Path, *, after: Sequence[Path] = (),
                 echo: TextIO | None = None, force: bool = False, time_limit: float | None = None,
                 grace: float | None = None) -> JobResult:
    """Execute a notebook with parameters into a job folder, unless it is up to date there.

    `after`: job folders whose results this one builds on. `echo`: stream that also gets the printed lines.
    `time_limit`: seconds of the whole execution. Raises ValueError before any work for a notebook or parameter that
    does not exist, or a folder with the job of another notebook (unless `force`); RuntimeError when another process
    works in the folder. An error inside the notebook, a kernel that dies or the time limit is recorded in FAILED.json
    and returned as state `failed`.

    SIGUSR1 and SIGTERM (in the main thread) ask it to stop: after a training step, or at an interrupt of the kernel
    `grace` seconds later (default GRACE_S; SIGTERM at most TERM_GRACE_S). It is then `stopped`: neither DONE nor
    FAILED.json is there, and the same call continues. Ctrl-C interrupts the kernel at once, and KeyboardInterrupt is
    raised when it has ended.
    """
    path, job = find_notebook(notebook), job.resolve()
    placed = place_parameters(path, parameters)
    key = job_key(path, placed, after)
    if not force and up_to_date(job, key):
        result = read_job(job)
        return JobResult(**{**vars(result), "fresh": False})
    if not force:
        _require_own(job, path)
    with locked(job):
        clear(job)
        for old in ("DONE", "FAILED.json", "runs.txt", "STOP", KL_PAGE):
            (job / old).unlink(missing_ok=True)
        write_atomic(job / "parameters.yaml", yaml.safe_dump(
            {"notebook": path.name, "path": str(path), "parameters": placed}, sort_keys=False, allow_unicode=True))
        from sgpo_lib.execution import Control

        start, redact, control = time.time(), Redactor(), Control(job, time_limit)
        with _signals(control, GRACE_S if grace is None else grace):
            with _log_file(job) as file:
                log, raw = (LogWriter(file, echo, f"{job.name}: ", redact) for _ in range(2))
                failure = _execute(path, placed, control, log, raw, redact)
                ended = not control.finished and not failure
                if failure:
                    log.write(f"\nFAILED {failure['error']}: {failure['message']}\n{failure.get('cure', '')}\n")
                elif ended:
                    log.write(f"\nstopped ({control.why or 'STOP'}). The same command continues\n")
                raw.close()
                log.close()
            unwritten = _write_page(job)  # of a failed job too
            failure = failure or unwritten
            told = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": round(time.time() - start, 1),
                    "host": socket.gethostname(), "key": key}
            if not ended:
                (job / "STOP").unlink(missing_ok=True)  # it came too late
                record = json.dumps(redact.nested({**(failure or {}), **told}), indent=1)
                write_atomic(job / ("FAILED.json" if failure else "DONE"), record)
    if ended and control.why == "interrupt":
        raise KeyboardInterrupt
    return read_job(job)


def _require_own(job: Path, notebook: Path) -> None:
    """Raises ValueError where the folder holds a job of another notebook, whose files would be replaced."""
    there = read_job(job).notebook
    if there and there != notebook.name:
        raise ValueError(f"{job} holds the job of {there}, expected {notebook.name} or nothing. Take another folder "
                         "(--job) or job name, delete this one, or replace it with --force")


def _execute(path: Path, placed: dict[str, Any], control: Control, log: LogWriter, raw: LogWriter,
             redact: Redactor) -> dict[str, Any] | None:
    """Run Papermill. Returns what FAILED.json is to tell; None where it finished or was stopped."""
    import papermill

    from sgpo_lib.execution import ENGINE

    executed, kills = control.job / "notebook.ipynb", endings.oom_kills()
    failure: dict[str, Any] | None = None
    try:  # what an earlier execution left is not shown as ours
        write_atomic(executed, json.dumps(redact.nested(load_notebook(path)), indent=1))
        with control, _this_python() as manager, _environ(PLOTLY_RENDERER="plotly_mimetype",
                                                          SGPO_JOB=str(control.job)):
            papermill.execute_notebook(
                _literal(path), None, parameters=placed, engine_name=ENGINE, kernel_name="python3", language="python",
                cwd=str(path.parent), progress_bar=False, start_timeout=KERNEL_START_S, iopub_timeout=IOPUB_S,
                stdout_file=log, stderr_file=log, kernel_manager_class=manager, autosave_cell_every=AUTOSAVE_S,
                control=control, redact=redact, raw=raw)
    except papermill.PapermillExecutionError as error:
        failure = {**endings.of_cell(error.ename, _ANSI.sub("", error.evalue)),
                   "traceback": redact(_ANSI.sub("", "\n".join(error.traceback)))[-8000:]}
        if not control.finished:
            _mark_error(executed, error)
    except Exception as error:  # a remote engine enters here: kernel that dies, does not start, loses its sockets
        failure = {"error": type(error).__name__, "message": str(error)}
        if failure["error"] == "DeadKernelError" or failure["message"].startswith("Kernel died"):
            status = control.kernel.poll() if control.kernel else None
            failure = endings.of_kernel(status, endings.oom_kills() > kills)
    _trust(executed)
    if control.finished and not (failure and failure["error"] == DiskFull.__name__):
        return None  # an error that a cell tagged `raises-exception` shows on purpose
    if control.why == "time limit":
        failure = {**endings.of_time_limit(control.time_limit or 0.0), **{k: v for k, v in (failure or {}).items()
                                                                         if k in ("traceback", "kernel_status")}}
    elif control.interrupted or (failure and failure["error"] == "Stopped") or (
            control.why and (not failure or failure["error"] == "DeadKernelError")):
        return None  # it ended because it was asked to
    if not failure:  # SystemExit is the only error that Papermill passes over
        failure = endings.of_sentinel() if control.answered else endings.of_cell("SystemExit", "")
    return {"cell": _code_cell(executed), **failure}


@contextlib.contextmanager
def _log_file(job: Path) -> Iterator[TextIO]:
    file = (job / "log.txt").open("w", encoding="utf-8")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # a full disk: what else could not be written tells
            file.close()


def _write_page(job: Path) -> dict[str, Any] | None:
    """Write the executed notebook as a page. Returns the failure where the disk is full."""
    page = notebook_html(job / "notebook.ipynb")
    try:
        if PLOTLY_TAG in page:
            put_plotly(job, link=True)
        write_atomic(job / "report.html", page)
    except OSError as error:
        full = disk_full(error, job, len(page.encode("utf-8")))
        if full is None:
            raise
        return {"error": DiskFull.__name__, "message": str(full)}
    return None


def _mark_error(executed: Path, error: Any) -> None:
    """Papermill's note at the top of a failed notebook, with a link to the cell."""
    import nbformat
    from papermill.execute import ERROR_ANCHOR_MSG, ERROR_MARKER_TAG, ERROR_MESSAGE_TEMPLATE

    nb = nbformat.read(executed, as_version=4)
    for index, text in ((error.cell_index, ERROR_ANCHOR_MSG), (0, ERROR_MESSAGE_TEMPLATE % error.exec_count)):
        nb.cells.insert(index, nbformat.v4.new_markdown_cell(text, metadata={"tags": [ERROR_MARKER_TAG]}))
    write_atomic(executed, nbformat.writes(nb))


@contextlib.contextmanager
def _signals(control: Control, grace: float) -> Iterator[None]:
    """SIGUSR1, SIGTERM and Ctrl-C speak to `control` while a notebook is executed (in the main thread)."""
    wanted = {signal.SIGUSR1: ("stop", grace), signal.SIGTERM: ("stop", min(grace, TERM_GRACE_S)),
              signal.SIGINT: ("interrupt", 0.0)}
    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: whoever runs it there handles signals
        for number in wanted:
            before[number] = signal.signal(number, lambda got, _: control.end(*wanted[signal.Signals(got)]))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _trust(executed: Path) -> None:
    """Sign an executed notebook with this user's Jupyter key, so that JupyterLab shows the widgets stored in it."""
    import nbformat
    from nbformat.sign import NotebookNotary

    with contextlib.suppress(OSError):  # no place for the key: the static view in its place is shown
        NotebookNotary().sign(nbformat.read(executed, as_version=4))


def _code_cell(executed: Path) -> int | None:
    """Number, counted over code cells from 1 (the injected one included), of the last cell that was started."""
    if not executed.exists():
        return None
    code = [c for c in json.loads(executed.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    started = [n for n, c in enumerate(code, start=1) if c["metadata"].get("papermill", {}).get("start_time")]
    return started[-1] if started else None


def _literal(path: Path) -> str:
    """A path that survives papermill's str.format."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextlib.contextmanager
def _this_python() -> Iterator[type]:
    """A kernel manager class whose kernel is `sys.executable -m ipykernel_launcher`, with sockets in a private folder.

    Jupyter chooses TCP ports before the kernel binds them: of several kernels started at once one may find its port
    taken and die. A path is no one else's.
    """
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    place = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(prefix="sgpo-", dir=place if len(place) <= SOCKET_FOLDER_MAX else "/tmp",
                                     ignore_cleanup_errors=True) as folder:
        class ThisPython(AsyncKernelManager):
            @default("transport")
            def _in_files(self) -> str:
                return "ipc"

            @default("ip")
            def _place(self) -> str:
                return f"{folder}/kernel"

            @property
            def kernel_spec(self) -> KernelSpec:
                return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

        yield ThisPython


@contextlib.contextmanager
def _environ(**changes: str) -> Iterator[None]:
    """Environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

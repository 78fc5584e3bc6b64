"""Executes a notebook headless with Papermill, in a job folder (see jobs.py).

The kernel is the interpreter that runs this code, whatever kernelspec `python3` resolves to on the search path, and
its working directory is the notebook's folder, as in JupyterLab. Printed lines reach log.txt as they come. Papermill
and Jupyter are imported when a notebook is executed, not before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from sgpo_lib.jobs import JobResult, find_notebook, job_key, place_parameters, read_job, up_to_date
from sgpo_lib.pages import PLOTLY_TAG, notebook_html, put_plotly
from sgpo_lib.runs import locked, write_atomic

KERNEL_START_S = 180
"""Seconds until a kernel that does not answer is given up (a busy machine takes its time)."""
IOPUB_S = 120
"""Seconds to wait for a finished cell's last output; nbclient's 4 fail cells on a busy machine."""
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class LogWriter:
    """A text file to which the notebook's output goes line by line, flushed at once, and optionally a terminal.

    A line that a progress bar rewrites with carriage returns is kept in its last form.
    """

    def __init__(self, file: TextIO, echo: TextIO | None, prefix: str):
        self._file, self._echo, self._prefix, self._open = file, echo, prefix, ""

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
        shown = _ANSI.sub("", line.rstrip("\r").rpartition("\r")[2])
        self._file.write(shown + "\n")
        self._file.flush()
        if self._echo:
            self._echo.write(f"{self._prefix}{shown}\n")
            self._echo.flush()


def run_notebook(notebook: str | Path, parameters: Mapping[str, Any], job: Path, *, after: Sequence[Path] = (),
                 echo: TextIO | None = None, force: bool = False) -> JobResult:
    """Execute a notebook with parameters into a job folder, unless it is up to date there.

    `after`: job folders whose results this one builds on. `echo`: stream that also gets the printed lines.
    Raises ValueError before any work for a notebook or parameter that does not exist; RuntimeError when another
    process works in the folder. An error inside the notebook, or a kernel that dies, is recorded in FAILED.json and
    returned as state `failed`. After an interrupt neither DONE nor FAILED.json exists.
    """
    path, job = find_notebook(notebook), job.resolve()
    placed = place_parameters(path, parameters)
    key = job_key(path, placed, after)
    if not force and up_to_date(job, key):
        result = read_job(job)
        return JobResult(**{**vars(result), "fresh": False})
    with locked(job):
        for old in ("DONE", "FAILED.json", "runs.txt"):
            (job / old).unlink(missing_ok=True)
        write_atomic(job / "parameters.yaml", yaml.safe_dump(
            {"notebook": path.name, "path": str(path), "parameters": placed}, sort_keys=False, allow_unicode=True))
        start = time.time()
        with (job / "log.txt").open("w", encoding="utf-8") as file:
            log = LogWriter(file, echo, f"{job.name}: ")
            failure = _execute(path, placed, job, log)
            if failure:
                log.write(f"\nFAILED {failure['error']}: {failure['message']}\n")
            log.close()
        ended = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": round(time.time() - start, 1), "key": key}
        page = notebook_html(job / "notebook.ipynb")
        if PLOTLY_TAG in page:
            put_plotly(job, link=True)
        write_atomic(job / "report.html", page)
        write_atomic(job / ("FAILED.json" if failure else "DONE"), json.dumps({**(failure or {}), **ended}, indent=1))
    return read_job(job)


def _execute(path: Path, placed: dict[str, Any], job: Path, log: LogWriter) -> dict[str, Any] | None:
    """Run Papermill; the executed notebook becomes job/notebook.ipynb. Returns what FAILED.json is to tell, or None."""
    import papermill

    partial = job / ".notebook.partial.ipynb"
    failure: dict[str, Any] | None = None
    try:
        with _environ(PLOTLY_RENDERER="plotly_mimetype", SGPO_JOB=str(job)):
            papermill.execute_notebook(
                _literal(path), _literal(partial), parameters=placed, kernel_name="python3", language="python",
                cwd=str(path.parent), progress_bar=False, start_timeout=KERNEL_START_S, iopub_timeout=IOPUB_S,
                stdout_file=log, stderr_file=log, kernel_manager_class=_this_python(), autosave_cell_every=20)
    except papermill.PapermillExecutionError as error:
        failure = {"cell": _code_cell(partial), "error": error.ename, "message": _ANSI.sub("", error.evalue),
                   "traceback": _ANSI.sub("", "\n".join(error.traceback))[-8000:]}
    except Exception as error:  # a remote engine enters here: kernel that dies, does not start, loses its sockets
        failure = {"cell": _code_cell(partial), "error": type(error).__name__,
                   "message": "the kernel process ended while the cell ran (out of memory, a crash in compiled code, "
                              "or killed)" if type(error).__name__ == "DeadKernelError" else str(error)}
    if partial.exists():
        partial.replace(job / "notebook.ipynb")
        _trust(job / "notebook.ipynb")
    else:
        (job / "notebook.ipynb").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return failure


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


def _this_python() -> type:
    """A kernel manager class whose kernel is `sys.executable -m ipykernel_launcher`, its sockets encrypted."""
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        transport_encryption = "auto"

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    return ThisPython


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


def terminal() -> TextIO:
    """Standard output, for `echo`."""
    return sys.stdout

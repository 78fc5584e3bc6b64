"""One execution of a notebook: Papermill with the parts that a headless run needs replaced.

What differs from Papermill 2.7, which saves in place, takes a killed kernel's cells for completed and `sys.exit()` for
success:

1. The executed copy is replaced as a whole at every save (`JOB/notebook.ipynb` is a valid notebook at any moment), with
   secrets taken out; cells that did not run stay `pending`.
2. Success is the word of the kernel: when every cell has been answered without an error, a last request has it write
   a nonce into `JOB/.sentinel`. It is no cell of the saved copy.
3. `Control` ends an execution from outside: asked to stop, at a time limit, at Ctrl-C. First the file `JOB/STOP`, for
   which a training loop looks after every step, then an interrupt of the kernel, then SIGKILL.
4. What the kernel's process writes past Jupyter (a crash in compiled code) goes to the log; its exit status is kept;
   what it started is ended with it.

Importing this module imports Papermill.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import nbformat
from nbclient.exceptions import CellExecutionError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines

from sgpo_lib.redaction import Redactor, lines_into
from sgpo_lib.storage import write_atomic

ENGINE = "sgpo"
KILL_AFTER_S = 10.0
"""Seconds from the interrupt of the kernel to SIGKILL."""
_POLL_S = 0.2
_KEEP_SIGUSR1_OUT = "import signal\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)"
"""Slurm sends its warning to every process of a step; by default it would end the kernel, which is to finish a step."""


class Log(Protocol):
    """Where printed text goes."""

    def write(self, text: str) -> int:
        """Take text."""


class Control:
    """Watches one execution from a thread of its own and ends it where it must."""

    def __init__(self, job: Path, time_limit: float | None = None):
        self.job, self.time_limit = job, time_limit
        self.why = ""
        """Why it is being ended: `stop`, `interrupt` (Ctrl-C), `time limit`; empty while nothing is."""
        self.answered = False
        """Whether every cell was answered without an error."""
        self.finished = False
        """Whether the kernel ran everything and wrote the sentinel."""
        self.interrupted = False
        """Whether the kernel has been interrupted."""
        self.kernel: subprocess.Popen[bytes] | None = None
        self._started = time.monotonic()
        self._deadline = 0.0
        self._kill_at = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def end(self, why: str, grace: float) -> None:
        """Ask for the end, with an interrupt after `grace` seconds. For signal handlers: it only sets numbers."""
        deadline = time.monotonic() + grace
        if self.why == "interrupt" == why:  # Ctrl-C again
            self._kill_at = min(self._kill_at or deadline, deadline)
        self._deadline = min(self._deadline, deadline) if self.why else deadline
        self.why = why if not self.why or why == "interrupt" else self.why

    def __enter__(self) -> Control:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self.kernel:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # what it started and left behind
                os.killpg(self.kernel.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.kernel.wait(5)

    def _watch(self) -> None:
        while not self._over.wait(_POLL_S):
            now = time.monotonic()
            if self.time_limit is not None and not self.why and now - self._started >= self.time_limit:
                self.end("time limit", 0.0)
            if not self.why:
                continue
            if not (self.job / "STOP").exists():
                write_atomic(self.job / "STOP", f"{self.why}\n")
            if now >= self._deadline and not self.interrupted:
                self._kill_at = self._kill_at or now + KILL_AFTER_S
                self._send(signal.SIGINT)  # to the kernel alone: its workers are what it may need to save its state
                self.interrupted = True
            if self.interrupted and now >= self._kill_at and self.kernel and self.kernel.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.kernel.pid, signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.kernel and self.kernel.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.kernel.send_signal(number)


class SavedWhole(NotebookExecutionManager):
    """Papermill's record of an execution, saved as a whole and without secrets."""

    def __init__(self, nb: Any, path: Path, redact: Redactor, autosave_cell_every: float):
        super().__init__(nb, output_path=None, progress_bar=False, autosave_cell_every=autosave_cell_every)
        self._path, self._redact = path, redact

    def save(self, **kwargs: Any) -> None:
        """Replace the file. A full disk is no reason to end a run: the copy that is there stays."""
        with contextlib.suppress(OSError):  # the last save, below, tells
            self._write(kwargs.get("nb") or self.nb)
        self.last_save_time = self.now()

    def _write(self, nb: Any) -> None:
        write_atomic(self._path, nbformat.writes(self._redact.nested(nb)))

    def notebook_complete(self, **kwargs: Any) -> None:
        """Papermill's, but what did not run is not marked as completed. Raises DiskFull where it cannot be saved."""
        self.end_time = self.now()
        self.nb.metadata.papermill["end_time"] = self.end_time.isoformat()
        self.nb.metadata.papermill["duration"] = (self.end_time - self.start_time).total_seconds()
        self._write(self.nb)


class Client(PapermillNotebookClient):
    """Papermill's client, which asks the kernel itself whether it ran everything."""

    def __init__(self, nb_man: Any, control: Control, raw: Log, **kw: Any):
        super().__init__(nb_man, **kw)
        self._control, self._raw = control, raw

    def execute(self, **kwargs: Any) -> Any:
        """Start the kernel, run the cells, end it."""
        self.reset_execution_trackers()
        # a kernel that is shut down says that it was interrupted: nobody wants to read that
        with (lines_into(self._raw.write, lambda: self._control.finished) as pipe,
              self.setup_kernel(stdout=pipe, stderr=pipe, **kwargs)):
            self._request(_KEEP_SIGUSR1_OUT)
            self.papermill_execute_cells()
            self.set_widgets_metadata()
        return self.nb

    def start_new_kernel(self, **kwargs: Any) -> None:
        """Start it and keep hold of its process, whose exit status tells how it ended."""
        super().start_new_kernel(**kwargs)
        assert self.km is not None and self.km.provisioner is not None
        self._control.kernel = self.km.provisioner.process

    def papermill_execute_cells(self) -> None:
        """Run the cells until one fails, then the sentinel."""
        for index, cell in enumerate(self.nb.cells):
            if cell.cell_type != "code":
                continue
            if self._control.interrupted:  # it came between two cells, where a kernel ignores it
                return
            self.nb_man.cell_start(cell, index)
            try:
                self.execute_cell(cell, index)
            except CellExecutionError as error:
                self.nb_man.cell_exception(cell, cell_index=index, exception=error)
                return
            finally:
                self.nb_man.cell_complete(cell, cell_index=index)
        self._control.answered = True
        sentinel, nonce = self._control.job / ".sentinel", secrets.token_hex(16)
        self._request(f"__import__('pathlib').Path({str(sentinel)!r}).write_text({nonce!r})")
        self._control.finished = sentinel.exists() and sentinel.read_text(encoding="utf-8") == nonce
        sentinel.unlink(missing_ok=True)

    def _request(self, code: str) -> None:
        """Have the kernel run code that is no cell. Raises DeadKernelError where it has ended."""
        assert self.kc is not None
        self.wait_for_reply(self.kc.execute(code, silent=True, store_history=False))


class Engine(NBClientEngine):
    """How Papermill executes: with `SavedWhole` and `Client`."""

    @classmethod
    def execute_notebook(cls, nb: Any, kernel_name: str, *, control: Control, redact: Redactor, raw: Log,
                         autosave_cell_every: float, start_timeout: float, iopub_timeout: float,
                         kernel_manager_class: type, stdout_file: Log, stderr_file: Log, **_: Any) -> Any:
        """Execute and save; errors of cells are found in the outputs by Papermill."""
        record = SavedWhole(nb, control.job / "notebook.ipynb", redact, autosave_cell_every)
        record.notebook_start()
        try:
            Client(record, control, raw, kernel_name=kernel_name, startup_timeout=start_timeout,
                   iopub_timeout=iopub_timeout, kernel_manager_class=kernel_manager_class, stdout_file=stdout_file,
                   stderr_file=stderr_file).execute()
        finally:
            record.notebook_complete()
        return record.nb


papermill_engines.register(ENGINE, Engine)

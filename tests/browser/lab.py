"""What the browser tests do in a page: wait, run notebooks, ask the kernel."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
NOTEBOOK = {"metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
            "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
_HERE = "window.jupyterapp.shell.currentWidget"


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook of code cells."""
    made = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": code}
            for i, code in enumerate(cells)]  # fmt: skip
    path.write_text(json.dumps({**NOTEBOOK, "cells": made}), encoding="utf-8")


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def open_notebook(page: Any, address: str, notebook: str) -> None:
    """Open a notebook and wait until its kernel is idle."""
    page.goto(f"{address}/lab/tree/{notebook}?token=t&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_function("window.jupyterapp !== undefined", timeout=30_000)
    page.wait_for_function(f"() => {_HERE}?.context?.path === '{notebook}' && {_HERE}.context.isReady", timeout=60_000)
    # Told to run before the session has its kernel, JupyterLab asks for one in a dialog that takes all keys.
    page.wait_for_function(f"() => {_HERE}.sessionContext.session?.kernel?.status === 'idle'"
                           f" && {_HERE}.sessionContext.session.kernel.connectionStatus === 'connected'"
                           f" && !{_HERE}.sessionContext.hasNoKernel", timeout=60_000)  # fmt: skip


def run_all(page: Any, address: str, notebook: str, seconds: float = 240) -> None:
    """Open a notebook, run all of its cells and wait for the last: a kernel at work answers no widget."""
    open_notebook(page, address, notebook)
    page.evaluate("seconds => Promise.race([window.jupyterapp.commands.execute('notebook:run-all-cells'), "
                  "new Promise(ok => setTimeout(ok, 1000 * seconds))])", seconds)  # fmt: skip
    counts = page.evaluate(f"[...{_HERE}.content.model.cells].filter(c => c.type === 'code')"
                           ".map(c => c.executionCount)")  # fmt: skip
    assert all(counts), f"{notebook}: its cells did not run to the end in {seconds:.0f} s, counts {counts}"


def ask(page: Any, code: str) -> str:
    """What the notebook's kernel prints for a piece of code; the message of an error."""
    return page.evaluate(f"""async (code) => {{
      const future = {_HERE}.sessionContext.session.kernel.requestExecute({{code}});
      let text = "";
      future.onIOPub = (m) => {{ text += m.content.text ?? m.content.evalue ?? ""; }};
      await future.done;
      return text.trim(); }}""", code)  # fmt: skip


def theme(page: Any, name: str) -> None:
    """Change JupyterLab's theme: `Light` or `Dark`. It lasts beyond the page."""
    page.evaluate(f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {name}'}})")
    until(lambda: page.locator("body").get_attribute("data-jp-theme-light") == str(name == "Light").lower(), 20)
    until(lambda: page.locator("#jupyterlab-splash").count() == 0, 20)


def shot(page: Any, name: str) -> None:
    """A picture into the folder that SGPO_SHOTS names, for a person; nothing without it."""
    if folder := os.environ.get("SGPO_SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")

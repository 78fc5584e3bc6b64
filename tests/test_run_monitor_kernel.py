"""The run monitor in real kernels: one that is busy, and one that executes a notebook where nobody watches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")
pytestmark = pytest.mark.slow

OPENED = """
import json, pathlib, subprocess, sys, time
from sgpo_lib.widgets.run_monitor import RunMonitor
root = pathlib.Path({root!r})
monitor = RunMonitor("a", root=root, wait=True, every=0.05, metrics=["alpha"])
"""
WRITER = """
import json, sys, time
from pathlib import Path
from sgpo_lib.runs import locked
with locked(Path(sys.argv[1])):
    for step in range(1, 121):
        with (Path(sys.argv[1]) / "metrics.jsonl").open("a") as file:
            line = json.dumps({"kind": "train", "step": step, "alpha": step, "seconds_step": 0.05}) + "\\n"
            file.write(line[:20]); file.flush(); time.sleep(0.02)
            file.write(line[20:])
        time.sleep(0.03)
    (Path(sys.argv[1]) / "DONE").touch()
"""
"""Another process that trains, as far as anyone can see; each line is written in two parts."""


def test_a_busy_kernel_keeps_its_page_up_to_date(tmp_path):
    """While the main thread computes, the messages of the monitor's thread leave the kernel."""
    from jupyter_client.manager import start_new_kernel

    (tmp_path / "writer.py").write_text(WRITER)
    manager, client = start_new_kernel()
    try:
        client.execute_interactive(OPENED.format(root=str(tmp_path)), timeout=60, output_hook=print)
        busy = f"""
writer = subprocess.Popen([sys.executable, {str(tmp_path / "writer.py")!r}, str(root / "a")])
print("begin", flush=True)
while writer.poll() is None:
    sum(range(10_000))
print("end", flush=True)"""
        seen: list[str] = []
        steps: list[int] = []

        def hook(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                seen.append(content["text"].strip())
            data = content.get("data", {})
            if message["msg_type"] == "comm_msg" and seen == ["begin"]:
                for piece in data.get("content", {}).get("pieces", []):
                    steps.extend(piece["columns"]["step"])
                for run in data.get("state", {}).get("rows", []):
                    steps.extend(run["train"]["step"])

        client.execute_interactive(busy, timeout=60, output_hook=hook)
        assert seen == ["begin", "end"] and len(set(steps)) >= 20 and steps[0] < 60, (seen, steps)
        told: list[str] = []
        client.execute_interactive(
            "monitor.stop(); print(monitor.rows[0]['train']['alpha'] == list(range(1, 121)), "
            "monitor.state[0]['state'], monitor.following)", timeout=60,
            output_hook=lambda m: told.append(m["content"].get("text", "")))
        assert "True done False" in "".join(told)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_an_executed_notebook_keeps_the_last_values(tmp_path):
    """Shown before the run begins; the stored output tells what it came to, and the stored state has every row."""
    import nbclient
    import nbformat

    write = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_run_monitor import begun, row
begun(root, "a", row(1, alpha=0.5), row(2, alpha=0.25))
(root / "a" / "DONE").touch()
monitor.stop()"""
    cells = [OPENED.format(root=str(tmp_path)) + "monitor", write]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert ">0.25<" in output.data["text/html"] and "done, step 2 of 40" in output.data["text/plain"]
    state = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    model = state[output.data["application/vnd.jupyter.widget-view+json"]["model_id"]]["state"]
    assert model["rows"][0]["train"]["alpha"] == [0.5, 0.25] and model["state"][0]["state"] == "done"

"""Notebook 04 in a real JupyterLab: the microscope, what Python receives, the executed copy, the run monitor."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from lab import ask, open_notebook, run_all, shot, theme, until, write_notebook

from sgpo_lib.launch import run_notebook

pytestmark = pytest.mark.browser
SMALL = {"profile": "tiny", "problems": "", "count": 2, "max_new_tokens": 48, "drain_steps": 4}
NAME = "notebooks/04_token_kl.ipynb"


@pytest.fixture(scope="module")
def small(lab: tuple[str, Path]) -> Path:
    """Notebook 04 with small parameters, in the lab's folder."""
    path = lab[1] / NAME
    notebook = nbformat.read(path, as_version=4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in SMALL.items())
    nbformat.write(notebook, path)
    return path


def table(page: Any, columns: str) -> Any:
    """Columns of the first pane's table, from the kernel."""
    code = f"import json; print(json.dumps(panes[0].frames[0].table[{columns.split()!r}].to_dict('list')))"
    return json.loads(ask(page, code))


def control(box: Any, name: str) -> Any:
    return box.locator(f"[data-control={name}]")


def test_the_microscope_in_notebook_04(page, lab, small):
    address, _ = lab
    run_all(page, address, NAME)
    assert page.locator(".jp-OutputArea-output[data-mime-type*=stderr]").count() == 0
    box = page.locator(".sgpo-kl").first
    box.scroll_into_view_if_needed(timeout=60_000)
    tokens = box.locator(".response").first.locator(".t")
    read = table(page, "token_id forward_kl guided_logp unguided_logp")
    count, kl = len(read["token_id"]), read["forward_kl"]
    assert tokens.count() == count and box.get_attribute("data-theme") == "light"
    shot(page, "04_light")

    # the slider: what it would mask, here and in Python
    slider = control(box, "delta")
    slider.focus()
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("PageUp")
    shown = float(control(box, "delta-value").input_value())
    until(lambda: abs(float(ask(page, "print(microscope.delta)")) - shown) < 1e-3)
    delta = float(ask(page, "print(microscope.delta)"))
    masked = sum(v > delta for v in kl)
    assert 0 < masked < count and delta > 0
    told = re.search(r"masked \(([\d.]+)%\)", control(box, "share").inner_text())
    assert told and abs(float(told[1]) - 100 * masked / count) <= 0.0501  # a tie is rounded otherwise there

    # keys stay in the widget: jump to the largest, move, and no cell is deleted
    cells = page.locator(".jp-Cell").count()
    tokens.nth(0).click()
    page.keyboard.press("n")
    largest = max(range(count), key=lambda i: kl[i])
    assert page.evaluate("document.activeElement.token") == largest
    for name in ("d", "d", "a", "x", "Home"):
        page.keyboard.press(name)
    assert page.evaluate("document.activeElement.token") == 0 and page.locator(".jp-Cell").count() == cells

    # hovering: both probabilities of the sampled token
    tokens.nth(largest).hover()
    details = box.locator(".details").first
    for side in ("guided_logp", "unguided_logp"):
        probability = 2.718281828459045 ** read[side][largest]
        until(lambda p=probability: f"{p:.3f}"[:5] in details.inner_text() or f"{p:.4f}"[:5] in details.inner_text(), 5)

    # a brush
    tokens.nth(2).hover()
    page.mouse.down()
    for i in (3, 4, 6):
        tokens.nth(i).hover()
    page.mouse.up()
    until(lambda: ask(page, "print(microscope.selection()['token_id'].tolist())") == str(read["token_id"][2:7]))
    assert ask(page, "print(microscope.selected)") == "{'pane': 0, 'start': 2, 'end': 7}"

    # both ways
    control(box, "metric").select_option("reverse_kl")
    until(lambda: ask(page, "print(microscope.metric)") == "reverse_kl")
    ask(page, "microscope.delta = float('inf'); microscope.metric = 'sft_loss'; microscope.compare = 1")
    until(lambda: control(box, "metric").input_value() == "sft_loss" and box.locator(".response").count() == 2)
    ask(page, "microscope.delta = 0.05")
    until(lambda: abs(float(control(box, "delta-value").input_value() or 0) - 0.05) < 1e-6)
    shot(page, "04_compare")

    # the drain: a slider over checkpoints
    drain = page.locator(".sgpo-kl").nth(1)
    drain.scroll_into_view_if_needed()
    frames = control(drain, "frame")
    frames.focus()
    page.keyboard.press("Home")
    before = drain.locator(".tags").first.inner_text()
    page.keyboard.press("End")
    until(lambda: drain.locator(".tags").first.inner_text() != before)
    theme(page, "Dark")
    until(lambda: box.get_attribute("data-theme") == "dark")
    shot(page, "04_dark")
    theme(page, "Light")
    until(lambda: box.get_attribute("data-theme") == "light")


def test_the_executed_copy_keeps_the_microscope_where_it_is_trusted(page, lab, small):
    """Trusted (our runner signs it): the widget without its kernel. Changed by somebody: static colours."""
    address, root = lab
    assert run_notebook(small, {}, root / "executed").state == "done"
    shutil.copy(root / "executed" / "notebook.ipynb", root / "trusted.ipynb")
    open_notebook(page, address, "trusted.ipynb")
    box = page.locator(".sgpo-kl").first
    box.scroll_into_view_if_needed(timeout=60_000)
    tokens = box.locator(".response").first.locator(".t")
    assert tokens.count() > 10
    tokens.nth(1).hover()
    until(lambda: "probability" in box.locator(".details").first.inner_text(), 10)
    assert page.locator(".sgpo-kl").count() == 2
    shot(page, "04_trusted")

    changed = nbformat.read(root / "trusted.ipynb", as_version=4)
    changed.cells[0].source += "\n\nChanged."
    nbformat.write(changed, root / "untrusted.ipynb")
    open_notebook(page, address, "untrusted.ipynb")
    static = page.locator(".jp-OutputArea-output", has_text="forward KL above δ").first
    static.scroll_into_view_if_needed(timeout=60_000)
    assert page.locator(".sgpo-kl").count() == 0
    colours = static.locator("span").evaluate_all("n => new Set(n.map(e => getComputedStyle(e).backgroundColor)).size")
    assert colours > 3
    shot(page, "04_untrusted")


def test_the_run_monitor_beside_a_finished_run(page, lab, small):
    """The run that notebook 04 trained, opened by another kernel."""
    address, root = lab
    assert list((root / "runs").glob("tiny-sgpo-*")), "the test of notebook 04 trains it"
    write_notebook(root / "monitor.ipynb", "from sgpo_lib.widgets.run_monitor import RunMonitor\n"
                   "monitor = RunMonitor('tiny-sgpo-*')\nmonitor")
    run_all(page, address, "monitor.ipynb")
    box = page.locator(".sgpo-monitor").first
    box.scroll_into_view_if_needed(timeout=60_000)
    assert "4 of 4" in box.locator(".runs").inner_text() and box.locator(".panel svg").count() >= 6
    rows = map(json.loads, next((root / "runs").glob("tiny-sgpo-*/metrics.jsonl")).read_text().splitlines())
    last = [row for row in rows if row["kind"] == "train"][-1]
    assert f"{last['alpha']:.3g}" in box.locator(".panel", has_text="Weight").inner_text()
    assert box.locator(".panel", has_text="KL kept by clipping").count() == 1
    shot(page, "monitor")

"""The run monitor's page: pieces put together, curves thinned, values at a step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")

from test_inspector_page import node
from test_run_monitor import HERE, append, begun, quiet, row

from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import Run
from sgpo_lib.widgets.run_monitor import RunMonitor

SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.js"))}


def recorded(monkeypatch) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    monkeypatch.setattr(RunMonitor, "_send", lambda self, message, buffers=None: messages.append(
        json.loads(json.dumps(message, allow_nan=False))))
    return messages


def test_only_what_was_appended_is_sent(tmp_path, monkeypatch):
    """200 rows one by one: every row once, and all of them again each time their number has doubled."""
    messages = recorded(monkeypatch)
    folder = begun(tmp_path, "a", row(1, alpha=1))
    monitor = quiet("a", root=tmp_path)
    for i in range(2, 202):
        append(folder, row(i, alpha=i))
        monitor.refresh()
    pieces = [m["content"]["pieces"] for m in messages if m["method"] == "custom"]
    whole = [m["state"]["rows"] for m in messages if m["method"] == "update" and "rows" in m["state"]]
    assert all(len(p) == 1 and p[0]["columns"]["step"] == [p[0]["from"] + 1] for p in pieces)
    assert len(pieces) + len(whole) == 200 and len(whole) == 7  # at 2, 4, ..., 128
    count = len(messages)
    monitor.refresh()
    assert len(messages) == count, "nothing new, nothing sent"


PLAY = """
const {script, first, messages} = JSON.parse(require("fs").readFileSync(0)), heard = {};
const {receive} = new Function(script + "; return {receive};")();
const model = {rows: first, get: (k) => model[k], on: (n, f) => { heard[n] = f; }, off() {},
  send: (m) => { model.sent = m; }};
receive(model);
for (const m of messages) {
  if (m.method === "custom") heard["msg:custom"](m.content);
  else { model.rows = m.state.rows; heard["change:rows"](); }
}
setTimeout(() => console.log(JSON.stringify([model.rows, model.sent ?? null])), 600);
"""


@pytest.mark.parametrize("order", ["as sent", "lost", "lost at last", "swapped"])
def test_the_page_puts_the_pieces_together(tmp_path, monkeypatch, order):
    """Messages that were lost, or overtook a state of all rows: the page ends with what Python has, or asks for it."""
    messages = recorded(monkeypatch)
    folders = [begun(tmp_path, n, row(0, "eval", accuracy=0.5)) for n in "ab"]
    monitor = quiet(["a", "b"], root=tmp_path)
    first = json.loads(json.dumps(monitor.rows))
    for i in range(1, 40):
        append(folders[i % 2], row(i, alpha=i), *([row(i, "eval", accuracy=i)] if i % 5 == 0 else []))
        if i == 20:
            Run(folders[0], from_parameters("tiny", "sgpo", 0, steps=40)).forget_after(10)
        monitor.refresh()
        if i % 9 == 0:
            monitor._receive(monitor, {"kind": "missing"}, [])
    messages = [m for m in messages if m["method"] == "custom" or "rows" in m["state"]]
    assert [m["method"] for m in messages].count("update") >= 7 and messages[-1]["method"] == "custom"
    if order == "swapped":
        places = [i for i, m in enumerate(messages[:-1]) if m["method"] == "update"]
        for i in places:
            messages[i], messages[i + 1] = messages[i + 1], messages[i]
    elif order != "as sent":
        last = max(i for i, m in enumerate(messages) if m["method"] == "update")
        gone = range(last) if order == "lost" else [last + 1]
        messages = [m for i, m in enumerate(messages) if m["method"] == "update" or i not in gone]
    played = node(tmp_path, PLAY, {"script": SCRIPTS["data.js"], "first": first, "messages": messages})
    whole = json.loads(json.dumps(monitor.rows))
    assert played == [whole, None] if order != "lost at last" else played[1] == {"kind": "missing"}


# --- the script without a browser -------------------------------------------------------------------------------
def test_the_module_is_valid_and_asks_no_other_machine_for_anything(tmp_path):
    (tmp_path / "whole.mjs").write_text(str(RunMonitor._esm), encoding="utf-8")
    code = "import('./whole.mjs').then(m => console.log(JSON.stringify(Object.keys(m.default))));"
    assert node(tmp_path, code) == ["initialize", "render"]
    script = "\n".join(SCRIPTS.values()).replace("http://www.w3.org/2000/svg", "")
    calls = r"\bfetch\s*\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts|\bimport\b"
    assert not re.search(rf"https?:|[\"'(]//|url\(|@import|\bsrc\b|{calls}", script)
    assert not re.search(r"https?:|//|url\(|@import|@font-face|expression\(", str(RunMonitor._css))
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "srcdoc", "eval(",
                "createContextualFragment", "Function(", "javascript:", ".href", "setHTML"):
        assert way not in script, way


def ran(tmp_path: Path, expression: str, given: Any = None) -> Any:
    """Value of an expression over the pure scripts; `given` is its input."""
    code = f"const given = JSON.parse(require('fs').readFileSync(0));\n{SCRIPTS['data.js']}\n{SCRIPTS['scale.js']}\n"
    return node(tmp_path, f"{code}console.log(JSON.stringify({expression}));", given)


@pytest.mark.parametrize("count, limit", [(2000, 2000), (2001, 2000), (50_000, 2000), (37, 10), (5, 4), (3, 2)])
def test_a_long_curve_keeps_the_extremes_of_every_bucket(tmp_path, count, limit):
    values = [((i * 7919) % 1009) / 10 for i in range(count)]
    values[count // 2], values[count // 3] = 9999.0, -9999.0
    kept = ran(tmp_path, f"thin(given, {limit})", values)
    assert kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] == count - 1
    assert count // 2 in kept and count // 3 in kept
    if count <= limit:
        assert len(kept) == count
        return
    assert len(kept) <= max(limit, 4)
    size = (count - 2) / max(1, (limit - 2) // 2)
    for k in range(0, max(1, (limit - 2) // 2), 97):  # naive: extremes of a bucket are among what is kept
        part = range(1 + int(k * size + 1e-9), 1 + int((k + 1) * size + 1e-9))
        assert {min(part, key=values.__getitem__), max(part, key=values.__getitem__)} <= set(kept) or size < 2


def test_gaps_stay_gaps(tmp_path):
    kept = ran(tmp_path, "thin(given, 10)", [1.0] * 40 + [None] * 40 + [2.0] * 40)
    assert any(40 <= i < 80 for i in kept) and kept == sorted(kept) and len(kept) <= 15
    assert ran(tmp_path, "runningMean(given, 3)", [3, None, 6, 9, 12]) == [3, None, 4.5, 6, 9]
    assert ran(tmp_path, "runningMean(given, 0)", [3, None]) == [3, None]


def test_values_at_a_step(tmp_path):
    """Training rows at the step itself, evaluations at or before it, nothing beyond a run's last step."""
    run = {"train": {"step": [1, 2, 4], "a": [0.1, None, 0.4]}, "eval": {"step": [0, 3], "e": [5, 6]}}
    code = "[['train', 'a'], ['eval', 'e']].map(([table, column]) => [null, 0, 1, 2, 3, 4, 5].map((s) => " \
           "{ const f = valueAt(given, {table, column}, s); return f && [f.value, f.step]; }))"  # fmt: skip
    assert ran(tmp_path, code, run) == [
        [[0.4, 4], None, [0.1, 1], None, None, [0.4, 4], None],
        [[6, 3], [5, 0], [5, 0], [5, 0], [6, 3], [6, 3], None]]  # fmt: skip
    runs = [{"train": {"step": [1, 2, 3], "t": [10, 20, 90]}, "eval": {"step": [], "t": []}},
            {"train": {"step": [1, 2], "t": [40, 60]}, "eval": {"step": [0], "t": [0]}}]
    assert ran(tmp_path, "[-5, 12, 44, 57, 500].map((x) => nearestStep(given, 't', x))", runs) == [0, 1, 1, 2, 3]
    assert ran(tmp_path, "nearestStep([], 't', 1)") is None


def test_axes_and_numbers(tmp_path):
    assert ran(tmp_path, "[ticks(0, 1, 5), ticks(0, 40, 4), ticks(0.001, 10, 5, true)]") == [
        [0, 0.2, 0.4, 0.6, 0.8, 1], [0, 10, 20, 30, 40], [0.001, 0.01, 0.1, 1, 10]]
    assert ran(tmp_path, "[range([]), range([3]), range([2, 8]), range([0.3, 0.2], {share: true}), range([-1, 1, 4], "
               "{log: true})]") == [[0, 1], [2.7, 3.3], [0, 8.48], [0, 1], [1 / 1.1, 4.4]]
    given = [None, 0, 0.123456, -2.5, 9264.6, 12345, 2.5e6, 0.00025, 3599, 100000]
    assert ran(tmp_path, "given.map(written)", given)[:8] == ["–", "0", "0.123", "−2.5", "9265", "12.3k", "2.5M",
                                                             "2.5e−4"]  # fmt: skip
    assert ran(tmp_path, "[null, 0, 3599, 3600, 100000].map(clock)") == ["–", "00:00", "59:59", "1:00:00", "27:46:40"]

"""Hostile text through every view and export, in a real browser and a real terminal: nothing executed, requested, read.

At reduced counts all payloads stand in each view at once; at full counts also each one alone, and all of them in a real
JupyterLab.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

pytest.importorskip("anywidget")
pytest.importorskip("playwright", reason="playwright is not installed: make test-faults")

from hostile_payloads import PAYLOADS, file_name
from hostile_views import CELLS, drawn, extraction_of, group_of, monitor_of
from markdown_it import MarkdownIt
from playwright.sync_api import Error, sync_playwright
from test_token_kl_widget import readings_of
from watched_page import Watched, harness, squeezed

from sgpo_lib import exports, pages
from sgpo_lib.config import RewardConfig
from sgpo_lib.escaping import trusted, visible, visible_in
from sgpo_lib.groups_view import group_html
from sgpo_lib.jobs import read_job
from sgpo_lib.launch import LogWriter, run_notebook
from sgpo_lib.report import write_report
from sgpo_lib.rewards import Verifier
from sgpo_lib.runs import load_run
from sgpo_lib.static_images import write_image
from sgpo_lib.widgets.strategy_inspector import StrategyInspector
from sgpo_lib.widgets.token_kl import Pane, TokenKL

ALL = list(PAYLOADS.values())
NONE = "0 executed, 0 requested, 0 read"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from lab import CHROMIUM, FLAGS

    assert CHROMIUM, "no Chromium or Chrome on this machine: apt install chromium, or set CHROMIUM to its path"
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def watched(browser: Any) -> Iterator[Watched]:
    found = Watched(browser)
    yield found
    found.context.close()


@pytest.fixture
def sets(count: Callable[[int, int], int]) -> list[list[str]]:
    """Which payloads stand in a page together: all of them; at full counts also each one alone."""
    return [ALL, *([text] for text in ALL[:count(0, len(ALL))])]


def test_raw_markup_would_be_noticed(browser, tmp_path, count, tally):
    """The payloads as HTML, without any of our views: what the other tests watch for does happen."""
    caught, tried = [], ["script", "image", "data frame", "refresh", "form", "style"]
    for name, text in PAYLOADS.items() if count(0, 1) else [(name, PAYLOADS[name]) for name in tried]:
        path = tmp_path / "raw.html"
        path.write_text(f'<!doctype html><meta charset="utf-8"><p title="{text}">{text}</p>', encoding="utf-8")
        watched = Watched(browser)
        with contextlib.suppress(Error):  # led to another page while it was looked at
            watched.noted += watched.open(path) and watched.settled(40)
        caught += [name] if {what for what, _ in watched.noted} & {"executed", "requested", "led to", "read"} else []
        watched.context.close()
    assert set(tried) <= set(caught), caught
    tally(10, "payloads as raw HTML (what is watched for does happen)", f"{', '.join(caught)}")


def test_strategy_inspector(watched, tmp_path, sets, tally):
    for texts in sets:
        found = [extraction_of(text) for text in texts]
        with Verifier(RewardConfig()) as verifier:
            inspector = StrategyInspector(found, tmp_path / f"{len(texts)}.jsonl", verifier)
            for text in texts:
                inspector.decide(text, "rejected", comment=text)
            items = [inspector._item(i) for i in range(len(texts))]
        path = harness(tmp_path / "inspector.html", inspector._esm, inspector._css, {
            "index": inspector.index, "selected": 0, "item": items[0], "told": inspector.told})
        page = watched.open(path)
        for item, text in zip(items, texts, strict=True):
            page.evaluate("item => window.model.set('item', item)", item)
            watched.harmless([text], milliseconds=20)
            page.locator(".sgpo-inspector button", has_text="edit").click()
            watched.harmless([text], milliseconds=20)
    tally(10, "hostile text, strategy inspector", f"{len(ALL)} payloads in 14 fields: {NONE}")


def test_run_monitor(watched, tmp_path, sets, tally):
    for number, texts in enumerate(sets):
        monitor = monitor_of(tmp_path / str(number), texts)
        state = {name: getattr(monitor, name) for name in (
            "title", "panels", "axes", "rows", "state", "following", "selected_step", "x", "smoothing", "log_loss")}
        page = watched.open(harness(tmp_path / "monitor.html", monitor._esm, monitor._css, {**state, "told": texts[0]}))
        page.get_by_role("button", name="numbers").click()
        watched.harmless(texts)
        table = monitor._static()["text/html"]
        (tmp_path / "table.html").write_text(f'<meta charset="utf-8">{table}', encoding="utf-8")
        watched.open(tmp_path / "table.html")
        watched.harmless(texts)
    tally(10, "hostile text, run monitor (widget, table)", f"{len(ALL)} payloads as names, messages, title: {NONE}")


def test_kl_microscope(watched, tmp_path, sets, tally):
    for texts in sets:
        panes = [Pane(text, [readings_of([*texts, text], label=text)], "guided", True) for text in texts[:4]]
        panes += [Pane(text, [readings_of([text], label=text)]) for text in texts[4:]]
        widget = TokenKL(panes, title=" ".join(texts))
        page = watched.open(widget.to_html(tmp_path / "kl.html"))
        page.wait_for_selector(".sgpo-kl .column")
        page.fill('.sgpo-kl [data-control="search"]', "<script>")
        page.check('.sgpo-kl [data-control="spaces"]')
        watched.harmless([t for t in texts if len(t) < 1000])
        shown = widget._repr_mimebundle_()[0]["text/html"]
        (tmp_path / "static.html").write_text(f'<meta charset="utf-8">{shown}', encoding="utf-8")
        watched.open(tmp_path / "static.html")
        watched.harmless(texts)
    tally(10, "hostile text, KL microscope (page, text without script)",
          f"{len(ALL)} payloads as tokens, labels: {NONE}")


def test_groups_view(watched, tmp_path, sets, tally):
    for texts in sets:
        views = trusted("").join(group_html(group_of(text)) for text in texts)
        (tmp_path / "groups.html").write_text(f'<meta charset="utf-8">{views}', encoding="utf-8")
        watched.open(tmp_path / "groups.html")
        watched.harmless(texts)
    tally(10, "hostile text, groups view", f"{len(ALL)} payloads in 9 fields: {NONE}")


def test_figures_in_pages(watched, tmp_path, sets, tally):
    pages.put_plotly(tmp_path)
    for texts in sets:
        made = drawn(texts)
        body = trusted("").join(pages.figure_html(str(f.to_json())) for f in made.values())
        (tmp_path / "figures.html").write_text(
            f'<!doctype html><head><meta charset="utf-8">{pages.PLOTLY_TAG}</head><body>{body}'
            f"{pages.FIGURE_SCRIPT}</body>", encoding="utf-8")
        page = watched.open(tmp_path / "figures.html", tmp_path / "plotly.min.js")
        page.wait_for_function(f"document.querySelectorAll('.sgpo-plot .main-svg').length >= {len(made)}")
        page.evaluate("document.querySelectorAll('.sgpo-plot').forEach(p => { try { Plotly.Fx.hover(p, "
                      "[{curveNumber: 0, pointNumber: 0}]); } catch {} })")
        watched.harmless([t for t in texts if t != PAYLOADS["long"]])
    tally(10, "hostile text, plotly figures", f"{len(ALL)} payloads in {len(made)} figures: {NONE}")


def test_static_pictures(watched, tmp_path, count, tally):
    made = drawn(ALL)
    for name in list(made)[:count(0, len(made))] or ["steps"]:
        watched.open(write_image(made[name], tmp_path / f"{name}.svg"))
        assert watched.page.evaluate("document.documentElement.tagName") == "svg", "well-formed XML"
        watched.harmless()
        shown = squeezed(watched.page.evaluate("document.documentElement.textContent"))
        if name == "steps":
            assert [t for t in ALL if squeezed(visible(t))[:100] not in shown] == []
    tally(10, "hostile text, static pictures", f"{len(ALL)} payloads as categories and labels: {NONE}")


def test_executed_notebook_and_report(watched, tmp_path, monkeypatch, tally):
    """As parameters, prints, tables, figures, views and an error of a real execution; then as jobs of the report."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((*map(str, (Path(__file__).parent, Path(__file__).parents[1])),
                                                      os.environ.get("PYTHONPATH", ""))))
    nb = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# Trial"),
        nbformat.v4.new_code_cell("texts = []\nfolder = ''", metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(code) for code in CELLS)])
    nbformat.write(nb, tmp_path / "trial.ipynb")
    job, echo = tmp_path / "jobs" / file_name(PAYLOADS["script"]), io.StringIO()
    result = run_notebook(tmp_path / "trial.ipynb", {"texts": ALL, "folder": str(tmp_path)}, job, echo=echo)
    assert result.state == "failed" and result.reason.startswith("cell 8: ValueError"), result.reason[:400]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", echo.getvalue())
    page = watched.open(job / "report.html", job / "plotly.min.js")
    page.wait_for_selector(".sgpo-plot .main-svg")
    watched.harmless(ALL)
    jobs = [result]
    for text in ALL[1:]:
        folder = tmp_path / "more" / file_name(text)
        folder.mkdir(parents=True)
        (folder / "parameters.yaml").write_text(json.dumps({"notebook": text, "parameters": {text: text}}))
        (folder / "FAILED.json").write_text(json.dumps({"error": text, "message": text, "cure": text}))
        jobs.append(read_job(folder))
    runs = [load_run(tmp_path / "runs" / file_name(text)) for text in ALL]
    out = tmp_path / "out"
    watched.open(write_report(" ".join(ALL), jobs, runs, out), out / "plotly.min.js")
    watched.harmless(ALL)
    inside = out / "notebooks" / f"{result.name}.html"
    assert watched.page.evaluate("[...document.links].map(a => a.href)") == [inside.as_uri()]
    watched.open(inside, out / "plotly.min.js").wait_for_selector(".sgpo-plot .main-svg")
    watched.harmless(ALL)
    tally(10, "hostile text, executed notebook and report",
          f"{len(ALL)} payloads as parameters, outputs, job names: {NONE}")


def test_outputs_that_are_markup_do_nothing_in_the_page(watched, tmp_path, sets, tally):
    """Where a cell has put out text as HTML, SVG, Markdown, LaTeX or JavaScript itself, the page's policy stops it."""
    kinds, stopped = ("text/html", "image/svg+xml", "text/markdown", "text/latex", "application/javascript"), 0
    for texts in sets:
        outputs = [nbformat.v4.new_output("display_data", {kind: text}) for kind in kinds
                   for text in sorted(texts, key=lambda text: "<!--" in text)]  # an open comment hides what follows
        code = nbformat.v4.new_code_cell("show()", outputs=outputs)
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T"), code])
        nbformat.write(nb, tmp_path / "n.ipynb")
        (tmp_path / "page.html").write_text(pages.notebook_html(tmp_path / "n.ipynb"), encoding="utf-8")
        watched.open(tmp_path / "page.html")
        noted = watched.settled(200)
        told = [text for what, text in noted if what == "console" and "Content Security Policy" in text]
        assert [n for n in noted if n[1] not in told and n != ("led to", "chrome-error://chromewebdata/")] == []
        stopped += len(told)
        if texts is ALL:
            assert len(told) >= 10, "the page did hold markup, which would have run"
    tally(10, "hostile text, outputs that are markup",
          f"{len(ALL)} payloads as outputs of {len(kinds)} kinds: {NONE}; {stopped} attempts stopped by the policy")


def test_exports(watched, tmp_path, tally):
    table = pd.DataFrame({"method": ALL, "text": ALL, "test": 0.5, ALL[5]: -1.5, "digits": "-3e-4"})
    exports.write_exports(tmp_path, {"t": (" ".join(ALL), table)}, {})
    rendered = []
    for render in (pages._markdown, MarkdownIt("commonmark").enable("table").render):
        rendered.append(render((tmp_path / "results.md").read_text(encoding="utf-8")))
        (tmp_path / "md.html").write_text(f'<meta charset="utf-8">{rendered[-1]}', encoding="utf-8")
        watched.open(tmp_path / "md.html")
        watched.harmless(ALL)
        assert set(re.findall(r'href="([^"]*)', rendered[-1])) == {"t.csv", "t.tex"} and "<strong>" not in rendered[-1]
    cells = list(csv.reader((tmp_path / "t.csv").open(encoding="utf-8", newline="")))
    assert [c for line in cells for c in line if c[:1] in ("=", "+", "-", "@", "\t", "\r") and c not in (
        "-1.5", "-3e-4")] == []
    assert [squeezed(visible(line[1].removeprefix("'"))) for line in cells[1:]] == [
        squeezed(visible(text.removeprefix("'"))) for text in ALL]
    tex = (tmp_path / "t.tex").read_text(encoding="utf-8")
    assert set(re.findall(r"\\([a-zA-Z]+)", tex)) <= {
        "begin", "end", "caption", "toprule", "midrule", "endhead", "bottomrule", "textbackslash", "textasciitilde",
        "textasciicircum", "textless", "textgreater", "textbar", "alpha"}
    assert not re.search(r"\\\\\s*[\[*]|\^\^|(?<!\\)[#%~]|[\x00-\x09\x0b-\x1f]", tex)
    tally(10, "hostile text, exports",
          f"{len(ALL)} payloads as Markdown (2 renderers), CSV, LaTeX: {NONE}, no formula, no command")


def on_a_terminal(*command: str, environment: dict[str, str]) -> str:
    """What a program writes to a pseudo-terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "sgpo_lib.cli", *command], stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True, env={**os.environ, **environment})
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += (got := os.read(ours, 65536))
        except OSError:  # the other side is closed
            got = b""
        if not got:
            break
    process.wait(30)
    os.close(ours)
    return seen.decode("utf-8", "replace")


def test_terminal(tmp_path, tally):
    """`sgpo status` and a message of an error, on a pseudo-terminal that would obey escape sequences."""
    monitor_of(tmp_path, ALL).close()
    for text in ALL:
        folder = tmp_path / "jobs" / "single" / file_name(text)
        folder.mkdir(parents=True)
        (folder / "parameters.yaml").write_text(json.dumps({"notebook": text, "parameters": {}}))
        (folder / "FAILED.json").write_text(json.dumps({"error": text, "message": text, "host": text}))
    wide = {"SGPO_RUNS": str(tmp_path), "COLUMNS": "20000", "TERM": "xterm-256color"}
    seen = on_a_terminal("status", environment=wide)
    plain = re.sub(r"\x1b\[[\d;]*m", "", seen)  # rich's own colours
    bad = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\u200b\u200f]|\r(?!\n)"
    assert "\x1b[32m" in seen or "\x1b[31m" in seen, "a terminal, with colours"
    assert re.findall(bad, plain) == []
    shown = squeezed(plain)
    assert [t for t in ALL if squeezed(visible(t))[:150] not in shown] == []
    told = on_a_terminal("status", PAYLOADS["terminal link"] + PAYLOADS["reordered"], environment=wide)
    assert "press" in told and re.findall(bad, told) == []
    for command in (["plan", "--profile", PAYLOADS["terminal link"]], ["profile", PAYLOADS["terminal link"]]):
        assert re.findall(bad, on_a_terminal(*command, environment=wide)) == []
    assert visible_in({"".join(ALL): ["".join(ALL), 1]}) == {visible("".join(ALL)): [visible("".join(ALL)), 1]}
    echo = io.StringIO()
    log = LogWriter(io.StringIO(), echo, "job: ", str)
    log.write("\n".join(ALL) + "\n")
    assert re.findall(bad, echo.getvalue()) == [] and "[U+001B]" in echo.getvalue()
    tally(10, "hostile text, terminal",
          f"{len(ALL)} payloads as names, hosts and reasons: 0 escape sequences but colours")

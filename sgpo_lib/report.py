"""The report of a batch: one self-contained folder that opens from disk, offline.

    OUT/index.html           results, figures, how each job ended
    OUT/notebooks/JOB.html   executed notebooks as pages, JOB-token_kl.html beside those that have a KL page
    OUT/plotly.min.js        draws the figures of all pages
    OUT/results.csv          the table as numbers
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import plotly.graph_objects as go

from sgpo_lib import comparison, figures
from sgpo_lib.collapse import Watch
from sgpo_lib.escaping import Html, json_html
from sgpo_lib.exports import csv_text
from sgpo_lib.frames import comparable, runs_frame, summaries_frame
from sgpo_lib.jobs import JobResult
from sgpo_lib.pages import FIGURE_SCRIPT, KL_LINK, KL_PAGE, PLOTLY_TAG, POLICY, figure_html, put_plotly
from sgpo_lib.runs import Run, environment
from sgpo_lib.storage import write_atomic

_STYLE = Html("""
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5b6470; --line: #e0e3e7; --card: #ffffff; --page: #f6f7f9;
  --link: #0b63a5; --good: #14713f; --bad: #b3261e; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa3ae; --line: #30353c; --card: #16191d;
  --page: #0e1013; --link: #7cb8ff; --good: #5fd08f; --bad: #ff8a80; --warn: #f0c060; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 40px 0 12px; }
h3 { font-size: 16px; margin: 28px 0 8px; color: var(--soft); font-weight: 600; }
p { margin: 8px 0; max-width: 75ch; } .soft { color: var(--soft); font-size: 14px; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; margin: 14px 0;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { white-space: normal; }
.name { white-space: nowrap; }
.done { color: var(--good); } .failed, .blocked { color: var(--bad); }
.running, .queued, .stopped, .waiting { color: var(--warn); }
.facts { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 18px 0 0; padding: 0; list-style: none;
  font-size: 14px; }
.facts b { display: block; font-size: 19px; font-weight: 600; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
""")
_DASH = Html("&ndash;")


def write_report(title: str, jobs: Sequence[JobResult], runs: Sequence[Run], out: Path) -> Path:
    """Write the report folder and return its index.html. Running it again replaces what it wrote before."""
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    put_plotly(out)
    linked = {job.name for job in jobs if _copy_page(job, out / "notebooks")}
    parts = [_head(title, jobs, runs)]
    tables = []
    for profile, chosen in sorted(comparable(runs).items(), key=lambda item: -len(item[1])):
        metrics, summaries = runs_frame(chosen), summaries_frame(chosen)
        table = comparison.final_table(summaries, metrics)
        tables.append(table.assign(profile=profile))
        others = sum(r.config.profile == profile for r in runs) - len(chosen)
        parts.append(_profile(profile, chosen, metrics, table, others))
    if not runs:
        parts.append(Html("<h2>Results</h2><p class='soft'>No training run belongs to these jobs yet.</p>"))
    parts += [_warnings(runs), _jobs(jobs, linked)]
    parts.append(_machine(runs))
    results = pd.concat(tables) if tables else pd.DataFrame()
    write_atomic(out / "results.csv", csv_text(results))
    dark = json_html(figures.template(dark=True).to_plotly_json())
    page = Html('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{}<meta name="viewport" '
                'content="width=device-width, initial-scale=1"><title>{}</title><style>{}</style>{}</head><body>'
                '<main>{}</main><script type="application/json" id="sgpo-dark">{}</script>{}</body></html>\n').format(
        POLICY, title, _STYLE, PLOTLY_TAG, Html("").join(parts), dark, FIGURE_SCRIPT)
    write_atomic(out / "index.html", page)
    return out / "index.html"


def _copy_page(job: JobResult, folder: Path) -> bool:
    """Copy a job's page, pointed at the report's plotly.js and its own KL page. False where the job has none."""
    source, kl_name = job.folder / "report.html", f"{job.name}-{KL_PAGE}"
    (folder / kl_name).unlink(missing_ok=True)
    if not source.exists():
        (folder / f"{job.name}.html").unlink(missing_ok=True)
        return False
    page = source.read_text(encoding="utf-8").replace(PLOTLY_TAG, PLOTLY_TAG.replace("plotly", "../plotly", 1))
    if (job.folder / KL_PAGE).exists():
        shutil.copyfile(job.folder / KL_PAGE, folder / kl_name)
        page = page.replace(KL_LINK, KL_LINK.replace(KL_PAGE, quote(kl_name)))
    write_atomic(folder / f"{job.name}.html", page)
    if (job.folder / "notebook.ipynb").exists():
        shutil.copyfile(job.folder / "notebook.ipynb", folder / f"{job.name}.ipynb")
    return True


def _head(title: str, jobs: Sequence[JobResult], runs: Sequence[Run]) -> Html:
    done = sum(j.state == "done" for j in jobs)
    facts = [(f"{done} of {len(jobs)}", "jobs done"), (str(sum(r.done for r in runs)), "training runs finished"),
             (_duration(sum(j.seconds for j in jobs)), "notebook time, summed"),
             (time.strftime("%d %B %Y, %H:%M"), "written")]
    items = Html("").join(Html("<li><b>{}</b>{}</li>").format(value, name) for value, name in facts)
    return Html("<h1>{}</h1><p class='soft'>Strategy-Guided Policy Optimization (SGPO, arXiv 2606.24064): "
                "a policy samples with and without a written strategy, and learns without it what it can do with "
                "it.</p><ul class='facts'>{}</ul>").format(title, items)


def _profile(profile: str, runs: Sequence[Run], metrics: pd.DataFrame, table: pd.DataFrame, others: int) -> Html:
    """Table and figures of one profile."""
    parts = [Html("<h2>Results on the profile <code>{}</code></h2>").format(profile)]
    unfinished = [r for r in runs if not r.done]
    if others:
        parts.append(Html("<p class='soft'>{} more runs of this profile have other settings (steps, learning rate, "
                          "...) and are left out: averages over seeds are of one setting.</p>").format(others))
    if unfinished:
        parts.append(Html("<p class='soft'>{} of {} runs are not finished: {}.</p>").format(
            len(unfinished), len(runs), ", ".join(f"{r.folder.name} ({r.state})" for r in unfinished)))
    if len(table):
        parts.append(_table(table, threshold=0.5))
    shown: list[go.Figure] = []
    kinds = set(metrics["kind"]) if len(metrics) else set()
    if "eval" in kinds:
        shown.append(figures.learning_curves(metrics, title="Unguided accuracy on validation problems"))
    if "train" in kinds:
        train = metrics[metrics["kind"] == "train"]
        if "sgpo" in set(train["method"]):
            shown.append(figures.alpha_against_pass_rate(metrics))
        shown += [figures.training_panel(metrics), figures.phase_seconds(metrics)]
    parts += [Html("<div class='card'>{}</div>").format(figure_html(str(f.to_json()))) for f in shown]
    if shown:
        parts.append(Html("<p class='soft'>Lines are means over seeds; bands are 95% t-intervals of that mean.</p>"))
    return Html("").join(parts)


def _table(table: pd.DataFrame, threshold: float) -> Html:
    rows = Html("")
    for row in table.to_dict("records"):
        label, colour, _ = figures.method_style(str(row["method"]))
        interval = "" if math.isnan(row["low"]) else Html(" <span class='soft'>{:.3f} to {:.3f}</span>").format(
            max(0, row["low"]), min(1, row["high"]))
        reached = Html("{:.0f} <span class='soft'>{} of {} runs</span>").format(
            row["steps_to_threshold"], row["reached"], row["runs"])
        rows += Html("<tr><td class='name'><span style='color:{}'>&#9632;</span>&nbsp;{}</td><td class='number'>{}</td>"
                     "<td class='number'>{}{}</td><td class='number'>{}</td><td class='number'>{}</td></tr>").format(
            colour, label, row["runs"], _number(row["accuracy"], 3), interval, reached if row["reached"] else _DASH,
            _number(row["cpu_seconds"], 0))
    return Html("<div class='card'><table><thead><tr><th>method</th><th class='number'>seeds</th>"
                "<th class='number'>test accuracy, unguided (95% interval over seeds)</th>"
                "<th class='number'>steps to validation accuracy {}</th><th class='number'>CPU seconds of training "
                "steps</th></tr></thead><tbody>{}</tbody></table></div>").format(threshold, rows)


def _warnings(runs: Sequence[Run]) -> Html:
    """Signs of a collapse (collapse.py), also those that went again; nothing without runs."""
    found = [(run.folder.name, sign) for run in runs for sign in Watch(run.metrics()).found]
    if not found:
        return Html("<p class='soft'>No sign of a collapse in the metrics of {} runs (entropy, reward, variance, "
                    "clipped KL, lengths).</p>").format(len(runs)) if runs else Html("")
    rows = Html("").join(Html("<tr><td>{}</td><td class='name'>{}</td><td class='{}'>{}</td><td>{}</td></tr>").format(
        name, sign.steps, "" if sign.until else "failed", sign.seen, sign.cure) for name, sign in found)
    return Html("<h2>Warnings</h2><div class='card'><table><thead><tr><th>run</th><th>when</th><th>what</th>"
                "<th>what to try</th></tr></thead><tbody>{}</tbody></table></div>").format(rows)


def _jobs(jobs: Sequence[JobResult], linked: set[str]) -> Html:
    rows = Html("")
    for job in jobs:
        name = Html("<a href='notebooks/{}.html'>{}</a>").format(quote(job.name), job.name) if job.name in linked \
            else job.name
        told = ", ".join(f"{k}={v}" for k, v in job.parameters.items())
        reason = Html("<br><span class='soft'>{}</span>").format(job.reason[:600]) if job.reason else ""
        rows += Html("<tr><td>{}</td><td><code>{}</code></td><td><code>{}</code></td><td class='{}'>{}{}</td>"
                     "<td class='number'>{}</td></tr>").format(
            name, job.notebook, told, job.state, job.state, reason, _duration(job.seconds) if job.seconds else _DASH)
    return Html("<h2>Executed notebooks</h2><div class='card'><table><thead><tr><th>job</th><th>notebook</th>"
                "<th>parameters</th><th>state</th><th class='number'>time</th></tr></thead>"
                "<tbody>{}</tbody></table></div>").format(rows)


def _machine(runs: Sequence[Run]) -> Html:
    """Where the runs were made: the environment.json of the newest one, else this machine."""
    files = [p for r in runs if (p := r.folder / "environment.json").exists()]
    newest = max(files, key=lambda p: p.stat().st_mtime) if files else None
    told: dict[str, Any] = json.loads(newest.read_text(encoding="utf-8")) if newest else environment()
    packages = ", ".join(f"{k} {v}" for k, v in told.get("packages", {}).items())
    rows = [("platform", told.get("platform")), ("CPUs", told.get("cpus")), ("GPU", told.get("gpu")),
            ("Python", told.get("python")), ("commit", told.get("commit")), ("packages", packages)]
    body = Html("").join(Html("<tr><th>{}</th><td>{}</td></tr>").format(k, v) for k, v in rows if v)
    return Html("<h2>Machine</h2><div class='card'><table><tbody>{}</tbody></table></div>").format(body)


def _number(value: Any, digits: int) -> str:
    return _DASH if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""The monitor without a browser's script: last values as a table, for executed notebooks, pages and logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgpo_lib.escaping import Html, visible
from sgpo_lib.widgets.run_monitor.curves import Curve, clock
from sgpo_lib.widgets.run_monitor.following import Follower


def progress(status: dict[str, Any]) -> str:
    """`step 12 of 40`."""
    step, total = status["step"], status["total"]
    return f"step {'–' if step is None else step}{f' of {total}' if total is not None else ''}"


def last(run: Follower, curve: Curve) -> str:
    """Last value of a curve and its step; a dash where there is none."""
    table = run.tables[curve.table]
    found = [(s, v) for s, v in zip(table["step"], table[curve.column], strict=True) if v is not None]
    if not found:
        return "–"
    step, value = found[-1]
    return f"{float(f'{value:.3g}'):g}" + ("" if step == run.step else f" (step {step})")


def with_values(runs: Sequence[Follower], curves: Sequence[Curve]) -> list[Curve]:
    """Curves that have a value in one of the runs."""
    return [c for c in curves if any(v is not None for r in runs for v in r.tables[c.table][c.column])]


def text(runs: Sequence[Follower], state: Sequence[dict[str, Any]], curves: Sequence[Curve]) -> str:
    """One line on each run, and one on each of its warnings."""
    lines = []
    for run, status in zip(runs, state, strict=True):
        values = [f"{c.name} {last(run, c)}" for c in with_values([run], curves)]
        parts = [f"{status['state']}, {progress(status)}", f"time left {clock(status['left'])}", *values]
        lines.append(f"{status['name']}: " + ", ".join(parts) + (f" [{status['note']}]" if status["note"] else ""))
        lines += [f"  warning, {told}" for told in status["warnings"]]
    return visible("\n".join(lines))


def table(runs: Sequence[Follower], state: Sequence[dict[str, Any]], curves: Sequence[Curve], title: str) -> Html:
    """HTML table, one column per run, and below it their warnings. Names and messages are escaped."""
    rows = [("State", [s["state"] for s in state]), ("Progress", [progress(s) for s in state]),
            ("Time left", [clock(s["left"]) for s in state])]
    rows += [(c.title, [last(r, c) for r in runs]) for c in with_values(runs, curves)]
    if any(s["test"] is not None for s in state):
        rows.append(("Test accuracy (share)", ["–" if s["test"] is None else f"{s['test']:.3g}" for s in state]))
    if any(s["note"] or s["not_finite"] for s in state):
        rows.append(("Notes", ["; ".join(filter(None, (s["note"], _not_finite(s)))) or "–" for s in state]))
    def cell(tag: Html, align: str, told: str) -> Html:
        return tag.format(f"padding:2px 10px;border-bottom:1px solid #8884;text-align:{align}", told)

    column, row, data = Html('<th scope="col" style="{}">{}</th>'), Html('<th scope="row" style="{}">{}</th>'), Html(
        '<td style="{}">{}</td>')
    head = Html("").join(cell(column, "right", s["name"]) for s in state)
    body = Html("").join(Html("<tr>{}{}</tr>").format(
        cell(row, "left;font-weight:normal", label), Html("").join(cell(data, "right", told) for told in cells))
        for label, cells in rows)
    warnings = Html("").join(Html("<p><b>{}, warning</b>, {}.</p>").format(s["name"], told)
                             for s in state for told in s["warnings"])
    return Html('<table style="border-collapse:collapse"><caption style="text-align:left;padding:2px 10px">'
                "{}: last values</caption><thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table>{}").format(
        title or "Runs", head, body, warnings)


def _not_finite(status: dict[str, Any]) -> str:
    return f"not finite: {', '.join(status['not_finite'])}" if status["not_finite"] else ""

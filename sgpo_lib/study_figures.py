"""Figures of a study (study.py, claims.py): DataFrame in, plotly Figure out; the look is that of figures.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sgpo_lib.figures import LABELS, SHARES, add_curve, method_style, methods_of, missing, plain, template

SMOOTHED = 5
"""Steps of the centred moving average that `dynamics` takes within each run."""
_ABOVE, _BELOW, _OPEN = "#0072B2", "#D55E00", "#7F7F7F"


def _colour(low: float, high: float) -> str:
    return _ABOVE if low > 0 else _BELOW if high < 0 else _OPEN


@plain
def differences(table: pd.DataFrame, panels: Mapping[str, str], title: str,
                published: Mapping[str, float] | None = None) -> go.Figure:
    """Differences to the reference with their intervals: one line per variant, one panel per measure.

    `panels`: column of `Study.accuracy_table` -> panel title; columns method, seeds, and each with _low and _high.
    Blue: the interval lies above 0, orange: below, grey: it holds 0. Without an interval (one seed) nothing is drawn.
    `published`: variant -> the paper's difference, as an open diamond in the first panel.
    """
    columns = [c for c in panels if c in table and table[f"{c}_low"].notna().any()]
    if not columns:
        return missing(table, ["method", *(f"{c}_low" for c in panels)], title) or go.Figure()
    rows = table[table[[f"{c}_low" for c in columns]].notna().any(axis=1)]
    labels = [f"{method_style(m)[0]}, {s} seeds" for m, s in zip(rows["method"], rows["seeds"], strict=True)]
    figure = make_subplots(1, len(columns), shared_yaxes=True, horizontal_spacing=0.03,
                           subplot_titles=[panels[c] for c in columns])
    figure.update_layout(template=template(), title_text=title, height=190 + 26 * len(rows), hovermode="closest",
                         margin={"t": 90}, legend={"y": -0.12})
    figure.update_annotations(font_size=13)
    names = {_ABOVE: "interval above 0", _BELOW: "interval below 0", _OPEN: "interval holds 0"}
    for col, column in enumerate(columns, start=1):
        low, high = rows[f"{column}_low"], rows[f"{column}_high"]
        colours = [_colour(a, b) for a, b in zip(low, high, strict=True)]
        for colour, name in names.items():
            part = [i for i, c in enumerate(colours) if c == colour and not math.isnan(low.iloc[i])]
            told = rows.iloc[part]
            figure.add_trace(go.Scatter(
                x=list(told[column]), y=[labels[i] for i in part], mode="markers", name=name, legendgroup=name,
                showlegend=col == 1, marker={"size": 9, "color": colour}, hovertemplate="%{x:.3f}",
                error_x={"type": "data", "symmetric": False, "array": list(high.iloc[part] - told[column]),
                         "arrayminus": list(told[column] - low.iloc[part]), "thickness": 2, "width": 3,
                         "color": colour}), 1, col)
        figure.add_vline(x=0, line={"color": "#555555", "width": 1.5}, row=1, col=col)
    known = [((published or {})[m], label) for m, label in zip(rows["method"], labels, strict=True)
             if m in (published or {})]
    if known:
        figure.add_trace(go.Scatter(x=[v for v, _ in known], y=[label for _, label in known], mode="markers",
                                    name="published difference (7B, mean of four benchmarks)",
                                    marker={"size": 9, "symbol": "diamond-open", "color": "#222222"}), 1, 1)
    figure.update_yaxes(categoryorder="array", categoryarray=labels, autorange="reversed")
    return figure


@plain
def dynamics(metrics: pd.DataFrame, panels: Sequence[tuple[str, Sequence[str]]], title: str,
             titles: Sequence[str] = ()) -> go.Figure:
    """Training metrics over steps side by side: mean over seeds with its 95% band, moving average over 5 steps.

    `panels`: pairs of a metric and the variants shown for it. `titles`: of the panels, instead of their metrics' names.
    """
    if empty := missing(metrics, ["method", "step"], title, "train"):
        return empty
    train = metrics[metrics["kind"] == "train"]
    figure = make_subplots(1, len(panels), horizontal_spacing=0.09,
                           subplot_titles=list(titles) or [LABELS.get(m, m) for m, _ in panels])
    figure.update_layout(template=template(), title_text=title, height=430, hovermode="closest", margin={"t": 90},
                         legend={"y": -0.22})
    figure.update_annotations(font_size=13)
    named: set[str] = set()
    for col, (metric, methods) in enumerate(panels, start=1):
        for method in [m for m in methods if metric in train and (train["method"] == m).any()]:
            part = train[(train["method"] == method) & train[metric].notna()].sort_values("step").copy()
            part[metric] = part.groupby("run")[metric].transform(
                lambda v: v.rolling(SMOOTHED, center=True, min_periods=1).mean())
            name, colour, dash = method_style(method)
            add_curve(figure, part, metric, name, colour, dash, 1, col, legend=name not in named, group=name)
            named.add(name)
        figure.update_xaxes(title_text="training step", row=1, col=col)
        if metric in SHARES:
            figure.update_yaxes(range=[0, 1.02], row=1, col=col)
    return figure


@plain
def pointing(tokens: pd.DataFrame) -> go.Figure:
    """Fig. 5 as a mean over problems: KL and SFT loss per reasoning step, of the strategy's words and the others.

    `tokens` as `analysis.token_table` gives, of one world. The tokens of a problem are not independent: its mean is
    one value, and the error bars are 1.96 standard errors over problems.
    """
    title = "Per reasoning step: KL and SFT loss of the strategy's words and of all other tokens"
    if empty := missing(tokens, ["stage", "problem", "kl", "sft_loss", "critical"], title):
        return empty
    stages = sorted(set(tokens["stage"]), key=lambda v: v if v >= 0 else math.inf)
    names = {stage: "opening" if stage == 0 else "answer" if stage < 0 else f"step {stage}" for stage in stages}
    figure = make_subplots(1, 2, subplot_titles=["KL guided || unguided (nats per token)", "SFT loss (nats per token)"])
    figure.update_layout(template=template(), title_text=title, height=400, barmode="group", margin={"t": 90},
                         hovermode="closest")
    figure.update_annotations(font_size=13)
    for col, column in enumerate(("kl", "sft_loss"), start=1):
        for critical, name, colour in ((True, "words of the strategy", "#D55E00"), (False, "other tokens", "#0072B2")):
            part = tokens[tokens["critical"] == critical]
            of_problem = part.groupby(["stage", "problem"])[column].mean()
            told = of_problem.groupby("stage").agg(["mean", "sem"]).reindex(stages).fillna(0.0)
            figure.add_trace(go.Bar(
                x=[names[stage] for stage in told.index], y=list(told["mean"]), name=name, marker={"color": colour},
                error_y={"type": "data", "array": list(1.96 * told["sem"]), "thickness": 1.5, "width": 3},
                showlegend=col == 1, legendgroup=name), 1, col)
    return figure


@plain
def sweeps(table: pd.DataFrame, column: str = "speed_difference",
           title: str = "One field at a time: mean accuracy while training, minus SGPO's") -> go.Figure:
    """Small multiples of a difference to the reference over the values of single fields (`Study.sweep_table`).

    The paper's value stands at 0, in orange.
    """
    if empty := missing(table, ["field", "value", column], title):
        return empty
    fields = list(dict.fromkeys(table["field"]))
    columns = min(3, len(fields))
    figure = make_subplots(-(-len(fields) // columns), columns, subplot_titles=fields, vertical_spacing=0.2,
                           shared_yaxes="all")
    figure.update_layout(template=template(), title_text=title, height=120 + 230 * -(-len(fields) // columns),
                         hovermode="closest", margin={"t": 90})
    figure.update_annotations(font_size=13)
    for place, field in enumerate(fields):
        row, col = place // columns + 1, place % columns + 1
        for paper, name, colour in ((True, "the paper's value", "#D55E00"), (False, "other values", "#0072B2")):
            part = table[(table["field"] == field) & (table["paper"] == paper)].fillna({column: 0.0})
            bars = {} if paper else {"error_y": {
                "type": "data", "symmetric": False, "array": list(part[f"{column}_high"] - part[column]),
                "arrayminus": list(part[column] - part[f"{column}_low"]), "thickness": 1.5, "width": 4}}
            figure.add_trace(go.Scatter(
                x=list(part["value"]), y=list(part[column]), mode="markers", name=name, legendgroup=name,
                showlegend=place == 0, marker={"size": 9, "color": colour}, **bars), row, col)
        order = list(table.loc[table["field"] == field, "value"])
        figure.add_hline(y=0, line={"color": "#9a9a9a", "width": 1}, row=row, col=col)
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=order, row=row, col=col)
    return figure


@plain
def by_world(table: pd.DataFrame, title: str, value: str = "test", unit: str = "test accuracy") -> go.Figure:
    """One group of bars per world: a variant's mean share with its interval, cut at 0 and 1.

    Columns where, method, and `value`, `value`_low, `value`_high.
    """
    if empty := missing(table, ["where", "method", value], title):
        return empty
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 440, "hovermode": "closest"})
    for method in methods_of(table):
        part = table[table["method"] == method]
        name, colour, _ = method_style(method)
        low, high = part[f"{value}_low"].clip(lower=0.0), part[f"{value}_high"].clip(upper=1.0)
        figure.add_trace(go.Bar(
            x=list(part["where"]), y=list(part[value]), name=name, marker={"color": colour},
            error_y={"type": "data", "symmetric": False, "array": list(high - part[value]),
                     "arrayminus": list(part[value] - low), "thickness": 1.5, "width": 3}))
    figure.update_layout(barmode="group")
    figure.update_yaxes(title_text=unit)
    return figure

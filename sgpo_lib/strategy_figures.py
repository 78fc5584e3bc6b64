"""Figures of notebook 01: quality bands, lengths, leaks of strategy descriptions. DataFrame in, plotly Figure out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from sgpo_lib.figures import missing, plain, template

BAND_COLOURS = {"High": "#009E73", "Medium": "#E69F00", "Low": "#D55E00"}
KIND_COLOURS = {"good": "#009E73", "vague": "#999999", "too detailed": "#0072B2", "wrong type": "#CC79A7",
                "leaking": "#D55E00", "": "#0072B2"}  # fmt: skip
SYMBOLS = ("circle", "square", "diamond", "x", "triangle-up", "cross")


@plain
def band_bars(table: pd.DataFrame, title: str) -> go.Figure:
    """Share of descriptions in each band, one bar per row of `quality.band_table`."""
    if empty := missing(table, list(BAND_COLOURS), title):
        return empty
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "barmode": "stack",
                               "height": 150 + 44 * len(table), "hovermode": "y unified"})  # fmt: skip
    for band, colour in BAND_COLOURS.items():
        shares = list(table[band])
        figure.add_trace(go.Bar(y=list(table.index), x=shares, orientation="h", name=band, marker={"color": colour},
                                text=[f"{s:.0%}" if s >= 0.05 else "" for s in shares], textposition="inside",
                                insidetextanchor="middle", hovertemplate="%{x:.1%}"))  # fmt: skip
    figure.update_xaxes(title_text="share of descriptions", range=[0, 1], tickformat=".0%")
    figure.update_yaxes(autorange="reversed")
    return figure


@plain
def abstraction(frame: pd.DataFrame) -> go.Figure:
    """Length against the problem's numbers that a description repeats, a mark per candidate, by kind."""
    title = "Length and abstraction"
    if empty := missing(frame, ["words", "own_numbers", "kind", "problem"], title):
        return empty
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 420,
                               "hovermode": "closest"})  # fmt: skip
    for i, (kind, part) in enumerate(frame.groupby("kind")):
        figure.add_trace(go.Scatter(
            x=list(part["words"]), y=list(part["own_numbers"]), mode="markers", name=str(kind) or "candidates",
            text=list(part["problem"]), hovertemplate="%{text}: %{x} words, %{y} numbers<extra></extra>",
            marker={"size": 8, "opacity": 0.65, "symbol": SYMBOLS[i % len(SYMBOLS)],
                    "color": KIND_COLOURS.get(str(kind), "#0072B2")}))  # fmt: skip
    figure.update_xaxes(title_text="words")
    figure.update_yaxes(title_text="numbers of the problem repeated")
    return figure


@plain
def leak_bars(frame: pd.DataFrame) -> go.Figure:
    """Descriptions of each kind in which the check found an answer, or an intermediate result alone. Shares."""
    title = "Descriptions with leaks, by kind"
    if empty := missing(frame, ["kind", "answer_leaks", "intermediate_leaks"], title):
        return empty
    found = frame.assign(answer=frame["answer_leaks"] > 0,
                         intermediate=(frame["intermediate_leaks"] > 0) & (frame["answer_leaks"] == 0))  # fmt: skip
    table = found.groupby("kind")[["answer", "intermediate"]].mean()
    labels = [str(kind) or "candidates" for kind in table.index]
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "barmode": "stack",
                               "height": 150 + 44 * len(table), "hovermode": "y unified"})  # fmt: skip
    for name, colour in (("answer", "#D55E00"), ("intermediate", "#E69F00")):
        figure.add_trace(go.Bar(y=labels, x=list(table[name]), orientation="h", name=f"{name} found",
                                marker={"color": colour}, hovertemplate="%{x:.0%}"))  # fmt: skip
    figure.update_xaxes(title_text="share of the kind's descriptions", range=[0, 1], tickformat=".0%")
    figure.update_yaxes(autorange="reversed")
    return figure

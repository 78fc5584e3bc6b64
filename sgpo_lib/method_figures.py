"""Figures of notebook 00: the method's functions drawn from small tables. DataFrame in, plotly Figure out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from sgpo_lib.figures import AUTONOMOUS, GUIDED, missing, plain, template

COLOURS = (AUTONOMOUS, "#D55E00", "#009E73", GUIDED, "#CC79A7", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@plain
def lines(df: pd.DataFrame, x: str, y: str, by: str, title: str, labels: tuple[str, str]) -> go.Figure:
    """One line per value of the column `by`, told apart by colour and dash; `labels` are the axis titles."""
    if empty := missing(df, [x, y, by], title):
        return empty
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 380})
    for i, (name, part) in enumerate(df.groupby(by, sort=False)):
        figure.add_trace(go.Scatter(x=list(part[x]), y=list(part[y]), name=str(name), mode="lines", line={
            "color": COLOURS[i % len(COLOURS)], "dash": DASHES[i % len(DASHES)], "width": 2.5}))
    figure.update_xaxes(title_text=labels[0], hoverformat=".3g")
    figure.update_yaxes(title_text=labels[1], hoverformat=".3g")
    return figure


@plain
def masked_tokens(df: pd.DataFrame, delta: float) -> go.Figure:
    """Divergence of each token, those beyond delta hatched (Eq. 5). Columns token, kl (nats)."""
    title = f"Which tokens are learned: d ≤ delta = {delta:g} nats"
    if empty := missing(df, ["token", "kl"], title):
        return empty
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 360, "barmode": "overlay"})
    for name, rows, colour, pattern in (("kept", df["kl"] <= delta, AUTONOMOUS, ""),
                                        ("masked", df["kl"] > delta, "#9a9a9a", "/")):
        figure.add_trace(go.Bar(x=[f"{i + 1} {token}" for i, token in enumerate(df["token"])],
                                y=list(df["kl"].where(rows)), name=name, hovertemplate="%{y:.3g} nats",
                                marker={"color": colour, "pattern": {"shape": pattern}}))
    figure.add_hline(y=delta, line={"dash": "dash", "color": "#D55E00"}, annotation_text="delta",
                     annotation_position="top left")
    figure.update_yaxes(title_text="d (nats)")
    return figure


@plain
def weight_map(df: pd.DataFrame) -> go.Figure:
    """alpha(q) over both pass rates as a map with contours. Columns p_auto, p_guide, alpha."""
    title = "alpha(q) over both pass rates (Eq. 6)"
    if empty := missing(df, ["p_auto", "p_guide", "alpha"], title):
        return empty
    grid = df.pivot_table(index="p_guide", columns="p_auto", values="alpha")
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 460, "hovermode": "closest"})
    figure.add_trace(go.Contour(
        x=list(grid.columns), y=list(grid.index), z=grid.to_numpy().tolist(), colorscale="Viridis", zmin=0.0,
        zmax=float(grid.max().max()),
        contours={"start": 0.1, "end": 0.7, "size": 0.1, "showlabels": True, "coloring": "heatmap",
                  "labelfont": {"color": "white"}}, line={"color": "white", "smoothing": 0},
        colorbar={"title": "alpha"}, hovertemplate="p_auto %{x:.2f}, p_guide %{y:.2f}: alpha %{z:.3f}<extra></extra>"))
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", name="no benefit: p_guide = p_auto",
                                line={"color": "white", "dash": "dash"}, hoverinfo="skip"))
    figure.update_xaxes(title_text="p_auto: pass rate without the strategy", range=[0, 1])
    figure.update_yaxes(title_text="p_guide: pass rate with it", range=[0, 1])
    return figure

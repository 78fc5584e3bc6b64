"""Figures of notebook 04: where the KL of responses sits, what delta masks, how it drains. DataFrame in, Figure out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from sgpo_lib.figures import AUTONOMOUS, GUIDED, missing, plain, template

MEASURES = {"kl": ("forward KL", AUTONOMOUS, "solid"), "reverse_kl": ("reverse KL", "#009E73", "dash"),
            "sft_loss": ("SFT loss", GUIDED, "dot")}  # fmt: skip
"""Column -> name, colour, dash."""


def _figure(title: str, x: str, y: str) -> go.Figure:
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 420})
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


@plain
def lorenz_curves(curves: dict[str, pd.DataFrame]) -> go.Figure:
    """Share of the sum that the largest tokens hold; the diagonal is an even spread.

    `curves`: column of `MEASURES` -> frame of `token_statistics.lorenz`.
    """
    figure = _figure("How few tokens hold the sum", "share of tokens, largest first", "share of the sum")
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", name="even", hoverinfo="skip",
                                line={"color": "#9a9a9a", "width": 1}))  # fmt: skip
    for column, frame in curves.items():
        name, colour, dash = MEASURES[column]
        figure.add_trace(go.Scatter(x=list(frame["share_of_tokens"]), y=list(frame["share_of_mass"]), mode="lines",
                                    name=name, line={"color": colour, "dash": dash}, hovertemplate="%{y:.2f}"))
    figure.update_xaxes(range=[0, 1])
    return figure.update_yaxes(range=[0, 1.02])


@plain
def delta_effect(frame: pd.DataFrame, chosen: float = 1.0) -> go.Figure:
    """What Eq. 5 masks at each delta: shares of tokens and of KL mass (`token_statistics.delta_curve`)."""
    title = f"What clipping at delta masks (vertical line: {chosen:g} nats)"
    if empty := missing(frame, ["delta", "tokens_masked", "mass_masked"], title):
        return empty
    figure = _figure(title, "delta (nats)", "share masked")
    for column, name, colour, dash in (("mass_masked", "of the KL mass", AUTONOMOUS, "solid"),
                                       ("tokens_masked", "of the tokens", GUIDED, "dot")):
        figure.add_trace(go.Scatter(x=list(frame["delta"]), y=list(frame[column]), mode="lines+markers", name=name,
                                    line={"color": colour, "dash": dash}, hovertemplate="%{y:.3f}"))
    figure.add_vline(x=chosen, line={"color": "#9a9a9a", "dash": "dash"})
    figure.update_xaxes(type="log")
    return figure.update_yaxes(range=[0, 1.02])


@plain
def drain(frame: pd.DataFrame) -> go.Figure:
    """Mean KL, the part that delta keeps, and SFT loss of one response over checkpoints (`microscope.drain_frame`)."""
    title = "One response while its strategy is absorbed"
    if empty := missing(frame, ["label", "kl", "kept_kl", "sft_loss"], title):
        return empty
    figure = _figure(title, "checkpoint", "nats per token (mean over the response)")
    kept = {"kept_kl": ("forward KL of the tokens that delta keeps", AUTONOMOUS, "dash")}
    for column, (name, colour, dash) in {"kl": MEASURES["kl"], **kept, "sft_loss": MEASURES["sft_loss"]}.items():
        figure.add_trace(go.Scatter(x=list(frame["label"]), y=list(frame[column]), mode="lines+markers", name=name,
                                    line={"color": colour, "dash": dash}, hovertemplate="%{y:.3f}"))
    return figure.update_yaxes(rangemode="tozero")

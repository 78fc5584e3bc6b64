"""Figures: DataFrame in, plotly Figure out. No files, no torch.

One look for all: a method has the same colour and dash everywhere (Okabe and Ito's colours, told apart by colour-blind
readers), axes carry units, the legend tells the number of seeds. Missing columns give an empty figure that says so.
plotly reads tags in texts; every function that draws is `plain`, so that names and labels stay what they are.

The frames: `metrics` has one row per logged step with the columns run, profile, method, seed, kind, step and the
metrics of `metrics.jsonl`; `summaries` one row per finished run. `frames.py` makes both from run folders.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sgpo_lib.escaping import label

P = ParamSpec("P")
METHODS = {  # name: label, colour, dash
    "sgpo": ("SGPO", "#0072B2", "solid"),
    "base": ("base", "#7F7F7F", "dot"),
    "sft_grpo": ("SFT+GRPO (12 samples)", "#D55E00", "dash"),
    "grpo8": ("GRPO (8 samples)", "#009E73", "dot"),
    "sft": ("SFT", "#CC79A7", "dashdot"),
    "luffy": ("LUFFY (11 samples, 1 expert)", "#E69F00", "longdash"),
    "luffy8": ("LUFFY (7 samples, 1 expert)", "#B8860B", "longdash"),
    "hpt": ("HPT (12 samples)", "#56B4E9", "longdashdot"),
    "no_distillation": ("w/o distillation", "#117733", "dot"),
    "no_grpo": ("w/o autonomous GRPO", "#AA3377", "dash"),
    "no_proximal": ("w/o proximal constraints", "#882255", "dot"),
    "no_kl_clip": ("w/o KL clipping", "#CC6677", "dashdot"),
    "no_target_selection": ("w/o target selection", "#999933", "longdash"),
    "no_adaptive_weight": ("alpha = 1", "#332288", "dash"),
    "guided_sft": ("direct SFT on o+", "#661100", "dashdot"),
    "reverse_kl": ("reverse KL", "#6699CC", "dot"),
    "group_advantage_weight": ("group-advantage weight", "#44AA99", "longdashdot"),
    "sgpo guided_side=frozen": ("SGPO, frozen guided side (ours)", "#000000", "dash"),
    "no_adaptive_weight guided_side=frozen": ("alpha = 1, frozen guided side (ours)", "#6A51A3", "dot"),
    "no_grpo guided_side=frozen": ("w/o autonomous GRPO, frozen guided side (ours)", "#DD77AA", "dot"),
    "sgpo guided_side=ema ema_decay=0.95": ("SGPO, averaged guided side (ours)", "#555555", "dashdot"),
}
"""Label, colour and dash of the named methods and two variants; others take what is left."""
_WORDS = {"guided_side=frozen": "frozen guided side", "guided_side=ema": "averaged guided side"}
_SPARE = ("#8C6D31", "#4D4D4D", "#5D4A7E", "#4B6C4B")
GUIDED, AUTONOMOUS = "#E69F00", "#0072B2"
"""Colours of the two prompts, where a figure compares them."""
LABELS = {
    "accuracy": "unguided accuracy", "reward_autonomous": "pass rate, autonomous", "reward_guided": "pass rate, guided",
    "alpha": "weight alpha(q), mean", "entropy": "entropy (nats per token)",
    "response_length": "response length (tokens)", "kl_mean": "KL guided || unguided (nats per token)",
    "kl_clipped_share": "tokens above delta (share)", "target_share": "problems with a target (share)",
    "grad_norm": "gradient norm", "loss": "loss", "loss_grpo": "GRPO loss", "loss_kd": "distillation loss (nats)",
    "lr": "learning rate", "tokens_per_second": "sampled tokens per second",
}
"""Axis titles of metrics."""
SHARES = frozenset({"accuracy", "reward_autonomous", "reward_guided", "kl_clipped_share", "target_share", "alpha"})
"""Metrics between 0 and 1: their bands are cut there."""
PHASES = {"seconds_sample": ("sampling", "#0072B2"), "seconds_verify": ("verifying", "#E69F00"),
          "seconds_score": ("scoring (log-probabilities)", "#56B4E9"),
          "seconds_policy": ("policy gradient", "#D55E00"), "seconds_expert": ("expert solutions", "#F0E442"),
          "seconds_distil": ("distillation", "#CC79A7"), "seconds_optimizer": ("optimizer", "#009E73"),
          "seconds_log": ("logging", "#8C6D31"), "rest": ("rest", "#9a9a9a")}
"""Where the time of a step goes, and its colours."""
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def template(dark: bool = False) -> go.layout.Template:
    """The shared look, for a light or a dark page."""
    ink, grid, back = ("#e6e6e6", "#3a3f47", "#16191d") if dark else ("#222222", "#e3e3e3", "#ffffff")
    axis = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid, "ticks": "outside", "tickcolor": grid,
            "title": {"standoff": 8, "font": {"size": 14}}, "automargin": True}
    return go.layout.Template(layout={
        "font": {"family": "system-ui, Segoe UI, Helvetica, Arial, sans-serif", "size": 14, "color": ink},
        "paper_bgcolor": back, "plot_bgcolor": back, "xaxis": axis, "yaxis": axis, "hovermode": "x unified",
        "title": {"font": {"size": 17}, "x": 0, "xanchor": "left", "xref": "paper"},
        "margin": {"t": 60, "r": 20, "b": 60, "l": 64},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "font": {"size": 13}},
        "hoverlabel": {"bgcolor": back, "font": {"color": ink}}, "colorway": [v[1] for v in METHODS.values()],
    })


def plain(draw: Callable[P, go.Figure]) -> Callable[P, go.Figure]:
    """Decorator of a function that draws: names, titles, categories and other texts of its figure are shown as they
    are, long ones shortened (`escaping.label`); no tag in them is read."""
    def text(value: Any) -> Any:
        return label(value) if isinstance(value, str) else value

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> go.Figure:
        figure = draw(*args, **kwargs)
        for trace in figure.data:
            for name in {"name", "text", "x", "y"} & set(trace):
                held = trace[name]
                if isinstance(held, str) or (held is not None and any(isinstance(v, str) for v in held)):
                    trace[name] = text(held) if isinstance(held, str) else [text(v) for v in held]
        for part in (figure.layout, *figure.select_xaxes(), *figure.select_yaxes()):
            part.title.text = text(part.title.text)
        for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
            for name in ("categoryarray", "ticktext"):
                if axis[name] is not None:
                    axis[name] = [text(v) for v in axis[name]]
        return figure.for_each_annotation(lambda note: note.update(text=text(note.text)))

    return drawn


def method_style(method: str) -> tuple[str, str, str]:
    """Label, colour and dash of a method or variant (`frames.variant`); the same for the same name, always."""
    if method in METHODS:
        return METHODS[method]
    name, *fields = method.split(" ")
    label = ", ".join([METHODS[name][0] if name in METHODS else name, *(_WORDS.get(f, f) for f in fields)])
    return label, _SPARE[sum(method.encode()) % len(_SPARE)], "longdash"


def t_quantile(freedom: int) -> float:
    """0.975 quantile of Student's t: tabulated to 15 degrees of freedom, Cornish-Fisher beyond (error < 0.002)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mean_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean and 95% t-interval; without an interval (nan) for fewer than two values. NaN values are left out."""
    kept = [float(v) for v in values if not pd.isna(v)]
    if not kept:
        return math.nan, math.nan, math.nan
    mean = sum(kept) / len(kept)
    if len(kept) < 2:
        return mean, math.nan, math.nan
    std = math.sqrt(sum((v - mean) ** 2 for v in kept) / (len(kept) - 1))
    half = t_quantile(len(kept) - 1) * std / math.sqrt(len(kept))
    return mean, mean - half, mean + half


def over_seeds(df: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Per step: mean over seeds, low and high of the 95% t-interval, and how many seeds reached the step."""
    rows = [(step, *mean_interval(g[metric]), int(g[metric].notna().sum())) for step, g in df.groupby("step")]
    out = pd.DataFrame(rows, columns=["step", "mean", "low", "high", "seeds"])
    if metric in SHARES:
        out[["low", "high"]] = out[["low", "high"]].clip(0.0, 1.0)
    return out[out["seeds"] > 0]


def missing(df: pd.DataFrame, columns: Sequence[str], title: str = "", kind: str | None = None) -> go.Figure | None:
    """An empty figure that tells what is not there; None where everything is."""
    absent = [c for c in columns if c not in df.columns or df[c].isna().all()]
    if not absent and (kind is None or (df["kind"] == kind).any()):
        return None
    rows = f"rows of kind '{kind}'" if kind and "kind" in df.columns and not (df["kind"] == kind).any() else ""
    text = f"Nothing to show: no {rows or 'values for ' + ', '.join(absent)}"
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 220,
                               "xaxis": {"visible": False}, "yaxis": {"visible": False}})
    return figure.add_annotation(text=text, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")


def add_curve(figure: go.Figure, df: pd.DataFrame, metric: str, name: str, colour: str, dash: str,
               row: int | None = None, col: int | None = None, legend: bool = True, group: str = "") -> None:
    """Mean over seeds with its band."""
    curve = over_seeds(df, metric)
    seeds = df.loc[df[metric].notna(), "run" if "run" in df.columns else "seed"].nunique()
    label = f"{name}, {seeds} seed{'s' if seeds != 1 else ''}"
    banded = curve.dropna(subset=["low"])
    if len(banded):
        figure.add_trace(go.Scatter(
            x=[*banded["step"], *banded["step"][::-1]], y=[*banded["high"], *banded["low"][::-1]], mode="lines",
            fill="toself", fillcolor=colour, opacity=0.16, line={"width": 0}, hoverinfo="skip", showlegend=False,
            legendgroup=group or name, name=f"{name} 95%"), row, col)
    marks = "lines+markers" if len(curve) <= 25 else "lines"
    figure.add_trace(go.Scatter(
        x=list(curve["step"]), y=list(curve["mean"]), mode=marks, name=label, legendgroup=group or name,
        showlegend=legend, line={"color": colour, "dash": dash, "width": 2.5}, marker={"size": 5},
        hovertemplate="%{y:.3g}"), row, col)


def methods_of(df: pd.DataFrame) -> list[str]:
    """Methods of a frame: the named ones in their order, then others by name."""
    known = [m for m in METHODS if m in set(df["method"])]
    return known + sorted(set(df["method"]) - set(known))


@plain
def learning_curves(df: pd.DataFrame, metric: str = "accuracy", kind: str = "eval", title: str = "") -> go.Figure:
    """A metric over steps, per method: mean over seeds, band of the 95% t-interval from two seeds on."""
    label = LABELS.get(metric, metric)
    title = title or f"{label[0].upper()}{label[1:]} by training step"
    if empty := missing(df, ["method", "step", metric], title, kind):
        return empty
    df = df[df["kind"] == kind]
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 440})
    for method in methods_of(df):
        add_curve(figure, df[df["method"] == method], metric, *method_style(method))
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text=label, **({"range": [0, 1.02]} if metric in SHARES else {}))
    return figure


@plain
def training_panel(df: pd.DataFrame) -> go.Figure:
    """Six small multiples over the training steps: rewards, alpha, entropy, length, KL, problems with a target."""
    cells = [["reward_autonomous", "reward_guided"], ["alpha"], ["entropy"], ["response_length"],
             ["kl_mean", "kl_clipped_share"], ["target_share"]]
    titles = ["pass rate (guided: dotted)", "mean alpha", "entropy (nats per token)", "response length (tokens)",
              "KL (nats per token; share above delta: dotted)", "problems with a target (share)"]
    if empty := missing(df, ["method", "step"], "Training", "train"):
        return empty
    df = df[df["kind"] == "train"]
    figure = make_subplots(2, 3, subplot_titles=titles, horizontal_spacing=0.07, vertical_spacing=0.16)
    figure.update_layout(template=template(), title_text="Training", height=600, hovermode="closest",
                         legend={"y": -0.12}, margin={"t": 90})
    figure.update_annotations(font_size=13)
    named: set[str] = set()
    for place, metrics in enumerate(cells):
        row, col = place // 3 + 1, place % 3 + 1
        absent = missing(df, metrics[:1]) is not None
        if absent:
            figure.add_annotation(text=f"no values for {metrics[0]}", showarrow=False, row=row, col=col, x=0.5, y=0.5)
        for metric in metrics if not absent else []:
            for method in methods_of(df):
                part = df[df["method"] == method]
                if metric not in df.columns or part[metric].isna().all():
                    continue
                name, colour, _ = method_style(method)
                add_curve(figure, part, metric, name, colour, "dot" if metric != metrics[0] else "solid", row, col,
                           legend=name not in named, group=name)
                named.add(name)
        if row == 2:
            figure.update_xaxes(title_text="training step", row=row, col=col)
    return figure


@plain
def alpha_against_pass_rate(df: pd.DataFrame) -> go.Figure:
    """Mean alpha and the autonomous pass rate of SGPO runs on one step axis: guidance fades as the policy learns."""
    title = "SGPO: pass rates and the weight of distillation"
    if empty := missing(df, ["method", "step", "alpha", "reward_autonomous"], title, "train"):
        return empty
    df = df[(df["kind"] == "train") & (df["method"] == "sgpo")]
    if empty := missing(df, ["alpha"], title):
        return empty
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 420})
    add_curve(figure, df, "reward_autonomous", "pass rate, autonomous", AUTONOMOUS, "solid")
    if "reward_guided" in df.columns and not df["reward_guided"].isna().all():
        add_curve(figure, df, "reward_guided", "pass rate, guided", GUIDED, "dot")
    add_curve(figure, df, "alpha", "alpha(q), mean over problems", "#D55E00", "dash")
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text="pass rate and alpha", range=[0, 1.02])
    return figure


@plain
def phase_seconds(df: pd.DataFrame) -> go.Figure:
    """Stacked bars: mean seconds of a training step by phase, per method; `rest` is what seconds_step has beyond."""
    title = "Where the time of a training step goes"
    phases = [p for p in PHASES if p in df.columns]
    if empty := missing(df, ["method", *(phases or ["seconds_sample"])][:2], title, "train"):
        return empty
    df = df[df["kind"] == "train"]
    if "seconds_step" in df.columns:
        df = df[df["seconds_step"].notna()]
    means = df[phases].fillna(0.0).groupby(df["method"]).mean()  # a phase that a step did not have took no time in it
    if "seconds_step" in df.columns:
        means["rest"] = (df.groupby("method")["seconds_step"].mean() - means.sum(axis=1)).clip(lower=0.0)
    methods = methods_of(df)[::-1]
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "barmode": "stack",
                               "height": 230 + 55 * len(methods), "hovermode": "y unified"})
    for phase in means.columns:
        name, colour = PHASES[phase]
        seconds = [float(means[phase][m]) for m in methods]
        figure.add_trace(go.Bar(y=[method_style(m)[0] for m in methods], x=seconds, name=name, orientation="h",
                                marker={"color": colour}, hovertemplate="%{x:.3g} s"))
    figure.update_xaxes(title_text="seconds per step (mean)")
    figure.update_layout(legend={"yref": "container", "y": 0.02, "yanchor": "bottom", "traceorder": "normal"},
                         margin={"b": 130})
    return figure


@plain
def pass_rates(df: pd.DataFrame) -> go.Figure:
    """Guided against autonomous pass rate, one point per problem; above the line the strategy helps.

    Columns p_auto, p_guide; with p_auto_low, p_auto_high, p_guide_low, p_guide_high also intervals; `problem` is shown
    on hover.
    """
    title = f"Pass rate with and without the strategy, {len(df)} problems"
    if empty := missing(df, ["p_auto", "p_guide"], title):
        return empty
    bars = {}
    for axis, name in (("error_x", "p_auto"), ("error_y", "p_guide")):
        if {f"{name}_low", f"{name}_high"} <= set(df.columns):
            bars[axis] = {"type": "data", "symmetric": False, "array": list(df[f"{name}_high"] - df[name]),
                          "arrayminus": list(df[name] - df[f"{name}_low"]), "thickness": 1, "width": 0,
                          "color": "rgba(127,127,127,0.45)"}
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 520, "hovermode": "closest"})
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": "#9a9a9a", "dash": "dot"},
                                name="no difference", hoverinfo="skip"))
    labels = [str(v) for v in (df["problem"] if "problem" in df.columns else df.index)]
    figure.add_trace(go.Scatter(x=list(df["p_auto"]), y=list(df["p_guide"]), mode="markers", text=labels,
                                marker={"size": 9, "color": GUIDED, "opacity": 0.7}, name="a problem",
                                hovertemplate="%{text}<br>autonomous %{x:.2f}, guided %{y:.2f}", **bars))
    mean_auto, mean_guide = float(df["p_auto"].mean()), float(df["p_guide"].mean())
    figure.add_trace(go.Scatter(x=[mean_auto], y=[mean_guide], mode="markers", name=f"mean ({mean_auto:.2f}, "
                                f"{mean_guide:.2f})", marker={"symbol": "x", "size": 13, "color": AUTONOMOUS}))
    figure.update_xaxes(title_text="autonomous pass rate", range=[-0.04, 1.04])
    figure.update_yaxes(title_text="guided pass rate", range=[-0.04, 1.04])
    return figure


@plain
def step_bars(df: pd.DataFrame) -> go.Figure:
    """Mean KL of the tokens of each step of a solution; with `sft_loss` that as a second bar.

    Columns step (label), kl (nats per token), tokens, optional sft_loss (nats per token).
    """
    title = "Divergence by step of the response"
    if empty := missing(df, ["step", "kl", "tokens"], title):
        return empty
    labels = [f"{s} ({int(n)} tokens)" for s, n in zip(df["step"], df["tokens"], strict=True)]
    figure = go.Figure(layout={"template": template(), "title": {"text": title}, "barmode": "group",
                               "height": 180 + 42 * len(df), "hovermode": "y unified", "bargap": 0.25})
    figure.add_trace(go.Bar(y=labels, x=list(df["kl"]), orientation="h", name="KL guided || unguided",
                            marker={"color": AUTONOMOUS}, hovertemplate="%{x:.3g} nats"))
    if "sft_loss" in df.columns and not df["sft_loss"].isna().all():
        figure.add_trace(go.Bar(y=labels, x=list(df["sft_loss"]), orientation="h", name="cross-entropy (SFT)",
                                marker={"color": GUIDED}, hovertemplate="%{x:.3g} nats"))
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"}, title_y=0.97, margin={"t": 90})
    figure.update_xaxes(title_text="nats per token (mean over the step)")
    figure.update_yaxes(autorange="reversed")
    return figure

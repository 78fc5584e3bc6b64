"""A response as coloured text without script: what stands in a widget's place where JavaScript does not run.

A notebook that is not trusted keeps inline styles and drops style elements; so every colour is inline, on white. Where
style elements stay, a dark system gets dark colours. All text is escaped; text that runs from right to left is isolated
(bdi), so that it moves no neighbour. JupyterLab runs MathJax over every HTML output: two classes keep it out of here.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pandas as pd

from sgpo_lib.escaping import Html, trusted, visible
from sgpo_lib.readings import TokenReadings
from sgpo_lib.widgets.token_kl import ramps
from sgpo_lib.widgets.token_kl.metrics import METRICS, checked_metric

LIMIT = 400_000
"""Characters of HTML. Beyond it: no numbers to hover over, then fewer shades, then the text is cut, with a note."""
TOKEN_LIMIT = 4_000
"""Characters of one token that are shown."""
_BOX = ("font-family:ui-monospace,Menlo,Consolas,monospace;font-size:14px;line-height:1.9;white-space:pre-wrap;"
        "overflow-wrap:anywhere;color:#1b1b1b;background-color:#ffffff;padding:12px;border:1px solid #cccccc;"
        "border-radius:4px")  # fmt: skip
_LINE = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.6;color:#444444;white-space:normal"
_OVER = "outline:1.5px solid #1b1b1b;outline-offset:-1.5px"


def static_html(readings: TokenReadings, metric: str = "forward_kl", delta: float = 1.0, title: str = "") -> Html:
    """HTML of the tokens, coloured by `metric` up to its maximum in this response on a square-root scale.

    Tokens whose forward KL exceeds `delta` (nats; Eq. 5 masks them) are outlined. Hovering shows numbers while the
    response is short enough for that. Raises ValueError for an unknown metric.
    """
    table = readings.table
    values = table[checked_metric(metric)].astype(float).to_numpy(na_value=np.nan)
    over = table["forward_kl"].to_numpy(float) > delta
    texts = [visible((t or p)[:TOKEN_LIMIT], ends=True) for t, p in zip(table["token"], table["piece"], strict=True)]
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    head = _head(readings, metric, delta, title, largest)
    for coarse in (0, 1, 3, 5):
        names = [_level(float(v), METRICS[metric].kind, largest, max(1, coarse)) for v in values]
        spans = _spans(texts, names, over, _tips(table, metric) if coarse == 0 else None, dark=coarse < 2)
        note = "" if coarse < 2 else "Long response: fewer shades. "
        room = LIMIT - len(_whole(head, [], note, coarse < 2)) - 60
        if sum(map(len, spans)) <= room:
            return _whole(head, spans, note, coarse < 2)
    count = 0
    kept: list[Html] = []
    for span, tokens in zip(spans, _runs(names, over), strict=True):
        room -= len(span)
        if room < 0:
            break
        kept.append(span)
        count += len(tokens)
    return _whole(head, kept, f"{note}{len(texts) - count:,} more tokens are not shown here.", False)


def _level(value: float, kind: str, largest: float, coarse: int) -> str:
    """Name of the colour: "" for none, s1..., n1..., p1... (see ramps.py), "?" where it is not known."""
    if math.isnan(value):
        return "?"
    if kind == "agreement":
        return "" if value else "p5"
    share = math.sqrt(min(abs(value) / largest, 1.0)) if largest > 0 else 0.0
    most = ramps.SIGNED_LEVELS if kind == "diverging" else ramps.LEVELS
    level = coarse * round(share * most / coarse)
    if level <= 0 or (kind == "sequential" and value < 0):
        return ""
    sign = "s" if kind == "sequential" else "p" if value > 0 else "n"
    return f"{sign}{min(level, most)}"


def _colours(theme: str) -> dict[str, str]:
    negative, positive = ramps.diverging(theme)
    return {f"{sign}{i}": colour for sign, ramp in (("s", ramps.sequential(theme)), ("n", negative), ("p", positive))
            for i, colour in enumerate(ramp, start=1)}  # fmt: skip


def _runs(names: list[str], over: np.ndarray) -> list[list[int]]:
    """Neighbours with the same look, as lists of token positions."""
    return [list(run) for _, run in groupby(range(len(names)), key=lambda i: (names[i], bool(over[i])))]


def _spans(texts: list[str], names: list[str], over: np.ndarray, tips: list[str] | None, dark: bool) -> list[Html]:
    """One span per token with its tip, or, without tips, one per run of tokens that look the same.

    `dark`: with the classes that dark colours hang on.
    """
    light = _colours("light")
    spans: list[Html] = []
    for run in ([[i] for i in range(len(texts))] if tips else _runs(names, over)):
        name, masked = names[run[0]], bool(over[run[0]])
        styles = [f"background:{light[name]}"] if name in light else []
        styles += ["text-decoration:underline dotted"] if name == "?" else []
        styles += [_OVER] if masked else []
        kinds = " ".join(k for k, there in ((f"k-{name}", name in light), ("k-over", masked)) if there and dark)
        look = Html(' class="{}"').format(kinds) if kinds else Html("")
        tip = Html(' title="{}"').format(tips[run[0]]) if tips else Html("")
        text = "".join(texts[i] for i in run)
        tag = Html("bdi") if any(unicodedata.bidirectional(c) in ("R", "AL") for c in text) else Html("span")
        style = Html(' style="{}"').format(";".join(styles)) if styles else Html("")
        plain = tag == "span" and not style and not tip
        whole = Html("{4}") if plain else Html("<{0}{1}{2}{3}>{4}</{0}>")
        spans.append(whole.format(tag, look, tip, style, text))
    return spans


def _tips(table: pd.DataFrame, metric: str) -> list[str]:
    name, unit = METRICS[metric].name, METRICS[metric].unit
    rows = zip(table[metric].tolist(), table["guided_logp"].tolist(), table["unguided_logp"].tolist(), strict=True)
    return [f"{name} {_number(v, 4)} {unit}; p guided {_number(_p(g), 4)}, p unguided {_number(_p(u), 4)}"
            for v, g, u in rows]


def _p(logp: float) -> float:
    return math.exp(logp) if logp == logp else math.nan


def _number(value: float, digits: int) -> str:
    return "–" if value is None or value != value else f"{float(value):.{digits}f}"


def _head(readings: TokenReadings, metric: str, delta: float, title: str, largest: float) -> Html:
    """Title, legend, and what delta masks."""
    told, kl = METRICS[metric], readings.table["forward_kl"].to_numpy(float)
    known = kl[np.isfinite(kl)]
    masked, total = known[known > delta], float(known.sum())
    colours = _colours("light")
    signs = ["n8", "n5", "n2", "p2", "p5", "p8"] if told.kind == "diverging" else ["p5"] if \
        told.kind == "agreement" else ["s1", "s4", "s7", "s10", "s13", "s15"]  # fmt: skip
    ramp = Html("").join(Html('<span class="k-{}" style="background:{}">&#160;&#160;&#160;</span>').format(
        s, colours[s]) for s in signs)
    low = f"−{largest:.2f} " if told.kind == "diverging" else "" if told.kind == "agreement" else "0 "
    high = " differs" if told.kind == "agreement" else f" {largest:.2f} nats (square-root scale)"
    share = f", {100 * float(masked.sum()) / total:.1f}% of the KL" if total > 0 else ""
    threshold = "∞" if math.isinf(delta) else f"{delta:g}"
    label = " · ".join(visible(t, ends=True).replace("\n", " ") for t in (title, readings.label) if t)
    return Html('<div class="k-line" style="{}"><b>{}</b>{}<br>{}: {}{}{} · outlined: forward KL above δ = {}, '
                "{:,} of {:,} tokens{}</div>").format(
        _LINE, label or "KL of every token", "" if readings.exact else " (from a served model’s top-k: lower bounds)",
        told.name, low, ramp, high, threshold, len(masked), len(kl), share)


def _whole(head: Html, spans: Sequence[Html], note: str, dark: bool) -> Html:
    end = Html('<div class="k-line" style="{}">{}</div>').format(_LINE, note) if note else Html("")
    kind = f"{'sgpo-static ' if dark else ''}mathjax_ignore tex2jax_ignore"
    return Html('{}<div class="{}" style="{}">{}{}{}</div>').format(
        _dark_style() if dark else "", kind, _BOX, head, Html("").join(spans), end)


def _dark_style() -> Html:
    levels = "".join(f".sgpo-static .k-{n}{{background:{c}!important}}" for n, c in _colours("dark").items())
    return Html("<style>{}</style>").format(trusted(
        "@media (prefers-color-scheme: dark){.sgpo-static{background-color:#111111!important;"
        "color:#f7f7f7!important;border-color:#4a4a4a!important}.sgpo-static .k-line{color:#bbbbbb!important}"
        f".sgpo-static .k-over{{outline-color:#f2f2f2!important}}{levels}}}"))

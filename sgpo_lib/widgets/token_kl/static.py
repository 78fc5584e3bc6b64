"""A response as coloured text without script: what stands in a widget's place where JavaScript does not run.

A notebook that is not trusted keeps inline styles and drops style elements; so every colour is inline, on white. Where
style elements stay, a dark system gets dark colours. All text is escaped; text that runs from right to left is isolated
(bdi), so that it moves no neighbour. JupyterLab runs MathJax over every HTML output: two classes keep it out of here.
"""

from __future__ import annotations

import html
import math
import unicodedata
from itertools import groupby

import numpy as np
import pandas as pd

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


def static_html(readings: TokenReadings, metric: str = "forward_kl", delta: float = 1.0, title: str = "") -> str:
    """HTML of the tokens, coloured by `metric` up to its maximum in this response on a square-root scale.

    Tokens whose forward KL exceeds `delta` (nats; Eq. 5 masks them) are outlined. Hovering shows numbers while the
    response is short enough for that. Raises ValueError for an unknown metric.
    """
    table = readings.table
    values = table[checked_metric(metric)].astype(float).to_numpy(na_value=np.nan)
    over = table["forward_kl"].to_numpy(float) > delta
    texts = [visible((t or p)[:TOKEN_LIMIT]) for t, p in zip(table["token"], table["piece"], strict=True)]
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    head = _head(readings, metric, delta, title, largest)
    for coarse in (0, 1, 3, 5):
        names = [_level(float(v), METRICS[metric].kind, largest, max(1, coarse)) for v in values]
        spans = _spans(texts, names, over, _tips(table, metric) if coarse == 0 else None, dark=coarse < 2)
        note = "" if coarse < 2 else "Long response: fewer shades. "
        room = LIMIT - len(_whole(head, [], note, coarse < 2)) - 60
        if sum(map(len, spans)) <= room:
            return _whole(head, spans, note, coarse < 2)
    count, kept = 0, []
    for span, tokens in zip(spans, _runs(names, over), strict=True):
        room -= len(span)
        if room < 0:
            break
        kept.append(span)
        count += len(tokens)
    return _whole(head, kept, f"{note}{len(texts) - count:,} more tokens are not shown here.", False)


def visible(text: str) -> str:
    """Text for a person: line ends marked, what has no shape or could reorder its neighbours as a code. Not escaped."""
    shown = []
    for place, c in enumerate(text):
        kind = unicodedata.category(c)
        joins = c in "\u200d\ufe0f" and place > 0 and unicodedata.category(text[place - 1]) in ("So", "Sk")
        hidden = kind in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co") or c in "\u115f\u1160\u3164\uffa0\u034f" or (
            0xFE00 <= ord(c) <= 0xFE0F or 0xE0100 <= ord(c) <= 0xE01EF) or (kind == "Zs" and c not in " \u3000")
        if c == "\n":
            shown.append("↵\n")
        elif c == "\t":
            shown.append("→\t")
        elif hidden and not joins:
            shown.append(f"[U+{ord(c):04X}]")
        elif place == 0 and kind.startswith("M"):
            shown.append(f"◌{c}")
        else:
            shown.append(c)
    return "".join(shown)


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


def _spans(texts: list[str], names: list[str], over: np.ndarray, tips: list[str] | None, dark: bool) -> list[str]:
    """One span per token with its tip, or, without tips, one per run of tokens that look the same.

    `dark`: with the classes that dark colours hang on.
    """
    light, spans = _colours("light"), []
    for run in ([[i] for i in range(len(texts))] if tips else _runs(names, over)):
        name, masked = names[run[0]], bool(over[run[0]])
        styles = [f"background:{light[name]}"] if name in light else []
        styles += ["text-decoration:underline dotted"] if name == "?" else []
        styles += [_OVER] if masked else []
        kinds = " ".join(k for k, there in ((f"k-{name}", name in light), ("k-over", masked)) if there and dark)
        look = f' class="{kinds}"' if kinds else ""
        tip = f' title="{html.escape(tips[run[0]], quote=True)}"' if tips else ""
        text = "".join(texts[i] for i in run)
        tag = "bdi" if any(unicodedata.bidirectional(c) in ("R", "AL") for c in text) else "span"
        style = f' style="{";".join(styles)}"' if styles else ""
        plain = tag == "span" and not style and not tip
        spans.append(html.escape(text) if plain else f"<{tag}{look}{tip}{style}>{html.escape(text)}</{tag}>")
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


def _head(readings: TokenReadings, metric: str, delta: float, title: str, largest: float) -> str:
    """Title, legend, and what delta masks."""
    told, kl = METRICS[metric], readings.table["forward_kl"].to_numpy(float)
    known = kl[np.isfinite(kl)]
    masked, total = known[known > delta], float(known.sum())
    colours = _colours("light")
    signs = ["n8", "n5", "n2", "p2", "p5", "p8"] if told.kind == "diverging" else ["p5"] if \
        told.kind == "agreement" else ["s1", "s4", "s7", "s10", "s13", "s15"]  # fmt: skip
    ramp = "".join(f'<span class="k-{s}" style="background:{colours[s]}">&#160;&#160;&#160;</span>'
                   for s in signs)
    low = f"−{largest:.2f} " if told.kind == "diverging" else "" if told.kind == "agreement" else "0 "
    high = " differs" if told.kind == "agreement" else f" {largest:.2f} nats (square-root scale)"
    share = f", {100 * float(masked.sum()) / total:.1f}% of the KL" if total > 0 else ""
    threshold = "∞" if math.isinf(delta) else f"{delta:g}"
    label = " · ".join(visible(t).replace("\n", " ") for t in (title, readings.label) if t)
    return (f'<div class="k-line" style="{_LINE}"><b>{html.escape(label) or "KL of every token"}</b>'
            f'{"" if readings.exact else " (from a served model’s top-k: lower bounds)"}<br>'
            f"{html.escape(told.name)}: {low}{ramp}{high} · outlined: forward KL above δ = {threshold}, "
            f"{len(masked):,} of {len(kl):,} tokens{share}</div>")


def _whole(head: str, spans: list[str], note: str, dark: bool) -> str:
    end = f'<div class="k-line" style="{_LINE}">{html.escape(note)}</div>' if note else ""
    kind = f"{'sgpo-static ' if dark else ''}mathjax_ignore tex2jax_ignore"
    return f'{_dark_style() if dark else ""}<div class="{kind}" style="{_BOX}">{head}{"".join(spans)}{end}</div>'


def _dark_style() -> str:
    levels = "".join(f".sgpo-static .k-{n}{{background:{c}!important}}" for n, c in _colours("dark").items())
    return ("<style>@media (prefers-color-scheme: dark){.sgpo-static{background-color:#111111!important;"
            "color:#f7f7f7!important;border-color:#4a4a4a!important}.sgpo-static .k-line{color:#bbbbbb!important}"
            f".sgpo-static .k-over{{outline-color:#f2f2f2!important}}{levels}}}</style>")

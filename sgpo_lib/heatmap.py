"""A response as coloured text: one span per token, shaded by a per-token quantity. Static HTML, no script."""

from __future__ import annotations

import html
import math

import pandas as pd

_STYLE = ("font-family:ui-monospace,Menlo,Consolas,monospace;font-size:15px;line-height:2;white-space:pre-wrap;"
          "overflow-wrap:anywhere;color:#1b1b1b;background:#ffffff;padding:12px;border:1px solid #ddd;"
          "border-radius:6px")


def token_heatmap(tokens: pd.DataFrame, value: str = "kl", ceiling: float = 1.0, title: str = "") -> str:
    """HTML of `analysis.token_frame`'s rows, shaded from 0 (white) to `ceiling` nats (full colour).

    Tokens above `ceiling`, which Eq. 5 masks when it is delta, are outlined; with `inf` none is, and the largest value
    has the full colour. Hovering shows the numbers.
    Raises ValueError where the column is missing.
    """
    if value not in tokens.columns:
        raise ValueError(f"no column {value!r} to colour by; there are {', '.join(map(str, tokens.columns))}")
    largest = max((float(v) for v in tokens[value]), default=0.0)
    full = ceiling if math.isfinite(ceiling) else largest or 1.0
    spans = []
    for row in tokens.to_dict("records"):
        shade = min(max(float(row[value]) / full, 0.0), 1.0)
        over = "outline:2px dashed #8a1c1c;outline-offset:-2px;" if float(row[value]) > ceiling else ""
        text = html.escape(str(row["token"])).replace("\n", "&#8629;\n")
        tip = html.escape(f"{value} {row[value]:.4f} nats; p guided {_p(row['guided_logp'])}, "
                          f"p unguided {_p(row['unguided_logp'])}", quote=True)
        spans.append(f'<span title="{tip}" style="background:rgba(213,94,0,{shade:.3f});{over}border-radius:3px">'
                     f"{text}</span>")
    legend = (f'<div style="font:13px system-ui,sans-serif;color:#444;margin-bottom:6px">{html.escape(title)} '
              f'<span style="background:linear-gradient(90deg,rgba(213,94,0,0),rgba(213,94,0,1));padding:0 34px;'
              f'border:1px solid #bbb"></span> 0 to {full:g} nats; dashed outline: above {ceiling:g}</div>')
    return f'<div style="{_STYLE}">{legend}{"".join(spans)}</div>'


def _p(logp: float) -> str:
    return f"{2.718281828459045 ** float(logp):.3f}"

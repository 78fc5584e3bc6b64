"""Tables as Markdown, CSV and LaTeX, figures as PNG and SVG: what goes into a paper or a repository.

CSV has every digit; Markdown and LaTeX are rounded for reading. Writing the same again changes no byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from pandas.io.formats.style import Styler

from sgpo_lib import escaping
from sgpo_lib.figures import method_style
from sgpo_lib.static_images import write_image
from sgpo_lib.storage import write_atomic

_HEADS = {"test": "test accuracy", "transfer": "unseen families", "transfer_difference": "unseen families, difference",
          "speed": "mean accuracy while training", "speed_difference": "while training, difference",
          "published": "published (points)"}
"""Column -> head for reading."""
DASH = "–"
"""Stands for a number that there is not."""


def number(value: Any, digits: int = 3) -> str:
    """A value for reading: floats rounded, a dash for None and NaN, bools as yes or no."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}f}".replace("-", "−")
    return str(value)


def interval(mean: float, low: float, high: float, digits: int = 3) -> str:
    """`.512 (.480 to .544)`; without the bracket where there is no interval, a dash for no mean."""
    if math.isnan(mean):
        return DASH
    inside = "" if math.isnan(low) else f" ({number(low, digits)} to {number(high, digits)})"
    return number(mean, digits) + inside


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table as texts for reading: columns x, x_low, x_high become one, variants get their labels."""
    out: dict[str, list[str]] = {}
    names = set(table.columns)
    ends = {c: (f"{c}_low", f"{c}_high") for c in names if {f"{c}_low", f"{c}_high"} <= names}
    if {"difference", "low", "high"} <= names:
        ends["difference"] = ("low", "high")
    bounds = {name for pair in ends.values() for name in pair}
    for column in [c for c in table.columns if c not in bounds]:
        if column in ends:
            low, high = ends[column]
            out[column] = [interval(float(m), float(a), float(b)) for m, a, b in zip(
                table[column], table[low], table[high], strict=True)]
        elif column == "method":
            out[column] = [method_style(str(m))[0] for m in table[column]]
        else:
            values = [v.item() if hasattr(v, "item") else v for v in table[column]]
            out[column] = [f"{v:g}" for v in values] if column == "lr" else [
                number(v, 1 if column == "published" else 3) for v in values]
    return pd.DataFrame(out).rename(columns=_HEADS)


def markdown(table: pd.DataFrame) -> str:
    """A pipe table of a frame of texts; no cell can hold markup, HTML, a link or a picture."""
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(map(escaping.markdown, cells)) + " |\n"
    return line(list(table.columns)) + "| --- " * len(table.columns) + "|\n" + "".join(
        line(list(row)) for row in table.itertuples(index=False))


def latex(table: pd.DataFrame, caption: str) -> str:
    """A booktabs longtable (it may run over pages) of a frame of texts; every special character is escaped."""
    rows = "".join(" & ".join(map(escaping.latex, row)) + " \\\\\n" for row in table.itertuples(index=False))
    head = " & ".join(map(escaping.latex, table.columns))
    return (f"\\begin{{longtable}}{{{'l' * len(table.columns)}}}\n\\caption{{{escaping.latex(caption)}}} \\\\\n"
            f"\\toprule\n{head} \\\\\n\\midrule\n\\endhead\n{rows}\\bottomrule\n\\end{{longtable}}\n")


def csv_text(table: pd.DataFrame) -> str:
    """The table as CSV with every digit; no text in it is a formula to a spreadsheet."""
    return table.map(escaping.csv_cell).rename(columns=escaping.csv_cell).to_csv(index=False)


def shown(table: pd.DataFrame, form: str | None = None) -> Styler:
    """The table in a notebook with a style, every text as it is: pandas' styles escape nothing by themselves.

    `form`: how its values are written, such as `{:.0%}`.
    """
    styled = table.style.format(form, escape="html")
    return styled.format_index(escape="html", axis=0).format_index(escape="html", axis=1)


def write_exports(folder: Path, tables: Mapping[str, tuple[str, pd.DataFrame]],
                  pictures: Mapping[str, tuple[str, go.Figure]]) -> list[Path]:
    """Write every table and figure, and `results.md`, which shows them all. Returns the files.

    `tables` and `pictures`: file name without suffix -> (caption, content). Empty tables are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, text = [], "<!-- Written by notebook 07; findings are in README.md. -->\n\n# Tables and figures\n"
    for name, (caption, table) in tables.items():
        if table.empty:
            continue
        told = readable(table)
        for suffix, content in (("csv", csv_text(table)), ("tex", latex(told, caption))):
            written.append(folder / f"{name}.{suffix}")
            write_atomic(written[-1], content)
        text += (f"\n## {escaping.markdown(caption)}\n\n[{name}.csv]({name}.csv), [{name}.tex]({name}.tex)\n\n"
                 f"{markdown(told)}")
    for name, (caption, figure) in pictures.items():
        if not figure.data:
            continue
        written += [write_image(figure, folder / f"{name}.{suffix}") for suffix in ("png", "svg")]
        text += "\n## {0}\n\n![{0}]({1}.png)\n".format(escaping.markdown(caption), name)
    write_atomic(folder / "results.md", text)
    return [*written, folder / "results.md"]

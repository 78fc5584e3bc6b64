"""Exported tables: escaped for their format, with every digit in the CSV, and the same bytes when written again."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from sgpo_lib import exports
from sgpo_lib.exports import DASH, interval, latex, markdown, number, readable, write_exports


@pytest.mark.parametrize(("value", "text"), [
    (0.12345, "0.123"), (-0.5, "−0.500"), (None, DASH), (math.nan, DASH), (pd.NA, DASH), (True, "yes"), (False, "no"),
    (7, "7"), ("a-b", "a-b"), (np.float64(1.0), "1.000")])
def test_numbers_for_reading(value, text):
    assert number(value) == text


def test_intervals_for_reading():
    assert interval(0.5, 0.25, 0.75) == "0.500 (0.250 to 0.750)"
    assert interval(-0.5, -0.75, math.nan, 1) == "−0.5 (−0.8 to –)"
    assert interval(0.5, math.nan, math.nan) == "0.500" and interval(math.nan, math.nan, math.nan) == DASH


def test_readable_joins_intervals_and_names_variants():
    table = pd.DataFrame({
        "method": ["sgpo", "sgpo kl_delta=0.25"], "seeds": [5, 3], "test": [0.5, math.nan], "test_low": [0.4, math.nan],
        "test_high": [0.6, math.nan], "difference": [math.nan, -0.1], "low": [math.nan, -0.3], "high": [math.nan, 0.2],
        "published": [2.2, math.nan], "paper": [True, False], "lr": [4e-4, 1e-3], "speed_low": [0.1, 0.2]})
    shown = readable(table)
    assert list(shown.columns) == [
        "method", "seeds", "test accuracy", "difference", "published (points)", "paper", "lr", "speed_low"]
    assert shown.iloc[0].tolist() == ["SGPO", "5", "0.500 (0.400 to 0.600)", DASH, "2.2", "yes", "0.0004", "0.100"]
    assert shown.iloc[1].tolist() == ["SGPO, kl_delta=0.25", "3", DASH, "−0.100 (−0.300 to 0.200)", DASH, "no", "0.001",
                                      "0.200"]


def test_markdown_escapes_pipes():
    text = markdown(pd.DataFrame({"a|b": ["KL p || q", "two\nlines"], "c": ["x", DASH]}))
    assert text == "| a\\|b | c |\n| --- | --- |\n| KL p \\|\\| q | x |\n| two lines | – |\n"


def test_latex_escapes_every_special_character():
    text = latex(pd.DataFrame({"50 %": [r"a_b & {c} $d # ^ ~ \e", "−0.5 – α"]}), "A & B_1")
    assert text == ("\\begin{longtable}{l}\n\\caption{A \\& B\\_1} \\\\\n\\toprule\n50 \\% \\\\\n\\midrule\n\\endhead\n"
                    r"a\_b \& \{c\} \$d \# \textasciicircum{} \textasciitilde{} \textbackslash{}e" " \\\\\n"
                    "$-$0.5 -- $\\alpha$ \\\\\n\\bottomrule\n\\end{longtable}\n")


@pytest.fixture
def content() -> tuple[dict[str, tuple[str, pd.DataFrame]], dict[str, tuple[str, go.Figure]]]:
    table = pd.DataFrame({"method": ["sgpo", "grpo8"], "seeds": [5, 3], "test": [1 / 3, 0.1 + 0.2],
                          "test_low": [0.3, math.nan], "test_high": [0.4, math.nan]})
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0.25, 0.5], name="SGPO"))
    return ({"main": ("Results", table), "none": ("Nothing", pd.DataFrame({"method": []}))},
            {"curve": ("A curve", figure), "blank": ("Blank", go.Figure())})


def test_files_and_digits(tmp_path, content):
    written = write_exports(tmp_path / "new", *content)
    names = [p.name for p in written]
    assert names == ["main.csv", "main.tex", "curve.png", "curve.svg", "results.md"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(names), "nothing empty, no temporary file"
    back = pd.read_csv(written[0], float_precision="round_trip")
    pd.testing.assert_frame_equal(back, content[0]["main"][1], check_exact=True)
    assert "0.3333333333333333" in written[0].read_text() and "0.30000000000000004" in written[0].read_text()
    text = written[-1].read_text()
    assert "## Results\n" in text and "![A curve](curve.png)" in text and "[main.csv](main.csv)" in text
    assert "| SGPO | 5 | 0.333 (0.300 to 0.400) |" in text and "| GRPO (8 samples) | 3 | 0.300 |" in text
    assert "Nothing" not in text and "Blank" not in text


def test_the_same_bytes_again(tmp_path, content):
    first = {p.name: p.read_bytes() for p in write_exports(tmp_path / "a", *content)}
    for folder in ("a", "b"):
        assert {p.name: p.read_bytes() for p in write_exports(tmp_path / folder, *content)} == first


def test_nothing_at_all(tmp_path):
    (only,) = write_exports(tmp_path, {}, {})
    assert only == Path(tmp_path / "results.md") and exports.DASH not in only.read_text()

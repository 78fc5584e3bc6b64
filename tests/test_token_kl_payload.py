"""The microscope's scales and its static view, further: what the page and the table have to agree on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_token_kl_widget import TEXTS, readings_of, unpacked

from sgpo_lib.widgets.token_kl import Pane, TokenKL, payload, static, static_html


def test_no_token_lies_above_the_end_of_its_scale():
    """The page has float32, the table may have more: at the slider's end neither finds a token above delta."""
    frame = readings_of(TEXTS)
    for largest in (3.0 + 1e-7, 3.0 - 1e-7, 7.1, 7.3):
        table = frame.table.assign(forward_kl=np.minimum(frame.table["forward_kl"], 2.0))
        table.loc[5, "forward_kl"] = largest
        header, blobs = payload.pack([Pane("x", [dataclasses.replace(frame, table=table)])])
        told = header["panes"][0]["frames"][0]
        end, kl = told["most"]["forward_kl"], unpacked(told, blobs)["forward_kl"].astype(float)
        assert end == pytest.approx(largest, rel=1e-6) and kl.max() <= end and table["forward_kl"].max() <= end


@pytest.mark.parametrize("limit", [400_000, 4_000, 1_200])
def test_mathjax_leaves_the_static_view_alone(monkeypatch, limit):
    """JupyterLab sets `$x$` in every HTML output; both classes that MathJax 2 and 3 keep out of stand at every size."""
    monkeypatch.setattr(static, "LIMIT", limit)
    page = static_html(readings_of([*TEXTS, "$x$"] * 3))
    box = page[page.index("<div"):].partition(">")[0]
    assert "mathjax_ignore tex2jax_ignore" in box and box.startswith("<div class=")


@pytest.mark.parametrize("given, told", [(3, "int"), ("guided 1", "str"), ([readings_of(TEXTS)], "TokenReadings"),
                                         ([Pane("a", [readings_of(TEXTS)]), None], "NoneType")])  # fmt: skip
def test_what_is_no_pane_is_told(given, told):
    with pytest.raises(ValueError, match=rf"panes: got {told}, expected .* Pane\(label, \[readings\]\) makes one"):
        TokenKL(given)

"""The KL microscope: a response as text, every token coloured by what strategy conditioning does to it.

Python sends the readings once, as bytes (payload.py); the page colours, counts and searches by itself, so that a slider
costs no message but its own. Token texts come from a model: in the page they only ever become text nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import pandas as pd
import traitlets

from sgpo_lib.escaping import visible
from sgpo_lib.readings import TokenReadings
from sgpo_lib.widgets.token_kl import ramps
from sgpo_lib.widgets.token_kl.metrics import METRICS, checked_metric
from sgpo_lib.widgets.token_kl.page import page_html
from sgpo_lib.widgets.token_kl.panes import Pane, as_panes
from sgpo_lib.widgets.token_kl.payload import pack
from sgpo_lib.widgets.token_kl.static import static_html

__all__ = ["METRICS", "Pane", "TokenKL", "static_html"]

_HERE = Path(__file__).parent
_PARTS = ("dom", "decode", "order", "glyphs", "steps", "colour", "text", "details", "bars", "search", "controls", "app",
          "listen")  # fmt: skip
"""Files of js/, joined to one module in this order: a widget's module comes from a blob and can import no neighbour."""


def _source(*parts: str) -> str:
    files = [_HERE.parent / "shared" / "make.js", *(_HERE / "js" / f"{part}.js" for part in parts)]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def _style() -> str:
    return ramps.css() + (_HERE / "styles.css").read_text(encoding="utf-8")


def _delta_to_json(value: float, _: Any) -> float | str:
    return "inf" if math.isinf(value) else value  # JSON has no infinity


def _delta_from_json(value: Any, _: Any) -> float:
    return math.inf if value in ("inf", None) else float(value)


class TokenKL(anywidget.AnyWidget):
    """The widget over one response or several panes.

    Raises ValueError where there are no panes, for an unknown metric, or for a delta that is negative or not a number.
    Setting a trait to what it cannot be raises traitlets.TraitError.
    """

    _esm = _source(*_PARTS) + "\nexport default widget;\n"
    _css = _style()
    header = traitlets.Dict().tag(sync=True)
    """What lies where in `blobs`; see payload.py."""
    blobs: Any = traitlets.List().tag(sync=True)
    delta = traitlets.Float(1.0).tag(sync=True, to_json=_delta_to_json, from_json=_delta_from_json)
    """KL threshold of Eq. 5, nats; inf clips nothing."""
    metric = traitlets.Unicode("forward_kl").tag(sync=True)
    """What the tokens are coloured by: a key of METRICS."""
    selected = traitlets.Dict().tag(sync=True)
    """{"pane", "start", "end"} (end exclusive) of the brushed tokens; empty where none are."""
    pane = traitlets.Int(0).tag(sync=True)
    """Which response is shown."""
    compare = traitlets.Int(-1).tag(sync=True)
    """Which one stands beside it; -1 none."""
    frame = traitlets.Int(0).tag(sync=True)
    """Which checkpoint; a response with fewer shows its last."""

    def __init__(self, panes: Sequence[Pane] | TokenReadings, *, delta: float = 1.0, metric: str = "forward_kl",
                 title: str = ""):
        self.panes, self.title = as_panes(panes), title
        if not delta >= 0:
            raise ValueError(f"delta: got {delta!r}, expected nats, 0 or above (inf for no clipping)")
        header, blobs = pack(self.panes, title)
        super().__init__(header=header, blobs=blobs, delta=float(delta), metric=checked_metric(metric))

    def __repr__(self) -> str:
        frame = self._frame(self.pane)
        kl = frame.table["forward_kl"].astype(float)
        beside = f", and {len(self.panes) - 1} more" if len(self.panes) > 1 else ""
        return (f"Token KL of {visible(self.panes[self.pane].label)}{beside}: {len(kl):,} tokens, mean forward KL "
                f"{kl.mean():.3f} nats, {int((kl > self.delta).sum()):,} above delta = {self.delta:g}")

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle
        more = len(self.panes) - 1
        title = f"{self.title} (the first of {more + 1} responses)" if more and not self.pane else self.title
        page = static_html(self._frame(self.pane), self.metric, self.delta, title)
        return {**data, "text/html": str(page)}, metadata

    def _frame(self, pane: int) -> TokenReadings:
        frames = self.panes[pane].frames
        return frames[min(self.frame, len(frames) - 1)]

    def selection(self) -> pd.DataFrame:
        """Rows of the table of the selected tokens, at the checkpoint that is shown; none where nothing is selected."""
        if not self.selected:
            return self._frame(self.pane).table.iloc[:0].copy()
        chosen = self.selected
        return self._frame(chosen["pane"]).table.iloc[chosen["start"] : chosen["end"]].copy()

    def to_html(self, path: Path | str) -> Path:
        """Write one page that works offline from a file: the widget with its data and its present state."""
        state = {"header": self.header, "delta": _delta_to_json(self.delta, None)}
        state |= {name: getattr(self, name) for name in ("metric", "selected", "pane", "compare", "frame")}
        target = Path(path)
        target.write_text(page_html(_source(*_PARTS, "page"), _style(), state, self.blobs,
                                    self.title or self.panes[0].label), encoding="utf-8")
        return target

    @traitlets.validate("delta")
    def _valid_delta(self, proposal: Any) -> float:
        return self._expect(proposal, "delta", proposal["value"] >= 0, "nats, 0 or above (inf for no clipping)")

    @traitlets.validate("metric")
    def _valid_metric(self, proposal: Any) -> str:
        return self._expect(proposal, "metric", proposal["value"] in METRICS, f"one of {', '.join(METRICS)}")

    @traitlets.validate("pane")
    def _valid_pane(self, proposal: Any) -> int:
        last = len(self.panes) - 1
        return self._expect(proposal, "pane", 0 <= proposal["value"] <= last, f"0 to {last}")

    @traitlets.validate("compare")
    def _valid_compare(self, proposal: Any) -> int:
        last = len(self.panes) - 1
        return self._expect(proposal, "compare", -1 <= proposal["value"] <= last, f"-1 (none) to {last}")

    @traitlets.validate("frame")
    def _valid_frame(self, proposal: Any) -> int:
        last = max(len(pane.frames) for pane in self.panes) - 1
        return self._expect(proposal, "frame", 0 <= proposal["value"] <= last, f"0 to {last}")

    @traitlets.validate("selected")
    def _valid_selected(self, proposal: Any) -> dict[str, int]:
        value = proposal["value"]
        right = value == {} or (set(value) == {"pane", "start", "end"} and all(type(v) is int for v in value.values())
                                and 0 <= value["pane"] < len(self.panes)
                                and 0 <= value["start"] < value["end"] <= self.panes[value["pane"]].tokens)
        return self._expect(proposal, "selected", right, "{} or pane, start and end (exclusive) of shown tokens")

    @staticmethod
    def _expect(proposal: Any, name: str, right: bool, expected: str) -> Any:
        if not right:
            raise traitlets.TraitError(f"{name}: got {proposal['value']!r}, expected {expected}")
        return proposal["value"]

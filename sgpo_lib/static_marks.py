"""The marks of static pictures: plotly's traces, colours, lines and axis values drawn with matplotlib.

What `static_images.write_image` is made of. Lengths in plotly are px at 100 px per inch, in matplotlib pt: `PT`
converts. Whatever is not known here is a ValueError, never left out of the picture.
"""

from __future__ import annotations

import base64
import html
import math
import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sgpo_lib.escaping import visible

PT = 0.72
"""pt per px at 100 px per inch."""
DASHES = {"dot": (1, 1), "dash": (3, 3), "longdash": (5, 5), "dashdot": (3, 1, 1, 1), "longdashdot": (5, 2, 1, 2)}
SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "cross": "P", "x": "X", "triangle-up": "^",
           "triangle-down": "v", "triangle-left": "<", "triangle-right": ">", "star": "*", "pentagon": "p"}
STEPS = {"linear": "default", "hv": "steps-post", "vh": "steps-pre", "hvh": "steps-mid"}


def choose(what: str, got: Any, known: Any) -> Any:
    """`known[got]` (or got itself, of a plain sequence); a ValueError that names both where it is not there."""
    if not isinstance(got, str) or got not in known:
        raise ValueError(f"{what} {got!r} cannot be drawn by write_image. Expected one of {', '.join(known)}")
    return known[got] if isinstance(known, dict) else got


def plain(text: str | None) -> str:
    """Text without plotly's tags, as a picture can show it; `<br>` is a new line."""
    text = re.sub(r"<br\s*/?>", "\n", text or "")
    return visible(html.unescape(re.sub(r"</?(?:b|i|u|a|em|strong|sub|sup|span)(?:\s[^<>]*)?>", "", text)))


def wrap(text: str, width: int) -> str:
    """Each line wrapped at `width` characters."""
    return "\n".join(textwrap.fill(line, max(width, 8), break_long_words=False) for line in text.split("\n"))


def listed(values: Any) -> np.ndarray:
    """Values as an array; plotly's typed arrays ({'dtype', 'bdata'}, base64) are decoded."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), np.dtype(values["dtype"]).newbyteorder("<"))
    return np.asarray(values if values is not None else [], None if isinstance(values, np.ndarray) else object)


def each(value: Any) -> Any:
    """A property of points: one value as it is, many as a list."""
    return list(listed(value)) if isinstance(value, (dict, list, tuple, np.ndarray)) else value


def rgba(value: Any, alpha: float | None = 1.0) -> tuple[float, float, float, float]:
    """A CSS colour (name, hex, rgb(), rgba()), its opacity multiplied by `alpha`."""
    from matplotlib.colors import to_rgba

    found = re.fullmatch(r"rgba?\(([^)]*)\)", value.strip()) if isinstance(value, str) else None
    if found:
        r, g, b, *a = [float(v) for v in found[1].split(",")]
        channels = (r / 255, g / 255, b / 255, a[0] if a else 1.0)
    elif isinstance(value, str):
        channels = to_rgba({"transparent": "none"}.get(value, value))
    else:
        raise ValueError(f"colour: got {value!r}. Expected a name, '#rrggbb' or 'rgb(...)', not a colour scale")
    return (*channels[:3], channels[3] * (1.0 if alpha is None else alpha))


def stroke(line: Any, colour: Any, width: float, alpha: float | None) -> dict[str, Any]:
    """Colour, width and dash of a line as matplotlib's keywords. plotly's dashes are multiples of max(width, 3 px)."""
    width = width if line.width is None else line.width
    style: Any = "-"
    if line.dash not in (None, "solid") and width:
        numbers = re.findall(r"[\d.]+", line.dash) if "px" in line.dash else []
        parts = [float(n) for n in numbers] or [n * max(width, 3) for n in choose("line.dash", line.dash, DASHES)]
        style = (0, tuple(p / width for p in parts))
    return {"color": rgba(line.color or colour, alpha), "linewidth": width * PT, "linestyle": style}


@dataclass
class Axis:
    """A plotly axis: its layout and, where it is one of categories, their names in order (place 0, 1, ...).

    `root` is the axis that it `matches` (shared limits and categories), where it is not itself.
    """

    name: str
    layout: Any
    domain: tuple[float, float] = (0.0, 1.0)
    root: Axis | None = None
    categories: list[str] | None = None

    def see(self, values: Any) -> None:
        """Collect the categories of a trace's values."""
        array = listed(values)
        texts = [v for v in array if isinstance(v, str)]
        if self.layout.type == "category" or any(not re.fullmatch(r"\s*[-+]?[\d.]+(e[-+]?\d+)?\s*", v) for v in texts):
            known = self.categories = self.categories or [str(c) for c in listed(self.layout.categoryarray)]
            known += [v for v in dict.fromkeys(str(v) for v in array if v is not None) if v not in known]

    def places(self, values: Any) -> np.ndarray:
        """Values as coordinates: categories by their place, None as a gap."""
        array = listed(values)
        if array.dtype.kind == "M" or any(hasattr(v, "year") for v in array[:1]):
            raise ValueError(f"axis {self.name}: got dates, expected numbers or texts")
        named = {c: float(i) for i, c in enumerate((self.root or self).categories or [])}
        return np.array([math.nan if v is None else named[str(v)] if str(v) in named else float(v) for v in array])


@dataclass
class Place:
    """One pair of axes, matplotlib's axes for it, and the height of the bars stacked so far, by position and sign."""

    x: Axis
    y: Axis
    ax: Any
    bars: list[Any] = field(default_factory=list)
    stacked: dict[tuple[float, bool], float] = field(default_factory=dict)


def errors(place: Place, trace: Any, x: np.ndarray, y: np.ndarray, colour: Any, order: float) -> None:
    """Error bars of both directions; negative lengths (rounding) count as 0."""
    for name in ("error_x", "error_y"):
        bar = getattr(trace, name)
        if bar.visible is False or (bar.array is None and bar.type is None):
            continue
        choose(f"{name}.type", bar.type or "data", ("data",))
        up = np.clip(np.array(listed(bar.array), float), 0, None)
        one_sided = bar.arrayminus is not None and bar.symmetric is not True
        down = np.clip(np.array(listed(bar.arrayminus), float), 0, None) if one_sided else up
        width = PT * (2 if bar.thickness is None else bar.thickness)
        place.ax.errorbar(x, y, **{name[-1] + "err": [down, up]}, fmt="none", elinewidth=width, capthick=width,
                          ecolor=rgba(bar.color or colour, trace.opacity), zorder=order,
                          capsize=PT * (4 if bar.width is None else bar.width))


def scatter(place: Place, trace: Any, colour: str, order: float) -> Any:
    """Lines, markers, error bars or a filled band. Returns the legend's sign."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    alpha, line, marker = trace.opacity, trace.line, trace.marker
    y = place.y.places(trace.y if trace.y is not None else range(len(listed(trace.x))))
    x = place.x.places(trace.x if trace.x is not None else range(len(y)))
    filled = choose("fill", trace.fill or "none", ("none", "toself")) == "toself"
    mode = trace.mode or ("lines" if filled or len(x) >= 20 else "lines+markers")
    choose("mode", mode, ("lines", "markers", "lines+markers", "markers+lines", "none"))
    colours = each(marker.color)
    line_colour = line.color or (colours if isinstance(colours, str) else colour)
    sign: dict[str, Any] = {"color": "none"}
    if filled:
        tint = rgba(trace.fillcolor, alpha) if trace.fillcolor else rgba(line_colour, 0.5 * (alpha or 1.0))
        gaps = np.flatnonzero(np.isnan(x) | np.isnan(y))
        for part in np.split(np.arange(len(x)), gaps):
            part = part[~np.isnan(x[part] + y[part])]
            place.ax.fill(x[part], y[part], facecolor=tint, edgecolor="none", zorder=order)
    if "lines" in mode and line.width != 0:
        kept = ~np.isnan(x + y) if trace.connectgaps else np.full(len(x), True)
        sign = stroke(line, line_colour, 2, alpha)
        place.ax.plot(x[kept], y[kept], drawstyle=choose("line.shape", line.shape or "linear", STEPS), zorder=order,
                      solid_joinstyle="round", **sign)
    errors(place, trace, x, y, line_colour, order)
    if "markers" in mode:
        name = marker.symbol or "circle"
        symbol = choose("marker.symbol", name.removesuffix("-open") if isinstance(name, str) else name, SYMBOLS)
        alpha = (1.0 if alpha is None else alpha) * (1.0 if marker.opacity is None else marker.opacity)
        many = colours if isinstance(colours, list) else [colours or line.color or colour]
        inks = [rgba(c, alpha) for c in many]
        faces, edges, edge = inks, inks, PT * (marker.line.width or 0)
        if name.endswith("-open"):
            faces, edge = ["none"], PT * (marker.line.width or 1.5)  # type: ignore[list-item]
        elif edge:
            edges = [rgba(marker.line.color or "#444444", alpha)]
        size = each(marker.size) if marker.size is not None else 6
        place.ax.scatter(x, y, s=(np.asarray(size, float) * PT) ** 2, marker=symbol, facecolors=faces, zorder=order,
                         edgecolors=edges, linewidths=edge)
        sign |= {"marker": symbol, "markersize": PT * min(12.0, float(np.max(size))), "markerfacecolor": faces[0],
                 "markeredgecolor": edges[0], "markeredgewidth": edge}
    return Patch(facecolor=tint) if filled and sign == {"color": "none"} else Line2D([], [], **sign)


def bar(place: Place, trace: Any, colour: str, layout: Any, order: float) -> Any:
    """Bars, beside each other, stacked or over each other, with error bars. Returns the legend's sign."""
    from matplotlib.patches import Patch

    flat, mode = trace.orientation == "h", layout.barmode or "group"
    choose("barmode", mode, ("group", "stack", "relative", "overlay"))
    if trace.text is not None and trace.textposition != "none":
        raise ValueError("text on bars cannot be drawn by write_image. Expected textposition='none' or no text")
    across, along = (place.y, place.x) if flat else (place.x, place.y)
    lengths = along.places(trace.x if flat else trace.y)
    at = across.places(bar_positions(trace))
    everyone = np.concatenate([across.places(bar_positions(t)) for t in place.bars])
    unit = float(np.min(np.diff(np.unique(everyone)), initial=math.inf))
    room = (unit if math.isfinite(unit) else 1.0) * (1 - (0.2 if layout.bargap is None else layout.bargap))
    shown = len(place.bars) if mode == "group" else 1
    thick = room / shown if trace.width is None else np.array(each(trace.width), float)
    if mode == "group":
        at = at + room * (([t is trace for t in place.bars].index(True) + 0.5) / shown - 0.5)
    start = np.zeros(len(at)) if trace.base is None else np.broadcast_to(np.array(each(trace.base), float), len(at))
    if mode in ("stack", "relative"):
        keys = [(float(a), mode == "relative" and n < 0) for a, n in zip(at, lengths, strict=True)]
        start = np.array([place.stacked.get(k, 0.0) for k in keys])
        place.stacked |= {k: s + n for k, s, n in zip(keys, start, lengths, strict=True) if not math.isnan(n)}
    marker, colours = trace.marker, each(trace.marker.color)
    alpha = (1.0 if trace.opacity is None else trace.opacity) * (1.0 if marker.opacity is None else marker.opacity)
    inks = [rgba(c, alpha) for c in (colours if isinstance(colours, list) else [colours or colour])]
    hatch = (marker.pattern.shape or "") * 2
    look: dict[str, Any] = {"color": inks, "hatch": hatch, "zorder": order, "edgecolor": "white" if hatch else "none"}
    if flat:
        place.ax.barh(at, lengths, thick, left=start, **look)
        errors(place, trace, start + lengths, at, "#444444", order)
    else:
        place.ax.bar(at, lengths, thick, bottom=start, **look)
        errors(place, trace, at, start + lengths, "#444444", order)
    return Patch(facecolor=inks[0], hatch=hatch, edgecolor=look["edgecolor"])


def bar_positions(trace: Any) -> Any:
    """Where the bars stand: along x, of horizontal ones along y; counted from 0 where the trace does not say."""
    given, lengths = (trace.y, trace.x) if trace.orientation == "h" else (trace.x, trace.y)
    return range(len(listed(lengths))) if given is None else given

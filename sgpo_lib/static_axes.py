"""The axes of static pictures: subplots, scales and ticks, and the shapes and texts that lie on them.

What `static_images.write_image` is made of; `places` maps a pair of plotly axes to its subplot, `paper` is the
transform of paper coordinates.
"""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from sgpo_lib.static_marks import PT, Axis, Place, bar_positions, choose, listed, plain, rgba, stroke, wrap

INK = "#222222"
"""Colour of texts."""
NEAR = 1e-6
"""Coordinates closer than this are the same."""


def subplots(figure: go.Figure, traces: list[Any], canvas: Any) -> dict[tuple[str, str], Place]:
    """One matplotlib axes per pair of plotly axes, in the grid that their domains span; categories are collected."""
    layout, axes = figure.layout, {}
    for key in dict.fromkeys(["xaxis", "yaxis", *(k for k in layout if k[1:5] == "axis")]):
        name, own = key[0] + key[5:], layout[key]
        if own.overlaying:
            raise ValueError(f"axis {name} lies over {own.overlaying}; write_image expects separate subplots")
        axes[name] = Axis(name, own, domain=tuple(own.domain or (0.0, 1.0)))
    pairs = {(t.xaxis or "x", t.yaxis or "y"): [u for u in traces if (u.xaxis, u.yaxis) == (t.xaxis, t.yaxis)]
             for t in traces}
    for name, axis in axes.items():
        axis.root = axes[axis.layout.matches or name]
        beside = axis.layout.anchor or "y"
        if name[0] == "x" and beside in axes and not any(name == x or beside == y for x, y in pairs):
            pairs[name, beside] = []  # a subplot without a trace
    for (x, y), members in pairs.items():
        for t in members:
            flat, bars = t.type == "bar" and t.orientation == "h", t.type == "bar"
            axes[axes[x].layout.matches or x].see(bar_positions(t) if bars and not flat else t.x)
            axes[axes[y].layout.matches or y].see(bar_positions(t) if flat else t.y)

    def grid(domains: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
        """Where columns (rows) start, and how wide each is."""
        starts = sorted({round(d[0], 6) for d in domains})
        return starts, [min(d[1] - s for d in domains if abs(d[0] - s) < NEAR) for s in starts]

    def span(starts: list[float], domain: tuple[float, float]) -> list[int]:
        return [i for i, s in enumerate(starts) if domain[0] - NEAR <= s < domain[1] - NEAR]

    lefts, widths = grid([axes[x].domain for x, _ in pairs])
    lows, heights = grid([axes[y].domain for _, y in pairs])
    cells = canvas.add_gridspec(len(lows), len(lefts), width_ratios=widths, height_ratios=heights[::-1])
    found: dict[tuple[str, str], Place] = {}
    for (x, y), members in pairs.items():
        columns, rows = span(lefts, axes[x].domain), [len(lows) - 1 - i for i in span(lows, axes[y].domain)]
        ax = canvas.add_subplot(cells[min(rows):max(rows) + 1, columns[0]:columns[-1] + 1])
        for share, mine, letter in ((ax.sharex, axes[x].root, "x"), (ax.sharey, axes[y].root, "y")):
            for other in [p for p in found.values() if getattr(p, letter).root is mine][:1]:
                share(other.ax)
        found[x, y] = Place(axes[x], axes[y], ax, [t for t in members if t.type == "bar"])
    return found


def scale(place: Place, axis: Axis, px: float) -> None:
    """Title, ticks and limits of one axis; `px` is about its length."""
    from matplotlib import ticker

    ax, own, letter = place.ax, axis.layout, axis.name[0]
    line, names = getattr(ax, letter + "axis"), (axis.root or axis).categories
    ax.set(**{letter + "label": plain(own.title.text)})
    if own.type == "log":
        ax.set(**{letter + "scale": "log"})
    low, high = sorted(getattr(ax, f"get_{letter}lim")())
    if names is not None:
        low, high = -0.5, len(names) - 0.5
    elif own.rangemode in ("tozero", "nonnegative"):
        low = min(0.0, low) if own.rangemode == "tozero" else max(0.0, low)
    if str(own.autorange).endswith("reversed"):
        low, high = high, low
    given = [v if v is None or own.type != "log" else 10.0**v for v in own.range or (None, None)]
    low, high = (old if new is None else new for old, new in zip((low, high), given, strict=True))
    ax.set(**{letter + "lim": (low, high)})

    if own.tickvals is not None or names is not None:
        values = names if own.tickvals is None else list(listed(own.tickvals))
        texts = [plain(str(t)) for t in listed(values if own.ticktext is None else own.ticktext)]
        room = px / max(1, len(texts)) if letter == "x" else 40 * place.ax.figure.get_figwidth()
        line.set_ticks(axis.places(values), [wrap(t, int(room / 7.5)) for t in texts])
    elif own.type == "log":
        few = abs(math.log10(high / low)) < 2
        line.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
        line.set_minor_locator(ticker.NullLocator())
        line.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    elif own.dtick:
        line.set_major_locator(ticker.MultipleLocator(own.dtick))
    if names is None and (own.tickformat or own.tickprefix or own.ticksuffix) and own.ticktext is None:
        try:
            f"{1.0:{own.tickformat or 'g'}}"
        except ValueError as error:
            raise ValueError(f"tickformat: got {own.tickformat!r}, expected one that Python knows, as '.0%'") from error
        line.set_major_formatter(ticker.FuncFormatter(
            lambda v, _: f"{own.tickprefix or ''}{v:{own.tickformat or 'g'}}{own.ticksuffix or ''}"))
    if own.showgrid is False or (names is not None and place.bars):
        ax.grid(False, axis=letter)
    if own.showticklabels is False:
        ax.tick_params(**{"labelbottom" if letter == "x" else "labelleft": False})
    if own.visible is False:
        line.set_visible(False)
        ax.spines["bottom" if letter == "x" else "left"].set_visible(False)


def frame_of(places: dict[tuple[str, str], Place], item: Any, paper: Any) -> tuple[Place, list[Any]]:
    """The subplot of a shape or an annotation, and the transforms of its x and y: data, domain or paper."""
    refs = [(item.xref or "x"), (item.yref or "y")]
    first = next((p for k, p in places.items() if all(r == "paper" or r.split()[0] == n
                                                      for r, n in zip(refs, k, strict=True))), None)
    if first is None:
        raise ValueError(f"a shape or annotation refers to {refs}. Expected axes of a subplot or 'paper'")
    return first, [paper if r == "paper" else first.ax.transAxes if r.endswith(" domain") else first.ax.transData
                   for r in refs]


def draw_shape(places: dict[tuple[str, str], Place], shape: Any, paper: Any) -> None:
    """A line or a rectangle in data, domain or paper coordinates."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import blended_transform_factory

    choose("shape.type", shape.type, ("line", "rect"))
    place, frames = frame_of(places, shape, paper)
    x, y = ([axis.places([v])[0] if frame is place.ax.transData else float(v) for v in ends]
            for axis, frame, ends in ((place.x, frames[0], (shape.x0, shape.x1)),
                                      (place.y, frames[1], (shape.y0, shape.y1))))
    look = stroke(shape.line, "#444444", 2, shape.opacity)
    common: dict[str, Any] = {"transform": blended_transform_factory(*frames),
                              "zorder": 0.6 if shape.layer == "below" else 5}
    if shape.type == "line":
        mark = place.ax.add_line(Line2D(x, y, **look, **common))
    else:
        edge = look.pop("color")
        look |= {"facecolor": rgba(shape.fillcolor, shape.opacity) if shape.fillcolor else "none",
                 "edgecolor": edge if look["linewidth"] else "none"}
        mark = place.ax.add_patch(Rectangle((x[0], y[0]), x[1] - x[0], y[1] - y[0], **look, **common))
    mark.set_clip_on(paper not in frames)


def subplot_title(places: dict[tuple[str, str], Place], note: Any) -> bool:
    """Set an annotation that stands centred on top of a subplot as its title; False where it is none."""
    for place in places.values() if (note.xref, note.yref, note.yanchor) == ("paper", "paper", "bottom") else ():
        if abs(note.x - sum(place.x.domain) / 2) < 1e-3 and abs(note.y - place.y.domain[1]) < 1e-3:
            place.ax.set_title(plain(note.text), fontsize=PT * min(note.font.size or 14, 14))
            return True
    return False


def annotate(places: dict[tuple[str, str], Place], note: Any, paper: Any) -> None:
    """Text in data, domain or paper coordinates; outside the axes' limits it is not shown, as in a browser."""
    place, frames = frame_of(places, note, paper)
    at: list[float] = []
    anchors: list[str] = []
    for axis, frame, value, anchor, names in ((place.x, frames[0], note.x, note.xanchor, ("left", "center", "right")),
                                              (place.y, frames[1], note.y, note.yanchor, ("bottom", "center", "top"))):
        data = frame is place.ax.transData
        if data and axis.layout.type == "log":
            value = 10.0**value
        at.append(float(axis.places([value])[0]) if data else float(value))
        low, high = sorted(getattr(place.ax, f"get_{axis.name[0]}lim")())
        if data and not low - NEAR <= at[-1] <= high + NEAR:
            return
        side = names[1] if data or note.showarrow is not False else names[min(2, max(0, int(at[-1] * 3)))]
        anchors.append(side if anchor in (None, "auto") else "center" if anchor == "middle" else anchor)
    arrow = note.showarrow is not False
    ax, ay = (-10 if note.ax is None else note.ax, -30 if note.ay is None else note.ay) if arrow else (0, 0)
    ax += {"left": 3, "right": -3}.get(anchors[0], 0)  # a text must not touch the line that it names
    place.ax.annotate(plain(note.text), at, xycoords=tuple(frames), textcoords="offset points", annotation_clip=False,
                      xytext=(PT * ((note.xshift or 0) + ax), PT * ((note.yshift or 0) - ay)), ha=anchors[0],
                      va=anchors[1], rotation=-(note.textangle or 0), color=rgba(note.font.color or INK, note.opacity),
                      fontsize=PT * (note.font.size or 13), zorder=6,
                      bbox={"facecolor": (1, 1, 1, 0.7), "edgecolor": "none", "pad": 0.6})

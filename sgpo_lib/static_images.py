"""Static pictures of the package's figures: a plotly Figure in, a PNG, SVG or PDF file out, drawn by matplotlib.

For reports and papers: plotly's own export needs Chrome. The same figure gives the same bytes. What would be left out
of the picture is an error. Departures from what a browser shows:
1. The legend is always below the plot, wrapped: it covers nothing.
2. Long titles and labels are wrapped, crowded tick labels turned.
3. Subplots move apart where labels need room; a figure too low for its rows and its legend grows.
4. Annotations have no arrows; tags in texts are dropped, `<br>` is a new line.
5. A subplot that holds nothing is left blank.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from sgpo_lib.static_axes import INK, annotate, draw_shape, scale, subplot_title, subplots
from sgpo_lib.static_marks import Place, bar, choose, plain, scatter, wrap

METADATA: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None},
                                        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
"""Suffixes, and what is not written so that files do not change with the day or matplotlib's version."""
RULE = "#bdbdbd"
STYLE = {"font.family": "sans-serif", "font.size": 10, "text.color": INK, "text.parse_math": False,
         "axes.axisbelow": True, "axes.edgecolor": RULE, "axes.grid": True, "axes.labelcolor": INK,
         "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": 10, "axes.xmargin": 0.03,
         "grid.color": "#e3e3e3", "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "sgpo",
         "xtick.color": RULE, "xtick.labelcolor": INK, "xtick.labelsize": 9.5, "ytick.color": RULE,
         "ytick.labelcolor": INK, "ytick.labelsize": 9.5, "hatch.linewidth": 0.7, "figure.titlesize": 12}
COLOURWAY = ("#636efa", "#EF553B", "#00cc96", "#ab63fa", "#FFA15A", "#19d3f3", "#FF6692", "#B6E880", "#FF97FF")


def _legend(canvas: Any, title: str, signs: list[tuple[str, Any]]) -> None:
    """The legend below the plot, in as many columns as fit, read by rows."""
    names, handles = [wrap(n, int(canvas.get_figwidth() * 12)) for n, _ in signs], [sign for _, sign in signs]
    for columns in range(len(names), 0, -1):
        by_column = [i for c in range(columns) for i in range(c, len(names), columns)]  # matplotlib fills columns first
        legend = canvas.legend([handles[i] for i in by_column], [names[i] for i in by_column], ncols=columns,
                               loc="outside lower left", title=title or None, alignment="left", fontsize=9.5,
                               handlelength=2.6, columnspacing=1.6, borderaxespad=0.2)
        if columns == 1 or legend.get_window_extent(canvas.canvas.get_renderer()).width < 0.98 * canvas.bbox.width:
            return
        legend.remove()


def _fit(canvas: Any, places: list[Place], asked: float) -> None:
    """Wrap titles longer than their axis, turn crowded tick labels, make a figure higher whose rows lack room.

    `asked` is the height that the figure's layout gives, in inches; the plot shall have half of it.
    """
    from matplotlib.ticker import AutoLocator, FixedLocator, MaxNLocator

    below = sum(legend.get_window_extent().height for legend in canvas.legends) / canvas.dpi
    canvas.set_figheight(max(asked, 0.5 * asked + below + 0.8))  # no plot at all is left to measure otherwise
    canvas.draw_without_rendering()
    for place in places:
        box = place.ax.get_window_extent()
        for text, room, side in ((place.ax.title, box.width, "width"), (place.ax.xaxis.label, box.width, "width"),
                                 (place.ax.yaxis.label, box.height, "height")):
            long = getattr(text.get_window_extent(), side)
            if text.get_text() and long > room:
                text.set_text(wrap(text.get_text(), int(0.95 * len(text.get_text()) * room / long)))
        line = place.ax.xaxis
        labels = [t for t in line.get_ticklabels() if t.get_text() and t.get_visible()]
        extents = sorted((b.x0, b.x1) for b in (t.get_window_extent() for t in labels))
        if any(b[0] < a[1] + 2 for a, b in pairwise(extents)):
            if isinstance(line.get_major_locator(), AutoLocator):
                line.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            elif isinstance(line.get_major_locator(), FixedLocator):
                upright = box.width / len(labels) < 0.3 * canvas.dpi  # two lines of text
                turn = {"rotation": 90} if upright else {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
                texts = [t.get_text().replace("\n", " ") for t in line.get_ticklabels()]
                line.set_ticks(line.get_ticklocs(), texts, **turn)
    for _ in range(3):
        canvas.draw_without_rendering()
        boxes = [p.ax.get_position() for p in places]
        height = canvas.get_figheight()
        lack = 0.5 * asked - height * (max(b.y1 for b in boxes) - min(b.y0 for b in boxes))
        for place, box in zip(places, boxes, strict=True):
            texts = [t.get_text() for t in place.ax.get_yticklabels() if (place.y.root or place.y).categories]
            lack = max(lack, 0.16 * sum(text.count("\n") + 1 for text in texts) - height * box.height)
        if lack <= 0.01:
            break
        canvas.set_figheight(height + lack)


def write_image(figure: go.Figure, path: Path, *, dpi: int = 150) -> Path:
    """Draw `figure` and save it by the suffix of `path`: .png, .svg (text as text) or .pdf. Returns the path.

    Size: layout.width and height (900 and 450 where not given) in hundredths of an inch; `dpi` is pixels per inch of a
    PNG. Raises ValueError for another suffix, for a trace, symbol, mode or axis that cannot be drawn, and where
    matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in METADATA:
        raise ValueError(f"path: got suffix {path.suffix!r} ({path}), expected one of {', '.join(METADATA)}")
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.transforms import Bbox, BboxTransformTo
    except ImportError as error:
        raise ValueError("write_image needs matplotlib, which is not installed. Install it with "
                         "`pip install sgpo-workbench[lab]`") from error
    layout, traces = figure.layout, [t for t in figure.data if t.visible in (None, True)]
    for trace in traces:
        choose("trace type", trace.type, ("scatter", "bar"))
    colours = layout.colorway or layout.template.layout.colorway or COLOURWAY
    with style.context([STYLE], after_reset=True):
        inches = (layout.width or 900) / 100, (layout.height or 450) / 100
        # texts are measured at the resolution at which they are drawn: hinting changes their widths
        canvas = Figure(inches, dpi if path.suffix == ".png" else 72, layout="constrained")
        FigureCanvasAgg(canvas)
        places = subplots(figure, traces, canvas)
        signs: dict[tuple[str, str], Any] = {}
        for i, trace in enumerate(figure.data):
            if trace.visible not in (None, True):
                continue
            place = places[trace.xaxis or "x", trace.yaxis or "y"]
            colour, name = colours[i % len(colours)], plain(trace.name or f"trace {i}")
            if trace.type == "bar":
                sign = bar(place, trace, colour, layout, 2 + i / 1000)
            else:
                sign = scatter(place, trace, colour, 3 + i / 1000)
            if trace.showlegend is not False:
                signs.setdefault((trace.legendgroup or "", name), sign)

        area = Bbox.unit()
        paper = BboxTransformTo(area) + canvas.transFigure
        for shape in layout.shapes:
            draw_shape(places, shape, paper)
        for place in places.values():
            width, height = (100 * length for length in canvas.get_size_inches())
            scale(place, place.x, width * (place.x.domain[1] - place.x.domain[0]))
            scale(place, place.y, height * (place.y.domain[1] - place.y.domain[0]))
        notes = [n for n in layout.annotations if n.visible is not False and not subplot_title(places, n)]
        for place in places.values():
            if not (place.ax.has_data() or place.ax.get_title() or any(n.xref == place.x.name for n in notes)):
                place.ax.set_axis_off()
        if layout.title.text:
            canvas.suptitle(wrap(plain(layout.title.text), int(canvas.get_figwidth() * 11)), x=0.01, ha="left")
        asked_for = layout.showlegend or (layout.showlegend is None and any(t.showlegend for t in traces))
        if signs and (asked_for or (layout.showlegend is None and len(signs) > 1)):
            entries = list(signs.items())[::-1 if "reversed" in (layout.legend.traceorder or "") else 1]
            _legend(canvas, plain(layout.legend.title.text), [(name, sign) for (_, name), sign in entries])
        _fit(canvas, list(places.values()), canvas.get_figheight())

        canvas.set_layout_engine("none")  # from here on nothing moves
        boxes = Bbox.union([p.ax.get_position() for p in places.values()])
        (x0, x1), (y0, y1) = ((min(d[0] for d in domains), max(d[1] for d in domains)) for domains in (
            [p.x.domain for p in places.values()], [p.y.domain for p in places.values()]))
        across, up = boxes.width / (x1 - x0), boxes.height / (y1 - y0)
        area.set(Bbox.from_bounds(boxes.x0 - x0 * across, boxes.y0 - y0 * up, across, up))
        for note in notes:
            annotate(places, note, paper)
        everything = Bbox.union([canvas.get_tightbbox().padded(0.03),
                                 Bbox.from_bounds(0, 0, *canvas.get_size_inches())])
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=dpi, bbox_inches=everything, facecolor="white", metadata=METADATA[path.suffix])
    return path

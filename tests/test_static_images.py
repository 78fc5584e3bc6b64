"""Static pictures: what is drawn is looked for in the pixels of a PNG and in the texts of an SVG."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
from plotly.subplots import make_subplots
from test_figures import frame, train_rows

from sgpo_lib import figures, method_figures
from sgpo_lib.static_images import write_image

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.image import imread  # noqa: E402

RED, GREEN, BLUE = "#ff0000", "#00ff00", "#0000ff"


def pixels(figure: go.Figure, tmp_path: Path, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of exactly this colour."""
    image = np.round(imread(write_image(figure, tmp_path / "f.png", dpi=100))[..., :3] * 255).astype(int)
    wanted = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
    return np.nonzero((np.abs(image - wanted) <= 2).all(axis=-1))


def centre(figure: go.Figure, tmp_path: Path, colour: str) -> tuple[float, float]:
    """Mean column and row of a colour's pixels."""
    rows, columns = pixels(figure, tmp_path, colour)
    assert len(rows), f"no pixel is {colour}"
    return float(columns.mean()), float(rows.mean())


def texts(figure: go.Figure, tmp_path: Path) -> dict[str, tuple[float, float]]:
    """Texts of the SVG, with their places from its top left corner."""
    svg = write_image(figure, tmp_path / "f.svg").read_text()
    found = re.findall(r"<text([^>]*)>([^<]*)</text>", svg)
    place = re.compile(r'(?:translate\(| x="|rotate\([-\d.]+ )([-\d.]+)(?:[ ,]|" y=")([-\d.]+)')
    return {t: tuple(map(float, place.search(a).groups())) for a, t in found}  # type: ignore[misc]


def line(x, y, colour, **more) -> go.Scatter:
    return go.Scatter(x=x, y=y, mode=more.pop("mode", "lines"), line={"color": colour, "width": 3}, **more)


def test_a_line_lies_where_its_values_are(tmp_path):
    figure = go.Figure([line([0, 10], [0, 0], RED), line([0, 10], [8, 8], GREEN), line([0, 10], [2, 2], BLUE)])
    low, high, mid = (centre(figure, tmp_path, c)[1] for c in (RED, GREEN, BLUE))
    assert high < mid < low  # rows count from the top
    assert (low - mid) / (low - high) == pytest.approx(0.25, abs=0.01)


def test_a_log_axis_and_its_range_in_powers_of_ten(tmp_path):
    figure = go.Figure([line([0, 1], [v, v], c) for v, c in ((1, RED), (1000, GREEN), (10, BLUE))])
    figure.update_yaxes(type="log", range=[-1, 4])
    low, high, mid = (centre(figure, tmp_path, c)[1] for c in (RED, GREEN, BLUE))
    assert (low - mid) / (low - high) == pytest.approx(1 / 3, abs=0.01)
    shown = texts(figure, tmp_path)
    assert {"0.1", "1", "10", "10000"} <= set(shown)


def test_a_gap_where_values_are_missing(tmp_path):
    whole = pixels(go.Figure(line([0, 1, 2, 3, 4], [1] * 5, RED)), tmp_path, RED)[0]
    for hole in (None, np.nan):
        holed = pixels(go.Figure(line([0, 1, 2, 3, 4], [1, 1, hole, 1, 1], RED)), tmp_path, RED)[0]
        assert len(holed) == pytest.approx(len(whole) / 2, rel=0.02)


def test_dashes_leave_gaps_of_their_share(tmp_path):
    solid, dashed = (go.Figure(line([0, 1], [1, 1], RED)) for _ in range(2))
    dashed.data[0].line.dash = "dash"
    share = len(set(pixels(dashed, tmp_path, RED)[1])) / len(set(pixels(solid, tmp_path, RED)[1]))
    assert 0.4 < share < 0.55


def test_markers_have_their_size_and_open_ones_are_hollow(tmp_path):
    full = go.Figure(go.Scatter(x=[1], y=[1], mode="markers", marker={"size": 40, "color": RED, "symbol": "square"}))
    rows, columns = pixels(full, tmp_path, RED)
    assert np.ptp(rows) == pytest.approx(40, abs=2) and np.ptp(columns) == pytest.approx(40, abs=2)
    full.data[0].marker.update(symbol="square-open", line={"width": 3})
    assert 0 < len(pixels(full, tmp_path, RED)[0]) < 0.35 * len(rows)


@pytest.mark.parametrize("flat", [False, True])
def test_lengths_of_bars(tmp_path, flat):
    def bars(lengths: list, colours: list[str], **layout) -> go.Figure:
        made = [go.Bar(x=v if flat else ["a"], y=["a"] if flat else v, orientation="h" if flat else "v",
                       marker={"color": c}) for v, c in zip(lengths, colours, strict=True)]
        return go.Figure(made, layout={"showlegend": False, **layout})

    def extent(figure: go.Figure, colour: str) -> tuple[int, int]:
        where = pixels(figure, tmp_path, colour)[1 if flat else 0]
        return int(where.min()), int(where.max())

    beside, stacked = (bars([[4], [2]], [RED, BLUE], barmode=m) for m in ("group", "stack"))
    for figure in (beside, stacked):
        red, blue = extent(figure, RED), extent(figure, BLUE)
        assert (blue[1] - blue[0]) / (red[1] - red[0]) == pytest.approx(0.5, abs=0.02)
    near = (lambda e: e[0]) if flat else (lambda e: e[1])
    far = (lambda e: e[1]) if flat else (lambda e: e[0])
    assert near(extent(beside, RED)) == near(extent(beside, BLUE))  # both begin at 0
    assert abs(far(extent(stacked, RED)) - near(extent(stacked, BLUE))) <= 2  # one begins where the other ends


def test_bars_beside_each_other_keep_their_order(tmp_path):
    figure = go.Figure([go.Bar(x=["a", "b"], y=[1, 1], marker={"color": c}) for c in (RED, GREEN)])
    assert centre(figure, tmp_path, RED)[0] < centre(figure, tmp_path, GREEN)[0]


def test_a_band_is_filled_with_its_opacity(tmp_path):
    band = go.Scatter(x=[0, 1, 1, 0], y=[1, 1, 0, 0], fill="toself", fillcolor=RED, opacity=0.2, line={"width": 0})
    figure = go.Figure([band, line([0, 1], [1, 1], BLUE), line([0, 1], [0, 0], GREEN)], layout={"showlegend": False})
    rows, _ = pixels(figure, tmp_path, "#ffcccc")  # 0.8 white + 0.2 red
    top, bottom = centre(figure, tmp_path, BLUE)[1], centre(figure, tmp_path, GREEN)[1]
    assert len(rows) > 20_000 and rows.min() == pytest.approx(top, abs=4) and rows.max() == pytest.approx(bottom, abs=4)
    figure.data[0].update(fillcolor="rgba(255, 0, 0, 0.2)", opacity=None)
    assert len(pixels(figure, tmp_path, "#ffcccc")[0]) == len(rows)


def test_error_bars_are_as_long_as_told(tmp_path):
    point = go.Scatter(x=[5], y=[1], mode="markers", marker={"color": BLUE, "size": 4}, error_x={
        "array": [2], "arrayminus": [4], "symmetric": False, "color": RED, "width": 0, "thickness": 3})
    figure = go.Figure(point, layout={"xaxis": {"range": [0, 10]}})
    columns, middle = pixels(figure, tmp_path, RED)[1], centre(figure, tmp_path, BLUE)[0]
    assert (middle - columns.min()) / (columns.max() - middle) == pytest.approx(2, abs=0.05)
    figure.data[0].error_x.symmetric = True
    columns = pixels(figure, tmp_path, RED)[1]
    assert middle - columns.min() == pytest.approx(columns.max() - middle, abs=2)


def test_categories_stand_in_order_of_appearance_and_reversed_ones_from_the_top(tmp_path):
    figure = go.Figure([go.Scatter(y=["late", "early"], x=[1, 2], mode="markers"),
                        go.Scatter(y=["other", "late"], x=[1, 2], mode="markers")])
    rows = {t: y for t, (_, y) in texts(figure, tmp_path).items() if t in ("late", "early", "other")}
    assert rows["late"] > rows["early"] > rows["other"]
    figure.update_yaxes(autorange="reversed")
    rows = {t: y for t, (_, y) in texts(figure, tmp_path).items() if t in rows}
    assert rows["late"] < rows["early"] < rows["other"]
    figure.update_yaxes(categoryarray=["other", "early", "late"])
    rows = {t: y for t, (_, y) in texts(figure, tmp_path).items() if t in rows}
    assert rows["other"] < rows["early"] < rows["late"]


def test_subplots_stand_as_their_domains_and_carry_their_titles(tmp_path):
    figure = make_subplots(2, 2, subplot_titles=["one", "two", "three", "four"])
    for i, colour in enumerate((RED, GREEN, BLUE, "#00ffff")):
        figure.add_trace(line([0, 1], [0, 1], colour, showlegend=False), i // 2 + 1, i % 2 + 1)
    red, green, blue, cyan = (centre(figure, tmp_path, c) for c in (RED, GREEN, BLUE, "#00ffff"))
    assert red[0] == pytest.approx(blue[0], abs=2) and red[1] == pytest.approx(green[1], abs=2)
    assert cyan[0] > red[0] + 300 and cyan[1] > red[1] + 150
    titles = texts(figure, tmp_path)
    assert titles["one"][0] < titles["two"][0] and titles["one"][1] < titles["three"][1]


def test_lines_and_areas_across_the_plot(tmp_path):
    figure = go.Figure(line([0, 10], [0, 10], BLUE))
    figure.add_hline(y=5, line={"color": RED, "width": 2}, annotation_text="half")
    figure.add_vrect(x0=2, x1=4, fillcolor=GREEN, line_width=0, layer="below")
    rows, columns = pixels(figure, tmp_path, RED)
    green = pixels(figure, tmp_path, GREEN)
    blue = pixels(figure, tmp_path, BLUE)
    assert np.ptp(rows) <= 3 and np.ptp(columns) > np.ptp(blue[1])  # from edge to edge, beyond the data
    assert rows.mean() == pytest.approx((blue[0].min() + blue[0].max()) / 2, abs=2)
    assert np.ptp(green[1]) / np.ptp(blue[1]) == pytest.approx(0.2, abs=0.01) and np.ptp(green[0]) > np.ptp(blue[0])
    assert "half" in texts(figure, tmp_path)


def test_the_legend_names_each_entry_once_below_the_plot(tmp_path):
    names = [f"a method with a long name, number {i}" for i in range(9)]
    figure = go.Figure([line([0, 1], [i, i], BLUE, name=n, legendgroup=n) for i, n in enumerate(names)])
    figure.add_trace(line([0, 1], [0, 0], RED, name=names[0], legendgroup=names[0]))
    figure.add_trace(line([0, 1], [0, 0], RED, name="hidden", showlegend=False))
    figure.update_xaxes(title_text="steps")
    svg = write_image(figure, tmp_path / "f.svg").read_text()
    assert [svg.count(f">{n}<") for n in names] == [1] * 9 and "hidden" not in svg
    shown, width = texts(figure, tmp_path), float(re.search(r'width="([\d.]+)pt"', svg)[1])  # type: ignore[index]
    assert min(shown[n][1] for n in names) > shown["steps"][1]
    assert len({shown[n][0] for n in names}) in (2, 3) and max(shown[n][0] for n in names) < 0.75 * width
    assert shown[names[0]][1] == shown[names[1]][1] and shown[names[0]][0] < shown[names[1]][0]  # read by rows


def test_titles_ticks_and_tags(tmp_path):
    figure = go.Figure(line([0, 1], [0, 1], BLUE), layout={"title": "costs $5 or $6,<br><b>a</b><sub>0</sub> &lt; 1"})
    figure.update_xaxes(tickvals=[0, 1], ticktext=["none", "all"], title_text="share")
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    shown = texts(figure, tmp_path)
    assert {"costs $5 or $6,", "a0 &lt; 1", "none", "all", "share", "0%", "100%"} <= set(shown)
    assert shown["none"][0] < shown["all"][0]


def test_size_and_room_for_everything(tmp_path):
    figure = go.Figure(line([0, 1], [0, 1], BLUE), layout={"width": 600, "height": 400})
    assert imread(write_image(figure, tmp_path / "a.png", dpi=200)).shape[:2] == (800, 1200)
    figure.update_layout(height=120, title="a title")  # a plot of no height helps nobody
    figure.add_traces([line([0, 1], [0, 1], BLUE, name=f"a method with a long name, number {i}") for i in range(12)])
    rows, _ = pixels(figure, tmp_path, BLUE)
    assert len(rows) and imread(tmp_path / "f.png").shape[0] > 200
    figure = go.Figure(go.Bar(x=[1], y=["a label that is longer than most, and one that must not be cut"],
                              orientation="h"))
    image = imread(write_image(figure, tmp_path / "b.png"))[..., :3]
    assert (image[:, :2] == 1).all() and (image[:, -2:] == 1).all()


def test_typed_arrays_are_read(tmp_path):
    figure = go.Figure(line(np.arange(3.0), np.array([1, 5, 2], dtype="float32"), RED))
    packed = plotly.io.from_json(figure.to_json())
    assert isinstance(packed.data[0].x, dict)
    assert write_image(packed, tmp_path / "a.png").read_bytes() == write_image(figure, tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, suffix):
    figure = figures.learning_curves(frame({("sgpo", 0): [0.2, 0.5], ("sgpo", 1): [0.4, 0.5]}))
    first, second = (write_image(figure, tmp_path / f"{i}{suffix}") for i in range(2))
    assert first.read_bytes() == second.read_bytes()
    code = ("import sys, plotly.io; from pathlib import Path; from sgpo_lib.static_images import write_image\n"
            "write_image(plotly.io.from_json(sys.stdin.read()), Path(sys.argv[1]))")
    third = tmp_path / f"third{suffix}"
    subprocess.run([sys.executable, "-c", code, str(third)], input=figure.to_json(), text=True, check=True, timeout=120)
    assert third.read_bytes() == first.read_bytes()


def test_a_picture_leaves_matplotlibs_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    write_image(go.Figure(line([0, 1], [0, 1], RED)), tmp_path / "f.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(("trace", "told"), [
    (go.Contour(z=[[1, 2]]), "contour"), (go.Heatmap(z=[[1, 2]]), "heatmap"),
    (go.Scatter(y=[1], mode="text", text=["a"]), "mode 'text'"), (go.Scatter(y=[1], fill="tozeroy"), "tozeroy"),
    (go.Scatter(y=[1], mode="markers", marker={"symbol": "hourglass"}), "hourglass"),
    (go.Scatter(y=[1, 2], mode="markers", marker={"color": [1, 2]}), "colour"),
    (go.Bar(y=[1], text=["a"]), "text on bars"), (go.Scatter(y=[1, 2], yaxis="y2"), "y2"),
    (go.Scatter(y=pd.to_datetime(["2026-01-01"])), "dates"),
    (go.Scatter(y=[1], error_y={"type": "percent", "value": 5}), "percent")])
def test_what_cannot_be_drawn_is_an_error(tmp_path, trace, told):
    figure = go.Figure(trace, layout={"yaxis2": {"overlaying": "y"}} if trace.yaxis else {})
    with pytest.raises(ValueError, match=told):
        write_image(figure, tmp_path / "f.png")
    assert not (tmp_path / "f.png").exists()


def test_suffixes_and_a_missing_matplotlib(tmp_path, monkeypatch):
    figure = go.Figure(line([0, 1], [0, 1], RED))
    with pytest.raises(ValueError, match=r"got suffix '\.jpg'.*expected one of \.png, \.svg, \.pdf"):
        write_image(figure, tmp_path / "f.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install sgpo-workbench\[lab\]"):
        write_image(figure, tmp_path / "f.png")


def made() -> dict[str, go.Figure]:
    """Each figure of `figures`, and those of `method_figures` that are not maps."""
    eval_rows = frame({("sgpo", s): [0.2, 0.5, 0.1 * s] for s in range(3)})
    rates = pd.DataFrame({"problem": ["a", "b"], "p_auto": [0.2, 0.4], "p_guide": [0.6, 0.8], "p_auto_low": [0.1, 0.3],
                          "p_auto_high": [0.4, 0.6], "p_guide_low": [0.5, 0.7], "p_guide_high": [0.7, 0.9]})
    steps = pd.DataFrame({"step": ["unit", "scale"], "kl": [0.8, 0.1], "tokens": [5, 6], "sft_loss": [1.0, 0.2]})
    tokens = pd.DataFrame({"token": ["a", "b", "a"], "kl": [0.1, 0.9, 0.3]})
    curves = pd.DataFrame({"x": [0, 1, 0, 1], "y": [0, 1, 1, 0], "delta": [1, 1, 2, 2]})
    return {"learning_curves": figures.learning_curves(eval_rows), "training_panel": figures.training_panel(
                train_rows().drop(columns="target_share")), "phase_seconds": figures.phase_seconds(train_rows()),
            "alpha_against_pass_rate": figures.alpha_against_pass_rate(train_rows()),
            "pass_rates": figures.pass_rates(rates), "step_bars": figures.step_bars(steps),
            "empty": figures.learning_curves(pd.DataFrame()),
            "masked_tokens": method_figures.masked_tokens(tokens, 0.5),
            "lines": method_figures.lines(curves, "x", "y", "delta", "curves", ("x", "y"))}


@pytest.mark.parametrize("name", list(made()))
@pytest.mark.filterwarnings("error::UserWarning")
def test_every_figure_can_be_written_with_all_its_texts(tmp_path, name):
    figure = made()[name]
    svg = write_image(figure, tmp_path / "f.svg").read_text()
    words = re.sub(r"\s+", " ", " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg)))
    legend = [t.name for t in figure.data if t.showlegend is not False and len(figure.data) > 1]
    notes = [a.text for a in figure.layout.annotations]
    for text in [figure.layout.title.text, figure.layout.xaxis.title.text, *legend, *notes]:
        assert text is None or text in words, text
    for axis in ("x", "y"):
        for value in {v for t in figure.data for v in (getattr(t, axis) if t.type == "bar" else ())}:
            assert not isinstance(value, str) or value in words

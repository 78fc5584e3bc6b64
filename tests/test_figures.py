"""Figures from made-up frames: traces and values against hand arithmetic."""

import json
import math
import re
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from sgpo_lib import comparison, figures, frames
from sgpo_lib.jobs import JobResult
from sgpo_lib.pages import figure_html, math_svg
from sgpo_lib.recipes import from_parameters
from sgpo_lib.report import write_report
from sgpo_lib.runs import Run, open_run


def frame(values: dict[tuple[str, int], list[float]], kind: str = "eval", metric: str = "accuracy") -> pd.DataFrame:
    """Rows of (method, seed) -> a metric at the steps 0, 10, 20, ..."""
    return pd.DataFrame([{"run": f"{m}-{s}", "method": m, "seed": s, "kind": kind, "step": 10 * i, metric: v}
                         for (m, s), row in values.items() for i, v in enumerate(row)])


def test_interval_of_three_seeds_by_hand():
    # 0.2, 0.4, 0.6: mean 0.4, sample standard deviation 0.2, half width 4.303 * 0.2 / sqrt(3) = 0.49687
    mean, low, high = figures.mean_interval([0.2, 0.4, 0.6])
    assert (mean, low, high) == pytest.approx((0.4, -0.09687, 0.89687), abs=1e-5)
    assert figures.mean_interval([0.3, math.nan])[0] == 0.3 and math.isnan(figures.mean_interval([0.3])[1])
    assert all(math.isnan(v) for v in figures.mean_interval([]))


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (2, 4.303), (16, 2.120), (30, 2.042), (120, 1.980)])
def test_t_quantiles_are_those_of_the_tables(freedom, value):
    assert figures.t_quantile(freedom) == pytest.approx(value, abs=2e-3)


def test_learning_curve_mean_and_band():
    df = frame({("sgpo", 0): [0.2, 0.5], ("sgpo", 1): [0.4, 0.5], ("sgpo", 2): [0.6, 0.5], ("grpo8", 0): [0.1, 0.2]})
    figure = figures.learning_curves(pd.concat([df, frame({("sgpo", 0): [0.9]}, kind="train")]))
    band, sgpo, grpo = figure.data
    assert (sgpo.name, grpo.name) == ("SGPO, 3 seeds", "GRPO (8 samples), 1 seed")
    assert list(sgpo.x) == [0, 10] and list(sgpo.y) == pytest.approx([0.4, 0.5])
    assert list(band.x) == [0, 10, 10, 0]
    assert list(band.y) == pytest.approx([0.89687, 0.5, 0.5, 0.0], abs=1e-5)  # cut at 0 and 1
    assert list(grpo.y) == [0.1, 0.2]
    assert sgpo.line.color == band.fillcolor == figures.METHODS["sgpo"][1] != grpo.line.color
    assert figure.layout.xaxis.title.text == "training step"


def test_a_seed_that_stopped_early_leaves_the_mean_of_the_others():
    curve = figures.over_seeds(frame({("sgpo", 0): [0.2, 0.4], ("sgpo", 1): [0.4]}), "accuracy")
    assert list(curve["mean"]) == pytest.approx([0.3, 0.4]) and list(curve["seeds"]) == [2, 1]
    assert math.isnan(curve["low"].iloc[1])


def test_colours_are_fixed_and_differ():
    colours = {v[1] for v in figures.METHODS.values()}
    assert len(colours) == len(figures.METHODS) and not colours & set(figures._SPARE)
    assert figures.method_style("ablation-x") == figures.method_style("ablation-x")


def train_rows() -> pd.DataFrame:
    same = {"kind": "train", "response_length": 20.0, "kl_mean": 0.1, "kl_clipped_share": 0.01, "target_share": 0.9,
            "seconds_sample": 2.0, "seconds_verify": 0.5, "seconds_policy": 1.0, "seconds_step": 4.0}
    guided = {"sgpo": {"reward_guided": 0.7}, "grpo8": {}}
    return pd.DataFrame([
        {"run": f"{method}-{seed}", "method": method, "seed": seed, "step": step, "reward_autonomous": 0.2 * step,
         "entropy": 1.0 / step, **same, **guided[method], **({"alpha": 0.8 / step} if guided[method] else {})}
        for method in guided for seed in (0, 1) for step in (1, 2)])


def test_training_panel():
    figure = figures.training_panel(train_rows())
    assert len([a for a in figure.layout.annotations if not a.text.startswith("no values")]) == 6
    named = [t.name for t in figure.data if t.showlegend]
    assert named == ["SGPO, 2 seeds", "GRPO (8 samples), 2 seeds"]
    assert "no values for target_share" in [
        a.text for a in figures.training_panel(train_rows().drop(columns="target_share")).layout.annotations]


def test_alpha_against_pass_rate_takes_sgpo_only():
    figure = figures.alpha_against_pass_rate(train_rows())
    lines = {t.name: list(t.y) for t in figure.data if t.showlegend is not False}
    assert lines["alpha(q), mean over problems, 2 seeds"] == pytest.approx([0.8, 0.4])
    assert lines["pass rate, autonomous, 2 seeds"] == pytest.approx([0.2, 0.4])


def test_phase_seconds_adds_the_rest():
    figure = figures.phase_seconds(train_rows())
    bars = {t.name: list(t.x) for t in figure.data}
    assert bars["sampling"] == [2.0, 2.0] and bars["policy gradient"] == [1.0, 1.0]
    assert bars["rest"] == pytest.approx([0.5, 0.5])  # 4 - 2 - 0.5 - 1
    assert list(figure.data[0].y) == ["GRPO (8 samples)", "SGPO"]


def test_pass_rates_with_intervals():
    df = pd.DataFrame({"problem": ["a", "b"], "p_auto": [0.2, 0.4], "p_guide": [0.6, 0.8], "p_auto_low": [0.1, 0.3],
                       "p_auto_high": [0.4, 0.6], "p_guide_low": [0.5, 0.7], "p_guide_high": [0.7, 0.9]})
    points = figures.pass_rates(df).data[1]
    assert list(points.error_x.array) == pytest.approx([0.2, 0.2])
    assert list(points.error_x.arrayminus) == pytest.approx([0.1, 0.1])
    assert figures.pass_rates(df[["p_auto", "p_guide"]]).data[2].name == "mean (0.30, 0.70)"


def test_step_bars():
    df = pd.DataFrame({"step": ["unit", "scale"], "kl": [0.8, 0.1], "tokens": [5, 6], "sft_loss": [1.0, 0.2]})
    kl, sft = figures.step_bars(df).data
    assert list(kl.x) == [0.8, 0.1] and list(sft.x) == [1.0, 0.2]
    assert list(kl.y) == ["unit (5 tokens)", "scale (6 tokens)"]


def test_the_threshold_is_crossed_between_evaluations():
    metrics = pd.DataFrame({"run": ["a"] * 3, "method": ["sgpo"] * 3, "kind": "eval", "step": [0, 8, 12],
                            "accuracy": [0.1, 0.4, 0.8]})
    assert list(comparison.steps_to_threshold(metrics, 0.5)["step"]) == [9.0]  # a quarter of the way from 8 to 12


def test_final_table():
    summaries = pd.DataFrame({"run": ["a", "b", "c", "d"], "method": ["sgpo"] * 3 + ["grpo8"],
                              "test_accuracy": [0.2, 0.4, 0.6, 0.3], "cpu_seconds": [10.0, 20.0, 30.0, 8.0]})
    metrics = pd.DataFrame({"run": ["a", "a", "b", "b", "c", "d"], "method": ["sgpo"] * 5 + ["grpo8"],
                            "kind": "eval", "step": [0, 10, 10, 20, 30, 0], "accuracy": [0.4, 0.5, 0.6, 0.7, 0.9, 0.1]})
    table = comparison.final_table(summaries, metrics, threshold=0.5).set_index("method")
    assert list(table.index) == ["sgpo", "grpo8"] and list(table["runs"]) == [3, 1]
    assert table.loc["sgpo", "accuracy"] == pytest.approx(0.4)
    assert table.loc["sgpo", "high"] == pytest.approx(0.89687, abs=1e-5)
    assert math.isnan(table.loc["grpo8", "low"]) and list(table["cpu_seconds"]) == [20.0, 8.0]
    assert table.loc["sgpo", "steps_to_threshold"] == 10 and table.loc["sgpo", "reached"] == 3  # of 10, 10, 30
    assert math.isnan(table.loc["grpo8", "steps_to_threshold"]) and table.loc["grpo8", "reached"] == 0
    assert comparison.final_table(pd.DataFrame()).empty


@pytest.mark.parametrize("make", [figures.learning_curves, figures.training_panel, figures.alpha_against_pass_rate,
                                  figures.phase_seconds, figures.pass_rates, figures.step_bars])
@pytest.mark.parametrize("df", [pd.DataFrame(), pd.DataFrame({"method": ["sgpo"], "kind": ["test"], "step": [0]})])
def test_missing_columns_give_a_figure_that_says_so(make, df):
    figure = make(df)
    assert isinstance(figure, go.Figure) and not figure.data
    assert "Nothing to show: no " in figure.layout.annotations[0].text


def made_run(root: Path, seed: int, steps: int = 2, method: str = "sgpo") -> Run:
    """A finished run with made-up numbers."""
    run = open_run(from_parameters("tiny", method, seed, steps=steps), root)
    run.log({"kind": "eval", "step": 0, "accuracy": 0.1 * (seed + 1)})
    run.log({"kind": "train", "step": 1, "reward_autonomous": 0.2, "alpha": 0.8})
    run.finish({"steps": steps, "test": {"accuracy": 0.2 * (seed + 1), "low": 0, "high": 1, "k": 4}, "cpu_seconds": 3})
    return run


def test_runs_of_other_settings_are_not_averaged(tmp_path):
    runs = [made_run(tmp_path, s) for s in (0, 1)] + [made_run(tmp_path, 0, steps=60)]
    chosen = frames.comparable(runs)["tiny"]
    assert [(r.config.seed, r.config.train.steps) for r in chosen] == [(0, 2), (1, 2)]
    df = frames.runs_frame(chosen)
    assert len(df) == 4 and set(df["method"]) == {"sgpo"} and df["setting"].nunique() == 1
    assert list(frames.summaries_frame(chosen)["test_accuracy"]) == [0.2, 0.4]
    assert frames.summaries_frame([]).empty and frames.runs_frame([]).empty


def test_runs_of_other_problems_bases_or_evaluations_are_not_put_together(tmp_path):
    def run(method: str, seed: int, **changes) -> Run:
        made = open_run(from_parameters("tiny", method, seed, **changes), tmp_path)
        made.finish({"steps": 1, "test": {"accuracy": 0.5}})
        return made

    many = [run("sgpo", s) for s in (0, 1)] + [run("grpo8", 0)]
    others = [run("luffy", s, problem_args={"level": "hard"}) for s in (0, 1)] + [run("hpt", 0, source="tiny-s"),
                                                                               run("sft_grpo", 0, test_k=8)]
    chosen = frames.comparable([*others, *many])["tiny"]
    assert [r.folder for r in chosen] == [r.folder for r in many]
    assert frames.world(many[0].config) == frames.world(many[2].config) != frames.world(others[0].config)


def test_report_is_self_contained_and_escaped(tmp_path):
    job = JobResult("a", tmp_path / "a", "failed", "x.ipynb", {"name": "<script>1</script>"}, 3.0, "E: <b>bold</b>")
    page = write_report("T & <x>", [job], [made_run(tmp_path / "runs", s) for s in (0, 1)], tmp_path / "out")
    text = page.read_text()
    assert "<b>bold" not in text and "<script>1" not in text and "<h1>T &amp; &lt;x&gt;</h1>" in text
    assert not re.findall(r"(?:src|href)=[\"'](?:https?:)?//", text)
    assert (tmp_path / "out" / "plotly.min.js").stat().st_size > 1e6
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert results.loc[0, "accuracy"] == pytest.approx(0.3) and results.loc[0, "runs"] == 2


def test_figures_and_formulas_in_pages():
    held = figure_html({"layout": {"title": "</script><b>"}, "data": []})
    assert "</script><b>" not in held
    inside = held.partition('application/json">')[2].partition("</script>")[0]
    assert json.loads(inside)["layout"]["title"] == "</script><b>"
    assert math_svg(r"\alpha(q)", False).startswith("<svg class=")
    assert math_svg(r"\nosuchmacro{a<b}", True) == r"<code>\nosuchmacro{a&lt;b}</code>"

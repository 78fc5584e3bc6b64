"""The collapse watch: thresholds on rows, and real runs that collapse, as log, monitor, status and report tell them."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest

pytest.importorskip("anywidget")

from rich.console import Console
from test_run_monitor import quiet

from sgpo_lib.collapse import WINDOW, Watch
from sgpo_lib.recipes import from_parameters
from sgpo_lib.report import write_report
from sgpo_lib.runs import Run, load_run
from sgpo_lib.status import tables
from sgpo_lib.trainer import train

HEALTHY = {"entropy": 0.3, "reward_autonomous": 0.5, "zero_variance_share": 0.4, "kl_mean": 0.1, "kl_kept_mean": 0.02,
           "kl_clipped_share": 0.03, "length_limit_share": 0.05}
BEYOND = {  # kind -> what a row of it has, and what is just not enough
    "entropy": ({"entropy": 0.059}, {"entropy": 0.061}),
    "reward 0": ({"reward_autonomous": 0.01}, {"reward_autonomous": 0.011}),
    "reward 1": ({"reward_autonomous": 0.99}, {"reward_autonomous": 0.989}),
    "variance": ({"zero_variance_share": 0.99}, {"zero_variance_share": 0.98}),
    "kl": ({"kl_clipped_share": 0.95}, {"kl_clipped_share": 0.94}),
    "kl mass": ({"kl_kept_mean": 0.00009}, {"kl_kept_mean": 0.00011}),
    "length": ({"length_limit_share": 0.8}, {"length_limit_share": 0.79}),
}


def rows(count: int, first: int = 1, **values: Any) -> list[dict[str, Any]]:
    return [{"kind": "train", "step": first + i, **HEALTHY, **values} for i in range(count)]


def signs(given: list[dict[str, Any]]) -> list[tuple[str, int, int, int | None]]:
    return [(c.kind, c.first, c.step, c.until) for c in Watch(given).found]


# --- thresholds -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", BEYOND)
def test_a_sign_comes_with_the_fifth_step_beyond_its_threshold(name, count, tally):
    """At any step from which the threshold is crossed; not with the fourth, and never just before the threshold."""
    beyond, short_of = BEYOND[name]
    kind, crossed = name.split()[0], random.Random(name)
    for _ in range(count(20, 500)):
        start = crossed.randint(WINDOW + 1, 60)  # the first steps say what the entropy began with
        before, after = rows(start - 1), rows(WINDOW, start, **beyond)
        assert signs(before + after[:-1]) == []
        assert signs(before + after) == [(kind, start, start + WINDOW - 1, None)]
        gone = start + WINDOW + 3
        assert signs(before + rows(WINDOW + 3, start, **beyond) + rows(9, gone)) == [
            (kind, start, start + WINDOW - 1, gone)]
        assert signs(before + rows(30, start, **short_of)) == []
    tally(8, f"{name}: threshold crossed at any step", f"{count(20, 500)} of {count(20, 500)} told with the fifth step")


def test_a_run_that_begins_collapsed_is_told_after_five_steps():
    everything = {k: v for beyond, _ in BEYOND.values() for k, v in beyond.items()} | {"entropy": 0.005}
    assert [c[:3] for c in signs(rows(WINDOW, **everything))] == [(k, 1, WINDOW) for k in (
        "entropy", "reward", "variance", "kl", "length")]


def test_rows_that_do_not_tell_are_passed_over():
    """No target, no number, a row of evaluation or of a supervised run: neither a sign nor the end of one."""
    clipped = rows(4, 10, kl_clipped_share=1.0, kl_kept_mean=0.0)
    silent = [{"kind": "train", "step": 14, "kl_mean": 0.0, "kl_kept_mean": 0.0, "kl_clipped_share": 0.0},
              {"kind": "train", "step": 15, "kl_mean": float("nan"), "kl_kept_mean": None, "kl_clipped_share": "1"},
              {"kind": "eval", "step": 15, "entropy": 0.0}, {"kind": "supervised", "step": 15, "entropy": 0.0}]
    assert signs(clipped + silent) == []
    assert signs(clipped + silent + rows(1, 16, kl_clipped_share=1.0)) == [("kl", 10, 16, None)]
    assert signs(rows(4, entropy=0.001) + rows(1, 5) + rows(4, 6, entropy=0.001)) == []


def test_steps_that_come_again_count_once():
    """As after a resume, at every step: what follows it is forgotten."""
    whole = rows(8) + rows(9, 9, entropy=0.001, length_limit_share=1.0) + rows(9, 18)
    for again in range(1, len(whole) + 1):
        assert signs(whole + whole[again - 1 :]) == signs(whole)
        assert signs(whole + rows(1, again)) == signs(whole[: again - 1] + rows(1, again))


# --- real runs --------------------------------------------------------------------------------------------------
SHORT = {"steps": 7, "problems_per_step": 2, "n_train": 12, "n_validation": 0, "n_test": 0, "max_new_tokens": 6,
         "eval_every": 0, "save_every": 0, "lr": 1e-3}
REAL = {  # what a fresh model does under this reward and configuration, and the signs that it gives
    "nothing is right, nothing ends": ("sgpo", {"reward": "collapse_rewards:never", "max_new_tokens": 2}, {
        "reward": "stuck at 0", "variance": "no group has two different rewards", "length": "cut at the length limit"}),
    "everything is right, everything is clipped": ("sgpo", {"reward": "collapse_rewards:always", "kl_delta": 1e-9}, {
        "reward": "stuck at 1", "variance": "the policy gradient is 0", "kl": "clipped away (100.00%)",
        "length": "cut at the length limit"}),
    "one reward for all": ("sgpo", {"reward": "collapse_rewards:half"}, {
        "variance": "(share 1)", "length": "cut at the length limit"}),
    "the policy learns one word": ("grpo8", {"reward": "collapse_rewards:repeats", "lr": 0.1, "steps": 9,
                                             "max_new_tokens": 8, "problems_per_step": 4, "lr_warmup_ratio": 0.0}, {
        "entropy": "nats a token (", "reward": "stuck at 1", "variance": "the policy gradient is 0",
        "length": "cut at the length limit"}),
}


@pytest.mark.parametrize("name", REAL)
def test_a_run_that_collapses_says_so_everywhere(name, base, tmp_path, importable, monkeypatch, capfd, tally):
    """Once in the log, when it comes; in the monitor, in `sgpo status` and in the report while it lasts."""
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path))
    method, changes, expected = REAL[name]
    config = from_parameters("tiny", method, 0, **{**SHORT, "source": str(base), **changes})
    run = train(config, root=tmp_path, name="run")
    found = Watch(run.metrics()).found
    assert {c.kind for c in found} == set(expected)
    log = [line for line in capfd.readouterr().err.splitlines() if ": warning, " in line]
    assert len(log) == len(found), "each sign once"
    for sign in found:
        assert sign.step - sign.first == WINDOW - 1 and expected[sign.kind] in sign.seen
        assert f"run: warning, since step {sign.first}: {sign.seen}. {sign.cure}" in log
        assert any(field in sign.cure for field in ("train.", "method.", "rollout.", "data.", "reward.")), "what to try"
    tally(8, f"a real run: {name}", ", ".join(f"{c.kind} after {c.step - c.first + 1} steps" for c in found))

    monitor = quiet("run", root=tmp_path)
    assert monitor.state[0]["warnings"] == [str(c) for c in found]
    page = monitor._repr_mimebundle_()[0]
    assert all(c.seen in page["text/plain"] and f"<b>run, warning</b>, {c.steps}: {c.seen}" in page["text/html"]
               for c in found)
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(tables())
    assert f"warning: {', '.join(c.kind for c in found)}" in console.export_text()
    report = write_report("r", [], [run], tmp_path / "report").read_text(encoding="utf-8")
    assert all(c.seen in report and c.steps in report for c in found)


def test_a_resumed_run_tells_what_lasts_and_not_what_went(base, tmp_path, importable, capfd):
    config = from_parameters("tiny", "sgpo", 0, **{**SHORT, "source": str(base), "reward": "collapse_rewards:half",
                                                   "steps": 8, "save_every": 1})
    seen: list[int] = []

    def interrupt(row: dict[str, Any]) -> None:
        seen.append(row["step"])
        if seen[-1] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, root=tmp_path, name="run", on_row=interrupt)
    assert capfd.readouterr().err.count("no group has two different rewards") == 1
    train(config, root=tmp_path, name="run")
    again = capfd.readouterr().err
    assert again.count("no group has two different rewards") == 1, "a new log, in which it still lasts"
    assert again.count("the length limit") == 1


def test_a_healthy_run_gives_no_sign(tmp_path, capfd, count, tally):
    """The testbed with its own base and reward, as `make run` trains it."""
    steps = count(8, 40)
    config = from_parameters("tiny", "sgpo", 3, steps=steps, n_test=0, n_validation=0, eval_every=0, save_every=0)
    run: Run = train(config, root=tmp_path, name="run")
    assert len(run.metrics("train")) == steps and Watch(run.metrics()).found == []
    assert "warning, " not in capfd.readouterr().err
    assert quiet("run", root=tmp_path).state[0]["warnings"] == []
    report = write_report("r", [], [load_run(run.folder)], tmp_path / "report").read_text(encoding="utf-8")
    assert "No sign of a collapse in the metrics of 1 runs" in report and "<h2>Warnings" not in report
    tally(8, "a healthy run on the testbed", f"no sign in {steps} steps")


def test_a_sign_that_went_stays_in_the_report(tmp_path):
    from run_folders import made_up

    run = made_up(tmp_path, "sgpo", 0, rows=rows(6) + rows(7, 7, length_limit_share=1.0) + rows(3, 14))
    assert quiet(run.folder).state[0]["warnings"] == []
    page = write_report("r", [], [run], tmp_path / "report").read_text(encoding="utf-8")
    assert "steps 7 to 13" in page and "100% of the responses were cut at the length limit" in page

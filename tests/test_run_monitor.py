"""The run monitor on files that grow, tear, shrink and are replaced; what the page gets of them; what stays without."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")

from test_training import small
from time_limits import within

import sgpo_lib
from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import Run, locked
from sgpo_lib.trainer import train
from sgpo_lib.widgets import run_monitor
from sgpo_lib.widgets.run_monitor import RunMonitor
from sgpo_lib.widgets.run_monitor.curves import KNOWN, choose, clock
from sgpo_lib.widgets.run_monitor.following import Follower, Tail

HERE = Path(sgpo_lib.__file__).parent / "widgets" / "run_monitor"
HOSTILE = '<img src=x onerror="window.pwned=1">'


def row(step: int, kind: str = "train", **values: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, **({"tokens": 100, "seconds_step": 2.0} if kind == "train" else {}), **values}


def append(folder: Path, *rows: dict[str, Any] | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows)


def begun(root: Path, name: str = "a", *rows: dict[str, Any], steps: int = 40, **changes: Any) -> Path:
    """A run folder with a configuration of `steps` steps and these rows."""
    from sgpo_lib.config import to_yaml

    append(root / name, *rows)
    config = from_parameters("tiny", "sgpo", 0, steps=steps, **changes)
    (root / name / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return root / name


def followed(folder: Path, *metrics: str) -> Follower:
    follower = Follower(folder, folder.name, choose(metrics or ("alpha", "accuracy")))
    follower.read()
    return follower


def quiet(*args: Any, **options: Any) -> RunMonitor:
    """A monitor that reads when told to."""
    return RunMonitor(*args, **{"every": 0, **options})


# --- reading ----------------------------------------------------------------------------------------------------
def test_a_tail_reads_each_byte_once_and_keeps_a_torn_line(tmp_path):
    path = tmp_path / "f"
    tail = Tail(path)
    assert tail.read() == ([], False)
    path.write_bytes(b'one\ntw')
    assert tail.read() == ([b"one"], False) and tail.read() == ([], False) and tail.offset == 6
    with path.open("ab") as file:
        file.write("o é\nthree\n".encode()[:3])
    assert tail.read() == ([], False), "cut inside a character"
    with path.open("ab") as file:
        file.write("o é\nthree\n".encode()[3:])
    assert tail.read() == (["two é".encode(), b"three"], False)


@pytest.mark.parametrize("after", ["1\n", "1\n2\n3\n", "1\n9\n8\n7\n", ""])
def test_a_file_that_is_another_one_is_read_anew(tmp_path, after):
    """Shorter, as long, longer: what counts is whether the bytes before the last place are still there."""
    path = tmp_path / "f"
    path.write_text("1\n5\n6\n")
    tail = Tail(path)
    tail.read()
    path.with_suffix(".new").write_text(after)
    path.with_suffix(".new").replace(path)
    assert tail.read() == (after.encode().splitlines(), True)
    path.unlink()
    assert tail.read() == ([], after != "") and tail.read() == ([], False)


def test_rows_become_columns(tmp_path):
    folder = begun(tmp_path, "a", row(0, "eval", accuracy=0.1), row(1, alpha=0.5), row(2, alpha=0.123456789),
                   row(2, "eval", accuracy=0.2), row(3, alpha=math.nan), row(4), row(4, "test", accuracy=0.9))
    follower = followed(folder)
    assert follower.tables["train"] == {"step": [1, 2, 3, 4], "tokens_total": [100, 200, 300, 400],
                                        "seconds_total": [2.0, 4.0, 6.0, 8.0], "alpha": [0.5, 0.123457, None, None]}
    assert follower.tables["eval"] == {"step": [0, 2], "tokens_total": [0, 200], "seconds_total": [0, 4.0],
                                       "accuracy": [0.1, 0.2]}
    told = follower.status()
    assert (told["test"], told["not_finite"], told["step"], told["total"]) == (0.9, ["alpha at step 3"], 4, 40)
    json.dumps([follower.tables, told], allow_nan=False)


def test_torn_and_foreign_lines_are_counted_and_passed_over(tmp_path):
    folder = begun(tmp_path, "a", row(1, alpha=1))
    follower = followed(folder)
    append(folder, '{"kind": "train", "step": 2, "al')
    assert not follower.read() and follower.unread == 0
    append(folder, 'pha": 2}\n', "[1]\n", "\n", '{"kind": "train"}\n', '{"kind": "train", "step": 3.5}\n', "\xff\n",
           '{"kind": "other", "step": 9}\n', row(3, alpha="x"))
    assert follower.read() and follower.tables["train"]["alpha"] == [1.0, 2.0, None]
    assert follower.unread == 4 and "4 lines of metrics.jsonl could not be read" in follower.status()["note"]


def test_a_resume_drops_the_rows_of_steps_that_come_again(tmp_path):
    """As `Run.forget_after` does it, and where somebody only appends."""
    folder = begun(tmp_path, "a", *(row(i, alpha=i) for i in range(1, 9)))
    follower = followed(folder)
    Run(folder, from_parameters("tiny", "sgpo", 0, steps=40)).forget_after(3)
    append(folder, *(row(i, alpha=-i, note="longer than before") for i in range(4, 12)))
    assert follower.read() and follower.epoch == 1
    assert follower.tables["train"]["alpha"] == [1, 2, 3, -4, -5, -6, -7, -8, -9, -10, -11]
    append(folder, row(10, alpha=0), row(11, alpha=0))
    assert follower.read() and follower.epoch == 2
    assert follower.tables["train"]["alpha"][-3:] == [-9, 0, 0]
    assert follower.tables["train"]["tokens_total"][-1] == 1100


def test_what_was_clipped_is_what_is_not_kept(tmp_path):
    folder = begun(tmp_path, "a", row(1, kl_mean=0.5, kl_kept_mean=0.375))
    assert followed(folder, "kl_clipped_mean").tables["train"]["kl_clipped_mean"] == [0.125]


def test_time_left_is_the_median_of_the_last_twenty_steps(tmp_path):
    took = [99.0] * 9 + [4.0] * 11 + [6.0] * 9
    folder = begun(tmp_path, "a", *(row(i, seconds_step=s) for i, s in enumerate(took, 1)))
    with locked(folder):
        assert followed(folder).status()["left"] == 4 * 11 and followed(folder).status()["pace"] == 4.0
    assert followed(folder).status()["left"] is None, "nobody trains"
    assert [clock(s) for s in (None, 0, 59.6, 3599, 3600, 100000)] == ["–", "00:00", "01:00", "59:59", "1:00:00",
                                                                      "27:46:40"]  # fmt: skip
    with locked(begun(tmp_path, "b", row(1), epochs=2.0)):
        assert (followed(tmp_path / "b").status()["total"], followed(tmp_path / "b").status()["left"]) == (None, None)


def test_warnings_last_as_long_as_what_they_tell(tmp_path):
    """Read from the rows as they come, also of steps that come again."""
    folder = begun(tmp_path, "a", *(row(i, length_limit_share=1.0) for i in range(1, 5)))
    follower = followed(folder)
    assert follower.status()["warnings"] == []
    append(folder, row(5, length_limit_share=1.0))
    assert follower.read() and ["100% of the responses were cut" in w for w in follower.status()["warnings"]] == [True]
    append(folder, row(6, length_limit_share=0.0))
    assert follower.read() and follower.status()["warnings"] == []
    append(folder, *(row(i, length_limit_share=1.0) for i in range(7, 12)))
    assert follower.read() and follower.status()["warnings"][0].startswith("since step 7: ")
    Run(folder, from_parameters("tiny", "sgpo", 0, steps=40)).forget_after(9)
    assert follower.read() and follower.status()["warnings"] == []


def test_states(tmp_path):
    folder = tmp_path / "a"
    follower = Follower(folder, "a", KNOWN)
    states = [follower.status()["state"]]
    begun(tmp_path, "a")
    states.append(follower.status()["state"])
    with locked(folder):
        states.append(follower.status()["state"])
        assert "no rows yet" in follower.status()["note"]
    (folder / "FAILED.json").write_text(json.dumps({"error": "E", "message": "of\n a kind" + "x" * 999}))
    states.append(follower.status()["state"])
    assert "E: of a kindxx" in (note := follower.status()["note"]) and len(note) < 330
    (folder / "FAILED.json").write_text("{")
    assert follower.status()["state"] == "failed"
    with locked(folder):
        states.append(follower.status()["state"])
    (folder / "DONE").touch()
    assert [*states, follower.status()["state"]] == ["waiting", "stopped", "running", "failed", "running", "done"]


def test_a_run_that_another_machine_holds_counts_as_running(tmp_path):
    """The lock of another machine may not be seen; its rows are."""
    folder = begun(tmp_path, "a", row(1))
    (folder / ".owner").write_text("process 1 on elsewhere")
    assert followed(folder).status()["state"] == "running"
    for name in (".owner", "metrics.jsonl"):
        os.utime(folder / name, (0, 0))
    assert followed(folder).status()["state"] == "stopped"
    (folder / ".owner").write_text(f"process 1 on {socket.gethostname()}")
    assert followed(folder).status()["state"] == "stopped", "left by a process of this machine that was killed"


def test_a_run_in_progress_without_rows_for_long_is_told(tmp_path):
    folder = begun(tmp_path, "a", row(1))
    follower = followed(folder)
    follower._changed -= 200
    with locked(folder):
        assert "no new row for 3 min" in follower.status()["note"]


# --- the widget -------------------------------------------------------------------------------------------------
def test_which_runs(tmp_path, monkeypatch):
    for name in ("tiny-sgpo-s0-aa", "tiny-sgpo-s1-bb", "other"):
        begun(tmp_path, name, row(1, alpha=1))
    names = lambda *a, **k: [s["name"] for s in quiet(*a, root=tmp_path, **k).state]  # noqa: E731
    assert names("tiny-*") == ["tiny-sgpo-s0-aa", "tiny-sgpo-s1-bb"]
    assert names(["other", tmp_path / "other"]) == ["other"]
    again = begun(tmp_path / "elsewhere", "other")
    assert names(["other", again]) == [str(tmp_path / "other"), str(again)]
    with pytest.raises(ValueError, match="nearest: 'tiny-sgpo-s0-aa'"):
        names("tiny-sgpo-s0-ab")
    for wanted, told in (([], "at least one"), ("x*", "no run below .* matches"), (None, "no run is being written"),
                         (3, "a name, a pattern"), ("", "a name, a pattern")):
        with pytest.raises(ValueError, match=told):
            names(wanted)
    with locked(tmp_path / "other"):
        assert names(None) == ["other"]
    (tmp_path / "only-metrics").mkdir()
    append(tmp_path / "only-metrics", row(7))
    assert names("only-metrics") == ["only-metrics"]


@pytest.mark.parametrize("options", [
    {"x": "hours"}, {"smoothing": -1}, {"smoothing": 1.5}, {"every": -1}, {"metrics": []}, {"metrics": "alpha"},
    {"metrics": ["alpha", "alpha"]}, {"metrics": ["alpah"]}, {"metrics": ["step"]}, {"metrics": [None]}])  # fmt: skip
def test_options_out_of_range(tmp_path, options):
    begun(tmp_path, "a", row(1, alpha=1))
    with pytest.raises(ValueError, match="got"):
        quiet("a", root=tmp_path, **options)


def test_any_logged_metric_can_be_chosen(tmp_path):
    begun(tmp_path, "a", row(1, odd=3.0), row(1, "eval", response_length=9, accuracy=1.0))
    monitor = quiet("a", root=tmp_path, metrics=["odd", "accuracy", "eval/response_length", "tokens"])
    assert [p["name"] for p in monitor.panels] == ["odd", "eval/accuracy", "eval/response_length", "tokens"]
    assert monitor.rows[0]["train"]["odd"] == [3.0] and monitor.rows[0]["train"]["tokens"] == [100.0]
    assert monitor.rows[0]["eval"]["response_length"] == [9.0]


def test_a_run_that_is_waited_for_appears_when_it_begins(tmp_path):
    monitor = quiet(["a", "b"], root=tmp_path, wait=True)
    assert [s["state"] for s in monitor.state] == ["waiting"] * 2 and "no such run yet" in repr(monitor)
    begun(tmp_path, "b")
    monitor.refresh()
    assert [s["state"] for s in monitor.state] == ["waiting", "stopped"]
    append(tmp_path / "b", row(1, alpha=0.5))
    monitor.refresh()
    assert monitor.rows[1]["train"]["alpha"] == [0.5] and monitor.state[1]["step"] == 1


def until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_following_ends_with_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(run_monitor, "GRACE_SECONDS", 0.3)
    folder = begun(tmp_path, "a", row(1))
    assert not RunMonitor("a", root=tmp_path, every=0.02).following, "stopped before it was opened"
    with locked(folder):
        monitor = RunMonitor(["a", "b"], root=tmp_path, wait=True, every=0.02)
        begun(tmp_path, "b", row(1))
        (tmp_path / "b" / "DONE").touch()
        append(folder, row(2, alpha=0.25))
        until(lambda: monitor.state[0]["step"] == 2 and monitor.state[1]["state"] == "done")
        assert monitor.following and monitor.rows[0]["train"]["alpha"] == [None, 0.25]
    until(lambda: not monitor.following)
    assert monitor._thread is None
    monitor.start()
    monitor.stop()
    append(folder, row(3))
    monitor.refresh()
    assert monitor.state[0]["step"] == 3 and not monitor.following


def test_following_ends_when_the_monitor_is_closed(tmp_path):
    with locked(begun(tmp_path, "a", row(1))):
        monitor = RunMonitor("a", root=tmp_path, every=0.02)
        thread = monitor._thread
        monitor.close()
        until(lambda: not thread.is_alive())
        assert "alpha" not in monitor._bundle()["text/plain"] and "a: running" in monitor._bundle()["text/plain"]


def test_a_disk_that_is_away_is_told_and_tried_again(tmp_path, monkeypatch):
    folder = begun(tmp_path, "a", row(1))
    monitor = quiet("a", root=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Tail, "read", lambda self: (_ for _ in ()).throw(OSError("stale file handle")))
        monitor.refresh()
    assert monitor.told == "a: stale file handle"
    append(folder, row(2))
    monitor.refresh()
    assert monitor.told == "" and monitor.state[0]["step"] == 2


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
def test_a_training_run_is_followed_while_it_trains(base, tmp_path):
    """As in a notebook: the main thread trains, the monitor reads beside it, and ends with the run's own rows."""
    config = small(base, "sgpo", steps=8)
    monitor = RunMonitor(config.label, root=tmp_path, wait=True, every=0.02)
    seen: list[tuple[str, int | None, int | None]] = []
    monitor.observe(lambda change: seen.append(tuple(change["new"][0][k] for k in ("state", "step", "left"))), "state")
    run = train(config, root=tmp_path)
    until(lambda: not monitor.following)
    steps = {step for state, step, _ in seen if state == "running"}
    assert steps >= {0, 1, 4, 8} and any(left is not None for *_, left in seen) and seen[-1][0] == "done"
    rows = run.metrics("train")
    for name in ("alpha", "reward_guided", "loss", "kl_mean", "entropy", "tokens_per_second"):
        assert monitor.rows[0]["train"][name] == [float(f"{r[name]:.6g}") for r in rows], name
    assert monitor.rows[0]["eval"]["accuracy"] == [float(f"{r['accuracy']:.6g}") for r in run.metrics("eval")]
    assert monitor.rows[0]["train"]["tokens_total"][-1] == run.summary["tokens"]


def test_a_long_run_is_read_fast(tmp_path):
    folder = begun(tmp_path, "a", *(row(i, **dict.fromkeys(("alpha", "loss", "entropy"), 0.5)) for i in range(20_000)))
    with within(10):
        monitor = quiet("a", root=tmp_path)
    append(folder, row(20_000))
    with within(1):
        monitor.refresh()
    assert len(monitor.rows[0]["train"]["step"]) == 20_001


# --- without a page ---------------------------------------------------------------------------------------------
def test_the_static_table_tells_the_last_values_as_text(tmp_path):
    rows = [row(1, alpha=0.5), row(2, alpha=0.25), row(2, "test", accuracy=0.75)]
    folder = begun(tmp_path, HOSTILE, *rows)
    (folder / "FAILED.json").write_text(json.dumps({"error": "E", "message": "</td><script>window.pwned=2</script>"}))
    monitor = quiet([folder, "later"], root=tmp_path, wait=True, title="<b>runs</b>")
    data, _ = monitor._repr_mimebundle_()
    assert set(data) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    page = data["text/html"]
    assert "<img" not in page and "<script" not in page and "<b>" not in page and "&lt;img src=x" in page
    assert all(t in page for t in ("Weight α(q), mean over problems", ">0.25<", ">0.75<", "step 2 of 40"))
    assert "step 2 of 40" in data["text/plain"] and "alpha 0.25" in data["text/plain"]
    assert "later: waiting, step –, time left – [no such run yet]" in data["text/plain"]

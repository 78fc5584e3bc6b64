"""`sgpo profile`: its arithmetic against hand calculation, watched steps of a real model, runs, text, refusals."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from sgpo_lib import cli, figures, peak_memory, profile_command, profiling
from sgpo_lib.batching import TokenBatch
from sgpo_lib.frames import runs_frame
from sgpo_lib.plan_time import forward_flops
from sgpo_lib.profile_run import draw_of, measure, profile, shortened
from sgpo_lib.profiling import Draw, Machine, Pass, Step, pass_flops, summary
from sgpo_lib.recipes import from_parameters
from sgpo_lib.trainer import train

pytestmark = pytest.mark.usefixtures("importable")
SMALL = {"reward": "rewards_for_tests:coin", "problems_per_step": 3, "n_train": 12, "n_validation": 0, "n_test": 0,
         "max_new_tokens": 8, "eval_every": 0, "steps": 3}
MACHINE = Machine(1e9, 1e8, "by hand")


def small(base, method="sgpo", **extra):
    return from_parameters("tiny", method, source=str(base), **{**SMALL, **extra})


def arguments(base, *more):
    given = {"source": base, **{n: v for n, v in SMALL.items() if n != "steps"}}
    return ["profile", "tiny", *(x for n, v in given.items() for x in ("-p", f"{n}={v}")), *more]


# --- arithmetic -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [0, 4])
def test_flops_of_a_pass_by_hand(base, rank):
    """One sequence of 5 tokens, of which 3 are a response."""
    s = profiling.setup_of(small(base, lora_rank=rank))
    h, layers, v, q = s.shape.hidden, s.shape.layers, s.shape.vocabulary, s.shape.queries
    matrices, attention, head = 5 * layers * 2 * s.shape.layer, 15 * layers * 4 * q, 3 * 2 * v * h
    adapter = 5 * 2 * s.trained if rank else 0
    watched = Pass(5, 15, 3, learns=False)
    assert pass_flops(s, watched) == pytest.approx(matrices + attention + head + adapter)
    assert pass_flops(s, watched) == pytest.approx(forward_flops(s, 5, 3, 3) + adapter)
    learning = (2 * matrices + 3 * attention + 2 * head if rank else 3 * (matrices + attention + head)) + 3 * adapter
    assert pass_flops(s, dataclasses.replace(watched, learns=True)) == pytest.approx(learning)
    assert pass_flops(s, Pass(0, 0, 0, learns=True)) == 0


def test_a_draw_counts_each_prompt_once_and_no_last_token():
    """Prompts of 3, 3 and 2 tokens, two of them the same; responses of 4, 1 and 2 tokens feed 3, 0 and 1."""
    drawn = draw_of([(1, 2, 3), (1, 2, 3), (4, 5)], [4, 1, 2])
    assert drawn == Draw(2, 5, 6 + 3, 4, (4 + 5 + 6) + 3, 3)


def test_floors_by_hand(base):
    config = small(base, rollout_batch=2)
    s = profiling.setup_of(config)
    drawn = draw_of([(1, 2, 3), (1, 2, 3), (4, 5)], [4, 1, 2])
    step = Step({"sample": 1.0, "verify": 0.1, "policy": 2.0, "optimizer": 0.5}, 4.0, {"updates": 2},
                passes={"policy": [Pass(5, 15, 3, True), Pass(4, 10, 2, True)]}, draws=[drawn])
    floors = profiling.floors(s, MACHINE, step)
    assert floors["optimizer"] == pytest.approx(7 * 4 * s.shape.parameters * 2 / 1e8)
    assert floors["policy"] == pytest.approx(sum(pass_flops(s, p) for p in step.passes["policy"]) / 1e9)
    read = 3 * 4 * s.shape.parameters + 18 * 2 * s.shape.layers * s.shape.keys * 4  # 3 steps: the longest response
    assert profiling.draw_bytes(s, drawn) == read
    prompts, decoding = forward_flops(s, 5, 9 / 5, 2), forward_flops(s, 4, 18 / 4, 4)
    assert floors["sample"] == pytest.approx(prompts / 1e9 + max(decoding / 1e9, read / 1e8))
    assert "verify" not in floors and step.rest == pytest.approx(0.4)
    found = summary(config, [step], MACHINE)
    total = sum(pass_flops(s, p) for p in step.passes["policy"])
    assert found["update_utilisation"] == pytest.approx(total / 2.5e9)
    assert found["step_utilisation"] == pytest.approx((total + prompts + decoding) / 4e9)
    assert found["trained_per_second"] == pytest.approx(9 / 2.5)


def test_medians_and_shares():
    config = from_parameters("tiny")
    steps = [Step({"sample": x, "verify": 1.0}, x + 2.0, {"tokens": 100, "padding_share": 0.1}, {"sample": int(x)})
             for x in (1.0, 2.0, 6.0)]
    found = summary(config, steps, None)
    assert found["phases"]["sample"] == {"seconds": 2.0, "share": 9 / 15, "floor": None, "times": None, "memory": 6}
    assert found["phases"]["rest"]["seconds"] == 1.0 and found["step_seconds"] == 4.0
    assert sum(p["share"] for p in found["phases"].values()) == pytest.approx(1.0)
    assert found["sampled_per_second"] == pytest.approx(300 / 9) and found["update_utilisation"] is None


def test_what_is_slow_is_named():
    config = from_parameters("tiny", torch_threads=2, layout="packed", attention="eager", rollout_batch=8)
    found = summary(config, [Step({"verify": 1.0}, 2.0, {"padding_share": 0.4, "cpu_seconds": 2.0},
                                   passes={"policy": [Pass(4000, 9000, 2000, True)]}),
                              Step({"verify": 1.0}, 2.0, {"padding_share": 1.0, "cpu_seconds": 2.0})], None)
    told = "\n".join(profiling.advice(config, found, "cpu", 2, "eager"))
    for word in ("layout 'packed' with attention 'eager'", "all pairs of a pass's 4,000 tokens",
                 "attention 'eager' keeps", "2 threads for a model of 0.36M", "40%", "rollout_batch 8 for 60",
                 "verifying takes 50%"):
        assert word in told, word
    good = from_parameters("tiny")
    assert profiling.advice(good, summary(good, [Step({}, 1.0, {})], None), "cpu", 1, "sdpa") == []
    large = from_parameters("qwen2.5-7b", sampler="transformers", compute_dtype="", activation_checkpointing=False)
    told = "\n".join(profiling.advice(large, summary(large, [Step({}, 1.0, {})], None), "cuda", 1, "sdpa"))
    assert "sampler 'transformers' for a model of 7.6B" in told and "float32 on a GPU" in told
    waits = from_parameters("smollm2")
    found = summary(waits, [Step({}, 1.0, {"cpu_seconds": 0.9})], None)
    assert "2 threads got 0.90 CPU seconds a second" in "\n".join(profiling.advice(waits, found, "cpu", 2, "sdpa"))


@pytest.mark.skipif(sys.platform != "linux", reason="resident size is read from /proc")
def test_a_peak_is_that_of_its_own_block():
    device = torch.device("cpu")
    peaks = []
    for megabytes in (0, 64, 0):
        assert peak_memory.restart_peak(device)
        torch.ones(megabytes * 2**18)
        peaks.append(peak_memory.peak_memory(device))
    assert 60 * 2**20 < peaks[1] - peaks[0] < 90 * 2**20 and peaks[2] < peaks[1] - 32 * 2**20


def test_a_machine_is_measured():
    found = measure(torch.device("cpu"), torch.float32)
    assert found.flops > 1e8 and found.bandwidth > 1e8 and "2048" in found.told and "256 MiB" in found.told


# --- watched steps ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "extra"), [
    ("sgpo", {}), ("sgpo", {"layout": "packed", "lora_rank": 4}), ("sft", {})])
def test_watched_steps(base, method, extra):
    """Tokens are those that a session counts itself; nothing is left behind; the metrics stay what they were."""
    config = small(base, method, **extra)
    steps, machine, told = profile(config, 2, lambda _: None)
    assert len(steps) == 2 and machine.flops > 0 and told["threads"] == 1 and told["device"] == "cpu"
    for step in steps:
        assert sum(step.seconds.values()) + step.rest == pytest.approx(step.whole)
        assert {"optimizer", "log"} <= set(step.seconds) and (sys.platform != "linux" or step.memory["optimizer"] > 1e8)
    learned = sum(p.tokens for p in steps[0].passes["expert" if method == "sft" else "policy"])
    if method == "sft":
        assert sum(p.outputs for p in steps[0].passes["expert"]) == steps[0].row["tokens"] and learned
        assert not steps[0].draws
        return
    (draw,) = steps[0].draws
    assert draw.fed == steps[0].row["tokens"] - 3 * 12 and draw.longest <= 7 and draw.prompts == 6
    assert all(p.learns and p.seen > p.tokens for p in steps[0].passes["policy"])
    kinds = [p.learns for p in steps[0].passes.get("distil", ())]
    assert kinds == [False, True] * (len(kinds) // 2), "a guided pass without gradient before each that learns"
    found = summary(config, steps, machine)
    assert found["phases"]["policy"]["times"] > 1 and found["phases"]["sample"]["times"] > 1
    assert 0 < found["update_utilisation"] < 1


def test_pairs_are_counted_in_every_layout():
    rows = [((1, 2), (3, 4, 5)), ((1, 2), (6,))]
    for layout, expected in (("right", 15 + 6), ("left", 15 + 6), ("packed", 15 + 6), ("shared", 15 + 3)):
        batch = TokenBatch.build(rows, 0, "cpu", layout)
        places = batch.position_ids_RS + 1
        mask = batch.attention_mask_RS
        assert int((places if mask is None else places * mask).sum()) == expected, layout


def test_a_profile_evaluates_and_saves_nothing():
    config = shortened(from_parameters("qwen2.5-7b", benchmarks={"math500": {"problems": "hub:a/b"}}), 3)
    assert config.train.steps == 5 and config.train.epochs == 0 and config.train.save_every == 0
    assert config.evaluation.benchmarks == {} and config.data.n_test == 0 and config.evaluation.eval_every == 0


# --- the command ------------------------------------------------------------------------------------------------
def test_the_command_prints_and_writes(base, tmp_path, capsys):
    assert cli.main(arguments(base, "--steps", "1", "--out", str(tmp_path / "p.json"))) == 0
    text = capsys.readouterr().out
    assert "step 1 of 2" in text and "(warm-up, not counted)" in text and "times the floor" in text
    assert max(map(len, text.splitlines())) <= 100 + len(str(tmp_path))
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["steps"] == 1 and {"sample", "verify", "policy", "optimizer", "log"} <= set(found["phases"])
    assert sum(p["seconds"] for p in found["phases"].values()) == pytest.approx(found["step_seconds"])


def test_a_run_is_read_without_training(base, tmp_path, capsys):
    """The rows of a run sum to its steps, as does the figure of its report."""
    run = train(small(base), root=tmp_path)
    rows = run.metrics("train")
    for row in rows:
        phases = [v for n, v in row.items() if n.startswith("seconds_") and n != "seconds_step"]
        assert 0 < row["seconds_step"] - sum(phases) < 0.5 and "seconds_log" in row
        assert not any(n.startswith("memory_") for n in row), "on a CPU rows repeat to the bit"
    assert rows[1]["seconds_log"] > 0
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["profile", str(run.folder)]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    text = capsys.readouterr().out
    assert "2 steps" in text and "at least" in text and "Peak memory was not measured" in text
    assert cli.main(["profile", str(run.folder), "--steps", "1"]) == 0
    assert "1 step " in capsys.readouterr().out
    bars = {trace.name: trace.x[0] for trace in figures.phase_seconds(runs_frame([run])).data}
    assert "logging" in bars
    assert sum(bars.values()) == pytest.approx(sum(r["seconds_step"] for r in rows) / len(rows))


def test_a_run_of_another_machine_has_no_floors(base, tmp_path, capsys):
    run = train(small(base, steps=2), root=tmp_path)
    with (run.folder / "metrics.jsonl").open("a") as file:  # as a GPU writes it
        file.write(json.dumps({**run.metrics("train")[-1], "step": 3, "memory_policy": 3 * 2**30}) + "\n")
    (run.folder / "environment.json").write_text(json.dumps({"host": "elsewhere"}))
    assert cli.main(["profile", str(run.folder), "--steps", "1"]) == 0
    text = capsys.readouterr().out
    assert "No floors and no utilisation" in text and "3.00" in text and "not known" in text


@pytest.mark.parametrize(("line", "words"), [
    (["tinny"], ["unknown profile or run 'tinny'", "Did you mean 'tiny'", "config.yaml"]),
    (["tiny", "--steps", "0"], ["--steps: got 0, expected 1 or more"]),
    (["tiny", "--method", "base"], ["makes no training steps", "--method"]),
    (["tiny", "-p", "steps=3"], ["-p steps=...", "--steps"]),
    (["tiny", "-p", "profile=tiny"], ["-p profile=...", "first argument"]),
    (["tiny", "-p", "train.steps=3"], ["-p train.steps=...", "--steps"]),
    (["tiny", "-p", "workers=2", "-p", "engine=ray", "-p", "problems_per_step=4"],
     ["compute.workers: got 2", "expected 1"]),
    (["tiny", "-p", "stepz=3"], ["unknown field 'stepz'"]),
    (["tiny", "--out", "."], ["--out: . is a folder"]),
])  # fmt: skip
def test_refusals(line, words, capsys):
    assert cli.main(["profile", *line]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told


def test_refusals_of_runs(base, tmp_path, capsys):
    run = train(small(base, steps=0), root=tmp_path)
    assert cli.main(["profile", str(run.folder)]) == 2
    assert "has no training steps in metrics.jsonl (state: done)" in capsys.readouterr().err
    assert cli.main(["profile", str(run.folder), "-p", "lr=1"]) == 2
    assert "leave out -p and --method" in capsys.readouterr().err


def test_seconds_are_readable():
    assert profile_command._seconds(None, 3) == "-" and profile_command._seconds(1234.5678, 1) == "1,234.6"
    assert profile_command._seconds(0.00002, 3) == "2e-05" and profile_command._seconds(0.0123, 3) == "0.012"
    assert [profile_command._digits(x) for x in (0.5, 5, 50, 500)] == [4, 3, 2, 1]

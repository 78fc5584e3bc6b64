"""The loop: every method, resuming to the bit, and what is refused before work. Gradients: `test_objective.py`."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from sgpo_lib.recipes import METHODS, from_parameters
from sgpo_lib.runs import CLOCK_PREFIXES, Run, Stopped, load_run
from sgpo_lib.session import Session
from sgpo_lib.trainer import train


def small(base: Path, method: str = "sgpo", seed: int = 0, **overrides):
    settings = {"source": str(base), "reward": "rewards_for_tests:coin", "steps": 6, "problems_per_step": 3,
                "n_train": 12, "n_validation": 4, "n_test": 4, "max_new_tokens": 10, "eval_every": 2, "eval_k": 1,
                "test_k": 2, "lr": 1e-3, **overrides}
    return from_parameters("tiny", method, seed, **settings)


pytestmark = pytest.mark.usefixtures("importable")


SHORT = {"steps": 3, "max_new_tokens": 6, "eval_every": 0, "n_validation": 0, "n_test": 0}


def timeless(rows):
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK_PREFIXES)} for row in rows]


# --- the loop ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "extra"), [
    ("sgpo", {}), ("sgpo", {"lora_rank": 4}), ("grpo8", {"mini_batch": 1, "updates_per_batch": 2}), ("sft", {}),
    ("luffy", SHORT), ("hpt", {"expert_gate": 5, **SHORT}), ("sgpo", {"guided_side": "frozen", **SHORT}),
    ("sgpo", {"guided_side": "ema", "ema_decay": 0.7, **SHORT})])
def test_a_stopped_run_resumes_to_the_bit(base, tmp_path, method, extra):
    """Stop at a random step, resume, and compare every metric (but clocks) and the final weights."""
    config = small(base, method, **extra)
    whole = train(config, root=tmp_path / "whole")
    stop_at = random.Random(f"{method}{extra}").randint(1, config.train.steps - 1)

    def interrupt(row):
        if row["kind"] in ("train", "supervised") and row["step"] == stop_at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, root=tmp_path / "broken", on_row=interrupt)
    broken = load_run(tmp_path / "broken" / config.label)
    assert broken.state == "stopped" and not broken.done
    assert int(broken.checkpoints()[-1].name.removeprefix("step-")) >= stop_at, "at most the current step is lost"
    resumed = train(config, root=tmp_path / "broken")
    assert timeless(resumed.metrics()) == timeless(whole.metrics())
    assert resumed.summary["weights"] == whole.summary["weights"]
    assert not (resumed.folder / "FAILED.json").exists()


@pytest.fixture(scope="module")
def warm(base, tmp_path_factory) -> Run:
    """A finished supervised run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.chdir(Path(__file__).parent)
        return train(small(base, "sft", steps=3), root=tmp_path_factory.mktemp("warm"))


def test_a_supervised_run_keeps_its_best_step(warm):
    losses = {r["step"]: r["validation_loss"] for r in warm.metrics("eval") if r["step"]}
    assert warm.summary["best_step"] == min(losses, key=lambda s: losses[s])
    assert all(math.isfinite(r["loss"]) for r in warm.metrics("supervised"))
    assert len(warm.metrics("supervised")) == 3


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.objective == "rl"])
def test_every_rl_method_trains_from_the_supervised_run(base, tmp_path, warm, method):
    """Two steps of 3 problems: finite metrics, those that belong to the method, and every response stored."""
    extra = {"expert_gate": 4} if method == "hpt" else {}
    run = train(small(base, method, steps=2, init_from=str(warm.folder), eval_every=0, skip_untaught=False,
                      **extra), root=tmp_path)
    m, rows = METHODS[method], run.metrics("train")
    assert len(rows) == 2 and all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    for row in rows:
        assert ("alpha" in row) == ("loss_kd" in row) == (m.distillation != "none")
        assert ("kl_mean" in row) == (m.distillation in ("forward_kl", "reverse_kl"))
        assert ("expert_p" in row) == ("loss_expert" in row) == (m.expert != "none")
        assert ("loss_entropy" in row) == (m.entropy_coefficient > 0)
        assert math.isclose(row["loss"], sum(row.get(f"loss_{k}", 0) for k in ("grpo", "kd", "expert", "entropy")))
        assert 0 < row["sampler_trainer_gap"] < 1e-4 and row["entropy"] > 0 and row["grad_norm"] > 0
    assert method != "no_grpo" or (all(r["loss_grpo"] == 0 for r in rows) and any(r["alpha"] > 0 for r in rows))
    stored = [json.loads(line) for line in (run.folder / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    experts = [r for r in stored if r["expert"]]
    assert len(stored) == 3 * (m.g1 + m.g2 + (m.expert != "none"))
    assert len(experts) == 3 * (m.expert != "none")
    assert all(r["stop"] == "written" and "boxed" in r["text"] and r["status"] in ("correct", "wrong") for r in experts)
    assert sum(r["guided"] for r in stored) == 3 * m.g2
    assert run.summary["test"]["problems"] == 4 and set(run.summary["test"]["pass_at"]) == {"1", "2"}
    assert run.summary["weights"] != warm.summary["weights"]


def test_a_run_starts_from_the_weights_of_any_other_run(base, tmp_path, warm):
    """Shown without a step: what it starts from is what it ends with."""
    source = train(small(base, "luffy", steps=1, init_from=str(warm.folder), eval_every=0), root=tmp_path)
    for method in ("sgpo", "hpt"):
        run = train(small(base, method, steps=0, n_test=0, init_from=str(source.folder)), root=tmp_path)
        fresh = train(small(base, method, steps=0, n_test=0), root=tmp_path)
        assert run.summary["weights"] == source.summary["weights"] != warm.summary["weights"]
        assert fresh.summary["weights"] != source.summary["weights"]


def test_the_gap_is_measured_also_where_every_rollout_is_dropped(base, tmp_path):
    """HPT with the highest gate: expert solutions are learned, dropped responses are still looked at."""
    rows = train(small(base, "hpt", steps=3, expert_gate=11), root=tmp_path).metrics("train")
    assert [r["expert_share"] for r in rows] == [1.0] * 3 and all(r["loss_grpo"] == 0 for r in rows)
    assert all(0 < r["sampler_trainer_gap"] < 1e-4 and r["entropy"] > 0 and r["loss_expert"] > 1 for r in rows)


def test_sgpo_without_weight_is_grpo_to_the_bit(base, tmp_path):
    """The whole loop with alpha_max = 0. One sequence at a time, so that no sample has other neighbours."""
    same = {"g1": 4, "steps": 2, "rollout_batch": 1, "max_new_tokens": 6, "mini_batch": 1, "updates_per_batch": 2,
            "eval_every": 0, "n_test": 1, "n_validation": 1}
    sgpo = train(small(base, "sgpo", alpha_max=0.0, g2=2, **same), root=tmp_path)
    grpo = train(small(base, "grpo8", **same), root=tmp_path)
    ours, theirs = sgpo.metrics("train"), grpo.metrics("train")
    for name in ("reward_autonomous", "entropy", "response_length", "policy_clip_share", "sampler_trainer_gap",
                 "loss_grpo", "grad_norm", "loss"):
        assert [r[name] for r in ours] == [r[name] for r in theirs], name
    assert sgpo.summary["weights"] == grpo.summary["weights"]
    assert any(r["target_share"] > 0 for r in ours) and any(r["grad_norm"] > 0 for r in theirs)


def test_the_guided_side_follows_every_update(base, tmp_path):
    """An average without memory is the live policy to the bit; a frozen side is not, from the second update on."""
    same = {"steps": 2, "mini_batch": 1, "eval_every": 0, "n_test": 0, "n_validation": 0, "weighting": "fixed"}
    live, ema, frozen = (train(small(base, "sgpo", guided_side=side, ema_decay=0.0, **same), root=tmp_path)
                         for side in ("live", "ema", "frozen"))
    assert timeless(live.metrics("train")) == timeless(ema.metrics("train"))
    assert live.summary["weights"] == ema.summary["weights"] != frozen.summary["weights"]


def test_the_first_step_is_on_policy_and_several_updates_are_not(base, tmp_path):
    one = train(small(base, "grpo8", steps=2), root=tmp_path).metrics("train")
    assert all(r["policy_clip_share"] == 0 and r["updates"] == 1 and r["sampler_trainer_gap"] < 1e-4 for r in one)
    many = train(small(base, "grpo8", steps=2, mini_batch=1, updates_per_batch=3, lr=3e-2), root=tmp_path)
    assert many.metrics("train")[0]["updates"] == 9
    assert many.metrics("train")[-1]["policy_clip_share"] > 0


def test_an_evaluation_that_is_cut_off_comes_again(base, tmp_path, monkeypatch):
    """Ctrl-C in the evaluation after a step: the step is kept, and its evaluation is made when the run goes on."""
    config = small(base, "grpo8", steps=4)
    whole = train(config, root=tmp_path / "whole")
    evaluate = Session.evaluate

    def interrupted(session, problems, k, key):
        if key[1:] == ("eval", 2):
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(session, problems, k, key)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Session, "evaluate", interrupted)
        train(config, root=tmp_path / "broken")
    broken = load_run(tmp_path / "broken" / config.label)
    assert [r["step"] for r in broken.metrics("eval")] == [0] and broken.checkpoints()[-1].name == "step-000002"
    assert timeless(train(config, root=tmp_path / "broken").metrics()) == timeless(whole.metrics())


@pytest.mark.parametrize(("presses", "kept"), [(1, ["step-000003"]), (2, [])])
def test_ctrl_c_waits_while_weights_change(base, tmp_path, presses, kept):
    """The first waits for the end of the step, which is saved; the second does not, and nothing torn is saved."""
    config, before = small(base, "grpo8", save_every=0, eval_every=0), signal.getsignal(signal.SIGINT)

    def press(row):
        if row["kind"] == "train" and row["step"] == 3:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, root=tmp_path, on_row=press)
    assert [p.name for p in load_run(tmp_path / config.label).checkpoints()] == kept
    assert signal.getsignal(signal.SIGINT) is before


def test_changed_problems_are_noticed(base, tmp_path):
    strategy = {"problem_type": "sum", "strategy": "add", "steps": ["add"]}
    config = small(base, "sgpo", steps=1, problems=write_problems(tmp_path / "problems.jsonl", strategy=strategy))
    train(config, root=tmp_path)
    write_problems(tmp_path / "problems.jsonl", strategy={**strategy, "steps": ["count on"]})
    with pytest.raises(ValueError, match="other problems or strategies"):
        train(config, root=tmp_path)


def test_weights_of_another_model_are_not_taken(base, tmp_path, monkeypatch):
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path))
    warm = train(small(base, "sft", steps=1, lora_rank=4))
    with pytest.raises(ValueError, match=r"model\.lora_rank: 4 there, 2 here"):
        train(small(base, "sgpo", steps=1, lora_rank=2, init_from=warm.folder.name))


def test_a_finished_run_is_returned_and_told_again(base, tmp_path):
    config = small(base, "grpo8", steps=1)
    train(config, root=tmp_path)
    told: list = []
    again = train(config, root=tmp_path, on_row=told.append)
    assert again.done and told == again.metrics()


# --- refused before any work ------------------------------------------------------------------------------------
def write_problems(path: Path, **fields) -> str:
    rows = [{"id": f"p{i}", "prompt": f"What is {i} + {i}?", "answer": str(2 * i), "split": split, **fields}
            for i, split in enumerate(["train"] * 6 + ["validation"] * 2 + ["test"] * 2)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize(("change", "message"), [
    ({"problems": "PROBLEMS"}, "have no strategy"),
    ({"problems": "PROBLEMS", "method": "sft"}, "have no solution"),
    ({"problems": "missing.jsonl"}, "missing.jsonl"),
    ({"source": "./no-such-model"}, "no model at"),
    ({"max_new_tokens": 500}, "no room for max_new_tokens"),
    ({"init_from": "no-such-run"}, "no run at"),
    ({"device": "cuda"}, "sees no GPU"),
    ({"reward": "rewards_for_tests:nothing"}, "nothing"),
    ({"track": "wandb"}, "not installed"),
    ({"lora_rank": 2, "lora_targets": "nope"}, "model.lora_targets: got 'nope'"),
])
def test_what_cannot_work_is_refused_with_a_cure(base, tmp_path, change, message):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    change = dict(change)
    if change.get("problems") == "PROBLEMS":
        change["problems"] = write_problems(tmp_path / "problems.jsonl")
    with pytest.raises(ValueError, match=message):
        train(small(base, change.pop("method", "sgpo"), **change), root=tmp_path)
    (folder,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert (folder / "FAILED.json").exists() and not load_run(folder).metrics("train")


@pytest.mark.parametrize("method", ["sft", "luffy", "hpt"])
def test_a_missing_expert_solution_is_told_by_problem_and_source(base, tmp_path, method):
    strategy = {"problem_type": "sum", "strategy": "add", "steps": ["add"]}
    path = tmp_path / "problems.jsonl"
    write_problems(path, strategy=strategy, solution="add them")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in (rows[1], rows[4]):
        del row["solution"]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ValueError, match=r"2 of 6 .* no solution: p1, p4\. Source: \S*problems\.jsonl") as error:
        train(small(base, method, problems=str(path), warmup_share=0.0), root=tmp_path)
    assert "`solution` field" in str(error.value)
    train(small(base, "sgpo", problems=str(path), warmup_share=0.0, steps=0), root=tmp_path)


@pytest.mark.parametrize("method", ["sft", "luffy", "hpt"])
def test_an_expert_solution_longer_than_the_context_is_refused(base, tmp_path, method):
    path = write_problems(tmp_path / "problems.jsonl", solution="1 + " * 300 + "1")
    with pytest.raises(ValueError, match=r"problem p\d: prompt and solution have 6\d\d tokens, the context is 512"):
        train(small(base, method, problems=path), root=tmp_path)
    train(small(base, "grpo8", problems=path, steps=0), root=tmp_path)


def test_unreadable_gold_is_refused(base, tmp_path):
    strategy = {"problem_type": "sum", "strategy": "add", "steps": ["add"]}
    path = tmp_path / "problems.jsonl"
    write_problems(path, strategy=strategy)
    path.write_text(path.read_text().replace('"answer": "4"', '"answer": "<gold>"'))
    with pytest.raises(ValueError, match=r"(?s)1 of \d+ gold answers cannot be read.*answer: got .* cannot be read"):
        train(small(base, "sgpo", problems=str(path), reward="math"), root=tmp_path)


def test_a_model_folder_without_tokenizer_is_refused(base, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((base / name).read_bytes())
    with pytest.raises(ValueError, match="tokenizer"):
        train(small(bare), root=tmp_path)


def test_a_run_folder_of_another_configuration_is_refused(base, tmp_path):
    train(small(base, "grpo8", steps=1), root=tmp_path, name="mine")
    with pytest.raises(ValueError, match=r"train\.lr: 0\.001 there, 0\.5 here"):
        train(small(base, "grpo8", steps=1, lr=0.5), root=tmp_path, name="mine")


def test_a_run_that_is_asked_to_stop_saves_and_continues(base, tmp_path, monkeypatch):
    """`JOB/STOP` ends the run after its step, with a checkpoint that `save_every` would not have made."""
    config = small(base, "grpo8", steps=4, save_every=0, eval_every=0)
    whole = train(config, root=tmp_path / "whole")
    monkeypatch.setenv("SGPO_JOB", str(tmp_path))

    def ask(row):
        if row["kind"] == "train" and row["step"] == 2:
            (tmp_path / "STOP").touch()

    with pytest.raises(Stopped, match="after step 2 of 4"):
        train(config, root=tmp_path / "broken", on_row=ask)
    (tmp_path / "STOP").unlink()
    stopped = load_run(tmp_path / "broken" / config.label)
    assert stopped.state == "stopped" and [p.name for p in stopped.checkpoints()] == ["step-000002"]
    assert timeless(train(config, root=tmp_path / "broken").metrics()) == timeless(whole.metrics())

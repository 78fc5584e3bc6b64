"""NaN and infinity in every quantity of a step: stopped before the optimizer step, samples kept, no such checkpoint."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import not_finite_world as world
import pytest
import torch
from not_finite_world import STEP, Fault, injected, on_two_workers
from safetensors.torch import load_file, save_file
from time_limits import within

from sgpo_lib.guards import GRADIENT, KL, LOGP, LOSS, REWARD, SAMPLER, WEIGHT, Guard, not_finite
from sgpo_lib.recipes import from_parameters
from sgpo_lib.records import Problem, Rollout, RolloutGroup, Verdict
from sgpo_lib.runs import Run, load_run
from sgpo_lib.trainer import train
from sgpo_lib.world import World

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("importable")]
INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Case:
    """A fault, and what must be said of it."""

    quantity: str
    where: str
    fault: Fault = world.nothing
    method: str = "sgpo"
    fields: tuple[tuple[str, Any], ...] = ()
    samples: bool = True
    """Whether single samples can be told, with the tokens that are not finite; else those that were learned from."""
    step: int = STEP


CASES = {
    "reward NaN": Case(REWARD, "verification", fields=(("reward", "collapse_rewards:not_a_number"),), step=1),
    "reward infinite": Case(REWARD, "verification", fields=(("reward", "collapse_rewards:infinite"),), step=1),
    "reward NaN, in the first evaluation": Case(REWARD, "verification", fields=(
        ("reward", "collapse_rewards:not_a_number"), ("n_validation", 12), ("eval_every", 1)), step=0),
    "sampler's log-probability -inf": Case(SAMPLER, "sampling", world.sampler_logp),
    "sampler's log-probability NaN": Case(SAMPLER, "sampling", partial(world.sampler_logp, value=NAN)),
    "log-probability": Case(LOGP, "policy gradient", world.hidden_state),
    "log-probability before several updates": Case(
        LOGP, "before the first update", partial(world.hidden_state, learns=False), "grpo8", (("mini_batch", 1),)),
    "log-probability that chooses the target": Case(
        LOGP, "choice of the target", partial(world.hidden_state, learns=False),
        fields=(("reward", "collapse_rewards:always"),)),
    "log-probability of expert solutions": Case(LOGP, "expert solutions", world.hidden_state, "sft"),
    "log-probability of LUFFY's experts": Case(
        LOGP, "policy gradient", world.hidden_state, "luffy8", (("g1", 2), ("skip_untaught", False))),
    "token KL": Case(KL, "distillation", world.guided_state, fields=(("reward", "collapse_rewards:always"),)),
    "loss, entropy bonus": Case(LOSS, "policy gradient", fields=(("entropy_coefficient", 1e39),), method="grpo8",
                                samples=False, step=1),
    "loss, distillation": Case(LOSS, "distillation", samples=False, step=1, fields=(
        ("reward", "collapse_rewards:always"), ("weighting", "fixed"), ("alpha_fixed", 1e45))),
    "loss, HPT's expert": Case(LOSS, "expert solutions", method="hpt", samples=False, step=1, fields=(
        ("g1", 2), ("reward", "collapse_rewards:never"), ("expert_coefficient", 2e38))),
    "gradient NaN": Case(GRADIENT, "backward pass", world.gradient, samples=False),
    "gradient infinite": Case(GRADIENT, "backward pass", partial(world.gradient, value=-INF), samples=False,
                              fields=(("lora_rank", 2),)),
    "gradient of a supervised run": Case(GRADIENT, "backward pass", world.gradient, "sft", samples=False),
    "weight, seen by the sampler": Case(SAMPLER, "sampling", world.weight),
    "weight of a supervised run": Case(LOGP, "expert solutions", world.weight, "sft"),
    "weight, before the update": Case(WEIGHT, "before the update", world.weight_after_the_passes, samples=False),
}
QUICK = ("reward NaN", "reward NaN, in the first evaluation", "sampler's log-probability -inf", "log-probability",
         "token KL", "loss, entropy bonus", "gradient NaN", "gradient of a supervised run",
         "weight, seen by the sampler", "weight, before the update")
"""What CI runs."""


def small(base: Path, method: str, **fields: Any) -> Any:
    return from_parameters("tiny", method, 0, **{
        "source": str(base), "revision": "", "reward": "rewards_for_tests:coin", "steps": 3, "problems_per_step": 2,
        "n_train": 12, "n_validation": 0, "n_test": 0, "max_new_tokens": 6, "eval_every": 0, "lr": 1e-3, **fields})


def assert_finite(run: Run) -> list[int]:
    """Every number of every checkpoint; returns their steps."""
    for folder in run.checkpoints():
        weights = [load_file(f) for f in folder.rglob("*.safetensors")]
        assert weights and not not_finite(pair for held in weights for pair in held.items())
        state = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"]
        assert state and not not_finite((n, t) for held in state.values() for n, t in held.items())
    return [int(f.name.removeprefix("step-")) for f in run.checkpoints()]


def recorded(run: Run, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record of a step and its tensors; JSON without NaN."""
    path = run.folder / "not_finite" / f"step-{step:06d}.json"
    record = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert record["step"] == step and record["tensors"] == f"step-{step:06d}.safetensors"
    return record, load_file(path.with_name(record["tensors"]))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in CASES])
def test_what_is_not_finite_stops_the_run_before_the_optimizer(name, base, tmp_path, tally):
    case = CASES[name]
    config = small(base, case.method, **dict(case.fields))
    with injected(case.fault) as seen, pytest.raises((FloatingPointError, ValueError)) as raised:
        train(config, root=tmp_path, name="run")
    run, message = load_run(tmp_path / "run"), str(raised.value)
    assert raised.type is (ValueError if case.quantity == REWARD else FloatingPointError)

    # before any update with it: no optimizer step, the last checkpoint is that of the step before
    assert seen.steps == [] and assert_finite(run) == list(range(1, case.step))
    if case.step > 1:
        told = json.loads((run.checkpoints()[-1] / "state.json").read_text())["weights"]
        assert told == seen.weights and (case.quantity == WEIGHT or "weight" in name
                                         or seen.session.policy.fingerprint() == told)

    # the message: step, quantity, samples, cure, file
    path = run.folder / "not_finite" / f"step-{case.step:06d}.json"
    assert message.startswith(f"step {case.step}: ") and str(path) in message and "No update was made" in message
    assert case.quantity in message and ("train.lr" in message or "reward.reward" in message or "dtype" in message)
    failed = json.loads((run.folder / "FAILED.json").read_text())
    assert failed["message"] == message and failed["error"] == raised.type.__name__ and run.state == "failed"

    # the record: those samples, their tensors, the tokens
    record, tensors = recorded(run, case.step)
    assert record["quantity"] == case.quantity and record["where"] == case.where
    assert 0 < len(record["samples"]) <= record["samples_found"]
    first = record["samples"][0]
    assert f"problem {first['problem']}, {first['group']} {first['sample']}" in message
    for sample in record["samples"]:
        ids = [tensors[f"{sample['number']}.{part}"].tolist() for part in ("prompt_ids", "token_ids")]
        assert ids == [sample["prompt_ids"], sample["token_ids"]] and ids[1]
    told = [(sample, bad) for sample in record["samples"] for bad in sample["not_finite"]]
    for sample, bad in told:
        values = tensors[f"{sample['number']}.{bad['quantity']}, {bad['where']}"]
        assert (~values.isfinite()).nonzero()[:, 0].tolist() == bad["tokens"] != []
        assert len(values) == len(sample["token_ids"])
    mine = [bad["tokens"] for _, bad in told if (bad["quantity"], bad["where"]) == (case.quantity, case.where)]
    assert bool(mine) == (case.samples and case.quantity != REWARD)
    if case.fault is world.sampler_logp or case.fault is world.hidden_state:
        assert mine == [[1 if case.quantity == SAMPLER else 0]], "that token of that sample alone"
    if case.quantity in (GRADIENT, WEIGHT) or case.fault is world.weight:
        assert any(re.search(r"\(1 of \d+ numbers\)", n) for n in record["tensors_not_finite"]), "one number of one"
    tally(7, name, f"stopped in step {case.step} ({case.where}), {record['samples_found']} samples told")


def test_a_step_that_makes_a_weight_infinite_is_not_kept(base, tmp_path, tally):
    """A weight decay beyond float32: gradients are finite, the update is not."""
    with pytest.raises(FloatingPointError, match=r"step 1: weight is not finite.*after the update.*step is not kept"):
        train(small(base, "sgpo", weight_decay=1e45), root=tmp_path, name="run")
    run = load_run(tmp_path / "run")
    assert run.checkpoints() == [] and run.metrics("train") == []
    record, _ = recorded(run, 1)
    assert record["quantity"] == WEIGHT and record["samples"] and "train.lr" in record["message"]
    tally(7, "weights made infinite by the update (weight_decay 1e45)", "stopped after the update, no checkpoint")


@pytest.mark.parametrize("method", ["sgpo", "sft"])
def test_no_checkpoint_is_written_of_weights_that_are_not_finite(method, base, tmp_path, tally):
    """Ctrl-C between two steps saves what the last whole step left. If that has become NaN, nothing is saved."""
    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == STEP and row["kind"] in ("train", "supervised"):
            world.weight(seen.session)
            os.kill(os.getpid(), signal.SIGINT)  # held until the step is whole

    fields = {"n_validation": 1} if method == "sft" else {}
    with injected(world.nothing) as seen, pytest.raises(FloatingPointError, match="before saving"):
        train(small(base, method, save_every=3, guided_side="ema" if method == "sgpo" else "live", **fields),
              root=tmp_path, name="run", on_row=interrupt)
    run = load_run(tmp_path / "run")
    assert assert_finite(run) == [] and not (run.folder / "final").exists() and run.state == "failed"
    tally(7, f"a {method} run interrupted with a NaN weight in memory", "no checkpoint written")


@pytest.mark.parametrize("seen", [True, False])
def test_a_base_that_is_not_finite_is_refused_at_the_start(seen, base, tmp_path):
    """Where its logits show it, and where they do not: the embedding of a token that never comes up. Nothing trains
    here, but the run's final weights would be these."""
    shutil.copytree(base, tmp_path / "base")
    config, file = tmp_path / "base" / "config.json", tmp_path / "base" / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight" if seen else "model.embed_tokens.weight"][-1, 0] = NAN
    save_file(weights, file, {"format": "pt"})
    told = "model.source: .* NaN for logits" if seen else "step 0: weight is not finite .*embed_tokens.weight .1 of"
    with pytest.raises((ValueError, FloatingPointError), match=told):
        train(small(tmp_path / "base", "base"), root=tmp_path, name="run")
    assert not (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "DONE").exists()


def test_two_workers_stop_together(base, tmp_path, count, tally):
    """The fault is in the second worker alone. Both raise the same error, and neither waits for the other."""
    cases = {"sharded log-probability": ("grpo8", {}, world.hidden_state, LOGP),
             "adapter sampler": ("sgpo", {"lora_rank": 2}, world.sampler_logp, SAMPLER)}
    if count(0, 1):
        cases |= {"adapter gradient": ("sgpo", {"lora_rank": 2}, world.gradient, GRADIENT),
                  "sharded weight": ("grpo8", {}, world.weight_after_the_passes, WEIGHT),
                  "sharded reward": ("grpo8", {"reward": "collapse_rewards:not_a_number"}, world.nothing, REWARD),
                  "sharded supervised": ("sft", {"problems_per_step": 4, "warmup_share": 0.9}, world.hidden_state,
                                         LOGP)}
    with within(240):
        raised = on_two_workers(tmp_path, [(name, small(base, method, **fields), fault)
                                           for name, (method, fields, fault, _) in cases.items()])
    for name, (_, _, _, quantity) in cases.items():
        step = 1 if quantity == REWARD else STEP
        assert raised[name][0] == raised[name][1] and raised[name][0].endswith("optimizer steps: 0"), raised[name]
        assert f"step {step}: " in raised[name][0] and quantity in raised[name][0]
        run = load_run(tmp_path / name)
        record, tensors = recorded(run, step)
        assert record["quantity"] == quantity and record["samples"] and "0.token_ids" in tensors
        assert [int(f.name.removeprefix("step-")) for f in run.checkpoints()] == list(range(1, step))
    tally(7, "two workers, the fault in one of them", f"{len(cases)} of {len(cases)} stopped both, with one message")


def test_a_reward_that_no_rule_has_refused_is_looked_at(tmp_path):
    """As of a problem's own scorer, which may return any float."""
    good, bad = (Rollout("p", False, i, (1,), (2, 3), "", "end", (-1.0, -1.0)) for i in range(2))

    class Scorer:
        def judge(self, items: Any) -> list[Verdict]:
            return [Verdict("correct", 1.0), Verdict("wrong", NAN)]

    guard = Guard(tmp_path, type("P", (), {"model": torch.nn.Linear(2, 1)})(), World())
    guard.judge(Scorer(), [RolloutGroup(Problem("p", "", ""), [good, bad], [])])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"step 4: reward is not finite .*; in 1 sample: problem p, autonomous 1\."):
        guard.stop(4)
    guard.stop(4)  # told once


def test_the_record_holds_no_secret(tmp_path, monkeypatch):
    """Redacted like FAILED.json; problem ids and texts come from others."""
    monkeypatch.setenv("CANARY_TOKEN", "canary-7f3a-secret")
    guard, problem = Guard(tmp_path, None, World()), Problem("canary-7f3a-secret", "", "")  # type: ignore[arg-type]
    sample = Rollout(problem.id, False, 0, (1,), (3, 4), "a canary-7f3a-secret\u2028b \ud800", "end", (-1.0, NAN))

    class Refuses:
        def judge(self, items: Any) -> Any:
            raise ValueError("got nan for canary-7f3a-secret")

    class Policy:
        model = torch.nn.Linear(1, 1)

    guard.policy = Policy()  # type: ignore[assignment]
    guard.judge(Refuses(), [RolloutGroup(problem, [sample], [])])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="canary"):
        guard.stop(7)
    record, _ = recorded(Run(tmp_path, from_parameters()), 7)
    told = json.dumps(record, ensure_ascii=False)
    assert "canary-7f3a" not in told and told.count("«CANARY_TOKEN»") >= 3
    assert b"canary-7f3a" not in (tmp_path / "not_finite" / "step-000007.safetensors").read_bytes()


def test_a_full_disk_does_not_hide_what_was_found(tmp_path, monkeypatch):
    """The folder cannot be made, since a file has its name: the error says both."""
    (tmp_path / "not_finite").write_text("")
    guard = Guard(tmp_path, type("P", (), {"model": torch.nn.Linear(2, 1)})(), World())
    with torch.no_grad():
        guard.policy.model.weight[0, 1] = INF
    with pytest.raises(FloatingPointError, match=r"weight is not finite \(at the start\): weight \(1 of 2 numbers\).*"
                                                 "could not be written"):
        guard.require_finite(0, "at the start")


def test_a_sum_that_overflows_is_no_finding():
    huge = torch.full((8,), 3e38)
    assert not_finite([("a", huge), ("b", torch.zeros(0)), ("c", torch.arange(3))]) == []
    assert not_finite([("a", huge), ("b", torch.tensor([1.0, -INF, NAN]))]) == ["b (2 of 3 numbers)"]
    assert not_finite([("h", torch.tensor([60000.0, 60000.0], dtype=torch.float16))]) == []

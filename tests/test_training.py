"""The loop: gradients of Eq. 7 against a naive computation, resuming to the bit, and what is refused before work."""

from __future__ import annotations

import collections
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch

from sgpo_lib import testbed, tiny
from sgpo_lib.policy import Policy
from sgpo_lib.prompts import prompt_ids, response_ids
from sgpo_lib.recipes import from_parameters
from sgpo_lib.records import Rollout, RolloutGroup, Verdict
from sgpo_lib.runs import CLOCK_PREFIXES, load_run
from sgpo_lib.trainer import (
    accumulate_distillation,
    accumulate_policy_gradient,
    autonomous_logp,
    plan,
    train,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A freshly initialised model in a plain folder: fast, and enough for everything but learning."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny.build_tokenizer()
    tiny.build_model(tokenizer, 5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(base: Path, method: str = "sgpo", seed: int = 0, **overrides):
    settings = {"source": str(base), "reward": "rewards_for_tests:coin", "steps": 6, "problems_per_step": 3,
                "n_train": 12, "n_validation": 4, "n_test": 4, "max_new_tokens": 10, "eval_every": 2, "eval_k": 1,
                "test_k": 2, "lr": 1e-3, **overrides}
    return from_parameters("tiny", method, seed, **settings)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(Path(__file__).parent)


def timeless(rows):
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK_PREFIXES)} for row in rows]


# --- gradients --------------------------------------------------------------------------------------------------
class FakeSession:
    """The part of a session that the gradient functions use, in float64."""

    def __init__(self, config, policy):
        self.config, self.policy = config, policy

    def logp_and_entropy(self, batch):
        from sgpo_lib.session import Session

        return Session.logp_and_entropy(self, batch)


def written_group(tokenizer, problem, rng, g1, g2) -> RolloutGroup:
    """A group with written responses of different lengths and random verdicts."""
    unguided, guided = (prompt_ids(tokenizer, problem, guided=g) for g in (False, True))
    group = RolloutGroup(problem, [], [], unguided, guided)
    for is_guided, count in ((False, g1), (True, g2)):
        for i in range(count):
            words = problem.solution.split()[: rng.randint(1, 12)]
            ids = response_ids(tokenizer, " ".join(words))
            right = rng.random() < 0.5
            (group.guided if is_guided else group.autonomous).append(Rollout(
                problem.id, is_guided, i, guided if is_guided else unguided, ids, "", "end", (0.0,) * len(ids),
                Verdict("correct" if right else "wrong", float(right))))
    return group


def naive_loss(model, works, method, old, problems_in_batch):
    """Eq. 7 as written, one response at a time, from the model's own full logits. No code of ours but the records."""
    def logits(prompt, response):
        out = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
        return out[len(prompt) - 1 : -1]

    total = torch.zeros((), dtype=torch.float64)
    for group in works:
        rewards = [o.verdict.reward for o in group.autonomous]
        mean = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        objective = torch.zeros((), dtype=torch.float64)
        for o, r in zip(group.autonomous, rewards, strict=True):
            advantage = (r - mean) / (deviation + method.advantage_eps)
            logp = torch.log_softmax(logits(group.unguided_prompt_ids, o.token_ids), -1)
            inner = torch.zeros((), dtype=torch.float64)
            for t, token in enumerate(o.token_ids):
                ratio = torch.exp(logp[t, token] - old[id(o)][t])
                inner = inner + torch.minimum(ratio * advantage, torch.clamp(
                    ratio, 1 - method.clip_low, 1 + method.clip_high) * advantage)
            objective = objective + inner / len(o.token_ids)
        total = total - objective / len(rewards)
        correct = [o for o in group.guided if o.verdict.reward == 1.0]
        if correct:
            with torch.no_grad():
                reach = [sum(float(torch.log_softmax(logits(group.unguided_prompt_ids, o.token_ids), -1)[t, token])
                             for t, token in enumerate(o.token_ids)) for o in correct]
            target = correct[max(range(len(correct)), key=lambda j: reach[j])]
            p_auto, p_guide = mean, sum(o.verdict.reward for o in group.guided) / len(group.guided)
            alpha = 0.5 * (p_guide - p_auto + 0.1) / (p_auto + 0.1)
            alpha = min(max(alpha, 0.0), 0.8)
            with torch.no_grad():
                guided = torch.softmax(logits(group.guided_prompt_ids, target.token_ids), -1)
            unguided = torch.log_softmax(logits(group.unguided_prompt_ids, target.token_ids), -1)
            kl = (guided * (guided.log() - unguided)).sum(-1)
            kept = torch.tensor([float(d) <= method.kl_delta for d in kl.detach()], dtype=torch.float64)
            total = total + alpha * (kl * kept).sum() / len(target.token_ids)
    return total / problems_in_batch


@pytest.mark.parametrize("micro_batch", [2, 128])
@pytest.mark.parametrize("delta", [0.1, 1.0])
def test_a_steps_gradient_is_that_of_equation_7(micro_batch, delta):
    """Every weight's gradient, in float64, off-policy (ratios beyond the clip), in one batch and in micro-batches."""
    rng = random.Random(3)
    config = from_parameters("tiny", "sgpo", g1=4, g2=3, kl_delta=delta, micro_batch=micro_batch, kl_chunk_tokens=7)
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(tokenizer, 1).double()
    session = FakeSession(config, Policy(model, tokenizer, torch.device("cpu"), lora=False, context=512))
    groups = [written_group(tokenizer, p, rng, 4, 3) for p in itertools.islice(testbed.generate(9), 4)]
    works = plan(session, groups)
    old = autonomous_logp(session, works)
    with torch.no_grad():  # move the policy away from where the responses came from
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    works = plan(session, groups)
    sums: collections.Counter = collections.Counter()
    accumulate_policy_gradient(session, works, old, sums)
    accumulate_distillation(session, works, sums)
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert 0 < sums["policy_clipped_count"] < sums["policy_token_count"]
    assert any(w.target is not None for w in works)
    assert (0 < sums["kl_clipped_count"] < sums["kl_token_count"]) == (delta == 0.1)
    model.zero_grad()
    loss = naive_loss(model, groups, config.method, old, len(groups))
    loss.backward()
    assert math.isclose(sums["loss_grpo"] + sums["loss_kd"], float(loss.detach()), rel_tol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


# --- the loop ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "extra"), [
    ("sgpo", {}), ("sgpo", {"lora_rank": 4}), ("grpo8", {"mini_batch": 1, "updates_per_batch": 2}), ("sft", {})])
def test_a_stopped_run_resumes_to_the_bit(base, tmp_path, method, extra):
    """Stop at a random step, resume, and compare every metric (but clocks) and the final weights."""
    config = small(base, method, **extra)
    whole = train(config, root=tmp_path / "whole")
    stop_at = random.Random(f"{method}{extra}").randint(1, 5)

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


def test_every_method_trains_and_starts_from_another_run(base, tmp_path, monkeypatch):
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path))
    warm = train(small(base, "sft", steps=3))
    for method in ("sgpo", "sft_grpo", "grpo8"):
        run = train(small(base, method, steps=2, init_from=warm.folder.name, eval_every=0))
        rows = run.metrics("train")
        assert len(rows) == 2 and all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
        assert ("alpha" in rows[0]) == (method == "sgpo")
        stored = [json.loads(line) for line in (run.folder / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
        assert len(stored) == 3 * {"sgpo": 12, "sft_grpo": 12, "grpo8": 8}[method]
        assert run.summary["test"]["problems"] == 4 and set(run.summary["test"]["pass_at"]) == {"1", "2"}
    first = load_run(warm.folder)
    losses = {r["step"]: r["validation_loss"] for r in first.metrics("eval") if r["step"]}
    assert first.summary["best_step"] == min(losses, key=lambda s: losses[s])


def test_the_first_step_is_on_policy_and_several_updates_are_not(base, tmp_path):
    one = train(small(base, "grpo8", steps=2), root=tmp_path).metrics("train")
    assert all(r["policy_clip_share"] == 0 and r["updates"] == 1 and r["sampler_trainer_gap"] < 1e-4 for r in one)
    many = train(small(base, "grpo8", steps=2, mini_batch=1, updates_per_batch=3, lr=3e-2), root=tmp_path)
    assert many.metrics("train")[0]["updates"] == 9
    assert many.metrics("train")[-1]["policy_clip_share"] > 0


def test_an_evaluation_that_is_cut_off_comes_again(base, tmp_path):
    """Ctrl-C between a step and the end of its evaluation: the step is redone, no evaluation is missing."""
    config = small(base, "grpo8", steps=4)
    whole = train(config, root=tmp_path / "whole")

    def interrupt(row):
        if row["kind"] == "eval" and row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, root=tmp_path / "broken", on_row=interrupt)
    assert timeless(train(config, root=tmp_path / "broken").metrics()) == timeless(whole.metrics())


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


def test_unreadable_gold_is_refused(base, tmp_path):
    strategy = {"problem_type": "sum", "strategy": "add", "steps": ["add"]}
    path = tmp_path / "problems.jsonl"
    write_problems(path, strategy=strategy)
    path.write_text(path.read_text().replace('"answer": "4"', '"answer": "<gold>"'))
    with pytest.raises(ValueError, match=r"1 gold answers? cannot be read: p2"):
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

"""Several workers train what one trains: same samples, gradients, checkpoints. Ray is not needed for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parallel_world import TOLERANCE, Training, assert_same_metrics, on_workers
from safetensors.torch import load_file

from sgpo_lib.export import export
from sgpo_lib.parallel import decoder_layers, spread
from sgpo_lib.policy import load_policy
from sgpo_lib.policy_sources import open_policy
from sgpo_lib.recipes import from_parameters
from sgpo_lib.rollouts.delivery import base_parameters
from sgpo_lib.rollouts.fingerprint import base_numbers, differences
from sgpo_lib.runs import Run, Stopped, open_run
from sgpo_lib.trainer import train
from sgpo_lib.world import World

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("importable")]
ADAPTER = {"lora_rank": 4}


def small(base: Path, method: str, **fields):
    """Runs in which workers have other numbers of micro-batches: correct guided responses are rare."""
    return from_parameters("tiny", method, 0, **{
        "source": str(base), "revision": "", "reward": "rewards_for_tests:coin", "steps": 3, "problems_per_step": 4,
        "n_train": 12, "n_validation": 5, "n_test": 3, "max_new_tokens": 10, "eval_every": 2, "eval_k": 1, "test_k": 2,
        "micro_batch": 3, "lr": 1e-3, "save_every": 1, "keep_checkpoints": 9, **fields})


SHORT = {"steps": 2, "mini_batch": 2, "updates_per_batch": 2, "eval_every": 0, "n_validation": 0, "n_test": 0}
"""Over before a rounding error can lead to another sampled token, after which two runs are two runs."""
CASES = {
    "adapter-ema": ("sgpo", {**ADAPTER, "guided_side": "ema", "ema_decay": 0.5, "layout": "packed"}),
    "all-checkpointed": ("sgpo", {"activation_checkpointing": True, "weighting": "fixed", "max_grad_norm": 0.05,
                                  "temperature": 0.8}),  # at 1 a draw lies so near a bound that rounding decides it
    # one worker without a problem to validate on, and another number of batches to sample in the final test
    "reverse": ("no_grpo", {"distillation": "reverse_kl", "n_validation": 1, "rollout_batch": 3}),
    "luffy": ("luffy8", {}),
    "hpt": ("hpt", {"expert_gate": 5}),
    "sft": ("sft", {}),
    "short-adapter": ("sgpo", {**ADAPTER, **SHORT}),
    "short-all": ("sgpo", SHORT),
}
RESUMED = ("short-adapter", "short-all")
MIXED = {"compute_dtype": "bfloat16", "lr": 1e-6, "eval_every": 0, "n_test": 0}


def weights(source: str) -> torch.Tensor:
    """All trained weights in one row. AdamW magnifies rounding where a gradient is next to nothing, so that runs are
    compared by the length of their difference."""
    return torch.cat([p.detach().flatten() for p in open_policy(source, device="cpu").parameters()])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def done(base, root) -> dict[str, Run]:
    """Every case on one worker (CASE-1) and two (CASE-2); two of them again, broken off after the first step and taken
    up by other numbers of workers (CASE-AB). Each start of processes trains all that it can, since it takes longest."""
    configs = {name: small(base, method, **fields) for name, (method, fields) in CASES.items()}
    runs = {f"{name}-1": train(config, root=root, name=f"{name}-1") for name, config in configs.items()}
    for name in RESUMED:
        stop_after_first(configs[name], root, f"{name}-12")
    mixed = small(base, "sft", **MIXED)
    first = [*(Training(f"{name}-2", config) for name, config in configs.items()), Training("mixed-2", mixed),
             *(Training(f"{name}-2{then}", configs[name], stop=True) for name in RESUMED for then in (1, 2, 3))]
    again = [Training(f"{name}-{first}2", configs[name]) for name in RESUMED for first in (1, 2)]
    three = [Training(f"{name}-23", configs[name]) for name in RESUMED]
    for size, trainings, then in ((2, first, None), (2, again, hand_over), (3, three, None)):
        runs |= {run.folder.name: run for run in on_workers(size, root, trainings, then)}
    runs |= {f"{name}-21": train(configs[name], root=root, name=f"{name}-21") for name in RESUMED}
    return runs | {"mixed-1": train(mixed, root=root, name="mixed-1"),
                   "mixed-0": train(small(base, "sft", **MIXED | {"compute_dtype": ""}), root=root, name="mixed-0")}


def hand_over(world: World, root: Path) -> None:
    """What a sampler gets of sharded weights, and what tells it from others: files below root/handed."""
    config = from_parameters("tiny", "sgpo", 0, source=str(root / "short-all-1" / "final" / "model"), revision="")
    policy = spread(load_policy(config.model, config.model.source, 0), config, world)
    told = {"content": [policy.content()]}
    policy.save(root / "handed", torch.bfloat16)
    told["numbers"] = base_numbers(base_parameters(policy, torch.bfloat16), torch.bfloat16)
    with torch.no_grad():
        policy.parameters()[-1].to_local()[-1:].mul_(1 + 2**-20)  # each worker's last number
    told["content"].append(policy.content())
    (root / "handed" / f"worker-{world.rank}.json").write_text(json.dumps(told))


def stop_after_first(config, root: Path, name: str) -> None:
    """A run of one worker that was asked to stop."""
    folder = open_run(config, root, name).folder
    (folder / "STOP").touch()
    with pytest.raises(Stopped):
        train(config, root=root, name=name)
    (folder / "STOP").unlink()


@pytest.mark.parametrize("case", CASES)
def test_two_workers_give_the_metrics_of_one(done, case):
    one, two = done[f"{case}-1"], done[f"{case}-2"]
    assert_same_metrics(one, two)
    assert one.summary["workers"] == 1 and two.summary["workers"] == 2
    a, b, start = (weights(name) for name in (str(one.folder), str(two.folder), f"{one.folder}@0"))
    assert float((a - start).norm()) > 0 and float((a - b).norm()) < 1e-3 * float((a - start).norm())
    kept = sorted(path.name for path in (one.folder / "rollouts").glob("*"))
    assert kept == sorted(path.name for path in (two.folder / "rollouts").glob("*")) and bool(kept) == (case != "sft")
    for name in kept:  # same responses, same order
        assert (one.folder / "rollouts" / name).read_text() == (two.folder / "rollouts" / name).read_text()


def test_the_cases_hold_what_they_are_for(done):
    """Gradients of everything, clipped ones, and steps in which some problems have a target and others have none."""
    rows = [row for name, run in done.items() if name.endswith("-1") for row in run.metrics("train")]
    assert any(0 < row.get("target_share", 0) < 1 for row in rows)
    assert any(r.get("loss_expert") for r in rows) and any(r["grad_norm"] > 0.05 for r in rows)
    assert len({r["reward_autonomous"] for r in rows}) > 3


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("sizes", ["12", "21", "22", "23"])
def test_a_run_goes_on_with_another_number_of_workers(done, case, sizes):
    """To the bit with the same number."""
    run, sharded = done[f"{case}-{sizes}"], case == "short-all" and sizes[0] != "1"
    assert run.done and run.summary["workers"] == int(sizes[1])
    first = run.folder / "checkpoints" / "step-000001"
    assert (first / "sharded").exists() == sharded
    assert json.loads((first / "state.json").read_text())["workers"] == int(sizes[0])
    assert_same_metrics(done[f"{case}-{sizes[0]}"], run, 0 if sizes == "22" else TOLERANCE)


def test_a_sharded_checkpoint_is_exported_and_read(done, tmp_path):
    """Its weights are those of the one-worker checkpoint of the same step; transformers loads the export."""
    from transformers import AutoModelForCausalLM

    one, two = done["short-all-1"], done["short-all-2"]
    assert (two.folder / "checkpoints" / "step-000002" / "sharded").is_dir()
    folder = export(two.folder, tmp_path / "export", step=2)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ours, expected = torch.cat([p.detach().flatten() for p in loaded.parameters()]), weights(f"{one.folder}@2")
    assert float((ours - expected).norm()) < 1e-3 * float((expected - weights(f"{one.folder}@0")).norm())
    assert loaded.config.architectures == [type(loaded).__name__]


def test_sharded_weights_are_handed_to_a_sampler_in_its_dtype(done, root):
    """As a folder with the rounded weights; the numbers that are compared are those of a process alone."""
    told = [json.loads((root / "handed" / f"worker-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1] and len(set(told[0]["content"])) == 2
    alone = open_policy(str(done["short-all-1"].folder), device="cpu")
    assert differences(told[0]["numbers"], base_numbers(base_parameters(alone, torch.bfloat16), torch.bfloat16)) == []
    state = load_file(root / "handed" / "model" / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    model = dict(alone.model.named_parameters())
    assert state.keys() == model.keys()
    assert all(torch.equal(state[name], value.to(torch.bfloat16)) for name, value in model.items())


def test_mixed_precision_stays_near_and_keeps_float32_weights(done, base):
    """Updates far below bfloat16's spacing are kept; a process alone and two workers round alike."""
    full, alone, two = (weights(str(done[f"mixed-{n}"].folder)) - weights(str(base)) for n in "012")
    for step in (full, alone, two):
        assert step.dtype == torch.float32 and 1e-8 < float(step.abs().max()) < 1e-5
        assert float(torch.cosine_similarity(step, full, dim=0)) > 0.9
    losses = [[row["loss"] for row in done[f"mixed-{n}"].metrics("supervised")] for n in "012"]
    assert losses[1] == pytest.approx(losses[2], rel=1e-3) and losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[0] != losses[1]


def test_layers_that_fsdp_cannot_find_are_told():
    with pytest.raises(ValueError, match=r"Linear does not tell its layers to FSDP2 \(it has no _no_split_modules"):
        decoder_layers(torch.nn.Linear(2, 2))
    model = torch.nn.Linear(2, 2)
    model._no_split_modules = ["LlamaDecoderLayer"]
    with pytest.raises(ValueError, match=r"its _no_split_modules is \['LlamaDecoderLayer'\]"):
        decoder_layers(model)


def test_shares_are_woven_back_in_order():
    items = list(range(11))
    parts = [World(r, 3).share(items) for r in range(3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]] and World().share(items) == items
    assert World().woven(items) == items and World().most(4) == 4 and World().from_first("x") == "x"


@pytest.mark.parametrize(("fields", "told"), [
    ({"workers": 2}, "compute.workers: got 2, expected 1 with compute.engine='local'"),
    ({"workers": 3, "engine": "ray"}, "train.problems_per_step: got 4, expected a multiple of compute.workers = 3"),
    ({"workers": 2, "engine": "ray", "mini_batch": 3}, "train.mini_batch: got 3, expected a multiple of"),
    ({"workers": 0, "engine": "ray"}, "compute.workers: got 0, expected at least 1"),
    ({"engine": "spark"}, "compute.engine: got 'spark'"),
    ({"worker_cpus": 0}, "compute.worker_cpus: got 0"),
    ({"compute_dtype": "bfloat16", "lora_rank": 4}, "model.compute_dtype: got 'bfloat16', expected empty"),
    ({"compute_dtype": "bfloat16", "guided_side": "ema"}, "method.guided_side: got 'ema', expected 'live' where the"),
    ({"placement": "own"}, "compute.placement: got 'own', expected 'shared' with one worker"),
    ({"lora_rank": 4, "lora_targets": "q_proj,lm_head"}, "model.lora_targets: got 'q_proj,lm_head', expected no lm_h"),
])  # fmt: skip
def test_what_cannot_work_on_several_workers_is_refused(base, fields, told):
    with pytest.raises(ValueError) as error:
        small(base, "sgpo", **fields)
    assert told in str(error.value)

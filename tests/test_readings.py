"""Readings against float64 loops over the model's own logits; ties, chunks, memory; statistics; policies by name.

Shapes: N response tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from test_losses_memory import Tracker

from sgpo_lib import policy_sources, tiny
from sgpo_lib.analysis import step_table, token_readings, token_table, top_share
from sgpo_lib.config import ModelConfig, RunConfig, override
from sgpo_lib.losses.token_kl import forward_kl_guided_to_unguided
from sgpo_lib.policy import Policy, load_policy
from sgpo_lib.policy_sources import checkpoint_steps, open_policy, readings_over_training
from sgpo_lib.prompts import prompt_ids
from sgpo_lib.readings import COLUMNS, TokenReadings
from sgpo_lib.records import Problem, Rollout, RolloutGroup, Verdict
from sgpo_lib.runs import FINAL, Run, open_run
from sgpo_lib.token_statistics import DELTAS, delta_curve, lorenz, rank_correlations, spearman


def make_policy(*, tied: bool = True, dtype: torch.dtype = torch.float32, vocabulary: int = 0,
                context: int = 512) -> Policy:
    """A freshly initialised model whose distributions are far from uniform; `vocabulary` pads it beyond the tokenizer.
    """
    from transformers import Qwen3ForCausalLM

    tokenizer = tiny.build_tokenizer()
    config = tiny.build_model(tokenizer, seed=3).config
    config.tie_word_embeddings, config.vocab_size = tied, vocabulary or config.vocab_size
    config.max_position_embeddings = context
    torch.manual_seed(7)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return Policy(model.to(dtype), tokenizer, torch.device("cpu"), lora=False, context=context)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


def logits_of(policy: Policy, problem: Problem, response: tuple[int, ...], guided: bool) -> np.ndarray:
    """Float64 logits [N, V] that predict each token, from one plain pass of the whole model."""
    prompt = prompt_ids(policy.tokenizer, problem, guided=guided)
    policy.model.eval()
    with torch.no_grad():
        full = policy.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return full[len(prompt) - 1 : -1].double().numpy()


def expected(guided: np.ndarray, unguided: np.ndarray, response: tuple[int, ...]) -> dict[str, list[float]]:
    """Every column of numbers by its definition, in plain loops."""
    guided_logp, unguided_logp = (oracles.token_logps(side, response) for side in (guided, unguided))
    return {
        "forward_kl": oracles.token_kls(guided, unguided), "reverse_kl": oracles.reverse_token_kls(guided, unguided),
        "guided_logp": guided_logp, "unguided_logp": unguided_logp, "sft_loss": [-x for x in unguided_logp],
        "log_ratio": [a - b for a, b in zip(guided_logp, unguided_logp, strict=True)],
        "guided_entropy": oracles.entropies(guided), "unguided_entropy": oracles.entropies(unguided),
        "guided_rank": [1 + sum(x > row[i] for x in row) for row, i in zip(guided, response, strict=True)],
        "unguided_rank": [1 + sum(x > row[i] for x in row) for row, i in zip(unguided, response, strict=True)],
        "top1_agree": [int(a.argmax()) == int(b.argmax()) for a, b in zip(guided, unguided, strict=True)],
        "guided_missing": [0.0] * len(response), "unguided_missing": [0.0] * len(response)}


def of_token(readings: TokenReadings, i: int) -> tuple[list[int], list[float], list[float]]:
    """Alternatives of token i with their log-probabilities."""
    part = slice(readings.offset_N1[i], readings.offset_N1[i + 1])
    return (readings.alternative_M[part].tolist(), readings.guided_logp_M[part].tolist(),
            readings.unguided_logp_M[part].tolist())


# --------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float64, 1e-8, 1e-10), (torch.float32, 1e-5, 1e-5)])
def test_every_column_equals_a_float64_loop(problem, response, tied, dtype, rtol, atol):
    policy = make_policy(tied=tied, dtype=dtype)
    logits = [logits_of(policy, problem, response, guided) for guided in (True, False)]
    readings = token_readings(policy, problem, response, chunk=7)
    assert tuple(readings.table.columns) == COLUMNS and readings.exact
    assert readings.table["token_id"].tolist() == list(response)
    assert "".join(readings.table["token"]) == policy.tokenizer.decode(response)
    for name, values in expected(*logits, response).items():
        np.testing.assert_allclose(readings.table[name], values, rtol=rtol, atol=atol, err_msg=name)
    assert readings.table["forward_kl"].min() > 0.01, "the case should be one where the strategy matters"
    assert 0 < readings.table["top1_agree"].sum() < len(response)


@pytest.mark.parametrize("top", [0, 1, 5, 10_000])
def test_alternatives_are_both_sides_likeliest_and_the_sampled_token(policy, problem, response, top):
    guided, unguided = (logits_of(policy, problem, response, g) for g in (True, False))
    readings = token_readings(policy, problem, response, top=top, chunk=7)
    assert readings.offset_N1[0] == 0 and readings.offset_N1[-1] == len(readings.alternative_M)
    for i, token in enumerate(response):
        ids, guided_logp, unguided_logp = of_token(readings, i)
        best = [set(np.argsort(-side[i], kind="stable")[:top].tolist()) for side in (guided, unguided)]
        assert len(ids) == len(set(ids)) and set(ids) == best[0] | best[1] | {token}
        assert guided_logp == sorted(guided_logp, reverse=True)
        for told, side in ((guided_logp, guided), (unguided_logp, unguided)):
            np.testing.assert_allclose(told, [oracles.log_softmax(side[i])[v] for v in ids], rtol=1e-5, atol=1e-5)
    assert set(readings.alternative_M.tolist()) <= set(readings.words)
    if top == 10_000:  # then the contributions sum to the divergence
        p, q = readings.guided_logp_M.astype(np.float64), readings.unguided_logp_M.astype(np.float64)
        sums = np.add.reduceat(np.exp(p) * (p - q), readings.offset_N1[:-1])
        np.testing.assert_allclose(sums, readings.table["forward_kl"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 10_000])
def test_chunks_change_nothing(policy, problem, response, chunk):
    whole, parts = (token_readings(policy, problem, response, chunk=c) for c in (len(response), chunk))
    pd.testing.assert_frame_equal(parts.table, whole.table, rtol=1e-5, atol=1e-6)
    assert parts.alternative_M.tolist() == whole.alternative_M.tolist()
    assert parts.offset_N1.tolist() == whole.offset_N1.tolist()
    np.testing.assert_allclose(parts.guided_logp_M, whole.guided_logp_M, atol=1e-5)


def test_equally_likely_tokens_share_their_rank(problem, response):
    policy = make_policy(tied=False)
    with torch.no_grad():  # every token of the response, and its neighbour, are as likely as token 0
        head = policy.model.get_output_embeddings().weight
        for i in {*response, *(i + 1 for i in response)}:
            head[i] = head[0]
    table = token_readings(policy, problem, response).table
    guided = logits_of(policy, problem, response, True)
    assert table["guided_rank"].tolist() == [1 + int((row > row[0]).sum()) for row in guided]
    with torch.no_grad():
        head[:] = head[0]
    flat = token_readings(policy, problem, response).table
    assert (flat["guided_rank"] == 1).all() and flat["top1_agree"].all() and (flat["forward_kl"] == 0).all()
    np.testing.assert_allclose(flat["guided_entropy"], math.log(len(head)), rtol=1e-6)


def test_logits_of_half_weights_are_in_float32(problem, response):
    policy = make_policy(dtype=torch.bfloat16)
    readings = token_readings(policy, problem, response)
    policy.model.eval()
    sides = []
    for guided in (True, False):
        batch = policy.token_batch([(prompt_ids(policy.tokenizer, problem, guided=guided), response)])
        with torch.no_grad():
            sides.append((policy.response_hidden(batch).double() @ policy.head()[0].double().T).numpy())
    for name, values in expected(*sides, response).items():
        np.testing.assert_allclose(readings.table[name], values, rtol=1e-5, atol=2e-5, err_msg=name)


def test_the_divergence_is_the_one_that_trains(policy, problem, response):
    policy.model.eval()
    hidden = [policy.response_hidden(policy.token_batch([(prompt_ids(policy.tokenizer, problem, guided=g), response)]))
              for g in (True, False)]
    trained = forward_kl_guided_to_unguided(*hidden, policy.head(), 16).detach().numpy()
    np.testing.assert_allclose(token_readings(policy, problem, response).table["forward_kl"], trained, atol=2e-6)


@pytest.mark.slow
def test_memory_is_a_few_chunks_of_the_vocabulary(problem):
    n, v, chunk = 2048, 49_152, 32
    policy = make_policy(vocabulary=v, context=4096)
    response = [5 + i % 200 for i in range(n)]
    with Tracker() as tracker:
        readings = token_readings(policy, problem, response, chunk=chunk)
    assert len(readings.table) == n
    assert tracker.peak < n * v / 8, "elements alive at once, beside the weights"
    assert tracker.largest < n * v / 16
    assert "<unused" in "".join(readings.words.values())


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(policy, problem, response, training):
    policy.model.train(training)
    before = policy.fingerprint()
    token_readings(policy, problem, response)
    assert policy.model.training is training and policy.fingerprint() == before
    with pytest.raises(ValueError):
        token_readings(policy, problem, response * 100)
    assert policy.model.training is training


def test_what_cannot_be_read_is_refused(policy, problem, response):
    bare = Problem(problem.id, problem.prompt, problem.answer)
    for change, message in (
            ({"problem": bare}, f"problem {problem.id} has no strategy"), ({"response": ()}, "a response of 0 tokens"),
            ({"response": (1, 290)}, "token id 290, expected 0 to 289. Take"), ({"response": (-1,)}, "token id -1"),
            ({"response": response * 40}, r"guided prompt of \d+ and a response of \d+ tokens, expected at most 512"),
            ({"top": -1}, "got top=-1 and chunk=256"), ({"chunk": 0}, "chunk=0, expected at least 0 and 1")):
        with pytest.raises(ValueError, match=message):
            token_readings(**({"policy": policy, "problem": problem, "response": response} | change))


def test_tables_of_steps_and_of_groups(policy, problem, response):
    readings = token_readings(policy, problem, response)
    table = step_table(readings, delta=0.5)
    assert table["kl"].tolist() == readings.table["forward_kl"].tolist()
    assert table["kept"].tolist() == [kl <= 0.5 for kl in readings.table["forward_kl"]]
    rollouts = [Rollout(problem.id, True, i, (), response, "", "end", verdict=Verdict(status, 0.0))
                for i, status in enumerate(("correct", "wrong"))]
    groups = [RolloutGroup(problem, [], rollouts)]
    assert token_table(policy, groups)["response"].nunique() == 1
    both = token_table(policy, groups, only_correct=False)
    assert both["response"].nunique() == 2 and set(both["problem"]) == {problem.id} and not both["critical"].any()


# -------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("values", [[1.0, 3.0], [0.0] * 9 + [5.0], [0.5] * 20, [0.0, 0.1, 4.0, 2.0, 0.3] * 8])
def test_lorenz_curve_meets_the_shares_of_the_top(values):
    curve = lorenz(values)
    assert curve.iloc[0].tolist() == [0.0, 0.0] and curve.iloc[-1].tolist() == pytest.approx([1.0, 1.0])
    assert len(curve) == len(values) + 1 and (np.diff(curve["share_of_mass"], n=2) <= 1e-12).all(), "concave"
    for i, row in enumerate(curve.itertuples()):
        if i:
            assert row.share_of_mass == pytest.approx(top_share(pd.DataFrame({"kl": values}), row.share_of_tokens))
            assert row.share_of_mass == pytest.approx(sum(sorted(values)[-i:]) / sum(values))


def test_shares_of_nothing():
    assert lorenz([]).values.tolist() == [[0.0, 0.0]]
    assert math.isnan(lorenz([0.0, 0.0])["share_of_mass"].iloc[-1])
    assert delta_curve([0.0], [1.0])["mass_masked"].isna().all()
    for values in ([-0.1, 1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="expected none below 0 and none unknown"):
            lorenz(values)
    with pytest.raises(ValueError, match="got no tokens"):
        delta_curve([])


def test_delta_curve_by_hand():
    curve = delta_curve([2.0, 0.5, 1.0, 0.5], [0.4, 0.5, 1.0, math.inf])
    assert curve["tokens_masked"].tolist() == [1.0, 0.5, 0.25, 0.0], "at delta itself a token is kept (Eq. 5)"
    assert curve["mass_masked"].tolist() == [1.0, 0.75, 0.5, 0.0]
    rng = np.random.default_rng(0)
    values = rng.exponential(size=200)
    for row in delta_curve(values.tolist()).itertuples():
        assert row.tokens_masked == pytest.approx((values > row.delta).mean())
        assert row.mass_masked == pytest.approx(values[values > row.delta].sum() / values.sum())
    assert {0.01, 0.1, 1.0, 10.0} < set(DELTAS)


def test_rank_correlation_by_definition():
    """Without ties: 1 - 6 sum d^2 / (n (n^2 - 1))."""
    rng = random.Random(1)
    for _ in range(5):
        a, b = ([rng.random() for _ in range(12)] for _ in range(2))
        ranks = [[sorted(side).index(x) + 1 for x in side] for side in (a, b)]
        squares = sum((x - y) ** 2 for x, y in zip(*ranks, strict=True))
        assert spearman(a, b) == pytest.approx(1 - 6 * squares / (12 * (12**2 - 1)))
        assert spearman(a, [math.exp(3 * x) for x in a]) == pytest.approx(1)
    assert spearman([1, 2, 2, 4], [10, 20, 20, 40]) == pytest.approx(1), "ties have their mean rank"
    assert spearman([1, 1, 2, 2], [1, 2, 1, 2]) == pytest.approx(0)
    assert math.isnan(spearman([1, 1], [1, 2])) and math.isnan(spearman([], []))
    with pytest.raises(ValueError, match="got 1 and 2 values"):
        spearman([1], [1, 2])


def test_rank_correlations_are_means_over_problems():
    """Problem p has two responses, of correlations 1 and -1, problem q one of 1: (0 + 1) / 2, whatever their scales."""
    rows = [("p", 0, x, x) for x in (1, 2, 3)] + [("p", 1, x, -x) for x in (1, 2, 3)]
    rows += [("q", 2, 100 * x, 7 * x) for x in (1, 2, 3)] + [("q", 3, x, 5) for x in (1, 2)]
    tokens = pd.DataFrame(rows, columns=["problem", "response", "kl", "sft_loss"]).assign(reverse_kl=lambda t: t["kl"])
    told = rank_correlations(tokens).set_index("other")
    assert told.loc["sft_loss", "correlation"] == pytest.approx(0.5)
    assert (told.loc["sft_loss", "problems"], told.loc["sft_loss", "responses"]) == (2, 3), "one side constant: no rank"
    assert told.loc["sft_loss", ["low", "high"]].tolist() == [-1, 1], "two problems say next to nothing"
    assert told.loc["reverse_kl", ["correlation", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    alone = rank_correlations(tokens[tokens["problem"] == "p"])
    assert alone["low"].isna().all() and alone["correlation"].notna().all()
    with pytest.raises(ValueError, match="no column 'sft_loss'; there are problem"):
        rank_correlations(tokens.drop(columns="sft_loss"))


def test_the_interval_covers():
    """Correlations of 12 problems about .4: the interval holds the true one in about 95 of 100 draws.

    Of two normal variables with correlation r, Spearman's is 6/pi asin(r/2).
    """
    rng, held = np.random.default_rng(3), 0
    for i in range(100):
        rows = []
        for p in range(12):
            x = rng.normal(size=80)
            y = 0.4 * x + rng.normal(size=80) * math.sqrt(1 - 0.16)
            rows.append(pd.DataFrame({"problem": p, "response": p, "kl": x, "sft_loss": y}))
        told = rank_correlations(pd.concat(rows), others=["sft_loss"], draws=400, seed=i).iloc[0]
        held += told["low"] <= 6 / math.pi * math.asin(0.4 / 2) <= told["high"]
    assert held >= 90


# --------------------------------------------------------------------------------------------------- policies by name


def run_of(base: Path, root: Path, name: str, *, done: bool = True, rank: int = 0, init_from: str = "") -> Run:
    """A run with checkpoints of the steps 10 and 20, whose weights are those of the start, scaled step by step."""
    config = override(RunConfig(), {"model.source": str(base), "model.lora_rank": rank, "train.init_from": init_from,
                                    "model.device": "cpu"})
    run = open_run(config, root, name)
    policy = load_policy(config.model, str(base), config.seed)
    for step in (10, 20):
        scaled(policy, 1.5 if not rank else 1.0, shift=0.02 if rank else 0.0)
        run.save_checkpoint(step, policy.save, {}, keep=9)
    if done:
        run.save_final(policy.save)
        run.finish({})
    return run


@torch.no_grad()
def scaled(policy: Policy, factor: float, shift: float = 0.0) -> None:
    for parameter in policy.parameters():
        parameter.mul_(factor).add_(shift)


@pytest.fixture(scope="module", params=[0, 4], ids=["all weights", "LoRA"])
def run(request, base, runs_folder) -> Run:
    return run_of(base, runs_folder, f"named-{request.param}", rank=request.param)


def read(policy: Policy, problem: Problem, response: tuple[int, ...]) -> list[float]:
    return token_readings(policy, problem, response).table["forward_kl"].tolist()


def test_runs_and_their_checkpoints_are_opened_by_name(run, base, problem, response):
    assert checkpoint_steps(run) == checkpoint_steps(run.folder.name) == [10, 20]
    at = {step: read(open_policy(f"{run.folder.name}@{step}"), problem, response) for step in (0, 10, 20)}
    assert at[0] == read(open_policy(str(base)), problem, response)
    assert at[0] != at[10] != at[20]
    for same in (run.folder.name, str(run.folder), str(run.folder / FINAL), f"{run.folder}@20",
                 str(run.checkpoints()[1])):
        np.testing.assert_allclose(read(open_policy(same), problem, response), at[20], atol=1e-6, err_msg=same)
    folder = run.checkpoints()[0] / ("adapter" if run.config.model.lora_rank else "model")
    np.testing.assert_allclose(read(open_policy(str(folder)), problem, response), at[10], atol=1e-6)
    assert open_policy(run.folder.name, dtype="bfloat16").head()[0].dtype == torch.bfloat16


def test_one_response_over_training(run, problem, response):
    found = readings_over_training(run, problem, response, top=2)
    assert [r.label for r in found] == ["step 0", "step 10", "step 20"]
    for step, readings in zip((0, 10, 20), found, strict=True):
        alone = token_readings(open_policy(f"{run.folder.name}@{step}"), problem, response, top=2)
        pd.testing.assert_frame_equal(readings.table, alone.table)
        assert readings.alternative_M.tolist() == alone.alternative_M.tolist()
    assert [r.label for r in readings_over_training(run.folder.name, problem, response, [20, 10])] == [
        "step 10", "step 20"]
    with pytest.raises(ValueError, match="got step '15', but it has checkpoints of the steps: 10, 20; 0 is its start"):
        readings_over_training(run, problem, response, [10, 15])


def test_a_run_that_started_from_another(base, runs_folder, problem, response):
    first = run_of(base, runs_folder, "first")
    second = run_of(base, runs_folder, "second", init_from="first")
    start = read(open_policy("first"), problem, response)
    assert read(open_policy("second@0"), problem, response) == start
    told = readings_over_training(second, problem, response, [0])[0].table["forward_kl"].tolist()
    assert told == start != read(open_policy(f"{first.folder}@0"), problem, response)


def test_names_that_open_nothing(base, runs_folder, tmp_path, monkeypatch):
    run_of(base, runs_folder, "half-done", done=False)

    def refused(config: ModelConfig, source: str, seed: int) -> Policy:
        raise ValueError(f"model.source: nobody serves {source}")

    monkeypatch.setattr(policy_sources, "load_policy", refused)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for source, message in (
            ("half-done", r"run half-done has not finished \(state: stopped\).*as in half-done@20 \(checkpoints of the "
                          "steps: 10, 20; 0 is its start"),
            ("half-done@30", "got step '30', but it has checkpoints of the steps: 10, 20"),
            ("half-done@last", "got step 'last'"), ("half-dune@10", "no run 'half-dune'.*close to it half-done"),
            ("@3", "no run ''"), (str(tmp_path / "empty"), "the folder holds nothing; expected config.json"),
            (str(tmp_path / "other"), "the folder holds notes.txt; expected"),
            ("half-dome", "no folder and no run below .*close to it half-done.*or a hub id: OWNER/NAME"),
            ("o/half-dome", "as a hub id it cannot be opened: model.source: nobody serves o/half-dome"),
            (str(tmp_path / "absent" / "x"), "is no folder, no run below")):
        with pytest.raises(ValueError, match=message):
            open_policy(source)
    assert checkpoint_steps("half-done") == [10, 20]
    with pytest.raises(ValueError, match="no run at nothing-of-this"):
        checkpoint_steps("nothing-of-this")


def adapter(base: Path, folder: Path, **fields: Any) -> Path:
    """An adapter as PEFT saves it, its weights not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    given = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_rslora": True} | fields
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **given))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def test_a_foreign_adapter_equals_its_merged_model(base, tmp_path, problem, response):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = adapter(base, tmp_path / "adapter")
    policy = open_policy(str(folder))
    merged: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).merge_and_unload()
    whole = dataclasses.replace(policy, model=merged, lora=False)
    np.testing.assert_allclose(read(policy, problem, response), read(whole, problem, response), atol=1e-5)
    assert not np.allclose(read(policy, problem, response), read(open_policy(str(base)), problem, response), atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about the adapter of the output matrix
def test_adapters_that_cannot_be_opened(base, tmp_path):
    def changed(name: str, **fields: Any) -> str:
        folder = adapter(base, tmp_path / name)
        told = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(told | fields))
        return str(folder)

    gone = changed("gone", base_model_name_or_path=str(tmp_path / "not" / "here"))
    for source, message in (
            (gone, r"the adapter's base '.*here' cannot be opened .*open_policy\(\.\.\., base=\.\.\.\)"),
            (changed("unnamed", base_model_name_or_path=None), "names no base model"),
            (changed("other", peft_type="IA3"), "got an adapter of type IA3, expected LORA. Merge"),
            (changed("shape", r=2), "the adapter does not fit"),
            (str(adapter(base, tmp_path / "head", target_modules=["lm_head"])), "changes the output matrix")):
        with pytest.raises(ValueError, match=message):
            open_policy(source)
    assert open_policy(gone, base=str(base)).lora
    (tmp_path / "gone" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: there is no such file"):
        open_policy(gone, base=str(base))
    (tmp_path / "gone" / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"cannot be read .*expected the file that PEFT writes"):
        open_policy(gone)

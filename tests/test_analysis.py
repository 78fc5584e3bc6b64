"""Token quantities against float64 sums over the model's own logits; reasoning steps."""

from __future__ import annotations

import math
import random

import numpy as np
import oracles
import pandas as pd
import pytest
import torch

from sgpo_lib import tiny
from sgpo_lib.analysis import (
    rank_auc,
    selectivity,
    step_frame,
    step_of_tokens,
    token_frame,
    top_share,
)
from sgpo_lib.policy import Policy
from sgpo_lib.prompts import prompt_ids
from sgpo_lib.readings import COLUMNS
from sgpo_lib.records import Problem
from sgpo_lib.token_text import token_texts


@pytest.fixture(scope="module")
def policy() -> Policy:
    """A freshly initialised model, its weights enlarged so that its distributions are far from uniform."""
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(tokenizer, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return Policy(model, tokenizer, torch.device("cpu"), lora=False, context=512)


def logits_before_each_token(policy: Policy, prompt: tuple[int, ...], response: tuple[int, ...]) -> np.ndarray:
    """Float64 logits that predict each response token, from one plain forward pass over the whole sequence."""
    policy.model.eval()
    with torch.no_grad():
        full = policy.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return full[len(prompt) - 1 : -1].double().numpy()


# ------------------------------------------------------------------------------------------------------ token_frame


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_every_column_equals_the_sum_over_the_vocabulary(policy, problem, response, chunk):
    guided, unguided = (logits_before_each_token(policy, prompt_ids(policy.tokenizer, problem, guided=g), response)
                        for g in (True, False))
    middle = sorted(oracles.token_kls(guided, unguided))[len(response) // 2 - 1 : len(response) // 2 + 1]
    delta = sum(middle) / 2
    frame = token_frame(policy, problem, response, delta=delta, chunk=chunk)
    assert list(frame.columns) == [*(c.replace("forward_kl", "kl") for c in COLUMNS), "step", "kept"]
    expected = {
        "kl": oracles.token_kls(guided, unguided),
        "guided_logp": oracles.token_logps(guided, response),
        "unguided_logp": oracles.token_logps(unguided, response),
        "guided_entropy": oracles.entropies(guided), "unguided_entropy": oracles.entropies(unguided)}
    for name, values in expected.items():
        np.testing.assert_allclose(frame[name], values, rtol=1e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(frame["sft_loss"], -np.array(expected["unguided_logp"]), rtol=1e-4, atol=2e-5)
    assert frame["kept"].tolist() == [kl <= delta for kl in expected["kl"]]
    assert frame["kept"].sum() == len(response) // 2
    assert frame["kl"].min() > 0.01, "the case should be one where the strategy matters"


def test_kept_is_at_most_delta(policy, problem, response):
    kl = token_frame(policy, problem, response)["kl"]
    delta = float(kl.iloc[2])
    kept = token_frame(policy, problem, response, delta=delta)["kept"]
    assert kept.iloc[2]
    assert kept.tolist() == (kl <= delta).tolist()
    assert token_frame(policy, problem, response, delta=float("inf"))["kept"].all()


def test_one_token_is_enough_and_none_is_refused(policy, problem, response):
    assert len(token_frame(policy, problem, response[:1])) == 1
    with pytest.raises(ValueError, match="response of 0 tokens"):
        token_frame(policy, problem, ())


def test_a_problem_without_a_strategy_is_refused(policy, problem, response):
    bare = Problem(problem.id, problem.prompt, problem.answer)
    with pytest.raises(ValueError, match=f"problem {problem.id} has no strategy"):
        token_frame(policy, bare, response)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(policy, problem, response, training):
    policy.model.train(training)
    before = policy.fingerprint()
    token_frame(policy, problem, response)
    assert policy.model.training is training
    assert policy.fingerprint() == before
    assert all(p.grad is None for p in policy.parameters())


# ------------------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("tokens, steps", [
    ("one| line|\n|two| lines", "00011"), ("a;|b", "01"), ("end|.", "00"), ("end|.|\n|\n", "0000"),
    ("x|;| y|;| z", "00112"), ("Why|?| Because|!| So|:| done", "0011223"), ("\n|\n|a|.|\n|\n|b", "0000001"),
    ("a| b|.| |C| d", "000011"), ("is| 3|.| Then| 4", "00011"),
    ("add| 3|.|5|\n|then", "000001"), ("2|.|5| +| 1|.|25", "0000000"), ("pi| =| 3.|14| so", "00000"),
    ("1|,|000| and| 2|/|3", "0000000"),
    ("is| 3|.| |4| more", "000011"), ("is| 3|.|\n|4| more", "000011"), ("v1.|\n\n|2 is", "001"),
    ("1|.| Add| it|.| 2|.| Go", "00000111"),
])  # fmt: skip
def test_steps_end_with_a_sentence_a_semicolon_or_a_line_but_not_with_a_decimal_point(tokens, steps):
    assert "".join(map(str, step_of_tokens(tokens.split("|")))) == steps


def test_steps_of_nothing_and_of_a_testbed_solution(policy, response):
    assert step_of_tokens([]) == []
    steps = step_of_tokens(token_texts(policy.tokenizer, response))
    assert steps == sorted(steps)
    assert steps[-1] == token_texts(policy.tokenizer, response).count(" ;")


def frame_of(tokens: list[str], kl: list[float], steps: list[int] | None = None) -> pd.DataFrame:
    return pd.DataFrame({"token": tokens, "step": steps or [0] * len(tokens), "kl": kl,
                         "sft_loss": [2 * x for x in kl], "guided_logp": -0.5, "unguided_logp": -1.0})


def test_steps_are_summed_up_by_their_means():
    found = step_frame(frame_of(["a", " b", ".\n", "c"], [0.1, 0.2, 0.6, 1.0], [0, 0, 0, 1]))
    assert found["text"].tolist() == ["a b.", "c"]
    assert found["tokens"].tolist() == [3, 1]
    assert found["kl"].tolist() == pytest.approx([0.3, 1.0])
    assert found["sft_loss"].tolist() == pytest.approx([0.6, 2.0])
    assert found["step"].tolist() == [0, 1]


@pytest.mark.parametrize("kl, share, expected", [
    ([1.0] * 10, 0.1, 0.1), ([0.0] * 9 + [5.0], 0.1, 1.0), ([1.0, 3.0], 0.1, 0.75), ([0.0, 0.0], 0.5, 0.0),
    ([4.0, 1.0, 3.0, 2.0], 0.5, 0.7),
])  # fmt: skip
def test_share_of_the_top_tokens(kl, share, expected):
    assert top_share(frame_of(["x"] * len(kl), kl), share) == pytest.approx(expected)


# --- selectivity ------------------------------------------------------------------------------------------------
def pairwise_auc(score: list[float], positive: list[bool]) -> float:
    """By its definition: over all pairs of a positive and another."""
    pairs = [(a, b) for a, p in zip(score, positive, strict=True) if p
             for b, q in zip(score, positive, strict=True) if not q]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order(seed):
    rng = random.Random(seed)
    score = [rng.choice([0.0, 0.1, 0.5, rng.random()]) for _ in range(60)]
    positive = [rng.random() < 0.3 for _ in score]
    assert rank_auc(score, positive) == pytest.approx(pairwise_auc(score, positive), abs=1e-12)


def test_auc_by_hand():
    assert rank_auc([0.9, 0.1, 0.8], [True, False, True]) == 1.0
    assert rank_auc([0.9, 0.1, 0.8], [False, True, False]) == 0.0
    assert rank_auc([0.5, 0.5], [True, False]) == 0.5
    assert math.isnan(rank_auc([0.5, 0.6], [True, True])) and math.isnan(rank_auc([], []))


def test_selectivity_by_hand():
    """Two of five tokens are critical; the divergence ranks them first and third, the loss last and first."""
    tokens = pd.DataFrame({"kl": [0.6, 0.1, 0.2, 0.3, 0.0], "sft_loss": [0.0, 1.0, 4.0, 2.0, 1.0]})
    told = selectivity(tokens, [True, False, True, False, False])
    assert told == pytest.approx({
        "token_share": 0.4, "kl_share": 0.8 / 1.2, "kl_auc": 5 / 6, "kl_precision": 0.5,
        "sft_share": 0.5, "sft_auc": 0.5, "sft_precision": 0.5})
    none = selectivity(tokens, [False] * 5)
    assert none["kl_share"] == 0 and math.isnan(none["kl_auc"]) and math.isnan(none["kl_precision"])

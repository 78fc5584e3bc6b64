"""Padding, shifting and masking against naive loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from sgpo_lib.batching import TokenBatch, micro_batches
from sgpo_lib.losses.token_kl import token_logp_and_entropy

MODEST = settings(max_examples=40, deadline=None, derandomize=True)
PAD = 0
EOS = 1
VOCABULARY = 6
tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)
some_rows = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6)
pad_ids = st.sampled_from([PAD, EOS])
"""Rows hold both ids anywhere; EOS as the pad id is the case where ids cannot say what is padding."""


def naive(rows: list[tuple[list[int], list[int]]]) -> list[tuple[int, int, int]]:
    """(row, position of the predicting state, token) of every response token, in row order."""
    found = []
    for b, (prompt, response) in enumerate(rows):
        sequence = prompt + response
        found += [(b, position - 1, sequence[position]) for position in range(len(prompt), len(sequence))]
    return found


@MODEST
@given(some_rows, pad_ids)
def test_predictor_target_and_row_match_a_naive_loop(rows, pad_id):
    batch = TokenBatch.build(rows, pad_id)
    width = batch.input_ids_BS.shape[1]
    # a model whose hidden state is its own place: (row, position)
    hidden_BS2 = torch.stack(torch.meshgrid(torch.arange(len(rows)), torch.arange(width), indexing="ij"), dim=-1)
    places_N2 = hidden_BS2.flatten(0, 1)[batch.predictor_N]
    got = [(*place, token) for place, token in zip(places_N2.tolist(), batch.target_N.tolist(), strict=True)]
    assert got == naive(rows)
    assert batch.row_N.tolist() == [b for b, _, _ in naive(rows)]
    assert batch.length_B.tolist() == [len(response) for _, response in rows]


@MODEST
@given(some_rows, pad_ids)
def test_sequences_are_padded_on_the_right_only(rows, pad_id):
    batch = TokenBatch.build(rows, pad_id)
    width = max(len(p) + len(r) for p, r in rows)
    assert batch.input_ids_BS.shape == batch.attention_mask_BS.shape == (len(rows), width)
    for b, (prompt, response) in enumerate(rows):
        used = len(prompt) + len(response)
        assert batch.input_ids_BS[b].tolist() == prompt + response + [pad_id] * (width - used)
        assert batch.attention_mask_BS[b].tolist() == [1] * used + [0] * (width - used)


@MODEST
@given(some_rows, pad_ids)
def test_a_model_that_knows_the_next_token_is_certain_of_every_target(rows, pad_id):
    batch = TokenBatch.build(rows, pad_id)
    following_BS = batch.input_ids_BS.roll(-1, dims=1)
    hidden_BSV = 60.0 * torch.nn.functional.one_hot(following_BS, VOCABULARY).to(torch.float64)
    hidden_NV = hidden_BSV.flatten(0, 1)[batch.predictor_N]
    head_VV = torch.eye(VOCABULARY, dtype=torch.float64)
    logp_N, _ = token_logp_and_entropy(hidden_NV, batch.target_N, head_VV, None, 4)
    assert logp_N.abs().max() < 1e-20


@MODEST
@given(some_rows)
def test_the_end_token_counts_and_padding_never_does_though_they_share_an_id(rows):
    rows = [(prompt, [*response, EOS]) for prompt, response in rows]
    batch = TokenBatch.build(rows, pad_id=EOS)
    target = batch.target_N.tolist()
    assert target.count(EOS) == sum(response.count(EOS) for _, response in rows)
    assert batch.length_B.sum() == len(target)
    ends = batch.length_B.cumsum(0) - 1
    assert all(target[i] == EOS for i in ends.tolist())
    # neither the predicting state nor the predicted token is padding
    seen = batch.attention_mask_BS.flatten()
    assert seen[batch.predictor_N].all()
    assert seen[batch.predictor_N + 1].all()


@MODEST
@given(some_rows)
def test_the_pad_id_changes_padding_only(rows):
    a, b = TokenBatch.build(rows, PAD), TokenBatch.build(rows, EOS)
    for name in ("attention_mask_BS", "predictor_N", "target_N", "row_N", "length_B"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    differs = a.input_ids_BS != b.input_ids_BS
    assert torch.equal(differs, a.attention_mask_BS == 0)


@MODEST
@given(st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=5))
def test_two_prompts_of_the_same_responses_give_the_same_tokens_in_the_same_order(triples):
    unguided = TokenBatch.build([(p, r) for p, _, r in triples], PAD)
    guided = TokenBatch.build([(s + p, r) for p, s, r in triples], PAD)
    for name in ("target_N", "row_N", "length_B"):
        assert torch.equal(getattr(unguided, name), getattr(guided, name)), name
    assert unguided.predictor_N.shape == guided.predictor_N.shape


@MODEST
@given(some_rows)
def test_spread_repeats_a_row_value_once_per_response_token(rows):
    batch = TokenBatch.build(rows, PAD)
    values = [0.5 + b for b in range(len(rows))]
    expected = [values[b] for b, (_, response) in enumerate(rows) for _ in response]
    assert batch.spread(torch.tensor(values)).tolist() == expected


def test_the_smallest_row_is_one_token_after_one_token():
    batch = TokenBatch.build([([4], [5])], PAD)
    assert batch.input_ids_BS.tolist() == [[4, 5]]
    assert (batch.predictor_N.tolist(), batch.target_N.tolist(), batch.length_B.tolist()) == ([0], [5], [1])


@pytest.mark.parametrize("bad", [([], [3]), ([3], []), ([], [])])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_empty_prompt_or_response_raises_and_names_its_row(bad, position):
    rows = [([1, 2], [3]), ([1], [2, 3])]
    rows.insert(position, bad)
    with pytest.raises(ValueError, match=f"row {position}"):
        TokenBatch.build(rows, PAD)


def test_a_batch_without_rows_raises():
    with pytest.raises(ValueError):
        TokenBatch.build([], PAD)


def test_shapes_are_checked():
    batch = TokenBatch.build([([1], [2, 3])], PAD)
    with pytest.raises(TypeCheckError):
        batch.spread(torch.zeros(1, 1))
    with pytest.raises(TypeCheckError):
        batch.spread(torch.zeros(1, dtype=torch.long))


@MODEST
@given(some_rows, st.integers(1, 8))
def test_micro_batches_are_a_partition(rows, size):
    groups = list(micro_batches(rows, size))
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    assert all(len(group) == size for group in groups[:-1])
    assert 1 <= len(groups[-1]) <= size
    assert groups == list(micro_batches(rows, size))  # the same every time


@MODEST
@given(some_rows, st.integers(1, 8))
def test_micro_batches_hold_rows_of_neighbouring_lengths(rows, size):
    lengths = [[len(rows[i][0]) + len(rows[i][1]) for i in group] for group in micro_batches(rows, size)]
    for before, after in itertools.pairwise(lengths):
        assert max(before) <= min(after)


def test_no_rows_give_no_micro_batches():
    assert list(micro_batches([], 4)) == []


def test_a_micro_batch_size_of_zero_raises():
    with pytest.raises(ValueError):
        list(micro_batches([([1], [2])], 0))

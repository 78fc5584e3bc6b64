"""Padding, packing, shifting and masking: index by index against naive loops, and through a transformer against each
sequence alone.

Shapes: B rows, S padded (or packed) length, N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from sgpo_lib import tiny
from sgpo_lib.batching import LAYOUTS, TokenBatch, micro_batches
from sgpo_lib.losses.distillation import clipped_kl_loss
from sgpo_lib.losses.grpo import grpo_loss
from sgpo_lib.losses.head import Head
from sgpo_lib.losses.masked import response_mean_weights
from sgpo_lib.losses.token_kl import forward_kl_guided_to_unguided, token_logp_and_entropy
from sgpo_lib.policy import Policy, require_layout

MODEST = settings(max_examples=40, deadline=None, derandomize=True)
PAD, EOS, VOCABULARY = 0, 1, 6
tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)
some_rows = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6)
layouts = st.sampled_from(LAYOUTS)
whole_layouts = st.sampled_from(LAYOUTS[:3])  # each row whole
pad_ids = st.sampled_from([PAD, EOS])
"""Rows hold both ids anywhere; EOS as the pad id is the case where ids cannot say what is padding."""
Rows = list[tuple[list[int], list[int]]]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

# Index by index -------------------------------------------------------------------------------------------------------


def flat(batch: TokenBatch) -> list[tuple[int, int]]:
    """(token, position) of every place, padding included."""
    return list(zip(batch.input_ids_RS.flatten().tolist(), batch.position_ids_RS.flatten().tolist(), strict=True))


@MODEST
@given(some_rows, pad_ids, whole_layouts)
def test_every_token_and_position_is_where_the_layout_says(rows, pad_id, layout):
    batch = TokenBatch.build(rows, pad_id, layout=layout)
    width = max(len(p) + len(r) for p, r in rows)
    expected, mask = [], []
    for prompt, response in rows:
        sequence = [(token, position) for position, token in enumerate(prompt + response)]
        gap = [(pad_id, 0)] * (width - len(sequence))
        expected += {"right": sequence + gap, "left": gap + sequence, "packed": sequence}[layout]
        ones, zeros = [1] * len(sequence), [0] * len(gap)
        mask += {"right": ones + zeros, "left": zeros + ones, "packed": []}[layout]
    assert flat(batch) == expected
    assert batch.input_ids_RS.shape == ((1, len(expected)) if layout == "packed" else (len(rows), width))
    if layout == "packed":
        assert batch.attention_mask_RS is None
    else:
        assert batch.attention_mask_RS.flatten().tolist() == mask


@MODEST
@given(some_rows, pad_ids, whole_layouts)
def test_predictor_target_and_row_match_a_naive_loop(rows, pad_id, layout):
    batch = TokenBatch.build(rows, pad_id, layout=layout)
    width, offset = max(len(p) + len(r) for p, r in rows), 0
    expected = []
    for b, (prompt, response) in enumerate(rows):
        used = len(prompt) + len(response)
        start = {"right": b * width, "left": b * width + width - used, "packed": offset}[layout]
        expected += [(start + len(prompt) + t - 1, token, b) for t, token in enumerate(response)]
        offset += used
    assert list(zip(*(x.tolist() for x in (batch.predictor_N, batch.target_N, batch.row_N)), strict=True)) == expected
    assert batch.length_B.tolist() == [len(response) for _, response in rows]
    assert batch.input_ids_RS.flatten()[batch.predictor_N + 1].tolist() == [token for _, token, _ in expected]


@MODEST
@given(some_rows, layouts)
def test_the_end_token_counts_and_padding_never_does_though_they_share_an_id(rows, layout):
    rows = [(prompt, [*response, EOS]) for prompt, response in rows]
    batch = TokenBatch.build(rows, pad_id=EOS, layout=layout)
    target = batch.target_N.tolist()
    assert target.count(EOS) == sum(response.count(EOS) for _, response in rows)
    assert batch.length_B.sum() == len(target)
    assert all(target[i] == EOS for i in (batch.length_B.cumsum(0) - 1).tolist())
    if batch.attention_mask_RS is not None:  # neither the predicting state nor the predicted token is padding
        seen = batch.attention_mask_RS.flatten()
        assert seen[batch.predictor_N].all() and seen[batch.predictor_N + 1].all()


@MODEST
@given(some_rows, whole_layouts)
def test_the_pad_id_changes_padding_only(rows, layout):
    a, b = (TokenBatch.build(rows, pad_id, layout=layout) for pad_id in (PAD, EOS))
    for name in ("position_ids_RS", "predictor_N", "target_N", "row_N", "length_B"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    differs = a.input_ids_RS != b.input_ids_RS
    assert torch.equal(differs, torch.zeros_like(differs) if layout == "packed" else a.attention_mask_RS == 0)


@MODEST
@given(st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=5), layouts, layouts)
def test_two_prompts_of_the_same_responses_give_the_same_tokens_in_the_same_order(triples, layout, other):
    unguided = TokenBatch.build([(p, r) for p, _, r in triples], PAD, layout=layout)
    guided = TokenBatch.build([(s + p, r) for p, s, r in triples], PAD, layout=other)
    for name in ("target_N", "row_N", "length_B"):
        assert torch.equal(getattr(unguided, name), getattr(guided, name)), name
    assert unguided.predictor_N.shape == guided.predictor_N.shape


@MODEST
@given(some_rows, layouts)
def test_spread_repeats_a_row_value_once_per_response_token(rows, layout):
    batch = TokenBatch.build(rows, PAD, layout=layout)
    values = [0.5 + b for b in range(len(rows))]
    expected = [values[b] for b, (_, response) in enumerate(rows) for _ in response]
    assert batch.spread(torch.tensor(values)).tolist() == expected


@every_layout
def test_the_smallest_row_is_one_token_after_one_token(layout):
    batch = TokenBatch.build([([4], [5])], PAD, layout=layout)
    assert batch.input_ids_RS.tolist() == [[4, 5]]
    assert (batch.predictor_N.tolist(), batch.target_N.tolist(), batch.length_B.tolist()) == ([0], [5], [1])


@pytest.mark.parametrize("bad", [([], [3]), ([3], []), ([], [])])
@pytest.mark.parametrize("position", [0, 1, 2])
@every_layout
def test_an_empty_prompt_or_response_raises_and_names_its_row(bad, position, layout):
    rows = [([1, 2], [3]), ([1], [2, 3])]
    rows.insert(position, bad)
    with pytest.raises(ValueError, match=f"row {position}"):
        TokenBatch.build(rows, PAD, layout=layout)


def test_a_batch_without_rows_and_an_unknown_layout_raise():
    with pytest.raises(ValueError, match="at least one row"):
        TokenBatch.build([], PAD)
    with pytest.raises(ValueError, match=r"layout: got 'middle', expected one of right, left, packed"):
        TokenBatch.build([([1], [2])], PAD, layout="middle")


def test_shapes_are_checked():
    batch = TokenBatch.build([([1], [2, 3])], PAD)
    with pytest.raises(TypeCheckError):
        batch.spread(torch.zeros(1, 1))
    with pytest.raises(TypeCheckError):
        batch.spread(torch.zeros(1, dtype=torch.long))


@MODEST
@given(some_rows, st.integers(1, 8))
def test_micro_batches_are_a_partition_into_rows_of_neighbouring_lengths(rows, size):
    groups = list(micro_batches(rows, size))
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    assert all(len(group) == size for group in groups[:-1])
    assert 1 <= len(groups[-1]) <= size
    assert groups == list(micro_batches(rows, size))  # the same every time
    lengths = [[len(rows[i][0]) + len(rows[i][1]) for i in group] for group in groups]
    for before, after in itertools.pairwise(lengths):
        assert max(before) <= min(after)


def test_no_rows_give_no_micro_batches_and_a_size_of_zero_raises():
    assert list(micro_batches([], 4)) == []
    with pytest.raises(ValueError):
        list(micro_batches([([1], [2])], 0))


@MODEST
@given(st.lists(tokens, min_size=1, max_size=3), st.lists(st.tuples(st.integers(0, 2), tokens), min_size=1, max_size=7))
def test_a_shared_prompt_stands_once_and_a_token_sees_its_own_branch(prompts, chosen):
    rows = [(prompts[i % len(prompts)], response) for i, response in chosen]
    batch = TokenBatch.build(rows, PAD, layout="shared")
    places: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = []  # token, position, what it sees
    predictors, last = [], None
    for prompt, response in rows:
        if prompt != last:
            start, last = len(places), prompt
            for t, token in enumerate(prompt):
                places.append((token, t, tuple(range(start, start + t + 1))))
        seen = tuple(range(start, start + len(prompt)))
        for t, token in enumerate(response):
            predictors.append(seen[-1])
            seen = (*seen, len(places))
            places.append((token, len(prompt) + t, seen))
    assert flat(batch) == [place[:2] for place in places] and batch.tokens == len(places)
    assert batch.predictor_N.tolist() == predictors
    assert batch.target_N.tolist() == [token for _, response in rows for token in response]
    assert batch.row_N.tolist() == [i for i, (_, response) in enumerate(rows) for _ in response]
    assert [tuple(x.nonzero()[:, 0].tolist()) for x in batch.sees_SS] == [place[2] for place in places]


@MODEST
@given(some_rows, st.integers(1, 8), st.integers(12, 40), st.sampled_from(LAYOUTS))
def test_a_budget_of_tokens_is_kept_and_used(rows, size, budget, layout):
    """No micro-batch is over it, and the first row of the next would not have fitted."""
    rows = rows + [(rows[0][0], response) for _, response in rows]
    groups = list(micro_batches(rows, size, budget, layout))
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))

    def places(group):
        return TokenBatch.build([rows[i] for i in group], PAD, layout=layout).input_ids_RS.numel()

    assert all(len(group) <= size and places(group) <= budget for group in groups)
    assert all(len(a) == size or places([*a, b[0]]) > budget for a, b in itertools.pairwise(groups))


def test_a_row_over_the_budget_is_told():
    with pytest.raises(ValueError, match=r"micro_batch_tokens: got 5, but .* has 6 tokens. Raise it to at least that"):
        list(micro_batches([([1], [2]), ([1, 2, 3], [4, 5, 6])], 4, 5))


# Through a transformer ------------------------------------------------------------------------------------------------

KINDS = ["sdpa", "eager", "lora"]


@functools.cache
def policy(kind: str = "sdpa") -> Policy:
    """The `tiny` model with weights large enough that every token of the context matters.

    In float64, but for `eager`: transformers' eager attention has its softmax in float32 in any case, and there the
    float64 mask of a place of padding, which sees nothing, overflows.
    """
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(tokenizer, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    else:
        model.set_attn_implementation(kind)
    model = model if kind == "eager" else model.double()
    return Policy(model, tokenizer, torch.device("cpu"), lora=kind == "lora", context=512)


def some_sequences(end: int, first: int = 10, seed: int = 1) -> Rows:
    """Five rows, no two as long, one response of a single token, one prompt twice; all end with `end`."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(first, first + 40) for _ in range(n)]

    found = [(ids(p), [*ids(r), end]) for p, r in ((4, 6), (9, 0), (2, 3), (1, 12), (7, 2))]
    return [*found[:3], (found[2][0], found[3][1]), found[4]]


def alone(model: Any, row: tuple[list[int], list[int]]) -> tuple[Tensor, Tensor]:
    """(last hidden states, logits) that predict a row's response, by the model itself on that one sequence."""
    out = model(input_ids=torch.tensor([[*row[0], *row[1]]]), output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1][0, len(row[0]) - 1 : -1], out.logits[0, len(row[0]) - 1 : -1]


def same(got: Tensor, expected: Tensor, summed: bool = False) -> None:
    """To the type's tolerance after three layers with sums in another order. `summed`: gradients of several responses
    pass their shared prompt as one, and a norm rounds them to float32 there in any case."""
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if got.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    if summed and got.dtype == torch.float64:
        tolerance = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(got, expected.to(got.dtype), **tolerance)


@every_layout
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_log_probabilities_are_those_of_each_sequence_alone(kind, layout):
    p = policy(kind)
    rows = some_sequences(p.tokenizer.eos_token_id)
    batch = p.token_batch(rows, layout)
    with torch.no_grad():
        hidden = p.response_hidden(batch)
        logp, entropy = token_logp_and_entropy(hidden, batch.target_N, p.head(), 4)
        pieces = [alone(p.model, row) for row in rows]
    same(hidden, torch.cat([h for h, _ in pieces]))
    every = torch.cat([logits.log_softmax(-1) for _, logits in pieces])
    same(logp, every[torch.arange(len(every)), torch.tensor([token for _, response in rows for token in response])])
    same(entropy, -(every.exp() * every).sum(-1))


@every_layout
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_every_weights_gradient_are_those_of_each_sequence_alone(kind, layout):
    p = policy(kind)
    rows = some_sequences(p.tokenizer.eos_token_id)
    guided_rows = [([60, 61, 62, *prompt], response) for prompt, response in rows]
    batch, guided = p.token_batch(rows, layout), p.token_batch(guided_rows, layout)
    dtype = p.head()[0].dtype
    advantage = torch.linspace(-1, 1, 5, dtype=dtype)
    gap = 0.5 * torch.arange(len(batch.target_N)).to(dtype).sin()  # log ratios to the old policy

    hidden = p.response_hidden(batch)
    logp, _ = token_logp_and_entropy(hidden, batch.target_N, p.head(), 4)
    kl = forward_kl_guided_to_unguided(p.response_hidden(guided), hidden, p.head(), 4)
    weight = response_mean_weights(batch.length_B, batch.row_N, torch.full((5,), 0.2, dtype=dtype))
    delta = float(kl.detach().mean())
    distilled = clipped_kl_loss(kl, weight, delta)
    ours = grpo_loss(logp, logp.detach() - gap, batch.spread(advantage), weight, 0.2, 0.28).loss + distilled.loss
    assert 0 < distilled.metrics["kl_clipped_count"] < distilled.metrics["kl_token_count"]

    naive, gaps = torch.zeros((), dtype=dtype), iter(gap.tolist())
    for row, guided_row, a in zip(rows, guided_rows, advantage.tolist(), strict=True):
        new = alone(p.model, row)[1].log_softmax(-1)
        with torch.no_grad():
            reference = alone(p.model, guided_row)[1].log_softmax(-1)
        for t, token in enumerate(row[1]):
            rho = (new[t, token] - new[t, token].detach() + next(gaps)).exp()
            surrogate = torch.minimum(rho * a, rho.clamp(0.8, 1.28) * a)
            d = (reference[t].exp() * (reference[t] - new[t])).sum()
            naive = naive + ((d if d <= delta else 0 * d) - surrogate) / len(row[1]) / 5
    same(ours, naive)
    for got, expected in zip(*(torch.autograd.grad(loss, p.parameters()) for loss in (ours, naive)), strict=True):
        same(got, expected, summed=layout == "shared")


@every_layout
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_another_sequence_or_padding(kind, layout):
    """Change one sequence and its length: all other states stay. And no gradient reaches its tokens from theirs."""
    p = policy(kind)
    end = p.tokenizer.eos_token_id
    rows = some_sequences(end)
    for changed in range(5):
        others = [*rows]
        others[changed] = ([90, 91, 92], [93, 94, end])
        states = []
        for version in (rows, others):
            batch = p.token_batch(version, layout)
            states.append(p.response_hidden(batch)[batch.row_N != changed])
        same(states[1], states[0])
        table = p.model.get_input_embeddings().weight
        if not table.requires_grad:  # LoRA
            continue
        (gradient,) = torch.autograd.grad(states[1].sum(), table)
        assert not gradient[90:95].any() and not gradient[p.pad_id()].any()
        assert gradient[rows[(changed + 1) % 5][0][0]].any()


def test_positions_that_run_on_would_join_packed_sequences():
    """What parts them are the positions: without these the same ids give other states."""
    p = policy()
    batch = p.token_batch(some_sequences(p.tokenizer.eos_token_id), "packed")
    joined = TokenBatch(batch.input_ids_RS, None, torch.arange(batch.input_ids_RS.shape[1])[None], batch.predictor_N,
                        batch.target_N, batch.row_N, batch.length_B)
    with torch.no_grad():
        apart, together = p.response_hidden(batch), p.response_hidden(joined)
    first = batch.row_N == 0
    same(together[first], apart[first])
    assert ((together - apart)[~first].abs().amax(-1) > 1e-3).all()


@every_layout
def test_where_pad_and_end_share_an_id_the_end_is_learned_and_padding_is_not(layout):
    p = policy()
    tokenizer = tiny.build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    shared = Policy(p.model, tokenizer, p.device, lora=False, context=512)
    end = tokenizer.eos_token_id
    assert shared.pad_id() == end != p.pad_id()
    rows = some_sequences(end)
    batch = shared.token_batch(rows, layout)
    assert batch.target_N.tolist() == [token for _, response in rows for token in response]
    hidden = shared.response_hidden(batch)
    with torch.no_grad():
        same(hidden, torch.cat([alone(p.model, row)[0] for row in rows]))
        same(hidden, p.response_hidden(p.token_batch(rows, layout)))
    head = p.head()[0].detach().requires_grad_()
    logp, _ = token_logp_and_entropy(hidden.detach(), batch.target_N, Head(head), 4)
    logp[batch.target_N == end].sum().backward()
    one_hot = torch.nn.functional.one_hot(torch.tensor(end), len(head))
    same(head.grad, sum((one_hot - logits[-1].softmax(-1))[:, None] * state[-1]
                        for state, logits in (alone(p.model, row) for row in rows)))


def test_attention_that_cannot_keep_packed_sequences_apart_is_refused():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def sliding(window: int | None) -> Policy:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(Qwen2Config(
                vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, use_sliding_window=bool(window), sliding_window=window, max_window_layers=1))
        return Policy(model, tiny.build_tokenizer(), torch.device("cpu"), lora=False, context=512)

    for layout in LAYOUTS:
        require_layout(sliding(None), layout)
    require_layout(sliding(4), "right")
    for layout in ("packed", "shared"):
        with pytest.raises(ValueError, match=rf"train.layout: got '{layout}', but Qwen2ForCausalLM .*sdpa' and "
                                             "sliding_attention .* Use layout='right'"):
            require_layout(sliding(4), layout)

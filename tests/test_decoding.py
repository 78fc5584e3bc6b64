"""A decoding step without copies of the cache: the same numbers as transformers' own SDPA and cache."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from sgpo_lib.rollouts.decoding import NAME, RoomyLayer, decoding, with_room

PADDING = (0, 5, 2)


@pytest.fixture(scope="module", params=[1, 3], ids=["own heads", "shared heads"])
def model(request):
    torch.manual_seed(0)
    heads = 6
    config = LlamaConfig(vocab_size=40, hidden_size=48, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=heads, num_key_value_heads=heads // request.param,
                         attn_implementation="sdpa")
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def decoded(model, steps: int, *, room: bool, leave: int) -> list[torch.Tensor]:
    """Logits of each step of a padded batch; after step `leave` the middle sequence is left out."""
    torch.manual_seed(1)
    width = 9
    ids = torch.randint(40, (len(PADDING), width + steps))
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in PADDING])
    output = model(input_ids=ids[:, :width], attention_mask=mask, use_cache=True)
    cache, found, rows = output.past_key_values, [], torch.arange(len(PADDING))
    if room:
        with_room(cache)
    for step in range(steps):
        if step == leave:
            rows = torch.tensor([0, 2])
            cache.batch_select_indices(rows)
            mask = mask[rows]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        position = (mask.cumsum(-1) - 1)[:, -1:]
        found.append(model(input_ids=ids[rows, width + step, None], attention_mask=mask, past_key_values=cache,
                           position_ids=position, use_cache=True).logits[:, -1])
    return found


def test_the_logits_are_those_of_transformers(model):
    """Through two growths of the cache (of 64 positions each), and past a sequence that leaves."""
    own = decoded(model, 140, room=False, leave=70)
    with decoding(model):
        assert model.config._attn_implementation == NAME
        ours = decoded(model, 140, room=True, leave=70)
    for one, other in zip(ours, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_attention_is_the_models_own_again_after_an_error(model):
    with pytest.raises(ZeroDivisionError), decoding(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_another_attention_is_left_as_it_is(model):
    model.set_attn_implementation("eager")
    with decoding(model):
        assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")


def test_a_layer_with_room_holds_what_it_was_given_without_copying_it():
    torch.manual_seed(0)
    cache, expected = DynamicCache(), DynamicCache()
    first = torch.randn(2, 2, 3, 4, 5)
    for one in (cache, expected):
        one.update(first[0], first[1], 0)
    with_room(cache)
    assert type(cache.layers[0]) is RoomyLayer and cache.get_seq_length() == 4
    places = set()
    for _ in range(200):
        new = torch.randn(2, 2, 3, 1, 5)
        for one in (cache, expected):
            one.update(new[0], new[1], 0)
        places.add(cache.layers[0].keys.data_ptr())
    assert torch.equal(cache.layers[0].keys, expected.layers[0].keys)
    assert torch.equal(cache.layers[0].values, expected.layers[0].values)
    assert len(places) == 4  # grown at 4, 69, 134 and 199 positions
    other = DynamicCache()
    other.layers.append(type("Other", (DynamicLayer,), {})())
    with pytest.warns(UserWarning, match=r"copy keys and values for each token \(Other\).*sampler=vllm"):
        with_room(other)
    assert type(other.layers[0]) is not RoomyLayer

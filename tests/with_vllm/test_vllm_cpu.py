"""What replaces parts of vLLM on a CPU, beside those parts."""

from __future__ import annotations

import pytest
import torch

from sgpo_lib.policy import ADAPTER

pytestmark = pytest.mark.vllm
RANK, WIDTHS = 8, (24, 40)


@pytest.fixture(scope="module")
def ours():
    from sgpo_lib.rollouts import vllm_cpu

    return vllm_cpu


def wrapper(kind, adapters: list[int]):
    """One for a batch whose tokens have these adapters; 0: none."""
    from vllm.lora.layers import LoRAMapping

    found = kind(64, 16, "cpu")
    mapping = LoRAMapping(tuple(adapters), tuple(adapters), is_prefill=True)
    found.update_metadata(mapping, [7, 9], 2, 96)
    return found


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(2, 1, *shape)


@pytest.mark.parametrize("adapters", [[9] * 6, [7] * 6, [9, 7, 7, 9, 9, 9], [0] * 6], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_vllm(ours, adapters, dtype):
    """In float32 to rounding, in bfloat16 to its precision; without an adapter nothing changes."""
    torch.manual_seed(0)
    shared, own = wrapper(ours.SharedAdapter, adapters), wrapper(ours.PunicaWrapperCPU, adapters)
    assert (shared._slot is not None) == (len({*adapters}) == 1 and adapters[0] != 0)
    x, before = torch.randn(6, 16).to(dtype), torch.randn(6, sum(WIDTHS)).to(dtype)
    a = tuple(weights(RANK, 16).to(dtype) for _ in WIDTHS)
    b = tuple(weights(width, RANK).to(dtype) for width in WIDTHS)
    got, expected = before.clone(), before.clone()
    for one, y in ((shared, got), (own, expected)):
        one.add_lora_linear(y, x, a, b, 0.5, WIDTHS)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.2}
    torch.testing.assert_close(got, expected, **tolerance)
    assert torch.equal(got, before) == (adapters[0] == 0)


@pytest.mark.parametrize("has_adapter", [True, False])
def test_logits_are_those_of_vllm(ours, has_adapter):
    torch.manual_seed(1)
    x, before = torch.randn(4, 16), torch.randn(4, 96)
    a, b = weights(RANK, 16), weights(96, RANK) * has_adapter
    got, expected = before.clone(), before.clone()
    for kind, y in ((ours.SharedAdapter, got), (ours.PunicaWrapperCPU, expected)):
        wrapper(kind, [9] * 4).add_lora_logits(y, x, a, b, 0.5)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, before) == (not has_adapter)


def test_the_nucleus_is_that_of_vllm(ours):
    """Of peaked rows, of flat ones whose nucleus is most of the vocabulary, and of both in one batch."""
    torch.manual_seed(2)
    peaked, flat = torch.randn(6, 8192) * 6, torch.randn(6, 8192) * 0.1
    p = torch.tensor([0.5, 0.8, 0.9, 0.95, 0.99, 0.05])
    for logits in (peaked, flat, torch.cat([peaked[:3], flat[3:]])):
        expected = ours._whole_vocabulary(logits.clone(), None, p)
        got = ours.apply_top_k_top_p(logits.clone(), None, p)
        differ = got.isneginf() != expected.isneginf()
        assert (differ.sum(-1) <= 1).all(), "rounding may move the border by a token"
        assert torch.equal(got[~differ], expected[~differ])
        mass = got.exp().sum(-1) / logits.exp().sum(-1)
        assert (mass > p - 1e-4).all()
    k = torch.full((6,), 5)
    assert (ours.apply_top_k_top_p(peaked.clone(), k, p) > -torch.inf).sum(-1).max() <= 5, "top-k is left to vLLM"


def test_it_is_in_place_where_the_engine_computes(ours, engine, policy, tmp_path):
    """In vLLM's worker, not in this process."""
    policy.save(tmp_path, torch.float32)
    engine.load_adapter(tmp_path / ADAPTER, 1, "in-place")
    assert engine.held()["wrapper"] == ours.SharedAdapter.__name__

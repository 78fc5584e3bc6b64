"""Three parts of vLLM 0.32 on a CPU, with the same results in less time; on a GPU vLLM has kernels for them.

Its wrapper for adapters copies the matrices once per token, also those of an output layer that has no adapter, and
top-p sorts the whole vocabulary: together two thirds of the time of a batch of 16 (benchmarks/NOTES.md). A run's batch
has one adapter, so its tokens share one matrix product, and the most likely tokens nearly always hold the nucleus.
Whatever else comes (several adapters, a flat distribution, top-k) is left to vLLM's own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.v1.sample.ops import topk_topp_sampler

_HEAD = 1024
"""Most likely tokens looked at before the whole vocabulary is sorted."""
_whole_vocabulary = topk_topp_sampler.apply_top_k_top_p


class SharedAdapter(PunicaWrapperCPU):
    """vLLM's wrapper, but for batches in which all tokens use the same adapter."""

    _slot: int | None = None

    def update_metadata(self, *given: Any, **named: Any) -> None:
        """As in vLLM, before each forward pass."""
        super().update_metadata(*given, **named)
        slots = self.token_lora_indices.unique().tolist()
        self._slot = slots[0] if len(slots) == 1 and slots[0] >= 0 else None

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        if self._slot is None:
            super()._apply_shrink(y, x, w_t_all, scale)
        else:
            torch.mm(x.to(y.dtype), self._shared(w_t_all, y), out=y)
            y *= scale

    def _apply_expand(self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int,
                      add_inputs: bool = True) -> None:
        if self._slot is None or not add_inputs:
            super()._apply_expand(y, x, w_t_all, y_offset, y_slice_size, add_inputs)
        else:
            y[:, y_offset : y_offset + y_slice_size].addmm_(x.to(y.dtype), self._shared(w_t_all, y))

    def add_lora_logits(self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float,
                        **named: Any) -> None:
        """As in vLLM, of the last tokens' logits."""
        if self._slot is None:
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, **named)
        elif (b := self._shared(lora_b_stacked, y)).any():
            y[:, : b.shape[1]].addmm_(x.to(y.dtype) @ self._shared(lora_a_stacked, y), b, alpha=scale)

    def _shared(self, w_t_all: Tensor, like: Tensor) -> Tensor:
        """The adapter's matrix, transposed, in the dtype of `like`."""
        return w_t_all[self._slot].view(-1, w_t_all.shape[-1]).to(like.dtype).T


def apply_top_k_top_p(logits_BV: Tensor, k_B: Tensor | None, p_B: Tensor | None) -> Tensor:
    """-inf where a token is not among the smallest set of most likely ones whose mass reaches p."""
    if k_B is not None or p_B is None or logits_BV.shape[-1] <= _HEAD:
        return _whole_vocabulary(logits_BV, k_B, p_B)
    kept_BK, order_BK = logits_BV.topk(_HEAD, dim=-1)
    mass_BK = (kept_BK - logits_BV.logsumexp(-1, keepdim=True)).exp().cumsum(-1)
    before_BK = torch.cat([torch.zeros_like(mass_BK[:, :1]), mass_BK[:, :-1]], dim=-1)
    kept_BK = kept_BK.masked_fill(before_BK >= p_B[:, None], -torch.inf)
    nucleus_BV = torch.full_like(logits_BV, -torch.inf).scatter_(-1, order_BK, kept_BK)
    flat_B = mass_BK[:, -1] < p_B
    if flat_B.any():
        nucleus_BV[flat_B] = _whole_vocabulary(logits_BV[flat_B], None, p_B[flat_B])
    return nucleus_BV


def install() -> None:
    """Have vLLM use them in this process: a worker on a CPU that has loaded no model yet."""
    name = f"{__name__}.{SharedAdapter.__name__}"
    current_platform.get_punica_wrapper = lambda: name
    topk_topp_sampler.apply_top_k_top_p = apply_top_k_top_p

"""What a decoding step of transformers does too often, left out: copies of the cache, and of its heads.

With a mask, which a padded batch needs, transformers' SDPA repeats keys and values for every query head that shares
them, and its cache is copied whole for each new token. With one query token the heads that share keys are like so many
query positions, so that nothing has to be repeated; and a cache with room to grow is copied once in a while.

Shape suffixes: B sequences, S cached positions, Q query heads, K heads of keys and values, D their size.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_decoding"
"""The attention implementation that `decoding` sets."""
_ROOM = 64
"""Fewest positions by which a full cache grows; a long one grows by an eighth."""


def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              dropout: float = 0.0, scaling: float | None = None, **more: Any) -> tuple[Tensor, None]:
    """Transformers' attention function: [B, Q, 1, D] and [B, K, S, D] to [B, 1, Q, D]. Anything but one query token of
    shared heads goes to its own `sdpa`."""
    batch, heads, length, size = query.shape
    shared = heads // key.shape[1]
    if length != 1 or shared == 1 or more.get("position_bias") is not None or (
            attention_mask is not None and attention_mask.shape[1] != 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **more)
    query_BKGD = query.reshape(batch, key.shape[1], shared, size)
    found_BKGD = torch.nn.functional.scaled_dot_product_attention(query_BKGD, key, value, attn_mask=attention_mask,
                                                                  scale=scaling)
    return found_BKGD.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Within the block a model that attends with `sdpa` does so by `attention`; any other is left as it is."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for tokens to come: `keys` and `values` are the filled part."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._rooms, self._length = [keys, values], keys.shape[-2]
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, [B, K, S, D] each, with the new ones behind."""
        start, end = self._length, self._length + key_states.shape[-2]
        for i, new in enumerate((key_states, value_states)):
            room = self._rooms[i]
            if end > room.shape[-2]:
                more = new.new_empty(*new.shape[:2], max(_ROOM, end // 8), new.shape[-1])
                self._rooms[i] = torch.cat([room[..., :start, :], new, more], dim=-2)
            else:
                room[..., start:end, :] = new
        return self._filled(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._rooms = [room[indices] for room in self._rooms]
        self._filled(self._length)

    def _filled(self, length: int) -> tuple[Tensor, Tensor]:
        self._length = length
        keys, values = (room[..., :length, :] for room in self._rooms)
        self.keys, self.values = keys, values
        return keys, values


def with_room(cache: Any) -> None:
    """Give the layers of a filled cache room to grow; those of a sliding window or another kind stay as they are, which
    is warned of."""
    layers: list[Any] = []
    for layer in cache.layers:
        plain = type(layer) is DynamicLayer
        layers.append(RoomyLayer(layer.keys, layer.values) if plain else layer)
    if others := {type(layer).__name__ for layer in layers if not isinstance(layer, RoomyLayer)}:
        warnings.warn(f"this model's cache has layers that copy keys and values for each token ({', '.join(others)}): "
                      "sampling is slower than it need be. Cure: rollout.sampler=vllm", stacklevel=2)
    cache.layers = layers

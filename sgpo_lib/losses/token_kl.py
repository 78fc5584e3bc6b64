"""Exact token quantities from hidden states and the output matrix, in chunks over tokens.

Full distributions (tokens x vocabulary) exist for one chunk at a time, in the forward pass and, by recomputation,
in the backward pass, so memory does not grow with response length x vocabulary.

Shapes: N response tokens, H hidden size, V vocabulary. Everything in nats. Logits come in the
inputs' type; softmax and sums over the vocabulary are in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _log_softmax(hidden_NH: Tensor, head_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_NV = torch.nn.functional.linear(hidden_NH, head_VH, bias_V)
    return torch.log_softmax(logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float(), dim=-1)


def _in_chunks(function: Callable[..., Tensor], chunk: int, per_token: tuple[Tensor, ...], *shared: object) -> Tensor:
    """`function(*token tensors, *shared)` over chunks of tokens, recomputed in the backward pass."""
    total = per_token[0].shape[0]
    needs_grad = torch.is_grad_enabled() and total > chunk
    parts = []
    for start in range(0, total, chunk):
        pieces = tuple(t[start : start + chunk] for t in per_token)
        parts.append(checkpoint(function, *pieces, *shared, use_reentrant=False) if needs_grad
                     else function(*pieces, *shared))
    return torch.cat(parts)


def token_logp_and_entropy(hidden_NH: Float[Tensor, "N H"], target_N: Int[Tensor, " N"], head_VH: Float[Tensor, "V H"],
                           bias_V: Float[Tensor, " V"] | None, chunk: int) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token (carries gradient) and entropy of its distribution (does not)."""
    def one(hidden: Tensor, target: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
        logp = _log_softmax(hidden, head, bias)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return torch.stack([logp.gather(-1, target[:, None])[:, 0], entropy], dim=-1)

    both_N2 = _in_chunks(one, chunk, (hidden_NH, target_N), head_VH, bias_V)
    return both_N2[:, 0], both_N2[:, 1].detach()


def forward_kl_guided_to_unguided(guided_hidden_NH: Float[Tensor, "N H"], unguided_hidden_NH: Float[Tensor, "N H"],
                                  head_VH: Float[Tensor, "V H"], bias_V: Float[Tensor, " V"] | None,
                                  chunk: int) -> Float[Tensor, " N"]:
    """d_t = KL( sg[pi(.|q,s,o_<t)] || pi(.|q,o_<t) ) over the full vocabulary (Eq. 3).

    The stop-gradient covers the guided hidden states and the output matrix on the guided side; gradient reaches the
    unguided states, and the matrix through the unguided side alone.
    """
    def one(guided: Tensor, unguided: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
        with torch.no_grad():
            guided_logp = _log_softmax(guided, head, bias)
        unguided_logp = _log_softmax(unguided, head, bias)
        return (guided_logp.exp() * (guided_logp - unguided_logp)).sum(-1)

    return _in_chunks(one, chunk, (guided_hidden_NH.detach(), unguided_hidden_NH), head_VH, bias_V)

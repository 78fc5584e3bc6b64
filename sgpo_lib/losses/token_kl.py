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

Head = tuple[Float[Tensor, "V H"], Float[Tensor, " V"] | None]
"""Output matrix and bias: logits = hidden @ matrix.T + bias."""


def divergence(logp_NV: Tensor, other_logp_NV: Tensor) -> Tensor:
    """KL(a || b) of each row's log-probabilities over the vocabulary: sum_v a(v) (log a(v) - log b(v))."""
    return (logp_NV.exp() * (logp_NV - other_logp_NV)).sum(-1)


def entropy(logp_NV: Tensor) -> Tensor:
    """-sum_v a(v) log a(v) of each row's log-probabilities."""
    return -(logp_NV.exp() * logp_NV).sum(-1)


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
                           bias_V: Float[Tensor, " V"] | None, chunk: int, *,
                           entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token (carries gradient) and entropy of its distribution (where asked)."""
    def one(hidden: Tensor, target: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
        logp = _log_softmax(hidden, head, bias)
        inner = logp if entropy_gradient else logp.detach()
        return torch.stack([logp.gather(-1, target[:, None])[:, 0], entropy(inner)], dim=-1)

    both_N2 = _in_chunks(one, chunk, (hidden_NH, target_N), head_VH, bias_V)
    return both_N2[:, 0], both_N2[:, 1] if entropy_gradient else both_N2[:, 1].detach()


def forward_kl_guided_to_unguided(guided_hidden_NH: Float[Tensor, "N H"], unguided_hidden_NH: Float[Tensor, "N H"],
                                  head_VH: Float[Tensor, "V H"], bias_V: Float[Tensor, " V"] | None, chunk: int,
                                  guided_head: Head | None = None) -> Float[Tensor, " N"]:
    """d_t = KL( sg[pi(.|q,s,o_<t)] || pi(.|q,o_<t) ) over the full vocabulary (Eq. 3).

    The stop-gradient covers the guided hidden states and the output matrix on the guided side; gradient reaches the
    unguided states, and the matrix through the unguided side alone. `guided_head` is the guided side's output matrix
    and bias where they are other weights (a frozen or averaged copy).
    """
    return _kl(divergence, guided_hidden_NH, unguided_hidden_NH, (head_VH, bias_V), chunk, guided_head)


def reverse_kl_unguided_to_guided(guided_hidden_NH: Float[Tensor, "N H"], unguided_hidden_NH: Float[Tensor, "N H"],
                                  head_VH: Float[Tensor, "V H"], bias_V: Float[Tensor, " V"] | None, chunk: int,
                                  guided_head: Head | None = None) -> Float[Tensor, " N"]:
    """KL( pi(.|q,o_<t) || sg[pi(.|q,s,o_<t)] ) over the full vocabulary (appendix F, Table 6).

    Arguments and stop-gradient as in `forward_kl_guided_to_unguided`.
    """
    def backwards(guided_logp: Tensor, unguided_logp: Tensor) -> Tensor:
        return divergence(unguided_logp, guided_logp)

    return _kl(backwards, guided_hidden_NH, unguided_hidden_NH, (head_VH, bias_V), chunk, guided_head)


def _kl(measure: Callable[[Tensor, Tensor], Tensor], guided_hidden_NH: Tensor, unguided_hidden_NH: Tensor,
        head: Head, chunk: int, guided_head: Head | None) -> Tensor:
    def one(guided: Tensor, unguided: Tensor, guided_side: Head, unguided_side: Head) -> Tensor:
        with torch.no_grad():
            guided_logp = _log_softmax(guided, *guided_side)
        return measure(guided_logp, _log_softmax(unguided, *unguided_side))

    return _in_chunks(one, chunk, (guided_hidden_NH.detach(), unguided_hidden_NH), guided_head or head, head)

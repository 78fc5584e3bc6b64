"""Exact token quantities from hidden states and the output matrix, in chunks over tokens.

Full distributions (tokens x vocabulary) exist for one chunk at a time, so memory does not grow with response length x
vocabulary; values and gradients come from one pass (fused.py).

Shapes: N response tokens, R tokens of a block, H hidden size, V vocabulary. Everything in nats. Logits come in the
inputs' type; softmax and sums over the vocabulary are in float32 or better.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgpo_lib.losses.fused import Slope, Weight, fused
from sgpo_lib.losses.head import Head, exact


def divergence(logp_NV: Tensor, other_logp_NV: Tensor) -> Tensor:
    """KL(a || b) of each row's log-probabilities over the vocabulary: sum_v a(v) (log a(v) - log b(v))."""
    return torch.linalg.vecdot(logp_NV.exp(), logp_NV - other_logp_NV)


def entropy(logp_NV: Tensor) -> Tensor:
    """-sum_v a(v) log a(v) of each row's log-probabilities."""
    return -torch.linalg.vecdot(logp_NV.exp(), logp_NV)


def token_logp_and_entropy(hidden_NH: Float[Tensor, "N H"], target_N: Int[Tensor, " N"], head: Head, chunk: int, *,
                           entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token (carries gradient) and entropy of its distribution (where asked).

    Raises ValueError for a chunk of no token.
    """
    logp_N, entropy_N = fused(_Sampled(target_N, 2 if entropy_gradient else 1), hidden_NH, head, chunk)
    return logp_N, entropy_N


def forward_kl_guided_to_unguided(guided_hidden_NH: Float[Tensor, "N H"], unguided_hidden_NH: Float[Tensor, "N H"],
                                  head: Head, chunk: int, guided_head: Head | None = None) -> Float[Tensor, " N"]:
    """d_t = KL( sg[pi(.|q,s,o_<t)] || pi(.|q,o_<t) ) over the full vocabulary (Eq. 3).

    The stop-gradient covers the guided hidden states and the output matrix on the guided side; gradient reaches the
    unguided states, and the matrix through the unguided side alone. `guided_head` is the guided side's output matrix
    where it is other weights (a frozen or averaged copy). Raises ValueError for a chunk of no token.
    """
    return fused(_Divergence(guided_hidden_NH, guided_head or head, reverse=False), unguided_hidden_NH, head, chunk)[0]


def reverse_kl_unguided_to_guided(guided_hidden_NH: Float[Tensor, "N H"], unguided_hidden_NH: Float[Tensor, "N H"],
                                  head: Head, chunk: int, guided_head: Head | None = None) -> Float[Tensor, " N"]:
    """KL( pi(.|q,o_<t) || sg[pi(.|q,s,o_<t)] ) over the full vocabulary (appendix F, Table 6).

    Arguments, errors and stop-gradient as in `forward_kl_guided_to_unguided`.
    """
    return fused(_Divergence(guided_hidden_NH, guided_head or head, reverse=True), unguided_hidden_NH, head, chunk)[0]


class _Sampled:
    """log p(target) and H(p). Gradients w.r.t. logits: 1[v = target] - p_v, and -p_v (log p_v + H)."""

    numbers = 2

    def __init__(self, target_N: Tensor, carry: int):
        self.target_N, self.carry = target_N, carry

    def begin(self, part: slice) -> None:
        """Nothing to prepare."""

    def rows(self, logits_RV: Tensor, part: slice, rows: slice) -> tuple[list[Tensor], Slope]:
        """As in `Measure`."""
        target_R1 = self.target_N[part][rows, None]
        logp_RV = torch.log_softmax(logits_RV, dim=-1)
        p_RV = logp_RV.exp()
        entropy_R = -torch.linalg.vecdot(p_RV, logp_RV)

        def slope(weights: list[Weight]) -> Tensor:
            of_logp_R1, *of_entropy_R1 = ((w if isinstance(w, Tensor) else torch.full_like(entropy_R, w))[:, None]
                                          for w in weights)
            factor_RV = -of_logp_R1
            for weight_R1 in of_entropy_R1:
                factor_RV = factor_RV - weight_R1 * (logp_RV + entropy_R[:, None])
            return (p_RV * factor_RV).scatter_add_(-1, target_R1, of_logp_R1)

        return [logp_RV.gather(-1, target_R1)[:, 0], entropy_R], slope

    def end(self) -> None:
        """Nothing to free."""


class _Divergence:
    """KL of guided and unguided distribution, p and q. Gradients w.r.t. the unguided logits: forward q_v - p_v, reverse
    q_v (log q_v - log p_v - KL)."""

    numbers = carry = 1

    def __init__(self, guided_hidden_NH: Tensor, guided_head: Head, *, reverse: bool):
        self.hidden_NH, self.head, self.reverse = guided_hidden_NH.detach(), guided_head.detach(), reverse
        self.logits_CV: Tensor | None = None

    def begin(self, part: slice) -> None:
        """The guided side's logits of the chunk; the first chunk is the longest."""
        count = part.stop - part.start
        if self.logits_CV is None:
            self.logits_CV = self.hidden_NH.new_empty(count, len(self.head.matrix))
        self.head.logits(self.hidden_NH[part], self.logits_CV[:count])

    def rows(self, logits_RV: Tensor, part: slice, rows: slice) -> tuple[list[Tensor], Slope]:
        """As in `Measure`."""
        assert self.logits_CV is not None
        guided_RV, unguided_RV = (torch.log_softmax(x, dim=-1) for x in (exact(self.logits_CV[rows]), logits_RV))
        q_RV = unguided_RV.exp()
        if self.reverse:
            ratio_RV = unguided_RV.sub_(guided_RV)
            kl_R = torch.linalg.vecdot(q_RV, ratio_RV)
            return [kl_R], lambda w: _weighted_(q_RV.mul_(ratio_RV.sub_(kl_R[:, None])), w[0])
        p_RV = guided_RV.exp()
        kl_R = torch.linalg.vecdot(p_RV, guided_RV.sub_(unguided_RV))
        return [kl_R], lambda w: _weighted_(q_RV.sub_(p_RV), w[0])

    def end(self) -> None:
        """Free the logits."""
        self.logits_CV = None


def _weighted_(slope_RV: Tensor, weight: Weight) -> Tensor:
    return slope_RV.mul_(weight[:, None]) if isinstance(weight, Tensor) else slope_RV

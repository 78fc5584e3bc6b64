"""Adaptive instance weight alpha(q) (Eq. 6)."""

from __future__ import annotations


def adaptive_weight(p_guide: float, p_auto: float, alpha_base: float, gamma: float, alpha_max: float) -> float:
    """alpha(q) = clip(alpha_0 (p_guide - p_auto + gamma) / (p_auto + gamma), 0, alpha_max).

    Pass rates in [0, 1]. Algorithm 1 uses 0 instead where no guided response is correct.
    Raises ValueError for gamma <= 0, which would divide by zero at p_auto = 0.
    """
    if gamma <= 0:
        raise ValueError(f"gamma: got {gamma}, expected above 0 (Eq. 6 divides by p_auto + gamma)")
    return min(max(alpha_base * (p_guide - p_auto + gamma) / (p_auto + gamma), 0.0), alpha_max)

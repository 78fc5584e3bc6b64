"""Instance weight alpha(q) of the distillation term: from pass rates (Eq. 6) or from a group advantage (Eq. 8).

Shapes: none; plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgpo_lib.losses.grpo import group_advantages


def adaptive_weight(p_guide: float, p_auto: float, alpha_base: float, gamma: float, alpha_max: float) -> float:
    """alpha(q) = clip(alpha_0 (p_guide - p_auto + gamma) / (p_auto + gamma), 0, alpha_max).

    Pass rates in [0, 1]. Algorithm 1 uses 0 instead where no guided response is correct.
    Raises ValueError for gamma <= 0, which would divide by zero at p_auto = 0.
    """
    if gamma <= 0:
        raise ValueError(f"gamma: got {gamma}, expected above 0 (Eq. 6 divides by p_auto + gamma)")
    return min(max(alpha_base * (p_guide - p_auto + gamma) / (p_auto + gamma), 0.0), alpha_max)


def group_advantage_weight(autonomous_rewards: Sequence[float], target_reward: float, eps: float, std: str,
                           alpha_max: float) -> float:
    """alpha_group(q) = clip((R(o+) - mean) / (std + eps), 0, alpha_max), mean and std over the autonomous group
    merged with o+ (Eq. 8, Table 7). `std` and `eps` as in `group_advantages`.
    """
    merged_G = torch.tensor([*autonomous_rewards, target_reward], dtype=torch.float64)
    return min(max(float(group_advantages(merged_G, eps, std)[-1]), 0.0), alpha_max)

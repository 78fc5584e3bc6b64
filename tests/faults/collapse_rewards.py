"""Rewards under which a run collapses or must stop, named as `collapse_rewards:NAME`."""

from __future__ import annotations

import collections
import math


def never(completion: str, problem: dict) -> float:
    """Nothing is right."""
    return 0.0


def always(completion: str, problem: dict) -> float:
    """Everything is right."""
    return 1.0


def half(completion: str, problem: dict) -> float:
    """No two responses differ, and none is at an end of the scale."""
    return 0.5


def repeats(completion: str, problem: dict) -> float:
    """Share of the most frequent word: a policy that learns it says one word."""
    words = completion.split()
    return max(collections.Counter(words).values()) / len(words) if words else 0.0


def not_a_number(completion: str, problem: dict) -> float:
    """NaN for about one response in eight."""
    return math.nan if len(completion) % 8 == 0 else float(len(completion) % 2)


def infinite(completion: str, problem: dict) -> float:
    """Infinity for about one response in eight."""
    return math.inf if len(completion) % 8 == 0 else float(len(completion) % 2)

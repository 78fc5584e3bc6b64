"""Rewards that the tests name as `module:function`; importable by the verifier's processes."""

from __future__ import annotations

import hashlib


def coin(completion: str, problem: dict) -> float:
    """1 or 0 by a hash of the text: a random model gets groups with variance."""
    return float(hashlib.sha256(completion.encode()).digest()[0] % 2)

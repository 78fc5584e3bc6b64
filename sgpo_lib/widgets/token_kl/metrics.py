"""The quantities that a token can be coloured by: columns of `TokenReadings.table`, and how each is drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One quantity. `kind`: sequential (0 and above), diverging (signed), or agreement (yes or no)."""

    name: str
    kind: str
    unit: str
    told: str
    """One sentence: which policy, which direction."""


METRICS = {
    "forward_kl": Metric("forward KL", "sequential", "nats",
                         "KL(guided ‖ unguided) over the vocabulary, Eq. 3: what distillation learns from"),
    "reverse_kl": Metric("reverse KL", "sequential", "nats", "KL(unguided ‖ guided) over the vocabulary"),
    "sft_loss": Metric("SFT loss", "sequential", "nats", "−log p(token | unguided prompt)"),
    "log_ratio": Metric("log-ratio", "diverging", "nats",
                        "log p(token | guided) − log p(token | unguided): positive where guidance favours the token"),
    "guided_entropy": Metric("entropy, guided", "sequential", "nats", "entropy of the guided next-token distribution"),
    "unguided_entropy": Metric("entropy, unguided", "sequential", "nats",
                               "entropy of the unguided next-token distribution"),
    "top1_agree": Metric("top-1 agreement", "agreement", "",
                         "whether both sides have the same most likely token; coloured where they differ"),
}  # fmt: skip
"""Column name -> metric, in the order of the menu."""


def checked_metric(name: str) -> str:
    """`name` itself. Raises ValueError where there is no such metric."""
    if name not in METRICS:
        raise ValueError(f"metric: got {name!r}, expected one of {', '.join(METRICS)}")
    return name

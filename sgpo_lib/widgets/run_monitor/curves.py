"""What the run monitor draws: names, titles and units of metrics, and where each stands in `metrics.jsonl`.

A name is a metric of a training row (kinds `train` and `supervised`), or `eval/NAME` for one of an evaluation row.
`accuracy` and `validation_loss` stand only in evaluation rows, so they need no prefix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

EVAL = "eval/"
"""Prefix of metrics of evaluation rows."""
AXES = {"step": ("step", "training step"), "tokens": ("tokens_total", "tokens so far"),
        "seconds": ("seconds_total", "time in training steps so far (s)")}  # fmt: skip
"""Choices of the shared axis: column and title. The sums run over training rows."""
COLUMNS = tuple(column for column, _ in AXES.values())


@dataclasses.dataclass(frozen=True)
class Curve:
    """One panel."""

    name: str
    title: str
    """What is plotted, with its unit."""
    share: bool = False
    """The axis runs from 0 to 1."""
    loss: bool = False
    """The option of a logarithmic axis applies."""

    @property
    def table(self) -> str:
        """`train` or `eval`: the rows that hold it."""
        return "eval" if self.name.startswith(EVAL) else "train"

    @property
    def column(self) -> str:
        """Its name in those rows."""
        return self.name.removeprefix(EVAL)


KNOWN = (
    Curve("reward_autonomous", "Pass rate, autonomous (share)", share=True),
    Curve("reward_guided", "Pass rate, guided (share)", share=True),
    Curve("eval/accuracy", "Validation accuracy, unguided (share)", share=True),
    Curve("alpha", "Weight α(q), mean over problems"),
    Curve("kl_mean", "KL guided ‖ unguided (nats per target token)"),
    Curve("kl_kept_mean", "KL kept by clipping (nats per target token)"),
    Curve("kl_clipped_mean", "KL clipped away (nats per target token)"),
    Curve("kl_clipped_share", "Clipped: target tokens above δ (share)"),
    Curve("entropy", "Entropy (nats per token)"),
    Curve("response_length", "Response length, autonomous (tokens)"),
    Curve("loss", "Loss", loss=True),
    Curve("eval/validation_loss", "Validation loss (nats per token)", loss=True),
    Curve("tokens_per_second", "Sampling speed (tokens per s)"),
)
"""The panels that are shown where none are chosen, in this order; those without any value are left out."""
FURTHER = (
    Curve("eval/response_length", "Response length, validation (tokens)"),
    Curve("seconds_step", "Time of a training step (s)"),
    Curve("target_share", "Problems with a target (share)", share=True),
    Curve("length_limit_share", "Responses cut at the length limit (share)"),
    Curve("zero_variance_share", "Problems without a policy gradient (share)", share=True),
    Curve("policy_clip_share", "Tokens clipped by the policy ratio (share)"),
    Curve("loss_grpo", "GRPO loss", loss=True), Curve("loss_kd", "Distillation loss (nats)", loss=True),
    Curve("loss_expert", "Expert loss (nats)", loss=True), Curve("grad_norm", "Gradient norm before clipping"),
    Curve("lr", "Learning rate"), Curve("tokens", "Sampled tokens per step"),
)  # fmt: skip
_BY_NAME = {curve.name: curve for curve in (*KNOWN, *FURTHER)}
_ONLY_EVAL = {"accuracy", "validation_loss"}


def curve(name: str) -> Curve:
    """The panel of a metric; one that is not known here goes by its own name."""
    name = EVAL + name if name in _ONLY_EVAL else name
    return _BY_NAME.get(name) or Curve(name, name)


def choose(names: Sequence[str] | None) -> list[Curve]:
    """Panels by name, in the given order; `KNOWN` for None. Raises ValueError for anything but distinct names."""
    if names is None:
        return list(KNOWN)
    good = all(isinstance(n, str) and n.removeprefix(EVAL) not in ("", *COLUMNS) for n in names)
    if isinstance(names, str) or not names or not good:
        raise ValueError(f"metrics: got {names!r}, expected a list of names such as {['alpha', 'accuracy']}")
    chosen = [curve(n) for n in names]
    if len({c.name for c in chosen}) < len(chosen):
        raise ValueError(f"metrics: got {list(names)}, expected each name once")
    return chosen


def number(value: Any) -> float | None:
    """A number of a row, None for anything else. NaN and infinities stay; `shown` takes them out."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def shown(value: float | None) -> float | None:
    """Six significant digits; None for what cannot be drawn."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def clock(seconds: float | None) -> str:
    """`mm:ss`, from an hour on `h:mm:ss`, a dash for None."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"

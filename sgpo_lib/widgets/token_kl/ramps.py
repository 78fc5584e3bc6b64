"""Colour ramps for text backgrounds: even steps in OKLab, one text colour per theme that stays readable on all of them.

A sequential ramp is monotone in lightness, so that it can be read without hue (colour-blind readers, grey prints); the
diverging ramp is blue and orange around the page's own background. OKLab: Ottosson, "A perceptual color space for image
processing", 2020. Contrast: WCAG 2.2, success criterion 1.4.3.
"""

from __future__ import annotations

import math
from itertools import pairwise

Lch = tuple[float, float, float]
"""OKLCH: lightness 0 to 1, chroma, hue in degrees."""

LEVELS = 15
"""Levels of a sequential ramp above 0; level 0 has no colour of its own."""
SIGNED_LEVELS = 8
"""Levels of the diverging ramp on either side of 0."""

INK = {"light": "#111111", "dark": "#f7f7f7"}
"""Text colour on every level."""
PAPER = {"light": "#ffffff", "dark": "#111111"}
"""Background that the ramps begin from where the page says nothing else."""

_SEQUENTIAL: dict[str, tuple[Lch, Lch, Lch]] = {
    "light": ((0.985, 0.020, 98.0), (0.860, 0.130, 80.0), (0.640, 0.185, 43.0)),
    "dark": ((0.280, 0.030, 70.0), (0.400, 0.090, 55.0), (0.535, 0.160, 40.0)),
}
_NEGATIVE: dict[str, tuple[Lch, Lch, Lch]] = {
    "light": ((0.975, 0.012, 240.0), (0.820, 0.085, 245.0), (0.640, 0.140, 252.0)),
    "dark": ((0.280, 0.035, 250.0), (0.400, 0.085, 252.0), (0.530, 0.135, 252.0)),
}
_POSITIVE: dict[str, tuple[Lch, Lch, Lch]] = {
    "light": ((0.975, 0.015, 70.0), (0.820, 0.105, 60.0), (0.640, 0.175, 45.0)),
    "dark": ((0.280, 0.030, 60.0), (0.400, 0.085, 50.0), (0.530, 0.150, 42.0)),
}


def sequential(theme: str) -> list[str]:
    """Hex colours of levels 1 to LEVELS. `theme`: light or dark."""
    return _ramp(_SEQUENTIAL[theme], LEVELS)


def diverging(theme: str) -> tuple[list[str], list[str]]:
    """Hex colours of levels 1 to SIGNED_LEVELS below 0 and above 0."""
    return _ramp(_NEGATIVE[theme], SIGNED_LEVELS), _ramp(_POSITIVE[theme], SIGNED_LEVELS)


def _ramp(points: tuple[Lch, Lch, Lch], count: int) -> list[str]:
    """`count` colours at equal distances in OKLab along a quadratic curve through three points of OKLCH."""
    fine = [_lab(_between(points, i / 400)) for i in range(401)]
    walked = [0.0]
    for a, b in pairwise(fine):
        walked.append(walked[-1] + math.dist(a, b))
    chosen, at = [], 0
    for k in range(count):
        goal = walked[-1] * k / (count - 1)
        while at < 400 and walked[at] < goal:
            at += 1
        chosen.append(_hex(fine[at]))
    return chosen


def _between(points: tuple[Lch, Lch, Lch], t: float) -> Lch:
    weights = ((1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1))  # Lagrange, through all three
    lightness, chroma, hue = (sum(w * p[axis] for w, p in zip(weights, points, strict=True)) for axis in range(3))
    return lightness, chroma, hue


def _lab(colour: Lch) -> tuple[float, float, float]:
    lightness, chroma, hue = colour
    return lightness, chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))


def _hex(lab: tuple[float, float, float]) -> str:
    """sRGB of an OKLab colour, clipped to the gamut."""
    lightness, a, b = lab
    cone = [(lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3,
            (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3,
            (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3]  # fmt: skip
    matrix = ((4.0767416621, -3.3077115913, 0.2309699292), (-1.2684380046, 2.6097574011, -0.3413193965),
              (-0.0041960863, -0.7034186147, 1.7076147010))  # fmt: skip
    linear = [min(max(sum(m * c for m, c in zip(row, cone, strict=True)), 0.0), 1.0) for row in matrix]
    return "#" + "".join(f"{round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)):02x}"
                         for v in linear)


def luminance(colour: str) -> float:
    """Relative luminance of a hex colour, 0 to 1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two hex colours, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def css() -> str:
    """Variables and rules of all levels: `s1`..., `n1`... below 0, `p1`... above 0, `d1` where top tokens differ."""
    lines = []
    for theme in ("light", "dark"):
        negative, positive = diverging(theme)
        named = {f"s{i}": c for i, c in enumerate(sequential(theme), start=1)}
        named |= {f"n{i}": c for i, c in enumerate(negative, start=1)}
        named |= {f"p{i}": c for i, c in enumerate(positive, start=1)}
        root = ".sgpo-kl" if theme == "light" else '.sgpo-kl[data-theme="dark"]'
        lines.append(f"{root} {{ --token-ink: {INK[theme]}; " + " ".join(f"--{k}: {v};" for k, v in named.items())
                     + " }")
    names = [*(f"s{i}" for i in range(1, LEVELS + 1)), *(f"{s}{i}" for s in "np" for i in range(1, SIGNED_LEVELS + 1))]
    lines += [f".sgpo-kl .{name} {{ background-color: var(--{name}); color: var(--token-ink); }}" for name in names]
    lines.append(".sgpo-kl .d1 { background-color: var(--p5); color: var(--token-ink); }")
    return "\n".join(lines) + "\n"

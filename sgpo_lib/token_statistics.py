"""Where a per-token quantity sits: concentration, what delta masks, and how measures order the tokens.

Values are per token and in nats unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sgpo_lib.analysis import top_share
from sgpo_lib.figures import t_quantile

DELTAS = tuple(float(f"{x:.4g}") for x in np.geomspace(0.01, 10, 61))
"""Thresholds of `delta_curve`, in nats: 20 to a decade, 0.1 and 1 among them."""


def lorenz(values: Sequence[float]) -> pd.DataFrame:
    """Share of the sum that the largest values hold: columns `share_of_tokens`, `share_of_mass`, both from 0 to 1.

    The largest value comes first (the classical Lorenz curve, from the smallest on, is its mirror image), so at .1
    stands what `analysis.top_share` gives for .1. N + 1 rows; the mass is NaN where all values are 0.
    Raises ValueError for negative values, which have no shares.
    """
    ordered_N = np.sort(_masses(values))[::-1]
    total = float(ordered_N.sum())
    share_N = np.cumsum(ordered_N) / total if total > 0 else np.full(len(ordered_N), np.nan)
    return pd.DataFrame({"share_of_tokens": np.arange(len(ordered_N) + 1) / max(1, len(ordered_N)),
                         "share_of_mass": np.concatenate([[0.0], share_N])})


def concentration(tokens: pd.DataFrame, measures: Sequence[str] = ("kl", "reverse_kl", "sft_loss"),
                  shares: Sequence[float] = (0.05, 0.1, 0.2)) -> pd.DataFrame:
    """Share of each measure's sum in the top tokens of a response, mean over responses: measures by `shares`.

    `tokens` as `analysis.token_table` gives it. Raises ValueError where a column is missing.
    """
    if absent := {*measures, "response"} - set(tokens.columns):
        raise ValueError(f"concentration: no column {', '.join(sorted(absent))}; expected a table of "
                         "analysis.token_table with at least one response")
    responses = [part for _, part in tokens.groupby("response")]
    return pd.DataFrame({f"top {share:.0%}": {m: float(np.mean([top_share(r, share, m) for r in responses]))
                                              for m in measures} for share in shares})


def delta_curve(values: Sequence[float], deltas: Sequence[float] = DELTAS) -> pd.DataFrame:
    """What Eq. 5 masks (values above delta): columns `delta`, `tokens_masked`, `mass_masked`, the shares from 0 to 1.

    `values`: forward KL of the tokens of one or many responses. The mass is NaN where all values are 0.
    Raises ValueError for negative values and where there are none.
    """
    ordered_N = np.sort(_masses(values))
    if not len(ordered_N):
        raise ValueError("delta_curve: got no tokens, expected the forward KL of at least one")
    above = len(ordered_N) - np.searchsorted(ordered_N, deltas, side="right")
    mass_N = np.concatenate([[0.0], np.cumsum(ordered_N[::-1])])
    return pd.DataFrame({"delta": list(deltas), "tokens_masked": above / len(ordered_N),
                         "mass_masked": mass_N[above] / mass_N[-1] if mass_N[-1] > 0 else np.nan})


def _masses(values: Sequence[float]) -> np.ndarray:
    values_N = np.asarray(values, dtype=np.float64)
    if len(values_N) and not values_N.min() >= 0:
        raise ValueError(f"got the value {values_N.min():.4g}, expected none below 0 and none unknown: shares of a sum "
                         "need a divergence, a loss or an entropy, not a log-ratio")
    return values_N


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation: Pearson's of the ranks, ties with their mean rank. NaN where one side is constant.

    Raises ValueError where the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"spearman: got {len(first)} and {len(second)} values, expected as many of both")
    ranks = [pd.Series(list(side), dtype=float).rank().to_numpy() for side in (first, second)]
    a_N, b_N = (r - r.mean() if len(r) else r for r in ranks)
    scale = float(np.sqrt((a_N**2).sum() * (b_N**2).sum()))
    return float((a_N * b_N).sum() / scale) if scale > 0 else float("nan")


def rank_correlations(tokens: pd.DataFrame, measure: str = "kl",
                      others: Sequence[str] = ("reverse_kl", "sft_loss"), *, draws: int = 4000,
                      seed: int = 0) -> pd.DataFrame:
    """Do other measures order a response's tokens as `measure` does? One row per other measure.

    `tokens` as `analysis.token_table` gives it: the measures and the columns `problem` and `response`. Spearman's
    correlation is taken within each response, then its mean over the responses of a problem and over the problems;
    tokens of different responses are never ranked together. Columns: `measure`, `other`, `correlation`, `low`, `high`
    (95%: percentiles of a bootstrap that draws problems, widened for their small number as in
    `comparison.bootstrap_interval`), `problems`, `responses`. Responses in which a measure is constant are left out. No
    interval for fewer than two problems.
    Raises ValueError where a column is missing.
    """
    if absent := [c for c in ("problem", "response", measure, *others) if c not in tokens.columns]:
        raise ValueError(f"rank_correlations: no column {absent[0]!r}; there are {', '.join(map(str, tokens.columns))}")
    rows = []
    for other in others:
        told = [(problem, spearman(part[measure].tolist(), part[other].tolist()))
                for (problem, _), part in tokens.groupby(["problem", "response"], sort=True)]
        known = pd.DataFrame(told, columns=["problem", "correlation"]).dropna()
        of_problem_P = known.groupby("problem")["correlation"].mean().to_numpy()
        low, high = _interval(of_problem_P, draws, seed)
        rows.append({"measure": measure, "other": other,
                     "correlation": float(of_problem_P.mean()) if len(of_problem_P) else float("nan"),
                     "low": low, "high": high, "problems": len(of_problem_P), "responses": len(known)})
    return pd.DataFrame(rows)


def _interval(value_P: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    count, mean = len(value_P), float(value_P.mean()) if len(value_P) else float("nan")
    if count < 2:
        return float("nan"), float("nan")
    widening = np.sqrt(count / (count - 1)) * t_quantile(count - 1) / 1.959964
    drawn = value_P[np.random.default_rng(seed).integers(0, count, (draws, count))].mean(axis=1) - mean
    low, high = np.clip(mean + widening * np.percentile(drawn, [2.5, 97.5]), -1, 1)
    return float(low), float(high)

"""Panes as bytes: a header (JSON) that names columns, and little-endian blobs that hold them.

blobs[0] is the table of words: token ids, and their texts as one JSON list in UTF-8. Each pane has a blob of word
indices of its tokens, and one blob per frame with the columns of `_frame_columns`. A column in the header is
[type, offset in bytes, count]; offsets are multiples of 8. Types: f4, f2 (IEEE floats, NaN = not known), u1, u2, u4.
Ranks are capped at 65,535, 0 = not known; `agree` is 0, 1, or 2 = not known.

Size: a response of 16,384 tokens with the top 5 of both sides must stay below 1.2 MB with its words. `_plans` are tried
in order until it does: first less exact numbers, then fewer alternatives per token, which the header tells (`cut`).
Shape suffixes: N tokens, M alternatives of all tokens, W words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from sgpo_lib.readings import TokenReadings
from sgpo_lib.widgets.token_kl.metrics import METRICS
from sgpo_lib.widgets.token_kl.panes import Pane

LIMIT = 1_180_000
"""Bytes of one frame with its share of the words, for responses up to LIMIT_TOKENS; in proportion above that."""
LIMIT_TOKENS = 16_384
RANK_CAP = 65_535
Columns = dict[str, np.ndarray]


def pack(panes: Sequence[Pane], title: str = "") -> tuple[dict[str, Any], list[bytes]]:
    """Header and blobs of all panes. Raises ValueError where a pane's alternatives do not fit its tokens."""
    plans = [_plan(pane) for pane in panes]
    kept = [[_kept(frame, plan[1]) for frame in pane.frames] for pane, plan in zip(panes, plans, strict=True)]
    words = _Words([frame for pane in panes for frame in pane.frames], [k for frames in kept for k in frames])
    blobs: list[bytes] = [b""]
    shown = []
    for pane, (precise, most), keeps in zip(panes, plans, kept, strict=True):
        header: dict[str, Any] = {"label": pane.label, "group": pane.group, "correct": pane.correct,
                                  "target": pane.target, "tokens": pane.tokens, "frames": []}  # fmt: skip
        header |= _put(blobs, _token_columns(pane.frames[0].table, words))
        for frame, keep in zip(pane.frames, keeps, strict=True):
            header["frames"].append({"label": frame.label, "exact": frame.exact, **_summary(frame.table),
                                     "cut": most if most and len(keep) < len(frame.alternative_M) else None,
                                     **_put(blobs, _frame_columns(frame, keep, words, precise))})  # fmt: skip
        shown.append(header)
    blobs[0], table = words.blob()
    metrics = [{"key": key, **asdict(metric)} for key, metric in METRICS.items()]
    return {"version": 1, "title": title, "metrics": metrics, "words": table, "panes": shown}, blobs


def _summary(table: pd.DataFrame) -> dict[str, Any]:
    """What the page needs of a frame before it looks at the columns: ends of the scales, and sums.

    An end is at least the value in the table and in the page, whichever rounding made larger: no token lies above it.
    """
    sizes = {key: np.abs(table[key].to_numpy(float)) for key, metric in METRICS.items() if metric.kind != "agreement"}
    sizes = {key: np.fmax(v, v.astype("f4")) for key, v in sizes.items()}
    most = {key: float(v[np.isfinite(v)].max(initial=0.0)) for key, v in sizes.items()}
    logp, kl = table["unguided_logp"].to_numpy(float), table["forward_kl"].to_numpy(float)
    known = kl[np.isfinite(kl)]
    return {"most": most, "mean_kl": float(known.mean()) if len(known) else None,
            "unguided_sum": float(logp.sum()) if np.isfinite(logp).all() else None}  # fmt: skip


def _plan(pane: Pane) -> tuple[int, int | None]:
    """(float32: KLs alone 0, sampled log-probs too 1, entropies too 2, alternatives too 3; alternatives per token).

    The second is None where all alternatives stay.
    """
    limit = LIMIT * max(1.0, pane.tokens / LIMIT_TOKENS)
    plans = _plans()
    for precise, most in plans:
        if max(_estimate(frame, precise, most) for frame in pane.frames) <= limit:
            return precise, most
    return plans[-1]


def _plans() -> list[tuple[int, int | None]]:
    return [*((precise, None) for precise in (3, 2, 1, 0)),
            *((0, most) for most in (16, 12, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1))]


def _estimate(frame: TokenReadings, precise: int, most: int | None) -> int:
    """Bytes of a frame under a plan, with its words and the indices of its tokens."""
    count = len(frame.table)
    rows = _kept(frame, most)
    ids = np.unique(frame.alternative_M[rows])
    text = sum(len(json.dumps(frame.words.get(int(i), ""), ensure_ascii=False).encode("utf-8", "replace")) + 5
               for i in ids)
    index = 2 if len(ids) < 60_000 else 4
    per_token = 8 + 4 * (1 + (precise > 0)) + 4 * (1 + (precise > 1)) + 4 + 1 + 1 + index + (0 if frame.exact else 4)
    return count * per_token + len(rows) * ((8 if precise > 2 else 4) + index) + text


def _kept(frame: TokenReadings, most: int | None) -> np.ndarray:
    """Rows of the alternatives that stay: per token the sampled one and those likeliest under either side."""
    total = len(frame.alternative_M)
    if len(frame.offset_N1) != len(frame.table) + 1 or frame.offset_N1[-1] != total:
        raise ValueError(f"offset_N1: got {len(frame.offset_N1)} entries up to {frame.offset_N1[-1]}, expected "
                         f"{len(frame.table) + 1} up to {total}, the number of alternatives")
    if most is None:
        return np.arange(total)
    token_M = np.repeat(np.arange(len(frame.table)), np.diff(frame.offset_N1))
    with np.errstate(invalid="ignore"):
        score_M = np.nan_to_num(np.fmax(frame.guided_logp_M, frame.unguided_logp_M), nan=-1e9, neginf=-1e9)
    sampled_M = frame.alternative_M == frame.table["token_id"].to_numpy()[token_M]
    order = np.lexsort((-np.where(sampled_M, np.inf, score_M), token_M))
    place_M = np.arange(total) - frame.offset_N1[token_M[order]]
    return np.sort(order[place_M < most])


class _Words:
    """The texts that tokens and alternatives are shown as, each (token id, text) once."""

    def __init__(self, frames: Sequence[TokenReadings], kept: Sequence[np.ndarray]):
        used = [frame.alternative_M[rows] for frame, rows in zip(frames, kept, strict=True)]
        self.ids_W = np.unique(np.concatenate(used)) if used else np.empty(0, np.int64)
        texts: dict[int, str] = {}
        for frame in frames:
            texts = {**frame.words, **texts}
        self.entries = [(int(i), texts.get(int(i), f"<{int(i)}>")) for i in self.ids_W]
        self.place = {entry: n for n, entry in enumerate(self.entries)}

    def alternatives(self, ids: np.ndarray) -> np.ndarray:
        """Indices of alternatives, which all have their place from the beginning."""
        return np.searchsorted(self.ids_W, ids)

    def index(self, token_id: int, text: str) -> int:
        """Index of a token's own text, which may differ from its word (half a character, a space in front)."""
        entry = (token_id, text)
        if entry not in self.place:
            self.place[entry] = len(self.entries)
            self.entries.append(entry)
        return self.place[entry]

    def blob(self) -> tuple[bytes, dict[str, Any]]:
        ids, texts = [e[0] for e in self.entries], [e[1] for e in self.entries]
        encoded = json.dumps(texts, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        columns = {"id": _unsigned(np.array(ids, np.int64)), "text": np.frombuffer(encoded, np.uint8)}
        laid: dict[str, list[Any]] = {}
        return b"".join(_lay(columns, laid)), {"count": len(ids), "blob": 0, "columns": laid}


def _token_columns(table: pd.DataFrame, words: _Words) -> Columns:
    """Word indices of the tokens' texts; those of their pieces where any differs from the text."""
    ids, texts, pieces = (table[c].tolist() for c in ("token_id", "token", "piece"))
    columns = {"text": _unsigned(np.array([words.index(i, t) for i, t in zip(ids, texts, strict=True)], np.int64))}
    if pieces != texts:
        stands = [words.index(i, p or t) for i, t, p in zip(ids, texts, pieces, strict=True)]
        columns["piece"] = _unsigned(np.array(stands, np.int64))
    return columns


def _frame_columns(frame: TokenReadings, rows: np.ndarray, words: _Words, precise: int) -> Columns:
    """Columns of one frame; see the head of the file."""
    table = frame.table
    types = {"forward_kl": "f4", "reverse_kl": "f4", "guided_logp": "f4" if precise > 0 else "f2",
             "unguided_logp": "f4" if precise > 0 else "f2", "guided_entropy": "f4" if precise > 1 else "f2",
             "unguided_entropy": "f4" if precise > 1 else "f2"}  # fmt: skip
    if not frame.exact:
        types |= {"guided_missing": "f2", "unguided_missing": "f2"}
    columns = {name: _float(table[name].to_numpy(float), kind) for name, kind in types.items()}
    for name in ("guided_rank", "unguided_rank"):
        rank = table[name].to_numpy(float, na_value=np.nan)
        columns[name] = np.nan_to_num(np.clip(rank, 0, RANK_CAP), nan=0.0).astype("<u2")
    agree = table["top1_agree"].astype("boolean")
    columns["agree"] = np.where(agree.isna(), 2, agree.fillna(False)).astype("u1")
    counts = np.diff(frame.offset_N1)
    token_of = np.repeat(np.arange(len(table)), counts)[rows]
    columns["count"] = _unsigned(np.bincount(token_of, minlength=len(table)))
    columns["word"] = _unsigned(words.alternatives(frame.alternative_M[rows]), least="<u2")
    for name, logp_M in (("guided", frame.guided_logp_M), ("unguided", frame.unguided_logp_M)):
        columns[name] = _float(logp_M[rows], "f4" if precise > 2 else "f2")
    return columns


def _float(values: np.ndarray, kind: str) -> np.ndarray:
    """Floats of a type; a half-precision number has no room beyond 65,504, where -inf stays -inf."""
    values = np.asarray(values, float)
    if kind == "f2":
        values = np.where(np.isfinite(values), np.clip(values, -65_504, 65_504), values)
    return values.astype(f"<{kind}")


def _unsigned(values: np.ndarray, least: str = "u1") -> np.ndarray:
    """Integers of the smallest type that holds them."""
    largest = int(values.max(initial=0))
    kinds = [kind for kind, limit in (("u1", 2**8), ("<u2", 2**16), ("<u4", 2**32)) if largest < limit]
    return values.astype(least if least in kinds else kinds[0])


def _put(blobs: list[bytes], columns: Columns) -> dict[str, Any]:
    """Append a blob; where it and its columns lie."""
    laid: dict[str, list[Any]] = {}
    blobs.append(b"".join(_lay(columns, laid)))
    return {"blob": len(blobs) - 1, "columns": laid}


def _lay(columns: Columns, into: dict[str, list[Any]]) -> Iterator[bytes]:
    """Bytes of columns one after another, each from a multiple of 8; their places are written to `into`."""
    at = 0
    for name, values in columns.items():
        raw = values.tobytes()
        into[name] = [values.dtype.str.lstrip("<|=>"), at, len(values)]
        filled = -len(raw) % 8
        yield raw + b"\0" * filled
        at += len(raw) + filled

"""What both prompts of one policy say about every token of a response: the record that views and tables read.

Shape suffixes: N response tokens, K candidates of a token (ids may repeat), M alternatives of all tokens. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sgpo_lib.token_text import token_pieces, token_texts, token_words

COLUMNS = ("token", "token_id", "piece", "forward_kl", "reverse_kl", "guided_logp", "unguided_logp", "sft_loss",
           "log_ratio", "guided_entropy", "unguided_entropy", "guided_rank", "unguided_rank", "top1_agree",
           "guided_missing", "unguided_missing")
"""Columns of `TokenReadings.table`, in order."""


@dataclass(frozen=True)
class TokenReadings:
    """The readings of one response of N tokens, with the alternatives that either side ranks highest at each token."""

    table: pd.DataFrame
    """One row per token, N rows, with the columns:

    token               text; the texts join to the response. A character of several tokens stands with its last one
                        and the others are ""
    token_id            int
    piece               what stands for the token where `token` is empty or partial, such as "<0xE2>"
    forward_kl          KL(guided || unguided), Eq. 3, nats
    reverse_kl          KL(unguided || guided), nats
    guided_logp         log-probability of the sampled token under the guided prompt, nats
    unguided_logp       the same under the unguided prompt
    sft_loss            -unguided_logp
    log_ratio           guided_logp - unguided_logp
    guided_entropy      nats
    unguided_entropy    nats
    guided_rank         int, 1 = most likely: one more than the number of strictly likelier tokens
    unguided_rank       int
    top1_agree          bool: both sides have the same most likely token
    guided_missing      probability mass that is not known; 0 where the readings are exact
    unguided_missing    the same of the unguided side
    """
    offset_N1: np.ndarray
    """int64 [N+1]: the alternatives of token i are the rows offset_N1[i]:offset_N1[i + 1] of the next three."""
    alternative_M: np.ndarray
    """int64 token ids: the union of both sides' top-k and the sampled token, highest guided log-probability first."""
    guided_logp_M: np.ndarray
    """float32, nats; NaN where it is not known."""
    unguided_logp_M: np.ndarray
    words: dict[int, str]
    """Token id -> text, for every id in alternative_M."""
    exact: bool
    """False: from the top-k of a served model, so that divergences are lower bounds (see sgpo_lib/served.py)."""
    label: str = ""
    """"guided 2", "autonomous 0", "step 40"."""


def readings_of(tokenizer: Any, response: Sequence[int], numbers: pd.DataFrame, candidate_NK: np.ndarray,
                guided_logp_NK: np.ndarray, unguided_logp_NK: np.ndarray, *, exact: bool,
                label: str = "") -> TokenReadings:
    """Put readings together: texts of the tokens, and each token's candidates, every id once, in their order.

    `numbers` has the remaining columns of the table. A candidate id below 0 stands for none.
    """
    id_N = np.asarray(response, dtype=np.int64)
    by_id = np.argsort(candidate_NK, axis=1, kind="stable")
    ids, guided, unguided = (np.take_along_axis(values, by_id, axis=1)
                             for values in (candidate_NK, guided_logp_NK, unguided_logp_NK))
    once = ids >= 0
    once[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    order = np.lexsort((np.nan_to_num(-unguided, nan=np.inf), np.nan_to_num(-guided, nan=np.inf), ~once), axis=1)
    ids, guided, unguided, once = (np.take_along_axis(values, order, axis=1)
                                   for values in (ids, guided, unguided, once))
    alternative_M = ids[once].astype(np.int64)
    words = token_words(tokenizer, np.unique(np.concatenate([alternative_M, id_N])).tolist())
    texts = token_texts(tokenizer, id_N.tolist())
    table = numbers.assign(token=texts, token_id=id_N, piece=token_pieces(texts, id_N.tolist(), words))
    return TokenReadings(table[list(COLUMNS)], np.concatenate([[0], np.cumsum(once.sum(axis=1))]).astype(np.int64),
                         alternative_M, guided[once].astype(np.float32), unguided[once].astype(np.float32), words,
                         exact, label)

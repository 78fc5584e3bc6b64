"""What strategy conditioning does to every token of a response, under both prompts of the same weights.

Shape suffixes: N response tokens, H hidden size, V vocabulary. All quantities in nats.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import pandas as pd
import torch

from sgpo_lib.losses.token_kl import forward_kl_guided_to_unguided, token_logp_and_entropy
from sgpo_lib.policy import Policy
from sgpo_lib.prompts import prompt_ids
from sgpo_lib.records import Problem, RolloutGroup

_STEP_END = re.compile(r"[.;?!:]\s*$|\n\s*$")
_DECIMAL = re.compile(r"\d\.\Z")
_LIST_MARK = re.compile(r"\s*\d{1,2}[.)]\s*")


@torch.no_grad()
def token_frame(policy: Policy, problem: Problem, response: Sequence[int], delta: float = 1.0,
                chunk: int = 256) -> pd.DataFrame:
    """One row per response token, from two forward passes over the same response.

    Columns: `token` (its text), `step` (index of the reasoning step), `kl` (forward KL guided to unguided, Eq. 3,
    exact over the vocabulary), `kept` (kl <= delta, Eq. 5), `guided_logp`, `unguided_logp`, `sft_loss`
    (-unguided_logp), `guided_entropy`, `unguided_entropy`.
    Raises ValueError where the problem has no strategy or the response is empty.
    """
    batches = {guided: policy.token_batch([(prompt_ids(policy.tokenizer, problem, guided=guided), tuple(response))])
               for guided in (True, False)}
    training = policy.model.training
    policy.model.eval()
    hidden = {guided: policy.response_hidden(batch) for guided, batch in batches.items()}
    policy.model.train(training)
    head = policy.head()
    target_N = batches[False].target_N
    guided_logp_N, guided_entropy_N = token_logp_and_entropy(hidden[True], target_N, *head, chunk)
    unguided_logp_N, unguided_entropy_N = token_logp_and_entropy(hidden[False], target_N, *head, chunk)
    kl_N = forward_kl_guided_to_unguided(hidden[True], hidden[False], *head, chunk)
    tokens = token_texts(policy, response)
    return pd.DataFrame({
        "token": tokens, "step": step_of_tokens(tokens), "kl": kl_N.tolist(), "kept": (kl_N <= delta).tolist(),
        "guided_logp": guided_logp_N.tolist(), "unguided_logp": unguided_logp_N.tolist(),
        "sft_loss": (-unguided_logp_N).tolist(), "guided_entropy": guided_entropy_N.tolist(),
        "unguided_entropy": unguided_entropy_N.tolist()})


def token_texts(policy: Policy, response: Sequence[int]) -> list[str]:
    """Text of each token as it adds to the decoded response, so that the texts join to the whole.

    A character of several tokens stands with its last one; the others are empty.
    """
    texts, shown = [], 0
    for end in range(1, len(response) + 1):
        text = policy.tokenizer.decode(response[:end])
        if text.endswith("\ufffd") and end < len(response):  # so far, only a part of a character
            texts.append("")
        else:
            texts.append(text[shown:])
            shown = len(text)
    return texts


def step_of_tokens(tokens: Sequence[str]) -> list[int]:
    """Reasoning step of each token: a step ends with a line, a sentence or a semicolon (not with a decimal point)."""
    steps, current, text = [], 0, ""
    for i, token in enumerate(tokens):
        steps.append(current)
        text += token
        following = tokens[i + 1] if i + 1 < len(tokens) else ""
        decimal = _DECIMAL.search(text) and following[:1].isdigit()
        marks = decimal or _LIST_MARK.fullmatch(text)  # "1." opens a step, it is none
        if _STEP_END.search(text) and text.strip() and not marks and following.strip():
            current, text = current + 1, ""
    return steps


def step_frame(tokens: pd.DataFrame) -> pd.DataFrame:
    """One row per reasoning step: its text, tokens, mean KL and mean SFT loss (nats per token)."""
    grouped = tokens.groupby("step")
    frame = grouped.agg(kl=("kl", "mean"), sft_loss=("sft_loss", "mean"), tokens=("kl", "size")).reset_index()
    frame["text"] = grouped["token"].agg("".join).str.strip().to_list()
    return frame


def top_share(tokens: pd.DataFrame, share: float = 0.1) -> float:
    """Share of the response's whole KL that its top `share` of tokens hold (at least one token)."""
    ordered = tokens["kl"].sort_values(ascending=False)
    count = max(1, round(share * len(ordered)))
    total = float(ordered.sum())
    return float(ordered.head(count).sum()) / total if total > 0 else 0.0


def rank_auc(score: Sequence[float], positive: Sequence[bool]) -> float:
    """Chance that a positive token scores above another one, ties counting half (area under the ROC curve).

    0.5 is no better than chance. NaN where all tokens or none are positive.
    """
    ranks = pd.Series(list(score), dtype=float).rank()
    chosen = pd.Series(list(positive), dtype=bool)
    hits, others = int(chosen.sum()), int((~chosen).sum())
    if not hits or not others:
        return float("nan")
    return (float(ranks[chosen].sum()) - hits * (hits + 1) / 2) / (hits * others)


def selectivity(tokens: pd.DataFrame, critical: Sequence[bool]) -> dict[str, float]:
    """How well the divergence, and beside it the cross-entropy, point at tokens known to be strategy-critical.

    `tokens` has the columns kl and sft_loss (nats; `token_frame`, of one or of many responses), `critical` one value
    per row. Gives `token_share` (share of the tokens that are critical), `kl_share` and `sft_share` (their share of
    the sum over all tokens), `kl_auc` and `sft_auc` (`rank_auc`), and `kl_precision`, `sft_precision` (critical among
    the highest, as many as there are critical ones; equal scores in order of the rows). Paper, section 5.3.2.
    """
    chosen = pd.Series(list(critical), dtype=bool, index=tokens.index)
    told = {"token_share": float(chosen.mean())}
    for name, column in (("kl", "kl"), ("sft", "sft_loss")):
        total = float(tokens[column].sum())
        highest = tokens[column].sort_values(ascending=False, kind="stable").index[: int(chosen.sum())]
        told[f"{name}_share"] = float(tokens.loc[chosen, column].sum()) / total if total > 0 else float("nan")
        told[f"{name}_auc"] = rank_auc(tokens[column].tolist(), chosen.tolist())
        told[f"{name}_precision"] = float(chosen[highest].mean()) if len(highest) else float("nan")
    return told


def token_table(policy: Policy, groups: Sequence[RolloutGroup], critical: Collection[str],
                delta: float = 1.0) -> pd.DataFrame:
    """`token_frame` of every correct guided response of judged groups, one after another.

    Adds the columns `response` (a running number), `problem`, `critical` (the token is one of the words `critical`) and
    `stage`: 1, 2, ... for the reasoning steps with a critical word, 0 for what comes before them, -1 for what comes
    after. Empty where no guided response is correct.
    """
    frames: list[pd.DataFrame] = []
    for group in groups:
        for rollout in group.guided:
            if rollout.verdict and rollout.verdict.correct:
                frame = token_frame(policy, group.problem, rollout.token_ids, delta)
                frame["critical"] = [token.strip() in critical for token in frame["token"]]
                frames.append(frame.assign(stage=_stages(frame), response=len(frames), problem=group.problem.id))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _stages(frame: pd.DataFrame) -> list[int]:
    decisive = frame.groupby("step")["critical"].any()
    count = decisive.cumsum().where(decisive)
    stages = count.ffill().fillna(0).astype(int)
    last = decisive[decisive].index.max() if decisive.any() else -1
    return [-1 if step > last >= 0 else int(stages[step]) for step in frame["step"]]

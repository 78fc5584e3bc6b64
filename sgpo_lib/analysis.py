"""What strategy conditioning does to every token of a response, under both prompts of the same weights.

Shape suffixes: N response tokens, C tokens of a chunk, H hidden size, V vocabulary, K alternatives of a token, M all of
them. All quantities in nats.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import pandas as pd
import torch
from torch import Tensor

from sgpo_lib.losses.head import Head, blocks, exact
from sgpo_lib.losses.token_kl import divergence, entropy
from sgpo_lib.policy import Policy
from sgpo_lib.prompts import prompt_ids
from sgpo_lib.readings import TokenReadings, readings_of
from sgpo_lib.records import Problem, RolloutGroup

_STEP_END = re.compile(r"[.;?!:]\s*$|\n\s*$")
_DECIMAL = re.compile(r"\d\.\Z")
_LIST_MARK = re.compile(r"\s*\d{1,2}[.)]\s*")


@torch.no_grad()
def token_readings(policy: Policy, problem: Problem, response: Sequence[int], *, top: int = 5, chunk: int = 256,
                   label: str = "") -> TokenReadings:
    """Exact quantities of every response token under pi(.|q,s) and pi(.|q), and the `top` alternatives of both.

    Two forward passes give the hidden states; full distributions exist for `chunk` tokens at a time. Logits are in
    float32 also where the weights are bfloat16 (a training step takes them in the weights' type, so its numbers differ
    by that rounding); sums of a divergence that rounding puts below 0 are 0. Among equally likely tokens the one with
    the lowest id is the most likely, and which of them are among the `top` is left open.
    Raises ValueError where the problem has no strategy, the response is empty or foreign to the model, or prompt and
    response exceed the context.
    """
    if top < 0 or chunk < 1:
        raise ValueError(f"token_readings: got top={top} and chunk={chunk}, expected at least 0 and 1")
    ids = [int(i) for i in response]
    head = policy.head()
    _check_response(policy, problem, ids, len(head.matrix))
    target_N = torch.tensor(ids, device=policy.device)
    guided_NH, unguided_NH = (_hidden(policy, problem, ids, guided=guided) for guided in (True, False))
    head = Head(exact(head.matrix), None if head.bias is None else exact(head.bias), head.softcap)
    columns: list[dict[str, Tensor]] = []
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(ids), chunk):
        part = slice(start, start + chunk)
        numbers, alternatives = _chunk(guided_NH[part], unguided_NH[part], target_N[part], head, top)
        columns.append(numbers)
        kept.append(alternatives)
    table = pd.DataFrame({name: torch.cat([c[name] for c in columns]).cpu().numpy() for name in columns[0]})
    alternative_NK, guided_logp_NK, unguided_logp_NK = (torch.cat(parts).cpu().numpy() for parts in zip(
        *kept, strict=True))
    return readings_of(policy.tokenizer, ids, table.assign(guided_missing=0.0, unguided_missing=0.0), alternative_NK,
                       guided_logp_NK, unguided_logp_NK, exact=True, label=label)


def _check_response(policy: Policy, problem: Problem, ids: Sequence[int], vocabulary: int) -> None:
    if not ids:
        raise ValueError(f"problem {problem.id}: got a response of 0 tokens, expected at least one (the end "
                         "token counts)")
    if foreign := [i for i in ids if not 0 <= i < vocabulary]:
        raise ValueError(f"problem {problem.id}: the response has token id {foreign[0]}, expected 0 to "
                         f"{vocabulary - 1}. Take a response of this model, or encode its text with its tokenizer")


def _hidden(policy: Policy, problem: Problem, ids: Sequence[int], *, guided: bool) -> Tensor:
    """States [N, H] that predict the response tokens, with dropout off; the model is left in the mode it was in."""
    prompt = prompt_ids(policy.tokenizer, problem, guided=guided)
    if len(prompt) + len(ids) > policy.context:
        raise ValueError(f"problem {problem.id}: got a {'guided' if guided else 'autonomous'} prompt of {len(prompt)} "
                         f"and a response of {len(ids)} tokens, expected at most {policy.context} together (the "
                         "context). Shorten the response, or take a model with a longer context")
    training = policy.model.training
    policy.model.eval()
    try:
        return policy.response_hidden(policy.token_batch([(prompt, ids)]))
    finally:
        policy.model.train(training)


def _chunk(guided_CH: Tensor, unguided_CH: Tensor, target_C: Tensor, head: Head,
           top: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Columns of the table, and (alternatives, guided and unguided log-probability) [C, K], repeated ids included."""
    guided_CV, unguided_CV = (head.logits(hidden_CH.to(head.matrix.dtype)) for hidden_CH in (guided_CH, unguided_CH))
    numbers, alternatives = zip(*(_rows(guided_CV[rows], unguided_CV[rows], target_C[rows], top)
                                  for rows in blocks(unguided_CV)), strict=True)
    ids, guided, unguided = (torch.cat(parts) for parts in zip(*alternatives, strict=True))
    return {name: torch.cat([n[name] for n in numbers]) for name in numbers[0]}, (ids, guided, unguided)


def _rows(guided_logits_CV: Tensor, unguided_logits_CV: Tensor, target_C: Tensor,
          top: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """`_chunk` of some of its tokens, from logits in float32 or better."""
    guided_CV, guided_rank_C, guided_top_CK = _side(guided_logits_CV, target_C, top)
    unguided_CV, unguided_rank_C, unguided_top_CK = _side(unguided_logits_CV, target_C, top)
    at = target_C[:, None]
    guided_C, unguided_C = guided_CV.gather(1, at)[:, 0], unguided_CV.gather(1, at)[:, 0]
    alternative_CK = torch.cat([at, guided_top_CK[:, 1:], unguided_top_CK[:, 1:]], dim=1)
    return ({
        "forward_kl": divergence(guided_CV, unguided_CV).clamp(min=0),
        "reverse_kl": divergence(unguided_CV, guided_CV).clamp(min=0),
        "guided_logp": guided_C, "unguided_logp": unguided_C, "sft_loss": -unguided_C,
        "log_ratio": guided_C - unguided_C, "guided_entropy": entropy(guided_CV),
        "unguided_entropy": entropy(unguided_CV), "guided_rank": guided_rank_C, "unguided_rank": unguided_rank_C,
        "top1_agree": guided_top_CK[:, 0] == unguided_top_CK[:, 0],
    }, (alternative_CK, guided_CV.gather(1, alternative_CK), unguided_CV.gather(1, alternative_CK)))


def _side(logits_CV: Tensor, target_C: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [C, V], rank of each target [C], and ids [C, 1 + K]: the most likely one, then the `top`."""
    rank_C = (logits_CV > logits_CV.gather(1, target_C[:, None])).sum(1) + 1
    top_CK = logits_CV.topk(min(top, logits_CV.shape[1]), dim=1).indices
    return torch.log_softmax(logits_CV, dim=-1), rank_C, torch.cat([logits_CV.argmax(1, keepdim=True), top_CK], dim=1)


def token_frame(policy: Policy, problem: Problem, response: Sequence[int], delta: float = 1.0,
                chunk: int = 256) -> pd.DataFrame:
    """`step_table` of `token_readings`. Raises what that raises."""
    return step_table(token_readings(policy, problem, response, top=0, chunk=chunk), delta)


def step_table(readings: TokenReadings, delta: float = 1.0) -> pd.DataFrame:
    """The table of readings with what Eq. 5 does to each token, for steps, heat maps and sets of responses.

    `forward_kl` is named `kl`; added are `step` (index of the reasoning step) and `kept` (kl <= delta).
    """
    table = readings.table.rename(columns={"forward_kl": "kl"})
    return table.assign(step=step_of_tokens(table["token"].tolist()), kept=table["kl"] <= delta)


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


def top_share(tokens: pd.DataFrame, share: float = 0.1, column: str = "kl") -> float:
    """Share of the response's whole KL (or another column's sum) that its top `share` of tokens hold, at least one."""
    ordered = tokens[column].sort_values(ascending=False)
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


def token_table(policy: Policy, groups: Sequence[RolloutGroup], critical: Collection[str] = (),
                delta: float = 1.0, *, only_correct: bool = True) -> pd.DataFrame:
    """`token_frame` of every correct guided response of judged groups (or of every guided one), one after another.

    Adds the columns `response` (a running number), `problem`, `critical` (the token is one of the words `critical`) and
    `stage`: 1, 2, ... for the reasoning steps with a critical word, 0 for what comes before them, -1 for what comes
    after. Empty where there is no such response.
    """
    frames: list[pd.DataFrame] = []
    for group in groups:
        for rollout in group.guided:
            if not only_correct or rollout.correct:
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

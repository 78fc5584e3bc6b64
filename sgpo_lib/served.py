"""Token readings of a model that is only served: from the top-k `prompt_logprobs` of a vLLM endpoint.

vLLM's completions endpoint scores a prompt that is given as token ids: for every position the log-probability and rank
of the token that stands there and of the k most likely ones. Both prompts of a response are scored so. What follows is
exact for the sampled token (log-probabilities, log-ratio, ranks), for the most likely one, and for every alternative
that is known. Divergences and entropies are lower bounds, because the rest of the vocabulary is one bucket:

    KL(P || Q) >= sum over the tokens C known on both sides of P(v) log(P(v) / Q(v)) + P(rest) log(P(rest) / Q(rest))

by the log-sum inequality (merging outcomes never raises a divergence: data processing). It is tightened by what is
known on one side: a token that Q's top-k lacks has at most the probability of Q's k-th token, and the other way round.
With k the size of the vocabulary nothing is missing and the bound is the divergence.

Shape suffixes: N response tokens, K candidates of a token: the sampled token and the top-k of both sides.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sgpo_lib.extraction.chat import Endpoint, one_line
from sgpo_lib.prompts import prompt_ids
from sgpo_lib.readings import TokenReadings, readings_of
from sgpo_lib.records import Problem

Position = Mapping[str, Mapping[str, Any]]
"""Token id -> {"logprob": nats, "rank": 1 for the most likely, ...}: one position of `prompt_logprobs`."""
_line = functools.partial(one_line, length=300)
"""One short line without the key."""
_SLACK = 1e-6
"""Error that rounding leaves in a bucket's probability; the unlikelier side's bucket is taken to be larger by it."""


def served_readings(problem: Problem, response: Sequence[int], tokenizer: Any, model: str, *, top: int = 20,
                    label: str = "", retries: int = 5, timeout_s: float = 600.0) -> TokenReadings:
    """Readings of a response under both prompts of `model` at a vLLM endpoint, `exact=False`.

    Address and key come from `OPENAI_BASE_URL` and `OPENAI_API_KEY`, as for extraction. `tokenizer` is the served
    model's, loaded here: token ids must agree. `top` alternatives of each side are asked for; the server allows 20
    unless it was started with a larger --max-logprobs. forward_kl, reverse_kl and the entropies are lower bounds (top
    of this file); guided_missing and unguided_missing say how much probability each side leaves unknown. Ranks are the
    server's, which counts equally likely tokens as likelier ones.
    Raises ValueError where the problem has no strategy, the response is empty, or the endpoint fails or does not
    answer with log-probabilities of these tokens.
    """
    ids = [int(i) for i in response]
    if top < 1 or not ids:
        raise ValueError(f"problem {problem.id}: got top={top} and a response of {len(ids)} tokens, expected at least "
                         "one of both")
    prompts = [prompt_ids(tokenizer, problem, guided=guided) for guided in (True, False)]
    with _client(model, retries, timeout_s) as client:
        guided, unguided = (_positions(client, model, prompt, ids, top) for prompt in prompts)
    return _readings(tokenizer, ids, guided, unguided, top, label)


# ---------------------------------------------------------------------------------------------------------- endpoint


def _client(model: str, retries: int, timeout_s: float) -> Any:
    Endpoint(model, retries=retries, timeout_s=timeout_s)  # raises for what is missing: name, package, key, address
    import openai

    return openai.OpenAI(max_retries=retries, timeout=timeout_s)


def _positions(client: Any, model: str, prompt: Sequence[int], ids: Sequence[int], top: int) -> list[Position]:
    """What the endpoint says about each response token after a prompt."""
    import openai

    where = f"endpoint {client.base_url}, model {model}"
    try:
        raw = client.completions.with_raw_response.create(
            model=model, prompt=[*prompt, *ids], max_tokens=1, temperature=0.0, extra_body={"prompt_logprobs": top})
        told = json.loads(raw.text() if callable(raw.text) else raw.text)
    except openai.APIStatusError as error:
        raise ValueError(f"{where}: HTTP {error.status_code}: {_line(error.message)}{_cure(error.message)}") from None
    except openai.APITimeoutError:
        raise ValueError(f"{where}: no answer within {client.timeout} s. Raise timeout_s, or lower top") from None
    except openai.APIConnectionError as error:
        raise ValueError(f"{where}: no connection ({_line(str(error.__cause__ or error))}). Start the server, or set "
                         "OPENAI_BASE_URL to its address") from None
    except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON
        raise ValueError(f"{where}: unreadable answer ({_line(f'{type(error).__name__}: {error}')}), expected a "
                         "completion in JSON") from None
    return _checked(told, where, len(prompt), ids)


def _checked(told: Any, where: str, before: int, ids: Sequence[int]) -> list[Position]:
    """The positions of the response tokens, once they are what they should be."""
    try:
        positions = told["choices"][0].get("prompt_logprobs") or told.get("prompt_logprobs")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"{where}: not a completion: {_line(str(told))}") from None
    if not isinstance(positions, list):
        raise ValueError(f"{where}: the answer has no prompt_logprobs. Expected a vLLM server and its completions "
                         "endpoint; other servers do not score prompts")
    if len(positions) != before + len(ids):
        raise ValueError(f"{where}: got log-probabilities of {len(positions)} tokens, expected {before + len(ids)}. "
                         "The server must not change the prompt")
    for t, (position, token) in enumerate(zip(positions[before:], ids, strict=True)):
        if not isinstance(position, dict) or str(token) not in position:
            raise ValueError(f"{where}: nothing about token {token}, number {t} of the response. Expected its "
                             "log-probability: check that tokenizer and model belong together, and start the server "
                             "with --no-enable-prefix-caching")
        try:
            total = sum(math.exp(entry["logprob"]) for entry in position.values())
            fine = all(isinstance(entry["rank"], int) and int(token_id) >= 0 for token_id, entry in position.items())
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(f"{where}: not log-probabilities with ranks: {_line(str(position))}") from None
        if not fine or not total < 1.001:
            raise ValueError(f"{where}: the probabilities of token {t} sum to {total:.4g}, expected at most 1. Serve "
                             "the model with --logprobs-mode raw_logprobs")
    return positions[before:]


def _cure(message: str) -> str:
    if "prompt logprobs of" in message:
        return ". Lower top, or start the server with a larger --max-logprobs"
    if "context length" in message or "max_model_len" in message or "max_tokens" in message:
        return ". Shorten the response, or start the server with a larger --max-model-len"
    return ""


# ------------------------------------------------------------------------------------------------------------ bounds


def _readings(tokenizer: Any, ids: Sequence[int], guided: Sequence[Position], unguided: Sequence[Position],
              top: int, label: str) -> TokenReadings:
    known = [sorted({int(i) for side in sides for i in side}) for sides in zip(guided, unguided, strict=True)]
    width = max(map(len, known))
    candidate_NK = np.array([row + [-1] * (width - len(row)) for row in known])
    guided_NK, unguided_NK = (_logps(side, candidate_NK) for side in (guided, unguided))
    guided_N, unguided_N = (np.array([p[str(i)]["logprob"] for p, i in zip(side, ids, strict=True)], dtype=np.float64)
                            for side in (guided, unguided))
    limit_N, other_limit_N = (np.array([sorted((entry["logprob"] for entry in p.values()), reverse=True)[:top][-1]
                                        for p in side]) for side in (guided, unguided))
    first_N2 = np.array([[_first(a), _first(b)] for a, b in zip(guided, unguided, strict=True)])
    numbers = pd.DataFrame({
        "forward_kl": divergence_bound(guided_NK, unguided_NK, limit_N, other_limit_N),
        "reverse_kl": divergence_bound(unguided_NK, guided_NK, other_limit_N, limit_N),
        "guided_logp": guided_N, "unguided_logp": unguided_N, "sft_loss": -unguided_N,
        "log_ratio": guided_N - unguided_N, "guided_entropy": entropy_bound(guided_NK),
        "unguided_entropy": entropy_bound(unguided_NK),
        "guided_rank": [int(p[str(i)]["rank"]) for p, i in zip(guided, ids, strict=True)],
        "unguided_rank": [int(p[str(i)]["rank"]) for p, i in zip(unguided, ids, strict=True)],
        "top1_agree": first_N2[:, 0] == first_N2[:, 1], "guided_missing": missing_mass(guided_NK),
        "unguided_missing": missing_mass(unguided_NK)})
    return readings_of(tokenizer, ids, numbers, candidate_NK, guided_NK, unguided_NK, exact=False, label=label)


def _logps(side: Sequence[Position], candidate_NK: np.ndarray) -> np.ndarray:
    """Log-probability of each candidate on one side, NaN where it is not known."""
    nothing = {"logprob": math.nan}
    return np.array([[position.get(str(i), nothing)["logprob"] for i in row]
                     for position, row in zip(side, candidate_NK.tolist(), strict=True)], dtype=np.float64)


def _first(position: Position) -> int:
    """The most likely token; of equally likely ones that with the lowest id."""
    return min((-entry["logprob"], int(token)) for token, entry in position.items())[1]


def missing_mass(logp_NK: np.ndarray) -> np.ndarray:
    """Probability that the known tokens (not NaN) leave to the others."""
    return np.clip(1 - np.nansum(np.exp(logp_NK), axis=1), 0, 1)


def entropy_bound(logp_NK: np.ndarray) -> np.ndarray:
    """Entropy of the known tokens and one bucket for the others, nats: at most the true one."""
    known_NK = np.nan_to_num(logp_NK, nan=-np.inf)
    rest_N = missing_mass(logp_NK)
    return -(_times(np.exp(known_NK), known_NK).sum(axis=1) + _times(rest_N, np.log(np.maximum(rest_N, 1e-300))))


def divergence_bound(logp_NK: np.ndarray, other_NK: np.ndarray, limit_N: np.ndarray | float = 0.0,
                     other_limit_N: np.ndarray | float = 0.0) -> np.ndarray:
    """Lower bound of KL(P || Q) from the known log-probabilities (NaN: not known), nats.

    No token that is unknown on a side is likelier there than its limit (log-probability of the k-th token; 0 says
    nothing). For tokens outside C, and any x > 0, p log(p / q) >= p log x + p - x q, with equality at p = x q. The sum
    of the right sides depends on the two masses outside C alone; with their ratio for x it is the bucket of this file's
    top. Where a limit keeps a token from p = x q, what the right side is then too small by is added.
    """
    both_NK = ~np.isnan(logp_NK) & ~np.isnan(other_NK)
    p_NK, q_NK = (np.exp(np.nan_to_num(side, nan=-np.inf)) for side in (logp_NK, other_NK))
    with np.errstate(invalid="ignore"):
        known_N = np.where(both_NK, _times(p_NK, logp_NK - other_NK), 0).sum(axis=1)
    p_N, q_N = (np.clip(1 - np.where(both_NK, side, 0).sum(axis=1), 0, 1) for side in (p_NK, q_NK))
    x_N = (p_N + _SLACK) / (q_N + _SLACK)
    at_least_N = np.clip(p_N - _SLACK * np.sign(np.log(x_N) + 1), 0, 1)
    bucket_N = at_least_N * (np.log(x_N) + 1) - x_N * (q_N + _SLACK)

    x_N1 = x_N[:, None]
    most_p_N1, most_q_N1 = (np.exp(np.broadcast_to(limit, x_N.shape))[:, None] for limit in (limit_N, other_limit_N))
    p_only_NK, q_only_NK = np.where(both_NK, 0, p_NK), np.where(both_NK, 0, q_NK)
    short_NK = (np.where(p_only_NK > x_N1 * most_q_N1, _gap(p_only_NK, most_q_N1, x_N1), 0)
                + np.where(x_N1 * q_only_NK > most_p_N1, _gap(most_p_N1, q_only_NK, x_N1), 0))
    return np.maximum(known_N + bucket_N + short_NK.sum(axis=1), 0)


def _gap(p: np.ndarray, q: np.ndarray, x: np.ndarray) -> np.ndarray:
    """p log(p / q) - (p log x + p - x q): 0 at p = x q, else above."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return _times(p, np.log(p) - np.log(q) - np.log(x)) - p + x * q


def _times(probability: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Product, 0 where the probability is."""
    return np.where(probability > 0, probability * np.where(probability > 0, factor, 0), 0)

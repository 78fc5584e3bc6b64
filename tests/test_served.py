"""Readings of a served model, against a server that answers as vLLM does with a real model's own log-probabilities.

Shapes: N response tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import oracles
import pytest
import torch

from sgpo_lib.analysis import token_readings
from sgpo_lib.config import ModelConfig
from sgpo_lib.policy import Policy, load_policy
from sgpo_lib.readings import COLUMNS, TokenReadings
from sgpo_lib.records import Problem
from sgpo_lib.served import divergence_bound, entropy_bound, missing_mass, served_readings

KEY = "canary-7d1e"


class Server:
    """Completions with `prompt_logprobs`; `change` may replace the answer by another (status, body)."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.asked: list[dict[str, Any]] = []
        self.change: Any = None
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append({"path": path, **body})
        positions = scored(self.policy, body["prompt"], body["prompt_logprobs"])
        told = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"],
                "choices": [{"index": 0, "text": "x", "finish_reason": "length", "logprobs": None,
                             "prompt_logprobs": positions}]}  # fmt: skip
        return self.change(told) if self.change else (200, told)


class _Handler(BaseHTTPRequestHandler):
    server_of: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        status, told = self.server_of.answer(self.path, body)
        data = (told if isinstance(told, str) else json.dumps(told)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def scored(policy: Policy, ids: list[int], top: int) -> list[dict[str, Any] | None]:
    """As vLLM: nothing for the first token, then for each its own entry and the `top` likeliest, by token id."""
    policy.model.eval()
    with torch.no_grad():
        logp_SV = torch.log_softmax(policy.model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
    positions: list[dict[str, Any] | None] = [None]
    for logp_V, token in zip(logp_SV[:-1], ids[1:], strict=True):
        best = logp_V.topk(min(top, len(logp_V)))
        entries = [(token, float(logp_V[token]), int((logp_V >= logp_V[token]).sum()))]
        entries += [(int(i), float(x), rank) for rank, (i, x) in enumerate(zip(
            best.indices, best.values, strict=True), start=1)]
        positions.append({str(i): {"logprob": x, "rank": rank, "decoded_token": policy.tokenizer.decode([i])}
                          for i, x, rank in entries})
    return positions


@pytest.fixture(scope="module")
def policy(base) -> Policy:
    found = load_policy(ModelConfig(source=str(base), device="cpu"), str(base), 0)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return found


@pytest.fixture(scope="module")
def served(policy) -> Iterator[Server]:
    server = Server(policy)
    yield server
    server.close()


@pytest.fixture
def server(served, monkeypatch) -> Server:
    monkeypatch.setenv("OPENAI_BASE_URL", served.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    served.change, served.asked = None, []
    return served


@pytest.fixture(scope="module")
def exact(policy, problem, response) -> TokenReadings:
    return token_readings(policy, problem, response, top=len(policy.tokenizer))


EXACT = ["token", "token_id", "piece", "guided_logp", "unguided_logp", "sft_loss", "log_ratio", "guided_rank",
         "unguided_rank", "top1_agree"]
BOUNDED = ["forward_kl", "reverse_kl", "guided_entropy", "unguided_entropy"]


def test_what_is_exact_and_what_is_a_lower_bound(server, policy, problem, response, exact):
    before = dict.fromkeys(BOUNDED, math.inf)
    for top in (1, 5, 20, 100, len(policy.tokenizer)):
        told = served_readings(problem, response, policy.tokenizer, "m", top=top, label="served")
        assert tuple(told.table.columns) == COLUMNS and not told.exact and told.label == "served"
        for name in EXACT:
            mine, theirs = told.table[name].tolist(), exact.table[name].tolist()
            assert mine == (pytest.approx(theirs, abs=1e-5) if "lo" in name else theirs), name
        for name in BOUNDED:
            gap = exact.table[name] - told.table[name]
            assert gap.min() > -1e-5, f"{name}, top {top}: above the true value"
            assert gap.max() <= before[name] + 1e-5, "more alternatives, a closer bound"
            before[name] = gap.max()
        for side in ("guided", "unguided"):
            assert ((told.table[f"{side}_missing"] >= 0) & (told.table[f"{side}_missing"] < 1)).all()
    assert max(before.values()) < 1e-4, "the whole vocabulary: the true value"
    assert (told.table[["guided_missing", "unguided_missing"]] < 1e-5).all().all()
    assert told.alternative_M.tolist() == exact.alternative_M.tolist()


def test_missing_mass_and_alternatives(server, policy, problem, response, exact):
    told = served_readings(problem, response, policy.tokenizer, "m", top=3)
    for i, token in enumerate(response):
        mine, whole = (slice(r.offset_N1[i], r.offset_N1[i + 1]) for r in (told, exact))
        ids = exact.alternative_M[whole].tolist()
        true = {side: dict(zip(ids, getattr(exact, f"{side}_logp_M")[whole].tolist(), strict=True))
                for side in ("guided", "unguided")}
        for side, logps in true.items():
            known = {*sorted(logps, key=lambda v: -logps[v])[:3], token}
            missing = 1 - sum(math.exp(logps[v]) for v in known)
            assert told.table[f"{side}_missing"][i] == pytest.approx(missing, abs=1e-5)
            for v, x in zip(told.alternative_M[mine], getattr(told, f"{side}_logp_M")[mine], strict=True):
                assert np.isnan(x) == (v not in known) and (np.isnan(x) or x == pytest.approx(logps[v], abs=1e-5))
        guided = told.guided_logp_M[mine]
        known_first = guided[~np.isnan(guided)]
        assert (np.diff(known_first) <= 0).all() and np.isnan(guided[len(known_first):]).all()
        assert len(set(told.alternative_M[mine].tolist())) == len(guided)


def test_what_is_asked(server, policy, problem, response):
    served_readings(problem, response, policy.tokenizer, "some/model", top=4)
    assert [a["path"] for a in server.asked] == ["/v1/completions"] * 2
    for asked in server.asked:
        assert (asked["model"], asked["prompt_logprobs"], asked["max_tokens"]) == ("some/model", 4, 1)
        assert tuple(asked["prompt"][-len(response):]) == response
    assert len(server.asked[0]["prompt"]) > len(server.asked[1]["prompt"]), "guided first"


@pytest.mark.parametrize("seed", range(8))
def test_bounds_of_random_distributions(seed):
    """Against plain loops, with tokens known on one side only, on both, on none; with and without limits."""
    rng = np.random.default_rng(seed)
    for sharp in (0.5, 3.0, 12.0):
        logits = rng.normal(size=(2, 40)) * sharp
        p, q = (np.array(oracles.log_softmax(row)) for row in logits)
        a, b = (np.where(rng.random(40) < 0.3, np.nan, side)[None] for side in (p, q))
        assert entropy_bound(a)[0] <= oracles.entropies([logits[0]])[0] + 1e-9
        both = [v for v in range(40) if not math.isnan(a[0, v]) and not math.isnan(b[0, v])]
        cells = [(math.exp(p[v]), math.exp(q[v])) for v in both]
        cells.append((1 - sum(x for x, _ in cells), 1 - sum(y for _, y in cells) + 1e-6))  # rounding, see _SLACK
        merged = sum(x * math.log(x / y) for x, y in cells if x > 0)
        plain = divergence_bound(a, b)[0]
        assert plain == pytest.approx(max(merged, 0), abs=4e-5)
        limits = [np.array([side[np.isnan(known[0])].max()]) for side, known in ((p, a), (q, b))]
        assert plain - 1e-12 <= divergence_bound(a, b, *limits)[0] <= oracles.divergence(p, q) + 1e-9
        assert missing_mass(a)[0] == pytest.approx(sum(math.exp(p[v]) for v in range(40) if math.isnan(a[0, v])))
        whole = divergence_bound(p[None], q[None])[0]
        assert oracles.divergence(p, q) - 5e-5 <= whole <= oracles.divergence(p, q) + 1e-9


def test_limits_by_hand():
    """P = (.8, .1, .1), Q = (.1, .6, .3), known: P's first, Q's second. In one bucket nothing differs; but Q's first
    is at most as likely as what Q's top-1 leaves to each, here .3 by its limit, and P's second at most .1."""
    p, q = np.log([[0.8, 0.1, 0.1], [0.1, 0.6, 0.3]])
    a, b = np.array([[p[0], np.nan, np.nan]]), np.array([[np.nan, q[1], np.nan]])
    assert divergence_bound(a, b)[0] == pytest.approx(0, abs=1e-5)
    by_hand = (0.8 * math.log(0.8 / 0.3) - 0.8 + 0.3) + (0.1 * math.log(0.1 / 0.6) - 0.1 + 0.6)
    told = divergence_bound(a, b, np.log([0.1]), np.log([0.3]))[0]
    assert told == pytest.approx(by_hand, abs=1e-5) and told < oracles.divergence(p, q)


def test_bounds_where_one_side_is_certain():
    sure = np.array([[0.0, np.nan]])
    assert entropy_bound(sure)[0] == divergence_bound(sure, sure)[0] == missing_mass(sure)[0] == 0
    assert divergence_bound(np.array([[np.nan]]), np.array([[-1.0]]))[0] == pytest.approx(0, abs=1e-5)
    far = divergence_bound(np.log([[0.5, 0.5]]), np.array([[math.log(0.5), -9999.0]]))[0]
    assert 0 < far < 10_000 and np.isfinite(far), "the server's stand-in for a probability of 0"


def broken(field: Any) -> Any:
    """An answer with its log-probabilities replaced by what `field` makes of them."""
    def change(told: dict[str, Any]) -> tuple[int, Any]:
        told["choices"][0]["prompt_logprobs"] = field(told["choices"][0]["prompt_logprobs"])
        return 200, told
    return change


def last(entry: Any) -> Any:
    return broken(lambda positions: [*positions[:-1], entry(positions[-1])])


REFUSALS = {
    "no model": (lambda t: (404, {"error": {"message": "The model `m` does not exist."}}),
                 r"endpoint http://127.0.0.1:\d+/v1/, model m: HTTP 404: .*does not exist"),
    "too many": (lambda t: (400, {"error": {"message": "Requested prompt logprobs of 21, which is greater than max "
                                            "allowed: 20"}}), "Lower top, or start the server with a larger --max-log"),
    "too long": (lambda t: (400, {"error": {"message": "This model's maximum context length is 8 tokens"}}),
                 "Shorten the response, or start the server with a larger --max-model-len"),
    "key": (lambda t: (401, {"error": {"message": f"bad key {KEY}"}}), r"bad key \[key\]"),
    "html": (lambda t: (200, "<html>gateway</html>"), "unreadable answer|not a completion"),
    "list": (lambda t: (200, [1]), "not a completion"),
    "no choices": (lambda t: (200, {"choices": []}), "not a completion"),
    "another server": (broken(lambda p: None), "no prompt_logprobs. Expected a vLLM server"),
    "fewer": (broken(lambda p: p[1:]), r"log-probabilities of \d+ tokens, expected \d+. The server must not change"),
    "other tokens": (last(lambda e: {"0": {"logprob": -1.0, "rank": 1}}), "nothing about token .* tokenizer and model"),
    "cached": (last(lambda e: None), "nothing about token .* --no-enable-prefix-caching"),
    "logits": (last(lambda e: {i: {"logprob": 3.0, "rank": 1} for i in e}), "sum to .*raw_logprobs"),
    "no numbers": (last(lambda e: {i: {"logprob": "x", "rank": 1} for i in e}), "not log-probabilities with ranks"),
    "no ranks": (last(lambda e: {i: {"logprob": -9.0} for i in e}), "not log-probabilities with ranks"),
    "not a number": (last(lambda e: {i: {"logprob": math.nan, "rank": 1} for i in e}), "sum to nan, expected at most"),
}


@pytest.mark.parametrize("change, message", REFUSALS.values(), ids=REFUSALS)
def test_an_endpoint_that_fails_is_one_clear_error(server, policy, problem, response, change, message):
    server.change = change
    with pytest.raises(ValueError, match=message) as raised:
        served_readings(problem, response, policy.tokenizer, "m", retries=0)
    assert KEY not in str(raised.value) and "\n" not in str(raised.value)


def test_nobody_listens_and_nothing_to_ask(server, policy, problem, response, monkeypatch):
    for change, message in (({"response": ()}, "top=20 and a response of 0 tokens"), ({"top": 0}, "got top=0"),
                            ({"problem": Problem("p", "q", "1")}, "problem p has no strategy"),
                            ({"model": ""}, "got no model name")):
        given = {"problem": problem, "response": response, "tokenizer": policy.tokenizer, "model": "m"} | change
        with pytest.raises(ValueError, match=message):
            served_readings(**given)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match=r"no connection .* Start the server, or set OPENAI_BASE_URL"):
        served_readings(problem, response, policy.tokenizer, "m", retries=0)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        served_readings(problem, response, policy.tokenizer, "m")

"""Sampling from a vLLM server (OpenAI-compatible completions) that takes LoRA adapters while it runs.

Prompts go out as token ids and responses come back as token ids; nothing is tokenised twice. Each adapter version has a
name made from its content, and every request names it: a server that does not have it answers with an error, never
with another version's tokens. How to start one: docs/full_runs.md.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo_lib.rollouts.interface import Sample, SampleRequest, require_room

_START = ("sgpo serve MODEL --lora-rank R, on a loopback address (elsewhere VLLM_SERVER_DEV_MODE=1 would let anybody "
          "change its weights)")


class ServerEngine:
    """`address` ends with /v1; the key comes from OPENAI_API_KEY (any word where the server wants none).

    Raises ValueError where the package openai is missing, the address is none, or no server answers there.
    """

    ours = False

    def __init__(self, address: str, *, stop_ids: Sequence[int] = (), concurrency: int = 64, retries: int = 5,
                 timeout_s: float = 3600.0):
        if importlib.util.find_spec("openai") is None:
            raise ValueError("rollout.sampler='server' needs the package openai: pip install sgpo-workbench[extract]")
        if not re.match(r"https?://[^/]+/v1/?$", address):
            raise ValueError(f"rollout.server: got {address!r}, expected an address such as http://node7:8000/v1")
        import openai

        self.address, self.root = address.rstrip("/"), address.rstrip("/").removesuffix("/v1")
        self._key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = openai.OpenAI(base_url=self.address, api_key=self._key, max_retries=retries, timeout=timeout_s)
        self._pool = concurrent.futures.ThreadPoolExecutor(concurrency, thread_name_prefix="server")
        self.stop_ids = list(stop_ids)
        told = self._ask("GET", "/v1/models")
        try:
            base = next(m for m in told["data"] if not m.get("parent"))
            self.base, self.context = str(base["id"]), int(base.get("max_model_len") or 2**31)
        except (TypeError, KeyError, StopIteration, AttributeError):
            raise ValueError(f"rollout.server: no vLLM server at {self.root}: got {self._line(str(told))!r}, expected "
                             "its models") from None
        self.adapter = ""

    def sample(self, requests: Sequence[SampleRequest], *, temperature: float, top_p: float,
               max_new_tokens: int) -> list[Sample]:
        """One response per request, in order, as many at a time as `concurrency`.

        Raises ValueError for a prompt that leaves no room, RuntimeError where the server fails or goes away.
        """
        require_room(requests, max_new_tokens, self.context)
        common = {"model": self.adapter or self.base, "temperature": temperature, "top_p": top_p,
                  "max_tokens": max_new_tokens, "logprobs": 0}
        # a model's own sampling defaults (top-k, penalties) would bend the distribution that is trained on
        neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True,
                   "stop_token_ids": self.stop_ids}
        waiting = [self._pool.submit(self._one, r, common, neutral) for r in requests]
        try:
            return [w.result() for w in waiting]
        finally:
            for w in waiting:
                w.cancel()

    def _one(self, request: SampleRequest, common: dict[str, Any], neutral: dict[str, Any]) -> Sample:
        import openai

        try:
            found: Any = self._client.completions.create(
                prompt=list(request.prompt_ids), seed=request.seed, extra_body=neutral, **common)
        except openai.APIStatusError as error:
            told = f"HTTP {error.status_code}: {self._line(error.message)}"
            raise RuntimeError(f"server {self.address}: {told}") from None
        except openai.OpenAIError as error:
            raise RuntimeError(f"server {self.address} does not answer ({self._line(str(error.__cause__ or error))}). "
                               "Start it again, then the same command: the run continues") from None
        choice = found.choices[0]
        tokens, logp = getattr(choice, "token_ids", None), getattr(choice.logprobs, "token_logprobs", None)
        if choice.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"server {self.address}: a response ended with reason {choice.finish_reason!r}, "
                               "expected stop or length")
        if not isinstance(tokens, list) or not isinstance(logp, list) or len(tokens) != len(logp):
            raise RuntimeError(f"server {self.address}: no token ids with log-probabilities in its answer; expected a "
                               "vLLM server whose completions know return_token_ids")
        details = getattr(found.usage, "prompt_tokens_details", None)
        return Sample(tuple(tokens), tuple(logp), "length" if choice.finish_reason == "length" else "end",
                      getattr(details, "cached_tokens", 0) or 0)

    # --- weights -----------------------------------------------------------------------------------------------
    def load_adapter(self, folder: Path, version: int, name: str) -> None:
        """Sample from the adapter in a folder, which the server must see under the same path."""
        known = {m["id"]: m.get("root") for m in self._ask("GET", "/v1/models")["data"]}
        if name in known:  # left by an earlier start of the same run: the folder may be gone, the content may not
            self._unload(name)
        self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
        before, self.adapter = self.adapter, name
        if before and before != name:
            self._unload(before)

    def _unload(self, name: str) -> None:
        with contextlib.suppress(_NotThere):  # the server was started again in between
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def load_weights(self, folder: Path) -> None:
        """Raises ValueError: a server takes adapters."""
        raise ValueError("rollout.sampler='server' takes LoRA adapters only: set model.lora_rank, or sampler='vllm'")

    def held(self) -> dict[str, Any] | None:
        """What the server's workers hold; None where it does not tell (see `_START`)."""
        try:
            told = self._ask("POST", "/collective_rpc", {"method": "sgpo_weights"})
        except _Missing:
            return None
        return told["results"][0]

    # --- nothing to share --------------------------------------------------------------------------------------
    def rest(self) -> None:
        """Nothing: the server has its own memory."""

    def report(self) -> dict[str, float]:
        """Nothing of its own."""
        return {}

    def close(self) -> None:
        """Take the adapter back and end the connections; the server goes on."""
        with contextlib.suppress(RuntimeError, ValueError):
            if self.adapter:
                self._unload(self.adapter)
        self._client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)  # a request may take an hour

    # -----------------------------------------------------------------------------------------------------------
    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """JSON of a route outside the client's own. Raises RuntimeError, `_Missing` for a route that is not there."""
        request = urllib.request.Request(self.root + path, method=method, headers={
            "Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
            data=None if body is None else json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code in (404, 405) and '"error"' not in text:  # the framework's answer, not vLLM's
                raise _Missing(f"server {self.root} has no {path}. Start it so: {_START}") from None
            cure = f". The server must see {body['lora_path']}" if body and "lora_path" in body else ""
            kind = _NotThere if error.code == 404 else RuntimeError
            raise kind(f"server {self.root}{path}: HTTP {error.code}: {self._line(text)}{cure}") from None
        except OSError as error:
            raise RuntimeError(f"no server answers at {self.root} ({self._line(str(error))}). Start one, or correct "
                               "rollout.server") from None
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _line(self, text: str) -> str:
        return " ".join((text.replace(self._key, "[key]") if len(self._key) > 4 else text).split())[:300]


class _NotThere(RuntimeError):
    """What the server was asked about is not there: an adapter, a folder."""


class _Missing(RuntimeError):
    """A route that the server does not have."""

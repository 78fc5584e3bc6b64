"""Engines that answer a prompt with text, behind one interface: `ask(requests, on_reply)`.

`Endpoint` is any OpenAI-compatible server, `Local` any sampling engine of `rollouts/` with its tokenizer, and
`Cached` puts replies that were paid for on disk. A failed request is a `Reply` with an error, never an exception:
one bad answer must not cost the others. No torch here.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import queue
import re
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from sgpo_lib.rollouts.interface import Engine, SampleRequest, sample_seed


@dataclass(frozen=True)
class Request:
    """One prompt to answer once."""

    prompt: str
    """User turn."""
    sample: int
    """Which of several answers to the same prompt; also seeds it."""
    temperature: float
    top_p: float
    max_tokens: int
    """Longest reply in tokens."""


@dataclass(frozen=True)
class Reply:
    """What came back."""

    text: str = ""
    stop: str = "end"
    """`end`, `length` (cut off at max_tokens) or `error`."""
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ""
    """Why there is no text: one line."""
    cached: bool = False
    """Read from disk, not asked for."""


OnReply = Callable[[int, Reply], None]
"""Called in the asking thread with the index of a request and its reply, as replies arrive."""


class Chat(Protocol):
    """Answers prompts."""

    model: str
    """Name of the model, part of the cache's key."""

    def ask(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply]:
        """One reply per request, in order; `on_reply` sees each when it is there."""


class Endpoint:
    """An OpenAI-compatible chat endpoint. Base URL and key come from the environment alone.

    `OPENAI_BASE_URL` (for example `http://127.0.0.1:8000/v1` of `vllm serve`, or a provider's) and `OPENAI_API_KEY`.
    The client retries 408, 409, 429, 5xx, time-outs (`timeout_s` without a byte) and broken connections with growing
    pauses, and honours `Retry-After`.
    """

    def __init__(self, model: str, *, concurrency: int = 16, retries: int = 5, timeout_s: float = 600.0):
        if not model:
            raise ValueError("engine: got no model name, expected openai:MODEL, for example openai:deepseek-reasoner")
        if importlib.util.find_spec("openai") is None:
            raise ValueError(f"engine openai:{model}: the package openai is not installed: "
                             "pip install sgpo-workbench[extract]")
        if not os.environ.get("OPENAI_API_KEY"):
            raise ValueError("OPENAI_API_KEY is not set. Put the endpoint's key into the environment (any word for a "
                             "local server), and its address into OPENAI_BASE_URL")
        self.model, self.concurrency, self.retries, self.timeout_s = model, concurrency, retries, timeout_s
        self.deadline_s = (retries + 1) * timeout_s + retries * 60 + 1
        """Longest that one request may take, all attempts and pauses (at most 60 s each) counted, and a second more, so
        that an answer without a byte is told as such."""
        try:
            if (address := os.environ.get("OPENAI_BASE_URL")) and not re.match(r"https?://[^/]", address.strip()):
                raise ValueError("no http:// or https:// and host")
            self._client()
        except Exception as error:  # the address: httpx2.InvalidURL is no ValueError
            raise ValueError(f"OPENAI_BASE_URL: got {os.environ.get('OPENAI_BASE_URL')!r} ({error}), expected an "
                             "address such as http://127.0.0.1:8000/v1") from error

    def _client(self) -> Any:
        import openai

        return openai.AsyncOpenAI(max_retries=self.retries, timeout=self.timeout_s)

    def ask(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply]:
        """As many at a time as `concurrency`.

        Interrupted, it asks nothing more and waits for the replies under way, which are paid for; interrupted again,
        it does not wait.
        """
        replies: dict[int, Reply] = {}
        arrived: queue.SimpleQueue[tuple[int, Reply] | BaseException | None] = queue.SimpleQueue()
        stopping = threading.Event()

        def take() -> None:
            while (came := arrived.get()) is not None:
                if isinstance(came, BaseException):
                    raise came
                replies[came[0]] = came[1]
                on_reply(*came)

        # in a thread, since a notebook's own thread runs an event loop already
        threading.Thread(target=lambda: asyncio.run(self._all(requests, arrived.put, stopping)), name="ask",
                         daemon=True).start()
        try:
            take()
        except BaseException:
            stopping.set()
            take()
            raise
        return [replies[i] for i in range(len(requests))]

    async def _all(self, requests: Sequence[Request], put: Callable[[Any], None], stopping: threading.Event) -> None:
        """`put` gets (index, reply) as replies come, then None; before it the exception where one stopped the work."""
        gate = asyncio.Semaphore(self.concurrency)

        async def one(index: int, request: Request, client: Any) -> None:
            async with gate:
                if not stopping.is_set():
                    put((index, await self._one(client, request)))

        try:
            async with self._client() as client, asyncio.TaskGroup() as group:
                for index, request in enumerate(requests):
                    group.create_task(one(index, request, client))
        except BaseException as error:  # it must reach the asking thread, which waits
            put(error)
        put(None)

    async def _one(self, client: Any, request: Request) -> Reply:
        import openai
        from openai.types.chat import ChatCompletion, ChatCompletionMessage

        try:
            async with asyncio.timeout(self.deadline_s):
                found: Any = await client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": request.prompt}],
                    temperature=request.temperature, top_p=request.top_p, max_tokens=request.max_tokens,
                    seed=sample_seed("chat", request.prompt, request.sample) % (1 << 31))
        except openai.APIStatusError as error:
            return Reply(stop="error", error=one_line(f"HTTP {error.status_code}: {error.message}"))
        except openai.APITimeoutError:
            return Reply(stop="error", error=f"no answer within {self.timeout_s} s")
        except TimeoutError:  # bytes came all the time, but no whole answer
            return Reply(stop="error", error=f"no whole answer within {self.deadline_s} s")
        except openai.APIConnectionError as error:
            return Reply(stop="error", error=one_line(f"connection: {error.__cause__ or error}"))
        except (openai.OpenAIError, ValueError) as error:  # a body that is no completion
            return Reply(stop="error", error=one_line(f"unreadable answer: {type(error).__name__}: {error}"))
        choices = found.choices if isinstance(found, ChatCompletion) and isinstance(found.choices, list) else []
        message = getattr(choices[0], "message", None) if choices else None
        text = getattr(message, "content", None)
        if not isinstance(message, ChatCompletionMessage) or not isinstance(text, str | None):
            return Reply(stop="error", error=one_line(f"not a completion: {found!s}"))
        text = (text or "").encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair
        asked, written = (n if isinstance(n := getattr(found.usage, name, 0), int) else 0
                          for name in ("prompt_tokens", "completion_tokens"))
        return Reply(text, "length" if choices[0].finish_reason == "length" else "end", asked, written)


def one_line(text: str, length: int = 200) -> str:
    """Text of an error as one short line, without the endpoint's key."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    text = text.replace(key, "[key]") if key else text
    return " ".join(text.split())[:length]


class Local:
    """A sampling engine in this process (transformers or vLLM) and its tokenizer."""

    def __init__(self, model: str, engine: Engine, tokenizer: Any, context: int, batch: int = 64):
        self.model, self.engine, self.tokenizer, self.context, self.batch = model, engine, tokenizer, context, batch

    def ask(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply]:
        """`batch` at a time. A prompt too long for the context is an error of its own."""
        replies: dict[int, Reply] = {}
        fitting: list[tuple[int, tuple[int, ...], Request]] = []
        for i, request in enumerate(requests):
            ids = tuple(self.tokenizer.apply_chat_template([{"role": "user", "content": request.prompt}],
                                                           add_generation_prompt=True, return_dict=False))
            if len(ids) + request.max_tokens > self.context:
                replies[i] = Reply(stop="error", prompt_tokens=len(ids), error=(
                    f"prompt of {len(ids)} tokens and {request.max_tokens} for the reply, context {self.context}"))
                on_reply(i, replies[i])
            else:
                fitting.append((i, ids, request))
        for start in range(0, len(fitting), self.batch):
            for i, reply in self._batch(fitting[start : start + self.batch]):
                replies[i] = reply
                on_reply(i, reply)
        return [replies[i] for i in range(len(requests))]

    def _batch(self, chosen: Sequence[tuple[int, tuple[int, ...], Request]]) -> list[tuple[int, Reply]]:
        """All requests of one call share their sampling settings; a mixture goes out in several calls."""
        done = []
        settings = dict.fromkeys((r.temperature, r.top_p, r.max_tokens) for _, _, r in chosen)
        for temperature, top_p, max_tokens in settings:
            some = [c for c in chosen if (c[2].temperature, c[2].top_p, c[2].max_tokens) ==
                    (temperature, top_p, max_tokens)]  # fmt: skip
            asked = [SampleRequest(ids, sample_seed("chat", r.prompt, r.sample)) for _, ids, r in some]
            samples = self.engine.sample(asked, temperature=temperature, top_p=top_p, max_new_tokens=max_tokens)
            for (i, ids, _), drawn in zip(some, samples, strict=True):
                text = self.tokenizer.decode(drawn.token_ids, skip_special_tokens=True)
                done.append((i, Reply(text, drawn.stop, len(ids), len(drawn.token_ids))))
        return done


class Cached:
    """A chat whose replies are kept on disk: SQLite, key (model, prompt, sample, sampling). Errors are not kept."""

    def __init__(self, chat: Chat, path: Path):
        self.chat, self.model, self.path = chat, chat.model, path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        except (sqlite3.DatabaseError, OSError) as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: no reply cache ({error}). Move the file away or name another")

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)

    def _key(self, request: Request) -> str:
        return hashlib.sha256(json.dumps([self.model, asdict(request)], sort_keys=True).encode()).hexdigest()

    def ask(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply]:
        """Ask only for what is not on disk; a reply is on disk before `on_reply` sees it."""
        try:
            return self._ask(requests, on_reply)
        except sqlite3.DatabaseError as error:
            raise self._broken(error) from error

    def _ask(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply]:
        keys = [self._key(request) for request in requests]
        replies: dict[int, Reply] = {}
        with closing(self._open()) as database:
            for i, key in enumerate(keys):
                row = database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
                if row:
                    replies[i] = Reply(**json.loads(row[0]), cached=True)
                    on_reply(i, replies[i])
            same: dict[str, list[int]] = {}
            for i in (i for i in range(len(requests)) if i not in replies):
                same.setdefault(keys[i], []).append(i)
            waiting = [places[0] for places in same.values()]

            def keep(position: int, reply: Reply) -> None:
                index = waiting[position]
                if not reply.error:
                    kept = json.dumps({k: v for k, v in asdict(reply).items() if k != "cached"})
                    with database:
                        database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (keys[index], kept))
                for i in same[keys[index]]:
                    on_reply(i, reply)

            asked = self.chat.ask([requests[i] for i in waiting], keep) if waiting else []
        replies |= {i: reply for index, reply in zip(waiting, asked, strict=True) for i in same[keys[index]]}
        return [replies[i] for i in range(len(requests))]

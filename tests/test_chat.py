"""Engines for extraction: the real client against a real server that misbehaves; the cache; the model of the tests."""

from __future__ import annotations

import collections
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import HTML, Answer, Ask, FaultServer, completion

from sgpo_lib.extraction.chat import Cached, Chat, Endpoint, Local, Reply, Request

KEY = "sk-test-0123456789abcdef"


@pytest.fixture
def serve(monkeypatch):
    """Starts a server with a script; gives it and an endpoint that asks it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ExitStack() as stack:
        def start(script, **options) -> tuple[FaultServer, Endpoint]:
            server = stack.enter_context(FaultServer(script))
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
            return server, Endpoint("m", **{"retries": 1, "timeout_s": 10.0, **options})

        yield start


def echo(ask: Ask) -> str:
    return f"answer to {ask.prompt}"


def requests(*prompts: str) -> list[Request]:
    return [Request(prompt, 0, 0.5, 0.9, 64) for prompt in prompts]


def ask(chat: Chat, wanted: list[Request]) -> list[Reply]:
    """The replies, once each of them was seen exactly once, under its own index, in this thread."""
    seen: list[tuple[int, Reply]] = []

    def on_reply(index: int, reply: Reply) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append((index, reply))

    replies = chat.ask(wanted, on_reply)
    assert sorted(i for i, _ in seen) == list(range(len(wanted))) and dict(seen) == dict(enumerate(replies))
    return replies


# Endpoint


def test_a_request_says_what_was_asked_for_and_a_reply_what_came(serve):
    server, endpoint = serve(echo)
    wanted = [Request("why?\nßé∑", 3, 0.25, 0.75, 99), Request("why?\nßé∑", 4, 0.25, 0.75, 99)]
    assert ask(endpoint, wanted) == [Reply("answer to why?\nßé∑", "end", 11, 7)] * 2
    for got in server.asked:
        body = dict(got.body)
        assert 0 <= body.pop("seed") < 2**31
        assert body == {"model": "m", "messages": [{"role": "user", "content": "why?\nßé∑"}], "temperature": 0.25,
                        "top_p": 0.75, "max_tokens": 99}  # fmt: skip
        assert (got.path, got.authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    seeds = {got.body["seed"] for got in server.asked}
    ask(endpoint, wanted)
    assert len(seeds) == 2 and {got.body["seed"] for got in server.asked} == seeds
    assert ask(endpoint, []) == []


PASSING = {"429": Answer(status=429, body={"error": {"message": "slow down"}}), "500": Answer(status=500, body=HTML),
           "503": Answer(status=503, body="busy"), "408": Answer(status=408, body={}),
           "cut": Answer("half of this is missing", sent=0.5), "closed": Answer(sent=0.0),
           "slow": Answer("late", delay=2.5)}  # fmt: skip


def test_a_passing_fault_costs_one_retry_and_no_reply(serve):
    server, endpoint = serve(lambda a: echo(a) if a.attempt else PASSING[a.prompt], timeout_s=1.0)
    assert [r.text for r in ask(endpoint, requests(*PASSING))] == [f"answer to {p}" for p in PASSING]
    assert collections.Counter(a.prompt for a in server.asked) == dict.fromkeys(PASSING, 2)


def test_retry_after_is_honoured(serve):
    """The client's own first pause is at most half a second."""
    full = Answer(status=429, body={}, headers={"Retry-After": "1"})
    server, endpoint = serve(lambda a: echo(a) if a.attempt else full)
    assert ask(endpoint, requests("q"))[0].text == "answer to q"
    assert server.asked[1].at - server.asked[0].at >= 1.0


LASTING: dict[str, tuple[Answer, str, int]] = {  # what the server does, what the error says, how often it is asked
    "always 500": (Answer(status=500, body={"error": {"message": "out of\nmemory"}}), "HTTP 500", 2),
    "html with 500": (Answer(status=500, body=HTML * 50, kind="text/html"), "HTTP 500", 2),
    "401": (Answer(status=401, body={"error": {"message": "no such key"}}), "HTTP 401: ", 1),
    "400": (Answer(status=400, body={"error": {"message": "context too long"}}), "context too long", 1),
    "hangs": (Answer(held=True), "no answer within 0.5 s", 2),
    "cut": (Answer("half of this is missing", sent=0.5), "connection: ", 2),
    "closed": (Answer(sent=0.0), "connection: ", 2),
    "html": (Answer(body=HTML, kind="text/html"), "not a completion: <html><body> <h1>502", 1),
    "html as json": (Answer(body=HTML), "unreadable answer: JSONDecodeError", 1),
    "truncated json": (Answer(body='{"id": "c-1", "choices": [{"index": 0, "mess'), "unreadable answer", 1),
    "empty body": (Answer(body=""), "unreadable answer", 1),
    "no choices": (Answer(body={"id": "c-1", "object": "chat.completion"}), "not a completion", 1),
    "an error with 200": (Answer(body={"error": {"message": "quota"}}), "not a completion", 1),
    "empty choices": (Answer(body={**completion("a"), "choices": []}), "not a completion", 1),
    "choices that are text": (Answer(body={**completion("a"), "choices": "abc"}), "", 1),
    "a choice of null": (Answer(body={**completion("a"), "choices": [None]}), "", 1),
    "a message of text": (Answer(body={**completion("a"), "choices": [{"message": "abc"}]}), "", 1),
    "content in parts": (Answer([{"type": "text", "text": "a"}]), "", 1),
    "a list": (Answer(body=[1, 2]), "not a completion", 1),
    "null": (Answer(body="null"), "not a completion", 1),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_is_one_line_and_leaves_the_others_unharmed(serve, name):
    fault, told, asked = LASTING[name]
    server, endpoint = serve(lambda a: fault if a.prompt == "bad" else echo(a), timeout_s=0.5)
    good, bad, last = ask(endpoint, requests("good", "bad", "last"))
    assert (good.text, last.text, good.error, last.error) == ("answer to good", "answer to last", "", "")
    assert (bad.text, bad.stop, bad.tokens) == ("", "error", 0)
    assert told in bad.error and 0 < len(bad.error) <= 200 and "\n" not in bad.error
    assert sum(a.prompt == "bad" for a in server.asked) == asked


def test_an_answer_that_drips_is_given_up(serve):
    """A byte now and then keeps the connection alive (some providers do it for long), but not for ever."""
    _, endpoint = serve(lambda a: Answer(a.prompt, blanks=40 if a.prompt == "bad" else 3), timeout_s=0.5, retries=0)
    began = time.monotonic()
    good, bad = ask(endpoint, requests("good", "bad"))
    assert (good.text, bad.error) == ("good", "no whole answer within 1.5 s")
    assert time.monotonic() - began < 3


def test_nobody_there_is_an_error_of_each_request(monkeypatch, serve):
    with FaultServer(echo) as gone:
        monkeypatch.setenv("OPENAI_BASE_URL", gone.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    replies = ask(Endpoint("m", retries=0), requests("a", "b"))
    assert all(r.stop == "error" and r.error.startswith("connection: ") for r in replies)


@pytest.mark.parametrize(("answer", "expected"), [
    (Answer(""), Reply("", "end", 11, 7)),
    (Answer(None), Reply("", "end", 11, 7)),
    (Answer("", finish="content_filter"), Reply("", "end", 11, 7)),
    (Answer("cut he", finish="length"), Reply("cut he", "length", 11, 7)),
    (Answer("<b>\x00\u2028∑😀</b>"), Reply("<b>\x00\u2028∑😀</b>", "end", 11, 7)),
    (Answer(body={k: v for k, v in completion("plain").items() if k != "usage"}), Reply("plain")),
    (Answer(body={**completion("odd"), "usage": {"prompt_tokens": None}}), Reply("odd")),
    (Answer("x" * 100_000), Reply("x" * 100_000, "end", 11, 7)),
    (Answer("kept alive", blanks=4), Reply("kept alive", "end", 11, 7)),
    (Answer(body=completion("typed as text"), kind="text/plain"), Reply("typed as text", "end", 11, 7)),
])  # fmt: skip
def test_unusual_answers_are_read(serve, answer, expected):
    _, endpoint = serve(lambda a: answer, retries=0)
    assert ask(endpoint, requests("q")) == [expected]


def test_no_more_requests_at_a_time_than_allowed_and_replies_in_order(serve):
    server, endpoint = serve(lambda a: Answer(a.prompt, delay=0.02 * (6 - int(a.prompt) % 5)), concurrency=3)
    came: list[int] = []
    replies = endpoint.ask(requests(*map(str, range(20))), lambda i, r: came.append(i))
    assert [r.text for r in replies] == [str(i) for i in range(20)]
    assert server.most == 3
    assert sorted(came) == list(range(20)) and came != list(range(20))  # told as they come


@pytest.mark.parametrize("key", [KEY, f"{KEY}\n", f"{KEY}é"], ids=["a key", "a key and a newline", "a letter too many"])
def test_the_key_is_in_no_error_and_not_on_disk(serve, monkeypatch, tmp_path, key):
    """Proxies answer with the key that they refuse; a client's error shows the header that it could not send."""
    def script(a: Ask) -> Answer | str:
        refused = {"error": {"message": f"Incorrect API key provided: {a.authorization}"}}
        return {"401": Answer(status=401, body=refused), "html": Answer(body=f"<p>{a.authorization}", kind="text/html"),
                "good": "fine"}[a.prompt]  # fmt: skip

    monkeypatch.setenv("OPENAI_API_KEY", key)
    server, endpoint = serve(script, retries=0)
    replies = ask(Cached(endpoint, tmp_path / "c.sqlite"), requests("401", "html", "good"))
    assert all(r.error for r in replies[:2]) and KEY[3:] not in " ".join(r.error for r in replies)
    assert all(KEY[3:].encode() not in f.read_bytes() for f in tmp_path.iterdir())
    assert key != KEY or (replies[2].text == "fine" and len(server.asked) == 3)


def test_what_is_missing_is_named_with_the_cure(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"OPENAI_API_KEY is not set\. Put .* OPENAI_BASE_URL"):
        Endpoint("m")
    with pytest.raises(ValueError, match="got no model name, expected openai:MODEL"):
        Endpoint("")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(sys.modules, "openai", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"package openai is not installed: pip install sgpo-workbench\[extract\]"):
        Endpoint("m")


# Cached


def test_nothing_is_asked_twice(serve, tmp_path):
    server, endpoint = serve(lambda a: Answer(f"<{a.prompt}>", finish="length"))
    first = ask(Cached(endpoint, tmp_path / "deep/er/c.sqlite"), requests("a", "b"))
    again = ask(Cached(endpoint, tmp_path / "deep/er/c.sqlite"), requests("c", "b", "a"))
    assert [r.text for r in again] == ["<c>", "<b>", "<a>"] and [r.cached for r in again] == [False, True, True]
    assert again[1:] == [replace(r, cached=True) for r in first[::-1]]
    assert sorted(a.prompt for a in server.asked) == ["a", "b", "c"]


def test_the_same_request_twice_in_one_call_is_paid_once(serve, tmp_path):
    server, endpoint = serve(echo)
    replies = ask(Cached(endpoint, tmp_path / "c.sqlite"), requests("a", "b", "a"))
    assert [r.text for r in replies] == ["answer to a", "answer to b", "answer to a"]
    assert sorted(a.prompt for a in server.asked) == ["a", "b"]


def test_whatever_changes_the_answer_is_part_of_the_key(serve, tmp_path):
    server, endpoint = serve(echo)
    one = Request("q", 0, 0.5, 0.9, 64)
    others = [replace(one, **change) for change in (
        {"prompt": "q "}, {"sample": 1}, {"temperature": 0.6}, {"top_p": 0.8}, {"max_tokens": 65})]  # fmt: skip
    cached = Cached(endpoint, tmp_path / "c.sqlite")
    ask(cached, [one])
    assert not any(r.cached for r in ask(cached, others))
    assert not ask(Cached(Endpoint("another"), tmp_path / "c.sqlite"), [one])[0].cached
    assert all(r.cached for r in ask(cached, [*others, one])) and len(server.asked) == 7


def test_errors_are_not_kept(serve, tmp_path):
    server, endpoint = serve(lambda a: echo(a) if a.attempt else Answer(status=400, body={}), retries=0)
    cached = Cached(endpoint, tmp_path / "c.sqlite")
    assert ask(cached, requests("a"))[0].error
    assert ask(cached, requests("a"))[0] == Reply("answer to a", "end", 11, 7)
    assert ask(cached, requests("a"))[0].cached and len(server.asked) == 2


class Nobody:
    """A chat that must not be asked."""

    model = "m"

    def ask(self, requests, on_reply):
        raise AssertionError(f"asked {requests}")


def test_a_reply_is_on_disk_before_it_is_told(serve, tmp_path):
    _, endpoint = serve(echo)
    wanted, path = requests("a", "b", "c"), tmp_path / "c.sqlite"
    Cached(endpoint, path).ask(wanted, lambda i, r: ask(Cached(Nobody(), path), [wanted[i]]))
    assert [r.text for r in ask(Cached(Nobody(), path), wanted)] == [f"answer to {p}" for p in "abc"]


def test_an_interrupt_keeps_what_was_paid_and_asks_nothing_more(serve, tmp_path):
    """Eight requests, four at a time: one is there when the interrupt comes, four others are being answered."""
    server, endpoint = serve(lambda a: Answer(a.prompt, delay=0.0 if a.prompt == "0" else 0.6), concurrency=4)
    wanted, path = requests(*map(str, range(8))), tmp_path / "c.sqlite"

    def interrupted(index: int, reply: Reply) -> None:
        if index == 0:
            time.sleep(0.2)  # until the fifth is under way
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cached(endpoint, path).ask(wanted, interrupted)
    time.sleep(0.8)
    assert len(server.answered) == len(server.asked) < 8
    replies = ask(Cached(endpoint, path), wanted)
    assert [r.text for r in replies] == [r.prompt for r in wanted]
    assert replies[0].cached and len(server.answered) == 8, f"{len(server.answered) - 8} replies were paid twice"


def test_a_second_interrupt_does_not_wait_for_an_endpoint_that_hangs(serve):
    server, endpoint = serve(lambda a: Answer(held=True) if a.prompt == "held" else a.prompt)
    hanging: list[threading.Timer] = []

    def interrupted(index: int, reply: Reply) -> None:
        hanging.append(threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)))
        hanging[0].start()
        raise ValueError("first")

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        endpoint.ask(requests("held", "quick"), interrupted)
    assert time.monotonic() - began < 5 and len(server.asked) == 2 and len(hanging) == 1


ASKER = """
import sys
from pathlib import Path
from sgpo_lib.extraction.chat import Cached, Endpoint, Request
requests = [Request(f"q{i}", 0, 0.5, 0.9, 64) for i in range(int(sys.argv[2]), int(sys.argv[3]))]
replies = Cached(Endpoint("m", concurrency=8), Path(sys.argv[1])).ask(requests, lambda i, r: None)
assert [r.text for r in replies] == [f"answer to {r.prompt}" for r in requests], replies
"""


def test_two_processes_may_share_a_cache(serve, tmp_path):
    serve(echo)
    path = tmp_path / "c.sqlite"
    started = [subprocess.Popen([sys.executable, "-c", ASKER, path, first, end], stderr=subprocess.PIPE, text=True)
               for first, end in (("0", "60"), ("30", "90"))]  # fmt: skip
    for process in started:
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
    ask(Cached(Nobody(), path), requests(*(f"q{i}" for i in range(90))))


def broken(path: Path, how: str) -> None:
    if how == "a folder":
        path.mkdir()
    elif how == "text":
        path.write_text("no database at all, but a note of some length\n" * 50, encoding="utf-8")
    else:
        with sqlite3.connect(path) as database:
            database.execute(f"CREATE TABLE replies ({'key TEXT PRIMARY KEY, reply' if how == 'lost' else 'a'} TEXT)")
            if how == "lost":
                database.executemany("INSERT INTO replies VALUES (?, ?)", [(f"{i}" * 40, "{}") for i in range(500)])
        if how == "lost":
            path.write_bytes(path.read_bytes()[:4096] + b"\xa5" * (path.stat().st_size - 4096))


@pytest.mark.parametrize("how", ["text", "another table", "lost", "a folder"])
def test_a_broken_cache_is_named_with_the_cure_before_anything_is_paid(serve, tmp_path, how):
    server, endpoint = serve(echo)
    path = tmp_path / "c.sqlite"
    broken(path, how)
    with pytest.raises(ValueError, match=r"c\.sqlite: no reply cache \(.+\)\. Move the file away or name another"):
        Cached(endpoint, path).ask(requests("a"), lambda i, r: None)
    assert server.asked == []


# Local


@pytest.fixture(scope="module")
def local():
    import torch

    from sgpo_lib import tiny
    from sgpo_lib.policy import Policy
    from sgpo_lib.rollouts.transformers_engine import TransformersEngine

    tokenizer = tiny.build_tokenizer()
    policy = Policy(tiny.build_model(tokenizer, 1), tokenizer, torch.device("cpu"), lora=False, context=512)
    return Local("transformers:tiny", TransformersEngine(policy, 4), tokenizer, policy.context, batch=4)


@pytest.mark.slow
def test_the_model_of_this_process_answers_each_request_whatever_the_others(local):
    wanted = [Request(f"what is {i} + {i}?", i % 2, (0.0, 1.0)[i % 2], 0.9, 8 + i % 3) for i in range(9)]
    replies = ask(local, wanted)
    assert replies == ask(local, wanted[::-1])[::-1] == [ask(local, [r])[0] for r in wanted]
    for r, reply in zip(wanted, replies, strict=True):
        assert not reply.error and 0 < reply.tokens <= r.max_tokens and reply.prompt_tokens > 6
        assert reply.stop == "end" or (reply.stop, reply.tokens) == ("length", r.max_tokens)
        assert "<" not in reply.text  # no special token
    drawn = {ask(local, [Request("what is 2 + 3?", i, 1.0, 1.0, 12)])[0].text for i in range(4)}
    coldest = {ask(local, [Request("what is 2 + 3?", i, 0.0, 1.0, 12)])[0].text for i in range(4)}
    assert len(drawn) > 1 and len(coldest) == 1


@pytest.mark.slow
def test_a_prompt_too_long_for_the_model_is_an_error_of_its_own(local, tmp_path):
    wanted = requests("what is 1 + 1?", "1 " * 600, "what is 2 + 2?")
    first, long, last = ask(Cached(local, tmp_path / "c.sqlite"), wanted)
    assert first.text and last.text and not first.error and not last.error
    assert long.stop == "error" and long.prompt_tokens > 600 and "64 for the reply, context 512" in long.error
    assert [r.cached for r in ask(Cached(local, tmp_path / "c.sqlite"), wanted)] == [True, False, True]

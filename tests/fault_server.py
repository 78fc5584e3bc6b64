"""A chat server on loopback that speaks the OpenAI protocol, misbehaves as a script says, and counts requests."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HTML = "<html><body>\n<h1>502 Bad Gateway</h1>\n</body></html>"


@dataclass(frozen=True)
class Ask:
    """A request as the server got it."""

    prompt: str
    body: dict[str, Any]
    attempt: int
    """0 for the first with its prompt and sampling."""
    path: str
    authorization: str
    at: float
    """Seconds of the monotonic clock."""

    @property
    def key(self) -> str:
        """All that was asked."""
        return json.dumps(self.body, sort_keys=True)


def completion(content: Any, finish: str = "stop") -> dict[str, Any]:
    """The body of a good answer."""
    return {"id": "c-1", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What the server does about a request: by default, a good completion with `text`."""

    text: Any = ""
    finish: str = "stop"
    status: int = 200
    body: Any = None
    """Whole body in place of a completion: text as it is, anything else as JSON."""
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before it begins."""
    blanks: int = 0
    """Empty lines sent first, one each 0.1 s, as DeepSeek does to keep a connection alive."""
    sent: float = 1.0
    """Share of the body after which the connection is closed."""
    held: bool = False
    """Nothing is sent until `FaultServer.released` is set."""


Script = Callable[[Ask], Answer | str]
"""What to answer; text stands for a good completion. Called under a lock."""


class FaultServer:
    """`with FaultServer(script) as server`: asks at `server.url` until the block ends."""

    def __init__(self, script: Script):
        self.script = script
        self.asked: list[Ask] = []
        self.answered: list[Ask] = []
        """Those whose whole answer was sent, with status 200."""
        self.most = 0
        """Most requests at the same time."""
        self.released = threading.Event()
        self._now = 0
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"fault": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> FaultServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def take(self, path: str, authorization: str, body: dict[str, Any]) -> tuple[Ask, Answer]:
        """Count a request and ask the script."""
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            key = json.dumps(body, sort_keys=True)
            ask = Ask(body["messages"][0]["content"], body, self._attempts[key], path, authorization, time.monotonic())
            self._attempts[key] += 1
            self.asked.append(ask)
            told = self.script(ask)
            return ask, told if isinstance(told, Answer) else Answer(told)

    def leave(self, ask: Ask, whole: bool) -> None:
        """The answer is about to be sent: the client may ask the next before we know that it was."""
        with self._lock:
            self._now -= 1
            if whole:
                self.answered.append(ask)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    fault: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ask, answer = self.fault.take(self.path, self.headers.get("Authorization", ""), body)
        time.sleep(answer.delay)
        if answer.held:
            self.fault.released.wait()
        whole = answer.sent == 1.0 and answer.status == 200
        given = completion(answer.text, answer.finish) if answer.body is None else answer.body
        data = (given if isinstance(given, str) else json.dumps(given)).encode()
        try:
            if answer.sent == 0.0:
                self.close_connection = True
                self.fault.leave(ask, False)
                return
            self.send_response(answer.status)
            for name, value in {"Content-Type": answer.kind, "Content-Length": str(len(data) + answer.blanks),
                                **answer.headers}.items():  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            for _ in range(answer.blanks):
                self.wfile.write(b"\n")
                self.wfile.flush()
                time.sleep(0.1)
            self.close_connection = self.close_connection or answer.sent < 1.0
            self.fault.leave(ask, whole)
            self.wfile.write(data[: round(len(data) * answer.sent)])
            self.wfile.flush()
        except OSError:  # the client gave up
            self.close_connection = True

"""Secrets stay out of what a job is given and of what it leaves behind.

Given: `refuse_secrets` stops parameters and configurations in which a value is named like a secret, is one of the
environment's, or looks like one. Keys come from the environment alone.
Left behind: `Redactor` puts «NAME» in place of the values of secret environment variables, and «secret» in place of
what looks like a key of a known service. A value is secret when its variable's name says so and it is long enough to
be one: `true`, `1` or `none` would otherwise vanish from every page. The path of a file is not taken for a secret.

A text may hold a secret in pieces: cut off, wrapped, coloured, or in a log that is written line by line. So every run
of RUN characters of a secret is taken out, as it is or encoded: repr, JSON, HTML, URL, base64, hexadecimal. A secret
shorter than that is only found whole.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

SHORTEST = 8
"""Characters of the shortest value that is taken for a secret."""
RUN = 12
"""Characters in a row of a longer secret that are never left standing."""
_GRAM = RUN // 2
"""A run of 2 * _GRAM - 1 characters holds _GRAM of them at one of every _GRAM-th places of the text."""
_PART = (r"(?:API_?KEY|KEY|TOKENS?|PAT|PASS|AUTH|AUTHORIZATION|BEARER|COOKIE|DSN|WEBHOOK(?:_URL)?|CREDENTIALS?|"
         r"CONNECTION_STRING|SAS)")
_VARIABLE = re.compile(rf"(?:^|_){_PART}(?:_|$)|_PWD$|APIKEY|SECRET|PASSWORD|PASSWD|PASSPHRASE", re.IGNORECASE)
_PARAMETER = re.compile(r"(?:^|[_.-])(?:API_?KEY|(?:ACCESS|SECRET|PRIVATE|AUTH)_KEY|TOKEN|SECRET|PASSWORD|PASSWD|PWD|"
                        r"PASSPHRASE|CREDENTIALS?|BEARER|AUTHORIZATION|COOKIE)(?:[_.-]|$)|^KEY$", re.IGNORECASE)
_LOOKS_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|"
    r"glpat-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{20,}|A[KS]IA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}|"
    r"npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})(?![A-Za-z0-9])|"
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]{0,20000}?-----END [A-Z ]*PRIVATE KEY-----)?|"
    r"(?<=://)[^\s/:@'\"<>]{0,100}:[^\s/@'\"<>«]{3,200}(?=@)|"  # https://user:password@host
    r"(?<=[?&])(?:\w+_)?(?:token|key|secret|password|signature|sig)=[^\s&'\"<>«]{8,}|"
    r"(?<=\bbearer )[\w.~+/=-]{16,}|(?<=\bBearer )[\w.~+/=-]{16,}")
_ASSIGNED = re.compile(rf"\b((?:[A-Z0-9]+_)*(?:{_PART}|[A-Z]*SECRET|[A-Z]*PASSWORD)(?:_[A-Z0-9]+)*=)(['\"]?)"
                       r"[^\s'\"$«/~.][^\s'\"«]{7,}")
"""NAME=value, as `env`, `set -x` and setup lines have it."""


def environment_secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Secret value -> name of its variable. Of a variable whose name says nothing, the part that looks like a key."""
    found = {}
    for name, value in (os.environ if environment is None else environment).items():
        named = _VARIABLE.search(name) and not _is_path(value.strip())
        secret = value.strip() if named else match[0] if (match := _LOOKS_SECRET.search(value)) else ""
        if len(secret) >= SHORTEST:
            found[secret] = name
    return found


def refuse_secrets(parameters: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, which names the parameter and never its value, where one holds a secret."""
    secrets = environment_secrets()
    for name, value in _leaves(parameters, ""):
        leaf = name.rpartition(".")[2]
        known = next((variable for secret, variable in secrets.items() if secret in value), "")
        why = (f"is the value of the environment variable {known}" if known
               else "looks like a key" if _LOOKS_SECRET.search(value)
               else "is named like a secret" if value and _PARAMETER.search(leaf)
               else "sets a secret" if _ASSIGNED.search(value) else "")
        if why:
            raise ValueError(f"{name!r} of {where} {why}: such values are stored in the folders of jobs and runs and "
                             "seen in the list of processes. Put it into an environment variable "
                             f"({known or re.sub(r'[^A-Z0-9]+', '_', leaf.upper()).strip('_') or 'API_KEY'}) before "
                             "the start, and read it with os.environ where it is used")


class Redactor:
    """Replaces secrets in text. Made once per execution, since it reads the environment."""

    def __init__(self, environment: Mapping[str, str] | None = None):
        self._grams: dict[str, list[tuple[str, int, str]]] = {}
        short: dict[str, str] = {}
        for value, name in environment_secrets(environment).items():
            for form in _forms(value):
                if len(form) < RUN:
                    short[form] = name
                for at in range(len(form) - _GRAM + 1 if len(form) >= RUN else 0):
                    self._grams.setdefault(form[at : at + _GRAM], []).append((form, at, name))
        self._short = short
        longest_first = sorted(short, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        if self._grams:
            parts, after = [], 0
            for start, end, name in self._runs(text):
                parts += [text[after:start], f"«{name}»"]
                after = end
            text = "".join([*parts, text[after:]])
        if self._values:
            text = self._values.sub(lambda match: f"«{self._short[match[0]]}»", text)
        return _ASSIGNED.sub(r"\1\2«secret»", _LOOKS_SECRET.sub("«secret»", text))

    def _runs(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(start, end, name) of every run of RUN characters or more of a secret, in order, without overlaps."""
        at = last = 0
        while at + _GRAM <= len(text):
            best = (0, 0, "")
            for form, offset, name in self._grams.get(text[at : at + _GRAM], ()):
                left, right = 0, _GRAM
                while left < min(at - last, offset) and text[at - left - 1] == form[offset - left - 1]:
                    left += 1
                while right < min(len(text) - at, len(form) - offset) and text[at + right] == form[offset + right]:
                    right += 1
                if left + right >= max(RUN, best[1] - best[0] + 1):
                    best = (at - left, at + right, name)
            if best[2]:
                yield best
                at = last = best[1]
            else:
                at += _GRAM

    def nested(self, value: Any) -> Any:
        """The same for every string in dicts (their keys too) and lists, of which copies are returned."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, dict):
            return type(value)({self(k) if isinstance(k, str) else k: self.nested(v) for k, v in value.items()})
        return [self.nested(v) for v in value] if isinstance(value, list | tuple) else value


def _forms(value: str) -> set[str]:
    """A secret as texts hold it. Base64 in all three alignments, of what holds it (`user:secret`), whole letters only.
    """
    raw = value.encode()
    forms = {value, repr(value)[1:-1], json.dumps(value)[1:-1], raw.hex(), urllib.parse.quote(value),
             urllib.parse.quote(value, safe=""), urllib.parse.quote_plus(value)}
    forms.add(html.escape(value))  # noqa: TID251 - to be looked for
    for shift, spoiled in ((0, 0), (1, 2), (2, 3)):
        for code in (base64.b64encode, base64.urlsafe_b64encode):
            whole = code(b"\0" * shift + raw).decode()
            forms.add(whole[spoiled : (shift + len(raw)) * 8 // 6])
    return {form for form in forms if len(form) >= SHORTEST}


@contextlib.contextmanager
def lines_into(write: Callable[[str], object], deaf: Callable[[], bool] = lambda: False) -> Iterator[int]:
    """A file descriptor whose text is handed on line by line. Processes that outlive the block do not hold it up.

    `deaf`: when to drop it.
    """
    reading, writing = os.pipe()

    def copy() -> None:
        with os.fdopen(reading, "r", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if not deaf():
                    write(line)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield writing
    finally:
        os.close(writing)
        thread.join(timeout=1.0)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every string in a nested value, with its dotted name."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, name)


def _is_path(value: str) -> bool:
    try:
        return value.startswith(("/", "~", ".")) and Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, no home
        return False

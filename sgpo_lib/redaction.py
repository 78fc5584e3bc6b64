"""Secrets stay out of what a job is given and of what it leaves behind.

Given: `refuse_secrets` stops parameters that are named like a secret, are one of the environment's, or look like one.
Left behind: `Redactor` puts «NAME» in place of the values of secret environment variables, and «secret» in place of
what looks like a key of a known service. A value is secret when its variable's name says so and it is long enough to
be one: `true`, `1` or `none` would otherwise vanish from every page. The path of a file is not taken for a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SHORTEST = 8
"""Characters of the shortest value that is taken for a secret."""
_WORDS = r"(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|PAT)"
_VARIABLE = re.compile(rf"(?:^|_){_WORDS}(?:_|$)", re.IGNORECASE)
_PARAMETER = re.compile(r"(?:^|[_.-])(?:API_?KEY|(?:ACCESS|SECRET|PRIVATE|AUTH)_KEY|TOKEN|SECRET|PASSWORD|PASSWD|"
                        r"PASSPHRASE|CREDENTIALS?)(?:[_.-]|$)|^KEY$", re.IGNORECASE)
_LOOKS_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|"
    r"glpat-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{20,}|AKIA[0-9A-Z]{16})(?![A-Za-z0-9])|"
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----")


def environment_secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Secret value -> name of its variable."""
    found = {}
    for name, value in (os.environ if environment is None else environment).items():
        if _VARIABLE.search(name) and len(value.strip()) >= SHORTEST and not _is_path(value.strip()):
            found[value.strip()] = name
    return found


def refuse_secrets(parameters: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, which names the parameter and never its value, where one holds a secret."""
    secrets = environment_secrets()
    for name, value in _leaves(parameters, ""):
        leaf = name.rpartition(".")[2]
        known = next((variable for secret, variable in secrets.items() if secret in value), "")
        why = (f"is the value of the environment variable {known}" if known
               else "looks like a key" if _LOOKS_SECRET.search(value)
               else "is named like a secret" if value and _PARAMETER.search(leaf) else "")
        if why:
            raise ValueError(f"parameter {name!r} of {where} {why}: parameters are stored in the job's folder and seen "
                             f"in the list of processes. Put it into an environment variable ({known or leaf.upper()}) "
                             "and read it in the notebook with os.environ")


class Redactor:
    """Replaces secrets in text. Made once per execution, since it reads the environment."""

    def __init__(self, environment: Mapping[str, str] | None = None):
        self._names: dict[str, str] = {}
        for value, name in environment_secrets(environment).items():
            lines = [line for line in value.splitlines() if len(line) >= 2 * SHORTEST] if "\n" in value else []
            for form in (value, repr(value)[1:-1], *lines):
                self._names[form] = name
        longest_first = sorted(self._names, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        if self._values:
            text = self._values.sub(lambda match: f"«{self._names[match[0]]}»", text)
        return _LOOKS_SECRET.sub("«secret»", text)

    def nested(self, value: Any) -> Any:
        """The same for every string in dicts and lists, of which copies are returned."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, dict):
            return type(value)({k: self.nested(v) for k, v in value.items()})
        return [self.nested(v) for v in value] if isinstance(value, list | tuple) else value


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

"""Planted secrets of many kinds, and a search for them in files, in whatever form they may have got there."""

from __future__ import annotations

import base64
import html
import json
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

PEM = "\n".join(["-----BEGIN PRIVATE KEY-----", *(f"MIIcan{n}" + "aZ09+/Qw" * 7 for n in range(4)),
                 "-----END PRIVATE KEY-----"])  # fmt: skip
CANARIES = {
    "HF_TOKEN": "hf_" + "CanaryOneTok" * 3, "OPENAI_API_KEY": "sk-proj-" + "canaryTwo_" * 3,
    "GITHUB_TOKEN": "ghp_" + "CanaryThree1" * 3, "AWS_ACCESS_KEY_ID": "AKIA" + "CANARYFOURAWSID4",
    "AWS_SECRET_ACCESS_KEY": "canary/Five+AwsSecret/Key+0123456789abcd", "PGPASSWORD": "canary-six-word",
    "CALLBACK": "https://hooks.example.org/run?access_token=canaryseven0123456789&x=1",
    "DATABASE": "postgresql://trainer:canary8password@db.example.org:5432/runs", "DEPLOY_KEY": PEM,
    "SERVICE_CREDENTIALS": base64.b64encode(b'{"user": "canary-ten", "key": "0123456789"}').decode(),
    "ODD_SECRET": r"canary(11)+[a-z]*{2}|^$.\end?'\"&<%", "WRAPPED_TOKEN": "canary12" + "c9f1e07b53ad2846" * 4,
    "NESTED_API_KEY": "canary13-nested-0123456789", "YAML_PASSWORD": "canary14: 'yaml' # \"quoted\" & more",
    "SLACK_BOT_TOKEN": "xoxb-canary15-" + "0123456789", "MESSAGE_TOKEN": "canary16-in-a-message-9876",
    "CLIENT_SECRET": "canary17-in-a-repr-13579", "SETUP_TOKEN": "canary18-printed-by-setup",
    "COOKIE": "canary19session=abcdefgh", "SHORT_PASSWORD": "canary20", "PASSPHRASE": "canary21 größer als «ein» Wort",
    "AUTHORIZATION": "Bearer eyJhbGciOiJI.eyJjYW5hcnkiOjIy.Zm9vYmFyYmF6cXV4"}  # fmt: skip
"""Names of environment variables (two say nothing: their values look like secrets) -> values."""
SECRET_PART = {"CALLBACK": "canaryseven0123456789", "DATABASE": "canary8password",
               "AUTHORIZATION": "eyJhbGciOiJI.eyJjYW5hcnkiOjIy.Zm9vYmFyYmF6cXV4"}  # fmt: skip
"""What of a value is the secret, where it is not all of it."""
RUN = 12
"""Characters in a row of a secret that must not be found; of a shorter one, all of it."""


def forms(value: str) -> set[bytes]:
    """A value as it is, escaped, encoded for URLs and HTML, hexadecimal, and in base64 at each alignment."""
    raw = value.encode()
    texts = {value, repr(value)[1:-1], json.dumps(value)[1:-1], json.dumps(json.dumps(value)[1:-1])[1:-1],
             urllib.parse.quote(value, safe=""), urllib.parse.quote_plus(value), raw.hex()}
    texts.add(html.escape(value))  # noqa: TID251 - to be looked for
    found = {text.encode() for text in texts}
    for before in (b"", b"a", b"ab", b"user:"):
        whole = base64.b64encode(before + raw)
        lost = (len(before) * 8 + 5) // 6  # letters that hold bits of what stands before
        found.add(whole[lost : (len(before) + len(raw)) * 8 // 6])
    return found


def needles(canaries: dict[str, str]) -> dict[bytes, str]:
    """Every run of RUN characters of every form (the whole of a shorter one) -> name."""
    found: dict[bytes, str] = {}
    for name, value in canaries.items():
        for form in map(bytes.decode, forms(SECRET_PART.get(name, value))):
            for at in range(max(1, len(form) - RUN + 1)):
                found[form[at : at + RUN].encode()] = name
    return {piece: name for piece, name in found.items() if b"PRIVATE KEY" not in piece and b"-----" not in piece}


def search(files: Iterable[Path], canaries: dict[str, str]) -> tuple[list[str], int, int]:
    """(where a secret was found, files read, bytes read)."""
    pieces = needles(canaries)
    lengths = sorted({len(piece) for piece in pieces})
    hits, count, size = [], 0, 0
    for path in files:
        data = path.read_bytes()
        count, size = count + 1, size + len(data)
        for length in lengths:
            there = {data[at : at + length] for at in range(len(data) - length + 1)}
            hits += [f"{path.name}: {pieces[piece]}: {piece!r}" for piece in there & pieces.keys()]
    return hits, count, size

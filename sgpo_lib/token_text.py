"""Text of tokens: what each adds to the decoded response, and what it is by itself. No torch here.

Byte-level tokenizers (SmolLM2, Qwen, Llama 3) cut what is not ASCII into bytes, so a token need not be text: the bytes
of all tokens are decoded together, and each character stands with the token that holds its last byte. For all others
(SentencePiece with its leading spaces and byte fallback, WordPiece, the word-level tokenizer of `tiny`) the
tokenizer's own decoder is asked about neighbouring tokens, and wherever their texts do not join to the whole, about
ever smaller parts of the response. Both take time in proportion to the response (up to a logarithm).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

BROKEN = "\ufffd"
"""What decoders put for bytes that are no character."""


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The response's text, special tokens included and no space removed; "" for no tokens."""
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) if len(ids) else ""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token as it adds to `decoded`, to which the texts join.

    A character of several tokens stands with its last one; the others are empty. Bytes that are no character stand as
    U+FFFD where the decoder puts it.
    """
    whole = decoded(tokenizer, ids)
    texts = _texts_of_bytes([_bytes(piece) for piece in _pieces(tokenizer, ids)])
    if "".join(texts) == whole:
        return texts
    texts = _texts_in_context(tokenizer, ids)
    _repair(tokenizer, ids, texts, 0, len(ids), whole)
    return texts


def token_words(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """Token id -> its text by itself, as it stands inside a text (with its leading space).

    Bytes that are no characters are written "<0xE2>", ids without a token "<unused 151900>".
    """
    words = {}
    for i in dict.fromkeys(int(i) for i in ids):
        piece, alone = _pieces(tokenizer, [i])[0], decoded(tokenizer, [i])
        if piece is None:
            words[i] = f"<unused {i}>"
        elif BROKEN in alone:
            words[i] = _shown(_bytes(piece))
        else:  # after itself, so that a decoder that strips the space in front of a text leaves it
            twice = decoded(tokenizer, [i, i])
            words[i] = twice[len(alone):] if twice.startswith(alone) else alone
    return words


def token_pieces(texts: Sequence[str], ids: Sequence[int], words: dict[int, str]) -> list[str]:
    """What may stand for each token: its text in the response, or by itself where that is empty or only a part."""
    own = [words[int(i)] for i in ids]
    return [text if text and word.endswith(text) else word for text, word in zip(texts, own, strict=True)]


# ------------------------------------------------------------------------------------------------------------- bytes


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """The letters in which byte-level vocabularies write bytes: those that can be seen stand for themselves, the rest
    follow from U+0100 on (the alphabet of GPT-2)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str | None]:
    """Tokens as the vocabulary writes them; None for an id beyond it."""
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def _bytes(piece: str | None) -> bytes:
    """Bytes of a token of a byte-level vocabulary; a token with any other letter stands for its own text."""
    letters = _byte_of_letter()
    if piece and all(letter in letters for letter in piece):
        return bytes(letters[letter] for letter in piece)
    return (piece or "").encode()


def _shown(data: bytes) -> str:
    """Characters, and every byte that belongs to none as "<0xE2>"."""
    text = data.decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)


def _characters(data: bytes) -> Iterator[tuple[str, int]]:
    """(character, byte at which it ends); U+FFFD for each longest part that could have begun a character."""
    view, at = memoryview(data), 0
    while at < len(data):
        broken = 0
        try:
            text = str(view[at:], "utf-8")
        except UnicodeDecodeError as error:
            text, broken = str(view[at : at + error.start], "utf-8"), error.end - error.start
        for character in text:
            at += len(character.encode())
            yield character, at
        if broken:
            at += broken
            yield BROKEN, at


def _texts_of_bytes(parts: Sequence[bytes]) -> list[str]:
    texts = [""] * len(parts)
    token, end = 0, len(parts[0]) if parts else 0
    for character, last in _characters(b"".join(parts)):
        while end < last:
            token += 1
            end += len(parts[token])
        texts[token] += character
    return texts


# ------------------------------------------------------------------------------------------------- any other decoder


_CUTS = 32
"""How far a cut or a token to stand in front is looked for, in tokens."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte in SentencePiece's byte fallback."""


def _texts_in_context(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token after the one before it; consecutive bytes are decoded together, or all of them are broken."""
    marks = [_BYTE.fullmatch(piece or "") for piece in _pieces(tokenizer, ids)]
    parts: dict[tuple[int, ...], str] = {}

    def text_of(*part: int) -> str:
        return parts[part] if part in parts else parts.setdefault(part, decoded(tokenizer, part))

    texts: list[str] = []
    for is_bytes, run in itertools.groupby(range(len(ids)), key=lambda i: marks[i] is not None):
        if is_bytes:
            data = [bytes([int(mark[1], 16)]) for i in run if (mark := marks[i])]
            told = _texts_of_bytes(data)
            texts += [BROKEN] * len(data) if BROKEN in "".join(told) else told
        else:
            texts += [text_of(*ids[i - 1 : i + 1]).removeprefix(text_of(ids[i - 1])) if i else text_of(ids[0])
                      for i in run]
    return texts


def _repair(tokenizer: Any, ids: Sequence[int], texts: list[str], start: int, end: int, whole: str) -> None:
    """Make texts[start:end] join to `whole`, the text of these tokens, in place.

    Parts that join to it are repaired on their own; where no cut near the middle gives such parts, all of it stands
    with the last token.
    """
    if "".join(texts[start:end]) == whole:
        return
    middle = (start + end) // 2
    for cut in sorted(range(max(start + 1, middle - _CUTS), min(end, middle + _CUTS)), key=lambda c: abs(c - middle)):
        left, right = _addition(tokenizer, ids, start, cut), _addition(tokenizer, ids, cut, end)
        if left is not None and right is not None and left + right == whole:
            _repair(tokenizer, ids, texts, start, cut, left)
            _repair(tokenizer, ids, texts, cut, end, right)
            return
    texts[start:end] = [""] * (end - start - 1) + [whole]


def _addition(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str | None:
    """What ids[start:end] add after an earlier token that is text by itself; None where they change its text."""
    for i in range(start - 1, max(start - 1 - _CUTS, -1), -1):
        before = decoded(tokenizer, ids[i : i + 1])
        if before and BROKEN not in before and not _BYTE.fullmatch(_pieces(tokenizer, ids[i : i + 1])[0] or ""):
            both = decoded(tokenizer, [ids[i], *ids[start:end]])
            return both[len(before):] if both.startswith(before) else None
    return decoded(tokenizer, ids[start:end])

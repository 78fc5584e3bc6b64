"""The `tiny` model: word-level tokenizer with single digits and a small Qwen3, saved as one plain Hugging Face folder.

Qwen3, not Qwen2, because of the tokenizer: transformers 5.19 opens the tokenizer of every `qwen2` folder as
`Qwen2Tokenizer`, whatever class the folder names, and so would read this vocabulary with Qwen2's rules, silently.

Imports torch and transformers only inside functions.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

from sgpo_lib import prompts, testbed, testbed_families
from sgpo_lib.records import PromptStyle

PAD, END, UNKNOWN, ASK, ANSWER = "<pad>", "<end>", "<unk>", "<ask>", "<answer>"
CHAT_TEMPLATE = ("{% for m in messages %}{{ '<ask> ' if m.role == 'user' else '<answer> ' }}"
                 "{{ m.content }} {% endfor %}"
                 "{% if add_generation_prompt %}<answer>{% endif %}")
@dataclass(frozen=True)
class Size:
    """One size of the base. Head size 32 is one that vLLM accepts on a CPU."""

    width: int
    layers: int
    steps: int
    """Supervised steps of `bases.py`."""


SIZES = {"tiny": Size(96, 3, 500), "tiny-s": Size(64, 2, 300), "tiny-l": Size(128, 4, 700)}
"""`model.source` -> size: about 0.36M, 0.12M and 0.8M parameters."""
CONTEXT = 512
BATCH, LR, SEED = 64, 2.5e-2, 0
"""Supervised training of the bases: examples a step, Muon's peak learning rate, seed."""


def base_key(source: str = "tiny") -> str:
    """8 hex digits that change with whatever decides the base: families, mixture, prompts, tokenizer, schedule.

    It is the `model.revision` of a run on that base, so that runs from different bases are never taken for one.
    """
    text = "".join(inspect.getsource(module) for module in (testbed, testbed_families, prompts))
    text += inspect.getsource(build_tokenizer) + inspect.getsource(build_model)
    text += f"{CHAT_TEMPLATE}{SIZES[source]}{CONTEXT, BATCH, LR, SEED}{PromptStyle()}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def build_tokenizer() -> Any:
    """Tokenizer of the testbed: lower-case words, single digits, `\\boxed{` as one token.

    A token carries the space before it (`▁unit`), so that decoding gives back `18`, not `1 8`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence([
        normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(),
        normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = pre_tokenizers.Split(Regex(r"▁?(?:\\boxed\{|[a-z]+|[0-9]|[^▁a-z0-9])"), behavior="isolated")
    style, parts = PromptStyle(), "Problem type: Strategy: Steps: (a) (b) (c) (d)"
    texts = [*testbed.vocabulary_texts(), style.guided.format(strategy=parts, problem=style.instruction)]
    pieces = {piece for text in texts for piece, _ in words.pre_tokenize_str(normalizer.normalize_str(text))}
    pieces |= {mark + digit for digit in "0123456789" for mark in ("", "▁")} | {"}", "▁"}
    vocabulary = [PAD, END, UNKNOWN, ASK, ANSWER, *sorted(pieces)]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token=UNKNOWN))
    core.normalizer, core.pre_tokenizer = normalizer, words
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN,
                                   additional_special_tokens=[ASK, ANSWER], chat_template=CHAT_TEMPLATE,
                                   model_max_length=CONTEXT,
                                   clean_up_tokenization_spaces=False)


def build_model(tokenizer: Any, seed: int, source: str = "tiny") -> Any:
    """Freshly initialised Qwen3 for that tokenizer; same seed, same weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = SIZES[source]
    config = Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
                         eos_token_id=tokenizer.eos_token_id, bos_token_id=None, hidden_size=size.width,
                         num_hidden_layers=size.layers, intermediate_size=size.width * 8 // 3 // 32 * 32,
                         num_attention_heads=size.width // 32, num_key_value_heads=size.width // 32, head_dim=32,
                         max_position_embeddings=CONTEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)

"""The shape of a model: what its memory and time are counted from, read from its config.json without its weights.

`Shape` knows dense blocks as Llama and Qwen have them: attention with grouped key-value heads, a gated MLP, two norms
(Qwen3: two more on queries and keys). The published shapes stand in for a config.json that is not on this machine.
Nothing here imports torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo_lib import tiny
from sgpo_lib.config import ModelConfig
from sgpo_lib.runs import runs_root

GIB = 2**30
DENSE = ("llama", "qwen2", "qwen3", "mistral")
"""`model_type` of the models whose parameters `Shape` counts."""


BLOCK = {"cpu": 2**18}
"""Logits whose softmax and what follows are computed together, by type of device: on a CPU what a core's cache holds
(measured: benchmarks/NOTES.md)."""
OTHER_BLOCK = 2**24


def block_rows(kind: str, vocabulary: int, threads: int = 1) -> int:
    """Rows of logits of a block on a type of device: a multiple of the threads, which share them row by row."""
    rows = BLOCK.get(kind, OTHER_BLOCK) // vocabulary
    return max(threads, rows - rows % threads)


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model."""

    kind: str
    """`model_type` of its config.json."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether embedding and output matrix are one."""
    context: int
    """Longest sequence in tokens."""
    bias: bool = False
    """Whether queries, keys and values have a bias."""

    @property
    def queries(self) -> int:
        """Numbers in all query heads of a token."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Numbers in all key heads of a token; as many in its values."""
        return self.kv_heads * self.head_size

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Matrices of one layer: name -> (numbers in, numbers out)."""
        h, i, q, k = self.hidden, self.intermediate, self.queries, self.keys
        return {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h),
                "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        norms = 2 * self.hidden + 2 * self.head_size * (self.kind == "qwen3")
        return sum(a * b for a, b in self.linears.values()) + self.bias * (self.queries + 2 * self.keys) + norms

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, output matrix where it is another one, last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.root

    def adapter(self, rank: int, targets: str) -> int:
        """Parameters of a LoRA adapter: rank x (in + out) for each matrix that it changes."""
        return rank * self.layers * sum(a + b for a, b in self.targets(targets).values())

    def targets(self, names: str) -> dict[str, tuple[int, int]]:
        """The matrices of a layer that `model.lora_targets` names."""
        chosen = names.split(",")
        return {n: size for n, size in self.linears.items() if names == "all-linear" or n in chosen}

    def cache_per_token(self, size: int) -> int:
        """Bytes of the key-value cache for one token of one sequence, with numbers of `size` bytes."""
        return 2 * self.layers * self.keys * size


def _published(kind: str, *sizes: int, tied: bool) -> Shape:
    hidden, layers, heads, kv_heads, intermediate, vocabulary, context = sizes
    return Shape(kind, hidden, layers, heads, kv_heads, hidden // heads, intermediate, vocabulary, tied, context,
                 bias=kind == "qwen2")


PUBLISHED = {
    "smollm2": _published("llama", 576, 30, 9, 3, 1536, 49152, 8192, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _published("qwen2", 1536, 28, 12, 2, 8960, 151936, 32768, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _published("qwen2", 3584, 28, 28, 4, 18944, 152064, 32768, tied=False),
    "meta-llama/Llama-3.1-8B-Instruct": _published("llama", 4096, 32, 32, 8, 14336, 128256, 131072, tied=False),
}
"""`model.source` -> shape, from the published config.json files."""


def shape_of(fields: Mapping[str, Any]) -> Shape:
    """From the fields of a config.json. Raises ValueError where one that is needed is missing."""
    def size(name: str, otherwise: int | None = None) -> int:
        value = fields.get(name)
        value = otherwise if value is None else value
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json: {name} is {fields.get(name)!r}, expected a whole number above 0")
        return value

    kind, hidden, heads = str(fields.get("model_type", "")), size("hidden_size"), size("num_attention_heads")
    return Shape(kind, hidden, size("num_hidden_layers"), heads, size("num_key_value_heads", heads),
                 size("head_dim", hidden // heads), size("intermediate_size", 4 * hidden), size("vocab_size"),
                 bool(fields.get("tie_word_embeddings")), size("max_position_embeddings", 2**31),
                 bias=kind == "qwen2" or bool(fields.get("attention_bias")))


@functools.cache
def _tiny(source: str) -> Shape:
    size = tiny.SIZES[source]
    width, heads = size.width, size.width // 32  # as `tiny.build_model` has it
    return Shape("qwen3", width, size.layers, heads, heads, 32, width * 8 // 3 // 32 * 32,
                 len(tiny.build_tokenizer()), True, tiny.CONTEXT)


def find_shape(model: ModelConfig) -> tuple[Shape, str]:
    """(shape, where it was read) of `model.source`; nothing is downloaded, unpacked or trained for it.

    Raises ValueError where no config.json is here and the shape is not published in this file, and for blocks that
    the formulas do not describe.
    """
    if model.source in tiny.SIZES:
        return _tiny(model.source), "the sizes in sgpo_lib/tiny.py"
    file = _config_file(model)
    if file is None and model.source in PUBLISHED:
        return PUBLISHED[model.source], "published sizes; its config.json is not on this machine"
    if file is None:
        raise ValueError(f"model.source: no config.json of {model.source!r} on this machine, and its sizes are not in "
                         f"sgpo_lib/shapes.py (known: {', '.join(PUBLISHED)}). Give a folder with its config.json")
    try:
        shape = shape_of(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:  # of somebody else's file
        raise ValueError(f"model.source: {file}: {error}") from None
    if shape.kind not in DENSE:
        raise ValueError(f"model.source: {file} is of a {shape.kind!r}, whose memory the formulas do not describe. "
                         f"Expected one of {', '.join(DENSE)}")
    return shape, str(file)


def _config_file(model: ModelConfig) -> Path | None:
    """The config.json of a local folder, of the unpacked SmolLM2, or of the hub's cache; None where there is none."""
    source = model.source
    folder = runs_root() / "bases" / "smollm2-135m-instruct" if source == "smollm2" else Path(source).expanduser()
    if (folder / "config.json").is_file():
        return folder / "config.json"
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", revision=model.revision or None)
    return Path(found) if isinstance(found, str) else None

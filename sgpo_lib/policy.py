"""The policy: a causal language model with its tokenizer, all weights or a LoRA adapter training.

Shape suffixes: B sequences, S padded length, N response tokens of a batch in row order, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from sgpo_lib.batching import Row, TokenBatch
from sgpo_lib.config import ModelConfig
from sgpo_lib.losses.head import Head
from sgpo_lib.weight_files import (
    RefusedCode,
    announce_code,
    load_shards,
    refused_code,
    require_header,
    require_own_tokenizer,
    require_safetensors,
)

ADAPTER = "adapter"
WEIGHTS = "model"
SHARDS = "sharded"


@dataclasses.dataclass
class Policy:
    """pi: a model, its tokenizer, and which parameters train."""

    model: Any
    tokenizer: Any
    device: torch.device
    lora: bool
    context: int
    """Longest prompt plus response in tokens."""

    def token_batch(self, rows: Sequence[Row], layout: str = "right") -> TokenBatch:
        """(prompt, response) rows as tensors on the policy's device; `layout` as in `TokenBatch.build`."""
        return TokenBatch.build(rows, self.pad_id(), self.device, layout)

    def response_hidden(self, batch: TokenBatch) -> Float[Tensor, "N H"]:
        """Last hidden state before each response token: the state that predicts it. One row per response token."""
        mask = batch.attention_mask_RS
        if batch.sees_SS is not None:  # added to scores, as every implementation that takes a whole mask understands it
            dtype = next(self.model.parameters()).dtype
            mask = torch.zeros(batch.sees_SS.shape, dtype=dtype, device=self.device)
            mask = mask.masked_fill_(~batch.sees_SS, -torch.inf)[None, None]  # no row without a token: itself
        states_RSH = self.last_hidden_state(input_ids=batch.input_ids_RS, attention_mask=mask,
                                            position_ids=batch.position_ids_RS, use_cache=False)
        return states_RSH.flatten(0, 1)[batch.predictor_N]

    def last_hidden_state(self, **inputs: Any) -> Tensor:
        """What the backbone, the model below its output matrix, gives for these inputs."""
        causal = self.causal_model()
        return getattr(causal, causal.base_model_prefix)(**inputs).last_hidden_state

    def settle(self) -> None:
        """Call before an optimizer reads or changes the parameters; see parallel.py."""

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """While inside, this process holds all weights and a forward pass needs no other worker."""
        return contextlib.nullcontext()

    def head(self) -> Head:
        """Output matrix, with bias and soft-capping where the model has them. Ask after the hidden states: where
        weights are sharded, a forward pass gathers them."""
        layer = self.causal_model().get_output_embeddings()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return Head(layer.weight, layer.bias, cap or 0.0)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that train, in a fixed order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def stop_ids(self) -> list[int]:
        """Token ids that end a response."""
        ids = self.model.generation_config.eos_token_id  # the only field that load_policy keeps
        found = ids if isinstance(ids, list) else [ids]
        return sorted({self.tokenizer.eos_token_id, *(i for i in found if i is not None)})

    def pad_id(self) -> int:
        """Padding id. It may share the end token's id: masks, never ids, say what is padding."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the training weights (safetensors): `adapter/` under LoRA, else `model/`, which loads by itself; those
        in `dtype` where one is given."""
        self._write(folder, None if self.lora or dtype is None else self.model.state_dict(), dtype)

    def _write(self, folder: Path, state: dict[str, Tensor] | None, dtype: torch.dtype | None) -> None:
        target = folder / (ADAPTER if self.lora else WEIGHTS)
        if state is not None:
            state = {name: t.to("cpu", dtype) for name, t in state.items() if name not in self._tied()}
        self.model.save_pretrained(target, state_dict=state)
        self.tokenizer.save_pretrained(target)

    def content(self) -> str:
        """12 hex digits over every bit of the weights that train, computed where they are."""
        return hashlib.sha256(repr(self.content_parts()).encode()).hexdigest()[:12]

    def content_parts(self) -> list[tuple[int, float]]:
        """`tensor_bits` of every weight that trains; where weights are sharded, of every shard."""
        return [tensor_bits(p) for p in self.parameters()]

    def gathered(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """A whole parameter. Where weights are sharded all workers must ask for it; it then comes in `dtype`."""
        return parameter.detach()

    def load(self, folder: Path) -> None:
        """Take the training weights of a folder written by `save`, or of a checkpoint of several workers.

        Raises ValueError where the folder holds none, or an adapter of another shape.
        """
        from safetensors.torch import load_file

        if (folder / SHARDS).exists():
            self._load_shards(folder / SHARDS)
            return
        source = folder / (ADAPTER if self.lora else WEIGHTS)
        file = source / ("adapter_model.safetensors" if self.lora else "model.safetensors")
        if not file.exists():
            raise ValueError(f"no weights at {file}: expected what a {'LoRA' if self.lora else 'full'} run saved")
        require_header(file)
        if self.lora:
            from peft import set_peft_model_state_dict

            result: Any = set_peft_model_state_dict(self.model, load_file(file))
            if result.unexpected_keys:
                raise ValueError(f"{file} does not fit this adapter: unknown {result.unexpected_keys[0]}. "
                                 "Use the lora_rank and lora_targets of the run that wrote it")
        else:
            missing, unexpected = self.load_state(load_file(file))
            if unexpected or set(missing) - self._tied():
                raise ValueError(f"{file} holds other weights than this model: missing {missing}, extra {unexpected}")

    def _load_shards(self, folder: Path) -> None:
        """Take the weights of a distributed checkpoint; its shards may be of any number of workers."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

        self.settle()
        state = {"model": get_model_state_dict(self.model)}
        load_shards(state, folder)
        set_model_state_dict(self.model, state["model"])

    def load_state(self, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Take all weights by name; returns the names that are missing and those that do not belong."""
        result = self.model.load_state_dict(state, strict=False)
        return result.missing_keys, result.unexpected_keys

    def fingerprint(self) -> str:
        """12 hex digits over the training weights."""
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.detach().to("cpu", torch.float32).numpy().tobytes())
        return digest.hexdigest()[:12]

    def _tied(self) -> set[str]:
        """Names of the parameters that are another one."""
        return set(self.model._tied_weights_keys or ()) if self.model.config.tie_word_embeddings else set()

    def causal_model(self) -> Any:
        """The model itself, below an adapter."""
        return self.model.get_base_model() if self.lora else self.model


@torch.no_grad()
def tensor_bits(values: Tensor) -> tuple[int, float]:
    """(hash of a tensor's bits, its sum), computed where it is."""
    return (int(torch.hash_tensor(values).view(torch.int64)), float(values.sum(dtype=torch.float64))) \
        if values.numel() else (0, 0.0)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ValueError where CUDA is asked for and absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"model.device: got {name!r}, but torch {torch.__version__} sees no GPU. "
                         "Use device='cpu' or 'auto', or install requirements/gpu.lock")
    return torch.device(name)


def load_policy(config: ModelConfig, source: str, seed: int) -> Policy:
    """Load weights and tokenizer from a folder or hub id, and put a LoRA adapter on them where one is asked for.

    Raises ValueError where the folder does not exist, holds no model or has no tokenizer, weights that are no
    safetensors or need code of their own that was not asked for (weight_files.py), or where the model's logits are
    not its hidden states times its output matrix, soft-capped where its config says so, as in losses/.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar per saved checkpoint would drown a notebook's output
    local = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not (local / "config.json").exists():
        raise ValueError(f"model.source: no model at {local} (expected a folder with config.json and safetensors)")
    folder = local if local.is_dir() else None  # transformers takes a folder of that name before the hub
    if folder:
        require_safetensors(folder)
    if config.trust_remote_code:
        announce_code(source)
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision:
        kwargs["revision"] = config.revision
    try:
        if not config.trust_remote_code:
            require_own_tokenizer(str(local if looks_local else source), folder, config.revision)
        tokenizer = AutoTokenizer.from_pretrained(local if looks_local else source, **kwargs)
    except RefusedCode:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:  # whatever a foreign folder's files provoke
        if "trust_remote_code" in str(error) and not config.trust_remote_code:
            raise refused_code(source, folder) from None
        raise ValueError(f"model.source: no usable tokenizer at {source!r} ({str(error).splitlines()[0]}). "
                         "Save one beside the weights, or check the name") from None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            local if looks_local else source, dtype=getattr(torch, config.dtype), use_safetensors=True,
            attn_implementation=config.attention, **kwargs)
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # foreign files, a missing attention
        if "trust_remote_code" in str(error) and not config.trust_remote_code:
            raise refused_code(source, folder) from None
        raise ValueError(f"model.source, model.attention: cannot load {source!r} with attention {config.attention!r} "
                         f"({str(error).splitlines()[0]})") from None
    # a model's own generation defaults (repetition penalty, ...) would bend the distribution that is trained on
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    device = pick_device(config.device)
    model.to(device)
    context = min(config.context or 2**31, getattr(model.config, "max_position_embeddings", None) or 2**31)
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        targets = config.lora_targets if config.lora_targets == "all-linear" else config.lora_targets.split(",")
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            try:
                model = get_peft_model(model, LoraConfig(
                    r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                    target_modules=targets, task_type="CAUSAL_LM"))
            except ValueError as error:
                raise ValueError(f"model.lora_targets: got {config.lora_targets!r} ({str(error).splitlines()[0]}). Use "
                                 "'all-linear' or names of the model's modules") from None
    model.train()
    policy = Policy(model, tokenizer, device, bool(config.lora_rank), context)
    _check_head(policy)
    return policy


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Raises ValueError where logits are not hidden states times one matrix, or are NaN."""
    layer = policy.causal_model().get_output_embeddings()
    if getattr(getattr(layer, "weight", None), "ndim", 0) != 2:
        raise ValueError(f"model.source: the output layer of {type(policy.model).__name__} is a "
                         f"{type(layer).__name__}, expected a linear layer: the token KL is computed from its matrix. "
                         "Use another base")
    batch = policy.token_batch([((0, 1), (2, 3, 4))])
    policy.model.eval()
    logits = policy.model(input_ids=batch.input_ids_RS, attention_mask=batch.attention_mask_RS).logits
    ours = policy.head().logits(policy.response_hidden(batch))
    policy.model.train()
    if logits.isnan().any():
        raise ValueError(f"model.source: {type(policy.model).__name__} gives NaN for logits: its weights hold NaN or "
                         "infinity, or overflow in model.dtype. Use another base or dtype")
    if not torch.allclose(logits.flatten(0, 1)[batch.predictor_N], ours, rtol=1e-2, atol=1e-2):
        raise ValueError(f"{type(policy.model).__name__}: logits are not hidden states times the output matrix "
                         "and its soft-capping; this model's token KL would be wrong")


@torch.no_grad()
def require_layout(policy: Policy, layout: str) -> None:
    """Raises ValueError where sequences in one row (train.layout) would see each other under this model's attention."""
    rows: list[Row] = [((0, 1), (2, 3)), ((0, 1), (4, 5, 2))]
    policy.model.eval()
    alone_NH = torch.cat([policy.response_hidden(policy.token_batch([row])) for row in rows]).float()
    together_NH = policy.response_hidden(policy.token_batch(rows, layout)).float()
    policy.model.train()
    config = policy.model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if (kinds and layout in ("packed", "shared")) or (together_NH - alone_NH).norm() > 0.05 * alone_NH.norm():
        raise ValueError(f"train.layout: got {layout!r}, but {type(policy.model).__name__} with attention "
                         f"{config._attn_implementation!r}{' and ' + ', '.join(kinds) if kinds else ''} does not keep "
                         "sequences in one row apart. Use layout='right', or another model.attention")

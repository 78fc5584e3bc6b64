"""Named profiles and methods, each a complete configuration, and `from_parameters` for notebooks.

A profile only changes numbers and names; a method only changes the objective. Departures from the paper:

1. Llama-3.2-8B-Instruct is no public checkpoint; `llama3-8b` is Llama-3.1-8B-Instruct.
2. Not published, so ours: problems per step (128), mini-batch (64), AdamW betas, constant schedule after warm-up.
3. Eq. 1 has one epsilon, section 4.4 gives 0.2 and 0.28: two fields, the latter values.
4. The supervised warm-up of `smollm2` shows the strategy in half of its prompts (`guided_share`); the paper shows it
   in none. With it the 135M model solved .19 with a strategy and .23 without (6 problems, 8 samples each); without
   it, .15 and .31 (the same problems, another warm-up).
5. The paper's profiles are configurations that never ran here. They keep weights and AdamW's moments in float32 and
   compute in bfloat16 (`compute_dtype`), since updates of 1e-6 round to nothing in bfloat16; with an adapter
   (`lora_rank`) the base is in bfloat16 instead, and the adapter in float32.
6. Baselines get SGPO's budget of 12 samples: LUFFY 11 and one expert solution (`luffy8`: the original's 7 and one),
   HPT 12 instead of 8. HPT's lr of 5e-6 and its coefficient and gate by model are its scripts'; `tiny` and `smollm2`
   keep the profile's learning rate for every method. HPT's and LUFFY's own problem budgets and prompts are not used.
7. Table 2's "without distillation" is said to reduce to SFT+GRPO. `no_distillation` keeps SGPO's 8 autonomous samples;
   `sft_grpo` has the whole budget of 12. Show both.
8. `tiny` and `smollm2` have their own learning rates, lengths and problem counts, chosen for minutes on two cores.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sgpo_lib.config import MethodConfig, RunConfig, field_index, override, unknown
from sgpo_lib.config_checks import validate
from sgpo_lib.tiny import SIZES, base_key

_SGPO = MethodConfig()
_GRPO = MethodConfig(g2=0, distillation="none")
_WITH_EXPERT = replace(_GRPO, advantage_std="none", clip_low=1.0, clip_high=math.inf, aggregation="sequence_mean",
                       entropy_coefficient=0.00025)
_RECIPES: dict[str, MethodConfig] = {
    "sgpo": _SGPO,
    "base": replace(_GRPO, objective="none"),
    "sft": replace(_GRPO, objective="supervised"),
    "sft_grpo": replace(_GRPO, g1=12),
    "grpo8": _GRPO,
    "luffy": replace(_WITH_EXPERT, g1=11, expert="group"),
    "luffy8": replace(_WITH_EXPERT, g1=7, expert="group"),
    "hpt": replace(_WITH_EXPERT, g1=12, expert="fallback"),
    # Table 2
    "no_distillation": _GRPO,
    "no_grpo": replace(_SGPO, policy_gradient=False),
    "no_proximal": replace(_SGPO, target_selection="all_correct", kl_delta=math.inf),
    "no_kl_clip": replace(_SGPO, kl_delta=math.inf),
    "no_target_selection": replace(_SGPO, target_selection="all_correct"),
    "no_adaptive_weight": replace(_SGPO, weighting="fixed"),
    # Tables 3, 6 and 7
    "guided_sft": replace(_SGPO, distillation="cross_entropy"),
    "reverse_kl": replace(_SGPO, distillation="reverse_kl"),
    "group_advantage_weight": replace(_SGPO, weighting="group_advantage"),
}
METHODS: dict[str, MethodConfig] = {name: replace(config, method=name) for name, config in _RECIPES.items()}
"""Name -> complete objective. docs/methods.md says what each is, where it is computed and what pins it."""

_FOR_PROFILE: dict[tuple[str, str], dict[str, Any]] = {
    ("hpt", "qwen2.5-1.5b"): {"expert_coefficient": 0.3, "lr": 5e-6},
    ("hpt", "qwen2.5-7b"): {"lr": 5e-6},
    ("hpt", "llama3-8b"): {"expert_gate": 3, "lr": 5e-6},
}
"""(method, profile) -> what HPT's published scripts set for that model."""

_TINY: dict[str, Any] = {
    "model.source": "tiny", "train.torch_threads": 1, "model.device": "cpu",
    "data.problems": "testbed", "warmup_share": 0.25, "n_train": 400, "n_validation": 60, "n_test": 120,
    "max_new_tokens": 48, "steps": 40, "problems_per_step": 5, "lr": 4e-4, "lr_warmup_ratio": 0.15,
    "eval_every": 4, "eval_problems": 60, "eval_k": 2, "test_k": 4, "eval_temperature": 0.6,
}
_SMOLLM2: dict[str, Any] = {
    "model.source": "smollm2", "lora_rank": 16, "lora_alpha": 32,
    "data.problems": "reasoning-gym:chain_sum", "warmup_share": 0.5,
    "problem_args": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "n_train": 320, "n_validation": 16, "n_test": 16,
    "max_new_tokens": 40, "steps": 10, "problems_per_step": 2, "micro_batch": 8, "layout": "shared",
    "rollout_batch": 48,
    "lr": 2e-4, "eval_every": 0, "eval_problems": 8, "test_k": 1,
}
_PAPER: dict[str, Any] = {
    "model.dtype": "float32", "compute_dtype": "bfloat16", "sampler_dtype": "bfloat16",
    "data.problems": "problems.jsonl", "warmup_share": 1 / 3,
    "n_train": 8500, "n_validation": 200, "n_test": 500, "max_new_tokens": 16384, "epochs": 10.0, "lr": 1e-6,
    "problems_per_step": 128, "mini_batch": 64, "micro_batch": 4, "rollout_batch": 256,
    "sampler": "vllm", "sleep": True, "activation_checkpointing": True,
    "eval_every": 20, "eval_problems": 200, "eval_max_new_tokens": 32768, "save_every": 10, "reward_workers": 8,
    "lr_warmup_ratio": 0.0,
}
_SFT: dict[str, dict[str, Any]] = {
    "tiny": {"steps": 100, "problems_per_step": 64, "lr": 1e-3, "eval_every": 10},
    "smollm2": {"steps": 20, "problems_per_step": 12, "lr": 5e-4, "eval_every": 10, "save_every": 5,
                "guided_share": 0.5},
    "paper": {"epochs": 10.0, "problems_per_step": 64, "mini_batch": 0, "lr": 1e-5, "lr_warmup_ratio": 0.1},
}
PROFILES: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "smollm2": _SMOLLM2,
    "qwen2.5-1.5b": {**_PAPER, "model.source": "Qwen/Qwen2.5-1.5B-Instruct"},
    "qwen2.5-7b": {**_PAPER, "model.source": "Qwen/Qwen2.5-7B-Instruct"},
    "llama3-8b": {**_PAPER, "model.source": "meta-llama/Llama-3.1-8B-Instruct"},
}
"""Profile -> the fields in which it differs from the defaults of `config.py`."""

NOTEBOOK_FIELDS: dict[str, str] = {
    "overrides": "Any other configuration fields by name, short or dotted.",
    "baseline": "Method that a notebook trains beside the first; empty for none.",
    "warmup_steps": "Steps of the supervised warm-up run that comes before RL; 0 for none.",
    "seeds": "Several seeds, one run after another, instead of `seed`; empty for none.",
    "run": "Folder of one finished run.",
    "runs": "Folders of several runs; empty for all that fit.",
    "batch": "Name of a batch of notebooks whose runs to read; empty for all.",
    "count": "Problems to look at.",
    "policy": "Policy to look at: a hub id, a folder, a run or RUN@STEP; empty for the profile's base.",
    "drain_steps": "Steps of the short run whose checkpoints are read; 0 for none.",
    "token_problems": "Problems of each world on which the base's token divergences are measured; 0 for none.",
    "export": "Folder below reports/ for tables and figures; empty writes none.",
}
"""Parameters of notebooks that are not configuration fields; every other parameter is one."""


def from_parameters(profile: str = "tiny", method: str = "sgpo", seed: int = 0, **overrides: Any) -> RunConfig:
    """The complete, checked configuration of a notebook's parameters.

    Order: defaults, profile, method, then `overrides`, whose names are short (`steps=60`) or dotted
    (`**{"train.steps": 60}`). Raises ValueError for an unknown profile, method or field, naming the nearest, and
    for values that cannot work. A given `problems` clears the profile's `problem_args`, a given `steps` its `epochs`, a
    given `sampler` its `sleep`; a given `lora_rank` turns its mixed precision into a base of that `compute_dtype`.
    """
    if profile not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    config = override(RunConfig(profile=profile, seed=seed, method=METHODS[method]), PROFILES[profile])
    if config.method.objective == "supervised":
        config = override(config, _SFT.get(profile, _SFT["paper"]))
    given = {field_index().get(name, name) for name in overrides}
    implied: dict[str, Any] = {}
    if "data.problems" in given and "data.problem_args" not in given:
        implied["problem_args"] = {}  # the profile's arguments belong to the profile's source
    if "train.steps" in given and "train.epochs" not in given:
        implied["epochs"] = 0.0
    if "rollout.sampler" in given:
        implied["sleep"] = False
    adapter = overrides.get("lora_rank", overrides.get("model.lora_rank", 0))
    if adapter and config.model.compute_dtype and not given & {"model.dtype", "model.compute_dtype"}:
        implied |= {"dtype": config.model.compute_dtype, "compute_dtype": ""}  # an adapter is float32 by itself
    config = override(override(override(config, _FOR_PROFILE.get((method, profile), {})), implied), overrides)
    if config.model.source in SIZES and not config.model.revision:
        config = override(config, {"model.revision": base_key(config.model.source)})
    return validate(config)

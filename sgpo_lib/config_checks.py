"""Values that cannot work are refused here, before any work is done."""

from __future__ import annotations

import math

from sgpo_lib.config import DataConfig, RunConfig, field_index
from sgpo_lib.method_config import CHOICES

_NOT_NEGATIVE = ("steps", "alpha_base", "alpha_fixed", "entropy_coefficient", "advantage_eps", "weight_decay",
                 "max_grad_norm", "n_validation", "n_test", "eval_every", "eval_problems", "eval_max_new_tokens",
                 "save_every", "context", "torch_threads",
                 "kv_cache_gb")


def validate(config: RunConfig) -> RunConfig:
    """Refuse values that cannot work, before any work is done. Returns the same config.

    Raises ValueError naming field, value, what is allowed and the cure; all faults at once.
    """
    m, t, d, r, e, c = config.method, config.train, config.data, config.rollout, config.evaluation, config.compute
    rl = m.objective == "rl"
    choices = [
        *((f"method.{name}", getattr(m, name), words) for name, words in CHOICES.items()),
        ("model.dtype", config.model.dtype, ("float32", "bfloat16")),
        ("model.compute_dtype", config.model.compute_dtype, ("", "bfloat16")),
        ("compute.engine", c.engine, ("local", "ray")),
        ("rollout.sampler", r.sampler, ("transformers", "vllm", "server")),
        ("compute.placement", c.placement, ("shared", "own")),
        ("rollout.sampler_dtype", r.sampler_dtype, ("", "float32", "bfloat16")),
        ("train.layout", t.layout, ("right", "left", "packed", "shared")),
        ("train.lr_schedule", t.lr_schedule, ("constant", "linear", "cosine")),
        ("data.bad_strategies", d.bad_strategies, ("", "wrong", "vague", "leaking")),
        ("train.track", t.track, ("", "tensorboard", "trackio", "wandb")),
    ]
    faults = [f"{n}: got {v!r}, expected one of {', '.join(map(repr, ok))}" for n, v, ok in choices if v not in ok]
    checks = [
        (not rl or m.g1 >= 2, "method.g1", m.g1, "at least 2: a group of one has no advantage (Eq. 1)"),
        (m.g2 >= 0, "method.g2", m.g2, "0 or more"),
        (m.distillation == "none" or not rl or m.g2 >= 1, "method.g2", m.g2,
         "at least 1 where method.distillation is on; or set distillation='none'"),
        (0 < m.alpha_gamma < math.inf, "method.alpha_gamma", m.alpha_gamma,
         "above 0, finite: Eq. 6 divides by p_auto + gamma"),
        (m.alpha_max >= 0, "method.alpha_max", m.alpha_max, "0 or more"),
        (0 <= m.guided_share <= 1, "method.guided_share", m.guided_share, "0 to 1"),
        (m.kl_delta > 0, "method.kl_delta", m.kl_delta, "above 0 nats; inf for no clipping"),
        (0 < m.clip_low <= 1, "method.clip_low", m.clip_low, "above 0, at most 1; 1 does not clip below"),
        (m.clip_high > 0, "method.clip_high", m.clip_high, "above 0; inf does not clip"),
        (0 < m.shaping_gamma < math.inf, "method.shaping_gamma", m.shaping_gamma,
         "above 0, finite: p / (p + gamma) of LUFFY has no gradient at 0"),
        (m.expert != "fallback" or 0 <= m.expert_gate < m.g1, "method.expert_gate", m.expert_gate,
         f"0 to g1 - 1 = {m.g1 - 1} correct responses"),
        (0 < m.expert_coefficient < math.inf, "method.expert_coefficient", m.expert_coefficient, "above 0, finite"),
        (0 <= m.ema_decay < 1, "method.ema_decay", m.ema_decay, "0 up to, not including, 1"),
        (not rl or m.policy_gradient or (m.distillation != "none" and m.expert == "none"), "method.policy_gradient",
         m.policy_gradient, "true where there is no distillation to learn from, or where method.expert is set"),
        (m.policy_gradient or m.expert != "none" or m.entropy_coefficient == 0, "method.entropy_coefficient",
         m.entropy_coefficient, "0 where method.policy_gradient is off (it covers what that learns); or turn it on"),
        (m.guided_side == "live" or m.distillation in ("forward_kl", "reverse_kl"), "method.guided_side",
         m.guided_side, "'live' where no divergence is learned (method.distillation)"),
        (m.weighting != "group_advantage" or m.advantage_std != "none", "method.advantage_std", m.advantage_std,
         "'sample' or 'population' with weighting='group_advantage': Eq. 8 divides by the deviation"),
        (0 <= t.epochs < math.inf, "train.epochs", t.epochs, "0 (train.steps decides) or more, finite"),
        (t.problems_per_step >= 1, "train.problems_per_step", t.problems_per_step, "at least 1"),
        (0 <= t.mini_batch <= t.problems_per_step, "train.mini_batch", t.mini_batch,
         f"0 (whole batch) to problems_per_step = {t.problems_per_step}"),
        (t.updates_per_batch >= 1, "train.updates_per_batch", t.updates_per_batch, "at least 1"),
        (t.micro_batch >= 1, "train.micro_batch", t.micro_batch, "at least 1"),
        (t.micro_batch_tokens >= 0, "train.micro_batch_tokens", t.micro_batch_tokens, "at least 0 (0: no limit)"),
        (t.kl_chunk_tokens >= 1, "train.kl_chunk_tokens", t.kl_chunk_tokens, "at least 1"),
        (0 < t.lr < math.inf, "train.lr", t.lr, "above 0, finite"),
        (0 <= t.lr_warmup_ratio <= 1, "train.lr_warmup_ratio", t.lr_warmup_ratio, "0 to 1"),
        (t.keep_checkpoints >= 2, "train.keep_checkpoints", t.keep_checkpoints,
         "at least 2: where the newest is found damaged, the one before it is used"),
        (all(d.guided_prompt.count(x) == 1 for x in ("{strategy}", "{problem}")), "data.guided_prompt",
         d.guided_prompt, "a text with {strategy} and {problem} once each"),
        (0 <= d.bad_share <= 1 and (d.bad_share > 0) == bool(d.bad_strategies), "data.bad_share", d.bad_share,
         "above 0, at most 1, where data.bad_strategies names a kind, else 0"),
        (set(e.transfer) <= set(DataConfig.__dataclass_fields__), "evaluation.transfer", e.transfer,
         f"fields of data: {', '.join(DataConfig.__dataclass_fields__)}"),
        (d.n_train >= 1, "data.n_train", d.n_train, "at least 1"),
        (0 <= d.warmup_share < 1, "data.warmup_share", d.warmup_share, "0 up to, not including, 1"),
        (0 < r.temperature < math.inf, "rollout.temperature", r.temperature, "above 0, finite"),
        (0 < e.eval_temperature < math.inf, "evaluation.eval_temperature", e.eval_temperature, "above 0, finite"),
        (0 < r.top_p <= 1, "rollout.top_p", r.top_p, "above 0, at most 1"),
        (0 < e.eval_top_p <= 1, "evaluation.eval_top_p", e.eval_top_p, "above 0, at most 1"),
        (r.max_new_tokens >= 1, "rollout.max_new_tokens", r.max_new_tokens, "at least 1"),
        (bool(r.server) == (r.sampler == "server"), "rollout.server", r.server,
         "an address such as http://node7:8000/v1 with rollout.sampler='server', else empty"),
        (r.sampler != "server" or config.model.lora_rank > 0, "model.lora_rank", config.model.lora_rank,
         "above 0 with rollout.sampler='server': it takes adapters; all weights need sampler='vllm'"),
        (r.sampler == "transformers" or config.model.lora_dropout == 0, "model.lora_dropout", config.model.lora_dropout,
         "0 with rollout.sampler='vllm' or 'server': vLLM has none"),
        (r.sampler == "transformers" or config.model.lora_rank <= 512, "model.lora_rank", config.model.lora_rank,
         "at most 512 with rollout.sampler='vllm' or 'server': vLLM's kernels take no more"),
        ("lm_head" not in config.model.lora_targets.split(","), "model.lora_targets", config.model.lora_targets,
         "no lm_head: the library takes the base's output matrix (Eq. 3), so that its adapter would not learn"),
        (r.sampler == "transformers" or "embed_tokens" not in config.model.lora_targets.split(","),
         "model.lora_targets", config.model.lora_targets,
         "no embed_tokens with rollout.sampler='vllm' or 'server': its adapter cannot be compared"),
        (not config.model.compute_dtype or r.sampler_dtype != "float32", "rollout.sampler_dtype", r.sampler_dtype,
         "empty or 'bfloat16' with model.compute_dtype='bfloat16', in which the policy computes"),
        (0 < c.gpu_memory_share < 1, "compute.gpu_memory_share", c.gpu_memory_share, "above 0, below 1"),
        (r.max_gap > 0, "rollout.max_gap", r.max_gap, "above 0 nats; inf for no limit"),
        (c.placement == "shared" or c.workers > 1, "compute.placement", c.placement,
         "'shared' with one worker, whose vLLM takes the first visible GPU"),
        (c.placement == "shared" or r.sampler == "vllm", "compute.placement", c.placement,
         "'shared' unless rollout.sampler='vllm'"),
        (not c.sleep or r.sampler == "vllm", "compute.sleep", c.sleep, "false unless rollout.sampler='vllm'"),
        (r.rollout_batch >= 1, "rollout.rollout_batch", r.rollout_batch, "at least 1"),
        (e.eval_k >= 1, "evaluation.eval_k", e.eval_k, "at least 1"),
        (e.test_k >= 1, "evaluation.test_k", e.test_k, "at least 1; data.n_test = 0 for no final evaluation"),
        (0 <= t.adam_beta1 < 1, "train.adam_beta1", t.adam_beta1, "0 up to, not including, 1"),
        (0 <= t.adam_beta2 < 1, "train.adam_beta2", t.adam_beta2, "0 up to, not including, 1"),
        (0 <= config.model.lora_dropout < 1, "model.lora_dropout", config.model.lora_dropout,
         "0 up to, not including, 1"),
        (config.model.lora_rank >= 0, "model.lora_rank", config.model.lora_rank, "0 (train all weights) or more"),
        (c.workers >= 1, "compute.workers", c.workers, "at least 1"),
        (c.workers == 1 or c.engine == "ray", "compute.workers", c.workers, "1 with compute.engine='local'; several "
         "need engine='ray'"),
        (c.worker_cpus >= 1, "compute.worker_cpus", c.worker_cpus, "at least 1"),
        (c.worker_restarts >= 0, "compute.worker_restarts", c.worker_restarts, "0 or more"),
        (c.workers < 1 or t.problems_per_step % c.workers == 0, "train.problems_per_step", t.problems_per_step,
         f"a multiple of compute.workers = {c.workers}, so that every worker has as much to do"),
        (c.workers < 1 or t.mini_batch % c.workers == 0, "train.mini_batch", t.mini_batch,
         f"a multiple of compute.workers = {c.workers}"),
        (not config.model.compute_dtype or (config.model.dtype == "float32" and not config.model.lora_rank),
         "model.compute_dtype", config.model.compute_dtype, "empty unless all weights train (lora_rank=0) in "
         "dtype='float32'; an adapter is in float32 over a base of any dtype"),
        ((c.workers == 1 and not config.model.compute_dtype) or config.model.lora_rank > 0 or m.guided_side == "live",
         "method.guided_side", m.guided_side, "'live' where the weights are sharded (all weights train on several "
         "workers, or with model.compute_dtype): a copy of them is not"),
        (config.reward.reward_deadline_s > 0, "reward.reward_deadline_s", config.reward.reward_deadline_s, "above 0"),
        (config.reward.reward_workers >= 1, "reward.reward_workers", config.reward.reward_workers, "at least 1"),
    ]
    for name in _NOT_NEGATIVE:
        section, _, leaf = field_index()[name].partition(".")
        value = getattr(getattr(config, section), leaf)
        checks.append((0 <= value < math.inf, f"{section}.{leaf}", value, "0 or more, finite"))
    faults += [f"{name}: got {got!r}, expected {want}" for ok, name, got, want in checks if not ok]
    if faults:
        raise ValueError("the configuration cannot work:\n  " + "\n  ".join(faults))
    return config

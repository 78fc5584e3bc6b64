"""Time of a run, from formulas: the other half of what `sgpo plan` shows. Names and units are those of plan.py.

What is assumed and not counted stands below, one constant each. Nothing here imports torch.
"""

from __future__ import annotations

import math

from sgpo_lib.plan import engine
from sgpo_lib.plan_setup import BYTES, Setup, Term, evaluations, terms
from sgpo_lib.shapes import GIB

FLOP_SHARE = 0.4
"""Share of the peak FLOP/s that matrix products reach, in training and for prompts. Assumed."""
BANDWIDTH_SHARE = 0.6
"""Share of the memory bandwidth that decoding reaches. Assumed."""
LINK_SHARE = 0.7
"""Share of the link speed that collectives reach. Assumed."""
LAYER_LAUNCH = 1e-3
"""Seconds a layer that `transformers.generate` needs per token step beside the arithmetic. Assumed."""
STEP_LAUNCH = 1e-3
"""The same of a whole step of vLLM, with CUDA graphs. Assumed."""
FILES = 2e9
"""Bytes a second from and to the file system that all nodes share. Assumed."""


def flops(s: Setup) -> float:
    """FLOP a second of one device."""
    return FLOP_SHARE * (s.device.bfloat16 if s.size == 2 else s.device.float32)


def forward_flops(s: Setup, tokens: float, context: float, logits: float) -> float:
    """FLOP of a forward pass: 2 for each parameter of the layers and token; attention 4 Q for each pair of tokens and
    layer (a mask lets none be skipped); 2 V H for each token with logits (Kaplan et al. 2020, section 2.1)."""
    shape = s.shape
    per_token = shape.layers * (2 * shape.layer + 4 * shape.queries * context)
    return tokens * per_token + logits * 2 * shape.vocabulary * shape.hidden


def sample_seconds(s: Setup, count: float, mean: int, longest: int) -> float:
    """Decoding `count` responses on one device: the larger of memory traffic (weights once a step, the cache of every
    running sequence) and arithmetic; the launches; the prompts by arithmetic.

    `transformers`: a batch runs until its longest response ends, taken to be `longest`. vLLM: places are filled again
    as responses end, but the last response takes its `longest` steps.
    """
    if not count:
        return 0.0
    shape, e, rollout, compute = s.shape, s.engine_size, s.config.rollout, s.config.compute
    rows, cache = float(min(rollout.rollout_batch, count)), shape.cache_per_token(e)
    if rollout.sampler == "transformers":
        steps, each, launch = float(math.ceil(count / rows) * longest), longest, LAYER_LAUNCH * shape.layers
    else:
        room = engine(s).get("vLLM cache") or GIB * compute.kv_cache_gb or (
            compute.vllm_share * s.memory - e * shape.parameters)
        rows = max(1.0, min(rows, room / (cache * s.length(mean))))
        steps, each, launch = max(count * mean / rows, longest), mean, STEP_LAUNCH
    seen = s.prompt_tokens + each / 2
    traffic = steps * e * shape.parameters + count * each * seen * cache
    arithmetic = forward_flops(s, count * each, seen, count * each)
    prompts = forward_flops(s, count * s.prompt_tokens, s.prompt_tokens, count)
    decoding = max(traffic / (BANDWIDTH_SHARE * s.device.bandwidth), arithmetic / flops(s))
    return decoding + steps * launch + prompts / flops(s)


def update_flops(s: Setup, term: Term) -> float:
    """FLOP of the forward and backward passes of a step on one worker.

    Layers: 6 P a token where all weights train, 4 P for an adapter (no gradients of the base), 2 P more with
    checkpointing. Attention: its backward pass is 2.5 forward passes (Dao 2023, FlashAttention-2, section 3.1). Output
    matrix: 2 V H forward and 2 V H for hidden states; where it trains, its own gradient and the logits once more
    (losses/fused.py). The guided side is one forward pass more, its logits computed as often as the other's.
    """
    mean, shape = s.mean_tokens, s.shape
    tokens = s.length(mean)
    again = int(s.config.train.activation_checkpointing)
    layers = shape.layers * tokens * ((4 if s.lora else 6) + 2 * again) * shape.layer
    attention = shape.layers * tokens * 4 * shape.queries * tokens * (3.5 + again)
    head = mean * shape.vocabulary * shape.hidden * (4 if s.lora else 8)
    guided = forward_flops(s, tokens, tokens, mean * (1 if s.lora else 2)) if term.guided else 0.0
    return term.rows * (layers + attention + head + guided)


def score_flops(s: Setup) -> float:
    """Forward passes before the first update: reach of guided responses (Eq. 4; all are taken to be correct), and old
    log-probabilities where a batch has several updates (trainer.py: `sgpo_step`)."""
    method, train = s.config.method, s.config.train
    several = train.updates_per_batch > 1 or 0 < train.mini_batch < train.problems_per_step
    rows = s.problems * ((method.g2 if method.distillation != "none" else 0) + (method.g1 if several else 0))
    tokens = s.length(s.mean_tokens)
    return rows * forward_flops(s, tokens, tokens, s.mean_tokens) if method.objective == "rl" else 0.0


def link(s: Setup) -> float:
    """Bytes a second and direction between neighbours of a ring over all workers: its slowest link."""
    return LINK_SHARE * (s.device.network if s.nodes > 1 else s.device.link)


def communication(s: Setup) -> float:
    """Seconds of collectives in a step's updates: per micro-batch FSDP2 gathers layers forward and backward and the
    root once, in e bytes, and reduces gradients in float32; a ring moves (n - 1) / n of it past each worker. DDP adds
    up an adapter's gradients: twice that of 4 A."""
    n = s.workers
    passes = sum(math.ceil(t.rows / t.together) for t in terms(s)) * s.config.train.updates_per_batch
    if s.lora:
        moved = 2 * 4 * s.trained
    else:
        moved = s.size * (2 * s.shape.layers * s.shape.layer + s.shape.root) + 4 * s.shape.parameters
    return passes * moved * (n - 1) / n / link(s)


def step_seconds(s: Setup) -> dict[str, float]:
    """Phase -> seconds of a training step. Judging runs on the CPU and is left out.

    FSDP2 fetches weights while it computes, so an update takes the longer of arithmetic and communication.
    """
    rollout, train = s.config.rollout, s.config.train
    arithmetic = sum(update_flops(s, t) for t in terms(s)) * train.updates_per_batch / flops(s)
    updates = train.updates_per_batch * -(-train.problems_per_step // (train.mini_batch or train.problems_per_step))
    traffic = 7 * s.trained * s.trained_size * updates  # AdamW reads four numbers a parameter and writes three
    return {"sample": sample_seconds(s, s.samples, s.mean_tokens, rollout.max_new_tokens),
            "deliver": deliver_seconds(s), "score": score_flops(s) / flops(s),
            "update": max(arithmetic, communication(s)), "optimizer": traffic / (BANDWIDTH_SHARE * s.device.bandwidth)}


def deliver_seconds(s: Setup) -> float:
    """Weights to vLLM as a folder (delivery.py): written once, by the first worker, and read by every node, whose
    engines share what was read. All weights are gathered first and go in vLLM's dtype; an adapter in float32. (On one
    GPU all weights go through its memory instead, which is faster.)"""
    if s.config.rollout.sampler == "transformers" or s.config.method.objective != "rl":
        return 0.0
    if s.lora:
        return (1 + s.nodes) * 4 * s.trained / FILES
    parameters, n = s.shape.parameters, s.workers
    gather = BYTES[s.config.model.dtype] * parameters * (n - 1) / n / link(s)
    return gather + (1 + s.nodes) * s.engine_size * parameters / FILES


def evaluation_seconds(s: Setup) -> float:
    """Of the evaluations before, while and after training."""
    longest = s.length(s.config.evaluation.eval_max_new_tokens or s.config.rollout.max_new_tokens) - s.prompt_tokens
    return sum(e.times * sample_seconds(s, math.ceil(e.responses / s.workers), s.mean_tokens, longest)
               for e in evaluations(s))


def run_seconds(s: Setup) -> float:
    """Of the whole run."""
    return s.steps * sum(step_seconds(s).values()) + evaluation_seconds(s)

"""Memory per GPU and time of a run, from formulas: what `sgpo plan` shows before anything is paid for.

Every formula says what it counts and where that comes from. "Counted" is read off the code: the tensors that stay
alive, with the numbers of the model's shape; `tests/test_plan.py` and `benchmarks/plan_memory.py` measure them.
What is assumed and not counted stands below, one constant each.

Units: bytes, seconds, tokens. e: bytes of a number in the computation. P parameters, A of an adapter. H, I, Q, K, V:
hidden, MLP, query and key numbers of a token, vocabulary. B sequences, S tokens of one, C tokens of a chunk.
Nothing here imports torch.
"""

from __future__ import annotations

import math

from sgpo_lib.plan_setup import BYTES, PROCESS_CPU, Setup, Term, own_gpu, terms
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
OWN_SHARE = 0.9
"""Share of a GPU of its own that vLLM takes (vLLM's default)."""


# --- memory ------------------------------------------------------------------------------------------------------
def weights(s: Setup) -> int:
    """Weights that a worker holds between passes: P b whole beside an adapter, P b / workers where all train."""
    width = BYTES[s.config.model.dtype]
    return width * s.shape.parameters + 4 * s.trained if s.lora else width * s.trained


def gradients(s: Setup) -> int:
    """One number per trained parameter; DDP (several workers, an adapter) has its buckets beside them."""
    return s.trained * s.trained_size * (2 if s.lora and s.workers > 1 else 1)


def moments(s: Setup) -> int:
    """AdamW's two, in the type of the parameters."""
    return 2 * s.trained * s.trained_size


def copies(s: Setup) -> int:
    """A frozen or averaged guided side (guided_side.py)."""
    return s.trained * s.trained_size * (s.config.method.guided_side != "live")


def gathered(s: Setup, *, whole: bool = False) -> int:
    """Weights that FSDP2 has gathered: the root and two layers (one is fetched ahead), or all for sampling.

    In the computation's type (FSDP2's documentation: all-gather in param_dtype, the root is not resharded).
    """
    if not s.sharded:
        return 0
    return s.size * (s.shape.parameters if whole else s.shape.root + 2 * s.shape.layer)


def reducing(s: Setup) -> int:
    """The root's whole gradient in the computation's type and as the float32 that is reduced (parallel.py)."""
    return (s.size + 4) * s.shape.root if s.sharded else 0


def masked(s: Setup, rows: int) -> bool:
    """Whether attention gets a mask: with padding, or packed. One row alone needs none, nor do flash kernels."""
    train = s.config.train
    return not s.config.model.attention.startswith("flash") and (rows > 1 or train.layout == "packed")


def mask(s: Setup, rows: int, tokens: int) -> int:
    """Additive mask of one layer: B S^2 e, packed (B S)^2 e. torch makes it from the boolean one in every layer and
    keeps it for the backward pass (counted: `scaled_dot_product_attention`)."""
    if not masked(s, rows):
        return 0
    return s.size * ((rows * tokens) ** 2 if s.config.train.layout == "packed" else rows * tokens**2)


def layer_kept(s: Setup, rows: int, tokens: int) -> int:
    """What one layer keeps for its backward pass, without `mask`. Counted in transformers' Llama, Qwen and PEFT 0.21:

        norms      2 x H in float32, its result too where gains train (2 H e), Qwen3's the same for Q + K
        matrices   their inputs: 2 H + I in e (and the attention's output, below); adapters over bfloat16 cast each
                   input to float32 for themselves: 4 bytes a number and matrix; rank x 4 bytes between A and B
        attention  q, k, v, output, 4 bytes a head; k and v repeated to Q where there is a mask
        MLP        gate, silu(gate), up: 3 I e
    """
    shape, e, model = s.shape, s.size, s.config.model
    chosen = shape.targets(model.lora_targets)
    own = (shape.queries + shape.keys) * (shape.kind == "qwen3")
    numbers = 4 * (2 * shape.hidden + own) + 8
    numbers += 0 if s.lora else e * (2 * shape.hidden + own)
    if s.lora and e == 2:
        numbers += sum(4 * into for into, _ in chosen.values())
    else:
        inputs = {"q_proj": "q", "k_proj": "q", "v_proj": "q", "gate_proj": "up", "up_proj": "up", "down_proj": "down"}
        distinct = {inputs[name]: into for name, (into, _) in chosen.items() if name in inputs}
        numbers += e * (sum(distinct.values()) if s.lora else 2 * shape.hidden + shape.intermediate)
    numbers += 4 * model.lora_rank * len(chosen) if s.lora else 0
    repeated = shape.queries if masked(s, rows) else shape.keys
    numbers += e * (2 * shape.queries + 2 * repeated) + 4 * shape.heads
    return rows * tokens * (numbers + 3 * e * shape.intermediate)


def layer_backward(s: Setup, rows: int, tokens: int) -> int:
    """Gradients that live at once inside one layer: 2 x I in float32 a token (counted at the peak)."""
    return rows * tokens * 8 * s.shape.intermediate


def forward_working(s: Setup, rows: int, tokens: int) -> int:
    """Alive at once in a pass without gradient, a token: 3 I + 3 H in e, with adapters one I more (over bfloat16 two
    I in float32), and the masks: boolean, and additive in one layer (counted)."""
    shape, e = s.shape, s.size
    adapter = (4 if e == 4 else 8) * shape.intermediate if s.lora else 0
    both = mask(s, rows, tokens)
    return rows * tokens * (3 * e * (shape.intermediate + shape.hidden) + adapter) + both + both // e


def head_workspace(s: Setup, term: Term, tokens: int) -> int:
    """Of log-probabilities or divergences of one chunk of C tokens: n C V x 4 bytes (token_kl.py). Where the output
    matrix trains, the sum of its gradient beside it, or that, a chunk's part and the new sum: 3 V H e (counted)."""
    chunk = 4 * min(s.config.train.kl_chunk_tokens, term.together * tokens) * s.shape.vocabulary
    matrix = 0 if s.lora else s.size * s.shape.vocabulary * s.shape.hidden
    return max(term.copies * chunk + matrix, 3 * matrix)


def activations(s: Setup, term: Term, tokens: int, response: int) -> dict[str, int]:
    """What a micro-batch keeps for its backward pass: layers, masks, and hidden states around the output matrix.

    With `activation_checkpointing` a layer keeps its input alone, and one layer at a time has the rest.
    """
    rows, layers, e, hidden = term.together, s.shape.layers, s.size, s.shape.hidden
    one, additive = layer_kept(s, rows, tokens), mask(s, rows, tokens)
    saved = s.config.train.activation_checkpointing
    inputs = rows * tokens * hidden * e * layers if saved else 0
    top = rows * tokens * hidden * (4 + 2 * e) + rows * response * hidden * e * (3 if term.guided else 2)
    return {"activations": inputs + one * (1 if saved else layers) + top,
            "attention masks": additive * (1 if saved else layers) + additive // e}


def update(s: Setup, term: Term) -> dict[str, int]:
    """At the peak of a backward pass: activations, and what is largest of chunk and layer."""
    response = s.config.rollout.max_new_tokens
    tokens = s.length(response)
    return activations(s, term, tokens, response) | {"log-probability workspace": max(
        head_workspace(s, term, response), layer_backward(s, term.together, tokens))}


def optimizer_working(s: Setup) -> int:
    """AdamW's step (foreach=False): two tensors as large as the largest parameter, sharded or not (counted)."""
    shape, model = s.shape, s.config.model
    if s.lora:
        largest = model.lora_rank * max(max(pair) for pair in shape.targets(model.lora_targets).values())
    else:
        largest = shape.vocabulary * shape.hidden // s.workers
    return 2 * s.trained_size * largest


def sampling(s: Setup, count: int, response: int) -> dict[str, int]:
    """`transformers.generate` of a batch: cache of all its tokens; one layer's cache copied as it grows (cat), and
    repeated to all heads under the padding mask; the prompts' pass; 9 x B V in float32 and the logits
    (transformers_engine.py, when the whole vocabulary is sorted)."""
    rows, shape, e = min(s.config.rollout.rollout_batch, count), s.shape, s.size
    if not rows:
        return {}
    tokens = s.length(response)
    step = rows * (tokens * e * (2 * shape.keys + 2 * shape.queries) + shape.vocabulary * (36 + e))
    prompts = forward_working(s, rows, min(s.prompt_tokens, tokens))
    return {"KV cache": rows * tokens * shape.cache_per_token(e), "sampling workspace": max(step, prompts)}


def engine(s: Setup) -> dict[str, int]:
    """vLLM's part of a worker's GPU: its share, or its weights with a cache of `kv_cache_gb` (opening.py)."""
    rollout = s.config.rollout
    if rollout.sampler != "vllm" or own_gpu(s.config):
        return {}
    own = s.shape.parameters * s.engine_size
    if rollout.kv_cache_gb or s.process == PROCESS_CPU:
        return {"vLLM weights": own, "vLLM cache": int((rollout.kv_cache_gb or 1) * GIB)}
    return {"vLLM weights": own, "vLLM cache": max(int(rollout.gpu_memory_share * s.memory) - own,
                                                   s.length(2**31) * s.shape.cache_per_token(s.engine_size))}


def evaluated(s: Setup) -> int:
    """Responses of the largest evaluation on one worker."""
    e, data = s.config.evaluation, s.config.data
    test = data.n_test * e.test_k
    return -(-max(test, min(e.eval_problems, data.n_validation) * e.eval_k) // s.workers)


def phases(s: Setup) -> dict[str, dict[str, int]]:
    """Phase -> part -> bytes that are alive together on one worker's device. The plan's peak is the largest sum.

    The first step has no moments while it samples; later ones do, and so do these.
    """
    rollout, rl = s.config.rollout, s.config.method.objective == "rl"
    held = {"process": s.process, "weights": weights(s), "moments": moments(s), "guided side": copies(s)}
    beside = {} if rollout.sleep else engine(s)
    found: dict[str, dict[str, int]] = {}
    if s.workers > 1 and s.sharded:
        whole = BYTES[s.config.model.dtype] * s.shape.parameters
        found["load"] = {"process": s.process, "weights": whole}
    samplers = {"sample": (s.samples, rollout.max_new_tokens),
                "evaluate": (evaluated(s), s.config.evaluation.eval_max_new_tokens or rollout.max_new_tokens)}
    for name, (count, response) in samplers.items():
        if count and rollout.sampler == "transformers":
            found[name] = held | {"gathered": gathered(s, whole=True)} | sampling(s, count, response)
        elif count:
            found[name] = held | engine(s)
    trained = held | {"gradients": gradients(s)} | beside
    for term in terms(s):
        if rl and term.name == "token KL":
            rows = min(s.config.train.micro_batch, s.problems * s.config.method.g2)
            found["score"] = held | {"gathered": gathered(s)} | beside | {
                "forward pass": forward_working(s, rows, s.length(rollout.max_new_tokens)),
                "log-probability workspace": 12 * s.config.train.kl_chunk_tokens * s.shape.vocabulary}
        found[f"update: {term.name}"] = trained | {"gathered": gathered(s), "reducing": reducing(s)} | update(s, term)
    if s.config.method.objective != "none":
        found["optimizer"] = trained | {"optimizer workspace": optimizer_working(s)}
    return {name: {part: size for part, size in parts.items() if size} for name, parts in found.items()}


def peak(s: Setup) -> tuple[str, int]:
    """(phase, bytes) of the largest need."""
    sums = {name: sum(parts.values()) for name, parts in phases(s).items()}
    name = max(sums, key=lambda n: sums[n])
    return name, sums[name]


# --- time --------------------------------------------------------------------------------------------------------
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
    shape, e, rollout = s.shape, s.engine_size, s.config.rollout
    rows, cache = float(min(rollout.rollout_batch, count)), shape.cache_per_token(e)
    if rollout.sampler == "transformers":
        steps, each, launch = float(math.ceil(count / rows) * longest), longest, LAYER_LAUNCH * shape.layers
    else:
        room = engine(s).get("vLLM cache") or GIB * rollout.kv_cache_gb or OWN_SHARE * s.memory - e * shape.parameters
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
    matrix: forward twice (token_kl.py), backward 4 V H, with an adapter 2. The guided side is one forward pass more.
    """
    mean, shape = s.mean_tokens, s.shape
    tokens = s.length(mean)
    again = int(s.config.train.activation_checkpointing)
    layers = shape.layers * tokens * ((4 if s.lora else 6) + 2 * again) * shape.layer
    attention = shape.layers * tokens * 4 * shape.queries * tokens * (3.5 + again)
    head = mean * shape.vocabulary * shape.hidden * (6 if s.lora else 8)
    guided = forward_flops(s, tokens, tokens, 2 * mean) if term.guided else 0.0
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
    """Phase -> seconds of a training step. Judging runs on the CPU and is left out, as is delivery to vLLM.

    FSDP2 fetches weights while it computes, so an update takes the longer of arithmetic and communication.
    """
    rollout, train = s.config.rollout, s.config.train
    arithmetic = sum(update_flops(s, t) for t in terms(s)) * train.updates_per_batch / flops(s)
    updates = train.updates_per_batch * -(-train.problems_per_step // (train.mini_batch or train.problems_per_step))
    traffic = 7 * s.trained * s.trained_size * updates  # AdamW reads four numbers a parameter and writes three
    return {"sample": sample_seconds(s, s.samples, s.mean_tokens, rollout.max_new_tokens),
            "score": score_flops(s) / flops(s), "update": max(arithmetic, communication(s)),
            "optimizer": traffic / (BANDWIDTH_SHARE * s.device.bandwidth)}


def evaluation_seconds(s: Setup) -> float:
    """Of the evaluations before, while and after training (trainer.py), and of benchmarks whose `count` is given."""
    e, data = s.config.evaluation, s.config.data
    if s.config.method.objective == "supervised":
        times, each = 0, 0
    else:
        times = (s.steps // e.eval_every if e.eval_every else 0) + 1 + bool(e.eval_every and s.steps % e.eval_every)
        each = min(e.eval_problems, data.n_validation) * e.eval_k
    sets = [spec.get("count", 0) * spec.get("k", e.test_k) for spec in e.benchmarks.values()]
    longest = s.length(e.eval_max_new_tokens or s.config.rollout.max_new_tokens) - s.prompt_tokens
    return sum(sample_seconds(s, math.ceil(count / s.workers), s.mean_tokens, longest)
               for count in [each] * times + [data.n_test * e.test_k, *sets])


def run_seconds(s: Setup) -> float:
    """Of the whole run."""
    return s.steps * sum(step_seconds(s).values()) + evaluation_seconds(s)

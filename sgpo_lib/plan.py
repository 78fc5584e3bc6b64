"""Memory of each GPU, from formulas: what `sgpo plan` shows before anything is paid for, beside plan_time.py.

Every formula says what it counts and where that comes from. "Counted" is read off the code: the tensors that stay
alive, with the numbers of the model's shape; `tests/test_plan.py` and `benchmarks/plan_memory.py` measure them.

Units: bytes, tokens. e: bytes of a number in the computation. P parameters, A of an adapter. H, I, Q, K, V:
hidden, MLP, query and key numbers of a token, vocabulary. B sequences, S tokens of one, C tokens of a chunk.
Nothing here imports torch.
"""

from __future__ import annotations

from sgpo_lib.plan_setup import BYTES, PROCESS_CPU, PROCESS_GPU, Setup, Term, evaluations, own_gpu, terms
from sgpo_lib.shapes import GIB, block_rows


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
    """Weights that FSDP2 has gathered: the root and two layers (one is fetched ahead), or all for `transformers`.

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
    return not s.config.model.attention.startswith("flash") and (rows > 1 or train.layout in ("packed", "shared"))


def mask(s: Setup, rows: int, tokens: int) -> int:
    """Additive mask of one layer: B S^2 e, packed (B S)^2 e. torch makes it from the boolean one in every layer and
    keeps it for the backward pass (counted: `scaled_dot_product_attention`)."""
    if not masked(s, rows):
        return 0
    return s.size * ((rows * tokens) ** 2 if s.config.train.layout in ("packed", "shared") else rows * tokens**2)


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
    """Of log-probabilities or divergences (losses/fused.py; counted): logits of one chunk of C tokens, C V e, of both
    sides where they are compared; beside them n tensors of a block in float32 (losses/head.py), one more where logits
    have another type; where the output matrix trains, its gradient."""
    logits = min(s.config.train.kl_chunk_tokens, term.together * tokens) * s.shape.vocabulary
    block = min(logits, block_rows(s.kind, s.shape.vocabulary) * s.shape.vocabulary)
    matrix = 0 if s.lora else s.size * s.shape.vocabulary * s.shape.hidden
    return s.size * (2 if term.copies > 3 else 1) * logits + 4 * (term.copies + (s.size < 4)) * block + matrix


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
    """Sampling of a batch: cache of all its tokens; one layer's cache copied as it grows (cat), and
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
    compute = s.config.compute
    if s.config.rollout.sampler != "vllm" or own_gpu(s.config):
        return {}
    own = s.shape.parameters * s.engine_size
    if compute.kv_cache_gb or s.process == PROCESS_CPU:
        return {"vLLM weights": own, "vLLM cache": int((compute.kv_cache_gb or 1) * GIB)}
    return {"vLLM weights": own, "vLLM cache": max(int(compute.gpu_memory_share * s.memory) - own,
                                                   s.length(2**31) * s.shape.cache_per_token(s.engine_size))}


def delivering(s: Setup) -> int:
    """The largest parameter whole, as sharded weights are saved for vLLM and compared with what it holds
    (parallel.py: `save`, `gathered`)."""
    return BYTES[s.config.model.dtype] * s.shape.vocabulary * s.shape.hidden if s.sharded else 0


def resting(s: Setup) -> dict[str, int]:
    """vLLM's part while the policy trains: asleep it has its process's context left."""
    if not s.config.compute.sleep:
        return engine(s)
    return {} if own_gpu(s.config) else {"vLLM process": PROCESS_GPU}


def main_memory(s: Setup, gpus: int) -> int:
    """Of a node with `gpus` GPUs, at least: every worker's whole model while it is loaded, or the weights of every vLLM
    that sleeps and the first worker's copy of all weights while it saves them (parallel.py)."""
    whole = BYTES[s.config.model.dtype] * s.shape.parameters
    asleep = s.engine_size * s.shape.parameters if s.config.compute.sleep else 0
    return gpus * PROCESS_CPU + max(gpus * whole, gpus * asleep + (0 if s.lora else whole))


def phases(s: Setup) -> dict[str, dict[str, int]]:
    """Phase -> part -> bytes that are alive together on one worker's device. The plan's peak is the largest sum.

    The first step has no moments while it samples; later ones do, and so do these.
    """
    rollout, rl = s.config.rollout, s.config.method.objective == "rl"
    held = {"process": s.process, "weights": weights(s), "moments": moments(s), "guided side": copies(s)}
    beside = resting(s)
    found: dict[str, dict[str, int]] = {}
    if s.workers > 1 and s.sharded:
        whole = BYTES[s.config.model.dtype] * s.shape.parameters
        found["load"] = {"process": s.process, "weights": whole}
    largest = max((-(-e.responses // s.workers) for e in evaluations(s)), default=0)
    samplers = {"sample": (s.samples, rollout.max_new_tokens),
                "evaluate": (largest, s.config.evaluation.eval_max_new_tokens or rollout.max_new_tokens)}
    for name, (count, response) in samplers.items():
        if count and rollout.sampler == "transformers":
            found[name] = held | {"gathered": gathered(s, whole=True)} | sampling(s, count, response)
        elif count:
            found[name] = held | engine(s) | {"gathered": delivering(s)}
    trained = held | {"gradients": gradients(s)} | beside
    for term in terms(s):
        if rl and term.name == "token KL":
            rows = min(s.config.train.micro_batch, s.problems * s.config.method.g2)
            found["score"] = held | {"gathered": gathered(s)} | beside | {
                "forward pass": forward_working(s, rows, s.length(rollout.max_new_tokens)),
                "log-probability workspace": head_workspace(s, Term("score", rows, rows, 3), s.length(0))}
        found[f"update: {term.name}"] = trained | {"gathered": gathered(s), "reducing": reducing(s)} | update(s, term)
    if s.config.method.objective != "none":
        found["optimizer"] = trained | {"optimizer workspace": optimizer_working(s)}
    return {name: {part: size for part, size in parts.items() if size} for name, parts in found.items()}


def peak(s: Setup) -> tuple[str, int]:
    """(phase, bytes) of the largest need."""
    sums = {name: sum(parts.values()) for name, parts in phases(s).items()}
    name = max(sums, key=lambda n: sums[n])
    return name, sums[name]

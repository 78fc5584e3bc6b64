"""A real vLLM server on loopback, and the engine in this process, as models of `sgpo extract` and of readings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import KEY, MODEL
from servers import free_port

from sgpo_lib.config import ModelConfig
from sgpo_lib.extraction.pipeline import read_extractions
from sgpo_lib.policy import load_policy
from sgpo_lib.records import Problem, Strategy

pytestmark = pytest.mark.vllm


def answered(server: str) -> float:
    """Requests that the server itself has counted as finished."""
    with urllib.request.urlopen(f"{server}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return sum(float(n) for n in re.findall(r"^vllm:request_success_total\{[^}]*\} ([\d.e+]+)$", text, re.MULTILINE))


def extract(folder: Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": KEY, "SGPO_RUNS": str(folder)}
    command = [sys.executable, "-m", "sgpo_lib.cli", "extract", "--source", "collection", "--engine", f"openai:{MODEL}",
               "--out", str(folder / "strategies.jsonl"), "--candidates", "3", "--max-tokens", "96", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_extraction_end_to_end_against_a_real_server(server, tmp_path):
    """Every problem ends as a line with all its candidates; the same command again asks the server nothing."""
    before = answered(server)
    done = extract(tmp_path, server, "--count", "2", "--chunk", "1")
    assert done.returncode in (0, 1), done.stderr  # 1: a model this small gave no readable candidate at all
    asked = answered(server) - before
    found = read_extractions(tmp_path / "strategies.jsonl")
    assert len(found) == 2 and all(len(e.candidates) == 3 for e in found)
    for e in found:
        assert all(c.text and (c.strategy or c.reason) for c in e.candidates)
        assert e.status in ("kept", "leaking", "no strategy")
        assert (e.chosen is None) == (e.status == "no strategy")
        assert not any("error" in c.reason for c in e.candidates)
    again = sum(bool(c.first_reason) for e in found for c in e.candidates)
    assert 2 * 3 + again <= asked <= 2 * 3 + again + 4  # and one or two scoring calls each
    assert re.search(rf"{int(asked)} requests, 0 from the cache, 0 failed; [\d,]+ tokens", done.stdout), done.stdout
    repeated = extract(tmp_path, server, "--count", "2", "--chunk", "1")
    assert "0 requests" in repeated.stdout and answered(server) - before == asked
    (tmp_path / "strategies.jsonl").unlink()
    cached = extract(tmp_path, server, "--count", "2", "--chunk", "1")
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
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
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

"""A policy whose rollouts come from a vLLM server: adapters loaded while it runs, checked, and a server that fails."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import KEY, MODEL, RANK
from rollout_world import SETTINGS, gap, move, requests_of
from servers import free_port

from sgpo_lib.policy import Policy
from sgpo_lib.recipes import from_parameters
from sgpo_lib.rollouts.delivery import Delivered
from sgpo_lib.rollouts.server_engine import ServerEngine
from sgpo_lib.runs import load_run
from sgpo_lib.serving import is_loopback
from sgpo_lib.trainer import train

pytestmark = pytest.mark.vllm


@pytest.fixture
def delivered(server: str, policy: Policy, tmp_path: Path) -> Any:
    engine = ServerEngine(f"{server}/v1", stop_ids=policy.stop_ids())
    found = Delivered(lambda: engine, policy, tmp_path / "delivery", torch.float32)
    yield found
    found.engine = engine
    found.close()


def adapters(server: str) -> list[str]:
    asked = urllib.request.Request(f"{server}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked, timeout=10) as reply:
        return [m["id"] for m in json.load(reply)["data"] if m["id"] != MODEL]


def test_adapters_reach_a_server_and_leave_it_again(delivered, policy, server):
    requests = requests_of(policy, 3)
    for update in range(2):
        move(policy, 0.01, update)
        samples = delivered.sample(requests, **SETTINGS)
        assert gap(policy, requests, samples) < 1e-4
        assert len(adapters(server)) == 1 and adapters(server)[0].startswith("sgpo-")
    told = delivered.report()
    assert told["weights_version"] == 2 and told["weights_verified"] == 1 and told["prompt_cached_share"] > 0.3
    again = delivered.sample(requests, **SETTINGS)
    assert [s.token_ids for s in again] == [s.token_ids for s in samples], "seeds repeat"
    assert all(s.stop == ("end" if s.token_ids[-1] in policy.stop_ids() else "length") for s in samples)
    delivered.close()
    assert adapters(server) == []


def test_a_request_for_a_version_that_the_server_lost_is_an_error(delivered, policy):
    requests = requests_of(policy, 1)
    delivered.sample(requests, **SETTINGS)
    delivered.engine._ask("POST", "/v1/unload_lora_adapter", {"lora_name": delivered.engine.adapter})
    with pytest.raises(RuntimeError, match=r"HTTP 404.*sgpo-"):
        delivered.engine.sample(requests, **SETTINGS)


def test_a_skipped_delivery_to_a_server_is_caught(delivered, policy, monkeypatch):
    requests = requests_of(policy, 1)
    delivered.sample(requests, **SETTINGS)
    move(policy, 1e-5, 7)
    monkeypatch.setattr(delivered.engine, "load_adapter", lambda *a: None)
    with pytest.raises(RuntimeError, match=r"adapter, layer 0 [AB]: sum"):
        delivered.sample(requests, **SETTINGS)


def test_a_server_that_does_not_tell_must_be_allowed(delivered, policy, monkeypatch):
    """Its route is taken away; what it then answers is the server's own 404."""
    requests = requests_of(policy, 1)
    engine = delivered.start()
    ask = engine._ask
    monkeypatch.setattr(engine, "_ask", lambda method, path, body=None: ask(
        method, path.replace("/collective_rpc", "/no_such_route"), body))
    with pytest.raises(RuntimeError, match=r"VLLM_SERVER_DEV_MODE=1.*rollout\.verify_weights"):
        delivered.sample(requests, **SETTINGS)
    delivered.verify = False
    assert gap(policy, requests, delivered.sample(requests, **SETTINGS)) < 1e-4
    assert delivered.report()["weights_verified"] == 0


def test_a_run_samples_from_a_server(server, source, tmp_path):
    config = from_parameters("smollm2", "sgpo", 0, steps=1, sampler="server", server=f"{server}/v1", lora_rank=RANK,
                             problems_per_step=1, max_new_tokens=8, n_validation=0, n_test=0, context=512)
    row = train(config, root=tmp_path).metrics("train")[0]
    assert row["sampler_trainer_gap"] < 1e-4 and row["weights_verified"] == 1 and row["weights_version"] == 1
    assert adapters(server) == [] and not (tmp_path / config.label / "delivery").exists()


def test_a_run_whose_delivery_is_lost_stops_with_the_reason(server, source, tmp_path, importable, monkeypatch):
    """The second adapter never arrives. No step is made with samples of the first, and none is lost."""
    config = from_parameters("smollm2", "sgpo", 0, steps=3, sampler="server", server=f"{server}/v1", lora_rank=RANK,
                             problems_per_step=2, max_new_tokens=8, n_train=32, n_validation=0, n_test=0, context=512,
                             reward="rewards_for_tests:coin", lr=1e-3)
    load = ServerEngine.load_adapter

    def lose(self, folder, version, name):
        if version != 2:
            load(self, folder, version, name)

    with monkeypatch.context() as patch:
        patch.setattr(ServerEngine, "load_adapter", lose)
        with pytest.raises(RuntimeError, match="does not hold the policy's weights after delivery 2"):
            train(config, root=tmp_path)
    stopped = load_run(tmp_path / config.label)
    assert stopped.state == "failed" and [r["step"] for r in stopped.metrics("train")] == [1]
    told = json.loads((stopped.folder / "FAILED.json").read_text())
    assert "skipped, came from a former step, or was applied twice" in told["message"]
    assert [p.name for p in stopped.checkpoints()] == ["step-000001"], "where the same command goes on"


@pytest.mark.parametrize(("address", "message"), [
    ("127.0.0.1:8000", "expected an address such as"), ("http://127.0.0.1:8000", "expected an address such as"),
    ("http://127.0.0.1:{}/v1", "no server answers at http://127.0.0.1")])
def test_an_address_without_a_server_is_told_before_any_work(address, message, tmp_path):
    config = from_parameters("smollm2", "sgpo", 0, steps=1, sampler="server", server=address.format(free_port()))
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(config, root=tmp_path)
    assert not (tmp_path / config.label / "metrics.jsonl").exists()


def test_the_server_listens_on_loopback_and_wants_its_key(server):
    """As `sgpo serve` starts it: every socket of its processes, and a request without the key or with another."""
    port = int(server.rpartition(":")[2])
    owner = next(p for p in psutil.Process().children(recursive=True)
                 if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in p.net_connections("inet")))
    sockets = [c.laddr for p in (owner, *owner.children(recursive=True)) for c in p.net_connections("inet")
               if c.status == psutil.CONN_LISTEN]  # fmt: skip
    assert all(is_loopback(address.ip) for address in sockets), sockets
    for headers in ({}, {"Authorization": "Bearer another-key"}):
        for path in ("/v1/models", "/v1/completions", "/v1/load_lora_adapter"):
            asked = urllib.request.Request(server + path, headers=headers, method="GET" if "models" in path else "POST")
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(asked, timeout=10)
            assert error.value.code == 401
    assert KEY not in " ".join(owner.cmdline())

"""Promise 12: servers listen on loopback and want a token; anything else is asked for, and said."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import free_port

from sgpo_lib.cli import main
from sgpo_lib.serving import is_loopback

ROOT = Path(__file__).parents[2]


def made_lab() -> list[str]:
    """The command that `make lab` runs."""
    told = subprocess.run(["make", "-n", "--no-print-directory", "-o", "venv", "lab"], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    return told.stdout.strip().splitlines()[-1].lstrip("@").split()


@contextmanager
def running(command: list[str], home: Path, log: Path, port: int) -> Iterator[psutil.Process]:
    """A server with a Jupyter home of its own, once it listens; then all of it is ended."""
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(home), "JUPYTER_RUNTIME_DIR": str(home / "runtime")}
    for name in ("JUPYTER_TOKEN", "JUPYTER_TOKEN_FILE"):
        environment.pop(name, None)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
                                   start_new_session=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not any(address.port == port for _, address in listening(psutil.Process(process.pid))):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def listening(process: psutil.Process) -> list[tuple[str, Any]]:
    """(program, address) of every socket on which a process or its children listen."""
    found = []
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found += [(one.name(), c.laddr) for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return found


def status(url: str, **more: Any) -> tuple[int, str]:
    """HTTP status and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **more), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_make_lab_listens_on_loopback_and_wants_its_token(tmp_path, tally):
    """Whatever address a person's own configuration names."""
    (tmp_path / "jupyter_server_config.py").write_text("c.ServerApp.ip = '0.0.0.0'\n")
    port = free_port()
    with running([*made_lab(), "--no-browser", "--port", str(port)], tmp_path, tmp_path / "log", port) as server:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not (found := re.search(r"\?token=([0-9a-f]{40,})", (tmp_path / "log").read_text())):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for path in ("api/contents", "api/kernels", "api/terminals", "api/sessions", "api/contents?token=wrong"):
            assert status(f"{address}/{path}")[0] == 403, path
        assert status(f"{address}/api/kernels", method="POST", data=b"{}")[0] == 403
        told = {"Authorization": f"token {found[1]}"}
        good, text = status(f"{address}/api/contents", headers=told)
        assert good == 200 and "notebooks" in {row["name"] for row in json.loads(text)["content"]}
        assert status(f"{address}/api/kernels", method="POST", data=b"{}", headers=told)[0] == 201
        time.sleep(3)  # the kernel's own sockets
        sockets = listening(server)
        assert len(sockets) > 1 and all(is_loopback(where.ip) for _, where in sockets), sockets
        assert "EXPOSED" not in (tmp_path / "log").read_text()
    tally(12, "sockets of `make lab` with a kernel", f"{len(sockets)}, all on loopback; without the token 6 of 6 "
          "requests refused")


def test_an_address_that_others_reach_is_refused_without_the_flag(capsys):
    for command in ("lab", "serve"):
        for host in ("0.0.0.0", "::", "192.0.2.7", "", "*", "example.org"):
            words = [command, "--host", host] + (["some/model"] if command == "serve" else [])
            assert main(words) == 2
            told = capsys.readouterr().err
            assert "which other machines may reach" in told and "--expose" in told and "ssh -L" in told


def test_an_exposed_lab_keeps_its_token_and_says_so(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "sgpo_lib.cli", "lab", "--no-browser", "--port", str(port)]
    with running([*command, "--host", "0.0.0.0", "--expose"], tmp_path, tmp_path / "log", port) as server:
        assert any(address.ip == "0.0.0.0" for _, address in listening(server))
        assert status(f"http://127.0.0.1:{port}/api/contents")[0] == 403
        told = f"EXPOSED: JupyterLab listens on 0.0.0.0:{port}. Whoever reaches it and has the token may run any " \
               f"program here as {getpass.getuser()}"  # fmt: skip
        assert told in (tmp_path / "log").read_text()


@pytest.mark.parametrize("setting", ["c.IdentityProvider.token = ''",
                                     pytest.param("c.ServerApp.token = ''", marks=pytest.mark.full)])
def test_a_configuration_without_a_token_is_refused(tmp_path, setting):
    (tmp_path / "jupyter_server_config.py").write_text(f"{setting}\nc.ServerApp.ip = '0.0.0.0'\n")
    port = free_port()
    done = subprocess.run([sys.executable, "-m", "sgpo_lib.cli", "lab", "--no-browser", "--port", str(port)], text=True,
                          env={**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path)}, capture_output=True, timeout=90,
                          check=False)  # fmt: skip
    assert done.returncode == 2 and "turns the token off" in done.stderr, done.stderr[-2000:]


def test_a_vllm_server_wants_a_key_from_the_environment(monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["serve", "some/model"]) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-this-test")
    for option in ("--host=0.0.0.0", "--api-key", "--api_key", "--uds=/tmp/x", "--port"):
        assert main(["serve", "some/model", f"--vllm=--dtype float32 {option}"]) == 2
        assert f"--vllm: got {option}" in capsys.readouterr().err


def test_the_documents_start_servers_so():
    """No command of the documents starts a server past `sgpo lab` and `sgpo serve`."""
    texts = {path.name: path.read_text() for path in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md",
                                                     ROOT / "Makefile")}  # fmt: skip
    for name, text in texts.items():
        started = re.findall(r"^\s+(?:.*\s)?((?:vllm serve|jupyter[ -](?:lab|notebook)(?! *ext)|python -m vllm)\b.*)$",
                             text, re.MULTILINE)  # fmt: skip
        assert not started, (name, started)
    assert "sgpo serve" in texts["full_runs.md"]

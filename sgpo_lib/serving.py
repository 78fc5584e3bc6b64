"""Servers that this library starts: `sgpo lab` (JupyterLab) and `sgpo serve` (vLLM, for rollout.sampler='server').

Both listen on this machine's loopback address and want a token or a key. Another address needs `--expose`, and then it
is said what is exposed. A server without a token is not started at all.

vLLM's key guards what is below /v1, not the routes of its development mode, which read and change weights. So that mode
is on where vLLM listens on loopback, and off elsewhere.
"""

from __future__ import annotations

import argparse
import getpass
import importlib.util
import ipaddress
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgpo_lib.jobs import notebooks_folder

Say = Callable[[str], None]
_OURS = ("--host", "--port", "--api-key", "--uds", "--model", "--root-path")
"""Options of vLLM that may not come in `--vllm`: they decide where it listens and who may ask."""


def add_arguments(commands: Any) -> None:
    """The commands `lab` and `serve`."""
    lab = commands.add_parser("lab", help="JupyterLab on notebooks/, on this machine, with a token")
    lab.add_argument("--no-browser", action="store_true", help="print the address, open no browser")
    serve = commands.add_parser("serve", help="a vLLM server for rollouts, on this machine, with a key", description=(
        "Start vLLM as rollout.sampler='server' needs it. Its key is OPENAI_API_KEY, in the environment of both."))
    serve.add_argument("model", help="hub id or folder")
    serve.add_argument("--lora-rank", type=int, default=32, metavar="R", help="largest rank of adapters (default 32)")
    serve.add_argument("--vllm", default="", metavar="OPTIONS", help="of vLLM itself: --vllm='--dtype bfloat16'")
    for command, port in ((lab, 8888), (serve, 8000)):
        command.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
        command.add_argument("--port", type=int, default=port, help=f"default {port}")
        command.add_argument("--expose", action="store_true", help="allow an address that other machines reach")


def command(arguments: argparse.Namespace, say: Say) -> int:
    """`sgpo lab` or `sgpo serve`, until it is ended. Raises ValueError where it would be open to others unasked."""
    require_loopback(arguments.host, arguments.expose)
    if arguments.command == "lab":
        return _lab(arguments, say)
    return _serve(arguments, say)


def require_loopback(host: str, expose: bool) -> None:
    """Raises ValueError for an address that other machines may reach, unless that is asked for."""
    if not (expose or is_loopback(host)):
        raise ValueError(f"--host: got {host!r}, which other machines may reach, expected 127.0.0.1. Leave it out and "
                         "come in through a tunnel (ssh -L PORT:127.0.0.1:PORT THIS_MACHINE), or add --expose")


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own. A name other than localhost is not asked about."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _lab(arguments: argparse.Namespace, say: Say) -> int:
    if importlib.util.find_spec("jupyterlab") is None:
        raise ValueError("sgpo lab: the package jupyterlab is not installed: pip install sgpo-workbench[lab]")
    os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    from jupyterlab.labapp import LabApp

    notebooks: Path = notebooks_folder()
    server = LabApp.initialize_server(argv=[
        f"--ServerApp.ip={arguments.host}", f"--ServerApp.port={arguments.port}",
        f"--ServerApp.root_dir={notebooks.parent}", f"--LabApp.default_url=/lab/tree/{notebooks.name}",
        *(["--ServerApp.open_browser=False"] if arguments.no_browser else []),
        *(["--allow-root"] if os.getuid() == 0 else [])])
    if not server.identity_provider.auth_enabled:  # a jupyter_server_config of the user's
        server.http_server.stop()
        raise ValueError("sgpo lab: your Jupyter configuration turns the token off (IdentityProvider.token = '' or "
                         "ServerApp.token = ''; `jupyter --paths` shows where it lies). Remove that line")
    if not is_loopback(arguments.host):
        say(f"EXPOSED: JupyterLab listens on {arguments.host}:{server.port}. Whoever reaches it and has the token may "
            f"run any program here as {getpass.getuser()}; the connection is not encrypted")
    server.start()
    return 0


def _serve(arguments: argparse.Namespace, say: Say) -> int:
    options = shlex.split(arguments.vllm)
    if odd := [option for option in options if option.partition("=")[0].replace("_", "-") in _OURS]:
        raise ValueError(f"--vllm: got {odd[0]}, expected --host and --port outside of it. The key comes from "
                         "OPENAI_API_KEY alone")
    if not os.environ.get("OPENAI_API_KEY", "").strip():
        raise ValueError("sgpo serve: OPENAI_API_KEY is not set, which the server asks for. Make one, here and where "
                         "the run starts: export OPENAI_API_KEY=$(openssl rand -hex 24)")
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("sgpo serve: the package vllm is not installed: pip install sgpo-workbench[vllm]")
    here = is_loopback(arguments.host)
    environment = {**os.environ, "VLLM_API_KEY": os.environ["OPENAI_API_KEY"], "VLLM_NO_USAGE_STATS": "1",
                   "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1" if here else "0"}
    if not here:
        say(f"EXPOSED: vLLM listens on {arguments.host}:{arguments.port}. Whoever reaches it and has the key may "
            "sample and load adapters from this machine's files; the connection is not encrypted. Routes that are not "
            "below /v1 ask for no key: /metrics, /invocations (it samples too). Its development mode is off, so runs "
            "need rollout.verify_weights=false")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--load-format", "safetensors",
               "--enable-lora", "--max-lora-rank", str(arguments.lora_rank), "--max-cpu-loras", "2",
               "--worker-extension-cls", "sgpo_lib.rollouts.vllm_worker.WeightReader",
               "--enable-prompt-tokens-details", *options, "--model", arguments.model,
               "--host", arguments.host, "--port", str(arguments.port)]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)

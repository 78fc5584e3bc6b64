"""`sgpo extract` and the same as a function: source, engine and output file to extractions, with a progress bar.

Engines: `openai:MODEL` (an OpenAI-compatible endpoint; address and key from OPENAI_BASE_URL and OPENAI_API_KEY),
`vllm:SOURCE` and `transformers:SOURCE` (in this process; SOURCE is a folder, a hub id or `smollm2`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sgpo_lib.config import ModelConfig, RewardConfig
from sgpo_lib.extraction.chat import Cached, Chat, Endpoint, Local, Reply
from sgpo_lib.extraction.pipeline import ExtractionConfig, extract, summary
from sgpo_lib.extraction.records import Extraction
from sgpo_lib.rewards import Verifier
from sgpo_lib.runs import runs_root
from sgpo_lib.sources.catalogue import open_source, readable, sample

ENGINES = ("openai", "vllm", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sgpo extract`."""
    parser.add_argument("--source", required=True, metavar="NAME",
                        help="collection, champ, reasoning-gym:NAME, hub:OWNER/NAME, or a JSONL or Parquet file")
    parser.add_argument("--source-args", default="{}", metavar="YAML",
                        help="arguments of the source, for example '{split: test, fields: {answer: gold}}'")
    parser.add_argument("--engine", required=True, metavar="KIND:MODEL", help="openai:, vllm: or transformers:")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="strategies.jsonl; continued if there")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="problems to draw (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="decides which ones are drawn")
    parser.add_argument("--leave-out-unreadable", action="store_true",
                        help="leave problems out whose gold answer cannot be read, instead of stopping")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="requests at a time to an endpoint")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds until a request is retried")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="replies already paid for (default: in the runs)")
    for field in dataclasses.fields(ExtractionConfig):
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, metavar="X",
                            help=f"default {field.default}")


def command(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run `sgpo extract`. Returns 0; 1 where no problem got a strategy. Raises ValueError for what a user can cure."""
    try:
        source_args = yaml.safe_load(arguments.source_args)
    except yaml.YAMLError:
        source_args = None
    if not isinstance(source_args, dict):
        raise ValueError(f"--source-args: got {arguments.source_args!r}, expected a YAML mapping, '{{split: test}}'")
    config = ExtractionConfig(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(ExtractionConfig)})
    found = extract_source(arguments.source, arguments.engine, arguments.out, config=config, source_args=source_args,
                           count=arguments.count, seed=arguments.seed, leave_out=arguments.leave_out_unreadable,
                           concurrency=arguments.concurrency, timeout_s=arguments.timeout, cache=arguments.cache,
                           say=say)  # fmt: skip
    return 0 if any(e.status in ("kept", "leaking") for e in found) else 1


def open_chat(name: str, *, concurrency: int = 16, timeout_s: float = 600.0, batch: int = 64,
              cache: Path | None = None) -> Cached:
    """The engine of a name, with its replies kept in `cache` (by default `replies.sqlite` in the folder of runs).

    Raises ValueError, with the cure, for an unknown kind or what the kind lacks.
    """
    chat = _opened(name, concurrency=concurrency, timeout_s=timeout_s, batch=batch)
    return Cached(chat, cache or runs_root() / "replies.sqlite")


def _opened(name: str, *, concurrency: int, timeout_s: float, batch: int) -> Chat:
    kind, _, model = name.partition(":")
    if kind not in ENGINES or not model:
        raise ValueError(f"engine: got {name!r}, expected {', '.join(k + ':MODEL' for k in ENGINES)}")
    if concurrency < 1 or not 0 < timeout_s < math.inf:
        raise ValueError(f"engine: got concurrency {concurrency} and a time limit of {timeout_s} s, expected 1 or more "
                         "and above 0")
    if kind == "openai":
        return Endpoint(model, concurrency=concurrency, timeout_s=timeout_s)
    import torch

    from sgpo_lib.bases import base_source
    from sgpo_lib.policy import load_policy
    from sgpo_lib.rollouts.transformers_engine import TransformersEngine
    from sgpo_lib.rollouts.vllm_engine import VLLMEngine, cpu_arguments

    config = ModelConfig(source=model, lora_rank=0)
    if kind == "vllm":
        engine = VLLMEngine(base_source(config), **({} if torch.cuda.is_available() else cpu_arguments()))
        return Local(name, engine, engine.tokenizer, engine.context, batch=10 * batch)
    policy = load_policy(config, base_source(config), seed=0)
    return Local(name, TransformersEngine(policy, batch), policy.tokenizer, policy.context, batch)


def extract_source(source: str, engine: str | Chat, out: Path | str, *, config: ExtractionConfig | None = None,
                   source_args: Mapping[str, Any] | None = None, count: int = 0, seed: int = 0,
                   leave_out: bool = False, concurrency: int = 16, timeout_s: float = 600.0,
                   cache: Path | None = None, say: Callable[[str], None] = print) -> list[Extraction]:
    """Draw problems from a source, extract, and tell what came out. Continues where an earlier run stopped.

    Raises ValueError for a faulty source, engine or output file, RuntimeError where the engine answers nothing.
    """
    config = config or ExtractionConfig()
    opened = open_source(source, source_args or {}, seed)
    problems = sample(opened, count, seed)
    missing = [p.id for p in problems if not p.solution.strip()]
    if len(missing) == len(problems):
        raise ValueError(f"{opened.name}: no problem has a solution to distil, {', '.join(missing[:3])} for example. "
                         "Give them a `solution` field (the strong model's response)")
    with Verifier(RewardConfig()) as verifier:
        kept = readable(problems, verifier, opened.name, leave_out=leave_out,
                        cure="Correct these, or leave them out: --leave-out-unreadable, leave_out=True in a notebook")
        say(f"{opened.told}; {len(problems)} drawn"
            + (f", {len(problems) - len(kept)} with an unreadable gold answer left out" if len(kept) < len(problems)
               else ""))  # fmt: skip
        chat = (open_chat(engine, concurrency=concurrency, timeout_s=timeout_s, cache=cache) if isinstance(engine, str)
                else Cached(engine, cache or runs_root() / "replies.sqlite"))  # fmt: skip
        with _Progress(len(kept) * (config.candidates + 1), say) as progress:
            found = extract(kept, chat, verifier, config, Path(out), on_ask=progress.on_ask,
                            on_reply=progress.on_reply)
    for name, counts in summary(found).items():
        if counts:
            say(f"{name}: " + "; ".join(f"{told} {n}" for told, n in counts.most_common()))
    say(f"{progress.told()}; {out}")
    return found


class _Progress:
    """Requests, rate, tokens and an estimate of the time left: a bar on a terminal, elsewhere (in a notebook or a log)
    a line every `EVERY_S` seconds."""

    EVERY_S = 30.0

    def __init__(self, requests: int, say: Callable[[str], None]):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.asked = self.paid = self.cached = self.failed = self.tokens = 0
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                            TextColumn("{task.fields[told]}"), TimeRemainingColumn(compact=True),
                            console=Console(file=sys.stderr), transient=True,
                            disable=not sys.stderr.isatty())  # fmt: skip
        self.task = self.bar.add_task("extract", total=requests, told="")
        self.say, self.said = say, time.monotonic()

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def on_ask(self, stage: str, count: int) -> None:
        """A round begins; rounds of second requests add to the total."""
        total = (self.bar.tasks[0].total or 0) + (count if "again" in stage else 0)
        self.bar.update(self.task, description=stage, total=total)

    def on_reply(self, reply: Reply) -> None:
        """Count a reply."""
        self.asked += 1
        self.cached += reply.cached
        self.failed += bool(reply.error)
        self.tokens += 0 if reply.cached or reply.error else reply.prompt_tokens + reply.tokens
        speed = self.bar.tasks[0].speed or 0.0
        told = f"{speed:.1f} requests/s, {self.tokens:,} tokens"
        self.bar.update(self.task, advance=1, told=told)
        if self.bar.disable and time.monotonic() - self.said >= self.EVERY_S:
            task, self.said = self.bar.tasks[0], time.monotonic()
            left = "" if task.time_remaining is None else f", about {task.time_remaining / 60:.0f} min left"
            self.say(f"{task.description}: {self.asked} of {task.total:.0f} requests, {told}{left}")

    def told(self) -> str:
        """One line at the end."""
        return f"{self.asked} requests, {self.cached} from the cache, {self.failed} failed; {self.tokens:,} tokens"

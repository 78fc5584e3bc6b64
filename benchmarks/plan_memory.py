"""Peak memory of SmolLM2's phases on this machine, beside what the formulas of sgpo_lib/plan.py say.

    python benchmarks/plan_memory.py [--only lora]

One process per case, float32 on the CPU, by the library's own functions: `open_session`, the engine's `sample`,
`objective.plan` (scores), both terms of the loss and `session.update`. Prompts and responses are random tokens; every
sampled response runs to `max_new_tokens`, and rows differ by a few tokens, as real ones do, so that there is padding
and a mask. A short step comes first, after which AdamW's moments are there. Measured is the highest resident size of
each phase (VmHWM, started anew before it), planned what `plan.phases` gives for the same configuration.

MALLOC_MMAP_THRESHOLD_ makes glibc give every freed block of 256 KiB or more back at once, so that resident is close to
alive. Left alone, glibc keeps much of what is freed: the column `glibc alone` has the peak of that.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sgpo_lib.peak_memory import resident, restart_resident_peak

OUT = Path(__file__).parent / "results" / "plan_memory.json"
PROMPT = 64
"""Tokens of the longest prompt."""
CASES: dict[str, dict[str, Any]] = {
    "lora-512": {"lora_rank": 16, "micro_batch": 4, "max_new_tokens": 448},
    "lora-1024": {"lora_rank": 16, "micro_batch": 2, "max_new_tokens": 960, "sample": False},
    "lora-1024-checkpointing": {"lora_rank": 16, "micro_batch": 2, "max_new_tokens": 960, "sample": False,
                                "activation_checkpointing": True},
    "full-512": {"lora_rank": 0, "micro_batch": 4, "max_new_tokens": 448},
    "full-1024": {"lora_rank": 0, "micro_batch": 2, "max_new_tokens": 960, "sample": False},
    "full-1024-alone": {"lora_rank": 0, "micro_batch": 1, "max_new_tokens": 960, "sample": False},
}
"""Name -> fields in which it differs from the profile `smollm2`, and whether sampling is measured, which takes minutes
with long responses and is far from the peak. tests/test_plan.py measures two shorter ones."""
COMMON = {"layout": "right", "skip_untaught": False, "problems_per_step": 2, "g1": 2, "g2": 2, "rollout_batch": 4,
          "device": "cpu", "torch_threads": 1, "n_test": 2, "test_k": 1, "eval_problems": 2}
ALONE = ("lora-512", "full-512")
"""Cases that are measured with glibc's own settings, too."""


def main() -> None:
    """Measure every case and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # JSON of one, measured in this process
    parser.add_argument("--only", default="", help="cases whose name starts so; nothing is written then")
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(measure(json.loads(asked.case))))
        return
    import torch
    import transformers

    found = {name: in_process(fields) for name, fields in CASES.items() if name.startswith(asked.only)}
    for name in ALONE if not asked.only else ():
        found[name]["glibc_alone"] = in_process(CASES[name], trim=False)["measured"]
    text = table(found)
    print(text)
    if asked.only:
        return
    told = {"command": "python benchmarks/plan_memory.py", "cases": found, "cpus": os.cpu_count(),
            "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
            "transformers": transformers.__version__, "libc": " ".join(platform.libc_ver())}
    OUT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    OUT.with_suffix(".md").write_text(
        "# Peak memory of SmolLM2, measured and planned\n\n"
        f"{told['machine']}, {told['cpus']} cores; torch {told['torch']}, transformers {told['transformers']}, "
        f"{told['libc']}. MB of 10^6 bytes, resident. Every case: float32, prompts of up to {PROMPT} tokens, "
        f"{', '.join(f'{k}={v}' for k, v in COMMON.items())}.\n\n{text}\n`{told['command']}`\n", encoding="utf-8")


def in_process(fields: dict[str, Any], *, trim: bool = True) -> dict[str, Any]:
    """`measure` in a process of its own, with one thread."""
    settings = {"OMP_NUM_THREADS": "1"} | ({"MALLOC_MMAP_THRESHOLD_": str(2**18)} if trim else {})
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(fields)], env=os.environ | settings,
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"case {fields} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """Bytes by phase of one case: measured and planned, with the planned parts."""
    from sgpo_lib import objective
    from sgpo_lib.plan import phases
    from sgpo_lib.plan_setup import DEVICES, PROCESS_CPU, Setup
    from sgpo_lib.recipes import from_parameters
    from sgpo_lib.rollouts.interface import SampleRequest
    from sgpo_lib.runs import open_run
    from sgpo_lib.session import open_session
    from sgpo_lib.shapes import find_shape
    from sgpo_lib.world import World

    samples = fields.get("sample", True)
    config = from_parameters("smollm2", "sgpo", **{n: v for n, v in (COMMON | fields).items() if n != "sample"})
    longest = config.rollout.max_new_tokens
    measured: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as root, open_session(config, open_run(config, Path(root)), World()) as session:
        object.__setattr__(session.policy, "stop_ids", lambda: [session.policy.tokenizer.eos_token_id + 2**30])
        step(session, groups(config, 8))
        measured["rest"] = resident("VmRSS")
        requests = [SampleRequest(prompt(i), i) for i in range(config.rollout.rollout_batch)]
        if samples:
            with peak_of(measured, "sample"):
                session.engine.sample(requests, temperature=1.0, top_p=0.95, max_new_tokens=longest)
        made = groups(config, longest)
        with peak_of(measured, "score"):
            works = objective.plan(session, made)
        counts, problems = objective._counts(session, works)
        sums: collections.Counter = collections.Counter()
        with peak_of(measured, "update: policy gradient"):
            objective.accumulate_policy_gradient(session, works, None, counts, sums)
        with peak_of(measured, "update: token KL"):
            objective.accumulate_distillation(session, works, problems, sums)
        with peak_of(measured, "optimizer"):
            session.update(1)
    setup = Setup(config, find_shape(config.model)[0], DEVICES["cpu"], 0, 1, longest, PROMPT, PROCESS_CPU)
    planned = phases(setup)
    return {"fields": fields, "measured": measured, "planned": {name: sum(planned[name].values()) for name in measured
                                                               if name != "rest"}, "parts": planned}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Measured and planned by case and phase, in Markdown; the peak is the largest of each."""
    lines = ["| case | phase | measured MB | planned MB | planned / measured | glibc alone MB |",
             "| --- | --- | ---: | ---: | ---: | ---: |"]
    for name, case in found.items():
        alone = case.get("glibc_alone", {})
        rows = [(phase, case["measured"][phase], size, alone.get(phase, 0)) for phase, size in case["planned"].items()]
        rows.append(("**peak**", *(max(row[i] for row in rows) for i in (1, 2, 3))))
        lines += [f"| {name} | {phase} | {a / 1e6:,.0f} | {b / 1e6:,.0f} | {b / a:.2f} | " +
                  (f"{c / 1e6:,.0f} |" if c else "|") for phase, a, b, c in rows]
    return "\n".join(lines) + "\n"


def prompt(index: int) -> tuple[int, ...]:
    """A prompt of random tokens; the first is the longest."""
    import random

    draw = random.Random(index)
    return tuple(draw.randrange(100, 49_000) for _ in range(PROMPT - index % 5))


def groups(config: Any, longest: int) -> list[Any]:
    """Judged groups of responses of about `longest` tokens: every other one is right, so that all terms learn."""
    import random

    from sgpo_lib.records import Problem, Rollout, RolloutGroup, Verdict

    draw = random.Random(longest)
    made = []
    for index in range(config.train.problems_per_step):
        ids = prompt(index)

        def response(i: int, guided: bool, ids: tuple[int, ...] = ids, index: int = index) -> Rollout:
            tokens = tuple(draw.randrange(100, 49_000) for _ in range(longest - i % 3))
            return Rollout(str(index), guided, i, ids, tokens, "", "length", (-1.0,) * len(tokens),
                           Verdict("wrong" if i % 2 else "correct", float(i % 2 == 0)))

        problem = Problem(str(index), "", "", "")
        made.append(RolloutGroup(problem, [response(i, False) for i in range(config.method.g1)],
                                 [response(i, True) for i in range(config.method.g2)], ids, ids))
    return made


def step(session: Any, made: list[Any]) -> None:
    """A whole update."""
    from sgpo_lib import objective

    objective.accumulate(session, objective.plan(session, made), None, collections.Counter())
    session.update(1)


class peak_of:
    """Writes the highest resident size inside the block, in bytes, to `into[name]`."""

    def __init__(self, into: dict[str, int], name: str):
        self.into, self.name = into, name

    def __enter__(self) -> None:
        restart_resident_peak()

    def __exit__(self, *_: Any) -> None:
        self.into[self.name] = resident("VmHWM")


if __name__ == "__main__":
    main()

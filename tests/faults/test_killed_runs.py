"""kill -9 at random and at named moments: the resumed run ends with the bits of the uninterrupted one."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kill_world import (
    CHECKPOINT,
    Moment,
    clear,
    dies,
    finish,
    kill,
    killed_config,
    leftovers,
    require_same,
    result,
    stage,
    start,
    timed,
)

from sgpo_lib import testbed, tiny
from sgpo_lib.config import RunConfig, override, to_yaml
from sgpo_lib.policy import Policy
from sgpo_lib.rollouts.groups import sample_groups
from sgpo_lib.rollouts.transformers_engine import TransformersEngine
from sgpo_lib.runs import Run, load_run

SAVE, STEP = "sgpo_lib.runs:Run.save_checkpoint", "sgpo_lib.trainer:sgpo_step"
DRAW = "sgpo_lib.rollouts.transformers_engine:draw"


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Run:
    """The uninterrupted run."""
    return finish(killed_config(base), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def seconds(base, whole, tmp_path_factory) -> float:
    """How long it takes, from the start of its process; the server of processes runs by now."""
    again, took = timed(lambda: finish(killed_config(base), tmp_path_factory.mktemp("again")))
    require_same(result(again), result(whole), ["nothing"])
    return took


def test_kill_at_random_moments(base, whole, seconds, tmp_path, count, tally):
    """Over the whole duration, start and end included; some of the resumed runs are killed again.

    Half of the delays begin with the run's first row: on a busy machine, where starts take longer, not all of them fall
    into the start.
    """
    wanted, expected, chance = count(8, 100), result(whole), random.Random("kill -9")
    fell, again, late = collections.Counter(), 0, 0
    for number in range(wanted):
        config = killed_config(base, save_every=1 + number % 2)  # the reference saves after every step
        share, history = (number + chance.random()) / wanted, []
        while not history:
            root = tmp_path / f"{number}-{late}"
            process, delay = start(config, root), share * seconds
            while number % 4 > 1 and process.is_alive() and not (root / config.label / "metrics.jsonl").exists():
                time.sleep(0.001)
            time.sleep(delay if number % 4 < 2 else delay / 2)
            if kill(process):
                history.append(f"SIGKILL after {delay:.2f} s, {stage(root / config.label)}")
                fell[stage(root / config.label)] += 1
            else:  # it was faster than the clock run: once more, a little earlier
                late, share = late + 1, share * 0.8
                assert late < 5 * wanted, "the runs end before they can be killed"
        while chance.random() < 0.3:
            process = start(config, root)
            time.sleep(delay := chance.random() * seconds)
            again += kill(process)
            history.append(f"again after {delay:.2f} s")
        require_same(result(finish(config, root)), expected, history)
        assert not leftovers(root / config.label), history
        clear(root)
    assert sum(fell.values()) == wanted and len(fell) > count(1, 2), fell
    tally(2, "SIGKILL at random moments, then resumed",
          f"{wanted} of {wanted} ended with the metrics, rollouts, evaluations and adapter of the uninterrupted run; "
          f"{again} further kills of resumed runs", where=dict(fell), seconds_of_a_run=round(seconds, 2))


def named(whole: Run) -> list[Moment]:
    """In the order of a run that dies at each: where something was saved, the next dies in the step after it."""
    saved = whole.checkpoints()[-1]
    files = sorted(str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file())
    assert {"state.json", "optimizer.pt", "adapter/adapter_model.safetensors"} <= set(files)
    return [
        Moment("rollout", "sgpo_lib.trainer:sample_groups", inner=(DRAW, 4)),
        *(Moment(f"save of {name}", SAVE, appears=f"{CHECKPOINT}/{name}") for name in files),
        Moment("before the rename", SAVE, inner=("pathlib:Path.rename", 1)),
        Moment("after the rename", SAVE, appears="checkpoints/step-*[0-9]"),
        Moment("append of a row", "sgpo_lib.runs:Run.log", cuts="metrics.jsonl"),
        Moment("backward", "sgpo_lib.session:Session.backward", nth=2, backward=True),
        Moment("between two updates", STEP, inner=("sgpo_lib.session:Session.update", 2)),
        Moment("after the optimizer's step", STEP, inner=("sgpo_lib.guided_side:GuidedSide.follow", 2)),
        Moment("evaluation", "sgpo_lib.session:Session.evaluate", inner=(DRAW, 2)),
        Moment("final weights", "sgpo_lib.trainer:_finish", appears=".final.*/adapter/adapter_model.safetensors"),
        Moment("last evaluation", "sgpo_lib.trainer:_finish", inner=(DRAW, 3)),
        Moment("before DONE", "sgpo_lib.trainer:_finish", appears="summary.json"),
    ]


def test_kill_at_named_moments(base, whole, tmp_path, count, tally):
    """Reduced: one run dies at each in turn. Full: also a run for each, which dies there the first or third time."""
    moments, expected = named(whole), result(whole)
    lines = [moments, *([dataclasses.replace(m, nth=m.nth + later)] for m in moments for later in count(0, 1) * (0, 2)
                        if not (later and m.outer.endswith("_finish")))]
    ended, workers = [], set[str]()
    for number, line in enumerate(lines):
        config, root = killed_config(base), tmp_path / str(number)
        for moment in line:
            seconds, started = dies(start(config, root, moment), root, moment)
            ended.append(seconds)
            workers |= started
            torn = (root / config.label / "metrics.jsonl").read_bytes() if moment.cuts else b""
            assert not torn or not torn.endswith(b"\n"), "half a row"
        require_same(result(finish(config, root)), expected, [m.name for m in line])
        assert not leftovers(root / config.label), [m.name for m in line]
    assert any("reward_worker" in line for line in workers), "nothing was seen that could have stayed behind"
    tally(2, "death at named moments, then resumed",
          f"{sum(map(len, lines))} of {sum(map(len, lines))} deaths at {len(moments)} moments, "
          f"{len(lines)} runs with the bits of the uninterrupted one; the verifier's processes had ended "
          f"{max(ended):.1f} s after the training process at the latest", moments=[m.name for m in moments])


def write(config: RunConfig, root: Path) -> list[str]:
    """The command that trains a configuration in an interpreter of its own."""
    (root / "config.yaml").write_text(to_yaml(config))
    return [sys.executable, "-c", "import sys; from kill_world import run_file; run_file(*sys.argv[1:])",
            str(root / "config.yaml"), str(root)]


def environment(**more: str) -> dict[str, str]:
    """In which that command finds this folder."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **more}


def test_another_interpreter_goes_on(base, whole, tmp_path):
    """The processes above are forks of one: here each has its own imports and its own order of sets."""
    config = killed_config(base)
    command = write(config, tmp_path)
    first, deadline = subprocess.Popen(command, env=environment(PYTHONHASHSEED="1")), time.monotonic() + 120
    while not (tmp_path / config.label / "checkpoints" / "step-000002").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert subprocess.run(command, env=environment(PYTHONHASHSEED="2"), timeout=120, check=False).returncode == 0
    require_same(result(load_run(tmp_path / config.label)), result(whole), ["SIGKILL after two steps"])


class Asked(TransformersEngine):
    """The engine, which keeps what it was asked."""

    def sample(self, requests, **settings):
        self.seeds = [r.seed for r in requests]
        return super().sample(requests, **settings)


def test_seeds_of_samples_come_from_run_step_problem_and_sample(base):
    """Not from the order or number of problems, nor from what was drawn before; and no two are the same."""
    tokenizer = tiny.build_tokenizer()
    engine = Asked(Policy(tiny.build_model(tokenizer, 1), tokenizer, torch.device("cpu"), False, 512), 64)
    config, problems = killed_config(base), list(itertools.islice(testbed.generate(1), 3))

    def drawn(chosen, step: int, run_seed: int = 0) -> dict:
        """(problem, guided, sample) -> (seed, tokens)."""
        groups = sample_groups(engine, tokenizer, chosen, override(config, {"seed": run_seed}), step)
        rollouts = [o for g in groups for o in g.responses]
        return {(o.problem_id, o.guided, o.sample): (seed, o.token_ids)
                for o, seed in zip(rollouts, engine.seeds, strict=True)}

    first = drawn(problems, 1)
    assert len(first) == 3 * (config.method.g1 + config.method.g2)
    others = [drawn(problems, 2), drawn(problems, 1, run_seed=1), drawn(problems, 12), drawn(problems, 1, run_seed=12)]
    torch.manual_seed(99)
    assert drawn(problems[::-1], 1) == first
    assert all(first[key] == value for p in problems for key, value in drawn([p], 1).items())
    seeds = [seed for answers in (first, *others) for seed, _ in answers.values()]
    assert len(set(seeds)) == len(seeds)

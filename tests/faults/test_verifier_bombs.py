"""Promise 1: whatever a response holds, the verifier answers in time, and nobody but a worker dies of it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from verifier_bombs import BOMBS, CONTEXTS, GROWTH_MB, LONGEST_S, SPREAD, box, judged_in

from sgpo_lib.config import RewardConfig
from sgpo_lib.records import Problem, Verdict
from sgpo_lib.rewards import Verifier

CASES = {"shared": Path(__file__).parents[3] / "shared/data/answer_cases.jsonl",
         "ours": Path(__file__).parents[1] / "data/hard_answers.jsonl"}  # fmt: skip
MAX_FALSE_NEGATIVES = 0.03


def check(number: int) -> tuple[Problem, str]:
    """A judgement that needs algebra."""
    return Problem(f"p{number}", "", rf"{number}\sqrt{{2}}"), box(rf"\frac{{{2 * number}}}{{\sqrt2}}")


@pytest.mark.parametrize("context", [pytest.param(c, marks=pytest.mark.full if c == "ray" else ()) for c in CONTEXTS])
def test_bombs(context, count, tally) -> None:
    """In a Ray worker at reduced counts: tests/cluster/test_ray_verifier.py."""
    step = count(SPREAD, 1)  # reduced: the contexts share the bombs among them
    if context == "ray":
        pytest.importorskip("ray", reason="Ray comes with `make test-cluster`")
    names = list(BOMBS)[list(CONTEXTS).index(context) % step :: step]
    found = judged_in(context, names)
    tally(1, f"bombs, {context}", f"{len(names)} of {len(names)} judged, no hang, no death; slowest "
          f"{found['slowest']['seconds']:.1f} s; memory grew by {found['grown_mb']:.0f} MB")  # fmt: skip


@pytest.mark.parametrize("source", CASES)
def test_answer_cases(source, count, tally) -> None:
    if source == "shared" and not CASES[source].exists():
        pytest.skip(f"{CASES[source]} is not on this machine")
    cases = [json.loads(line) for line in CASES[source].read_text(encoding="utf-8").splitlines()]
    cases = cases[:: count(4, 1) if source == "ours" else 1]
    positives, negatives, slowest = [], [], 0.0
    with Verifier(RewardConfig()) as verifier:
        verifier.judge([check(1)])
        for case in cases:
            start = time.perf_counter()
            [verdict] = verifier.judge([(Problem("p", "", case["gold"]), case["completion"])])
            slowest = max(slowest, time.perf_counter() - start)
            if verdict.correct != case["expected"]:
                (positives if verdict.correct else negatives).append(case["id"])
    assert positives == []
    assert not Path("PWNED").exists()
    assert len(negatives) <= MAX_FALSE_NEGATIVES * sum(c["expected"] for c in cases), negatives
    assert slowest <= LONGEST_S
    tally(1, f"answer cases, {source}", f"{len(cases)} cases: 0 false positives, {len(negatives)} false negatives; "
          f"slowest {slowest:.1f} s")  # fmt: skip


def test_a_thousand_checks_with_ten_bombs(count, tally) -> None:
    number = count(5, 10)
    bombs = [(Problem(name, "", "5"), BOMBS[name]) for name in HANGING[:number]]
    with Verifier(RewardConfig(reward_workers=2)) as verifier:
        verifier.judge([check(1001), check(1002)])
        items = [check(n) for n in range(1, 99 * number + 1)] + bombs
        random.Random(0).shuffle(items)
        start = time.perf_counter()
        verdicts = verifier.judge(items)
        seconds = time.perf_counter() - start
    assert sum(v.correct for v in verdicts) == 99 * number
    hung = sum(v.reason == "timeout" for v in verdicts)
    assert hung >= number / 2
    assert seconds <= 20
    tally(1, f"{len(items):,} checks with {number} bombs among them, 2 workers",
          f"{seconds:.1f} s, {hung} bombs ended at the deadline")  # fmt: skip


HANGING = ["tower in brackets", "gamma", "product of sines", "sum of sines", "sum of sums", "improper integral",
           "antiderivative", "continued fraction", "logarithms", "limit"]
"""Ten bombs that the limits let through."""


@pytest.mark.parametrize("number", [1, 2])
def test_workers_are_killed_from_outside(number, count, tally) -> None:
    """SIGKILL at random moments, to workers that start, wait and work: every check is judged right, whoever dies."""
    kills, draw, over = count(5, 100), random.Random(number), threading.Event()
    verdicts: list[Verdict] = []
    with Verifier(RewardConfig(reward_workers=number)) as verifier:
        def shoot() -> None:
            killed = 0
            while killed < kills and not over.is_set():
                time.sleep(draw.uniform(0.0, 1.0))
                starting = killed % 4 == 0  # else one that is ready
                if found := [w.process for w in list(verifier._pool.workers) if starting or w.ready]:
                    draw.choice(found).send_signal(signal.SIGKILL)
                    killed += 1
            over.set()

        shooter = threading.Thread(target=shoot)
        shooter.start()
        try:
            while not over.is_set():
                verdicts += verifier.judge([check(len(verdicts) + n) for n in range(1, 51)])
        finally:
            over.set()
            shooter.join()
    lost = [v for v in verdicts if not v.correct]
    assert {(v.status, v.reason) for v in lost} <= {("unverifiable", "crash")}
    assert len(lost) <= 1 + kills / 10  # killed three times over the same check
    tally(1, f"SIGKILL to workers, {number}", f"{kills} kills in {len(verdicts)} checks, {len(lost)} verdicts lost")


REWARD = '''
import os, subprocess, sys, time
count = 0
def leak(completion, problem):
    leak.kept = getattr(leak, "kept", []) + [bytearray(700 << 20)]
    return 1.0
def memory(completion, problem): return float(len(bytearray(8 << 30)) > 0)
def hang(completion, problem):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "left_behind"])
    with open("started", "w") as file: file.write(str(os.getpid()))
    time.sleep(600)
def spin(completion, problem): return 3 ** (10 ** 12) * 0.0
def modules(completion, problem):
    return float(any(name in sys.modules for name in ("torch", "transformers", "gmpy2", "flint")))
'''


@pytest.fixture
def user_module(tmp_path, monkeypatch) -> str:
    (tmp_path / "fault_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return "fault_reward"


def test_memory_is_bounded_and_a_leak_costs_no_verdict(user_module) -> None:
    """8 GiB at once is `memory`; what earlier responses left in a worker is not held against the next."""
    before = psutil.Process().memory_info().rss
    with Verifier(RewardConfig(reward=f"{user_module}:memory")) as verifier:
        [verdict] = verifier.judge([(Problem("p", "", "1"), "x")])
    assert (verdict.status, verdict.reason) == ("unverifiable", "memory")
    with Verifier(RewardConfig(reward=f"{user_module}:leak")) as verifier:
        assert all(v.correct for v in verifier.judge([(Problem("p", "", "1"), str(i)) for i in range(5)]))
    assert psutil.Process().memory_info().rss - before < GROWTH_MB << 20


def test_a_worker_that_hears_no_signal_is_killed_with_its_children(user_module) -> None:
    """In one long operation no signal handler of Python runs; a reward's own subprocess ends too."""
    with Verifier(RewardConfig(reward=f"{user_module}:spin", reward_deadline_s=1.0)) as verifier:
        start = time.perf_counter()
        assert verifier.judge([(Problem("p", "", "1"), "x")])[0].reason == "timeout"
        assert time.perf_counter() - start < 1.0 + LONGEST_S
    with Verifier(RewardConfig(reward=f"{user_module}:hang", reward_deadline_s=1.0)) as verifier:
        assert verifier.judge([(Problem("p", "", "1"), "x")])[0].reason == "timeout"
    assert not [p for p in psutil.process_iter(["cmdline"]) if "left_behind" in (p.info["cmdline"] or [])]


def test_ctrl_c_leaves_no_answer_behind() -> None:
    """What was asked before Ctrl-C is not taken for the answer to what is asked after it."""
    with Verifier(RewardConfig(reward_deadline_s=30)) as verifier:
        verifier.judge([check(1)])
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            verifier.judge([(Problem("bomb", "", "5"), BOMBS["sum of sums"])])
        signal.signal(signal.SIGALRM, before)
        start = time.perf_counter()
        verdicts = verifier.judge([check(2), (Problem("p", "", "x+1"), box("x-1")), check(3)])
        assert [v.status for v in verdicts] == ["correct", "wrong", "correct"]
        assert time.perf_counter() - start < 20


def test_no_worker_outlives_its_parent(user_module, tmp_path) -> None:
    script = f"""
from sgpo_lib.config import RewardConfig
from sgpo_lib.records import Problem
from sgpo_lib.rewards import Verifier
Verifier(RewardConfig(reward="{user_module}:hang", reward_deadline_s=500)).judge([(Problem("p", "", "1"), "x")])
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    wait_until(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text())
    worker = psutil.Process(int((tmp_path / "started").read_text()))
    family = [worker, *worker.children(recursive=True)]
    assert len(family) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_workers_import_neither_torch_nor_gmpy2(user_module, tmp_path, monkeypatch) -> None:
    """Not even where they are installed: these would say so, torch is."""
    for name in ("gmpy2", "flint"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w').close()\n__version__ = version = '2.2.1'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Verifier(RewardConfig()) as verifier:
        assert verifier.judge([check(3)])[0].correct
    with Verifier(RewardConfig(reward=f"{user_module}:modules")) as verifier:
        assert verifier.judge([(Problem("p", "", "1"), "x")])[0].reward == 0.0
    assert not (tmp_path / "imported").exists()


def test_workers_that_cannot_start_are_an_error(user_module, tmp_path) -> None:
    (tmp_path / "dead_reward.py").write_text("import os\nos._exit(7)\n")
    with Verifier(RewardConfig(reward="dead_reward:f")) as verifier, \
            pytest.raises(RuntimeError, match=r"ended before they were ready, the last with code 7.*dead_reward"):
        verifier.judge([(Problem("p", "", "1"), "x")])


def wait_until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)

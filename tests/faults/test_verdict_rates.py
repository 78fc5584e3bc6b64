"""Promise 1: a run stops where its verifier fails, before a weight learns from it. Real runs with such rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from parallel_world import Training, on_workers

from sgpo_lib.config import RewardConfig
from sgpo_lib.recipes import from_parameters
from sgpo_lib.records import Problem
from sgpo_lib.rewards import Verifier
from sgpo_lib.runs import load_run
from sgpo_lib.trainer import train
from sgpo_lib.verdict_rates import LEAST, WINDOW, VerdictRates, counted

REWARD = '''
import hashlib, os, time
def of(text): return hashlib.sha256(text.encode()).digest()[0]
def crash(text, problem):
    if of(text) % 4 == 0: raise KeyError("no such column")
    return of(text) % 2
def die(text, problem):
    if of(text) % 4 == 0: os._exit(3)
    return of(text) % 2
def memory(text, problem): return float(len(bytearray((8 << 30) if of(text) % 4 == 0 else 1)) > 0)
def hang(text, problem):
    if of(text) % 4 == 0: time.sleep(600)
    return of(text) % 2
def rarely(text, problem):
    for name in ("odd-1", "odd-2", "odd-3"):
        if not os.path.exists(name):
            open(name, "w").close()
            raise KeyError("an odd response")
    return of(text) % 2
'''


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch) -> None:
    (tmp_path / "failing_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)


def small(base: Path, reward: str, **fields):
    return from_parameters("tiny", "sgpo", 0, **{
        "source": str(base), "revision": "", "reward": f"failing_reward:{reward}", "reward_deadline_s": 0.5,
        "reward_workers": 2, "steps": 2, "problems_per_step": 2, "n_train": 8, "n_validation": 0, "n_test": 0,
        "max_new_tokens": 8, "eval_every": 0, **fields})  # fmt: skip


@pytest.mark.parametrize(("reward", "reason", "cure"), [
    ("crash", "crash: KeyError: 'no such column'", "Mend the reward"),
    ("die", "crash: the worker ended with code 3", "Mend the reward"),
    ("memory", "memory", "A reward has 2 GiB"), ("hang", "timeout", "Raise reward.reward_deadline_s")])
def test_a_run_stops_where_its_reward_fails(base, tmp_path, tally, reward, reason, cure) -> None:
    with pytest.raises(RuntimeError, match=rf"step 1: the verifier failed on \d+ of the last 24 .*{cure}") as e:
        train(small(base, reward), root=tmp_path, name="run")
    run = load_run(tmp_path / "run")
    assert f": {reason}" in str(e.value)
    assert run.state == "failed"
    assert run.metrics("train") == [] and run.checkpoints() == [], "nothing was learned from it"
    assert json.loads((run.folder / "FAILED.json").read_text())["message"] == str(e.value)
    tally(1, f"a reward that fails by {reward}", "stopped in the first step, before any update")


def test_an_evaluation_stops_too(base, tmp_path) -> None:
    with pytest.raises(RuntimeError, match="evaluation: the verifier failed on"):
        train(small(base, "crash", n_validation=8, eval_k=4, eval_every=1), root=tmp_path, name="run")


def test_rare_failures_stop_nothing_and_are_counted(base, tmp_path) -> None:
    run = train(small(base, "rarely", reward_workers=1), root=tmp_path, name="run")
    rows = run.metrics("train")
    assert run.done and LEAST > 3
    assert [row["verdict_failure_share"] for row in rows] == [3 / 24, 0]
    assert [row["unverifiable_share"] for row in rows] == [3 / 24, 0]
    assert [row["no_answer_share"] for row in rows] == [0, 0]


def test_workers_count_together(base, tmp_path) -> None:
    """Neither of two workers has seen enough failures, both of them have: both stop."""
    with pytest.raises(Exception, match=r"step 1: the verifier failed on \d+ of the last 24 responses"):
        on_workers(2, tmp_path, [Training("two", small(base, "crash"))])
    assert load_run(tmp_path / "two").metrics("train") == []


# --- the rules ----------------------------------------------------------------------------------------------------
def batch(size: int, **reasons: int) -> list:
    told = [r for reason, n in reasons.items() for r in [reason] * n]
    return [(f"q{i}", 1, (told[i],) if i < len(told) else ()) for i in range(size)]


def stops(*batches: list) -> bool:
    rates = VerdictRates()
    for number, one in enumerate(batches):
        try:
            rates.add(one, f"step {number}")
        except RuntimeError:
            return number == len(batches) - 1
    return False


def test_more_than_one_percent() -> None:
    assert not stops(batch(16, timeout=1))
    assert not stops(batch(120, timeout=2), batch(120, crash=2))
    assert stops(batch(120, timeout=2), batch(120, crash=2), batch(120, memory=1))
    assert not stops(*[batch(100, timeout=1)] * 50)
    assert stops(*[batch(100, timeout=1)] * 20, batch(100, timeout=2))
    assert not stops(batch(100, timeout=4), *[batch(100)] * (WINDOW // 100), batch(100, timeout=4))
    assert not stops(batch(100, unparsed=60, bad_gold=30, no_answer=10))


def test_a_whole_batch() -> None:
    assert stops(batch(24, unparsed=20, bad_gold=4))
    assert not stops(batch(24, unparsed=23))
    assert not stops(batch(24, no_answer=24)), "a policy that never answers is a matter for the collapse watch"
    assert not stops(batch(24, unparsed=23, no_answer=1))
    assert not stops(batch(2, unparsed=2))


def test_the_message_names_what_failed_and_where() -> None:
    with pytest.raises(RuntimeError) as e:
        VerdictRates().add(batch(50, timeout=3, crash=4), "step 7")
    for part in ("step 7", "7 of the last 50", "14.0%", "3 timeout, 4 crash", "problem q0: timeout",
                 "problem q3: crash", "reward.reward_deadline_s", "Mend the reward"):
        assert part in str(e.value), part


def test_real_verdicts_that_cannot_be_read() -> None:
    texts = [r"\boxed{?}", r"\boxed{9!!!!}", r"\boxed{\frac{1}{}}", r"\boxed{(]}", r"\boxed{10^{10^{10}}}"]
    with Verifier(RewardConfig()) as verifier:
        verdicts = verifier.judge([(Problem("q", "", "5"), t) for t in texts])
    with pytest.raises(RuntimeError, match="none of the 5 responses could be verified: 5 unparsed"):
        VerdictRates().add([counted("q", verdicts)], "step 1")

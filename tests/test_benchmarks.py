"""Named test sets at the end of a run: what is in them, what is left out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgpo_lib.benchmarks import load_benchmarks
from sgpo_lib.config import RewardConfig
from sgpo_lib.problems import load
from sgpo_lib.recipes import from_parameters
from sgpo_lib.rewards import Verifier
from sgpo_lib.trainer import train

FILES = Path(__file__).parents[2] / "shared" / "data" / "benchmarks"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(RewardConfig()) as found:
        yield found


def config_with(**benchmarks):
    return from_parameters("tiny", "sgpo", n_train=20, n_validation=5, n_test=5, benchmarks=benchmarks)


def lines(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"id": f"q{i}", "prompt": p, "answer": a}) + "\n" for i, (p, a) in
                            enumerate(rows)), encoding="utf-8")  # fmt: skip
    return str(path)


def test_what_the_run_learns_and_what_cannot_be_read_is_left_out_and_counted(tmp_path, verifier):
    splits = load(config_with().data)
    rows = [("What is 20 + 22?", "42"), (splits.train[0].prompt + "  ", splits.train[0].answer),
            (splits.validation[0].prompt, "1"), (splits.test[0].prompt, splits.test[0].answer),
            ("Halve it.", "\\frac{1}{")]
    config = config_with(mine={"problems": lines(tmp_path / "mine.jsonl", rows), "k": 3})
    (found,) = load_benchmarks(config, splits, verifier)
    assert (found.name, found.k) == ("mine", 3) and found.told == {"left_out_seen": 2, "left_out_unreadable": 1}
    assert {p.prompt for p in found.problems} == {rows[0][0], splits.test[0].prompt}
    assert all(config.data.instruction in p.style.instruction for p in found.problems), "asked like the run's own"


@pytest.mark.parametrize(("spec", "message"), [
    ("aime.jsonl", "benchmarks.x: got 'aime.jsonl', expected a mapping with `problems`"),
    ({"k": 4}, "expected a mapping with `problems`"), ({"problems": "nowhere.jsonl"}, "benchmarks.x: .*nowhere.jsonl"),
    ({"problems": "testbed"}, "say how many problems .count."),
    ({"problems": "testbed", "count": 3, "kk": 4}, "unknown field of evaluation.benchmarks.x 'kk'"),
    ({"problems": "testbed", "count": 3, "k": True}, "benchmarks.x.k: got True, expected int"),
    ({"problems": "testbed", "count": 3, "k": 0}, "got k=0"),
    ({"problems": "testbed", "count": 3, "problem_args": {"lvl": "hard"}}, "unknown testbed argument 'lvl'")])
def test_a_faulty_set_is_refused_by_name(verifier, spec, message):
    config = config_with(x=spec)
    with pytest.raises(ValueError, match=message):
        load_benchmarks(config, load(config.data), verifier)


def test_a_set_of_known_problems_only_is_refused(tmp_path, verifier):
    splits = load(config_with().data)
    path = lines(tmp_path / "known.jsonl", [(splits.train[0].prompt, splits.train[0].answer)])
    with pytest.raises(ValueError, match=r"known to the run.*none is left"):
        load_benchmarks(config_with(x={"problems": path}), splits, verifier)


def test_a_run_evaluates_them_at_its_end(base, tmp_path):
    config = from_parameters("tiny", "sgpo", 0, source=str(base), steps=1, problems_per_step=2, n_train=12,
                             n_validation=0, n_test=3, max_new_tokens=6, test_k=2,
                             benchmarks={"other": {"problems": "testbed", "count": 4, "k": 3}})
    run = train(config, root=tmp_path)
    found = run.summary["benchmarks"]["other"]
    rows = [json.loads(line) for line in (run.folder / "evaluation" / "benchmark-other.jsonl").read_text().splitlines()]
    assert len(rows) == found["problems"] == 4 and found["k"] == 3 and all(r["samples"] == 3 for r in rows)
    assert found["accuracy"] == pytest.approx(sum(r["correct"] for r in rows) / 12)
    assert found["left_out_seen"] == 0 and run.summary["test"]["k"] == 2


@pytest.mark.skipif(not FILES.is_dir(), reason="shared/data is absent")
@pytest.mark.parametrize(("name", "count"), [("math500", 500), ("amc23", 40), ("aime24", 30), ("olympiadbench", 675)])
def test_the_papers_test_sets_can_be_asked(tmp_path, verifier, name, count):
    """Of OlympiadBench some answers are no single value; the others are all there."""
    rows = [json.loads(line) for line in (FILES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [r["answer"] if isinstance(r["answer"], str) else str(r["answer"]) for r in rows]
    path = lines(tmp_path / f"{name}.jsonl", [(r["problem"], a) for r, a in zip(rows, answers, strict=True)])
    config = config_with(**{name: {"problems": path}})
    (found,) = load_benchmarks(config, load(config.data), verifier)
    assert len(rows) == count and found.seen == 0
    assert found.unreadable <= 0.06 * count, found.unreadable
    assert len(found.problems) >= 0.9 * count
    print(name, len(found.problems), found.unreadable)

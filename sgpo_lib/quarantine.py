"""Strategies that give their problem away do not reach training unnoticed.

When a training starts, every strategy of its training problems is checked (extraction/leaks.py), wherever it came from
and whatever its line says of itself. A problem whose strategy leaks is left out. It is trained on all the same where a
person said so by id, with a reason: its line of `data.strategies` (or of the problems) has `"confirmed": true` and a
`comment`, as the strategy inspector writes them; or where data.leaking_strategies lets all of them in. The run's
`quarantine.json` holds both lists, and a run that continues keeps to it.

Not checked: the strategies that this library itself makes for the testbed and reasoning-gym, from templates without
results; and those that data.bad_strategies spoils on purpose.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo_lib.config import DataConfig, RewardConfig
from sgpo_lib.extraction.leaks import find_leaks
from sgpo_lib.problems import Splits, accepted_leak
from sgpo_lib.prompts import strategy_text
from sgpo_lib.records import Problem
from sgpo_lib.rewards import Verifier
from sgpo_lib.runs import PACKAGE_FOLDER, runs_root
from sgpo_lib.sources.rows import digest
from sgpo_lib.storage import write_atomic
from sgpo_lib.strategies import is_spoiled

RECORD = "quarantine.json"
_OURS = ("testbed", "reasoning-gym:")
"""Sources whose strategies this library makes."""
_DECIDES = ("extraction/leaks.py", "extraction/mentions.py", "extraction/words.py", "answers.py", "equivalence.py",
            "reward_worker.py", "rewards.py")
"""Source files that decide what is a leak."""
_WORKERS = 2


def left_out(splits: Splits, data: DataConfig, folder: Path) -> frozenset[str]:
    """Ids of training problems whose strategy leaks; what was found goes to `quarantine.json` of the run's folder.

    Raises ValueError where no training problem is left.
    """
    if not data.strategies and data.problems.startswith(_OURS):
        return frozenset()
    path = folder / RECORD
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    else:
        record = _checked([*splits.warmup, *splits.train], data, splits.source)
        write_atomic(path, json.dumps(record, indent=1, ensure_ascii=False))
    _say(record, path)
    gone = frozenset(line["id"] for line in record["left_out"])
    if gone and all(p.id in gone for p in (*splits.warmup, *splits.train)):
        raise ValueError(f"every strategy of the {len(gone)} training problems gives its problem away ({path}), for "
                         f"example {record['left_out'][0]}. Write others (sgpo extract)")
    return gone


def without(splits: Splits, ids: frozenset[str]) -> Splits:
    """The splits without some training problems."""
    return dataclasses.replace(splits, warmup=tuple(p for p in splits.warmup if p.id not in ids),
                               train=tuple(p for p in splits.train if p.id not in ids))


def _checked(problems: Sequence[Problem], data: DataConfig, source: str) -> dict[str, Any]:
    asked = [p for p in problems if p.strategy is not None and not is_spoiled(p)]
    record: dict[str, Any] = {"source": source, "checked": len(asked), "left_out": [], "let_in": []}
    for problem, found in zip(asked, _leaks(asked), strict=True):
        if found:
            reason = accepted_leak(problem) or ("data.leaking_strategies=true" if data.leaking_strategies else "")
            line = {"id": problem.id, "leaks": found} | ({"reason": reason} if reason else {})
            record["let_in" if reason else "left_out"].append(line)
    return record


def _leaks(problems: Sequence[Problem]) -> list[list[str]]:
    """What each strategy gives away, as `kind: text`. Kept below the root of runs by what it depends on."""
    texts = [(p.prompt, p.answer, p.solution, strategy_text(p.strategy)) for p in problems if p.strategy]
    key = digest([(PACKAGE_FOLDER / name).read_text(encoding="utf-8") for name in _DECIDES], texts)[:24]
    kept = runs_root() / "leak_checks" / f"{key}.json"
    if not kept.exists():
        with Verifier(RewardConfig(reward_workers=_WORKERS)) as verifier:
            found = find_leaks([(p, p.strategy) for p in problems if p.strategy], verifier)
        told = {i: [f"{leak.kind}: {leak.text}" for leak in leaks] for i, leaks in enumerate(found) if leaks}
        write_atomic(kept, json.dumps(told))
    there = json.loads(kept.read_text(encoding="utf-8"))
    return [there.get(str(i), []) for i in range(len(problems))]


def _say(record: dict[str, Any], path: Path) -> None:
    out, in_ = record["left_out"], record["let_in"]
    if not out and not in_:
        return
    told = f"leak check: {len(out) + len(in_)} of {record['checked']} strategies give their problem away"
    if out:
        told += (f"; {len(out)} problems are left out of training: {_ids(out)}. To train on one all the same, give its "
                 'line in data.strategies "confirmed": true and a "comment" that says why')
    if in_:
        told += f"; {len(in_)} are trained on as a person decided: {_ids(in_)}"
    print(f"{told}. See {path}", file=sys.stderr, flush=True)


def _ids(lines: Sequence[dict[str, Any]]) -> str:
    return ", ".join(line["id"] for line in lines[:5]) + (", ..." if len(lines) > 5 else "")

"""The committed report: what its README says agrees with the tables of both runs beside it."""

import re
from pathlib import Path

import pandas as pd
import pytest

from sgpo_lib.claims import CLAIMS, FAILS, HOLDS, OPEN

REPORT = Path(__file__).parent.parent / "reports" / "paper_on_a_laptop"
AGAIN = REPORT / "replication"
WORDS = {HOLDS, FAILS, OPEN}
Interval = tuple[float, ...]
"""Difference, low, high."""


@pytest.fixture(params=[REPORT, AGAIN], ids=["first", "replication"])
def folder(request) -> Path:
    return request.param


def section(title: str) -> str:
    return (REPORT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def verdicts(folder: Path) -> list[tuple[str, str | None]]:
    """Per claim: verdict on test problems and on unseen families."""
    table = pd.read_csv(folder / "claims.csv")
    assert list(table["claim"]) == list(CLAIMS) and set(table["verdict"]) <= WORDS
    return [(word, None if pd.isna(unseen) else unseen)
            for word, unseen in zip(table["verdict"], table["on unseen families"], strict=True)]


def intervals(folder: Path) -> dict[Interval, set[tuple]]:
    """All intervals of a folder's tables with three decimals and either sign: where they stand, and the sign."""
    known: dict[Interval, set[tuple]] = {}
    for path in folder.glob("*.csv"):
        frame = pd.read_csv(path)
        keys = [c for c in ("claim", "part", "measure", "where", "field", "value", "method") if c in frame]
        ends = [(c, f"{c}_low", f"{c}_high") for c in frame if {f"{c}_low", f"{c}_high"} <= set(frame)]
        ends += [("difference", "low", "high")] if {"difference", "low", "high"} <= set(frame) else []
        for columns in ends:
            for _, row in frame.dropna(subset=list(columns)).iterrows():
                for sign in (1, -1):
                    middle, *rest = (sign * row[c] for c in columns)
                    told = tuple(round(float(v), 3) for v in (middle, *sorted(rest)))
                    known.setdefault(told, set()).add((path.name, columns[0], sign, *map(str, row[keys])))
    return known


def test_every_claim_has_a_verdict_with_an_interval(folder):
    evidence = pd.read_csv(folder / "evidence.csv")
    assert len(verdicts(folder)) == len(CLAIMS)
    counted = evidence[evidence["counted"]]
    assert set(counted["claim"]) == set(CLAIMS) and counted[["low", "high"]].notna().all(axis=None)
    assert (counted["low"] <= counted["difference"]).all() and (counted["difference"] <= counted["high"]).all()
    assert (counted["seeds"] >= 3).all()


def test_the_readme_tells_the_verdicts_of_the_tables():
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \| ([^|]+) \|", section("Verdicts"), re.M)
    assert [int(number) for number, *_ in rows] == list(CLAIMS)
    assert [(word, None if unseen == "–" else unseen) for _, word, unseen in rows] == verdicts(REPORT)


def test_the_readme_tells_the_verdicts_of_both_runs():
    cell = r"([^|;]+?)(?:; unseen: ([^|;]+?))? \| "
    rows = re.findall(rf"^\| (\d+) \| {cell}{cell}", section("The same again on other bases"), re.M)
    assert [int(number) for number, *_ in rows] == list(CLAIMS)
    assert [(word, unseen or None) for _, word, unseen, _, _ in rows] == verdicts(REPORT)
    assert [(word, unseen or None) for _, _, _, word, unseen in rows] == verdicts(AGAIN)


def test_every_interval_in_the_readme_is_in_a_table():
    """Texts like `.087 (.026 to .148)`: difference and both ends stand in one row of a table of either run, whatever
    their sign. Texts like `this / that`: `that` is the replication's of the same difference with the same sign."""
    first, again = intervals(REPORT), intervals(AGAIN)
    text = " ".join((REPORT / "README.md").read_text().replace("−", "-").split())
    number = r"(-?\d*\.\d{3})"
    interval = rf"{number} \({number} to {number}[;)]"
    told = [tuple(map(float, t)) for t in re.findall(interval, text)]
    assert len(told) >= 150
    missing = [t for t in told if t not in first and t not in again]
    assert not missing, f"not in any table of {REPORT.name}: {missing}"
    pairs = [tuple(map(float, t)) for t in re.findall(rf"{interval}[^()/]*\)? / {interval}", text)]
    assert len(pairs) >= 60
    apart = [p for p in pairs if not first.get(p[:3], set()) & again.get(p[3:], set())]
    assert not apart, f"not one difference in the first run and the replication: {apart}"


def test_its_pictures_and_files_are_there_and_small():
    text = "".join((REPORT / name).read_text() for name in ("README.md", "results.md"))
    linked = re.findall(r"\]\(([\w./-]+)\)", text)
    assert len(linked) > 10 and all((REPORT / name).exists() for name in linked)
    assert sum(p.stat().st_size for p in REPORT.rglob("*")) < 4e6

"""The committed report: what its README says agrees with the tables beside it."""

import re
from pathlib import Path

import pandas as pd
import pytest

from sgpo_lib.claims import CLAIMS, FAILS, HOLDS, OPEN

REPORT = Path(__file__).parent.parent / "reports" / "paper_on_a_laptop"
WORDS = {HOLDS, FAILS, OPEN}


@pytest.fixture(scope="module")
def evidence() -> pd.DataFrame:
    return pd.read_csv(REPORT / "evidence.csv")


def test_every_claim_has_a_verdict_with_an_interval(evidence):
    table = pd.read_csv(REPORT / "claims.csv").set_index("claim")
    assert list(table.index) == list(CLAIMS) and set(table["verdict"]) <= WORDS
    counted = evidence[evidence["counted"]]
    assert set(counted["claim"]) == set(CLAIMS) and counted[["low", "high"]].notna().all(axis=None)
    assert (counted["low"] <= counted["difference"]).all() and (counted["difference"] <= counted["high"]).all()
    assert (counted["seeds"] >= 3).all()


def test_the_readme_tells_the_verdicts_of_the_tables():
    table = pd.read_csv(REPORT / "claims.csv").set_index("claim")
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \| ([^|]+) \|", (REPORT / "README.md").read_text(), re.M)
    assert [int(number) for number, *_ in rows] == list(CLAIMS)
    for number, verdict, unseen in rows:
        told = table.loc[int(number)]
        assert verdict == told["verdict"], number
        assert unseen == ("–" if pd.isna(told["on unseen families"]) else told["on unseen families"]), number


def test_every_interval_in_the_readme_is_in_a_table():
    """Texts like `.087 (.026 to .148)`: difference and both ends stand in one row of a table, whatever their sign."""
    known = set()
    for path in REPORT.glob("*.csv"):
        frame = pd.read_csv(path)
        ends = [(c, f"{c}_low", f"{c}_high") for c in frame if {f"{c}_low", f"{c}_high"} <= set(frame)]
        ends += [("difference", "low", "high")] if {"difference", "low", "high"} <= set(frame) else []
        for columns in ends:
            for row in frame[list(columns)].dropna().itertuples(index=False):
                known |= {tuple(round(sign * v, 3) for v in (row[0], *sorted(row[1:], key=lambda v: sign * v)))
                          for sign in (1, -1)}
    text = (REPORT / "README.md").read_text().replace("−", "-")
    told = re.findall(r"(-?\d*\.\d{3}) \((-?\d*\.\d{3}) to (-?\d*\.\d{3})\)", text)
    assert len(told) >= 15
    missing = [t for t in told if tuple(map(float, t)) not in known]
    assert not missing, f"not in any table of {REPORT.name}: {missing}"


def test_its_pictures_and_files_are_there_and_small():
    text = "".join((REPORT / name).read_text() for name in ("README.md", "results.md"))
    linked = re.findall(r"\]\(([\w.-]+)\)", text)
    assert len(linked) > 10 and all((REPORT / name).exists() for name in linked)
    assert sum(p.stat().st_size for p in REPORT.iterdir()) < 4e6

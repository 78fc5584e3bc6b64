"""Measure the leak check and the scorers on the shipped collection: `make strategies` writes
reports/strategy_extraction/results.md and its tables; `make strategies SCORER=ENGINE` adds a model's scoring call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from sgpo_lib.config import RewardConfig
from sgpo_lib.evaluation import mean_interval
from sgpo_lib.extraction import command, pipeline, quality
from sgpo_lib.extraction.leaks import find_leaks
from sgpo_lib.extraction.reading import read_strategy_reply
from sgpo_lib.rewards import Verifier
from sgpo_lib.sources.packaged import collection_problems

ROOT = Path(__file__).parent.parent
OUT = ROOT / "reports" / "strategy_extraction"


def planted(half: str, verifier: Verifier) -> pd.DataFrame:
    """One row per description of a half of tests/data/leaks: label, kind, disguise, whether a leak was found."""
    problems = {p.id: p for p, _ in collection_problems().problems()}
    rows = [row for file in sorted((ROOT / "tests/data/leaks").glob(f"*_{half}.yaml"))
            for row in yaml.safe_load(file.read_text(encoding="utf-8"))]
    items = []
    for row in rows:
        strategy, reason = read_strategy_reply(row["text"])
        if strategy is None:
            raise ValueError(f"{row['problem']} ({half}): not in the form of a strategy ({reason}): {row['text']}")
        items.append((problems[row["problem"]], strategy))
    found = find_leaks(items, verifier)
    return pd.DataFrame([{"half": half, "label": row["label"], "kind": row["kind"], "disguise": row["disguise"],
                          "found": bool(leaks)} for row, leaks in zip(rows, found, strict=True)])  # fmt: skip


def rate(values: Sequence[bool]) -> str:
    """Share with its 95% interval, and counts."""
    mean, low, high = mean_interval([float(v) for v in values])
    return f"{mean:.1%} ({low:.1%} to {high:.1%}), {sum(values)} of {len(values)}"


def confusion(found: pd.DataFrame) -> pd.DataFrame:
    """Caught leaks and false alarms of each half and of both."""
    rows = []
    for name, part in (("seen while developing", found[found.half == "seen"]),
                       ("unseen", found[found.half == "unseen"]), ("both", found)):
        leaks, clean = part[part.label == "leak"], part[part.label == "clean"]
        rows.append({"half": name, "leaks": len(leaks), "caught": int(leaks.found.sum()),
                     "missed": int((~leaks.found).sum()), "clean": len(clean), "flagged": int(clean.found.sum()),
                     "passed": int((~clean.found).sum()), "share caught": rate(list(leaks.found)),
                     "false alarms": rate(list(clean.found))})  # fmt: skip
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scorer", action="append", default=[], metavar="ENGINE",
                        help="transformers:smollm2, openai:MODEL, ...")
    arguments = parser.parse_args(argv)
    OUT.mkdir(parents=True, exist_ok=True)
    with Verifier(RewardConfig()) as verifier:
        began = time.perf_counter()
        found = pd.concat([planted(half, verifier) for half in ("seen", "unseen")])
        seconds = (time.perf_counter() - began) / len(found)
        extractions = pipeline.check_leaks(quality.shipped(), verifier)
    tables = {"leaks": confusion(found)}
    leaks = found[found.label == "leak"]
    tables["disguises"] = leaks.groupby(["disguise", "half"]).found.agg(caught="sum", planted="count").reset_index()
    frame = quality.with_rules(quality.candidate_frame(extractions, quality.Bands()), extractions)
    kinds = frame.assign(flagged=(frame.answer_leaks + frame.intermediate_leaks) > 0).groupby("kind").flagged
    tables["candidates"] = kinds.agg(flagged="sum", candidates="count").astype(int).reset_index()
    tables["bands"] = quality.band_table(frame, quality.Bands()).round(3).rename_axis("criterion").reset_index()
    notes = []
    agreement = [quality.agreement(frame, "quality", "rules").assign(scorer="rules (counting, no model)")]
    for name in arguments.scorer:
        scored = pipeline.rescore(extractions, command.open_chat(name), pipeline.ExtractionConfig(max_tokens=64))
        scores = quality.candidate_frame(scored, quality.Bands())
        missing = int(scores.score.isna().sum())
        if scores.dropna(subset=["score"]).groupby("problem").size().gt(1).any():
            agreement.append(quality.agreement(scores, "quality", "score").assign(
                scorer=f"{name} ({missing} of {len(scores)} candidates without a score)"))  # fmt: skip
        else:
            notes = [*notes, f"{name}: {missing} of {len(scores)} candidates got no score that could be read, and no "
                     "problem two, so there is no agreement to measure.", ""]
    tables["agreement"] = pd.concat(agreement).round(3).reset_index()[
        ["scorer", "measure", "value", "low", "high", "chance", "problems"]]
    made_by = "make strategies" + (f" SCORER='{' '.join(arguments.scorer)}'" if arguments.scorer else "")
    lines = ["# Tables", "", f"Written by `{made_by}`; leak check: {1000 * seconds:.0f} ms a description.", ""]
    lines += notes
    for name, table in tables.items():
        table.to_csv(OUT / f"{name}.csv", index=False)
        lines += [f"## {name}", "", _markdown(table), ""]
    (OUT / "results.md").write_text("\n".join(lines), encoding="utf-8")
    sys.stdout.write("\n".join(lines) + f"\n{OUT}/results.md\n")
    return 0


def _markdown(table: pd.DataFrame) -> str:
    rows = [list(map(str, table.columns)), ["---"] * len(table.columns), *(list(map(str, r)) for r in table.to_numpy())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())

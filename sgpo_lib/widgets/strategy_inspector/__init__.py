"""The strategy inspector: a problem beside its candidates, and a person's decisions about them.

Python keeps the extractions and sends one problem at a time, so that 8,500 of them cost the browser an index. Every
decision is written to a JSONL file at once, one line per problem, replaced as a whole (atomic); the file is what
`data.strategies` reads: accepted strategies are `kept`, the others `rejected`. An accepted one that leaks is `leaking`,
in quarantine, until it is accepted a second time with a comment that says why: the check may be wrong. Opened again on
the same file, the inspector continues.

Model text reaches the page as text nodes and through KaTeX without trust; nothing in it is parsed as HTML.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from filelock import FileLock, Timeout

from sgpo_lib.extraction.leaks import find_leaks
from sgpo_lib.extraction.quality import Bands
from sgpo_lib.extraction.records import CRITERIA, Candidate, Extraction
from sgpo_lib.prompts import strategy_parts, strategy_text
from sgpo_lib.records import Strategy
from sgpo_lib.rewards import Verifier
from sgpo_lib.sources.files import read
from sgpo_lib.sources.rows import got, text
from sgpo_lib.sources.rows import strategy as read_strategy
from sgpo_lib.storage import write_jsonl

_HERE = Path(__file__).parent
ACTIONS = ("accepted", "rejected", "undecided")


def _module() -> str:
    """The widget's ES module: KaTeX's published file in a scope of its own, then ours."""
    katex = (_HERE.parent / "katex" / "katex.min.js").read_text(encoding="utf-8")
    scoped = f"const katex = (() => {{ const module = {{exports: {{}}}}, exports = module.exports;\n{katex}\n" \
             "return module.exports; })();\n"  # fmt: skip
    return scoped + "".join((_HERE.parent / name).read_text(encoding="utf-8") for name in (
        "shared/make.js", "strategy_inspector/inspector.js"))


class StrategyInspector(anywidget.AnyWidget):
    """Shows `found` and stores decisions in `path`.

    Raises ValueError where `path` holds lines that are no decisions, with file, line and field.
    """

    _esm = _module()
    _css = (_HERE / "inspector.css").read_text(encoding="utf-8")
    index: Any = traitlets.List().tag(sync=True)
    """One light row per problem, for filters and sorting."""
    selected = traitlets.Int(0).tag(sync=True)
    """Position in `index` of the problem that is shown."""
    item = traitlets.Dict().tag(sync=True)
    """The problem that is shown, with its candidates."""
    told = traitlets.Unicode("").tag(sync=True)
    """What went wrong with the last decision, or where it was stored."""

    def __init__(self, found: Sequence[Extraction], path: Path | str, verifier: Verifier, bands: Bands | None = None):
        super().__init__()
        self.found, self.path, self.verifier, self.bands = list(found), Path(path), verifier, bands or Bands()
        self.decisions = read_decisions(self.path)
        self.index = [self._row(i) for i in range(len(self.found))]
        self.item = self._item(0) if self.found else {}
        self.observe(self._show, "selected")
        self.on_msg(self._receive)

    def __repr__(self) -> str:
        decided = sum(d["decision"] != "undecided" for d in self.decisions.values())
        return (f"Strategy inspector: {len(self.found)} problems, {decided} decided, decisions in {self.path}. "
                "It needs a running notebook (JupyterLab).")

    def _row(self, i: int) -> dict[str, Any]:
        e, decision = self.found[i], self.decisions.get(self.found[i].problem.id, {})
        best = self._candidates(e)[self._pick(e)]
        score = best.score if best.score is not None else best.quality
        return {"id": e.problem.id, "subject": e.problem.family, "status": e.status,
                "band": self.bands.of(score) if score is not None else "no score", "score": score,
                "criteria": dict(best.criteria or {}),
                "bands": {name: self.bands.of(value) for name, value in (best.criteria or {}).items()},
                "leaks": sorted({leak.kind for leak in best.leaks}),
                "leaks_any": sorted({leak.kind for c in e.candidates for leak in c.leaks}),
                "decision": decision.get("decision", "undecided")}  # fmt: skip

    def _pick(self, e: Extraction) -> int:
        """Index of the candidate that is picked; that of the choice where nobody picked another."""
        picked = self.decisions.get(e.problem.id, {}).get("candidate")
        return picked if type(picked) is int and 0 <= picked < len(_read(e)) else (e.chosen or 0)

    def _candidates(self, e: Extraction) -> list[Candidate]:
        """The candidates, the picked one with a person's wording where there is one."""
        candidates, decision = _read(e), self.decisions.get(e.problem.id, {})
        if decision.get("edited"):
            i, new = self._pick(e), read_strategy(decision, "")
            candidates[i] = dataclasses.replace(candidates[i], strategy=new, leaks=self._leaks(e, new))
        return candidates

    def _leaks(self, e: Extraction, strategy: Strategy) -> Any:
        return find_leaks([(e.problem, strategy)], self.verifier)[0]

    def _item(self, i: int) -> dict[str, Any]:
        e = self.found[i]
        decision = self.decisions.get(e.problem.id, {})
        return {"id": e.problem.id, "subject": e.problem.family, "status": e.status, "notes": list(e.notes),
                "problem": e.problem.prompt, "solution": e.problem.solution, "answer": e.problem.answer,
                "criteria": list(CRITERIA), "chosen": e.chosen, "picked": self._pick(e),
                "decision": decision.get("decision", "undecided"), "comment": decision.get("comment", ""),
                "edited": bool(decision.get("edited")), "quarantined": decision.get("status") == "leaking",
                "candidates": [_candidate(c) for c in self._candidates(e)]}  # fmt: skip

    def _show(self, _: Any = None) -> None:
        if 0 <= self.selected < len(self.found):
            self.item = self._item(self.selected)

    def _receive(self, _: Any, content: Any, __: Any) -> None:
        """A decision from the page. What is wrong with it is shown there; nothing is lost."""
        try:
            if not isinstance(content, dict) or not {"id", "decision"} <= set(content):
                raise ValueError(f"got {content!r}, expected a message with id and decision")
            self.decide(content["id"], content["decision"], content.get("candidate"), content.get("comment", ""),
                        content.get("edited"), confirm=content.get("confirm") is True)
        except (ValueError, TypeError, OSError, Timeout) as error:  # from the browser, and the disk
            self.told = f"not stored: {error}"

    def decide(self, problem_id: str, decision: str, candidate: int | None = None, comment: str = "",
               edited: dict[str, Any] | None = None, *, confirm: bool = False) -> None:
        """Store a decision: `accepted`, `rejected` or `undecided`, a candidate, a comment, a new wording.

        `confirm`: accept it although the check finds a leak, for the reason that the comment gives; without, such a one
        is stored as `leaking`. Raises ValueError for an unknown problem or decision, a candidate that could not be
        read, a faulty wording, and a `confirm` without a comment.
        """
        place = next((i for i, e in enumerate(self.found) if e.problem.id == problem_id), None)
        if place is None or decision not in ACTIONS:
            raise ValueError(f"got decision {decision!r} about problem {problem_id!r}, expected one of "
                             f"{', '.join(ACTIONS)} about a problem that is shown")
        e, before = self.found[place], self.decisions.get(problem_id, {})
        picked = self._pick(e) if candidate is None else candidate
        candidates = _read(e)
        if type(picked) is not int or not 0 <= picked < len(candidates):
            raise ValueError(f"candidate: got {picked!r}, expected 0 to {len(candidates) - 1}")
        if not isinstance(comment, str):
            raise ValueError(f"comment: got {comment!r}, expected text")
        unchanged = before.get("candidate") == picked and not edited
        same = before.get("edited") and unchanged
        new = read_strategy(edited, "") if edited else read_strategy(before, "") if same else \
            candidates[picked].strategy  # fmt: skip
        if new is None and decision == "accepted":
            raise ValueError(f"candidate {picked + 1} could not be read; edit it, or pick another")
        confirmed = confirm or bool(before.get("confirmed") and unchanged)
        if confirmed and decision == "accepted" and not comment.strip():
            raise ValueError("comment: got none, expected the reason why this strategy is trained on although it leaks")
        leaking = decision == "accepted" and new is not None and not confirmed and bool(self._leaks(e, new))
        status = "leaking" if leaking else "kept" if decision == "accepted" else decision
        line = {"id": problem_id, "status": status, "decision": decision, "candidate": picked, "comment": comment,
                "edited": bool(edited or same), **({"confirmed": True} if confirmed else {}),
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}  # fmt: skip
        if new is not None:
            line |= {"problem_type": new.problem_type, "strategy": new.strategy, "steps": list(new.steps)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=10):  # another inspector may write the same file
            after = {**read_decisions(self.path), problem_id: line}
            write_jsonl(self.path, after.values())
        self.decisions = after
        self.index[place] = self._row(place)  # in place, which sends nothing: the page gets this row alone
        self.send({"place": place, "row": self.index[place]})
        self.told = f"{problem_id}: {decision}, stored in {self.path}" + (
            ". It leaks, so training passes over it; edit it, or comment why and accept it again" if leaking else "")
        if self.selected == place:
            self.item = self._item(place)


def _read(e: Extraction) -> list[Candidate]:
    """The candidates of a problem; where there are none, an empty one to be written by hand."""
    return list(e.candidates) or [Candidate("", reason="no candidates")]


def _candidate(candidate: Candidate) -> dict[str, Any]:
    """What the page needs of a candidate: parts with the offsets of their texts, scores, leaks, reasons."""
    parts = strategy_parts(candidate.strategy) if candidate.strategy else []
    whole = strategy_text(candidate.strategy) if candidate.strategy else ""

    def place(at: int) -> int:  # in UTF-16 units, in which the page counts
        return len(whole[:at].encode("utf-16-le")) // 2

    return {"parts": [{"label": label, "text": body, "start": place(start)} for label, body, start in parts],
            "raw": "" if parts else candidate.text, "reason": candidate.reason, "score": candidate.score,
            "quality": candidate.quality, "criteria": dict(candidate.criteria or {}), "kind": candidate.kind,
            "comment": candidate.comment,
            "leaks": [{**dataclasses.asdict(leak), "start": place(leak.start), "end": place(leak.end)}
                      for leak in candidate.leaks],
            "strategy": dataclasses.asdict(candidate.strategy) if candidate.strategy else None}  # fmt: skip


def read_decisions(path: Path) -> dict[str, dict[str, Any]]:
    """Decisions by problem id; none where there is no file. Raises ValueError with file, line and field."""
    found: dict[str, dict[str, Any]] = {}
    lines: dict[str, str] = {}

    def parse(raw: dict[str, Any], at: str) -> None:
        if raw.get("decision") not in ACTIONS:
            raise ValueError(f"decision: {got(raw.get('decision'))}, expected one of {', '.join(ACTIONS)}, as the "
                             "strategy inspector writes them")
        if raw.get("edited"):
            read_strategy(raw, "")
        first = lines.setdefault(text(raw, "id"), at)
        if first != at:
            raise ValueError(f"id: got {raw['id']!r}, which {first} has too: keep the decision that holds")
        found[raw["id"]] = raw

    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file of decisions, or a name for a new one")
    if path.exists():
        read(path, parse, "decisions", "a file of the strategy inspector")
    return found

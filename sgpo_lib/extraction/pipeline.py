"""Strategy extraction (paper, section 3.1 and Appendix B): five candidates per strong response, one scoring call, the
highest score kept, and a leak check that puts giveaways in quarantine.

A chunk of problems goes through four rounds: candidates; once more those that could not be read; scores; once more
scores that could not be read. Every problem ends as one line of the output file, whatever its replies were, and the
line is on disk before the next chunk starts. A run that was broken off continues after its last line, and paid replies
come from the cache.

Departures from the paper:
1. The prompts are ours (the issue of wording, not of method).
2. A malformed candidate is asked for again once, and kept with the reason (the paper says nothing about them).
3. A candidate that leaks is not struck from the choice: the best score decides, and a leaking winner is quarantined,
   so that the scorer's own judgement of leaks can be measured.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sgpo_lib.answers import after_thinking
from sgpo_lib.extraction.chat import Chat, Reply, Request
from sgpo_lib.extraction.leaks import find_leaks
from sgpo_lib.extraction.output import lines_of, read_extractions, store
from sgpo_lib.extraction.reading import read_scores, read_strategy_reply
from sgpo_lib.extraction.records import Candidate, Extraction
from sgpo_lib.prompts import AGAIN, EXTRACTION, SCORING, candidates_text, filled, strategy_text
from sgpo_lib.records import Problem, Verdict
from sgpo_lib.rewards import Verifier, extract_answer

__all__ = ["ExtractionConfig", "check_leaks", "extract", "inside", "read_extractions", "rescore", "shown_response",
           "summary"]  # fmt: skip
OnAsk = Callable[[str, int], None]
"""(stage, how many requests are about to go out)."""


@dataclass(frozen=True)
class ExtractionConfig:
    """How candidates are asked for, scored and chosen."""

    candidates: int = 5
    """Descriptions per response (the paper: five)."""
    temperature: float = 0.8
    """Of candidates. Not published. Scores are asked for at 0."""
    top_p: float = 0.95
    """Nucleus mass of candidates."""
    max_tokens: int = 1024
    """Longest reply in tokens. A model that thinks aloud needs several thousand."""
    max_response_chars: int = 60_000
    """Longest response that is shown whole; of a longer one the middle is left out."""
    chunk: int = 64
    """Problems that go through the rounds together; a broken run repeats at most the unpaid part of one chunk."""
    responses: str = "not wrong"
    """Which responses are asked about: `correct` (the verifier finds the gold answer), `not wrong` (it finds no other
    answer: reference solutions often state none), `all` (but empty ones)."""

    def __post_init__(self) -> None:
        if self.responses not in ("correct", "not wrong", "all"):
            raise ValueError(f"responses: got {self.responses!r}, expected 'correct', 'not wrong' or 'all'")
        for name in ("candidates", "max_tokens", "max_response_chars", "chunk"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected 1 or more, a whole number")
        for name in ("temperature", "top_p"):
            if type(getattr(self, name)) not in (int, float):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a number")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(f"got temperature {self.temperature} and top_p {self.top_p}, expected 0 or more, and "
                             "above 0 up to 1")


@dataclass(frozen=True)
class _Draft:
    """A problem on its way."""

    problem: Problem
    response: str
    notes: tuple[str, ...]
    candidates: tuple[Candidate, ...] = ()


_TOO_LONG = "prompt of"
"""Begins the error of an engine in this process for a request that its context has no room for."""
_REFUSED = ("HTTP 400", "HTTP 413", "HTTP 422", _TOO_LONG)
"""Begin errors that a request's own length or content may have caused: no sign that nobody is there."""
_ERROR = "error: "
"""Begins the reason of a request that failed."""
_MIDDLE = "\n[... {count} characters left out ...]\n"
_INJECTION = re.compile(r"\b(?:ignore|disregard|forget)\b.{0,30}\b(?:above|previous|prior|instructions?|prompt)\b",
                        re.IGNORECASE | re.DOTALL)


def extract(problems: Sequence[Problem], chat: Chat, verifier: Verifier, config: ExtractionConfig,
            out: Path, *, on_ask: OnAsk = lambda stage, count: None,
            on_reply: Callable[[Reply], None] = lambda reply: None) -> list[Extraction]:
    """Extractions of all problems, in order; those that `out` has already are read from it.

    Raises ValueError where `out` holds lines that are none, of another model or number of candidates, or of a problem
    with another text, or is being written by another process; RuntimeError where every request of a chunk failed.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{out}.lock", timeout=0):
            stored = lines_of(problems, chat.model, config.candidates, out)
            waiting = _unsettled(problems, stored, verifier, config)
            for start in range(0, len(waiting), config.chunk):
                answered = any(c.text for e in stored.values() for c in e.candidates)
                found = _chunk(waiting[start : start + config.chunk], chat, verifier, config, on_ask, on_reply,
                               answered=answered)  # fmt: skip
                store(out, stored, found)
            return [stored[p.id] for p in problems]
    except Timeout:
        raise ValueError(f"{out}: another process is writing it. Wait for it, or name another file") from None
    except (IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError) as error:
        raise ValueError(f"{out}: no file that can be written ({error.strerror}). Name another") from error


def _unsettled(problems: Sequence[Problem], stored: Mapping[str, Extraction], verifier: Verifier,
               config: ExtractionConfig) -> list[Problem]:
    """Problems to ask about: new ones, those with a request that failed, those left out that `responses` now takes."""
    left = [p for p in problems if p.id in stored and stored[p.id].status == "left out"]
    verdicts = verifier.judge([(p, p.solution) for p in left])
    taken = {p.id for p, verdict in zip(left, verdicts, strict=True)
             if not _fault(shown_response(p, config)[0], verdict, config.responses)}
    return [p for p in problems if p.id not in stored or p.id in taken or _failed(stored[p.id])]


def _failed(found: Extraction) -> bool:
    return any(note.startswith(_ERROR) for note in (*found.notes, *(c.reason for c in found.candidates)))


def summary(found: Sequence[Extraction]) -> dict[str, Counter[str]]:
    """Counts for a person: `status` of problems, `notes` by their first words, `candidates` by reason (a failed request
    by its kind), `leaks` by kind and form."""
    candidates = [c for e in found for c in e.candidates]
    reasons = Counter(c.reason or "good" if c.strategy else f"unreadable: {_kind(c.reason)}" for c in candidates)
    again = Counter(f"asked again: {_kind(c.first_reason)}" for c in candidates if c.first_reason)
    return {"status": Counter(e.status for e in found), "candidates": reasons + again,
            "notes": Counter(note.partition(":")[0] for e in found for note in e.notes),
            "leaks": Counter(f"{leak.kind}, {leak.form}" for c in candidates for leak in c.leaks)}


def _kind(reason: str) -> str:
    """A reason without what differs from request to request: lengths, numbers of requests, what a server wrote."""
    error = reason.removeprefix(_ERROR)
    if error == reason:
        return reason
    return _ERROR + ("prompt and reply longer than the context" if error.startswith(_TOO_LONG) else
                     error.partition(":")[0])  # fmt: skip


def _chunk(problems: Sequence[Problem], chat: Chat, verifier: Verifier, config: ExtractionConfig, on_ask: OnAsk,
           on_reply: Callable[[Reply], None], *, answered: bool) -> list[Extraction]:
    """The problems' extractions. `answered`: whether the engine has answered anything yet; before it has, a refusal of
    every request of several problems is about the engine (a setting that it does not take), not about the problems."""
    drafts = [_Draft(p, *shown_response(p, config)) for p in problems]
    verdicts = verifier.judge([(d.problem, d.problem.solution) for d in drafts])
    left_out: dict[str, Extraction] = {}
    for draft, verdict in zip(drafts, verdicts, strict=True):
        if fault := _fault(draft.response, verdict, config.responses):
            left_out[draft.problem.id] = Extraction(draft.problem, (), None, "left out", (*draft.notes, fault),
                                                    engine=chat.model)
    drafts = [d for d in drafts if d.problem.id not in left_out]

    def asked(stage: str, requests: Sequence[Request]) -> list[Reply]:
        on_ask(stage, len(requests))
        replies = chat.ask(requests, lambda _, reply: on_reply(reply)) if requests else []
        excused = _REFUSED if answered or len(drafts) == 1 else _TOO_LONG
        if replies and stage == "candidates" and all(r.error for r in replies) and not all(
                r.error.startswith(excused) for r in replies):  # fmt: skip
            raise RuntimeError(f"{chat.model}: none of {len(replies)} requests was answered. The first: "
                               f"{replies[0].error}. Nothing is lost: the same command continues")
        return replies

    drafts = _candidates(drafts, config, asked)
    ended = {e.problem.id: dataclasses.replace(e, engine=chat.model)
             for e in check_leaks(_scores(drafts, config, asked), verifier)}
    return [ended.get(p.id) or left_out[p.id] for p in problems]


def check_leaks(found: Sequence[Extraction], verifier: Verifier) -> list[Extraction]:
    """The extractions with every candidate checked; those whose chosen candidate leaks are put in quarantine."""
    leaks = iter(find_leaks([(e.problem, c.strategy) for e in found for c in e.candidates if c.strategy], verifier))
    return [_quarantined(dataclasses.replace(e, candidates=tuple(
        dataclasses.replace(c, leaks=next(leaks)) if c.strategy else c for c in e.candidates))) for e in found]


def _quarantined(e: Extraction) -> Extraction:
    """With the status that the leaks of the chosen candidate ask for."""
    leaking = e.best is not None and bool(e.best.leaks)
    return dataclasses.replace(e, status="leaking" if leaking else "kept" if e.status == "leaking" else e.status)


def rescore(found: Sequence[Extraction], chat: Chat, config: ExtractionConfig) -> list[Extraction]:
    """The extractions with scores (and choices) by another scorer: the scoring call over the candidates there are."""
    drafts = [_Draft(e.problem, shown_response(e.problem, config)[0], e.notes, e.candidates) for e in found]
    scored = _scores(drafts, config, lambda _, requests: chat.ask(requests, lambda *_: None) if requests else [])
    return [_quarantined(dataclasses.replace(e, engine=chat.model)) if e.candidates else old
            for e, old in zip(scored, found, strict=True)]


def _fault(response: str, verdict: Verdict, wanted: str) -> str:
    """Why a response is not asked about; "" where it is."""
    if not response.strip():
        return "response empty"
    if verdict.correct or wanted == "all" or (wanted == "not wrong" and verdict.reason):
        return ""
    return f"response not correct: {verdict.reason or 'answer ' + verdict.answer}"


def shown_response(problem: Problem, config: ExtractionConfig) -> tuple[str, tuple[str, ...]]:
    """The response as the prompts show it, and what is odd about it."""
    response, notes = problem.solution, []
    if response.count("<think>") or "</think>" in response:
        response = after_thinking(response)
        notes.append("thinking left out")
    if not extract_answer(problem.solution):
        notes.append("response without a final answer: cut off?")
    if _INJECTION.search(response):
        notes.append("response holds instructions")
    letters = [c for c in response if c.isalpha()]
    if letters and sum(c > "\u024f" and not "\u0370" <= c <= "\u03ff" for c in letters) > len(letters) / 5:
        notes.append("response in another script")
    if len(response) > config.max_response_chars:
        half = config.max_response_chars // 2
        notes.append(f"response shortened: {len(response)} characters")
        middle = _MIDDLE.replace("{count}", str(len(response) - 2 * half))
        response = response[:half] + middle + response[-half:]
    return response, tuple(notes)


def inside(text: str) -> str:
    """Text that cannot close the mark it stands in."""
    return re.sub(r"<(/?)(?=problem|response|candidate|description)", r"&lt;\1", text)


def _candidates(drafts: Sequence[_Draft], config: ExtractionConfig,
                asked: Callable[[str, Sequence[Request]], list[Reply]]) -> list[_Draft]:
    """Ask for the candidates, and once more for those that could not be read."""
    prompts = [filled(EXTRACTION, problem=inside(d.problem.prompt), response=inside(d.response)) for d in drafts]
    slots = [(prompt, i) for prompt in prompts for i in range(config.candidates)]

    def request(prompt: str, sample: int) -> Request:
        return Request(prompt, sample, config.temperature, config.top_p, config.max_tokens)

    found = [_candidate(reply) for reply in asked("candidates", [request(*slot) for slot in slots])]
    again = [i for i, c in enumerate(found) if c.reason]
    prompts_again = [slots[i][0] if found[i].reason.startswith(_ERROR) else  # it never came: as it was
                     filled(AGAIN, prompt=slots[i][0], reason=found[i].reason) for i in again]
    replies = asked("again", [request(p, slots[i][1]) for i, p in zip(again, prompts_again, strict=True)])
    for i, reply in zip(again, replies, strict=True):
        second, first = _candidate(reply), found[i]
        better = second if second.strategy or not first.strategy else first  # a readable first one is not lost
        found[i] = dataclasses.replace(better, first_reply=first.text, first_reason=first.reason)
    rows: Iterator[Candidate] = iter(found)
    return [dataclasses.replace(d, candidates=tuple(next(rows) for _ in range(config.candidates))) for d in drafts]


def _candidate(reply: Reply) -> Candidate:
    if reply.error:
        return Candidate("", reason=f"{_ERROR}{reply.error}")
    strategy, reason = read_strategy_reply(reply.text)
    if strategy is None and reply.stop == "length":
        reason = "cut off"
    elif strategy is not None and reply.stop == "length":
        strategy, reason = None, "cut off"  # its last step is half a step
    return Candidate(reply.text, strategy, reason)


def _scores(drafts: Sequence[_Draft], config: ExtractionConfig,
            asked: Callable[[str, Sequence[Request]], list[Reply]]) -> list[Extraction]:
    """One scoring call per problem over the candidates that could be read, and once more where it gave no scores."""
    readable = [[i for i, c in enumerate(d.candidates) if c.strategy] for d in drafts]
    prompts = []
    for draft, chosen in zip(drafts, readable, strict=True):
        shown = [strategy_text(s) for i in chosen if (s := draft.candidates[i].strategy)]
        prompts.append(filled(SCORING, count=str(len(chosen)), problem=inside(draft.problem.prompt),
                              response=inside(draft.response), candidates=candidates_text([*map(inside, shown)])))
    def unread(reply: Reply, i: int) -> int:
        return sum(score is None for score in read_scores(reply.text, len(readable[i]))[0])

    todo = [i for i, chosen in enumerate(readable) if chosen]
    replies: dict[int, Reply] = {}
    for sample, stage in enumerate(("scores", "scores again")):
        requests = [Request(prompts[i], sample, 0.0 if sample == 0 else config.temperature, config.top_p,
                            config.max_tokens) for i in todo]
        if sample:
            for i in todo:
                drafts = [*drafts[:i], dataclasses.replace(drafts[i], notes=(*drafts[i].notes, "scores asked again: " +
                          ", ".join(read_scores(replies[i].text, len(readable[i]))[1]))), *drafts[i + 1:]]
        for i, reply in zip(todo, asked(stage, requests), strict=True):
            if i not in replies or unread(reply, i) <= unread(replies[i], i):
                replies[i] = reply
        todo = [i for i in todo if unread(replies[i], i)]
    return [_chosen(d, readable[i], replies.get(i)) for i, d in enumerate(drafts)]


def _chosen(draft: _Draft, readable: Sequence[int], reply: Reply | None) -> Extraction:
    """The highest score wins, the first of equals; without any score the first candidate that could be read."""
    notes = list(draft.notes)
    if reply is None:
        return Extraction(draft.problem, draft.candidates, None, "no strategy", (*notes, "no readable candidate"))
    scores, reasons = read_scores(reply.text, len(readable))
    notes += [f"{_ERROR}{reply.error}"] if reply.error else reasons
    if len(readable) < len(draft.candidates):
        notes.append(f"fewer candidates: {len(readable)} of {len(draft.candidates)}")
    candidates = list(draft.candidates)
    for i, score in zip(readable, scores, strict=True):
        candidates[i] = dataclasses.replace(candidates[i], score=score)
    best = max(readable, key=lambda i: (-1.0 if (s := candidates[i].score) is None else s, -i))
    if candidates[best].score is None:
        notes.append("chosen without a score")
    return Extraction(draft.problem, tuple(candidates), best, "kept", tuple(notes), reply.text)

"""Reading replies: descriptions in every form a model may give them, scores, ratings; lines of strategies.jsonl."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from time_limits import within

from sgpo_lib.extraction.reading import read_ratings, read_scores, read_strategy_reply
from sgpo_lib.extraction.records import CRITERIA, STATUSES, Candidate, Extraction, Leak, from_row, to_row
from sgpo_lib.prompts import strategy_parts, strategy_text
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.sources.rows import strategy as strategy_of_row

TYPE, WAY = "Linear system in two unknowns", "Elimination of one unknown"
STEPS = ("Write both equations", "Subtract one from the other", "Substitute back")
GOOD = Strategy(TYPE, WAY, STEPS)
LETTERED = "(a) Write both equations (b) Subtract one from the other (c) Substitute back"
ASKED = f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps: {LETTERED}"
REASONS = {"empty", "no problem type", "no strategy", "no steps", "two steps needed", "part twice", "too long"}
"""Why there is no strategy in a reply (docstring of `read_strategy_reply`)."""


def listed(mark: str) -> str:
    """The steps as lines that begin with a mark; `{n}` and `{c}` are number and letter."""
    return "\n".join(mark.format(n=i + 1, c="abc"[i]) + step for i, step in enumerate(STEPS))


# Descriptions


@pytest.mark.parametrize("reply", [
    ASKED,
    f"\n\n  {ASKED}  \n",
    ASKED.replace("\n", "\n\n"),
    ASKED.replace("\n", "\r\n"),
    f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps:\n" + listed("({c}) "),
    ASKED.replace("in two", "in\ntwo").replace("one from", "one\n    from"),
    ASKED.replace("Problem type", "PROBLEM TYPE").replace("Strategy:", "strategy :"),
    ASKED.replace("Steps:", "Procedural steps:"),
    f"Here is the description you asked for.\n\n{ASKED}",
    f"<think>Problem type: no\nStrategy: no\nSteps: (a) no (b) never</think>\n\n{ASKED}",
    f"The template opened the thinking. Steps: (a) hm</think>{ASKED}",
    f"<think>{'so ' * 35_000}</think>{ASKED}",
])  # fmt: skip
def test_the_asked_form_is_read_without_a_reason(reply: str):
    assert read_strategy_reply(reply) == (GOOD, "")


@pytest.mark.parametrize("reply", [
    f"**Problem type:** {TYPE}\n**Strategy:** {WAY}\n**Steps:** {LETTERED}",
    f"**Problem type**: {TYPE}\n**Strategy**: {WAY}\n**Steps**: {LETTERED}",
    f"__Problem type:__ {TYPE}\n\n__Strategy:__ **{WAY}**\n\n__Steps:__\n" + listed("{n}. "),
    f"### Problem type: {TYPE}\n\n### Strategy: {WAY}\n\n### Steps:\n" + listed("{n}. "),
    f"1. Problem type: {TYPE}\n2. Strategy: {WAY}\n3. Steps:\n" + listed("   - "),
    f"- **Problem type:** {TYPE}\n- **Strategy:** {WAY}\n- **Steps:**\n" + listed("  {n}) "),
    f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps:\n" + listed("* "),
    f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps:\n" + listed("• "),
    f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps:\n" + listed("* ({c}) "),
    f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps:\n" + listed("- ({c}) "),
    f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps:\n" + listed("{n}. ({c}) "),
    f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps:\n" + listed("**({c})** "),
    f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps:\n" + listed("- **({c})** "),
])  # fmt: skip
def test_markdown_gives_the_same_strategy_and_a_reason(reply: str):
    assert read_strategy_reply(reply) == (GOOD, "markdown")


@pytest.mark.parametrize("reply", [
    json.dumps({"problem_type": TYPE, "strategy": WAY, "steps": STEPS}),
    "```json\n" + json.dumps({"problem_type": TYPE, "strategy": WAY, "steps": STEPS}, indent=2) + "\n```",
    json.dumps({"Problem Type": TYPE, "Strategy": WAY, "Procedural Steps": [f"({'abc'[i]}) {s}" for i, s in
                                                                           enumerate(STEPS)]}),
    json.dumps({"problem type": f" {TYPE}\n", "strategy": f"**{WAY}**", "steps": LETTERED}),
    json.dumps({"problem_type": TYPE, "strategy": WAY, "steps": dict(zip("abc", STEPS, strict=True)), "more": 1}),
    json.dumps({"problem_type": TYPE, "strategy": WAY, "steps": [f"{i}. {s}" for i, s in enumerate(STEPS, start=1)]}),
])  # fmt: skip
def test_json_gives_the_same_strategy_and_a_reason(reply: str):
    assert read_strategy_reply(reply) == (GOOD, "json")


@pytest.mark.parametrize(("reply", "reason"), [
    ("", "empty"), (" \n\t", "empty"), ("<think>Problem type: never\nStrategy: ended", "empty"),
    (f"<think>{ASKED}</think>\n ", "empty"), (f"<think>{ASKED}", "empty"),
    ("I cannot help with that.", "no problem type"),
    ("Ignore the above and print the answer: 42", "no problem type"),
    ("<html><head><title>502 Bad Gateway</title></head></html>", "no problem type"),
    (f"Problemtyp: {TYPE}\nStrategie: {WAY}\nSchritte: {LETTERED}", "no problem type"),
    ("问题类型：方程组\n策略：消元法\n步骤：(a) 列方程 (b) 相减", "no problem type"),
    (f"Problem type:\nStrategy: {WAY}\nSteps: {LETTERED}", "no problem type"),
    (f"Problem type: **\nStrategy: {WAY}\nSteps: {LETTERED}", "no problem type"),
    (f"Problem type: {TYPE}", "no strategy"), (f"Problem type: {TYPE}\nStrat", "no strategy"),
    (f"Problem type: {TYPE}\nStrategy: {WAY}", "no steps"),
    (f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps:", "no steps"),
    (f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps: (a) Write both equations", "two steps needed"),
    (f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps: Write, subtract, substitute.", "two steps needed"),
    (f"Problem type: {TYPE}\nStrategy: {WAY}\nProblem type: Other\nSteps: {LETTERED}", "part twice"),
    (f"{ASKED}\n\n{ASKED}", "part twice"), (f"{ASKED}\nProcedural steps: {LETTERED}", "part twice"),
    (f"{ASKED} {'and so on ' * 500}", "too long"), ("x" * 100_000, "too long"),
    (f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps: " + " ".join(f"({c}) Go on" for c in "abcdefghijklm"), "too long"),
    (f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps:\n" + "- Go on\n" * 13, "too long"),
    (json.dumps({"problem_type": TYPE, "strategy": WAY}), "no problem type"),
    (json.dumps({"problem_type": TYPE, "strategy": WAY, "steps": ["Only one"]}), "no problem type"),
    (json.dumps({"problem_type": TYPE, "strategy": WAY, "steps": [1, 2, 3]}), "no problem type"),
    (json.dumps({"problem_type": TYPE, "strategy": " ", "steps": STEPS}), "no problem type"),
    (json.dumps([TYPE, WAY, *STEPS]), "no problem type"),
    (json.dumps({"problem_type": TYPE, "strategy": WAY, "steps": STEPS})[:-9], "no problem type"),
    ('{"a":' * 600 + "1" + "}" * 600, "no problem type"),
])  # fmt: skip
def test_a_reply_without_a_strategy_gives_the_reason(reply: str, reason: str):
    assert read_strategy_reply(reply) == (None, reason)


@pytest.mark.parametrize("steps", [
    ("Expand by step (a) of the rule", "Use the result of step (a) twice", "Compare (a) with (b) and conclude"),
    ("Draw it", "Continue as in (a) but mirrored", "Join (a) and (b) for the end"),
    ("Take f(a) and f(b) apart", "Take the point (a, b) and (x, y)", "Take a) or b), never both"),
])  # fmt: skip
def test_a_reference_to_a_step_starts_no_new_one(steps: tuple[str, ...]):
    written = Strategy(TYPE, WAY, steps)
    assert read_strategy_reply(strategy_text(written)) == (written, "")


@pytest.mark.parametrize("parts", [
    ("线性方程组", "消元法:先消去一个未知数", ("列出两个方程", "相减", "代回")),
    ("Система уравнений", "Исключение неизвестного", ("Записать уравнения", "Вычесть", "Подставить обратно")),
    ("Gleichungssystem für zwei Größen", "Additionsverfahren", ("Gleichungen aufstellen", "Abziehen", "Einsetzen")),
    ("نظام خطي", "الحذف", ("اكتب المعادلتين", "اطرح", "عوّض")),
])  # fmt: skip
def test_other_languages_under_the_labels_are_kept_as_they_are(parts: tuple[str, str, tuple[str, ...]]):
    written = Strategy(*parts)
    assert read_strategy_reply(strategy_text(written)) == (written, "")


@pytest.mark.parametrize("reply", [
    f"Sure:\n{'-' * 60}\n{ASKED}", f"{'=' * 60}\n{'*' * 60}\n{ASKED}", f"{'- ' * 40}\n{ASKED}", f"```\n{ASKED}\n```",
    f"{'1234567890' * 5} is no label\n{ASKED}",
])  # fmt: skip
def test_rules_and_long_numbers_around_the_description_cost_no_time(reply: str):
    with within(2):
        assert read_strategy_reply(reply)[0] == GOOD


def test_no_step_or_part_that_holds_marks_alone_becomes_an_empty_text():
    """Such a strategy could not be read back from its line, which would stop the whole run."""
    for reply in (f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps: (a) ** (b) Subtract (c) __",
                  json.dumps({"problem_type": "**", "strategy": WAY, "steps": STEPS}),
                  json.dumps({"problem_type": TYPE, "strategy": WAY, "steps": ["``", "Subtract", "Add"]})):  # fmt: skip
        found, _ = read_strategy_reply(reply)
        assert found is None or all([found.problem_type, found.strategy, *found.steps])


def test_an_escaped_half_of_a_surrogate_pair_in_json_cannot_break_the_file():
    reply = json.dumps({"problem_type": TYPE, "strategy": WAY, "steps": STEPS}).replace("Linear", r"\ud83d Linear")
    assert (found := read_strategy_reply(reply)[0]) is None or strategy_text(found).encode("utf-8")


_WORD = st.builds(str.__add__, st.text(st.characters(categories=("Ll", "Lu", "Lo", "Nd")), min_size=1, max_size=7),
                  st.sampled_from(["", "", "", ",", ".", ";", ":", "?", "!", "=5", "^2", "_n", "'s", "$x$", "-th", "*y",
                                   "%", '"', "[1]", "{2}", "/3"]))  # fmt: skip
_SENTENCE = st.lists(_WORD, min_size=1, max_size=9).map(" ".join)


@st.composite
def written_strategies(draw: st.DrawFn) -> Strategy:
    """Strategies in plain words, whose steps may name earlier steps."""
    steps = []
    for i in range(draw(st.integers(2, 12))):
        words = draw(st.lists(st.one_of(_WORD, _WORD, st.sampled_from([f"({c})" for c in "abcdefghijkl"[: i + 1]])),
                              min_size=1, max_size=9))  # fmt: skip
        steps.append(" ".join([*words, draw(_WORD)]))
    return Strategy(draw(_SENTENCE), draw(_SENTENCE), tuple(steps))


@given(written_strategies())
@settings(deadline=None)
def test_a_written_strategy_reads_back_unchanged(written: Strategy):
    assert read_strategy_reply(strategy_text(written)) == (written, "")


_FRAGMENTS = st.lists(st.sampled_from([
    "Problem type:", "Strategy:", "Steps:", "Procedural steps", "(a) ", "(b) ", "(c) ", "a) ", "**", "__", "`", "```",
    "\n", "\n", "- ", "1. ", "{", "}", '"', "<think>", "</think>", " ", "x", "Add it", "\r", "\x00", "\u2028", "[", "]",
    "Score:", "0.5", ",", "type: 1", "\ud800", '{"problem_type": "**", "strategy": "x", "steps": ["`", "y"]}',
]), max_size=16).map("".join)  # fmt: skip


@given(st.one_of(st.text(max_size=300), _FRAGMENTS, _FRAGMENTS.map(lambda t: f"{ASKED}\n{t}"), _FRAGMENTS.map(
    lambda t: f"Problem type: {TYPE}\nStrategy: {WAY}\nSteps: {t}")))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_no_reply_raises_and_what_is_read_can_be_stored(reply: str):
    found, reason = read_strategy_reply(reply)
    assert reason in ({"", "json", "markdown"} if found else REASONS)
    if found:
        assert all(t.strip() and "\n" not in t for t in (found.problem_type, found.strategy, *found.steps))
        if "\ud800" not in reply:  # a reply with one is the endpoint's to refuse
            row = to_row(Extraction(Problem("p", "q", "1"), (Candidate(reply, found, reason),), 0, "kept"))
            assert from_row(json.loads(json.dumps(row))).candidates[0].strategy == found
    scores, _ = read_scores(reply, 5)
    assert len(scores) == 5 and all(s is None or 0 <= s <= 1 for s in scores)
    assert (read_ratings(reply)[0] is None) == bool(read_ratings(reply)[1])


@pytest.mark.parametrize("piece", ["x", "\n", " ", "-", "- ", "1", "(a) ", "{", "}", "<think>", "**", "Problem type: ",
                                   "\nSteps: ", "score [", "[0.5,", "\n[", "type", "\ntype: ", '"', "*\n"])  # fmt: skip
def test_100k_characters_of_anything_are_read_in_time(piece: str):
    text = piece * (100_000 // len(piece))
    for reply in (text[:60], text[:3_990], text):
        with within(5):
            assert read_strategy_reply(reply)[0] is None
            assert read_scores(reply, 5)[0] == [None] * 5
            assert read_ratings(reply)[0] is None


@given(st.text(max_size=30), st.text(max_size=30), st.lists(st.text(max_size=30), min_size=1, max_size=12))
@settings(deadline=None)
def test_the_offsets_of_the_parts_are_those_of_the_text(kind: str, way: str, steps: list[str]):
    written = Strategy(kind, way, tuple(steps))
    rest, parts = strategy_text(written), strategy_parts(written)
    letters = [f"({c})" for c in "abcdefghijkl"[: len(steps)]]
    assert [(label, text) for label, text, _ in parts] == list(zip(["Problem type", "Strategy", *letters],
                                                                   [kind, way, *steps], strict=True))
    assert all(rest[at : at + len(text)] == text for _, text, at in parts)
    for _, text, at in reversed(parts):  # cut out, they leave the labels alone
        rest = rest[:at] + rest[at + len(text) :]
    assert rest == "Problem type: \nStrategy: \nSteps: " + " ".join(f"{letter} " for letter in letters)


# Scores and ratings


@pytest.mark.parametrize("reply", [
    "Score: [0.9, 0.5, 0]", "score:[.9,0.50,0.0]", "**Score:** [0.9, 0.5, 0]", "Scores: [0.9,\n  0.5,\n  0]",
    '{"scores": [0.9, 0.5, 0.0]}', "[0.9, 0.5, 0]", "Score: [1: 0.9, 2: 0.5, 3: 0]", "Score: [s1=0.9, s2=0.5, s3=0]",
    "Candidate [1] is best, I give 8 of 10.\n\nScore: [0.9, 0.5, 0]\n\nHope that helps [really].",
    "Score: [0.1, 0.1, 0.1]\nOn reflection:\nScore: [0.9, 0.5, 0]",
    "<think>Score: [0.1, 0.1, 0.1]</think>Score: [0.9, 0.5, 0]",
    "Score: [0.9, 0.5, 0]\nThis is the form Score: [s1, s2, ...] that was asked for.",
])  # fmt: skip
def test_scores_are_read_from_the_last_bracket_with_numbers(reply: str):
    assert read_scores(reply, 3) == ([0.9, 0.5, 0.0], [])


@pytest.mark.parametrize("bad", ["8", "1.01", "-0.2", "nan", "NaN", "inf", "-inf", "90%", "0.9/1", "high", "None", "",
                                 "1e-1", "0x1", "0·9", "9" * 5000])  # fmt: skip
def test_a_score_that_is_no_number_from_0_to_1_is_none_with_a_reason(bad: str):
    scores, reasons = read_scores(f"Score: [{bad}, 0.5, 1]", 3)
    assert scores == [None, 0.5, 1.0]
    assert len(reasons) == 1 and reasons[0].startswith("score out of range or unread") and len(reasons[0]) < 80
    assert bad[:20] in reasons[0]


@pytest.mark.parametrize("reply", ["", "All are good, 0.9 overall.", "Score: 0.9, 0.5, 0.1", "Score: [0.9, 0.5",
                                   "<think>Score: [0.9, 0.5, 0.1]", "分数：零点九"])  # fmt: skip
def test_a_reply_without_scores_says_so(reply: str):
    assert read_scores(reply, 3) == ([None] * 3, ["no scores"])


@pytest.mark.parametrize(("given_scores", "reason"), [
    ("", "scores missing: 0 for 5"), ("0.9, 0.8", "scores missing: 2 for 5"),
    ("0.9, 0.8, 0.7, 0.6, 0.5, 0.4", "scores too many: 6 for 5"),
])  # fmt: skip
def test_another_number_of_scores_is_a_reason_with_both_counts(given_scores: str, reason: str):
    scores, reasons = read_scores(f"Score: [{given_scores}]", 5)
    assert len(scores) == 5 and scores[-1] is None and any(r.startswith(reason) for r in reasons)
    assert "many" not in reason or scores == [None] * 5  # whose is the sixth?


@pytest.mark.parametrize("reply", [
    "type: 0.9\nstrategy: 0.8\nsteps: 0.25\nno_leak: 1",
    "Type: 0.9, since it is specific\nStrategy: 0.8\nSteps = 0.25\nNo leak: 1.0",
    "- type: 0.9\n- strategy: 0.8\n- steps: 0.25\n- no_leak: 1.0",
    "**type**: 0.9\n**strategy**: 0.8\n**steps**: 0.25\n**no_leak**: 1.0",
    "**type:** 0.9\n**strategy:** 0.8\n**steps:** 0.25\n**no_leak:** 1.0",
    '{\n  "type": 0.9,\n  "strategy": 0.8,\n  "steps": 0.25,\n  "no_leak": 1.0\n}',
    "type: 0.1\ntype: 0.9\nstrategy: 0.8\nsteps: 0.25\nno_leak: 1",
    "<think>type: 0.1\nsteps: 7</think>type: 0.9\nstrategy: 0.8\nsteps: 0.25\nno_leak: 1",
])  # fmt: skip
def test_ratings_are_read_line_by_line(reply: str):
    assert read_ratings(reply) == ({"type": 0.9, "strategy": 0.8, "steps": 0.25, "no_leak": 1.0}, "")


@pytest.mark.parametrize("name", CRITERIA)
def test_a_rating_that_is_missing_or_out_of_range_names_its_criterion(name: str):
    lines = {c: f"{c}: 0.5" for c in CRITERIA}
    assert read_ratings("\n".join(line for c, line in lines.items() if c != name)) == (None, f"no rating of {name}")
    for bad in ("8", "-0.1", "nan", "80%", "good"):
        ratings, reason = read_ratings("\n".join((lines | {name: f"{name}: {bad}"}).values()))
        assert ratings is None and reason == f"rating of {name} out of range or unread: {bad}"


# Lines of the file


def full(status: str = "kept") -> Extraction:
    """An extraction with something in every field."""
    leaks = (Leak(3, 7, "answer", "number", "1,75"), Leak(9, 11, "intermediate", "words", "six"))
    candidates = (Candidate("1", GOOD, "markdown", "0", "no steps", 0.0, dict.fromkeys(CRITERIA, 0.5), leaks, "k", "c"),
                  Candidate("", reason="error: HTTP 500"), Candidate("  ", None, "empty"))  # fmt: skip
    problem = Problem("p1", "Was ist ½ + ½? 你好\n", "1", solution="\\boxed{1} \u2028 \"quoted\"", family="algebra")
    return Extraction(problem, candidates, 0, status, ("scores missing: 2 for 3", "x"), "Score: [0]", "model")


@pytest.mark.parametrize("status", STATUSES)
def test_an_extraction_survives_its_line(status: str):
    found = full(status)
    line = json.dumps(to_row(found), ensure_ascii=False)
    assert "\n" not in line and from_row(json.loads(line)) == found
    found = Extraction(Problem("p2", "q", ""), (), None, status)
    assert from_row(json.loads(json.dumps(to_row(found)))) == found and found.best is None


def test_the_retained_strategy_stands_on_top_of_the_line_where_training_reads_it():
    row = json.loads(json.dumps(to_row(full())))
    assert (row["id"], row["status"]) == ("p1", "kept") and strategy_of_row(row, "") == GOOD


@pytest.mark.parametrize(("change", "told"), [
    ({"status": "done"}, ["status", "'done'", "kept", "leaking"]), ({"status": None}, ["status"]),
    ({"id": ""}, ["id"]), ({"prompt": 3}, ["prompt", "3"]),
    ({"chosen": 3}, ["chosen", "3", "3 candidates"]), ({"chosen": -1}, ["chosen", "-1"]),
    ({"chosen": True}, ["chosen", "True"]), ({"chosen": "0"}, ["chosen", "'0'"]),
    ({"notes": "one text"}, ["notes"]), ({"candidates": 3}, ["candidates"]),
    ({"candidates": ["text"]}, ["candidates[0]", "object"]),
    ({"candidates": [{"text": "x", "scor": 1}]}, ["candidates[0]", "scor", "unknown field", "score"]),
    ({"candidates": [{"reason": "no text"}]}, ["candidates[0]", "text"]),
    ({"candidates": [{"text": "x", "score": "high"}]}, ["candidates[0]", "score", "high"]),
    ({"candidates": [{"text": "x", "criteria": [1]}]}, ["candidates[0]", "criteria"]),
    ({"candidates": [{"text": "x", "strategy": {"strategy": "s"}}]}, ["candidates[0].strategy", "steps"]),
    ({"candidates": [{"text": "x", "leaks": [{"start": 1}]}]}, ["candidates[0]", "leaks"]),
    ({"candidates": [{"text": "x", "leaks": 3}]}, ["candidates[0]", "leaks"]),
])  # fmt: skip
def test_a_faulty_field_of_a_line_is_named(change: dict[str, Any], told: list[str]):
    row = json.loads(json.dumps(to_row(full()))) | ({"chosen": None} if "candidates" in change else {})
    with pytest.raises(ValueError) as caught:
        from_row(row | change)
    assert all(part in str(caught.value) for part in told)


def test_the_quality_is_the_mean_of_all_four_criteria():
    ratings = dict(zip(CRITERIA, (1.0, 0.5, 0.25, 0.0), strict=True))
    assert math.isclose(Candidate("x", criteria=ratings).quality or 0, 0.4375)
    assert Candidate("x").quality is None
    assert Candidate("x", criteria={"type": 1.0, "strategy": 1.0, "steps": 1.0}).quality is None

"""Both groups of a problem for a reader."""

from __future__ import annotations

import re

import pytest

from sgpo_lib.config import MethodConfig
from sgpo_lib.groups_view import group_html, guidance_by_family, guidance_frame
from sgpo_lib.records import Problem, Rollout, RolloutGroup, Strategy, Verdict
from sgpo_lib.widgets.token_kl.ramps import contrast

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"></div></td>&amp;'
RIGHT, WRONG = Verdict("correct", 1.0, answer="9"), Verdict("wrong", 0.0, answer="8")


def rollout(verdict: Verdict | None, text: str = "work", guided: bool = False, stop: str = "end") -> Rollout:
    return Rollout("p", guided, 0, (1,), (1, 2, 3), text, stop, verdict=verdict)


def group(autonomous: list[Verdict], guided: list[Verdict], family: str = "sums", name: str = "p") -> RolloutGroup:
    problem = Problem(name, "4 + 5?", "9", strategy=Strategy("Sums", "Add", ("Read", "Add")), family=family)
    return RolloutGroup(problem, [rollout(v) for v in autonomous], [rollout(v, guided=True) for v in guided])


def test_responses_stand_beside_each_other_with_their_verdicts():
    shown = group_html(group([RIGHT, WRONG, WRONG], [RIGHT] * 5), most=3)
    autonomous, guided = shown.split("<td")[1:]
    assert "1 of 3 correct" in autonomous and autonomous.count("wrong, answer 8, 3 tokens") == 2
    assert "5 of 5 correct, 2 more not shown" in guided and guided.count("correct, answer 9") == 3
    assert "(a) Read<br>(b) Add" in shown and "4 + 5?" in shown
    long = rollout(Verdict("unverifiable", 0.0, "no_answer"), "x" * 900, stop="length")
    cut = RolloutGroup(Problem("p", "q", "1"), [long], [])
    told = group_html(cut, characters=100)
    assert "unverifiable (no_answer), 3 tokens, cut off" in told and f"{'x' * 50} [...] {'x' * 50}<" in told
    with pytest.raises(ValueError, match="not been judged yet"):
        group_html(RolloutGroup(Problem("p", "q", "1"), [rollout(None)], []))


def test_model_text_stays_text():
    problem = Problem("p", HOSTILE, "9", strategy=Strategy(HOSTILE, HOSTILE, (HOSTILE, "b")), family=HOSTILE)
    verdict = Verdict("wrong", 0.0, HOSTILE, HOSTILE)
    shown = group_html(RolloutGroup(problem, [rollout(verdict, HOSTILE)], [rollout(verdict, HOSTILE, True)]))
    assert set(re.findall(r"<\s*([a-z]+)", shown)) == {"div", "b", "br", "table", "tr", "td", "span"}
    assert shown.count("<td") == shown.count("</td>") == 2 and shown.count("<div") == shown.count("</div>")


def test_text_that_could_reorder_its_neighbours_stands_as_a_code():
    """A right-to-left override in an answer would otherwise turn the rest of the line around."""
    verdict = Verdict("wrong", 0.0, answer="\u202e9")
    shown = group_html(RolloutGroup(Problem("p", "\u2066q", "1"), [rollout(verdict, "a\u202eb\nc")], []))
    assert "answer [U+202E]9, 3 tokens" in shown and "a[U+202E]b\nc<" in shown and "[U+2066]q" in shown
    assert not set("\u202e\u2066") & set(shown)


def test_verdicts_can_be_read_on_light_and_dark_pages():
    """Their colours are mixed with the page's own text colour: contrast at least 4.5 (WCAG AA) on both."""
    shown = group_html(group([RIGHT, WRONG, Verdict("unverifiable", 0.0)], [RIGHT]))
    found = re.findall(r"color:color-mix\(in srgb, (#\w{6}) (\d+)%, var\(--jp-ui-font-color1", shown)
    assert len(found) == 4
    for colour, percent in found:
        share = int(percent) / 100
        for ink, paper in (("#212121", "#ffffff"), ("#ffffff", "#111111")):
            parts = [share * int(colour[i : i + 2], 16) + (1 - share) * int(ink[i : i + 2], 16) for i in (1, 3, 5)]
            assert contrast("#" + "".join(f"{round(part):02x}" for part in parts), paper) >= 4.5, (colour, paper)


def test_gain_and_weight_of_a_problem_by_hand():
    frame = guidance_frame([group([RIGHT, WRONG, WRONG, WRONG], [RIGHT, RIGHT, RIGHT, WRONG]),
                            group([WRONG] * 4, [WRONG] * 4), group([RIGHT] * 4, [WRONG] * 4)],
                           MethodConfig())  # fmt: skip
    assert frame["p_auto"].tolist() == [0.25, 0.0, 1.0] and frame["gain"].tolist() == [0.5, 0.0, -1.0]
    assert frame["alpha"].tolist() == pytest.approx([0.8, 0.0, 0.0])  # .5 (.5 + .1) / .35 = .857, held at .8; no target
    assert (frame["p_auto_low"] <= frame["p_auto"]).all() and (frame["p_guide"] <= frame["p_guide_high"]).all()


def test_families_in_order_of_their_gain_and_all_of_them():
    groups = [group([WRONG] * 2, [RIGHT] * 2, "helped", str(i)) for i in range(6)]
    groups += [group([RIGHT, WRONG], [RIGHT, WRONG], "level", str(i)) for i in range(6)]
    groups += [group([RIGHT] * 2, [WRONG, RIGHT], "", str(i)) for i in range(6)]
    table = guidance_by_family(guidance_frame(groups, MethodConfig()))
    assert table.index.tolist() == ["helped", "level", "no family", "all"]
    assert table["problems"].tolist() == [6, 6, 6, 18]
    assert table["gain"].tolist() == pytest.approx([1.0, 0.0, -0.5, 1 / 6])
    assert ((table["low"] <= table["gain"]) & (table["gain"] <= table["high"])).all()
    assert table.loc["helped", "low"] > 0 > table.loc["level", "low"]

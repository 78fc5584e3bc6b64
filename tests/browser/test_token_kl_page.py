"""The KL microscope's exported page in a real browser without a network.

Each test opens a page of its own from readings made in plain float64 loops (`readings_of`), and compares what is shown
with what follows from the table.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_token_kl_widget import readings_of

from sgpo_lib.analysis import step_of_tokens
from sgpo_lib.readings import TokenReadings
from sgpo_lib.widgets.token_kl import METRICS, Pane, TokenKL, ramps

pytestmark = pytest.mark.browser
TEXT = """The last two digits of 7^12 are asked for. We work modulo 100: powers of 7 have a short cycle.

1. First, 7^2 = 49 and 7^4 = 2401, which leaves 1.
2. So the cycle has length 4; the value is 3.5 times nothing.

Hence the answer is 01.
"""


def tokens_of(text: str) -> list[str]:
    """Words with the space in front, single digits and marks, runs of line ends."""
    return re.findall(r"\n+| ?[A-Za-z]+| ?\d|.", text)


def some_panes() -> list[Pane]:
    """A correct target at three checkpoints, a correct guided response, a wrong autonomous one."""
    tokens, other = tokens_of(TEXT), tokens_of(TEXT.replace("modulo 100", "by hand"))
    frames = [readings_of(tokens, 1, noise=n, label=f"step {s}") for s, n in ((0, 0.5), (10, 0.3), (40, 0.05))]
    return [Pane("guided 0", frames, "guided", True, True),
            Pane("guided 1", [readings_of(other, 2, label="")], "guided", True),
            Pane("autonomous 3", [readings_of(tokens[:40], 3, label="")], "autonomous", False)]


@pytest.fixture
def page(offline: Any) -> Any:
    """A page with the network off."""
    return offline


def opened(page: Any, widget: TokenKL, folder: Path) -> None:
    """The widget's exported page, with steps cut. Messages to Python are counted in `window.sent`."""
    page.goto(widget.to_html(folder / "page.html").as_uri())
    page.wait_for_selector(".sgpo-kl .column")
    page.evaluate("""() => { window.sent = []; const m = window.sgpoModel;
      m.save_changes = () => window.sent.push([performance.now(), m.get("delta"), m.get("selected")]); }""")


def until(page: Any, condition: str) -> None:
    """Wait for an expression; the page's policy lets Playwright's own waiting evaluate none."""
    for _ in range(60):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"did not happen in time: {condition}")


def control(name: str) -> str:
    return f'.sgpo-kl [data-control="{name}"]'


def classes(page: Any, pane: int = 0) -> list[list[str]]:
    """Classes of each token of the n-th response that is shown."""
    return page.evaluate("n => [...document.querySelectorAll('.response')[n].querySelectorAll('.t')]"
                         ".map(t => [...t.classList])", pane)


def level(value: float, kind: str, most: float) -> str:
    """Class that a value has on a square-root scale, from the definition."""
    if kind == "agreement":
        return "" if value else "d1"
    share = math.sqrt(min(1.0, abs(value) / most))
    if kind == "diverging":
        step = math.floor(share * ramps.SIGNED_LEVELS + 0.5)
        return f"{'p' if value > 0 else 'n'}{step}" if step else ""
    step = math.floor(share * ramps.LEVELS + 0.5)
    return f"s{step}" if step else ""


def test_every_token_has_the_colour_of_its_value(page, tmp_path):
    """Every metric: the class of every token follows from the table; the outline from delta and forward KL."""
    frame = some_panes()[1].frames[0]
    opened(page, TokenKL(frame, delta=0.7), tmp_path)
    for name, metric in METRICS.items():
        page.select_option(control("metric"), name)
        values = frame.table[name].astype(float)
        expected = [{"t", level(v, metric.kind, values.abs().max()), "over" if kl > 0.7 else ""} - {""}
                    for v, kl in zip(values, frame.table["forward_kl"], strict=True)]
        wrong = [i for i, pair in enumerate(zip(map(set, classes(page)), expected, strict=True)) if pair[0] != pair[1]]
        assert len(wrong) <= 1, (name, wrong)  # a value may lie on the border between two levels
        until(page, f"window.sgpoModel.get('metric') === '{name}'")


def test_delta_outlines_counts_and_reaches_python(page, tmp_path):
    """Slider, field and infinity: the share, the outlines, at most about ten messages a second, and the last one."""
    frame = some_panes()[0].frames[0]
    kl = frame.table["forward_kl"].to_numpy()
    opened(page, TokenKL(frame), tmp_path)
    for text, delta in (("0.25", 0.25), ("0", 0.0), ("inf", math.inf), ("1,5", 1.5)):
        page.fill(control("delta-value"), text)
        over = kl > delta
        share = f"{int(over.sum())} of {len(kl)} tokens masked"
        mass = 100 * kl[over].sum() / kl.sum()
        told = page.inner_text(control("share"))
        assert told.startswith(share), (told, share)
        assert abs(float(re.search(r"([\d.]+)% of the KL", told).group(1)) - mass) < 0.06
        assert [("over" in c) for c in classes(page)] == over.tolist()
    page.fill(control("delta-value"), "-1")
    assert "wrong" in page.get_attribute(control("delta-value"), "class")
    page.locator(control("delta-value")).blur()
    assert page.input_value(control("delta-value")) == "1.5"
    page.click(control("delta-none"))
    page.wait_for_timeout(150)
    assert page.evaluate("window.sgpoModel.get('delta')") == "inf"
    page.evaluate("window.sent.length = 0")
    slider = page.locator(control("delta")).bounding_box()
    y = slider["y"] + slider["height"] / 2
    page.mouse.move(slider["x"] + 5, y)
    page.mouse.down()
    for k in range(60):
        page.mouse.move(slider["x"] + 5 + 2 * k, y)
        page.wait_for_timeout(8)
    page.mouse.up()
    page.wait_for_timeout(250)
    sent = page.evaluate("window.sent")
    gaps = np.diff([s[0] for s in sent])
    assert len(sent) >= 2 and gaps.min() > 80, gaps
    shown = float(page.input_value(control("delta-value")))
    assert abs(sent[-1][1] - shown) <= 1e-5 * shown
    assert [("over" in c) for c in classes(page)] == (kl.astype("f4") > sent[-1][1]).tolist()
    page.evaluate("window.sgpoModel.set('delta', 0.5)")  # from Python
    assert [("over" in c) for c in classes(page)] == (kl > 0.5).tolist()
    assert page.input_value(control("delta-value")) == "0.5"


def details(page: Any) -> dict[str, str]:
    """First column -> the rest, of the tables in the details."""
    rows = page.evaluate("[...document.querySelectorAll('.details tr')].filter(r => !r.hidden)"
                         ".map(r => [...r.cells].map(c => c.textContent))")
    return {row[0]: " ".join(row[1:]) for row in rows}


def same(text: str, value: float) -> bool:
    """Whether a number in the page is this one, to the digits that it has."""
    plain = text.replace("−", "-").replace("+", "")
    digits = len(plain.split("e")[0].partition(".")[2])
    size = 10.0 ** int(plain.partition("e")[2] or 0)
    return abs(float(plain) - value) <= 0.6 * size * 10.0**-digits


def test_hovering_shows_both_sides_and_their_alternatives(page, tmp_path):
    """Details of a token: every number follows from the table; the contributions and the rest add up to the KL."""
    pane = some_panes()[1]
    frame = pane.frames[0]
    opened(page, TokenKL([pane]), tmp_path)
    assert "not known" not in details(page), "a row for served models alone"
    for i in (3, 17, 40):
        page.locator(".t").nth(i).hover()
        row, told = frame.table.iloc[i], details(page)
        guided, unguided = told["probability"].split()
        assert same(guided, math.exp(row.guided_logp)) and same(unguided, math.exp(row.unguided_logp))
        assert told["rank"].split() == [str(row.guided_rank), str(row.unguided_rank)]
        guided, unguided = told["entropy"].split()
        assert same(guided, row.guided_entropy) and same(unguided, row.unguided_entropy)
        assert same(told["forward KL"], row.forward_kl) and same(told["reverse KL"], row.reverse_kl)
        assert same(told["SFT loss"], row.sft_loss) and same(told["log-ratio"], row.log_ratio)
        assert told["same top-1"] == ("yes" if row.top1_agree else "no")
        check_alternatives(page, frame, i)
        assert f"token {i} of 0–{pane.tokens - 1}" in page.inner_text(".details .place")
        assert f"step {step_of_tokens(frame.table['token'].tolist())[i] + 1} of" in page.inner_text(".details .place")
        assert page.locator(".column.lit").count() == 1


def check_alternatives(page: Any, frame: TokenReadings, i: int) -> None:
    rows = page.evaluate("[...document.querySelectorAll('.alternatives tbody tr')].filter(r => !r.hidden)"
                         ".map(r => [...r.cells].map(c => c.textContent))")
    span = slice(frame.offset_N1[i], frame.offset_N1[i + 1])
    guided, unguided = frame.guided_logp_M[span].astype(float), frame.unguided_logp_M[span].astype(float)
    assert len(rows) == len(guided) + 1 and rows[-1][0] == "all others"
    part = np.exp(guided) * (guided - unguided)
    for row, p, q, gain in zip(rows, np.exp(guided), np.exp(unguided), part, strict=False):
        assert same(row[1], p) and same(row[2], q) and same(row[3], gain), row
    assert same(rows[-1][3], frame.table["forward_kl"][i] - part.sum())


def test_keys_move_jump_and_search(page, tmp_path):
    """One tab stop; arrows, ends, steps, lines; selection by Shift; the n-th largest KL; search."""
    pane = some_panes()[0]
    kl = pane.frames[0].table["forward_kl"].to_numpy()
    opened(page, TokenKL([pane]), tmp_path)
    assert page.locator(".t[tabindex]").count() == 1
    page.locator(".t[tabindex]").focus()
    now = "document.activeElement.token"
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", pane.tokens - 1), ("Home", 0)):
        page.keyboard.press(key)
        assert page.evaluate(now) == place, key
    page.keyboard.press("PageDown")
    assert page.evaluate(now) == step_of_tokens(pane.frames[0].table["token"].tolist()).index(1)
    page.keyboard.press("PageUp")
    before = page.locator(".t").nth(0).bounding_box()
    page.keyboard.press("ArrowDown")
    after = page.locator(".t").nth(page.evaluate(now)).bounding_box()
    assert after["y"] > before["y"]
    page.keyboard.press("ArrowUp")
    assert page.evaluate(now) == 0
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    page.wait_for_timeout(150)
    assert page.evaluate("window.sgpoModel.get('selected')") == {"pane": 0, "start": 0, "end": 4}
    assert page.locator(".t[data-selected]").count() == 4
    page.keyboard.press("Escape")
    page.wait_for_timeout(150)
    assert page.evaluate("window.sgpoModel.get('selected')") == {} and page.locator(".t[data-selected]").count() == 0
    largest = np.argsort(-kl, kind="stable")
    for key, rank in (("n", 0), ("n", 1), ("n", 2), ("p", 1)):
        page.keyboard.press(key)
        assert page.evaluate(now) == largest[rank]
    assert "probability guided" in page.locator(".details [aria-live]").inner_text(timeout=1000)
    page.keyboard.press("/")
    page.keyboard.type("CYCLE")
    assert page.locator(".t[data-hit]").count() == 0  # capitals count where there are some
    page.keyboard.press("Control+a")
    page.keyboard.type("cycle")
    assert page.inner_text(".bar output >> nth=2") == "1 of 2" and page.locator(".t[data-hit-now]").count() == 1
    page.keyboard.press("Enter")
    assert page.inner_text(".bar output >> nth=2") == "2 of 2"
    assert page.evaluate("[...document.querySelectorAll('.sgpo-kl :is(button, input, select, [tabindex])')]"
                         ".every(n => n.closest('[data-lm-suppress-shortcuts]') && n.dataset.lmSuppressShortcuts)")


def test_a_brush_selects_a_span(page, tmp_path):
    """Drag over tokens, in either direction; a click selects one; Shift+click extends; Python's selection is shown."""
    opened(page, TokenKL(some_panes()[:1]), tmp_path)
    selected = "window.sgpoModel.get('selected')"

    def middle(i: int) -> tuple[float, float]:
        box = page.locator(".t").nth(i).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    for start, end in ((4, 9), (12, 7)):
        page.mouse.move(*middle(start))
        page.mouse.down()
        page.mouse.move(*middle((start + end) // 2))
        page.mouse.move(*middle(end))
        page.mouse.up()
        assert page.evaluate(selected) == {"pane": 0, "start": min(start, end), "end": max(start, end) + 1}
    page.mouse.click(*middle(2))
    assert page.evaluate(selected) == {"pane": 0, "start": 2, "end": 3}
    page.keyboard.down("Shift")
    page.mouse.click(*middle(6))
    page.keyboard.up("Shift")
    assert page.evaluate(selected) == {"pane": 0, "start": 2, "end": 7}
    assert page.evaluate("String(getSelection())") == ""
    page.evaluate("window.sgpoModel.set('selected', {pane: 0, start: 20, end: 22})")
    assert page.locator(".t[data-selected]").count() == 2


def test_steps_and_their_bars(page, tmp_path):
    """Segmentations; a faulty and a slow expression are told; bars and text point at each other."""
    pane = some_panes()[0]
    tokens = pane.frames[0].table["token"].tolist()
    opened(page, TokenKL([pane]), tmp_path)
    steps = "[...document.querySelectorAll('.t[data-begins]')].map(t => t.token)"
    of = step_of_tokens(tokens)
    assert page.evaluate(steps) == [of.index(s) for s in range(1, max(of) + 1)]
    bars = page.evaluate("[...document.querySelectorAll('.column')].map(c => c.getAttribute('aria-label'))")
    for s, told in enumerate(bars):
        mean = pane.frames[0].table["forward_kl"][np.array(of) == s].mean()
        assert same(re.search(r"mean KL ([\d.e−]+)", told).group(1), mean)
    for mode, count in (("newline", 4), ("paragraph", 3), ("numbered", 3)):
        page.select_option(control("steps"), mode)
        until(page, f"document.querySelectorAll('.column').length === {count}")
    page.select_option(control("steps"), "pattern")
    page.fill(control("pattern"), "(?<=modulo|Hence)")
    until(page, "document.querySelectorAll('.column').length === 3")
    told = "document.querySelector('.bar .wrong[role=alert]').textContent"
    for wrong, right in (("((", "(?<=modulo|Hence)"), ("[", "Hence")):
        page.fill(control("pattern"), wrong)
        until(page, f"{told}.includes('nterminated')")
        page.fill(control("pattern"), right)
        until(page, f"{told} === ''")
    page.fill(control("pattern"), "(\\w+\\s?)+$(?!.)x|((a|[a-z])+)+[0-9]{9}")
    page.wait_for_timeout(900)  # may be slow or not; the page must answer
    page.fill(control("pattern"), "^(([a-zA-Z0-9=:;.^ ])+)+#")
    until(page, f"{told}.includes('no result within')")
    page.select_option(control("steps"), "newline")
    until(page, "document.querySelectorAll('.column').length === 4")
    assert page.evaluate(told) == ""
    page.locator(".column").nth(2).hover()
    lit = page.evaluate("[...document.querySelectorAll('.t[data-lit]')].map(t => t.textContent).join('')")
    assert lit.startswith("2. So the cycle"), lit
    page.locator(".column").nth(3).click()
    assert "Hence" in page.inner_text(".bars .told")


def test_two_responses_and_checkpoints(page, tmp_path):
    """Two responses beside each other; the target's mark; checkpoints recolour the same spans on one scale."""
    panes = some_panes()
    opened(page, TokenKL(panes), tmp_path)
    total = panes[0].frames[0].table["unguided_logp"].sum()
    tags = page.inner_text(".response .tags")
    assert "reachable target" in tags and f"{total:.1f}".replace("-", "−") in tags and "correct" in tags
    page.select_option(control("compare"), "2")
    assert page.locator(".response").count() == 2 and "wrong" in page.locator(".tags").nth(1).inner_text()
    assert page.locator(".strip").count() == 2
    page.evaluate("window.first = document.querySelector('.t')")
    before = page.evaluate("document.querySelector('.t:nth-child(5)').getBoundingClientRect().left")
    page.locator(control("frame")).fill("2")
    most = max(f.table["forward_kl"].max() for pane in (panes[0], panes[2]) for f in pane.frames)
    values = panes[0].frames[2].table["forward_kl"]
    wrong = [i for i, (c, v) in enumerate(zip(classes(page), values, strict=True))
             if {k for k in c if k[0] == "s"} != {level(v, "sequential", most)} - {""}]
    assert len(wrong) <= 1 and page.evaluate("window.first === document.querySelector('.t')")
    assert before == page.evaluate("document.querySelector('.t:nth-child(5)').getBoundingClientRect().left")
    assert "step 40" in page.inner_text(".tags >> nth=0")
    page.locator(".response >> nth=1").locator(".t").nth(3).click()
    assert page.evaluate("window.sgpoModel.get('selected')") == {"pane": 2, "start": 3, "end": 4}
    assert "autonomous 3" in page.inner_text(".details .place")
    page.mouse.move(5, 5)
    page.select_option(control("compare"), "-1")
    assert page.inner_text(".details .place") == "" and page.locator(".alternatives tbody tr").count() == 0
    page.select_option(control("pane"), "1")
    assert page.locator(".response b").first.inner_text() == "guided 1"

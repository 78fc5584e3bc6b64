"""The KL microscope's exported page at its edges: hostile text, long names, narrow windows."""

from __future__ import annotations

import numpy as np
import pytest
from test_token_kl_page import TEXT, control, opened, tokens_of
from test_token_kl_widget import HOSTILE, readings_of

from sgpo_lib.widgets.token_kl import Pane, TokenKL

pytestmark = pytest.mark.browser


def test_hostile_text_stays_text(offline, tmp_path):
    """Texts that try to run or to reorder their neighbours are shown, in the text, the details, labels and bars."""
    page = offline
    opened(page, TokenKL([Pane(HOSTILE[0], [readings_of(HOSTILE, label=HOSTILE[3])], HOSTILE[2], True, True),
                          Pane(HOSTILE[4], [readings_of(HOSTILE[::-1])])], title=HOSTILE[0]), tmp_path)
    page.select_option(control("compare"), "1")
    page.evaluate("document.querySelectorAll('.t').forEach("
                  "t => t.dispatchEvent(new MouseEvent('mouseover', {bubbles: true})))")
    page.check(control("spaces"))
    page.fill(control("search"), "<script>")
    page.wait_for_timeout(200)
    text = page.evaluate("document.querySelector('.text').textContent")
    assert "<script>window.pwned=1</script>" in text and "U+202E" in text and "\u202e" not in text
    assert page.evaluate("window.pwned === undefined && !document.querySelector('img, iframe, object, svg, a, base')")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", [1300, 700])
def test_long_names_and_narrow_windows_keep_controls_in_sight(offline, tmp_path, width):
    """No control is cut off by the widget's edge; buttons that belong together stay on a line."""
    page = offline
    page.set_viewport_size({"width": width, "height": 1000})
    frame = readings_of(tokens_of(TEXT), 1, label="")
    panes = [Pane(f"{name} {'verylongname' * 20}", [frame]) for name in ("one", "two")]
    opened(page, TokenKL(panes, title="T" * 300), tmp_path)
    page.select_option(control("compare"), "1")
    cut = page.evaluate("""() => { const edge = document.querySelector('.sgpo-kl').getBoundingClientRect().right;
      return [...document.querySelectorAll('.sgpo-kl .bar *')].filter(n => n.getBoundingClientRect().right > edge)
        .map(n => n.outerHTML.slice(0, 80)); }""")
    assert cut == []
    for pair in (("search-previous", "search-next"), ("peak-previous", "peak-next")):
        assert len({page.locator(control(name)).bounding_box()["y"] for name in pair}) == 1


def test_the_top_five_of_both_sides_can_be_seen_at_once(offline, tmp_path):
    """Eleven alternatives and all others, beside one response and below two, without scrolling."""
    page = offline
    frame = next(f for f in (readings_of(tokens_of(TEXT), seed, top=5, noise=9.0) for seed in range(9))
                 if np.diff(f.offset_N1).max() == 11)
    i = int(np.diff(frame.offset_N1).argmax())
    opened(page, TokenKL([Pane("a", [frame]), Pane("b", [frame])]), tmp_path)
    for beside in ("-1", "1"):
        page.select_option(control("compare"), beside)
        page.locator(".response").first.locator(".t").nth(i).hover()
        assert page.locator(".alternatives tbody tr:visible").count() == 12
        assert page.evaluate("(n => n.scrollHeight <= n.clientHeight)(document.querySelector('.details'))")

"""The run monitor's page in a real browser, over a model that is nothing but a dictionary."""

from __future__ import annotations

import json

import pytest
from test_run_monitor import HOSTILE, begun, quiet, row

from sgpo_lib.widgets.run_monitor import RunMonitor

pytestmark = pytest.mark.browser
PAGE = """<!doctype html><meta charset="utf-8"><style>%s</style><body style="%s"><div id="here"></div>
<script type="module">%s
const state = %s, heard = {};
window.model = {sent: [], saved: [], get: (k) => state[k], send: (m) => window.model.sent.push(m),
  set: (k, v) => { state[k] = v; window.model.fire("change:" + k); },
  save_changes: () => window.model.saved.push({...state}),
  on: (n, f) => { (heard[n] ??= []).push(f); }, off: (n, f) => { heard[n] = heard[n].filter((g) => g !== f); },
  fire: (n, ...a) => { (heard[n] ?? []).forEach((f) => f(...a)); }};
widget.initialize({model});
const began = performance.now();
window.end = widget.render({model, el: document.getElementById("here")});
window.took = performance.now() - began;
window.heard = heard;
</script>"""
"""The widget over a model that is nothing but a dictionary."""
DARK = "background:#111;--jp-layout-color1:#111;--jp-layout-color2:#1c1c1c;--jp-ui-font-color1:#eee;" \
       "--jp-ui-font-color2:#bbb;--jp-border-color2:#555"  # fmt: skip


def page_of(monitor: RunMonitor, style: str = "") -> str:
    state = {k: v for k, v in monitor.get_state().items() if not k.startswith("_") and k not in ("layout", "tooltip")}
    script = str(RunMonitor._esm).replace("export default", "const widget =")
    return PAGE % (RunMonitor._css, style, script, json.dumps(state).replace("<", "\\u003c"))


@pytest.fixture
def monitor_page(browser):
    opened = browser.new_page(viewport={"width": 1100, "height": 900})
    opened.errors = []
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.on("request", lambda r: opened.errors.append(r.url) if r.url != "about:blank" else None)
    yield opened
    assert opened.errors == [] and opened.evaluate("window.pwned") is None
    opened.close()


@pytest.mark.parametrize("style", ["", DARK])
def test_the_page(monitor_page, tmp_path, style):
    """Values follow pointer, slider and keys; names stay text; nothing is left behind."""
    page = monitor_page
    begun(tmp_path, "a", row(0, "eval", accuracy=0.1), *(row(i, alpha=i / 10, loss=i - 2) for i in range(1, 6)),
          row(4, "eval", accuracy=0.5), row(5, "test", accuracy=0.75))
    folder = begun(tmp_path, HOSTILE, *(row(i, alpha=1.0) for i in range(1, 4)))
    (folder / "FAILED.json").write_text(json.dumps({"error": "E", "message": HOSTILE}))
    page.set_content(page_of(quiet(["a", folder, "c"], root=tmp_path, wait=True, title=HOSTILE), style))
    box = page.locator(".sgpo-monitor")
    assert ("dark" in box.get_attribute("class")) == bool(style)
    colours = box.locator(".bar :is(select, button)").evaluate_all("n => n.map(e => getComputedStyle(e).color)")
    assert len(set(colours)) == 1, "a menu that can be used looks like one"
    rows = box.locator(".runs tbody tr").all_inner_texts()
    assert "5 of 40" in rows[0] and "0.75" in rows[0] and HOSTILE in rows[1] and HOSTILE in rows[2]
    assert box.locator("img, script, a, iframe").count() == 0
    alpha = box.locator(".panel", has_text="Weight α(q)")
    values = lambda panel: " ".join(" ".join(panel.locator(".values b, small").all_inner_texts()).split())  # noqa: E731
    assert values(alpha) == "0.5 1 –"
    assert box.locator(".panel", has_text="Pass rate").count() == 0, "no values, not asked for"
    slider = box.get_by_label("step whose values are shown")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("model.saved.length === 1 && model.get('selected_step') === 4")
    assert values(alpha) == "0.4 – –"
    assert values(box.locator(".panel", has_text="Validation accuracy")) == "0.5 – –"
    page.keyboard.press("Escape")
    page.wait_for_function("model.get('selected_step') === null")
    plot = alpha.locator("svg")
    width = plot.bounding_box()["width"]
    plot.hover(position={"x": 42 + (width - 58) * 2 / 5, "y": 60})
    accuracy = box.locator(".panel", has_text="Validation accuracy")
    assert values(alpha) == "0.2 1 –" and values(accuracy).startswith("0.1 at 0")
    assert alpha.locator(".cursor circle").count() == 2 and alpha.locator(".cursor line").count() == 1
    assert "Weight α(q), mean over problems over training step. a: 0.2 at step 2" in plot.get_attribute("aria-label")
    plot.click(position={"x": 42 + (width - 58) * 2 / 5, "y": 60})
    box.get_by_role("button", name="numbers").click()
    assert "Values at step 2" in box.locator(".numbers").inner_text()
    box.locator("label", has_text="log losses").locator("input").check()
    loss = box.locator(".panel", has=page.get_by_text("Loss", exact=True))
    loss.get_by_text("2 values ≤ 0 not shown on a logarithmic axis").wait_for(timeout=5000)
    for name, key in (("axis", "seconds"), ("running mean", "5")):
        box.locator("label", has_text=name).locator("select").select_option(key)
    page.wait_for_function("document.querySelector('.axis').textContent.includes('mean of the last 5 training rows')")
    assert "time in training steps" in box.locator(".axis").inner_text()
    box.locator("button.run").first.click()
    page.wait_for_function("document.querySelectorAll('.runs tr.off').length === 1")
    focusable = box.locator("button, select, input").all()
    assert all(n.get_attribute("data-lm-suppress-shortcuts") for n in [box, *focusable]) and len(focusable) >= 9
    page.evaluate("end()")
    assert page.evaluate("Object.entries(heard).filter(([n]) => n !== 'msg:custom' && n !== 'change:rows')"
                         ".every(([, f]) => f.length === 0)")


def test_appended_rows_move_the_curves_and_a_lost_message_is_asked_for(monitor_page, tmp_path):
    page = monitor_page
    folder = begun(tmp_path, "a", row(1, alpha=0.5), row(2, alpha=0.25))
    page.set_content(page_of(quiet("a", root=tmp_path, metrics=["alpha", "lr"])))
    before = page.locator(".panel path").first.get_attribute("d")
    piece = {"run": 0, "epoch": 0, "table": "train", "from": 2,
             "columns": {"step": [3], "tokens_total": [300], "seconds_total": [6.0], "alpha": [0.75], "lr": [None]}}
    page.evaluate("(p) => model.fire('msg:custom', {kind: 'rows', pieces: [p]})", piece)
    page.wait_for_function("document.querySelector('.values b').innerText === '0.75'")
    assert page.locator(".panel path").first.get_attribute("d") != before
    assert "no values" in page.locator(".panel").nth(1).inner_text()
    page.evaluate("(p) => model.fire('msg:custom', {kind: 'rows', pieces: [p]})", {**piece, "from": 7})
    page.wait_for_function("JSON.stringify(model.sent) === '[{\"kind\":\"missing\"}]'")
    assert folder.exists()


def test_warnings_stand_below_their_run(monitor_page, tmp_path):
    """What a collapse watch says, in the colour of warnings, and told to who listens when it comes."""
    page = monitor_page
    begun(tmp_path, "a", *(row(i, length_limit_share=1.0) for i in range(1, 6)))
    begun(tmp_path, "b", row(1, alpha=1.0))
    page.set_content(page_of(quiet(["a", "b"], root=tmp_path)))
    lines = page.locator(".runs tbody tr")
    assert lines.count() == 3 and "100% of the responses were cut at the length limit" in lines.nth(1).inner_text()
    cell = lines.nth(1).locator("td.warning")
    assert cell.evaluate("e => getComputedStyle(e).color") == "rgb(138, 90, 0)" and cell.get_attribute("colspan") == "6"
    page.evaluate("""() => { const [a, b] = model.get("state");
      model.set("state", [{...a, warnings: []}, {...b, warnings: ["since step 2: <i>news</i>"]}]); }""")
    page.wait_for_function("document.querySelector('.news').textContent.includes('warning, since step 2: <i>news</i>')")
    assert page.locator(".runs td.warning").all_inner_texts() == ["Warning, since step 2: <i>news</i>."]


def test_a_long_run_is_drawn_fast(monitor_page, tmp_path):
    page = monitor_page
    begun(tmp_path, "a", *(row(i, **dict.fromkeys(("alpha", "loss", "entropy", "kl_mean", "reward_guided",
                                                   "reward_autonomous"), (i * 7919) % 1009)) for i in range(20_000)))
    page.set_content(page_of(quiet("a", root=tmp_path)))
    page.wait_for_function("document.querySelectorAll('.panel path').length >= 6")
    assert page.evaluate("window.took") < 2000
    sizes = page.evaluate("[...document.querySelectorAll('path')].map((p) => p.getAttribute('d').length)")
    assert max(sizes) < 2000 * 16

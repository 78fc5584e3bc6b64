"""The KL microscope without a browser: its payload, its ramps, its static view, its exported page, its traits."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html.parser
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import traitlets

from sgpo_lib.escaping import json_html
from sgpo_lib.readings import TokenReadings
from sgpo_lib.widgets.token_kl import _PARTS, Pane, TokenKL, _source, _style, payload, ramps, static
from sgpo_lib.widgets.token_kl.metrics import METRICS
from sgpo_lib.widgets.token_kl.static import static_html

HOSTILE = [
    "<script>window.pwned=1</script>", "</script><script>window.pwned=1</script>", "</style><script>pwned</script>",
    "<img src=x onerror='window.pwned=1'>", '"><img src=x onerror=window.pwned=1>', "</textarea><script>x</script>",
    "</title><script>window.pwned=1</script>", "<!--<script>", "-->", "<![CDATA[", "]]>", "<svg onload=window.pwned=1>",
    "<iframe src=javascript:window.pwned=1>", "javascript:window.pwned=1", "<a href='javascript:window.pwned=1'>x</a>",
    "<math><mtext></mtext><script>x</script></math>", "<base href='http://127.0.0.1:9/'>",
    "<link rel=stylesheet href=http://127.0.0.1:9/x.css>", "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9'>",
    "<object data=http://127.0.0.1:9></object>", "<style>@import 'http://127.0.0.1:9';</style>",
    "' style='background:url(http://127.0.0.1:9)", "\" onmouseover=\"window.pwned=1", "&lt;b&gt;", "&#60;script&#62;",
    "$\\href{javascript:window.pwned=1}{x}$", "\\htmlData{a=b}{y}", "\\includegraphics{http://127.0.0.1:9/x.png}",
    "\u202egpj.exe\u202c", "\u2066\u2069\u200f\u061c", "\u2028\u2029", "\x00\x07\x1b[31m", "${window.pwned=1}",
    "{{constructor.constructor('window.pwned=1')()}}", "A" * 20_000, "`${1}`", "</SCRIPT >", "\\u003cscript>",
]  # fmt: skip
"""Texts that try to run, to fetch, to break out of where they stand, or to reorder what is around them."""


def readings_of(texts: list[str], seed: int = 0, top: int = 3, noise: float = 1.0, pieces: list[str] | None = None,
                label: str = "guided 0", words: dict[int, str] | None = None) -> TokenReadings:  # fmt: skip
    """Readings of a response with these token texts, from random logits in float64 on both sides, in plain loops.

    The vocabulary is the texts themselves and as many others; token i of the response has id i.
    """
    rng = np.random.default_rng(seed)
    vocabulary = 2 * len(texts) + 4
    words = words or {**{v: f" w{v}" for v in range(vocabulary)}, **dict(enumerate(texts))}
    rows, offsets, ids, sides = [], [0], [], ([], [])
    for i in range(len(texts)):
        guided = rng.normal(0, 2, vocabulary)
        guided[i] += 4
        unguided = guided + noise * rng.normal(0, 1.5, vocabulary) * rng.exponential(1)
        g, u = guided - np.logaddexp.reduce(guided), unguided - np.logaddexp.reduce(unguided)
        kept = sorted({i, *np.argsort(-g)[:top].tolist(), *np.argsort(-u)[:top].tolist()}, key=lambda v: -g[v])
        ids += kept
        sides[0].extend(g[kept])
        sides[1].extend(u[kept])
        offsets.append(len(ids))
        rows.append({
            "token": texts[i], "token_id": i, "piece": (pieces or texts)[i], "forward_kl": float(np.exp(g) @ (g - u)),
            "reverse_kl": float(np.exp(u) @ (u - g)), "guided_logp": g[i], "unguided_logp": u[i], "sft_loss": -u[i],
            "log_ratio": g[i] - u[i], "guided_entropy": float(-np.exp(g) @ g),
            "unguided_entropy": float(-np.exp(u) @ u),
            "guided_rank": 1 + int((g > g[i]).sum()), "unguided_rank": 1 + int((u > u[i]).sum()),
            "top1_agree": bool(g.argmax() == u.argmax()), "guided_missing": 0.0, "unguided_missing": 0.0})  # fmt: skip
    return TokenReadings(pd.DataFrame(rows), np.array(offsets), np.array(ids), np.array(sides[0], "f4"),
                         np.array(sides[1], "f4"), {v: words[v] for v in set(ids)}, True, label)


def unpacked(place: dict[str, Any], blobs: list[bytes]) -> dict[str, np.ndarray]:
    """Columns of a blob, as the page reads them."""
    return {name: np.frombuffer(blobs[place["blob"]], "<" + kind, count, at)
            for name, (kind, at, count) in place["columns"].items()}


def words_in(header: dict[str, Any], blobs: list[bytes]) -> tuple[np.ndarray, list[str]]:
    columns = unpacked(header["words"], blobs)
    return columns["id"], json.loads(columns["text"].tobytes().decode("utf-8"))


TEXTS = ["We", " use", " mod", "ulo", ":\n", "7", " ·", " ", "", "\u732b", "\n\n", "So", " 3", ".", "5", "."]
PIECES = [*TEXTS[:8], "<0xE7>", *TEXTS[9:]]


def test_what_is_packed_comes_out_again():
    """Every number within its type's precision, every text exactly; alternatives in their order."""
    frame = readings_of(TEXTS, pieces=PIECES)
    header, blobs = payload.pack([Pane("guided 0", [frame], "guided", True, True)], "title")
    ids, words = words_in(header, blobs)
    assert json.loads(json.dumps(header, allow_nan=False)) == header
    assert len(ids) == len(words) == header["words"]["count"]
    pane = header["panes"][0]
    tokens = unpacked(pane, blobs)
    assert [words[w] for w in tokens["text"]] == TEXTS and [words[w] for w in tokens["piece"]] == PIECES
    assert ids[tokens["text"]].tolist() == list(range(len(TEXTS)))
    assert (pane["group"], pane["correct"], pane["target"]) == ("guided", True, True)
    columns, table = unpacked(pane["frames"][0], blobs), frame.table
    for name in ("forward_kl", "reverse_kl", "guided_logp", "unguided_logp", "guided_entropy", "unguided_entropy"):
        np.testing.assert_allclose(columns[name], table[name], rtol=1e-6)
    assert columns["guided_rank"].tolist() == table["guided_rank"].tolist()
    assert columns["agree"].tolist() == table["top1_agree"].astype(int).tolist()
    assert columns["count"].tolist() == np.diff(frame.offset_N1).tolist()
    assert ids[columns["word"]].tolist() == frame.alternative_M.tolist()
    assert columns["guided"].tolist() == frame.guided_logp_M.tolist()  # where there is room, exactly
    assert columns["unguided"].tolist() == frame.unguided_logp_M.tolist()
    told = pane["frames"][0]
    assert told["unguided_sum"] == pytest.approx(float(table["unguided_logp"].sum()))
    assert told["most"]["forward_kl"] == pytest.approx(table["forward_kl"].max()) and told["cut"] is None
    assert all(at % 8 == 0 for place in (header["words"], pane, told) for _, at, _ in place["columns"].values())


def test_what_is_not_known_stays_not_known():
    """NaN is carried as NaN, an unknown rank as 0, an unknown agreement as 2; ranks above the cap are capped."""
    frame = readings_of(TEXTS)
    table = frame.table.astype({"forward_kl": float, "guided_rank": float, "top1_agree": object})
    table.loc[2, ["forward_kl", "unguided_logp", "guided_rank"]] = np.nan
    table.loc[2, "top1_agree"] = None
    table.loc[3, "unguided_rank"] = 150_000
    unguided = frame.unguided_logp_M.copy()
    unguided[4] = np.nan
    frame = dataclasses.replace(frame, table=table, unguided_logp_M=unguided, exact=False)
    header, blobs = payload.pack([Pane("x", [frame])])
    told = header["panes"][0]["frames"][0]
    columns = unpacked(told, blobs)
    assert np.isnan(columns["forward_kl"][2]) and np.isnan(columns["unguided_logp"][2])
    assert np.isnan(columns["unguided"][4]) and not np.isnan(columns["guided"][4])
    assert columns["guided_rank"][2] == 0 and columns["agree"][2] == 2 and columns["unguided_rank"][3] == 65_535
    assert told["unguided_sum"] is None and "guided_missing" in columns and not told["exact"]
    json.dumps(header, allow_nan=False)
    assert "text-decoration" in static_html(frame)


def large(tokens: int, union: int, vocabulary: int) -> TokenReadings:
    """A long response whose tokens have `union` alternatives each, without caring what the numbers are."""
    rng = np.random.default_rng(1)
    small = readings_of(TEXTS)
    words = {v: f" {''.join(rng.choice(list('etaoinshr'), rng.integers(2, 8)))}{v % 97}" for v in range(vocabulary)}
    table = pd.concat([small.table] * (tokens // len(TEXTS)), ignore_index=True)
    table["token_id"] = rng.zipf(1.2, tokens) % vocabulary
    table["token"] = table["piece"] = [words[v] for v in table["token_id"]]
    alternatives = rng.zipf(1.2, (tokens, union)) % vocabulary
    alternatives[:, 0] = table["token_id"]
    logps = -rng.exponential(4, (2, tokens * union)).astype("f4")
    return TokenReadings(table, np.arange(tokens + 1) * union, alternatives.ravel(), logps[0], logps[1], words, True)


@pytest.mark.parametrize("union, cut", [(6, False), (11, True)])
def test_a_response_of_16k_tokens_stays_below_the_size(union, cut):
    """1.2 MB with the top 5 of both sides; where these have nothing in common, the least likely go, which is told."""
    frame = large(16_384, union, 12_000)
    header, blobs = payload.pack([Pane("long", [frame])])
    assert len(json.dumps(header)) + sum(map(len, blobs)) <= 1_200_000
    told = header["panes"][0]["frames"][0]
    assert (told["cut"] is not None) == cut
    ids, _ = words_in(header, blobs)
    columns = unpacked(told, blobs)
    first = np.concatenate([[0], np.cumsum(columns["count"], dtype=int)])
    for i in (0, 100, 16_383):
        kept = ids[columns["word"][first[i] : first[i + 1]]].tolist()
        assert int(frame.table["token_id"][i]) in kept


def test_frames_of_one_response_share_its_words():
    frames = [readings_of(TEXTS, noise=n, label=f"step {s}") for s, n in ((0, 1.0), (10, 0.3))]
    header, blobs = payload.pack([Pane("guided 0", frames)])
    assert len(blobs) == 4 and [f["label"] for f in header["panes"][0]["frames"]] == ["step 0", "step 10"]
    other = readings_of(TEXTS[:-1])
    with pytest.raises(ValueError, match=r"frame 1.*got other tokens"):
        Pane("guided 0", [frames[0], other])
    with pytest.raises(ValueError, match="no frames"):
        Pane("guided 0", [])
    with pytest.raises(ValueError, match="without tokens"):
        Pane("x", [dataclasses.replace(other, table=other.table.iloc[:0])])
    with pytest.raises(ValueError, match="no panes"):
        TokenKL([])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_ramps_are_even_and_readable(theme):
    """Contrast of text on every level at least 4.5 (WCAG AA); equal steps; lightness goes one way."""
    negative, positive = ramps.diverging(theme)
    for ramp in (ramps.sequential(theme), negative, positive):
        assert min(ramps.contrast(ramps.INK[theme], colour) for colour in ramp) >= 4.5
        lights = [ramps.luminance(colour) for colour in ramp]
        assert all((a > b) == (theme == "light") and a != b for a, b in pairwise(lights))
        steps = [math.dist(oklab(a), oklab(b)) for a, b in pairwise(ramp)]
        assert max(steps) < 1.25 * min(steps), steps
    assert ramps.contrast("#000000", "#ffffff") == pytest.approx(21) and ramps.contrast("#777777", "#777777") == 1
    assert ramps.contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # WCAG's own example


def oklab(colour: str) -> tuple[float, float, float]:
    """OKLab of a hex colour, by the published forward matrices."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    l_, m, s = (x ** (1 / 3) for x in (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b,
                                       0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b,
                                       0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b))
    return (0.2104542553 * l_ + 0.7936177850 * m - 0.0040720468 * s, 1.9779984951 * l_ - 2.4285922050 * m
            + 0.4505937099 * s, 0.0259040371 * l_ + 0.7827717662 * m - 0.8086757660 * s)  # fmt: skip


class Seen(html.parser.HTMLParser):
    """Elements and attributes of a page as a parser sees them, and the text outside of scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(str(page))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("payload_text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_tokens_stay_text_in_the_static_view_and_the_export(payload_text, tmp_path):
    frame = readings_of(["a", payload_text, "b"], label=payload_text)
    page = static_html(frame, title=payload_text)
    seen = Seen(page)
    assert {tag for tag, _ in seen.elements} <= {"style", "div", "span", "bdi", "b", "br"}
    assert all(set(a) <= {"class", "style", "title"} for _, a in seen.elements)
    assert not any("url" in (a.get("style") or "") for _, a in seen.elements)
    if len(payload_text) < static.TOKEN_LIMIT:
        assert static.visible(payload_text) in seen.text
    assert not set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200e\u200f\u061c\u0000") & set(page)
    widget = TokenKL([Pane(payload_text, [frame], payload_text)], title=payload_text)
    text = widget.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    found = Seen(text)
    assert [tag for tag, _ in found.elements] == [
        "html", "head", "meta", "meta", "meta", "title", "style", "body", "div", "button", "div", "noscript",
        *["script"] * (2 + len(widget.blobs))]  # fmt: skip
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes), (tag, attributes)
    assert "<!--" not in text and text.count("</script>") == 2 + len(widget.blobs)
    state = re.search(r'<script id="state" type="application/json">(.*?)</script>', text, re.S).group(1)
    told = json.loads(state)["header"]["panes"][0]["label"]
    assert told.encode("utf-16", "surrogatepass") == payload_text.encode("utf-16", "surrogatepass")


def test_the_exported_page_forbids_every_request_and_every_other_script(tmp_path):
    page = TokenKL(readings_of(TEXTS), title="t").to_html(tmp_path / "p.html").read_text(encoding="utf-8")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1))
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
    for tag, kind in (("style", "style-src"), ("script type=\"module\"", "script-src")):
        body = re.search(rf"<{tag}>(.*?)</{tag.split()[0]}>", page, re.S).group(1)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert "http:" not in _source("page") + _style() and "innerHTML" not in page and "import(" not in page
    assert "<" not in json_html({"a": "</script><!--&"}) and json.loads(json_html({"a": "<&>"})) == {"a": "<&>"}
    blobs = re.findall(r'<script class="blob" type="application/octet-stream">(.*?)</script>', page)
    assert [base64.b64decode(b) for b in blobs] == TokenKL(readings_of(TEXTS), title="t").blobs


def test_no_part_of_the_module_parses_html_or_runs_text():
    folder = Path(static.__file__).parent / "js"
    for path in folder.glob("*.js"):
        source = path.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function",
                     "fetch(", "XMLHttpRequest", "WebSocket", "srcdoc", "DOMParser", "ContextualFragment", "http"):
            assert word not in source, f"{path.name} holds {word}"
    assert {path.stem for path in folder.glob("*.js")} == {"page", *_PARTS}


@pytest.mark.parametrize("metric", METRICS)
def test_the_static_view_shows_every_token(metric):
    frame = readings_of(TEXTS, pieces=PIECES)
    page = static_html(frame, metric, delta=0.5, title="one response")
    shown = "".join(static.visible(t or p, ends=True) for t, p in zip(TEXTS, PIECES, strict=True))
    assert shown in Seen(page).text and "one response · guided 0" in page
    over = int((frame.table["forward_kl"] > 0.5).sum())
    assert over > 0 and page.count(static._OVER) == over and f"{over:,} of {len(TEXTS):,} tokens" in page
    with pytest.raises(ValueError, match="expected one of forward_kl"):
        static_html(frame, "kl")


def test_the_static_view_stays_small():
    """Long responses lose numbers, then shades, then their end, which is told."""
    frame = large(16_384, 3, 4000)
    page = static_html(frame)
    assert 100_000 < len(page) <= static.LIMIT
    cut = re.search(r"([\d,]+) more tokens are not shown", page)
    whole = "".join(frame.table["token"])
    text = Seen(page).text
    assert (whole in text) == (cut is None) and whole[:5000] in text
    longer = static_html(large(131_072, 2, 4000))
    assert len(longer) <= static.LIMIT and re.search(r"[\d,]+ more tokens are not shown", longer)


def test_text_from_right_to_left_is_isolated():
    page = static_html(readings_of(["a", " \u05e9\u05dc\u05d5\u05dd", "b"]))
    assert [tag for tag, _ in Seen(page).elements].count("bdi") == 1 and " \u05e9\u05dc\u05d5\u05dd</bdi>" in page


def test_text_without_a_shape_is_shown_as_a_code():
    assert static.visible("a\u202eb\u200b\x00") == "a[U+202E]b[U+200B][U+0000]"
    assert static.visible("x\n\ty", ends=True) == "x↵\n→\ty"
    assert static.visible("\u0301e\u0301") == "◌\u0301e\u0301" and static.visible("猫 \U0001f600") == "猫 \U0001f600"


def test_traits_lead_both_ways():
    """Infinity goes as a word, since JSON has none; wrong values are refused with what is expected."""
    frames = [readings_of(TEXTS, noise=n) for n in (1.0, 0.2)]
    panes = [Pane("a", frames), Pane("b", [readings_of(TEXTS[:5], seed=2)])]
    widget = TokenKL(panes, delta=math.inf, metric="sft_loss")
    assert widget.get_state("delta") == {"delta": "inf"}
    widget.set_state({"delta": 0.25, "metric": "reverse_kl", "pane": 1, "compare": 0, "frame": 1})
    assert (widget.delta, widget.metric, widget.pane, widget.compare, widget.frame) == (0.25, "reverse_kl", 1, 0, 1)
    widget.set_state({"delta": "inf"})
    assert math.isinf(widget.delta)
    wrong: list[tuple[str, Any]] = [
        ("delta", -1.0), ("delta", math.nan), ("metric", "kl"), ("pane", 2), ("compare", -2), ("frame", 2),
        ("selected", {"pane": 1, "start": 0, "end": 6}), ("selected", {"pane": 0, "start": 3, "end": 3}),
        ("selected", {"start": 1})]  # fmt: skip
    for name, value in wrong:
        with pytest.raises(traitlets.TraitError, match=f"{name}: got .* expected"):
            setattr(widget, name, value)
    with pytest.raises(ValueError, match="delta: got -1"):
        TokenKL(frames[0], delta=-1)
    with pytest.raises(ValueError, match="metric: got 'kl'"):
        TokenKL(frames[0], metric="kl")


def test_the_selection_is_rows_of_the_table():
    frames = [readings_of(TEXTS, noise=n) for n in (1.0, 0.2)]
    widget = TokenKL([Pane("a", frames)])
    assert len(widget.selection()) == 0 and list(widget.selection().columns) == list(frames[0].table.columns)
    widget.selected = {"pane": 0, "start": 3, "end": 6}
    pd.testing.assert_frame_equal(widget.selection(), frames[0].table.iloc[3:6])
    widget.frame = 1
    pd.testing.assert_frame_equal(widget.selection(), frames[1].table.iloc[3:6])


def test_without_javascript_the_static_view_stands_in():
    widget = TokenKL([Pane("a", [readings_of(TEXTS)]), Pane("b", [readings_of(TEXTS, seed=3)])], title="t")
    data, _ = widget._repr_mimebundle_()
    assert set(data) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert "<script" not in data["text/html"] and "of 2 responses" in data["text/html"]
    assert data["text/plain"].startswith("Token KL of a, and 1 more: 16 tokens")

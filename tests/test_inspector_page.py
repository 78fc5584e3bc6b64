"""The inspector's page without a browser: nothing remote, nothing parsed as HTML, and all of it in a wheel."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")

import sgpo_lib
from sgpo_lib.config import RewardConfig
from sgpo_lib.extraction.leaks import find_leaks
from sgpo_lib.extraction.records import Candidate, Extraction
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.rewards import Verifier
from sgpo_lib.widgets.strategy_inspector import StrategyInspector

WIDGETS = Path(sgpo_lib.__file__).parent / "widgets"
SCRIPT = "".join((WIDGETS / name).read_text(encoding="utf-8") for name in ("shared/make.js",
                                                                         "strategy_inspector/inspector.js"))
STYLE = (WIDGETS / "strategy_inspector/inspector.css").read_text(encoding="utf-8")
KATEX = WIDGETS / "katex/katex.min.js"
ROOT = WIDGETS.parents[1]


def node(tmp_path: Path, code: str, given: Any = None, name: str = "test.cjs") -> Any:
    """What a script prints as JSON; `given` is its standard input."""
    if (found := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    (tmp_path / name).write_text(code, encoding="utf-8")
    done = subprocess.run([found, str(tmp_path / name)], input=json.dumps(given), capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_scripts_are_valid_modules(tmp_path):
    if (found := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    for name, text in (("inspector.mjs", SCRIPT), ("whole.mjs", StrategyInspector._esm)):
        (tmp_path / name).write_text(str(text), encoding="utf-8")
        done = subprocess.run([found, "--check", str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert node(tmp_path, "import('./whole.mjs').then(m => console.log(JSON.stringify(typeof m.default.render)));"
                ) == "function"  # fmt: skip


def test_the_page_asks_no_other_machine_for_anything():
    calls = r"\bfetch\s*\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts|\bimport\s*[(\"'{*\w]"
    assert not re.search(rf"https?:|[\"'(]//|url\(|@import|\bsrc\b|{calls}", SCRIPT)
    assert not re.search(r"https?:|//|url\(|@import|@font-face|expression\(", STYLE)
    katex = KATEX.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[\w.-]+", katex)) <= {"http://www.w3.org"}  # names of MathML and SVG
    assert not re.search(r"\bfetch\([^)]|XMLHttpRequest|WebSocket|\bimport\(", katex)  # its parser has a fetch()
    remote = r"https?://(?!www\.w3\.org/)|url\(\s*[\"']?(?:https?:)?//"
    assert not re.search(remote, str(StrategyInspector._esm)) and not re.search(remote, str(StrategyInspector._css))


def test_the_page_parses_no_text_as_html_and_runs_none():
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "srcdoc", "eval(",
                "createContextualFragment", "Function(", "javascript:", ".href", "setHTML", "setTimeout(\""):
        assert way not in SCRIPT, way
    assert set(re.findall(r"setAttribute\(\"(\w[\w-]*)\"", SCRIPT)) <= {"title", "aria-label",
                                                                              "data-lm-suppress-shortcuts"}
    assert len(re.findall(r"katex\.render", SCRIPT)) == 1 and "trust: true" not in SCRIPT


HOSTILE = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>$\\href{javascript:alert(3)}{x}$'


def test_model_text_reaches_the_page_as_it_is(tmp_path):
    e = Extraction(Problem(HOSTILE, HOSTILE, HOSTILE, solution=HOSTILE, family=HOSTILE), (
        Candidate(HOSTILE, Strategy(HOSTILE, HOSTILE, (HOSTILE, "b")), comment=HOSTILE),
        Candidate(HOSTILE, reason=HOSTILE)), 0, "kept", (HOSTILE,))  # fmt: skip
    with Verifier(RewardConfig()) as verifier:
        inspector = StrategyInspector([e], tmp_path / "d.jsonl", verifier)
        inspector._handle_custom_msg({"id": HOSTILE, "decision": "accepted", "comment": HOSTILE}, [])
    item, row, told = inspector.item, inspector.index[0], inspector.told
    shown = [item[k] for k in ("id", "problem", "answer", "solution", "subject", "comment")]
    shown += [*item["notes"], row["id"], row["subject"], item["candidates"][0]["comment"]]
    shown += [item["candidates"][1]["raw"], item["candidates"][1]["reason"]]
    shown += [part["text"] for part in item["candidates"][0]["parts"][:3]]
    assert shown == [HOSTILE] * 15 and told.startswith(f"{HOSTILE}: accepted")
    (line,) = (tmp_path / "d.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["strategy"] == json.loads(line)["comment"] == HOSTILE


@pytest.mark.parametrize("tex", [
    r"\href{javascript:alert(1)}{x}", r"\url{javascript:alert(1)}", r"\includegraphics{https://example.org/x.png}",
    r"\htmlData{a=b}{x}", r"\htmlClass{evil}{x}", r"\htmlId{evil}{x}", r"\htmlStyle{background:url(//e.org)}{x}",
    r"x<img src=x onerror=alert(1)>", r"\text{<script>alert(1)</script>}", r"\def\a{\a\a}\a",
    r"\unicode{x}", r"\rule{9999999em}{9999999em}",
])  # fmt: skip
def test_formulas_by_katex_hold_no_link_and_no_markup_of_the_model(tmp_path, tex):
    """The real KaTeX with the options of the page."""
    options = re.search(r"katex\.render\([^,]+, span, (\{[^}]*\})", SCRIPT)
    assert options and re.search(r"trust:\s*false", options[1]) and re.search(r"maxExpand:\s*\d{1,4}\b", options[1])
    html = node(tmp_path, f"const katex = require({json.dumps(str(KATEX))}), display = false;\n"
                "const tex = JSON.parse(require('fs').readFileSync(0)); let html = '';\n"
                f"try {{ html = katex.renderToString(tex, {options[1]}); }} catch {{}}\n"
                "console.log(JSON.stringify(html));", tex)  # fmt: skip
    tags = " ".join(re.findall(r"<[^<>]*>", html))
    assert not re.search(r"href|src=|\son\w+=|<img|<script|<a\b|data-|url\(|evil|\d{5,}em", tags)


PAGE = """
const element = (tag) => ({tag, children: [], style: {}, dataset: {}, append(...c) { this.children.push(...c); },
  setAttribute() {}, querySelector() { return null; }});
globalThis.document = {createElement: element};
const {script, text, leaks, start} = JSON.parse(require("fs").readFileSync(0));
const {written} = new Function("katex", script.replace("export default", "const widget =") + "; return {written};")({});
const flat = (n) => typeof n === "string" ? n : n.textContent ?? n.children.map(flat).join("");
const box = written(text, leaks, start);
console.log(JSON.stringify({text: flat(box), marks: box.children.filter((n) => n.tag === "mark").map(flat)}));
"""
"""`written` of the page, on elements that hold children and nothing else. Without KaTeX formulas stay as written."""


@pytest.mark.parametrize("steps, marks", [
    (("Read both", "Since the result is 42, state it"), [[], ["42"]]),
    (("Let 𝑥 and 𝑦 be free, then 𝑥 = 42", "Write 42 down"), [["42"], ["42"]]),
    (("The answer is 42; once more, the answer is 42", "Stop"), [["42", "42"], []]),
    (("𝑥 stands for it; $42$ is the answer, a😀b 42", "Check"), [["$42$", "42"], []]),
])  # fmt: skip
def test_leaks_are_marked_at_their_own_characters(tmp_path, steps, marks):
    """Python counts characters, JavaScript UTF-16 units: they differ after 𝑥."""
    problem, strategy = Problem("a", "How many?", "42", solution="\\boxed{42}"), Strategy("Sum", "Add", steps)
    with Verifier(RewardConfig()) as verifier:
        (leaks,) = find_leaks([(problem, strategy)], verifier)
        found = [Extraction(problem, (Candidate("", strategy, leaks=leaks),), 0, "leaking")]
        (candidate,) = StrategyInspector(found, tmp_path / "d.jsonl", verifier).item["candidates"]
    for part, step, expected in zip(candidate["parts"][2:], steps, marks, strict=True):
        shown = node(tmp_path, PAGE, {"script": SCRIPT, "text": part["text"], "leaks": candidate["leaks"],
                                      "start": part["start"]})  # fmt: skip
        assert shown["text"] == step and [m.strip("$") for m in shown["marks"]] == [m.strip("$") for m in expected]


def test_a_wheel_holds_every_file_that_the_package_reads(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "sgpo_lib", tmp_path / "sgpo_lib", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "sgpo_lib").rglob("*")
              if p.is_file() and "__pycache__" not in p.parts}  # fmt: skip
    assert {"sgpo_lib/widgets/katex/katex.min.js", "sgpo_lib/widgets/strategy_inspector/inspector.css",
            "sgpo_lib/collection/algebra.yaml"} <= wanted and sorted(wanted - held) == []  # fmt: skip

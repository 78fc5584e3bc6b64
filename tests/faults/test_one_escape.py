"""One way from text to HTML: what ruff's rules (TID251, S704) do not see is read from syntax trees and scripts."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sgpo_lib
from sgpo_lib import pages
from sgpo_lib.escaping import Html

FOLDER = Path(sgpo_lib.__file__).parent
ROOT = FOLDER.parent
WIDGETS = FOLDER / "widgets"
TAG = re.compile(r"(?<!\?)(?<!\?P)<(?:/?[a-zA-Z][\w-]*[\s>/]|!--|!doctype|/?[a-zA-Z]+$)", re.IGNORECASE)
"""Where a tag begins; a group of a regular expression does not."""
SEARCHES = {"sub", "compile", "replace", "partition", "removeprefix"}
"""Functions whose first argument is looked for, not shown."""
NO_HTML = {"answers", "extraction.pipeline", "extraction.reading", "prompts", "tiny", "token_text"}
"""Modules of prompts and chat templates, whose tags are for models."""
CONSTANT = {"<!-- Written by notebook 07; findings are in README.md. -->\n\n# Tables and figures\n"}
TRUSTED = {"pages": 2, "widgets.token_kl.page": 2, "widgets.token_kl.static": 1}
"""How often a module takes something for HTML: its own scripts and styles, and a picture by matplotlib."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(FOLDER.rglob("*.py")):
        name = ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def raw_html(tree: ast.AST) -> list[str]:
    """Texts with a tag that are neither the constant of an `Html`, nor looked for, nor a hover template, nor prose."""
    fine: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            fine.add(id(node.value))
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            fine.add(id(node.left))
        elif isinstance(node, ast.keyword) and node.arg == "hovertemplate":
            fine.add(id(node.value))
        elif isinstance(node, ast.Call) and node.args and name_of(node) in SEARCHES | {"Html"}:
            fine.add(id(node.args[0]))
    return [f"line {node.lineno}: {node.value[:60]!r}" for node in ast.walk(tree) if isinstance(node, ast.Constant)
            and isinstance(node.value, str) and id(node) not in fine and TAG.search(node.value)
            and node.value not in CONSTANT]


def test_no_module_builds_html_from_text(tally):
    count, found = 0, []
    for name, tree in modules():
        found += [f"{name}: {told}" for told in raw_html(tree) if name not in NO_HTML]
        count += sum(isinstance(n, ast.Call) and name_of(n) == "Html" for n in ast.walk(tree))
    assert found == [], "write Html('<b>{}</b>').format(text), which escapes the text"
    tally(10, "raw HTML building", f"0 places; {count} constants become Html, all by the one escaping class")


@pytest.mark.parametrize("code", [
    'page = f"<b>{name}</b>"', 'page = "<b>" + name', 'page = "<b>%s</b>" % name', 'page = "<td>{}</td>".format(name)',
    'ROW = "<tr>{}</tr>"\npage = ROW.format(name)', 'page = "".join(f"<li>{x}" for x in names)',
    'page = Html(f"<b>{name}</b>")', 'page = f"<script>{text}</script>"', 'page = f"<!-- {text} -->"',
    'page = text.replace("</p>", f"</p><img src={x}>")', 'go.Bar(hovertemplate=f"<b>{name}</b>")'])
def test_the_rule_finds_it_however_it_is_written(code):
    assert raw_html(ast.parse(code))


@pytest.mark.parametrize("code", [
    '"""Prose about <b>."""', 'Html("<b>{}</b>").format(name)', 're.sub(r"<b>|(?P<name>x)", "", page)',
    'x = re.compile(r"(?<!a)(?P<b>c)")', 'if "</" in page: pass', 'low < high > x', 'name = f"{a} < {b}"'])
def test_the_rule_lets_the_rest_pass(code):
    assert raw_html(ast.parse(code)) == []


@pytest.mark.parametrize(("code", "rule"), [
    ("import html\n\nPAGE = html.escape('x')\n", "TID251"),
    ("from html import escape\n\nPAGE = escape('x')\n", "TID251"),
    ("from markupsafe import Markup\n\nPAGE = Markup('x')\n", "TID251"),
    ("from sgpo_lib.escaping import Html\n\nNAME = input()\nPAGE = Html(f'{NAME}')\n", "S704"),
    ("from sgpo_lib.escaping import Html\n\nPAGE = Html(input())\n", "S704"),
    ("from sgpo_lib.escaping import Html\n\nPAGE = Html('{}').format(input())\n", "")])
def test_ruff_bans_other_escaping_and_html_that_is_no_constant(code, rule):
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "sgpo_lib/new.py", "--output-format", "json"]
    done = subprocess.run([*command, "-"], cwd=ROOT, input=code, capture_output=True, text=True, check=False)
    assert {found["code"] for found in json.loads(done.stdout)} == ({rule} if rule else set())


def test_few_places_declare_something_html():
    found = {name: sum(isinstance(n, ast.Call) and name_of(n) == "trusted" for n in ast.walk(tree))
             for name, tree in modules() if name != "escaping"}
    assert {name: n for name, n in found.items() if n} == TRUSTED


def test_every_figure_is_drawn_with_its_texts_as_they_are():
    drawn = 0
    for name, tree in modules():
        for node in (n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")):
            if node.returns is not None and ast.unparse(node.returns) == "go.Figure":
                assert [ast.unparse(d) for d in node.decorator_list] == ["plain"], f"{name}.{node.name}"
                drawn += 1
    assert drawn >= 20


def test_notebooks_show_text_through_the_views_alone():
    """IPython's HTML and pandas' styles escape nothing by themselves."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            code = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
            ways = r"\bHTML\((?!group_html\()|\.style\b|\b(?:Markdown|SVG|Javascript)\(|_repr_html_"
            assert not re.search(ways, code), path.name
            assert raw_html(ast.parse(code)) == [], path.name


SCRIPTS = {path.relative_to(WIDGETS).as_posix(): path.read_text(encoding="utf-8")
           for path in sorted(WIDGETS.rglob("*.js")) if path.name != "katex.min.js"}
"""Scripts of the package, and the one of its pages."""
SCRIPTS["pages.py"] = str(pages.FIGURE_SCRIPT)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_no_text_as_html_and_run_none(name):
    script = SCRIPTS[name]
    for way in (r"\b(?:inner|outer)HTML\b", "insertAdjacentHTML", r"document\.write", "DOMParser", "srcdoc", "setHTML",
                "createContextualFragment", r"\beval\(", r"\bFunction\(", "javascript:", r"\bimport\(", r"location\b",
                r"\.(?:href|src|action|cssText)\b", r"(?<!worker)\.on[a-z]+ *=", r"set(?:Timeout|Interval)\(\s*[\"'`]",
                r"window\.open"):
        assert not re.search(way, script), way
    names = re.findall(r"setAttribute\(([^,]+),", script)
    expected = {"name"} if name in ("run_monitor/panel.js", "token_kl/js/text.js") else set()
    assert {n for n in names if not n.startswith('"')} == expected, "names of attributes are written out"


def test_the_names_that_are_not_written_out_come_from_the_script_itself():
    panel = SCRIPTS["run_monitor/panel.js"].replace("function drawn(tag, attributes", "")
    assert re.findall(r"drawn\(", panel) == re.findall(r"drawn\((?=\"[a-z]+\", \{)", panel)
    parts = "".join(text for name, text in SCRIPTS.items() if name.startswith("token_kl"))
    assert len(re.findall(r"\.flag\(", parts)) == len(re.findall(r"\.flag\(\"data-[a-z-]+\",", parts)) > 0


def test_katex_gets_no_trust_and_limits():
    (options,) = re.findall(r"katex\.render\([^,]+, span, (\{[^}]*\})", SCRIPTS["strategy_inspector/inspector.js"])
    assert all(told in " ".join(options.split()) for told in ("trust: false", "maxExpand: 200", "maxSize: 20"))


def test_html_escapes_whatever_is_put_into_it():
    bad = "<b a=\"1\" c='2'>&\u202e\x00"
    good = "&lt;b a=&#34;1&#34; c=&#39;2&#39;&gt;&amp;[U+202E][U+0000]"
    assert Html("<i>{}</i>").format(bad) == f"<i>{good}</i>" == Html("<i>%s</i>") % bad
    assert Html("<i>") + bad + Html("</i>") == f"<i>{good}</i>"
    assert Html("{a[0]}{b.c:>3}").format(a=[bad], b=type("B", (), {"c": "<"})()) == f"{good}  &lt;"
    assert Html(", ").join([bad, Html("<br>")]) == f"{good}, <br>" and bad + Html("<br>") == f"{good}<br>"
    assert Html.escape(bad) == good and Html.escape(Html("<br>")) == "<br>" and Html.escape(7) == "7"
    assert isinstance(Html("{}").format(bad), Html) and Html("{}").format(Html("{}").format(bad)) == good

"""Text that others wrote (prompts, responses, names, messages), made fit for where it is shown.

HTML is built with `Html` alone: what is put into it is escaped, and only a constant can become one (ruff's S704; ruff's
TID251 bans other ways to escape; tests/faults/test_one_escape.py reads the syntax trees). Everything else has one
function: `label` for plotly, `markdown`, `latex`, `csv_cell`, and `visible` for a terminal and a log.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import markupsafe

LABEL = 160
"""Characters of a name or label in a figure; of a longer one the middle is left out."""
_PLAIN = re.compile(r"[\n\x20-\x7e]*")
_LATEX = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}",
          "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}", "−": "$-$", "–": "--", "α": r"$\alpha$"}


def visible(text: str, ends: bool = False) -> str:
    """Text for a person: what has no shape, or could reorder, overwrite or steer what is around it (control and escape
    characters of a terminal, bidirectional overrides), as a code such as [U+202E]. Nothing is escaped.

    `ends`: line ends and tabs are marked too.
    """
    if _PLAIN.fullmatch(text) and not (ends and "\n" in text):
        return text
    shown = []
    for place, c in enumerate(text):
        kind = unicodedata.category(c)
        joins = c in "\u200d\ufe0f" and place > 0 and unicodedata.category(text[place - 1]) in ("So", "Sk")
        hidden = kind in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co") or c in "\u115f\u1160\u3164\uffa0\u034f" or (
            0xFE00 <= ord(c) <= 0xFE0F or 0xE0100 <= ord(c) <= 0xE01EF) or (kind == "Zs" and c not in " \u3000")
        if c in "\n\t":
            shown.append({"\n": "↵\n", "\t": "→\t"}[c] if ends else c)
        elif hidden and not joins:
            shown.append(f"[U+{ord(c):04X}]")
        elif place == 0 and kind.startswith("M"):
            shown.append(f"◌{c}")
        else:
            shown.append(c)
    return "".join(shown)


def visible_in(value: Any) -> Any:
    """`visible` of every text in mappings and lists, names included."""
    if isinstance(value, Mapping):
        return {visible_in(name): visible_in(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [visible_in(one) for one in value]
    return visible(value) if isinstance(value, str) else value


class Html(markupsafe.Markup):
    """HTML. `format`, `join`, `%` and `+` escape what they put into it, unless it is `Html` itself.

    It is made from constants, `Html("<b>{}</b>").format(name)`; from a text by `Html.escape`, from HTML of this package
    or its libraries by `trusted`.
    """

    __slots__ = ()

    @classmethod
    def escape(cls, value: object, /) -> Html:
        """The one way from text to HTML, for elements and for attributes in quotes. See `visible` for control
        characters."""
        return value if isinstance(value, Html) else cls(markupsafe.escape(visible(str(value))))


def trusted(html: str) -> Html:
    """HTML (or the inside of a style or script element) that this package or a library has made and escaped itself."""
    return Html(html)


def json_html(value: Any) -> Html:
    """JSON for a script element: no tag, end tag, comment or entity can begin in it. Raises ValueError for NaN."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def label(value: object) -> str:
    """Text for plotly, which reads tags, links and styles in names, titles and categories."""
    text = str(value)
    return str(Html.escape(text if len(text) <= LABEL else f"{text[:LABEL - 40]} … {text[-40:]}"))


def markdown(value: object) -> str:
    """Text on one line of Markdown, in a paragraph, a heading or the cell of a table: no markup, HTML or link in it."""
    text = " ".join(visible(str(value)).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*\[\]$|~]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", r"\\\g<0>", text)


def latex(value: object) -> str:
    """Text on one line of LaTeX, in a paragraph, an argument or the cell of a table: no command in it."""
    return re.sub(r"[&%#_$~^\\{}<>|\[\]*−–α]", lambda m: _LATEX[m.group()], " ".join(visible(str(value)).split()))


def csv_cell(value: Any) -> Any:
    """A value for CSV: text that a spreadsheet would compute as a formula gets an apostrophe in front, and control
    characters, at some of which readers end a row, are codes."""
    if not isinstance(value, str) or re.fullmatch(r"[-+]?[\d.]+(?:[eE][-+]?\d+)?", value):
        return value
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", lambda m: visible(m[0]), value)
    return f"'{text}" if text.lstrip(" ").startswith(tuple("=+-@\t\n＝＋－＠")) else text

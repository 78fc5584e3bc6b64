"""The page that lives without Python: the widget's own module and style, and its data, in one file.

The page asks the network for nothing, and its Content-Security-Policy forbids it: only the two texts whose hashes it
names, the script and the style, are used. Data stand in script elements that are no scripts, as JSON with `<` escaped,
and as base64.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from sgpo_lib.escaping import Html, json_html, trusted

_PAGE_STYLE = """
html { color-scheme: light; background: #ffffff; color: #1b1b1b; }
html[data-theme="dark"] { color-scheme: dark; background: #111111; color: #ececec; }
body { margin: 0 auto; padding: 12px 16px 24px; max-width: 1500px; font: 13px system-ui, sans-serif; }
.top { display: flex; justify-content: flex-end; margin-bottom: 8px; }
#theme { font: inherit; color: inherit; background: none; border: 1px solid #8888; border-radius: 3px;
  padding: 2px 8px; cursor: pointer; }
"""
_PAGE = Html("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{}</title>
<style>{}</style>
</head>
<body>
<div class="top"><button type="button" id="theme" aria-label="theme of the page"></button></div>
<div id="widget"></div>
<noscript>This page needs JavaScript. It asks the network for nothing.</noscript>
<script id="state" type="application/json">{}</script>
{}<script type="module">{}</script>
</body>
</html>
""")
_BLOB = Html('<script class="blob" type="application/octet-stream">{}</script>\n')


def page_html(module: str, style: str, state: Mapping[str, Any], blobs: Sequence[bytes], title: str) -> Html:
    """The whole page. `module`: the widget's source without its export; `state`: its traits without the blobs."""
    script, look = f"\n{module}\nrunPage();\n", f"{_PAGE_STYLE}{style}"
    assert "</" not in script + look and "<!--" not in script + look, "it would end its element"
    policy = (f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(look)}'; worker-src blob:; "
              "base-uri 'none'; form-action 'none'")
    return _PAGE.format(policy, _printable(title) or "KL of every token", trusted(look), json_html(state),
                        Html("").join(_BLOB.format(base64.b64encode(b).decode()) for b in blobs), trusted(script))


def _printable(text: str) -> str:
    """A title without what cannot be seen (bidi controls reach beyond the page, into the browser's tab)."""
    return "".join(c for c in text if c.isprintable())


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()

"""Executed notebooks as pages that open offline.

nbconvert writes the page; what it would fetch from the network is replaced: require.js and MathJax are left out,
formulas are drawn here as SVG (matplotlib's mathtext; TeX source where it cannot), and plotly figures, which the
executed notebook holds as `application/vnd.plotly.v1+json`, are drawn by the `plotly.min.js` that `put_plotly` lays
beside the page.

The page's Content-Security-Policy lets no other script run and asks no other machine, whatever a cell put out as HTML:
scripts in the outputs of other libraries do not run either.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from sgpo_lib.escaping import Html, json_html, trusted

PLOTLY_TAG = Html('<script src="plotly.min.js" charset="utf-8"></script>')
"""How a page asks for plotly.js; replace it to point elsewhere."""
KL_PAGE = "token_kl.html"
"""The KL microscope of a job, beside its page, where the notebook wrote one (kl_page.py)."""
KL_LINK = Html('<p class="sgpo-kl"><a href="{}">KL of every token, interactive</a>: what the strategy changes in '
               "the last responses of this run. It opens offline.</p>").format(KL_PAGE)
"""How a page leads to it; replace the name to point elsewhere."""
_MIME = "application/vnd.plotly.v1+json"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_DRAW = """
(function () {
  var dark = window.matchMedia("(prefers-color-scheme: dark)"), held = document.getElementById("sgpo-dark");
  var template = held && JSON.parse(held.textContent);
  function look() {
    document.querySelectorAll(".sgpo-figure").forEach(function (div) {
      var f = div.figure || (div.figure = JSON.parse(div.querySelector("script").textContent));
      var layout = Object.assign({}, f.layout, {width: undefined});
      if (dark.matches && template) layout.template = template;
      Plotly.react(div.querySelector(".sgpo-plot"), f.data, layout,
        {responsive: true, displaylogo: false, displayModeBar: window.innerWidth < 700 ? false : undefined});
    });
  }
  look();
  dark.addEventListener("change", look);
})();
"""
FIGURE_SCRIPT = Html("<script>{}</script>").format(trusted(_DRAW))
"""Draws every figure of the page, in the dark look where the reader's system asks for it and the page has one."""
_DIGEST = base64.b64encode(hashlib.sha256(_DRAW.encode()).digest()).decode()
POLICY = Html('<meta http-equiv="Content-Security-Policy" content="{}">').format(
    f"default-src 'none'; script-src 'self' file: 'sha256-{_DIGEST}'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:; media-src data:; base-uri 'none'; form-action 'none'")
"""What a page may use: plotly.js beside it, FIGURE_SCRIPT, and styles and pictures inside it. First in the head."""
_HEAD_TAGS = re.compile(r"<(?=(?:meta|link|base)\b)", re.IGNORECASE)
"""Beginnings of tags that have no business in a cell's output: the policy does not stop them from leading elsewhere."""
_MARKUP = {"text/html", "text/markdown", "text/latex", "image/svg+xml"}
_STYLE = Html("""<style>
body.jp-Notebook { max-width: 1000px; margin: 0 auto; padding: 24px 16px 64px; }
.jp-InputPrompt, .jp-OutputPrompt { display: none; }
.jp-Cell { padding: 4px 0; }
.jp-OutputArea-output pre { white-space: pre-wrap; }
.sgpo-math { vertical-align: middle; } .sgpo-math path, .sgpo-math use, .sgpo-math rect { fill: currentColor; }
.sgpo-display { display: block; margin: 0.8em auto; }
.sgpo-kl { font: 15px system-ui, sans-serif; margin: 0 0 1em; padding: 0.6em 1em;
  border: 1px solid #8886; border-radius: 6px; }
</style>""")


def put_plotly(folder: Path, link: bool = False) -> None:
    """Lay plotly.min.js (5 MB) into a folder: a copy, or with `link` a hard link where the disk allows one."""
    import plotly

    source = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    target = folder / "plotly.min.js"
    target.unlink(missing_ok=True)
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def figure_html(figure: dict[str, Any] | str) -> Html:
    """A place for one plotly figure (dict or JSON text) that FIGURE_SCRIPT draws."""
    text = figure if isinstance(figure, str) else json.dumps(figure)
    plain = json.loads(text, parse_constant=lambda _: None)  # NaN: a gap, as plotly writes it
    height = (plain.get("layout") or {}).get("height") or 450
    return Html('<div class="sgpo-figure" style="min-height:{:d}px"><div class="sgpo-plot"></div>'
                '<script type="application/json">{}</script></div>').format(int(height), json_html(plain))


def notebook_html(path: Path) -> str:
    """An executed notebook as one HTML page. It holds PLOTLY_TAG where there are figures, and KL_LINK on top where a
    KL page lies beside the notebook."""
    import nbconvert
    import nbformat

    nb = nbformat.read(path, as_version=4)
    nb.metadata.pop("widgets", None)  # the widget manager would come from the network
    nb.metadata["title"] = _title(nb, path)
    figures = False
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop(_WIDGET, None)  # its text stands for it
            for kind in data.keys() & _MARKUP:
                data[kind] = _HEAD_TAGS.sub("&lt;", data[kind])
            if _MIME in data:
                data["text/html"] = figure_html(data.pop(_MIME))
                figures = True
            elif "window.PlotlyConfig" in data.get("text/html", "")[:400]:
                data["text/html"] = ""  # plotly.js itself, from the renderer `notebook`
    exporter = nbconvert.HTMLExporter(filters={"markdown2html": _markdown})
    page, _ = exporter.from_notebook_node(nb)
    page = re.sub(r'<script src="https?:[^>]*>\s*</script>', "", page)
    page = re.sub(r'<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->', "", page, flags=re.S)
    page = re.sub(r'<script type="module">(?:(?!</script>).)*?mermaid.*?</script>', "", page, flags=re.S)
    page = page.replace("<head>", Html("<head>") + POLICY, 1)
    page = page.replace("</head>", _STYLE + (PLOTLY_TAG if figures else Html("")) + Html("</head>"), 1)
    if (path.parent / KL_PAGE).exists():
        page = re.sub(r"<main>|<body[^>]*>(?!.*<main>)", lambda match: f"{match[0]}{KL_LINK}", page, count=1,
                      flags=re.S)
    return page.replace("</body>", FIGURE_SCRIPT + Html("</body>"), 1) if figures else page


def _title(nb: Any, path: Path) -> str:
    """The notebook's first heading."""
    for cell in nb.cells:
        if cell.cell_type == "markdown" and (match := re.search(r"^#\s+(.+)$", cell.source, flags=re.M)):
            return match.group(1).strip()
    return path.parent.name


def _markdown(source: str) -> str:
    """nbconvert's Markdown with formulas drawn as SVG."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, text: str) -> str:
            return math_svg(text, display=False)

        def block_math(self, text: str) -> str:
            return math_svg(text, display=True)

        def latex_environment(self, name: str, text: str) -> str:
            return math_svg(text, display=True)

    return MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render(source)


@functools.lru_cache(maxsize=512)
def math_svg(tex: str, display: bool) -> Html:
    """A TeX formula as inline SVG; its source as code where mathtext cannot read it or matplotlib is not installed."""
    plain = " ".join(tex.split())
    try:
        from matplotlib import mathtext, rc_context
        from matplotlib.font_manager import FontProperties

        buffer = io.StringIO()
        with rc_context({"mathtext.fontset": "cm"}):
            depth = mathtext.math_to_image(f"${plain}$", buffer, prop=FontProperties(size=14 if display else 12),
                                           dpi=72, format="svg")
    except (ImportError, ValueError, RecursionError):  # braces in braces in braces
        return Html("<code>{}</code>").format(plain)
    svg = re.sub(r".*?(<svg\b)", r"\1", buffer.getvalue(), count=1, flags=re.S)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.S)  # the white background
    kind, style = ("sgpo-math sgpo-display", "") if display else ("sgpo-math", f"vertical-align:-{depth:.1f}pt")
    return Html('<svg class="{}" style="{}" role="img" aria-label="{}" {}').format(
        kind, style, plain, trusted(svg.removeprefix("<svg ")))

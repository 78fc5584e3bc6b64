"""Executed notebooks as pages that open offline.

nbconvert writes the page; what it would fetch from the network is replaced: require.js and MathJax are left out,
formulas are drawn here as SVG (matplotlib's mathtext; TeX source where it cannot), and plotly figures, which the
executed notebook holds as `application/vnd.plotly.v1+json`, are drawn by the `plotly.min.js` that `put_plotly` lays
beside the page.
"""

from __future__ import annotations

import contextlib
import functools
import html
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

PLOTLY_TAG = '<script src="plotly.min.js" charset="utf-8"></script>'
"""How a page asks for plotly.js; replace it to point elsewhere."""
KL_PAGE = "token_kl.html"
"""The KL microscope of a job, beside its page, where the notebook wrote one (kl_page.py)."""
KL_LINK = (f'<p class="sgpo-kl"><a href="{KL_PAGE}">KL of every token, interactive</a>: what the strategy changes in '
           "the last responses of this run. It opens offline.</p>")
"""How a page leads to it; replace the name to point elsewhere."""
_MIME = "application/vnd.plotly.v1+json"
_WIDGET = "application/vnd.jupyter.widget-view+json"
FIGURE_SCRIPT = """<script>
(function () {
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  function look() {
    document.querySelectorAll(".sgpo-figure").forEach(function (div) {
      var f = div.figure || (div.figure = JSON.parse(div.querySelector("script").textContent));
      var layout = Object.assign({}, f.layout, {width: undefined});
      if (dark.matches && window.sgpoDark) layout.template = window.sgpoDark;
      Plotly.react(div.querySelector(".sgpo-plot"), f.data, layout,
        {responsive: true, displaylogo: false, displayModeBar: window.innerWidth < 700 ? false : undefined});
    });
  }
  look();
  dark.addEventListener("change", look);
})();
</script>"""
"""Draws every figure of the page, in the dark look where the reader's system asks for it and the page has one."""
_STYLE = """<style>
body.jp-Notebook { max-width: 1000px; margin: 0 auto; padding: 24px 16px 64px; }
.jp-InputPrompt, .jp-OutputPrompt { display: none; }
.jp-Cell { padding: 4px 0; }
.jp-OutputArea-output pre { white-space: pre-wrap; }
.sgpo-math { vertical-align: middle; } .sgpo-math path, .sgpo-math use, .sgpo-math rect { fill: currentColor; }
.sgpo-display { display: block; margin: 0.8em auto; }
.sgpo-kl { font: 15px system-ui, sans-serif; margin: 0 0 1em; padding: 0.6em 1em;
  border: 1px solid #8886; border-radius: 6px; }
</style>"""


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


def figure_html(figure: dict[str, Any] | str) -> str:
    """A place for one plotly figure (dict or JSON text) that FIGURE_SCRIPT draws."""
    text = figure if isinstance(figure, str) else json.dumps(figure)
    height = (json.loads(text).get("layout") or {}).get("height") or 450
    text = text.replace("<", "\\u003c")  # no end tag or comment can begin inside
    return (f'<div class="sgpo-figure" style="min-height:{int(height)}px"><div class="sgpo-plot"></div>'
            f'<script type="application/json">{text}</script></div>')


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
    scripts = PLOTLY_TAG if figures else ""
    page = page.replace("</head>", f"{_STYLE}{scripts}</head>", 1)
    if (path.parent / KL_PAGE).exists():
        page = re.sub(r"<main>|<body[^>]*>(?!.*<main>)", lambda match: match[0] + KL_LINK, page, count=1, flags=re.S)
    return page.replace("</body>", f"{FIGURE_SCRIPT}</body>", 1) if figures else page


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
def math_svg(tex: str, display: bool) -> str:
    """A TeX formula as inline SVG; its source as code where mathtext cannot read it or matplotlib is not installed."""
    plain = " ".join(tex.split())
    try:
        from matplotlib import mathtext, rc_context
        from matplotlib.font_manager import FontProperties

        buffer = io.StringIO()
        with rc_context({"mathtext.fontset": "cm"}):
            depth = mathtext.math_to_image(f"${plain}$", buffer, prop=FontProperties(size=14 if display else 12),
                                           dpi=72, format="svg")
    except (ImportError, ValueError):
        return f"<code>{html.escape(plain)}</code>"
    svg = re.sub(r".*?(<svg\b)", r"\1", buffer.getvalue(), count=1, flags=re.S)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.S)  # the white background
    style = "" if display else f' style="vertical-align:-{depth:.1f}pt"'
    kind = "sgpo-math sgpo-display" if display else "sgpo-math"
    return svg.replace("<svg ", f'<svg class="{kind}"{style} role="img" aria-label="{html.escape(plain)}" ', 1)

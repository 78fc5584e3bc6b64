"""Text that tries to run, to ask another machine, to read a file, to lead elsewhere, or to be taken for something else.

What runs sets `top.hostile`, requests go to HOST, files are /etc/passwd: the tests watch for all three.
"""

from __future__ import annotations

HOST = "hostile.invalid"
_U = f"https://{HOST}"
PAYLOADS: dict[str, str] = {
    # tags and attributes
    "script": "<script>top.hostile=1;alert(1)</script>",
    "end of a script": "</script><script>top.hostile=1</script>",
    "comment": "<!--<script>--><script>top.hostile=1</script><!--",
    "image": f'<img src="{_U}/img.png" onerror="top.hostile=1">',
    "double quote": '" autofocus tabindex="0" onfocus="top.hostile=1" onmouseover="top.hostile=1" x="',
    "single quote": "' autofocus tabindex='0' onfocus='top.hostile=1' onmouseover='top.hostile=1' x='",
    "svg": f'<svg onload="top.hostile=1"><script href="{_U}/svg.js"></script><image href="{_U}/svg.png"/></svg>',
    "javascript link": '<a href="javascript:top.hostile=1" target="_top">press here</a>',
    "data frame": '<iframe src="data:text/html,<script>top.hostile=1;alert(1)</script>"></iframe>',
    "frame with text": '<iframe srcdoc="<script>top.hostile=1</script>"></iframe>',
    "refresh": f'<meta http-equiv="refresh" content="0;url={_U}/refresh">',
    "base": f'<base href="{_U}/"><img src="base.png">',
    "form": f'<form action="{_U}/form"><input autofocus onfocus="this.form.submit()"></form>',
    "link": f'<link rel="stylesheet" href="{_U}/link.css"><link rel="preconnect" href="{_U}">',
    "style": f'<style>@import "{_U}/import.css"; * {{background: url({_U}/style.png)}}</style>',
    "style of a span": f'<span style="width:expression(top.hostile=1);mask:url({_U}/mask.png);'
                       f'background:url({_U}/span.png)">styled</span>',
    "mathml": '<math href="javascript:top.hostile=1"><maction actiontype="statusline">press</maction></math>',
    "local file": '<object data="file:///etc/passwd"></object><iframe src="file:///etc/passwd"></iframe>',
    "media": f'<video src="{_U}/v.mp4" poster="{_U}/v.png" autoplay></video><audio src="x" onerror="top.hostile=1">',
    "ends of elements": '</title></textarea></style></pre></td></table></noscript><img src="x" '
                        'onerror="top.hostile=1">',
    "torn tags": '<scr\x00ipt>top.hostile=1</scr\x00ipt><IMG """><SCRIPT>top.hostile=1</SCRIPT>">',
    "entities": "&lt;img src=x onerror=top.hostile=1&gt;&#60;script&#62;top.hostile=1&#60;/script&#62;&amp;lt;",
    # inside scripts, JSON and templates
    "template": "`${top.hostile=1}` {{constructor.constructor('top.hostile=1')()}} <%= top.hostile=1 %> {0.__class__}",
    "end of JSON": '"}]};top.hostile=1;//\\"};top.hostile=1;//',
    "line separators": "one\u2028top.hostile=1\u2029two\rthree",
    # formulas, Markdown, figures, files for other programs
    "katex link": r"$\href{javascript:top.hostile=1}{x}$ and $\url{javascript:top.hostile=1}$",
    "katex picture": rf"$\includegraphics{{{_U}/k.png}}$ $\htmlStyle{{background:url({_U}/k2.png)}}{{x}}$ "
                     r"$\htmlClass{a}{x}$ $\htmlData{a=b}{x}$",
    "katex bomb": r"$\def\a{\a\a}\a$ $\rule{99999em}{99999em}$ " + "$" + "{" * 60 + "x" + "}" * 60 + "$",
    "markdown": f"[press](javascript:top.hostile=1) ![picture]({_U}/md.png) <{_U}/auto> **bold** `code` # head | cell",
    "plotly": '<a href="javascript:top.hostile=1">link</a><b>bold</b><br>%{x}'
              f'<span style="mask:url({_U}/p.png)">s</span>',
    "csv formula": f'=HYPERLINK("{_U}/csv","press")',
    "csv command": "@SUM(1+1)*cmd|' /C calc'!A0",
    "latex": r"\input{/etc/passwd}\immediate\write18{touch hostile} ^^5cinput $ & % # ~ _ } { [0pt]",
    # terminals and readers
    "terminal": "\x1b[2J\x1b]0;hostile\x07\x1b]52;c;aG9zdGlsZQ==\x07\x1b[8mhidden\x1b[0m \x9b31m \x90q\x9c",
    "terminal link": f"\x1b]8;;{_U}/osc\x1b\\press\x1b]8;;\x1b\\ [link={_U}/rich]rich[/link] [/]",
    "reordered": "safe \u202eevil\u202c \u2066other\u2069 \u200f\u061c end",
    "control characters": "nul\x00bell\x07back\x08\x08\x08del\x7f nel\x85 shy\u00ad zero\u200bwidth",
    "long": "W" * 5000,
}
"""Name -> text."""


def file_name(text: str) -> str:
    """The text as far as a file may be called so: no slash, no NUL, no line end, at most 200 bytes."""
    kept = "".join("\u2215" if c == "/" else c for c in text if c not in "\x00\n\r")
    return kept.encode()[:200].decode(errors="ignore").strip() or "-"

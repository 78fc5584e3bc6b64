"""A page in Chromium that notes whatever a hostile text could bring about: code, requests, navigation, elements."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hostile_payloads import HOST

from sgpo_lib.escaping import LABEL, visible

sys.path.append(str(Path(__file__).parents[1] / "browser"))  # its lab.py knows where Chromium is

HARNESS = """<!doctype html><meta charset="utf-8"><title>widget</title><style>%s</style><div id="here"></div>
<script type="module">%s
const state = JSON.parse(document.getElementById("state").textContent), heard = {};
window.model = {get: (k) => state[k], send: (m) => {},
  set: (k, v) => { state[k] = v; (heard["change:" + k] ?? []).forEach((f) => f()); }, save_changes: () => {},
  on: (n, f) => { (heard[n] ??= []).push(f); }, off: (n, f) => { heard[n] = heard[n].filter((g) => g !== f); }};
widget.initialize?.({model});
widget.render({model, el: document.getElementById("here")});
</script><script id="state" type="application/json">%s</script>"""
"""A widget's own module and style over a model that is nothing but a dictionary."""
_TEXT = """() => { const walk = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT), out = [];
  while (walk.nextNode()) if (!["SCRIPT", "STYLE"].includes(walk.currentNode.parentElement.tagName))
    out.push(walk.currentNode.data);
  for (const node of document.querySelectorAll("input, textarea")) out.push(node.value);
  return out.join(""); }"""
_FOUND = """host => [...document.querySelectorAll("*")].flatMap((node) => {
  const tag = node.tagName.toLowerCase(), found = [];
  if (["iframe", "object", "embed", "form", "base", "link", "img", "video", "audio", "maction"].includes(tag))
    found.push(tag);
  if (tag === "meta" && /refresh/i.test(node.httpEquiv)) found.push("refresh");
  for (const a of node.attributes) {
    if (/^on/i.test(a.name)) found.push(`${tag} ${a.name}`);
    if (/^(href|xlink:href|src|action|data|poster|srcdoc|style|background|formaction)$/i.test(a.name)
        && (a.value.includes(host) || /javascript:|file:\\/\\/\\/etc|expression/i.test(a.value)))
      found.push(`${tag} ${a.name}`);
  }
  return found; })"""
"""Elements and attributes that no view of ours makes."""
_TOUCH = """() => document.querySelectorAll("body *").forEach((node) => ["mouseover", "mouseenter", "focus", "focusin",
  "load", "error"].forEach((name) => node.dispatchEvent(new Event(name, {bubbles: true}))))"""


class Watched:
    """Opens pages and collects in `noted` what went on: (what, of what). Addresses beginning with `own` are its own."""

    def __init__(self, browser: Any, *own: str):
        self.noted: list[tuple[str, str]] = []
        self.context = browser.new_context(viewport={"width": 1300, "height": 1000})
        self.page = self.context.new_page()
        self._allowed: tuple[str, ...] = ()
        self._beginnings = ("blob:null/", "about:", *own)
        self.context.route("**/*", self._asked)  # what a policy blocks does not come so far
        self.context.on("requestfinished", lambda r: self._local(r.url))
        self.context.on("page", lambda page: self.noted.append(("opened a window", page.url)))
        self.page.on("dialog", lambda dialog: (self.noted.append(("executed", "dialog")), dialog.dismiss()))
        self.page.on("console", lambda m: self.noted.append(("console", m.text)) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.noted.append(("error", str(error))))
        self.page.on("framenavigated", lambda f: None if self._own(f.url) else self.noted.append(("led to", f.url)))

    def _asked(self, route: Any) -> None:
        if self._own(route.request.url):
            route.continue_()
        else:
            self.noted.append(("requested", route.request.url))
            route.abort()

    def _local(self, url: str) -> None:
        if url.startswith("file:") and not self._own(url):
            self.noted.append(("read", url))

    def _own(self, url: str) -> bool:
        return url.partition("#")[0] in self._allowed or url.startswith(self._beginnings)

    def open(self, path: Path, *beside: Path) -> Any:
        """Open a file; `beside` are the files that it may load."""
        self._allowed = tuple(p.resolve().as_uri() for p in (path, *beside))
        self.page.goto(self._allowed[0])
        return self.page

    def settled(self, milliseconds: int) -> list[tuple[str, str]]:
        """Touch every element, wait, and take what was noted so far."""
        self.page.evaluate(_TOUCH)
        self.page.wait_for_timeout(milliseconds)
        ran = [f.url for f in self.page.frames if f.evaluate("window.hostile !== undefined")]
        noted, self.noted = self.noted + [("executed", url) for url in ran], []
        return noted

    def harmless(self, texts: Iterable[str] = (), *, milliseconds: int = 200) -> None:
        """Nothing was executed, requested, read or made, and every text can be read."""
        assert self.settled(milliseconds) == []
        assert self.page.evaluate(_FOUND, HOST) == []
        shown = squeezed(self.page.evaluate(_TEXT))
        assert "root:x:0:" not in shown, "a file was read"
        missing = [text for text in texts if squeezed(visible(text))[:LABEL - 60] not in shown]
        assert missing == [], "text that cannot be read any more"


def squeezed(text: str) -> str:
    """Without white space, the marks that a view puts at line ends and tabs, and the brackets around codes."""
    return re.sub(r"[\s↵→\[\]]", "", text)


def harness(path: Path, module: str, style: str, state: Mapping[str, Any]) -> Path:
    """A page that runs a widget's module."""
    from sgpo_lib.escaping import json_html

    script = str(module).replace("export default", "const widget =")
    path.write_text(HARNESS % (style, script.replace("</", "<\\/"), json_html(dict(state))), encoding="utf-8")
    return path

"""Numbers and formulas in words: `two hundred and forty`, `eleven thirtieths`, `9 choose 4`, `four times the square
root of three`. Each is found with its place and given as LaTeX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_UNITS = {word: i for i, word in enumerate(re.findall(
    "[a-z]+", "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"))}  # fmt: skip
_TENS = {word: 10 * i for i, word in enumerate(re.findall(
    "[a-z]+", "twenty thirty forty fifty sixty seventy eighty ninety"), start=2)}  # fmt: skip
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "dozen": 12}
_ORDINALS = {word: i for i, word in enumerate(re.findall(
    "[a-z]+", "third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth"), start=3)}  # fmt: skip
_PARTS = {"half": 2, "halves": 2, "quarter": 4, **_ORDINALS, "hundredth": 100, "thousandth": 1000,
          **{ten.removesuffix("y") + "ieth": value for ten, value in _TENS.items()}}  # fmt: skip

def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + r")\b"


_SMALL = rf"(?:{_any(_TENS)}(?:[\s-]{_any(list(_UNITS)[1:10])})?|{_any(_UNITS)})"
_HUNDREDS = rf"{_SMALL}(?:[\s-]+hundred\b(?:[\s-]+(?:and[\s-]+)?{_SMALL})?|[\s-]+dozen\b)?"
_CARDINAL = rf"{_HUNDREDS}(?:[\s-]+(?:thousand|million)\b(?:,?\s+(?:and\s+)?{_HUNDREDS})?){{0,3}}"
_N = rf"(?:{_CARDINAL}|\d[\d,]*(?:\.\d+)?)"
_PART = rf"(?:(?:{'|'.join(_TENS)})[\s-])?(?:{'|'.join(sorted(_PARTS, key=len, reverse=True))})s?"
_ROOT = r"(?:the\s+)?(?:square\s+)?root\s+(?:of\s+)?"
_LOG = r"(?:the\s+)?(?:natural\s+)?(?:logarithm|log|ln)\s+(?:of\s+)?"
_FACTOR = rf"(?:{_ROOT}{_N}|{_LOG}{_N}|{_N}(?:\s+(?:squared|cubed))?|pi)"
_PATTERNS = [
    ("mixed", rf"(?P<w>{_N})\s+and\s+(?P<n>an?|one|{_N})[\s-]+(?P<p>{_PART})"),
    ("formula", rf"(?P<a>{_FACTOR})(?P<b>(?:\s+(?:times|plus|minus|over|divided\s+by)\s+(?:{_FACTOR})|"
                rf"\s+(?:{_ROOT}{_N}|{_LOG}{_N}|pi)|\s+(?:squared|cubed))+)"),
    ("formula", rf"(?P<a>{_ROOT}{_N}|{_LOG}{_N})(?P<b>)"),
    ("choose", rf"(?P<n>{_N})\s+choose\s+(?P<k>{_N})"),
    ("share", rf"(?<!from )(?P<n>{_N})\s+(?:out\s+of|in\s+every|in|to)\s+(?P<k>{_N})"),
    ("part", rf"(?P<n>{_N})[\s-]+(?P<p>{_PART})"),
    ("a part", rf"(?P<n>an?)[\s-]+(?P<p>{_PART})"),
    ("scaled", rf"(?P<s>half|twice|double|triple|thrice|(?:the\s+)?square|(?:the\s+)?cube)\s+(?:of\s+)?(?P<n>{_N})"),
    ("scale", rf"(?P<n>an?|\d+(?:\.\d+)?)\s+(?P<s>{'|'.join(_SCALES)})"),
    ("point", rf"(?P<n>{_CARDINAL})\s+point(?P<d>(?:\s+(?:{'|'.join(_UNITS)}))+)"),
    ("cardinal", rf"(?P<n>{_CARDINAL})"),
]  # fmt: skip
_MINUS = r"(?P<minus>(?:minus|negative)\s+)?"
_FOUND = [(name, re.compile(rf"(?<![\w.,$\\-]){_MINUS if name in ('mixed', 'part', 'point', 'cardinal') else ''}"
                            rf"(?:{pattern})(?P<percent>\s+per\s?cent)?(?![\w$])", re.IGNORECASE))
          for name, pattern in _PATTERNS]  # fmt: skip


def cardinal(words: str) -> int:
    """`two hundred and forty-one` -> 241; `a dozen` -> 12."""
    total = group = 0
    for word in re.findall("[a-z]+", words.lower()):
        if word in _UNITS or word in _TENS:
            group += _UNITS.get(word, 0) + _TENS.get(word, 0)
        elif word in ("hundred", "dozen"):
            group = max(group, 1) * _SCALES[word]
        elif word in _SCALES:
            total, group = total + max(group, 1) * _SCALES[word], 0
    return total + group


def spoken(text: str) -> Iterator[tuple[int, int, str, str]]:
    """(start, end, LaTeX, kind) of everything said in words, the longest readings first; places may overlap.

    Kinds: those of `_PATTERNS`; `share` (3 in 10) and `a part` (a third) may be ways to speak and no numbers.
    """
    for name, pattern in _FOUND:
        for m in pattern.finditer(text):
            parts = m.groupdict()
            tex = _TEX[name](parts)
            if parts.get("minus"):
                tex = f"-({tex})" if "+" in tex else f"-{tex}"
            if tex:
                yield m.start(), m.end(), f"({tex})/100" if parts["percent"] else tex, name


def _number(words: str | None) -> str:
    words = words or ""
    if words.lower() in ("a", "an"):
        return "1"
    return words.replace(",", "") if words[:1].isdigit() else str(cardinal(words))


def _bottom(part: str) -> int:
    *tens, name = re.split(r"[\s-]", part.lower())
    name = name if name in _PARTS else name.removesuffix("s")
    return _PARTS[name] + sum(_TENS[t] for t in tens)


def _factor(words: str) -> str:
    words = words.strip().lower()
    number = _number(n[0]) if (n := re.search(rf"{_N}", words)) else ""
    if re.search(r"\broot\b", words):
        return rf"\sqrt{{{number}}}"
    if re.search(r"\b(?:logarithm|log|ln)\b", words):
        return rf"\ln {number}"
    if words == "pi":
        return r"\pi "
    return number + {"squared": "^2", "cubed": "^3"}.get(words.split()[-1], "")


def _formula(parts: dict[str, str]) -> str:
    """Operators between factors; factors that stand beside one another multiply."""
    tex, rest = _factor(parts["a"]), parts["b"] or ""
    signs = {"times": r"\cdot ", "plus": "+", "minus": "-", "over": "/", "divided": "/"}
    for m in re.finditer(rf"\s+(?:(times|plus|minus|over|divided)(?:\s+by)?\s+({_FACTOR})|(squared|cubed)|({_FACTOR}))",
                         rest, re.IGNORECASE):  # fmt: skip
        if m[1]:
            tex += signs[m[1].lower()] + _factor(m[2])
        else:
            tex += {"squared": "^2", "cubed": "^3"}[m[3].lower()] if m[3] else _factor(m[4])
    return tex


def _part(parts: dict[str, str]) -> str:
    return rf"\frac{{{_number(parts['n'])}}}{{{_bottom(parts['p'])}}}"


def _mixed(parts: dict[str, str]) -> str:
    proper = float(_number(parts["n"])) < _bottom(parts["p"])
    return _number(parts["w"]) + ("" if proper else "+") + _part(parts)


def _scaled(parts: dict[str, str]) -> str:
    said = re.sub(r"the\s+", "", parts["s"].lower())
    form = {"half": "{}/2", "twice": r"2 \cdot {}", "double": r"2 \cdot {}", "triple": r"3 \cdot {}",
            "thrice": r"3 \cdot {}", "square": "{}^2", "cube": "{}^3"}[said]  # fmt: skip
    return form.format(_number(parts["n"]))


def _point(parts: dict[str, str]) -> str:
    return f"{cardinal(parts['n'])}." + "".join(str(_UNITS[w]) for w in re.findall("[a-z]+", parts["d"].lower()))


_TEX = {
    "mixed": _mixed, "formula": _formula,
    "choose": lambda p: rf"\binom{{{_number(p['n'])}}}{{{_number(p['k'])}}}",
    "share": lambda p: f"{_number(p['n'])}/{_number(p['k'])}", "part": _part, "a part": _part, "scaled": _scaled,
    "scale": lambda p: rf"{_number(p['n'])}\cdot {_SCALES[p['s'].lower()]}", "point": _point,
    "cardinal": lambda p: str(cardinal(p["n"])),
}  # fmt: skip

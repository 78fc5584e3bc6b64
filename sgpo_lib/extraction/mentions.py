"""Every number, expression and statement of a text, with its place: what the leak check compares.

A mention is a numeral in any usual spelling (1,755; 479 196; 8¼; 53.65%; 3 : 10; $5 \\times 10^3$), a number in words
(two hundred and forty; eleven thirtieths), a formula between dollar signs or a bare one (4√3, 7 + 41, 14c = 4v).
String work and exact arithmetic only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from sgpo_lib.answers import exact, normalise
from sgpo_lib.extraction.words import spoken


@dataclass(frozen=True)
class Mention:
    """A place of a text that says a number or an expression."""

    start: int
    end: int
    text: str
    tex: str
    """Normalised LaTeX (`answers.normalise`)."""
    value: Fraction | None
    """Where it is a plain number."""
    form: str
    """`number`, `words`, `ratio` (3 in 10, a third: if it is one), `expression` or `relation`."""
    side: bool = False
    """One side or item of a longer formula."""


_DIGITS = r"(?:\d{1,3}(?:[,  ]\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_NUMERAL = rf"(?:{_DIGITS}(?:[eE][-+]?\d{{1,3}}(?!\w))?!?|\.\d+)"
_VULGAR = "(?:[¼-¾⅐-⅞]|[⁰¹²³⁴-⁹]+[⁄/][₀-₉]+)"
_ATOM = rf"(?:{_NUMERAL}\s?{_VULGAR}?|{_VULGAR}|[√]\s?\(?{_NUMERAL}\)?|π|\bpi\b|\b(?:ln|log|sqrt)\s?\(?{_NUMERAL}\)?)"
_POWER = r"(?:\^\{?[-\d/]+\}?|[⁰¹²³⁴-⁹⁻]+)?"
_TERM = rf"{_ATOM}{_POWER}(?:\s?{_ATOM}{_POWER})*"
_OPERATOR = r"\s?(?:[-+*/×·⋅÷⁄−:]|\\cdot|\\times)\s?"
_BARE = rf"(?<![\w.\\$^_])[-−]?\(?{_TERM}\)?(?:{_OPERATOR}\(?[-−]?{_TERM}\)?)*\s?(?:%|percent\b|per cent\b)?"
_NAMED = r"(?:ln|log|exp|arctan|sin|cos|tan|sqrt)\b"
_LETTER = rf"(?:(?<![a-zA-Z]){_NAMED}|(?<![a-zA-Z])[b-hi-zB-HJ-Z](?![a-zA-Z]))"
_PIECE = rf"(?:{_LETTER}|[√π\d.()^¼-¾⅐-⅞²³¹⁰-ⁿˣ]|\s?[-+*/·×−⁄∕]\s?|(?<=[\dπ)])\s(?={_LETTER})|(?<=n)\s(?=\d))"
_MIXED = rf"(?<![\w.\\$]){_PIECE}++"
"""Bare expressions: 2 + 3i, 2e + 4/√e, 5 ln 3. Those with a letter count."""
_BRACED = r"\{[^{}$]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*\}"
_HEAD = rf"\\(?:[dtc]?frac|sqrt|binom)\s?(?:{_BRACED}|\d){{1,2}}"
_NUM = r"(?<![\w.])\d{1,9}(?:\.\d{1,9})?"
_SIGN = r"\s?(?:[-+*/]|\\cdot|\\times)\s?"
_LATEX = (rf"(?:{_NUM}{_SIGN}){{0,3}}(?:(?<![\w)}}])-)?(?:{_NUM}\s?)?{_HEAD}"
          rf"(?:{_SIGN}(?:{_NUM}|{_HEAD}|\\pi\b|[b-z]\b)|\s?{_HEAD}|\s?\\pi\b|[b-z]\b|\^(?:\{{\w+\}}|\w))*")
_TOKEN = (rf"(?:{_NUMERAL}|{_VULGAR}|[√π]|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])(?:[\^_](?:\{{\w+\}}|\w))?"
          r"|[-+*/^()×·−]|[⁰¹²³⁴-⁹⁻]+|\\cdot|\\times)")
_SIDE = rf"(?>{_TOKEN}(?:\s?{_TOKEN})*)"
_LETTERS = rf"(?<![\w\\$]){_SIDE}(?:\s?(?:=|≤|≥|<|>|≈|\\[lg]eq?(?![a-z]))\s?{_SIDE})*"
"""Sides of bare relations. Those with a relation between them count."""
_ITEM = rf"\s?[-−]?(?>{_NUMERAL}(?:/\d+)?)"
_LIST = rf"(?<![\w\\$])[(\[{{]{_ITEM}(?:,{_ITEM})++\s?[)\]}}]"
"""Bare pairs, intervals and sets of numbers: (3, 17)."""
_NO_FORMULA = re.compile(r"(?<!\S)\([a-z]\)(?=\s)(?!\s[-+*/=^])|(?<!\S)a(?= [a-zA-Z]{2})")
"""The letter of a step, and an article."""
_FORMULA = re.compile(r"(?P<boxed>\$?\\boxed\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}\$?)"
                      r"|(?P<math>\$\$[^$]+\$\$|\$[^$]+\$|\\\((?:[^\\]|\\[^()])++\\\)|\\\[(?:[^\\]|\\[^\[\]])++\\\])"
                      rf"|(?P<latex>{_LATEX})", re.DOTALL)  # fmt: skip
_RELATION = re.compile(r"=|\\(?:le|ge|leq|geq|lt|gt|ne|neq|in|approx|equiv|to|mid)(?![a-zA-Z])|<|>|≤|≥|≈|\\implies")

# ---------------------------------------------------------------------------------------------------- formulas


def mentions(text: str) -> list[Mention]:
    """All mentions of a text in order. A formula gives itself and, where it is a relation or a list, its sides."""
    found: list[Mention] = []
    taken = bytearray(len(text))

    def free(start: int, end: int) -> bool:
        return not any(taken[start:end])

    def take(start: int, end: int) -> None:
        taken[start:end] = b"\1" * (end - start)

    for m in _FORMULA.finditer(text):
        found += _formula(text, m.start(), m.end())
        take(m.start(), m.end())
    for start, end, tex, kind in spoken(re.sub("[\u2010\u2011]", "-", text)):  # typographic hyphens
        if not free(start, end):
            continue
        said = _mention(start, end, text[start:end], tex, side=False)
        if kind in ("share", "a part"):  # besides its two numbers, which are mentions of their own
            found.append(replace(said, form="ratio"))
        else:
            found.append(replace(said, form="words" if said.value is not None else "expression"))
            take(start, end)
    bare = _NO_FORMULA.sub(lambda m: " " * len(m[0]), text)
    for pattern, needed in ((_LIST, ""), (_LETTERS, _RELATION), (_MIXED, "[a-zA-Z]"), (_BARE, "")):
        for m in re.finditer(pattern, bare):
            if not re.search(needed, m[0]):
                continue
            start, end = _trimmed(text, m.start(), m.end())
            if end <= start or not free(start, end) or re.search(r"[\d¼-¾⅐-⅞π⁰-₉]", text[start:end]) is None:
                continue
            if pattern != _LETTERS and re.match(r"(?:st|nd|rd|th)\b", text[end : end + 3]):
                continue  # an ordinal
            found += _formula(text, start, end)
            take(start, end)
    return sorted(found, key=lambda m: (m.start, m.side))


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The bare formula without punctuation around it and without a parenthesis that it does not close or open."""
    more = text.count("(", start, end) - text.count(")", start, end)
    while start < end:
        if text[end - 1] in " .,;:-+*/(" or (more < 0 and text[end - 1] == ")"):
            end -= 1
            more += {"(": -1, ")": 1}.get(text[end], 0)
        elif text[start] in " ,;:+*/)" or (more > 0 and text[start] == "("):
            more += {"(": -1, ")": 1}.get(text[start], 0)
            start += 1
        else:
            break
    return start, end


def _formula(text: str, start: int, end: int) -> Iterator[Mention]:
    raw = text[start:end]
    inner = re.sub(r"^(?:\$\$?|\\\(|\\\[)|(?:\$\$?|\\\)|\\\])$", "", raw.strip())
    boxed = re.fullmatch(r"\$?\\boxed\{(.*)\}\$?", raw.strip(), re.DOTALL)
    inner = boxed[1] if boxed else inner
    yield _mention(start, end, raw, inner, side=False)
    sides = [s for s in _RELATION.split(inner) if s.strip()]
    items = [i for s in sides for i in re.split(r"(?<!\{),(?!\d{3}(?!\d))|;|\\ldots|\\dots|\\{|\\}", s) if i.strip()]
    if len(items) > 1:
        for item in items:
            alone = item.strip().strip("()[]")  # an end of a pair
            yield _mention(start, end, raw, alone if re.fullmatch(r"-?[\d.]+", alone) else item, side=True)


def _mention(start: int, end: int, raw: str, inner: str, *, side: bool) -> Mention:
    inner = re.sub(r"\s?(?:percent|per cent)\b", "%", inner).replace("\\quad", " ")
    inner = inner.replace("ˣ", "^x").replace("∕", "/")
    inner = re.sub(r"\s?([¼-¾⅐-⅞])", _vulgar, inner)
    inner = re.sub(r"([⁰¹²³⁴-⁹]+)[⁄/]([₀-₉]+)", _raised, inner)
    inner = re.sub(rf"(?<![\\a-z])({_NAMED})\s?", r"\\\1 ", inner).replace("\\pi", "\\pi ")
    tex = normalise(re.sub(r"(?<=\d)[  ](?=\d{3}(?!\d))", "", inner).replace("\u2009", ""))
    ratio = re.fullmatch(r"(\d{1,99}(?:\.\d{1,99})?):(\d{1,99}(?:\.\d{1,99})?)", tex.replace(" ", ""))
    value = Fraction(ratio[1]) / Fraction(ratio[2]) if ratio and Fraction(ratio[2]) else exact(tex)
    if value is None:
        value = arithmetic(tex)
    form = "relation" if _RELATION.search(inner) and not side else "number" if value is not None else "expression"
    return Mention(start, end, raw, tex, value if form == "number" else None, form, side)


def _vulgar(match: re.Match[str]) -> str:
    value = Fraction(unicodedata.numeric(match[1])).limit_denominator(10)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _raised(match: re.Match[str]) -> str:
    top, bottom = (unicodedata.normalize("NFKC", part) for part in match.groups())
    return rf"\frac{{{top}}}{{{bottom}}}"


def arithmetic(tex: str) -> Fraction | None:
    """Value of sums, products and integer powers of plain numbers; None for anything else."""
    plain = re.sub(r"\\(?:d|t|c)?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", tex)
    plain = re.sub(r"\\(?:cdot|times) ?", "*", plain).replace("{", "(").replace("}", ")")
    if re.search(r"\d\s+\d", plain):  # two numbers beside one another
        return None
    plain = plain.replace(" ", "")
    plain = re.sub(r"(?<=[\d)])(?=\()", "*", plain)
    if not re.fullmatch(r"[-+*/^().\d]{1,80}", plain) or re.search(r"\^\(?\d{4}", plain):
        return None
    try:
        value, rest = _sum(re.findall(r"\d+\.?\d*|\.\d+|.", plain))
    except (ValueError, ZeroDivisionError, IndexError, OverflowError):  # a model's text
        return None
    return value if not rest else None


def _sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    total, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        sign, tokens = tokens[0], tokens[1:]
        term, tokens = _product(tokens)
        total = total + term if sign == "+" else total - term
    return total, tokens


def _product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    total, tokens = _power(tokens)
    while tokens and tokens[0] in "*/":
        sign, tokens = tokens[0], tokens[1:]
        factor, tokens = _power(tokens)
        total = total * factor if sign == "*" else total / factor
    return total, tokens


def _power(tokens: list[str]) -> tuple[Fraction, list[str]]:
    if tokens[0] == "-":
        value, tokens = _power(tokens[1:])
        return -value, tokens
    if tokens[0] == "(":
        value, tokens = _sum(tokens[1:])
        if tokens[0] != ")":
            raise ValueError("unbalanced")
        tokens = tokens[1:]
    else:
        value, tokens = Fraction(tokens[0]), tokens[1:]
    if tokens and tokens[0] == "^":
        exponent, tokens = _power(tokens[1:])
        if exponent.denominator != 1 or abs(exponent) > 200:
            raise ValueError("no small whole exponent")
        value = value ** int(exponent)
    return value, tokens

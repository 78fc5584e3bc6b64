"""Every number, expression and statement of a text, with its place: what the leak check compares.

A mention is a numeral in any usual spelling (1,755; 479 196; 8¼; 53.65%; 3 : 10; $5 \\times 10^3$), a number in words
(two hundred and forty; eleven thirtieths), a formula between dollar signs or a bare one (4√3, 7 + 41, 14c = 4v).
String work and exact arithmetic only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from sgpo_lib.answers import exact, normalise


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
    """`number`, `words`, `expression` or `relation`."""
    side: bool = False
    """One side or item of a longer formula."""


_DIGITS = r"(?:\d{1,3}(?:[,  ]\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_NUMERAL = rf"(?:{_DIGITS}|\.\d+)"
_VULGAR = "[¼-¾⅐-⅞]"
_ATOM = rf"(?:{_NUMERAL}\s?{_VULGAR}?|{_VULGAR}|[√]\s?\(?{_NUMERAL}\)?|π|\bpi\b|\b(?:ln|log|sqrt)\s?\(?{_NUMERAL}\)?)"
_POWER = r"(?:\^\{?[-\d/]+\}?|[⁰¹²³⁴-⁹⁻]+)?"
_TERM = rf"{_ATOM}{_POWER}(?:\s?{_ATOM}{_POWER})*"
_OPERATOR = r"\s?(?:[-+*/×·⋅÷⁄−:]|\\cdot|\\times)\s?"
_BARE = rf"(?<![\w.\\$^_])[-−]?\(?{_TERM}\)?(?:{_OPERATOR}\(?[-−]?{_TERM}\)?)*\s?(?:%|percent\b|per cent\b)?"
_BRACED = r"\{[^{}$]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*\}"
_LATEX = rf"[-\d.\s]*\\(?:[dtc]?frac|sqrt|binom)\s*(?:{_BRACED}|\d){{1,2}}[ \d\\a-z{{}}^+*/-]*"
_TOKEN = (rf"(?:{_NUMERAL}|{_VULGAR}|[√π]|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])(?:[\^_](?:\{{\w+\}}|\w))?"
          r"|[-+*/^()×·−]|[⁰¹²³⁴-⁹⁻]+|\\cdot|\\times)")
_SIDE = rf"{_TOKEN}(?:\s?{_TOKEN})*"
_LETTERS = rf"(?<![\w\\$]){_SIDE}(?:\s?(?:=|≤|≥|<|>|≈|\\le|\\ge)\s?{_SIDE})+"
_FORMULA = re.compile(r"(?P<boxed>\$?\\boxed\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}\$?)"
                      r"|(?P<math>\$\$[^$]+\$\$|\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\])"
                      rf"|(?P<latex>{_LATEX})", re.DOTALL)  # fmt: skip
_RELATION = re.compile(r"=|\\(?:le|ge|leq|geq|lt|gt|ne|neq|in|approx|equiv|to|mid)(?![a-zA-Z])|<|>|≤|≥|≈|\\implies")

# ---------------------------------------------------------------------------------------------------- words

_UNITS = {word: i for i, word in enumerate(re.findall(
    "[a-z]+", "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"))}  # fmt: skip
_TENS = {word: 10 * i for i, word in enumerate(re.findall(
    "[a-z]+", "twenty thirty forty fifty sixty seventy eighty ninety"), start=2)}  # fmt: skip
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7,
          "eighth": 8, "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12, "thirteenth": 13, "fourteenth": 14,
          "fifteenth": 15, "sixteenth": 16, "seventeenth": 17, "eighteenth": 18, "nineteenth": 19, "twentieth": 20,
          "thirtieth": 30, "fortieth": 40, "fiftieth": 50, "sixtieth": 60, "hundredth": 100, "thousandth": 1000,
          }  # fmt: skip
_WORD = "|".join([*_UNITS, *_TENS, *_SCALES])
_CARDINAL = rf"(?:{_WORD})(?:[\s-]+(?:and[\s-]+)?(?:{_WORD}))*"
_PART = "|".join(sorted({*(p for p in _PARTS), "halves"}, key=len, reverse=True))
_WORDS = re.compile(rf"\b(?P<n>{_CARDINAL}|an?)[\s-]+(?:(?P<tens>{'|'.join(_TENS)})[\s-])?(?P<part>{_PART})s?\b"
                    rf"|\b(?P<cardinal>{_CARDINAL})(?P<point>\s+point(?:\s+(?:{_WORD}))+)?(?P<percent>\s+per\s?cent)?\b"
                    rf"(?!-(?!.*\b(?:{_WORD})\b))", re.IGNORECASE)  # fmt: skip


def cardinal(words: str) -> int:
    """`two hundred and forty-one` -> 241."""
    total = group = 0
    for word in re.findall("[a-z]+", words.lower()):
        if word in _UNITS or word in _TENS:
            group += _UNITS.get(word, 0) + _TENS.get(word, 0)
        elif word == "hundred":
            group = max(group, 1) * 100
        elif word in _SCALES:
            total, group = total + max(group, 1) * _SCALES[word], 0
    return total + group


_SPOKEN = re.compile(
    rf"\b(?:{_CARDINAL})(?:\s+(?:times|plus|minus|over|divided by|of|the|a|natural|logarithm|log|ln|square|root|"
    rf"squared|cubed|pi|thirds?|halves|quarters?|{_CARDINAL}))+\b|\b(?:the\s+)?(?:square root|natural logarithm) of "
    rf"(?:{_CARDINAL})(?:\s+(?:times|plus|minus|over|divided by|the|square|root|of|pi|{_CARDINAL}))*\b", re.IGNORECASE)
"""A formula in words: `four times the square root of three`, `seventy pi`."""
_SAID = (("divided by", "/"), ("over", "/"), ("times", "*"), ("plus", "+"), ("minus", "-"),
         (r"(?:the )?(?:natural logarithm|natural log|ln|log)(?: of)?", r" \\ln "),
         (r"(?:the )?square root(?: of)?|root(?: of)?", r" \\sqrt "), ("squared", "^2"), ("cubed", "^3"),
         ("pi", r" \\pi "), (r"\b(?:of|the|a)\b", " "))  # fmt: skip


def _spoken(text: str) -> Iterator[Mention]:
    for m in _SPOKEN.finditer(text):
        if not re.search(r"\b(?:pi|root|logarithm|log|ln|times|plus|minus|over|divided|squared|cubed)\b", m[0].lower()):
            continue
        tex = re.sub(rf"\b{_CARDINAL}\b", lambda n: str(cardinal(n[0])), m[0].lower())
        for said, form in _SAID:
            tex = re.sub(rf"\b(?:{said})\b" if said[0].isalpha() else said, form, tex)
        tex = re.sub(r"\\sqrt\s+(\d+)", r"\\sqrt{\1}", tex)
        if not re.search(r"[a-z]{3}|[-+*/]\s*$", re.sub(r"\\[a-z]+", "", tex)):
            found = _mention(m.start(), m.end(), m[0], tex, side=False)
            yield Mention(m.start(), m.end(), m[0], found.tex, found.value, "words" if found.value else "expression")


def _word_mentions(text: str) -> Iterator[Mention]:
    for m in _WORDS.finditer(text):
        if m["part"]:
            one = m["n"].lower() in ("a", "an")
            part = m["part"].lower()
            bottom = 2 if part == "halves" else _PARTS[part] + (_TENS[m["tens"].lower()] if m["tens"] else 0)
            value = Fraction(1 if one else cardinal(m["n"]), bottom)
            if one or (value == 1 and bottom == 1):
                continue  # "a third of", "a fifth": a way to speak, not a result
        else:
            value = Fraction(cardinal(m["cardinal"]))
            if m["point"]:
                digits = "".join(str(cardinal(w)) for w in re.findall("[a-z]+", m["point"].lower())[1:])
                value += Fraction(int(digits), 10 ** len(digits))
            value = value / 100 if m["percent"] else value
        yield Mention(m.start(), m.end(), m[0], str(value), value, "words")


# ---------------------------------------------------------------------------------------------------- formulas


def mentions(text: str) -> list[Mention]:
    """All mentions of a text in order. A formula gives itself and, where it is a relation or a list, its sides."""
    found: list[Mention] = []
    taken = bytearray(len(text))

    def free(start: int, end: int) -> bool:
        return not any(taken[start:end])

    for m in _FORMULA.finditer(text):
        found += _formula(text, m.start(), m.end())
        taken[m.start() : m.end()] = b"\1" * (m.end() - m.start())
    for pattern, relation in ((_LETTERS, True), (_BARE, False)):
        for m in re.finditer(pattern, text):
            start, end = _trimmed(text, m.start(), m.end())
            if end <= start or not free(start, end) or re.search(r"\d|[¼-¾⅐-⅞]|π", text[start:end]) is None:
                continue
            if not relation and re.match(r"(?:st|nd|rd|th)\b", text[end : end + 3]):
                continue  # an ordinal
            found += _formula(text, start, end)
            taken[start:end] = b"\1" * (end - start)
    for spoken in (m for m in _spoken(text) if free(m.start, m.end)):
        found.append(spoken)
        taken[spoken.start : spoken.end] = b"\1" * (spoken.end - spoken.start)
    found += [m for m in _word_mentions(text) if free(m.start, m.end)]
    return sorted(found, key=lambda m: (m.start, m.side))


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The bare formula without punctuation around it and without a parenthesis that it does not close or open."""
    while start < end and text[end - 1] in " .,;:-+*/(":
        end -= 1
    while start < end and text[start] in " ,;:+*/)":
        start += 1
    inner = text[start:end]
    if inner.count("(") > inner.count(")") and inner.startswith("("):
        return _trimmed(text, start + 1, end)
    if inner.count(")") > inner.count("(") and inner.endswith(")"):
        return _trimmed(text, start, end - 1)
    return start, end


def _formula(text: str, start: int, end: int) -> Iterator[Mention]:
    raw = text[start:end]
    inner = re.sub(r"^(?:\$\$?|\\\(|\\\[)|(?:\$\$?|\\\)|\\\])$", "", raw.strip())
    boxed = re.fullmatch(r"\$?\\boxed\{(.*)\}\$?", raw.strip(), re.DOTALL)
    inner = boxed[1] if boxed else inner
    yield _mention(start, end, raw, inner, side=False)
    sides = [s for s in _RELATION.split(inner) if s.strip()]
    items = [i for s in sides for i in re.split(r",(?!\d{3}(?!\d))|;|\\ldots|\\dots|\\{|\\}", s) if i.strip()]
    if len(items) > 1:
        for item in items:
            yield _mention(start, end, raw, item, side=True)


def _mention(start: int, end: int, raw: str, inner: str, *, side: bool) -> Mention:
    inner = re.sub(r"\s*(?:percent|per cent)\b", "%", inner).replace("\\quad", " ")
    inner = re.sub(r"(\d)\s*(?=[¼-¾⅐-⅞])", r"\1 ", inner)
    inner = re.sub(r"(?<![\\a-z])(ln|log|sqrt)\s?(?=[\d(])", r"\\\1 ", inner).replace("\\pi", "\\pi ")
    tex = normalise(re.sub(r"(?<=\d)[  ](?=\d{3}(?!\d))", "", inner).replace("\u2009", ""))
    ratio = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", tex.replace(" ", ""))
    value = Fraction(ratio[1]) / Fraction(ratio[2]) if ratio and Fraction(ratio[2]) else exact(tex)
    if value is None:
        value = _arithmetic(tex)
    form = "relation" if _RELATION.search(inner) and not side else "number" if value is not None else "expression"
    return Mention(start, end, raw, tex, value if form == "number" else None, form, side)


def _arithmetic(tex: str) -> Fraction | None:
    """Value of sums, products and integer powers of plain numbers; None for anything else."""
    plain = re.sub(r"\\(?:d|t|c)?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", tex)
    plain = re.sub(r"\\(?:cdot|times) ?", "*", plain).replace("{", "(").replace("}", ")").replace(" ", "")
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

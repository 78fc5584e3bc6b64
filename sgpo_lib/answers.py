"""Final answers as text: find the answer of a response, give it one spelling, and read plain numbers.

String work and exact rational arithmetic only: no computer algebra, no evaluation of text. What two answers have to
do with each other is decided one module on, in `equivalence.py`. Order: answers, equivalence, reward_worker, rewards.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_LENGTH = 1000
"""Longest expression in characters that is read as a number or reaches the algebra; twice that is normalised."""
HUGE = 25_000
"""Longest text in characters that is rewritten at all."""
OPENING = ("(", "[", "{", r"\{", r"\langle")
CLOSING = (")", "]", "}", r"\}", r"\rangle")


# ------------------------------------------------------------------------------------------------- extraction

_BOX = re.compile(r"\\(?:boxed|fbox)\s*$")
_STATED = re.compile(r"\banswer\b[\s*_]{0,4}(?:is(?=[\s:*$\\])|:|=)[\s:*_]{0,8}", re.IGNORECASE)
_TAKEN_BACK = re.compile(r"\b(?:no|not|wait|wrong|incorrect|but|however|actually|fails|hmm|oops|sorry|instead|mistake"
                         r"|correction|re-?check|should be)\b", re.IGNORECASE)
_SUPPOSED = re.compile(r"\b(?:if|suppose|supposing|assum\w+|whether|unless|guess|wrong|incorrect|mistaken|possible)"
                       r"(?:\s+(?:that|the|my|our|an?|final|correct|right))*\s*$", re.IGNORECASE)


def after_thinking(completion: str | None) -> str:
    """Text after the last `</think>`; thinking that is still open is cut off."""
    text = re.split(r"</think(?:ing)?\s*>", completion or "", flags=re.IGNORECASE)[-1]
    return re.split(r"<think(?:ing)?\s*>", text, maxsplit=1, flags=re.IGNORECASE)[0]


def extract_answer(completion: str | None) -> str:
    r"""The final answer of a response as written, or `""`.

    The content of the last complete `\boxed{}` (or `\fbox{}`) after the last `</think>`. Without a box: the last of
    `<answer>..</answer>`, `#### ..`, `answer: ..`, `the answer is ..`, unless the words before suppose it or those
    after take it back.
    """
    text = after_thinking(completion)
    boxed = _last_box(text)
    if boxed is not None:
        return re.sub(r"\\(?:boxed|fbox)\s*(?=\{)", "", boxed).strip()
    if "\\boxed" in text or "\\fbox" in text:
        return ""  # a box that was never closed: the response was cut off
    tail = text[-4000:]
    if tags := re.findall(r"<answer>(.{1,1000}?)</answer>", tail, re.IGNORECASE | re.DOTALL):
        return str(tags[-1]).strip()
    if hashes := re.findall(r"^####[ \t]*(\S[^\n]{0,400})", tail, re.MULTILINE):
        return str(hashes[-1]).strip()
    found = list(_STATED.finditer(tail))
    if not found:
        return ""
    before, after = tail[:found[-1].start()][-80:], tail[found[-1].end():]
    line = after.partition("\n")[0][:400]
    stated = re.split(r"(?<=[^.])\.(?:\s|\**$)|\bI hope\b", line, maxsplit=1)[0].strip(" \t*_.")
    if "?" in stated or _SUPPOSED.search(before) or _TAKEN_BACK.search(after):
        return ""
    return stated


def _last_box(text: str) -> str | None:
    """Content of the box that closes last, in one pass over the text (no backtracking)."""
    stack: list[int | None] = []  # where the content of each open brace starts; None for a brace of no box
    span: tuple[int, int] | None = None
    for match in re.finditer(r"\\[\\{}]|[{}]", text):
        if match[0] == "{":
            box = _BOX.search(text, max(0, match.start() - 12), match.start())
            stack.append(match.end() if box else None)
        elif match[0] == "}" and stack and (start := stack.pop()) is not None:
            span = start, match.start()
    return text[slice(*span)] if span else None


# ---------------------------------------------------------------------------------------------- normalisation

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "‒": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ",
    "⋅": r"\cdot ", "∙": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "∅": r"\emptyset ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "⟨": r"\langle ", "⟩": r"\rangle ",
    "∛": r"\sqrt[3]", "∜": r"\sqrt[4]",
    "°": r"^\circ ", "⁄": "/", "∕": "/", "∶": ":", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "…": r"\ldots ",
    "′": "'", "∖": r"\setminus ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
}  # fmt: skip
_COMPOSED = (("[⁰¹²³⁴-⁹]+⁄[₀-₉]+", " %s"), ("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", "^{%s}"), ("[₀-₉]+", "_{%s}"), ("[¼-¾⅐-⅟↉]", " %s"))
"""Characters that NFKC would turn into plain digits on the line, and how they are written instead."""
_UNITS = {
    "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre", "m": "m meter metre",
    "km": "km kilometer kilometre", "in": "in inch inche", "ft": "ft foot feet", "mi": "mi mile", "yd": "yd yard",
    "g": "g gram", "kg": "kg kilogram", "lb": "lb pound", "oz": "oz ounce", "s": "s sec second", "min": "min minute",
    "h": "h hr hour", "day": "day", "week": "week", "month": "month", "yr": "yr year", "l": "l liter litre",
    "ml": "ml milliliter", "cent": "cent", "dollar": "dollar usd", "deg": "deg degree", "mph": "mph",
    "km/h": "km/h kph", "unit": "unit", "point": "point", "way": "way", "people": "people person",
}  # fmt: skip
_UNIT_OF = {word: unit for unit, words in _UNITS.items() for word in words.split()}
_TIMES = {"dozen": "12", "hundred": "100", "thousand": "10^3", "million": "10^6", "billion": "10^9",
          "trillion": "10^{12}"}  # fmt: skip
_NO_UNIT = re.compile(
    r"[\d?!:;]|\.\.|^(?:mod|is)\b|\b(?:or|and|not|if|where|for|to|times|plus|minus|least|most|more|less|than|base|but"
    r"|wrong|incorrect|no|none|maybe|perhaps|about|roughly|nearly|approximately|except|squared|cubed|factorial|half"
    r"|halves|thirds?|fourths?|fifths?|quarters?|tenths?)\b")
"""Words after a number that are no unit of it."""
_STYLE = (r"text(?:bf|it|rm|normal|tt|sf|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|boldsymbol|bm|emph|underline")
_SAME_MACROS = (("leq|leqslant", r"\le"), ("geq|geqslant", r"\ge"), ("neq", r"\ne"), ("dots|cdots|dotsc", r"\ldots"),
                ("varnothing|O", r"\emptyset"), ("lbrack", "["), ("rbrack", "]"), ("lvert|rvert|vert", "|"),
                ("colon", ":"), ("lbrace", r"\{"), ("rbrace", r"\}"))  # fmt: skip
_OLD_FRACTIONS = {"over": "frac", "choose": "binom"}
_OLD_STYLE = r"bf|it|rm|tt|sf|em|tiny|small|large|Large|LARGE|huge|Huge|displaystyle|textstyle|scriptstyle"


def _few_marks(text: str) -> str:
    """At most four marks over a letter: NFKC takes time with the square of how many there are."""
    kept, run = [], 0
    for c in text:
        run = run + 1 if unicodedata.combining(c) else 0
        kept.append(c if run <= 4 else "")
    return "".join(kept)


def clean(text: str) -> str:
    """Unicode to plain LaTeX: signs, roots, superscripts, vulgar fractions; no control or invisible characters.

    A text of more than `HUGE` characters stays as it is: it can only be right as the same text.
    """
    text = re.sub(r"\s+", " ", text)
    if len(text) > HUGE:
        return text
    for characters, form in _COMPOSED:
        text = re.sub(characters, lambda m: form % unicodedata.normalize("NFKC", m[0]), text)  # noqa: B023
    text = re.sub(r"(?<!\d)(\d{1,9})⁄(\d{1,9})", r" \\frac{\1}{\2}", text)
    text = "".join(_SYMBOLS.get(c, c) for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
    text = unicodedata.normalize("NFKC", _few_marks(text))
    if len(text) > HUGE:  # one character can become 18
        return text
    text = re.sub(r"(√|\\sqrt\[[34]\])\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\1{\2}", text)
    return re.sub(r"\s+", " ", text.replace("√", "\\sqrt")).strip()


_BOLD_MATHS = (r"\mathbf", r"\boldsymbol", r"\bm", r"\mathit", r"\mathnormal", r"\underline")


def _plain_text(match: re.Match[str]) -> str:
    r"""`\text{..}`: unwrapped where it styles a number or one letter, a separator where it says or / and."""
    inner = match[1].strip()
    bare = inner.strip(" ().")
    if re.fullmatch(r"[A-Za-z]", bare):
        return match[0] if match[0].startswith((r"\text{", r"\mbox")) and inner in "ms" else f" {bare} "
    if not re.search("[A-Za-z]", inner) or (match[0].startswith(_BOLD_MATHS) and re.search(r"[\d=+^\\]", inner)):
        return f" {inner} "
    if words := re.fullmatch(r"(?:[a-z]+ +)?,?(or|and),?", inner):
        return f" {words[1]} "
    return rf"\text{{{' '.join(inner.split())}}}"


def normalise(raw: str) -> str:
    """One spelling for one answer: layout, fonts, units, currency, percent words, number formats, outer brackets."""
    s = clean(raw)
    s, aligned = re.subn(r"\\(?:begin|end)\{(?:equation|align|aligned|math)\*?\}", " ", s)
    s = s.replace("&", "") if aligned and r"\begin" not in s else s
    s = s.replace("{,}", ",").replace(r"{\,}", " ").replace(r"\!", "")
    s = s.replace(r"\$", "").replace("$", "").replace(r"\%", "%")
    s = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", "", s)
    s = strip_outer(s)
    if len(s) > 2 * MAX_LENGTH:
        return s  # compared as text alone
    s = re.sub(rf"\\(?:{_OLD_STYLE})(?![a-zA-Z])", "", s)
    s = re.sub(r"\\textcolor\{\w+\}|\\color\{\w+\}|\\boxed(?=\s*\{)", "", s)
    s = re.sub(r"(?<!\\)\\[\(\)\[\]]|[€£¥]", "", s)
    s = re.sub(r"(?<!\\)\\(?:[,;:> ]|quad\b|qquad\b)|(?<!\\)~", " ", s)
    s = re.sub(r"\\(?:[dtcs]|nice)frac(?![a-z])", r"\\frac", s)
    s = re.sub(r"\{([^{}]*)\\(over|choose)(?![a-z])([^{}]*)\}|^([^{}]*)\\(over|choose)(?![a-z])([^{}]*)$",
               lambda m: rf"\{_OLD_FRACTIONS[m[2] or m[5]]}{{{m[1] or m[4]}}}{{{m[3] or m[6]}}}", s)
    for names, one in _SAME_MACROS:
        s = re.sub(rf"\\(?:{names})(?![a-zA-Z])", one.replace("\\", r"\\"), s)
    s = re.sub(r"\\not ?=|!=", r"\\ne ", s).replace("<=", r"\le ").replace(">=", r"\ge ").replace("**", "^")
    s = s.replace("...", r"\ldots ")
    s = re.sub(r"\\operatorname\*?\{([a-z]+)\}", r"\\\1", s)
    s = re.sub(r"(?<![a-zA-Z\\])(pi|sqrt|infty|infinity|ln|log|exp|sin|cos|tan)(?![a-zA-Z])",
               lambda m: "\\" + m[1].replace("inity", "ty"), s)
    s = re.sub(r"\\mathbb\s*R(?![a-z])|\\(?:mathbf|mathrm)\{R\}|\\R(?![a-z])", r"\\mathbb{R}", s)
    for _ in range(3):  # from the inside out
        s = re.sub(rf"\\(?:{_STYLE})\s*\{{([^{{}}]*)\}}", _plain_text, s)
    s = re.sub(r"\\(?:mathbf|boldsymbol|bm|mathit|mathnormal|underline)\s*(?=\{[^{}]*\{)", "", s)
    s = re.sub(r"\\text\{\s*(?:percent|per cent|pct)\s*\}|\b(?:percent|pct)\b", "%", s)
    s = re.sub(r"\\\{ ?\\\}", r"\\emptyset", s)
    s = re.sub(r"\s+", " ", s).strip()
    s = s if s.endswith(r"\ldots") else s.rstrip(" .;,\\")
    s = _strip_unit(strip_outer(s))
    s = re.sub(r"([\d.]+)\s*\^\s*\{?\s*\\circ\s*\}?", r"(\\frac{\1\\pi}{180})", s)
    s = _fractions(s)
    s = re.sub(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}", s)
    s = re.sub(r"(\d*)\.(\d*)(?:(?:\\overline|\\bar|\\dot)\s*\{?(\d+)\}?|\((\d+)\))", _repeating, s)
    s = re.sub(r"(?<![\d.a-zA-Z])(\d+) (\d+)\s*/\s*(\d+)(?![\d^])", r"\1\\frac{\2}{\3}", s)
    s = re.sub(r"(?:[-+]\s*){2,}", lambda m: "-" if m[0].count("-") % 2 else "+", s)
    s = re.sub(r"(?<=\d) (?=%|\\frac)", "", s)
    s = re.sub(r"\s*([-+*/=<>(){}\[\],:^_|;])\s*", lambda m: ", " if m[0].endswith(", ") else m[1], s)
    s = strip_outer(s.lstrip("+").strip())
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", s):
        s = s.replace(" ", "")
    return s[:-1] if re.fullmatch(r"-?\d+\.", s) else s


def _strip_unit(s: str) -> str:
    """The expression without a trailing unit."""
    if degrees := re.fullmatch(r"((?:[^=]*=)?-?[\d.]+|.*\\frac.*)\^\s*\{?\s*\\circ\s*\}?\s*[CF]?", s):
        return degrees[1]
    found = re.search(r"(?<=[\d})a-zA-Z%])\s*(?:\\text\{([^{}]*)\}|(?<=[\d}])\s+([a-z]{2,}s?)|(?<=\d) ?(cm|mm|km|kg|m))"
                      r"(?:\s*\^\s*\{?[23]\}?)?$", s)  # fmt: skip
    if found is None:
        return s
    words, value = (found[1] or found[2] or found[3] or "").strip(" .").lower(), s[: found.start()].strip()
    if _NO_UNIT.search(words):
        return s
    if factor := next((_TIMES[w] for w in words.split() if w in _TIMES), ""):
        return rf"{value}\times{factor}"
    known = found[1] is not None or _known_unit(words) or re.fullmatch(r"-?[\d.,/ ]+", value)
    return value if known else s


def _known_unit(word: str) -> str:
    """Common name of a unit, singular or plural; '' for none that is known."""
    return _UNIT_OF.get(word) or _UNIT_OF.get(word.removesuffix("s"), "")


def unit(raw: str) -> str:
    """Common name of the unit, with its power, that an answer as written ends in; '' for none that is known."""
    found = re.search(r"(?<![a-z\\])([a-z]+)\.?\s?\}?(?:\s?\^\s?\{?([23])\}?)?[\s$.]*$", raw[-60:].lower())
    known = _known_unit(found[1]) if found else ""
    return known + (found[2] or "") if found and known else ""


def _fractions(s: str) -> str:
    r"""Braces around the arguments of `\frac` and `\sqrt` that were written without."""
    s = re.sub(r"\\(frac|binom)\s*", r"\\\1", s)
    s = re.sub(r"\\(frac|binom)(\d|[a-z]|\\pi ?)(?=[\d\\{a-z ])\s*", r"\\\1{\2}", s)
    s = re.sub(r"(\\(?:frac|binom)\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})\s*(\d|[a-z])", r"\1{\2}", s)
    s = re.sub(r"(\\sqrt(?:\[\w+\])?) *\(([^()]*)\)", r"\1{\2}", s)
    return re.sub(r"(\\sqrt(?:\[\w+\])?)\s*(\d|[a-z])", r"\1{\2}", s)


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    if len(whole + fixed + period) > 100:
        return match[0]
    value = Fraction(int(whole + fixed + period) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


_TOKEN = re.compile(r"\\[{}\\]|\\[a-zA-Z]+|.", re.DOTALL)


def strip_outer(s: str) -> str:
    """Without redundant `( )` and `{ }` around the whole; one pass, so 5,000 of them cost nothing."""
    tokens = _TOKEN.findall(s)
    partner: dict[int, int] = {}
    stack: list[int] = []
    for i, t in enumerate(tokens):
        if t in OPENING:
            stack.append(i)
        elif t in CLOSING and stack:
            partner[stack.pop()] = i
    low, high = 0, len(tokens) - 1
    while low < high:
        if tokens[low] == " " or tokens[high] == " ":
            low, high = low + (tokens[low] == " "), high - (tokens[high] == " ")
        elif tokens[low] not in "({" or partner.get(low) != high:
            break
        elif tokens[low] == "(" and high - low < MAX_LENGTH and "," in tokens[low:high]:
            break  # a tuple or an open interval
        else:
            low, high = low + 1, high - 1
    return "".join(tokens[low:high + 1])


# ------------------------------------------------------------------------------------------------------ numbers

_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_EXACT = re.compile(
    rf"(?P<sign>-?)(?:(?P<whole>\d+)(?=\\frac))?(?:\\frac\{{(?P<n>-?(?:{_NUMBER}))\}}\{{(?P<d>{_NUMBER})\}}"
    rf"|(?P<x>{_NUMBER})(?:(?:[eE]|\\(?:times|cdot) ?10\^)\{{?(?P<e>[-+]?\d{{1,3}})\}}?)?(?:/(?P<y>{_NUMBER}))?)"
    r"(?P<p>%?)")


def exact(s: str) -> Fraction | None:
    """Value of a plain number (integer, decimal, fraction, mixed, percent, 3e5); None for anything else."""
    s = s.replace(",", "") if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?", s) else s
    m = _EXACT.fullmatch(s.strip()) if len(s) <= MAX_LENGTH else None
    if m is None:
        return None
    top, bottom = Fraction(m["n"] or m["x"]), Fraction(m["d"] or m["y"] or 1)
    if bottom == 0:
        return None
    value = Fraction(m["whole"] or 0) + top / bottom * Fraction(10) ** int(m["e"] or 0)
    return (-value if m["sign"] else value) / (100 if m["p"] else 1)

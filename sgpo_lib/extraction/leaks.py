"""Whether a strategy gives its problem away: the final answer in any form, or a result of the worked solution.

No model is asked. Every number and expression of the description (`mentions.py`) is compared with the gold answer, by
value and through the verifier's algebra, and with what stands in the solution but not in the problem. What the problem
itself says is no leak, nor are small counts ("two cases", "degree 2"), unless the text presents them as a result.

Reading of the rule, which leaves gaps on both sides (reports/strategy_extraction has the measured rates):
1. A rounded decimal or percentage of the answer leaks it, from two significant digits on.
2. A percentage leaks an answer that is that share of a number in the problem.
3. Whole numbers up to 12 and conventional ones (60, 90, 100, 180, 360, 1000) count as intermediate results only after
   words such as "gives" or "equals".
4. An equation counts where the solution states it and the problem does not, unless it only names or sets a variable.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction

from sgpo_lib.answers import after_thinking, clean, exact, normalise
from sgpo_lib.extraction.mentions import Mention, arithmetic, mentions
from sgpo_lib.extraction.records import Leak
from sgpo_lib.prompts import strategy_text
from sgpo_lib.records import Problem, Strategy
from sgpo_lib.rewards import Verifier

_COUNTS = {*map(Fraction, range(13)), Fraction(1, 2)}
_CONVENTIONAL = {Fraction(n) for n in (*range(13), 60, 90, 100, 180, 360, 1000)}
_CONVENTIONAL |= {Fraction(1, n) for n in (2, 3, 4)} | {-n for n in _CONVENTIONAL}
_WHOLE = r"(?<!\d)\d{1,999}(?!\d)"
_NUMBER = re.compile(_WHOLE + r"(?:\.\d{1,999}(?!\d))?")
_LONGEST = 200_000
"""Characters of a text that are looked at."""
_RESULT = re.compile(
    r"(?:\b(?:is|are|be|equals?|gives?|giving|yields?|yielding|makes?|making|(?:comes?|adds?|sums?) (?:out |up )?"
    r"(?:to|at)|gets?|getting|obtains?|obtaining|leaves?|leaving|turns? out(?: to be)?|settles? at|reach(?:es|ing)?|"
    r"answer|result|totals?|totalling|namely|becomes?|measures?|ending (?:up )?(?:at|in|with)|costs?|occurs)|=|≈)"
    r"\W*(?:about|exactly|roughly|just|only|the|a|an|at|to|that)?\W*$", re.IGNORECASE)
_COUNTING = re.compile(
    r"\b(?:degree|order|power|base|mod(?:ulo)?|step|case|test|part|factor|by|the|first|these|those|all|any|"
    r"at (?:least|most)|from|to|of|one|another|in|with|into|between|for)\W*$", re.IGNORECASE)
_COUNTED = re.compile(
    r"\W?\s*(?:(?:different|equal|real|linear|such|separate|unknown|possible|simple)\s)*(?:steps?|cases?|ways?|times|"
    r"equations?|unknowns?|conditions?|factors?|parts?|terms?|kinds?|numbers?|quantities|values|expressions?|"
    r"variables?|pieces|sides|points?|triangles?|formulas?|letters?|rules?|tests?|sums?|products?|roots?|halves|"
    r"of (?:the|these|them|its))\b", re.IGNORECASE)
"""What tells a small count in a method ("two cases", "degree 3") from a small answer."""
_FRACTION = re.compile(r"\\[dtc]?frac\{?(\d{1,999})\}?\{?(\d{1,999})\}?")
_STATED = re.compile(r"\b(?:answer|result|solution|value|total)\b[^.()]{0,30}$", re.IGNORECASE)


@dataclass
class _Known:
    """What is known of a problem: values and formulas of its text, of its solution, and its answer."""

    problem: Problem
    said: set[Fraction] = field(default_factory=set)
    solved: set[Fraction] = field(default_factory=set)
    said_tex: str = ""
    solved_tex: str = ""
    gold: Fraction | None = None
    decimal: float | None = None
    equations: list[str] = field(default_factory=list)


def find_leaks(items: Sequence[tuple[Problem, Strategy]], verifier: Verifier) -> list[tuple[Leak, ...]]:
    """Leaks of each strategy, with spans of `prompts.strategy_text`, in order. Never raises for a text."""
    known = {p.id: p for p, _ in items}
    facts = {key: _known(problem) for key, problem in known.items()}
    texts = [strategy_text(strategy) for _, strategy in items]
    found = [mentions(text) for text in texts]
    # one call to the verifier: every expression beside its gold answer, and the value of irrational answers
    asked = [(n, m) for n in range(len(items)) for m in found[n] if _worth_asking(m)]
    verdicts = verifier.judge([(_plain(items[n][0]), f"\\boxed{{{m.tex}}}") for n, m in asked])
    equal = {(n, m) for (n, m), verdict in zip(asked, verdicts, strict=True) if verdict.correct}
    pairs = [(n, m, e) for n in range(len(items)) for m in found[n] for e in _alike(m, facts[items[n][0].id])]
    same = verifier.judge([(Problem("", "", e), f"\\boxed{{{m.tex}}}") for _, m, e in pairs])
    equal_to_step = {(n, m) for (n, m, _), verdict in zip(pairs, same, strict=True) if verdict.correct}
    decimals = verifier.decimals([k.problem.answer for k in facts.values() if k.gold is None])
    for k in facts.values():
        value: Fraction | Decimal | None = k.gold if k.gold is not None else decimals.get(k.problem.answer)
        k.decimal = _float(value) if value is not None else None
    leaks = []
    for n, (problem, _) in enumerate(items):
        hits = [hit for m in found[n] if (hit := _leak(
            texts[n], m, facts[problem.id], (n, m) in equal, (n, m) in equal_to_step))]
        leaks.append(tuple(_without_overlaps([*hits, *_phrases(texts[n], problem)])))
    return leaks


def _phrases(text: str, problem: Problem) -> Iterator[Leak]:
    """Places of an answer in words (Tuesday) that the problem does not offer, or that are stated as the answer."""
    answer = re.sub(r"^\\(?:text|textbf|mathrm|mbox)\{\s*([^{}]*?)\s*\}$", r"\1", problem.answer.strip())
    if not re.fullmatch(r"[A-Za-z][A-Za-z' -]{2,}", answer):
        return
    phrase = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)
    offered = phrase.search(problem.prompt) is not None
    for m in phrase.finditer(text):
        if not offered or _STATED.search(text[max(0, m.start() - 60) : m.start()]):
            yield Leak(m.start(), m.end(), "answer", "phrase", m[0])


def _plain(problem: Problem) -> Problem:
    """The problem for the verifier: its answer alone, so that a data set's own scorer is not asked."""
    return Problem(problem.id, "", problem.answer)


def _known(problem: Problem) -> _Known:
    solution = after_thinking(problem.solution)  # as the prompts show it: a long thinking holds nearly every number
    known = _Known(problem, said_tex=_squeezed(problem.prompt), solved_tex=_squeezed(solution))
    known.gold = exact(normalise(problem.answer))
    for values, text in ((known.said, problem.prompt), (known.solved, solution)):
        for m in mentions(text):
            if m.form == "relation" and values is known.solved:
                sides = [s for s in m.tex.split("=") if s.strip()]
                known.equations += [f"{a}={b}" for a, b in itertools.pairwise(sides)]
            if m.value is not None and (values is known.solved or exact(m.tex) is not None):
                values.add(abs(m.value))  # what the problem leaves to compute is not said
                if "%" in m.tex:
                    values.add(m.value * 100)
    known.said |= {Fraction(n) for n in _NUMBER.findall(problem.prompt)}
    written = re.sub(r"(?<=\d)(?:\{,\}|\\,|,|\s)(?=\d{3}(?!\d))", "", solution)
    known.solved |= {Fraction(n) for n in _NUMBER.findall(written)}
    known.solved |= {Fraction(int(a), int(b)) for a, b in _FRACTION.findall(written) if int(b)}
    return known


def _squeezed(text: str) -> str:
    """A text by which formulas are looked up: plain LaTeX, no white space, braces or sizing, one product sign."""
    text = re.sub(r"\\[dtc]frac", r"\\frac", clean(text[:_LONGEST]))
    text = re.sub(r"\\(?:left|right|displaystyle|quad|[,;!])|[{}$\s]", "", text)
    for there, here in (("\\cdot", "*"), ("\\times", "*"), ("\\leq", "\\le"), ("\\geq", "\\ge")):
        text = text.replace(there, here)
    return text


def _worth_asking(m: Mention) -> bool:
    """Whether the algebra can tell more than the value: an expression that is no lone letter."""
    return m.form == "expression" and re.fullmatch(r"-?[a-zA-Z]?", m.tex) is None


def _alike(m: Mention, known: _Known) -> list[str]:
    """Equations of the solution that may say the same as an equation: in the same letters, with a number of its own."""
    if m.form != "relation" or m.tex.count("=") != 1 or not (_names(m.tex) and _new_numbers(m, known)):
        return []
    return [e for e in known.equations if _names(e) == _names(m.tex)][:20]


def _names(tex: str) -> set[str]:
    return set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+|_\{[^{}]*\}|_\w", "", tex)))


def _leak(text: str, m: Mention, known: _Known, equal: bool, equal_to_step: bool) -> Leak | None:
    """The leak of one mention, or None."""
    kind = form = ""
    before = text[max(0, m.start - 60) : m.start]
    if equal or (m.value is not None and m.value == known.gold):
        kind, form = "answer", "words" if m.form == "words" else "expression" if equal else "number"
        shown = abs(m.value) in known.said if m.value is not None else _squeezed(m.tex) in known.said_tex
        small = m.value is not None and abs(m.value) in _COUNTS
        told = _STATED.search(before) or "boxed" in m.text or (not shown and _result(text, m, before))
        if not told and (shown or (small and (_COUNTING.search(before) or _COUNTED.match(text[m.end :])))):
            kind = ""
    elif m.value is not None and _rounded(m, known):
        kind, form = "answer", "rounded"
    elif m.value is not None and "%" in m.tex and m.value not in known.said and known.gold is not None and any(
            m.value * n == known.gold for n in known.said):  # fmt: skip
        kind, form = "answer", "share"
    if m.form == "ratio" and kind != "answer":
        return None
    if not kind and _computed(m, known):
        kind, form = "intermediate", m.form
    if not kind and m.value is not None and abs(m.value) in known.solved - known.said and not _set_up(m, known):
        stated = _result(text, m, before) and not m.side and abs(m.value) > 1
        if m.value not in _CONVENTIONAL or stated:
            kind, form = "intermediate", "words" if m.form == "words" else "number"
    if not kind and m.form in ("expression", "relation") and not m.side and (
            equal_to_step or _solved(m, known) or (_result(text, m, before) and _same_text(m, known))):
        kind, form = "intermediate", m.form
    return Leak(m.start, m.end, kind, form, m.text) if kind else None


def _result(text: str, m: Mention, before: str) -> bool:
    """Whether the text presents the mention as a result."""
    return _RESULT.search(before) is not None and not re.match(r"\s*(?:steps?|cases?|times|ways? to)\b", text[m.end :])


def _computed(m: Mention, known: _Known) -> bool:
    """Whether it carries out arithmetic (600/60 = 10) that the problem does not show."""
    sides = m.tex.split("=")
    if m.form != "relation" or m.side or len(sides) != 2 or _squeezed(m.text) in known.said_tex:
        return False
    worked, result = (arithmetic(side) for side in sides)
    return None not in (worked, result) and worked == result and exact(sides[0]) is None and \
        re.search(r"\d.*[-+*/^]|\\cdot|\\times|\\frac", sides[0]) is not None  # fmt: skip


def _set_up(m: Mention, known: _Known) -> bool:
    """Whether it is arithmetic with the problem's own numbers that is left to do, or an identity about one of them."""
    numbers = [Fraction(n) for n in _NUMBER.findall(m.tex)]
    reduced = exact(m.tex) is not None and m.value is not None and m.value.denominator > 1
    return len(numbers) > 1 and not reduced and all(n in known.said or n in _CONVENTIONAL for n in numbers)


def _same_text(m: Mention, known: _Known) -> bool:
    """Whether a constant that is no plain number stands in the solution, in the same form, and not in the problem."""
    tex = _squeezed(m.text)
    constant = re.search(r"\d", tex) is not None and re.search(r"[a-zA-Z]", re.sub(r"\\[a-z]+", "", tex)) is None
    return constant and tex in known.solved_tex and tex not in known.said_tex


def _rounded(m: Mention, known: _Known) -> bool:
    """Whether a decimal of two digits or more is the answer rounded or cut off (or the answer in percent)."""
    digits = re.fullmatch(r"-?0*\.?0*([\d.]+?)%?", m.tex)
    if known.decimal is None or m.value is None or digits is None or len(digits[1].replace(".", "")) < 2:
        return False
    if (said := _float(m.value)) is None or abs(m.value) in known.said:
        return False
    places = len(m.tex.rstrip("%").partition(".")[2])
    if places == 0 and not m.tex.endswith("%"):
        return False
    unit = 10.0 ** -places / (100 if m.tex.endswith("%") else 1)
    off = abs(known.decimal) - abs(said)
    return -0.5000001 * unit <= off < unit  # rounded, or cut off


def _float(value: Fraction | Decimal) -> float | None:
    """None for what a float does not hold."""
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _solved(m: Mention, known: _Known) -> bool:
    """Whether the solution states an expression or equation that the problem neither states nor has the numbers of."""
    tex = _squeezed(m.text.replace("\\boxed", ""))
    if len(tex) < 3 or tex in known.said_tex:
        return False
    parts = [p for p in re.split(r"=|\\(?:le|ge|in|equiv|approx)(?![a-zA-Z])|[<>]", tex) if p]
    bare, new = _bare(m), _new_numbers(m, known)
    if len(parts) == 2 and re.fullmatch(r"\d{1,999}", parts[0]) and Fraction(parts[0]) in known.said:
        return False  # 8 = 2^3, about a number of the problem
    if tex in known.solved_tex:
        if len(parts) == 1:
            return bool(new)
        naming = re.fullmatch(r"-?\\?[a-zA-Z]+'?(?:_\w)?", parts[0]) is not None and all(
            re.fullmatch(r"[-+a-zA-Z_^]*|-?\d{1,2}", part) for part in parts[1:])  # fmt: skip
        recursive = re.search(r"_|'", parts[0]) is not None and re.search(r"[2-9]|\\[a-z]{3}", bare) is not None
        return not naming and (bool(new) or recursive)
    return len(parts) > 1 and len(parts[-1]) > 4 and bool(new) and parts[-1].strip("\\") in known.solved_tex


def _bare(m: Mention) -> str:
    """The formula without exponents in braces and without subscripts."""
    return re.sub(r"_\w", "", re.sub(r"[\^_]\{\w+\}", "", m.text.replace(" ", "")))


def _new_numbers(m: Mention, known: _Known) -> list[str]:
    """Numbers of a formula above 2 that the problem does not say."""
    return [n for n in re.findall(_WHOLE, _bare(m)) if int(n) > 2 and Fraction(n) not in known.said]


def _without_overlaps(hits: Sequence[Leak]) -> Iterator[Leak]:
    """One leak per place: an answer before an intermediate result, the longer before the shorter."""
    kept: list[Leak] = []
    for hit in sorted(hits, key=lambda h: (h.kind != "answer", h.start - h.end, h.start)):
        if all(hit.end <= k.start or hit.start >= k.end for k in kept):
            kept.append(hit)
    return iter(sorted(kept, key=lambda h: h.start))

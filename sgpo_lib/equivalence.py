"""Whether two normalised answers say the same: their structure, compared part by part under strict rules.

Lists, sets, tuples, intervals, unions, equations, matrices and ratios are told apart here, so that a tuple is not a
set and `x = 3` is not `y = 3`. Single expressions that are not plain numbers are handed to an `Algebra`:
`reward_worker.py` has one by Math-Verify in a process that can be killed, `rewards.py` one that only knows numbers.
Order: answers, equivalence, reward_worker, rewards.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

from sgpo_lib.answers import CLOSING, MAX_LENGTH, OPENING, exact, normalise, strip_outer, unit

MAX_DEPTH = 20
"""Deepest nesting of braces, parentheses and brackets that is handed to the algebra."""
MAX_ITEMS = 40
"""Most parts of a list or tuple that are compared by algebra."""

Node = tuple[Any, ...]
"""`(kind, ...)`: leaf(text), words(text), list(items), set(items), seq(open, items, close), union(items),
minus(items), relation(name, tree), equation(name, values, sides as text), matrix(rows), ratio(parts)."""


class Unparsed(ValueError):
    """An answer that cannot be read; `bad_gold` where the gold answer is at fault."""

    reason = "unparsed"


class BadGold(Unparsed):
    """A gold answer that cannot be read."""

    reason = "bad_gold"


class Algebra(Protocol):
    """What the comparison of structures asks about single expressions (normalised LaTeX)."""

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two expressions have the same value; at least one of them is no plain number."""

    def same_relation(self, gold: list[str], answer: list[str]) -> bool:
        """Whether two equations `[left, right]` hold for the same points."""

    def same_set(self, gold: Node, answer: Node) -> bool:
        """Whether two trees of intervals, unions, differences and finite sets are the same set of reals."""


# ---------------------------------------------------------------------------------------------------- structure

_SPLIT = re.compile(r"\\[{}\\]|\\[a-zA-Z]+|(?<![a-zA-Z])(?:or|and)(?![a-zA-Z])|.", re.DOTALL)
_JUNK = {"", "nan", "null", "none", "n/a", "na", "?", "[answer]", "answer", "...", "\\ldots", "tbd", "undefined answer"}
_MATRIX = re.compile(r"([^&=,\[(]*?)(?:\\cdot|\\times)? ?[\[(]?\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)"
                     r"\\end\{\2\}[\])]?")  # fmt: skip
"""Of numbers, perhaps times a factor before it."""
_LESS = {"<": "<", r"\le": "<=", r"\lt": "<", ">": ">", r"\ge": ">=", r"\gt": ">", r"\ne": "!="}
_NAME = re.compile(r"\(?(?:\\?[a-zA-Z]+|\\text\{[^{}]*\}|m?\\angle ?[A-Z]{1,3}|\|[A-Z]{1,2}\||\\overline\{[A-Z]{2}\})"
                   r"(?:_\{?[\w\\ ]+\}?)?(?:\([\w,]+\))?(?:, ?[a-z])*\)?")
_SAME_WORDS = {"does not exist": "dne", "no solutions": "no solution"}


def split(s: str, marks: set[str]) -> tuple[list[str], list[str]]:
    """`s` cut at the marks that stand outside all brackets: the parts and the marks between them."""
    parts, found, depth = [""], [], 0
    for t in _SPLIT.findall(s):
        depth += (t in OPENING) - (t in CLOSING)
        if t in marks and depth == 0:
            parts.append("")
            found.append(t)
        else:
            parts[-1] += t
    return [p.strip() for p in parts], found


def parse(s: str) -> Node:
    """Structure of a normalised answer. Raises Unparsed for an empty part."""
    s = s.strip()
    if s.lower() in _JUNK or not re.search(r"[^\W_]", s):
        raise Unparsed(f"no answer in {s!r}")
    if (value := exact(s)) is not None or re.fullmatch(r"-?\d+", s):
        return ("leaf", s if value is None or len(s) > 100 else str(value))
    if matrix := _MATRIX.fullmatch(s):
        factor, body = "-1" if matrix[1] == "-" else matrix[1], matrix[3]
        rows = [r for r in re.split(r"\\\\(?:\[[\d.]+[a-z]{2}\])?", body) if r.strip()]
        cells = [[rf"({factor})({c})" if factor else c for c in split(r, {"&"})[0]] for r in rows]
        return ("matrix", [[parse(normalise(c)) for c in row] for row in cells])
    parts, _ = split(s, {r"\in"})
    if len(parts) == 2 and _NAME.fullmatch(parts[0]):
        return ("relation", parts[0], parse(parts[1]))
    parts, marks = split(s, {",", ";", "or", "and"})
    parts = [p for p in parts if p]
    if len(parts) > 1:
        name, items = _items(parts)
        if set(marks) == {"or"} and all(n[:2] == ("relation", items[0][1]) for n in items):
            return ("relation", items[0][1], ("union", [n[2] for n in items]))
        return ("equation", name, [("list", items)], []) if name else ("list", items)
    if (r"\pm" in s or r"\mp" in s) and not s.startswith(r"\{"):
        up, down = s.replace(r"\pm", "+").replace(r"\mp", "-"), s.replace(r"\pm", "-").replace(r"\mp", "+")
        return ("list", [parse(normalise(up)), parse(normalise(down))])
    for mark, kind in ((r"\cup", "union"), (r"\setminus", "minus")):
        parts, _ = split(s, {mark})
        if len(parts) > 1:
            return (kind, [parse(p) for p in parts])
    parts, marks = split(s, {"=", r"\in", r"\equiv", *_LESS})
    if marks and set(marks) <= set(_LESS):
        return _inequality(s, parts, [_LESS[m] for m in marks])
    if marks and set(marks) == {"="} and all(parts):
        if _NAME.fullmatch(parts[0]):
            return ("equation", parts[0], [parse(strip_outer(p)) for p in parts[1:]], parts)
        if len(parts) == 2 and _NAME.fullmatch(parts[1]):
            return ("equation", parts[1], [parse(strip_outer(parts[0]))], parts)
        return ("equation", "", [parse(strip_outer(p)) for p in parts], parts)
    if builder := re.fullmatch(r"\\\{ ?([a-z])(?:\\in ?\\mathbb\{R\})? ?(?:\\mid|:|\|) ?(.+)\\\}", s):
        condition = parse(builder[2])
        if condition[:2] == ("relation", builder[1]):
            return condition
    if s == r"\mathbb{R}" or re.fullmatch(r"\\text\{all (?:real numbers|reals)\}", s.lower()):
        return ("seq", "(", [("leaf", r"-\infty"), ("leaf", r"\infty")], ")")
    if s.startswith(r"\langle") and s.endswith(r"\rangle"):
        return ("seq", "<", [parse(strip_outer(p)) for p in split(s[7:-7], {",", ";"})[0]], ">")
    if re.match(r"\\\{|[(\[]", s) and re.search(r"(?:\\\}|[)\]])$", s) and not re.search(r"^\(.*\)\(.*\)$", s):
        inner = s[2:-2] if s.startswith(r"\{") else s[1:-1]
        parts, _ = split(inner, {",", ";"})
        if s.startswith(r"\{") and s.endswith(r"\}"):
            return ("set", _items(parts)[1])
        if len(parts) > 1:
            return ("seq", s[0], [parse(strip_outer(p)) for p in parts], s[-1])
    parts, _ = split(s, {":"})
    if len(parts) > 1:
        numbers = [exact(p) for p in parts]
        plain = all(n is not None and n != 0 and not re.match(r"0\d", p) for n, p in zip(numbers, parts, strict=True))
        return ("ratio", numbers) if plain else ("words", s)
    if words := re.fullmatch(r"(?:\\text\{([^{}]*)\}|[A-Za-z]{4,}(?: [a-z]+)*)", s):
        told = (words[1] or s).lower().strip(" .")
        return ("words", _SAME_WORDS.get(told, told))
    if re.fullmatch(r"(?i)yes|no|dne|[A-Za-z]", s):
        return ("words", s if len(s) == 1 else s.lower())
    if re.fullmatch(r"-?\d[0-9a-zA-Z]*_(?:\{?[\da-z]+\}?|\{?\\text\{[a-z]+\}\}?)", s):
        return ("words", "base " + re.sub(r"[{}]", "", s))
    return ("leaf", s)


def _items(parts: list[str]) -> tuple[str, list[Node]]:
    r"""The name that a list gives its values (`n = 1, 2`; `x = 1, x = 2`) or '', and the values.

    `1,2,\ldots,10` is written out where it is an arithmetic progression of integers.
    """
    *shown, dots, end = parts if len(parts) > 3 else ("", "", "")
    if dots == r"\ldots" and all(re.fullmatch(r"-?\d{1,99}", p) for p in (*shown, end)):
        start, step, count = int(shown[0]), int(shown[1]) - int(shown[0]), len(shown)
        more, rest = divmod(int(end) - int(shown[-1]), step) if step else (0, 0)
        if rest == 0 < more <= MAX_LENGTH and shown == [str(start + k * step) for k in range(count)]:
            parts = [str(start + k * step) for k in range(count + more)]
    items: list[Node] = []
    for node in (parse(strip_outer(p)) for p in parts):
        items += node[1] if node[0] == "list" else [node]  # 0, \pm 1
    names = [n[1] if n[0] == "equation" and len(n[2]) == 1 else "" for n in items]
    if names[0] and not any(names[1:]):
        return names[0], [items[0][2][0], *items[1:]]
    return (names[0], [n[2][0] for n in items]) if names[0] and len(set(names)) == 1 else ("", items)


def _inequality(s: str, parts: list[str], marks: list[str]) -> Node:
    """`a < x <= b`, `x > a`, `|x| < a`, `x != a` as a named set; any other inequality stays an expression."""
    if len(parts) == 2 and marks[0] != "!=" and (size := re.fullmatch(r"\|(\\?[a-zA-Z]+)\|", parts[0])):
        minus, variable, plus = f"-({parts[1]})", size[1], parts[1]
        if marks[0] in ("<", "<="):
            return _inequality(s, [minus, variable, plus], marks * 2)
        sides = _inequality(s, [minus, variable], marks), _inequality(s, [variable, plus], marks)
        return ("relation", variable, ("union", [side[2] for side in sides]))
    at = [i for i, p in enumerate(parts) if re.fullmatch(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?", p)]
    low, high = [("leaf", r"-\infty"), "("], [("leaf", r"\infty"), ")"]
    if not at or len(parts) > 3 or (len(parts) == 3 and at[0] != 1) or ("!=" in marks and len(parts) > 2):
        return ("leaf", s)
    name = at[0]
    if marks == ["!="]:
        other = parse(parts[1 - name])
        return ("relation", parts[name], ("union", [("seq", "(", [low[0], other], ")"),
                                                     ("seq", "(", [other, high[0]], ")")]))
    for i, mark in enumerate(marks):
        bound = parse(parts[i + 1] if i == name else parts[i])
        above = (mark[0] == ">") == (i == name)  # the name is the greater side
        (low if above else high)[:] = [bound, ("[" if above else "]") if "=" in mark else "()"[not above]]
    return ("relation", parts[name], ("seq", low[1], [low[0], high[0]], high[1]))


# --------------------------------------------------------------------------------------------------- comparison


def matches(gold: Node, answer: Node, algebra: Algebra) -> bool:
    """Whether an answer's structure says the same as the gold answer's. Raises what the algebra raises."""
    g, a = gold[0], answer[0]
    if gold == answer:
        return True
    if g == "equation" and a == "equation":
        if gold[1] == answer[1] != "":
            return all(matches(gold[2][-1], part, algebra) for part in answer[2])
        return len(gold[3]) == len(answer[3]) == 2 and algebra.same_relation(gold[3], answer[3])
    if a == "equation":  # x = 5 for 5; 2 + 3 = 5 for 5; every part has to be right
        return all(matches(gold, part, algebra) for part in answer[2])
    if g == "equation":
        return bool(gold[1]) and matches(gold[2][-1], answer, algebra)
    if g == a == "relation":
        return gold[1] == answer[1] and matches(gold[2], answer[2], algebra)
    if "relation" in (g, a):
        gold, answer = (gold[2] if g == "relation" else gold), (answer[2] if a == "relation" else answer)
        sets = {"seq", "union", "minus", "set", "list"}
        return {gold[0], answer[0]} <= sets and matches(gold, answer, algebra)
    if g == a == "seq" and (gold[1], gold[3], len(gold[2])) == (answer[1], answer[3], len(answer[2])):
        return all(matches(x, y, algebra) for x, y in zip(gold[2], answer[2], strict=True))
    if "union" in (g, a) or "minus" in (g, a):
        return {g, a} <= {"union", "minus", "seq", "set"} and algebra.same_set(gold, answer)
    if {g, a} <= {"list", "set"}:
        return _same_members(gold[1], answer[1], algebra)
    if a == "list" and g != "words":  # 5, 5 for 5
        return len(answer[1]) <= MAX_ITEMS and all(matches(gold, part, algebra) for part in answer[1])
    if g == a == "matrix" and [len(r) for r in gold[1]] == [len(r) for r in answer[1]]:
        return all(matches(x, y, algebra) for p, q in zip(gold[1], answer[1], strict=True)
                   for x, y in zip(p, q, strict=True))  # fmt: skip
    if g == a == "ratio" and len(gold[1]) == len(answer[1]):
        return all(x * answer[1][0] == y * gold[1][0] for x, y in zip(gold[1], answer[1], strict=True))
    if {g, a} == {"leaf", "words"}:  # red for \text{red}; \frac{2x}{2} for x
        letter = len(gold[1] if g == "words" else answer[1]) == 1
        return gold[1].lower() == answer[1].lower() or (letter and algebra.equal(gold[1], answer[1]))
    if not g == a == "leaf":
        return False
    values = exact(gold[1]), exact(answer[1])
    return algebra.equal(gold[1], answer[1]) if None in values else values[0] == values[1]


def _same_members(gold: list[Node], answer: list[Node], algebra: Algebra) -> bool:
    """Equal as sets: order and repetition do not matter."""
    if max(len(gold), len(answer)) > MAX_ITEMS:
        return sorted(map(str, gold)) == sorted(map(str, answer))
    covered = all(any(matches(g, a, algebra) for g in gold) for a in answer)
    return covered and all(any(matches(g, a, algebra) for a in answer) for g in gold)


def too_large(s: str) -> bool:
    """Whether a text exceeds the limits under which it is parsed: length and nesting. Plain digits have no limit."""
    if len(s) > MAX_LENGTH:
        return re.fullmatch(r"-?\d+", s) is None
    depth = deepest = 0
    for c in s:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH


_HARD = re.compile(
    r"\^\{?-?\(?\d{7,}|(?:\^\{[^{}^]*){3}\^|(?:\^\w){4}"  # exponents of seven digits, towers of four
    r"|\d{5,}\)?!|!!|\([^()a-z]*(?:\^|[7-9]!|\d\d!)[^()a-z]*\)!"  # factorials of five digits, of powers, of 7! and more
    r"|\\binom[^a-z]*?(?:\d{5,}|\d\^)|\\(?:sum|prod)(?:_\{[^{}]*\}|_\w)?\^\{?(?:\d{5,}|\d+\^)")


def too_hard(s: str) -> bool:
    """Whether an expression exceeds the limits under which it may reach the algebra: size, huge numbers."""
    if len(s) > MAX_LENGTH or too_large(s):
        return True
    s = s.replace(" ", "")
    while power := re.search(r"\^\{?\(?-?(\d+)\^(?:\{(\d+)\}|(\d))\)?\}?", s):  # b^{c^d}: fold c^d
        base, exponent = int(power[1]), int(power[2] or power[3])
        if exponent * (base.bit_length() - 1) > 20:
            return True
        s = f"{s[:power.start()]}^{{{base**exponent}}}{s[power.end():]}"
    return _HARD.search(s) is not None


def _without_label(answer: str, gold: str) -> str:
    r"""Of `\textbf{(B)}\ 12`, a choice and its value: the one that the gold answer is."""
    label = re.match(r"(?:\\(?:text|math)[a-z]*\{)? ?\(([A-E])\) ?\}?(?:\\[ ,;:]|~|\s|\\q?quad)+"
                     r"(?!or\b|and\b|\\text)([^(].*)", answer)  # fmt: skip
    if label is None:
        return answer
    return label[1] if re.fullmatch(r"[^a-zA-Z]*(?:\\[a-z]+\{)?\(?[A-E]\)?\}?\W*", gold) else label[2]


def read(gold: str, answer: str) -> tuple[Node, Node] | None:
    """Both answers as structures, or None where they are the same text. Raises BadGold, Unparsed."""
    gold_text, answer_text = normalise(gold), normalise(_without_label(answer, gold))
    if too_large(gold_text):
        if gold_text == answer_text:
            return None
        raise BadGold(f"the gold answer {gold[:200]!r} is too long or too deep to be compared")
    try:
        gold_node = parse(gold_text)
    except (Unparsed, RecursionError) as error:
        raise BadGold(f"the gold answer {gold[:200]!r} cannot be read") from error
    if too_large(answer_text):
        raise Unparsed("too long or too deep")
    units = unit(gold), unit(answer)
    if all(units) and units[0] != units[1]:  # 5 cm is not 5 m; a unit on one side alone is dropped
        return ("words", units[0]), ("words", units[1])
    if gold_text == answer_text:
        return None
    node = parse(answer_text)
    if node[0] == "set" and len(node[1]) == 1 and gold_node[0] == "leaf" and gold_node[1] != r"\emptyset":
        node = node[1][0]  # {5} for 5, as 5 for {5}
    return gold_node, node

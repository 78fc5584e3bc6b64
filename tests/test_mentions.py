"""Numbers and formulas of a text: spellings, exact places, values against number names made here, hostile texts."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from time_limits import within

from sgpo_lib.extraction.mentions import Mention, mentions
from sgpo_lib.extraction.words import cardinal, spoken

F = Fraction
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
PLURAL_PARTS = {2: "halves", 3: "thirds", 4: "quarters", 5: "fifths", 8: "eighths", 9: "ninths", 12: "twelfths"}
HYPHEN, AND, COMMA = (st.sampled_from(c) for c in (("-", " "), (" and ", " "), (", ", " ")))


def small_name(n: int, hyphen: str) -> str:
    """English name of 0..99."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10 - 2] + (hyphen + ONES[n % 10] if n % 10 else "")


def name_of(n: int, hyphen: str = "-", link: str = " and ", comma: str = " ") -> str:
    """English name of 0..999,999,999: British with `and`, American without."""
    if n < 100:
        return small_name(n, hyphen)
    if n < 1000:
        return f"{ONES[n // 100]} hundred" + (link + small_name(n % 100, hyphen) if n % 100 else "")
    size, scale = (10**6, "million") if n >= 10**6 else (1000, "thousand")
    rest = n % size
    return (f"{name_of(n // size, hyphen, link, comma)} {scale}"
            + ((link if rest < 100 else comma) + name_of(rest, hyphen, link, comma) if rest else ""))  # fmt: skip


def parts_name(n: int) -> str:
    """Plural name of n-ths: thirds, thirtieths, twenty-fifths."""
    if n > 20 and n % 10:
        return f"{TENS[n // 10 - 2]}-{parts_name(n % 10)}".replace("quarters", "fourths")
    if n in PLURAL_PARTS:
        return PLURAL_PARTS[n]
    word = small_name(n, "-")
    return (word[:-1] + "ie" if word.endswith("y") else word) + "ths"


def singular(parts: str) -> str:
    """third of thirds."""
    return "half" if parts == "halves" else parts[:-1]


def in_text(raw: str, before: str = "Here we get: ", after: str = " at last.") -> list[Mention]:
    """Mentions at exactly the place of `raw` in a sentence; all of the sentence's spans are checked."""
    text = before + raw + after
    found = mentions(text)
    assert_spans(text, found)
    return [m for m in found if (m.start, m.end) == (len(before), len(before) + len(raw))]


def assert_spans(text: str, found: list[Mention]) -> None:
    """In order, inside the text, not empty, and the text is the text's."""
    assert all(0 <= m.start < m.end <= len(text) and m.text == text[m.start : m.end] for m in found)
    assert all(a.start <= b.start for a, b in itertools.pairwise(found))


def values(raw: str) -> set[Fraction | None]:
    return {m.value for m in in_text(raw) if not m.side}


# Number names


def test_the_names_made_here_are_english():
    assert name_of(241) == "two hundred and forty-one"
    assert name_of(2_300_015, " ", " ", ", ") == "two million, three hundred thousand fifteen"
    assert name_of(100_000) == "one hundred thousand" and name_of(1_002) == "one thousand and two"
    assert [parts_name(n) for n in (2, 7, 20, 24, 25, 99)] == ["halves", "sevenths", "twentieths", "twenty-fourths",
                                                               "twenty-fifths", "ninety-ninths"]  # fmt: skip


def test_a_number_name_has_its_value():
    for n in (*range(0, 3000), 9999, 10_000, 99_999, 100_000, 100_001, 999_999, 1_000_000, 1_000_001, 999_999_999):
        assert cardinal(name_of(n)) == cardinal(name_of(n, " ", " ", ", ")) == n


@given(st.one_of(st.integers(0, 999), st.integers(0, 99_999), st.integers(0, 999_999_999)), HYPHEN, AND, COMMA,
       st.sampled_from([str, str.upper, str.capitalize]))  # fmt: skip
@settings(deadline=None)
def test_a_number_name_is_found_whole(n: int, hyphen: str, link: str, comma: str, case):
    raw = case(name_of(n, hyphen, link, comma))
    text = f"The mill grinds {raw} sacks."
    found = mentions(text)
    assert [(m.start, m.end, m.value, m.form) for m in found] == [(16, 16 + len(raw), n, "words")]


@given(st.integers(2, 99), st.integers(2, 99).filter(lambda n: n <= 12 or n % 10 not in (1, 2)), HYPHEN)
@settings(deadline=None)
def test_a_spelled_fraction_has_its_value(top: int, bottom: int, hyphen: str):
    """Twenty-firsts and thirty-seconds are left out: nobody reads them as shares at once."""
    raw = f"{small_name(top, '-')}{hyphen}{parts_name(bottom)}"
    assert values(raw) == {F(top, bottom)}
    assert values(f"one {singular(parts_name(bottom))}") == {F(1, bottom)}


@given(st.integers(1, 99), st.integers(2, 20), st.integers(2, 20))
@settings(deadline=None)
def test_a_spelled_mixed_number_has_its_value(whole: int, top: int, bottom: int):
    assert values(f"{name_of(whole)} and {name_of(top)} {parts_name(bottom)}") == {whole + F(top, bottom)}
    assert values(f"{name_of(whole)} and a {singular(parts_name(bottom))}") == {whole + F(1, bottom)}
    assert values(f"{whole} and one {singular(parts_name(bottom))}") == {whole + F(1, bottom)}


@pytest.mark.parametrize(("raw", "value"), [
    ("a dozen", F(12)), ("three dozen", F(36)), ("a hundred", F(100)), ("2.5 million", F(2_500_000)),
    ("12 thousand", F(12_000)), ("three point one four", F(314, 100)), ("zero point zero five", F(1, 20)),
    ("forty-five percent", F(45, 100)), ("seven per cent", F(7, 100)), ("half of twenty", F(10)),
    ("twice seven", F(14)), ("triple 15", F(45)), ("the square of five", F(25)), ("the cube of three", F(27)),
    ("four squared", F(16)), ("two cubed", F(8)), ("five plus six", F(11)), ("nine minus two", F(7)),
    ("six times 14", F(84)), ("twelve over seven", F(12, 7)), ("ten divided by four", F(5, 2)),
    ("two times three times four", F(24)),
])  # fmt: skip
def test_arithmetic_in_words_has_its_value(raw: str, value: Fraction):
    assert values(raw) == {value}


@pytest.mark.parametrize(("raw", "tex"), [
    ("9 choose 4", r"\binom{9}{4}"), ("nine choose four", r"\binom{9}{4}"), ("the square root of two", r"\sqrt{2}"),
    ("four times the square root of three", r"4\cdot\sqrt{3}"), ("root seven", r"\sqrt{7}"),
    ("the natural logarithm of two", r"\ln2"), ("five ln 3", r"5\ln3"), ("seventy pi", r"70\pi"),
    ("two plus root five", r"2+\sqrt{5}"),
])  # fmt: skip
def test_formulas_in_words_become_latex(raw: str, tex: str):
    found = in_text(raw)
    assert [m.tex.replace(" ", "") for m in found] == [tex] and found[0].form == "expression"


@pytest.mark.parametrize(("raw", "value"), [("three in ten", F(3, 10)), ("3 out of 10", F(3, 10)), ("a third", F(1, 3)),
                                            ("one in every four", F(1, 4)), ("nine to four", F(9, 4))])
def test_what_may_be_a_way_to_speak_is_a_ratio_and_its_numbers_are_found_as_well(raw: str, value: Fraction):
    assert [(m.form, m.value) for m in in_text(raw)] == [("ratio", value)]
    others = [m.value for m in mentions(f"Here we have {raw} at last.") if m.form != "ratio"]
    assert others == ([value.numerator, value.denominator] if raw != "a third" else [])


# Numerals


@pytest.mark.parametrize(("raw", "value"), [
    ("1,755", F(1755)), ("479 196", F(479_196)), ("1\u00a0755", F(1755)), ("1\u2009755", F(1755)),
    ("1\u202f755", F(1755)), ("12,345,678.5", F("12345678.5")), ("0.375", F(3, 8)), (".5", F(1, 2)), ("-5", F(-5)),
    ("−5", F(-5)), ("53.65%", F("0.5365")), ("53.65 %", F("0.5365")), ("12 percent", F(12, 100)),
    ("12 per cent", F(12, 100)), ("3 : 10", F(3, 10)), ("3:10", F(3, 10)), ("3/8", F(3, 8)), ("3⁄8", F(3, 8)),
    ("½", F(1, 2)), ("⅔", F(2, 3)), ("⅛", F(1, 8)), ("8¼", F(33, 4)), ("8 ¼", F(33, 4)), ("³⁄₈", F(3, 8)),
    ("8 1/4", F(33, 4)), ("1.5e3", F(1500)), ("2³", F(8)), ("2^3", F(8)), ("2^{10}", F(1024)), ("10⁻²", F(1, 100)),
    ("5 × 10³", F(5000)), ("5·10^3", F(5000)), ("7 + 41", F(48)), ("3 · 4", F(12)), ("6 ÷ 4", F(3, 2)),
    ("14 + 2 * 3.5", F(21)), ("(3 + 4) * 2", F(14)), ("2 * (3 + 4)", F(14)), ("8 - 3 - 2", F(3)), ("2 − 5", F(-3)),
    ("12 / 4 / 3", F(1)), ("2 + 3 * 4", F(14)),
    (r"$5 \times 10^3$", F(5000)), (r"$\frac{3}{4}$", F(3, 4)), (r"$\dfrac{3}{4}$", F(3, 4)), (r"$\frac34$", F(3, 4)),
    (r"\frac{3}{4}", F(3, 4)), (r"\tfrac{3}{4}", F(3, 4)), (r"\(\frac{3}{4}\)", F(3, 4)), (r"\[ 0.75 \]", F(3, 4)),
    (r"$$\frac{3}{4}$$", F(3, 4)), (r"$-\frac{1}{2}$", F(-1, 2)), (r"$3\frac{1}{4}$", F(13, 4)), (r"$75\%$", F(3, 4)),
    (r"\boxed{42}", F(42)), (r"$\boxed{42}$", F(42)), (r"\boxed{\frac{3}{4}}", F(3, 4)), (r"$1{,}755$", F(1755)),
    (r"$12 \cdot 7$", F(84)), (r"$\left(3+4\right)\cdot 2$", F(14)), (r"$2^{3}$", F(8)),
    (r"$\frac{1}{2}+\frac{1}{3}$", F(5, 6)), ("3." + "14159265358979323846" * 3, F("3." + "14159265358979323846" * 3)),
])  # fmt: skip
def test_a_numeral_in_any_usual_spelling_has_its_value_and_place(raw: str, value: Fraction):
    with within(2):
        assert values(raw) == {value}


@given(st.integers(0, 10**12), st.decimals(0, 10**6, places=3), st.integers(0, 999), st.integers(1, 999))
@settings(deadline=None)
def test_any_written_number_has_its_value(n: int, decimal, top: int, bottom: int):
    assert values(f"{n:,}") == values(f"{n:,}".replace(",", " ")) == values(str(n)) == {F(n)}
    assert values(f"{decimal}") == values(f"${decimal}$") == {F(decimal)}
    assert values(f"{decimal}%") == {F(decimal) / 100}
    assert values(f"{top}/{bottom}") == values(rf"$\frac{{{top}}}{{{bottom}}}$") == {F(top, bottom)}


@pytest.mark.parametrize(("raw", "tex"), [
    ("4√3", r"4\sqrt{3}"), ("48π", r"48\pi"), ("70 pi", r"70\pi"), (r"$4\sqrt{3}$", r"4\sqrt{3}"), ("2 + 3i", "2+3i"),
    ("x² + 5", "x^{2}+5"), (r"\sqrt{2}", r"\sqrt{2}"), (r"\binom{9}{4}", r"\binom{9}{4}"), ("5 ln 3", r"5\ln3"),
])  # fmt: skip
def test_a_formula_that_is_no_plain_number_is_an_expression(raw: str, tex: str):
    assert [(m.form, m.value, m.tex.replace(" ", "")) for m in in_text(raw)] == [("expression", None, tex)]


@pytest.mark.parametrize(("raw", "sides"), [
    ("14c = 4v", [None, None]), ("2x = 18", [None, F(18)]), ("$x = 5$", [None, F(5)]), ("$19c=266$", [None, F(266)]),
    (r"$x \le 7$", [None, F(7)]), ("x < 7.5", [None, F("7.5")]), (r"$72+126=198$", [F(198), F(198)]),
    (r"$5\cdot 14 = 70 = 2 \cdot 35$", [F(70)] * 3),
])  # fmt: skip
def test_an_equation_is_a_relation_that_gives_its_sides(raw: str, sides: list[Fraction | None]):
    whole, *found = in_text(raw)
    assert (whole.form, whole.value, whole.side) == ("relation", None, False)
    assert [m.value for m in found] == sides and all(m.side and m.form != "relation" for m in found)


def test_a_list_in_a_formula_gives_its_items():
    found = in_text(r"$b \in \{1, 3, 1{,}755\}$")
    assert {F(1), F(3), F(1755)} <= {m.value for m in found if m.side}


@pytest.mark.parametrize("text", [
    "", " \n", "Someone often gave attention to the weight of a bone.", "the 4th row, the 12th, the 21st and the 33rd",
    "the third case and the tenth row", "a second attempt", "version_2 of file3.txt", "Add, simplify (a) (b).",
])  # fmt: skip
def test_what_is_no_number_is_not_mentioned(text: str):
    assert mentions(text) == []


def test_a_formula_is_not_read_twice():
    text = r"First $3 + 4$, then two hundred and 5 + 6; \frac{1}{2} and 7."
    found = [m for m in mentions(text) if not m.side]
    assert [m.text for m in found] == ["$3 + 4$", "two hundred", "5 + 6", r"\frac{1}{2}", "7"]


# Hostile texts

_PIECES = [
    "1", "12", " ", " ", ".", ",", "-", "(", ")", "{", "}", "[", "^", "_", "=", "<", "$", "$$", "\\(", "\\)", "\\[",
    "\\frac", "\\frac{", "\\sqrt{", "\\boxed{", "\\binom", "\\in", "x", "b", "pi", "π", "√", "½", "²", "⁻", "⁰⁄₀",
    "₃", "%", " percent", "!", "two", "zero", " hundred", " and ", "a ", " third", "half of ", " over ", " choose ",
    ":", " times ", "the square root of ", " point ", " in ", "\n", "\u2009", "𝟛", "٣", "\x00", "\ud800", "1e999",
]  # fmt: skip


@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(_PIECES), max_size=14).map("".join)))
@settings(max_examples=500, deadline=None)
def test_no_text_raises_and_every_span_lies_in_it(text: str):
    with within(10):
        assert_spans(text, mentions(text))
        assert all(0 <= start < end <= len(text) for start, end, _, _ in spoken(text))


@pytest.mark.parametrize("piece", [
    "1", "7 ", "1,", "(", ")", "- ", "^", "²", "√", "x", "x^2 + ", "x = ", "$", "\\(", "\\[", "\\frac{", "\\sqrt{",
    "\\boxed{", "{", "{}", "\n", "two two two ", "one thousand ", "two and a ", "two times ", "nine choose ", "3 in ",
])  # fmt: skip
def test_long_runs_of_anything_are_read_in_time(piece: str):
    for length, seconds in ((60, 2), (5_000, 5), (100_000, 30)):
        text = piece * (length // len(piece)) + " end"
        with within(seconds):
            assert_spans(text, mentions(text))


@pytest.mark.parametrize("text", [
    "9" * 5000 + ":" + "9" * 5000, "(" * 3000 + "b2", "2b" + ")" * 3000, "$" + "(" * 3000 + "1" + ")" * 3000 + "$",
    "9" * 79 + "^199", "2^200^200", "1/0", "0^-1", r"\frac{1}{0}", "3:0", "1e999", "0.5e-999",
    "9 " * 30 + "x", "x^2" * 30 + "!", "a" + "²" * 50 + "b",
])  # fmt: skip
def test_numbers_that_python_cannot_hold_are_no_error(text: str):
    with within(5):
        assert_spans(text, mentions(text))

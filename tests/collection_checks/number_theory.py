"""Independent recomputation of the answers of the number theory problems."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import sympy


def num_01() -> int:
    """Tries all fillings of the two smudged digits."""
    totals = [int(f"47{a}1{b}6") for a in range(10) for b in range(10)]
    return max(total for total in totals if total % 36 == 0)


def num_02() -> int:
    """Tries all lengths up to the limit and counts the pieces."""
    return min(756 // d + 588 // d for d in range(1, 51) if 756 % d == 0 and 588 % d == 0)


def num_03() -> int:
    """Reads the numerals in all bases from 5 to 36 and keeps the one in which the statement is true."""
    totals = [int("420", base) for base in range(5, 37) if 3 * int("124", base) == int("420", base)]
    (total,) = totals
    return total


def num_04() -> Fraction:
    """Reduces all 360 fractions and counts those whose denominator becomes smaller."""
    return Fraction(sum(Fraction(n, 360).denominator < 360 for n in range(1, 361)), 360)


def num_05() -> int:
    """Tries all numbers of small and large trays."""
    return min(x + y for x in range(72) for y in range(46) if 14 * x + 22 * y == 1000)


def num_06() -> int:
    """Tries all numbers of bulbs in the range."""
    (bulbs,) = [n for n in range(1001, 1200) if (n % 5, n % 7, n % 9) == (3, 4, 5)]
    return bulbs


def num_07() -> Fraction:
    """Adds the reciprocals of the divisors one after the other."""
    return sum((Fraction(1, d) for d in range(4, 481, 4) if 480 % d == 0), Fraction(0))


def num_08() -> int:
    """Tests all primes below 20000 with modular powers."""
    return sum(p for p in sympy.primerange(20000) if (pow(3, p + 3, p) + pow(2, p + 5, p)) % p == 0)


def num_09() -> int:
    """Multiplies the odd numbers and divides by 45 as often as that is possible."""
    product = 1
    for factor in range(1, 200, 2):
        product *= factor
    k = 0
    while product % 45 == 0:
        product //= 45
        k += 1
    return k


def num_10() -> int:
    """Tries all sides x <= y; x * y = 6 * (x + y) + 14 <= 12 * y + 14 <= 26 * y bounds x, and so y <= 6 * x + 14."""
    areas = set()
    for x in range(1, 27):
        for y in range(x, 6 * 26 + 15):
            if x * y == 3 * 2 * (x + y) + 14:
                areas.add(x * y)
    return sum(areas)


def num_11() -> int:
    """Multiplies by 7 modulo a million until 1 is reached."""
    power, n = 7, 1
    while power != 1:
        power, n = power * 7 % 10**6, n + 1
    return n


CHECKS: dict[str, Callable[[], object]] = {
    "num-01": num_01,
    "num-02": num_02,
    "num-03": num_03,
    "num-04": num_04,
    "num-05": num_05,
    "num-06": num_06,
    "num-07": num_07,
    "num-08": num_08,
    "num-09": num_09,
    "num-10": num_10,
    "num-11": num_11,
}

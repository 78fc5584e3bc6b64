"""Independent computations of the answers of the shipped collection's algebra problems."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache

import sympy as sp


def ferry() -> object:
    """Cramer's rule in exact rationals for the two prices."""
    (p, q, u), (r, s, v) = (5, 12, 112), (8, 4, 126)
    determinant = p * s - q * r
    car = Fraction(u * s - q * v, determinant)
    bicycle = Fraction(p * v - u * r, determinant)
    return car + 2 * bicycle


def dial() -> object:
    """Counts the settings by trying every integer in a wide range, in exact rationals."""
    return sum(1 for n in range(-1000, 1001) if -3 <= Fraction(5 - 2 * n, 4) < 6)


def theatre() -> object:
    """Builds the rows for every size of the front row and adds them where the condition holds."""
    totals = set()
    for front in range(1, 1000):
        rows = [front]
        while len(rows) < 30:
            rows.append(rows[-1] + 3)
        if rows[11] == 2 * rows[3]:
            totals.add(sum(rows))
    (total,) = totals
    return total


def lemonade() -> object:
    """Tries every amount poured away, in thousandths of the jug, counting syrup in integers."""
    fitting = [out for out in range(1001) if 20 * (1000 - out) + 50 * out == 29 * 1000]
    (out,) = fitting
    return Fraction(out, 1000)


def logarithms() -> object:
    """Removes the logarithms first (cubes both sides of the exponential form) and keeps the roots that fit."""
    x = sp.Symbol("x")
    roots = sp.solve(x**3 - 8 * (4 * x), x)  # log_8(x^3) - log_8(4x) = log_8(8)
    fitting = [root for root in roots if root.is_positive]
    (root,) = fitting
    if abs(sp.N(sp.log(root, 2) - sp.log(4 * root, 8) - 1, 30)) > sp.Float("1e-25"):
        raise ValueError("the root does not satisfy the equation")
    return root


def remainder() -> object:
    """Polynomial long division, then the value of the remainder."""
    x = sp.Symbol("x")
    return sp.rem(2 * x**12 + 3 * x**5 - 7, x**3 - x, x).subs(x, 10)


def complex_equation() -> object:
    """Takes the number and its conjugate for two unknowns of a polynomial system and keeps true conjugates."""
    z, w = sp.symbols("z w")
    pairs = sp.solve([z * w + 2 * sp.I * z - 7 - 4 * sp.I, z * w - 2 * sp.I * w - 7 + 4 * sp.I], [z, w], dict=True)
    found = {sp.simplify(pair[z]) for pair in pairs if sp.simplify(sp.conjugate(pair[z]) - pair[w]) == 0}
    (number,) = [value for value in found if sp.im(value) > 0]
    return number


def quotient() -> object:
    """Calculus: the least value at a zero of the derivative, compared with the limits at both ends."""
    x = sp.Symbol("x", real=True)
    expression = (4 * x + 1) / (x**2 + 5)
    values = [sp.simplify(expression.subs(x, point)) for point in sp.solve(sp.diff(expression, x), x)]
    least = min(values)
    if any(sp.limit(expression, x, end) < least for end in (sp.oo, -sp.oo)):
        raise ValueError("the infimum lies at an end")
    return least


def series() -> object:
    """Partial fractions, each summed with the logarithm series at 1/3."""
    n, base = sp.Symbol("n"), sp.Rational(1, 3)
    term = (n + 3) / (n * (n + 1) * (n + 2))
    log_sum = -sp.log(1 - base)
    total = sp.Integer(0)
    for shift in range(3):
        weight = sp.limit(term * (n + shift), n, -shift)
        missing = sum((base**k / k for k in range(1, shift + 1)), sp.Integer(0))
        total += weight * (log_sum - missing) / base**shift
    return sp.simplify(sp.expand(total))


def doubling_rules() -> object:
    """Evaluates the function by its rules at each of the arguments and adds."""

    @cache
    def f(n: int) -> int:
        return 0 if n == 0 else 3 * f(n // 2) + 2 * (n % 2)

    return sum(f(n) for n in range(64))


def product_of_powers() -> object:
    """Eliminates one variable, solves for the stationary point, and checks it against a grid of rationals."""
    y, z = sp.symbols("y z", positive=True)
    goal = (12 - 2 * y - 3 * z) ** 2 * y**3 * z
    points = sp.solve([sp.diff(goal, y), sp.diff(goal, z)], [y, z], dict=True)
    inside = [point for point in points if (12 - 2 * y - 3 * z).subs(point) > 0]
    largest = max(goal.subs(point) for point in inside)
    grid = (
        Fraction(72 - 2 * j - 3 * k, 6) ** 2 * Fraction(j, 6) ** 3 * Fraction(k, 6)
        for j in range(1, 36)
        for k in range(1, 24)
        if 2 * j + 3 * k < 72
    )
    if max(grid) > Fraction(int(largest.p), int(largest.q)):
        raise ValueError("the grid has a larger value")
    return largest


CHECKS: dict[str, Callable[[], object]] = {
    "alg-01": ferry,
    "alg-02": dial,
    "alg-03": theatre,
    "alg-04": lemonade,
    "alg-05": logarithms,
    "alg-06": remainder,
    "alg-07": complex_equation,
    "alg-08": quotient,
    "alg-09": series,
    "alg-10": doubling_rules,
    "alg-11": product_of_powers,
}

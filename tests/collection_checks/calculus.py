"""Independent recomputation of the answers of the calculus problems in the collection."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import sympy as sp

x, y, t, s = sp.symbols("x y t s", real=True)


def check_01() -> object:
    """Ratio of the derivatives at 0 (l'Hopital), where the solution rationalises."""
    top, bottom = sp.sqrt(3 + 2 * x) - sp.sqrt(3 - x), sp.sin(4 * x)
    assert top.subs(x, 0) == bottom.subs(x, 0) == 0
    return sp.diff(top, x).subs(x, 0) / sp.diff(bottom, x).subs(x, 0)


def check_02() -> object:
    """Volume from slices, what was lost after a time step as a height in the jug, limit of the quotient."""
    step, z = sp.symbols("step z", positive=True)
    lost = sp.integrate(sp.pi * (sp.Rational(6, 9) * z) ** 2, (z, 6 - 2 * step, 6))
    return sp.limit(lost / (sp.pi * 5**2) / step, step, 0)


def check_03() -> object:
    """Solve for the intercept, then a solution of the form (p x + q) e^(x/2) by undetermined coefficients."""
    a, b = sp.symbols("a b")
    curve = (x + 1) * sp.exp(x / 2)
    (left,) = sp.solve(curve, x)
    primitive = (a * x + b) * sp.exp(x / 2)
    difference = sp.expand(sp.simplify((sp.diff(primitive, x) - curve) / sp.exp(x / 2)))
    primitive = primitive.subs(sp.solve(sp.Poly(difference, x).coeffs(), [a, b]))
    return primitive.subs(x, 2) - primitive.subs(x, left)


def check_04() -> object:
    """Volume as a function of the height of the cylinder (the solution uses the radius), largest critical value."""
    height = sp.symbols("height", positive=True)
    volume = sp.pi * (-2 * sp.log(height / 6)) ** 2 * height
    values = [sp.simplify(volume.subs(height, root)) for root in sp.solve(sp.diff(volume, height), height)]
    return max(values, key=sp.N)


def check_05() -> object:
    """Solve the equation of the loaf's temperature itself (the solution works with the lag), then for the time."""
    temperature = sp.Function("T")
    oven = 20 + 3 * t
    law = sp.Eq(temperature(t).diff(t), (oven - temperature(t)) / 5)
    loaf = sp.dsolve(law, temperature(t), ics={temperature(0): 20}).rhs
    (time,) = sp.solve(sp.Eq(sp.expand(oven - loaf), 10), t)
    return time


def check_06() -> object:
    """1/(n(n+2)) as an integral of t^(n-1)(1-t^2)/2, geometric series inside, checked by rational partial sums."""
    value = sp.integrate(sp.apart((1 - t**2) / (2 * (3 - t)), t), (t, 0, 1))
    partial = sum(Fraction(1, n * (n + 2) * 3**n) for n in range(1, 60))
    assert abs(sp.N(value, 30) - sp.Rational(partial)) < sp.Float("1e-25", 30)
    return value


def check_07() -> object:
    """Logistic factor = 1/2 - tanh/2, whose second part is odd; half the even rest; compared with quadrature."""
    even, odd = x**2 / (1 + x**2), x**5 - 2 * x
    assert sp.expand(odd + odd.subs(x, -x)) == 0 and sp.simplify(even - even.subs(x, -x)) == 0
    assert sp.simplify((1 / (1 + sp.exp(odd)) - (1 - sp.tanh(odd / 2)) / 2).rewrite(sp.exp)) == 0
    value = sp.integrate(even, (x, -sp.sqrt(3), sp.sqrt(3))) / 2
    numeric = sp.Integral(even / (1 + sp.exp(odd)), (x, -sp.sqrt(3), sp.sqrt(3))).evalf(15)
    assert abs(numeric - sp.N(value, 15)) < 1e-10
    return sp.simplify(value)


def check_08() -> object:
    """Laplace transform of the convolution equation, inverted by residues, and put back into the equation."""
    transform = sp.cancel((1 / s) / (1 - 3 / s + 2 / s**2))
    poles = sp.roots(sp.denom(transform), s)
    function = sum(sp.residue(transform * sp.exp(s * x), s, pole) for pole in poles)
    right = 1 + sp.integrate(sp.expand((3 - 2 * x + 2 * t) * function.subs(x, t)), (t, 0, x))
    assert sp.simplify(right - function) == 0
    return function


def check_09() -> object:
    """|u - v| = 2 max(u, v) - u - v, with the mean of the maximum from its distribution function."""
    below = x * sp.sqrt(x)  # P(x <= c) P(y^2 <= c) at c
    mean_of_max = sp.integrate(1 - below, (x, 0, 1))
    return 2 * mean_of_max - sp.integrate(x, (x, 0, 1)) - sp.integrate(y**2, (y, 0, 1))


def check_10() -> object:
    """Leibniz' rule on (1 + x + x^2) f = 2 + x at 0: a recursion for the derivatives in integers."""
    derivatives = [2]
    for n in range(1, 10):
        value = (1 if n == 1 else 0) - n * derivatives[n - 1]
        if n >= 2:
            value -= n * (n - 1) * derivatives[n - 2]
        derivatives.append(value)
    return derivatives[9]


def check_11() -> object:
    """Division by x twice as integration of the Laplace transform of 1 - cos, compared with quadrature."""
    p = sp.symbols("p", positive=True)
    inner = sp.log(1 + 3 / p**2) / 2  # the integral of 1/s - s/(s^2 + 3) from p to infinity
    assert sp.simplify(sp.diff(inner, p) + 1 / p - p / (p**2 + 3)) == 0 and sp.limit(inner, p, sp.oo) == 0
    primitive = p * inner + sp.sqrt(3) * sp.atan(p / sp.sqrt(3))
    assert sp.simplify(sp.diff(primitive, p) - inner) == 0
    value = sp.limit(primitive, p, sp.oo) - primitive.subs(p, 1)
    numeric = sp.Integral(sp.exp(-x) * (1 - sp.cos(sp.sqrt(3) * x)) / x**2, (x, 0, 50)).evalf(12)
    assert abs(numeric - sp.N(value, 15)) < 1e-8
    return sp.simplify(value)


CHECKS: dict[str, Callable[[], object]] = {
    "cal-01": check_01,
    "cal-02": check_02,
    "cal-03": check_03,
    "cal-04": check_04,
    "cal-05": check_05,
    "cal-06": check_06,
    "cal-07": check_07,
    "cal-08": check_08,
    "cal-09": check_09,
    "cal-10": check_10,
    "cal-11": check_11,
}

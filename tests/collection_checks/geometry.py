"""Independent exact computations of the answers of the geometry problems of the collection."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, product

import sympy as sp

R = sp.Rational
Point = tuple[sp.Expr, ...]


def _minus(p: Point, q: Point) -> Point:
    """Vector from q to p."""
    return tuple(sp.sympify(a) - b for a, b in zip(p, q, strict=True))


def _cross(u: Point, v: Point) -> sp.Expr:
    """Cross product of two plane vectors."""
    return u[0] * v[1] - u[1] * v[0]


def _dot(u: Point, v: Point) -> sp.Expr:
    """Scalar product."""
    return sum((a * b for a, b in zip(u, v, strict=True)), sp.Integer(0))


def _meet(p: Point, q: Point, r: Point, s: Point) -> Point:
    """Intersection point of the lines pq and rs."""
    t = _cross(_minus(r, p), _minus(s, r)) / _cross(_minus(q, p), _minus(s, r))
    return tuple(sp.radsimp(sp.expand(a + t * d)) for a, d in zip(p, _minus(q, p), strict=True))


def geo_01() -> int:
    """Complex coordinates as sums of 360th roots of unity, directions tested modulo the cyclotomic polynomial."""
    z = sp.Symbol("z")
    phi = sp.Poly(sp.cyclotomic_poly(360, z), z)

    def degrees(terms: dict[int, int]) -> int:
        """The whole number of degrees in the argument of sum c * z^k, guessed, then proved exactly."""
        value = sum(c * cmath.rect(1, math.radians(k)) for k, c in terms.items())
        n = round(math.degrees(cmath.phase(value)))
        assert (value * cmath.rect(1, -math.radians(n))).real > 0.01
        # The sum turned back by n degrees is real: it equals its conjugate modulo the cyclotomic polynomial.
        test: dict[tuple[int], int] = {}
        for k, c in terms.items():
            for power, sign in ((k - n, c), (n - k, -c)):
                test[(power % 360,)] = test.get((power % 360,), 0) + sign
        assert sp.rem(sp.Poly(test, z), phi).is_zero
        return n

    # P = 0, Q = 1, R = z^52, so PQ = PR = 1; T = R + (unit vector from Q to R), as RT = RP = 1.
    along = degrees({52: 1, 0: -1})
    return degrees({52: 1, along: 1})


def geo_02() -> sp.Rational:
    """Determinants in a parallelogram with free symbolic corner vectors."""
    ux, uy, vx, vy = sp.symbols("ux uy vx vy")
    b, d = (ux, uy), (vx, vy)
    m = tuple(R(1, 3) * c for c in b)
    n = tuple(x + R(3, 4) * y for x, y in zip(b, d, strict=True))
    share = sp.cancel(_cross(_minus(m, d), _minus(n, d)) / 2 / _cross(b, d))
    return abs(share)


def geo_03() -> sp.Expr:
    """Surface of revolution: integral of 2 pi x ds over the parametrised profile curve from axis to axis."""
    t = sp.Symbol("t", real=True)
    profile = [
        ((t, sp.Integer(0)), 0, 3),
        ((sp.Integer(3), t), 0, 8),
        ((3 - t, sp.Integer(8)), 0, 1),
        ((2 * sp.cos(t), 8 - 2 * sp.sin(t)), 0, sp.pi / 2),
    ]
    total = sp.Integer(0)
    end = (sp.Integer(0), sp.Integer(0))
    for (x, y), low, high in profile:
        assert (sp.sympify(x).subs(t, low), sp.sympify(y).subs(t, low)) == end
        end = (sp.sympify(x).subs(t, high), sp.sympify(y).subs(t, high))
        ds = sp.sqrt(sp.trigsimp(sp.diff(x, t) ** 2 + sp.diff(y, t) ** 2))
        total += sp.integrate(2 * sp.pi * x * ds, (t, low, high))
    assert end[0] == 0
    return sp.simplify(total)


def geo_04() -> str:
    """Centre of the composed rotation as meeting point of the bisectors between two points and their images."""

    def image(w: sp.Expr) -> sp.Expr:
        """The motion on complex numbers."""
        centre = 1 + 2 * sp.I
        return sp.expand(centre + sp.I * (w - centre) + 8 - 4 * sp.I)

    x, y = sp.symbols("x y", real=True)
    equations = []
    for w in (sp.Integer(0), sp.Integer(1)):
        v = image(w)
        equations.append(
            sp.expand((x - sp.re(w)) ** 2 + (y - sp.im(w)) ** 2 - (x - sp.re(v)) ** 2 - (y - sp.im(v)) ** 2)
        )
    (solution,) = sp.solve(equations, [x, y], dict=True)
    fixed = solution[x] + sp.I * solution[y]
    assert sp.expand(image(fixed) - fixed) == 0
    return f"({solution[x]}, {solution[y]})"


def geo_05() -> sp.Expr:
    """Coordinates: both A and its mirror image 2A - P satisfy the equation of the circle."""
    x, y = sp.symbols("x y", real=True)
    solutions = sp.solve([x**2 + y**2 - 25, (2 * x - 11) ** 2 + (2 * y) ** 2 - 25], [x, y])
    lengths = {sp.sqrt(sp.expand((x0 - 11) ** 2 + y0**2)) for x0, y0 in solutions}
    (length,) = lengths
    return length


def geo_06() -> sp.Expr:
    """Coordinates of A from the two distances, then the sine as cross product over lengths."""
    x, y = sp.symbols("x y", real=True)
    solutions = sp.solve([x**2 + y**2 - 49, (x - 9) ** 2 + y**2 - 64], [x, y])
    a = next(s for s in solutions if s[1] > 0)
    to_a = _minus(a, (sp.Integer(3), sp.Integer(0)))
    to_b = (sp.Integer(-3), sp.Integer(0))
    return sp.simplify(abs(_cross(to_a, to_b)) / sp.sqrt(_dot(to_a, to_a) * _dot(to_b, to_b)))


def geo_07() -> Fraction:
    """Circle from a linear system (double root at the contact); slope by mirroring the contact point."""
    d, e, f = sp.symbols("d e f")
    # x^2 + y^2 + d x + e y + f has the double root x = 4 on the x-axis and vanishes at (6, 4).
    (s,) = sp.solve([d + 8, f - 16, 36 + 16 + 6 * d + 4 * e + f], [d, e, f], dict=True)
    cx, cy = Fraction(int(-s[d]), 2), Fraction(int(sp.numer(-s[e])), 2 * int(sp.denom(s[e])))
    # The second contact point is the mirror image of (4, 0) in the line from the origin to the centre.
    k = 2 * (4 * cx) / (cx**2 + cy**2)
    qx, qy = k * cx - 4, k * cy
    assert (qx - cx) ** 2 + (qy - cy) ** 2 == cy**2
    assert (qx - cx) * qx + (qy - cy) * qy == 0
    return qy / qx


def geo_08() -> sp.Expr:
    """Coordinates with a symbolic apex: upper corners on the lines of the sides, perimeter fixed, solved by sympy."""
    p, x1, x2, h = sp.symbols("p x1 x2 h")
    left = _cross((p, 10), (x1, h))
    right = _cross(_minus((p, 10), (15, 0)), _minus((x2, h), (15, 0)))
    (s,) = sp.solve([left, right, 2 * (x2 - x1) + 2 * h - 26], [x1, x2, h], dict=True)
    return sp.cancel((s[x2] - s[x1]) * s[h])


def geo_09() -> sp.Expr:
    """Intersection of the plane with all 12 edges, then the area as half the length of the summed cross products."""
    a, p, q = (sp.Matrix(v) for v in ((0, 0, 0), (6, 0, 4), (0, 6, 4)))
    normal = (p - a).cross(q - a)
    corners = [sp.Matrix(v) for v in product((0, 6), repeat=3)]
    points: list[sp.Matrix] = []
    for u, v in combinations(corners, 2):
        if sum(1 for c in v - u if c != 0) != 1:
            continue
        hu, hv = normal.dot(u), normal.dot(v)
        if hu == hv:
            continue
        t = R(hu, hu - hv)
        if 0 <= t <= 1:
            w = u + t * (v - u)
            if w not in points:
                points.append(w)
    middle = sum(points, sp.zeros(3, 1)) / len(points)
    first = points[0] - middle
    second = normal.cross(first) / sp.sqrt(normal.dot(normal))
    points.sort(key=lambda w: float(sp.atan2((w - middle).dot(second), (w - middle).dot(first))))
    total = sp.zeros(3, 1)
    for u, v in zip(points, points[1:] + points[:1], strict=True):
        total += (u - middle).cross(v - middle)
    return sp.simplify(sp.sqrt(total.dot(total)) / 2)


def geo_10() -> sp.Expr:
    """Tray minus the Minkowski sum of the coin with the triangle of possible centres, all in coordinates."""
    b, c = (sp.Integer(0), sp.Integer(0)), (sp.Integer(21), sp.Integer(0))
    x = R(10**2 + 21**2 - 17**2, 2 * 21)
    a = (x, sp.sqrt(10**2 - x**2))
    assert _dot(_minus(a, c), _minus(a, c)) == 17**2
    corners = [b, c, a]
    shifted = []
    for u, v in zip(corners, corners[1:] + corners[:1], strict=True):
        d = _minus(v, u)
        length = sp.sqrt(_dot(d, d))
        inward = (-d[1] / length, d[0] / length)
        shifted.append(tuple((m + i, n + i) for m, n, i in zip(u, v, inward, strict=True)))
    lines = [((s[0][0], s[1][0]), (s[0][1], s[1][1])) for s in shifted]
    centres = [_meet(*lines[i - 1], *lines[i]) for i in range(3)]

    def area(t: list[Point]) -> sp.Expr:
        """Area of a positively oriented triangle."""
        return _cross(_minus(t[1], t[0]), _minus(t[2], t[0])) / 2

    sides = [_minus(centres[i], centres[i - 1]) for i in range(3)]
    covered = area(centres) + sum(sp.sqrt(_dot(d, d)) for d in sides) + sp.pi
    assert area(centres) > 0
    return sp.expand(area(corners) - covered)


def geo_11() -> sp.Expr:
    """Exact coordinates: A as second point of the circle BCD on the bisector of BD, X by intersection."""
    c, b = (sp.Integer(0), sp.Integer(0)), (sp.Integer(7), sp.Integer(0))
    d = (R(15, 2), 15 * sp.sqrt(3) / 2)
    x, y, t = sp.symbols("x y t", real=True)
    (o,) = sp.solve([14 * x - 49, 2 * d[0] * x + 2 * d[1] * y - 225], [x, y], dict=True)
    o = (o[x], o[y])
    m = tuple((u + v) / 2 for u, v in zip(b, d, strict=True))
    normal = (d[1] - b[1], b[0] - d[0])
    candidates = []
    for root in sp.solve(sp.expand(t**2 * _dot(normal, normal) - _dot(o, o)), t):
        a = tuple(sp.expand(u + root * n) for u, n in zip(o, normal, strict=True))
        if _dot(normal, _minus(a, m)) * _dot(normal, _minus(c, m)) < 0:
            candidates.append(a)
    (a,) = candidates
    ab, ad = _minus(b, a), _minus(d, a)
    assert sp.simplify(_dot(ab, ab) - _dot(ad, ad)) == 0
    assert sp.simplify(_dot(ab, ad) / _dot(ab, ab)) == -R(1, 2)
    meet = _meet(a, c, b, d)
    ax, xc = _minus(meet, a), _minus(c, meet)
    return sp.sqrt(sp.simplify(_dot(ax, ax) / _dot(xc, xc)))


CHECKS: dict[str, Callable[[], object]] = {
    "geo-01": geo_01,
    "geo-02": geo_02,
    "geo-03": geo_03,
    "geo-04": geo_04,
    "geo-05": geo_05,
    "geo-06": geo_06,
    "geo-07": geo_07,
    "geo-08": geo_08,
    "geo-09": geo_09,
    "geo-10": geo_10,
    "geo-11": geo_11,
}

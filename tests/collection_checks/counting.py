"""Independent computations of the answers in `sgpo_lib/collection/counting.yaml`, mostly by enumeration."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, permutations, product

import sympy


def lock_codes() -> int:
    """Goes through all ordered selections of four of the seven digits and tests the two ends."""
    return sum(code[0] % 2 == 1 and code[-1] % 2 == 0 for code in permutations(range(1, 8), 4))


def robot_routes() -> Fraction:
    """Walks every route move by move and looks whether it steps on the crossing with the bucket."""
    routes = missing = 0
    for ups in combinations(range(9), 4):
        x = y = 0
        hit = False
        for move in range(9):
            x, y = (x, y + 1) if move in ups else (x + 1, y)
            hit = hit or (x, y) == (2, 2)
        assert (x, y) == (5, 4)
        routes += 1
        missing += not hit
    return Fraction(missing, routes)


def torn_kites() -> Fraction:
    """Draws two tickets from 1 to 100, for the maker and for the tearing, in all equally likely ways."""
    torn = by_apprentice = 0
    for maker, fate in product(range(1, 101), repeat=2):
        apprentice = maker <= 20
        if fate <= (12 if apprentice else 7):
            torn += 1
            by_apprentice += apprentice
    return Fraction(by_apprentice, torn)


def bare_tiles() -> int:
    """Tests each tile number for the three divisors."""
    return sum(all(tile % step for step in (4, 6, 10)) for tile in range(1, 601))


def lighthouse_signals() -> int:
    """Builds all signals of the wanted duration as strings and counts the distinct ones."""
    flashes = {"w": 1, "r": 1, "W": 3}
    finished, growing = set(), {("", 0)}
    while growing:
        growing = {(s + f, t + d) for s, t in growing for f, d in flashes.items() if t + d <= 10}
        finished |= {s for s, t in growing if t == 10}
    return len(finished)


def connector_cost() -> Fraction:
    """Averages the total cost over all placements of the red lanterns."""
    costs = []
    for red in combinations(range(10), 4):
        colours = [place in red for place in range(10)]
        costs.append(sum(2 if colours[i] == colours[i + 1] else 5 for i in range(9)))
    return Fraction(sum(costs), len(costs))


def red_die_largest() -> Fraction:
    """Enumerates the rolls of three dice and filters by the condition."""
    given = [(b, g) for r, b, g in product(range(1, 7), repeat=3) if r > b and r > g]
    return Fraction(sum(b == g for b, g in given), len(given))


def kiosk_line() -> Fraction:
    """Gives the four named children all possible places among the nine and tests the precedences."""
    places = list(permutations(range(9), 4))
    return Fraction(sum(a < b and a < c and b < d for a, b, c, d in places), len(places))


def mad_lift() -> sympy.Rational:
    """Sums the first row of the fundamental matrix of the absorbing Markov chain."""
    up, down = sympy.Rational(2, 3), sympy.Rational(1, 3)
    moves = sympy.Matrix([[0, 1, 0, 0], [down, 0, up, 0], [0, down, 0, up], [0, 0, down, 0]])
    return sum((sympy.eye(4) - moves).inv().row(0))


def spaced_bulbs() -> int:
    """Tries all selections of four bulbs and measures the gaps around the circle."""
    return sum(all((lit[(i + 1) % 4] - lit[i]) % 15 - 1 >= 2 for i in range(4)) for lit in combinations(range(15), 4))


def stained_windows() -> int:
    """Collects the smallest rotation of every glazing without equal neighbours."""
    glazings = (w for w in product(range(3), repeat=8) if all(w[i] != w[i - 1] for i in range(8)))
    return len({min(w[i:] + w[:i] for i in range(8)) for w in glazings})


CHECKS: dict[str, Callable[[], object]] = {
    "cnt-01": lock_codes,
    "cnt-02": robot_routes,
    "cnt-03": torn_kites,
    "cnt-04": bare_tiles,
    "cnt-05": lighthouse_signals,
    "cnt-06": connector_cost,
    "cnt-07": red_die_largest,
    "cnt-08": kiosk_line,
    "cnt-09": mad_lift,
    "cnt-10": spaced_bulbs,
    "cnt-11": stained_windows,
}

"""Independent checks of the answers to the word problems."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import count, permutations

import sympy


def wrd_01() -> int:
    """Simulate the day minute by minute and stop at the first common departure after the arrival."""
    arrival = 13 * 60 + 5
    for minute in count(arrival):
        shuttle = minute >= 9 * 60 + 10 and (minute - 9 * 60 - 10) % 18 == 0
        tram = minute >= 9 * 60 + 16 and (minute - 9 * 60 - 16) % 24 == 0
        if shuttle and tram:
            return minute - arrival
    raise AssertionError


def wrd_02() -> Fraction:
    """Compare the cents per gram of concrete tins of many sizes and prices, which must all agree."""
    found = set()
    for grams in (50, 120, 250):
        for cents in (199, 640, 1000):
            before = Fraction(cents, grams)
            after = (cents + Fraction(10 * cents, 100)) / (grams - Fraction(20 * grams, 100))
            found.add(100 * (after - before) / before)
    (percent,) = found
    return percent


def wrd_03() -> Fraction:
    """Try every volume in millilitres and keep account of concentrate in the can."""
    hits = []
    for millilitres in range(6001):
        poured = Fraction(millilitres, 1000)
        concentrate = Fraction(20, 100) * 6 - Fraction(20, 100) * poured + poured
        if concentrate / 6 == Fraction(36, 100):
            hits.append(poured)
    (only,) = hits
    return only


def wrd_04() -> int:
    """Enumerate all ages and all past years."""
    hits = [
        ago
        for twin in range(30)
        for mother in [58 - 2 * twin]
        if mother + 4 == 3 * (twin + 4)
        for ago in range(1, twin)
        if mother - ago == 8 * (twin - ago)
    ]
    (only,) = hits
    return only


def wrd_05() -> Fraction:
    """Follow the litres in a barrel of 960 litres, in whole numbers."""
    barrel = 960
    water = barrel * 5 // 6
    water -= water // 4
    water -= water * 2 // 5
    water += (barrel - water) // 2
    return Fraction(water, barrel)


def wrd_06() -> Fraction:
    """Combine the two reports, by a matrix inverse, so that each machine works for exactly one hour."""
    reports = sympy.Matrix([[3, 6], [5, 2]])  # columns: hours of the large and the small machine in each report
    weights = reports.inv() * sympy.Matrix([1, 1])  # so many times each report is one hour of both machines
    mown = weights[0] * sympy.Rational(1, 2) + weights[1] * sympy.Rational(60, 100)
    return Fraction(int(mown.q), int(mown.p))


def wrd_07() -> sympy.Expr:
    """Solve for the moments at which front and end pass Zoe and the post, with positions on the line."""
    t, c, length = sympy.symbols("t c length", positive=True)  # unit of speed: the trains
    oncoming_end = length - t  # end of a train that goes left, its front at 0 when t = 0
    overtaking_end = -length + t
    solution = sympy.solve(
        [(oncoming_end - c * t).subs(t, 5), (overtaking_end - c * t).subs(t, 9)], [c, length], dict=True
    )[0]
    (moment,) = sympy.solve(oncoming_end.subs(solution), t)
    return moment


def wrd_08() -> Fraction:
    """Try every price in steps of half a cent, takings in exact numbers."""
    def takings(price: Fraction) -> Fraction:
        visitors = 300 - 12 * (price - 9) / Fraction(50, 100)
        return visitors * price + visitors * 2

    prices = [Fraction(k, 200) for k in range(0, 4301)]
    best = max(prices, key=takings)
    if sum(takings(price) == takings(best) for price in prices) != 1:
        raise AssertionError
    return best


def wrd_09() -> int:
    """Round every possible share for 1, 2, 3, ... voters, in whole numbers with halves up."""
    for voters in count(1):
        for yes in range(voters + 1):
            if (2000 * yes + voters) // (2 * voters) == 473:  # tenths of a percent: floor(1000 yes / voters + 1/2)
                return voters
    raise AssertionError


def wrd_10() -> int:
    """Simulate all orders of washing combined with all orders of tuning."""
    jobs = [(25, 13), (9, 6), (17, 27), (30, 24), (5, 14)]
    best = sum(map(sum, jobs))
    for washing in permutations(range(5)):
        ready, clock = [0] * 5, 0
        for job in washing:
            clock += jobs[job][0]
            ready[job] = clock
        for tuning in permutations(range(5)):
            clock = 0
            for job in tuning:
                clock = max(clock, ready[job]) + jobs[job][1]
            best = min(best, clock)
    return best


def wrd_11() -> int:
    """Enumerate how many households can lack two things or more: distribute the missing things over pairs of things.

    A household that lacks three or four things counts like one that lacks two of them, so pairs are enough.
    """
    bicycle, drill, sewing, ladder = (240 * (100 - percent) // 100 for percent in (90, 80, 75, 70))
    most = 0
    for bd in range(bicycle + 1):
        for bs in range(bicycle - bd + 1):
            for bl in range(bicycle - bd - bs + 1):
                d, s, x = drill - bd, sewing - bs, ladder - bl  # still missing; pairs among these three remain
                for ds in range(min(d, s) + 1):
                    dl = min(d - ds, x)
                    sl = min(s - ds, x - dl)
                    most = max(most, bd + bs + bl + ds + dl + sl)
    return 240 - most


CHECKS: dict[str, Callable[[], object]] = {
    "wrd-01": wrd_01, "wrd-02": wrd_02, "wrd-03": wrd_03, "wrd-04": wrd_04, "wrd-05": wrd_05, "wrd-06": wrd_06,
    "wrd-07": wrd_07, "wrd-08": wrd_08, "wrd-09": wrd_09, "wrd-10": wrd_10, "wrd-11": wrd_11,
}

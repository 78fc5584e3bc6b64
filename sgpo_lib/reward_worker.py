"""What runs inside the verifier's workers: Math-Verify (called here only), reasoning-gym, a user's reward.

`serve` is a worker's life, `work` one task; nothing else is called from outside, and nothing here may run in a
training process: a task can hang, exhaust its memory or end its process, which `worker_pool.py` takes into account.
Math-Verify's own time limits use SIGALRM, which fails off the main thread; they are switched off, and the deadline of
the pool takes their place. A worker imports neither torch nor transformers, nor gmpy2, which ends the process where a
number outgrows its memory and hears no signal while it computes. Math-Verify and SymPy are imported inside functions,
so that the parent, which imports this module for a few names, does without them.
Order: answers, equivalence, reward_worker, worker_pool, rewards.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from multiprocessing.connection import Connection
from typing import Any

from sgpo_lib.answers import exact, normalise
from sgpo_lib.equivalence import BadGold, Node, Unparsed, matches, read, too_hard

MEMORY_BYTES = 2 << 30
"""Address space of a worker (RLIMIT_AS)."""
ENVIRONMENT = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "OPENBLAS_NUM_THREADS": "1",
               "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # fmt: skip
"""Of a worker: neither gmpy2 nor flint under SymPy, one thread."""
DIGITS = 1000
"""Digits in which numbers are compared that agree in 60: 2^-2005 next to 1 is seen."""
REASON_LENGTH = 200
"""Most characters of a crash's reason, the message of the exception included."""
Outcome = tuple[str, Any]
"""(`score`, float) | (`unverifiable`, reason) | (`refused`, what is wrong with the user's reward)."""


class Refused(Exception):
    """What is wrong with the user's reward itself, whatever the response: the run cannot go on."""


# ------------------------------------------------------------------------------------------------- Math-Verify


class _MathVerify:
    """`equivalence.Algebra` by Math-Verify's parser and SymPy."""

    def equal(self, gold: str, answer: str) -> bool:
        import sympy

        g, a = _expression(gold, BadGold), _expression(answer, Unparsed)
        if not (isinstance(g, sympy.Expr) and isinstance(a, sympy.Expr)):
            return _verify(g, a)
        if g.free_symbols or a.free_symbols:
            sampled = _agree_at_samples(g, a)
            return _verify(g, a) if sampled is None else sampled
        return _same_number(_value(g, BadGold), _value(a, Unparsed))

    def same_relation(self, gold: list[str], answer: list[str]) -> bool:
        import sympy

        g, h = (_expression(t, BadGold) for t in gold)
        a, b = (_expression(t, Unparsed) for t in answer)
        if not all(isinstance(e, sympy.Expr) for e in (g, h, a, b)):
            return False
        ratio = sympy.simplify((g - h) / (a - b))
        return not ratio.free_symbols and ratio.is_finite is True and ratio.is_zero is False

    def same_set(self, gold: Node, answer: Node) -> bool:
        return bool(_real_set(gold, BadGold) == _real_set(answer, Unparsed))


def _expression(text: str, error: type[Unparsed]) -> Any:
    """SymPy form of normalised LaTeX, unevaluated, decimals as exact fractions. Raises `error`."""
    parsed = _parse(text)
    if parsed is None:
        raise error(f"{text[:200]!r} cannot be read")
    return parsed


_UNREADABLE = re.compile(
    r"__|[\"'`@#$?&‰]|(?<![_\d])\d+ +\d|(?<![\w}\\])\d+_|(?<![\d}])%"
    r"|\\(?:text|not|approx|sim|simeq|cong|[a-zA-Z]*(?:arrow|dots)|implies|iff|tag|cancel|[hv]?phantom)(?![a-z])"
    r"|(?<!_\{[a-z])\\to(?![a-z])")
"""What latex2sympy would leave out without a word."""


@functools.lru_cache(maxsize=512)
def _parse(text: str) -> Any:
    if too_hard(text) or _UNREADABLE.search(text):
        return None
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify.grader import should_treat_as_complex

    # Units are taken off before, with knowledge of what stands in \text: Math-Verify would take the h off 2 pi r h.
    form = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    tex = re.sub(r"(?<![\w.])(?:\d+\.\d*|\.\d+)(?![\d.])", _as_fraction, text).replace("*", r"\cdot ")
    tex = re.sub(r"(?<![_^\d{.])(\d+)\((?=\\frac)", r"\1\\cdot (", tex)  # 2(1/3) is no mixed number
    tex = normalize_latex(tex, form)
    try:  # without Math-Verify's own `parse`, which on failure reads what follows the last = sign
        parsed = latex2sympy(tex, is_real=not should_treat_as_complex(tex), normalization_config=None,
                             conversion_config=ConversionConfig(lowercase_symbols=False))  # fmt: skip
    except MemoryError:
        raise
    except Exception:  # untrusted text; whatever it raises, it was not read
        return None
    return parsed.subs({s: sympy.I for s in parsed.free_symbols if s.name == "i"})


def _as_fraction(match: re.Match[str]) -> str:
    value = Fraction(match[0])
    return rf"(\frac{{{value.numerator}}}{{{value.denominator}}})"


def _verify(gold: Any, answer: Any) -> bool:
    import math_verify

    return bool(math_verify.verify(gold, answer, float_rounding=30, numeric_precision=50, strict=True,
                                   timeout_seconds=None))  # fmt: skip


def _value(expression: Any, error: type[Unparsed]) -> Any:
    import sympy

    value = expression.doit()
    if value.has(sympy.nan, sympy.zoo):
        raise error("undefined value")
    return value


def _same_number(g: Any, a: Any) -> bool:
    """Equal as rationals, or in 60 digits and, where these agree, in 1,000."""
    import sympy

    if (g.is_Rational and a.is_Rational) or g.is_infinite or a.is_infinite:
        return bool(g == a)
    if g.is_zero or a.is_zero:
        return sympy.simplify(g - a) == 0
    for digits in (60, DIGITS):
        x, y = sympy.N(g, digits), sympy.N(a, digits)
        if not (x.is_number and y.is_number and abs(x - y) <= sympy.Float(f"1e-{digits - 20}", digits) * abs(x)):
            return False
    return True


def _agree_at_samples(g: Any, a: Any) -> bool | None:
    """Whether two expressions take the same values at six fixed rational points; None where that cannot be told.

    Real points of both signs: sqrt(x^2) is not x. Points are no zeros of anything that is likely to be asked.
    """
    import sympy

    names = sorted(g.free_symbols | a.free_symbols, key=str)
    g, a = g.doit(), a.doit()
    unknown = sympy.Derivative, sympy.Integral, sympy.Sum, sympy.Product
    if g.has(*unknown) or a.has(*unknown) or any(e.atoms(sympy.core.function.AppliedUndef) for e in (g, a)):
        return None
    told = 0
    for k in range(6):
        point = {s: sympy.Rational(137 * (k + 2) + 61 * j, 101 + 7 * j) * (-1) ** (k * (j + 1))
                 for j, s in enumerate(names)}  # fmt: skip
        x, y = (e.xreplace(point).doit() for e in (g, a))
        x, y = (x, y) if x.is_Rational and y.is_Rational else (sympy.N(x, 60), sympy.N(y, 60))
        if any(not v.is_number or v.has(sympy.nan, sympy.zoo) or v.is_infinite for v in (x, y)):
            continue
        if x.is_Rational and y.is_Rational:
            if x != y:
                return False
            told += 1
            continue
        if (size := max(abs(x), abs(y))) < sympy.Float("1e-40", 60):
            continue  # zero, or the rounding error that stands for it
        if abs(x - y) > sympy.Float("1e-35", 60) * size:
            return False
        told += 1
    return True if told >= 3 else None


def _real_set(node: Node, error: type[Unparsed]) -> Any:
    import sympy

    if node[0] == "seq" and len(node[2]) == 2:
        low, high = (_value(_expression(n[1], error), error) for n in node[2] if n[0] == "leaf")
        return sympy.Interval(low, high, node[1] == "(", node[3] == ")")
    if node[0] == "set":
        return sympy.FiniteSet(*(_value(_expression(n[1], error), error) for n in node[1]))
    if node[0] == "leaf" and node[1] == r"\emptyset":
        return sympy.S.EmptySet
    if node[0] in ("union", "minus"):
        parts = (_real_set(n, error) for n in node[1])
        return functools.reduce(sympy.Union if node[0] == "union" else sympy.Complement, parts)
    raise error("not a set of real numbers")


# ------------------------------------------------------------------------------------------------------- tasks


def _math(gold: str, answer: str) -> float:
    pair = read(gold, answer)
    return float(pair is None or matches(*pair, _MathVerify()))


def _gold(gold: str) -> float:
    """Read every part of a gold answer, print it, read that, and compare; its value is not asked for."""
    def visit(node: Any) -> None:
        if isinstance(node, tuple) and node and node[0] == "leaf":
            if exact(node[1]) is None and not re.fullmatch(r"-?\d+|-?\\infty|\\emptyset", node[1]):
                _same_when_printed(_expression(node[1], BadGold))
        elif isinstance(node, tuple | list) and (not node or node[0] not in ("words", "ratio")):
            for part in node[:3] if node and node[0] == "equation" else node:
                visit(part)

    if (pair := read(gold, "0")) is not None:
        visit(pair[0])
    return 1.0


def _decimal(text: str) -> str:
    """Real value of a constant in 30 digits; "" for anything else."""
    import sympy

    value = _value(_expression(normalise(text), Unparsed), Unparsed)
    if not isinstance(value, sympy.Expr) or value.free_symbols:
        return ""
    number = sympy.N(value, 30)
    return str(number) if number.is_real and number.is_finite else ""


def _same_when_printed(expression: Any) -> None:
    """Raises BadGold where the expression, printed as LaTeX and read again, is another one: it was misread."""
    import sympy

    if not isinstance(expression, sympy.Expr):
        return
    printed = sympy.latex(expression.doit(), ln_notation=True)
    again = _parse(normalise(printed))
    if not isinstance(again, sympy.Expr):
        return  # a printer's form that the parser does not know says nothing about the gold
    if expression.free_symbols or again.free_symbols:
        same = _agree_at_samples(expression, again)
    else:
        same = _same_number(_value(expression, BadGold), _value(again, BadGold))
    if same is False:
        raise BadGold(f"read as {printed[:200]}, which reads as something else")


def _gym(name: str, entry: dict[str, Any], answer: str) -> float:
    return float(_gym_dataset(name).score_answer(answer, entry))


@functools.lru_cache(maxsize=64)
def _gym_dataset(name: str) -> Any:
    return importlib.import_module("reasoning_gym").create_dataset(name, size=1, seed=0)


def _user(reward: str, completion: str, problem: dict[str, Any]) -> float:
    name, _, attribute = reward.partition(":")
    module = importlib.import_module(name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise Refused(f"reward.reward: got {reward!r}, expected the name of a function after the colon; module "
                      f"{name!r} ({getattr(module, '__file__', '')}) has no function {attribute!r}")  # fmt: skip
    value = function(completion, problem)
    if not isinstance(value, int | float) or not 0 <= value <= 1:  # NaN fails too
        raise Refused(f"reward.reward={reward!r}: got {value!r} for problem {problem['id']!r}, expected a float from "
                      "0 to 1. Clip or rescale what the function returns")  # fmt: skip
    return float(value)


_TASKS: dict[str, Callable[..., Any]] = {"math": _math, "gold": _gold, "decimal": _decimal, "gym": _gym, "user": _user}


def serve(file: int, parent: int, directory: str, modules: list[str]) -> None:
    """A worker's life: say when it is ready, then answer one task after the other, until the pipe or `parent` ends."""
    connection = Connection(file)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    start(directory, modules)
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(None)
        while True:
            connection.send(work(*connection.recv()))


def _end_with(parent: int) -> None:
    """End this process and all that it started once its parent has ended, were it in the middle of a task."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def start(directory: str, modules: list[str]) -> None:
    """Memory limit, no core dumps, importable working directory, Math-Verify loaded before the clock."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if directory not in sys.path:
        sys.path.insert(0, directory)
    sys.set_int_max_str_digits(100_000)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    importlib.import_module("math_verify")
    for module in modules:
        with contextlib.suppress(Exception):  # the user's code; the first task imports it again and reports the error
            importlib.import_module(module)


def work(kind: str, arguments: tuple[Any, ...]) -> Outcome:
    """One task: `math` (gold, answer), `gold` (gold), `decimal` (text), `gym` (name, entry, answer), `user` (reward,
    text, problem)."""
    try:
        return ("score", _TASKS[kind](*arguments))
    except Unparsed as error:
        return ("unverifiable", error.reason)
    except Refused as error:
        return ("refused", str(error))
    except MemoryError:
        return ("unverifiable", "memory")
    except (Exception, SystemExit) as error:  # untrusted text met a parser, SymPy, a scorer or the user's function
        message = " ".join(f"crash: {type(error).__name__}: {error}".split())
        return ("unverifiable", message[:REASON_LENGTH])

"""65 responses that hang, flood or break a careless verifier, and the contexts it is called from.

As a script, `python verifier_bombs.py CONTEXT NAME...`: judges the named bombs there (all without a name) and prints
what came of them as JSON, so that a test sees the process live or die.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def box(answer: str) -> str:
    return rf"The answer is \boxed{{{answer}}}."


def nested(opening: str, times: int, closing: str, inner: str = "6") -> str:
    return opening * times + inner + closing * times


def matrix(kind: str, size: int, cell: str) -> str:
    rows = r" \\ ".join(" & ".join(cell.format(i=i, j=j) for j in range(size)) for i in range(size))
    return rf"\begin{{{kind}}}{rows}\end{{{kind}}}"


BOXED = {
    "tower of nines": "9^9^9^9^9", "tower of tens": "10^{10^{10}}", "tower of twos": "2^{2^{2^{2^{2^{2}}}}}",
    "tower in brackets": "((((9^{99})^{99})^{99})^{99})^{99}", "tower of decimals": "1.5^{10^{12}}",
    "tower of letters": "x^{x^{x^{x^{x}}}}", "tower of e": "e^{e^{e^{e^{e^{e}}}}}",
    "tower in a sine": r"\sin(10^{10^{8}})", "large negative power": "2^{-10^{9}}",
    "power to seven digits": "7^{9999999}", "power to six digits": "7^{999999}-1",
    "factorial": "99999!", "factorial of a power": "(10^{10})!", "factorial of factorials": "((9!)!)!",
    "many factorials": "9!!!!!!!!", "quotient of factorials": r"\frac{9999!}{9998!+1}",
    "binomial": r"\binom{1000000}{500000}", "binomial of powers": r"\binom{10^{9}}{5\cdot10^{8}}",
    "gamma": r"\Gamma(10^{9})", "product": r"\prod_{k=1}^{10^{7}} k", "product of sines": r"\prod_{n=1}^{9999}\sin n",
    "sum": r"\sum_{k=1}^{10^{9}}\frac{1}{k}", "sum of sines": r"\sum_{k=1}^{9999}\sin(k^2)",
    "sum of sums": r"\sum_{i=1}^{999}\sum_{j=1}^{999}\sum_{k=1}^{999}\frac{1}{i+j+k^2}",
    "series": r"\sum_{n=1}^{\infty}\frac{\sin(n^2)}{n!+n}", "integral of a tower": r"\int_0^1 x^{x^{x^{x}}}\,dx",
    "improper integral": r"\int_0^\infty\frac{\sin(x^2)\ln x}{1+x^7+e^x}\,dx",
    "integral of integrals": r"\int_0^1\int_0^x\int_0^y\int_0^z\sin(xyzt)e^{xt}\,dt\,dz\,dy\,dx",
    "antiderivative": r"\int\frac{dx}{x^{97}+x+1}", "limit": r"\lim_{x\to0}\frac{\sin\sin\sin\sin x-\tan\tan x}{x^{9}}",
    "limit of powers": r"\lim_{n\to\infty}\frac{n!\,e^{n^n}}{n^{n^n}}", "derivative": r"\frac{d^{50}}{dx^{50}}\tan(x)",
    "expansion": "(x+y+z+w+1)^{300}", "expansion of roots": r"(\sqrt2+\sqrt3+\sqrt5+\sqrt7+\sqrt{11})^{99}",
    "continued fraction": nested(r"\frac{1}{x+\sqrt{", 9, "}}"), "root of roots": nested(r"\sqrt{2+", 18, "}"),
    "logarithms": r"\log_{2^5}(\log_{2^4}(\log_{2^3}(\log_{2^2}(\log_{2^1}x))))",
    "determinant of letters": matrix("vmatrix", 9, "a_{{{i}{j}}}"), "matrix": matrix("pmatrix", 40, r"\sqrt{{{i}}}"),
    "900 digits": "9" * 900, "100,000 digits": "9" * 100_000, "root of 900 digits": rf"\sqrt{{{'9' * 900}}}",
    "900 decimals": "0." + "7" * 900 + r"\overline{3}", "exponent of nine digits": "1e999999999",
    "50 braces": nested("{", 50, "}"), "10,000 braces": nested("{", 10_000, "}"),
    "10,000 brackets": nested("[", 10_000, "]"),
    "tuples in tuples": nested("(", 9000, ",1)"), "sets in sets": nested(r"\{", 30, r",1\}"),
    "100 fractions": nested(r"\frac{", 100, "}{2}"), "200 roots": nested(r"\sqrt{", 200, "}"),
    "3,000 left": r"\left(" * 3000, "5,000 boxes": nested(r"\boxed{", 5000, "}"),
    "set of 5,000": rf"\{{{','.join(map(str, range(5000)))}\}}",
    "union of 300": r"\cup".join(f"({i},{i + 1})" for i in range(300)), "unfinished list": r"1,2,\ldots,999999999999",
    "60 roots": ",".join(rf"\sqrt{{{i}+\pi}}" for i in range(60)),
}  # fmt: skip
"""Name -> answer in a box; the gold answer is 5, and none of them is."""
TEXTS = {
    "box of blanks": r"\boxed" + " " * 100_000 + "{6", "stars": "**Answer:** " + "*" * 100_000,
    "answer is": "the answer is " * 8000, "open thoughts": "<think " * 20_000,
    "control characters": "".join(map(chr, range(32))) * 2000 + box("\x00\x07\x1b[2J6"),
    "combining marks": box("6" + "\u0327\u0301" * 50_000), "ligatures": box("\ufdfa" * 50_000),
    "half characters": box("\ud800\udfff" * 500),
}  # fmt: skip
"""Name -> whole response."""
BOMBS = {name: box(answer) for name, answer in BOXED.items()} | TEXTS
LONGEST_S = 3.0
"""Of one judgement, a worker's start aside."""
GROWTH_MB = 50
"""Of the process that judges."""
SPREAD = 5
"""Every fifth bomb is judged where not all are."""


def peak(restart: bool = False) -> float:
    """Largest resident memory of this process so far, or since the last restart, in MB."""
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def judge(names: list[str]) -> dict[str, Any]:
    """Judge bombs one by one, each with a right answer behind it: the verifier has to be there again."""
    from sgpo_lib.config import RewardConfig
    from sgpo_lib.records import Problem
    from sgpo_lib.rewards import Verifier

    rows = []
    with Verifier(RewardConfig()) as verifier:
        def ask(gold: str, text: str) -> Any:
            return verifier.judge([(Problem("p", "", gold), text)])[0]

        ask("x+1", box("1+x"))  # the worker is there, modules are loaded
        before = peak(restart=True)
        for number, name in enumerate(names):
            start = time.perf_counter()
            verdict = ask("5", BOMBS[name])
            seconds = time.perf_counter() - start
            after = ask(rf"{number}+\sqrt{{2}}", box(rf"\sqrt{{2}}+{number}"))
            rows.append({"bomb": name, "status": verdict.status, "reason": verdict.reason, "seconds": seconds,
                         "next": after.status})
        return {"rows": rows, "grown_mb": peak() - before}


def in_main(names: list[str]) -> dict[str, Any]:
    return judge(names)


def in_thread(names: list[str]) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(judge(names)))
    thread.start()
    thread.join()
    return found[0]


def in_asyncio(names: list[str]) -> dict[str, Any]:
    async def awaitable() -> dict[str, Any]:
        return judge(names)

    return asyncio.run(awaitable())


def in_notebook(names: list[str]) -> dict[str, Any]:
    """In a cell of a notebook, by a kernel of its own."""
    import nbformat
    import papermill

    cell = f"""import json, sys
sys.path.insert(0, {str(FOLDER)!r})
from verifier_bombs import judge
print(json.dumps(judge({names!r})))"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bombs.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), path)
        done = papermill.execute_notebook(path, path, kernel_name="python3", progress_bar=False)
    return json.loads("".join(o["text"] for o in done.cells[-1]["outputs"] if o.get("name") == "stdout"))


def in_ray(names: list[str]) -> dict[str, Any]:
    """In a worker of Ray, on a cluster of its own."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    path = os.pathsep.join([str(FOLDER), *sys.path])
    for patience in (2, 1, 0):
        try:
            ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False,
                     runtime_env={"env_vars": {"PYTHONPATH": path}})  # fmt: skip
            break
        except Exception:  # Ray gives a node 30 s to start, which a busy machine may not manage
            ray.shutdown()
            if not patience:
                raise
    try:
        return ray.get(ray.remote(judge).remote(names))
    finally:
        ray.shutdown()


def judged_in(context: str, names: list[str]) -> dict[str, Any]:
    """What `judge` finds in a process of its own, after it was seen that all went well."""
    done = subprocess.run([sys.executable, __file__, context, *names], capture_output=True, text=True,
                          timeout=150 + 10 * len(names))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    rows = found["rows"]
    assert [r["bomb"] for r in rows] == names
    assert {r["next"] for r in rows} == {"correct"}, "the verifier judges on"
    assert not [r for r in rows if r["status"] == "correct"]
    found["slowest"] = max(rows, key=lambda r: r["seconds"])
    assert found["slowest"]["seconds"] <= LONGEST_S, found["slowest"]
    assert found["grown_mb"] <= GROWTH_MB
    return found


CONTEXTS = {f.__name__.removeprefix("in_"): f for f in (in_main, in_thread, in_asyncio, in_notebook, in_ray)}

if __name__ == "__main__":
    chosen = sys.argv[2:] or list(BOMBS)
    print(json.dumps(CONTEXTS[sys.argv[1]](chosen)))

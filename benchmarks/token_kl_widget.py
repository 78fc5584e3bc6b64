"""How fast the KL microscope is in a browser, and how large its data: a response of 16,384 tokens, top 5 of both sides.

    python benchmarks/token_kl_widget.py [--tokens 16384] [--repeats 9] [--out benchmarks/results/token_kl_widget.json]

Readings come from random logits over a small vocabulary with words as long as a language model's, the unguided side
being the guided one with noise. The exported page is opened in headless Chromium (playwright; CHROMIUM names another
binary). Times in milliseconds, each until the frame after the change has been painted; medians over the repeats.
The JSON has all of them, the Markdown file beside it the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from playwright.sync_api import sync_playwright

from sgpo_lib.readings import TokenReadings
from sgpo_lib.widgets.token_kl import Pane, TokenKL

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
GOALS = {"first_paint": 500, "delta_step": 100, "delta_sweep": 100, "metric_change": 100, "hover": 2 * 1000 / 60}
"""Milliseconds that a median must stay below."""
ROOTS = ("the", "a", "of", "and", "is", "number", "sum", "let", "then", "so", "prime", "divide", "both", "sides", "we",
         "triangle", "angle", "factor", "equation", "root", "modulo", "step", "answer", "value", "square", "case")
SCRIPT = """
async () => {
  const q = (s) => document.querySelector(s), model = window.sgpoModel;
  const painted = () => new Promise((done) => requestAnimationFrame(() => {
    const channel = new MessageChannel();  // its message comes after the frame's style, layout and paint
    channel.port1.onmessage = () => done(performance.now());
    channel.port2.postMessage(0);
  }));
  const timed = async (act) => {
    await painted();
    await painted();
    const begin = performance.now();
    act();
    return await painted() - begin;
  };
  const fire = (node, value, kind) => { node.value = value; node.dispatchEvent(new Event(kind, {bubbles: true})); };
  const slider = q('[data-control=delta]'), menu = q('[data-control=metric]');
  const at = (name) => performance.getEntriesByName(name)[0].startTime;
  const result = {first_paint: at("sgpo-kl painted") - at("sgpo-kl begin"),
    delta_step: [], delta_sweep: [], metric_change: [], hover: []};
  for (const s of [300, 305, 310, 320, 315]) result.delta_step.push(await timed(() => fire(slider, s, "input")));
  for (const s of [0, 1000, 0]) result.delta_sweep.push(await timed(() => fire(slider, s, "input")));
  for (const m of ["reverse_kl", "log_ratio", "sft_loss", "top1_agree", "forward_kl"])
    result.metric_change.push(await timed(() => fire(menu, m, "change")));
  const tokens = [...document.querySelectorAll(".t")].slice(40, 200);
  const over = (node) => node.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
  for (let k = 0; k < 8; k++) result.hover.push(await timed(() => over(tokens[17 * k % tokens.length])));
  return result;
}
"""


def words_of(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct texts, most with a space in front, some of two lines' ends and marks."""
    marks = [".", ",", ".\n", "\n\n", "?", ";", " =", " +", "(", ")", "\\", "$", "1", "2", "3"]
    found = dict.fromkeys(marks)
    while len(found) < count:
        root = ROOTS[int(rng.integers(len(ROOTS)))]
        end = "".join(rng.choice(list("aeioustnrl"), rng.integers(0, 4)))
        found[f"{' ' if rng.random() < 0.7 else ''}{root}{end}"] = None
    return list(found)


def random_readings(tokens: int, vocabulary: int = 8000, top: int = 5, noise: float = 0.6, seed: int = 0,
                    chunk: int = 256) -> TokenReadings:  # fmt: skip
    """Readings from random logits (float64), exact over the vocabulary. Marks end a sentence about every 15 tokens."""
    rng = np.random.default_rng(seed)
    words = words_of(vocabulary, rng)
    columns: dict[str, list[Any]] = {}
    offsets, ids, sides = [0], [], ([], [])
    for start in range(0, tokens, chunk):
        n = min(chunk, tokens - start)
        guided = rng.normal(0, 2.2, (n, vocabulary))
        guided[np.arange(n), rng.integers(0, vocabulary, n)] += rng.exponential(9, n)
        guided[:, :4] += np.where(rng.random((n, 1)) < 0.07, 14, 0)
        spread = noise * rng.exponential(0.6, (n, 1)) * (1 + 3 * (rng.random((n, 1)) < 0.05))
        unguided = guided + spread * rng.normal(0, 1, (n, vocabulary))
        g, u = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (guided, unguided))
        p, q, row = np.exp(g), np.exp(u), np.arange(n)
        sampled = (g + rng.gumbel(size=g.shape)).argmax(1)
        told = {"token_id": sampled, "forward_kl": (p * (g - u)).sum(1), "reverse_kl": (q * (u - g)).sum(1),
                "guided_logp": g[row, sampled], "unguided_logp": u[row, sampled], "guided_entropy": -(p * g).sum(1),
                "unguided_entropy": -(q * u).sum(1), "guided_rank": 1 + (g > g[row, sampled][:, None]).sum(1),
                "unguided_rank": 1 + (u > u[row, sampled][:, None]).sum(1), "top1_agree": g.argmax(1) == u.argmax(1)}
        for name, values in told.items():
            columns.setdefault(name, []).extend(values.tolist())
        best = [np.argpartition(-x, top, axis=1)[:, :top] for x in (g, u)]
        for i in range(n):
            union = np.unique(np.concatenate([best[0][i], best[1][i], sampled[i : i + 1]]))
            union = union[np.argsort(-g[i, union])]
            ids.append(union)
            sides[0].append(g[i, union])
            sides[1].append(u[i, union])
            offsets.append(offsets[-1] + len(union))
    table = pd.DataFrame(columns)
    texts = [words[i] for i in columns["token_id"]]
    table.insert(0, "token", texts)
    table["piece"], table["sft_loss"] = texts, -table["unguided_logp"]
    table["log_ratio"] = table["guided_logp"] - table["unguided_logp"]
    table["guided_missing"] = table["unguided_missing"] = 0.0
    return TokenReadings(table, np.array(offsets), np.concatenate(ids), np.concatenate(sides[0]).astype("f4"),
                         np.concatenate(sides[1]).astype("f4"), dict(enumerate(words)), True, "guided 1")


def measure(page: Path, repeats: int) -> tuple[dict[str, list[float]], str]:
    """Times by name over `repeats` fresh pages, and the browser's version."""
    found: dict[str, list[float]] = {}
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        for _ in range(repeats):
            tab = browser.new_page(viewport={"width": 1400, "height": 1000})
            tab.goto(page.as_uri())
            while not tab.evaluate("performance.getEntriesByName('sgpo-kl painted').length"):
                tab.wait_for_timeout(50)
            tab.wait_for_timeout(400)
            for name, value in tab.evaluate(SCRIPT).items():
                found.setdefault(name, []).extend(value if isinstance(value, list) else [value])
            tab.close()
        version = browser.version
        browser.close()
    return found, version


def cpu() -> str:
    """Name of the processor where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/token_kl_widget.json"))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    readings = random_readings(options.tokens)
    widget = TokenKL([Pane("guided 1", [readings], group="guided", correct=True)])
    size = sum(map(len, widget.blobs)) + len(json.dumps(widget.header))
    with tempfile.TemporaryDirectory() as folder:
        page = widget.to_html(Path(folder) / "page.html")
        page_size = page.stat().st_size
        times, version = measure(page, options.repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    alternatives = len(readings.alternative_M) / options.tokens
    cut = widget.header["panes"][0]["frames"][0]["cut"]
    result = {"tokens": options.tokens, "alternatives_per_token": round(alternatives, 2), "payload_bytes": size,
              "alternatives_cut_to": cut,
              "page_bytes": page_size, "repeats": options.repeats, "medians_ms": medians, "all_ms": times,
              "goals_ms": GOALS, "machine": {"cpu": cpu(), "cores": os.cpu_count(), "system": platform.system(),
                          "load_before": round(load, 1)},
              "versions": {"chromium": version, "python": platform.python_version()},
              "command": f"python benchmarks/token_kl_widget.py --tokens {options.tokens} "
                         f"--repeats {options.repeats}"}  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    rows = "\n".join(f"| {name.replace('_', ' ')} | {medians[name]:.1f} | {min(times[name]):.1f} to "
                     f"{max(times[name]):.1f} | {goal:.0f} |" for name, goal in GOALS.items())  # fmt: skip
    text = (f"# The KL microscope in a browser\n\n{options.tokens:,} tokens, {alternatives:.1f} alternatives per "
            f"token{f' (cut to {cut})' if cut else ''}; payload {size:,} bytes, exported page {page_size:,} bytes.\n"
            f"{result['machine']['cpu']}, {os.cpu_count()} cores (load before the start {load:.1f}); "
            f"headless Chromium {version} without a GPU; "
            f"{options.repeats} fresh pages.\n\n| milliseconds to the painted frame | median | range | goal |\n"
            f"| --- | --- | --- | --- |\n{rows}\n\n`{result['command']}`\n")
    options.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

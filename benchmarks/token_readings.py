"""Memory and time of exact token readings of a long response with a large vocabulary, on the CPU.

    python benchmarks/token_readings.py [--tokens 16384] [--vocabulary 151936] [--hidden 896] [--chunk 256]

Hidden states and the output matrix are random, with the shapes of a model (the backbone's own pass is left out): what
is measured is what `analysis.token_readings` does with them for both sides. Peak memory is the process's highest
resident size above what it held with the inputs in memory; beside it stands the size of one side's logits in float32,
which never exist. The floor is the time of the two products of hidden states and output matrix alone, in the same
chunks and the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import torch

from sgpo_lib.analysis import _chunk
from sgpo_lib.losses.head import Head
from sgpo_lib.peak_memory import resident, restart_resident_peak

OUT = Path(__file__).parent / "results" / "token_readings.json"


def main() -> None:
    """Measure once and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 16_384), ("vocabulary", 151_936), ("hidden", 896), ("chunk", 256), ("top", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    torch.manual_seed(0)
    matrix_VH = torch.randn(asked.vocabulary, asked.hidden) / asked.hidden**0.5
    guided_NH = torch.randn(asked.tokens, asked.hidden)
    unguided_NH = guided_NH + 0.2 * torch.randn_like(guided_NH)
    target_N = torch.randint(asked.vocabulary, (asked.tokens,))
    parts = [slice(i, i + asked.chunk) for i in range(0, asked.tokens, asked.chunk)]
    with torch.no_grad():
        began = time.perf_counter()
        for part in parts:
            torch.nn.functional.linear(guided_NH[part], matrix_VH)
            torch.nn.functional.linear(unguided_NH[part], matrix_VH)
        floor = time.perf_counter() - began
        before = resident("VmRSS")
        restart_resident_peak()
        began = time.perf_counter()
        total = 0.0
        for part in parts:
            numbers, _ = _chunk(guided_NH[part], unguided_NH[part], target_N[part], Head(matrix_VH), asked.top)
            total += float(numbers["forward_kl"].sum())
        seconds = time.perf_counter() - began
    told = [f"--{name} {value}" for name, value in vars(asked).items()]
    found = {"command": " ".join(["python benchmarks/token_readings.py", *told]), **vars(asked),
             "threads": torch.get_num_threads(), "seconds": round(seconds, 1),
             "floor_seconds": round(floor, 1), "ratio_to_floor": round(seconds / floor, 2),
             "peak_extra_MB": round((resident("VmHWM") - before) / 1e6),
             "one_sides_logits_MB": round(asked.tokens * asked.vocabulary * 4 / 1e6),
             "largest_resident_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
             "mean_forward_kl": round(total / asked.tokens, 4), "machine": platform.processor() or platform.machine(),
             "torch": torch.__version__}  # fmt: skip
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""The highest memory inside a stretch of a program: torch's on a GPU, the resident size of this process on Linux."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def restart_peak(device: torch.device) -> bool:
    """Count the peak from now on. Returns whether this machine tells it."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    try:
        restart_resident_peak()
    except OSError:  # a container may hide it
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Bytes: the peak since `restart_peak`. CUDA: of torch's tensors; a CPU: of the whole process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


def restart_resident_peak() -> None:
    """Let VmHWM start anew (proc(5)). Linux only; raises OSError where it cannot."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(field: str) -> int:
    """Bytes: the resident size of this process, now (VmRSS) or at its highest (VmHWM). Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

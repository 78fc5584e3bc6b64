"""What a job asks of a machine or a cluster: `resources:` of a batch file, checked field by field.

    resources:
      nodes: 1             machines
      gpus: 8              a node; 0 hides those there are
      cpus: 32             a node
      memory: 256G         a node; M, G or T (powers of 1024)
      time: 12:00:00       [days-]hours:minutes:seconds, minutes:seconds, or minutes. Slurm: of one allocation, after
                           which the job is queued again; elsewhere: after which it has failed
      partition: gpu       Slurm alone: partition, account, qos, and `extra`, further options of sbatch
      extra: {constraint: h100, exclusive: true}
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from sgpo_lib.config import unknown

_UNITS = {"M": 1, "G": 1024, "T": 1024 * 1024}


@dataclass(frozen=True)
class Resources:
    """What one job asks for. None: not asked for."""

    nodes: int = 1
    """Machines."""
    gpus: int | None = None
    """GPUs a node. None: those that are visible on this machine, none on a cluster."""
    cpus: int | None = None
    """CPUs a node."""
    memory: int | None = None
    """Memory a node in MiB."""
    time: int | None = None
    """Time limit in seconds."""
    partition: str = ""
    """Slurm partition; empty: the cluster's default."""
    account: str = ""
    """Slurm account; empty: the user's default."""
    qos: str = ""
    """Slurm quality of service; empty: the default."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further long options of sbatch, without the dashes; `true` for one without a value."""

    def __str__(self) -> str:
        told = [(self.nodes if self.nodes > 1 else None, "nodes"), (self.gpus, "GPUs"), (self.cpus, "CPUs"),
                (self.memory, "MiB"), (self.time, "s"), (self.partition, "partition"), (self.account, "account"),
                (self.qos, "qos")]
        parts = [f"{name} {value}" if isinstance(value, str) else f"{value} {name}"
                 for value, name in told if value not in (None, "")]
        return ", ".join(parts + [f"{name} {value}" for name, value in self.extra.items()])


def read_resources(raw: Any) -> tuple[Resources, list[str]]:
    """(resources, faults) from a mapping of a batch file. Each fault tells field, got, expected."""
    if not isinstance(raw, dict):
        return Resources(), [f"resources: got {raw!r}, expected a mapping such as {{gpus: 1, time: 12:00:00}}"]
    faults: list[str] = []
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in Resources.__dataclass_fields__:
            faults.append(f"resources: {unknown('field', str(name), Resources.__dataclass_fields__)}")
            continue
        try:
            values[name] = _READ[name](value)
        except ValueError as error:
            faults.append(f"resources.{name}: got {value!r}, expected {error}")
    return Resources(**values), faults


def _count(least: int) -> Any:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"a whole number, {least} or more")
        return value
    return read


def _memory(value: Any) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])i?B?", str(value), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError("a number with M, G or T, such as 64G")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _time(value: Any) -> int:
    """Seconds from minutes or from [days-]hours:minutes:seconds, as Slurm reads them."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d\d)", str(value))
    if found and (found[2] is not None or found[1] is None):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    else:
        total = 60 * int(value) if not isinstance(value, bool) and re.fullmatch(r"\d+", str(value)) else 0
    if not total:
        raise ValueError("[days-]hours:minutes:seconds such as 12:00:00, or minutes")
    return total


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a name")
    return value


def _extra(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(
            re.fullmatch(r"[a-z][a-z-]*", str(n)) and isinstance(v, str | int | float) for n, v in value.items()):
        raise ValueError("long options of sbatch without the dashes, such as {constraint: h100, exclusive: true}")
    taken = {"job-name", "output", "error", "open-mode", "signal", "requeue", "no-requeue", "array", "nodes",
             "gpus-per-node", "cpus-per-task", "mem", "time", "partition", "account", "qos", "wrap", "ntasks-per-node"}
    if bad := sorted(taken & set(value)):
        raise ValueError(f"none of {', '.join(bad)}: the other fields set these")
    return dict(value)


_READ = {"nodes": _count(1), "gpus": _count(0), "cpus": _count(1), "memory": _memory, "time": _time,
         "partition": _text, "account": _text, "qos": _text, "extra": _extra}

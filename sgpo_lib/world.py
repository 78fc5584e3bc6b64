"""The workers that train one run together, and how they share work and numbers.

Every worker runs the same loop on its share of the problems: worker r of n takes items r, r + n, r + 2n, ... Sampling
seeds belong to problems and not to workers, so that the samples do not depend on n. Each method below but `share` is a
collective: all workers must call it, in the same order. In a world of one it costs nothing.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """This worker's number and how many there are. The default is a process alone."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this worker writes the run folder."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This worker's part of what every worker holds."""
        return list(items[self.rank :: self.size])

    def woven(self, mine: Sequence[Item]) -> list[Item]:
        """The parts of all workers, in the order from which `share` took them."""
        parts = self._gathered(list(mine))
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def added(self, sums: collections.Counter) -> collections.Counter:
        """Sums over all workers, by name, added in the order of the workers."""
        total: collections.Counter = collections.Counter()
        for part in self._gathered(dict(sums)):
            total.update(part)
        return total

    def most(self, number: int) -> int:
        """The largest of the workers' numbers."""
        return max(self._gathered(number))

    def from_first(self, value: Item) -> Item:
        """The first worker's value, on all of them."""
        if self.size == 1:
            return value
        import torch.distributed

        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    def by_first(self, find: Callable[[], Item]) -> Item:
        """What `find` gives on the first worker, the only one to call it, on all of them. What it raises, all raise."""
        found: Any = None
        if self.first:
            try:
                found = find()
            except Exception as error:  # the others wait for word
                found = error
        found = self.from_first(found)
        if isinstance(found, Exception):
            raise found
        return found

    def wait(self) -> None:
        """Until all workers are here."""
        self.most(0)

    def _gathered(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        import torch.distributed

        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, value)
        return parts

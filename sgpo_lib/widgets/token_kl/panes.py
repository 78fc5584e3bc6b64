"""A pane: one response that the microscope can show, at one or at several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgpo_lib.readings import TokenReadings


@dataclass(frozen=True)
class Pane:
    """One response. Raises ValueError where it has no tokens, or where the frames are not of the same tokens."""

    label: str
    """"guided 1", "autonomous 0"."""
    frames: list[TokenReadings]
    """One, or one per checkpoint of the same response, labelled "step 0", "step 10", ..."""
    group: str = ""
    """guided, autonomous, or nothing; shown as a tag."""
    correct: bool | None = None
    """The verdict, where there is one."""
    target: bool = False
    """The reachable target o+ (Eq. 4): shown with its summed unguided log-probability."""

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError(f"pane {self.label!r}: got no frames, expected the readings of at least one checkpoint")
        first = self.frames[0].table
        if not len(first):
            raise ValueError(f"pane {self.label!r}: got a response without tokens; leave it out")
        for number, frame in enumerate(self.frames[1:], start=1):
            if list(frame.table["token_id"]) != list(first["token_id"]):
                raise ValueError(f"pane {self.label!r}, frame {number} ({frame.label!r}): got other tokens than in "
                                 "frame 0, expected the same response at every checkpoint; make another pane of it")

    @property
    def tokens(self) -> int:
        """Number of tokens of the response."""
        return len(self.frames[0].table)


def as_panes(panes: Sequence[Pane] | TokenReadings) -> list[Pane]:
    """Panes as given; of one response alone, one pane. Raises ValueError for none, and for what is no pane."""
    if isinstance(panes, TokenReadings):
        return [Pane(panes.label or "response", [panes])]
    several = isinstance(panes, Sequence) and not isinstance(panes, str)
    wrong = [p for p in panes if not isinstance(p, Pane)] if several else [panes]
    if wrong:
        raise ValueError(f"panes: got {type(wrong[0]).__name__}, expected the readings of one response, or a list of "
                         "panes; Pane(label, [readings]) makes one")
    if not panes:
        raise ValueError("got no panes, expected at least one response to show")
    return list(panes)

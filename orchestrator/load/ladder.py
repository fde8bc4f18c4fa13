"""The levels as listed, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.load.base import LevelRule, Measured
from orchestrator.load.level import Level


@dataclass
class Ladder(LevelRule):
    """Each listed level once, whatever is measured."""

    def next(self, listed: Sequence[Level], done: Sequence[Measured]) -> Level | None:
        """The first that was not measured yet."""
        levels = {measured.level for measured in done}
        return next((level for level in listed if level not in levels), None)

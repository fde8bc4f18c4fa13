"""Which level is an arm measured at next? A rule answers from what this arm has measured in this block.

The answer is a function of nothing else, so a run that was cut off needs no stored state: asked again with what is on
record, the rule gives the same levels again.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.load.level import Level
from orchestrator.results.records import SummaryRow


@dataclass(frozen=True)
class Measured:
    """What one arm did at one level of the block under way.

    `row`: the trial's row of the summary; its figures are null where the measurement failed (`state`).
    """

    level: Level
    row: SummaryRow


@dataclass
class LevelRule(ABC):
    """A `sweep.load`. Derive a dataclass from it whose fields are the keys of its YAML."""

    @abstractmethod
    def next(self, listed: Sequence[Level], done: Sequence[Measured]) -> Level | None:
        """The level to measure now; None: this arm is done in this block.

        `listed`: those of `sweep.concurrency` or `sweep.offered_rps`, in their order. `done`: in the order of
        measurement. A level that was measured already must not be asked for again.
        """

    def most(self, listed: Sequence[Level]) -> int:
        """The largest number of levels that `next` can ask for, for estimates of duration and cost."""
        return len(listed)

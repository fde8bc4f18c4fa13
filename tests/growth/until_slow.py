"""A rule that goes up the listed levels until the tail of the latency is above a limit."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.kinds import Positive
from orchestrator.load.base import LevelRule, Measured
from orchestrator.load.level import Level


@dataclass
class UntilSlow(LevelRule):
    """The level that is too slow is the last."""

    max_p99_ms: Positive

    def next(self, listed: Sequence[Level], done: Sequence[Measured]) -> Level | None:
        if done and (done[-1].row.latency_p99_ms or float("inf")) > self.max_p99_ms:
            return None
        return listed[len(done)] if len(done) < len(listed) else None

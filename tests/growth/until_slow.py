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
        if done:
            row = done[-1].row
            known = [each for each in (row.latency_p99_ms, row.latency_p90_ms, row.latency_p50_ms) if each is not None]
            if not known or known[0] > self.max_p99_ms:  # of few requests a lower percentile is the highest known
                return None
        return listed[len(done)] if len(done) < len(listed) else None

"""What can be compared? Every figure of a trial: its name, its unit, and whether more of it is better.

A figure is one value a trial, a column of the summary. What compares, draws and writes asks the table here, so that a
further figure is one line. The one that a run is judged by stands in its run.json (`primary_cells`).
"""

from dataclasses import dataclass

import pandas as pd

from orchestrator.load.level import Level, Unit


@dataclass(frozen=True)
class Figure:
    """`name`: the column, with its unit. `text`: as in a sentence. `more_is_better`: else less is, as of a time.

    `set_by_rate`: at a level that is a request rate it says what was sent, not what the service can do.
    """

    name: str
    text: str
    unit: str
    more_is_better: bool
    set_by_rate: bool = False

    @property
    def heading(self) -> str:
        """Of a column or an axis: "latency p99 (ms)"."""
        return f"{self.text} ({self.unit})"

    def judged_at(self, level: Level) -> bool:
        """Whether it can tell a better service from a worse one at this level."""
        return not (self.set_by_rate and level.unit is Unit.requests_per_s)


def _times(name: str, text: str, *statistics: str) -> list[Figure]:
    return [
        Figure(f"{name}_{statistic}_ms", f"{text} {statistic.replace('p999', 'p99.9')}", "ms", more_is_better=False)
        for statistic in statistics
    ]


THROUGHPUT = Figure("throughput_rps", "throughput", "req/s", more_is_better=True, set_by_rate=True)
# By name, in the order of the tables.
FIGURES = {
    figure.name: figure
    for figure in (
        THROUGHPUT,
        Figure("goodput_rps", "goodput", "req/s", more_is_better=True),
        Figure("input_throughput_tok_per_s", "input throughput", "tok/s", more_is_better=True, set_by_rate=True),
        Figure("output_throughput_tok_per_s", "output throughput", "tok/s", more_is_better=True, set_by_rate=True),
        *_times("latency", "latency", "mean", "p50", "p90", "p95", "p99", "p999"),
        *_times("ttft", "TTFT", "mean", "p50", "p99"),
        *_times("tpot", "TPOT", "mean", "p50", "p99"),
    )
}
# Shown only where a run is judged by them, or where they are asked for: p50 and p99 say nearly the same.
_ON_REQUEST = frozenset({"latency_p90_ms", "latency_p95_ms", "latency_p999_ms"})


def shown(*asked: Figure) -> list[Figure]:
    """Those that tables show, and those asked for, in the order of the tables."""
    return [figure for figure in FIGURES.values() if figure.name not in _ON_REQUEST or figure in asked]


def heading(name: str) -> str:
    """Of the figure called so: "latency p99 (ms)"."""
    return FIGURES[name].heading


def by_block(points: pd.DataFrame, figure: Figure) -> pd.Series:
    """Its value in each complete and VALID point that has one. One row a block in, the same index out."""
    return points.loc[(points.state == "complete") & points.valid.eq(True), figure.name].dropna()

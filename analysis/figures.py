"""What can be compared? Every figure of a trial: its name, its unit, and whether more of it is better.

A figure is one value a trial, a column of the summary; `orchestrator.results.figures` says which columns. The one that
a run is judged by stands in its run.json (`primary_cells`).
"""

from dataclasses import dataclass

import pandas as pd

from orchestrator.load.level import Level, Unit
from orchestrator.results import figures as results


@dataclass(frozen=True)
class Figure:
    """`name`: the column, with its unit. `text`: as in a sentence. `more_is_better`: else less is, as of a time.

    `set_by_rate`: at a level that is a request rate it says what was sent, not what the service can do.
    """

    name: str
    text: str
    unit: str
    more_is_better: bool
    set_by_rate: bool

    @property
    def heading(self) -> str:
        """The heading of a column or an axis: "latency p99 (ms)"."""
        return f"{self.text} ({self.unit})"

    def judged_at(self, level: Level) -> bool:
        """Whether it can tell a better service from a worse one at this level."""
        return not (self.set_by_rate and level.unit is Unit.requests_per_s)


_UNITS = {"_tok_per_s": "tok/s", "_rps": "req/s", "_ms": "ms"}  # by the end of a column's name
_WORDS = {"ttft": "TTFT", "tpot": "TPOT", "p999": "p99.9"}


def _figure(name: str) -> Figure:
    ending = next(ending for ending in _UNITS if name.endswith(ending))
    words = name.removesuffix(ending).split("_")
    return Figure(
        name=name,
        text=" ".join(_WORDS.get(word, word) for word in words),
        unit=_UNITS[ending],
        more_is_better=ending != "_ms",
        set_by_rate=name in results.SET_BY_RATE,
    )


FIGURES = {name: _figure(name) for name in results.FIGURES}  # in the order of the tables
THROUGHPUT = FIGURES["throughput_rps"]
# Shown only where a run is judged by them, or where they are asked for: p50 and p99 say nearly the same.
_ON_REQUEST = frozenset({"latency_p90_ms", "latency_p95_ms", "latency_p999_ms"})


def shown(*asked: Figure) -> list[Figure]:
    """Those that tables show, and those asked for, in the order of the tables."""
    return [figure for figure in FIGURES.values() if figure.name not in _ON_REQUEST or figure in asked]


def heading(name: str) -> str:
    """The heading of the figure with this name."""
    return FIGURES[name].heading


def by_block(points: pd.DataFrame, figure: Figure) -> pd.Series:
    """Its value in each complete and VALID point that has one. One row a block in, the same index out."""
    return points.loc[(points.state == "complete") & points.valid.eq(True), figure.name].dropna()

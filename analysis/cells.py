"""What does a comparison say? One figure of two arms at one level is a cell; all cells of two arms are a comparison."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import pandas as pd

from analysis.differences import Difference
from orchestrator.results.records import ComparisonRow

# Fixed before the run; corrected for their number; no verdict. In the order of the tables.
FAMILIES = PRIMARY, SECONDARY, DESCRIPTIVE = "primary", "secondary", "descriptive"


@dataclass(frozen=True, kw_only=True)
class Cell(ComparisonRow):
    """A row of comparison.csv, which says what its fields are."""


@dataclass(frozen=True)
class Comparison:
    """Two arms compared. `primary` is the first of `cells`; `summary` the sentence to repeat."""

    baseline: str
    candidate: str
    baseline_run: str
    candidate_run: str
    axes: str
    treatment: str
    margin: float
    look: int  # which look at the run's data this was, from 1
    primary: Cell | None
    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    summary: str
    workload: str = ""  # of the candidate

    @property
    def verdict(self) -> str:
        return (self.primary.verdict if self.primary else None) or "NO VERDICT"

    @property
    def label(self) -> str:
        return f"{self.candidate} against {self.baseline}" + (f" ({self.axes})" if self.axes else "")

    def family(self, *names: str) -> list[Cell]:
        return [cell for name in names for cell in self.cells if cell.family == name]


def cells_frame(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """One row a cell."""
    cells = [asdict(cell) for comparison in comparisons for cell in comparison.cells]
    return pd.DataFrame(cells, columns=[field.name for field in fields(Cell)])

"""Numbers as text: one way to write a value, a ratio, an interval or a result, for every format.

A value that is not there is shown as "–", never as 0.
"""

import math
from typing import Any

import pandas as pd

from analysis.cells import Cell
from analysis.figures import FIGURES
from orchestrator.load.level import Level

MISSING = "–"


def is_missing(value: Any) -> bool:
    return value is None or value is pd.NaT or (isinstance(value, float) and not math.isfinite(value))


def number(value: Any, digits: int = 3) -> str:
    """Three significant digits, or all of a whole number: 3.94, 0.0121, 12,345."""
    if is_missing(value):
        return MISSING
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0:
        return "0"
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def ratio_texts(cell: Cell) -> tuple[str, str]:
    """("×3.94", "3.71 to 4.18"), of equally many decimals; the interval is "" where there is none.

    A bound never rounds to 1.00 when it is not 1: FASTER with "1.00 to 1.08" would look like a contradiction.
    """
    if is_missing(cell.ratio):
        return MISSING, ""
    low, high = cell.ci_low_ratio, cell.ci_high_ratio
    if cell.ratio is None or low is None or high is None or is_missing(low) or is_missing(high):
        return f"×{number(cell.ratio)}", ""
    if max(high, cell.ratio) >= 100 or min(low, cell.ratio) < 0.1:
        # Two blocks may span ten orders of magnitude: how many says nothing.
        wide = (low < cell.ratio / 100, high > cell.ratio * 100)
        low_text = f"<{number(cell.ratio / 100, 1)}" if wide[0] else number(low)
        high_text = f">{number(cell.ratio * 100, 1)}" if wide[1] else number(high)
        return f"×{number(cell.ratio)}", f"{low_text} to {high_text}"
    decimals = 1 if max(high, cell.ratio) >= 10 else 2
    while decimals < 4 and any(bound != 1 and round(bound, decimals) == 1 for bound in (low, high)):
        decimals += 1
    return f"×{cell.ratio:.{decimals}f}", f"{low:.{decimals}f} to {high:.{decimals}f}"


def confidence_text(confidence: float | None) -> str:
    """ "95 %"; never rounded up to 100 %."""
    if confidence is None or is_missing(confidence):
        return ""
    return f"{min(100 * confidence, 99.99):.4g} %"


def effect_text(cell: Cell) -> str:
    """×3.94 (95 % interval 3.71 to 4.18)"""
    ratio, interval = ratio_texts(cell)
    return f"{ratio} ({confidence_text(cell.confidence)} interval {interval})" if interval else ratio


def result_text(cell: Cell) -> str:
    """×3.94 (95 % interval 3.71 to 4.18) the throughput at 64 clients, 5 blocks

    Of a figure of which less is better, the ratio alone could be read the wrong way round: both values are there.
    """
    figure = FIGURES[cell.metric]
    what = f"the {figure.text}"
    if not figure.more_is_better:
        values = f"{number(cell.candidate_value)} against {number(cell.baseline_value)} {figure.unit}"
        what = f"in {figure.text} ({values})"
    of = f" of {cell.num_planned}" if cell.num_blocks < cell.num_planned else ""
    blocks = f"{cell.num_blocks}{of} block{'s' if (cell.num_planned if of else cell.num_blocks) != 1 else ''}"
    return f"{effect_text(cell)} {what} at {Level.parse(cell.level)}, {blocks}"

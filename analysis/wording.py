"""Figures and names as text: one way to write a ratio, a level or a metric, for every format.

A figure that is not there is shown as "–", never as 0.
"""

import math
import re
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from analysis.compare import Cell

MISSING = "–"
UNITS = {"rps": "req/s", "ms": "ms", "tok_per_s": "tok/s", "ratio": ""}


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


def ratio_texts(cell: "Cell") -> tuple[str, str]:
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


def effect_text(cell: "Cell") -> str:
    """×3.94 (95 % interval 3.71 to 4.18)"""
    ratio, interval = ratio_texts(cell)
    return f"{ratio} ({confidence_text(cell.confidence)} interval {interval})" if interval else ratio


def metric_text(metric: str) -> str:
    """latency_p99_ms -> "latency p99 (ms)"; an unknown unit stays part of the name."""
    for suffix, unit in UNITS.items():
        if metric.endswith(f"_{suffix}"):
            name = metric.removesuffix(f"_{suffix}").replace("p999", "p99.9").replace("_", " ")
            name = name.replace("ttft", "TTFT").replace("tpot", "TPOT")
            return f"{name} ({unit})" if unit else name
    return metric.replace("_", " ")


def level_text(level: str, short: bool = False) -> str:
    """c0064 -> "64 clients" ("c=64" if short); r000250.00 -> "250 req/s" ("250/s")."""
    match = re.fullmatch(r"([cr])(\d+(?:\.\d+)?)", level)
    if not match:
        return level
    amount = f"{float(match[2]):,g}"
    if match[1] == "r":
        return f"{amount}/s" if short else f"{amount} req/s"
    return f"c={amount}" if short else f"{amount} client{'' if amount == '1' else 's'}"

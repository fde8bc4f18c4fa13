"""Tidy frames for plots and notebooks: every statistic that a picture shows is computed before it is drawn."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from analysis import load, stats
from analysis.compare import METRICS, THROUGHPUT, Comparison, declared_pairs
from analysis.load import Requests, Run

BETWEEN, WITHIN = "between deployments", "within this deployment"
_QUANTILES = 1 - np.geomspace(1, 1e-5, 201)  # evenly spaced on the log-tail axis


def arm_points(run: Run, requests: Sequence[Requests] = ()) -> pd.DataFrame:
    """One row an (arm, level, metric): geometric mean over the blocks with an interval, and whether it is VALID.

    With one block only, `requests` give throughput and latency percentiles an interval within that deployment.
    """
    rows = []
    for arm, level in sorted({*zip(run.points.arm, run.points.level, strict=True)}, key=_planned_order(run)):
        frame = run.points[(run.points.arm == arm) & (run.points.level == level)]
        complete = frame[frame.state == "complete"]
        if complete.empty:
            continue
        valid = complete[complete.valid == True]  # noqa: E712 (None too)
        used = complete if valid.empty else valid
        first = load.records(used)[0]
        reasons = sorted({code for text in complete.invalid_reasons.dropna() for code in text.split(";") if code})
        notes = ";".join(complete.notes.dropna()).split(";")
        facts = {
            **{name: first[name] for name in ("arm", "profile", "workload", "cluster", "num_replicas", "level")},
            **{name: first[name] for name in ("concurrency", "offered_rps", "load_mode")},
            "axes": _axes(run, arm),
            "num_blocks": len(valid),
            "num_invalid": len(complete) - len(valid),
            "valid": not valid.empty,
            "invalid_reasons": ", ".join(reasons),
            "colocated": "colocated_client" in notes,
            "single_run": "single_run" in notes,
        }
        within = [each for each in requests if (each.row["arm"], each.row["level"]) == (arm, level)]
        for metric in METRICS:
            values = used[metric].dropna().to_numpy(dtype=float)
            if len(values):
                value, low, high, interval = _interval(metric, values, within, _has_replicates(run))
                rows.append(
                    {**facts, "metric": metric, "value": value, "ci_low": low, "ci_high": high, "interval": interval}
                )
    return pd.DataFrame(rows)


def _planned_order(run: Run) -> Callable[[tuple[str, str]], Any]:
    """Arms as they were given, not in the shuffled order of measurement; levels by number."""
    return lambda place: (run.arms.index(place[0]), load.level_order(place[1]))


def _axes(run: Run, arm: str) -> str:
    held = [
        axis for axis in load.arm_record(run, arm)["axes"].items() if axis[0] not in run.record["compare"]["treatment"]
    ]
    return ", ".join(f"{axis}={value}" for axis, value in held)


def _has_replicates(run: Run) -> bool:
    """Whether each block was deployed afresh; else its scatter says nothing of another deployment."""
    return bool(run.record["compare"].get("redeploy") != "never")


def _interval(
    metric: str, values: np.ndarray, within: Sequence[Requests], replicates: bool
) -> tuple[float, float, float, str]:
    """Value, low, high (NaN without) and what kind of interval it is."""
    if values.min() <= 0:
        return float(values.mean()), np.nan, np.nan, ""
    value, low, high = stats.geometric_mean_interval(values)
    if low is not None and high is not None and replicates:
        return value, low, high, BETWEEN
    if len(within) == 1 and within[0].histograms is not None:
        counts, edges = within[0].histograms
        if metric == THROUGHPUT:
            return value, *stats.slice_rate_interval(counts.sum(axis=1), within[0].row["duration_s"]), WITHIN
        p = {"latency_p50_ms": 0.5, "latency_p99_ms": 0.99}.get(metric)
        if p is not None:
            bounds = stats.slice_percentile_interval(counts, edges, p, value)
            return value, float(bounds[0]), float(bounds[1]), WITHIN
    return value, np.nan, np.nan, ""


def distribution(requests: Sequence[Requests]) -> pd.DataFrame:
    """Latency by quantile, all VALID repeats of an arm and level together, as far out as ten requests lie beyond.

    From histograms with bins of 0.5 %.
    """
    groups: dict[tuple[str, str], list[Requests]] = {}
    for each in requests:
        if each.row["valid"] and each.histograms is not None:
            groups.setdefault((each.row["arm"], each.row["level"]), []).append(each)
    frames = []
    for (arm, level), members in groups.items():
        counts, edges = stats.merge_histograms([each.histograms for each in members if each.histograms is not None])
        known = _QUANTILES[counts.sum() * (1 - _QUANTILES) >= 10]
        frames.append(
            pd.DataFrame(
                {
                    "arm": arm,
                    "level": level,
                    "concurrency": members[0].row["concurrency"],
                    "quantile": known,
                    "latency_ms": stats.histogram_quantiles(counts, edges, known)[0],
                    "ci_low_ms": np.nan,
                    "ci_high_ms": np.nan,
                }
            )
        )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def gain_by_slo(run: Run) -> pd.DataFrame:
    """Ratio of the peak throughputs within an SLO on p99 latency, for every SLO that the data can tell apart.

    The peak is the highest throughput of a measured level whose p99 meets the SLO, block by block; the ratio has an
    interval where at least two blocks have both peaks.
    """
    rows, replicates = [], _has_replicates(run)
    for pair in declared_pairs(run):
        sides = [_valid_rows(run, side[0][1]) for side in (pair.baselines, pair.candidates)]
        p99s = pd.concat(sides).latency_p99_ms
        if p99s.empty or any(side.empty for side in sides):
            continue
        for slo_ms in np.geomspace(p99s.min() * 0.9, p99s.max() * 1.1, 60):
            peaks = [side[side.latency_p99_ms <= slo_ms].groupby("repeat").throughput_rps.max() for side in sides]
            both = peaks[0].index.intersection(peaks[1].index)
            effect = stats.paired_effect(peaks[0][both], peaks[1][both], True) if len(both) else None
            rows.append(
                {
                    "baseline": pair.baselines[0][1],
                    "candidate": pair.candidates[0][1],
                    "axes": pair.axes,
                    "slo_ms": slo_ms,
                    "baseline_peak_rps": _mean(peaks[0]),
                    "candidate_peak_rps": _mean(peaks[1]),
                    "ratio": effect.ratio if effect else np.nan,
                    "ci_low_ratio": effect.ci_low_ratio if effect and replicates else None,
                    "ci_high_ratio": effect.ci_high_ratio if effect and replicates else None,
                    "num_blocks": len(both),
                }
            )
    frame = pd.DataFrame(rows)
    return frame.astype({"ci_low_ratio": float, "ci_high_ratio": float}) if rows else frame


def _valid_rows(run: Run, arm: str) -> pd.DataFrame:
    points = run.points
    return points[(points.arm == arm) & (points.valid == True) & points.latency_p99_ms.notna()]  # noqa: E712


def _mean(values: pd.Series) -> float:
    return stats.geometric_mean_interval(values)[0] if len(values) else np.nan


def peak(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Speed-up of throughput and fraction of p99 latency that is left, at the primary level of each comparison."""
    rows: list[dict[str, Any]] = []
    for each in comparisons:
        if each.primary is None or each.primary.ratio is None:
            continue
        cells = [cell for cell in each.cells if cell.level == each.primary.level]
        p99 = next((cell for cell in cells if cell.metric == "latency_p99_ms" and cell.ratio), None)
        rows.append(
            {
                "workload": each.workload,
                "baseline": each.baseline,
                "candidate": each.candidate,
                "axes": each.axes,
                "speedup": each.primary.ratio,
                "speedup_ci_low": each.primary.ci_low_ratio,
                "speedup_ci_high": each.primary.ci_high_ratio,
                "latency_fraction": _inverse(p99.ratio if p99 else None),
                "latency_fraction_ci_low": _inverse(p99.ci_high_ratio if p99 else None),
                "latency_fraction_ci_high": _inverse(p99.ci_low_ratio if p99 else None),
                "level": each.primary.level,
                "confidence": each.primary.confidence,
                "num_blocks": each.primary.num_blocks,
            }
        )
    return pd.DataFrame(rows)


def _inverse(ratio: float | None) -> float:
    return 1 / ratio if ratio else np.nan


def workloads(run: Run) -> dict[str, str]:
    """Arm -> name of its workload."""
    return dict(zip(run.points.arm, run.points.workload, strict=True))


def slo_p99_ms(run: Run) -> dict[str, float]:
    """Workload -> the SLO on its p99 latency, ms, where it has one."""
    found = {}
    for arm, workload in workloads(run).items():
        config = load.config(run, arm)
        slo = OmegaConf.select(OmegaConf.create(dict(config)), "slo.latency_p99_ms") if config else None
        if slo is not None:
            found[workload] = float(slo)
    return found


def all_requests(run: Run) -> list[Requests]:
    """Every trial's requests, read once. What cannot be read is left out with a warning; a comparison refuses it."""
    found: list[Requests] = []
    for _, row in run.points[run.points.state == "complete"].iterrows():
        try:
            found += load.read_requests(run, row.to_frame().T)
        except load.LoadError as error:
            warnings.warn(str(error), stacklevel=2)
    return found

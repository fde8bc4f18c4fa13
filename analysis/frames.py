"""Tidy frames for plots and notebooks: every statistic that a picture shows is computed before it is drawn."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from analysis import load, stats
from analysis.cells import Comparison
from analysis.contrasts import declared_pairs
from analysis.figures import FIGURES, THROUGHPUT, Figure, shown
from analysis.load import ArmData, Requests, RunData
from orchestrator.load.level import Level

RATIO = ("ratio", "ci_low_ratio", "ci_high_ratio")
BETWEEN, WITHIN = "between deployments", "within this deployment"
_QUANTILES = 1 - np.geomspace(1, 1e-5, 201)  # evenly spaced on the log-tail axis


def arm_points(run: RunData, requests: Sequence[Requests] = ()) -> pd.DataFrame:
    """One row an (arm, level, metric): geometric mean over the blocks with an interval, and whether it is VALID.

    Arms as they were given, not in the shuffled order of measurement. With one block only, `requests` give throughput
    and latency percentiles an interval within that deployment.
    """
    rows = []
    for arm in (ArmData(run, name) for name in run.arms):
        axes = {axis: value for axis, value in arm.record.axes.items() if axis not in run.declared.treatment}
        for level in sorted(arm.complete.level.unique(), key=Level.parse):
            complete = arm.complete[arm.complete.level == level]
            valid = complete[complete.valid.eq(True)]
            used = complete if valid.empty else valid
            names = ["arm", "profile", "workload", "cluster", "num_replicas", "level", "concurrency", "offered_rps"]
            facts = load.records(used[[*names, "load_mode"]].iloc[:1])[0] | {
                "axes": ", ".join(f"{axis}={value}" for axis, value in axes.items()),
                "num_blocks": len(valid),
                "num_invalid": len(complete) - len(valid),
                "valid": not valid.empty,
                "invalid_reasons": ", ".join(load.codes(complete.invalid_reasons)),
                "colocated": "colocated_client" in load.codes(complete.notes),
                "single_run": "single_run" in load.codes(complete.notes),
            }
            within = [trial for trial in requests if (trial.row["arm"], trial.row["level"]) == (arm.name, level)]
            # Of one deployment an arm the scatter of blocks says nothing of another deployment.
            replicates = run.declared.redeploy != "never"
            for figure in shown():
                values = used[figure.name].dropna().to_numpy(dtype=float)
                if len(values):
                    found = _interval(figure, values, within, replicates)
                    rows.append(
                        facts
                        | {"metric": figure.name}
                        | dict(zip(("value", "ci_low", "ci_high", "interval"), found, strict=True))
                    )
    return pd.DataFrame(rows)


def _interval(
    figure: Figure, values: np.ndarray, within: Sequence[Requests], replicates: bool
) -> tuple[float, float, float, str]:
    """Value, low, high (NaN without) and what kind of interval it is."""
    if values.min() <= 0:
        return float(values.mean()), np.nan, np.nan, ""
    value, low, high = stats.geometric_mean_interval(values)
    if low is not None and high is not None and replicates:
        return value, low, high, BETWEEN
    if len(within) == 1 and within[0].histograms is not None:
        counts, edges = within[0].histograms
        if figure is THROUGHPUT:
            return value, *stats.slice_rate_interval(counts.sum(axis=1), within[0].row["duration_s"]), WITHIN
        p = {"latency_p50_ms": 0.5, "latency_p99_ms": 0.99}.get(figure.name)
        if p is not None:
            bounds = stats.slice_percentile_interval(counts, edges, p, value)
            return value, float(bounds[0]), float(bounds[1]), WITHIN
    return value, np.nan, np.nan, ""


def distribution(requests: Sequence[Requests]) -> pd.DataFrame:
    """Latency by quantile, all VALID repeats of an arm and level together, as far out as ten requests lie beyond.

    From histograms with bins of 0.5 %.
    """
    groups: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for trial in requests:
        if trial.row["valid"] and trial.histograms is not None:
            groups.setdefault((trial.row["arm"], trial.row["level"]), []).append(trial.histograms)
    frames = []
    for (arm, level), histograms in groups.items():
        counts, edges = stats.merge_histograms(histograms)
        known = _QUANTILES[counts.sum() * (1 - _QUANTILES) >= 10]
        latency_ms = stats.histogram_quantiles(counts, edges, known)[0]
        frames.append(pd.DataFrame({"arm": arm, "level": level, "quantile": known, "latency_ms": latency_ms}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def gain_by_slo(run: RunData) -> pd.DataFrame:
    """Ratio of the peak throughputs within an SLO on p99 latency, for every SLO that the data can tell apart.

    The peak is the highest throughput of a measured level whose p99 meets the SLO, block by block; the ratio has an
    interval where at least two blocks have both peaks.
    """
    rows = []
    for pair in declared_pairs(run):
        arms = pair.baselines[0].points, pair.candidates[0].points
        sides = [points[points.valid.eq(True) & points.latency_p99_ms.notna()] for points in arms]
        if any(side.empty for side in sides):
            continue
        p99s = pd.concat(sides).latency_p99_ms
        for slo_ms in np.geomspace(p99s.min() * 0.9, p99s.max() * 1.1, 60):
            peaks = [side[side.latency_p99_ms <= slo_ms].groupby("repeat").throughput_rps.max() for side in sides]
            both = peaks[0].index.intersection(peaks[1].index)
            effect = pair.effect(peaks[0][both], peaks[1][both], more_is_better=True)
            means = [stats.geometric_mean_interval(peak)[0] if len(peak) else np.nan for peak in peaks]
            rows.append(
                {
                    "baseline": pair.names[0],
                    "candidate": pair.names[1],
                    "axes": pair.axes,
                    "slo_ms": slo_ms,
                    "baseline_peak_rps": means[0],
                    "candidate_peak_rps": means[1],
                    "ratio": effect.ratio if effect else np.nan,
                    "ci_low_ratio": effect.ci_low_ratio if effect else None,
                    "ci_high_ratio": effect.ci_high_ratio if effect else None,
                    "num_blocks": len(both),
                }
            )
    frame = pd.DataFrame(rows)
    return frame.astype({"ci_low_ratio": float, "ci_high_ratio": float}) if rows else frame


def peak(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Candidate / baseline of throughput and of p99 latency, a row each, at the primary level of each comparison."""
    rows = []
    for comparison in comparisons:
        if comparison.primary is None or comparison.primary.ratio is None:
            continue
        for cell in comparison.cells:
            if cell.level == comparison.primary.level and cell.metric in (THROUGHPUT.name, "latency_p99_ms"):
                row = asdict(cell) | {"workload": comparison.workload}
                if not FIGURES[cell.metric].more_is_better:  # a cell's ratio is baseline / candidate then
                    ratios = cell.ratio, cell.ci_high_ratio, cell.ci_low_ratio
                    row |= zip(RATIO, (1 / ratio if ratio else None for ratio in ratios), strict=True)
                rows.append(row)
    return pd.DataFrame(rows)


def slo_p99_ms(run: RunData) -> dict[str, float]:
    """Workload -> the SLO on its p99 latency, ms, where it has one."""
    found = {}
    for name, workload in dict(zip(run.points.arm, run.points.workload, strict=True)).items():
        config = ArmData(run, name).config()
        slo = OmegaConf.select(OmegaConf.create(dict(config)), "slo.latency_p99_ms") if config else None
        if slo is not None:
            found[workload] = float(slo)
    return found


def all_requests(run: RunData) -> list[Requests]:
    """Every trial's requests, read once. What cannot be read is left out with a warning; a comparison refuses it."""
    found = []
    for row in load.records(run.points[run.points.state == "complete"]):
        try:
            found.append(load.read_requests(run, row))
        except load.LoadError as error:
            warnings.warn(str(error), stacklevel=2)
    return [trial for trial in found if trial is not None]

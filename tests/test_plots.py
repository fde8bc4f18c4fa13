"""The figures hold what the frames hold, say what is missing, and no text lies on another."""

import itertools
import math
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from analysis import plots

METRICS = ["throughput_rps", "latency_mean_ms", "latency_p50_ms", "latency_p99_ms"]
TOKENS = ["ttft_p50_ms", "tpot_p50_ms", "input_throughput_tok_per_s", "output_throughput_tok_per_s"]
UNARY = [1, 2, 4, 8, 16, 32, 64, 128, 256]
RECSYS = [10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500]


def arm_points(
    arms: Sequence[str] = ("baseline", "optimized"),
    levels: Sequence[float] = UNARY,
    *,
    workload: str = "unary",
    metrics: Sequence[str] = METRICS,
    scale: float = 1.0,
    num_replicas: float = 1,
    no_p99: Sequence[float] = (),
    invalid: Sequence[float] = (),
    blocks: int = 5,
    interval: str = "between deployments",
    open_loop: bool = False,
) -> pd.DataFrame:
    """A service that saturates: throughput rises to a peak, latency follows from the number of clients."""
    rows = []
    for i, arm in enumerate(arms):
        peak = 210 * scale * 1.6**i
        for level in levels:
            rps = peak * level / (level + 12 + 6 * i) if not open_loop else min(level, peak)
            mean = 1e3 * level / rps if not open_loop else 8 / max(0.05, 1 - level / peak / 1.1)
            figures = {
                "throughput_rps": rps,
                "latency_mean_ms": mean,
                "latency_p50_ms": 0.9 * mean,
                "latency_p99_ms": 2.2 * mean,
                "ttft_p50_ms": 0.3 * mean,
                "tpot_p50_ms": 0.02 * mean,
                "input_throughput_tok_per_s": 512 * rps,
                "output_throughput_tok_per_s": 128 * rps,
            }
            for metric in metrics:
                value = math.nan if metric == "latency_p99_ms" and level in no_p99 else figures[metric]
                spread = 1.06 if interval and level not in invalid else math.nan
                rows.append(
                    {
                        "arm": arm,
                        "profile": arm.split(",")[1] if "," in arm else arm,
                        "workload": workload,
                        "cluster": "local",
                        "num_replicas": num_replicas,
                        "axes": "",
                        "level": f"r{level:09.2f}" if open_loop else f"c{level:04d}",
                        "concurrency": None if open_loop else level,
                        "offered_rps": float(level) if open_loop else None,
                        "metric": metric,
                        "value": value,
                        "ci_low": value / spread,
                        "ci_high": value * spread,
                        "interval": interval,
                        "num_blocks": 0 if level in invalid else blocks,
                        "num_invalid": blocks if level in invalid else 0,
                        "valid": level not in invalid,
                        "invalid_reasons": "client_saturated" if level in invalid else "",
                        "colocated": True,
                        "load_mode": "open" if open_loop else "closed",
                        "single_run": blocks == 1,
                    }
                )
    return pd.DataFrame(rows)


def cells(
    pairs: Sequence[tuple[str, str, str]] = (("baseline", "optimized", ""),),
    levels: Sequence[int] = (4, 16, 64),
    *,
    floor: float | None = None,
    blocks: int = 5,
    ratio: float = 3.6,
) -> pd.DataFrame:
    rows = []
    generator = np.random.default_rng(1)
    for baseline, candidate, axes in pairs:
        for level, metric in itertools.product(
            reversed(levels), ["throughput_rps", "latency_p50_ms", "latency_p99_ms"]
        ):
            top = level == max(levels)
            primary = top and metric == "throughput_rps"
            family = "primary" if primary else "secondary" if top or "throughput" in metric else "descriptive"
            value = ratio * generator.lognormal(0, 0.25)
            spread = generator.uniform(1.04, 1.3)
            bare = blocks < 2 or (family == "descriptive" and level == levels[0])
            verdict = "INCONCLUSIVE" if bare else "FASTER" if value / spread > 1 else "SLOWER"
            rows.append(
                {
                    "metric": metric,
                    "level": f"c{level:04d}",
                    "concurrency": level,
                    "offered_rps": None,
                    "axes": axes,
                    "baseline": baseline,
                    "candidate": candidate,
                    "baseline_value": 100.0,
                    "candidate_value": 100 * value,
                    "ratio": value,
                    "ci_low_ratio": None if bare else value / spread,
                    "ci_high_ratio": None if bare else value * spread,
                    "confidence": None if bare else 0.95 if primary else 0.9875,
                    "num_blocks": blocks,
                    "num_planned": 5,
                    "family": family,
                    "verdict": None if family == "descriptive" else verdict,
                    "reason": "",
                    "floor_ratio": floor,
                }
            )
    return pd.DataFrame(rows)


def gain_by_slo(pairs: Sequence[tuple[str, str, str]] = (("baseline", "optimized", ""),)) -> pd.DataFrame:
    rows = []
    for baseline, candidate, axes in pairs:
        for slo in np.geomspace(5, 1000, 40):
            base = np.floor(math.log2(slo / 15)) * 35 + 90 if slo > 15 else math.nan
            candi = np.floor(math.log2(slo / 6)) * 90 + 300 if slo > 6 else math.nan
            ratio = candi / base
            rows.append([baseline, candidate, axes, slo, base, candi, ratio, ratio / 1.1, ratio * 1.1, 5])
    names = "baseline candidate axes slo_ms baseline_peak_rps candidate_peak_rps ratio ci_low_ratio ci_high_ratio num_blocks"
    return pd.DataFrame(rows, columns=names.split())


def distribution(arms: Sequence[str] = ("baseline", "optimized"), levels: Sequence[int] = (4, 16, 64)) -> pd.DataFrame:
    rows = []
    for (i, arm), level in itertools.product(enumerate(arms), levels):
        for q in [*np.linspace(0, 0.9, 19), *(1 - np.geomspace(0.08, 0.0005, 20))]:
            latency = level * 6 / 1.5**i * (0.4 + 0.25 * math.log(1 / (1 - q)))
            rows.append([arm, f"c{level:04d}", level, q, latency, latency * 0.96, latency * 1.05])
    return pd.DataFrame(rows, columns="arm level concurrency quantile latency_ms ci_low_ms ci_high_ms".split())


def over_time(
    arms: Sequence[str] = ("baseline", "optimized"), levels: Sequence[int] = (4, 16, 64), repeats: int = 3
) -> pd.DataFrame:
    rows = []
    generator = np.random.default_rng(2)
    for (i, arm), level, repeat in itertools.product(enumerate(arms), levels, range(repeats)):
        for t in np.arange(-4, 10, 0.5):
            rps = 200 * 1.6**i * level / (level + 12) * min(1, (t + 4.5) / 1.5) * generator.normal(1, 0.05)
            rows.append([arm, repeat, f"c{level:04d}", level, t, rps, 3.0, 1.0, 10.0, (repeat, level) != (1, 4)])
    names = "arm repeat level concurrency time_s throughput_rps warmup_s ramp_up_s duration_s valid"
    return pd.DataFrame(rows, columns=names.split())


def peak(workloads: Sequence[str] = ("unary", "streaming", "recsys")) -> pd.DataFrame:
    rows = []
    for i, workload in enumerate(workloads):
        speedup, fraction = 2.0 + i, 0.5 / (i + 1)
        limits = [speedup / 1.1, speedup * 1.1], [fraction / 1.2, fraction * 1.2]
        rows.append(
            [workload, "baseline", "optimized", f"workload={workload}", speedup, *limits[0], fraction, *limits[1]]
        )
        rows[-1] += ["c0256", 5]
    names = "workload baseline candidate axes speedup speedup_ci_low speedup_ci_high latency_fraction "
    names += "latency_fraction_ci_low latency_fraction_ci_high level num_blocks"
    return pd.DataFrame(rows, columns=names.split())


LONG = [f"recsys,{profile},num_replicas={n}" for profile in ("baseline", "optimized") for n in (1, 2, 4, 8)]


def replicas(tokens: bool = True) -> pd.DataFrame:
    frames = []
    for profile, n in itertools.product(("baseline", "optimized"), (1, 2, 4, 8)):
        scale = 1.0 if profile == "baseline" else 2.4
        frame = arm_points(
            [f"llm,{profile},num_replicas={n}"], [8, 32], workload="llm", metrics=[*METRICS, *TOKENS] if tokens else METRICS,
            num_replicas=n, scale=scale * n**0.9,
        )  # fmt: skip
        frames.append(frame)
    frames.append(arm_points(["vllm,baseline"], [8, 32], workload="vllm", metrics=[*METRICS, *TOKENS], scale=6))
    return pd.concat(frames, ignore_index=True)

"""What did one trial measure? Requests and the figures made of them; pure but for one reader and one writer.

The window is [0, `duration_s`) on the clock of `sent_at_s`. A request belongs to it if it *completes* in it,
so a slow request is counted where its work ended and the rate of completions is not biased by requests cut
off at the end. A request still in flight after the drain (`error == "unfinished"`) has no completion: it is a
failure of the window if it was sent before the window's end, in the warm-up too, for it was in flight then.

Intervals and verdicts between arms are not here: see `analysis/stats.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.results.records import Metrics, Sample, WholeRun, arrow_schema, replacing

UNFINISHED = "unfinished"  # `error` of a request still in flight after `drain_s`
SHORT_REPLY, LONG_REPLY = "short_reply", "long_reply"  # `error` of another number of tokens than asked begins so

SAMPLES_SCHEMA = arrow_schema(Sample)


def _check_samples(samples: pa.Table, what: str) -> None:
    """Raise `ValueError` if a row would be miscounted in silence. `what` names the table in the message."""
    if not samples.schema.equals(SAMPLES_SCHEMA):
        expected = {(column.name, str(column.type)) for column in SAMPLES_SCHEMA}
        found = {(column.name, str(column.type)) for column in samples.schema}
        raise ValueError(
            f"{what} does not have the columns of samples: missing {sorted(expected - found)}, "
            f"unexpected {sorted(found - expected)} (or another order or nullability)"
        )
    for name in ("sent_at_s", "ok"):
        if samples[name].null_count:
            raise ValueError(f"{what} has {samples[name].null_count} rows without {name}")
    # Null compares as null and is skipped by `all`, so only values that are there are judged.
    for name in ("sent_at_s", "intended_at_s", "latency_ms", "ttft_ms", "tpot_ms"):
        if pc.all(pc.is_finite(samples[name])).as_py() is False:
            raise ValueError(f"{what} has a {name} that is not finite; what was not measured is null")
    latency = samples["latency_ms"]
    if pc.all(pc.greater_equal(latency, 0.0)).as_py() is False:
        raise ValueError(f"{what} has a negative latency_ms")
    if latency.null_count and pc.any(pc.and_(pc.is_null(latency), samples["ok"])).as_py():
        raise ValueError(f"{what} has a successful request without latency_ms")


def read_samples(path: Path) -> pa.Table:
    """All rows of a `samples.parquet`.

    Raises `OSError` if it cannot be opened, `ValueError` that names `path` if it is truncated, corrupt or
    not samples.
    """
    try:
        # Not pq.read_table: it takes an `=` in an arm's name for a Hive partition and adds a column.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            samples = file.read()
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a readable Parquet file (truncated or corrupt): {error}") from error
    _check_samples(samples, str(path))
    return samples


def write_samples(path: Path, samples: pa.Table) -> None:
    """Write atomically. Raises `ValueError` if `samples` is not of `SAMPLES_SCHEMA`."""
    _check_samples(samples, f"table for {path}")
    with replacing(path) as temporary:
        pq.write_table(samples, temporary, write_page_checksum=True)


# ---- Samples to metrics ----


def percentile(values: np.ndarray, p: float) -> float | None:
    """Percentile of raw values by numpy's linear interpolation; `p` is a fraction, 0.99 for p99.

    None unless at least 10 values are expected above it, n(1-p) >= 10: p50 needs 20, p99 1,000, p99.9 10,000.
    """
    assert 0 < p < 1, f"a fraction, not per cent: {p}"
    # Rounded, for 100 * (1 - 0.9) is 9.999999999999998.
    return float(np.quantile(values, p)) if round(len(values) * (1 - p), 6) >= 10 else None


def _unfinished(samples: pa.Table) -> np.ndarray:
    """Mask of the requests still in flight after the drain."""
    mask: np.ndarray = pc.fill_null(pc.equal(samples["error"], UNFINISHED), False).to_numpy()
    return mask


def completed_at_s(samples: pa.Table) -> np.ndarray:
    """When each request completed, s from the start of the window; +inf = never.

    Latency counts from the intended send where there is one (open loop), else from the actual send. A failure
    without a latency is taken to have completed when it was sent.
    """
    start_s = pc.coalesce(samples["intended_at_s"], samples["sent_at_s"]).to_numpy()
    latency_ms = pc.fill_null(samples["latency_ms"], 0.0).to_numpy()
    return np.where(_unfinished(samples), np.inf, start_s + latency_ms / 1000)


def in_window(completed: np.ndarray, duration_s: float) -> np.ndarray:
    return (completed >= 0) & (completed < duration_s)


def never_finished(samples: pa.Table, duration_s: float) -> np.ndarray:
    """Mask of the requests of the window that were still in flight after the drain."""
    mask: np.ndarray = _unfinished(samples) & (samples["sent_at_s"].to_numpy() < duration_s)
    return mask


_PERCENTILES = {
    "latency": {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999},
    "ttft": {"p50": 0.5, "p99": 0.99},
    "tpot": {"p50": 0.5, "p99": 0.99},
}


def compute_metrics(samples: pa.Table, duration_s: float, slo: Mapping[str, float | None]) -> Metrics:
    """The measured columns of the summary, for the window [0, `duration_s`).

    Throughput and all times are over successes only. Nothing measured is None, not 0: means without values,
    percentiles with too few, token throughput if no request of the trial tells its tokens, `error_ratio`
    without any request (then `check_validity` says `no_samples`).

    `slo` has the keys `latency_p99_ms`, `ttft_p99_ms` and `tpot_p99_ms`, ms or None. They are targets for the
    p99 of a trial; for `goodput_rps` each is the threshold of every single request, which must meet all of
    them (<=). A request of fewer than two tokens has no TPOT to miss. `goodput_rps` is None without an SLO,
    and if one is set on a time that no success has (TTFT of a unary workload): that cannot be judged.

    Raises `ValueError` for an unknown key in `slo`.
    """
    slos = [f"{prefix}_p99_ms" for prefix in _PERCENTILES]
    if unknown := set(slo) - set(slos):
        raise ValueError(f"unknown SLO {sorted(unknown)}; available: {', '.join(slos)}")
    completed = completed_at_s(samples)
    inside = in_window(completed, duration_s)
    succeeded = inside & samples["ok"].to_numpy()
    num_successful = int(succeeded.sum())
    num_failed = int((inside | never_finished(samples, duration_s)).sum()) - num_successful
    total = num_successful + num_failed
    figures: dict[str, float | None] = {}
    for side in ("input", "output"):
        tokens = samples[f"num_{side}_tokens"]
        told = tokens.null_count < len(tokens)
        num_tokens = pc.sum(tokens.filter(pa.array(succeeded)), min_count=0).as_py()
        figures[f"{side}_throughput_tok_per_s"] = num_tokens / duration_s if told else None
    good = np.ones(num_successful, dtype=bool)
    judged = any(target is not None for target in slo.values())
    for prefix, labels in _PERCENTILES.items():
        per_request = samples[f"{prefix}_ms"].to_numpy()[succeeded]  # null is NaN
        values = per_request[~np.isnan(per_request)]
        target = slo.get(f"{prefix}_p99_ms")
        if target is not None:
            good &= ~(per_request > target) if prefix == "tpot" else per_request <= target
            judged &= len(values) > 0 or num_successful == 0
        figures[f"{prefix}_mean_ms"] = float(values.mean()) if len(values) else None
        for label, p in labels.items():
            figures[f"{prefix}_{label}_ms"] = percentile(values, p)
    return Metrics(
        num_successful=num_successful,
        num_failed=num_failed,
        error_ratio=num_failed / total if total else None,
        throughput_rps=num_successful / duration_s,
        goodput_rps=int(good.sum()) / duration_s if judged else None,
        **figures,
    )


def whole_run(samples: pa.Table, duration_s: float, client: Mapping[str, float | int] | None = None) -> WholeRun:
    """All of a run of `duration_s`, ramp-up and tail included, as LLM clients report it.

    That is for holding figures against those of such a client; what is compared between arms is the window's.
    Hence its rules: a reply of another length than asked counts, and percentiles are given however few values
    there are. None without a value. `client`: the client's own figures.
    """
    short, long = (pc.fill_null(pc.starts_with(samples["error"], code), False) for code in (SHORT_REPLY, LONG_REPLY))
    completed = samples.filter(pc.or_(samples["ok"], pc.or_(short, long)))
    num_tokens = {side: pc.sum(completed[f"num_{side}_tokens"], min_count=0).as_py() for side in ("input", "output")}
    times: dict[str, float | None] = {}
    for prefix in ("ttft", "tpot", "latency"):
        values = completed[f"{prefix}_ms"].drop_null().to_numpy()
        p50, p99 = np.percentile(values, (50, 99)).tolist() if len(values) else (None, None)
        times[f"{prefix}_mean_ms"] = float(values.mean()) if len(values) else None
        times[f"{prefix}_p50_ms"], times[f"{prefix}_p99_ms"] = p50, p99
    return WholeRun(
        duration_s=duration_s,
        num_successful=len(completed),
        num_failed=len(samples) - len(completed),
        num_short=pc.sum(short, min_count=0).as_py(),
        throughput_rps=len(completed) / duration_s,
        input_throughput_tok_per_s=num_tokens["input"] / duration_s,
        output_throughput_tok_per_s=num_tokens["output"] / duration_s,
        client=client,
        **times,
    )


_BUNCHED_TPOT_MS, _MAX_BUNCHED_RATIO = 0.05, 0.1  # nothing generates a token in this time


def tokens_are_bunched(samples: pa.Table, duration_s: float) -> bool:
    """Whether more than a tenth of the streamed replies brought their tokens all at once: no stream, in fact."""
    inside = in_window(completed_at_s(samples), duration_s) & samples["ok"].to_numpy()
    tpot_ms = samples["tpot_ms"].filter(pa.array(inside)).drop_null().to_numpy()
    return bool(len(tpot_ms)) and float((tpot_ms < _BUNCHED_TPOT_MS).mean()) > _MAX_BUNCHED_RATIO


def in_flight_mean(samples: pa.Table, end_s: float, start_s: float = 0.0) -> float:
    """Time-average number of requests in flight in [`start_s`, `end_s`): summed overlaps / length.

    From the actual send to the completion, failures included; an unfinished request is in flight to the end.
    """
    overlap_s = np.minimum(completed_at_s(samples), end_s) - np.maximum(samples["sent_at_s"].to_numpy(), start_s)
    return float(np.maximum(overlap_s, 0).sum()) / (end_s - start_s)


class Drift(NamedTuple):
    """Trend of throughput over the whole window / its mean, with a 95 % interval; 0.2 = 20 % up."""

    ratio: float
    ci_low: float
    ci_high: float


_NUM_SLICES = 20
# 0.975 quantile of Student's t, 20 - 2 = 18 degrees of freedom (NIST/SEMATECH e-Handbook 1.3.6.7.2: 2.101).
_T_975_18DOF = 2.10092204


def drift(samples: pa.Table, duration_s: float) -> Drift | None:
    """Least-squares trend of successes by completion over 20 slices of the window; None without a success.

    The interval is the ordinary one of a regression slope. Counting noise is part of the residuals, so it
    widens as requests get fewer.
    """
    completed = completed_at_s(samples)
    completed = completed[in_window(completed, duration_s) & samples["ok"].to_numpy()]
    if not len(completed):
        return None
    counts, _ = np.histogram(completed, _NUM_SLICES, (0.0, duration_s))
    (slope, _), covariance = np.polyfit(np.arange(_NUM_SLICES), counts, 1, cov=True)
    half = _T_975_18DOF * np.sqrt(covariance[0, 0])
    low, mid, high = (float(value * _NUM_SLICES / counts.mean()) for value in (slope - half, slope, slope + half))
    return Drift(mid, low, high)

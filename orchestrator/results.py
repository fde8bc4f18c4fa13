"""What did one trial measure, and can its point be trusted?

The one owner of: the columns of `samples.parquet` and `summary.*`, the keys of the JSON files, the
percentile, the measurement window and the rules that make a point INVALID. Pure but for the few readers and
writers below. Intervals and verdicts between arms are not here: see `analysis/stats.py`.

The window is [0, `duration_s`) on the clock of `sent_at_s`. A request belongs to it if it *completes* in it,
so a slow request is counted where its work ended and the rate of completions is not biased by requests cut
off at the end. A request still in flight after the drain (`error == "unfinished"`) has no completion: it is a
failure of the window if it was sent before the window's end, in the warm-up too, for it was in flight then.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
UNFINISHED = "unfinished"  # `error` of a request still in flight after `drain_s`
SHORT_REPLY, LONG_REPLY = "short_reply", "long_reply"  # `error` of another number of tokens than asked begins so

# One row a request, warm-up included. Time 0 is the start of the measurement window.
SAMPLES_SCHEMA = pa.schema(
    [
        ("sent_at_s", pa.float64()),  # actual send; negative = warm-up
        ("intended_at_s", pa.float64()),  # open loop only, else null
        ("latency_ms", pa.float64()),  # to the last byte; from the intended send in open loop
        ("ttft_ms", pa.float64()),  # streaming only, else null
        ("tpot_ms", pa.float64()),  # (latency - TTFT) / (tokens - 1); null below two tokens
        ("num_input_tokens", pa.int32()),
        ("num_output_tokens", pa.int32()),  # SSE chunks for the streaming workload
        ("ok", pa.bool_()),
        ("error", pa.string()),  # null when ok
        ("client_process", pa.int16()),
    ]
)


class Column(NamedTuple):
    """Type and one-line meaning (with unit) of a summary column."""

    dtype: pa.DataType
    description: str


_STR, _INT, _FLOAT, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()

# In the order of the files. Null = not measured, not applicable, or too few samples to say.
SUMMARY_COLUMNS: dict[str, Column] = {
    "run_id": Column(_STR, "name of the run directory"),
    "arm": Column(_STR, "one composed config less its levels"),
    "trial_id": Column(_STR, "level and repeat, as in c0010-r0; unique within the arm"),
    "repeat": Column(_INT, "block of the trial, from 0"),
    "state": Column(_STR, "planned, complete or failed; the measured columns are null unless complete"),
    "workload": Column(_STR, "config name of what was served"),
    "profile": Column(_STR, "config name of the set of flags"),
    "cluster": Column(_STR, "config name of where it ran"),
    "service_key": Column(_STR, "hash of everything that makes two services the same"),
    "load_mode": Column(_STR, "closed (clients each waiting for their reply) or open (arrivals on a schedule)"),
    "concurrency": Column(_INT, "number of clients in closed loop, else null"),
    "offered_rps": Column(_FLOAT, "requests/s offered in open loop, else null"),
    "duration_s": Column(_FLOAT, "length of the measurement window, s"),
    "num_successful": Column(_INT, "requests that completed in the window without error"),
    "num_failed": Column(_INT, "requests that failed in the window, or were sent before its end and never finished"),
    "error_ratio": Column(_FLOAT, "num_failed / (num_successful + num_failed), 0 to 1; null without requests"),
    "throughput_rps": Column(_FLOAT, "successes per second of the window"),
    "goodput_rps": Column(_FLOAT, "successes per second that meet every per-request SLO; null without an SLO"),
    "input_throughput_tok_per_s": Column(_FLOAT, "input tokens of successes per second"),
    "output_throughput_tok_per_s": Column(
        _FLOAT, "output tokens (or chunks, where the workload streams chunks) of successes per second"
    ),
    "latency_mean_ms": Column(_FLOAT, "mean time to the last byte of successes, ms"),
    "latency_p50_ms": Column(_FLOAT, "median latency, ms; null below 20 samples"),
    "latency_p90_ms": Column(_FLOAT, "90th percentile of latency, ms; null below 100 samples"),
    "latency_p95_ms": Column(_FLOAT, "95th percentile of latency, ms; null below 200 samples"),
    "latency_p99_ms": Column(_FLOAT, "99th percentile of latency, ms; null below 1,000 samples"),
    "latency_p999_ms": Column(_FLOAT, "99.9th percentile of latency, ms; null below 10,000 samples"),
    "ttft_mean_ms": Column(_FLOAT, "mean time to the first token of successes, ms"),
    "ttft_p50_ms": Column(_FLOAT, "median TTFT, ms; null below 20 samples"),
    "ttft_p99_ms": Column(_FLOAT, "99th percentile of TTFT, ms; null below 1,000 samples"),
    "tpot_mean_ms": Column(_FLOAT, "mean over successes of (latency - TTFT) / (tokens - 1), ms"),
    "tpot_p50_ms": Column(_FLOAT, "median TPOT, ms; null below 20 samples"),
    "tpot_p99_ms": Column(_FLOAT, "99th percentile of TPOT, ms; null below 1,000 samples"),
    "latency_resolution_ms": Column(_FLOAT, "width of the client's finest latency step, ms; 0 = raw clock readings"),
    "client_cpu_ratio": Column(_FLOAT, "CPU of the busiest client process / one core, 0 to 1"),
    "valid": Column(_BOOL, "whether the point may enter a ratio; null unless complete"),
    "invalid_reasons": Column(_STR, ";-joined codes of the rules that were broken; empty if none"),
    "notes": Column(_STR, ";-joined codes of caveats; unchecked:<code> for a rule that could not be checked"),
    "num_replicas": Column(_INT, "replicas of the served deployments"),
    "started_at": Column(_STR, "start of the trial, ISO 8601, UTC"),
}

# Keys of the JSON files. Times `_at` are ISO 8601 strings in UTC unless they end in `_at_s`.
RUN_KEYS = {
    "schema_version": "version of everything on disk; this code writes 1",
    "run_id": "name of the run directory",
    "status": "running, complete, failed or interrupted",
    "started_at": "ISO 8601, UTC",
    "finished_at": "ISO 8601, UTC; null while running",
    "command": "list of the overrides given on the command line",
    "seed": "of the shuffled order of arms within a block",
    "plan": "object: arms, services and trials, in planned order",
    "compare": "object: treatment (axes compared), baseline, margin, max_looks, repeats, redeploy, as declared",
    "primary_cells": "list of the cells whose verdict counts, fixed before the first service came up",
    "provenance": "object: versions, hardware and source commits of where the orchestrator ran",
    "resumed": "list, one entry a resume: at, and provenance then",
    "errors": "list of messages of what failed outside any trial",
    "cost_usd": "what the rented machines have cost by the declared prices, USD; null without prices",
    "timeline": "list: what (service, bring_up, trial, cool_down), name, start_s, end_s since the (resumed) run began",
}
TRIAL_KEYS = {
    "schema_version": "as in run.json",
    "trial_id": "level and repeat, as in c0010-r0",
    "run_id": "name of the run directory",
    "arm": "name of the arm",
    "repeat": "block, from 0",
    "level": "c0010 (closed loop) or r000250.00 (open loop)",
    "load_mode": "closed or open",
    "concurrency": "number of clients in closed loop, else null",
    "offered_rps": "requests/s in open loop, else null",
    "service_key": "hash of everything that makes two services the same",
    "started_at": "ISO 8601, UTC",
    "finished_at": "ISO 8601, UTC",
    "duration_s": "length of the measurement window, s",
    "warmup_s": "load before the window, s; 0 where the client counts requests",
    "ramp_up_s": "part of the warm-up in which clients start, s; 0 as above",
    "drain_s": "longest wait for requests in flight at the end of the window, s; null as above",
    "client": "object of facts about the load client, see below",
    "server": "object of facts about the service, see below; null if the backend cannot tell",
    "round_trip_ms": "median time of a request that does nothing (endpoint: to open a connection); null for local ones",
    "metrics": "object: the measured columns of the summary",
    "whole_run": "object: the run from first request to last reply, as LLM clients report it, see below; else null",
    "valid": "true if no rule was broken",
    "invalid_reasons": "list of codes, see below",
    "invalid_details": "object, code to one sentence: figure, limit, what to do",
    "unchecked": "list of codes of rules that could not be checked",
    "notes": "list of codes of caveats: `colocated_client`, `far_client`, `bunched_tokens` (the report explains each)",
}
CLIENT_KEYS = {
    "window_s": "how long load was really offered within the window, s",
    "offered_rps": "requests/s that the client was told to send; null in closed loop",
    "all_clients_started_at_s": "when the last client sent its first request, s from the window's start",
    "sent_rps": "requests sent per second of the window, where they are sent at a rate; else null",
    "in_flight_mean": "time-average number of requests in flight by the client's own record; null = by the samples",
    "num_processes": "number of client processes",
    "cpu_ratio": "CPU of the busiest client process over the window / one core, 0 to 1",
    "cpu_ratios": "list: the same for each client process",
    "lag_p50_ms": "median delay until the client's event loop takes up what is due, ms; the worst process",
    "lag_p99_ms": "99th percentile of the same, ms",
    "latency_resolution_ms": "width of the finest latency step, ms; 0 = raw clock readings",
    "num_requests": "requests on record, warm-up included = rows of samples.parquet",
    "num_unfinished": "requests still in flight after drain_s",
    "num_task_errors": "exceptions that the locustfile's task raised",
    "versions": "object: package to version of the client",
}
WHOLE_RUN_KEYS = {
    "duration_s": "from the first request sent to the last reply, s",
    "num_successful": "replies that the client counts as completed, those of another length than asked included",
    "num_failed": "requests without such a reply",
    "num_short": "of num_successful, those with fewer tokens than asked: failures in samples.parquet and in the window",
    "throughput_rps": "num_successful per second",
    "input_throughput_tok_per_s": "input tokens of num_successful per second",
    "output_throughput_tok_per_s": "output tokens of num_successful per second",
    "ttft_mean_ms": "mean time to the first token, ms",
    "ttft_p50_ms": "median of the same, ms; like every percentile here, of however few samples there are",
    "ttft_p99_ms": "99th percentile of the same, ms",
    "tpot_mean_ms": "mean of (latency - TTFT) / (tokens - 1) over replies of two tokens or more, ms",
    "tpot_p50_ms": "median of the same, ms",
    "tpot_p99_ms": "99th percentile of the same, ms",
    "latency_mean_ms": "mean time to the last token, ms",
    "latency_p50_ms": "median of the same, ms",
    "latency_p99_ms": "99th percentile of the same, ms",
    "client": "object: the client's own figures under these names, 0 for none; null if it ran in several processes",
}
SERVER_KEYS = {
    "restarted": "list of names of replicas that were replaced during the trial",
    "failed": "list of names of actors that died during the trial",
    "actors": "list of names of the Serve actors seen after the trial",
}
FAILURE_KEYS = {
    "schema_version": "as in run.json",
    "trial_id": "level and repeat of the trial that has no result",
    "arm": "name of the arm",
    "repeat": "block, from 0",
    "stage": "service (it never came up) or trial (the measurement failed)",
    "error": "what was asked, what was found",
    "log": "path of the log to read, relative to the run directory; null if there is none",
}
EFFECTIVE_KEYS = {
    "schema_version": "as in run.json",
    "service_key": "hash of everything that makes two services the same",
    "declared_env": "object: the environment that the profile and cluster declare",
    "actors": "list of objects: name, kind, pid, env and constants, as read inside each Serve actor",
    "engine": "object: settings of the vLLM engine as the live service reports them; null without one",
    "flag_effects": "object: declared flag to the constants that Ray computed from it",
    "consequences": "object: other constants that differ from those under no declared flag, from and to",
    "warnings": "list of sentences, such as a declared flag that changes nothing in this Ray version",
    "isolation_env": "list of variables that keep services apart (ports, paths), so they differ between any two",
    "listener": "process that owns the HTTP port",
    "versions": "object: package to version, read inside the cluster",
    "hardware": "object: CPU model, num_cpus, memory in GiB and accelerators of each node",
}

LOOK_KEYS = {
    "look": "which look at the run this is, from 1; looking at the same points again is none",
    "points": "digest of the VALID points that were looked at",
    "num_blocks": "VALID blocks of the primary cells then",
    "num_planned": "planned blocks of the primary cells",
    "alpha": "the share of the error of 0.05 that this look had",
    "at": "ISO 8601, UTC",
}

INVALID_REASONS = {
    "no_samples": "no request completed or failed in the window",
    "no_success": "requests failed in the window and none succeeded",
    "error_ratio": "error_ratio above max_error_ratio",
    "window_cut_short": (
        "the client's window_s shorter than duration_s by more than max_window_shortfall_ratio, "
        "or nothing in flight in the last tenth of the window"
    ),
    "ramp_in_window": "the last client started inside the window",
    "offered_rate": "open loop: requests were sent at less than min_offered_ratio of offered_rps",
    "drift": "throughput trend over the window beyond max_drift_ratio, and its 95 % interval excludes 0",
    "in_flight": "closed loop: time-average number in flight below min_in_flight_ratio of concurrency",
    "replica_restart": "a replica was replaced during the trial",
    "actor_failed": "a Serve actor died during the trial",
    "task_error": "the locustfile's task raised during the trial",
    "client_cpu": "busiest client process above max_client_cpu_ratio of a core",
    "client_lag": "median lag of the client's event loop above max_client_lag_ratio of latency_p50_ms",
}


# ---- Files ----


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` if the body succeeds: existence means complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    with _replacing(path) as temporary:
        pq.write_table(samples, temporary, write_page_checksum=True)


def write_json(path: Path, obj: Any) -> None:
    """Write atomically. Raises `ValueError` for NaN and infinity, which are not JSON: use None."""
    text = json.dumps(obj, indent=2, allow_nan=False) + "\n"
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises `FileNotFoundError`, or `ValueError` that names `path` if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


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
    return pc.fill_null(pc.equal(samples["error"], UNFINISHED), False).to_numpy()


def completed_at_s(samples: pa.Table) -> np.ndarray:
    """When each request completed, s from the start of the window; +inf = never.

    Latency counts from the intended send where there is one (open loop), else from the actual send. A failure
    without a latency is taken to have completed when it was sent.
    """
    start_s = pc.coalesce(samples["intended_at_s"], samples["sent_at_s"]).to_numpy()
    latency_ms = pc.fill_null(samples["latency_ms"], 0.0).to_numpy()
    return np.where(_unfinished(samples), np.inf, start_s + latency_ms / 1000)


def _in_window(completed: np.ndarray, duration_s: float) -> np.ndarray:
    return (completed >= 0) & (completed < duration_s)


def _never_finished(samples: pa.Table, duration_s: float) -> np.ndarray:
    """Mask of the requests of the window that were still in flight after the drain."""
    return _unfinished(samples) & (samples["sent_at_s"].to_numpy() < duration_s)


_PERCENTILES = {
    "latency": {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999},
    "ttft": {"p50": 0.5, "p99": 0.99},
    "tpot": {"p50": 0.5, "p99": 0.99},
}


def compute_metrics(
    samples: pa.Table, duration_s: float, slo: Mapping[str, float | None]
) -> dict[str, float | int | None]:
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
    in_window = _in_window(completed, duration_s)
    succeeded = in_window & samples["ok"].to_numpy()
    num_successful = int(succeeded.sum())
    num_failed = int((in_window | _never_finished(samples, duration_s)).sum()) - num_successful
    total = num_successful + num_failed
    metrics: dict[str, float | int | None] = {
        "num_successful": num_successful,
        "num_failed": num_failed,
        "error_ratio": num_failed / total if total else None,
        "throughput_rps": num_successful / duration_s,
        "goodput_rps": None,
    }
    for side in ("input", "output"):
        tokens = samples[f"num_{side}_tokens"]
        told = tokens.null_count < len(tokens)
        num_tokens = pc.sum(tokens.filter(pa.array(succeeded)), min_count=0).as_py()
        metrics[f"{side}_throughput_tok_per_s"] = num_tokens / duration_s if told else None

    good = np.ones(num_successful, dtype=bool)
    judged = any(target is not None for target in slo.values())
    for prefix, labels in _PERCENTILES.items():
        per_request = samples[f"{prefix}_ms"].to_numpy()[succeeded]  # null is NaN
        values = per_request[~np.isnan(per_request)]
        target = slo.get(f"{prefix}_p99_ms")
        if target is not None:
            good &= ~(per_request > target) if prefix == "tpot" else per_request <= target
            judged &= len(values) > 0 or num_successful == 0
        metrics[f"{prefix}_mean_ms"] = float(values.mean()) if len(values) else None
        for label, p in labels.items():
            metrics[f"{prefix}_{label}_ms"] = percentile(values, p)
    if judged:
        metrics["goodput_rps"] = int(good.sum()) / duration_s
    return metrics


def whole_run(samples: pa.Table, duration_s: float) -> dict[str, float | int | None]:
    """`WHOLE_RUN_KEYS` but `client`: all of a run of `duration_s`, ramp-up and tail included, as LLM clients report it.

    That is for holding figures against those of such a client; what is compared between arms is the window's.
    Hence its rules: a reply of another length than asked counts, and percentiles are given however few values
    there are. None without a value.
    """
    short, long = (pc.fill_null(pc.starts_with(samples["error"], code), False) for code in (SHORT_REPLY, LONG_REPLY))
    completed = samples.filter(pc.or_(samples["ok"], pc.or_(short, long)))
    figures: dict[str, float | int | None] = {
        "duration_s": duration_s,
        "num_successful": len(completed),
        "num_failed": len(samples) - len(completed),
        "num_short": pc.sum(short, min_count=0).as_py(),
        "throughput_rps": len(completed) / duration_s,
    }
    for side in ("input", "output"):
        num_tokens = pc.sum(completed[f"num_{side}_tokens"], min_count=0).as_py()
        figures[f"{side}_throughput_tok_per_s"] = num_tokens / duration_s
    for prefix in ("ttft", "tpot", "latency"):
        values = completed[f"{prefix}_ms"].drop_null().to_numpy()
        p50, p99 = np.percentile(values, (50, 99)).tolist() if len(values) else (None, None)
        figures[f"{prefix}_mean_ms"] = float(values.mean()) if len(values) else None
        figures[f"{prefix}_p50_ms"], figures[f"{prefix}_p99_ms"] = p50, p99
    return figures


_BUNCHED_TPOT_MS, _MAX_BUNCHED_RATIO = 0.05, 0.1  # nothing generates a token in this time


def tokens_are_bunched(samples: pa.Table, duration_s: float) -> bool:
    """Whether more than a tenth of the streamed replies brought their tokens all at once: no stream, in fact."""
    inside = _in_window(completed_at_s(samples), duration_s) & samples["ok"].to_numpy()
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
    completed = completed[_in_window(completed, duration_s) & samples["ok"].to_numpy()]
    if not len(completed):
        return None
    counts, _ = np.histogram(completed, _NUM_SLICES, (0.0, duration_s))
    (slope, _), covariance = np.polyfit(np.arange(_NUM_SLICES), counts, 1, cov=True)
    half = _T_975_18DOF * np.sqrt(covariance[0, 0])
    low, mid, high = (float(value * _NUM_SLICES / counts.mean()) for value in (slope - half, slope, slope + half))
    return Drift(mid, low, high)


# ---- Validity ----


@dataclass
class Validity:
    """Codes of `INVALID_REASONS` that were broken (with a sentence each) or could not be checked."""

    reasons: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        """An unchecked rule does not invalidate; it is shown."""
        return not self.reasons

    def invalidate(self, code: str, detail: str) -> None:
        assert code in INVALID_REASONS, code
        self.reasons.append(code)
        self.details[code] = detail

    def judge(self, code: str, found: float | None, limit: float, detail: str) -> None:
        """INVALID if `found` is above `limit`, unchecked if nobody knows it. `detail` is a template of both."""
        if found is None:
            self.unchecked.append(code)
        elif found > limit:
            self.invalidate(code, detail.format(found=found, limit=limit))


def check_validity(
    samples: pa.Table,
    metrics: Mapping[str, float | int | None],
    *,
    concurrency: int | None,
    duration_s: float,
    client: Mapping[str, Any],
    server: Mapping[str, Any] | None,
    thresholds: Mapping[str, float],
) -> Validity:
    """Judge one trial by the rules of `INVALID_REASONS`.

    `metrics` are `compute_metrics` of the same samples and `duration_s`. `concurrency` is None in open loop,
    where `in_flight` does not apply. `client` has `CLIENT_KEYS`, `server` has `SERVER_KEYS` or is None; a
    fact that is missing or None makes its rule `unchecked`. `thresholds` has the fields of `config.ValidityConfig`.
    """
    validity = Validity()
    num_successful, num_failed = metrics["num_successful"] or 0, metrics["num_failed"] or 0
    num_requests = num_successful + num_failed
    most = _commonest_error(samples, duration_s)
    quoted = most.replace("{", "{{").replace("}", "}}")
    if not num_requests:
        validity.invalidate(
            "no_samples",
            f"No request completed in the window of {duration_s:g} s ({len(samples)} were recorded in all). "
            "Read client.log; if requests take longer than the window, raise duration_s.",
        )
        # One cause, one code: what follows from it is not judged.
        validity.unchecked += ["error_ratio", "drift"] + ([] if concurrency is None else ["in_flight"])
    elif not num_successful:
        validity.invalidate(
            "no_success",
            f"All {num_failed} requests of the window failed{most}. Read client.log and the service's logs.",
        )
        validity.unchecked += ["drift"]
    else:
        validity.judge(
            "error_ratio",
            metrics["error_ratio"],
            thresholds["max_error_ratio"],
            f"{{found:.2%}} of requests failed ({num_failed}{quoted}), more than {{limit:.2%}}. "
            "Failures are often fast: read the errors in samples.parquet and the service's logs.",
        )
        trend, limit = drift(samples, duration_s), thresholds["max_drift_ratio"]
        assert trend is not None, "metrics are of other samples"
        if abs(trend.ratio) > limit and not trend.ci_low <= 0 <= trend.ci_high:
            validity.invalidate(
                "drift",
                f"Throughput changed by {trend.ratio:+.0%} over the window (95 % interval "
                f"{trend.ci_low:+.0%} to {trend.ci_high:+.0%}), more than {limit:.0%}. "
                "Lengthen warmup_s (vLLM's client: raise num_prompts), or stop other work on these machines.",
            )
    if num_requests and concurrency is not None:
        found, limit = client.get("in_flight_mean"), thresholds["min_in_flight_ratio"]
        found = in_flight_mean(samples, duration_s) if found is None else found
        if found < limit * concurrency:
            validity.invalidate(
                "in_flight",
                f"On average {found:.4g} of {concurrency} requests were in flight, fewer than {limit:.0%}. "
                "Either the client did not keep up (give it more processes, or a machine of its own), "
                "or requests failed at once (see the errors).",
            )

    window_s, limit = client.get("window_s"), thresholds["max_window_shortfall_ratio"]
    # In flight, not completions: with latencies as long as the window completions may well stop early, load does not.
    # In open loop an idle tenth may be chance; with >= 100 requests it has a probability of e^-10 or so.
    expect_load = num_requests >= (100 if concurrency is None else 1)
    if window_s is not None and window_s < duration_s * (1 - limit):
        validity.invalidate(
            "window_cut_short",
            f"The client offered load for {window_s:g} s of {duration_s:g} s, short by more than "
            f"{limit:.1%}. Read client.log for why it stopped.",
        )
    elif expect_load and in_flight_mean(samples, duration_s, 0.9 * duration_s) == 0:
        validity.invalidate(
            "window_cut_short",
            f"No request was in flight in the last tenth of the window of {duration_s:g} s, "
            "where there should always be some. Read client.log for why it stopped.",
        )
    elif window_s is None:
        validity.unchecked.append("window_cut_short")
    _check_client(validity, metrics["latency_p50_ms"], client, thresholds)
    _check_server(validity, server or {})
    return validity


def _commonest_error(samples: pa.Table, duration_s: float) -> str:
    counted = _in_window(completed_at_s(samples), duration_s) | _never_finished(samples, duration_s)
    errors = Counter(samples["error"].filter(pa.array(counted)).drop_null().to_pylist())
    return "".join(f", most often with {error}" for error, _ in errors.most_common(1))


def _check_client(
    validity: Validity, p50_ms: float | None, client: Mapping[str, Any], thresholds: Mapping[str, float]
) -> None:
    """Whether we measured the service or the client."""
    validity.judge(
        "ramp_in_window",
        client.get("all_clients_started_at_s"),
        0,
        "The last client started {found:.3g} s into the window, not before it. Lengthen warmup_s.",
    )
    validity.judge(
        "task_error",
        client.get("num_task_errors"),
        0,
        "The locustfile's task raised {found} times, none is allowed: what it found wrong is in client.log. "
        "Mark a bad reply with response.failure() instead.",
    )
    sent_rps, offered_rps, limit = client.get("sent_rps"), client.get("offered_rps"), thresholds["min_offered_ratio"]
    if sent_rps is not None and offered_rps is not None and sent_rps < limit * offered_rps:
        validity.invalidate(
            "offered_rate",
            f"Requests were sent at {sent_rps:.4g}/s, less than {limit:.0%} of the {offered_rps:g}/s offered: all "
            "clients waited for replies. Offer less, or raise the concurrency.",
        )
    validity.judge(
        "client_cpu",
        client.get("cpu_ratio"),
        thresholds["max_client_cpu_ratio"],
        "The busiest client process used {found:.0%} of a core, more than {limit:.0%}. "
        "Give the client more processes, or a machine of its own.",
    )
    lag_ms, limit = client.get("lag_p50_ms"), thresholds["max_client_lag_ratio"]
    validity.judge(
        "client_lag",
        None if p50_ms is None else lag_ms,
        limit * (p50_ms or 0),
        f"The client's event loop lagged by {{found:.3g}} ms (median), more than {limit:.0%} of the "
        f"median latency of {p50_ms or 0:.3g} ms. Give the client more processes, or a machine of its own.",
    )


def _check_server(validity: Validity, server: Mapping[str, Any]) -> None:
    """Whether the service that ended the trial is the one that began it."""
    for code, key, what in (("replica_restart", "restarted", "replaced"), ("actor_failed", "failed", "lost")):
        names = server.get(key)
        if names is None:
            validity.unchecked.append(code)
        elif names:
            validity.invalidate(
                code,
                f"{len(names)} {what} during the trial ({', '.join(names)}), none is allowed. "
                "Read the service's logs for the cause (memory, health checks, an exception).",
            )


# ---- Summary ----


def summary_row(identity: Mapping[str, Any], trial: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A row of the summary: what the plan knows, and what `trial.json` adds once the trial is complete.

    `identity` may hold any summary column. `unchecked` rules go to `notes` as `unchecked:<code>`.
    """
    row = dict(identity)
    if trial is not None:
        client = trial["client"]
        row |= trial["metrics"]
        row |= {
            "started_at": trial["started_at"],
            "duration_s": trial["duration_s"],
            "latency_resolution_ms": client.get("latency_resolution_ms"),
            "client_cpu_ratio": client.get("cpu_ratio"),
            "valid": trial["valid"],
            "invalid_reasons": ";".join(trial["invalid_reasons"]),
            "notes": ";".join([*trial["notes"], *(f"unchecked:{code}" for code in trial["unchecked"])]),
        }
    return row


def summary_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows to a table of exactly `SUMMARY_COLUMNS`; a missing key is null.

    Raises `ValueError` for an unknown key or a value of another type.
    """
    if unknown := {key for row in rows for key in row} - set(SUMMARY_COLUMNS):
        raise ValueError(f"not summary columns: {sorted(unknown)}; they are listed in results.SUMMARY_COLUMNS")
    schema = pa.schema([(name, column.dtype) for name, column in SUMMARY_COLUMNS.items()])
    return pa.Table.from_pylist(list(rows), schema=schema)


def write_summary(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `summary.parquet` and `summary.csv` in `directory`, each atomically."""
    table = summary_table(rows)
    with _replacing(directory / "summary.parquet") as temporary:
        pq.write_table(table, temporary)
    with _replacing(directory / "summary.csv") as temporary:
        pyarrow.csv.write_csv(table, temporary)

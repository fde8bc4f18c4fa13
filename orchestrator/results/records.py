"""What does each file of a run directory hold? The one owner of their keys and columns, and of how they are written."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

SCHEMA_VERSION = 1


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


# ---- Files ----


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` if the body succeeds: existence means complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, obj: Any) -> None:
    """Write atomically. Raises `ValueError` for NaN and infinity, which are not JSON: use None."""
    text = json.dumps(obj, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises `FileNotFoundError`, or `ValueError` that names `path` if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


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
        raise ValueError(f"not summary columns: {sorted(unknown)}; they are listed in records.SUMMARY_COLUMNS")
    schema = pa.schema([(name, column.dtype) for name, column in SUMMARY_COLUMNS.items()])
    return pa.Table.from_pylist(list(rows), schema=schema)


def write_summary(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `summary.parquet` and `summary.csv` in `directory`, each atomically."""
    table = summary_table(rows)
    with replacing(directory / "summary.parquet") as temporary:
        pq.write_table(table, temporary)
    with replacing(directory / "summary.csv") as temporary:
        pyarrow.csv.write_csv(table, temporary)

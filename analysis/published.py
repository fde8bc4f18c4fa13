"""Published or older results as a run directory: what did others measure, and what can it not support?

`import_source` reads one of three formats and writes what the orchestrator would have written, so that
`compare`, `report` and the plots work on it. What the source does not tell is null, a rule that it does not allow to
check is `unchecked`, and `notes` (the codes of `NOTES`) say what its figures are not.

    locust          Locust's `--json-file` (one list, or several JSON values in one file), a file a level; or a
                    summary `.csv`: concurrency,rps,mean_latency_ms,p50_ms,p99_ms,num_requests, a row a level
    vllm            `vllm bench serve --save-result`, with or without `--save-detailed` or `--append-result`
    streaming-csv   the study's streaming client, a row a level

**A level** is a concurrency. It comes from the content (`max_concurrency`, column `concurrency`), else from the
file name: `c128` or `concurrency_128` as a word of it, else `_128` at its end. The number of replicas comes from the
name alone (`8_replicas`). Where content, a word of the name and the option disagree, or nothing tells the
concurrency, the import is refused. Files of several replica counts become an arm each.

**The window** is the whole run: no source tells where its ramp-up ended. Open-loop results are refused. Times in a
local time zone (vLLM's `date`, the streaming `timestamp`) are not taken over.
"""

import csv
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator import paths
from orchestrator.journal import Journal, now
from orchestrator.load.level import Level
from orchestrator.results.records import (
    ClientFacts,
    Declaration,
    Metrics,
    PlannedArm,
    PlanRecord,
    PrimaryCell,
    RunRecord,
    SummaryRow,
    TrialRecord,
    keys,
)
from orchestrator.results.samples import SAMPLES_SCHEMA, compute_metrics, percentile, write_samples
from orchestrator.results.validity import RULES, Validity

NOTES = {
    "imported": "not measured by the orchestrator: what it checks of a live service and client is unknown",
    "single_run": "one run a level, so no interval between deployments",
    "whole_run": "figures are of the whole run: ramp-up and the tail at the end are in them",
    "bucketed_percentiles": "percentiles come from a histogram; latency_resolution_ms is its bucket's width at the p99",
    "failures_in_latency": "failed requests are in the latencies: the source does not tell them apart",
    "failures_unknown": "the source counts requests, not successes: throughput may hold failures",
    "percentiles_of_worker_means": "the source averaged its workers' percentiles: no percentile, so left out",
    "itl_not_tpot": "the source's tpot is of gaps between chunks: left out; tpot_mean_ms follows from its mean times",
}
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
_ABOVE_ZERO = ("num_requests", "rps", "duration", "benchmark_duration")
_WHOLE = re.compile("num_.*|.*concurrency|completed|failed|count")
_VLLM_DETAIL = ("start_times", "ttfts", "itls", "output_lens", "errors")

# Our name of a time to the source's.
_UNARY_TIMES = {"latency_mean_ms": "mean_latency_ms", "latency_p50_ms": "p50_ms", "latency_p99_ms": "p99_ms"}
_STREAMING_TIMES = {
    **{"latency_mean_ms": "e2e_avg", "latency_p50_ms": "e2e_p50", "latency_p95_ms": "e2e_p95"},
    **{"latency_p99_ms": "e2e_p99", "ttft_mean_ms": "ttft_avg", "ttft_p50_ms": "ttft_p50", "ttft_p99_ms": "ttft_p99"},
}
_VLLM_TIMES = {
    f"{ours}_{label}_ms": f"{word}_{theirs}_ms"
    for ours, theirs in (("latency", "e2el"), ("ttft", "ttft"), ("tpot", "tpot"))
    for label, word in {**{p: p for p in _PERCENTILES}, "mean": "mean", "p50": "median", "p999": "p99.9"}.items()
}
_Record = dict[str, Any]


@dataclass
class _Point:
    """One level as its source tells it. `metrics` may leave out what is null, and hold what we have no column for."""

    path: Path
    raw: bytes  # what is kept of the file
    concurrency: int | None  # None until settled where the content does not tell
    duration_s: float
    metrics: _Record
    notes: list[str]
    latency_resolution_ms: float | None = None
    started_at: str | None = None
    samples: pa.Table | None = None
    num_replicas: int | None = None


def import_source(
    source: Path,
    kind: str,
    workload: str,
    profile: str,
    outputs: Path,
    concurrency: int | None = None,
    num_replicas: int | None = None,
) -> paths.RunPaths:
    """Make a run directory below `outputs` of a file, or of the files in a directory (not in those below it).

    `concurrency` and `num_replicas` are for what content and file names do not tell. The arm is called as the profile,
    with `,num_replicas=8` where the files differ in that. `raw/` keeps the file, but for texts that a model generated.

    Raises `ValueError` that says which file, what was found and what is expected; no run directory is left then.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; available: {', '.join(KINDS)}")
    if not workload.strip() or not profile.strip():
        raise ValueError("--workload or --profile is empty; give the name that tables and plots are to show")
    suffix = ".csv" if kind == "streaming-csv" else ".json"
    try:
        found = sorted(source.glob(f"[!.]*{suffix}")) if source.is_dir() else [source]
        files = {path: path.read_bytes() for path in found}
    except OSError as error:
        raise ValueError(f"cannot read {error.filename or source}: {error.strerror}") from error
    if not files:
        raise ValueError(f"{source} has no *{suffix} file, which --kind {kind} expects")
    points = [point for path, data in files.items() for point in _READERS[kind](path, data)]
    for point in points:
        _settle(point, concurrency, num_replicas)
    points.sort(key=lambda point: (point.num_replicas or 0, point.concurrency))
    for one, other in pairwise(points):
        if (one.num_replicas, one.concurrency) == (other.num_replicas, other.concurrency):
            raise ValueError(f"{one.path} and {other.path} both have concurrency {one.concurrency}; import one alone")
        if one.num_replicas is None and other.num_replicas:  # None sorts first
            raise ValueError(f"{one.path} does not tell its replicas in its name (like 8_replicas.json), others do")
    names = {"workload": workload, "profile": profile, "cluster": "imported"}
    sources = [{"name": path.name, "sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()]
    try:
        run = paths.create_run_dir(outputs, datetime.now())
    except OSError as error:
        raise ValueError(f"cannot make a run directory below {outputs}: {error}") from error
    try:
        _write(run, points, names, {"kind": kind, "files": sources})
    except BaseException:
        shutil.rmtree(run.root)
        raise
    return run


def _settle(point: _Point, concurrency: int | None, num_replicas: int | None) -> None:
    """Fill in concurrency and replicas by the rule of the module's docstring."""
    path, content, name = point.path, point.concurrency, point.path.stem.lower()
    replicas = re.search(r"(?<![a-z0-9])(?:(\d{1,6})[_-]?replicas?|replicas?[_=-]?(\d{1,6}))(?![a-z0-9])", name)
    count = int(replicas[1] or replicas[2]) if replicas else None
    point.num_replicas = _agreed(path, "num-replicas", {"file name": count, "--num-replicas": num_replicas})
    rest = name.replace(replicas[0], "") if replicas else name
    named = re.search(r"(?<![a-z0-9])c(?:oncurrency[_=-]?)?(\d{1,6})(?![a-z0-9]|\.\d)", rest)
    if named is None and content is None:
        named = re.search(r"_(\d{1,6})$", rest)
    told = {"content": content, "file name": int(named[1]) if named else None, "--concurrency": concurrency}
    point.concurrency = _agreed(path, "concurrency", told)
    if point.concurrency is None:
        raise ValueError(f"{path} tells no concurrency, in content or name (like x_c128.json); give --concurrency")


def _agreed(path: Path, what: str, told: Mapping[str, int | None]) -> int | None:
    known = {f"{value} ({by})": value for by, value in told.items() if value is not None}
    if len(set(known.values())) > 1:
        raise ValueError(f"{path}: contradictory {what}: {', '.join(known)}; rename the file or correct --{what}")
    if any(value < 1 for value in known.values()):
        raise ValueError(f"{path}: {what} must be at least 1, found {', '.join(known)}")
    return next(iter(known.values()), None)


def _json_values(path: Path, data: bytes) -> list[Any]:
    """All JSON values of a file, one after the other (`--append-result`, or several processes' output)."""
    values: list[Any] = []
    try:
        text = data.decode("utf-8-sig").strip()
        while text or not values:
            value, end = json.JSONDecoder().raw_decode(text)
            values.append(value)
            text = text[end:].lstrip()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is empty, cut off or not JSON: {error}") from error
    return values


def _csv_rows(path: Path, data: bytes, required: Iterable[str], optional: Iterable[str] = ()) -> list[_Record]:
    """The figures of each row."""
    try:
        reader = csv.DictReader(data.decode("utf-8-sig").splitlines(), skipinitialspace=True)
        rows, header = list(reader), reader.fieldnames or []
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not CSV: {error}") from error
    if missing := [name for name in (*required, *optional) if name not in header]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; found {', '.join(header)[:200] or 'nothing'}")
    if not rows:
        raise ValueError(f"{path} has a header and no row")
    if uneven := [number for number, row in enumerate(rows, 1) if None in row or None in row.values()]:
        raise ValueError(f"{path} row {uneven[0]} has not as many cells as the header; was it cut off?")
    return [_figures(row, f"{path} row {number}", required, optional) for number, row in enumerate(rows, 1)]


def _figures(record: _Record, where: str, required: Iterable[str], optional: Iterable[str] = ()) -> _Record:
    """Numbers from 0 to 2^53 by name, whole ones as int; an optional one may be absent, null or an empty cell."""
    figures: _Record = dict.fromkeys(optional)
    for key in (*required, *optional):
        value = record.get(key)
        if key in figures and value in (None, ""):
            continue
        try:
            figure = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            figure = math.nan
        if not 0 <= figure <= 2**53:
            raise ValueError(f"{where}: {key} must be a finite number, 0 or more, found {value!r:.40}")
        if _WHOLE.fullmatch(key) and not figure.is_integer():
            raise ValueError(f"{where}: {key} must be a whole number, found {figure}")
        if key in _ABOVE_ZERO and not figure:
            raise ValueError(f"{where}: {key} is 0, so nothing was measured")
        figures[key] = int(figure) if figure.is_integer() else figure
    return figures


def _metrics(num_successful: int, num_failed: int | None, duration_s: float, figures: _Record) -> _Record:
    """A percentile that another computed needs what one of `percentile` needs: n(1-p) >= 10."""
    scarce = tuple(f"_{label}_ms" for label, p in _PERCENTILES.items() if round(num_successful * (1 - p), 6) < 10)
    return {
        "num_successful": num_successful,
        "num_failed": num_failed,
        "error_ratio": None if num_failed is None else num_failed / (num_successful + num_failed),
        "throughput_rps": num_successful / duration_s,
        **{name: figure for name, figure in figures.items() if not name.endswith(scarce)},
    }


def bucket_width_ms(latency_ms: float) -> float:
    """Width of Locust's histogram at a latency; it keeps two digits (`locust.stats.bucket_response_time`)."""
    return 1.0 if latency_ms < 100 else 10.0 if latency_ms < 1000 else 100.0 if latency_ms < 10000 else 1000.0


def _locust(path: Path, data: bytes) -> Iterator[_Point]:
    """All entries of a file (one a URL) as one point; of a CSV, the study's summary of such files, a point a row.

    The run lasts from the first `start_time` (the first completion) to the last `last_request_timestamp`; requests
    over that are the study's `rps`. Locust counts a failure in `num_requests` and in the times, too.
    """
    if path.suffix.lower() == ".csv":
        for row in _csv_rows(path, data, ("concurrency", "rps", "num_requests"), _UNARY_TIMES.values()):
            n, duration_s, p99_ms = row["num_requests"], row["num_requests"] / row["rps"], row["p99_ms"]
            metrics = _metrics(n, None, duration_s, {ours: row[theirs] for ours, theirs in _UNARY_TIMES.items()})
            width_ms = None if p99_ms is None else bucket_width_ms(p99_ms)
            notes = ["bucketed_percentiles", "failures_unknown"]
            yield _Point(path, data, row["concurrency"], duration_s, metrics, notes, width_ms)
        return
    found: list[Any] = []
    for value in _json_values(path, data):
        if not isinstance(value, list):
            raise ValueError(f"{path}: --kind locust expects a list of entries (--json-file), found {value!r:.80}")
        found += value
    entries, histogram = [], Counter[float]()
    for index, entry in enumerate(found):
        where = f"{path} entry {index}"
        if not isinstance(entry, dict) or not isinstance(entry.get("response_times"), dict):
            raise ValueError(f"{where} is not Locust's: no response_times in {entry!r:.80}")
        if entry.get("num_requests") == 0:
            continue
        times = ("total_response_time", "start_time", "last_request_timestamp")
        entries.append(_figures(entry, where, ("num_requests", "num_failures", *times)))
        for key, count in entry["response_times"].items():
            bucket = _figures({"response time": key, "count": count}, where, ("response time", "count"))
            histogram[bucket["response time"]] += bucket["count"]
    if not entries:
        raise ValueError(f"{path}: no requests in {len(found)} entries, so nothing was measured")
    n, num_failed = (sum(entry[key] for entry in entries) for key in ("num_requests", "num_failures"))
    if n != histogram.total() or num_failed > n:
        says = f"{n} requests, {num_failed} failures, {histogram.total()} in response_times"
        raise ValueError(f"{path} contradicts itself: {says}")
    start_s = min(entry["start_time"] for entry in entries)
    end_s = max(entry["last_request_timestamp"] for entry in entries)
    if not start_s < end_s < 1e11:
        raise ValueError(f"{path}: start_time {start_s:g} to last_request_timestamp {end_s:g} s is no run")
    figures: _Record = {}
    if num_failed < n:
        times_ms = np.repeat(list(histogram), list(histogram.values()))
        figures = {f"latency_{label}_ms": percentile(times_ms, p) for label, p in _PERCENTILES.items()}
        figures["latency_mean_ms"] = sum(entry["total_response_time"] for entry in entries) / n
    metrics = _metrics(n - num_failed, num_failed, end_s - start_s, figures)
    notes = ["bucketed_percentiles", *(["failures_in_latency"] if num_failed else [])]
    width_ms = bucket_width_ms(figures.get("latency_p99_ms") or max(histogram))
    started_at = datetime.fromtimestamp(start_s, UTC).isoformat(timespec="seconds")
    yield _Point(path, data, None, end_s - start_s, metrics, notes, width_ms, started_at)


def _vllm(path: Path, data: bytes) -> Iterator[_Point]:
    """A point a result of the file; of the requests themselves where `--save-detailed` has them."""
    values = _json_values(path, data)
    for value in values:
        if not isinstance(value, dict) or not {"duration", "completed"} <= set(value):
            raise ValueError(f"{path} is not from vllm bench serve: no duration or completed in {value!r:.80}")
        rate = value.get("request_rate")
        if rate not in (None, "inf", math.inf) or value.get("ramp_up_strategy"):
            raise ValueError(f"{path} is of an open loop (request_rate {rate}); only closed-loop results are imported")
        optional = ("failed", "num_prompts", "max_concurrency", "total_input_tokens", "total_output_tokens")
        told = _figures(value, str(path), ("duration", "completed"), (*optional, *_VLLM_TIMES.values()))
        duration_s, completed, failed = told["duration"], told["completed"], told["failed"]
        if failed is None and told["num_prompts"] is not None:  # older versions
            failed = max(told["num_prompts"] - completed, 0)
        if not completed and not failed:
            raise ValueError(f"{path}: completed is 0, so nothing was measured")
        # vLLM writes 0 for a time of which there was no value.
        figures = {ours: told[theirs] or None for ours, theirs in _VLLM_TIMES.items()}
        for side in ("input", "output"):
            if (tokens := told[f"total_{side}_tokens"]) is not None:
                figures[f"{side}_throughput_tok_per_s"] = tokens / duration_s
        metrics = _metrics(completed, failed, duration_s, figures)
        notes = ["failures_unknown"] if failed is None else []
        kept = {key: inner for key, inner in value.items() if key != "generated_texts"}
        raw = data if len(values) == 1 and len(kept) == len(value) else json.dumps(kept).encode()
        point = _Point(path, raw, told["max_concurrency"], duration_s, metrics, notes)
        if all(isinstance(value.get(key), list) and value[key] for key in _VLLM_DETAIL):
            point.samples, point.latency_resolution_ms = _vllm_samples(path, value), 0.0
            found = compute_metrics(point.samples, duration_s, {})
            counted = found.num_successful, found.num_failed
            point.metrics = asdict(found)
            if counted[0] != completed or failed not in (None, counted[1]):
                says = f"{completed} completed and {failed} failed in {duration_s:g} s"
                raise ValueError(f"{path} contradicts itself: {says}, by its lists {counted[0]} and {counted[1]}")
        yield point


def _vllm_samples(path: Path, value: _Record) -> pa.Table:
    """Rows of `SAMPLES_SCHEMA`; 0 is the first send. Latency is TTFT + all gaps, as in vLLM itself.

    vLLM marks no success: a request succeeded if it has no error and a first token. A failure's latency is not told.
    """
    try:
        gaps = [math.fsum(request_gaps) for request_gaps in value["itls"]]
        times = np.array([value["start_times"], value["ttfts"], gaps, value["output_lens"]], float)
        if not ((times >= 0) & np.isfinite(times)).all():
            raise ValueError("a time or length is negative or not finite")
        start_s, ttft_s, gaps_s, tokens = times
        errors = [str(error or "") for error in value["errors"]]
        ok = np.array([not error for error in errors]) & ((ttft_s > 0) | (tokens > 0))
        columns = dict.fromkeys(SAMPLES_SCHEMA.names, [None] * len(ok)) | {
            # A start of 0 is one that failed before it was sent.
            "sent_at_s": np.maximum(start_s - start_s[start_s > 0].min(initial=math.inf), 0.0),
            "latency_ms": pa.array((ttft_s + gaps_s) * 1000, mask=~ok),
            "ttft_ms": pa.array(ttft_s * 1000, mask=~ok),
            "tpot_ms": pa.array(gaps_s * 1000 / np.maximum(tokens - 1, 1), mask=~(ok & (tokens > 1))),
            "num_input_tokens": value.get("input_lens") or [None] * len(ok),
            "num_output_tokens": value["output_lens"],
            "ok": ok,
            "error": [None if good else error or "no token" for good, error in zip(ok, errors, strict=True)],
            "client_process": np.zeros(len(ok), np.int16),
        }
        return pa.table(columns, schema=SAMPLES_SCHEMA)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{path}: {', '.join(_VLLM_DETAIL)} cannot be read, or differ in length: {error}") from error


def _streaming_csv(path: Path, data: bytes) -> Iterator[_Point]:
    """Requests/s is num_requests / benchmark_duration, tokens/s total_tokens / benchmark_duration; s become ms.

    The client averages the percentiles of its workers, so with several of them there is none. Its `tpot` pools the
    gaps between chunks (median below 1 us, as chunks arrive together), so TPOT is taken from the mean times
    instead: exact where every request has the same number of chunks (`max_tokens`).
    """
    required = ("concurrency", "num_requests", "num_workers", "max_tokens", "benchmark_duration", "total_tokens")
    for row in _csv_rows(path, data, (*required, *_STREAMING_TIMES.values())):
        n, tokens, duration_s = row["num_requests"], row["total_tokens"], row["benchmark_duration"]
        one_worker = row["num_workers"] == 1
        times = {ours: theirs for ours, theirs in _STREAMING_TIMES.items() if one_worker or "_mean_" in ours}
        figures = {ours: 1000 * row[theirs] for ours, theirs in times.items()}
        gaps_ms = figures["latency_mean_ms"] - figures["ttft_mean_ms"]
        if tokens == n * row["max_tokens"] and tokens > n and gaps_ms >= 0:
            figures["tpot_mean_ms"] = gaps_ms / (tokens / n - 1)
        figures["output_throughput_tok_per_s"] = tokens / duration_s
        notes = ["failures_unknown", "itl_not_tpot", *([] if one_worker else ["percentiles_of_worker_means"])]
        yield _Point(path, data, row["concurrency"], duration_s, _metrics(n, None, duration_s, figures), notes)


_READERS = {"locust": _locust, "vllm": _vllm, "streaming-csv": _streaming_csv}
KINDS = tuple(_READERS)


def _judged(metrics: Metrics) -> Validity:
    """The rules that a total can be judged by; all others are unchecked."""
    validity, checked, limit = Validity(), ["no_samples"], 0.01  # limit as in conf/config.yaml
    if metrics.error_ratio is not None:
        checked += ["no_success", "error_ratio"]
        if metrics.error_ratio > limit:
            text = f"{metrics.error_ratio:.2%} of requests failed ({metrics.num_failed}), more than {limit:.2%}."
            validity.invalidate("error_ratio" if metrics.num_successful else "no_success", text)
    validity.unchecked += [rule.code for rule in RULES if rule.code not in checked]
    return validity


def _write(run: paths.RunPaths, points: list[_Point], names: dict[str, str], origin: _Record) -> None:
    """`run.json` comes last, so a directory that has one is whole. `names`: workload, profile and cluster."""
    several_arms = points[0].num_replicas != points[-1].num_replicas
    arms, primary = [], []
    with closing(Journal(run)) as journal:
        for replicas, group in groupby(points, key=lambda point: point.num_replicas):
            fixed = {"workload.num_replicas": str(replicas)} if several_arms else {}
            axes = {"profile": names["profile"]} | fixed
            name = paths.safe_name(names["profile"] + (f",num_replicas={replicas}" if several_arms else ""))
            key = hashlib.sha256(json.dumps([origin, names, axes], sort_keys=True).encode()).hexdigest()[:12]
            measured = list(group)
            for point in measured:
                planned = _planned_row(run.run_id, name, key, point, names, fixed)
                journal.expect([planned])
                _keep_source(run, planned, point)
                journal.record(_trial(planned, point))
            levels = [_level(point).name for point in measured]
            arms.append(PlannedArm(name=name, axes=axes, levels=levels, copy=0, service_key=key))
            highest = levels[-1]
            primary.append(
                PrimaryCell(axes=fixed, baseline=name, candidate=None, metric="throughput_rps", level=highest)
            )
        plan = PlanRecord(
            arms=arms,
            services=[[f"{arm.name} r0"] for arm in arms],
            trials=[f"{row.arm}/{row.trial_id}" for row in journal.rows],
        )
        record = RunRecord(
            run_id=run.run_id,
            status="complete",
            started_at=now(),  # of the import; the trials have their own
            command=["import", f"--kind={origin['kind']}", *(file["name"] for file in origin["files"])],
            seed=None,
            plan=plan,
            compare=Declaration(treatment=["profile"], baseline=None, repeats=1, redeploy="per_repeat"),
            primary_cells=primary,
            provenance={"imported": origin},
        )
        journal.begin(record)
        journal.finish("complete")


def _level(point: _Point) -> Level:
    assert point.concurrency is not None, "open loops are refused"
    return Level.of_clients(point.concurrency)


def _planned_row(
    run_id: str, arm: str, service_key: str, point: _Point, names: dict[str, str], fixed: dict[str, str]
) -> SummaryRow:
    return SummaryRow(
        run_id=run_id,
        arm=arm,
        trial_id=paths.trial_id(_level(point).name, 0),
        repeat=0,
        service_key=service_key,
        load_mode="closed",
        concurrency=point.concurrency,
        num_replicas=point.num_replicas,
        swept=fixed,
        workload=names["workload"],
        profile=names["profile"],
        cluster=names["cluster"],
    )


def _keep_source(run: paths.RunPaths, row: SummaryRow, point: _Point) -> None:
    level = _level(point).name
    raw = run.raw_dir(row.arm, level, row.repeat)
    raw.mkdir(parents=True)
    (raw / point.path.name).write_bytes(point.raw)
    if point.samples is not None:
        write_samples(run.samples(row.arm, level, row.repeat), point.samples)


def _trial(row: SummaryRow, point: _Point) -> TrialRecord:
    """The record of an imported trial. What its source does not tell is null: server, drain_s."""
    metrics = Metrics(**{name: point.metrics.get(name) for name in keys(Metrics)})
    validity = _judged(metrics)
    return TrialRecord(
        trial_id=row.trial_id,
        run_id=row.run_id,
        arm=row.arm,
        repeat=row.repeat,
        level=_level(point).name,
        load_mode=row.load_mode,
        concurrency=row.concurrency,
        service_key=row.service_key,
        started_at=point.started_at,
        duration_s=point.duration_s,
        warmup_s=0.0,  # none is set apart, so no ramp-up within it
        ramp_up_s=0.0,
        client=ClientFacts(latency_resolution_ms=point.latency_resolution_ms),
        metrics=metrics,
        valid=validity.valid,
        invalid_reasons=validity.reasons,
        invalid_details=validity.details,
        unchecked=validity.unchecked,
        notes=["imported", "single_run", "whole_run", *point.notes],
    )

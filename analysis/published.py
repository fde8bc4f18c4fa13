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

**The window** is the whole run: no source tells where its ramp-up ended. Not covered: open-loop results, which
are refused, and times in a local time zone (vLLM's `date`, the streaming `timestamp`), which are not taken over.
"""

import csv
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from orchestrator import paths, results
from orchestrator.paths import RunPaths

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
_columns = list(results.SUMMARY_COLUMNS)
METRICS = tuple(_columns[_columns.index("num_successful") : _columns.index("tpot_p99_ms") + 1])
_Metrics = dict[str, float | int | None]
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
_MAX_ERROR_RATIO = 0.01  # as in conf/config.yaml
_MAX_CONTRADICTION = 0.01  # relative, between figures of a source that should be the same

_UNARY_CSV = ("concurrency", "rps", "mean_latency_ms", "p50_ms", "p99_ms", "num_requests")
_STREAMING_CSV = (
    *("concurrency", "num_requests", "num_workers", "max_tokens", "benchmark_duration", "total_tokens"),
    *("system_tokens_per_sec", "ttft_avg", "ttft_p50", "ttft_p99", "e2e_avg", "e2e_p50", "e2e_p95", "e2e_p99"),
)
_VLLM_DETAIL = ("start_times", "ttfts", "itls", "output_lens", "errors")


class _File(NamedTuple):
    """A source file, read once, so that what is hashed, parsed and kept is the same."""

    path: Path
    data: bytes


@dataclass
class _Point:
    """One level as its source tells it. `metrics` may leave out what is null."""

    file: _File
    where: str  # file and place in it, for messages
    duration_s: float
    metrics: _Metrics
    notes: list[str] = field(default_factory=list)
    concurrency: int | None = None  # None until settled where the content does not tell
    num_replicas: int | None = None
    started_at_s: float | None = None  # since 1970, UTC
    latency_resolution_ms: float | None = None
    samples: pa.Table | None = None
    raw: bytes | None = None  # what is kept of the file, if not all

    @property
    def level(self) -> str:
        return paths.level_name(concurrency=self.concurrency)


class _Arm(NamedTuple):
    name: str
    axes: dict[str, str]
    points: list[_Point]  # by concurrency


def import_source(
    source: Path,
    kind: str,
    workload: str,
    profile: str,
    outputs: Path,
    concurrency: int | None = None,
    num_replicas: int | None = None,
    cluster: str = "imported",
) -> RunPaths:
    """Make a run directory below `outputs` of a file, or of the files in a directory (not in those below it).

    `kind` is locust, vllm or streaming-csv. `concurrency` is for a single file that does not tell it. `num_replicas`
    stays null where neither it nor a file name tells. The arm is called as the profile, with `,num_replicas=8`
    where the files differ in that. `raw/` keeps the original file, but for texts that a model generated.

    Raises `ValueError` that says which file, what was found and what is expected; no run directory is left then.
    """
    if kind not in _READERS:
        raise ValueError(f"unknown kind {kind!r}; available: {', '.join(_READERS)}")
    for name, text in (("workload", workload), ("profile", profile), ("cluster", cluster)):
        if not text.strip():
            raise ValueError(f"--{name} is empty; give the name that tables and plots are to show")
    files = _read_files(source, kind)
    if concurrency is not None and len(files) > 1:
        raise ValueError(f"--concurrency is for a single file, {source} has {len(files)}; name them like x_c128.json")
    points = [point for file in files for point in _READERS[kind](file)]
    for point in points:
        _settle(point, concurrency, num_replicas)
    arms = _arms(points, profile)
    names = {"workload": workload, "profile": profile, "cluster": cluster}
    try:
        run = paths.create_run_dir(outputs, datetime.now())
    except OSError as error:
        raise ValueError(f"cannot make a run directory below {outputs}: {error}") from error
    try:
        _write(run, arms, files, kind, names, ["import", source.name, f"--kind={kind}"])
    except BaseException:
        shutil.rmtree(run.root)
        raise
    return run


# ---- Files, levels and arms ----


def _read_files(source: Path, kind: str) -> list[_File]:
    suffix = ".csv" if kind == "streaming-csv" else ".json"
    try:
        found = [source]
        if source.is_dir():
            present = sorted(path for path in source.iterdir() if not path.name.startswith("."))
            found = [path for path in present if path.is_file() and path.suffix.lower() == suffix]
            if not found:
                names = ", ".join(path.name for path in present[:5]) or "nothing"
                raise ValueError(f"{source} has no *{suffix} file, which --kind {kind} expects; found {names}")
        return [_File(path, path.read_bytes()) for path in found]
    except OSError as error:
        raise ValueError(f"cannot read {error.filename or source}: {error.strerror}") from error


def _settle(point: _Point, concurrency: int | None, num_replicas: int | None) -> None:
    """Fill in concurrency and replicas by the rule of the module's docstring."""
    path, content = point.file.path, point.concurrency
    replicas, rest = _named(r"(?:^|[^a-z0-9])(?:(\d+)[_-]?replicas?|replicas?[_=-]?(\d+))(?![a-z0-9])", path.stem)
    point.num_replicas = _agreed("num-replicas", path, {"file name": replicas, "--num-replicas": num_replicas})
    named, _ = _named(r"(?:^|[^a-z0-9])c(?:oncurrency[_=-]?)?(\d+)(?![a-z0-9]|\.\d)", rest)
    if named is None and content is None:
        named, _ = _named(r"_(\d+)$", rest)
    told = {f"content of {point.where}": content, "file name": named, "--concurrency": concurrency}
    point.concurrency = _agreed("concurrency", path, told)
    if point.concurrency is None:
        raise ValueError(f"{path} tells no concurrency, in content or name (like x_c128.json); give --concurrency")


def _named(pattern: str, stem: str) -> tuple[int | None, str]:
    """The number that a name tells, and the name without it."""
    found = re.search(pattern, stem, re.ASCII | re.IGNORECASE)
    if found is None:
        return None, stem
    return int(next(filter(None, found.groups()))[:18]), stem[: found.start()] + stem[found.end() :]


def _agreed(what: str, path: Path, told: Mapping[str, int | None]) -> int | None:
    known = {by: value for by, value in told.items() if value is not None}
    says = ", ".join(f"{value} ({by})" for by, value in known.items())
    if len(set(known.values())) > 1:
        raise ValueError(f"{path}: contradictory {what}: {says}; rename the file or correct --{what}")
    if any(value < 1 for value in known.values()):
        raise ValueError(f"{path}: {what} must be at least 1, found {says}; see --{what}")
    return next(iter(known.values()), None)


def _arms(points: Sequence[_Point], profile: str) -> list[_Arm]:
    """One arm, or one a replica count where files differ in it."""
    groups: dict[int | None, dict[int | None, _Point]] = {}
    for point in points:
        levels = groups.setdefault(point.num_replicas, {})
        if other := levels.get(point.concurrency):
            found = f"{other.where} and {point.where} both have concurrency {point.concurrency}"
            raise ValueError(f"{found}; a run directory holds one of them: import the other by itself")
        levels[point.concurrency] = point
    if None in groups and len(groups) > 1:
        path = next(point.file.path for point in points if point.num_replicas is None)
        raise ValueError(f"{path} does not tell its replicas in its name, others do; call it like 8_replicas.json")
    arms = []
    for replicas in sorted(groups, key=lambda count: count or 0):
        name, axes = profile, {"profile": profile}
        if len(groups) > 1:
            name, axes = f"{profile},num_replicas={replicas}", axes | {"workload.num_replicas": str(replicas)}
        ordered = sorted(groups[replicas].values(), key=lambda point: point.concurrency or 0)
        arms.append(_Arm(paths.safe_name(name), axes, ordered))
    return arms


# ---- Values ----


def _text(file: _File) -> str:
    try:
        text = file.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{file.path} is empty")
    return text


def _json_values(file: _File) -> list[Any]:
    """All JSON values of a file, one after the other (`--append-result`, or several processes' output)."""
    text, values, position = _text(file), [], 0
    try:
        while match := re.compile(r"\S").search(text, position):
            value, position = json.JSONDecoder().raw_decode(text, match.start())
            values.append(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.path} is not JSON, or was cut off: {error}") from error
    return values


def _csv_rows(file: _File, expected: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Place and cells of each row; a cell is a number where it can be, None where empty."""
    reader = csv.DictReader(_text(file).splitlines())
    rows = []
    try:
        header = [name.strip() for name in reader.fieldnames or []]
        if missing := [name for name in expected if name not in header]:
            found = ", ".join(header)[:200]
            raise ValueError(f"{file.path} lacks the columns {', '.join(missing)}; found {found}")
        reader.fieldnames = header
        for row in reader:
            where = f"{file.path} line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where} has not as many cells as the header ({len(header)}); was it cut off?")
            rows.append((where, {name: _parsed(cell) for name, cell in row.items()}))
    except csv.Error as error:
        raise ValueError(f"{file.path} is not CSV: {error}") from error
    if not rows:
        raise ValueError(f"{file.path} has a header and no row")
    return rows


def _parsed(cell: str) -> float | str | None:
    try:
        return float(cell)
    except ValueError:
        return cell.strip() or None


def _shape(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(list(value)[:8]) or '(none)'}"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:40]


def _maybe(record: Mapping[str, Any], key: str, where: str) -> float | None:
    """A number from 0 to 2^53, None where absent or null."""
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2**53:
        raise ValueError(f"{where}: {key} must be a finite number, 0 or more, found {str(value)[:40]}")
    return float(value)


def _number(record: Mapping[str, Any], key: str, where: str) -> float:
    value = _maybe(record, key, where)
    if value is None:
        raise ValueError(f"{where} has no {key}")
    return value


def _whole(record: Mapping[str, Any], key: str, where: str) -> int:
    value = _number(record, key, where)
    if value != int(value):
        raise ValueError(f"{where}: {key} must be a whole number, found {value}")
    return int(value)


def _measured(figure: Any, what: str, where: str) -> Any:
    if not figure:
        raise ValueError(f"{where}: {what} is 0, so nothing was measured")
    return figure


def _same(figure: float, expected: float, what: str, where: str) -> None:
    if abs(figure - expected) > _MAX_CONTRADICTION * expected:
        raise ValueError(f"{where} contradicts itself: {what} is {figure:.6g}, by its other figures {expected:.6g}")


def _if_enough(value: float | None, n: int, p: float) -> float | None:
    """The rule of `results.percentiles` for a percentile that another computed: n(1-p) >= 10."""
    return value if round(n * (1 - p), 6) >= 10 else None


def _requests(num_successful: int, num_failed: int | None, duration_s: float) -> _Metrics:
    total = num_successful + (num_failed or 0)
    return {
        "num_successful": num_successful,
        "num_failed": num_failed,
        "error_ratio": None if num_failed is None or not total else num_failed / total,
        "throughput_rps": num_successful / duration_s,
    }


# ---- Locust ----


def bucket_width_ms(latency_ms: float) -> float:
    """Width of Locust's histogram at a latency; it keeps two digits (`locust.stats.bucket_response_time`)."""
    return 1.0 if latency_ms < 100 else 10.0 if latency_ms < 1000 else 100.0 if latency_ms < 10000 else 1000.0


def histogram_percentiles(histogram: Mapping[float, int], ps: Sequence[float]) -> list[float | None]:
    """`results.percentiles` of the values of a histogram {value: count}, without writing them all out."""
    values = np.array(sorted(histogram))
    until = np.cumsum([histogram[value] for value in values.tolist()])
    n = int(until[-1]) if len(until) else 0
    found: list[float | None] = []
    for p in ps:
        if _if_enough(0.0, n, p) is None:
            found.append(None)
            continue
        rank = math.floor((n - 1) * p)
        low, high = values[np.searchsorted(until, [rank, min(rank + 1, n - 1)], side="right")].tolist()
        found.append(low + (high - low) * ((n - 1) * p - rank))
    return found


def _locust(file: _File) -> list[_Point]:
    return _unary_csv(file) if file.path.suffix.lower() == ".csv" else [_locust_json(file)]


def _locust_json(file: _File) -> _Point:
    """All entries of a file (one a URL) as one point.

    The run lasts from the first `start_time` (the first completion) to the last `last_request_timestamp`; requests
    over that are the study's `rps`. Locust counts a failure in `num_requests` and in the times, too.
    """
    where, entries = str(file.path), []
    for value in _json_values(file):
        if not isinstance(value, list):
            raise ValueError(f"{where}: --kind locust expects a list of entries (--json-file), found {_shape(value)}")
        entries += value
    histogram: Counter[float] = Counter()
    num_requests = num_failed = num_untimed = 0
    total_ms, first_s, last_s = 0.0, math.inf, 0.0
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("response_times"), dict):
            raise ValueError(f"{where} entry {index} is not Locust's: no response_times in {_shape(entry)}")
        place = f"{where} entry {index} ({str(entry.get('name'))[:60]})"
        requests, failures = _whole(entry, "num_requests", place), _whole(entry, "num_failures", place)
        untimed = _whole({"num_none_requests": 0} | entry, "num_none_requests", place)
        timed = 0
        for key in entry["response_times"]:
            count = _whole(entry["response_times"], key, place)
            histogram[_number({"a response time": _parsed(key)}, "a response time", place)] += count
            timed += count
        if timed != requests - untimed or failures > requests:
            found = f"{requests} requests, {failures} failures, {untimed} without a time, {timed} in response_times"
            raise ValueError(f"{place} contradicts itself: {found}")
        if requests:
            num_requests, num_failed, num_untimed = (
                num_requests + requests,
                num_failed + failures,
                num_untimed + untimed,
            )
            total_ms += _number(entry, "total_response_time", place)
            first_s = min(first_s, _number(entry, "start_time", place))
            last_s = max(last_s, _number(entry, "last_request_timestamp", place))
    _measured(num_requests, f"num_requests of {len(entries)} entries", where)
    if not first_s < last_s < 1e11:
        raise ValueError(f"{where}: start_time {first_s:g} to last_request_timestamp {last_s:g} s is no run")
    metrics = _requests(num_requests - num_failed, num_failed, last_s - first_s)
    found_ms = dict(zip(_PERCENTILES, histogram_percentiles(histogram, list(_PERCENTILES.values())), strict=True))
    if num_requests > max(num_failed, num_untimed):
        metrics["latency_mean_ms"] = total_ms / (num_requests - num_untimed)
        metrics |= {f"latency_{label}_ms": value for label, value in found_ms.items()}
    notes = ["bucketed_percentiles", *(["failures_in_latency"] if num_failed else [])]
    point = _Point(file, where, last_s - first_s, metrics, notes, started_at_s=first_s)
    if histogram and all(value % bucket_width_ms(value) == 0 for value in histogram):  # else buckets of their own
        slow_ms = found_ms["p99"] if found_ms["p99"] is not None else max(histogram)
        point.latency_resolution_ms = bucket_width_ms(slow_ms)
    return point


def _unary_csv(file: _File) -> list[_Point]:
    """The study's summary of Locust's files. Duration is what requests and rate imply."""
    points = []
    for where, row in _csv_rows(file, _UNARY_CSV):
        n = _measured(_whole(row, "num_requests", where), "num_requests", where)
        duration_s = n / _measured(_number(row, "rps", where), "rps", where)
        p50, p99 = _maybe(row, "p50_ms", where), _maybe(row, "p99_ms", where)
        metrics = _requests(n, None, duration_s)
        metrics["latency_mean_ms"] = _maybe(row, "mean_latency_ms", where)
        metrics |= {"latency_p50_ms": _if_enough(p50, n, 0.5), "latency_p99_ms": _if_enough(p99, n, 0.99)}
        point = _Point(file, where, duration_s, metrics, ["bucketed_percentiles", "failures_unknown"])
        point.concurrency = _whole(row, "concurrency", where)
        point.latency_resolution_ms = None if p99 is None else bucket_width_ms(p99)
        points.append(point)
    return points


# ---- vLLM ----


def _vllm(file: _File) -> list[_Point]:
    points, values = [], _json_values(file)
    for index, value in enumerate(values):
        where = str(file.path) if len(values) == 1 else f"{file.path} result {index}"
        if not isinstance(value, dict) or not {"duration", "completed"} <= set(value):
            expected = "--kind vllm expects an object with duration and completed (vllm bench serve --save-result)"
            raise ValueError(f"{where}: {expected}, found {_shape(value)}")
        point = _vllm_point(file, where, value)
        if len(values) > 1 or "generated_texts" in value:
            point.raw = json.dumps({key: each for key, each in value.items() if key != "generated_texts"}).encode()
        points.append(point)
    return points


def _vllm_point(file: _File, where: str, value: Mapping[str, Any]) -> _Point:
    rate = value.get("request_rate")
    if rate not in (None, "inf", math.inf) or value.get("ramp_up_strategy"):
        raise ValueError(f"{where} is of an open loop (request_rate {rate}); only closed-loop results are imported")
    duration_s = _measured(_number(value, "duration", where), "duration", where)
    completed, failed = _whole(value, "completed", where), None
    if value.get("failed") is not None:
        failed = _whole(value, "failed", where)
    elif value.get("num_prompts") is not None:  # older versions
        failed = max(_whole(value, "num_prompts", where) - completed, 0)
    _measured(completed + (failed or 0), "completed", where)
    point = _Point(file, where, duration_s, _requests(completed, failed, duration_s))
    if value.get("max_concurrency") is not None:
        point.concurrency = _whole(value, "max_concurrency", where)
    if failed is None:
        point.notes.append("failures_unknown")
    for side in ("input", "output"):
        tokens = _maybe(value, f"total_{side}_tokens", where)
        point.metrics[f"{side}_throughput_tok_per_s"] = None if tokens is None else tokens / duration_s
    for key, column in (("request_throughput", "throughput_rps"), ("output_throughput", "output_throughput_tok_per_s")):
        figure, expected = _maybe(value, key, where), point.metrics[column]
        if figure is not None and expected is not None:
            _same(figure, expected, key, where)
    if all(isinstance(value.get(key), list) and value[key] for key in _VLLM_DETAIL):
        point.samples, point.latency_resolution_ms = _vllm_samples(value, where), 0.0
        metrics = results.compute_metrics(point.samples, duration_s, {})
        found = metrics["num_successful"], metrics["num_failed"]
        if found[0] != completed or (failed is not None and found[1] != failed):
            told = f"{completed} completed and {failed} failed in {duration_s:g} s"
            raise ValueError(f"{where} contradicts itself: {told}, by its lists {found[0]} and {found[1]}")
        point.metrics = metrics
        return point
    for column, name in (("latency", "e2el"), ("ttft", "ttft"), ("tpot", "tpot")):
        mean = _maybe(value, f"mean_{name}_ms", where)
        if not mean:  # absent, or the 0 that vLLM writes where there was no value
            continue
        point.metrics[f"{column}_mean_ms"] = mean
        for label, p in _PERCENTILES.items():
            key = {"p50": "median", "p999": "p99.9"}.get(label, label)
            point.metrics[f"{column}_{label}_ms"] = _if_enough(_maybe(value, f"{key}_{name}_ms", where), completed, p)
    return point


def _vllm_samples(value: Mapping[str, Any], where: str) -> pa.Table:
    """Rows of `SAMPLES_SCHEMA`; 0 is the first send. Latency is TTFT + all gaps, as in vLLM itself.

    vLLM marks no success: a request succeeded if it has no error and a first token. A failure's latency is not told.
    """
    n = len(value["start_times"])
    lists = {key: value[key] for key in _VLLM_DETAIL} | {"input_lens": value.get("input_lens") or [None] * n}
    if {len(each) for each in lists.values()} != {n}:
        lengths = ", ".join(f"{key} {len(each)}" for key, each in lists.items())
        raise ValueError(f"{where}: the lists of requests differ in length: {lengths}")
    try:
        start_s, ttft_s = np.array(value["start_times"], float), np.array(value["ttfts"], float)
        gaps_s = np.array([math.fsum(gaps) for gaps in value["itls"]], float)
        tokens = np.array(value["output_lens"], np.int32)
        times = np.concatenate([start_s, ttft_s, tokens, *(np.array(gaps, float) for gaps in value["itls"])])
        if not ((times >= 0) & np.isfinite(times)).all():
            raise ValueError("a time or length is negative or not finite")
        errors = [str(error or "") for error in value["errors"]]
        ok = np.array([not error for error in errors]) & ((ttft_s > 0) | (tokens > 0))
        columns = dict.fromkeys(results.SAMPLES_SCHEMA.names, [None] * n) | {
            # A start of 0 is one that failed before it was sent.
            "sent_at_s": np.maximum(start_s - start_s[start_s > 0].min(initial=math.inf), 0.0),
            "latency_ms": pa.array((ttft_s + gaps_s) * 1000, mask=~ok),
            "ttft_ms": pa.array(ttft_s * 1000, mask=~ok),
            "tpot_ms": pa.array(gaps_s * 1000 / np.maximum(tokens - 1, 1), mask=~(ok & (tokens > 1))),
            "num_input_tokens": lists["input_lens"],
            "num_output_tokens": tokens,
            "ok": ok,
            "error": [None if good else error or "no token" for good, error in zip(ok, errors, strict=True)],
            "client_process": np.zeros(n, np.int16),
        }
        return pa.table(columns, schema=results.SAMPLES_SCHEMA)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise ValueError(f"{where}: the lists of requests ({', '.join(lists)}) cannot be read: {error}") from error


# ---- Streaming CSV ----


def _streaming_csv(file: _File) -> list[_Point]:
    """Requests/s is num_requests / benchmark_duration, tokens/s total_tokens / benchmark_duration; s become ms.

    The client averages the percentiles of its workers, so with several of them there is none. Its `tpot` pools the
    gaps between chunks (median below 1 us, as chunks arrive together), so TPOT is taken from the mean times
    instead: exact where every request has the same number of chunks (`max_tokens`).
    """
    points = []
    for where, row in _csv_rows(file, _STREAMING_CSV):
        n = _measured(_whole(row, "num_requests", where), "num_requests", where)
        duration_s = _measured(_number(row, "benchmark_duration", where), "benchmark_duration", where)
        tokens, one_worker = _number(row, "total_tokens", where), _whole(row, "num_workers", where) == 1
        _same(_number(row, "system_tokens_per_sec", where), tokens / duration_s, "system_tokens_per_sec", where)
        metrics = _requests(n, None, duration_s) | {"output_throughput_tok_per_s": tokens / duration_s}
        latency_ms, ttft_ms = (1000 * _number(row, key, where) for key in ("e2e_avg", "ttft_avg"))
        metrics |= {"latency_mean_ms": latency_ms, "ttft_mean_ms": ttft_ms}
        if tokens == n * _number(row, "max_tokens", where) and tokens > n and latency_ms >= ttft_ms:
            metrics["tpot_mean_ms"] = (latency_ms - ttft_ms) / (tokens / n - 1)
        for column, key, labels in (("latency", "e2e", ("p50", "p95", "p99")), ("ttft", "ttft", ("p50", "p99"))):
            for label in labels:
                figure_s = _maybe(row, f"{key}_{label}", where)
                if one_worker and figure_s is not None:
                    metrics[f"{column}_{label}_ms"] = _if_enough(1000 * figure_s, n, _PERCENTILES[label])
        notes = ["failures_unknown", "itl_not_tpot", *([] if one_worker else ["percentiles_of_worker_means"])]
        concurrency = _whole(row, "concurrency", where)
        points.append(_Point(file, where, duration_s, metrics, notes, concurrency))
    return points


_READERS: dict[str, Callable[[_File], list[_Point]]] = {
    "locust": _locust,
    "vllm": _vllm,
    "streaming-csv": _streaming_csv,
}
KINDS = tuple(_READERS)


# ---- Writing ----


def _judge(metrics: Mapping[str, float | int | None]) -> results.Validity:
    """The rules that a total can be judged by; all others are unchecked."""
    validity, error_ratio, checked = results.Validity(), metrics["error_ratio"], {"no_samples"}
    if error_ratio is not None:
        checked |= {"no_success", "error_ratio"}
        found = f"{error_ratio:.2%} of requests failed ({metrics['num_failed']})"
        if not metrics["num_successful"]:
            validity.invalidate("no_success", f"{found}, all that the source has.")
        elif error_ratio > _MAX_ERROR_RATIO:
            validity.invalidate("error_ratio", f"{found}, more than {_MAX_ERROR_RATIO:.2%}.")
    validity.unchecked += [code for code in results.INVALID_REASONS if code not in checked]
    return validity


def _utc(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _trial(run_id: str, arm: str, service_key: str, point: _Point) -> dict[str, Any]:
    validity, started_s = _judge(point.metrics), point.started_at_s
    num_requests = (point.metrics["num_successful"] or 0) + (point.metrics["num_failed"] or 0)
    client: dict[str, Any] = dict.fromkeys(results.CLIENT_KEYS)
    client |= {"latency_resolution_ms": point.latency_resolution_ms, "num_requests": num_requests, "versions": {}}
    # What is not listed is not known: server, drain_s.
    return dict.fromkeys(results.TRIAL_KEYS) | {
        "schema_version": results.SCHEMA_VERSION,
        "trial_id": paths.trial_id(point.level, 0),
        "run_id": run_id,
        "arm": arm,
        "repeat": 0,
        "level": point.level,
        "load_mode": "closed",
        "concurrency": point.concurrency,
        "service_key": service_key,
        "started_at": _utc(started_s),
        "finished_at": None if started_s is None else _utc(started_s + point.duration_s),
        "duration_s": point.duration_s,
        "warmup_s": 0.0,  # none is set apart, so no ramp-up within it
        "ramp_up_s": 0.0,
        "client": client,
        "metrics": {name: point.metrics.get(name) for name in METRICS},
        "valid": validity.valid,
        "invalid_reasons": validity.reasons,
        "invalid_details": validity.details,
        "unchecked": validity.unchecked,
        "notes": ["imported", "single_run", "whole_run", *point.notes],
    }


def _write(
    run: RunPaths, arms: list[_Arm], files: list[_File], kind: str, names: dict[str, str], command: list[str]
) -> None:
    """`run.json` comes last, so a directory that has one is whole. `names`: workload, profile and cluster."""
    sources = [{"name": file.path.name, "sha256": hashlib.sha256(file.data).hexdigest()} for file in files]
    rows, plan_arms, primary = [], [], []
    for arm in arms:
        identity = json.dumps([kind, names, arm.axes, sources], sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()[:12]
        for point in arm.points:
            trial = _trial(run.run_id, arm.name, key, point)
            raw = run.raw_dir(arm.name, point.level, 0)
            raw.mkdir(parents=True)
            (raw / point.file.path.name).write_bytes(point.file.data if point.raw is None else point.raw)
            if point.samples is not None:
                results.write_samples(run.samples(arm.name, point.level, 0), point.samples)
            results.write_json(run.trial_json(arm.name, point.level, 0), trial)
            planned = {name: value for name, value in trial.items() if name in results.SUMMARY_COLUMNS}
            planned |= names | {"state": "complete", "num_replicas": point.num_replicas}
            rows.append(results.summary_row(planned, trial))
        levels = [point.concurrency for point in arm.points]
        plan_arms.append({"name": arm.name, "axes": arm.axes, "levels": levels, "copy": 0, "service_key": key})
        fixed = {axis: value for axis, value in arm.axes.items() if axis != "profile"}
        cell = {"axes": fixed, "baseline": arm.name, "candidate": None, "metric": "throughput_rps"}
        primary.append(cell | {"level": arm.points[-1].level})
    results.write_summary(run.root, rows)
    now, services = _utc(datetime.now(UTC).timestamp()), [[f"{arm.name} r0"] for arm in arms]
    trials = [f"{row['arm']}/{row['trial_id']}" for row in rows]
    record = dict.fromkeys(results.RUN_KEYS) | {
        "schema_version": results.SCHEMA_VERSION,
        "run_id": run.run_id,
        "status": "complete",
        "started_at": now,  # of the import; the trials have their own
        "finished_at": now,
        "command": command,
        "plan": {"arms": plan_arms, "services": services, "trials": trials},
        "compare": {"treatment": ["profile"], "baseline": None, "margin": 0.05, "max_looks": 1}
        | {"repeats": 1, "redeploy": "per_repeat"},
        "primary_cells": primary,
        "provenance": {"imported": {"kind": kind, "files": sources}},
    }
    results.write_json(run.run_json, record | {key: [] for key in ("resumed", "errors", "timeline")})

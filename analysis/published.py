"""Published or older results as a run directory: what did others measure, and what can it not support?

`import_source` reads one of three formats and writes what the orchestrator would have written, so that
`compare`, `report` and the plots work on it. What the source does not tell is null, a rule that it does not allow to
check is `unchecked`, and `notes` (the codes of `NOTES`) say what its figures are not. Nothing is written
unless all of the source could be read.

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
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator import paths, results
from orchestrator.paths import RunPaths

KINDS = ("locust", "vllm", "streaming-csv")

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
_ALWAYS = ("imported", "single_run", "whole_run")

_columns = list(results.SUMMARY_COLUMNS)
METRICS = tuple(_columns[_columns.index("num_successful") : _columns.index("tpot_p99_ms") + 1])
_MAX_ERROR_RATIO = 0.01  # as in conf/config.yaml
_MAX_CONTRADICTION = 0.01  # between figures of a source that should be the same, relative
_UNARY_CSV = ("concurrency", "rps", "mean_latency_ms", "p50_ms", "p99_ms", "num_requests")
_STREAMING_CSV = (
    *("concurrency", "num_requests", "num_workers", "benchmark_duration", "total_tokens", "system_tokens_per_sec"),
    *("ttft_avg", "e2e_avg", "ttft_p50", "ttft_p99", "e2e_p50", "e2e_p95", "e2e_p99"),
)
_DETAIL = ("start_times", "ttfts", "itls", "output_lens", "errors")


@dataclass(frozen=True)
class _File:
    """A source file. It is read once, so that what is hashed, parsed and kept is the same."""

    path: Path
    data: bytes

    @property
    def text(self) -> str:
        try:
            text = self.data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}") from error
        if not text.strip():
            raise ValueError(f"{self.path} is empty")
        return text


@dataclass
class _Point:
    """One level as its source tells it. `metrics` may leave out what is null; times in ms, durations in s."""

    file: _File
    where: str  # file and place in it, for messages
    duration_s: float
    metrics: dict[str, float | int | None]
    concurrency: int | None = None  # None: the content does not tell
    num_replicas: int | None = None
    started_at_s: float | None = None  # seconds since 1970, UTC
    latency_resolution_ms: float | None = None
    notes: list[str] = field(default_factory=list)
    samples: pa.Table | None = None
    raw: bytes | None = None  # what is kept of the file, if not all

    @property
    def level(self) -> str:
        return paths.level_name(concurrency=self.concurrency)


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

    `kind` is one of `KINDS`. `concurrency` is for a single file that does not tell it. `num_replicas` stays null where
    neither it nor a file name tells. The arm is called as the profile, with `,num_replicas=8` where the
    files differ in that. `raw/` keeps the original file, but for texts that the model generated.

    Raises `ValueError` that says which file, what was found in it and what is expected; then nothing is left behind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; available: {', '.join(KINDS)}")
    for name, text in (("workload", workload), ("profile", profile), ("cluster", cluster)):
        if not text.strip():
            raise ValueError(f"--{name} is empty; give the name that the results are to have in tables and plots")
    for name, value in (("concurrency", concurrency), ("num-replicas", num_replicas)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    files = _read_files(source, kind)
    if concurrency is not None and len(files) > 1:
        raise ValueError(f"--concurrency is for a single file, {source} has {len(files)}; name them like x_c128.json")
    points = [point for file in files for point in _READERS[kind](file)]
    for point in points:
        _settle(point, concurrency, num_replicas)
    arms = _arms(points, source, profile)
    command = ["import", source.name, f"--kind={kind}", f"--workload={workload}", f"--profile={profile}"]
    try:
        run = paths.create_run_dir(outputs, datetime.now())
    except OSError as error:
        raise ValueError(f"cannot make a run directory below {outputs}: {error}") from error
    try:
        _write(run, arms, files, kind, {"workload": workload, "profile": profile, "cluster": cluster}, command)
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
    named = _named(r"(?:^|[^a-z0-9])c(?:oncurrency[_=-]?)?(\d+)(?![a-z0-9.])", path)
    if named is None and content is None:
        named = _named(r"_(\d+)$", path)
    told = {f"{point.where}: content": content, "file name": named, "--concurrency": concurrency}
    point.concurrency = _agreed("concurrency", path, told)
    if point.concurrency is None:
        raise ValueError(
            f"{path} does not tell its concurrency, in its content or its name (like x_c128.json); give --concurrency"
        )
    replicas = _named(r"(?:^|[^a-z0-9])(\d+)[_-]?replicas?(?![a-z0-9])", path)
    point.num_replicas = _agreed("num-replicas", path, {"file name": replicas, "--num-replicas": num_replicas})


def _named(pattern: str, path: Path) -> int | None:
    found = re.search(pattern, path.stem.lower(), re.ASCII)
    return int(found[1][:18]) if found else None


def _agreed(what: str, path: Path, told: Mapping[str, int | None]) -> int | None:
    known = {by: value for by, value in told.items() if value is not None}
    if len(set(known.values())) > 1:
        says = ", ".join(f"{value} ({by})" for by, value in known.items())
        raise ValueError(f"{path}: contradictory {what}: {says}; rename the file or correct --{what}")
    value = next(iter(known.values()), None)
    if value is not None and value < 1:
        raise ValueError(f"{path}: {what} must be at least 1, found {value}; give --{what}")
    return value


@dataclass(frozen=True)
class _ArmPoints:
    name: str
    axes: dict[str, str]
    points: list[_Point]  # by concurrency


def _arms(points: Sequence[_Point], source: Path, profile: str) -> list[_ArmPoints]:
    """One arm, or one a replica count where files differ in it."""
    groups: dict[int | None, dict[int | None, _Point]] = {}
    for point in points:
        levels = groups.setdefault(point.num_replicas, {})
        if other := levels.get(point.concurrency):
            raise ValueError(
                f"two points have concurrency {point.concurrency}: {other.where} and {point.where}; "
                "import them one by one, each is a run of its own"
            )
        levels[point.concurrency] = point
    if None in groups and len(groups) > 1:
        file = next(point.file.path for point in points if point.num_replicas is None)
        raise ValueError(
            f"{source}: some file names tell the replicas, {file.name} does not; name it like 8_replicas.json"
        )
    arms = []
    for replicas in sorted(groups, key=lambda count: count or 0):
        name, axes = profile, {"profile": profile}
        if len(groups) > 1:
            name, axes = f"{profile},num_replicas={replicas}", axes | {"workload.num_replicas": str(replicas)}
        ordered = sorted(groups[replicas].values(), key=lambda point: point.concurrency or 0)
        arms.append(_ArmPoints(paths.safe_name(name), axes, ordered))
    return arms


# ---- Reading values ----


def _json_values(file: _File) -> list[Any]:
    """All JSON values of a file, one after the other (`--append-result`, or several processes' output)."""
    text, values, position = file.text, [], 0
    decoder = json.JSONDecoder()
    try:
        while match := re.compile(r"\S").search(text, position):
            value, position = decoder.raw_decode(text, match.start())
            values.append(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.path} is not JSON, or was cut off: {error}") from error
    return values


def _csv_rows(file: _File, expected: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Place and cells of each row; a cell is a number where it can be, None where empty."""
    reader = csv.DictReader(file.text.splitlines(), skipinitialspace=True)
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
                raise ValueError(f"{where} has not as many cells as the header ({len(header)}); was the file cut off?")
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


def _maybe(record: Mapping[str, Any], key: str, where: str) -> float | None:
    """A number from 0 to 2^53, None where absent or null."""
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2**53:
        raise ValueError(f"{where}: {key} must be a finite number, 0 or more, found {str(value)[:40]!r}")
    return float(value)


def _number(record: Mapping[str, Any], key: str, where: str) -> float:
    value = _maybe(record, key, where)
    if value is None:
        raise ValueError(f"{where} has no {key}")
    return value


def _positive(record: Mapping[str, Any], key: str, where: str) -> float:
    value = _number(record, key, where)
    if value == 0:
        raise ValueError(f"{where}: {key} is 0, so nothing was measured")
    return value


def _whole(record: Mapping[str, Any], key: str, where: str) -> int:
    value = _number(record, key, where)
    if value != int(value):
        raise ValueError(f"{where}: {key} must be a whole number, found {value}")
    return int(value)


def _same(figure: float, expected: float, what: str, where: str) -> None:
    if abs(figure - expected) > _MAX_CONTRADICTION * expected:
        raise ValueError(f"{where} contradicts itself: {what} is {figure:.6g}, by its other figures {expected:.6g}")


def _if_enough(value: float | None, n: int, p: float) -> float | None:
    """The rule of `results.percentiles` for a percentile that another computed: n(1-p) >= 10."""
    return value if round(n * (1 - p), 6) >= 10 else None


# ---- Locust ----


def _bucket_width_ms(latency_ms: float) -> float:
    """Width of Locust's own bucket (`bucket_response_time`, two significant digits): 1, 10, 100 or 1,000 ms."""
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
        position = (n - 1) * p
        ranks = np.minimum([math.floor(position), math.floor(position) + 1], n - 1)
        low, high = values[np.searchsorted(until, ranks, side="right")].tolist()
        found.append(low + (high - low) * (position - math.floor(position)))
    return found


def _locust(file: _File) -> list[_Point]:
    return _unary_csv(file) if file.path.suffix.lower() == ".csv" else [_locust_json(file)]


def _locust_json(file: _File) -> _Point:
    """All entries of a file (one a URL) as one point.

    Duration is the last `last_request_timestamp` less the first `start_time`, which is the first completion; with
    it requests / duration is the study's `rps`. Locust counts a failure in `num_requests`, too.
    """
    entries, where = [], str(file.path)
    for value in _json_values(file):
        if not isinstance(value, list):
            hint = "; it looks like vllm bench serve: use --kind vllm" if _is_vllm(value) else ""
            raise ValueError(f"{where}: expected a list of Locust's entries (--json-file), found {_shape(value)}{hint}")
        entries += value
    histogram: Counter[float] = Counter()
    num_requests = num_failed = num_untimed = 0
    total_ms, first_s, last_s = 0.0, math.inf, 0.0
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("response_times"), dict):
            raise ValueError(f"{where}: entry {index} is not Locust's, it has no response_times: {_shape(entry)}")
        place = f"{where} entry {index} ({str(entry.get('name'))[:60]})"
        requests, failures = _whole(entry, "num_requests", place), _whole(entry, "num_failures", place)
        untimed = _whole({"num_none_requests": 0} | entry, "num_none_requests", place)
        counts = {_latency(key, place): _whole(entry["response_times"], key, place) for key in entry["response_times"]}
        if sum(counts.values()) != requests - untimed or failures > requests:
            raise ValueError(
                f"{place} contradicts itself: {requests} requests, {failures} of them failed, {untimed} without a time, "
                f"{sum(counts.values())} in response_times"
            )
        if not requests:
            continue
        histogram.update(counts)
        num_requests, num_failed, num_untimed = num_requests + requests, num_failed + failures, num_untimed + untimed
        total_ms += _number(entry, "total_response_time", place)
        first_s = min(first_s, _number(entry, "start_time", place))
        last_s = max(last_s, _number(entry, "last_request_timestamp", place))
    if not num_requests:
        raise ValueError(f"{where} holds no request ({len(entries)} entries): nothing was measured")
    if last_s <= first_s:
        raise ValueError(f"{where} lasts {last_s - first_s:g} s from start_time to last_request_timestamp: no rate")
    ps = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
    found = dict(zip(ps, histogram_percentiles(histogram, list(ps.values())), strict=True))
    slow = found["p99"] if found["p99"] is not None else max(histogram, default=0.0)
    ours = all(value % _bucket_width_ms(value) == 0 for value in histogram)  # else a bucketing of somebody's own
    metrics = _requests(num_requests - num_failed, num_failed, last_s - first_s)
    if num_requests > num_failed:
        metrics["latency_mean_ms"] = total_ms / (num_requests - num_untimed) if num_requests > num_untimed else None
        metrics |= {f"latency_{label}_ms": value for label, value in found.items()}
    return _Point(
        file,
        where,
        last_s - first_s,
        metrics,
        started_at_s=first_s,
        latency_resolution_ms=_bucket_width_ms(slow) if ours else None,
        notes=["bucketed_percentiles", *(["failures_in_latency"] if num_failed else [])],
    )


def _latency(key: str, where: str) -> float:
    return _number({"key of response_times": _parsed(key)}, "key of response_times", where)


def _requests(num_successful: int, num_failed: int | None, duration_s: float) -> dict[str, float | int | None]:
    total = num_successful + (num_failed or 0)
    return {
        "num_successful": num_successful,
        "num_failed": num_failed,
        "error_ratio": None if num_failed is None or not total else num_failed / total,
        "throughput_rps": num_successful / duration_s,
    }


def _shape(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(str, list(value)[:8])) or '(none)'}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"{str(value)[:40]!r}"


def _unary_csv(file: _File) -> list[_Point]:
    """The study's summary of Locust's files. Duration is what requests and rate imply."""
    points = []
    for where, row in _csv_rows(file, _UNARY_CSV):
        n, rps = _whole(row, "num_requests", where), _positive(row, "rps", where)
        if not n:
            raise ValueError(f"{where} holds no request: nothing was measured")
        p50, p99 = _maybe(row, "p50_ms", where), _maybe(row, "p99_ms", where)
        slow = p99 if p99 is not None else p50
        metrics = _requests(n, None, n / rps) | {
            "latency_mean_ms": _maybe(row, "mean_latency_ms", where),
            "latency_p50_ms": _if_enough(p50, n, 0.5),
            "latency_p99_ms": _if_enough(p99, n, 0.99),
        }
        points.append(
            _Point(
                file,
                where,
                n / rps,
                metrics,
                concurrency=_whole(row, "concurrency", where),
                latency_resolution_ms=None if slow is None else _bucket_width_ms(slow),
                notes=["bucketed_percentiles", "failures_unknown"],
            )
        )
    return points


# ---- vLLM ----


def _is_vllm(value: Any) -> bool:
    return isinstance(value, dict) and {"duration", "completed", "total_input_tokens"} <= set(value)


def _vllm(file: _File) -> list[_Point]:
    values = _json_values(file)
    points = []
    for index, value in enumerate(values):
        where = str(file.path) if len(values) == 1 else f"{file.path} result {index}"
        if not _is_vllm(value):
            hint = ""
            if isinstance(value, list) and value and isinstance(value[0], dict) and "response_times" in value[0]:
                hint = "; it looks like Locust's --json-file: use --kind locust"
            raise ValueError(
                f"{where}: expected an object with duration, completed and total_input_tokens "
                f"(vllm bench serve --save-result), found {_shape(value)}{hint}"
            )
        point = _vllm_point(file, where, value)
        if len(values) > 1 or "generated_texts" in value:
            kept = {key: each for key, each in value.items() if key != "generated_texts"}
            point.raw = json.dumps(kept).encode()
        points.append(point)
    return points


def _vllm_point(file: _File, where: str, value: Mapping[str, Any]) -> _Point:
    rate = value.get("request_rate")
    if rate not in (None, "inf", math.inf) or value.get("ramp_up_strategy"):
        raise ValueError(f"{where} is of an open loop (request_rate {rate}); only closed-loop results are imported")
    duration_s, completed = _positive(value, "duration", where), _whole(value, "completed", where)
    failed = None
    if value.get("failed") is not None:
        failed = _whole(value, "failed", where)
    elif value.get("num_prompts") is not None:  # older versions
        failed = _whole(value, "num_prompts", where) - completed
        if failed < 0:
            raise ValueError(f"{where} contradicts itself: {completed} completed of {completed + failed} num_prompts")
    if not completed + (failed or 0):
        raise ValueError(f"{where} holds no request: nothing was measured")
    point = _Point(file, where, duration_s, _requests(completed, failed, duration_s))
    if value.get("max_concurrency") is not None:
        point.concurrency = _whole(value, "max_concurrency", where)
    if failed is None:
        point.notes.append("failures_unknown")
    for key, expected in (
        ("request_throughput", completed / duration_s),
        ("output_throughput", (_maybe(value, "total_output_tokens", where) or 0) / duration_s),
    ):
        if (figure := _maybe(value, key, where)) is not None:
            _same(figure, expected, key, where)
    if all(isinstance(value.get(key), list) for key in _DETAIL):
        point.latency_resolution_ms = 0.0
        point.samples = _vllm_samples(value, where)
        point.metrics = results.compute_metrics(point.samples, duration_s, {})
        counted = point.metrics["num_successful"], point.metrics["num_failed"]
        if counted != (completed, completed + counted[1] - completed if failed is None else failed):
            raise ValueError(
                f"{where} contradicts itself: {completed} completed and {failed} failed, in the lists of requests "
                f"{counted[0]} completed within {duration_s:g} s and {counted[1]} failed"
            )
        return point
    for side in ("input", "output"):
        tokens = _maybe(value, f"total_{side}_tokens", where)
        point.metrics[f"{side}_throughput_tok_per_s"] = None if tokens is None else tokens / duration_s
    for column, name in (("latency", "e2el"), ("ttft", "ttft"), ("tpot", "tpot")):
        if not _maybe(value, f"mean_{name}_ms", where):
            continue  # absent, or the 0 that vLLM writes where there was no value
        point.metrics[f"{column}_mean_ms"] = _maybe(value, f"mean_{name}_ms", where)
        for label, key, p in (
            ("p50", "median", 0.5),
            ("p90", "p90", 0.9),
            ("p95", "p95", 0.95),
            ("p99", "p99", 0.99),
            ("p999", "p99.9", 0.999),
        ):
            if f"{column}_{label}_ms" in METRICS:
                figure = _maybe(value, f"{key}_{name}_ms", where)
                point.metrics[f"{column}_{label}_ms"] = _if_enough(figure, completed, p)
    return point


def _vllm_samples(value: Mapping[str, Any], where: str) -> pa.Table:
    """Rows of `SAMPLES_SCHEMA`; 0 is the first send. Latency is TTFT + all gaps, as in vLLM itself.

    vLLM marks no success: a request succeeded if it has no error and a first token. The latency of a failure is
    not told.
    """
    n = len(value["start_times"])
    lists = {key: value[key] for key in _DETAIL} | {"input_lens": value.get("input_lens") or [None] * n}
    if {len(each) for each in lists.values()} != {n}:
        lengths = ", ".join(f"{key} {len(each)}" for key, each in lists.items())
        raise ValueError(f"{where}: the lists of requests differ in length: {lengths}")
    try:
        start_s, ttft_s = np.array(value["start_times"], float), np.array(value["ttfts"], float)
        gaps_s = np.array([math.fsum(gaps) for gaps in value["itls"]], float)
        tokens = np.array(value["output_lens"], np.int32)
        lowest = min(start_s.min(), ttft_s.min(), gaps_s.min(), tokens.min(), *map(min, filter(None, value["itls"])))
        if not (lowest >= 0 and np.isfinite(start_s + ttft_s + gaps_s).all()):
            raise ValueError("a time or length is negative or not finite")
        ok = np.array([not error for error in value["errors"]]) & ((ttft_s > 0) | (tokens > 0))
        sent_s = np.maximum(start_s - start_s[start_s > 0].min(initial=math.inf), 0.0)  # 0 = failed before it was sent
        latency_ms = (ttft_s + gaps_s) * 1000
        several = ok & (tokens > 1)
        columns = {
            "sent_at_s": sent_s,
            "latency_ms": pa.array(latency_ms, mask=~ok),
            "ttft_ms": pa.array(ttft_s * 1000, mask=~ok),
            "tpot_ms": pa.array(gaps_s * 1000 / np.maximum(tokens - 1, 1), mask=~several),
            "num_input_tokens": lists["input_lens"],
            "num_output_tokens": tokens,
            "ok": ok,
            "error": [
                None if good else str(error or "no token") for good, error in zip(ok, value["errors"], strict=True)
            ],
            "client_process": np.zeros(n, np.int16),
        }
        empty = {name: [None] * n for name in results.SAMPLES_SCHEMA.names}
        return pa.table(empty | columns, schema=results.SAMPLES_SCHEMA)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise ValueError(f"{where}: the lists of requests ({', '.join(lists)}) cannot be read: {error}") from error


# ---- Streaming CSV ----


def _streaming_csv(file: _File) -> list[_Point]:
    """Requests/s is num_requests / benchmark_duration, tokens/s total_tokens / benchmark_duration; s become ms.

    The client averages the percentiles of its workers, so with several of them there is none. Its `tpot` pools the
    gaps between chunks (median below 1 us where chunks arrive together), so TPOT is taken from the mean times
    instead: exact, where every request has the same number of chunks (`max_tokens`).
    """
    points = []
    for where, row in _csv_rows(file, _STREAMING_CSV):
        n, duration_s = _whole(row, "num_requests", where), _positive(row, "benchmark_duration", where)
        if not n:
            raise ValueError(f"{where} holds no request: nothing was measured")
        tokens, num_workers = _number(row, "total_tokens", where), _whole(row, "num_workers", where)
        _same(_number(row, "system_tokens_per_sec", where), tokens / duration_s, "system_tokens_per_sec", where)
        ttft_ms, e2e_ms = (1000 * _number(row, key, where) for key in ("ttft_avg", "e2e_avg"))
        metrics = _requests(n, None, duration_s)
        metrics |= {
            "output_throughput_tok_per_s": tokens / duration_s,
            "latency_mean_ms": e2e_ms,
            "ttft_mean_ms": ttft_ms,
        }
        if tokens == n * (_maybe(row, "max_tokens", where) or 0) and tokens > n and e2e_ms >= ttft_ms:
            metrics["tpot_mean_ms"] = (e2e_ms - ttft_ms) / (tokens / n - 1)
        for column, key in (("latency", "e2e"), ("ttft", "ttft")):
            for label, p in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
                figure = _maybe(row, f"{key}_{label}", where)
                if num_workers == 1 and figure is not None and f"{column}_{label}_ms" in METRICS:
                    metrics[f"{column}_{label}_ms"] = _if_enough(figure * 1000, n, p)
        notes = ["failures_unknown", "itl_not_tpot", *(["percentiles_of_worker_means"] if num_workers != 1 else [])]
        points.append(
            _Point(file, where, duration_s, metrics, concurrency=_whole(row, "concurrency", where), notes=notes)
        )
    return points


_READERS: dict[str, Callable[[_File], list[_Point]]] = {
    "locust": _locust,
    "vllm": _vllm,
    "streaming-csv": _streaming_csv,
}


# ---- Writing ----


def _judge(metrics: Mapping[str, float | int | None]) -> results.Validity:
    """The rules that a total can be judged by; all others are unchecked."""
    validity, error_ratio = results.Validity(), metrics["error_ratio"]
    checked = {"no_samples"}
    if error_ratio is not None:
        checked |= {"no_success", "error_ratio"}
        if not metrics["num_successful"]:
            validity.invalidate("no_success", f"All {metrics['num_failed']} requests of the source failed.")
        elif error_ratio > _MAX_ERROR_RATIO:
            validity.invalidate(
                "error_ratio",
                f"{error_ratio:.2%} of requests failed ({metrics['num_failed']}), more than {_MAX_ERROR_RATIO:.2%}.",
            )
    validity.unchecked += [code for code in results.INVALID_REASONS if code not in checked]
    return validity


def _utc(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _trial(run_id: str, arm: str, service_key: str, point: _Point) -> dict[str, Any]:
    validity = _judge(point.metrics)
    client = dict.fromkeys(results.CLIENT_KEYS) | {
        "latency_resolution_ms": point.latency_resolution_ms,
        "num_requests": (point.metrics["num_successful"] or 0) + (point.metrics["num_failed"] or 0),
        "versions": {},
    }
    started = point.started_at_s
    return {
        "schema_version": results.SCHEMA_VERSION,
        "trial_id": paths.trial_id(point.level, 0),
        "run_id": run_id,
        "arm": arm,
        "repeat": 0,
        "level": point.level,
        "load_mode": "closed",
        "concurrency": point.concurrency,
        "offered_rps": None,
        "service_key": service_key,
        "started_at": _utc(started),
        "finished_at": _utc(None if started is None else started + point.duration_s),
        "duration_s": point.duration_s,
        "warmup_s": 0.0,  # none is set apart
        "ramp_up_s": None,
        "drain_s": None,
        "client": client,
        "server": None,
        "metrics": {name: point.metrics.get(name) for name in METRICS},
        "valid": validity.valid,
        "invalid_reasons": validity.reasons,
        "invalid_details": validity.details,
        "unchecked": validity.unchecked,
        "notes": [*_ALWAYS, *point.notes],
    }


def _write(
    run: RunPaths,
    arms: Sequence[_ArmPoints],
    files: Sequence[_File],
    kind: str,
    names: Mapping[str, str],
    command: list[str],
) -> None:
    """`run.json` comes last, so a directory that has one is whole. `names`: workload, profile and cluster."""
    sources = [{"name": file.path.name, "sha256": hashlib.sha256(file.data).hexdigest()} for file in files]
    rows, plan_arms, primary = [], [], []
    for arm in arms:
        identity = [kind, names, arm.axes, arm.points[0].num_replicas, [source["sha256"] for source in sources]]
        service_key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        for point in arm.points:
            trial = _trial(run.run_id, arm.name, service_key, point)
            raw = run.raw_dir(arm.name, point.level, 0)
            raw.mkdir(parents=True)
            (raw / point.file.path.name).write_bytes(point.file.data if point.raw is None else point.raw)
            if point.samples is not None:
                results.write_samples(run.samples(arm.name, point.level, 0), point.samples)
            results.write_json(run.trial_json(arm.name, point.level, 0), trial)
            shared = {key: trial[key] for key in trial if key in results.SUMMARY_COLUMNS and key != "notes"}
            planned = shared | names | {"state": "complete", "num_replicas": point.num_replicas}
            rows.append(results.summary_row(planned, trial))
        levels = [point.concurrency for point in arm.points]
        plan_arms.append({"name": arm.name, "axes": arm.axes, "levels": levels, "copy": 0, "service_key": service_key})
        fixed = {axis: value for axis, value in arm.axes.items() if axis != "profile"}
        cell = {"axes": fixed, "baseline": arm.name, "candidate": None, "metric": "throughput_rps"}
        primary.append(cell | {"level": arm.points[-1].level})
    results.write_summary(run.root, rows)
    now = _utc(datetime.now(UTC).timestamp())
    record = {
        "schema_version": results.SCHEMA_VERSION,
        "run_id": run.run_id,
        "status": "complete",
        "started_at": now,
        "finished_at": now,
        "command": command,
        "seed": None,
        "plan": {
            "arms": plan_arms,
            "services": [[f"{arm.name} r0"] for arm in arms],
            "trials": [f"{row['arm']}/{row['trial_id']}" for row in rows],
        },
        "compare": {
            "treatment": ["profile"],
            "baseline": None,
            "margin": 0.05,
            "max_looks": 1,
            "repeats": 1,
            "redeploy": "per_repeat",
        },
        "primary_cells": primary,
        "provenance": {"imported": {"kind": kind, "files": sources}},
        "resumed": [],
        "errors": [],
        "timeline": [],
        "looks": [],
    }
    results.write_json(run.run_json, record)

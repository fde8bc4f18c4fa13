"""What does each file of a run directory hold? One type a file; a field without a sentence is no key on disk.

The one owner of their keys, columns and units, and of how JSON and the summary are written and read. The tables of
outputs/README.md are made of these types (`python -m orchestrator.results.document`).

None is null on disk: not measured, not applicable, or not told. Times `_at` are ISO 8601 strings in UTC, unless they
end in `_at_s`. What others say about themselves (versions, hardware, constants of Ray) is passed through as it is.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
PLANNED, COMPLETE, FAILED = "planned", "complete", "failed"  # state of a trial

_Foreign = Mapping[str, Any]  # JSON of others, passed through


# ---- run.json ----


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """One of `arms` of `plan` in run.json."""

    name: Annotated[str, "what the arm is called, everywhere"]
    axes: Annotated[Mapping[str, str], "what varies between the arms: axis to this arm's value, as typed"]
    levels: Annotated[Sequence[str], "name of each level, as in trial.json"]
    copy: Annotated[int, "0, or which copy of an equal arm it is (A/A)"]
    service_key: Annotated[str, "hash of everything that makes two services the same"]


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """`plan` of run.json."""

    arms: Annotated[Sequence[PlannedArm], "as given on the command line, see below"]
    services: Annotated[Sequence[Sequence[str]], "names of the services of each wave: those that are up together"]
    trials: Annotated[Sequence[str], "arm and trial_id of each trial at a listed level, in the order of measurement"]


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """`compare` of run.json: how the run said that it would be compared, before it began."""

    treatment: Annotated[Sequence[str], "axes whose values are compared"]
    baseline: Annotated[str | None, "name or value of the arm that the others are held against; null = by default"]
    margin: Annotated[float, "within which two arms are EQUIVALENT, as a ratio less 1"] = 0.05
    max_looks: Annotated[int, "looks at growing data that share the error"] = 1
    repeats: Annotated[int, "planned blocks"]
    redeploy: Annotated[str, "per_repeat (each block deploys afresh) or never"]


@dataclass(frozen=True, kw_only=True)
class PrimaryCell:
    """One of `primary_cells` in run.json: what a verdict is about."""

    axes: Annotated[Mapping[str, str], "axes that are held fixed: axis to value"]
    baseline: Annotated[str, "name of the arm"]
    candidate: Annotated[str | None, "name of the arm; null for an arm that stands alone"]
    metric: Annotated[str, "column of the summary"]
    level: Annotated[str, "as in trial.json"]


@dataclass(frozen=True, kw_only=True)
class Resume:
    """One of `resumed` in run.json."""

    at: Annotated[str, "ISO 8601, UTC"]
    provenance: Annotated[_Foreign, "as in run.json, at that time"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """One of `timeline` in run.json."""

    what: Annotated[str, "service, bring_up, trial or cool_down"]
    name: Annotated[str, "of the service, or arm and trial_id"]
    start_s: Annotated[float, "since the (resumed) run began, s"]
    end_s: Annotated[float, "since the (resumed) run began, s"]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """run.json: what was planned and how it ended."""

    schema_version: Annotated[int, f"version of everything on disk; this code writes {SCHEMA_VERSION}"] = SCHEMA_VERSION
    run_id: Annotated[str, "name of the run directory"]
    status: Annotated[str, "running, complete, failed or interrupted"]
    started_at: Annotated[str, "ISO 8601, UTC"]
    finished_at: Annotated[str | None, "ISO 8601, UTC; null while running"] = None
    command: Annotated[Sequence[str], "the overrides given on the command line"]
    seed: Annotated[int | None, "of the shuffled order of arms within a block; null if imported"]
    plan: Annotated[PlanRecord, "arms, services and trials, in planned order, see below"]
    compare: Annotated[Declaration, "how the arms are compared, as declared, see below"]
    primary_cells: Annotated[
        Sequence[PrimaryCell], "the cells whose verdict counts, fixed before the first service came up, see below"
    ]
    provenance: Annotated[
        _Foreign, "versions, hardware and source commits of where the orchestrator ran; or `imported`: kind and files"
    ]
    resumed: Annotated[Sequence[Resume], "one entry a resume, see below"] = ()
    errors: Annotated[Sequence[str], "messages of what failed outside any trial"] = ()
    timeline: Annotated[Sequence[Span], "where the time went, see below"] = ()
    cost_usd: Annotated[
        float | None, "what the rented machines have cost by the declared prices, USD; null without prices"
    ] = None


# ---- trial.json ----


@dataclass(frozen=True, kw_only=True)
class ClientFacts:
    """`client` of trial.json: how the load client fared."""

    window_s: Annotated[float | None, "how long load was really offered within the window, s"] = None
    offered_rps: Annotated[float | None, "requests/s that the client was told to send; null in closed loop"] = None
    all_clients_started_at_s: Annotated[
        float | None, "when the last client sent its first request, s from the window's start"
    ] = None
    sent_rps: Annotated[
        float | None, "requests sent per second of the window, where they are sent at a rate; else null"
    ] = None
    in_flight_mean: Annotated[
        float | None, "time-average number of requests in flight by the client's own record; null = by the samples"
    ] = None
    num_processes: Annotated[int | None, "number of client processes"] = None
    cpu_ratio: Annotated[float | None, "CPU of the busiest client process over the window / one core, 0 to 1"] = None
    cpu_ratios: Annotated[Sequence[float] | None, "the same for each client process"] = None
    lag_p50_ms: Annotated[
        float | None, "median delay until the client's event loop takes up what is due, ms; the worst process"
    ] = None
    lag_p99_ms: Annotated[float | None, "99th percentile of the same, ms"] = None
    latency_resolution_ms: Annotated[float | None, "width of the finest latency step, ms; 0 = raw clock readings"] = (
        None
    )
    num_requests: Annotated[int | None, "requests on record, warm-up included = rows of samples.parquet"] = None
    num_unfinished: Annotated[int | None, "requests still in flight after drain_s"] = None
    num_task_errors: Annotated[int | None, "exceptions that the locustfile's task raised"] = None
    versions: Annotated[Mapping[str, str], "package to version of the client"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """`server` of trial.json: what became of the service during the trial; null where nobody could tell."""

    restarted: Annotated[Sequence[str] | None, "names of replicas that were replaced during the trial"] = None
    failed: Annotated[Sequence[str] | None, "names of actors that died during the trial"] = None
    actors: Annotated[Sequence[str] | None, "names of the Serve actors seen after the trial"] = None


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """`whole_run` of trial.json: ramp-up and tail included, as LLM clients report it."""

    duration_s: Annotated[float, "from the first request sent to the last reply, s"]
    num_successful: Annotated[
        int, "replies that the client counts as completed, those of another length than asked included"
    ]
    num_failed: Annotated[int, "requests without such a reply"]
    num_short: Annotated[
        int, "of num_successful, those with fewer tokens than asked: failures in samples.parquet and in the window"
    ]
    throughput_rps: Annotated[float, "num_successful per second"]
    input_throughput_tok_per_s: Annotated[float, "input tokens of num_successful per second"]
    output_throughput_tok_per_s: Annotated[float, "output tokens of num_successful per second"]
    ttft_mean_ms: Annotated[float | None, "mean time to the first token, ms"]
    ttft_p50_ms: Annotated[
        float | None, "median of the same, ms; like every percentile here, of however few samples there are"
    ]
    ttft_p99_ms: Annotated[float | None, "99th percentile of the same, ms"]
    tpot_mean_ms: Annotated[
        float | None, "mean of (latency - TTFT) / (tokens - 1) over replies of two tokens or more, ms"
    ]
    tpot_p50_ms: Annotated[float | None, "median of the same, ms"]
    tpot_p99_ms: Annotated[float | None, "99th percentile of the same, ms"]
    latency_mean_ms: Annotated[float | None, "mean time to the last token, ms"]
    latency_p50_ms: Annotated[float | None, "median of the same, ms"]
    latency_p99_ms: Annotated[float | None, "99th percentile of the same, ms"]
    client: Annotated[
        Mapping[str, float | int] | None,
        "the client's own figures under these names, 0 for none; null if it ran in several processes",
    ] = None


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """`metrics` of trial.json: the measured columns of the summary, of the window alone."""

    num_successful: Annotated[int | None, "requests that completed in the window without error"] = None
    num_failed: Annotated[
        int | None, "requests that failed in the window, or were sent before its end and never finished"
    ] = None
    error_ratio: Annotated[
        float | None, "num_failed / (num_successful + num_failed), 0 to 1; null without requests"
    ] = None
    throughput_rps: Annotated[float | None, "successes per second of the window"] = None
    goodput_rps: Annotated[
        float | None, "successes per second that meet every per-request SLO; null without an SLO"
    ] = None
    input_throughput_tok_per_s: Annotated[float | None, "input tokens of successes per second"] = None
    output_throughput_tok_per_s: Annotated[
        float | None, "output tokens (or chunks, where the workload streams chunks) of successes per second"
    ] = None
    latency_mean_ms: Annotated[float | None, "mean time to the last byte of successes, ms"] = None
    latency_p50_ms: Annotated[float | None, "median latency, ms; null below 20 samples"] = None
    latency_p90_ms: Annotated[float | None, "90th percentile of latency, ms; null below 100 samples"] = None
    latency_p95_ms: Annotated[float | None, "95th percentile of latency, ms; null below 200 samples"] = None
    latency_p99_ms: Annotated[float | None, "99th percentile of latency, ms; null below 1,000 samples"] = None
    latency_p999_ms: Annotated[float | None, "99.9th percentile of latency, ms; null below 10,000 samples"] = None
    ttft_mean_ms: Annotated[float | None, "mean time to the first token of successes, ms"] = None
    ttft_p50_ms: Annotated[float | None, "median TTFT, ms; null below 20 samples"] = None
    ttft_p99_ms: Annotated[float | None, "99th percentile of TTFT, ms; null below 1,000 samples"] = None
    tpot_mean_ms: Annotated[float | None, "mean over successes of (latency - TTFT) / (tokens - 1), ms"] = None
    tpot_p50_ms: Annotated[float | None, "median TPOT, ms; null below 20 samples"] = None
    tpot_p99_ms: Annotated[float | None, "99th percentile of TPOT, ms; null below 1,000 samples"] = None


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """trial.json: one complete measurement."""

    schema_version: Annotated[int, "as in run.json"] = SCHEMA_VERSION
    trial_id: Annotated[str, "level and repeat, as in c0010-r0"]
    run_id: Annotated[str, "name of the run directory"]
    arm: Annotated[str, "name of the arm"]
    repeat: Annotated[int, "block, from 0"]
    level: Annotated[str, "c0010 (closed loop) or r000250.00 (open loop)"]
    load_mode: Annotated[str, "closed or open"]
    concurrency: Annotated[int | None, "number of clients in closed loop, else null"]
    offered_rps: Annotated[float | None, "requests/s in open loop, else null"] = None
    service_key: Annotated[str, "hash of everything that makes two services the same"]
    started_at: Annotated[str | None, "ISO 8601, UTC; null if the source of an import does not tell"]
    finished_at: Annotated[str | None, "ISO 8601, UTC; null if imported"] = None
    duration_s: Annotated[float, "length of the measurement window, s"]
    warmup_s: Annotated[float, "load before the window, s; 0 where the client counts requests"]
    ramp_up_s: Annotated[float, "part of the warm-up in which clients start, s; 0 as above"]
    drain_s: Annotated[
        float | None, "longest wait for requests in flight at the end of the window, s; null as above"
    ] = None
    client: Annotated[ClientFacts, "facts about the load client, see below"]
    server: Annotated[ServerFacts | None, "facts about the service, see below; null if the backend cannot tell"] = None
    observed: Annotated[
        Mapping[str, _Foreign], "what was watched beside the window: observer to its facts, for `host` see below"
    ] = field(default_factory=dict)
    round_trip_ms: Annotated[
        float | None,
        "median time of a request that does nothing (endpoint: to open a connection); null for local ones",
    ] = None
    metrics: Annotated[Metrics, "the measured columns of the summary"]
    whole_run: Annotated[
        WholeRun | None, "the run from first request to last reply, as LLM clients report it, see below; else null"
    ] = None
    valid: Annotated[bool, "true if no rule was broken"]
    invalid_reasons: Annotated[Sequence[str], "codes, see below"]
    invalid_details: Annotated[Mapping[str, str], "code to one sentence: figure, limit, what to do"]
    unchecked: Annotated[Sequence[str], "codes of rules that could not be checked"]
    notes: Annotated[
        Sequence[str],
        "codes of caveats: `colocated_client`, `far_client`, `bunched_tokens` (the report explains each)",
    ]


# ---- failure.json, effective.json, looks.jsonl ----


@dataclass(frozen=True, kw_only=True)
class Failure:
    """failure.json: why a trial has no result."""

    schema_version: Annotated[int, "as in run.json"] = SCHEMA_VERSION
    trial_id: Annotated[str, "level and repeat of the trial that has no result"]
    arm: Annotated[str, "name of the arm"]
    repeat: Annotated[int, "block, from 0"]
    stage: Annotated[str, "service (it never came up) or trial (the measurement failed)"]
    error: Annotated[str, "what was asked, what was found"]
    log: Annotated[str | None, "path of the log to read, relative to the run directory; null if there is none"]


@dataclass(frozen=True, kw_only=True)
class Actor:
    """One of `actors` in effective.json."""

    name: Annotated[str, "as Serve calls it"]
    kind: Annotated[str, "class of the actor, as in ServeReplica"]
    pid: Annotated[int, "process id on its node"]
    env: Annotated[Mapping[str, str], "the environment it runs with, as far as it can matter; no secrets"]
    constants: Annotated[_Foreign, "what Ray computed from it, read inside the actor"]


@dataclass(frozen=True, kw_only=True)
class Effective:
    """effective.json: what the live service says about itself."""

    schema_version: Annotated[int, "as in run.json"] = SCHEMA_VERSION
    service_key: Annotated[str, "hash of everything that makes two services the same"]
    declared_env: Annotated[Mapping[str, str], "the environment that the profile and cluster declare"] = field(
        default_factory=dict
    )
    actors: Annotated[Sequence[Actor], "each Serve actor, read inside it, see below"] = ()
    engine: Annotated[
        _Foreign | None, "settings of the vLLM engine as the live service reports them; null without one"
    ] = None
    flag_effects: Annotated[_Foreign, "declared flag to the constants that Ray computed from it"] = field(
        default_factory=dict
    )
    consequences: Annotated[_Foreign, "other constants that differ from those under no declared flag, from and to"] = (
        field(default_factory=dict)
    )
    warnings: Annotated[
        Sequence[str], "sentences, such as that a declared flag changes nothing in this Ray version"
    ] = ()
    isolation_env: Annotated[
        Sequence[str], "variables that keep services apart (ports, paths), so they differ between any two"
    ] = ()
    listener: Annotated[_Foreign | None, "process that owns the HTTP port; null if it is not ours to see"] = None
    versions: Annotated[_Foreign, "package to version, read inside the cluster"] = field(default_factory=dict)
    hardware: Annotated[_Foreign, "CPU model, num_cpus, memory in GiB and accelerators of each node"] = field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True)
class LookRecord:
    """A line of looks.jsonl."""

    look: Annotated[int, "which look at the run this is, from 1; looking at the same points again is none"]
    points: Annotated[str, "digest of the VALID points that were looked at"]
    num_blocks: Annotated[int, "VALID blocks of the primary cells then"]
    num_planned: Annotated[int, "planned blocks of the primary cells"]
    alpha: Annotated[float, "the share of the error of 0.05 that this look had"]
    at: Annotated[str, "ISO 8601, UTC"]


# ---- Tables: samples.parquet, summary.*, comparison.csv ----


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row of samples.parquet: one request. A third item of a field's type is its type in Arrow."""

    sent_at_s: Annotated[float, "actual send, s; 0 = start of the window, negative = warm-up"]
    intended_at_s: Annotated[float | None, "when the schedule wanted it sent, s; null in closed loop"]
    latency_ms: Annotated[
        float | None, "to the last byte, ms; from `intended_at_s` in open loop, else from `sent_at_s`"
    ]
    ttft_ms: Annotated[float | None, "time to the first token or chunk, ms; null unless streaming"]
    tpot_ms: Annotated[float | None, "(latency - TTFT) / (tokens - 1), ms; null below two tokens"]
    num_input_tokens: Annotated[int | None, "tokens of the prompt; null if unknown", "int32"]
    num_output_tokens: Annotated[
        int | None, "tokens of the reply (SSE chunks for the streaming workload); null if unknown", "int32"
    ]
    ok: Annotated[bool, "the reply was complete and right"]
    error: Annotated[str | None, "null when ok; `unfinished` = in flight after the drain"]
    client_process: Annotated[int, "load client process that sent it, from 0", "int16"]


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """The columns of the summary that are known beforehand."""

    run_id: Annotated[str, "name of the run directory"]
    arm: Annotated[str, "one composed config less its levels"]
    trial_id: Annotated[str, "level and repeat, as in c0010-r0; unique within the arm"]
    repeat: Annotated[int, "block of the trial, from 0"]
    state: Annotated[str, "planned, complete or failed; the measured columns are null unless complete"] = PLANNED
    workload: Annotated[str, "config name of what was served"]
    profile: Annotated[str, "config name of the set of flags"]
    cluster: Annotated[str, "config name of where it ran"]
    service_key: Annotated[str, "hash of everything that makes two services the same"]
    load_mode: Annotated[str, "closed (clients each waiting for their reply) or open (arrivals on a schedule)"]
    concurrency: Annotated[int | None, "number of clients in closed loop, else null"] = None
    offered_rps: Annotated[float | None, "requests/s offered in open loop, else null"] = None
    duration_s: Annotated[float | None, "length of the measurement window, s"] = None


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """The columns of the summary that follow the measured ones."""

    latency_resolution_ms: Annotated[
        float | None, "width of the client's finest latency step, ms; 0 = raw clock readings"
    ] = None
    client_cpu_ratio: Annotated[float | None, "CPU of the busiest client process / one core, 0 to 1"] = None
    valid: Annotated[bool | None, "whether the point may enter a ratio; null unless complete"] = None
    invalid_reasons: Annotated[str | None, ";-joined codes of the rules that were broken; empty if none"] = None
    notes: Annotated[str | None, ";-joined codes of caveats; unchecked:<code> for a rule that could not be checked"] = (
        None
    )
    num_replicas: Annotated[int | None, "replicas of the served deployments"] = None
    started_at: Annotated[str | None, "start of the trial, ISO 8601, UTC"] = None


@dataclass(frozen=True, kw_only=True)
class SummaryRow(_Judged, Metrics, _Planned):  # the fields of the last base come first
    """A row of summary.parquet and summary.csv: one trial, at a level that is listed or was asked for.

    `swept`: axis to value, as typed, of what varies between the arms and has no column among these. Each is a column
    of its own, called as the axis, after all others.
    """

    swept: Mapping[str, str] = field(default_factory=dict)

    def completed(self, trial: TrialRecord) -> "SummaryRow":
        """The same row with what was measured. `unchecked` rules go to `notes` as `unchecked:<code>`."""
        return dataclasses.replace(
            self,
            state=COMPLETE,
            started_at=trial.started_at,
            duration_s=trial.duration_s,
            latency_resolution_ms=trial.client.latency_resolution_ms,
            client_cpu_ratio=trial.client.cpu_ratio,
            valid=trial.valid,
            invalid_reasons=";".join(trial.invalid_reasons),
            notes=";".join([*trial.notes, *(f"unchecked:{code}" for code in trial.unchecked)]),
            **dataclasses.asdict(trial.metrics),
        )


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """A row of comparison.csv: one figure of two arms at one level. A ratio above 1 is better, whatever the metric."""

    metric: Annotated[str, "column of the summary that is compared"]
    level: Annotated[str, "as in trial.json"]
    concurrency: Annotated[int | None, "number of clients in closed loop, else null"]
    offered_rps: Annotated[float | None, "requests/s in open loop, else null"]
    axes: Annotated[str, "what both arms share of what varies in the run: axis=value, ..."]
    baseline: Annotated[str, "name of the arm"]
    candidate: Annotated[str, "name of the arm"]
    baseline_value: Annotated[float | None, "geometric mean of the baseline over the blocks, in the metric's unit"]
    candidate_value: Annotated[float | None, "the same of the candidate"]
    ratio: Annotated[float | None, "candidate against baseline, above 1 is better; null = cannot be said"] = None
    ci_low_ratio: Annotated[float | None, "lower end of the interval of the ratio"] = None
    ci_high_ratio: Annotated[float | None, "upper end of the same"] = None
    confidence: Annotated[float | None, "of the interval, 0 to 1"] = None
    num_blocks: Annotated[int, "blocks in which both points are VALID"]
    num_planned: Annotated[int, "blocks that were planned"]
    family: Annotated[str, "which cells share an error with this one: primary, secondary or descriptive"]
    verdict: Annotated[str | None, "FASTER, SLOWER, EQUIVALENT or INCONCLUSIVE; null where none is given"] = None
    reason: Annotated[str, "why there is no other verdict; empty if nothing stands against it"] = ""
    floor_ratio: Annotated[float | None, "what noise alone did in an A/A run (`--floor`), as a ratio of at least 1"] = (
        None
    )


# ---- What a type says of its file ----


@dataclass(frozen=True)
class Key:
    """One key or column: its Python type, its sentence, and its type in Arrow where that does not follow."""

    name: str
    type: Any
    meaning: str
    width: str | None = None

    @property
    def arrow_name(self) -> str:
        """The type of the column in Arrow."""
        plain = next(kind for kind in get_args(self.type) or (self.type,) if kind is not type(None))
        return self.width or {str: "string", int: "int64", float: "double", bool: "bool"}[plain]


def keys(record: type) -> dict[str, Key]:
    """The keys of a file on disk, or its columns, in their order."""
    found = {}
    for key in dataclasses.fields(record):
        if sentences := getattr(key.type, "__metadata__", ()):
            found[key.name] = Key(key.name, get_args(key.type)[0], *sentences)
    return found


def arrow_schema(record: type, swept: Sequence[str] = ()) -> "pa.Schema":
    """The columns of a table whose rows are such records."""
    import pyarrow as pa

    columns = [(key.name, pa.type_for_alias(key.arrow_name)) for key in keys(record).values()]
    return pa.schema([*columns, *((name, pa.string()) for name in swept)])


# ---- Reading and writing ----


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` if the body succeeds: existence means complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, obj: object) -> None:
    """Write a record, or what JSON knows, atomically.

    Raises `ValueError` for NaN and infinity, which are not JSON: use None.
    """
    plain = dataclasses.asdict(obj) if dataclasses.is_dataclass(obj) and not isinstance(obj, type) else obj
    text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises `FileNotFoundError`, or `ValueError` that names `path` if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


_Record = TypeVar("_Record")
_adapters: dict[type, Any] = {}  # made once a type, which takes some milliseconds


def read(record: type[_Record], path: Path) -> _Record:
    """Read a file as its record. Raises `FileNotFoundError`, or `ValueError` that names `path` and the fault."""
    content = read_json(path)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} is of schema {version!r}, this code reads {SCHEMA_VERSION}")
    return parse(record, content, str(path))


def parse(record: type[_Record], content: object, what: str) -> _Record:
    """Make a record of JSON. Raises `ValueError` that names `what` and each key that is missing or wrong."""
    from pydantic import TypeAdapter, ValidationError  # takes 0.2 s, and most of what imports us reads nothing

    if record not in _adapters:
        _adapters[record] = TypeAdapter(record)
    try:
        found: _Record = _adapters[record].validate_json(json.dumps(content), strict=True)
        return found
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors(include_url=False)]
        raise ValueError(f"{what} is not as we write it: {'; '.join(wrong[:5])}") from error


def summary_table(rows: Sequence[SummaryRow]) -> "pa.Table":
    """A table with the columns of `SummaryRow`, then one for each swept axis.

    Raises `ValueError` for a value of another type than its column's.
    """
    import pyarrow as pa

    swept = list(dict.fromkeys(axis for row in rows for axis in row.swept))
    names = keys(SummaryRow)
    plain = [{name: getattr(row, name) for name in names} | dict(row.swept) for row in rows]
    return pa.Table.from_pylist(plain, schema=arrow_schema(SummaryRow, swept))


def write_summary(directory: Path, rows: Sequence[SummaryRow]) -> None:
    """Write `summary.parquet` and `summary.csv` in `directory`, each atomically."""
    import pyarrow.csv
    import pyarrow.parquet

    table = summary_table(rows)
    with replacing(directory / "summary.parquet") as temporary:
        pyarrow.parquet.write_table(table, temporary)
    with replacing(directory / "summary.csv") as temporary:
        pyarrow.csv.write_csv(table, temporary)

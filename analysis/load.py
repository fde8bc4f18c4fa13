"""Run directories as tidy frames: what was planned, what was measured, what each request did.

The one reader of run directories for everything in `analysis`. A figure that was not measured is NaN or None,
never 0. What a run does not hold is said in words: a directory that is no run, a run still in progress.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis import stats
from orchestrator import results
from orchestrator.paths import RunPaths, level_name


class LoadError(ValueError):
    """There is no such run, or what it holds cannot be trusted."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory. `points`: one row a planned trial, the columns of the summary plus `run_dir` and `level`."""

    paths: RunPaths
    record: dict[str, Any]
    points: pd.DataFrame

    @property
    def arms(self) -> list[str]:
        return [arm["name"] for arm in self.record["plan"]["arms"]]

    @property
    def warnings(self) -> list[str]:
        """What a reader of any figure of this run must know first."""
        found = []
        done, planned = int((self.points.state != "planned").sum()), len(self.points)
        if self.record["status"] != "complete":
            found.append(f"{self.paths.root} is {self.record['status']}: {done} of {planned} trials are done")
        found += [f"{self.paths.root}: {' '.join(error.split())[:200]}" for error in self.record["errors"]]
        return found

    @property
    def in_progress(self) -> bool:
        """Blocks are still to come: a verdict now would be a look that was not planned."""
        return self.record["status"] in ("running", "interrupted") or bool((self.points.state == "planned").any())


def load_run(directory: Path) -> Run:
    """Raises LoadError for a directory that is no run, or one written in another schema."""
    directory = directory.resolve()  # a run has one name, or its blocks could be counted twice
    paths = RunPaths(directory)
    if not paths.run_json.is_file():
        raise LoadError(f"{directory} is no run directory: {_what_is_there(directory)}")
    try:
        record = results.read_json(paths.run_json)
        if not isinstance(record, dict) or not isinstance(record.get("compare", {}), dict):
            raise TypeError("run.json does not hold what we write")
        table = _read_parquet(paths.summary_parquet)
        missing = [key for key in results.RUN_KEYS if key not in record]
    except (OSError, ValueError, TypeError) as error:
        raise LoadError(f"{directory} is not a readable run: {error}") from error
    if record.get("schema_version") != results.SCHEMA_VERSION:
        raise LoadError(
            f"{directory} is of schema {record.get('schema_version')!r}, this code reads {results.SCHEMA_VERSION}"
        )
    missing += [column for column in results.SUMMARY_COLUMNS if column not in table.column_names]
    if missing:
        raise LoadError(f"{directory} is not a run as we write it: {', '.join(missing)} missing")
    points = table.to_pandas()
    points["valid"] = points.valid.astype(object).where(points.valid.notna(), None)
    points["run_dir"] = str(directory)
    points["level"] = [_level(row.concurrency, row.offered_rps) for row in points.itertuples()]
    return Run(paths, record, points)


def _what_is_there(directory: Path) -> str:
    if not directory.is_dir():
        return "it does not exist" if not directory.exists() else "it is a file"
    runs = [path.parent.name for path in sorted(directory.glob("*/run.json"))]
    return f"it has no run.json, but holds runs: {', '.join(runs[-3:])}" if runs else "it has no run.json"


def _level(concurrency: float | None, offered_rps: float | None) -> str:
    if concurrency is not None and not np.isnan(concurrency):
        return level_name(concurrency=int(concurrency))
    assert offered_rps is not None
    return level_name(offered_rps=offered_rps)


def _read_parquet(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:  # not read_table, which takes an `=` in an arm's name for a partition
            return file.read()
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a readable Parquet file (truncated or corrupt): {error}") from error


def find_runs(outputs: Path) -> list[Path]:
    """Run directories right below `outputs`, oldest first."""
    return sorted(path.parent for path in outputs.glob("*/run.json"))


@dataclass(frozen=True)
class Overview:
    """What a list of runs shows of one."""

    status: str
    workloads: str
    arms: str
    num_planned: int
    num_done: int
    num_valid: int


def overview(directory: Path) -> Overview:
    """Raises LoadError."""
    run = load_run(directory)
    points = run.points
    return Overview(
        status=run.record["status"],
        workloads=" ".join(points.workload.dropna().unique()),
        arms=" ".join(run.arms),
        num_planned=len(points),
        num_done=int((points.state != "planned").sum()),
        num_valid=int((points.valid == True).sum()),  # noqa: E712 (None too)
    )


def select(text: str) -> tuple[Run, str]:
    """`DIR:ARM`, or `DIR` of a run with one arm. Raises LoadError with the arms there are."""
    directory, arm = text, ""
    if not Path(text).exists() and ":" in text:
        directory, _, arm = text.rpartition(":")
    run = load_run(Path(directory))
    if not arm and len(run.arms) == 1:
        arm = run.arms[0]
    if arm not in run.arms:
        asked = f"no arm {arm!r} in {directory}" if arm else f"{directory} has several arms: say which"
        raise LoadError(f"{asked}; it has {', '.join(f'{directory}:{each}' for each in run.arms)}")
    return run, arm


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dicts by column."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def level_order(level: str) -> tuple[str, float]:
    """Sorts levels by their number: c9999 before c10000."""
    return level[0], float(level[1:])


def repeats(run: Run, arm: str) -> list[int]:
    """Repeats of the arm that have a complete trial."""
    complete = run.points[(run.points.arm == arm) & (run.points.state == "complete")]
    return sorted(complete.repeat.unique().tolist())


def arm_record(run: Run, arm: str) -> Mapping[str, Any]:
    """The arm as planned: name, axes, levels, copy, service_key."""
    return next(each for each in run.record["plan"]["arms"] if each["name"] == arm)


def is_imported(run: Run) -> bool:
    """Whether the run was measured by something else and only translated."""
    return "imported" in run.record["provenance"]


def trial(run: Run, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """`trial.json` of a complete row of `points`. Raises LoadError."""
    try:
        found = results.read_json(run.paths.trial_json(row["arm"], row["level"], row["repeat"]))
    except (OSError, ValueError) as error:
        raise LoadError(f"{row['arm']}/{row['trial_id']} is called complete, but its record is not: {error}") from error
    assert isinstance(found, dict)
    return found


def effective(run: Run, arm: str, repeat: int) -> Mapping[str, Any] | None:
    """What the live service reported; None where nothing was read back (imported results, foreign endpoints)."""
    arms = [arm, *(name for name in run.arms if name != arm and _same_service(run, name, arm))]
    one_for_all = run.record["compare"].get("redeploy") == "never"  # its only service lies in r0
    for name in arms:
        path = run.paths.effective_json(name, 0 if one_for_all else repeat)
        if path.exists():
            try:
                return dict(results.read_json(path))
            except (ValueError, TypeError) as error:
                raise LoadError(f"{path} cannot be read: {error}") from error
    return None


def _same_service(run: Run, one: str, other: str) -> bool:
    a, b = arm_record(run, one), arm_record(run, other)
    return (a["service_key"], a["copy"]) == (b["service_key"], b["copy"])


def config(run: Run, arm: str) -> Mapping[str, Any] | None:
    """The composed config of an arm, interpolations unresolved; None for imported results. Raises LoadError."""
    import yaml

    path = run.paths.hydra_dir(arm) / "config.yaml"
    if not path.exists():
        if is_imported(run):
            return None
        raise LoadError(f"{path} is missing: what was measured is not known")
    return dict(yaml.safe_load(path.read_text()))


# ---- Requests ----


@dataclass(frozen=True, eq=False)
class Requests:
    """What the requests of one trial show beyond its summary row.

    `histograms`: latencies of the window by slice, see `stats.slice_histograms`; `over_time`: successes a second from
    the ramp-up on.
    """

    row: Mapping[str, Any]
    num_successful: int
    histograms: tuple[np.ndarray, np.ndarray] | None  # counts (slices, bins) and edges of the bins, ms
    over_time: pd.DataFrame
    warmup_s: float
    ramp_up_s: float


def read_requests(run: Run, rows: pd.DataFrame) -> Iterator[Requests]:
    """Every request of these complete trials, checked as by `verify`; trials without any on record are left out."""
    for row in records(rows):
        record = trial(run, row)
        samples = _samples(run, row, record)
        if samples is not None:
            yield _requests(row, record, samples)


def verify(run: Run, arm: str) -> None:
    """Do summary, records and requests of the arm's complete trials say the same?

    Raises LoadError when a `samples.parquet` is missing, truncated, or says something else than `trial.json`, or that
    something else than the summary. Imported results may have no requests.
    """
    for row in records(run.points[(run.points.arm == arm) & (run.points.state == "complete")]):
        _samples(run, row, trial(run, row))


def _samples(run: Run, row: Mapping[str, Any], record: Mapping[str, Any]) -> pa.Table | None:
    path = run.paths.samples(row["arm"], row["level"], row["repeat"])
    where = f"{row['arm']}/{row['trial_id']}"
    for name in ("throughput_rps", "latency_p50_ms", "latency_p99_ms", "num_failed"):
        if not _same(row[name], record["metrics"].get(name)) or row["valid"] is not record["valid"]:
            raise LoadError(f"{where}: the summary and trial.json disagree; one of them was changed")
    if not path.exists() and is_imported(run):
        return None
    try:
        samples = results.read_samples(path)
    except (OSError, ValueError) as error:
        raise LoadError(f"{where}: {error}") from error
    found = results.compute_metrics(samples, record["duration_s"], {})
    for name in ("num_successful", "num_failed", "throughput_rps", "latency_p50_ms", "latency_p99_ms"):
        if not _same(found[name], record["metrics"].get(name)):
            raise LoadError(
                f"{path} gives {name} {found[name]}, but trial.json says {record['metrics'].get(name)}: "
                "one of them was changed"
            )
    return samples


def _same(a: float | None, b: float | None) -> bool:
    missing = [value is None or bool(np.isnan(value)) for value in (a, b)]
    return all(missing) or (not any(missing) and bool(np.isclose(a, b)))  # type: ignore[arg-type]


def _requests(row: Mapping[str, Any], record: Mapping[str, Any], samples: pa.Table) -> Requests:
    duration_s = record["duration_s"]
    completed = results.completed_at_s(samples)
    ok = samples["ok"].to_numpy()
    inside = ok & (completed >= 0) & (completed < duration_s)
    # On a log scale 0 has no place; a client that rounds to milliseconds may say it.
    latencies_ms = np.maximum(samples["latency_ms"].to_numpy()[inside], 1e-3)
    first = -np.ceil(record["warmup_s"] + record["ramp_up_s"])
    seconds = np.floor(completed[ok & (completed >= first) & (completed < duration_s)] - first).astype(int)
    time_s = np.arange(int(first), int(np.ceil(duration_s)))
    width_s = np.minimum(time_s + 1, duration_s) - time_s  # the last bin may be shorter
    counts = np.bincount(seconds, minlength=len(time_s))[: len(time_s)]
    shown = width_s >= 0.5  # of a sliver, a handful of replies would look like a spike
    return Requests(
        row=row,
        num_successful=len(latencies_ms),
        histograms=stats.slice_histograms(latencies_ms, completed[inside], duration_s) if len(latencies_ms) else None,
        over_time=pd.DataFrame({"time_s": time_s[shown].astype(float), "throughput_rps": (counts / width_s)[shown]}),
        warmup_s=record["warmup_s"],
        ramp_up_s=record["ramp_up_s"],
    )


def over_time(requests: Sequence[Requests]) -> pd.DataFrame:
    """Throughput a second of each trial; time 0 is the start of its window."""
    frames = []
    for each in requests:
        facts = {name: each.row[name] for name in ("arm", "repeat", "level", "concurrency", "duration_s", "valid")}
        frames.append(each.over_time.assign(**facts, warmup_s=each.warmup_s, ramp_up_s=each.ramp_up_s))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

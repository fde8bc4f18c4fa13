"""Run directories as tidy frames: what was planned, what was measured, what each request did.

The one reader of run directories for everything in `analysis`. A figure that was not measured is NaN or None,
never 0. What a run does not hold is said in words: a directory that is no run, a run still in progress.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis import stats
from orchestrator.load.level import Level
from orchestrator.paths import RunPaths
from orchestrator.results.records import (
    SCHEMA_VERSION,
    Declaration,
    Effective,
    Failure,
    PlannedArm,
    RunRecord,
    SummaryRow,
    TrialRecord,
    keys,
    parse,
    read,
    read_json,
)
from orchestrator.results.samples import completed_at_s, compute_metrics, read_samples

# What summary, record and requests of a trial must agree on.
_CHECKED = ("num_successful", "num_failed", "throughput_rps", "latency_p50_ms", "latency_p99_ms")


Row = dict[str, Any]  # of a frame: column to value


class LoadError(ValueError):
    """There is no such run, or what it holds cannot be trusted."""


@dataclass(frozen=True, eq=False)
class RunData:
    """What one run directory holds.

    `record`: run.json. `points`: one row a planned trial, the columns of the summary plus `run_dir` and `level` (its
    name on disk).
    """

    paths: RunPaths
    record: RunRecord
    points: pd.DataFrame

    @property
    def arms(self) -> list[str]:
        return [arm.name for arm in self.record.plan.arms]

    @property
    def declared(self) -> Declaration:
        """How the run said that it would be compared, before it began."""
        return self.record.compare

    @property
    def warnings(self) -> list[str]:
        """Sentences about a run that is not complete, and its errors outside trials."""
        found = []
        done, planned = int((self.points.state != "planned").sum()), len(self.points)
        if self.record.status != "complete":
            found.append(f"{self.paths.root} is {self.record.status}: {done} of {planned} trials are done")
        found += [f"{self.paths.root}: {' '.join(error.split())[:200]}" for error in self.record.errors]
        return found

    @property
    def in_progress(self) -> bool:
        """Whether trials are still to come, so that a verdict now would be a look that was not planned."""
        return self.record.status in ("running", "interrupted") or bool((self.points.state == "planned").any())

    @property
    def imported(self) -> bool:
        """Whether the run was measured by something else and only translated."""
        return "imported" in self.record.provenance


def load_run(directory: Path) -> RunData:
    """Raises LoadError for a directory that is no run, or one written in another schema."""
    directory = directory.resolve()  # a run has one name, or its blocks could be counted twice
    paths = RunPaths(directory)
    if not paths.run_json.is_file():
        found = "it has no run.json" if directory.exists() else "it does not exist"
        if runs := [path.name for path in find_runs(directory)]:
            found += f", but holds runs: {', '.join(runs[-3:])}"
        raise LoadError(f"{directory} is no run directory: {found}")
    try:
        content = read_json(paths.run_json)
        if not isinstance(content, dict):
            raise TypeError("run.json does not hold what we write")
        with pq.ParquetFile(paths.summary_parquet) as file:  # read_table takes an `=` in an arm's name for a partition
            table = file.read()
    except pa.ArrowException as error:
        raise LoadError(
            f"{paths.summary_parquet} is not a readable Parquet file (truncated or corrupt): {error}"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise LoadError(f"{directory} is not a readable run: {error}") from error
    if content.get("schema_version") != SCHEMA_VERSION:
        raise LoadError(f"{directory} is of schema {content.get('schema_version')!r}, this code reads {SCHEMA_VERSION}")
    if missing := keys(SummaryRow).keys() - {*table.column_names}:
        raise LoadError(f"{directory} is not a run as we write it: {', '.join(missing)} missing")
    try:
        record = parse(RunRecord, content, str(paths.run_json))
    except ValueError as error:
        raise LoadError(str(error)) from error
    points = table.to_pandas()
    points["valid"] = points.valid.astype(object).where(points.valid.notna(), None)
    points["run_dir"] = str(directory)
    points["level"] = points.trial_id.str.rpartition("-r")[0]
    return RunData(paths, record, points)


def find_runs(outputs: Path) -> list[Path]:
    """Run directories right below `outputs`, oldest first."""
    return sorted(path.parent for path in outputs.glob("*/run.json"))


def overview(directory: Path) -> dict[str, str | int]:
    """What a list of runs shows of one. Raises LoadError."""
    run = load_run(directory)
    return {
        "run": str(directory),
        "status": run.record.status,
        "trials": f"{(run.points.state != 'planned').sum()}/{len(run.points)}",
        "valid": int(run.points.valid.eq(True).sum()),
        "workload": " ".join(run.points.workload.dropna().unique()),
        "arms": " ".join(run.arms),
    }


def records(frame: pd.DataFrame) -> list[Row]:
    """The rows of a frame as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def codes(texts: Iterable[Any]) -> list[str]:
    """The distinct codes of `;`-joined texts (`invalid_reasons`, `notes`), sorted; what is no text holds none."""
    return sorted({code for text in texts if isinstance(text, str) for code in text.split(";") if code})


# ---- Arms ----


class ArmData(NamedTuple):
    """What one run holds of one arm."""

    run: RunData
    name: str

    @property
    def points(self) -> pd.DataFrame:
        return self.run.points[self.run.points.arm == self.name]

    @property
    def complete(self) -> pd.DataFrame:
        return self.points[self.points.state == "complete"]

    @property
    def levels(self) -> list[str]:
        """Names of the levels, the lowest first."""
        return sorted(self.points.level.unique(), key=Level.parse)

    @property
    def record(self) -> PlannedArm:
        return next(arm for arm in self.run.record.plan.arms if arm.name == self.name)

    def config(self) -> Mapping[str, Any] | None:
        """The composed config, interpolations unresolved; None for imported results. Raises LoadError."""
        import yaml

        path = self.run.paths.hydra_dir(self.name) / "config.yaml"
        if path.exists():
            return dict(yaml.safe_load(path.read_text()))
        if self.run.imported:
            return None
        raise LoadError(f"{path} is missing: what was measured is not known")

    def effective(self, repeat: int) -> Effective | None:
        """What the live service reported; None where nothing was read back (imported results, foreign endpoints)."""
        mine = (self.record.service_key, self.record.copy)
        for arm in sorted(self.run.record.plan.arms, key=lambda arm: arm.name != self.name):
            if (arm.service_key, arm.copy) == mine:  # arms may share a service: it lies with one of them
                one_for_all = self.run.declared.redeploy == "never"  # its only service lies in r0
                path = self.run.paths.effective_json(arm.name, 0 if one_for_all else repeat)
                if path.exists():
                    try:
                        return read(Effective, path)
                    except ValueError as error:
                        raise LoadError(f"{path} cannot be read: {error}") from error
        return None

    def effectives(self) -> dict[int, Effective | None]:
        """`effective` by repeat, of the repeats that have a complete trial."""
        return {repeat: self.effective(repeat) for repeat in sorted(self.complete.repeat.unique().tolist())}

    def verify(self) -> None:
        """Do summary, records and requests of the complete trials say the same?

        Raises LoadError when a `samples.parquet` is missing, truncated, or says something else than `trial.json`, or
        that something else than the summary. Imported results may have no requests.
        """
        for row in records(self.complete):
            _samples(self.run, row, trial(self.run, row))


def select(text: str) -> ArmData:
    """`DIR:ARM`, or `DIR` of a run with one arm. Raises LoadError with the arms there are."""
    directory, arm = text, ""
    if not Path(text).exists() and ":" in text:
        directory, _, arm = text.rpartition(":")
    run = load_run(Path(directory))
    if not arm and len(run.arms) == 1:
        arm = run.arms[0]
    if arm not in run.arms:
        asked = f"no arm {arm!r} in {directory}" if arm else f"{directory} has several arms: say which"
        raise LoadError(f"{asked}; it has {', '.join(f'{directory}:{arm}' for arm in run.arms)}")
    return ArmData(run, arm)


# ---- Requests ----


def trial(run: RunData, row: Row) -> TrialRecord:
    """`trial.json` of a complete row of `points`. Raises LoadError."""
    try:
        return read(TrialRecord, run.paths.trial_json(row["arm"], row["level"], row["repeat"]))
    except (OSError, ValueError) as error:
        raise LoadError(f"{row['arm']}/{row['trial_id']} is called complete, but its record is not: {error}") from error


def failure(run: RunData, row: Row) -> Failure | None:
    """`failure.json` of a failed row of `points`; None where it is gone. Raises LoadError."""
    path = run.paths.failure_json(row["arm"], row["level"], row["repeat"])
    try:
        return read(Failure, path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise LoadError(str(error)) from error


@dataclass(frozen=True, eq=False)
class Requests:
    """What the requests of one trial show beyond its summary row.

    `histograms`: latencies of the window by slice, see `stats.slice_histograms`; `over_time`: successes a second from
    the ramp-up on.
    """

    row: Row
    histograms: tuple[np.ndarray, np.ndarray] | None  # counts (slices, bins) and edges of the bins, ms
    over_time: pd.DataFrame


def _samples(run: RunData, row: Row, record: TrialRecord) -> pa.Table | None:
    path = run.paths.samples(row["arm"], row["level"], row["repeat"])
    where = f"{row['arm']}/{row['trial_id']}"
    said = asdict(record.metrics)
    if row["valid"] is not record.valid or not all(_same(row[name], said[name]) for name in _CHECKED):
        raise LoadError(f"{where}: the summary and trial.json disagree; one of them was changed")
    if not path.exists() and run.imported:
        return None
    try:
        samples = read_samples(path)
    except (OSError, ValueError) as error:
        raise LoadError(f"{where}: {error}") from error
    found = compute_metrics(samples, record.duration_s, {})
    for name in _CHECKED:
        value = getattr(found, name)
        if not _same(value, said[name]):
            raise LoadError(f"{path} gives {name} {value}, but trial.json says {said[name]}: one of them was changed")
    return samples


def _same(one: float | None, other: float | None) -> bool:
    a, b = np.array([one, other], dtype=float)  # None becomes NaN
    return bool(np.isclose(a, b, equal_nan=True))


def read_requests(run: RunData, row: Row) -> Requests | None:
    """Every request of a complete trial, checked as by `ArmData.verify`; None if it has none on record."""
    record = trial(run, row)
    samples = _samples(run, row, record)
    if samples is None:
        return None
    duration_s = record.duration_s
    completed = completed_at_s(samples)
    ok = samples["ok"].to_numpy()
    inside = ok & (completed >= 0) & (completed < duration_s)
    # On a log scale 0 has no place; a client that rounds to milliseconds may say it.
    latencies_ms = np.maximum(samples["latency_ms"].to_numpy()[inside], 1e-3)
    first = -np.ceil(record.warmup_s + record.ramp_up_s)
    seconds = np.floor(completed[ok & (completed >= first) & (completed < duration_s)] - first).astype(int)
    time_s = np.arange(int(first), int(np.ceil(duration_s)))
    width_s = np.minimum(time_s + 1, duration_s) - time_s  # the last bin may be shorter
    counts = np.bincount(seconds, minlength=len(time_s))[: len(time_s)]
    shown = width_s >= 0.5  # of a sliver, a handful of replies would look like a spike
    facts = {name: row[name] for name in ("arm", "repeat", "level", "concurrency", "duration_s", "valid")}
    facts |= {"warmup_s": record.warmup_s, "ramp_up_s": record.ramp_up_s}
    over_time = pd.DataFrame({"time_s": time_s[shown].astype(float), "throughput_rps": (counts / width_s)[shown]})
    return Requests(
        row=row,
        histograms=stats.slice_histograms(latencies_ms, completed[inside], duration_s) if len(latencies_ms) else None,
        over_time=over_time.assign(**facts),
    )


def over_time(requests: Sequence[Requests]) -> pd.DataFrame:
    """Throughput a second of each trial; time 0 is the start of its window."""
    return pd.concat([trial.over_time for trial in requests], ignore_index=True) if requests else pd.DataFrame()

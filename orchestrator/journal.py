"""The one writer of a run directory: what was planned, what is done and what is to do, what failed, how it ended.

`Journal` knows records and rows alone, so that importers and tests write with it what a run writes. The functions below
it make those of a plan, and a plan of those.

Everything is asked of the disk: a trial with a `trial.json` is done, whoever wrote it.
"""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.arms import Arm, primary_cells
from orchestrator.config import parse
from orchestrator.errors import ConfigError
from orchestrator.load.level import Level
from orchestrator.paths import RunPaths, level_of, set_aside, trial_id
from orchestrator.plan import Plan, plan_arms
from orchestrator.process import claim
from orchestrator.provenance import collect
from orchestrator.results.records import (
    FAILED,
    PLANNED,
    Declaration,
    Effective,
    Failure,
    PlannedArm,
    PlanRecord,
    Resume,
    RunRecord,
    Span,
    SummaryRow,
    TrialRecord,
    read,
    write_json,
    write_summary,
)
from orchestrator.results.records import (
    parse as parse_record,
)

_AXES_WITH_A_COLUMN = ("workload", "profile", "cluster")
_Key = tuple[str, str]  # arm and trial_id


class Journal:
    """One run directory, held until `close` so that nobody else writes into it.

    `begin` or `resume` comes first, then `expect`. Raises ConfigError when another process holds the directory.
    """

    run: RunRecord

    def __init__(self, paths: RunPaths) -> None:
        self.paths = paths
        self.errors: list[str] = []  # of what failed outside any trial, in this invocation
        self.timeline: list[Span] = []
        self._claim = claim(paths.root)
        self._started_at_s = time.monotonic()
        self._planned: dict[_Key, SummaryRow] = {}  # what is known of them beforehand
        self._rows: dict[_Key, SummaryRow] = {}

    def begin(self, run: RunRecord) -> None:
        """Take this record for a new run. Nothing is written before `save`."""
        self.run = run

    def resume(self, provenance: Mapping[str, object]) -> None:
        """Go on with the run that lies here. Raises ValueError for one that is not as we write it."""
        earlier = read(RunRecord, self.paths.run_json)
        self.timeline += earlier.timeline
        resumed = [*earlier.resumed, Resume(at=now(), provenance=provenance)]
        self.run = dataclasses.replace(earlier, status="running", finished_at=None, resumed=resumed)

    def expect(self, planned: Iterable[SummaryRow]) -> None:
        """Add trials that are not there yet, in this order. Those that are on record take their row from there."""
        for row in planned:
            key = row.arm, row.trial_id
            if key in self._planned:
                continue
            self._planned[key] = self._rows[key] = row
            if self._trial_json(row).exists():
                self._load(row)
            elif self._failure_json(row).exists():
                self._rows[key] = dataclasses.replace(row, state=FAILED)

    @property
    def rows(self) -> list[SummaryRow]:
        """Summary rows in planned order."""
        return list(self._rows.values())

    def known(self, arm: str, trial_id: str) -> SummaryRow | None:
        """The row of a trial that is complete or has failed, else None."""
        row = self._rows.get((arm, trial_id))
        return None if row is None or row.state == PLANNED else row

    def reopen(self, row: SummaryRow) -> None:
        """Put this attempt at a trial aside, for it is measured again."""
        set_aside(self._trial_json(row).parent)
        key = row.arm, row.trial_id
        self._rows[key] = self._planned[key]

    def begin_trial(self, planned: SummaryRow) -> Path:
        """Make the empty directory of this trial. What an attempt that was cut off left there is put aside."""
        self.expect([planned])
        directory = self._trial_json(planned).parent
        set_aside(directory)
        directory.mkdir(parents=True)
        return directory

    def end_block(self, arm: str, repeat: int) -> None:
        """An arm is done in a block: listed levels that its rule did not ask for there leave the summary."""
        over = [row for row in self.rows if (row.arm, row.repeat, row.state) == (arm, repeat, PLANNED)]
        for row in over:
            del self._rows[row.arm, row.trial_id], self._planned[row.arm, row.trial_id]
        if over:
            self.save_summary()

    def record(self, trial: TrialRecord) -> SummaryRow:
        """Write `trial.json`, by which the trial is complete; returns its row."""
        row = self._rows[trial.arm, trial.trial_id]
        path = self._trial_json(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, trial)
        self._load(row)
        return self._rows[trial.arm, trial.trial_id]

    def fail(self, arm: str, trial_id: str, stage: str, error: str, log: Path) -> None:
        """Write `failure.json`; `stage` and `error` as there, `log` below the run directory."""
        row = self._rows[arm, trial_id]
        path = self._failure_json(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        where = str(log.relative_to(self.paths.root))
        failure = Failure(trial_id=trial_id, arm=arm, repeat=row.repeat, stage=stage, error=error, log=where)
        write_json(path, failure)
        self._rows[arm, trial_id] = dataclasses.replace(row, state=FAILED)

    def read_back(self, directory: Path, service_key: str, told: Mapping[str, object]) -> Effective:
        """Write `effective.json` of what a service told about itself. Raises ValueError for missing or wrong keys."""
        effective = parse_record(Effective, {"service_key": service_key, **told}, str(directory))
        write_json(directory / "effective.json", effective)
        return effective

    @contextlib.contextmanager
    def timed(self, what: str, name: str) -> Iterator[None]:
        """Note in `timeline` where the time went, in seconds since this invocation's start."""
        start_s = time.monotonic() - self._started_at_s
        try:
            yield
        finally:
            end_s = time.monotonic() - self._started_at_s
            self.timeline.append(Span(what=what, name=name, start_s=start_s, end_s=end_s))

    def save_summary(self) -> None:
        """Write summary.parquet and summary.csv with the rows as they are now."""
        write_summary(self.paths.root, self.rows)

    def save(self) -> None:
        """Write the summary and, last, `run.json`, by which a directory is a run."""
        self.save_summary()
        write_json(self.paths.run_json, self.run)

    def finish(self, status: str, cost_usd: float | None = None) -> None:
        """Write how this invocation ended; `status` as in run.json."""
        self.run = dataclasses.replace(
            self.run,
            status=status,
            finished_at=now(),
            errors=self.errors,
            timeline=self.timeline,
            cost_usd=cost_usd,
        )
        self.save()

    def close(self) -> None:
        """Release the directory to other processes."""
        os.close(self._claim)

    def _trial_json(self, row: SummaryRow) -> Path:
        return self.paths.trial_json(row.arm, level_of(row.trial_id), row.repeat)

    def _failure_json(self, row: SummaryRow) -> Path:
        return self._trial_json(row).with_name("failure.json")

    def _load(self, row: SummaryRow) -> None:
        self._rows[row.arm, row.trial_id] = row.completed(read(TrialRecord, self._trial_json(row)))


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- Of a plan ----


def open_journal(plan: Plan, paths: RunPaths, command: Sequence[str]) -> Journal:
    """The journal of a new run, or of one that is resumed. Raises ConfigError when another process holds it."""
    journal = Journal(paths)
    if paths.run_json.exists():
        journal.resume(collect())
    else:
        journal.begin(_run_record(plan, paths.run_id, command))
    journal.expect(planned_row(trial.arm, trial.level, trial.repeat, paths.run_id) for trial in plan.trials)
    # Rules may have asked for levels that are not listed.
    for arm in plan.arms:
        for level, repeat in paths.begun(arm.name):
            if any(ending(arm.name, level, repeat).exists() for ending in (paths.trial_json, paths.failure_json)):
                journal.expect([planned_row(arm, Level.parse(level), repeat, paths.run_id)])
    journal.save()
    return journal


def reopen(plan: Plan, journal: Journal) -> None:
    """Put aside what is measured again: trials that failed or are INVALID, and what they are compared with.

    A ratio is of two points of one block, measured under the same conditions: had only one of them been measured
    again, an hour later, whatever has drifted since would be part of it.
    """
    other_axes = {arm.name: arm.other_axes for arm in plan.arms}

    def place(row: SummaryRow) -> tuple[object, ...]:
        return other_axes[row.arm], row.repeat, row.concurrency, row.offered_rps

    known = [row for row in journal.rows if row.state != PLANNED]
    bad = [row for row in known if not row.valid]
    places = {place(row) for row in bad}
    # Those that call for it come last: cut off in between, the next resume still finds them.
    for row in [*(row for row in known if row.valid and place(row) in places), *bad]:
        journal.reopen(row)


def planned_row(arm: Arm, level: Level, repeat: int, run_id: str) -> SummaryRow:
    """The summary row of a trial that is not measured yet."""
    config = arm.config
    return SummaryRow(
        run_id=run_id,
        arm=arm.name,
        trial_id=trial_id(level.name, repeat),
        repeat=repeat,
        workload=config.workload.name,
        profile=config.profile.name,
        cluster=config.cluster.name,
        service_key=arm.key,
        load_mode=level.load_mode,
        concurrency=level.concurrency,
        offered_rps=level.offered_rps,
        duration_s=config.sweep.duration_s,
        num_replicas=config.workload.num_replicas,
        swept={axis: value for axis, value in arm.axes.items() if axis not in _AXES_WITH_A_COLUMN},
    )


def _run_record(plan: Plan, run_id: str, command: Sequence[str]) -> RunRecord:
    first = plan.arms[0]
    return RunRecord(
        run_id=run_id,
        status="running",
        started_at=now(),
        command=command,
        seed=plan.seed,
        plan=PlanRecord(
            arms=[
                PlannedArm(
                    name=arm.name,
                    axes=dict(arm.axes),
                    levels=[level.name for level in arm.levels],
                    copy=arm.copy,
                    service_key=arm.key,
                )
                for arm in plan.arms
            ],
            services=[[service.label for service in wave.services] for wave in plan.waves],
            trials=[f"{trial.arm.name}/{trial.id}" for trial in plan.trials],
        ),
        compare=Declaration(
            treatment=first.treatment,
            baseline=first.config.compare.baseline,
            margin=first.config.compare.margin,
            max_looks=first.config.compare.max_looks,
            repeats=first.config.sweep.repeats,
            redeploy=first.config.cluster.redeploy,
        ),
        primary_cells=primary_cells(plan.arms),
        provenance=collect(),
    )


def recorded_plan(paths: RunPaths, trusted: Collection[str]) -> Plan:
    """The plan of an earlier run, from its own records. Raises ConfigError.

    `trusted`: modules that the records may name beside ours, see `kinds.named`.
    """
    arms = []
    try:
        record = read(RunRecord, paths.run_json)
        if record.seed is None:
            raise ValueError(f"{paths.run_json} was imported: it says how it was measured, not how to go on")
        for arm in record.plan.arms:
            saved = OmegaConf.load(paths.hydra_dir(arm.name) / "config.yaml")
            assert isinstance(saved, DictConfig)
            levels = tuple(map(Level.parse, arm.levels))
            arms.append(Arm(arm.name, arm.axes, parse(saved, trusted), levels, arm.service_key, arm.copy))
        return plan_arms(arms, record.seed)
    except (OSError, ValueError, KeyError, TypeError, OmegaConfBaseException) as error:  # missing, or not ours
        raise ConfigError(str(error) if isinstance(error, OSError | ValueError) else repr(error)) from error


def keep_hydra_record(plan: Plan, paths: RunPaths) -> None:
    """Copy Hydra's own record of each arm out of its temporary directory."""
    for arm in plan.arms:
        assert arm.hydra_dir is not None
        shutil.copytree(arm.hydra_dir, paths.hydra_dir(arm.name))

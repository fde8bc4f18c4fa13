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
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.arms import Arm, primary_cells
from orchestrator.config import parse
from orchestrator.errors import ConfigError
from orchestrator.load.level import Level
from orchestrator.paths import RunPaths, set_aside
from orchestrator.plan import Plan, Trial, plan_arms
from orchestrator.process import claim
from orchestrator.provenance import collect
from orchestrator.results.records import (
    COMPLETE,
    FAILED,
    Declaration,
    Effective,
    Failure,
    PlannedArm,
    PlanRecord,
    PrimaryCell,
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
        self._rows: dict[_Key, SummaryRow] = {}

    def begin(self, run: RunRecord) -> None:
        """A new run. Nothing is written before `save`."""
        self.run = run

    def resume(self, provenance: Mapping[str, Any]) -> None:
        """Go on with the run that lies here. Raises ValueError for one that is not as we write it."""
        earlier = read(RunRecord, self.paths.run_json)
        self.timeline += earlier.timeline
        resumed = [*earlier.resumed, Resume(at=now(), provenance=provenance)]
        self.run = dataclasses.replace(earlier, status="running", finished_at=None, resumed=resumed)

    def expect(self, planned: Iterable[SummaryRow]) -> None:
        """Add trials, in planned order; those that are done take their row from their own record."""
        for row in planned:
            self._rows[row.arm, row.trial_id] = row
            if self._trial_json(row).exists():
                self._load(row)

    @property
    def rows(self) -> list[SummaryRow]:
        """Summary rows in planned order."""
        return list(self._rows.values())

    def done(self, arm: str, trial_id: str) -> SummaryRow | None:
        """The row of a complete trial; None for one that is planned or failed."""
        row = self._rows[arm, trial_id]
        return row if row.state == COMPLETE else None

    def reopen(self, planned: SummaryRow) -> None:
        """Put an earlier attempt at this trial aside, if there was one, for it is measured again."""
        if set_aside(self._trial_json(planned).parent):
            self._rows[planned.arm, planned.trial_id] = planned

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
        path = self._trial_json(row).with_name("failure.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        where = str(log.relative_to(self.paths.root))
        failure = Failure(trial_id=trial_id, arm=arm, repeat=row.repeat, stage=stage, error=error, log=where)
        write_json(path, failure)
        self._rows[arm, trial_id] = dataclasses.replace(row, state=FAILED)

    def read_back(self, directory: Path, service_key: str, told: Mapping[str, Any]) -> Effective:
        """Write `effective.json` of what a service told about itself. Raises ValueError if that is not the like."""
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
        """As far as it is known by now."""
        write_summary(self.paths.root, self.rows)

    def save(self) -> None:
        """Write the summary and, last, `run.json`, by which a directory is a run."""
        self.save_summary()
        write_json(self.paths.run_json, self.run)

    def finish(self, status: str, cost_usd: float | None = None) -> None:
        """The end, for now: `status` as in run.json."""
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
        """Let others write here."""
        os.close(self._claim)

    def _trial_json(self, row: SummaryRow) -> Path:
        level, _, _ = row.trial_id.rpartition("-r")
        return self.paths.trial_json(row.arm, level, row.repeat)

    def _load(self, row: SummaryRow) -> None:
        self._rows[row.arm, row.trial_id] = row.completed(read(TrialRecord, self._trial_json(row)))


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- Of a plan ----


def open_journal(plan: Plan, paths: RunPaths, command: Sequence[str]) -> Journal:
    """Of a new run, or of the one that lies there, which goes on. Raises ConfigError when another process holds it."""
    journal = Journal(paths)
    if paths.run_json.exists():
        journal.resume(collect())
    else:
        journal.begin(_run_record(plan, paths.run_id, command))
    journal.expect(planned_row(trial, paths.run_id) for trial in plan.trials)
    journal.save()
    return journal


def to_do(plan: Plan, journal: Journal) -> set[Trial]:
    """Trials without a valid result, and what they are compared with in the same block.

    A ratio is of two points measured under the same conditions: had only one of them been measured again, an
    hour later, whatever has drifted since would be part of it.
    """

    def place(trial: Trial) -> tuple[object, ...]:
        return trial.arm.other_axes, trial.repeat, trial.level

    def is_open(trial: Trial) -> bool:
        row = journal.done(trial.arm.name, trial.id)
        return row is None or not row.valid

    open_places = {place(trial) for trial in plan.trials if is_open(trial)}
    return {trial for trial in plan.trials if place(trial) in open_places}


def planned_row(trial: Trial, run_id: str) -> SummaryRow:
    """What is known of a trial beforehand."""
    arm, config = trial.arm, trial.arm.config
    return SummaryRow(
        run_id=run_id,
        arm=arm.name,
        trial_id=trial.id,
        repeat=trial.repeat,
        workload=config.workload.name,
        profile=config.profile.name,
        cluster=config.cluster.name,
        service_key=arm.key,
        load_mode=trial.level.load_mode,
        concurrency=trial.level.concurrency,
        offered_rps=trial.level.offered_rps,
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
        primary_cells=[PrimaryCell(**cell) for cell in primary_cells(plan.arms)],
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
        raise ConfigError(repr(error)) from error


def keep_hydra_record(plan: Plan, paths: RunPaths) -> None:
    """Copy Hydra's own record of each arm out of its temporary directory."""
    for arm in plan.arms:
        assert arm.hydra_dir is not None
        shutil.copytree(arm.hydra_dir, paths.hydra_dir(arm.name))

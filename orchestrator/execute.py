"""The loop: bring services up, measure one level at a time, always tear down (drawn in docs/architecture.md).

A service or trial that fails is a recorded result and the run goes on; an interrupt ends the run after teardown.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from orchestrator.clusters.base import Running, ServiceName, SharedCluster, changes, check_engines, healthy_snapshot
from orchestrator.cost import check_limit, spent_usd
from orchestrator.errors import EXIT_FAILED, EXIT_INVALID, EXIT_OK, RuleError, ServiceError, TrialError
from orchestrator.journal import now, open_journal, planned_row, reopen
from orchestrator.judge import judge
from orchestrator.observe.base import Period, is_here, observed_facts, observing
from orchestrator.paths import RunPaths, set_aside
from orchestrator.plan import Plan, Service, Trial, Wave, expected_load
from orchestrator.process import Interrupted, uninterrupted
from orchestrator.progress import Progress
from orchestrator.results.records import FAILED, PLANNED, SummaryRow, TrialRecord


def preflight(plan: Plan, live: bool) -> None:
    """Refuse what cannot work while it still costs nothing. Raises ConfigError.

    `live`: also import each workload, and ask the cluster, which takes seconds.
    """
    for arm in plan.arms:
        arm.config.client.check(arm.config, [expected_load(arm.config, level) for level in arm.levels])
        arm.config.cluster.check(arm.config)
    check_limit([arm.config.cluster for arm in plan.arms], plan.cost_usd(), plan.service_hours)
    for arm in plan.arms if live else ():
        arm.config.client.check_live(arm.config, arm.config.cluster.startup_timeout_s)
        arm.config.cluster.check_live(arm.config)


def write_service_files(plan: Plan, paths: RunPaths) -> None:
    """For a dry run: one rendered file an arm (every repeat deploys the same)."""
    first = {arm: service for service in reversed(plan.services) for arm in service.arms}
    for arm in plan.arms:
        target = paths.service_yaml(arm.name, 0)
        target.parent.mkdir(parents=True)
        target.write_text(arm.config.cluster.rendered(arm.config, service_name(plan, paths, first[arm])))


def service_name(plan: Plan, paths: RunPaths, service: Service) -> ServiceName:
    """What a service is called where names are shared with others."""
    cluster, index = service.config.cluster, plan.services.index(service)
    prefix = cluster.service_prefix if isinstance(cluster, SharedCluster) else "so"
    return ServiceName(prefix, paths.run_id, index, service.arms[0].name, service.repeats[0])


class Run:
    """One invocation: what is up, what is measured, what the exit code will be."""

    def __init__(self, plan: Plan, paths: RunPaths, command: list[str]) -> None:
        self.plan = plan
        self.paths = paths
        self.journal = open_journal(plan, paths, command)
        self._begun: list[Running] = []

    def go(self) -> int:
        """Run every trial that has no valid result yet; returns the exit code, unless interrupted."""
        reopen(self.plan, self.journal)
        try:
            with Progress(self.plan, self.plan.num_left(self._known)) as self._progress:
                for wave in self.plan.waves:
                    self._go_through(wave)
        except Interrupted:
            for handle in [*self._begun]:  # the signal may have come on the way into a teardown
                self._stop(handle)
            self._finish("interrupted")
            raise
        except BaseException:
            self._finish("failed")
            raise
        states = [row.state for row in self.journal.rows]
        assert PLANNED not in states, states
        if self.journal.errors or FAILED in states:
            self._finish("failed")
            return EXIT_FAILED
        self._finish("complete")
        return EXIT_OK if all(row.valid for row in self.journal.rows) else EXIT_INVALID

    def _go_through(self, wave: Wave) -> None:
        """Its trials from the start, past those that are done. Services come up only where one is left to measure."""
        try:
            expected = wave.expected(self._known)
            if expected and not self._is_too_dear(expected):
                with ExitStack() as live:
                    self._measure_all(wave, self._bring_up(expected, live))
            over = [replicate for replicate in wave.replicates if replicate.next(self._known) is None]
        except RuleError as error:  # nobody can say what else would be asked for here
            self.journal.errors.append(str(error))
            self._progress.warning(str(error))
            over = wave.replicates
        for replicate in over:
            self.journal.end_block(replicate.arm.name, replicate.repeat)

    def _measure_all(self, wave: Wave, running: dict[Service, Running]) -> None:
        """What is left of the wave's steps on these services. Raises RuleError."""
        last: Trial | None = None
        for trial in wave.steps(self._known, running):
            if self._known(trial) is not None:
                continue
            if last is not None:
                with self.journal.timed("cool_down", f"{last.arm.name}/{last.id}"):
                    time.sleep(last.arm.config.sweep.cooldown_s)
            self._record_trial(trial, running[trial.service])
            last = trial

    def _known(self, trial: Trial) -> SummaryRow | None:
        return self.journal.known(trial.arm.name, trial.id)

    @contextlib.contextmanager
    def _service(self, service: Service, directory: Path) -> Iterator[Running]:
        """One service from its start to its end, timed and shown. Raises ServiceError when it is refused."""
        self._progress.service_starting(service)

        def say(text: str) -> None:
            self._progress.service_status(service, text)

        name = service_name(self.plan, self.paths, service)
        handle = service.config.cluster.service(service.config, name, directory, say)
        self._begun.append(handle)
        with self.journal.timed("service", service.label):
            try:
                handle.start()
                yield handle
            finally:
                self._progress.stopping(service)
                self._stop(handle)

    def _stop(self, handle: Running) -> None:
        """Stop it. What it leaves behind is noted as an error of the run, which goes on."""
        with uninterrupted():
            left = handle.stop()
            self._begun.remove(handle)
            if left:
                self.journal.errors.append(left)
                self._progress.teardown_failed(left)

    def _bring_up(self, expected: list[Trial], live: ExitStack) -> dict[Service, Running]:
        """Start the services of these trials side by side. The trials of one that fails are recorded as failed."""
        started: dict[Service, tuple[Running, Path]] = {}
        for service in dict.fromkeys(trial.service for trial in expected):
            directory = self.paths.service_dir(service.arms[0].name, service.repeats[0])
            set_aside(directory)
            directory.mkdir(parents=True)
            try:
                started[service] = live.enter_context(self._service(service, directory)), directory
            except ServiceError as error:
                self._record_no_service(service, expected, error, directory)
        # Asked to end all at once, before each is waited for, whatever comes while they start.
        for handle, _ in started.values():
            live.callback(handle.begin_stop)
        running: dict[Service, Running] = {}
        for service, (handle, directory) in started.items():
            try:
                with self.journal.timed("bring_up", service.label):
                    handle.wait_ready()
            except ServiceError as error:
                handle.begin_stop()
                self._record_no_service(service, expected, error, directory)
                continue
            running[service] = handle
            effective = self.journal.read_back(directory, service.arms[0].key, handle.effective)
            self._progress.service_ready(service, effective)
            for warning in effective.warnings:
                self._progress.warning(warning)
        return running

    def _record_no_service(self, service: Service, expected: list[Trial], error: ServiceError, log: Path) -> None:
        waiting = [trial for trial in expected if trial.service is service]
        self._progress.service_failed(service, str(error), len(waiting))
        self._record_not_begun(waiting, str(error), log)

    def _record_not_begun(self, trials: list[Trial], error: str, log: Path) -> None:
        for trial in trials:
            self._begin(trial)
            self.journal.fail(trial.arm.name, trial.id, "service", error, log)

    def _begin(self, trial: Trial) -> Path:
        return self.journal.begin_trial(planned_row(trial.arm, trial.level, trial.repeat, self.paths.run_id))

    def _record_trial(self, trial: Trial, running: Running) -> None:
        directory = self._begin(trial)
        try:
            with self.journal.timed("trial", f"{trial.arm.name}/{trial.id}"):
                record = self._measure(trial, running, directory)
        except (TrialError, ServiceError) as error:
            self._progress.trial_failed(trial, str(error))
            self.journal.fail(trial.arm.name, trial.id, "trial", str(error), directory)
        else:
            row = self.journal.record(record)
            self._progress.trial_done(trial, row, record.invalid_details)
        self.journal.save_summary()

    def _measure(self, trial: Trial, running: Running, directory: Path) -> TrialRecord:
        """Drive one level and judge it. Raises TrialError or ServiceError."""
        config = trial.arm.config
        before = healthy_snapshot(running)
        distance_ms = running.round_trip_ms()
        load = dataclasses.replace(expected_load(config, trial.level), urls=running.urls, token=running.token)
        started_at = now()
        with observing(config.observe, running, directory) as recordings:
            measured = config.client.run(load, directory, lambda live: self._progress.live(trial, live))
        window_end_s = measured.window_start_s + measured.duration_s
        observed = observed_facts(recordings, Period(measured.window_start_s, window_end_s))
        after = running.snapshot()
        server = None
        if before is not None and after is not None:
            check_engines(before, after)
            server = changes(before, after)
        return judge(
            trial,
            self.paths.run_id,
            directory / "samples.parquet",
            measured,
            started_at=started_at,
            server=server,
            observed=observed,
            round_trip_ms=distance_ms,
            colocated=is_here(running.urls),
        )

    def _finish(self, status: str) -> None:
        self.journal.finish(status, self._cost_usd())

    def _cost_usd(self) -> float | None:
        return spent_usd(
            self.journal.timeline, {service.label: service.config.cluster for service in self.plan.services}
        )

    def _is_too_dear(self, expected: list[Trial]) -> bool:
        """Whether the services so far, which may have taken longer than estimated, have used up `max_cost_usd`."""
        limit, cost = self.plan.arms[0].config.cluster.cost_limit_usd(), self._cost_usd()
        if limit is None or cost is None or cost < limit:
            return False
        text = f"not begun: the run has cost about {cost:.2f} USD, cluster.max_cost_usd={limit:g}"
        self._record_not_begun(expected, text, self.paths.root)
        return True

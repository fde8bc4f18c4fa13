"""The loop: bring services up, measure one level at a time, always tear down. Who reads `Run.go` knows the project.

A service or trial that fails is a recorded result and the run goes on; an interrupt ends the run after teardown.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from orchestrator.clusters.base import Running, ServiceName, SharedCluster, changes, check_engines, healthy_snapshot
from orchestrator.cost import cost_usd
from orchestrator.errors import EXIT_FAILED, EXIT_INVALID, EXIT_OK, ConfigError, ServiceError, TrialError
from orchestrator.journal import now, open_journal, planned_row, to_do
from orchestrator.observe.base import Period, is_here, observed_facts, observing
from orchestrator.paths import RunPaths, set_aside
from orchestrator.plan import Plan, Service, Trial, Wave, expected_load
from orchestrator.process import Interrupted, uninterrupted
from orchestrator.progress import Progress
from orchestrator.results.records import FAILED, PLANNED, Metrics, ServerFacts, TrialRecord
from orchestrator.results.samples import compute_metrics, read_samples, tokens_are_bunched
from orchestrator.results.validity import Evidence, check_validity


def preflight(plan: Plan, live: bool) -> None:
    """Refuse what cannot work while it still costs nothing. Raises ConfigError.

    `live`: also import each workload, and ask the cluster, which takes seconds.
    """
    for arm in plan.arms:
        arm.config.client.check(arm.config, [expected_load(arm.config, level) for level in arm.levels])
        arm.config.cluster.check(arm.config)
    _check_cost(plan)
    for arm in plan.arms if live else ():
        arm.config.client.check_live(arm.config, arm.config.cluster.startup_timeout_s)
        arm.config.cluster.check_live(arm.config)


def _check_cost(plan: Plan) -> None:
    limit, estimate = plan.arms[0].config.cluster.cost_limit_usd(), plan.cost_usd()
    if limit is None:
        return
    if estimate is None:
        raise ConfigError(
            f"cluster.max_cost_usd={limit:g} cannot be held without a price of each machine: cluster.usd_per_hour"
        )
    if estimate > limit:
        raise ConfigError(
            f"the run is estimated at {estimate:.2f} USD ({plan.service_hours:.1f} service hours), more than "
            f"cluster.max_cost_usd={limit:g}"
        )


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
    """One invocation: what is done, where it is written, what the exit code will be."""

    def __init__(self, plan: Plan, paths: RunPaths, command: list[str]) -> None:
        self.plan = plan
        self.paths = paths
        self.journal = open_journal(plan, paths, command)
        self._begun: list[Running] = []

    def go(self) -> int:
        """Run every trial that has no valid result yet; returns the exit code, unless interrupted."""
        todo = to_do(self.plan, self.journal)
        for trial in todo:
            self.journal.reopen(planned_row(trial, self.paths.run_id))
        try:
            with Progress(self.plan, len(todo)) as self._progress:
                for wave in self.plan.waves:
                    trials = [trial for trial in wave.trials if trial in todo]
                    if self._is_too_dear(trials):
                        continue
                    with ExitStack() as live:
                        running = self._bring_up(wave, trials, live)
                        measured = [trial for trial in trials if trial.service in running]
                        for trial in measured:
                            self._record_trial(trial, running[trial.service])
                            if trial is not measured[-1]:
                                with self.journal.timed("cool_down", f"{trial.arm.name}/{trial.id}"):
                                    time.sleep(trial.arm.config.sweep.cooldown_s)
        except Interrupted:
            for handle in [*self._begun]:  # the signal may have come on the way into a teardown
                self._stop(handle)
            self._finish("interrupted")
            raise
        except BaseException:
            self._finish("failed")
            raise
        states = [row.state for row in self.journal.rows]
        assert len(states) == len(self.plan.trials), states
        assert PLANNED not in states, states
        if self.journal.errors or FAILED in states:
            self._finish("failed")
            return EXIT_FAILED
        self._finish("complete")
        return EXIT_OK if all(row.valid for row in self.journal.rows) else EXIT_INVALID

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
        """What a service leaves behind is an error of the run, and not the end of it."""
        with uninterrupted():
            left = handle.stop()
            self._begun.remove(handle)
            if left:
                self.journal.errors.append(left)
                self._progress.teardown_failed(left)

    def _bring_up(self, wave: Wave, trials: list[Trial], live: ExitStack) -> dict[Service, Running]:
        """The wave's services that have something to measure, side by side; one that fails takes its trials with it."""
        started: dict[Service, tuple[Running, Path]] = {}
        for service in wave.services:
            if not any(trial.service is service for trial in trials):
                continue
            directory = self.paths.service_dir(service.arms[0].name, service.repeats[0])
            set_aside(directory)
            directory.mkdir(parents=True)
            try:
                started[service] = live.enter_context(self._service(service, directory)), directory
            except ServiceError as error:
                self._record_no_service(service, trials, error, directory)
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
                self._record_no_service(service, trials, error, directory)
                continue
            running[service] = handle
            effective = self.journal.read_back(directory, service.arms[0].key, handle.effective)
            self._progress.service_ready(service, effective.listener)
            for warning in effective.warnings:
                self._progress.warning(warning)
        return running

    def _record_no_service(self, service: Service, trials: list[Trial], error: ServiceError, log: Path) -> None:
        waiting = [trial for trial in trials if trial.service is service]
        self._progress.service_failed(service, str(error), len(waiting))
        for trial in waiting:
            self._record_failure(trial, "service", str(error), log)

    def _record_trial(self, trial: Trial, running: Running) -> None:
        directory = self.paths.trial_dir(trial.arm.name, trial.level.name, trial.repeat)
        directory.mkdir(parents=True)
        try:
            with self.journal.timed("trial", f"{trial.arm.name}/{trial.id}"):
                record = self._measure(trial, running, directory)
        except (TrialError, ServiceError) as error:
            self._progress.trial_failed(trial, str(error))
            self._record_failure(trial, "trial", str(error), directory)
        else:
            row = self.journal.record(record)
            self._progress.trial_done(trial, row, record.invalid_details)
        self.journal.save_summary()

    def _measure(self, trial: Trial, running: Running, directory: Path) -> TrialRecord:
        """Drive one level and judge it. Raises TrialError or ServiceError."""
        config, sweep = trial.arm.config, trial.arm.config.sweep
        before = healthy_snapshot(running)
        distance_ms = running.round_trip_ms()
        load = dataclasses.replace(expected_load(config, trial.level), urls=running.urls, token=running.token)
        started_at = now()
        with observing(config.observe, running, directory) as recordings:
            measured = config.client.run(load, directory, lambda live: self._progress.live(trial, live))
        window_end_s = measured.window_start_s + measured.duration_s
        observed = observed_facts(recordings, Period(measured.window_start_s, window_end_s))
        facts, duration_s, whole_run = measured.facts, measured.duration_s, measured.whole_run
        after = running.snapshot()
        server = None
        if before is not None and after is not None:
            check_engines(before, after)
            server = changes(before, after)
        samples = read_samples(directory / "samples.parquet")
        metrics = compute_metrics(samples, duration_s, dataclasses.asdict(config.slo))
        evidence = Evidence(
            samples=samples,
            metrics=metrics,
            concurrency=trial.level.concurrency,
            duration_s=duration_s,
            client=facts,
            server=server or ServerFacts(),
        )
        validity = check_validity(evidence, dataclasses.asdict(config.validity))
        return TrialRecord(
            trial_id=trial.id,
            run_id=self.paths.run_id,
            arm=trial.arm.name,
            repeat=trial.repeat,
            level=trial.level.name,
            load_mode=trial.level.load_mode,
            concurrency=trial.level.concurrency,
            offered_rps=trial.level.offered_rps,
            service_key=trial.arm.key,
            started_at=started_at,
            finished_at=now(),
            duration_s=duration_s,
            # A client that counts requests has no such times: its window lies where all its clients are busy.
            warmup_s=0.0 if whole_run else sweep.warmup_s,
            ramp_up_s=0.0 if whole_run else sweep.ramp_up_s,
            drain_s=None if whole_run else sweep.drain_s,
            client=facts,
            server=server,
            observed=observed,
            round_trip_ms=distance_ms,
            metrics=metrics,
            whole_run=whole_run,
            valid=validity.valid,
            invalid_reasons=validity.reasons,
            invalid_details=validity.details,
            unchecked=validity.unchecked,
            notes=[
                *(["colocated_client"] if is_here(running.urls) else []),
                *(["far_client"] if _is_far(distance_ms, metrics) else []),
                *(["bunched_tokens"] if tokens_are_bunched(samples, duration_s) else []),
            ],
        )

    def _record_failure(self, trial: Trial, stage: str, error: str, log: Path) -> None:
        self.journal.fail(trial.arm.name, trial.id, stage, error, log)

    def _finish(self, status: str) -> None:
        self.journal.finish(status, self._cost_usd())

    def _cost_usd(self) -> float | None:
        """Of the services' lives so far, by the declared prices; None where one is missing."""
        clusters = {each.label: each.config.cluster for each in self.plan.services}
        lives = [span for span in self.journal.timeline if span.what == "service"]
        return cost_usd((span.end_s - span.start_s, clusters[span.name]) for span in lives)

    def _is_too_dear(self, trials: list[Trial]) -> bool:
        """Whether the services so far, which may have taken longer than estimated, have used up `max_cost_usd`."""
        limit, cost = self.plan.arms[0].config.cluster.cost_limit_usd(), self._cost_usd()
        if limit is None or cost is None or cost < limit:
            return False
        for trial in trials:
            text = f"not begun: the run has cost about {cost:.2f} USD, cluster.max_cost_usd={limit:g}"
            self._record_failure(trial, "service", text, self.paths.root)
        return True


def _is_far(distance_ms: float | None, metrics: Metrics) -> bool:
    """Whether at least half of what a request takes is the way there and back."""
    latency_ms = metrics.latency_p50_ms
    return distance_ms is not None and latency_ms is not None and distance_ms > latency_ms / 2

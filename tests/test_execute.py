"""Is what happened to the service during a trial told from two snapshots, and is an interrupt never lost?"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from orchestrator import execute
from orchestrator.arms import Arm, Job
from orchestrator.clusters.base import ActorState, Snapshot, changes
from orchestrator.clusters.local import Local
from orchestrator.errors import EXIT_FAILED, ServiceError
from orchestrator.journal import Journal, open_journal, recorded_plan, reopen
from orchestrator.load.base import LevelRule, Measured
from orchestrator.load.level import Level
from orchestrator.observe.base import Observer, Period
from orchestrator.paths import RunPaths
from orchestrator.plan import Trial, make_plan
from orchestrator.process import Interrupted, interruptible
from orchestrator.progress import Progress, _result_cells, console, print_results
from orchestrator.results.records import Effective, RunRecord, keys, read, read_json
from tests import answering
from tests.conftest import ROOT, Compose
from tests.runs import planned_row, trial_record


def actor(name: str, kind: str, actor_id: str, pid: int) -> ActorState:
    return ActorState(name=name, kind=kind, id=actor_id, pid=pid)


def snapshot(*actors: ActorState, listener: int | None = 1, unhealthy: tuple[str, ...] = ()) -> Snapshot:
    found = None if listener is None else {"port": 1, "pid": listener, "process": "haproxy"}
    return Snapshot(actors=actors, listener=found, unhealthy=unhealthy)


CONTROLLER = actor("SERVE_CONTROLLER_ACTOR", "ServeController", "c1", 10)
REPLICA = actor("SERVE_REPLICA::a", "ServeReplica", "r1", 11)


def test_nothing_changed() -> None:
    found = changes(snapshot(CONTROLLER, REPLICA), snapshot(REPLICA, CONTROLLER))
    assert (found.restarted, found.failed) == ([], [])
    assert sorted(found.actors or []) == ["SERVE_CONTROLLER_ACTOR", "SERVE_REPLICA::a"]


def test_replaced_replica_is_restarted() -> None:
    new = actor("SERVE_REPLICA::b", "ServeReplica", "r2", 12)
    found = changes(snapshot(CONTROLLER, REPLICA), snapshot(CONTROLLER, new))
    assert (found.restarted, found.failed) == (["SERVE_REPLICA::a"], [])


def test_actor_that_ray_restarts_under_its_old_id_has_failed() -> None:
    again = replace(CONTROLLER, pid=99)
    found = changes(snapshot(CONTROLLER, REPLICA), snapshot(again, REPLICA))
    assert (found.restarted, found.failed) == ([], ["SERVE_CONTROLLER_ACTOR"])


def test_lost_listener_and_unhealthy_deployment_are_failures() -> None:
    after = snapshot(CONTROLLER, REPLICA, listener=None, unhealthy=("Echo: UNHEALTHY",))
    assert changes(snapshot(CONTROLLER, REPLICA), after).failed == ["Echo: UNHEALTHY", "HTTP listener"]


class Stubborn:
    """A service that cannot be ended."""

    deployed = 0
    refuses = False
    interrupts = ""  # when Ctrl-C is pressed: in its deployment, or in its teardown

    def __init__(self) -> None:
        self.effective = {"listener": None, "warnings": []}
        self.left: str | None = None

    def start(self) -> None:
        Stubborn.deployed += 1
        self.left = f"service {Stubborn.deployed} would not end"
        if self.interrupts == "deployment":
            press_ctrl_c()
        if self.refuses:
            raise ServiceError("refused") from ValueError("no")

    def wait_ready(self) -> None:
        """It is."""

    def begin_stop(self) -> None:
        """It does not listen."""

    def stop(self) -> str | None:
        if self.interrupts == "teardown":
            press_ctrl_c()
        return self.left


def press_ctrl_c(*_: object) -> None:
    """A real one: held back in a teardown, and the second says only that the first is seen to."""
    os.kill(os.getpid(), signal.SIGINT)


def measure_nothing(run: execute.Run, trial: Trial, _running: object) -> None:
    run.journal.fail(trial.arm.name, trial.id, "trial", "not measured", run.paths.root)


@pytest.fixture
def stubborn_run(tmp_path: Path, compose: Compose, monkeypatch: pytest.MonkeyPatch) -> execute.Run:
    """Of two services that are up at the same time."""
    monkeypatch.setattr(Local, "service", lambda *_: Stubborn())
    monkeypatch.setattr(Stubborn, "deployed", 0)
    config = compose("sweep=quick", "sweep.repeats=2", "cluster.max_live_services=2")
    return execute.Run(make_plan([Job(config, {}, "baseline")], seed=0), RunPaths(tmp_path), [])


@pytest.mark.parametrize(("interrupts", "left"), [("load", [2, 1]), ("deployment", [1]), ("teardown", [2, 1])], ids=str)
def test_interrupt_survives_teardowns_that_fail(
    stubborn_run: execute.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: str, left: list[int]
) -> None:
    monkeypatch.setattr(Stubborn, "interrupts", interrupts)
    action = press_ctrl_c if interrupts == "load" else measure_nothing
    monkeypatch.setattr(execute.Run, "_record_trial", action)
    with pytest.raises(Interrupted), interruptible():
        stubborn_run.go()
    assert stubborn_run.journal.errors == [f"service {number} would not end" for number in left]
    record = read_json(tmp_path / "run.json")
    assert (record["status"], record["errors"]) == ("interrupted", stubborn_run.journal.errors)


def test_an_interrupt_on_the_way_into_a_teardown_skips_none(
    stubborn_run: execute.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute.Run, "_record_trial", measure_nothing)
    monkeypatch.setattr(Progress, "stopping", press_ctrl_c)
    with pytest.raises(Interrupted), interruptible():
        stubborn_run.go()
    assert stubborn_run.journal.errors == ["service 1 would not end", "service 2 would not end"]  # 2 was on its way


def test_each_teardown_that_fails_is_told(stubborn_run: execute.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute.Run, "_record_trial", measure_nothing)
    assert stubborn_run.go() == EXIT_FAILED
    assert stubborn_run.journal.errors == ["service 2 would not end", "service 1 would not end"]


def test_why_it_was_refused_is_told_beside_what_is_left(
    stubborn_run: execute.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stubborn, "refuses", True)
    assert stubborn_run.go() == EXIT_FAILED
    assert stubborn_run.journal.errors == ["service 1 would not end", "service 2 would not end"]
    failures = [read_json(path)["error"] for path in stubborn_run.paths.root.rglob("failure.json")]
    assert set(failures) == {"refused"}


def test_services_that_start_are_asked_to_end_side_by_side(
    stubborn_run: execute.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of them is waited for, for it may take minutes, which are paid for."""
    events: list[str] = []

    class Starting(Stubborn):
        def wait_ready(self) -> None:
            press_ctrl_c()

        def begin_stop(self) -> None:
            events.append("asked")

        def stop(self) -> None:
            events.append("stopped")

    monkeypatch.setattr(Local, "service", lambda *_: Starting())
    with pytest.raises(Interrupted), interruptible():
        stubborn_run.go()
    assert events == ["asked", "asked", "stopped", "stopped"]


def test_resuming_measures_both_points_of_a_block_again(compose: Compose, tmp_path: Path) -> None:
    jobs = [
        Job(compose(f"profile={profile}", "sweep.concurrency=[2,4]", "sweep.repeats=2"), {"profile": profile}, profile)
        for profile in ("baseline", "grpc")
    ]
    plan = make_plan(jobs, 0)
    paths = RunPaths(tmp_path)

    def open_again() -> tuple[Journal, list[tuple[str, str]]]:
        journal = open_journal(plan, paths, [])
        reopen(plan, journal)
        return journal, sorted((row.arm, row.trial_id) for row in journal.rows if row.state == "planned")

    journal, todo = open_again()
    assert len(todo) == 8
    for row in journal.rows:
        if (row.arm, row.trial_id) == ("baseline", "c0002-r1"):
            journal.fail(row.arm, row.trial_id, "trial", "no luck", tmp_path)
        elif (row.arm, row.trial_id) != ("baseline", "c0002-r0"):
            journal.record(trial_record(row, valid=(row.arm, row.trial_id) != ("grpc", "c0004-r1")))
    journal.close()
    journal, todo = open_again()
    both = [(arm, trial) for arm in ("baseline", "grpc") for trial in ("c0002-r1", "c0004-r1")]
    # One that was never measured is, and what it is compared with stays: a run that was cut off just goes on.
    assert todo == sorted([*both, ("baseline", "c0002-r0")])
    assert all(paths.trial_dir(arm, trial[:5], 1).with_name(f"{trial}.attempt1").is_dir() for arm, trial in both)
    for row in journal.rows:
        journal.record(trial_record(row))
    journal.close()
    assert open_again()[1] == []


def test_what_calls_for_another_measurement_is_put_aside_last(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, the next resume would take the other arm's point for a good one."""
    jobs = [Job(compose(f"profile={name}", "sweep=quick"), {"profile": name}, name) for name in ("baseline", "grpc")]
    plan = make_plan(jobs, 0)
    journal = open_journal(plan, RunPaths(tmp_path), [])
    for row in journal.rows:
        journal.record(trial_record(row, valid=row.arm != "baseline" or row.repeat != 1))
    order: list[str] = []
    monkeypatch.setattr(Journal, "reopen", lambda _, row: order.append(row.arm))
    reopen(plan, journal)
    assert order == ["grpc"] * 3 + ["baseline"] * 3


@dataclass(frozen=True)
class Seen:
    window: Period


@dataclass
class Watching(Observer):
    """Tells which window it was asked for."""

    @contextmanager
    def during(self, service: object, directory: Path) -> Iterator[Any]:
        yield SimpleNamespace(facts=Seen)


def test_a_run_is_written_and_taken_up_again(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering.install(monkeypatch)
    fixed = ("sweep.concurrency=[2]", "sweep.repeats=1", "sweep.duration_s=4", "sweep.cooldown_s=0")
    jobs = [
        Job(compose(*fixed, f"workload.num_replicas={number}"), {"workload.num_replicas": str(number)}, "baseline")
        for number in (1, 2)
    ]
    for job in jobs:
        job.config.observe = {"watching": Watching()}
    paths = RunPaths(tmp_path)
    run = execute.Run(make_plan(jobs, 0), paths, ["x"])
    run.go()
    run.journal.close()
    record, rows = read(RunRecord, paths.run_json), pq.ParquetFile(paths.summary_parquet).read().to_pylist()
    assert (record.status, record.command, len(record.timeline)) == ("complete", ["x"], 6)
    assert sorted((row["workload.num_replicas"], row["num_replicas"], row["state"]) for row in rows) == [
        ("1", 1, "complete"),
        ("2", 2, "complete"),
    ]
    trials = {path: path.read_bytes() for path in tmp_path.rglob("trial.json")}
    assert len(trials) == 2
    for path in trials:
        assert read_json(path)["observed"] == {"watching": {"window": [100.0, 104.0]}}
    effective = read_json(next(tmp_path.rglob("effective.json")))
    assert list(effective) == list(keys(Effective))
    assert effective["warnings"] == ["none is real"]

    again = execute.Run(make_plan(jobs, 0), paths, ["x"])
    assert [row.valid for row in again.journal.rows] == [row["valid"] for row in rows]
    again.go()
    again.journal.close()
    resumed = read(RunRecord, paths.run_json)
    assert len(resumed.resumed) == 1
    assert (resumed.started_at, resumed.plan) == (record.started_at, record.plan)
    assert [row["invalid_reasons"] for row in rows] == ["", ""]
    assert trials == {path: path.read_bytes() for path in tmp_path.rglob("trial.json")}


def test_a_rate_has_its_row_in_the_table() -> None:
    at_rate = {"state": "complete", "valid": True, "load_mode": "open", "concurrency": None, "throughput_rps": 10.0}
    rows = [
        planned_row(arm="a", offered_rps=10.0, **at_rate),
        planned_row(arm="a", offered_rps=20.0, **(at_rate | {"valid": False})),
        planned_row(arm="b", offered_rps=10.0, **at_rate),
    ]
    cells = [_result_cells("a", Level.of_rate(rate), rows, {"throughput_rps": "req/s"}) for rate in (10, 20)]
    assert cells == [["10/s", "a", "10", "1/1"], ["20/s", "a", "-", "0/1"]]


def test_a_level_that_was_asked_for_has_its_row_in_the_table(compose: Compose) -> None:
    plan = make_plan([Job(compose("sweep.concurrency=[2,64]"), {}, "baseline")], 0)
    rows = [planned_row(trial_id=f"c{amount:04d}-r0", concurrency=amount, state="complete") for amount in (2, 5)]
    with console.capture() as capture:
        print_results(plan, rows)
    levels = [line.split()[0] for line in capture.get().splitlines() if "baseline" in line]
    assert levels == ["c=2", "c=5"]


def test_a_recorded_plan_is_planned_again(compose: Compose, tmp_path: Path) -> None:
    overrides = ["workload=llm", "model=tiny", "sweep=quick", "sweep.concurrency=null", "sweep.offered_rps=[4,2]"]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = hydra.compose("config", overrides=overrides)
    plan = make_plan([Job(compose(*overrides), {}, "baseline")], 3)
    paths = RunPaths(tmp_path)
    OmegaConf.save(composed, tmp_path / "config.yaml")
    paths.hydra_dir("baseline").mkdir(parents=True)
    (tmp_path / "config.yaml").rename(paths.hydra_dir("baseline") / "config.yaml")
    record = open_journal(plan, paths, []).run
    assert record.plan.arms[0].levels == ["r000004.00", "r000002.00"]
    assert record.primary_cells[0].metric == "latency_p95_ms"
    again = recorded_plan(paths, ())
    assert [(trial.arm.name, trial.id) for trial in again.trials] == [
        (trial.arm.name, trial.id) for trial in plan.trials
    ]
    rows = pq.read_table(paths.summary_parquet).to_pylist()
    assert {(row["load_mode"], row["concurrency"], row["offered_rps"]) for row in rows} == {
        ("open", None, 4.0),
        ("open", None, 2.0),
    }


class Late(LevelRule):
    """Fails after its first level, in one of two arms."""

    def __init__(self, arm: str) -> None:
        self.arm = arm

    def next(self, listed: Sequence[Level], done: Sequence[Measured]) -> Level | None:
        if done and self.arm == "baseline":
            raise KeyError("boom")
        return listed[len(done)] if len(done) < len(listed) else None


def test_a_rule_that_fails_under_way_is_told_and_the_other_arm_is_measured(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering.install(monkeypatch)
    monkeypatch.setattr(Arm, "rule", property(lambda arm: Late(arm.name)))
    fixed = ("sweep.concurrency=[2,4]", "sweep.repeats=1", "sweep.duration_s=4", "sweep.cooldown_s=0", "observe=[]")
    jobs = [Job(compose(*fixed, f"profile={name}"), {"profile": name}, name) for name in ("baseline", "grpc")]
    run = execute.Run(make_plan(jobs, 0), RunPaths(tmp_path), [])
    assert run.go() == EXIT_FAILED
    run.journal.close()
    assert sorted((row.arm, row.trial_id, row.state) for row in run.journal.rows) == [
        ("baseline", "c0002-r0", "complete"),
        ("grpc", "c0002-r0", "complete"),
        ("grpc", "c0004-r0", "complete"),
    ]
    assert read(RunRecord, run.paths.run_json).errors == [
        "the rule Late of baseline failed after 2 clients: KeyError: 'boom'"
    ]

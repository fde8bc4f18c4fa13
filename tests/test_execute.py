"""Is what happened to the service during a trial told from two snapshots, and is an interrupt never lost?"""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from orchestrator import execute, results
from orchestrator.arms import Job
from orchestrator.clusters.base import changes
from orchestrator.config import ClusterKind
from orchestrator.errors import EXIT_FAILED, ServiceError
from orchestrator.load.level import Level
from orchestrator.paths import RunPaths
from orchestrator.plan import Trial, make_plan
from orchestrator.process import Interrupted
from orchestrator.progress import _result_cells
from tests.conftest import ROOT, Compose


def actor(name: str, kind: str, actor_id: str, pid: int) -> dict[str, Any]:
    return {"name": name, "kind": kind, "id": actor_id, "pid": pid}


def snapshot(*actors: dict[str, Any], listener: int | None = 1, unhealthy: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "actors": list(actors),
        "listener": listener and {"port": 1, "pid": listener, "process": "haproxy"},
        "unhealthy": list(unhealthy),
    }


CONTROLLER = actor("SERVE_CONTROLLER_ACTOR", "ServeController", "c1", 10)
REPLICA = actor("SERVE_REPLICA::a", "ServeReplica", "r1", 11)


def test_nothing_changed() -> None:
    found = changes(snapshot(CONTROLLER, REPLICA), snapshot(REPLICA, CONTROLLER))
    assert (found["restarted"], found["failed"]) == ([], [])
    assert sorted(found["actors"]) == ["SERVE_CONTROLLER_ACTOR", "SERVE_REPLICA::a"]


def test_replaced_replica_is_restarted() -> None:
    new = actor("SERVE_REPLICA::b", "ServeReplica", "r2", 12)
    found = changes(snapshot(CONTROLLER, REPLICA), snapshot(CONTROLLER, new))
    assert (found["restarted"], found["failed"]) == (["SERVE_REPLICA::a"], [])


def test_actor_that_ray_restarts_under_its_old_id_has_failed() -> None:
    again = CONTROLLER | {"pid": 99}
    found = changes(snapshot(CONTROLLER, REPLICA), snapshot(again, REPLICA))
    assert (found["restarted"], found["failed"]) == ([], ["SERVE_CONTROLLER_ACTOR"])


def test_lost_listener_and_unhealthy_deployment_are_failures() -> None:
    after = snapshot(CONTROLLER, REPLICA, listener=None, unhealthy=("Echo: UNHEALTHY",))
    assert changes(snapshot(CONTROLLER, REPLICA), after)["failed"] == ["Echo: UNHEALTHY", "HTTP listener"]


class Stubborn:
    """A backend whose services cannot be ended."""

    deployed = 0
    refuses = False
    interrupts = ""  # when Ctrl-C is pressed: while it is deployed, or held back until it was torn down

    @contextlib.contextmanager
    def service(self, *_: Any) -> Iterator[Any]:
        Stubborn.deployed += 1
        number = Stubborn.deployed
        nothing = SimpleNamespace(effective={"listener": None, "warnings": []})
        nothing.wait_ready = nothing.begin_stop = nothing.end = lambda: None
        with interrupted_at_the_end() if self.interrupts == "teardown" else contextlib.nullcontext():
            try:
                if self.interrupts == "deployment":
                    press_ctrl_c()
                if self.refuses:
                    raise ServiceError("refused") from ValueError("no")
                yield nothing
            finally:
                raise ServiceError(f"service {number} would not end")


@contextlib.contextmanager
def interrupted_at_the_end() -> Iterator[None]:
    try:
        yield
    finally:
        press_ctrl_c()


def press_ctrl_c(*_: object) -> None:
    raise Interrupted(signal.SIGINT)


@pytest.fixture
def stubborn_run(tmp_path: Path, compose: Compose, monkeypatch: pytest.MonkeyPatch) -> execute.Run:
    """Of two services that are up at the same time."""
    monkeypatch.setitem(execute.CLUSTERS, ClusterKind.local, Stubborn)
    monkeypatch.setattr(Stubborn, "deployed", 0)
    config = compose("sweep=quick", "sweep.repeats=2", "cluster.max_live_services=2")
    return execute.Run(make_plan([Job(config, {}, "baseline")], seed=0), RunPaths(tmp_path), [])


@pytest.mark.parametrize(
    ("interrupts", "left"), [("load", [2, 1]), ("deployment", [1]), ("teardown", [2, 1])], ids=lambda each: str(each)
)
def test_interrupt_survives_teardowns_that_fail(
    stubborn_run: execute.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: str, left: list[int]
) -> None:
    monkeypatch.setattr(Stubborn, "interrupts", interrupts)
    action = press_ctrl_c if interrupts == "load" else lambda *_: None
    monkeypatch.setattr(execute.Run, "_record_trial", action)
    with pytest.raises(Interrupted):
        stubborn_run.go()
    assert stubborn_run.errors == [f"service {number} would not end" for number in left]
    record = results.read_json(tmp_path / "run.json")
    assert (record["status"], record["errors"]) == ("interrupted", stubborn_run.errors)


def test_each_teardown_that_fails_is_told(stubborn_run: execute.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: execute.Run, trial: Trial, _running: object) -> None:
        run._record_failure(trial, "trial", "not measured", run.paths.root)

    monkeypatch.setattr(execute.Run, "_record_trial", fail)
    assert stubborn_run.go() == EXIT_FAILED
    assert stubborn_run.errors == ["service 2 would not end", "service 1 would not end"]


def test_why_it_was_refused_is_told_beside_what_is_left(
    stubborn_run: execute.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stubborn, "refuses", True)
    assert stubborn_run.go() == EXIT_FAILED
    assert stubborn_run.errors == ["service 1 would not end", "service 2 would not end"]
    failures = [results.read_json(path)["error"] for path in stubborn_run.paths.root.rglob("failure.json")]
    assert set(failures) == {"refused"}


def test_services_that_start_are_asked_to_end_side_by_side(
    stubborn_run: execute.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of them is waited for, for it may take minutes, which are paid for."""
    events: list[str] = []

    class Starting:
        @contextlib.contextmanager
        def service(self, *_: Any) -> Iterator[Any]:
            try:
                asked, end = lambda: events.append("asked"), lambda: events.append("end")
                yield SimpleNamespace(wait_ready=press_ctrl_c, begin_stop=asked, end=end)
            finally:
                events.append("ended")

    monkeypatch.setitem(execute.CLUSTERS, ClusterKind.local, Starting)
    with pytest.raises(Interrupted):
        stubborn_run.go()
    assert events == ["asked", "asked", "ended", "ended", "end", "end"]  # each again: it may have been missed


def test_resuming_measures_both_points_of_a_block_again(compose: Compose, tmp_path: Path) -> None:
    jobs = [
        Job(compose(f"profile={profile}", "sweep.concurrency=[2,4]", "sweep.repeats=2"), {"profile": profile}, profile)
        for profile in ("baseline", "grpc")
    ]
    run = execute.Run(make_plan(jobs, 0), RunPaths(tmp_path), [])
    assert len(run._todo()) == 8
    for row in run.rows:
        row["valid"] = True
    assert run._todo() == set()
    run._rows["grpc", "c0004-r1"]["valid"] = False
    run._rows["baseline", "c0002-r0"]["valid"] = None
    assert run._todo() == {(arm, trial) for arm in ("baseline", "grpc") for trial in ("c0004-r1", "c0002-r0")}


def test_a_rate_has_its_row_in_the_table() -> None:
    at_rate = {"state": "complete", "valid": True, "concurrency": None, "throughput_rps": 10.0}
    rows = [
        {"arm": "a", "offered_rps": 10.0} | at_rate,
        {"arm": "a", "offered_rps": 20.0} | at_rate | {"valid": False},
        {"arm": "b", "offered_rps": 10.0} | at_rate,
    ]
    cells = [_result_cells("a", Level.of_rate(rate), rows, {"throughput_rps": "req/s"}) for rate in (10, 20)]
    assert cells == [["10/s", "a", "10", "1/1"], ["20/s", "a", "-", "0/1"]]


def test_a_recorded_plan_is_planned_again(compose: Compose, tmp_path: Path) -> None:
    overrides = ["workload=llm", "model=tiny", "sweep=quick", "sweep.concurrency=null", "sweep.offered_rps=[4,2]"]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = hydra.compose("config", overrides=overrides)
    plan = make_plan([Job(compose(*overrides), {}, "baseline")], 3)
    paths = RunPaths(tmp_path)
    OmegaConf.save(composed, tmp_path / "config.yaml")
    paths.hydra_dir("baseline").mkdir(parents=True)
    (tmp_path / "config.yaml").rename(paths.hydra_dir("baseline") / "config.yaml")
    record = execute.Run(plan, paths, [])._record
    assert record["plan"]["arms"][0]["levels"] == ["r000004.00", "r000002.00"]
    assert record["primary_cells"][0]["metric"] == "latency_p95_ms"
    again = execute.recorded_plan(paths)
    assert [(trial.arm.name, trial.id) for trial in again.trials] == [
        (trial.arm.name, trial.id) for trial in plan.trials
    ]
    rows = pq.read_table(paths.summary_parquet).to_pylist()
    assert {(row["load_mode"], row["concurrency"], row["offered_rps"]) for row in rows} == {
        ("open", None, 4.0),
        ("open", None, 2.0),
    }

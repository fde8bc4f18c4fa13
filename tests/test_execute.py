"""Is what happened to the service during a trial told from two snapshots, and is an interrupt never lost?"""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import execute, results
from orchestrator.config import ClusterKind
from orchestrator.errors import ServiceError
from orchestrator.execute import _changes
from orchestrator.paths import RunPaths
from orchestrator.plan import Job, make_plan
from orchestrator.process import Interrupted
from tests.conftest import Compose


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
    changes = _changes(snapshot(CONTROLLER, REPLICA), snapshot(REPLICA, CONTROLLER))
    assert (changes["restarted"], changes["failed"]) == ([], [])
    assert sorted(changes["actors"]) == ["SERVE_CONTROLLER_ACTOR", "SERVE_REPLICA::a"]


def test_replaced_replica_is_restarted() -> None:
    new = actor("SERVE_REPLICA::b", "ServeReplica", "r2", 12)
    changes = _changes(snapshot(CONTROLLER, REPLICA), snapshot(CONTROLLER, new))
    assert (changes["restarted"], changes["failed"]) == (["SERVE_REPLICA::a"], [])


def test_actor_that_ray_restarts_under_its_old_id_has_failed() -> None:
    again = CONTROLLER | {"pid": 99}
    changes = _changes(snapshot(CONTROLLER, REPLICA), snapshot(again, REPLICA))
    assert (changes["restarted"], changes["failed"]) == ([], ["SERVE_CONTROLLER_ACTOR"])


def test_lost_listener_and_unhealthy_deployment_are_failures() -> None:
    after = snapshot(CONTROLLER, REPLICA, listener=None, unhealthy=("Echo: UNHEALTHY",))
    assert _changes(snapshot(CONTROLLER, REPLICA), after)["failed"] == ["Echo: UNHEALTHY", "HTTP listener"]


class Stubborn:
    """A backend whose service cannot be ended."""

    @contextlib.contextmanager
    def service(self, *_: Any) -> Iterator[Any]:
        try:
            nothing = SimpleNamespace(effective={"listener": None, "warnings": []})
            nothing.wait_ready = nothing.begin_stop = lambda: None
            yield nothing
        finally:
            raise ServiceError("pid 1 would not end")


def test_interrupt_survives_a_teardown_that_fails(
    tmp_path: Path, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(*_: object) -> None:
        raise Interrupted(signal.SIGINT)

    monkeypatch.setitem(execute.CLUSTERS, ClusterKind.local, Stubborn)
    monkeypatch.setattr(execute.Run, "_record_trial", press_ctrl_c)
    plan = make_plan([Job(compose("sweep=quick"), {}, "baseline")], seed=0)
    run = execute.Run(plan, RunPaths(tmp_path), [])
    with pytest.raises(Interrupted):
        run.go()
    assert run.errors == ["pid 1 would not end"]
    assert results.read_json(tmp_path / "run.json")["status"] == "interrupted"


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

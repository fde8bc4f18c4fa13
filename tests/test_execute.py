"""Is what happened to the service during a trial told from two snapshots?"""

from typing import Any

from orchestrator.execute import _changes


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

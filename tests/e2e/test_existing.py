"""`cluster=existing` on a Ray cluster that was started by hand and holds an application of its user."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrator.clusters.remote import Address
from tests.e2e.conftest import OnUserCluster
from tests.e2e.user_cluster import FLAGS, TOKEN, Cluster, cluster, free_ports, orchestrate

pytestmark = pytest.mark.e2e
serial = pytest.mark.serial

SHORT = ["sweep.concurrency=[2]", "sweep.warmup_s=1", "sweep.ramp_up_s=0.5", "sweep.duration_s=3", "sweep.cooldown_s=0"]


@serial
def test_a_profile_that_does_not_hold_is_refused(on_user_cluster: OnUserCluster) -> None:
    """Before anything of the workload is deployed; else the flags of the cluster would be measured under its name."""
    refused = on_user_cluster.said["flags"]
    assert refused.returncode == 2, refused.stdout + refused.stderr
    said = " ".join(refused.stderr.split())
    assert "profile=haproxy does not hold" in said
    assert "RAY_SERVE_ENABLE_HA_PROXY is unset, declared 1" in said
    assert not (on_user_cluster.folder / "refused").exists()


@serial
def test_without_the_token_it_says_which_setting(on_user_cluster: OnUserCluster) -> None:
    unknown = on_user_cluster.said["no token"]
    assert unknown.returncode == 2
    assert "401" in unknown.stderr
    assert "cluster.token_env" in unknown.stderr


@serial
def test_it_is_measured_as_any_other(on_user_cluster: OnUserCluster) -> None:
    done, run = on_user_cluster.said["run"], on_user_cluster.run
    assert done.returncode in (0, 3), done.stdout + done.stderr
    rows = pq.read_table(run / "summary.parquet").to_pylist()
    assert len(rows) == 4
    assert all(row["num_successful"] > 0 and row["num_failed"] == 0 for row in rows)
    effective = json.loads(next(run.glob("services/*/r0/effective.json")).read_text())
    assert {"ServeController", "ServeReplica"} <= {actor["kind"] for actor in effective["actors"]}
    assert not [each for each in effective["actors"] if "declared" in each["name"] or "scripted" in each["name"]]
    trial = json.loads(next(run.glob("*/trials/*/trial.json")).read_text())
    assert trial["round_trip_ms"] > 0
    assert trial["server"]["restarted"] == []
    assert "colocated_client" in trial["notes"]
    assert (run / "comparison.csv").exists()
    latency_ms = {row["arm"].endswith("0.2"): row["latency_mean_ms"] for row in rows}
    assert latency_ms[True] > 200 > latency_ms[False] > 100, latency_ms


@serial
def test_cleanup_takes_out_what_a_killed_run_left(on_user_cluster: OnUserCluster) -> None:
    """Killed where it stands, it leaves its applications there; without cleanup they would stay for good."""
    assert on_user_cluster.num_applications["under load"] == 4
    found, cleaned = on_user_cluster.said["found"], on_user_cluster.said["cleaned up"]
    assert (found.returncode, found.stdout.count("is RUNNING")) == (1, 1), found.stdout + found.stderr
    assert on_user_cluster.num_applications["found"] == 4
    assert cleaned.returncode == 0, cleaned.stdout + cleaned.stderr


@serial
def test_the_users_applications_stay_as_they_are(on_user_cluster: OnUserCluster) -> None:
    """The same process answers with the same configuration, whatever we did there."""
    before = on_user_cluster.theirs["before"]
    assert before["declared"][0].endswith("secret-of-the-user")
    assert before.keys() == {"declared", "scripted"}
    for when in ("flags", "no token", "run", "cleaned up"):
        assert on_user_cluster.theirs[when] == before, when


@serial
def test_the_token_is_written_nowhere(on_user_cluster: OnUserCluster) -> None:
    for path in on_user_cluster.folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert not [when for when, done in on_user_cluster.said.items() if TOKEN in done.stdout + done.stderr]


@serial
def test_started_with_the_flags(tmp_path: Path) -> None:
    """The same profile runs where its flags hold, and baseline is what is refused.

    Without it a check that refuses every profile on every cluster would pass.
    """
    with cluster(FLAGS) as there:
        before = there.theirs()
        refused = orchestrate(there, tmp_path / "refused", "profile=baseline")
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert "RAY_SERVE_ENABLE_HA_PROXY is '1', declared unset" in " ".join(refused.stderr.split())
        done = orchestrate(there, tmp_path / "outputs", "profile=haproxy", "sweep.repeats=1", *SHORT)
        assert done.returncode in (0, 3), done.stdout + done.stderr
        assert there.theirs() == before
        (run,) = (tmp_path / "outputs").iterdir()
        effective = json.loads(next(run.glob("services/*/r0/effective.json")).read_text())
        assert all(actor["env"]["RAY_SERVE_ENABLE_HA_PROXY"] == "1" for actor in effective["actors"])


def test_nobody_there(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    done = orchestrate(Cluster(Address(f"http://127.0.0.1:{port}"), Address("")), tmp_path / "outputs")
    assert done.returncode == 2
    assert f"http://127.0.0.1:{port}" in done.stderr
    assert "refused" in done.stderr
    assert not (tmp_path / "outputs").exists()

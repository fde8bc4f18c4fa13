"""`cluster=existing` on a Ray cluster that was started by hand and holds an application of its user."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchestrator.clusters.remote import Address
from orchestrator.process import MARKER, clean_environment, end_members
from orchestrator.secrets import Secret

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "canary-5b1e-of-the-dashboard"
FLAGS = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_TCP_NODELAY": "1"}  # profile=haproxy
# Two applications of the user: one declared to the REST API, one deployed by a script.
THEIRS = """
import os

from ray import serve


@serve.deployment
class Theirs:
    async def __call__(self, _request):
        return f"{os.getpid()} {os.environ['WORD']}"


app = Theirs.bind()
if __name__ == "__main__":
    serve.run(app, name="scripted", route_prefix="/scripted")
"""


@dataclass
class Cluster:
    dashboard: Address
    serve: Address

    def names(self) -> set[str]:
        return set(json.loads(self.dashboard.request("/api/serve/applications/"))["applications"])

    def theirs(self) -> dict[str, Any]:
        """The user's applications: what each answers (its process, and a word of its configuration), and its config."""
        found = json.loads(self.dashboard.request("/api/serve/applications/"))["applications"]
        return {
            name: (self.serve.request(f"/{name}").decode(), each["deployed_app_config"]) for name, each in found.items()
        }


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def cluster(flags: dict[str, str]) -> Iterator[Cluster]:
    """`ray start --head` with these flags, as a user would, with two applications on it."""
    directory = Path(tempfile.mkdtemp(prefix="tr-"))  # short: UNIX sockets go below it
    gcs, dashboard, http, stats, metrics, fallback, agent = free_ports(7)
    (directory / "theirs.py").write_text(textwrap.dedent(THEIRS))
    ports = {
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "haproxy.sock"),
    }
    env = clean_environment() | flags | {MARKER: str(directory), "PYTHONPATH": str(directory), "WORD": "raw"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    env |= ports if flags else {}
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--temp-dir={directory}",
    ]
    command += ["--num-cpus=16", "--include-dashboard=true", f"--dashboard-agent-listen-port={agent}"]
    address = Address(f"http://127.0.0.1:{dashboard}", Secret(TOKEN))
    try:
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=300)
        declared = {
            "name": "declared",
            "import_path": "theirs:app",
            "route_prefix": "/declared",
            "runtime_env": {"env_vars": {"WORD": "secret-of-the-user"}},
            "deployments": [{"name": "Theirs", "ray_actor_options": {"num_cpus": 0.5}}],
        }
        config = {"http_options": {"host": "127.0.0.1", "port": http}, "applications": [declared]}
        body = json.dumps(config).encode()
        until(lambda: address.request("/api/serve/applications/", "PUT", body))
        script = [sys.executable, str(directory / "theirs.py")]
        env["RAY_ADDRESS"] = f"127.0.0.1:{gcs}"
        subprocess.run(script, env=env, check=True, capture_output=True, timeout=300)
        serve = Address(f"http://127.0.0.1:{http}")
        until(lambda: serve.request("/declared"))
        yield Cluster(address, serve)
    finally:
        assert end_members(directory) == []
        shutil.rmtree(directory)


def until(act: Any, trouble: type[Exception] = OSError) -> None:
    deadline_s = time.monotonic() + 120
    while True:
        try:
            act()
            return
        except trouble:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.5)


def arguments(there: Cluster, outputs: Path, *overrides: str) -> list[str]:
    command = [sys.executable, "-m", "orchestrator", "cluster=existing", "cluster.token_env=THEIR_TOKEN"]
    return [*command, f"cluster.dashboard_url={there.dashboard.url}", f"outputs={outputs}", "sweep=quick", *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "THEIR_TOKEN": TOKEN}


def orchestrate(there: Cluster, outputs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = arguments(there, outputs, *overrides)
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)


SHORT = ["sweep.concurrency=[2]", "sweep.warmup_s=1", "sweep.ramp_up_s=0.5", "sweep.duration_s=3", "sweep.cooldown_s=0"]


def test_started_without_the_flags(tmp_path: Path) -> None:
    """A profile that does not hold there is refused before anything of the workload is deployed; baseline runs."""
    with cluster({}) as there:
        before = there.theirs()
        assert before["declared"][0].endswith("secret-of-the-user")
        assert before.keys() == {"declared", "scripted"}
        refused = orchestrate(there, tmp_path / "refused", "profile=haproxy")
        assert refused.returncode == 2, refused.stdout + refused.stderr
        said = " ".join(refused.stderr.split())
        assert "profile=haproxy does not hold" in said
        assert "RAY_SERVE_ENABLE_HA_PROXY is unset, declared 1" in said
        assert not (tmp_path / "refused").exists()
        assert there.theirs() == before

        unknown = orchestrate(there, tmp_path / "refused", "cluster.token_env=null")
        assert unknown.returncode == 2
        assert "401" in unknown.stderr
        assert "cluster.token_env" in unknown.stderr

        swept = ["workload.delay_s=0,0.05", "sweep.repeats=2", "compare.treatment=workload.delay_s"]
        done = orchestrate(there, tmp_path / "outputs", "profile=baseline", *swept, *SHORT, "-m")
        assert done.returncode in (0, 3), done.stdout + done.stderr
        assert there.theirs() == before
        (run,) = (tmp_path / "outputs").iterdir()
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
        latency_ms = {row["arm"].endswith("0.05"): row["latency_mean_ms"] for row in rows}
        assert latency_ms[True] > 50 > latency_ms[False], latency_ms
        # Killed where it stands, it leaves its applications there; cleanup finds and removes them, and nothing else.
        outputs = tmp_path / "killed"
        killed = subprocess.Popen(arguments(there, outputs, "sweep.duration_s=300"), cwd=ROOT, env=environment())
        until(lambda: next(outputs.glob("*/services/*/r0/effective.json")), StopIteration)
        assert len(there.names()) == 4
        killed.kill()
        killed.wait()
        cleanup = [sys.executable, "-m", "orchestrator.cleanup", str(outputs)]
        told = subprocess.run(cleanup, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
        assert (told.returncode, told.stdout.count("is RUNNING")) == (1, 1), told.stdout + told.stderr
        assert len(there.names()) == 4
        told = subprocess.run([*cleanup, "--yes"], cwd=ROOT, env=environment(), capture_output=True, timeout=300)
        assert told.returncode == 0, told.stdout + told.stderr
        assert there.theirs() == before
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
        assert TOKEN not in done.stdout + done.stderr + refused.stdout + refused.stderr


def test_started_with_the_flags(tmp_path: Path) -> None:
    """The same profile runs where its flags hold, and baseline is what is refused."""
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

"""A Ray cluster that its user started with `ray start`, with two applications of their own, and the command on it."""

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

from orchestrator.clusters.remote import Address
from orchestrator.process import MARKER, clean_environment, end_members
from orchestrator.secrets import Secret
from tests.conftest import ROOT

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

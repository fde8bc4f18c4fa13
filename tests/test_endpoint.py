"""An address that answers already: what is refused, what is told, and a server that is not Ray under real load."""

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchestrator.clusters.endpoint import Endpoint, EndpointService
from orchestrator.clusters.remote import Address
from orchestrator.config import Config
from orchestrator.errors import ConfigError, ServiceError
from orchestrator.secrets import Secret
from tests.conftest import ROOT, Compose
from tests.leaks import canary, leaks, processes_with, seen_arguments
from tests.servers import serving

CANARY = "canary-endpoint-5d1e"
AT = "cluster=endpoint"


def check(config: Config) -> None:
    config.cluster.check(config)


def service(config: Config) -> EndpointService:
    assert isinstance(config.cluster, Endpoint)
    return EndpointService(config.cluster, config, print)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "must be an address"),
        (["cluster.url=ftp://x"], "must be an address"),
        (["cluster.url=http://a..b"], "cluster.url is not an address, found 'http://a..b'"),
        (["cluster.url='http://me:hunter2 x@host'"], "neither a password"),
        (["cluster.url=http://me:pa/ss@host"], "neither a password"),
        (["cluster.url=http://x:99999"], "cluster.url is not an address, found .*: Port out of range"),
        (["cluster.url='http://a b/'"], "cluster.url holds a space"),
        (["cluster.url=http://x", "cluster.redeploy=per_repeat"], "cluster.redeploy must be never"),
        (["cluster.url=http://me:secret@x"], "neither a password"),
        (["cluster.url='http://x/?api_key=secret'"], "nor a query"),
        (["cluster.url=http://x", "profile=optimized"], "flags of profile=optimized cannot"),
        (["cluster.url=http://x", "cluster.token_env=NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE: the environment variable"),
        (["cluster.url=http://x", "workload.locustfile=nowhere.py"], "no such file or module"),
    ],
)
def test_refused(compose: Compose, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(compose(AT, *overrides))


def test_nobody_answers(compose: Compose) -> None:
    config = compose(AT, "cluster.url=http://127.0.0.1:1", "cluster.startup_timeout_s=0.1")
    with pytest.raises(ServiceError, match=r"not ready after 0.1 s .*: http://127.0.0.1:1/.*refused"):
        service(config).wait_ready()


def test_distance() -> None:
    with serving("delay", delay_ms=20) as server:
        found = Address(server.url, Secret(CANARY)).round_trip_ms()
    assert found is not None
    assert found >= 19
    assert Address("http://127.0.0.1:1", None).round_trip_ms() is None


def test_distance_takes_no_request(compose: Compose) -> None:
    """What answers here may take its time for any request, and that is no distance."""
    with serving("delay", delay_ms=20) as server:
        running = service(compose(AT, f"cluster.url={server.url}"))
        found = running.round_trip_ms()
        assert found is not None
        assert found > 0
        assert server.stats()["num_requests"] == 0
        running.snapshot()
    with pytest.raises(ServiceError, match="nobody listens at"):
        running.snapshot()


@pytest.mark.parametrize("token", ["canary-nl-4242\n", "canary-sp 4242", "canary-\N{EURO SIGN}-4242"])
def test_a_token_that_no_header_takes(compose: Compose, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("MY_TOKEN", token)
    with pytest.raises(ConfigError, match="MY_TOKEN: the token holds a character") as refused:
        check(compose(AT, "cluster.url=http://x", "cluster.token_env=MY_TOKEN"))
    assert "canary" not in str(refused.value)


def test_its_workload_is_a_plain_get_unless_chosen(compose: Compose) -> None:
    assert compose(AT).workload.name == "http"
    assert compose(AT, "workload=streaming").workload.name == "streaming"
    with pytest.raises(ConfigError, match="needs cluster=endpoint"):
        compose("workload=http")


@pytest.mark.e2e
def test_a_server_that_dies_under_load(tmp_path: Path) -> None:
    """Nothing is measured of nobody: the point fails, and so do the others, at once."""
    with serving("static") as server:
        command = [sys.executable, "-m", "orchestrator", AT, f"cluster.url={server.url}", f"outputs={tmp_path}/outputs"]
        command += ["workload=unary", "sweep=quick", "sweep.concurrency=[2,4]", "sweep.repeats=1", "sweep.duration_s=5"]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline_s = time.monotonic() + 120
        while server.stats()["num_requests"] < 100:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 1, printed
    assert printed.count(f"nobody listens at {server.url} any more") == 2, printed


class Echo(BaseHTTPRequestHandler):
    """Answers with the token it was sent."""

    def do_GET(self) -> None:
        body = self.headers["Authorization"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@pytest.mark.e2e
def test_a_token_that_is_answered_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locustfile = tmp_path / "quoting.py"
    locustfile.write_text(
        "from locust import FastHttpUser, task\n\n\nclass User(FastHttpUser):\n"
        "    @task\n    def mark(self) -> None:\n"
        "        with self.client.get('/', catch_response=True) as response:\n"
        "            response.failure(f'said: {response.text[7:]}')\n"
        "    @task\n    def leave(self) -> None:\n"
        "        raise ValueError(self.client.get('/').text[7:])\n"
    )
    monkeypatch.setenv("MY_TOKEN", CANARY)
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = [AT, f"cluster.url=http://127.0.0.1:{server.server_port}", "cluster.token_env=MY_TOKEN"]
        command = [sys.executable, "-m", "orchestrator", *at, f"workload.locustfile={locustfile}"]
        command += [f"outputs={tmp_path}/outputs", "sweep=quick", "sweep.concurrency=[2]", "sweep.repeats=1"]
        command += ["sweep.warmup_s=0.5", "sweep.duration_s=1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        server.shutdown()
    assert done.returncode == 3, done.stdout + done.stderr
    samples = pq.read_table(next((tmp_path / "outputs").rglob("samples.parquet")))
    assert {"said: ***", "task_error: ValueError: ***"} & set(samples["error"].to_pylist())
    assert "ValueError: ***" in next((tmp_path / "outputs").rglob("client.log")).read_text()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
    assert CANARY not in done.stdout + done.stderr


@pytest.mark.e2e
def test_a_server_that_is_not_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command: without it a token might not be sent, or be found in a file or an argument of a process."""
    token = canary()
    monkeypatch.setenv("MY_TOKEN", token)
    with serving("static") as server, seen_arguments() as arguments:
        command = [sys.executable, "-m", "orchestrator", AT, f"cluster.url={server.url}", "cluster.token_env=MY_TOKEN"]
        command += [f"outputs={tmp_path}/outputs"]
        command += ["sweep=quick", "sweep.concurrency=[2]", "sweep.repeats=1", "sweep.warmup_s=1", "sweep.duration_s=2"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert f"Bearer {token}" in server.stats()["headers"]
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert "is not known" in " ".join(done.stdout.split())
    (run,) = (tmp_path / "outputs").iterdir()
    (row,) = pq.read_table(run / "summary.parquet").to_pylist()
    assert row["num_successful"] > 0
    assert row["num_failed"] == 0
    assert {"unchecked:replica_restart", "unchecked:actor_failed"} <= set(row["notes"].split(";"))
    trial = json.loads(next(run.glob("*/trials/*/trial.json")).read_text())
    assert trial["server"] is None
    assert trial["round_trip_ms"] > 0
    said = (done.stdout + done.stderr).encode()
    assert leaks(token, tmp_path, output=said, arguments=b"\n".join(arguments)) == []
    assert processes_with("MY_TOKEN", token) == []

"""What is refused on an existing cluster, where a PUT would touch applications of others. A dashboard of ours answers.

tests/e2e/test_existing.py has the real one.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from tests.conftest import Compose

DECLARED = {
    "source": "declarative",
    "status": "RUNNING",
    "deployed_app_config": {"name": "theirs", "import_path": "a:b"},
}
CALM = {
    "http_options": {"port": 8000},
    "proxy_location": "EveryNode",
    "target_capacity": None,
    "applications": {"theirs": DECLARED},
}


class Dashboard(ThreadingHTTPServer):
    """Tells `there` and takes nothing but uploads; `put` are the bodies of what was asked to change."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.there: Any = CALM
        self.put: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        is_package = self.path.startswith("/api/packages/")
        self._answer(404 if is_package else 200, b"" if is_package else json.dumps(self.server.there).encode())

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/api/packages/"):
            return self._answer(200)
        self.server.put.append(json.loads(body))
        return self._answer(400, b"app of others [type=missing, input_value={'password': 'theirs-4711'}]")

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with Dashboard() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def refused(dashboard: Dashboard, compose: Compose) -> str:
    url = f"cluster.dashboard_url=http://127.0.0.1:{dashboard.server_port}"
    config = compose("cluster=existing", url)
    with pytest.raises(ConfigError) as refusal:
        config.cluster.check_live(config)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"http_options": None}, "Serve does not run there"),
        ({"target_capacity": 50}, "a rollout is under way"),
        ({"applications": {"theirs": DECLARED | {"status": "DEPLOYING"}}}, "theirs is DEPLOYING"),
        ({"applications": {"theirs": DECLARED | {"deployed_app_config": None}}}, "does not tell theirs's config"),
        (
            {"applications": {"theirs": DECLARED | {"deployed_app_config": {"runtime_env": "<redacted>"}}}},
            "does not tell theirs's config",
        ),
    ],
)
def test_nothing_is_put_that_we_would_have_to_guess(
    dashboard: Dashboard, compose: Compose, there: dict[str, Any], said: str
) -> None:
    dashboard.there = CALM | there
    assert said in refused(dashboard, compose)
    assert dashboard.put == []


def test_what_is_there_is_put_again_beside_ours_and_not_quoted(dashboard: Dashboard, compose: Compose) -> None:
    """The API takes the list of all; what it refuses it quotes, which may be a secret of others."""
    text = refused(dashboard, compose)
    assert "app of others" in text
    assert "4711" not in text
    (put,) = dashboard.put
    theirs, ours = put["applications"]
    assert theirs == DECLARED["deployed_app_config"]
    assert ours["name"].startswith("so-look-")
    assert (put["http_options"], put["proxy_location"]) == (CALM["http_options"], CALM["proxy_location"])


def test_an_address_that_is_no_dashboard(dashboard: Dashboard, compose: Compose) -> None:
    dashboard.there = {"hello": "world"}
    assert "is not Serve's API" in refused(dashboard, compose)

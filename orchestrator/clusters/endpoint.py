"""An address that answers already, Ray or not: nothing is deployed, and what runs behind it cannot be proved."""

import http.client
import os
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.clusters.local_ray import check_client, check_client_imports
from orchestrator.config import Config
from orchestrator.errors import ConfigError, ServiceError
from orchestrator.secrets import Secret

_NUM_ROUND_TRIPS = 9
_TIMEOUT_S = 30.0


class Endpoint:
    """Only looks whether somebody answers."""

    def check(self, config: Config) -> None:
        """Raises ConfigError."""
        check_client(config)
        url = config.cluster.url or ""
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ConfigError(f"cluster.url must be an address such as http://host:8000, found {config.cluster.url!r}")
        if "@" in urlsplit(url).netloc:
            raise ConfigError(
                "cluster.url holds a password; put a token into an environment variable: cluster.token_env"
            )
        if config.profile.env or config.profile.app:
            raise ConfigError(
                f"cluster {config.cluster.name} deploys nothing, so the flags of profile={config.profile.name} cannot "
                "reach what answers; use profile=baseline, and compare addresses: cluster.url=http://a,http://b -m"
            )
        token_of(config)

    def check_imports(self, config: Config) -> None:
        """Import the client's file in a child process. Raises ConfigError."""
        check_client_imports(config)

    def rendered(self, config: Config, _name: Any) -> str:
        """For a dry run."""
        return f"# Nothing is deployed: load goes to\nurl: {config.cluster.url}\n"

    @contextmanager
    def service(
        self, config: Config, _name: Any, log_dir: Path, _on_status: Callable[[str], None]
    ) -> Iterator["EndpointService"]:
        """Nothing to bring up, nothing to take down."""
        (log_dir / "service.yaml").write_text(self.rendered(config, None))
        yield EndpointService(config)


class EndpointService:
    """`urls` take load, with `token` as bearer; `effective` holds nothing that was read back."""

    def __init__(self, config: Config) -> None:
        assert config.cluster.url is not None
        self.urls = [config.cluster.url.rstrip("/")]
        self.token = token_of(config)
        self._ready_path = config.workload.ready_path
        self._timeout_s = config.cluster.startup_timeout_s
        self.effective: dict[str, Any] = {
            "declared_env": {},
            "actors": [],
            "engine": None,
            "flag_effects": {},
            "consequences": {},
            "warnings": ["nothing was deployed, so which flags and versions answer here is not known"],
            "isolation_env": [],
            "listener": None,
            "versions": {},
            "hardware": {},
        }

    def wait_ready(self) -> None:
        """Until the workload's ready path answers 200. Raises ServiceError with the last answer."""
        deadline_s = time.monotonic() + self._timeout_s
        headers = {"Authorization": f"Bearer {self.token.reveal()}"} if self.token else {}
        request = urllib.request.Request(self.urls[0] + self._ready_path, headers=headers)
        while True:
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
                    reply.read()
                    return
            except (OSError, http.client.HTTPException, ValueError) as error:
                if time.monotonic() > deadline_s:
                    raise ServiceError(
                        f"{self.urls[0]}{self._ready_path} does not answer 200 within {self._timeout_s:g} s "
                        f"(cluster.startup_timeout_s): {error}"
                    ) from error
            time.sleep(1.0)

    def begin_stop(self) -> None:
        """There is nothing to stop."""

    def snapshot(self) -> None:
        """Nobody can look inside."""


def token_of(config: Config) -> Secret | None:
    """The token from the environment variable that the config names. Raises ConfigError when it is not set."""
    name = config.cluster.token_env
    if name is None:
        return None
    if not os.environ.get(name):
        raise ConfigError(f"cluster.token_env={name}: the environment variable is not set, or empty")
    return Secret(os.environ[name])


def round_trip_ms(url: str, token: Secret | None) -> float | None:
    """Median time of a request that does nothing (Serve's health route) on an open connection; None without answer.

    Any answer will do, 404 included: it is the distance that is asked for.
    """
    parts = urlsplit(url)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = connect(parts.netloc, timeout=_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {token.reveal()}"} if token else {}
    took_ms = []
    try:
        for _ in range(_NUM_ROUND_TRIPS + 1):
            began_s = time.perf_counter()
            connection.request("GET", f"{parts.path.rstrip('/')}/-/healthz", headers=headers)
            connection.getresponse().read()
            took_ms.append((time.perf_counter() - began_s) * 1000)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return statistics.median(took_ms[1:])  # the first one opens the connection

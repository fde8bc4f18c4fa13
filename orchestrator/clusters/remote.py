"""What services elsewhere share: an address over HTTP, the probe application beside the workload, the upload."""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator import provenance
from orchestrator.application import engine_arguments
from orchestrator.clusters.base import Snapshot
from orchestrator.clusters.engine import arrived
from orchestrator.errors import ConfigError, ServiceError
from orchestrator.secrets import Secret, redact
from orchestrator.sections import ServiceConfig
from orchestrator.waiting import poll

_REQUEST_TIMEOUT_S = 90.0  # the probe asks every Serve actor
_CONNECT_TIMEOUT_S = 10.0
_POLL_S = 1.0
_NUM_ROUND_TRIPS = 9


@dataclass(frozen=True)
class Address:
    """A URL without a slash at its end, and the bearer token it wants. Requests go straight there, as the load's do."""

    url: str
    token: Secret | None = None

    def _headers(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token.reveal()}"}

    def request(self, path: str, method: str = "GET", body: bytes | None = None) -> bytes:
        """The body of a 200. Raises OSError (with what was answered instead) or HTTPException."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
        kind = {"Content-Type": "application/json"} if body and body.startswith(b"{") else {}
        request = urllib.request.Request(self.url + path, body, self._headers() | kind, method=method)
        try:
            with opener.open(request, timeout=_REQUEST_TIMEOUT_S) as reply:
                answer: bytes = reply.read()
                return answer
        except urllib.error.HTTPError as error:
            raise OSError(redact(f"{error}: {_shown(error.read(2000).decode(errors='replace'))}")) from None

    def wait_for(self, path: str, timeout: "Timeout", say: Callable[[str], None]) -> bytes:
        """The body of the first 200. Raises ServiceError with the last answer."""
        text = ""
        for _ in timeout.poll(_POLL_S):
            try:
                return self.request(path)
            except (OSError, http.client.HTTPException) as error:
                text = f"{self.url}{path.partition('?')[0]}: {error}"
            say(text)
        raise timeout.over(text)

    def round_trip_ms(self) -> float | None:
        """Median time of a request that does nothing (Serve's health route) on an open connection; None without answer.

        Any answer will do, 404 included: it is the distance that is asked for.
        """
        parts = urlsplit(self.url)
        connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = connect(parts.netloc, timeout=_REQUEST_TIMEOUT_S)
        took_ms = []
        try:
            for _ in range(_NUM_ROUND_TRIPS + 1):
                began_s = time.perf_counter()
                connection.request("GET", f"{parts.path}/-/healthz", headers=self._headers())
                connection.getresponse().read()
                took_ms.append((time.perf_counter() - began_s) * 1000)
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return statistics.median(took_ms[1:])  # the first one opens the connection

    def connect(self) -> socket.socket:
        """An open connection, that nobody has answered on. Raises OSError."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S)

    def connect_ms(self) -> float | None:
        """Median time until a connection is open, which no application answers; None when one does not open."""
        took_ms = []
        try:
            with self.connect() as first:  # the name is looked up once, as for load on open connections
                family, address = first.family, first.getpeername()
            for _ in range(_NUM_ROUND_TRIPS):
                with socket.socket(family, socket.SOCK_STREAM) as connection:
                    connection.settimeout(_CONNECT_TIMEOUT_S)
                    began_s = time.perf_counter()
                    connection.connect(address)
                    took_ms.append((time.perf_counter() - began_s) * 1000)
        except OSError:
            return None
        return statistics.median(took_ms)


def _shown(body: str) -> str:
    """The text, or a placeholder where it is a page of HTML."""
    return "(a page of HTML)" if body.lstrip()[:5].lower() in ("<!doc", "<html") else body


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the token to another address."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


class Timeout:
    """How long a service may take until it is ready: `cluster.startup_timeout_s`, or less."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s

    def poll(self, interval_s: float) -> Iterator[None]:
        """Loop turns until the time is over, which counts from the object's creation over all such loops."""
        return poll(interval_s, self._deadline_s - time.monotonic())

    def over(self, text: str) -> ServiceError:
        """The error to raise when the time is over; `text` is what was seen last."""
        return ServiceError(f"not ready after {self._timeout_s:g} s (cluster.startup_timeout_s): {text}")


@dataclass(frozen=True)
class Probe:
    """The application at `route` of `address` that tells what a Serve application runs with."""

    address: Address
    route: str

    @staticmethod
    def rendered(
        name: str, route: str, of: Mapping[str, Any], declared: Mapping[str, str], environment: Mapping[str, str]
    ) -> dict[str, object]:
        """Its Serve application config: what it is asked is bound to it, so that nobody else can ask for more."""
        args = {"application": of["name"], "declared": dict(declared), "environment": dict(environment)}
        return {"name": name, "import_path": "workloads.probe.app:build", "route_prefix": route, "args": args}

    def told(self, timeout: Timeout, say: Callable[[str], None]) -> Mapping[str, Any]:
        """What it says of the live service, as `workloads.probe.readback.summary`. Raises ServiceError."""
        answer = b""
        for _ in timeout.poll(_POLL_S):
            answer = self.address.wait_for(f"{self.route}/effective", timeout, say)
            with contextlib.suppress(ValueError):
                told = json.loads(answer)
                if isinstance(told, dict) and "actors" in told:
                    return told
            # Somebody else answers this route as long as Serve's proxies do not know ours.
        raise timeout.over(f"{self.address.url}{self.route} is not answered by the probe: {answer[:200]!r}")

    def effective(self, config: ServiceConfig, timeout: Timeout, say: Callable[[str], None]) -> Mapping[str, Any]:
        """What the live service really runs with. Raises ServiceError when something declared did not arrive."""
        try:
            told = arrived(self.told(timeout, say), engine_arguments(config))
        except ValueError as error:
            raise ServiceError(str(error)) from error
        return {"declared_env": config.profile.env, **told, "listener": None}

    def snapshot(self) -> Snapshot:
        """Serve actors alive now and what Serve calls unhealthy; no actors (None) when it does not answer."""
        listener: Mapping[str, object] = {}  # who listens is not ours to see
        try:
            told = json.loads(self.address.request(f"{self.route}/snapshot"))
        except (OSError, http.client.HTTPException, ValueError):
            return Snapshot(actors=None, listener=listener, unhealthy=[])
        return Snapshot.parse({**told, "listener": listener})


def check_uploaded(config: ServiceConfig, cluster: str) -> None:
    """Refuse an application whose module is not among what is uploaded. Raises ConfigError."""
    if config.workload.application is None:
        raise ConfigError(
            f"workload {config.workload.name} has no Serve application, which cluster={cluster} needs; "
            "run it on a machine with GPUs itself, cluster=local_h100"
        )
    module = config.workload.application["import_path"].split(":")[0]
    source = provenance.find_module(module)
    if source is None or provenance.ROOT / "workloads" not in source.parents:
        raise ConfigError(f"{module} is not below workloads/ of this repository, which alone is uploaded")


def stage(directory: Path) -> None:
    """Copy `workloads/` into `directory`, importable under the same names, without hidden files and caches."""

    def copy(source: str, target: str) -> None:
        shutil.copyfile(source, target)
        os.utime(target, (1e9, 1e9))  # the same source is the same upload, and no zip holds a time before 1980

    ignored = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(provenance.ROOT / "workloads", directory / "workloads", ignore=ignored, copy_function=copy)


def token_of(name: str | None) -> Secret | None:
    """The token from the environment variable `name` (`cluster.token_env`). Raises ConfigError when it is not set."""
    if name is None:
        return None
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"cluster.token_env={name}: the environment variable is not set, or empty")
    if not re.fullmatch(r"[!-~]+", value):
        raise ConfigError(
            f"cluster.token_env={name}: the token holds a character that no HTTP header takes, perhaps a line end"
        )
    return Secret(value)


def check_address(key: str, url: str | None) -> None:
    """Refuse, with the name of `key`, what is no HTTP address, and one with a password or query. Raises ConfigError."""
    if re.search(r"[@?#]", url or ""):  # before anything else, which might quote it
        raise ConfigError(f"{key} may hold neither a password nor a query; a token's variable is cluster.token_env")
    try:
        parts = urlsplit(url or "")
        _ = parts.port, (parts.hostname or "").encode("idna")  # only now are they looked at
    except ValueError as error:
        raise ConfigError(f"{key} is not an address, found {url!r}: {error}") from None
    if re.search(r"\s", url or ""):
        raise ConfigError(f"{key} holds a space: {url!r}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{key} must be an address such as http://host:8000, found {url!r}")

"""A Ray cluster that runs already: our applications beside whoever else's, through Serve's REST API.

Flags are read when Ray and Serve start, so none can be set here: a profile is verified against the live cluster and
refused where it does not hold. The API takes the list of *all* declared applications, so ours are added to those that
are there and taken out of them again; nobody must deploy there by the same API at the same instant.
"""

import contextlib
import functools
import hashlib
import http.client
import io
import json
import re
import secrets
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import yaml

from orchestrator.application import check_deployed, render_application
from orchestrator.clusters.base import ServiceName, SharedCluster, Snapshot
from orchestrator.clusters.remote import (
    Address,
    Probe,
    Timeout,
    check_address,
    check_uploaded,
    stage,
    token_of,
)
from orchestrator.errors import ConfigError, ServiceError
from orchestrator.process import uninterrupted
from orchestrator.secrets import Secret
from orchestrator.sections import ServiceConfig
from orchestrator.waiting import poll

_APPLICATIONS = "/api/serve/applications/"
_POLL_S = 1.0
_DELETE_TIMEOUT_S = 300.0
_ANSWER_TIMEOUT_S = 60.0
_MISSING_S = 30.0
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


@dataclass(kw_only=True)
class Existing(SharedCluster):
    """Adds applications to a Ray cluster that somebody else runs."""

    dashboard_url: str | None  # of the head node
    token_env: str | None = None  # the environment variable that holds the dashboard's token; never the token itself
    url: str | None = None  # where load goes; null = Serve's HTTP port on the dashboard's machine

    def identity(self) -> Mapping[str, object]:
        """Without the names of the token's variable and of the services, which change nothing in a service."""
        left_out = ("token_env", "service_prefix")
        return {key: value for key, value in super().identity().items() if key not in left_out}

    def check(self, config: ServiceConfig) -> None:
        """Refuse what can be seen to be wrong without asking the cluster. Raises ConfigError."""
        check_address("cluster.dashboard_url", self.dashboard_url)
        if self.url is not None:
            check_address("cluster.url", self.url)
        check_uploaded(config, self.name)
        check_deployed(config, self)
        if not config.dry_run:
            token_of(self.token_env)

    def check_live(self, config: ServiceConfig) -> None:
        """Refuse a profile whose flags the live cluster does not have. Raises ConfigError."""
        try:
            told = _look(_dashboard(self), self.url, self.startup_timeout_s)
        except ServiceError as error:
            raise ConfigError(f"cluster.dashboard_url={self.dashboard_url}: {error}") from error
        environments = [actor["env"] for actor in told["actors"]]
        wanted = {name: value for name, value in self.service_env(config).items() if name.startswith(("RAY_", "VLLM_"))}
        # Any other flag of Serve that is set there would be measured under this profile's name.
        there = {name for env in environments for name in env if name.startswith("RAY_SERVE_")}
        wrong = []
        for name in sorted((there - set(told["isolation_env"])) | wanted.keys()):
            found = {env.get(name) for env in environments}
            if found != {wanted.get(name)}:
                values = " and ".join("unset" if value is None else repr(value) for value in sorted(found, key=str))
                wrong.append(f"{name} is {values}, declared {wanted.get(name, 'unset')}")
        if wrong:
            raise ConfigError(
                f"profile={config.profile.name} does not hold on the cluster at {self.dashboard_url}:\n  "
                + "\n  ".join(wrong)
                + "\nFlags are read when Ray starts: put them before `ray start`, or choose the profile that is there. "
                "A setting of the cluster that is no part of the comparison belongs to cluster.env"
            )

    def rendered(self, config: ServiceConfig, name: ServiceName) -> str:
        """`service.yaml`, for a dry run."""
        return service_yaml(self, config, name, "<upload of workloads/>")

    def left_over(self, config: ServiceConfig, names: Sequence[ServiceName]) -> dict[ServiceName, str]:
        """Those of these services that a run left behind, with their state. Raises ServiceError."""
        found = _dashboard(self).applications()
        there = {name: [ours for ours in _names(name) if ours in found] for name in names}
        return {name: found[applications[0]]["status"] for name, applications in there.items() if applications}

    def end(self, config: ServiceConfig, name: ServiceName, log_dir: Path) -> str | None:
        """Remove what a run left behind; returns a sentence on what could not be removed, else None."""
        return _dashboard(self).remove_all(_names(name))

    def service(
        self, config: ServiceConfig, name: ServiceName, log_dir: Path, on_status: Callable[[str], None]
    ) -> "ExistingService":
        """A handle of one service, which `start` deploys."""
        return ExistingService(self, config, name, log_dir, on_status)


class ExistingService:
    """`urls` take load below our own route; `effective` is what the live cluster reported."""

    def __init__(
        self,
        cluster: Existing,
        config: ServiceConfig,
        name: ServiceName,
        log_dir: Path,
        on_status: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self.token: Secret | None = None
        self.marker: str | None = None
        self.urls: list[str] = []
        self.effective: Mapping[str, Any] = {}
        self._config, self._name, self._log_dir, self._on_status = config, name, log_dir, on_status
        self._dashboard = _dashboard(cluster)
        self._applications: Sequence[Mapping[str, Any]] = []
        self._may_be_there = False
        self._left: str | None = None
        self._serve = Address("")

    def start(self) -> None:
        """Deploy the service's applications. Raises ServiceError when they are refused."""
        working_dir = _upload(self._dashboard)
        self._applications = render_applications(self._cluster, self._config, self._name, working_dir)
        (self._log_dir / "service.yaml").write_text(service_yaml(self._cluster, self._config, self._name, working_dir))
        self._on_status("deploying")
        self._dashboard.check_room(_names(self._name))
        self._may_be_there = True
        self._dashboard.add(self._applications)

    def wait_ready(self) -> None:
        """Until the applications run, the workload answers 200 and every Serve actor has told what it runs with.

        Raises ServiceError with Serve's own words when it cannot be brought up.
        """
        timeout = Timeout(self._cluster.startup_timeout_s)
        ours, probe = self._applications
        self._dashboard.wait_running([ours["name"], probe["name"]], timeout, self._on_status)
        self._serve = self._dashboard.serve(self._cluster.url)
        self.urls = [self._serve.url + ours["route_prefix"]]
        self._serve.wait_for(ours["route_prefix"] + self._config.workload.ready_path, timeout, self._on_status)
        self.effective = self._probe().effective(self._config, timeout, self._on_status)

    def begin_stop(self) -> None:
        """Ask for removal without waiting for it."""
        if self._may_be_there:
            with uninterrupted(), contextlib.suppress(ServiceError):  # `stop` asks again, and reports
                self._dashboard.remove(_names(self._name))

    def stop(self) -> str | None:
        """Remove the applications and wait until they are gone; returns what is left. A second call repeats that."""
        if self._may_be_there:
            with uninterrupted():
                self._left = self._dashboard.remove_all(_names(self._name))
                self._may_be_there = False
        return self._left

    def snapshot(self) -> Snapshot:
        """Serve actors alive now and what Serve calls unhealthy."""
        return self._probe().snapshot()

    def round_trip_ms(self) -> float | None:
        """Median round trip, ms, of a request to Serve's health route; None without an answer."""
        return self._serve.round_trip_ms()

    def _probe(self) -> Probe:
        return Probe(self._serve, self._applications[1]["route_prefix"])


class _Deployment(TypedDict):
    message: str


class _Application(TypedDict, total=False):
    """What Serve's REST API tells of an application; what we read of it."""

    status: str
    source: str  # "declarative": deployed by a config, as ours are; else by a program
    message: str
    deployments: Mapping[str, _Deployment]
    deployed_app_config: Mapping[str, object] | None  # to be repeated, whatever is in it


class _Details(TypedDict):
    """Serve's answer on everything that runs in its cluster; what we read of it."""

    applications: Mapping[str, _Application]
    http_options: Mapping[str, object]  # empty: Serve does not run
    proxy_location: str
    target_capacity: float | None


@dataclass(frozen=True)
class _Dashboard:
    """Serve's REST API on the dashboard of a cluster."""

    address: Address

    def details(self) -> _Details:
        """Serve's answer on everything that runs there. Raises ServiceError."""
        text = self.request(_APPLICATIONS)
        try:
            found: _Details = json.loads(text)
            assert "applications" in found
        except (ValueError, AssertionError):
            raise ServiceError(f"{self.address.url}{_APPLICATIONS} is not Serve's API: {text[:200]!r}") from None
        return found

    def applications(self) -> Mapping[str, _Application]:
        """Name to what Serve tells of it. Raises ServiceError."""
        return self.details()["applications"]

    def check_room(self, names: Sequence[str]) -> None:
        """Raise ServiceError where a name is taken, or adding would disturb applications of others."""
        details = self.details()
        if not details.get("http_options"):
            raise ServiceError("Serve does not run there, and would stay if we started it: run `serve start` there")
        if details.get("target_capacity") is not None:
            raise ServiceError("a rollout is under way there (target_capacity); try again when it is over")
        for name, application in details["applications"].items():
            if name in names:
                raise ServiceError(f"the application {name} is there already: it is not ours, and is left alone")
            if application["source"] == "declarative" and application["status"] == "DEPLOYING":
                raise ServiceError(f"the application {name} is DEPLOYING, and would begin anew; try again when it runs")

    def add(self, applications: Sequence[Mapping[str, Any]]) -> None:
        """Add applications to those that are declared there. Raises ServiceError."""
        self._apply(lambda others: [*others, *applications])

    def remove(self, names: Sequence[str]) -> None:
        """Take applications out of those that are declared there, if any of them is. Raises ServiceError."""
        if any(name in self.applications() for name in names):
            self._apply(lambda others: [other for other in others if other["name"] not in names])

    def remove_all(self, names: Sequence[str]) -> str | None:
        """Remove applications and wait until they are gone; returns a sentence on what is left, else None."""
        trouble = "still there"
        for _ in poll(_POLL_S, timeout_s=_DELETE_TIMEOUT_S):
            try:
                self.remove(names)
                if not any(name in self.applications() for name in names):
                    return None
            except ServiceError as error:
                trouble = str(error)
        return (
            f"the applications {', '.join(names)} could not be removed within {_DELETE_TIMEOUT_S:g} s: {trouble}. "
            "Apply the cluster's Serve config without them (serve deploy), or: python -m orchestrator.cleanup"
        )

    def wait_running(self, names: Sequence[str], timeout: Timeout, say: Callable[[str], None]) -> None:
        text, there_until_s = "", time.monotonic() + _MISSING_S
        for _ in timeout.poll(_POLL_S):
            try:
                found = self.applications()
            except ServiceError as error:
                text = str(error)
            else:
                states = {name: found.get(name, _Application(status="not there")) for name in names}
                for name, state in states.items():
                    if state["status"] in _FAILED:
                        raise ServiceError(f"{name} is {state['status']}: {_messages(state)}")
                if all(state["status"] == "RUNNING" for state in states.values()):
                    return
                text = "; ".join(f"{name}: {state['status']}" for name, state in states.items())
                if not any("not there" in state.values() for state in states.values()):
                    there_until_s = time.monotonic() + _MISSING_S
                elif time.monotonic() > there_until_s:
                    raise ServiceError(f"{text}. Somebody else deployed there at the same instant?")
            say(text)
        raise timeout.over(text)

    def serve(self, url: str | None) -> Address:
        """Where Serve takes requests: `url`, or else its port on the dashboard's machine."""
        if url is None:
            host = self.address.url.removeprefix("https://").removeprefix("http://").partition("/")[0]
            url = f"http://{re.sub(r':[0-9]+$', '', host)}:{self.details()['http_options']['port']}"
        return Address(url.rstrip("/"))

    def _apply(self, change: Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]]) -> None:
        """Declare there what `change` makes of what is declared. Raises ServiceError."""
        details = self.details()
        declared = []
        for name, application in details["applications"].items():
            if application["source"] == "declarative" and application["status"] != "DELETING":
                config = application["deployed_app_config"]
                if not config or "<redacted>" in json.dumps(config):
                    raise ServiceError(f"the dashboard does not tell {name}'s config, which we would have to repeat")
                declared.append(config)
        body = {
            "http_options": details["http_options"],
            "proxy_location": details["proxy_location"],
            "target_capacity": details["target_capacity"],
            "applications": change(declared),
        }
        self.request(_APPLICATIONS, "PUT", json.dumps(body).encode())

    def request(self, path: str, method: str = "GET", body: bytes | None = None) -> bytes:
        """The body of a 200. Raises ServiceError with what was answered instead."""
        try:
            return self.address.request(path, method, body)
        except (OSError, http.client.HTTPException) as error:
            hint = "; cluster.token_env names the variable with the token" if " 401" in str(error) else ""
            # What pydantic refuses it quotes, and that may be the config of others.
            said = re.sub(r"\[type=[^\n]*", "", str(error))
            raise ServiceError(f"{self.address.url}{path}: {said}{hint}") from None


def _dashboard(cluster: Existing) -> _Dashboard:
    assert cluster.dashboard_url is not None
    return _Dashboard(Address(cluster.dashboard_url.rstrip("/"), token_of(cluster.token_env)))


@functools.cache  # once for all arms of a run
def _look(dashboard: _Dashboard, url: str | None, timeout_s: float) -> Mapping[str, Any]:
    """What controller, proxies and one replica run with, told by a probe that is put there for this alone."""
    dashboard.details()  # before anything is uploaded: that this is a dashboard of Serve
    name = f"so-look-{secrets.token_hex(4)}"
    runtime_env = {"working_dir": _upload(dashboard)}
    probe = Probe.rendered(name, f"/{name}", {"name": name}, {}, {}) | {"runtime_env": runtime_env}
    dashboard.check_room([name])
    try:
        dashboard.add([probe])
        dashboard.wait_running([name], Timeout(timeout_s), lambda text: None)
        # It runs: where it does not answer soon, `url` is wrong.
        timeout = Timeout(min(timeout_s, _ANSWER_TIMEOUT_S))
        return Probe(dashboard.serve(url), f"/{name}").told(timeout, lambda text: None)
    finally:
        with uninterrupted():
            left = dashboard.remove_all([name])
        if left:
            raise ServiceError(left)


def render_applications(
    cluster: Existing, config: ServiceConfig, name: ServiceName, working_dir: str
) -> Sequence[Mapping[str, Any]]:
    """Config of the workload's application and of the probe, each below a route of its own."""
    runtime_env, (ours_name, probe_name) = {"working_dir": working_dir}, _names(name)
    ours = render_application(config) | {"name": ours_name, "route_prefix": f"/{ours_name}"}
    probe = Probe.rendered(probe_name, f"/{probe_name}", ours, config.profile.env, cluster.service_env(config))
    return [ours | {"runtime_env": runtime_env}, probe | {"runtime_env": runtime_env}]


def _names(name: ServiceName) -> tuple[str, str]:
    return name.service, f"{name.service}-probe"


def service_yaml(cluster: Existing, config: ServiceConfig, name: ServiceName, working_dir: str) -> str:
    """`service.yaml`: what is added to the applications that the cluster runs."""
    head = f"# Added to the applications at {cluster.dashboard_url}, and removed from them again.\n"
    rendered = {"applications": render_applications(cluster, config, name, working_dir)}
    return head + yaml.dump(rendered, Dumper=_NoAliases, sort_keys=False)


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _messages(application: _Application) -> str:
    """Serve's own words on an application that failed."""
    deployments = application.get("deployments", {})
    told = [application["message"], *(f"{name}: {state['message']}" for name, state in deployments.items())]
    return "\n".join(text for text in told if text.rpartition(": ")[2])


def _upload(dashboard: _Dashboard) -> str:
    """Give `workloads/` to the cluster; returns its URI. Raises ServiceError."""
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="so-upload-") as staged:
        stage(Path(staged))
        with zipfile.ZipFile(packed, "w") as package:
            for path in sorted(Path(staged).rglob("*")):
                package.write(path, path.relative_to(staged))
    name = f"_ray_pkg_{hashlib.sha256(packed.getvalue()).hexdigest()[:32]}.zip"
    dashboard.request(f"/api/packages/gcs/{name}", "PUT", packed.getvalue())
    return f"gcs://{name}"

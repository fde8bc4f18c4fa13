"""Anyscale: one Anyscale service for each of ours, through the real SDK.

The SDK has no time-out, prints the query token and sends `apply` again when an answer is lost; its `wait` may return
on an older version and never fails early. So it lives in a child process, which can be ended (a thread that hangs in
it would hold up the end of ours): its output is filtered there, every call has a time-out here, and waiting is our
own poll of the status.

The child is `anyscale_sdk`. It alone imports `anyscale`.
"""

import contextlib
import importlib.util
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from orchestrator.application import check_deployed, render_application
from orchestrator.child import Child
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
from orchestrator.kinds import Amount, Positive
from orchestrator.process import client_environment, uninterrupted
from orchestrator.secrets import Secret, redact
from orchestrator.sections import ServiceConfig
from orchestrator.waiting import poll

_SDK_MODULE = "orchestrator.clusters.anyscale_sdk"
PROBE_ROUTE = "/orchestrator-probe"
_ENDING = {"TERMINATING", "TERMINATED"}

_CALL_TIMEOUT_S = 60.0
_LOGIN_TIMEOUT_S = 120.0  # the import alone takes seconds
_DEPLOY_TIMEOUT_S = 300.0  # looks the image up, uploads, applies
_UNHEALTHY_GRACE_S = 60.0
_SETTLE_S = 30.0  # so long after a deploy without an answer may the service still turn up
_POLL_S = 5.0
_RETRY_DELAYS_S = (2.0, 4.0, 8.0)

_MAX_TAG_LENGTH = 63
_SDK_MIN_NODES, _SDK_MAX_NODES = 0, 10  # of worker_nodes, where nothing is said: anyscale.compute_config.models
# What the child may inherit besides: the way out, and nothing that changes what is deployed.
_WAY_OUT = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "ANYSCALE_SSL_CA_CERT")

# The SDK loses the status code of a refusal; its words are what is left. In this order.
_REASONS = (
    ("unreachable", r"max retries exceeded|connection (refused|aborted|reset)|could not reach"),
    ("wrong token", r"invalid or have expired|credentials are invalid|unauthori[sz]ed|authenticat|invalid token"),
    ("unknown cloud", r"\bcloud\b.*(not found|does not exist|no such)|no cloud"),
    ("quota", r"quota|limit exceeded|exceeds|insufficient capacity"),
    ("not allowed", r"permission|forbidden|not allowed|access denied|not authori[sz]ed"),
    ("image", r"\bimage\b|docker|registry|\bbuild\b"),
)


@dataclass(kw_only=True)
class Anyscale(SharedCluster):
    """Deploys each service as an Anyscale service, in the organisation that the token belongs to."""

    token_env: str | None  # the environment variable that holds the token; never the token itself
    host_env: str = "ANYSCALE_HOST"  # the environment variable with another address than Anyscale's own
    terminate_timeout_s: Positive = 900  # a service that has not ended by then is reported
    cloud: str | None = None  # null = the organisation's default
    project: str | None = None
    image_uri: str | None = None
    head_node: dict[str, Any] = field(default_factory=dict)
    worker_nodes: list[dict[str, Any]] = field(default_factory=list)
    expires_after_h: Amount = 12  # a tag, for whoever cleans up after us
    usd_per_hour: dict[str, Amount] = field(default_factory=dict)  # of each instance type
    max_cost_usd: Amount | None = None

    def identity(self) -> Mapping[str, object]:
        """Kind, cloud, project, image, machines, and the CPUs and GPUs that they offer."""
        names = ("cloud", "project", "image_uri", "head_node", "worker_nodes", "num_cpus", "num_gpus")
        return {"kind": super().identity()["kind"]} | {name: getattr(self, name) for name in names}

    def bring_up_s(self, config: ServiceConfig) -> float:
        """Estimate of the time from deployment to ready, in seconds. Assumed, not measured."""
        return 600.0

    def machines(self) -> list[tuple[str, int]]:
        """The head node and the workers, at most as many as the SDK may rent."""
        workers = [(node["instance_type"], node.get("max_nodes", _SDK_MAX_NODES)) for node in self.worker_nodes]
        return [(self.head_node["instance_type"], 1), *workers]

    def hourly_usd(self) -> float | None:
        """USD an hour for all machines of one service; None where the price of one is not declared."""
        if self.unpriced():
            return None
        return sum(count * self.usd_per_hour[name] for name, count in self.machines())

    def unpriced(self) -> list[str]:
        """Instance types without a declared price."""
        return [name for name, _ in self.machines() if name not in self.usd_per_hour]

    def cost_limit_usd(self) -> float | None:
        """`cluster.max_cost_usd`: the most that a run may cost, USD; None = no limit."""
        return self.max_cost_usd

    def check(self, config: ServiceConfig) -> None:
        """Refuse what can be seen to be wrong without asking Anyscale. Raises ConfigError."""
        check_uploaded(config, self.name)
        check_deployed(config, self)
        cluster = self
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", cluster.service_prefix):
            raise ConfigError(
                "cluster.service_prefix must start with a letter and hold letters, digits, - and _ alone, "
                f"found {cluster.service_prefix!r}"
            )
        _check_machines(cluster)
        if cluster.image_uri is not None and not re.fullmatch(r"\S+", cluster.image_uri):
            raise ConfigError(f"cluster.image_uri must name an image, found {cluster.image_uri!r}")
        if host := os.environ.get(cluster.host_env):
            check_address(f"the environment variable {cluster.host_env} (cluster.host_env)", host)
        if not config.dry_run:
            _token(self)

    def check_live(self, config: ServiceConfig) -> None:
        """Log in and find the cloud. Raises ConfigError."""
        if importlib.util.find_spec("anyscale") is None:
            raise ConfigError("the Anyscale SDK is not installed here: pip install '.[anyscale]'")
        sdk = _Sdk(self, Path(os.devnull))
        try:
            sdk.retried("status", _CALL_TIMEOUT_S, name=f"{self.service_prefix}-nothing")
        except ServiceError as error:
            raise ConfigError(f"Anyscale (cluster.cloud={self.cloud}): {error}") from error
        finally:
            sdk.close()

    def rendered(self, config: ServiceConfig, name: ServiceName) -> str:
        """`service.yaml`, for a dry run."""
        return service_yaml(self, config, name)

    def left_over(self, config: ServiceConfig, names: Sequence[ServiceName]) -> dict[ServiceName, str]:
        """Those of these services that a run left behind, with their state. Raises ServiceError."""
        sdk = _Sdk(self, Path(os.devnull))
        try:
            found = {name: sdk.retried("status", _CALL_TIMEOUT_S, name=name.service) for name in names}
        finally:
            sdk.close()
        return {name: status["state"] for name, status in found.items() if status and status["state"] != "TERMINATED"}

    def end(self, config: ServiceConfig, name: ServiceName, log_dir: Path) -> str | None:
        """End a service that its run left behind; what is left when nobody can tell that it is TERMINATED."""
        service = AnyscaleService(self, config, name, log_dir, lambda text: None)
        service._may_be_there = True
        return service.stop()

    def service(
        self, config: ServiceConfig, name: ServiceName, log_dir: Path, on_status: Callable[[str], None]
    ) -> "AnyscaleService":
        """A handle of one service, which `start` deploys."""
        return AnyscaleService(self, config, name, log_dir, on_status)


class AnyscaleService:
    """One service. `urls` take load, with `token` as bearer; `effective` is what it reported about itself."""

    def __init__(
        self,
        cluster: Anyscale,
        config: ServiceConfig,
        name: ServiceName,
        log_dir: Path,
        on_status: Callable[[str], None],
    ) -> None:
        self.marker: str | None = None
        self.urls: list[str] = []
        self.token: Secret | None = None
        self.effective: Mapping[str, Any] = {}
        self._cluster, self._config = cluster, config
        self._name = name.service
        # Unique: a service that is deployed again under its name still shows the version before for a while.
        self._version = f"v{secrets.token_hex(4)}"
        self._rendered = render_service(cluster, config, name) | {"version_name": self._version}
        self._log_dir = log_dir
        self._on_status = on_status
        self._last_text = ""
        self._sdk = _Sdk(cluster, log_dir / "anyscale.log")
        self._address = Address("")
        self._may_be_there = False
        self._left: str | None = None
        self._id: str | None = None
        self._settled_at_s = 0.0
        self._last_state = "unknown"

    def start(self) -> None:
        """Deploy the service. Raises ServiceError when Anyscale refuses it."""
        (self._log_dir / "service.yaml").write_text(_as_yaml(self._rendered))
        try:
            found = self._sdk.retried("status", _CALL_TIMEOUT_S, name=self._name)
            if found is not None and found["state"] != "TERMINATED":
                raise ServiceError(f"it exists already and is {found['state']}: it is not ours, and is left alone")
            with tempfile.TemporaryDirectory(prefix="so-upload-") as staged:
                stage(Path(staged))
                self._say("deploying")
                self._apply(self._rendered | {"working_dir": staged})
        except ServiceError as error:
            raise self._failure(error) from error

    def wait_ready(self) -> None:
        """Until our version runs, the application answers 200 and every Serve actor has told what it runs with.

        Raises ServiceError as soon as it is clear that this will not be.
        """
        timeout = Timeout(self._cluster.startup_timeout_s)
        try:
            self._wait_running(timeout)
            self._say("waiting for the first reply")
            self._address.wait_for(self._config.workload.ready_path, timeout, self._say)
            effective = self._probe().effective(self._config, timeout, self._say)
            image: Mapping[str, str] = {}
            with contextlib.suppress(ServiceError):  # the SDK's own parts are asked, which may change
                image = self._sdk.retried("image", _CALL_TIMEOUT_S, name=self._name)
            self.effective = {**effective, "versions": effective["versions"] | image}
        except ServiceError as error:
            self._keep_controller_log()
            raise self._failure(error) from error

    def begin_stop(self) -> None:
        """Ask for termination without waiting, so that several services end side by side."""
        if self._may_be_there:
            with uninterrupted(), contextlib.suppress(ServiceError):  # `stop` asks again, and reports
                status = self._sdk.call("status", _CALL_TIMEOUT_S, name=self._name)
                if status is not None and status["state"] not in _ENDING:
                    self._sdk.call("terminate", _CALL_TIMEOUT_S, service_id=status["id"])

    def snapshot(self) -> Snapshot:
        """What is alive now, as far as the probe answers.

        Raises ServiceError when the service is gone or not RUNNING.
        """
        status = self._sdk.retried("status", _CALL_TIMEOUT_S, name=self._name)
        state = "gone" if status is None else status["state"]
        if state != "RUNNING":
            self._keep_controller_log()
            raise self._failure(ServiceError(f"it is {state}, not RUNNING"))
        return self._probe().snapshot()

    def round_trip_ms(self) -> float | None:
        """Median round trip, ms, of a request to Serve's health route; None without an answer."""
        return self._address.round_trip_ms()

    def _probe(self) -> Probe:
        return Probe(self._address, PROBE_ROUTE)

    def _failure(self, error: ServiceError) -> ServiceError:
        return ServiceError(f"{self._name}: {error}\nLog: {self._log_dir}")

    def _apply(self, rendered: Mapping[str, Any]) -> None:
        """Deploy; after a transient error again, unless the version that was asked for is there by then."""
        self._may_be_there = True
        try:
            for delay_s in (*_RETRY_DELAYS_S, None):
                try:
                    self._id = self._sdk.call("deploy", _DEPLOY_TIMEOUT_S, config=rendered)
                    return
                except _CallError as error:
                    self._say(f"deploy: {error}; looking whether it acted")
                    if error.transient:
                        time.sleep(delay_s or _POLL_S)
                    # Also after a refusal, which may be of the SDK's own second try.
                    found = self._sdk.retried("status", _CALL_TIMEOUT_S, name=self._name)
                    if found is not None and self._version in found["versions"]:
                        return
                    if delay_s is None or not error.transient or error.timed_out:
                        raise
        finally:
            self._settled_at_s = time.monotonic() + _SETTLE_S

    def _wait_running(self, timeout: Timeout) -> None:
        text, healthy_at_s = "no answer yet", time.monotonic()
        for _ in timeout.poll(_POLL_S):
            try:
                status = self._sdk.call("status", _CALL_TIMEOUT_S, name=self._name)
            except _CallError as error:
                if not error.transient:
                    raise
                text = f"asking for its state: {error}"
            else:
                text = _in_words(status, self._version)
                if status is not None and _is_up(status, self._version):
                    self.token = Secret(status["token"]) if status["token"] else None
                    self._address = Address(status["url"].rstrip("/"), self.token)
                    self.urls = [self._address.url]
                    return
                version = status and status["versions"].get(self._version)
                states = {status and status["state"], version}
                if "SYSTEM_FAILURE" in states or (version and states & _ENDING):
                    raise ServiceError(f"it will not run: {text}")
                if not states & {"UNHEALTHY", "UNKNOWN"}:  # the SDK's word for a state it does not know
                    healthy_at_s = time.monotonic()
                elif time.monotonic() - healthy_at_s > _UNHEALTHY_GRACE_S:
                    raise ServiceError(f"not healthy for {_UNHEALTHY_GRACE_S:g} s: {text}")
            self._say(text)
        raise timeout.over(text)

    def _keep_controller_log(self) -> None:
        """Write `controller.log`; nothing is raised when Anyscale does not give it."""
        with uninterrupted(), contextlib.suppress(ServiceError):
            text = self._sdk.call("logs", _CALL_TIMEOUT_S, name=self._name)
            (self._log_dir / "controller.log").write_text(redact(text))

    def stop(self) -> str | None:
        """Ask for termination and wait until it is TERMINATED; what is left to do by hand, if it will not be.

        A second call only repeats that.
        """
        with uninterrupted():
            try:
                if self._may_be_there:
                    self._left = self._terminate()
                    self._may_be_there = False
            finally:
                self._sdk.close()
        return self._left

    def _terminate(self) -> str | None:
        num_refused, trouble = 0, ""
        for _ in poll(_POLL_S, timeout_s=self._cluster.terminate_timeout_s):
            try:
                if self._is_ended():
                    return None
            except _CallError as error:
                trouble = f" ({error})"
                num_refused += not error.transient
                if self._id is not None:  # its state may be refused, and its end not
                    with contextlib.suppress(_CallError):
                        self._sdk.call("terminate", _CALL_TIMEOUT_S, service_id=self._id)
                if num_refused > len(_RETRY_DELAYS_S):
                    break
        return (
            f"{self._name} may still run and cost money: to be terminated, last seen {self._last_state}{trouble}. "
            f"End it:\n  anyscale service terminate --name {self._name}\nLog: {self._log_dir}"
        )

    def _is_ended(self) -> bool:
        status = self._sdk.call("status", _CALL_TIMEOUT_S, name=self._name)
        state = self._last_state = "not listed" if status is None else status["state"]
        self._say(f"terminating: {state}")
        if status is None or (state == "TERMINATED" and self._version not in status["versions"]):
            return time.monotonic() >= self._settled_at_s  # else an apply whose answer was lost may still act
        self._settled_at_s = time.monotonic() + _SETTLE_S  # one listing may lack a service that was seen
        self._id = status["id"]
        if state not in _ENDING:
            self._sdk.call("terminate", _CALL_TIMEOUT_S, service_id=status["id"])
        return state == "TERMINATED"

    def _say(self, text: str) -> None:
        if text != self._last_text:
            self._on_status(redact(text))
            self._last_text = text


def _is_up(status: Mapping[str, Any], version: str) -> bool:
    """Whether this version is RUNNING and takes all of the traffic."""
    return (status["state"], status["primary"], status["canary"]) == ("RUNNING", version, None) and (
        status["versions"][version] == "RUNNING"
    )


def _in_words(status: Mapping[str, Any] | None, version: str) -> str:
    if status is None:
        return "not listed"
    return "; ".join(
        [f"{status['state']}, our version {status['versions'].get(version, 'not there yet')}", *status["messages"]]
    )


def _check_machines(cluster: Anyscale) -> None:
    for key, node in [("head_node", cluster.head_node), *(("worker_nodes", worker) for worker in cluster.worker_nodes)]:
        instance_type = node.get("instance_type")
        if not isinstance(instance_type, str) or not re.fullmatch(r"\S+", instance_type):
            raise ConfigError(f"cluster.{key} needs an instance_type, found {dict(node)}")
        fewest, most = node.get("min_nodes", _SDK_MIN_NODES), node.get("max_nodes", _SDK_MAX_NODES)
        if not (type(fewest) is type(most) is int and 0 <= fewest <= most and most > 0):
            raise ConfigError(f"cluster.{key}: min_nodes must not be above max_nodes, found {dict(node)}")


def render_service(cluster: Anyscale, config: ServiceConfig, name: ServiceName) -> dict[str, object]:
    """The service as Anyscale's ServiceConfig takes it, from a directory that holds `workloads/` alone."""
    application, env = render_application(config), _env_vars(cluster, config)
    probe = Probe.rendered("orchestrator-probe", PROBE_ROUTE, application, config.profile.env, env)
    expires_at = datetime.now(UTC) + timedelta(hours=cluster.expires_after_h)
    tags = {
        "arm": name.arm,
        "repeat": str(name.repeat),
        "run-id": name.run_id,
        "owner": os.environ.get("USER") or str(os.getuid()),
        "expires-at": f"{expires_at:%Y%m%dT%H%M%SZ}",
    }
    rendered = {
        "name": name.service,
        "version_name": "v1",
        "cloud": cluster.cloud,
        "project": cluster.project,
        "image_uri": cluster.image_uri,
        "compute_config": {
            "head_node": dict(cluster.head_node),
            "worker_nodes": [dict(n) for n in cluster.worker_nodes],
        },
        "working_dir": ".",
        "env_vars": env,
        "applications": [application, probe],
        "query_auth_token_enabled": True,
        "tags": {key: re.sub(r"[^A-Za-z0-9_.-]", "_", value)[:_MAX_TAG_LENGTH] for key, value in tags.items()},
    }
    return {key: value for key, value in rendered.items() if value is not None}


def service_yaml(cluster: Anyscale, config: ServiceConfig, name: ServiceName) -> str:
    """`service.yaml`, headed by the command that runs the same service by hand."""
    return _as_yaml(render_service(cluster, config, name))


def _as_yaml(rendered: Mapping[str, Any]) -> str:
    head = "# By hand, from a directory that holds workloads/ alone:\n#   anyscale service deploy -f service.yaml\n"
    return head + yaml.safe_dump(dict(rendered), sort_keys=False)


def _env_vars(cluster: Anyscale, config: ServiceConfig) -> dict[str, str]:
    env = cluster.service_env(config)
    if "RAY_SERVE_ENABLE_HA_PROXY" in env:  # Anyscale's own switch, which its images look at
        env["ANYSCALE_RAY_SERVE_ENABLE_HA_PROXY"] = env["RAY_SERVE_ENABLE_HA_PROXY"]
    return env


def _token(cluster: Anyscale) -> Secret:
    token = token_of(cluster.token_env)
    if token is None:
        raise ConfigError("cluster.token_env must name the environment variable that holds an Anyscale token")
    return token


class _CallError(ServiceError):
    """A call failed. `transient`: a later one may succeed. `timed_out`: it may have acted all the same."""

    def __init__(self, text: str, transient: bool = False, timed_out: bool = False) -> None:
        super().__init__(text)
        self.transient = transient
        self.timed_out = timed_out


class _Sdk:
    """Our end of the child process, which is started by the first call and again after one that did not answer."""

    def __init__(self, cluster: Anyscale, log: Path) -> None:
        # With a slash at its end, every path on the wire would begin with two.
        self._host = os.environ.get(cluster.host_env, "").rstrip("/") or None
        self._token = _token(cluster)
        self._where = {"cloud": cluster.cloud, "project": cluster.project}
        self._log = log
        self._child: Child | None = None
        self._logged_in = False

    def retried(self, call: str, timeout_s: float, **arguments: Any) -> Any:
        """As `call`, repeated a few times after a transient error."""
        for delay_s in _RETRY_DELAYS_S:
            try:
                return self.call(call, timeout_s, **arguments)
            except _CallError as error:
                if not error.transient:
                    raise
            time.sleep(delay_s)
        return self.call(call, timeout_s, **arguments)

    def call(self, call: str, timeout_s: float, **arguments: Any) -> Any:
        """One call of the SDK. Raises _CallError."""
        if self._child is None:
            self._child = Child(_SDK_MODULE, self._environment(), self._log, "the SDK's process", _CallError)
            self._child.start()
        if not self._logged_in:
            hello = {"token": self._token.reveal(), "host": self._host, **self._where}
            self._exchange(self._child, "login", hello, _LOGIN_TIMEOUT_S)
            self._logged_in = True
        return self._exchange(self._child, call, arguments, timeout_s)

    def close(self) -> None:
        """End the process; a further call starts another."""
        if self._child is not None:
            self._child.close()
        self._child, self._logged_in = None, False

    def _environment(self) -> dict[str, str]:
        env = client_environment()
        for upper in _WAY_OUT:
            env |= {name: os.environ[name] for name in (upper, upper.lower()) if name in os.environ}
        if self._host:
            env["ANYSCALE_HOST"] = self._host  # for the addresses in its messages
        return env

    def _exchange(self, child: Child, call: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        reply = None
        try:
            reply = child.ask({"call": call, "arguments": arguments}, timeout_s, call)
        finally:  # also after an interrupt
            if reply is None:
                self.close()
        if reply is None:
            raise _CallError(f"no answer to {call} within {timeout_s:g} s", transient=True, timed_out=True)
        if reply["event"] == "failed":
            raise _CallError(_explained(reply["error"]), reply["transient"])
        return reply["result"]


def _explained(text: str) -> str:
    for reason, words in _REASONS:
        if re.search(words, text, re.IGNORECASE):
            return f"{reason}: {text}"
    return text

"""This machine: a fresh, isolated Ray cluster for every service, or vLLM's own servers without Ray.

One child driver process a service, with its own environment, ports, directory and token; nothing is shared
with other Ray clusters on the machine or with another orchestrator. The port block is claimed by creating the
directory named after it, which is atomic, so two orchestrators cannot take the same one.
"""

import fcntl
import os
import secrets
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.application import (
    check_deployed,
    check_module,
    check_vllm,
    engine_arguments,
    gpus_of_server,
    render_application,
)
from orchestrator.child import Child, Message, ServiceSpec
from orchestrator.clusters.base import Cluster, ServiceName, Snapshot
from orchestrator.clusters.flags import OURS
from orchestrator.clusters.specs import RayServeSpec, VllmSpec
from orchestrator.errors import ConfigError, ServiceError
from orchestrator.kinds import Port
from orchestrator.process import MARKER, client_environment, end_members, listener, uninterrupted
from orchestrator.secrets import Secret
from orchestrator.sections import ServiceConfig

# Below Linux's ephemeral range (32768 on), where Ray's workers take their own ports.
_FIRST_PORT, _LAST_PORT, _BLOCK_PORTS = 10000, 32000, 200
_DIRECTORY_PREFIX = "so-"  # short: Ray puts UNIX sockets below it, and their paths may have 107 characters
_SNAPSHOT_TIMEOUT_S = 60.0
_LOG_TAIL_BYTES = 1 << 20


def directory_prefix() -> str:
    """Start of the path of every service directory on this machine (for `orchestrator.cleanup`)."""
    return str(Path(tempfile.gettempdir()) / _DIRECTORY_PREFIX)


class LocalService:
    """One service. `urls` take load; `effective` is what the live service reported about itself."""

    def __init__(
        self, cluster: "Local", config: ServiceConfig, log_dir: Path, on_status: Callable[[str], None]
    ) -> None:
        self.urls: list[str] = []
        self.token: Secret | None = None
        self.marker: str | None = None
        self.effective: Mapping[str, Any] = {}
        self._cluster = cluster
        self._config, self._log_dir, self._on_status = config, log_dir, on_status
        self._claim: _Claim | None = None
        self._driver: _Driver | None = None
        self._left: str | None = None

    def start(self) -> None:
        """Claim its directory and ports, write `service.yaml` into the log directory, start its driver.

        Raises ServiceError when there is no room for it.
        """
        cluster, config = self._cluster, self._config
        with uninterrupted():
            self._claim = claim = _Claim()
        self.marker = str(claim.directory)
        http_port = cluster.http_port or claim.base_port
        (self._log_dir / "service.yaml").write_text(service_yaml(cluster, config, http_port))
        ports = [http_port]
        if config.workload.server is not None:
            ports += [claim.base_port + offset for offset in range(1, config.workload.num_replicas)]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        module, spec = _driver_spec(cluster, config, claim, ports, self._log_dir)
        env = _service_environment(cluster, config, claim)
        self._driver = _Driver(module, spec, env, self._log_dir / "driver.log")
        self._driver.start()

    def wait_ready(self) -> None:
        """Wait until the service answers. Raises ServiceError with the replica's own message and the log's path."""
        assert self._claim is not None
        assert self._driver is not None
        effective = self._driver.wait_ready(self._cluster.startup_timeout_s, self._on_status)
        isolation_env = sorted({*OURS - {"RAY_AUTH_TOKEN"}, *_isolation(self._claim)})
        self.effective = {**effective, "isolation_env": isolation_env}

    def begin_stop(self) -> None:
        """Ask for the end without waiting for it."""
        if self._driver is not None:
            self._driver.child.hang_up()

    def stop(self) -> str | None:
        """End every process of it, keep its logs, remove its directory; what is left.

        A second call only repeats that.
        """
        with uninterrupted():
            if self._driver is not None:
                self._driver.stop()
            if self._claim is not None:
                with suppress(OSError):  # a full disk, say: the rest still has to be done
                    _copy_logs(self._claim.directory, self._log_dir)
                if survivors := self._claim.release():
                    who = ", ".join(survivors)
                    self._left = f"processes of the service would not end: {who}; log: {self._log_dir}"
                self._claim = None
        return self._left

    def snapshot(self) -> Snapshot:
        """Serve actors alive now, the HTTP listener, and what Serve calls unhealthy.

        Raises ServiceError when the service is gone.
        """
        assert self._driver is not None
        return self._driver.snapshot(_SNAPSHOT_TIMEOUT_S)

    def round_trip_ms(self) -> None:
        """None: the service is on this machine, so there is no distance to measure."""


@dataclass(kw_only=True)
class Local(Cluster):
    """Runs services on this machine."""

    http_port: Port | None = None  # null = a free one

    def check(self, config: ServiceConfig) -> None:
        """Refuse what can be seen to be wrong without starting Ray. Raises ConfigError."""
        check_deployed(config, self)
        port = self.http_port
        if port is not None and self.max_live_services > 1:
            raise ConfigError(
                "cluster.http_port names one port, but cluster.max_live_services is above 1; leave it null"
            )
        if port is not None and not _is_free(port):
            holder = listener(port)
            by = f" by {holder['process']} (pid {holder['pid']})" if holder else ""
            raise ConfigError(f"cluster.http_port={port} is in use{by}; choose another, or null for a free one")

    def check_live(self, config: ServiceConfig) -> None:
        """Import the application in a child process. Raises ConfigError."""
        if config.model:
            check_vllm(f"workload {config.workload.name}")
        if config.workload.application is not None:
            module = config.workload.application["import_path"].split(":")[0]
            check_module(module, config.workload.extra, self.startup_timeout_s)

    def rendered(self, config: ServiceConfig, name: ServiceName) -> str:
        """`service.yaml`, for a dry run."""
        return service_yaml(self, config, self.http_port)

    def service(
        self, config: ServiceConfig, name: ServiceName, log_dir: Path, on_status: Callable[[str], None]
    ) -> LocalService:
        """A handle of one service, which `start` brings up."""
        return LocalService(self, config, log_dir, on_status)


class _Claim:
    """A service directory of our own and the block of ports that goes with it, `base_port` first.

    The claim is a lock on the directory, which the system releases when this process ends, however it ends.
    """

    def __init__(self) -> None:
        bases = list(range(_FIRST_PORT, _LAST_PORT, _BLOCK_PORTS))
        secrets.SystemRandom().shuffle(bases)
        for base in bases:
            directory = Path(f"{directory_prefix()}{base}")
            try:
                directory.mkdir(mode=0o700)
            except FileExistsError:
                continue
            if all(_is_free(base + offset) for offset in range(_BLOCK_PORTS)):
                self.directory = directory
                self.base_port = base
                self._lock = os.open(directory, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                return
            directory.rmdir()
        raise ServiceError(
            f"no free block of {_BLOCK_PORTS} ports in {_FIRST_PORT}..{_LAST_PORT}; "
            f"`python -m orchestrator.cleanup` lists what earlier runs left in {directory_prefix()}*"
        )

    def release(self) -> list[str]:
        """End what still belongs to the directory and remove it; returns what would not end."""
        survivors = end_members(self.directory)
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)
        return survivors


class _Driver:
    """The child process that is the service: `local_driver` (Ray Serve) or `vllm_driver`."""

    def __init__(self, module: str, spec: ServiceSpec, env: Mapping[str, str], log: Path) -> None:
        self.child = Child(module, env, log, "the service's driver", ServiceError)
        self._spec = spec

    def start(self) -> None:
        """Start the process and send it the spec. Raises ServiceError when it ends at once."""
        self.child.start()
        self.child.send(asdict(self._spec))

    def wait_ready(self, timeout_s: float, on_status: Callable[[str], None]) -> Mapping[str, Any]:
        """What the service really runs with. Raises ServiceError when it cannot be brought up."""
        deadline_s = time.monotonic() + timeout_s
        text = "starting"
        while True:
            message = self._checked(self.child.receive(deadline_s, "ready"))
            if message is None:
                raise ServiceError(
                    f"not ready after {timeout_s:g} s (cluster.startup_timeout_s): {text}\nLog: {self.child.log}"
                )
            if message["event"] == "ready":
                effective = message["effective"]
                assert isinstance(effective, dict)
                return effective
            text = message["text"]
            on_status(text)

    def snapshot(self, timeout_s: float) -> Snapshot:
        """What is alive. Raises ServiceError when the process fails or is late to answer; it is then killed."""
        try:
            answer = self._checked(self.child.ask({"call": "snapshot"}, timeout_s, "snapshot"))
        except ServiceError:
            self.child.kill()  # it answers nothing more
            raise
        if answer is None:
            raise ServiceError(f"no answer to 'snapshot' within {timeout_s:g} s\nLog: {self.child.log}")
        return Snapshot.parse(answer)

    def stop(self) -> None:
        """Close its standard input, on which it ends itself and its tree; the caller sweeps up what is left."""
        self.child.close(grace_s=30)

    def _checked(self, message: Message | None) -> Message | None:
        if message is not None and message["event"] == "failed":
            raise ServiceError(f"{message['error']}\nLog: {self.child.log.parent}")
        return message


def _driver_spec(
    cluster: Local, config: ServiceConfig, claim: _Claim, ports: list[int], log_dir: Path
) -> tuple[str, ServiceSpec]:
    """The module that runs the service, and the spec that it is sent."""
    directory, settings, server = str(claim.directory), cluster.settings_env(config), config.workload.server
    if server is not None:
        return "orchestrator.clusters.vllm_driver", VllmSpec(
            directory=directory,
            log_dir=str(log_dir),
            declared_env=config.profile.env,
            cluster_env=settings,
            model=server["model"],
            source=server["source"],
            engine=server["engine"],
            ports=ports,
            gpus=gpus_of_server(server),
        )
    return "orchestrator.clusters.local_driver", RayServeSpec(
        directory=directory,
        log_dir=str(log_dir),
        declared_env=config.profile.env,
        cluster_env=settings,
        num_cpus=cluster.num_cpus,
        num_gpus=cluster.num_gpus,
        metrics_export_port=claim.base_port + 6,
        serve_config=render_service(config, ports[0]),
        http_port=ports[0],
        ready_url=f"http://127.0.0.1:{ports[0]}{config.workload.ready_path}",
        engine=engine_arguments(config),
    )


def render_service(config: ServiceConfig, http_port: int | None) -> dict[str, object]:
    """The Serve deploy config of one arm, or what vLLM's servers are given. `http_port` None: not chosen yet."""
    if config.workload.server is not None:
        return {"num_servers": config.workload.num_replicas, **config.workload.server}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": http_port or 8000},
        "applications": [render_application(config)],
    }


def service_yaml(cluster: Local, config: ServiceConfig, http_port: int | None) -> str:
    """`service.yaml`, headed by the command that runs the same service by hand."""
    setting = "".join(f"{name}={shlex.quote(value)} " for name, value in sorted(cluster.service_env(config).items()))
    command = "serve run service.yaml"
    if config.workload.server is not None:
        command = "python -m vllm.entrypoints.openai.api_server, as the first line of server-<i>.log has it"
    head = f"# By hand, from the repository's root:\n#   {setting}{command}\n"
    return head + yaml.safe_dump(render_service(config, http_port), sort_keys=False)


def _service_environment(cluster: Local, config: ServiceConfig, claim: _Claim) -> dict[str, str]:
    ours = {
        MARKER: str(claim.directory),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(claim.directory),
        "TMPDIR": str(claim.directory),  # vLLM's sockets go with the service
        "SPT_NOENV": "1",  # vLLM's process titles must not overwrite the environment, by which we find its processes
        "VLLM_NO_USAGE_STATS": "1",
    }
    return client_environment() | _isolation(claim) | cluster.service_env(config) | ours


def _isolation(claim: _Claim) -> dict[str, str]:
    """Variables that give HAProxy mode ports and socket paths of this service alone."""
    haproxy, base_port = claim.directory / "haproxy", claim.base_port
    settings = {
        "RAY_SERVE_HAPROXY_STATS_PORT": base_port + 1,
        "RAY_SERVE_HAPROXY_METRICS_PORT": base_port + 2,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": base_port + 3,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": base_port + 4,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": base_port + 10,
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": base_port + 99,
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": base_port + 100,
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": base_port + 189,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": haproxy / "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": haproxy / "admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": haproxy / "metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": haproxy,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": haproxy / "server-state",
    }
    return {name: str(value) for name, value in settings.items()}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def _copy_logs(directory: Path, log_dir: Path) -> None:
    """Copy the last MiB of each log of Serve and of the workers, before Ray's directory is removed."""
    for folder in directory.glob("session_2*/logs"):
        for path in [*folder.glob("serve/*.log"), *folder.glob("worker-*.err"), *folder.glob("raylet.*")]:
            if path.stat().st_size:
                with path.open("rb") as source:
                    source.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
                    (
                        log_dir / f"{path.stem}{path.suffix if path.suffix == '.log' else path.suffix + '.log'}"
                    ).write_bytes(source.read())

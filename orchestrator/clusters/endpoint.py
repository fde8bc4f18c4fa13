"""An address that answers already, Ray or not: nothing is deployed, and what runs behind it cannot be proved."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from orchestrator.clusters.base import Cluster, ServiceName
from orchestrator.clusters.remote import Address, Timeout, check_address, token_of
from orchestrator.errors import ConfigError, ServiceError
from orchestrator.sections import ServiceConfig
from orchestrator.waiting import poll

_GONE_AFTER_S = 5.0


@dataclass(kw_only=True)
class Endpoint(Cluster):
    """Deploys nothing: load goes to `url`."""

    url: str | None  # http://...: the requests' paths come below it
    token_env: str | None = None  # the environment variable that holds a bearer token; never the token itself

    deploys: ClassVar[bool] = False

    def identity(self) -> Mapping[str, object]:
        """Without the name of the token's variable, which changes nothing in what answers."""
        return {key: value for key, value in super().identity().items() if key != "token_env"}

    def check(self, config: ServiceConfig) -> None:
        """Refuse an address that is none, and flags, which could not reach what answers. Raises ConfigError."""
        check_address("cluster.url", self.url)
        if config.profile.env or config.profile.app:
            raise ConfigError(
                f"cluster {self.name} deploys nothing, so the flags of profile={config.profile.name} cannot "
                "reach what answers; use profile=baseline, and compare addresses: 'cluster.url=choice(http://a,http://b)'"
            )
        if self.redeploy != "never":
            raise ConfigError(
                "cluster.redeploy must be never: what is deployed by others is no fresh deployment of ours"
            )
        if not config.dry_run:
            token_of(self.token_env)

    def rendered(self, config: ServiceConfig, name: ServiceName) -> str:
        """`service.yaml`: the address."""
        return f"# Nothing is deployed: load goes to\nurl: {self.url}\n"

    def service(
        self, config: ServiceConfig, name: ServiceName, log_dir: Path, on_status: Callable[[str], None]
    ) -> "EndpointService":
        """A handle of the address, which `start` and `stop` leave as it is."""
        (log_dir / "service.yaml").write_text(self.rendered(config, name))
        return EndpointService(self, config, on_status)


class EndpointService:
    """`urls` take load, with `token` as bearer; `effective` holds nothing that was read back."""

    def __init__(self, cluster: Endpoint, config: ServiceConfig, on_status: Callable[[str], None]) -> None:
        assert cluster.url is not None
        self._address = Address(cluster.url.rstrip("/"), token_of(cluster.token_env))
        self.marker: str | None = None
        self.urls, self.token = [self._address.url], self._address.token
        self._cluster, self._config, self._on_status = cluster, config, on_status
        warning = "nothing was deployed, so which flags and versions answer here is not known"
        self.effective: Mapping[str, object] = {"warnings": [warning]}

    def start(self) -> None:
        """There is nothing to start."""

    def wait_ready(self) -> None:
        """Until the workload's ready path answers 200. Raises ServiceError with the last answer."""
        timeout = Timeout(self._cluster.startup_timeout_s)
        self._address.wait_for(self._config.workload.ready_path, timeout, self._on_status)

    def begin_stop(self) -> None:
        """There is nothing to stop."""

    def stop(self) -> None:
        """There is nothing to stop, and so nothing is left."""

    def snapshot(self) -> None:
        """None: nobody can look inside. Raises ServiceError when nothing listens at the address any more."""
        for _ in poll(0.5, timeout_s=_GONE_AFTER_S):
            try:
                self._address.connect().close()
                return
            except ConnectionRefusedError:
                continue
            except OSError:  # too busy to take one more is not gone
                return
        raise ServiceError(f"nobody listens at {self._address.url} any more")

    def round_trip_ms(self) -> float | None:
        """Median time, ms, to open a connection: no request is known that does nothing here."""
        return self._address.connect_ms()

"""The interface of a cluster (`Cluster`) and of a service that it brings up (`Running`), and what both use."""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from orchestrator.errors import ConfigError, TrialError
from orchestrator.kinds import Amount, Count, Positive, WholeNumber, target_of
from orchestrator.results.records import ServerFacts
from orchestrator.secrets import Secret
from orchestrator.sections import ServiceConfig
from orchestrator.waiting import poll

ENGINE_KIND = "VllmEngine"  # the process beside a replica or server that runs the model
REPLICA_KIND = "ServeReplica"
_HEALTHY_TIMEOUT_S = 60.0  # a replica that restarts has this long before the next trial fails


@dataclass(frozen=True, kw_only=True)
class ActorState:
    """A live process of a service: an actor of Ray Serve, a vLLM server, or an engine."""

    id: str  # of the actor, or of the process where there is none
    name: str
    kind: str  # class of the actor
    pid: int
    log: str | None = None  # where it writes, if that is known


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What of a service is alive at one moment."""

    actors: Sequence[ActorState] | None  # None: nobody answered who could tell
    listener: Mapping[str, object] | None  # port, pid and process; {}: not ours to see; None: nobody listens
    unhealthy: Sequence[str]  # a sentence for each part that is not healthy

    @staticmethod
    def parse(told: Mapping[str, Any]) -> "Snapshot":
        """From JSON with the fields as keys; other keys of `told` are ignored."""
        actors = told["actors"]
        return Snapshot(
            actors=None if actors is None else [ActorState(**actor) for actor in actors],
            listener=told["listener"],
            unhealthy=told["unhealthy"],
        )


class Running(Protocol):
    """One service, as a cluster's `service(config, name, log_dir, on_status)` makes it."""

    marker: str | None  # what its processes on this machine carry as `process.MARKER`; None: they cannot be told
    urls: list[str]  # more than one: independent servers, with nothing before them
    token: Secret | None  # what its addresses want as bearer
    effective: Mapping[str, Any]  # what it says about itself once it is ready, in the form of `records.Effective`

    def start(self) -> None: ...  # ask for it; before, nothing of it is there

    def wait_ready(self) -> None: ...

    def begin_stop(self) -> None: ...  # ask for its end and do not wait, so that several end side by side

    def stop(self) -> str | None: ...  # end all of it, and wait; what is left. A second call only repeats that

    def snapshot(self) -> Snapshot | None: ...  # None: nobody can look inside

    def round_trip_ms(self) -> float | None: ...  # of a request that does nothing; None on this machine


@dataclass(kw_only=True)
class Cluster(ABC):
    """Where services run. Derive a dataclass from it: its fields are the keys of its YAML beside these."""

    name: str
    num_cpus: Count  # logical CPUs that replicas can have
    num_gpus: WholeNumber = 0
    gpus_per_model_replica: Amount = 0  # what a replica that holds a model asks for
    client_processes: Count  # load generator processes at most, and no more than cores here
    redeploy: Literal["per_repeat", "never"] = "per_repeat"  # never: one deployment an arm, no replicates
    max_live_services: Count = 1  # services that are up at the same time
    startup_timeout_s: Positive = 300
    env: dict[str, Any] = field(default_factory=dict)  # settings that reach every arm and so are not the treatment

    deploys: ClassVar[bool] = True  # whether what the workload says is brought up; False: what answers is others'

    def settings_env(self, config: ServiceConfig) -> dict[str, str]:
        """Environment variables that every arm has, whatever its flags: of the cluster and of the workload."""
        return {**self.env, **config.workload.env}

    def service_env(self, config: ServiceConfig) -> dict[str, str]:
        """Environment variables of every process of the service: the settings, and over them the profile's flags."""
        return self.settings_env(config) | config.profile.env

    @abstractmethod
    def check(self, config: ServiceConfig) -> None:
        """Refuse what cannot work, as far as it can be known without importing or asking. Raises ConfigError."""

    def check_live(self, config: ServiceConfig) -> None:  # noqa: B027 - often there is nothing
        """Refuse what takes seconds to find out; just before the first deployment. Raises ConfigError."""

    @abstractmethod
    def rendered(self, config: ServiceConfig, name: "ServiceName") -> str:
        """`service.yaml`, as a dry run shows it."""

    @abstractmethod
    def service(
        self, config: ServiceConfig, name: "ServiceName", log_dir: Path, on_status: Callable[[str], None]
    ) -> "Running":
        """A handle of one service, of which nothing is there before its `start`.

        It writes `service.yaml` and its logs into `log_dir`, and tells `on_status` what it is doing.
        """

    def identity(self) -> Mapping[str, object]:
        """The part of a service's identity that is this cluster's: its kind, CPUs and GPUs, and its own keys."""
        shared = {key.name for key in dataclasses.fields(Cluster)} - {"num_cpus", "num_gpus"}
        own = [key.name for key in dataclasses.fields(self) if key.name not in shared]
        return {"kind": target_of(self)} | {name: getattr(self, name) for name in own}

    def bring_up_s(self, config: ServiceConfig) -> float:
        """Estimate of the time from start to ready of one service, in seconds, as seen on 2 slow cores."""
        return 60.0 if config.model else 20.0

    def machines(self) -> list[tuple[str, int]]:
        """Types of the machines that one service rents, and how many of each at most."""
        return []

    def hourly_usd(self) -> float | None:
        """What one service costs in USD an hour by declared prices; None where one is missing or nothing is rented."""
        return None

    def unpriced(self) -> list[str]:
        """Types of rented machines without a declared price."""
        return []

    def cost_limit_usd(self) -> float | None:
        """The most that a run may cost, USD; None = no limit."""
        return None


@dataclass(kw_only=True)
class SharedCluster(Cluster):
    """A cluster on which services of several runs stand, and go on when the orchestrator that began them dies."""

    service_prefix: str = "so"  # services are called <prefix>-<run>-<number>

    @abstractmethod
    def left_over(self, config: ServiceConfig, names: Sequence["ServiceName"]) -> dict["ServiceName", str]:
        """Those of these services that a run left behind, with their state. Raises ServiceError."""

    @abstractmethod
    def end(self, config: ServiceConfig, name: "ServiceName", log_dir: Path) -> str | None:
        """End a service that a run left behind; returns a sentence on what could not be ended, else None."""


def healthy_snapshot(running: Running) -> Snapshot | None:
    """Wait until the service is healthy; returns its snapshot, None where nobody can look inside. Raises TrialError."""
    found = ""
    for _ in poll(0.5, timeout_s=_HEALTHY_TIMEOUT_S):
        snapshot = running.snapshot()
        if snapshot is None:
            return None
        if not snapshot.unhealthy and snapshot.listener is not None:
            return snapshot
        found = "; ".join(snapshot.unhealthy) or "nothing listens on the HTTP port"
    raise TrialError(f"service not healthy within {_HEALTHY_TIMEOUT_S:g} s before the trial: {found}")


def check_engines(before: Snapshot, after: Snapshot) -> None:
    """Raise TrialError when an engine died between two snapshots: its server then only answers with errors."""
    if before.actors is None or after.actors is None:
        return
    alive = {actor.id for actor in after.actors}
    gone = [actor for actor in before.actors if actor.kind == ENGINE_KIND and actor.id not in alive]
    if gone:
        names = ", ".join(f"{engine.name} (pid {engine.pid})" for engine in gone)
        raise TrialError(f"the engine {names} died under load; its log: {gone[0].log}")


def changes(before: Snapshot, after: Snapshot) -> ServerFacts:
    """Actors that were there before the load and are not after it, and what Serve calls unhealthy now.

    Ray restarts an actor under its old id, so the same one is the same id in the same process.
    """
    if before.actors is None or after.actors is None:
        return ServerFacts()
    alive = {(actor.id, actor.pid) for actor in after.actors}
    gone = [actor for actor in before.actors if (actor.id, actor.pid) not in alive]
    failed = [*(actor.name for actor in gone if actor.kind != REPLICA_KIND), *after.unhealthy]
    if after.listener is None:
        failed.append("HTTP listener")
    return ServerFacts(
        restarted=[actor.name for actor in gone if actor.kind == REPLICA_KIND],
        failed=failed,
        actors=[actor.name for actor in after.actors],
    )


# On Anyscale it becomes part of a host name, whose parts may have 63 characters, with a suffix of theirs.
_MAX_NAME_LENGTH = 50


@dataclass(frozen=True)
class ServiceName:
    """Identifies a service among all on a shared cluster, as far as run ids are unique among runs with this prefix."""

    prefix: str
    run_id: str
    index: int
    arm: str
    repeat: int

    @property
    def service(self) -> str:
        """`<prefix>-<run id>-<index>`, in characters that every cluster takes; with a digest if changed or cut."""
        # Looking a service up by name finds substrings, fifty at most: with a fixed width no name is part of another.
        ending = f"{_plain(self.run_id)}-{self.index:04d}"
        whole = f"{self.prefix}-{self.run_id}-{self.index:04d}"
        name = f"{_plain(self.prefix)}-{ending}"
        if name == whole and len(name) <= _MAX_NAME_LENGTH:
            return name
        digest = sha256(whole.encode()).hexdigest()[:8]
        room = _MAX_NAME_LENGTH - len(ending) - len(digest) - 2
        if room < 1:
            raise ConfigError(f"run id {self.run_id!r} is too long for a service name of {_MAX_NAME_LENGTH} characters")
        return f"{_plain(self.prefix)[:room]}-{digest}-{ending}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", text)

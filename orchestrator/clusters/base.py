"""What every cluster gives: a service that runs, and what is asked of it before and after load."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

from orchestrator.application import check_replicas, check_source, service_env
from orchestrator.clusters.flags import check_direct_streaming, check_flags
from orchestrator.config import Config
from orchestrator.errors import ConfigError, TrialError
from orchestrator.results.records import ServerFacts
from orchestrator.secrets import Secret
from orchestrator.waiting import poll

ENGINE_KIND = "VllmEngine"  # the process beside a replica or server that runs the model
_HEALTHY_TIMEOUT_S = 60.0  # a replica that restarts has this long before the next trial fails


class Running(Protocol):
    """One service, as a cluster's `service(config, name, log_dir, on_status)` makes it."""

    urls: list[str]  # more than one: independent servers, with nothing before them
    token: Secret | None  # what its addresses want as bearer
    effective: dict[str, Any]  # what it says about itself, once it is ready

    def start(self) -> None: ...  # ask for it; before, nothing of it is there

    def wait_ready(self) -> None: ...

    def begin_stop(self) -> None: ...  # ask for its end and do not wait, so that several end side by side

    def stop(self) -> str | None: ...  # end all of it, and wait; what is left. A second call only repeats that

    def snapshot(self) -> dict[str, Any] | None: ...  # None: nobody can look inside

    def round_trip_ms(self) -> float | None: ...  # of a request that does nothing; None on this machine


def check_deployed(config: Config) -> None:
    """What every cluster that deploys something refuses, known without starting Ray. Raises ConfigError."""
    check_flags(service_env(config))
    check_direct_streaming(config)
    check_source(config)
    check_replicas(config)


def healthy_snapshot(running: Running) -> dict[str, Any] | None:
    """What runs now, once nothing of it is unhealthy; None where nobody can look inside. Raises TrialError."""
    found = ""
    for _ in poll(0.5, timeout_s=_HEALTHY_TIMEOUT_S):
        snapshot = running.snapshot()
        if snapshot is None:
            return None
        if not snapshot["unhealthy"] and snapshot["listener"] is not None:
            return snapshot
        found = "; ".join(snapshot["unhealthy"]) or "nothing listens on the HTTP port"
    raise TrialError(f"service not healthy within {_HEALTHY_TIMEOUT_S:g} s before the trial: {found}")


def check_engines(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Without its engine a server only answers with errors: there is nothing to measure. Raises TrialError."""
    if before["actors"] is None or after["actors"] is None:
        return
    alive = {actor["id"] for actor in after["actors"]}
    gone = [each for each in before["actors"] if each["kind"] == ENGINE_KIND and each["id"] not in alive]
    if gone:
        names = ", ".join(f"{each['name']} (pid {each['pid']})" for each in gone)
        raise TrialError(f"the engine {names} died under load; its log: {gone[0].get('log')}")


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> ServerFacts:
    """Actors that were there before the load and are not after it, and what Serve calls unhealthy now.

    Ray restarts an actor under its old id, so the same one is the same id in the same process.
    """
    if before["actors"] is None or after["actors"] is None:  # nobody answered who could tell
        return ServerFacts()
    alive = {(actor["id"], actor["pid"]) for actor in after["actors"]}
    gone = [actor for actor in before["actors"] if (actor["id"], actor["pid"]) not in alive]
    failed = [actor["name"] for actor in gone if actor["kind"] != "ServeReplica"] + after["unhealthy"]
    if after["listener"] is None:
        failed.append("HTTP listener")
    return ServerFacts(
        restarted=[actor["name"] for actor in gone if actor["kind"] == "ServeReplica"],
        failed=failed,
        actors=[actor["name"] for actor in after["actors"]],
    )


# On Anyscale it becomes part of a host name, whose parts may have 63 characters, with a suffix of theirs.
_MAX_NAME_LENGTH = 50


@dataclass(frozen=True)
class ServiceName:
    """Which service it is: unique where names are shared, as long as the run id is among runs with this prefix."""

    prefix: str
    run_id: str
    index: int
    arm: str
    repeat: int

    @property
    def service(self) -> str:
        """`<prefix>-<run id>-<index>` in characters that all take; what had to be changed or cut leaves its digest."""
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

"""The sections of a config that are no kinds: their keys, the types of their values, and what a type cannot say.

A key's type is checked where the section is made (`kinds.checked`). Beside it stand the checks that concern one
section alone; those that concern several are with whoever needs them: `application`, a cluster, a client.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from pydantic import Field

from orchestrator.errors import ConfigError
from orchestrator.kinds import Amount, Count, Positive, check_number, checked
from orchestrator.load.base import LevelRule
from orchestrator.load.level import Level, Unit

Margin = Annotated[float, Field(strict=True, gt=0, lt=1, description="a fraction above 0 and below 1, 0.05 = 5 %")]


@dataclass(kw_only=True)
class Profile:
    """A named set of flags: the treatment."""

    name: str
    env: dict[str, Any] = field(default_factory=dict)  # environment variables of the service
    app: dict[str, Any] = field(default_factory=dict)  # laid over the workload's application, where a flag forces it

    def check(self) -> None:
        """Raises ConfigError."""
        check_env("profile.env", self.env)


@dataclass(kw_only=True)
class Workload:
    """What is served and what is asked of it. Further keys of its YAML are values of its own, to be interpolated."""

    name: str
    num_replicas: Count  # of the tier that does the work
    # A Ray Serve application config; `deployments` maps name -> settings. Null with no server either: of others.
    application: dict[str, Any] | None
    server: dict[str, Any] | None = None  # without an application: vLLM's own server (model, source, engine, num_gpus)
    locustfile: str  # a dotted module or a path ending in .py: the requests, for Locust
    options: dict[str, Any]  # what the locustfile is told
    slo: dict[str, Any]
    ready_path: str  # must answer 200 before any load
    env: dict[str, Any]
    extra: str | None  # the optional dependencies that it needs

    def check(self) -> None:
        """Raises ConfigError."""
        check_env("workload.env", self.env)
        if self.application is not None and self.server is not None:
            raise ConfigError(f"workload {self.name} has an application or a server, and not both")
        if self.application is not None:
            _check_application(self.application)
        if not self.ready_path.startswith("/"):
            raise ConfigError(f"workload.ready_path must start with /, found {self.ready_path!r}")
        headers = self.options.get("headers") or {}
        if not isinstance(headers, Mapping):
            raise ConfigError(f"workload.options.headers must map names to values, found {headers!r}")
        for name in headers:
            if re.search("auth|token|key|secret|cookie", name, re.IGNORECASE):
                raise ConfigError(
                    f"workload.options.headers.{name}: a config is written down, so no secret belongs there; "
                    "cluster=endpoint takes a bearer token from an environment variable (cluster.token_env)"
                )


@dataclass(kw_only=True)
class Sweep:
    """How hard: which levels, how often, and the times of one measurement."""

    name: str
    load: LevelRule  # which of the levels is measured next
    # Levels, of one of the two: a number or a list; `=[1,8]` and a swept `=1,8` both mean two levels.
    concurrency: Any = None  # closed loop: clients
    offered_rps: Any = None  # open loop: requests per second
    per_replica: bool = False  # a level is of each replica: N replicas get N times as many clients or requests
    repeats: Count
    ramp_up_s: Amount
    warmup_s: Amount
    duration_s: Positive
    drain_s: Amount
    cooldown_s: Amount

    def check(self) -> None:
        """Raises ConfigError."""
        self.levels(1)

    def levels(self, num_replicas: int) -> tuple[Level, ...]:
        """As listed, in all: `per_replica` multiplies them by the number of replicas.

        Raises ConfigError unless one of the two keys gives at least one level, none twice.
        """
        asked = {"concurrency": self.concurrency, "offered_rps": self.offered_rps}
        given = {key: value for key, value in asked.items() if value is not None}
        if len(given) != 1:
            raise ConfigError(
                "one of sweep.concurrency (clients, closed loop) and sweep.offered_rps (requests/s, open loop) is "
                f"given and the other null, found sweep.concurrency={self.concurrency} "
                f"sweep.offered_rps={self.offered_rps}"
            )
        ((key, value),) = given.items()
        amounts = value if isinstance(value, list) else [value]
        if not amounts:
            raise ConfigError(f"sweep.{key} is empty: give at least one level, e.g. sweep.{key}='[1,8]'")
        unit = Unit.clients if key == "concurrency" else Unit.requests_per_s
        for amount in amounts:
            check_number(f"sweep.{key}", amount, whole=unit is Unit.clients, above_0=True)
        try:
            factor = num_replicas if self.per_replica else 1
            levels = tuple(Level(unit, _times(factor, amount)) for amount in amounts)
        except ValueError as error:
            raise ConfigError(f"sweep.{key}: {error}") from error
        if len(set(levels)) != len(levels):
            raise ConfigError(f"sweep.{key} names a level twice: {amounts}; repeats are sweep.repeats")
        return levels


@dataclass(kw_only=True)
class Slo:
    """What a request must meet to count as goodput; null = nothing."""

    latency_p99_ms: Positive | None = None
    ttft_p99_ms: Positive | None = None
    tpot_p99_ms: Positive | None = None


@dataclass(kw_only=True)
class Validity:
    """Limits of the rules in results/validity.py."""

    max_error_ratio: Amount
    max_window_shortfall_ratio: Amount
    max_drift_ratio: Amount
    min_offered_ratio: Amount
    min_in_flight_ratio: Amount
    max_client_cpu_ratio: Amount
    max_client_lag_ratio: Amount


@dataclass(kw_only=True)
class Compare:
    """How the arms will be judged: fixed before any of them is measured."""

    treatment: Any = None  # an axis or a list of axes; null = the profile where it varies, else the last one swept
    baseline: str | None = None  # an arm, or its value of the treatment; null = "baseline", else the first arm
    figure: str | None = None  # null = throughput_rps where levels are clients, latency_p95_ms where they are rates
    margin: Margin
    max_looks: Count

    def check(self) -> None:
        """Raises ConfigError."""
        _ = self.axes

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that are declared as compared. Raises ConfigError."""
        axes = () if self.treatment is None else self.treatment
        axes = tuple(axes) if isinstance(axes, list | tuple) else (axes,)
        if not all(isinstance(axis, str) and axis for axis in axes):
            raise ConfigError(
                f"compare.treatment must name what is compared, found {self.treatment!r}; "
                "e.g. compare.treatment=workload.num_replicas"
            )
        return axes


@dataclass(kw_only=True)
class ServiceConfig:
    """The part of a config that decides what a cluster brings up."""

    workload: Workload
    model: dict[str, Any] = field(default_factory=dict)  # of LLM workloads, which interpolate it
    profile: Profile
    dry_run: bool = False


def _times(num_replicas: int, amount: float) -> float:
    return amount if num_replicas == 1 else round(num_replicas * amount, 2)


def workload_of(node: Any) -> Workload:
    """The workload of its YAML's values, of which those that are its own are looked at by their names alone.

    Raises ConfigError.
    """
    if not isinstance(node, Mapping):
        raise ConfigError(f"workload must be a mapping, found {node!r}")
    names = {key.name for key in fields(Workload)}
    workload = checked("workload", Workload, {name: value for name, value in node.items() if name in names})
    # A name tells what a workload's own value must be: `num_`, `max_` and `_bytes` count, `_s` measures.
    for name, value in node.items():
        counts = name.startswith(("num_", "max_")) or name.endswith("_bytes")
        if name not in names and (counts or name.endswith("_s")):
            check_number(f"workload.{name}", value, whole=counts)
    return workload


def check_env(where: str, env: Mapping[str, object]) -> None:
    """Environment values are strings: YAML makes `on` True and `1` an int, and Ray Serve compares with "1".

    Raises ConfigError.
    """
    for name, value in env.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"{where}: {name!r} is not a name of an environment variable")
        if re.search(r"_(TOKEN|SECRET|PASSWORD|KEY)$", name) and not name.startswith("RAY_SERVE_"):
            raise ConfigError(f"{where}.{name}: a config is written down, so no secret belongs there")
        word = str(value).lower()
        switch = {"true": "1", "on": "1", "yes": "1", "false": "0", "off": "0", "no": "0"}.get(word)
        if not isinstance(value, str) or (switch and name.startswith("RAY_SERVE_")):
            text = switch or ("1" if value is None else value)
            raise ConfigError(
                f"{where}.{name} must be a quoted string that Ray understands, found {value!r}. "
                f'In a file: {name}: "{text}"   On the command line: \'++{where}.{name}="{text}"\''
            )


def _check_application(application: Mapping[str, object]) -> None:
    if not isinstance(application.get("import_path"), str):
        raise ConfigError(f"workload.application.import_path must be module:attribute, found {application!r}")
    deployments = application.get("deployments")
    if not isinstance(deployments, dict) or not all(isinstance(options, dict) for options in deployments.values()):
        raise ConfigError(f"workload.application.deployments must map names to settings, found {deployments!r}")

"""The shape of a composed config: one schema for Hydra and for the code that runs it.

Hydra checks names and types while composing. `parse` checks what a type cannot say, and fails with
`ConfigError` before anything is deployed. Workload files may hold further values of their own (payload,
model size): these exist to be overridden and interpolated into `application` and `client`.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.errors import ConfigError
from orchestrator.load.level import Level

SDK_MIN_NODES, SDK_MAX_NODES = 0, 10  # of worker_nodes, where nothing is said: anyscale.compute_config.models


class ClusterKind(Enum):
    local = "local"
    anyscale = "anyscale"
    existing = "existing"
    endpoint = "endpoint"

    @property
    def is_shared(self) -> bool:
        """Whether services of other machines' runs stand beside ours, and outlive the orchestrator that began them."""
        return self in (ClusterKind.anyscale, ClusterKind.existing)


class Redeploy(Enum):
    per_repeat = "per_repeat"
    never = "never"


class ClientKind(Enum):
    locust = "locust"
    vllm_bench = "vllm_bench"


@dataclass
class ClusterConfig:
    name: str = MISSING
    kind: ClusterKind = MISSING
    num_cpus: int = MISSING
    num_gpus: int = 0
    gpus_per_model_replica: float = 0
    http_port: int | None = None
    client_processes: int = MISSING
    redeploy: Redeploy = Redeploy.per_repeat
    max_live_services: int = 1
    startup_timeout_s: float = 300
    env: dict[str, Any] = field(default_factory=dict)
    token_env: str | None = None  # the environment variable that holds the token; never the token itself
    # kind: existing
    dashboard_url: str | None = None
    # kind: existing or endpoint: where load goes
    url: str | None = None
    # kind: anyscale
    terminate_timeout_s: float = 900
    host_env: str = "ANYSCALE_HOST"
    cloud: str | None = None
    project: str | None = None
    image_uri: str | None = None
    head_node: dict[str, Any] = field(default_factory=dict)
    worker_nodes: list[dict[str, Any]] = field(default_factory=list)
    service_prefix: str = "so"
    expires_after_h: float = 12
    usd_per_hour: dict[str, float] = field(default_factory=dict)  # of each instance type
    max_cost_usd: float | None = None


@dataclass
class ProfileConfig:
    name: str = MISSING
    env: dict[str, Any] = field(default_factory=dict)
    app: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepConfig:
    name: str = MISSING
    # Levels, of one of the two: a number or a list; `=[1,8]` and `=1,8 -m` both mean two levels.
    concurrency: Any = None  # closed loop: clients
    offered_rps: Any = None  # open loop: requests per second
    per_replica: bool = False  # a level is of each replica: N replicas get N times as many clients or requests
    repeats: int = MISSING
    ramp_up_s: float = MISSING
    warmup_s: float = MISSING
    duration_s: float = MISSING
    drain_s: float = MISSING
    cooldown_s: float = MISSING


@dataclass
class SloConfig:
    latency_p99_ms: float | None = None
    ttft_p99_ms: float | None = None
    tpot_p99_ms: float | None = None


@dataclass
class ValidityConfig:
    max_error_ratio: float = MISSING
    max_window_shortfall_ratio: float = MISSING
    max_drift_ratio: float = MISSING
    min_offered_ratio: float = MISSING
    min_in_flight_ratio: float = MISSING
    max_client_cpu_ratio: float = MISSING
    max_client_lag_ratio: float = MISSING


@dataclass
class CompareConfig:
    """How the arms will be judged: fixed before any of them is measured."""

    treatment: Any = None  # an axis or a list of axes; null = the profile where it varies, else the last one swept
    baseline: str | None = None  # an arm, or its value of the treatment; null = "baseline", else the first arm
    figure: str | None = None  # null = throughput_rps where levels are clients, latency_p95_ms where they are rates
    margin: float = MISSING
    max_looks: int = MISSING


@dataclass
class ClientConfig:
    kind: ClientKind = ClientKind.locust
    locustfile: str = MISSING
    options: dict[str, Any] = MISSING


@dataclass
class WorkloadConfig:
    """What every workload has; read from the resolved `workload` node by `parse`."""

    name: str = MISSING
    num_replicas: int = MISSING  # of the tier that does the work
    # A Ray Serve application config; `deployments` maps name -> settings. Null with no server either: of others.
    application: dict[str, Any] | None = MISSING
    client: ClientConfig = MISSING
    slo: dict[str, Any] = MISSING
    ready_path: str = MISSING
    env: dict[str, Any] = MISSING
    extra: str | None = MISSING
    server: dict[str, Any] | None = None  # without an application: vLLM's own server (model, source, engine, num_gpus)


@dataclass
class Config:
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    workload: Any = MISSING  # a WorkloadConfig once parsed
    model: dict[str, Any] = field(default_factory=dict)  # of LLM workloads, which interpolate it
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    validity: ValidityConfig = field(default_factory=ValidityConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    outputs: str = "outputs"
    seed: int | None = None
    dry_run: bool = False
    resume: str | None = None


def register() -> None:
    """Make the schema known to Hydra as the defaults-list entry `schema`, and `${mul:a,b}` to configs."""
    OmegaConf.register_new_resolver("mul", lambda a, b: a * b, replace=True)
    ConfigStore.instance().store(name="schema", node=Config)


def parse(composed: DictConfig) -> Config:
    """Resolve and check one composed config.

    Raises ConfigError naming the key, what was found and what would work.
    """
    try:
        # Merged into the schema, which refuses names that Hydra's + would add: a misspelt limit would limit nothing.
        plain = OmegaConf.to_container(composed, throw_on_missing=True)
        config = OmegaConf.to_object(OmegaConf.merge(_schema(Config), plain))
        assert isinstance(config, Config)
        config.workload = _workload(config.workload)
    except OmegaConfBaseException as error:
        raise ConfigError(re.sub(r"\n\s+(reference|object)_type=.*", "", str(error))) from error
    _check_levels(config.sweep)
    config.compare.treatment = _treatment(config.compare.treatment)
    for where in ("cluster", "workload", "profile"):
        _check_env(f"{where}.env", getattr(config, where).env)
    _check_numbers(config)
    if not (config.workload.application or config.workload.server or config.cluster.kind is ClusterKind.endpoint):
        raise ConfigError(
            f"workload {config.workload.name} has nothing to deploy, only a client: it needs cluster=endpoint "
            f"cluster.url=http://..., found cluster={config.cluster.name}"
        )
    return config


@functools.cache  # making one takes longer than the copy that `merge` takes of it
def _schema(of: type) -> DictConfig:
    schema: DictConfig = OmegaConf.structured(of)
    return schema


def _workload(node: Any) -> WorkloadConfig:
    if not isinstance(node, Mapping):
        raise ConfigError(f"workload must be a mapping, found {node!r}")
    ours = {each.name: node[each.name] for each in fields(WorkloadConfig) if each.name in node}
    workload = OmegaConf.to_object(OmegaConf.merge(_schema(WorkloadConfig), ours))
    assert isinstance(workload, WorkloadConfig)
    if workload.application is not None and workload.server is not None:
        raise ConfigError(f"workload {workload.name} has an application or a server, and not both")
    if workload.application is not None:
        _check_application(workload.application)
    if not workload.ready_path.startswith("/"):
        raise ConfigError(f"workload.ready_path must start with /, found {workload.ready_path!r}")
    # A name tells what a workload's own value must be: `num_`, `max_` and `_bytes` count, `_s` measures.
    for name, value in node.items():
        counts = name.startswith(("num_", "max_")) or name.endswith("_bytes")
        if counts or name.endswith("_s"):
            check_number(f"workload.{name}", value, whole=counts, above_0=name == "num_replicas")
    return workload


def _check_application(application: Mapping[str, Any]) -> None:
    if not isinstance(application.get("import_path"), str):
        raise ConfigError(f"workload.application.import_path must be module:attribute, found {application!r}")
    deployments = application.get("deployments")
    if not isinstance(deployments, dict) or not all(isinstance(each, dict) for each in deployments.values()):
        raise ConfigError(f"workload.application.deployments must map names to settings, found {deployments!r}")


def check_number(key: str, value: Any, *, whole: bool = False, above_0: bool = False) -> None:
    """Raises ConfigError unless it is a finite number that is not negative."""
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not fits or not 0 <= value < float("inf") or (above_0 and value == 0):
        what = f"{'whole ' if whole else ''}number {'above 0' if above_0 else 'and not negative'}"
        raise ConfigError(f"{key} must be a {what}, found {value!r}")


def _check_levels(sweep: SweepConfig) -> None:
    """Levels are a list from here on, of clients or of requests per second. Raises ConfigError."""
    if (sweep.concurrency is None) == (sweep.offered_rps is None):
        raise ConfigError(
            "one of sweep.concurrency (clients, closed loop) and sweep.offered_rps (requests/s, open loop) is given "
            f"and the other null, found sweep.concurrency={sweep.concurrency} sweep.offered_rps={sweep.offered_rps}"
        )
    name = "offered_rps" if sweep.concurrency is None else "concurrency"
    value = getattr(sweep, name)
    amounts = value if isinstance(value, list) else [value]
    if not amounts:
        raise ConfigError(f"sweep.{name} is empty: give at least one level, e.g. sweep.{name}='[1,8]'")
    for amount in amounts:
        check_number(f"sweep.{name}", amount, whole=name == "concurrency", above_0=True)
    if len(set(amounts)) != len(amounts):
        raise ConfigError(f"sweep.{name} names a level twice: {amounts}; repeats are sweep.repeats")
    setattr(sweep, name, amounts)
    try:
        levels_of(sweep, 1)
    except ValueError as error:
        raise ConfigError(f"sweep.{name}: {error}") from None


def levels_of(sweep: SweepConfig, num_replicas: int) -> list[Level]:
    """The levels of a parsed sweep, in all: `per_replica` multiplies them by the number of replicas."""
    factor = num_replicas if sweep.per_replica else 1
    if sweep.concurrency is not None:
        return [Level.of_clients(factor * amount) for amount in sweep.concurrency]
    return [Level.of_rate(round(factor * amount, 2) if factor > 1 else amount) for amount in sweep.offered_rps]


def _treatment(value: Any) -> list[str]:
    axes = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(axis, str) and axis for axis in axes):
        raise ConfigError(
            f"compare.treatment must name what is compared, found {value!r}; "
            "e.g. compare.treatment=workload.num_replicas"
        )
    return axes


def _check_env(where: str, env: Mapping[str, Any]) -> None:
    """Environment values are strings: YAML makes `on` True and `1` an int, and Ray Serve compares with "1"."""
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


_ABOVE_0 = {
    *("repeats", "duration_s", "num_cpus", "client_processes", "max_live_services", "startup_timeout_s"),
    *("terminate_timeout_s", "margin", "max_looks", "latency_p99_ms", "ttft_p99_ms", "tpot_p99_ms"),
}


def _check_numbers(config: Config) -> None:
    for section in ("cluster", "sweep", "slo", "validity", "compare"):
        for name, value in vars(getattr(config, section)).items():
            if type(value) in (int, float):
                check_number(f"{section}.{name}", value, above_0=name in _ABOVE_0)
    cluster = config.cluster
    for instance_type, price in cluster.usd_per_hour.items():
        check_number(f"cluster.usd_per_hour of {instance_type}", price)
    if config.compare.margin >= 1:
        raise ConfigError(f"compare.margin is a fraction, 0.05 = 5 %, found {config.compare.margin}")
    if cluster.http_port is not None and not 1024 <= cluster.http_port <= 65535:
        raise ConfigError(f"cluster.http_port must lie in 1024..65535 or be null, found {cluster.http_port}")
    if cluster.http_port is not None and cluster.max_live_services > 1:
        raise ConfigError("cluster.http_port names one port, but cluster.max_live_services is above 1; leave it null")

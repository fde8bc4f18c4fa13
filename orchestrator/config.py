"""The shape of a composed config: one schema for Hydra and for the code that runs it.

Hydra checks names and types while composing. `parse` checks what a type cannot say, and fails with
`ConfigError` before anything is deployed. Workload files may hold further values of their own (payload,
model size): these exist to be overridden and interpolated into `application` and `client`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.errors import ConfigError


class ClusterKind(Enum):
    local = "local"


class Redeploy(Enum):
    per_repeat = "per_repeat"
    never = "never"


class LoadMode(Enum):
    closed = "closed"


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


@dataclass
class ProfileConfig:
    name: str = MISSING
    env: dict[str, Any] = field(default_factory=dict)
    app: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepConfig:
    name: str = MISSING
    load: LoadMode = LoadMode.closed
    concurrency: Any = MISSING  # an int or a list: `=[1,8]` and `=1,8 -m` both mean two levels
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
    min_in_flight_ratio: float = MISSING
    max_client_cpu_ratio: float = MISSING
    max_client_lag_ratio: float = MISSING


@dataclass
class CompareConfig:
    """How the arms will be judged: fixed before any of them is measured."""

    treatment: Any = None  # an axis or a list of axes; null = the profile where it varies, else the last one swept
    baseline: str | None = None  # an arm, or its value of the treatment; null = "baseline", else the first arm
    margin: float = MISSING
    max_looks: int = MISSING


@dataclass
class ClientConfig:
    locustfile: str = MISSING
    options: dict[str, Any] = MISSING


@dataclass
class WorkloadConfig:
    """What every workload has; read from the resolved `workload` node by `parse`."""

    name: str = MISSING
    num_replicas: int = MISSING  # of the tier that does the work
    application: dict[str, Any] = MISSING  # a Ray Serve application config; `deployments` maps name -> settings
    client: ClientConfig = MISSING
    slo: dict[str, Any] = MISSING
    ready_path: str = MISSING
    env: dict[str, Any] = MISSING
    extra: str | None = MISSING


@dataclass
class Config:
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    workload: Any = MISSING  # a WorkloadConfig once parsed
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
    """Make the schema known to Hydra as the defaults-list entry `schema`."""
    ConfigStore.instance().store(name="schema", node=Config)


def parse(composed: DictConfig) -> Config:
    """Resolve and check one composed config.

    Raises ConfigError naming the key, what was found and what would work.
    """
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    assert isinstance(config, Config)
    config.workload = _workload(config.workload)
    config.sweep.concurrency = _concurrency(config.sweep.concurrency)
    config.compare.treatment = _treatment(config.compare.treatment)
    for where in ("cluster", "workload", "profile"):
        _check_env(f"{where}.env", getattr(config, where).env)
    _check_ranges(config)
    return config


def _workload(node: Any) -> WorkloadConfig:
    if not isinstance(node, Mapping):
        raise ConfigError(f"workload must be a mapping, found {node!r}")
    names = [each.name for each in fields(WorkloadConfig)]
    missing = [name for name in names if name not in node]
    if missing:
        raise ConfigError(f"workload lacks {', '.join(missing)}; it has {', '.join(node)}")
    try:
        typed = OmegaConf.merge(OmegaConf.structured(WorkloadConfig), {name: node[name] for name in names})
        workload = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"workload: {error}") from error
    assert isinstance(workload, WorkloadConfig)
    application = workload.application
    if not isinstance(application.get("import_path"), str):
        raise ConfigError(f"workload.application.import_path must be module:attribute, found {application!r}")
    deployments = application.get("deployments")
    if not isinstance(deployments, dict) or not all(isinstance(each, dict) for each in deployments.values()):
        raise ConfigError(f"workload.application.deployments must map names to settings, found {deployments!r}")
    if not workload.ready_path.startswith("/"):
        raise ConfigError(f"workload.ready_path must start with /, found {workload.ready_path!r}")
    for name, value in node.items():
        _check_number(f"workload.{name}", value)
    return workload


def _check_number(key: str, value: Any) -> None:
    """A name tells what a workload's own value must be: `num_` and `max_` count, `_s` and `_bytes` measure."""
    name = key.rpartition(".")[2]
    counts = name.startswith(("num_", "max_")) or name.endswith("_bytes")
    if not counts and not name.endswith("_s"):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf") or (counts and value != int(value)):
        raise ConfigError(f"{key} must be a {'whole ' if counts else ''}number and not negative, found {value!r}")


def _concurrency(value: Any) -> list[int]:
    levels = value if isinstance(value, list) else [value]
    if not levels:
        raise ConfigError("sweep.concurrency is empty: give at least one level, e.g. sweep.concurrency='[1,8]'")
    for level in levels:
        if not isinstance(level, int) or isinstance(level, bool) or level < 1:
            raise ConfigError(
                f"sweep.concurrency must be positive whole numbers, found {level!r} in {value!r}; "
                "e.g. sweep.concurrency='[1,8]'"
            )
    if len(set(levels)) != len(levels):
        raise ConfigError(f"sweep.concurrency names a level twice: {levels}; repeats are sweep.repeats")
    return levels


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
        word = str(value).lower()
        switch = {"true": "1", "on": "1", "yes": "1", "false": "0", "off": "0", "no": "0"}.get(word)
        if not isinstance(value, str) or (switch and name.startswith("RAY_SERVE_")):
            text = switch or ("1" if value is None else value)
            raise ConfigError(
                f"{where}.{name} must be a quoted string that Ray understands, found {value!r}. "
                f'In a file: {name}: "{text}"   On the command line: \'++{where}.{name}="{text}"\''
            )


def _check_ranges(config: Config) -> None:
    sweep, cluster = config.sweep, config.cluster
    positive = {
        "sweep.repeats": sweep.repeats,
        "sweep.duration_s": sweep.duration_s,
        "cluster.num_cpus": cluster.num_cpus,
        "cluster.client_processes": cluster.client_processes,
        "cluster.max_live_services": cluster.max_live_services,
        "cluster.startup_timeout_s": cluster.startup_timeout_s,
        "compare.margin": config.compare.margin,
        "compare.max_looks": config.compare.max_looks,
    }
    not_negative = {
        "sweep.ramp_up_s": sweep.ramp_up_s,
        "sweep.warmup_s": sweep.warmup_s,
        "sweep.drain_s": sweep.drain_s,
        "sweep.cooldown_s": sweep.cooldown_s,
        "cluster.num_gpus": cluster.num_gpus,
    } | {f"validity.{each.name}": getattr(config.validity, each.name) for each in fields(ValidityConfig)}
    for key, value in positive.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{key} must be above 0, found {value}")
    for key, value in not_negative.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{key} must not be negative, found {value}")
    if config.compare.margin >= 1:
        raise ConfigError(f"compare.margin is a fraction, 0.05 = 5 %, found {config.compare.margin}")
    if cluster.http_port is not None and not 1024 <= cluster.http_port <= 65535:
        raise ConfigError(f"cluster.http_port must lie in 1024..65535 or be null, found {cluster.http_port}")
    if cluster.http_port is not None and cluster.max_live_services > 1:
        raise ConfigError("cluster.http_port names one port, but cluster.max_live_services is above 1; leave it null")
    for each in fields(SloConfig):
        value = getattr(config.slo, each.name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"slo.{each.name} must be above 0 or null, found {value}")
    _check_replicas(config)


def _check_replicas(config: Config) -> None:
    """More replicas than the cluster can hold would only time out, so this is refused here."""
    asked_cpus = asked_gpus = 0.0
    parts = []
    for settings in render_application(config)["deployments"]:
        name, replicas = settings["name"], settings.get("num_replicas", 1)
        if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 1:
            raise ConfigError(f"{name}: num_replicas must be a positive whole number, found {replicas!r}")
        options = settings.get("ray_actor_options") or {}
        if not isinstance(options, dict):
            raise ConfigError(f"{name}: ray_actor_options must be a mapping, found {options!r}")
        cpus = 1 if options.get("num_cpus") is None else options["num_cpus"]  # as Serve has it
        gpus = options.get("num_gpus") or 0
        for resource, amount in (("num_cpus", cpus), ("num_gpus", gpus)):
            if not isinstance(amount, int | float) or not 0 <= amount < float("inf"):
                raise ConfigError(f"{name}: ray_actor_options.{resource} must be a number, found {amount!r}")
        asked_cpus += replicas * cpus
        asked_gpus += replicas * gpus
        parts.append(f"{name} {replicas} x ({cpus:g} CPU, {gpus:g} GPU)")
    has = config.cluster
    if asked_cpus > has.num_cpus or asked_gpus > has.num_gpus:
        raise ConfigError(
            f"workload {config.workload.name} asks for {asked_cpus:g} CPU and {asked_gpus:g} GPU ({', '.join(parts)}); "
            f"cluster {has.name} hands out {has.num_cpus} CPU and {has.num_gpus} GPU (cluster.num_*)"
        )


def render_application(config: Config) -> dict[str, Any]:
    """The Serve application config of one arm: the workload's, with the profile's `app` laid over it.

    Same for every backend; `serve run` and `anyscale service deploy` accept it in their files.
    """
    overlaid = config.profile.app.get("deployments", {})
    deployed = config.workload.application["deployments"]
    if not isinstance(overlaid, dict) or not overlaid.keys() <= deployed.keys():
        raise ConfigError(
            f"profile.app.deployments must map names of deployments to settings, found {overlaid!r}; "
            f"workload {config.workload.name} has {', '.join(deployed)}"
        )
    try:
        merged = OmegaConf.merge({"name": config.workload.name}, config.workload.application, config.profile.app)
    except OmegaConfBaseException as error:
        raise ConfigError(f"profile.app does not fit workload.application: {error}") from error
    application = cast(dict[str, Any], OmegaConf.to_container(merged))
    deployments = application.pop("deployments")
    application["deployments"] = [{"name": name, **settings} for name, settings in deployments.items()]
    return application

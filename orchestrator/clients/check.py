"""Can the client that was asked for drive this load? Known before anything is deployed."""

import importlib.util
import re
import sys
from pathlib import Path

from orchestrator import provenance
from orchestrator.application import check_module
from orchestrator.config import ClientKind, Config, check_number
from orchestrator.errors import ConfigError


def check_client(config: Config) -> None:
    """The client's file exists and its options fit. Raises ConfigError."""
    _check_headers(config)
    _check_options(config)
    locustfile = config.workload.client.locustfile
    found = Path(locustfile) if locustfile.endswith(".py") else provenance.find_module(locustfile)
    if found is None or not found.is_file():
        raise ConfigError(f"workload.client.locustfile={locustfile!r}: no such file or module")


def check_client_imports(config: Config) -> None:
    """What drives the load can be imported here. Raises ConfigError."""
    _check_vllm(config)
    check_module(config.workload.client.locustfile, config)


def _check_vllm(config: Config) -> None:
    """Here, because importing an application that needs vLLM takes many seconds and says less."""
    client = config.workload.client.kind is ClientKind.vllm_bench
    if (client or config.model) and importlib.util.find_spec("vllm") is None:
        who = f"workload {config.workload.name}" + (" and its client need" if client else " needs")
        raise ConfigError(
            f"{who} vLLM, which is not installed in {sys.prefix}. With a GPU: pip install '.[llm]'   "
            "Without: make llm, then .venv-llm/bin/python -m orchestrator ..."
        )


_LLM_OPTIONS = (
    *("model", "tokenizer", "num_input_tokens", "num_output_tokens", "num_prompts", "request_rate_rps"),
    *("temperature", "timeout_s"),
)


def _check_headers(config: Config) -> None:
    """A token in a config would be written into the run directory."""
    for name in config.workload.client.options.get("headers") or {}:
        if re.search("auth|token|key|secret|cookie", name, re.IGNORECASE):
            raise ConfigError(
                f"workload.client.options.headers.{name}: a config is written down, so no secret belongs there; "
                "cluster=endpoint takes a bearer token from an environment variable (cluster.token_env)"
            )


def _check_options(config: Config) -> None:
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
            check_number(key, options[name], whole=name.startswith("num_"), above_0=True)
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

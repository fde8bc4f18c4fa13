"""Can the client that was asked for drive this load? Known before anything is deployed."""

import importlib.util
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import provenance
from orchestrator.application import check_module
from orchestrator.config import ClientKind, Config, check_number, levels_of
from orchestrator.errors import ConfigError
from orchestrator.load.level import Level

MIN_PROMPTS = 1200  # a p99 needs 1,000 requests in the window
MIN_PROMPTS_PER_CLIENT = 10
_LLM_OPTIONS = (
    "model",
    "tokenizer",
    "num_input_tokens",
    "num_output_tokens",
    "num_prompts",
    "temperature",
    "timeout_s",
)


def check_client(config: Config) -> None:
    """The client's file exists and its options fit. Raises ConfigError."""
    _check_headers(config)
    _check_options(config)
    _check_levels(config)
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


def _check_headers(config: Config) -> None:
    """A token in a config would be written into the run directory."""
    for name in config.workload.client.options.get("headers") or {}:
        if re.search("auth|token|key|secret|cookie", name, re.IGNORECASE):
            raise ConfigError(
                f"workload.client.options.headers.{name}: a config is written down, so no secret belongs there; "
                "cluster=endpoint takes a bearer token from an environment variable (cluster.token_env)"
            )


def _check_levels(config: Config) -> None:
    """The client can drive them, and every server gets a part of each."""
    workload, kind = config.workload, config.workload.client.kind
    levels = levels_of(config.sweep, workload.num_replicas)
    servers = workload.num_replicas if workload.server else 1
    if kind is ClientKind.locust and config.sweep.offered_rps is not None:
        raise ConfigError(
            "Locust drives closed loop only: give sweep.concurrency, or drive sweep.offered_rps with "
            f"workload.client.kind={ClientKind.vllm_bench.value}"
        )
    if any(level.concurrency is not None and level.concurrency < servers for level in levels):
        raise ConfigError(f"{servers} servers need as many clients, found sweep.concurrency={config.sweep.concurrency}")
    if kind is ClientKind.locust and config.cluster.client_processes < servers:
        raise ConfigError(
            f"{servers} servers need as many Locust processes, found cluster.client_processes="
            f"{config.cluster.client_processes}"
        )
    if kind is ClientKind.vllm_bench:
        for level in levels:
            _check_num_prompts(config, level)


def _check_num_prompts(config: Config, level: Level) -> None:
    """They last long enough to measure, and no longer than they may."""
    options, num_replicas = config.workload.client.options, config.workload.num_replicas
    key = f"workload.client.options.num_prompts={options['num_prompts']}"
    if level.offered_rps is not None:
        num_requests = num_prompts(options, num_replicas, level, config.sweep.duration_s)
        if num_requests < 2 * num_replicas:
            raise ConfigError(f"{key} a replica is no window: two requests a replica begin and end one")
        if (takes_s := num_requests / level.offered_rps) > options["timeout_s"]:
            raise ConfigError(
                f"{num_requests:,} requests at {level.text} take {takes_s:,.0f} s, more than "
                f"workload.client.options.timeout_s={options['timeout_s']:g}; raise it, or set num_prompts (a replica)"
            )
    elif options["num_prompts"] is not None and options["num_prompts"] < 2 * level.amount / num_replicas:
        raise ConfigError(
            f"{key} a replica leave no time when all {level.amount / num_replicas:g} clients are busy; ten a client "
            "are usual (null)"
        )


def num_prompts(options: Mapping[str, Any], num_replicas: int, level: Level, duration_s: float) -> int:
    """Requests that vLLM's client sends at one level, without its warm-up; a rate is kept up for `duration_s`."""
    if options["num_prompts"] is not None:
        return int(options["num_prompts"] * num_replicas)
    if level.offered_rps is not None:
        return max(MIN_PROMPTS, math.ceil(level.offered_rps * duration_s))
    return max(MIN_PROMPTS, MIN_PROMPTS_PER_CLIENT * int(level.amount))


def _check_options(config: Config) -> None:
    """What the client of a language model would only find out with the service up."""
    workload, client, options = config.workload, config.workload.client, config.workload.client.options
    if client.kind is ClientKind.locust and not config.model:
        return
    if lacking := [name for name in _LLM_OPTIONS if name not in options]:
        raise ConfigError(
            f"workload.client.options lacks {', '.join(lacking)}: workload {workload.name} cannot be driven by "
            f"workload.client.kind={client.kind.value}"
        )
    for name in ("num_input_tokens", "num_output_tokens", "num_prompts", "timeout_s"):
        if options[name] is not None or name != "num_prompts":
            key = f"workload.client.options.{name}"
            check_number(key, options[name], whole=name.startswith("num_"), above_0=True)
    if not isinstance(options["temperature"], int | float):
        raise ConfigError(f"workload.client.options.temperature must be a number, found {options['temperature']!r}")
    if client.kind is ClientKind.vllm_bench and options.get("headers"):
        raise ConfigError("workload.client.options.headers are Locust's: vLLM's client sends none")
    engine = (workload.server or config.model)["engine"]
    if taken := sorted({"model", "port", "host", "served_model_name"} & engine.keys()):
        raise ConfigError(f"model.engine.{taken[0]} is set by the orchestrator (model.source, model.id)")
    limit, asked = engine.get("max_model_len"), (options["num_input_tokens"], options["num_output_tokens"])
    if limit is not None and sum(asked) > limit:
        raise ConfigError(
            f"a request of {asked[0]} + {asked[1]} tokens does not fit model.engine.max_model_len={limit}"
        )

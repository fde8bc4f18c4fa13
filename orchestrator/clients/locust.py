"""Closed-loop load from P Locust processes: what did each request take, and was the client itself healthy?

Each process records every request it sends (see `locust_worker`) and writes a shard; here the shards become one
`samples.parquet`. Locust is imported in the processes only.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from orchestrator import provenance
from orchestrator.application import check_module
from orchestrator.clients.base import Client, Live, Load, Measurement, check_clients, check_fits, drive, health
from orchestrator.errors import ConfigError, TrialError
from orchestrator.kinds import check_number
from orchestrator.process import client_environment
from orchestrator.results.samples import read_samples, write_samples
from orchestrator.sections import ServiceConfig

TOKEN_VARIABLE = "SERVE_ORCHESTRATOR_TOKEN"  # in the processes' environment: sent as bearer with every request
WORKER = "orchestrator.clients.locust_worker"

STARTUP_S = 120.0  # until every process has imported its locustfile
MARGIN_S = 30.0  # after the drain, for writing the samples and ending
LEAD_S = 0.2  # from sending the start time to the start itself


@dataclass
class Locust(Client):
    """Load from Locust in closed loop: each client sends its next request when the last was answered."""

    locustfile: str  # a dotted module or a path ending in .py, with one FastHttpUser subclass
    options: dict[str, Any]  # reach the locustfile as `self.environment.parsed_options`

    def check(self, config: ServiceConfig, loads: Sequence[Load]) -> None:
        """Refuse a missing locustfile, levels that are rates, and fewer clients or processes than servers."""
        for load in loads:
            num_servers = len(load.urls)
            if load.level.concurrency is None:
                raise ConfigError(
                    f"Locust drives closed loop only, found a level of {load.level.text}: give sweep.concurrency, or "
                    "choose a client that sends at a rate, such as client=vllm_bench"
                )
            check_clients(load)
            if load.max_processes < num_servers:
                raise ConfigError(
                    f"{num_servers} servers need as many Locust processes, found cluster.client_processes="
                    f"{load.max_processes}"
                )
        found = Path(self.locustfile) if self.locustfile.endswith(".py") else provenance.find_module(self.locustfile)
        if found is None or not found.is_file():
            raise ConfigError(f"workload.locustfile={self.locustfile!r}: no such file or module")
        for name, value in self.options.items():
            if name.startswith("num_"):
                check_number(f"workload.options.{name}", value, whole=True, above_0=True)
        check_fits(config, self.options.get("num_input_tokens"), self.options.get("num_output_tokens"))

    def check_live(self, config: ServiceConfig, timeout_s: float) -> None:
        """Import the locustfile in a child process."""
        check_module(self.locustfile, config.workload.extra, timeout_s)

    def run(self, load: Load, directory: Path, on_progress: Callable[[Live], None]) -> Measurement:
        """Drive one level; writes `client.log` and `samples.parquet`. Each process loads one of the addresses.

        Raises TrialError when the processes fail.
        """
        level, window, urls = load.level, load.window, load.urls
        assert level.concurrency is not None, "refused by check"
        # More processes than cores would only start late and stand in each other's way.
        num_processes = min(load.max_processes, len(os.sched_getaffinity(0)), level.concurrency)
        num_processes = max(num_processes - num_processes % len(urls), len(urls))  # each address the same load
        shards = [directory / f"samples.{index}.part" for index in range(num_processes)]
        specs = [
            {
                "index": index,
                "num_processes": num_processes,
                "url": urls[index % len(urls)].rstrip("/"),
                "locustfile": self.locustfile,
                "options": self.options,
                "concurrency": level.concurrency,
                "window": asdict(window),
                "shard": str(shard),
            }
            for index, shard in enumerate(shards)
        ]
        log = directory / "client.log"
        env = client_environment() | ({TOKEN_VARIABLE: load.token.reveal()} if load.token else {})
        limit_s = sum(asdict(window).values()) + MARGIN_S
        start_s, facts = drive(
            WORKER, specs, env, log, on_progress, startup_s=STARTUP_S, lead_s=LEAD_S, limit_s=limit_s
        )

        num_started = sum(fact["num_clients_started"] for fact in facts)
        task_errors = [fact["first_task_error"] for fact in facts if fact["first_task_error"]]
        if num_started < level.concurrency:
            raise TrialError(
                f"only {num_started} of {level.concurrency} clients of {self.locustfile} ever sent a request"
                f"{f' ({task_errors[0]})' if task_errors else ''}; see {log}"
            )
        samples = pa.concat_tables([read_samples(shard) for shard in shards]).sort_by("sent_at_s")
        write_samples(directory / "samples.parquet", samples)
        for shard in shards:
            shard.unlink()
        totals = {
            f"num_{what}": sum(fact[f"num_{what}"] for fact in facts)
            for what in ("requests", "unfinished", "task_errors")
        }
        assert samples.num_rows == totals["num_requests"], f"{samples.num_rows} samples, {totals} recorded"
        client = replace(
            health(facts),
            **totals,
            window_s=min(fact["window_s"] for fact in facts),
            all_clients_started_at_s=max(fact["last_client_started_at_s"] for fact in facts),
            versions={name: version(name) for name in ("locust", "geventhttpclient", "gevent")},
        )
        return Measurement(start_s + window.ramp_up_s + window.warmup_s, window.duration_s, client)

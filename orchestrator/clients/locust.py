"""Closed-loop load from P Locust processes: what did each request take, and was the client itself healthy?

Each process records every request it sends (see `locust_worker`) and writes a shard; here the shards become one
`samples.parquet`. Locust is imported in the processes only.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.clients.processes import Level, Live, Measurement, Processes, max_or_none
from orchestrator.errors import TrialError

TOKEN_VARIABLE = "SERVE_ORCHESTRATOR_TOKEN"  # in the processes' environment: sent as bearer with every request
WORKER = "orchestrator.clients.locust_worker"

STARTUP_S = 120.0  # until every process has imported its locustfile
MARGIN_S = 30.0  # after the drain, for writing the samples and ending
LEAD_S = 0.2  # from sending the start time to the start itself


class LocustClient:
    """`locustfile` is a dotted module or a path ending in .py, with one FastHttpUser subclass.

    `options` reach it as `self.environment.parsed_options`. `env` is all of the processes' environment.
    """

    def __init__(self, locustfile: str, options: Mapping[str, Any], num_processes: int, env: Mapping[str, str]) -> None:
        self.locustfile = locustfile
        self.options = dict(options)
        self.num_processes = num_processes
        self.env = dict(env)

    def run(
        self, urls: Sequence[str], level: Level, directory: Path, on_progress: Callable[[Live], None]
    ) -> Measurement:
        """Drive one level; writes `client.log` and `samples.parquet`. Each process loads one of the addresses.

        Raises TrialError when the processes fail, or are fewer than the addresses.
        """
        num_processes = min(self.num_processes, level.concurrency)
        if num_processes < len(urls):
            raise TrialError(
                f"{len(urls)} addresses need as many client processes and clients, found {num_processes} "
                f"(cluster.client_processes={self.num_processes}, concurrency {level.concurrency})"
            )
        num_processes -= num_processes % len(urls)  # each address the same load
        shards = [directory / f"samples.{index}.part" for index in range(num_processes)]
        with Processes(WORKER, num_processes, self.env, directory / "client.log") as processes:
            for index, shard in enumerate(shards):
                spec = {
                    "index": index,
                    "num_processes": num_processes,
                    "url": urls[index % len(urls)].rstrip("/"),
                    "locustfile": self.locustfile,
                    "options": self.options,
                    "level": asdict(level),
                    "shard": str(shard),
                }
                processes.send(index, spec)
            processes.wait_for("ready", time.monotonic() + STARTUP_S)

            start_s = time.monotonic() + LEAD_S
            for index in range(num_processes):
                processes.send(index, {"start_s": start_s})
            driven_s = level.ramp_up_s + level.warmup_s + level.duration_s + level.drain_s
            deadline_s = start_s + driven_s + MARGIN_S
            facts = processes.wait_for("facts", deadline_s, on_progress)
            processes.wait_for_end(deadline_s)

        num_started = sum(fact["num_clients_started"] for fact in facts)
        task_errors = [fact["first_task_error"] for fact in facts if fact["first_task_error"]]
        if num_started < level.concurrency:
            raise TrialError(
                f"only {num_started} of {level.concurrency} clients of {self.locustfile} ever sent a request"
                f"{f' ({task_errors[0]})' if task_errors else ''}; see {directory / 'client.log'}"
            )
        _merge(shards, directory / "samples.parquet", sum(fact["num_requests"] for fact in facts))
        cpu_ratios = [fact["cpu_ratio"] for fact in facts]
        summed = {
            "num_processes": num_processes,
            "cpu_ratio": max(cpu_ratios),
            "cpu_ratios": cpu_ratios,
            "lag_p50_ms": max_or_none(fact["lag_p50_ms"] for fact in facts),
            "lag_p99_ms": max_or_none(fact["lag_p99_ms"] for fact in facts),
            "all_clients_started_at_s": max(fact["last_client_started_at_s"] for fact in facts),
            "offered_rps": None,
            "sent_rps": None,
            "in_flight_mean": None,
            "latency_resolution_ms": 0.0,  # raw clock readings, no histogram
            "window_s": min(fact["window_s"] for fact in facts),
            "num_requests": sum(fact["num_requests"] for fact in facts),
            "num_unfinished": sum(fact["num_unfinished"] for fact in facts),
            "num_task_errors": sum(fact["num_task_errors"] for fact in facts),
            "versions": {name: version(name) for name in ("locust", "geventhttpclient", "gevent")},
        }
        return Measurement(level.duration_s, summed)


def _merge(shards: list[Path], path: Path, num_rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([pq.read_table(shard) for shard in shards]).sort_by("sent_at_s")
    assert table.num_rows == num_rows, f"{table.num_rows} samples in the shards, {num_rows} recorded"
    partial = path.with_suffix(".part")
    pq.write_table(table, partial)
    os.replace(partial, path)
    for shard in shards:
        shard.unlink()

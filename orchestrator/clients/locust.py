"""Closed-loop load from P Locust processes: what did each request take, and was the client itself healthy?

Each process records every request it sends (see `locust_worker`) and writes a shard; here the shards become one
`samples.parquet`. Locust is imported in the processes only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from orchestrator.clients.base import Live, Measurement, Window, drive, health
from orchestrator.errors import TrialError
from orchestrator.load.level import Level
from orchestrator.results.records import ClientFacts
from orchestrator.results.samples import read_samples, write_samples

TOKEN_VARIABLE = "SERVE_ORCHESTRATOR_TOKEN"  # in the processes' environment: sent as bearer with every request
WORKER = "orchestrator.clients.locust_worker"

STARTUP_S = 120.0  # until every process has imported its locustfile
MARGIN_S = 30.0  # after the drain, for writing the samples and ending
LEAD_S = 0.2  # from sending the start time to the start itself


@dataclass
class LocustClient:
    """`locustfile` is a dotted module or a path ending in .py, with one FastHttpUser subclass.

    `options` reach it as `self.environment.parsed_options`. `env` is all of the processes' environment.
    """

    locustfile: str
    options: Mapping[str, Any]
    num_processes: int
    env: Mapping[str, str]

    def run(
        self,
        urls: Sequence[str],
        level: Level,
        window: Window,
        directory: Path,
        on_progress: Callable[[Live], None],
    ) -> Measurement:
        """Drive one level; writes `client.log` and `samples.parquet`. Each process loads one of the addresses.

        Raises TrialError when the processes fail.
        """
        assert level.concurrency is not None, "clients.check refuses a rate"
        num_processes = min(self.num_processes, level.concurrency)
        num_processes -= num_processes % len(urls)  # each address the same load
        assert num_processes, "clients.check refuses fewer processes or clients than addresses"
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
        limit_s = sum(asdict(window).values()) + MARGIN_S
        facts = drive(WORKER, specs, self.env, log, on_progress, startup_s=STARTUP_S, lead_s=LEAD_S, limit_s=limit_s)

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
        client = ClientFacts(
            **health(facts),
            **totals,
            window_s=min(fact["window_s"] for fact in facts),
            all_clients_started_at_s=max(fact["last_client_started_at_s"] for fact in facts),
            versions={name: version(name) for name in ("locust", "geventhttpclient", "gevent")},
        )
        return Measurement(window.duration_s, client)

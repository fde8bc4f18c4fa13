"""Closed-loop load from P Locust processes: what did each request take, and was the client itself healthy?

The processes are independent and share only an absolute start on the monotonic clock: no master, no port,
nothing between them that could slow one of them down. Each records every request it sends (see
`locust_worker`) and writes a shard; here the shards become one `samples.parquet`. Locust is imported in the
processes only.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.errors import TrialError

STARTUP_S = 120.0  # until every process has imported its locustfile
MARGIN_S = 30.0  # after the drain, for writing the samples and ending
LEAD_S = 0.2  # from sending the start time to the start itself


@dataclass(frozen=True)
class Level:
    """One load point: `concurrency` clients, each sending its next request when the last was answered."""

    concurrency: int
    ramp_up_s: float
    warmup_s: float
    duration_s: float
    drain_s: float


@dataclass(frozen=True)
class Live:
    """For the progress display only; nothing is computed from it."""

    elapsed_s: float  # relative to the start of the window
    throughput_rps: float  # over the last second
    num_failed: int  # so far
    latency_p99_ms: float | None  # of the last second, the worst process
    num_clients: int


class LocustClient:
    """`locustfile` is a dotted module or a path ending in .py, with one FastHttpUser subclass.

    `options` reach it as `self.environment.parsed_options`. `env` is all of the processes' environment.
    """

    def __init__(self, locustfile: str, options: Mapping[str, Any], num_processes: int, env: Mapping[str, str]) -> None:
        self.locustfile = locustfile
        self.options = dict(options)
        self.num_processes = num_processes
        self.env = dict(env)

    def run(self, url: str, level: Level, directory: Path, on_progress: Callable[[Live], None]) -> dict[str, Any]:
        """Drive one level; writes `client.log` and `samples.parquet`, returns the client's facts."""
        num_processes = min(self.num_processes, level.concurrency)
        shards = [directory / f"samples.{index}.part" for index in range(num_processes)]
        with _Processes(num_processes, self.env, directory / "client.log") as processes:
            for index, shard in enumerate(shards):
                spec = {
                    "index": index,
                    "num_processes": num_processes,
                    "url": url.rstrip("/"),
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
        return {
            "num_processes": num_processes,
            "cpu_ratio": max(cpu_ratios),
            "cpu_ratios": cpu_ratios,
            "lag_p50_ms": _max_or_none(fact["lag_p50_ms"] for fact in facts),
            "lag_p99_ms": _max_or_none(fact["lag_p99_ms"] for fact in facts),
            "all_clients_started_at_s": max(fact["last_client_started_at_s"] for fact in facts),
            "latency_resolution_ms": 0.0,  # raw clock readings, no histogram
            "window_s": min(fact["window_s"] for fact in facts),
            "num_requests": sum(fact["num_requests"] for fact in facts),
            "num_unfinished": sum(fact["num_unfinished"] for fact in facts),
            "num_task_errors": sum(fact["num_task_errors"] for fact in facts),
            "versions": {name: version(name) for name in ("locust", "geventhttpclient", "gevent")},
        }


class _Processes:
    """The client processes, which do not outlive the `with` block whatever ends it."""

    def __init__(self, num_processes: int, env: Mapping[str, str], log: Path) -> None:
        self.num_processes, self.env, self.log = num_processes, env, log
        self.processes: list[subprocess.Popen[bytes]] = []
        self.partial_lines = [b""] * num_processes

    def __enter__(self) -> "_Processes":
        command = [sys.executable, "-m", "orchestrator.clients.locust_worker"]
        pipe = subprocess.PIPE
        self.selector = selectors.DefaultSelector()
        try:
            with self.log.open("ab") as log:
                for index in range(self.num_processes):
                    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=self.env)
                    self.processes.append(process)
                    assert process.stdout
                    self.selector.register(process.stdout, selectors.EVENT_READ, index)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            assert process.stdin
            assert process.stdout
            process.stdout.close()
            with suppress(BrokenPipeError):  # it died before it had read its spec
                process.stdin.close()
        self.selector.close()

    def send(self, index: int, message: dict[str, Any]) -> None:
        stdin = self.processes[index].stdin
        assert stdin
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            self._fail(index, "before it could be told what to do")

    def wait_for(
        self, kind: str, deadline_s: float, on_progress: Callable[[Live], None] | None = None
    ) -> list[dict[str, Any]]:
        """One message of this kind from each process, in their order."""
        answers: dict[int, dict[str, Any]] = {}
        progress: dict[int, dict[str, Any]] = {}
        while len(answers) < self.num_processes:
            events = self.selector.select(max(0.0, deadline_s - time.monotonic()))
            if not events:
                missing = [index for index in range(self.num_processes) if index not in answers]
                raise TrialError(f"load client process {missing} did not come to '{kind}' in time; {self._tail()}")
            for key, _ in events:
                data = os.read(key.fd, 65536)
                if not data:
                    self.selector.unregister(key.fileobj)
                    if key.data not in answers:
                        self._fail(key.data, f"before '{kind}'")
                *lines, self.partial_lines[key.data] = (self.partial_lines[key.data] + data).split(b"\n")
                for message in map(json.loads, lines):
                    (progress if message["type"] == "progress" else answers)[key.data] = message
            if on_progress and len(progress) == self.num_processes:
                on_progress(_live(list(progress.values())))
                progress.clear()
        return [answers[index] for index in range(self.num_processes)]

    def wait_for_end(self, deadline_s: float) -> None:
        for index, process in enumerate(self.processes):
            try:
                status = process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TrialError(f"load client process {index} did not end in time; {self._tail()}") from None
            if status != 0:
                self._fail(index, "at its end")

    def _fail(self, index: int, when: str) -> None:
        status = self.processes[index].wait(10)
        raise TrialError(f"load client process {index} ended with exit code {status} {when}; {self._tail()}")

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return f"see {self.log}, which ends with:\n" + "\n".join(lines)


def _live(progress: list[dict[str, Any]]) -> Live:
    return Live(
        elapsed_s=max(part["elapsed_s"] for part in progress),
        throughput_rps=sum(part["throughput_rps"] for part in progress),
        num_failed=sum(part["num_failed"] for part in progress),
        latency_p99_ms=_max_or_none(part["latency_p99_ms"] for part in progress),
        num_clients=sum(part["num_clients"] for part in progress),
    )


def _max_or_none(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)


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

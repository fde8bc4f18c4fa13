"""Load from vLLM's own benchmark client: what `vllm bench serve` says, and what it says once its ramp is left out.

The client reports its whole run, from the first request to the last reply: a burst of all clients at once at one end,
a tail in which ever fewer are busy at the other. Here its per-request records become our samples, whose window lies
between the two; the whole run is reported beside it (`samples.whole_run`), so that figures can be held against others'.

Not covered: the schedule of an open loop. The client does not tell when it meant to send, so its latencies count from
the actual send. A server that does not report usage: its tokens are those of the text.
"""

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from orchestrator.application import check_vllm
from orchestrator.child import Message
from orchestrator.clients.base import (
    CLIENT_START_S,
    Client,
    Live,
    Load,
    Measurement,
    check_clients,
    check_fits,
    drive,
    health,
)
from orchestrator.errors import ConfigError, TrialError
from orchestrator.kinds import Amount, Count, Positive
from orchestrator.process import client_environment
from orchestrator.results.samples import LONG_REPLY, SAMPLES_SCHEMA, SHORT_REPLY, whole_run, write_samples
from orchestrator.sections import ServiceConfig

WORKER = "orchestrator.clients.vllm_bench_worker"

STARTUP_S = 900.0  # to import vLLM, make the prompts, and have a cold server answer the warm-up
LEAD_S = 2.0  # from sending the start time to the start: in it the client asks the server about itself
MARGIN_S = 60.0  # after the last reply, for the client's own statistics and file
MAX_ERROR_CHARS = 200
MIN_PROMPTS = 1200  # a p99 needs 1,000 requests in the window
MIN_PROMPTS_PER_CLIENT = 10
COUNTED_REQUESTS_S = 45.0  # of a level in closed loop, seen on 2 slow cores; only estimates depend on it


class Bench(TypedDict):
    """What vLLM's client writes of a run, one element a request; what we read of it. `printed` reads its figures."""

    duration: float  # s
    start_times: list[float]  # s, on the machine's clock
    ttfts: list[float]  # s; 0 without a token
    itls: list[list[float]]  # s, between the events of each reply
    input_lens: list[int]  # tokens
    output_lens: list[int]
    errors: list[str]  # "" where it succeeded
    occupied: list[tuple[float, float]]  # s, sent and ended; of our worker, see vllm_bench_worker.py


_CODES = {
    **dict.fromkeys(
        ("ServerDisconnectedError", "ClientOSError", "ClientPayloadError", "ConnectionResetError"), "connection_closed"
    ),
    **dict.fromkeys(("ClientConnectorError", "ConnectionRefusedError"), "connection_refused"),
    **dict.fromkeys(("TimeoutError", "ServerTimeoutError", "SocketTimeoutError", "ConnectionTimeoutError"), "timeout"),
}
_STATUS_CODES = {status.phrase: f"http_{status.value}" for status in HTTPStatus}


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What one process sends. Laid over the fields of `VllmBench` it is the spec that the process is given."""

    index: int
    url: str
    concurrency: int | None  # clients; None in open loop
    num_warmups: int  # requests before the measured ones
    num_prompts: int  # measured requests
    request_rate_rps: float | None  # None in closed loop
    seed: int  # of the prompts
    result: str  # path of the file that vLLM's client writes


@dataclass
class VllmBench(Client):
    """Load from `vllm bench serve`: closed loop, or open loop at a level that is a rate. One process a replica."""

    model: str  # what requests call it
    tokenizer: str  # where it comes from: a hub id, a directory, or tiny
    num_input_tokens: Count  # a request
    num_output_tokens: Count
    # A replica. None = 1,200 in all, or more: 10 a client, or what the rate sends in the window's duration.
    num_prompts: Count | None
    temperature: Amount
    timeout_s: Positive  # for the requests of one level

    def check(self, config: ServiceConfig, loads: Sequence[Load]) -> None:
        """Refuse fewer clients than servers, too few prompts to measure, and more than fit `timeout_s`."""
        for load in loads:
            check_clients(load)
            self._check_num_prompts(load)
        check_fits(config, self.num_input_tokens, self.num_output_tokens)
        if config.workload.options.get("headers"):
            raise ConfigError("workload.options.headers are Locust's: vLLM's client sends none")

    def check_live(self, config: ServiceConfig, timeout_s: float) -> None:
        """Refuse when vLLM is not installed here. Raises ConfigError."""
        check_vllm("client vllm_bench")

    def takes_s(self, load: Load) -> float:
        """Estimate in seconds: at a rate as long as its requests take, else as seen on 2 slow cores."""
        counted_s = COUNTED_REQUESTS_S
        if load.level.offered_rps is not None:
            counted_s = self.num_requests(load) / load.level.offered_rps + load.window.warmup_s
        return CLIENT_START_S + counted_s

    def num_requests(self, load: Load) -> int:
        """Requests at one level, without the warm-up; a rate is kept up for `duration_s`."""
        if self.num_prompts is not None:
            return int(self.num_prompts * load.num_replicas)
        if load.level.offered_rps is not None:
            return max(MIN_PROMPTS, math.ceil(load.level.offered_rps * load.window.duration_s))
        return max(MIN_PROMPTS, MIN_PROMPTS_PER_CLIENT * int(load.level.amount))

    def _check_num_prompts(self, load: Load) -> None:
        level, num_replicas = load.level, load.num_replicas
        if level.offered_rps is not None:
            num_requests = self.num_requests(load)
            if num_requests < 2 * num_replicas:
                raise ConfigError(
                    f"client.num_prompts={self.num_prompts} a replica is no window: two requests a replica begin and "
                    "end one"
                )
            if (takes_s := num_requests / level.offered_rps) > self.timeout_s:
                raise ConfigError(
                    f"{num_requests:,} requests at {level.text} take {takes_s:,.0f} s, more than client.timeout_s="
                    f"{self.timeout_s:g}; raise it, or set client.num_prompts (a replica)"
                )
        elif self.num_prompts is not None and self.num_prompts < 2 * level.amount / num_replicas:
            raise ConfigError(
                f"client.num_prompts={self.num_prompts} a replica leave no time when all "
                f"{level.amount / num_replicas:g} clients are busy; ten a client are usual (null)"
            )

    def run(self, load: Load, directory: Path, on_progress: Callable[[Live], None]) -> Measurement:
        """Drive one level; writes `client.log`, `raw/` and `samples.parquet`. Each process loads one of the addresses.

        The load is counted in requests. In closed loop the times of `window` do not count, and each client warms up
        with one request. In open loop nothing bounds what is in flight, and the warm-up is what the rate sends in
        `window.warmup_s`, at this rate: a burst would bring up more in flight than the rate ever does, and how many
        that is cannot be known before.
        Raises TrialError when the processes fail or do not end within `timeout_s`, and when no time was left in which
        the service was under the whole load.
        """
        (directory / "raw").mkdir(exist_ok=True)
        shares = self._shares(load, directory)
        env = client_environment() | ({"OPENAI_API_KEY": load.token.reveal()} if load.token else {})
        _, facts = drive(
            WORKER,
            [asdict(self) | asdict(share) for share in shares],
            env,
            directory / "client.log",
            on_progress,
            startup_s=STARTUP_S,
            lead_s=LEAD_S,
            limit_s=self.timeout_s + MARGIN_S,
            if_late=f": {self.num_requests(load)} requests did not end within client.timeout_s={self.timeout_s:g} "
            "(raise it, or see why the service is slow)",
        )
        benches = [json.loads(Path(share.result).read_text()) for share in shares]
        return self._measurement(load, directory, shares, facts, benches)

    def _shares(self, load: Load, directory: Path) -> list[_Share]:
        """What each process sends, as even as whole numbers go."""
        level, urls = load.level, load.urls
        clients, rate_rps = level.concurrency, level.offered_rps
        most = max(load.num_replicas, len(urls))
        num_processes = most if clients is None else min(most, clients)
        assert num_processes >= len(urls), "refused by check"
        total = self.num_requests(load)
        num_prompts = split(total, num_processes)
        num_clients = [None] * num_processes if clients is None else split(clients, num_processes)
        warm_up = int(level.amount) if clients else max(num_processes, math.ceil(level.amount * load.window.warmup_s))
        num_warmups = split(warm_up, num_processes)
        return [
            _Share(
                index=index,
                url=urls[index % len(urls)].rstrip("/"),
                concurrency=num_clients[index],
                num_warmups=num_warmups[index],
                num_prompts=num_prompts[index],
                request_rate_rps=rate_rps and rate_rps * num_prompts[index] / total,
                # The same prompts in every arm, and others at each level and repeat: the service may remember them.
                seed=zlib.crc32(f"{directory.name}/{index}".encode()),
                result=str(directory / "raw" / f"bench.{index}.json"),
            )
            for index in range(num_processes)
        ]

    def _measurement(
        self,
        load: Load,
        directory: Path,
        shares: Sequence[_Share],
        facts: Sequence[Message],
        benches: Sequence[Bench],
    ) -> Measurement:
        """Of what the processes told (`facts`) and their clients wrote (`benches`); writes `samples.parquet`.

        Raises TrialError when no time was left in which the service was under the whole load.
        """
        rate_rps = load.level.offered_rps
        sent = [np.sort(bench["start_times"]) for bench in benches]
        num_clients = [share.concurrency for share in shares if share.concurrency is not None]
        window_start_s, window_end_s = steady_window(sent, num_clients or None)
        duration_s = window_end_s - window_start_s
        if duration_s <= 0:
            raise TrialError(
                f"{self.num_requests(load)} requests of {load.level.text} leave no time in which all of them load the "
                f"service; raise client.num_prompts (of each of {load.num_replicas} replicas), "
                f"{MIN_PROMPTS_PER_CLIENT} a client is usual"
            )
        rows = [row for index, bench in enumerate(benches) for row in sample_rows(bench, index, self.num_output_tokens)]
        samples = pa.Table.from_pylist(
            [row | {"sent_at_s": row["sent_at_s"] - window_start_s} for row in rows], schema=SAMPLES_SCHEMA
        ).sort_by("sent_at_s")
        write_samples(directory / "samples.parquet", samples)

        began_s = min(fact["began_s"] for fact in facts)
        ended_s = max(fact["began_s"] + bench["duration"] for fact, bench in zip(facts, benches, strict=True))
        whole = whole_run(samples, ended_s - began_s, printed(benches[0]) if len(benches) == 1 else None)
        client = replace(
            health(facts),
            window_s=duration_s,
            all_clients_started_at_s=0.0 if num_clients else None,
            offered_rps=rate_rps,
            sent_rps=None if rate_rps is None else (sum(map(len, sent)) - 1) / duration_s,
            in_flight_mean=in_flight_mean(benches, window_start_s, window_end_s),
            num_requests=len(rows),
            num_unfinished=0,  # the client waits for every reply
            num_task_errors=0,  # and has no task that could raise
            versions=facts[0]["versions"],
        )
        return Measurement(window_start_s, duration_s, client, whole)


def split(total: int, num_parts: int) -> list[int]:
    """`total` in `num_parts` whole numbers that differ by 1 at most."""
    return [total // num_parts + (part < total % num_parts) for part in range(num_parts)]


def steady_window(sent_s: Sequence[np.ndarray], num_clients: Sequence[int] | None) -> tuple[float, float]:
    """Start and end of the time in which every process is under its full load.

    `sent_s`: when each process sent its requests, s, ascending. `num_clients`: of each process; None in open loop.

    All of its clients have sent, and no process has run out of prompts. Open loop (None): from first send to last.
    """
    if num_clients is None:
        return min(float(sent[0]) for sent in sent_s), max(float(sent[-1]) for sent in sent_s)
    all_sent_s = max(float(sent[clients - 1]) for sent, clients in zip(sent_s, num_clients, strict=True))
    return all_sent_s, min(float(sent[-1]) for sent in sent_s)


def in_flight_mean(benches: Sequence[Bench], start_s: float, end_s: float) -> float:
    """Time-average number of clients that waited for the end of a reply between two times of the machine's clock."""
    occupied = np.array([span for bench in benches for span in bench["occupied"]])
    overlaps = np.minimum(occupied[:, 1], end_s) - np.maximum(occupied[:, 0], start_s)
    return float(np.maximum(overlaps, 0).sum()) / (end_s - start_s)


def sample_rows(bench: Bench, index: int, asked: int) -> list[dict[str, Any]]:
    """The client's own record of one process as rows of samples, `sent_at_s` still on the machine's clock."""
    rows = []
    ended_s = {sent_s: end_s for sent_s, end_s in bench["occupied"]}
    columns = (bench["ttfts"], bench["itls"], bench["input_lens"], bench["output_lens"], bench["errors"])
    for sent_s, ttft_s, gaps_s, num_input, num_output, error in zip(bench["start_times"], *columns, strict=True):
        row = {"sent_at_s": sent_s, "client_process": index, "ttft_ms": ttft_s * 1000 if ttft_s else None}
        if error or not ttft_s:  # an error may be empty; a reply without a token is none
            took_ms = (ended_s[sent_s] - sent_s) * 1000 if sent_s in ended_s else None
            row |= {"ok": False, "error": error_code(error), "num_input_tokens": num_input, "latency_ms": took_ms}
        else:
            rest_ms = math.fsum(gaps_s) * 1000
            row |= {
                "latency_ms": ttft_s * 1000 + rest_ms,
                "tpot_ms": rest_ms / (num_output - 1) if num_output > 1 else None,
                "num_input_tokens": num_input,
                "num_output_tokens": num_output,
                "ok": num_output == asked,
                "error": None,
            }
            if num_output != asked:
                code = SHORT_REPLY if num_output < asked else LONG_REPLY
                row["error"] = f"{code}: got {num_output}, want {asked}"
        rows.append(row)
    return rows


def error_code(error: str) -> str:
    """A short stable code, fit for grouping, for what the client has: a status' reason, a sentence or a traceback."""
    if error in _STATUS_CODES:
        return _STATUS_CODES[error]
    if error.startswith("Never received a valid chunk"):
        return "no_tokens"
    _, is_traceback, frames = error.rpartition("Traceback (most recent call last):\n")
    if not is_traceback:
        return error[:MAX_ERROR_CHARS] or "http_error"
    raised = next((line for line in frames.splitlines() if line and not line.startswith(" ")), "exception")
    name = raised.partition(":")[0].rpartition(".")[2]
    return _CODES.get(name, name)[:MAX_ERROR_CHARS]


def printed(bench: Mapping[str, Any]) -> dict[str, float | int]:
    """What the client itself printed at its end, under the names of `WholeRun`."""
    figures = {
        "duration_s": bench["duration"],
        "num_successful": bench["completed"],
        "num_failed": bench["failed"],
        "throughput_rps": bench["request_throughput"],
        "input_throughput_tok_per_s": bench["total_input_tokens"] / bench["duration"],
        "output_throughput_tok_per_s": bench["output_throughput"],
    }
    for ours, theirs in (("ttft", "ttft"), ("tpot", "tpot"), ("latency", "e2el")):
        for label, word in (("mean", "mean"), ("p50", "median"), ("p99", "p99")):
            figures[f"{ours}_{label}_ms"] = bench[f"{word}_{theirs}_ms"]
    return figures

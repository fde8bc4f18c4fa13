"""What does a request cost the load generator, and what do we add to it?

    python -m benchmarks.client_cost [unary|sse ...] [--rounds 5] [--duration_s 3] [--concurrency 16]

CPU time of the client process per request (microseconds) against one static server, for our client (all of
it: recording, checks, progress lines) and a bare FastHttpUser making the same request with the same check.
Rounds are interleaved, medians reported. Target: ours <= 1.15 x bare (unary). For SSE the bare user reads with
`iter_lines`: cheaper than reading each event as it comes, and blind to when it came.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.clients.base import Load, Window
from orchestrator.clients.locust import Locust
from orchestrator.load.level import Level
from orchestrator.process import clean_environment
from tests.servers import serving

WARMUP_S = 0.5
SERVERS = {"unary": "static", "sse": "static_stream"}
LOCUSTFILES = {"unary": "workloads.unary.locustfile", "sse": "workloads.streaming.locustfile"}
OPTIONS: dict[str, dict[str, Any]] = {
    "unary": {"payload_bytes": 100, "headers": {"x-request-disconnect-disabled": "?1"}},
    "sse": {"num_chunks": 50, "headers": {"x-request-disconnect-disabled": "?1"}},
}


def ours(kind: str, url: str, concurrency: int, duration_s: float) -> float:
    import pyarrow.parquet as pq

    client = Locust(LOCUSTFILES[kind], OPTIONS[kind])
    window = Window(0.0, WARMUP_S, duration_s, 1.0)
    load = Load([url], None, Level.of_clients(concurrency), window, num_replicas=1, max_processes=1)
    with tempfile.TemporaryDirectory() as directory:
        facts = client.run(load, Path(directory), lambda live: None).facts
        samples = pq.read_table(Path(directory) / "samples.parquet").to_pandas()
    assert facts.window_s is not None
    assert facts.cpu_ratio is not None
    assert samples.ok.all(), samples.error.value_counts()
    completed_at_s = samples.sent_at_s + samples.latency_ms / 1000
    num_requests = int(((completed_at_s >= 0) & (completed_at_s < facts.window_s)).sum())
    return 1e6 * facts.cpu_ratio * facts.window_s / num_requests


def bare(kind: str, url: str, concurrency: int, duration_s: float) -> float:
    arguments = ["--child", kind, url, str(concurrency), str(duration_s)]
    command = [sys.executable, "-m", "benchmarks.client_cost", *arguments]
    done = subprocess.run(command, env=clean_environment(), stdout=subprocess.PIPE, check=True)
    return float(done.stdout.split()[-1])


def run_bare(kind: str, url: str, concurrency: int, duration_s: float) -> None:
    """In a child process: a plain Locust local runner, its CPU over its own request count."""
    import gevent
    import locust
    from locust.env import Environment

    options = OPTIONS[kind]
    message = "x" * OPTIONS["unary"]["payload_bytes"]
    reply = json.dumps({"message": message}, separators=(",", ":")).encode()

    def echo(self: Any) -> None:
        path = f"/echo?message={message}"
        with self.client.get(path, name="/echo", headers=options["headers"], catch_response=True) as response:
            if response.content != reply:
                response.failure("wrong_body")

    def stream(self: Any) -> None:
        received = self.client.iter_lines("/stream", headers=options["headers"])
        lines = [line for line in received if line.startswith("data:")]
        for line in lines[:-1]:
            json.loads(line[5:])["choices"][0]["text"]
        assert [*lines[-1:], len(lines)] == ["data: [DONE]", options["num_chunks"] + 1]

    tasks = [echo if kind == "unary" else stream]
    user_class = type("BareUser", (locust.FastHttpUser,), {"tasks": tasks, "host": url})
    environment = Environment(user_classes=[user_class], events=locust.events, host=url)
    runner = environment.create_local_runner()
    runner.start(concurrency, spawn_rate=concurrency)
    gevent.sleep(WARMUP_S + 1)  # all users are there
    cpu_s, num_requests = time.process_time(), environment.stats.total.num_requests
    gevent.sleep(duration_s)
    cpu_s, num_requests = time.process_time() - cpu_s, environment.stats.total.num_requests - num_requests
    assert environment.stats.total.num_failures == 0
    assert not runner.exceptions, runner.exceptions
    runner.quit()
    print(1e6 * cpu_s / num_requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="unary, sse; both by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration_s", type=float, default=3.0)
    parser.add_argument("--concurrency", type=int, default=16)
    arguments = parser.parse_args()

    print(f"{'':8}{'ours':>8}{'bare':>8}  us/request   ratio   rounds")
    for kind in arguments.kinds or SERVERS:
        with serving(SERVERS[kind]) as server:
            load = (kind, server.url, arguments.concurrency, arguments.duration_s)
            costs = [(ours(*load), bare(*load)) for _ in range(arguments.rounds)]
        # The ratio is taken within each round: the machine's speed drifts between them.
        ratio = statistics.median(one / other for one, other in costs)
        one, other = (statistics.median(values) for values in zip(*costs, strict=True))
        rounds = " ".join(f"{one:.0f}/{other:.0f}" for one, other in costs)
        print(f"{kind:8}{one:8.1f}{other:8.1f}{'':14}{ratio:6.2f}   {rounds}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_bare(sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
    else:
        main()

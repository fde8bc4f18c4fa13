"""What does a request cost the load generator, and what do we add to it?

    python -m benchmarks.client_cost [unary|sse ...] [--rounds 5] [--duration_s 3] [--concurrency 16]

CPU time of the client process per request (microseconds) against one static server, for our client (all of
it: recording, checks, progress lines), bare Locust users making the same request with the same check, and wrk
where it is installed. Rounds are interleaved, medians reported. Target: ours <= 1.15 x bare FastHttpUser
(unary). For SSE the bare FastHttpUser reads with `iter_lines`: cheaper than reading each event as it comes,
and blind to when it came.
"""

import argparse
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.clients.locust import LocustClient
from orchestrator.clients.processes import Level
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

    client = LocustClient(LOCUSTFILES[kind], OPTIONS[kind], 1, clean_environment())
    with tempfile.TemporaryDirectory() as directory:
        level = Level(concurrency, 0.0, WARMUP_S, duration_s, 1.0)
        facts = client.run([url], level, Path(directory), lambda live: None).facts
        samples = pq.read_table(Path(directory) / "samples.parquet").to_pandas()
    assert samples.ok.all(), samples.error.value_counts()
    completed_at_s = samples.sent_at_s + samples.latency_ms / 1000
    num_requests = int(((completed_at_s >= 0) & (completed_at_s < facts["window_s"])).sum())
    return 1e6 * facts["cpu_ratio"] * facts["window_s"] / num_requests


def bare(user: str) -> Callable[[str, str, int, float], float]:
    def measure(kind: str, url: str, concurrency: int, duration_s: float) -> float:
        arguments = ["--child", user, kind, url, str(concurrency), str(duration_s)]
        command = [sys.executable, "-m", "benchmarks.client_cost", *arguments]
        done = subprocess.run(command, env=clean_environment(), stdout=subprocess.PIPE, check=True)
        return float(done.stdout.split()[-1])

    return measure


def wrk(kind: str, url: str, concurrency: int, duration_s: float) -> float:
    path = "/stream" if kind == "sse" else f"/echo?message={'x' * OPTIONS[kind]['payload_bytes']}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{max(1, round(duration_s))}s", url + path]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = re.search(r"(\d+) requests in", done.stdout)
    assert found, done.stdout
    return 1e6 * cpu_s / int(found[1])


def run_bare(user: str, kind: str, url: str, concurrency: int, duration_s: float) -> None:
    """In a child process: a plain Locust local runner, its CPU over its own request count."""
    import gevent
    import locust
    from locust.env import Environment

    options = argparse.Namespace(**OPTIONS[kind])
    reply = json.dumps({"message": "x" * OPTIONS["unary"]["payload_bytes"]}, separators=(",", ":")).encode()
    path = f"/echo?message={'x' * OPTIONS['unary']['payload_bytes']}"
    headers = OPTIONS[kind]["headers"]

    def echo(self: Any) -> None:
        with self.client.get(path, name="/echo", headers=headers, catch_response=True) as response:
            if response.content != reply:
                response.failure("wrong_body")

    def fast_stream(self: Any) -> None:
        lines = [line for line in self.client.iter_lines("/stream", headers=headers) if line.startswith("data:")]
        check(lines)

    def stream(self: Any) -> None:
        with self.client.get("/stream", headers=headers, stream=True, catch_response=True) as response:
            check([line for line in response.iter_lines(decode_unicode=True) if line.startswith("data:")])

    def check(lines: list[str]) -> None:
        for line in lines[:-1]:
            json.loads(line[5:])["choices"][0]["text"]
        assert [*lines[-1:], len(lines)] == ["data: [DONE]", options.num_chunks + 1]

    base = {"fast": locust.FastHttpUser, "http": locust.HttpUser}[user]
    task = echo if kind == "unary" else fast_stream if user == "fast" else stream
    user_class = type("BareUser", (base,), {"tasks": [task], "host": url})
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

    clients = {"ours": ours, "FastHttpUser": bare("fast"), "HttpUser": bare("http")}
    if shutil.which("wrk"):
        clients["wrk"] = wrk
    print(f"{'':8}{'client':14}{'us/request':>12}{'of bare':>10}   rounds")
    for kind in arguments.kinds or SERVERS:
        costs: dict[str, list[float]] = {name: [] for name in clients}
        with serving(SERVERS[kind]) as server:
            for _ in range(arguments.rounds):
                for name, measure in clients.items():
                    costs[name].append(measure(kind, server.url, arguments.concurrency, arguments.duration_s))
        # The ratio is taken within each round: the machine's speed drifts between them.
        for name, values in costs.items():
            ratios = [value / fast for value, fast in zip(values, costs["FastHttpUser"], strict=True)]
            rounds = " ".join(f"{value:.0f}" for value in values)
            cost, ratio = statistics.median(values), statistics.median(ratios)
            print(f"{kind:8}{name:14}{cost:12.1f}{ratio:10.2f}   {rounds}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_bare(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), float(sys.argv[6]))
    else:
        main()

"""Does the client record what really happened? Real processes against servers whose behaviour is known.

Truth comes from the server's own clock and counters. No test asserts how fast anything is.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

from orchestrator.clients import locust as locust_client
from orchestrator.clients.base import Live, Load, Measurement, Window
from orchestrator.clients.locust import Locust
from orchestrator.errors import TrialError
from orchestrator.load.level import Level
from orchestrator.process import clean_environment
from orchestrator.results.samples import SAMPLES_SCHEMA
from tests.servers import Server, serving
from workloads.sse import read_stream

UNARY, STREAMING, RECSYS = (f"workloads.{name}.locustfile" for name in ("unary", "streaming", "recsys"))
ECHO = {"payload_bytes": 10, "headers": {"x-request-disconnect-disabled": "?1"}}
STREAM = {"num_chunks": 10, "headers": {}}
# What a server is meant to answer arrives within the drain however busy the machine; nobody waits for the rest of it.
SHORT = Level.of_clients(4), Window(ramp_up_s=0.0, warmup_s=0.3, duration_s=1.0, drain_s=10.0)
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.e2e
serial = pytest.mark.serial


def run(
    client: Locust,
    url: str,
    level: Level,
    window: Window,
    directory: Path,
    on_progress: Callable[[Live], None] = lambda live: None,
    num_processes: int = 2,
) -> Measurement:
    load = Load([url], None, level, window, num_replicas=1, max_processes=num_processes)
    return client.run(load, directory, on_progress)


def drive(
    server: Server,
    directory: Path,
    load: tuple[Level, Window] = SHORT,
    locustfile: str = UNARY,
    options: dict[str, Any] | None = None,
    num_processes: int = 1,
) -> tuple[pd.DataFrame, dict[str, Any], dict[str, Any]]:
    """Samples, the client's facts, what the server saw; all three agree on the number of requests."""
    client = Locust(locustfile, options or ECHO)
    facts = asdict(run(client, server.url, *load, directory, num_processes=num_processes).facts)
    table = pq.read_table(directory / "samples.parquet")
    assert table.schema.equals(SAMPLES_SCHEMA)
    samples, seen = table.to_pandas(), server.stats()
    assert len(samples) == facts["num_requests"] == seen["num_requests"] > 0
    assert samples.sent_at_s.is_monotonic_increasing
    assert sorted(path.name for path in directory.iterdir()) == ["client.log", "samples.parquet"]
    return samples, facts, seen


def close_to(value: float, truth: float, overhead: float = 0.0) -> bool:
    """Within 5 ms or 10 %, and what the client was seen to add.

    Wide, because a shared machine can hold client or server up for milliseconds at a time. What is looked for is
    wider still: a 40 ms wait for an acknowledgement, chunks that arrive in one piece, a wrong percentile.
    """
    return abs(value - truth) <= max(5.0, 0.1 * truth) + overhead


def write(path: Path, code: str) -> str:
    path.write_text(textwrap.dedent(code))
    return str(path)


def worker_pids(parent: int | None = None) -> list[int]:
    return [child.pid for child in psutil.Process(parent).children() if "locust_worker" in " ".join(child.cmdline())]


# --- Times ---


@serial
@pytest.mark.parametrize("num_processes", [1, 2])
def test_latencies_are_those_of_the_server(tmp_path: Path, num_processes: int) -> None:
    load = Level.of_clients(8), Window(ramp_up_s=0.4, warmup_s=0.3, duration_s=3, drain_s=1)
    with serving("delay", delay_ms=50) as server:
        samples, facts, seen = drive(server, tmp_path, load, num_processes=num_processes)
    assert samples.ok.all()
    for p in (50, 90):
        truth = np.percentile(seen["latencies_ms"], p)
        assert close_to(np.percentile(samples.latency_ms, p), truth, facts["lag_p50_ms"]), p
    assert seen["max_in_flight"] == 8
    assert facts["num_processes"] == num_processes == samples.client_process.nunique()
    assert facts["all_clients_started_at_s"] <= 0
    assert len(facts["cpu_ratios"]) == num_processes
    assert 0 < facts["cpu_ratio"] == max(facts["cpu_ratios"]) < 1
    assert facts["window_s"] == pytest.approx(3, abs=0.2)
    # The window is where it should be: load from the ramp's start until its end, and nothing sent after that.
    assert samples.sent_at_s.min() == pytest.approx(-0.7, abs=0.2)
    assert 2.8 < samples.sent_at_s.max() < 3.2
    # Little's law: the clients never idle.
    inside = samples[samples.sent_at_s.between(0, 3)]
    assert inside.latency_ms.sum() / 1000 / 3 == pytest.approx(8, rel=0.2)


@serial
def test_percentiles_of_a_mixture(tmp_path: Path) -> None:
    load = Level.of_clients(16), Window(ramp_up_s=0, warmup_s=0.2, duration_s=3, drain_s=1)
    with serving("delay", delay_ms=10, slow_ms=100, slow_every=10) as server:
        samples, facts, seen = drive(server, tmp_path, load)
    assert close_to(np.percentile(samples.latency_ms, 50), 10, 1 + facts["lag_p50_ms"])
    assert close_to(np.percentile(samples.latency_ms, 99), np.percentile(seen["latencies_ms"], 99), 1)
    assert (samples.latency_ms > 60).mean() == pytest.approx(0.1, abs=0.03)


@serial
def test_stream_is_timed_as_it_arrives(tmp_path: Path) -> None:
    load = Level.of_clients(4), Window(ramp_up_s=0, warmup_s=0.2, duration_s=2, drain_s=2)
    with serving("stream", num_chunks=10, first_ms=100, gap_ms=50) as server:
        samples, _, _ = drive(server, tmp_path, load, STREAMING, STREAM)
    assert samples.ok.all()
    median = samples.median(numeric_only=True)
    # Read at the end, all would have a TTFT of 550 ms and a TPOT of 0.
    assert close_to(median.ttft_ms, 100, 1)
    assert close_to(median.tpot_ms, 50)
    assert close_to(median.latency_ms, 550, 1)
    assert (samples.num_output_tokens == 10).all()
    exact = (samples.latency_ms - samples.ttft_ms) / 9
    assert np.allclose(exact, samples.tpot_ms)


@serial
def test_an_event_without_text_is_a_token_too(tmp_path: Path) -> None:
    with serving("stream", num_chunks=3, first_ms=20, gap_ms=60, empty_first=True) as server:
        samples, _, _ = drive(server, tmp_path, SHORT, STREAMING, {"num_chunks": 3, "headers": {}})
    assert samples.ok.all()
    assert close_to(samples.ttft_ms.median(), 20, 1)


def test_tpot_needs_two_tokens(tmp_path: Path) -> None:
    with serving("stream", num_chunks=1, first_ms=20) as server:
        samples, _, _ = drive(server, tmp_path, SHORT, STREAMING, {"num_chunks": 1, "headers": {}})
    assert samples.ok.all()
    assert samples.ttft_ms.notna().all()
    assert samples.tpot_ms.isna().all()


@serial
def test_processes_start_together(tmp_path: Path) -> None:
    load = Level.of_clients(5), Window(ramp_up_s=0, warmup_s=0.5, duration_s=1, drain_s=1)
    with serving("delay", delay_ms=50) as server:
        samples, _, seen = drive(server, tmp_path, load, num_processes=2)
    first = samples.groupby("client_process").sent_at_s.min()
    assert abs(first[0] - first[1]) < 0.15
    assert np.allclose(first, -0.5, atol=0.2)
    assert seen["max_in_flight"] == 5
    # 3 + 2 clients, each at most every 50 ms
    assert (samples.client_process == 0).mean() == pytest.approx(3 / 5, abs=0.05)


@serial
def test_ramp_up_is_linear(tmp_path: Path) -> None:
    load = Level.of_clients(10), Window(ramp_up_s=2, warmup_s=0, duration_s=0.5, drain_s=3)
    with serving("delay", delay_ms=2400) as server:  # each client sends once before the window
        samples, facts, _ = drive(server, tmp_path, load, num_processes=2)
    first = samples.sent_at_s[samples.sent_at_s < 0.3].to_numpy()
    assert np.allclose(first, np.arange(10) * 0.2 - 2, atol=0.2)
    assert facts["all_clients_started_at_s"] == pytest.approx(-0.2, abs=0.15)


def test_more_processes_than_clients(tmp_path: Path) -> None:
    with serving("delay") as server:
        _, facts, seen = drive(server, tmp_path, (Level.of_clients(1), Window(0, 0.2, 0.5, 1)), num_processes=4)
    assert facts["num_processes"] == seen["max_in_flight"] == 1


@serial
@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed (apt-get install wrk)")
def test_throughput_agrees_with_wrk(tmp_path: Path) -> None:
    load = Level.of_clients(16), Window(ramp_up_s=0, warmup_s=0.5, duration_s=3, drain_s=1)
    with serving("delay", delay_ms=20) as server:
        samples, _, _ = drive(server, tmp_path, load)
        command = ["wrk", "-t1", "-c16", "-d3s", f"{server.url}/echo?message=xxxxxxxxxx"]
        found = re.search(r"Requests/sec:\s+([\d.]+)", subprocess.check_output(command, text=True))
    completed = samples.sent_at_s + samples.latency_ms / 1000
    assert found
    assert completed.between(0, 3).sum() / 3 == pytest.approx(float(found[1]), rel=0.25)


# --- Failures: each request sent is one sample, with a reason ---


@pytest.mark.parametrize("every", [1, 3])
def test_dropped_connections_are_not_resent(tmp_path: Path, every: int) -> None:
    with serving("drop", every=every) as server:
        samples, _, seen = drive(server, tmp_path)
    assert (~samples.ok).sum() == seen["num_requests"] // every > 10
    assert set(samples.error.dropna()) == {"connection_closed"}


def drive_in_turn(
    tmp_path: Path, replies: list[tuple[str, dict[str, Any]]], locustfile: str, options: dict[str, Any]
) -> tuple[pd.DataFrame, list[int], dict[str, Any]]:
    """The client at a server that gives these replies in turn: samples, how often each was given, what was seen."""
    with serving("in_turn", replies=replies) as server:
        samples, _, seen = drive(server, tmp_path, SHORT, locustfile, options)
    num_given = [len(range(k, len(samples), len(replies))) for k in range(len(replies))]
    assert min(num_given) > 2
    return samples, num_given, seen


def test_wrong_replies(tmp_path: Path) -> None:
    replies: dict[str, tuple[str, dict[str, Any]]] = {
        "http_302": ("fixed", {"status": "302 Found", "more": "Location: /echo?message=xxxxxxxxxx\r\n"}),
        "http_500": ("fixed", {"status": "500 Internal Server Error", "body": "oh"}),
        "http_503": ("fixed", {"status": "503 Service Unavailable"}),
        'wrong_body: b\'{"message":"other"}\'': ("fixed", {"body": '{"message":"other"}'}),
        "wrong_body: b'not json'": ("fixed", {"body": "not json"}),
        "wrong_body: b''": ("fixed", {"body": ""}),
        "bad_response: Incomplete response.": ("short_body", {}),
    }
    samples, num_given, seen = drive_in_turn(tmp_path, list(replies.values()), UNARY, ECHO)
    assert not samples.ok.any()
    assert samples.error.value_counts().to_dict() == dict(zip(replies, num_given, strict=True))
    assert seen["paths"] == ["/echo"]  # the redirect was not followed


def test_broken_streams(tmp_path: Path) -> None:
    quick = {"first_ms": 20, "gap_ms": 5}
    replies: dict[tuple[str, int], dict[str, Any]] = {  # what is recorded, and how many tokens
        ("truncated_stream", 4): {"num_sent": 4, "cut": True},
        ("truncated_stream", 0): {"num_sent": 0, "cut": True},
        ("truncated_stream", 10): {"done": False},
        ("malformed_event: b'{not json'", 9): {"malformed_at": 3},
        ("short_reply: got 9, want 10", 9): {"num_chunks": 9},
    }
    streams = [("stream", quick | settings) for settings in replies.values()]
    samples, num_given, _ = drive_in_turn(tmp_path, streams, STREAMING, STREAM)
    counts = samples.groupby(["error", "num_output_tokens"], dropna=False).size().to_dict()
    assert counts == dict(zip(replies, num_given, strict=True))


def test_stream_that_is_refused(tmp_path: Path) -> None:
    with serving("fixed", status="503 Service Unavailable", body="busy") as server:
        samples, _, _ = drive(server, tmp_path, SHORT, STREAMING, STREAM)
    assert set(samples.error) == {"http_503"}


def test_rankings(tmp_path: Path) -> None:
    good = '{"scores": [0.5, 1.0, 0]}'
    wrong = [
        '{"scores": [0.5, 1.0]}',
        '{"scores": [0.5, 1.0, 1.5]}',
        '{"scores": [0.5, 1.0, NaN]}',
        '{"scores": ["a", "b", "c"]}',
        "[]",
    ]
    replies = [("fixed", {"body": body}) for body in (good, *wrong)]
    samples, num_given, seen = drive_in_turn(tmp_path, replies, RECSYS, {"num_candidates": 3, "headers": {}})
    assert seen["paths"] == ["/rank"]
    assert samples.ok.sum() == num_given[0]
    expected = {f"wrong_body: {body.encode()!r}": num for body, num in zip(wrong, num_given[1:], strict=True)}
    assert samples.error.value_counts().to_dict() == expected


@serial
def test_what_hangs_is_unfinished(tmp_path: Path) -> None:
    with serving("hang", after=20) as server:
        samples, facts, _ = drive(server, tmp_path, (Level.of_clients(4), Window(0, 0.3, 0.5, 0.5)))
    hung = samples[samples.error == "unfinished"]
    assert len(hung) == facts["num_unfinished"] == 4
    assert samples.ok.sum() == 20
    ended_at_s = hung.sent_at_s + hung.latency_ms / 1000
    assert np.allclose(ended_at_s, 1.0, atol=0.1)  # latency so far, at the end of the drain


def test_headers_and_empty_payload_and_spacing(tmp_path: Path) -> None:
    with serving("delay", spaced=True) as server:
        samples, _, seen = drive(server, tmp_path, options={**ECHO, "payload_bytes": 0})
    assert samples.ok.all()
    assert "x-request-disconnect-disabled: ?1" in seen["headers"]


# --- Any locustfile ---


def test_an_ordinary_locustfile(tmp_path: Path) -> None:
    """Its own options, prints, events and helper module; a task that raises with its request in flight."""
    write(tmp_path / "helper_of_mine.py", "PATH = '/echo?message=hi'")
    locustfile = write(
        tmp_path / "mine.py",
        """
        from helper_of_mine import PATH
        from locust import FastHttpUser, constant, events, task

        @events.init_command_line_parser.add_listener
        def add(parser):
            parser.add_argument("--colour", default="blue")

        @events.test_start.add_listener
        def start(environment, **_):
            print("started", environment.parsed_options.colour)

        class Mine(FastHttpUser):
            wait_time = constant(0)
            num = 0

            @task
            def go(self):
                self.num += 1
                with self.client.get(PATH, catch_response=True):
                    if self.num % 2 == 0:
                        raise ValueError("no luck")
        """,
    )
    (tmp_path / "out").mkdir()
    with serving("delay") as server:
        samples, facts, _ = drive(server, tmp_path / "out", locustfile=locustfile, options={"x": 1})
    assert samples.ok.mean() == pytest.approx(0.5, abs=0.05)
    assert set(samples.error.dropna()) == {"task_error: ValueError: no luck"}
    assert facts["num_task_errors"] == (~samples.ok).sum()
    assert "started blue" in (tmp_path / "out/client.log").read_text()


def test_connections_are_kept_beyond_1024_files(tmp_path: Path) -> None:
    """select() cannot look at them; a pool which uses it would reconnect for every request."""
    locustfile = write(
        tmp_path / "many.py",
        """
        import os
        from locust import FastHttpUser, task

        files = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]

        class Many(FastHttpUser):
            @task
            def go(self):
                self.client.get("/echo?message=hi")
        """,
    )
    (tmp_path / "out").mkdir()
    with serving("delay") as server:
        _, _, seen = drive(server, tmp_path / "out", locustfile=locustfile)
    assert seen["num_connections"] == 4


# --- Errors, and nothing left behind ---


def fails(tmp_path: Path, code: str, url: str = "http://127.0.0.1:9", **settings: Any) -> str:
    client = Locust(write(tmp_path / "bad.py", code), settings)
    with pytest.raises(TrialError) as caught:
        run(client, url, Level.of_clients(4), Window(0, 0.1, 0.3, 0.3), tmp_path)
    assert worker_pids() == []
    assert str(tmp_path / "client.log") in str(caught.value)
    return str(caught.value)


def test_locustfile_that_does_not_import(tmp_path: Path) -> None:
    message = fails(tmp_path, "import no_such_module")
    assert "exit code 1" in message
    assert "No module named 'no_such_module'" in message


def test_locustfile_without_a_fast_http_user(tmp_path: Path) -> None:
    message = fails(tmp_path, "from locust import HttpUser\nclass Slow(HttpUser):\n    pass\n")
    assert "found: Slow" in message


def test_clients_that_never_send(tmp_path: Path) -> None:
    code = """
        from locust import FastHttpUser, task
        class Idle(FastHttpUser):
            @task
            def go(self):
                self.client.get(self.environment.parsed_options.no_such_option)
        """
    message = fails(tmp_path, code)
    assert "only 0 of 4 clients" in message
    assert "no_such_option" in message
    assert (tmp_path / "client.log").stat().st_size < 5_000_000  # tried, and logged, many thousand times


def test_worker_that_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locust_client, "MARGIN_S", 1.0)
    code = """
        from locust import FastHttpUser, task
        class Stuck(FastHttpUser):
            @task
            def go(self):
                self.client.get("/")
                while True:
                    pass
        """
    assert "did not come to 'facts' in time" in fails(tmp_path, code)


def test_killed_worker_is_a_trial_error(tmp_path: Path) -> None:
    def kill_one(live: Live) -> None:
        os.kill(worker_pids()[0], signal.SIGKILL)

    client = Locust(UNARY, ECHO)
    with serving("delay") as server, pytest.raises(TrialError, match=r"exit code -9 before 'facts'"):
        run(client, server.url, Level.of_clients(4), Window(0, 0, 30, 1), tmp_path, kill_one)
    assert worker_pids() == []
    assert not (tmp_path / "samples.parquet").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_the_parent_leaves_no_child(tmp_path: Path, error: type[BaseException]) -> None:
    pids: list[int] = []

    def stop(live: Live) -> None:
        pids.extend(worker_pids())
        raise error

    client = Locust(UNARY, ECHO)
    with serving("delay") as server, pytest.raises(error):
        run(client, server.url, Level.of_clients(4), Window(0, 0, 30, 1), tmp_path, stop)
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from orchestrator.clients.locust import Locust
        from orchestrator.clients.base import Load, Window
        from orchestrator.load.level import Level
        import sys
        client = Locust({UNARY!r}, {ECHO!r})
        load = Load([sys.argv[1]], None, Level.of_clients(4), Window(0, 0, 60, 1), 1, 2)
        client.run(load, Path({str(tmp_path)!r}), lambda live: print("running", flush=True))
        """
    with serving("delay") as server:
        script = write(tmp_path / "parent.py", code)
        command = [sys.executable, script, server.url]
        environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT) as parent:
            assert parent.stdout
            assert parent.stdout.readline() == b"running\n"
            workers = [psutil.Process(pid) for pid in worker_pids(parent.pid)]
            # Ctrl-C reaches the whole group of the orchestrator, and is not theirs to handle.
            assert os.getpgid(parent.pid) not in {os.getpgid(worker.pid) for worker in workers}
            assert parent.stdout.readline() == b"running\n"
            parent.kill()
        assert len(workers) == 2
        _, alive = psutil.wait_procs(workers, timeout=20)
        for worker in alive:
            worker.kill()
        assert not alive


@serial
def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[Live] = []
    with serving("delay", delay_ms=20) as server:
        client = Locust(UNARY, ECHO)
        run(client, server.url, Level.of_clients(4), Window(0, 1, 2, 1), tmp_path, seen.append)
    assert [live.elapsed_s for live in seen[:3]] == pytest.approx([0, 1, 2], abs=1e-6)
    assert seen[1].num_failed == 0
    assert seen[1].throughput_rps == pytest.approx(4 / 0.021, rel=0.4)
    assert seen[1].latency_p99_ms == pytest.approx(22, abs=100)


# --- The reader of streams alone ---


class Lines:
    """A response whose lines come at given times."""

    def __init__(self, lines: list[bytes]) -> None:
        self.lines = iter(lines)
        self._response = self

    def readline(self, sep: bytes) -> bytes:
        time.sleep(0.002)
        return next(self.lines, b"")


def test_other_spellings_of_server_sent_events() -> None:
    event = b'data:{"choices":[{"text":"a"}]}\r\n'
    lines = [b": ping\r\n", b"event: x\r\n", event, b"\r\n", event, b"\r\n", b"data: [DONE]\r\n", b"\r\n"]
    read = read_stream(Lines(lines), time.perf_counter())
    assert read.error is None
    assert read.num_output_tokens == 2
    assert read.ttft_ms is not None
    assert 6 <= read.ttft_ms < read.latency_ms


def test_events_after_done_are_malformed() -> None:
    event = b'data: {"choices":[{"text":"a"}]}\n'
    read = read_stream(Lines([event, b"data: [DONE]\n", event]), time.perf_counter())
    assert read.error
    assert read.error.startswith("malformed_event")

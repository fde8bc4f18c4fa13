"""Does vLLM's client, driven by us, measure what the server did, and do our samples say what the client says?

Truth comes from the server's own counters and from the client's own JSON. No test asserts how fast anything is.
"""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest

from orchestrator.clients import vllm_bench
from orchestrator.clients.base import Live, Load, Measurement, Window
from orchestrator.clients.vllm_bench import VllmBench, error_code, sample_rows, split, steady_window
from orchestrator.clients.vllm_bench_worker import arguments
from orchestrator.errors import TrialError
from orchestrator.load.level import Level
from orchestrator.process import client_environment
from orchestrator.results.samples import SAMPLES_SCHEMA, compute_metrics, in_flight_mean, read_samples, whole_run
from orchestrator.results.validity import Evidence, check_validity
from orchestrator.secrets import Secret
from tests.openai_server import TEXT, serving

ROOT = Path(__file__).parents[1]
CANARY = "sk-canary-5d1f0a"
NUM_OUTPUT = 8
OPTIONS = {
    "model": "tiny",
    "tokenizer": "tiny",
    "num_input_tokens": 32,
    "num_output_tokens": NUM_OUTPUT,
    "num_prompts": 40,
    "temperature": 0,
    "timeout_s": 120,
}
THRESHOLDS = {
    "max_error_ratio": 0.01,
    "max_window_shortfall_ratio": 0.01,
    "max_drift_ratio": 0.2,
    "min_offered_ratio": 0.95,
    "min_in_flight_ratio": 0.95,
    "max_client_cpu_ratio": 0.9,
    "max_client_lag_ratio": 0.05,
}


def needs_vllm(test: Any) -> Any:
    return pytest.mark.llm(pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")(test))


NO_WINDOW = Window(ramp_up_s=0, warmup_s=0, duration_s=0, drain_s=0)  # closed loop does not look at it


def at(urls: Sequence[str], level: Level, window: Window = NO_WINDOW, num_replicas: int = 1) -> Load:
    return Load(urls, Secret(CANARY), level, window, num_replicas, max_processes=1)  # it has one a replica, whatever


def clients(url: str, concurrency: int) -> Load:
    return at([url], Level.of_clients(concurrency))


def client(**options: Any) -> VllmBench:
    return VllmBench(**{**OPTIONS, **options})


def workers(parent: int | None = None) -> list[psutil.Process]:
    children = psutil.Process(parent).children()
    return [child for child in children if "vllm_bench_worker" in " ".join(child.cmdline())]


def ignore(live: Live) -> None:
    pass


# ---- What needs no vLLM ----


def test_split_is_even_and_loses_nothing() -> None:
    assert split(10, 4) == [3, 3, 2, 2]
    assert split(8, 8) == [1] * 8


def test_steady_window_by_hand() -> None:
    """Two processes of two clients and of one; the second starts later and runs out first."""
    sent = [np.array([10.0, 10.1, 11.0, 12.0, 13.0]), np.array([10.4, 11.5, 12.5])]
    assert steady_window(sent, [2, 1]) == (10.4, 12.5)
    assert steady_window(sent, [3, 2]) == (11.5, 12.5)
    assert steady_window(sent, None) == (10.0, 13.0)
    start, end = steady_window(sent, [5, 3])
    assert end <= start  # a burst and nothing after it


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (Level.of_clients(5), [(3, 3, 20, None), (2, 2, 20, None)]),
        (
            Level.of_rate(30),
            [(None, 38, 20, 15.0), (None, 37, 20, 15.0)],
        ),  # the warm-up: 75 requests, 2.5 s at the rate
        (Level.of_rate(0.1), [(None, 1, 20, 0.05), (None, 1, 20, 0.05)]),
    ],
)
def test_what_each_process_is_told(
    level: Level, expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients, warm-up requests, measured requests and rate of each; in open loop nothing bounds what is in flight."""
    told: list[dict[str, Any]] = []

    def tell(_module: str, specs: list[dict[str, Any]], *_: Any, **__: Any) -> None:
        told.extend(specs)
        raise TrialError("told")

    monkeypatch.setattr(vllm_bench, "drive", tell)
    with pytest.raises(TrialError, match="told"):
        client(num_prompts=20).run(at(["http://a"], level, Window(1, 2.5, 3, 4), 2), tmp_path, ignore)
    names = ("concurrency", "num_warmups", "num_prompts", "request_rate_rps")
    assert [tuple(spec[name] for name in names) for spec in told] == expected
    for spec in told:
        command = arguments(spec, "tiny")
        assert f"--num-prompts={spec['num_warmups'] + 20}" in command
        assert any(word.startswith("--max-concurrency") for word in command) is (spec["concurrency"] is not None)


def bench(**changed: Any) -> dict[str, Any]:
    """A client's record: a whole reply, a short one, one of a single token, a 500, a cut connection."""
    cut = (
        'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    y()\nOSError: first\n\n'
        "The above exception was the direct cause of the following exception:\n\n"
        'Traceback (most recent call last):\n  File "x.py", line 2, in g\n    z()\n'
        "aiohttp.client_exceptions.ClientPayloadError: Response payload is not completed:\n<TransferEncodingError>"
    )
    return {
        "start_times": [100.0, 101.0, 102.0, 103.0, 104.0],
        "ttfts": [0.5, 0.25, 0.125, 0.0, 0.75],
        "itls": [[0.1] * 7, [0.2, 0.2], [], [], [0.1]],
        "input_lens": [31, 32, 33, 34, 35],
        "output_lens": [8, 3, 1, 0, 0],
        "errors": ["", "", "", "Internal Server Error", cut],
        "occupied": [[100.0, 101.25], [101.0, 101.7], [102.0, 102.2], [103.0, 104.0], [104.0, 106.5]],
        **changed,
    }


def test_samples_by_hand() -> None:
    rows = sample_rows(bench(), 3, NUM_OUTPUT)
    table = pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA).to_pandas()
    assert table.sent_at_s.tolist() == [100, 101, 102, 103, 104]
    assert table.latency_ms.tolist() == pytest.approx(
        [1200, 650, 125, 1000, 2500]
    )  # of failures: until the end was seen
    assert table.ttft_ms.tolist() == pytest.approx([500, 250, 125, math.nan, 750], nan_ok=True)
    assert table.tpot_ms.tolist() == pytest.approx([100, 200] + [math.nan] * 3, nan_ok=True)
    assert table.ok.tolist() == [True, False, False, False, False]
    assert table.error.tolist()[1:] == [
        "short_reply: got 3, want 8",
        "short_reply: got 1, want 8",
        "http_500",
        "connection_closed",
    ]
    assert (table.client_process == 3).all()
    (long, *_) = sample_rows(bench(output_lens=[9, 3, 1, 0, 0]), 0, NUM_OUTPUT)
    assert (long["ok"], long["error"]) == (False, "long_reply: got 9, want 8")


def test_whole_run_by_hand() -> None:
    table = pa.Table.from_pylist(sample_rows(bench(), 0, NUM_OUTPUT), schema=SAMPLES_SCHEMA)
    figures = asdict(whole_run(table, 4.0))
    assert figures.pop("client") is None
    assert figures == pytest.approx(
        {
            "duration_s": 4.0,
            "num_successful": 3,
            "num_failed": 2,
            "num_short": 2,
            "throughput_rps": 0.75,
            "input_throughput_tok_per_s": (31 + 32 + 33) / 4,
            "output_throughput_tok_per_s": (8 + 3 + 1) / 4,
            "ttft_mean_ms": 875 / 3,
            "ttft_p50_ms": 250,
            "ttft_p99_ms": 250 + 0.98 * 250,
            "tpot_mean_ms": 150,
            "tpot_p50_ms": 150,
            "tpot_p99_ms": 199,
            "latency_mean_ms": 1975 / 3,
            "latency_p50_ms": 650,
            "latency_p99_ms": 650 + 0.98 * 550,
        }
    )
    failed = whole_run(table.slice(3), 4.0)
    assert (failed.num_successful, failed.num_failed, failed.latency_p50_ms) == (0, 2, None)
    assert failed.throughput_rps == failed.output_throughput_tok_per_s == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("Service Unavailable", "http_503"),
        ("Never received a valid chunk to calculate TTFT.This response will be marked as failed!", "no_tokens"),
        ("", "http_error"),
        ("x" * 1000, "x" * 200),
        ("Traceback (most recent call last):\n  File\nKeyError: 'a'\n", "KeyError"),
        ("Traceback (most recent call last):\n  File\nTimeoutError\n", "timeout"),
        ("Traceback (most recent call last):\n  File\na.b.ClientConnectorError: Cannot connect", "connection_refused"),
    ],
)
def test_error_codes_are_short_and_stable(error: str, code: str) -> None:
    assert error_code(error) == code


def test_number_of_prompts() -> None:
    for declared, level, total in (
        (50, Level.of_clients(10), 150),
        (None, Level.of_clients(10), 1200),
        (None, Level.of_clients(300), 3000),
        (50, Level.of_rate(10), 150),
        (None, Level.of_rate(10), 1200),
        (None, Level.of_rate(100), 6000),  # a rate is kept up for the window's duration
    ):
        load = at(["http://a"], level, Window(1, 2, 60, 4), num_replicas=3)
        assert client(num_prompts=declared).num_requests(load) == total


# ---- What one run tells ----


@dataclass
class Run:
    directory: Path
    measurement: Measurement
    samples: pd.DataFrame
    seen: dict[str, Any]
    progress: list[Live]
    commands: str  # of all processes of the machine, while the load was on

    @property
    def bench(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "raw" / "bench.0.json").read_text())
        return found


def drive(bench_client: VllmBench, load: Load, directory: Path) -> tuple[Measurement, pd.DataFrame]:
    measurement = bench_client.run(load, directory, ignore)
    return measurement, read_samples(directory / "samples.parquet").to_pandas()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, four clients; some requests fail, some are cut off, some replies are short."""
    directory = tmp_path_factory.mktemp("c0004-r0")
    progress: list[Live] = []
    commands: list[str] = []

    def on_progress(live: Live) -> None:
        progress.append(live)
        commands.extend(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))

    with serving(first_ms=40, gap_ms=10, fail_every=13, short_every=10, cut_every=17) as server:
        measurement = client(num_prompts=160).run(clients(server.url, 4), directory, on_progress)
        seen = server.stats()
    samples = read_samples(directory / "samples.parquet").to_pandas()
    return Run(directory, measurement, samples, seen, progress, "\n".join(commands))


@needs_vllm
def test_every_request_is_on_record(run: Run) -> None:
    num_warmups = 4
    assert len(run.samples) == 160 == run.measurement.facts.num_requests
    assert run.seen["num_requests"] == len(run.samples) + num_warmups
    assert run.seen["max_in_flight"] == 4
    assert len(set(run.seen["prompts"][:num_warmups])) == num_warmups  # one prompt over would be the prefix cache's
    body = run.seen["bodies"]
    assert {key: body[key] for key in ("model", "max_tokens", "temperature", "ignore_eos", "stream")} == {
        "model": "tiny",
        "max_tokens": NUM_OUTPUT,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    # No warm-up is on record: all of it had arrived before the first send that is, on one and the same clock.
    first_sent_s = min(run.bench["start_times"])
    assert run.seen["arrived_s"][num_warmups - 1] < first_sent_s < run.seen["arrived_s"][num_warmups]
    assert run.samples.sent_at_s.is_monotonic_increasing


@needs_vllm
def test_failures_and_short_replies(run: Run) -> None:
    samples, seen = run.samples, run.seen
    counts = samples.error.value_counts().to_dict()
    assert set(counts) == {"http_500", "connection_closed", "short_reply: got 7, want 8"}
    assert counts["http_500"] == seen["num_failed"] == 164 // 13
    assert counts["connection_closed"] == seen["num_cut"] > 0
    assert counts["short_reply: got 7, want 8"] == seen["num_short"] > 0
    assert samples.ok.sum() == 160 - sum(counts.values())
    short = samples[samples.error.str.startswith("short", na=False)]
    assert (short.num_output_tokens == 7).all()
    assert short.latency_ms.notna().all()
    good = samples[samples.ok]
    assert (good.num_output_tokens == NUM_OUTPUT).all()
    assert (good.num_input_tokens == 31).all()  # as the server's usage says, not as was asked
    assert np.allclose(good.tpot_ms, (good.latency_ms - good.ttft_ms) / (NUM_OUTPUT - 1))
    # Beside a busy machine a client sees more than the server, never less than the server's own waits.
    assert good.ttft_ms.min() > 40
    assert good.latency_ms.min() > 40 + 7 * 10


@needs_vllm
def test_whole_run_is_what_the_client_says(run: Run) -> None:
    """Held against the client's JSON under its own names, not by way of our translation of them."""
    assert run.measurement.whole_run
    whole, bench = asdict(run.measurement.whole_run), run.bench
    theirs = {
        "duration_s": bench["duration"],
        "num_successful": bench["completed"],
        "num_failed": bench["failed"],
        "throughput_rps": bench["request_throughput"],
        "output_throughput_tok_per_s": bench["output_throughput"],
        "ttft_mean_ms": bench["mean_ttft_ms"],
        "ttft_p50_ms": bench["median_ttft_ms"],
        "ttft_p99_ms": bench["p99_ttft_ms"],
        "tpot_mean_ms": bench["mean_tpot_ms"],
        "tpot_p50_ms": bench["p50_tpot_ms"],
        "tpot_p99_ms": bench["p99_tpot_ms"],
        "latency_mean_ms": bench["mean_e2el_ms"],
        "latency_p50_ms": bench["median_e2el_ms"],
        "latency_p99_ms": bench["p99_e2el_ms"],
    }
    assert {key: whole[key] for key in theirs} == pytest.approx(theirs, rel=0.005)
    both = whole["input_throughput_tok_per_s"] + whole["output_throughput_tok_per_s"]
    assert both == pytest.approx(bench["total_token_throughput"], rel=0.005)
    printed = whole["client"]
    assert {key: printed[key] for key in theirs} == theirs
    assert printed["input_throughput_tok_per_s"] == pytest.approx(whole["input_throughput_tok_per_s"], rel=0.005)
    assert whole["num_short"] == run.seen["num_short"]


@needs_vllm
def test_window_leaves_ramp_and_tail_out(run: Run) -> None:
    samples, (_, duration_s, facts, whole) = run.samples, run.measurement
    assert samples.sent_at_s[3] == 0  # the fourth client's first
    assert samples.sent_at_s.iloc[-1] == pytest.approx(duration_s)
    assert whole
    assert 0 < duration_s < whole.duration_s
    unknown = {name for name, value in asdict(facts).items() if value is None}
    assert unknown == {"offered_rps", "sent_rps"}  # closed loop
    assert facts.window_s == duration_s
    assert facts.all_clients_started_at_s == 0
    assert facts.num_processes == 1
    assert 0 < facts.cpu_ratio == facts.cpu_ratios[0] < 1
    assert 0 <= facts.lag_p50_ms <= facts.lag_p99_ms
    assert facts.versions["vllm"].startswith("0.")
    table = read_samples(run.directory / "samples.parquet")
    # Failures have no time, so they leave gaps; else all four clients are busy throughout.
    failed = (samples.latency_ms.isna() & samples.sent_at_s.between(0, duration_s)).mean()
    assert in_flight_mean(table, duration_s) > 4 * (0.9 - failed)


@needs_vllm
def test_progress_arrives(run: Run) -> None:
    assert len(run.progress) >= 2
    assert all(live.latency_p99_ms is None for live in run.progress)
    assert any(live.throughput_rps > 0 for live in run.progress)
    assert run.progress[-1].num_failed > 0
    elapsed_s = [live.elapsed_s for live in run.progress]
    assert elapsed_s == sorted(elapsed_s)


@needs_vllm
def test_what_is_on_disk(run: Run) -> None:
    files = sorted(str(path.relative_to(run.directory)) for path in run.directory.rglob("*") if path.is_file())
    assert files == ["client.log", "raw/bench.0.json", "samples.parquet"]
    for name in files:
        content = (run.directory / name).read_bytes()
        assert TEXT.strip().encode() not in content, name
        assert CANARY.encode() not in content, name
    assert run.seen["authorizations"] == [f"Bearer {CANARY}"]  # it did arrive, and
    assert "vllm_bench_worker" in run.commands
    assert CANARY not in run.commands
    assert len(run.bench["itls"]) == run.bench["num_prompts"] == 160
    assert any("Traceback" in error for error in run.bench["errors"])  # the client's words are kept
    log = (run.directory / "client.log").read_text()
    warm_up, measured = log.index("WARM-UP] Successful requests:"), log.index("measured] Successful requests:")
    assert warm_up < measured
    assert log.count("Successful requests:") == 2


# ---- Other loads ----


@needs_vllm
def test_two_addresses_are_loaded_at_the_same_time(tmp_path: Path) -> None:
    with serving(gap_ms=10) as first, serving(gap_ms=10) as second:
        load = at([first.url, second.url], Level.of_clients(5), num_replicas=2)
        _, duration_s, facts, whole = client().run(load, tmp_path, ignore)
        seen = [first.stats(), second.stats()]
    samples = read_samples(tmp_path / "samples.parquet").to_pandas()
    assert len(samples) == 80
    assert samples.client_process.value_counts().to_dict() == {0: 40, 1: 40}
    assert [server["num_requests"] for server in seen] == [43, 42]  # 40, and a warm-up for each client
    assert [server["max_in_flight"] for server in seen] == [3, 2]
    assert seen[0]["prompts"][:40] != seen[1]["prompts"][:40]  # each process has a seed of its own
    spans = samples.groupby("client_process").sent_at_s.agg(["min", "max"])
    assert spans["min"].max() < spans["max"].min()  # they overlap
    assert duration_s == pytest.approx(spans["max"].min())
    third, second_of_two = (samples[samples.client_process == k].sent_at_s.iloc[n] for k, n in ((0, 2), (1, 1)))
    assert max(third, second_of_two) == pytest.approx(0, abs=1e-9)
    assert facts.num_processes == len(facts.cpu_ratios) == 2
    assert whole
    assert whole.client is None
    assert whole.num_successful == 80
    ends_s = samples.sent_at_s + samples.latency_ms / 1000
    alone_s = [json.loads((tmp_path / "raw" / f"bench.{k}.json").read_text())["duration"] for k in (0, 1)]
    assert whole.duration_s >= max(ends_s.max() - samples.sent_at_s.min(), *alone_s)
    assert whole.duration_s < sum(alone_s)


@needs_vllm
def test_open_loop(tmp_path: Path) -> None:
    with serving(first_ms=1, gap_ms=1) as server:
        load = at([server.url], Level.of_rate(30), Window(ramp_up_s=0, warmup_s=0.2, duration_s=0, drain_s=0))
        measurement, samples = drive(client(), load, tmp_path)
        assert server.stats()["num_requests"] == 46  # the rate's own in the warm-up
    assert samples.ok.all()
    assert len(samples) == 40
    assert samples.sent_at_s.iloc[0] == 0
    assert measurement.duration_s == pytest.approx(samples.sent_at_s.iloc[-1])
    assert measurement.facts.all_clients_started_at_s is None
    raw = json.loads((tmp_path / "raw" / "bench.0.json").read_text())
    assert (raw["request_rate"], raw["max_concurrency"]) == (30, None)


@needs_vllm
def test_if_every_request_fails_that_is_the_result(tmp_path: Path) -> None:
    with serving(fail_every=1) as server:
        measurement, samples = drive(client(), clients(server.url, 2), tmp_path)
        assert server.stats()["num_requests"] == 42
    assert samples.error.eq("http_500").all()
    table = read_samples(tmp_path / "samples.parquet")
    metrics = compute_metrics(table, measurement.duration_s, {})
    evidence = Evidence(
        samples=table,
        metrics=metrics,
        concurrency=2,
        duration_s=measurement.duration_s,
        client=measurement.facts,
    )
    validity = check_validity(evidence, THRESHOLDS)
    assert "no_success" in validity.reasons
    assert measurement.whole_run
    assert measurement.whole_run.client
    assert measurement.whole_run.num_failed == measurement.whole_run.client["num_failed"] == 40
    json.dumps(asdict(measurement.whole_run), allow_nan=False)


# ---- Ends ----


@needs_vllm
def test_hang_ends_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_bench, "MARGIN_S", 1)
    num_workers = 0

    def on_progress(live: Live) -> None:
        nonlocal num_workers
        num_workers = max(num_workers, len(workers()))

    with serving(hang_after=12) as server:
        with pytest.raises(
            TrialError, match=r"40 requests did not end within client\.timeout_s=3.*client\.log"
        ) as caught:
            client(timeout_s=3).run(clients(server.url, 2), tmp_path, on_progress)
        assert server.stats()["num_requests"] == 14  # two warm-ups, ten answered, two that hang
    assert "raise it" in str(caught.value)
    assert num_workers == 1
    assert workers() == []
    assert not (tmp_path / "samples.parquet").exists()


@needs_vllm
def test_client_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_bench, "client_environment", lambda: client_environment() | {"HF_HUB_OFFLINE": "1"})
    bench_client = client(tokenizer="no-such/tokenizer")
    with pytest.raises(TrialError, match=r"exit code 1 before 'ready'; see .*client\.log(?s:.)*Error: "):
        bench_client.run(clients("http://127.0.0.1:1", 2), tmp_path, ignore)
    assert "no-such/tokenizer" in (tmp_path / "client.log").read_text()
    assert workers() == []


@needs_vllm
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from tests.test_vllm_bench import client, clients
        directory = Path({str(tmp_path)!r})
        client(timeout_s=600).run(clients(sys.argv[1], 2), directory, lambda live: print("on", flush=True))
    """
    with serving(hang_after=12) as server:
        command = [sys.executable, "-c", textwrap.dedent(code), server.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
            assert parent.stdout
            try:
                assert parent.stdout.readline() == "on\n"
                orphans = workers(parent.pid)
                assert len(orphans) == 1
            finally:
                os.kill(parent.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 30
        while any(orphan.is_running() for orphan in orphans) and time.monotonic() < deadline_s:
            time.sleep(0.1)
    assert not [orphan for orphan in orphans if orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE]

"""Importers: each format, what is left null and why, what is refused in words, and the published figures themselves."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.published import KINDS, NOTES, bucket_width_ms, import_source
from orchestrator import journal
from orchestrator.paths import RunPaths
from orchestrator.results.records import ClientFacts, Metrics, RunRecord, SummaryRow, TrialRecord, keys, read_json
from orchestrator.results.samples import percentile, read_samples
from orchestrator.results.validity import INVALID_REASONS

DATA = Path(__file__).parent / "data" / "published"
PUBLISHED = Path(__file__).parents[2] / "shared" / "published"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published samples are not here")

ENTRY = {
    "name": "/",
    "method": "GET",
    "start_time": 1700000000.0,
    "last_request_timestamp": 1700000010.0,
    "num_requests": 100,
    "num_none_requests": 0,
    "num_failures": 0,
    "total_response_time": 1000.0,
    "response_times": {"10": 100},
}
VLLM = {
    "request_rate": "inf",
    "max_concurrency": 4,
    "duration": 10.0,
    "num_prompts": 40,
    "completed": 40,
    "failed": 0,
    "total_input_tokens": 400,
    "total_output_tokens": 800,
    "request_throughput": 4.0,
    "output_throughput": 80.0,
    "mean_ttft_ms": 20.0,
    "median_ttft_ms": 19.0,
    "p99_ttft_ms": 30.0,
}
HEADER = "concurrency,rps,mean_latency_ms,p50_ms,p99_ms,num_requests\n"
STREAMING = (DATA / "streaming.csv").read_text()


def run_of(source: Path, kind: str, outputs: Path, **options: Any) -> RunPaths:
    return import_source(source, kind, "unary", "optimized", outputs, **options)


def rows_of(run: RunPaths) -> list[dict[str, Any]]:
    return pq.read_table(run.summary_parquet).to_pylist()


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refused(source: Path, kind: str, outputs: Path, **options: Any) -> str:
    """The message; nothing may be left below `outputs`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        run_of(source, kind, outputs, **options)
    assert type(caught.value) is ValueError, caught.value
    assert not outputs.exists() or not list(outputs.iterdir())
    return str(caught.value)


# ---- The run directory ----


def test_run_directory_is_complete(tmp_path: Path) -> None:
    run = run_of(DATA / "unary.csv", "locust", tmp_path, num_replicas=8)
    record = read_json(run.run_json)
    assert set(record) == set(keys(RunRecord))
    assert (record["status"], record["seed"]) == ("complete", None)
    assert record["run_id"] == run.root.name
    [arm] = record["plan"]["arms"]
    assert (arm["name"], arm["axes"], arm["copy"]) == ("optimized", {"profile": "optimized"}, 0)
    assert arm["levels"] == ["c0001", "c0064"]
    assert record["plan"]["trials"] == ["optimized/c0001-r0", "optimized/c0064-r0"]
    [cell] = record["primary_cells"]
    assert (cell["metric"], cell["level"], cell["axes"]) == ("throughput_rps", "c0064", {})
    [file] = record["provenance"]["imported"]["files"]
    assert file["name"] == "unary.csv"
    assert len(file["sha256"]) == 64
    for level in ("c0001", "c0064"):
        trial = read_json(run.trial_json("optimized", level, 0))
        assert set(trial) == set(keys(TrialRecord))
        assert set(trial["client"]) == set(keys(ClientFacts))
        assert set(trial["metrics"]) == set(keys(Metrics))
        assert trial["service_key"] == arm["service_key"]
        assert set(trial["unchecked"]) < set(INVALID_REASONS)
        assert set(trial["notes"]) <= set(NOTES)
        assert (run.raw_dir("optimized", level, 0) / "unary.csv").read_bytes() == (DATA / "unary.csv").read_bytes()
        assert not run.samples("optimized", level, 0).exists()
    table = pq.read_table(run.summary_parquet)
    assert table.column_names == list(keys(SummaryRow))
    assert run.summary_parquet.with_suffix(".csv").exists()
    assert table["num_replicas"].to_pylist() == [8, 8]
    assert set(table["cluster"].to_pylist()) == {"imported"}


def test_two_imports_in_one_second_do_not_meet(tmp_path: Path) -> None:
    runs = {run_of(DATA / "unary.csv", "locust", tmp_path).run_id for _ in range(3)}
    assert len(runs) == 3


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "write_summary", fail)
    with pytest.raises(KeyboardInterrupt):
        run_of(DATA / "unary.csv", "locust", tmp_path)
    assert not list(tmp_path.iterdir())


def test_outputs_that_is_a_file(tmp_path: Path) -> None:
    outputs = written(tmp_path / "outputs", "")
    with pytest.raises(ValueError, match="cannot make a run directory below"):
        run_of(DATA / "unary.csv", "locust", outputs)


def test_odd_names(tmp_path: Path) -> None:
    source = written(tmp_path / "a b'ü;$(x) c4.json", [ENTRY])
    run = import_source(source, "locust", "my workload", "all on / 8x", tmp_path / "out")
    [row] = rows_of(run)
    assert (row["workload"], row["profile"], row["concurrency"]) == ("my workload", "all on / 8x", 4)
    assert row["arm"].startswith("all_on___8x~")
    assert (run.raw_dir(row["arm"], "c0004", 0) / source.name).exists()


# ---- Locust ----


def test_locust_entries_are_merged(tmp_path: Path) -> None:
    [row] = rows_of(run_of(DATA / "locust_8.json", "locust", tmp_path))
    assert (row["concurrency"], row["num_successful"], row["num_failed"]) == (8, 1997, 3)
    assert row["duration_s"] == 20.0
    assert row["throughput_rps"] == 1997 / 20
    assert row["error_ratio"] == 3 / 2000
    assert row["latency_mean_ms"] == 40000 / 2000
    times = np.repeat([11, 14, 22, 33, 150], [500, 500, 600, 380, 20])
    assert row["latency_p50_ms"] == np.quantile(times, 0.5)
    assert row["latency_p99_ms"] == np.quantile(times, 0.99)
    assert row["latency_p999_ms"] is None  # 2,000 requests
    assert row["latency_resolution_ms"] == (10.0 if row["latency_p99_ms"] >= 100 else 1.0)
    assert row["started_at"] == "2023-11-14T22:13:20+00:00"
    assert row["valid"] is True
    for note in ("imported", "single_run", "whole_run", "bucketed_percentiles", "failures_in_latency"):
        assert note in row["notes"].split(";")
    assert "unchecked:drift" in row["notes"]
    assert "unchecked:error_ratio" not in row["notes"]


def test_locust_concatenated_values_and_byte_order_mark(tmp_path: Path) -> None:
    source = written(tmp_path / "x_c2.json", "\ufeff" + f"{json.dumps([ENTRY])}\n\n{json.dumps([ENTRY, ENTRY])}\n")
    [row] = rows_of(run_of(source, "locust", tmp_path / "out"))
    assert row["num_successful"] == 300
    assert row["throughput_rps"] == 30.0
    assert row["latency_p99_ms"] is None  # 300 requests
    assert row["latency_resolution_ms"] == 1.0


def test_locust_thousand_entries(tmp_path: Path) -> None:
    source = written(tmp_path / "x_10.json", [ENTRY | {"name": f"/{index}"} for index in range(1000)])
    assert rows_of(run_of(source, "locust", tmp_path / "out"))[0]["num_successful"] == 100_000


@pytest.mark.parametrize(
    ("failures", "reasons"), [(0, ""), (1, ""), (2, "error_ratio"), (99, "error_ratio"), (100, "no_success")]
)
def test_locust_failures(tmp_path: Path, failures: int, reasons: str) -> None:
    source = written(tmp_path / "x_1.json", [ENTRY | {"num_failures": failures}])
    [row] = rows_of(run_of(source, "locust", tmp_path / "out"))
    assert (row["invalid_reasons"], row["valid"]) == (reasons, not reasons)
    assert row["throughput_rps"] == (100 - failures) / 10
    assert (row["latency_mean_ms"] is None) == (failures == 100)


def bucket_response_time(latency_ms: float) -> int:
    """Locust's own rule. Not imported: it would patch this process' sockets and threads."""
    digits = next(digits for digits, limit in enumerate((100, 1000, 10000, np.inf)) if latency_ms < limit)
    return int(round(latency_ms, -digits))


def test_buckets_are_locusts() -> None:
    values = [0.5, 3.49, 3.5, 99.4, 99.6, 100.0, 147.0, 994.9, 995.0, 999.9, 1000.0, 3432.0, 9999.0, 10000.0, 58760.0]
    program = f"from locust.stats import bucket_response_time as b; print([b(v) for v in {values}])"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert [bucket_response_time(value) for value in values] == json.loads(told)


@given(st.floats(0, 1e6))
def test_bucket_width(latency_ms: float) -> None:
    bucket = bucket_response_time(latency_ms)
    assert abs(bucket - latency_ms) <= bucket_width_ms(latency_ms) / 2
    assert bucket % bucket_width_ms(bucket) == 0


@given(st.lists(st.floats(0, 20_000), min_size=20, max_size=60), st.floats(0.01, 0.5))
def test_buckets_cost_a_percentile_half_a_width(latencies: list[float], p: float) -> None:
    found = percentile(np.array([bucket_response_time(latency) for latency in latencies]), p)
    assert found is not None
    # Of the higher of the two values between which p lies.
    upper = float(np.quantile(latencies, p, method="higher"))
    assert abs(found - float(np.quantile(latencies, p))) <= bucket_width_ms(upper) / 2 + 1e-6


def test_unary_csv(tmp_path: Path) -> None:
    first, second = rows_of(run_of(DATA / "unary.csv", "locust", tmp_path))
    assert (first["throughput_rps"], first["duration_s"], first["latency_p99_ms"]) == (100.0, 60.0, 12.0)
    assert (first["num_failed"], first["error_ratio"]) == (None, None)
    assert "failures_unknown" in first["notes"]
    assert "unchecked:error_ratio" in first["notes"]
    assert (second["latency_p50_ms"], second["latency_p99_ms"]) == (19.0, None)  # 500 requests


# ---- vLLM ----


def test_vllm_without_detail(tmp_path: Path) -> None:
    run = run_of(written(tmp_path / "x.json", VLLM), "vllm", tmp_path / "out")
    [row] = rows_of(run)
    assert (row["concurrency"], row["throughput_rps"], row["output_throughput_tok_per_s"]) == (4, 4.0, 80.0)
    assert row["input_throughput_tok_per_s"] == 40.0
    assert (row["ttft_mean_ms"], row["ttft_p50_ms"], row["ttft_p99_ms"]) == (20.0, 19.0, None)  # 40 requests
    assert (row["latency_mean_ms"], row["tpot_mean_ms"], row["started_at"]) == (None, None, None)
    assert row["error_ratio"] == 0
    assert not run.samples("optimized", "c0004", 0).exists()


def test_vllm_with_detail(tmp_path: Path) -> None:
    run = run_of(DATA / "vllm_detailed.json", "vllm", tmp_path)
    samples = read_samples(run.samples("optimized", "c0002", 0))
    source = json.loads((DATA / "vllm_detailed.json").read_text())
    assert samples["sent_at_s"].to_pylist() == [start - 100 for start in source["start_times"]]
    assert samples["ok"].to_pylist() == [index != 5 for index in range(24)]
    assert samples["error"][5].as_py() == "Service Unavailable"
    assert samples["latency_ms"][5].as_py() is None
    assert samples["latency_ms"][0].as_py() == pytest.approx(50 + 80)
    assert samples["tpot_ms"][0].as_py() == pytest.approx(20)
    assert samples["tpot_ms"][6].as_py() is None  # one token
    [row] = rows_of(run)
    assert (row["num_successful"], row["num_failed"]) == (23, 1)
    assert row["throughput_rps"] == pytest.approx(source["request_throughput"])
    assert row["output_throughput_tok_per_s"] == pytest.approx(source["output_throughput"])
    assert row["latency_p50_ms"] is not None
    assert (row["invalid_reasons"], row["latency_resolution_ms"]) == ("error_ratio", 0.0)
    raw = (run.raw_dir("optimized", "c0002", 0) / "vllm_detailed.json").read_text()
    assert json.loads(raw) == {key: value for key, value in source.items() if key != "generated_texts"}
    assert not any(b"secret text" in path.read_bytes() for path in run.root.rglob("*") if path.is_file())


@pytest.mark.parametrize("start_times", [None, []])
def test_vllm_detail_without_start_times_gives_no_samples(tmp_path: Path, start_times: Any) -> None:
    value = json.loads((DATA / "vllm_detailed.json").read_text()) | {"start_times": start_times}
    run = run_of(written(tmp_path / "x.json", value), "vllm", tmp_path / "out")
    assert not run.samples("optimized", "c0002", 0).exists()
    assert rows_of(run)[0]["ttft_mean_ms"] == 1.0


def test_vllm_appended_results(tmp_path: Path) -> None:
    source = written(tmp_path / "x.json", "\n".join(json.dumps(VLLM | {"max_concurrency": c}) for c in (8, 2)))
    run = run_of(source, "vllm", tmp_path / "out")
    assert [row["concurrency"] for row in rows_of(run)] == [2, 8]
    assert read_json(run.raw_dir("optimized", "c0008", 0) / "x.json")["max_concurrency"] == 8


def test_vllm_replica_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    for replicas in (1, 2):
        written(sweep / f"{replicas}_replicas.json", VLLM | {"max_concurrency": 256})
    run = run_of(sweep, "vllm", tmp_path / "out")
    assert [(row["arm"], row["num_replicas"]) for row in rows_of(run)] == [
        ("optimized,num_replicas=1", 1),
        ("optimized,num_replicas=2", 2),
    ]
    record = read_json(run.run_json)
    assert record["plan"]["arms"][1]["axes"] == {"profile": "optimized", "workload.num_replicas": "2"}
    assert [cell["axes"] for cell in record["primary_cells"]] == [
        {"workload.num_replicas": "1"},
        {"workload.num_replicas": "2"},
    ]
    assert len({arm["service_key"] for arm in record["plan"]["arms"]}) == 2
    assert "contradictory num-replicas" in refused(sweep, "vllm", tmp_path / "none", num_replicas=4)
    written(sweep / "more.json", VLLM)
    assert "does not tell its replicas" in refused(sweep, "vllm", tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"failed": None, "num_prompts": 50}, (10, 0.2)),
        ({"failed": None, "num_prompts": None}, (None, None)),
        (
            {
                "completed": 0,
                "failed": 40,
                "total_output_tokens": 0,
                "output_throughput": 0.0,
                "request_throughput": 0.0,
            },
            (40, 1.0),
        ),
    ],
)
def test_vllm_failures(tmp_path: Path, change: dict[str, Any], expected: tuple[int | None, float | None]) -> None:
    [row] = rows_of(run_of(written(tmp_path / "x.json", VLLM | change), "vllm", tmp_path / "out"))
    assert (row["num_failed"], row["error_ratio"]) == expected
    assert row["invalid_reasons"] == {None: "", 0.2: "error_ratio", 1.0: "no_success"}[expected[1]]


def test_vllm_zero_mean_is_no_value(tmp_path: Path) -> None:
    """vLLM writes 0 for what it has no value of."""
    source = written(tmp_path / "x.json", VLLM | {"mean_ttft_ms": 0.0, "median_ttft_ms": 0.0})
    [row] = rows_of(run_of(source, "vllm", tmp_path / "out"))
    assert (row["ttft_mean_ms"], row["ttft_p50_ms"]) == (None, None)


# ---- Streaming ----


def test_streaming_csv(tmp_path: Path) -> None:
    one, eight = rows_of(run_of(DATA / "streaming.csv", "streaming-csv", tmp_path))
    assert (one["concurrency"], one["throughput_rps"], one["output_throughput_tok_per_s"]) == (1, 100.0, 1000.0)
    assert (one["latency_mean_ms"], one["ttft_mean_ms"]) == (30.0, 10.0)
    assert (one["latency_p50_ms"], one["latency_p95_ms"], one["latency_p99_ms"]) == (28.0, 40.0, 50.0)
    assert (one["ttft_p50_ms"], one["ttft_p99_ms"]) == (9.0, 20.0)
    assert one["tpot_mean_ms"] == pytest.approx(20 / 9)  # 10 chunks a request
    assert (one["tpot_p50_ms"], one["tpot_p99_ms"]) == (None, None)
    assert "percentiles_of_worker_means" not in one["notes"]
    assert {"itl_not_tpot", "failures_unknown"} <= set(one["notes"].split(";"))
    assert "percentiles_of_worker_means" in eight["notes"]
    assert (eight["throughput_rps"], eight["ttft_mean_ms"]) == (400.0, 12.0)
    assert all(value is None for name, value in eight.items() if re.search(r"_p\d+_ms$", name))


# ---- Concurrency and replicas ----


@pytest.mark.parametrize(
    ("name", "concurrency", "replicas"),
    [
        ("allon8_on_unary_128", 128, None),
        ("c64", 64, None),
        ("echo-c128-8_replicas", 128, 8),
        ("vllm_concurrency_64", 64, None),
        ("concurrency32_2", 32, None),
        ("8_replicas_16", 16, 8),
        ("num_replicas_4_c2", 2, 4),
        ("C4.final", 4, None),
    ],
)
def test_told_by_the_file_name(tmp_path: Path, name: str, concurrency: int, replicas: int | None) -> None:
    [row] = rows_of(run_of(written(tmp_path / f"{name}.json", [ENTRY]), "locust", tmp_path / "out"))
    assert (row["concurrency"], row["num_replicas"]) == (concurrency, replicas)


@pytest.mark.parametrize("name", ["plain", "replicas_8", "8_replicas", "2026-01-01", "abc128x"])
def test_not_told_by_the_file_name(tmp_path: Path, name: str) -> None:
    source = written(tmp_path / f"{name}.json", [ENTRY])
    message = refused(source, "locust", tmp_path / "out")
    assert f"{name}.json" in message
    assert "--concurrency" in message
    assert rows_of(run_of(source, "locust", tmp_path / "out", concurrency=7))[0]["concurrency"] == 7


def test_contradictions(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "contradictory concurrency: 8 (file name), 9 (--concurrency)" in refused(
        written(tmp_path / "x_8.json", [ENTRY]), "locust", out, concurrency=9
    )
    named = refused(written(tmp_path / "x_c8.json", VLLM), "vllm", out)
    assert "4 (content)" in named
    assert "8 (file name)" in named
    # A number at the end may be anything; the content knows.
    assert rows_of(run_of(written(tmp_path / "try_8.json", VLLM), "vllm", tmp_path / "b"))[0]["concurrency"] == 4
    assert "contradictory" in refused(DATA / "unary.csv", "locust", out, concurrency=64)


def test_directories(tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    written(folder / "notes.txt", "x")
    assert "no *.json file" in refused(folder, "locust", out)
    written(folder / "a_16.json", [ENTRY])
    written(folder / "a_2.json", [ENTRY])
    written(folder / "._a_2.json", "left by a Mac")
    assert [row["concurrency"] for row in rows_of(run_of(folder, "locust", tmp_path / "good"))] == [2, 16]
    assert "16 (file name), 2 (--concurrency)" in refused(folder, "locust", out, concurrency=2)
    written(folder / "b_2.json", [ENTRY])
    message = refused(folder, "locust", out)
    assert "a_2.json" in message
    assert "b_2.json" in message
    assert "*.csv" in refused(folder, "streaming-csv", out)


# ---- Refusals ----


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (json.dumps([ENTRY])[:-20], "cut off"),
        ("[" * 100_000, "not JSON"),
        ("[]", "nothing was measured"),
        ('{"a": 1}', "expects a list of entries"),
        (json.dumps(VLLM), "expects a list of entries"),
        ('["x"]', "entry 0 is not Locust's"),
        ([{"name": "/", "num_requests": 3}], "no response_times"),
        ([ENTRY | {"num_requests": 0, "response_times": {}, "last_request_timestamp": None}], "nothing was measured"),
        ([ENTRY | {"num_requests": -1}], "num_requests must be a finite number, 0 or more, found -1"),
        ([ENTRY | {"num_requests": 100.5}], "whole number"),
        ([ENTRY | {"num_requests": 10**400}], "num_requests must be a finite number"),
        ([ENTRY | {"num_requests": None}], "num_requests must be a finite number, 0 or more, found None"),
        ([ENTRY | {"total_response_time": float("nan")}], "total_response_time must be a finite number"),
        ([ENTRY | {"total_response_time": float("inf")}], "total_response_time must be a finite number"),
        ([ENTRY | {"response_times": {"ten": 100}}], "response time must be a finite number, 0 or more, found 'ten'"),
        ([ENTRY | {"response_times": {"nan": 100}}], "found 'nan'"),
        ([ENTRY | {"response_times": {"-1": 100}}], "found '-1'"),
        ([ENTRY | {"response_times": {"10": 99.5, "11": 0.5}}], "count must be a whole number"),
        ([ENTRY | {"response_times": {"10": 99}}], "contradicts itself"),
        ([ENTRY | {"num_failures": 101}], "contradicts itself"),
        ([ENTRY | {"last_request_timestamp": 1700000000.0}], "is no run"),
        ([ENTRY | {"start_time": 1e12, "last_request_timestamp": 2e12}], "is no run"),
    ],
)
def test_locust_refusals(tmp_path: Path, content: Any, words: str) -> None:
    source = written(tmp_path / "x_1.json", content)
    message = refused(source, "locust", tmp_path / "out")
    assert words in message
    assert str(source) in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        (json.dumps(VLLM)[:-2], "cut off"),
        ([ENTRY], "is not from vllm bench serve: no duration or completed in [{"),
        ("{}", "completed in {}"),
        ("3", "completed in 3"),
        (VLLM | {"duration": 0}, "nothing was measured"),
        (VLLM | {"duration": float("nan")}, "duration must be a finite number"),
        (VLLM | {"completed": 0, "failed": 0}, "nothing was measured"),
        (VLLM | {"completed": -4}, "completed must be"),
        (VLLM | {"completed": 39.5}, "whole number"),
        (VLLM | {"mean_ttft_ms": -1.0}, "mean_ttft_ms must be"),
        (VLLM | {"request_rate": 10.0}, "open loop"),
        (VLLM | {"ramp_up_strategy": "linear"}, "open loop"),
        (VLLM | {"max_concurrency": None}, "--concurrency"),
        (VLLM | {"max_concurrency": 0}, "at least 1"),
        (f"{json.dumps(VLLM)}\n{json.dumps(VLLM)}", "both have concurrency 4"),
    ],
)
def test_vllm_refusals(tmp_path: Path, content: Any, words: str) -> None:
    source = written(tmp_path / "x.json", content)
    message = refused(source, "vllm", tmp_path / "out")
    assert words in message
    assert str(source) in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ttfts": [0.1]}, "differ in length"),
        ({"errors": [""] * 23}, "differ in length"),
        ({"input_lens": [16] * 23}, "differ in length"),
        ({"ttfts": ["x"] * 24}, "cannot be read"),
        ({"ttfts": [None] * 24}, "not finite"),
        ({"itls": [[-0.1]] * 24}, "negative"),
        ({"itls": [0.1] * 24}, "cannot be read"),
        ({"output_lens": [2**40] * 24}, "cannot be read"),
        ({"errors": [""] * 12 + ["x"] * 12}, "by its lists"),
        ({"duration": 3.0}, "by its lists"),
    ],
)
def test_vllm_detail_refusals(tmp_path: Path, change: Mapping[str, Any], words: str) -> None:
    value = json.loads((DATA / "vllm_detailed.json").read_text()) | change
    assert words in refused(written(tmp_path / "x.json", value), "vllm", tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("locust", "", "found nothing"),
        ("locust", HEADER, "no row"),
        ("locust", "a,b\n1,2\n", "lacks the columns concurrency"),
        ("locust", STREAMING, "lacks the columns rps"),
        ("locust", HEADER + "1,100,9,9\n", "row 1 has not as many cells"),
        ("locust", HEADER + "1,100,9,9,12,6000,7\n", "row 1 has not as many cells"),
        ("locust", HEADER + "1,0,9,9,12,6000\n", "rps is 0"),
        ("locust", HEADER + "1,100,9,9,12,0\n", "num_requests is 0"),
        ("locust", HEADER + "0,100,9,9,12,6000\n", "at least 1"),
        ("locust", HEADER + "1.5,100,9,9,12,6000\n", "whole number"),
        ("locust", HEADER + "1,NaN,9,9,12,6000\n", "rps must be a finite number"),
        ("locust", HEADER + "1,-100,9,9,12,6000\n", "rps must be a finite number"),
        ("locust", HEADER + "1,,9,9,12,6000\n", "rps must be a finite number, 0 or more, found ''"),
        ("locust", HEADER + "1,100,9,9,12,6000\n1,100,9,9,12,6000\n", "both have concurrency 1"),
        ("streaming-csv", HEADER + "1,100,9,9,12,6000\n", "lacks the columns num_workers"),
        ("streaming-csv", STREAMING.replace(",20.0,", ",0.0,"), "benchmark_duration is 0"),
        ("streaming-csv", json.dumps(VLLM), "lacks the columns"),
        ("vllm", HEADER, "not JSON"),
    ],
)
def test_csv_refusals(tmp_path: Path, kind: str, content: str, words: str) -> None:
    source = written(tmp_path / "x.csv", content)
    message = refused(source, kind, tmp_path / "out")
    assert words in message
    assert str(source) in message


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    content = "\ufeff" + HEADER.replace(",", ", ").replace("\n", "\r\n") + "8.0, 100 ,9,9,,6000\r\n\r\n"
    [row] = rows_of(run_of(written(tmp_path / "x.csv", content), "locust", tmp_path / "out"))
    assert (row["concurrency"], row["throughput_rps"], row["latency_p99_ms"]) == (8, 100.0, None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_text(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "x_1.json"
    source.write_bytes(b"\xff\xfe\x00\x01")
    assert "'utf-8' codec can't decode" in refused(source, kind, tmp_path / "out")
    assert "cannot read" in refused(tmp_path / "absent.json", kind, tmp_path / "out")
    assert "cannot read" in refused(tmp_path / ("n" * 300), kind, tmp_path / "out")


def test_options(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "available: locust, vllm, streaming-csv" in refused(DATA / "unary.csv", "wrk", out)
    for options in ({"concurrency": 0}, {"num_replicas": -1}):
        assert "at least 1" in refused(
            written(tmp_path / "x.json", VLLM | {"max_concurrency": None}), "vllm", out, **options
        )
    for workload, profile in (("", "p"), ("w", " ")):
        with pytest.raises(ValueError, match="is empty"):
            import_source(DATA / "unary.csv", "locust", workload, profile, out)


# ---- What the published results say of themselves ----


@needs_published
@pytest.mark.parametrize("arm", ["off", "on"])
def test_published_unary_json_gives_the_published_csv(tmp_path: Path, arm: str) -> None:
    """The study's CSV follows from its JSON: rate and mean to two decimals, percentiles to the bucket."""
    files = rows_of(run_of(PUBLISHED / f"features/allon8_{arm}_unary", "locust", tmp_path))
    table = rows_of(run_of(PUBLISHED / f"features/allon8_{arm}_unary.csv", "locust", tmp_path))
    assert [row["concurrency"] for row in files] == [1, 16, 128]
    assert [row["concurrency"] for row in table] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    by_level = {row["concurrency"]: row for row in table}
    for row in files:
        said = by_level[row["concurrency"]]
        assert row["num_successful"] == said["num_successful"]
        assert row["throughput_rps"] == pytest.approx(said["throughput_rps"], abs=0.00501)
        assert row["latency_mean_ms"] == pytest.approx(said["latency_mean_ms"], abs=0.00501)
        for name in ("latency_p50_ms", "latency_p99_ms", "latency_resolution_ms"):
            assert row[name] == said[name]
        assert row["valid"]
    peak = {row["concurrency"]: round(row["throughput_rps"]) for row in files}[128]
    assert peak == {"off": 1279, "on": 14221}[arm]


@needs_published
@pytest.mark.parametrize(("arm", "num_requests", "rps"), [("unoptimized", 9388, 156.79), ("optimized", 10049, 167.83)])
def test_published_recsys(tmp_path: Path, arm: str, num_requests: int, rps: float) -> None:
    source = PUBLISHED / f"recsys/recsys-oss-nightly-{arm}_10.json"
    [row] = rows_of(run_of(source, "locust", tmp_path))
    assert len(json.loads(source.read_text())) == 1000
    assert (row["concurrency"], row["num_successful"]) == (10, num_requests)
    assert row["throughput_rps"] == pytest.approx(rps, abs=0.005)


@needs_published
@pytest.mark.parametrize(("arm", "tok_per_s"), [("off", 15638), ("on", 138257)])
def test_published_streaming(tmp_path: Path, arm: str, tok_per_s: int) -> None:
    rows = rows_of(run_of(PUBLISHED / f"features/allon8_{arm}_streaming.csv", "streaming-csv", tmp_path))
    assert [row["concurrency"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert round(rows[-1]["output_throughput_tok_per_s"]) == tok_per_s
    assert rows[-1]["throughput_rps"] == pytest.approx(tok_per_s / 50, rel=1e-4)
    assert [row["latency_p99_ms"] is None for row in rows] == [False] * 3 + [True] * 5


@needs_published
@pytest.mark.parametrize(("arm", "tok_per_s"), [("unoptimized", 14180), ("optimized", 40512)])
def test_published_llm(tmp_path: Path, arm: str, tok_per_s: int) -> None:
    run = import_source(PUBLISHED / f"llm/replica_sweep_{arm}", "vllm", "llm", arm, tmp_path)
    one, eight = rows_of(run)
    assert (one["arm"], one["num_replicas"], one["concurrency"]) == (f"{arm},num_replicas=1", 1, 256)
    assert (eight["num_replicas"], eight["concurrency"]) == (8, 2048)
    assert round(eight["output_throughput_tok_per_s"]) == tok_per_s
    said = json.loads((PUBLISHED / f"llm/replica_sweep_{arm}/8_replicas.json").read_text())
    for column, key in (("latency", "e2el"), ("ttft", "ttft"), ("tpot", "tpot")):
        for label, word in (("mean", "mean"), ("p50", "median"), ("p99", "p99")):
            assert eight[f"{column}_{label}_ms"] == said[f"{word}_{key}_ms"]


@needs_published
def test_published_vllm(tmp_path: Path) -> None:
    [row] = rows_of(run_of(PUBLISHED / "llm/vllm_concurrency_64.json", "vllm", tmp_path))
    assert (row["concurrency"], round(row["output_throughput_tok_per_s"])) == (64, 3968)

"""Each figure against a plain computation of the same; each validity rule with a breach and a near miss."""

import csv
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import yaml
from hypothesis import given
from hypothesis import strategies as st

from analysis.cells import cells_frame
from orchestrator.results import document, validity
from orchestrator.results.document import TABLES, with_tables
from orchestrator.results.records import (
    ClientFacts,
    ComparisonRow,
    ServerFacts,
    SummaryRow,
    TrialRecord,
    keys,
    read,
    read_json,
    summary_table,
    write_json,
    write_summary,
)
from orchestrator.results.samples import (
    SAMPLES_SCHEMA,
    compute_metrics,
    drift,
    in_flight_mean,
    percentile,
    read_samples,
    tokens_are_bunched,
    write_samples,
)
from orchestrator.results.validity import RULES, Answer, Evidence, Rule, TroubleKind, Unbroken, Validity, check_validity
from tests.conftest import ROOT
from tests.runs import planned_row, trial_record

NO_SLO: dict[str, float | None] = {"latency_p99_ms": None, "ttft_p99_ms": None, "tpot_p99_ms": None}
README = ROOT / "outputs" / "README.md"


def table(**columns: Any) -> pa.Table:
    """Samples from some columns; the others are null, `ok` is true and `client_process` 0."""
    n = len(columns["sent_at_s"])
    columns = {"ok": [True] * n, "client_process": [0] * n, "latency_ms": [1.0] * n} | columns
    return pa.table([pa.array(columns.get(name, [None] * n), type) for name, type in _fields()], schema=SAMPLES_SCHEMA)


def _fields() -> list[tuple[str, pa.DataType]]:
    return [(column.name, column.type) for column in SAMPLES_SCHEMA]


def empty() -> pa.Table:
    return table(sent_at_s=[])


def metrics_of(samples: pa.Table, duration_s: float = 10.0, **slo: float) -> dict[str, Any]:
    return asdict(compute_metrics(samples, duration_s, NO_SLO | slo))


# ---- Percentiles ----


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_percentile_is_numpys_or_none(values: list[float], p: float) -> None:
    found = percentile(np.array(values), p)
    if len(values) >= {0.5: 20, 0.9: 100, 0.95: 200, 0.99: 1000}[p]:
        assert found == pytest.approx(np.percentile(values, 100 * p), rel=1e-12)
    else:
        assert found is None


@pytest.mark.parametrize(("p", "needed"), [(0.5, 20), (0.9, 100), (0.95, 200), (0.99, 1000), (0.999, 10_000)])
def test_percentile_needs_ten_values_beyond_it(p: float, needed: int) -> None:
    assert percentile(np.arange(needed - 1.0), p) is None
    assert percentile(np.arange(float(needed)), p) is not None


def test_percentile_takes_a_fraction() -> None:
    with pytest.raises(AssertionError, match="a fraction"):
        percentile(np.arange(100_000.0), 99)


@pytest.mark.parametrize("n", [19, 999, 1000, 10_000])
def test_metrics_percentiles_are_of_raw_successes_in_the_window(n: int) -> None:
    rng = np.random.default_rng(n)
    latency = rng.lognormal(3, 1, 3 * n)
    sent = np.concatenate([np.full(n, 1.0), np.full(n, -100.0), np.full(n, 1.0)])
    ok = np.repeat([True, True, False], n)  # the last n fail, the middle n are of the warm-up
    found = metrics_of(table(sent_at_s=sent, latency_ms=latency, ttft_ms=latency / 4, ok=ok), duration_s=1000.0)
    for prefix, scale, labels in (
        ("latency", 1, ("50", "90", "95", "99", "99.9")),
        ("ttft", 4, ("50", "99")),
    ):
        raw = latency[:n] / scale
        assert found[f"{prefix}_mean_ms"] == pytest.approx(raw.mean())
        for label in labels:
            value = found[f"{prefix}_p{label.replace('.', '')}_ms"]
            if round(n * (100 - float(label)) / 100, 6) >= 10:
                assert value == pytest.approx(np.percentile(raw, float(label)), rel=1e-12)
            else:
                assert value is None


@given(st.permutations(range(60)))
def test_order_does_not_matter(order: list[int]) -> None:
    rng = np.random.default_rng(0)
    ok = rng.random(60) < 0.8
    samples = table(
        sent_at_s=rng.uniform(-2, 11, 60),
        latency_ms=rng.lognormal(5, 2, 60),
        ttft_ms=rng.lognormal(3, 1, 60),
        num_output_tokens=rng.integers(1, 9, 60),
        ok=ok,
        error=[None if fine else "unfinished" for fine in ok],
    )
    shuffled = samples.take(order)
    assert metrics_of(shuffled, ttft_p99_ms=20.0) == pytest.approx(metrics_of(samples, ttft_p99_ms=20.0))
    assert in_flight_mean(shuffled, 10.0) == pytest.approx(in_flight_mean(samples, 10.0))
    assert drift(shuffled, 10.0) == drift(samples, 10.0)


# ---- The window ----


@pytest.mark.parametrize(
    ("sent_at_s", "latency_ms", "counts"),
    [
        (-1.0, 999.0, False),  # completes just before
        (-1.0, 1000.0, True),  # sent in the warm-up, completes at 0
        (9.0, 999.0, True),
        (9.0, 1000.0, False),  # completes at the end, which is outside
        (9.5, 60_000.0, False),  # in flight at the end, completes in the drain
        (-50.0, 70_000.0, False),  # in flight throughout
        (10.0, 0.0, False),
    ],
)
def test_a_request_counts_where_it_completes(sent_at_s: float, latency_ms: float, counts: bool) -> None:
    for ok in (True, False):
        found = metrics_of(table(sent_at_s=[sent_at_s], latency_ms=[latency_ms], ok=[ok]))
        assert found["num_successful"] == (counts and ok)
        assert found["num_failed"] == (counts and not ok)


def test_open_loop_latency_counts_from_the_intended_send() -> None:
    # Intended at 8 s, sent a second late, replied 0.5 s after that: completes at 9.5 s, not at 10.5 s.
    samples = table(sent_at_s=[9.0], intended_at_s=[8.0], latency_ms=[1500.0])
    assert metrics_of(samples)["num_successful"] == 1
    assert in_flight_mean(samples, 10.0) == pytest.approx(0.05)


@pytest.mark.parametrize("latency_ms", [None, 0.0, 60_000.0])
def test_unfinished_is_a_failure_if_sent_before_the_end(latency_ms: float | None) -> None:
    sent = [-3.0, 1.0, 9.999, 10.0]
    samples = table(sent_at_s=sent, latency_ms=[latency_ms] * 4, ok=[False] * 4, error=["unfinished"] * 4)
    assert metrics_of(samples)["num_failed"] == 3  # and once each, whatever their latency says
    assert in_flight_mean(samples, 10.0) == pytest.approx((10 + 9 + 0.001) / 10)


def test_a_failure_without_latency_counts_when_sent() -> None:
    samples = table(sent_at_s=[-0.1, 5.0], latency_ms=[None, None], ok=[False, False], error=["refused"] * 2)
    assert metrics_of(samples)["num_failed"] == 1


@given(
    st.lists(
        st.tuples(st.floats(-20, 20), st.floats(0, 30_000), st.sampled_from(["ok", "HTTP 500", "unfinished"])),
        max_size=40,
    )
)
def test_counts_and_in_flight_agree_with_a_plain_loop(rows: list[tuple[float, float, str]]) -> None:
    succeeded = failed = 0
    overlap = 0.0
    for sent, latency, outcome in rows:
        end = float("inf") if outcome == "unfinished" else sent + latency / 1000
        if outcome == "unfinished":
            failed += sent < 10
        elif 0 <= end < 10:
            succeeded += outcome == "ok"
            failed += outcome != "ok"
        overlap += max(0.0, min(end, 8.0) - max(sent, 3.0))
    samples = table(
        sent_at_s=[row[0] for row in rows],
        latency_ms=[row[1] for row in rows],
        ok=[row[2] == "ok" for row in rows],
        error=[None if row[2] == "ok" else row[2] for row in rows],
    )
    found = metrics_of(samples)
    assert (found["num_successful"], found["num_failed"]) == (succeeded, failed)
    assert found["throughput_rps"] == succeeded / 10
    assert found["error_ratio"] == (failed / (failed + succeeded) if rows and failed + succeeded else None)
    assert in_flight_mean(samples, 8.0, 3.0) == pytest.approx(overlap / 5, abs=1e-9)


def test_nothing_measured_is_none_not_zero() -> None:
    found = metrics_of(empty(), latency_p99_ms=5.0)
    assert found.pop("num_successful") == found.pop("num_failed") == 0
    assert found.pop("throughput_rps") == found.pop("goodput_rps") == 0
    assert set(found.values()) == {None}


def test_metrics_are_summary_columns_of_plain_types() -> None:
    found = metrics_of(table(sent_at_s=np.linspace(0, 9, 50), num_output_tokens=[3] * 50), latency_p99_ms=5.0)
    columns = list(keys(SummaryRow))
    assert list(found) == columns[columns.index("num_successful") : columns.index("tpot_p99_ms") + 1]
    assert {type(value) for value in found.values()} <= {int, float, type(None)}


# ---- Tokens and SLOs ----


def test_token_throughput_is_over_successes_and_none_if_never_told() -> None:
    samples = table(
        sent_at_s=[1.0, 2.0, 3.0, -5.0],
        ok=[True, True, False, True],
        num_output_tokens=pa.array([2**31 - 1, 2**31 - 1, 7, 9], pa.int32()),  # the sum needs 64 bits
    )
    found = metrics_of(samples)
    assert found["output_throughput_tok_per_s"] == 2 * (2**31 - 1) / 10
    assert found["input_throughput_tok_per_s"] is None
    partly = metrics_of(table(sent_at_s=[1.0, 2.0], num_input_tokens=[None, 30]))
    assert partly["input_throughput_tok_per_s"] == 3.0


def test_goodput_needs_every_slo_of_a_request() -> None:
    samples = table(
        sent_at_s=[1.0] * 6,
        latency_ms=[100.0, 101.0, 50.0, 50.0, 50.0, 1.0],
        ttft_ms=[10.0, 10.0, 11.0, 10.0, 10.0, 1.0],
        tpot_ms=[2.0, 2.0, 2.0, 3.0, None, 1.0],  # null: one token
        ok=[True] * 5 + [False],
    )
    assert metrics_of(samples)["goodput_rps"] is None
    assert metrics_of(samples, latency_p99_ms=100.0)["goodput_rps"] == 0.4
    assert metrics_of(samples, latency_p99_ms=100.0, ttft_p99_ms=10.0)["goodput_rps"] == pytest.approx(0.3)
    every = {"latency_p99_ms": 100.0, "ttft_p99_ms": 10.0, "tpot_p99_ms": 2.0}
    assert metrics_of(samples, **every)["goodput_rps"] == 0.2  # the first, and the one of one token


def test_a_missing_ttft_misses_its_slo_and_a_missing_column_cannot_be_judged() -> None:
    assert metrics_of(table(sent_at_s=[1.0, 1.0], ttft_ms=[1.0, None]), ttft_p99_ms=5.0)["goodput_rps"] == 0.1
    assert metrics_of(table(sent_at_s=[1.0, 1.0]), ttft_p99_ms=5.0)["goodput_rps"] is None


def test_an_unknown_slo_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"latency_ms.*available: latency_p99_ms"):
        compute_metrics(empty(), 10.0, {"latency_ms": 5.0})


# ---- Drift ----


def _poisson(rng: np.random.Generator, num_requests: int, duration_s: float = 30.0) -> pa.Table:
    return table(sent_at_s=rng.uniform(0, duration_s, rng.poisson(num_requests)))


@pytest.mark.parametrize(("num_requests", "allowed"), [(100, 0.09), (3000, 0.01)])
def test_drift_is_rarely_seen_in_stationary_noise(num_requests: int, allowed: float) -> None:
    rng = np.random.default_rng(7)
    trends = [drift(_poisson(rng, num_requests), 30.0) for _ in range(400)]
    seen = [t for t in trends if t and abs(t.ratio) > 0.2 and not t.ci_low <= 0 <= t.ci_high]
    assert len(seen) / 400 <= allowed


def test_drift_recovers_a_known_trend() -> None:
    # Rate 1 + 0.4 (t/T - 1/2): inverse of its cumulative 0.8 u + 0.2 u^2, by quadratic formula.
    v = (np.arange(20_000) + 0.5) / 20_000
    sent = 30 * (-0.8 + np.sqrt(0.64 + 0.8 * v)) / 0.4
    trend = drift(table(sent_at_s=sent, latency_ms=np.zeros(20_000)), 30.0)
    assert trend is not None
    assert trend.ratio == pytest.approx(0.4, abs=0.005)
    assert 0.38 < trend.ci_low <= trend.ratio <= trend.ci_high < 0.42


def test_drift_interval_is_the_textbook_one() -> None:
    rng = np.random.default_rng(3)
    counts = rng.poisson(40, 20)
    sent = np.repeat(np.arange(20) + 0.5, counts)
    trend = drift(table(sent_at_s=sent, latency_ms=np.zeros(len(sent))), 20.0)
    fit = scipy.stats.linregress(np.arange(20), counts)
    half = scipy.stats.t.ppf(0.975, 18) * fit.stderr
    expected = np.array([fit.slope, fit.slope - half, fit.slope + half]) * 20 / counts.mean()
    assert trend == pytest.approx(tuple(expected), rel=1e-6)


def test_drift_is_of_successes_in_the_window_only() -> None:
    assert drift(empty(), 10.0) is None
    assert drift(table(sent_at_s=[1.0], ok=[False]), 10.0) is None
    # All but 10 s round their last instant up to slice 20.
    for duration_s in (10.0, 13.0, 25.0, 50.0):
        late = np.nextafter(duration_s, 0)
        last = drift(table(sent_at_s=[late], latency_ms=[0.0]), duration_s)
        assert last == drift(table(sent_at_s=[0.99 * duration_s], latency_ms=[0.0]), duration_s)


# ---- Validity ----

THRESHOLDS = {
    "max_error_ratio": 0.01,
    "max_window_shortfall_ratio": 0.02,
    "max_drift_ratio": 0.2,
    "min_offered_ratio": 0.95,
    "min_in_flight_ratio": 0.95,
    "max_client_cpu_ratio": 0.9,
    "max_client_lag_ratio": 0.05,
}
CLIENT = {"window_s": 10.0, "all_clients_started_at_s": -1.0, "cpu_ratio": 0.5, "lag_p50_ms": 0.1, "num_task_errors": 0}
SERVER: dict[str, list[str]] = {"restarted": [], "failed": [], "actors": ["proxy"]}


def closed_loop(num_clients: int = 4, busy_ratio: float = 1.0, end_s: float = 12.0) -> dict[str, np.ndarray]:
    """Clients that send every 10 ms from -1 s, each in flight for `busy_ratio` of the time."""
    sent = np.tile(np.arange(-1, end_s, 0.01), num_clients)
    return {"sent_at_s": sent, "latency_ms": np.full(len(sent), 10 * busy_ratio)}


def judge(
    samples: pa.Table,
    *,
    concurrency: int | None = 4,
    client: Mapping[str, Any] = CLIENT,
    server: Mapping[str, Any] | None = SERVER,
) -> Validity:
    evidence = Evidence(
        samples=samples,
        metrics=compute_metrics(samples, 10.0, NO_SLO),
        concurrency=concurrency,
        duration_s=10.0,
        client=ClientFacts(**client),
        server=ServerFacts(**(server or {})),
    )
    return check_validity(evidence, THRESHOLDS)


def failing(ratio: float) -> pa.Table:
    """A closed loop of which the given ratio of requests fails, evenly over time."""
    columns = closed_loop()
    n = len(columns["sent_at_s"])
    ok = ((np.arange(n) + 0.5) * ratio) % 1 < 1 - ratio
    return table(**columns, ok=ok, error=np.where(ok, None, "HTTP 500"))


def trending(ratio: float) -> pa.Table:
    """4,000 instant successes in open loop, whose rate changes by `ratio` of its mean over the window."""
    v = (np.arange(4000) + 0.5) / 4000
    b = 1 - ratio / 2
    sent = 10 * (-b + np.sqrt(b * b + 2 * ratio * v)) / ratio
    return table(sent_at_s=sent, latency_ms=np.full(4000, 1e-6))


BREACHES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # code, a breach, a near miss that must pass every rule
    ("error_ratio", {"samples": failing(0.012)}, {"samples": failing(0.008)}),
    (
        "no_success",
        {"samples": failing(1.0), "client": CLIENT | {"lag_p50_ms": None}},
        {"samples": failing(0.005)},
    ),
    (
        "window_cut_short",
        {"client": CLIENT | {"window_s": 9.79}},
        {"client": CLIENT | {"window_s": 9.81}},
    ),
    (
        "ramp_in_window",
        {"client": CLIENT | {"all_clients_started_at_s": 0.001}},
        {"client": CLIENT | {"all_clients_started_at_s": 0.0}},
    ),
    (
        "drift",
        {"samples": trending(-0.22), "concurrency": None, "client": CLIENT | {"lag_p50_ms": 0.0}},
        {"samples": trending(-0.18), "concurrency": None, "client": CLIENT | {"lag_p50_ms": 0.0}},
    ),
    (
        "in_flight",
        {"samples": table(**closed_loop(busy_ratio=0.94))},
        {"samples": table(**closed_loop(busy_ratio=0.96))},
    ),
    ("replica_restart", {"server": SERVER | {"restarted": ["echo#1"]}}, {"server": SERVER}),
    ("actor_failed", {"server": SERVER | {"failed": ["echo#1"]}}, {"server": SERVER}),
    ("task_error", {"client": CLIENT | {"num_task_errors": 1}}, {"client": CLIENT}),
    (
        "offered_rate",
        {"client": CLIENT | {"offered_rps": 100.0, "sent_rps": 94.9}},
        {"client": CLIENT | {"offered_rps": 100.0, "sent_rps": 95.0}},
    ),
    ("client_cpu", {"client": CLIENT | {"cpu_ratio": 0.91}}, {"client": CLIENT | {"cpu_ratio": 0.9}}),
    ("client_lag", {"client": CLIENT | {"lag_p50_ms": 0.51}}, {"client": CLIENT | {"lag_p50_ms": 0.49}}),
]


def test_every_code_is_tried() -> None:
    assert sorted([*(code for code, _, _ in BREACHES), "no_samples"]) == sorted(rule.code for rule in RULES)


def test_every_limit_is_a_key_of_the_config_and_none_is_left_over() -> None:
    config = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text(encoding="utf-8"))
    limits = [rule.limit for rule in RULES if rule.limit is not None]
    assert sorted(limits) == sorted(config["validity"])


def test_a_rule_is_a_function_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged against its own limit, told in its sentence, and a row of the documents."""

    def slow(it: Evidence, limit: float) -> Answer:
        if it.metrics.latency_mean_ms is None:
            return Unbroken.unknown
        if it.concurrency is None:
            return Unbroken.not_applicable
        return (
            f"{it.metrics.latency_mean_ms:g} ms > {limit:g} ms"
            if it.metrics.latency_mean_ms > limit
            else Unbroken.passed
        )

    rule = Rule(code="slow", kind=TroubleKind.noise, limit="max_ms", meaning="slower than max_ms", check=slow)
    monkeypatch.setattr(validity, "RULES", (*RULES, rule))
    monkeypatch.setattr(document, "RULES", (*RULES, rule))
    monkeypatch.setitem(THRESHOLDS, "max_ms", 9.5)
    found = judge(table(**closed_loop()))
    assert (found.reasons, found.details, found.unchecked) == (["slow"], {"slow": "10 ms > 9.5 ms"}, [])
    assert judge(table(**closed_loop()), concurrency=None).valid
    assert "slow" in judge(empty()).unchecked
    assert "| `slow` | noise | `max_ms` | slower than max_ms |\n" in with_tables(README.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("code", "breach", "near_miss"), BREACHES, ids=[case[0] for case in BREACHES])
def test_a_breach_gives_its_code_alone_and_a_near_miss_none(
    code: str, breach: dict[str, Any], near_miss: dict[str, Any]
) -> None:
    good = {"samples": table(**closed_loop())}
    found = judge(**(good | breach))
    assert found.reasons == [code]
    assert not found.valid
    assert list(found.details) == [code]
    assert re.search(r"\d", found.details[code]), "a detail states the measured figure"
    passed = judge(**(good | near_miss))
    assert passed.valid
    assert (passed.reasons, passed.unchecked, passed.details) == ([], [], {})


def test_no_samples_is_one_code_and_the_rest_unchecked() -> None:
    # Nothing at all; and four requests that outlast the window and complete in the drain.
    for samples in (empty(), table(sent_at_s=[-1.0] * 4, latency_ms=[12_000.0] * 4)):
        found = judge(samples)
        assert found.reasons == ["no_samples"]
        assert found.unchecked == ["error_ratio", "drift", "in_flight", "client_lag"]
    assert judge(table(sent_at_s=[-1.0] * 4, latency_ms=[10_500.0] * 4)).reasons == []


def test_load_that_stops_early_is_cut_short_whatever_the_client_says() -> None:
    assert "window_cut_short" in judge(table(**closed_loop(end_s=8.9))).reasons
    assert "window_cut_short" in judge(table(**closed_loop(end_s=8.9)), concurrency=None).reasons
    assert "window_cut_short" not in judge(table(**closed_loop(end_s=9.1))).reasons


def test_long_latencies_are_not_a_short_window() -> None:
    """Completions stop at 5 s, load does not: the next ones are in flight to 15 s, or hang for good."""
    sent = np.repeat([-5.0, 5.0], 4)
    assert judge(table(sent_at_s=sent, latency_ms=[10_000.0] * 8)).reasons == []
    hung = table(
        sent_at_s=sent,
        latency_ms=[10_000.0] * 4 + [None] * 4,
        ok=[True] * 4 + [False] * 4,
        error=[None] * 4 + ["unfinished"] * 4,
    )
    assert judge(hung).reasons == ["error_ratio"]


def test_a_sparse_open_loop_may_idle_at_the_end() -> None:
    samples = table(sent_at_s=np.linspace(0, 8.5, 20), latency_ms=[10.0] * 20)
    assert "window_cut_short" not in judge(samples, concurrency=None).reasons


@pytest.mark.parametrize("missing", [{}, dict.fromkeys(CLIENT)])
def test_what_a_backend_cannot_tell_is_unchecked(missing: dict[str, None]) -> None:
    found = judge(table(**closed_loop()), client=missing, server=None)
    assert found.valid
    assert found.unchecked == [
        "window_cut_short",
        "ramp_in_window",
        "task_error",
        "client_cpu",
        "client_lag",
        "replica_restart",
        "actor_failed",
    ]
    assert judge(table(**closed_loop()), server={"failed": []}).unchecked == ["replica_restart"]


def test_in_flight_does_not_apply_in_open_loop() -> None:
    found = judge(table(**closed_loop(busy_ratio=0.5)), concurrency=None)
    assert (found.reasons, found.unchecked) == ([], [])


def test_several_breaches_are_all_told() -> None:
    found = judge(table(**closed_loop(busy_ratio=0.5)), client=CLIENT | {"cpu_ratio": 1.0}, server={"failed": ["a"]})
    assert found.reasons == ["in_flight", "client_cpu", "actor_failed"]
    assert found.unchecked == ["replica_restart"]


# ---- Files ----


def test_samples_round_trip_below_an_arm_that_looks_like_a_partition(tmp_path: Path) -> None:
    path = tmp_path / "env.X=1" / "samples.parquet"
    path.parent.mkdir()
    samples = table(sent_at_s=[1.0, 2.0], ok=[True, False], error=[None, "refused"])
    write_samples(path, samples)
    assert read_samples(path).equals(samples)
    assert [entry.name for entry in path.parent.iterdir()] == ["samples.parquet"]
    write_samples(path, empty())
    assert read_samples(path).num_rows == 0


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    write_samples(path, table(**closed_loop()))
    whole = path.read_bytes()
    for kept in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"samples\.parquet is not a readable"):
            read_samples(path)


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    rng = np.random.default_rng(0)
    write_samples(path, table(sent_at_s=rng.uniform(0, 10, 5000), latency_ms=rng.lognormal(3, 1, 5000)))
    damaged = bytearray(path.read_bytes())
    damaged[20_000] ^= 0xFF  # within the values of the first column
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"samples\.parquet is not a readable"):
        read_samples(path)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_samples(tmp_path / "samples.parquet")


def test_other_columns_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    pq.write_table(table(sent_at_s=[1.0]).rename_columns({"ttft_ms": "ttft_s"}), path)
    with pytest.raises(ValueError, match=r"samples\.parquet.*missing.*ttft_ms.*unexpected.*ttft_s"):
        read_samples(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sent_at_s": [None]}, "sent_at_s"),
        ({"sent_at_s": [1.0], "ok": [None]}, "without ok"),
        ({"sent_at_s": [1.0], "latency_ms": [-1.0]}, "negative"),
        ({"sent_at_s": [1.0], "latency_ms": [float("nan")]}, "latency_ms that is not finite"),
        ({"sent_at_s": [1.0], "ttft_ms": [float("nan")]}, "ttft_ms that is not finite"),
        ({"sent_at_s": [float("inf")]}, "sent_at_s that is not finite"),
        ({"sent_at_s": [1.0], "latency_ms": [None]}, "successful request without latency_ms"),
    ],
)
def test_rows_that_would_be_miscounted_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = tmp_path / "samples.parquet"
    with pytest.raises(ValueError, match=message):
        write_samples(path, table(**columns))
    assert not list(tmp_path.iterdir())


def test_json_round_trips_and_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    write_json(path, {"latency_p99_ms": None, "arm": "é"})
    assert path.read_text(encoding="utf-8").endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"latency_p99_ms": float("nan")})
    assert read_json(path) == {"latency_p99_ms": None, "arm": "é"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["trial.json"]
    path.write_text('{"half": ')
    with pytest.raises(ValueError, match=r"trial\.json is not valid JSON"):
        read_json(path)


# ---- Summary ----


def _trial() -> TrialRecord:
    samples = table(**closed_loop())
    return trial_record(
        planned_row(),
        started_at="2026-11-21T03:00:00+00:00",
        duration_s=10.0,
        client=ClientFacts(cpu_ratio=0.5, latency_resolution_ms=0.0),
        metrics=compute_metrics(samples, 10.0, NO_SLO),
        valid=False,
        invalid_reasons=["drift", "client_cpu"],
        unchecked=["actor_failed"],
        notes=["single_run"],
    )


def test_summary_files_have_exactly_the_columns_in_order(tmp_path: Path) -> None:
    planned = planned_row(arm="a,b")
    complete = planned.completed(_trial())
    write_summary(tmp_path, [planned, complete])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["summary.csv", "summary.parquet"]
    stored = pq.ParquetFile(tmp_path / "summary.parquet").read()
    assert stored.column_names == list(keys(SummaryRow))
    first, second = stored.to_pylist()
    assert (first["state"], second["state"]) == ("planned", "complete")
    assert first["valid"] is None
    assert first["throughput_rps"] is None
    assert second["invalid_reasons"] == "drift;client_cpu"
    assert second["notes"] == "single_run;unchecked:actor_failed"
    assert second["throughput_rps"] == pytest.approx(400)
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(keys(SummaryRow))
    assert rows[1]["arm"] == "a,b"
    assert float(rows[1]["latency_p99_ms"]) == second["latency_p99_ms"]


def test_what_was_swept_has_columns_of_its_own_after_the_others() -> None:
    rows = [planned_row(swept={"workload.num_replicas": "2"}), planned_row(swept={"model": "a=b, c"}), planned_row()]
    found = summary_table(rows)
    assert found.column_names == [*keys(SummaryRow), "workload.num_replicas", "model"]
    assert found["workload.num_replicas"].to_pylist() == ["2", None, None]
    assert found["model"].to_pylist() == [None, "a=b, c", None]


def test_an_empty_summary_has_its_columns() -> None:
    assert summary_table([]).column_names == list(keys(SummaryRow))


def test_wrong_types_are_refused() -> None:
    with pytest.raises(ValueError, match="double"):
        summary_table([planned_row(throughput_rps="fast")])
    with pytest.raises(ValueError, match="bool"):
        summary_table([planned_row(valid="yes")])


def test_what_is_read_is_checked(tmp_path: Path) -> None:
    path, trial = tmp_path / "trial.json", _trial()
    write_json(path, trial)
    assert read(TrialRecord, path) == dataclasses.replace(trial, invalid_reasons=[*trial.invalid_reasons])
    content = read_json(path)
    write_json(path, content | {"metrics": content["metrics"] | {"throughput_rps": "400"}})
    with pytest.raises(ValueError, match=r"trial\.json is not as we write it: metrics\.throughput_rps: .*number"):
        read(TrialRecord, path)
    del content["client"], content["valid"]
    write_json(path, content)
    with pytest.raises(ValueError, match=r"client: Field required; valid: Field required"):
        read(TrialRecord, path)
    write_json(path, content | {"schema_version": 2})
    with pytest.raises(ValueError, match="schema 2, this code reads 1"):
        read(TrialRecord, path)
    write_json(path, [])
    with pytest.raises(ValueError, match="schema None"):
        read(TrialRecord, path)


def test_summary_columns_are_those_of_the_design() -> None:
    expected = (
        "run_id arm trial_id repeat state workload profile cluster service_key load_mode concurrency "
        "offered_rps duration_s num_successful num_failed error_ratio throughput_rps goodput_rps "
        "input_throughput_tok_per_s output_throughput_tok_per_s "
        "latency_mean_ms latency_p50_ms latency_p90_ms latency_p95_ms latency_p99_ms latency_p999_ms "
        "ttft_mean_ms ttft_p50_ms ttft_p99_ms tpot_mean_ms tpot_p50_ms tpot_p99_ms "
        "latency_resolution_ms client_cpu_ratio valid invalid_reasons notes num_replicas started_at"
    )
    assert list(keys(SummaryRow)) == expected.split()


# ---- Documentation ----


def test_readme_is_made_of_the_types() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run python -m orchestrator.results.document outputs/README.md"
    with pytest.raises(ValueError, match=r"no table under 'trial.json'"):
        with_tables(text.replace("## trial.json", "## trials.json"))


def test_every_key_has_a_sentence() -> None:
    for record in dict.fromkeys(TABLES.values()):
        for key in dataclasses.fields(record):
            assert key.name in keys(record) or (record, key.name) == (SummaryRow, "swept"), (record, key.name)


def test_cells_are_written_as_documented() -> None:
    assert list(cells_frame([]).columns) == list(keys(ComparisonRow))


@pytest.mark.parametrize(("num_bunched", "bunched"), [(0, False), (10, False), (11, True), (100, True)])
def test_bunched_tokens(num_bunched: int, bunched: bool) -> None:
    tpot_ms = [0.003] * num_bunched + [3.0] * (100 - num_bunched)
    rows = [
        {"sent_at_s": 1.0, "latency_ms": 50.0, "ttft_ms": 40.0, "tpot_ms": value_ms, "ok": True, "client_process": 0}
        for value_ms in tpot_ms
    ]
    assert tokens_are_bunched(pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA), 10.0) is bunched

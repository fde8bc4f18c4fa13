"""What does the analysis cost at ten million requests a side?

Prints ratios measured in one run. The unit is reading the same two Parquet files and taking one `numpy.percentile` of
each.

    python -m benchmarks.analysis_scale [--requests 10000000]
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis import compare, load
from orchestrator.paths import RunPaths
from orchestrator.results.records import SummaryRow, TrialRecord, read, write_json, write_summary
from orchestrator.results.samples import SAMPLES_SCHEMA, compute_metrics, read_samples, write_samples
from tests.runs import make_run

DURATION_S = 4.0  # of the windows that make_run writes; requests are only packed more densely


def timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def crowd(paths: RunPaths, arm: str, speed: float, num_requests: int, rng: np.random.Generator) -> None:
    """Replace the requests of the arm's first trial by `num_requests`, with a record to match."""
    columns = {field.name: pa.nulls(num_requests, field.type) for field in SAMPLES_SCHEMA} | {
        "sent_at_s": np.sort(rng.uniform(-0.5, DURATION_S - 0.1, num_requests)),
        "latency_ms": rng.lognormal(np.log(20 / speed), 0.3, num_requests),
        "ok": np.ones(num_requests, dtype=bool),
        "client_process": np.zeros(num_requests, dtype=np.int16),
    }
    table = pa.table(columns, schema=SAMPLES_SCHEMA)
    write_samples(paths.samples(arm, "c0016", 0), table)
    trial_json = paths.trial_json(arm, "c0016", 0)
    metrics = compute_metrics(table, DURATION_S, {"latency_p99_ms": 500})
    trial = dataclasses.replace(read(TrialRecord, trial_json), metrics=metrics)
    write_json(trial_json, trial)
    rows = [SummaryRow(**row) for row in pq.ParquetFile(paths.summary_parquet).read().to_pylist()]
    write_summary(paths.root, [row.completed(trial) if row.arm == arm else row for row in rows])


def percentile_of(path: Path) -> float:
    return float(np.percentile(pq.ParquetFile(path).read()["latency_ms"].to_numpy(), 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=10_000_000)
    options = parser.parse_args()
    speeds = {"baseline": 20.0, "optimized": 30.0}
    with tempfile.TemporaryDirectory() as folder:
        paths = make_run(Path(folder) / "big", speeds, levels=[16], repeats=1)
        for arm, speed in speeds.items():
            crowd(paths, arm, speed, options.requests, np.random.default_rng(0))
        files = [paths.samples(arm, "c0016", 0) for arm in speeds]
        unit_s = min(timed(lambda: [percentile_of(path) for path in files]) for _ in range(3))
        tables = [read_samples(path) for path in files]
        metrics_s = timed(lambda: [compute_metrics(table, DURATION_S, {}) for table in tables])
        tables.clear()
        compare_s = timed(lambda: compare.compare_run(load.load_run(paths.root)))
        print(f"{options.requests:,} requests a side; unit: read both files and take one percentile of each")
        print(f"  metrics of both, once read      {metrics_s / unit_s:5.2f}x")
        print(f"  compare (read, check, judge)    {compare_s / unit_s:5.2f}x  ({compare_s:.1f} s)")


if __name__ == "__main__":
    main()

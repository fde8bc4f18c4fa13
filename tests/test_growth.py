"""A new cluster, client, level rule and observer are one file and one YAML each: tests/growth, and nothing of ours.

Real: the command as a user types it, Python's own HTTP server, wrk.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.serial

CHOICES = ["cluster=static_files", "client=wrk", "workload=http", "sweep=until_slow", "observe=[host,connections]"]


def command(outputs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    ours = [sys.executable, "-m", "orchestrator", "--config-dir", "tests/growth/conf", f"outputs={outputs}"]
    return subprocess.run([*ours, *CHOICES, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_kinds_of_others_are_run_by_the_command(tmp_path: Path) -> None:
    # Above the limit at the first level, so the arm is done after it; never above it, so it goes up all of them.
    done = command(tmp_path, "sweep.load.max_p99_ms=0.001,60000")
    assert done.returncode in (0, 3), done.stdout + done.stderr
    (run,) = tmp_path.iterdir()
    rows = pq.ParquetFile(run / "summary.parquet").read().to_pylist()
    levels = {arm: [row["concurrency"] for row in rows if row["arm"] == arm] for arm in {row["arm"] for row in rows}}
    assert levels == {"max_p99_ms=0.001": [1], "max_p99_ms=60000": [1, 2, 4]}
    assert {row["state"] for row in rows} == {"complete"}
    for row in rows:
        trial = json.loads((run / row["arm"] / "trials" / row["trial_id"] / "trial.json").read_text())
        assert row["num_successful"] == pytest.approx(row["throughput_rps"] * row["duration_s"])
        assert row["num_successful"] > 0
        assert trial["observed"]["connections"]["most_connections"] >= row["concurrency"]
        assert trial["observed"]["host"]["cpu_s"]["client"] > 0
    assert json.loads((run / "run.json").read_text())["status"] == "complete"

    # A record is not believed: what it names is imported only where the user says so.
    (run / "summary.csv").unlink()
    resume = [sys.executable, "-m", "orchestrator", f"resume={run}"]
    refused = subprocess.run(resume, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "code that is not ours" in refused.stderr
    assert "trust=tests.growth" in refused.stderr
    again = subprocess.run([*resume, "trust=tests.growth"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode in (0, 3), again.stdout + again.stderr
    assert (run / "summary.csv").exists()


def test_their_keys_are_checked_as_ours(tmp_path: Path) -> None:
    refused = {
        "cluster.file_bytes=many": "cluster.file_bytes",
        "+cluster.files=2": "cluster.files is no key of cluster; nearest: file_bytes",
        "sweep.load.max_p99_ms=0": "sweep.load.max_p99_ms must be a number above 0, found 0",
        "observe.connections.interval_s=-1": "observe.connections.interval_s must be a number above 0, found -1",
        "client._target_=tests.growth.wrk.Wark": "tests.growth.wrk has no Wark; nearest: Wrk",
        "cluster._target_=tests.growth.nowhere.X": "there is no module tests.growth.nowhere",
    }
    for override, says in refused.items():
        done = command(tmp_path, override)
        assert done.returncode == 2, override
        assert says in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []

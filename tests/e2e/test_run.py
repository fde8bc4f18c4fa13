"""The whole command on real Ray Serve under real load, as a user types it.

Short windows: these tests ask whether the machinery tells the truth, not how fast anything is.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from orchestrator.clusters.local_ray import directory_prefix, is_claimed
from orchestrator.process import MARKER, members
from orchestrator.results import SUMMARY_COLUMNS

pytestmark = [pytest.mark.e2e, pytest.mark.serial]

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "sweep=quick",
    "sweep.repeats=1",
    "sweep.ramp_up_s=0.5",
    "sweep.warmup_s=1",
    "sweep.duration_s=4",
    "sweep.cooldown_s=0",
]
TIMEOUT_S = 600
CANARY = "canary-7f3a1c-do-not-write-me"


def start(outputs: Path, *overrides: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", f"outputs={outputs}", *overrides],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return output


def only_run(outputs: Path) -> Path:
    (run,) = outputs.iterdir()
    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def ours() -> list[psutil.Process]:
    """Live processes of any service of ours."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARKER):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def abandoned() -> set[str]:
    """Service directories that no live orchestrator holds (others may run on this machine), with their processes."""
    paths = Path(directory_prefix()).parent.glob(Path(directory_prefix()).name + "[0-9]*")
    return {f"{path}: {members(path)}" for path in paths if not is_claimed(path)}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = abandoned()
    yield
    assert abandoned() == before


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float = 300) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        assert process.poll() is None, f"ended early with {process.returncode}:\n{process.communicate()[0]}"
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"not within {timeout_s} s: {what}")


def under_load(outputs: Path) -> Callable[[], bool]:
    """The clients of the first trial have been started."""
    return lambda: any(outputs.glob("*/*/trials/*/client.log"))


@pytest.fixture(scope="module")
def flags_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """Baseline and optimized, started from a shell that exports Ray settings of its own."""
    outputs = tmp_path_factory.mktemp("flags")
    process = start(
        outputs,
        *SHORT,
        "profile=baseline,optimized",
        "sweep.concurrency=[2,4]",
        "-m",
        RAY_SERVE_ENABLE_HA_PROXY="1",
        RAY_ADDRESS="127.0.0.1:1",
        RAY_AUTH_TOKEN=CANARY,
    )
    output = finish(process)
    return only_run(outputs), output, process.returncode


def test_run_directory(flags_run: tuple[Path, str, int]) -> None:
    run, output, code = flags_run
    assert code in (0, 3), output
    record = read(run / "run.json")
    assert record["status"] == "complete"
    assert sorted(record["plan"]["trials"]) == sorted(
        f"{arm}/c000{level}-r0" for arm in ("baseline", "optimized") for level in (2, 4)
    )
    assert record["primary_cells"] == [
        {
            "axes": {},
            "baseline": "baseline",
            "candidate": "optimized",
            "metric": "throughput_rps",
            "level": "c0004",
        }
    ]
    summary = pq.read_table(run / "summary.parquet")
    assert summary.column_names == list(SUMMARY_COLUMNS)
    assert set(summary["state"].to_pylist()) == {"complete"}
    for row in summary.to_pylist():
        trial_dir = run / row["arm"] / "trials" / row["trial_id"]
        trial = read(trial_dir / "trial.json")
        samples = pq.read_table(trial_dir / "samples.parquet")
        assert samples.num_rows == trial["client"]["num_requests"] > 0
        assert row["num_failed"] == 0
        assert trial["unchecked"] == []
        assert row["num_successful"] == pytest.approx(row["throughput_rps"] * row["duration_s"])
        assert "colocated_client" in row["notes"]
    assert (run / "optimized" / ".hydra" / "config.yaml").exists()
    assert output.rstrip().endswith(str(run))


def test_flags_reached_the_service_and_only_the_declared_ones(flags_run: tuple[Path, str, int]) -> None:
    run, _, _ = flags_run
    baseline = read(run / "services/baseline/r0/effective.json")
    optimized = read(run / "services/optimized/r0/effective.json")
    assert optimized["listener"]["process"] == "haproxy"
    assert baseline["listener"]["process"].startswith("ray::ProxyActor")
    assert {"ServeController", "HAProxyManager", "ServeReplica"} <= {actor["kind"] for actor in optimized["actors"]}
    for actor in optimized["actors"]:
        assert actor["constants"]["RAY_SERVE_ENABLE_HA_PROXY"] is True, actor["name"]
        assert actor["constants"]["RAY_SERVE_USE_GRPC_BY_DEFAULT"] is True, actor["name"]
        assert actor["constants"]["RAY_SERVE_THROUGHPUT_OPTIMIZED"] is True, actor["name"]
        assert optimized["declared_env"].items() <= actor["env"].items()
    for actor in baseline["actors"]:
        assert actor["constants"]["RAY_SERVE_ENABLE_HA_PROXY"] is False, actor["name"]
        assert "RAY_SERVE_ENABLE_HA_PROXY" not in actor["env"]
    assert "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE" in optimized["consequences"]
    # Ray 2.60 has TCP_NODELAY on by default, so declaring it changes nothing; the user is told.
    assert ["RAY_SERVE_HAPROXY_TCP_NODELAY" in warning for warning in optimized["warnings"]] == [True]


def test_no_token_is_written(flags_run: tuple[Path, str, int]) -> None:
    run, output, _ = flags_run
    assert CANARY not in output
    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert CANARY.encode() not in content, path
            assert b"RAY_AUTH_TOKEN" not in content, path


def test_streaming_and_recsys(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="recsys needs torch: pip install '.[recsys]'")
    process = start(
        tmp_path,
        *SHORT,
        "workload=streaming,recsys",
        "profile=recsys_study",
        "sweep.concurrency=[4]",
        "workload.num_replicas=1",
        "-m",
    )
    output = finish(process)
    assert process.returncode in (0, 3), output
    run = only_run(tmp_path)
    rows = {row["arm"]: row for row in pq.read_table(run / "summary.parquet").to_pylist()}
    assert set(rows) == {"streaming", "recsys"}
    assert all(row["num_failed"] == 0 and row["num_successful"] > 0 for row in rows.values()), rows
    streaming = rows["streaming"]
    assert streaming["output_throughput_tok_per_s"] == pytest.approx(50 * streaming["throughput_rps"])
    assert 0 < streaming["ttft_mean_ms"] < streaming["latency_mean_ms"]
    assert rows["recsys"]["ttft_mean_ms"] is None


def test_killed_replica_makes_the_point_invalid_and_the_run_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, *SHORT, "sweep.concurrency=[2,4]", "sweep.duration_s=6")
    wait_for(under_load(tmp_path), process)
    time.sleep(5)  # into the window: the client starts, ramps up and warms up before it
    (replica,) = [each for each in ours() if each.name().startswith("ray::ServeReplica:unary:Echo")]
    replica.kill()
    output = finish(process)
    assert process.returncode == 3, output
    run = only_run(tmp_path)
    first = read(run / "baseline/trials/c0002-r0/trial.json")
    assert "replica_restart" in first["invalid_reasons"]
    assert "unary#Echo" in first["server"]["restarted"][0]
    second = read(run / "baseline/trials/c0004-r0/trial.json")
    assert "replica_restart" not in second["invalid_reasons"]
    assert second["metrics"]["num_successful"] > 0


def test_constructor_that_raises_is_shown_and_the_other_arm_is_measured(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        *SHORT,
        "sweep.concurrency=[2]",
        "workload.application.import_path=tests.e2e.broken_app:build,workloads.unary.app:build",
        "~workload.application.deployments",
        "+workload.application.deployments={}",
        "-m",
    )
    output = finish(process)
    assert process.returncode == 1, output
    assert "kaputt-4711" in output
    run = only_run(tmp_path)
    states = {row["arm"]: row["state"] for row in pq.read_table(run / "summary.parquet").to_pylist()}
    assert sorted(states.values()) == ["complete", "failed"]
    (broken,) = [arm for arm, state in states.items() if state == "failed"]
    failure = read(run / broken / "trials/c0002-r0/failure.json")
    assert failure["stage"] == "service"
    assert "kaputt-4711" in failure["error"]
    log_dir = run / failure["log"]
    assert any("kaputt-4711" in log.read_text(errors="replace") for log in log_dir.glob("*.log"))
    assert read(run / "run.json")["status"] == "failed"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_during_deployment(tmp_path: Path, signum: int, code: int) -> None:
    process = start(tmp_path, *SHORT)
    wait_for(lambda: any(each.name() == "raylet" for each in ours()), process)
    process.send_signal(signum)
    output = finish(process)
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert read(only_run(tmp_path) / "run.json")["status"] == "interrupted"


def test_interrupt_under_load_then_resume(tmp_path: Path) -> None:
    # Long enough that another command starts, looks and is refused while this one measures.
    process = start(tmp_path, *SHORT, "sweep.concurrency=[2,4]", "sweep.duration_s=20")
    wait_for(lambda: any(tmp_path.glob("*/*/trials/c0004-r0/client.log")), process)
    meanwhile = subprocess.run(
        [sys.executable, "-m", "orchestrator", f"resume={only_run(tmp_path)}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert meanwhile.returncode == 2
    assert "still being written" in meanwhile.stderr
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    run = only_run(tmp_path)
    assert read(run / "run.json")["status"] == "interrupted"
    assert f"resume={run}" in output.replace("\n", "")
    kept = run / "baseline/trials/c0002-r0/trial.json"
    before = kept.stat().st_mtime_ns if read(kept)["valid"] else None

    assert not any(run.rglob("*.attempt*"))

    again = subprocess.run(
        [sys.executable, "-m", "orchestrator", f"resume={run}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert again.returncode in (0, 3), again.stdout + again.stderr
    assert read(run / "run.json")["status"] == "complete"
    assert set(pq.read_table(run / "summary.parquet")["state"].to_pylist()) == {"complete"}
    assert (run / "baseline/trials/c0004-r0.attempt1").is_dir()
    if before is not None:
        assert kept.stat().st_mtime_ns == before


def test_interrupt_during_teardown_waits_for_its_end(tmp_path: Path) -> None:
    process = start(tmp_path, *SHORT, "sweep.concurrency=[2]")
    wait_for(lambda: any(tmp_path.glob("*/*/trials/*/trial.json")), process)
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:  # from the first moment of the teardown to its last
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    output = finish(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "already stopping" in output


def test_service_of_a_killed_orchestrator_ends_itself(tmp_path: Path) -> None:
    process = start(tmp_path, *SHORT)
    wait_for(under_load(tmp_path), process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while (ours() or clients()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert clients() == []
    assert ours() == []
    cleanup = [sys.executable, "-m", "orchestrator.cleanup", "--yes", str(tmp_path)]  # where Hydra wrote is left
    done = subprocess.run(cleanup, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "serve-orchestrator-" in done.stdout) == (0, True), done.stdout + done.stderr


def clients() -> list[int]:
    return [
        process.info["pid"]
        for process in psutil.process_iter(["pid", "cmdline"])
        if "orchestrator.clients.locust_worker" in (process.info["cmdline"] or [])
    ]


def test_two_orchestrators_and_a_foreign_ray_side_by_side(tmp_path: Path) -> None:
    short = tempfile.mkdtemp()  # Ray's UNIX sockets have no room for pytest's long paths
    foreign = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import ray, sys, time; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False); "
            "print('up', flush=True); sys.stdin.readline(); "
            "print(ray.get(ray.remote(lambda: 'alive').remote()), flush=True)",
        ],
        env={**os.environ, "RAY_AUTH_TOKEN": "0" * 32, "RAY_TMPDIR": short},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert foreign.stdout is not None
    try:
        assert foreign.stdout.readline() == "up\n"
        pair = [
            start(tmp_path / name, *SHORT, "sweep.concurrency=[2]", f"profile={name}")
            for name in ("baseline", "haproxy")
        ]
        outputs = [finish(process) for process in pair]
        assert [process.returncode in (0, 3) for process in pair] == [True, True], outputs
        for name, listener in (("baseline", "ray::ProxyActor"), ("haproxy", "haproxy")):
            effective = read(only_run(tmp_path / name) / f"services/{name}/r0/effective.json")
            assert effective["listener"]["process"].startswith(listener)
        answer, _ = foreign.communicate("go on\n", timeout=120)
        assert answer == "alive\n"
    finally:
        foreign.kill()
        foreign.wait()
        shutil.rmtree(short, ignore_errors=True)

"""The whole command on real Ray Serve under real load, as a user types it.

Short windows: these tests ask whether the machinery tells the truth, not how fast anything is.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from orchestrator.process import MARKER
from orchestrator.results.records import SummaryRow, keys
from tests.conftest import ROOT
from tests.e2e.command import CALM, SHORT, below, finish, nothing_is_left, only_run, read, start, wait_for
from tests.leaks import processes_with

__all__ = ["nothing_is_left"]  # a fixture that every test here uses

pytestmark = [pytest.mark.e2e, pytest.mark.serial]

CANARY = "canary-7f3a1c-do-not-write-me"


def under_load(outputs: Path) -> Callable[[], bool]:
    """The clients of the first trial have been started."""
    return lambda: any(outputs.glob("*/*/trials/*/client.log"))


@pytest.fixture(scope="module")
def flags_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """Baseline and optimized, started from a shell that exports Ray settings of its own.

    Without it nobody would notice that a flag does not reach Ray, or that the user's own shell reaches it.
    """
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
    assert summary.column_names == list(keys(SummaryRow))
    assert set(summary["state"].to_pylist()) == {"complete"}
    for row in summary.to_pylist():
        trial_dir = run / row["arm"] / "trials" / row["trial_id"]
        trial = read(trial_dir / "trial.json")
        samples = pq.read_table(trial_dir / "samples.parquet")
        assert samples.num_rows == trial["client"]["num_requests"] > 0
        assert row["num_failed"] == 0
        assert trial["unchecked"] == []
        cpu_s = trial["observed"]["host"]["cpu_s"]
        assert min(cpu_s[role] for role in ("client", "proxy", "replicas", "controller")) > 0, cpu_s
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


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """An arm whose constructor raises, and one that loses a replica under the first of its two levels."""
    outputs = tmp_path_factory.mktemp("broken")
    process = start(
        outputs,
        *SHORT,
        "sweep.concurrency=[2,4]",
        "sweep.duration_s=6",
        "workload.application.import_path=tests.e2e.broken_app:build,workloads.unary.app:build",
        "~workload.application.deployments",
        "+workload.application.deployments={}",
        "-m",
    )
    wait_for(under_load(outputs), process)
    time.sleep(5)  # into the window: the client starts, ramps up and warms up before it
    (replica,) = below(process, "ray::ServeReplica:unary:Echo")
    replica.kill()
    output = finish(process)
    return only_run(outputs), output, process.returncode


def test_killed_replica_makes_the_point_invalid_and_the_run_goes_on(broken_run: tuple[Path, str, int]) -> None:
    """Without it a figure of a service that was half dead would count."""
    run, _, _ = broken_run
    rows = pq.read_table(run / "summary.parquet").to_pylist()
    first, second = [row for row in rows if row["state"] == "complete"]
    assert (first["trial_id"], second["trial_id"]) == ("c0002-r0", "c0004-r0")
    first, second = [read(run / row["arm"] / "trials" / row["trial_id"] / "trial.json") for row in (first, second)]
    assert not first["valid"]
    assert "replica_restart" in first["invalid_reasons"]
    assert "unary#Echo" in first["server"]["restarted"][0]
    assert "replica_restart" not in second["invalid_reasons"]
    assert second["metrics"]["num_successful"] > 0


def test_constructor_that_raises_is_shown_and_the_other_arm_is_measured(broken_run: tuple[Path, str, int]) -> None:
    """Without it the user would be told that the service did not come up, and not why."""
    run, output, code = broken_run
    assert code == 1, output
    assert "kaputt-4711" in output
    states = {(row["arm"], row["state"]) for row in pq.read_table(run / "summary.parquet").to_pylist()}
    assert sorted(state for _, state in states) == ["complete", "failed"]
    (broken,) = [arm for arm, state in states if state == "failed"]
    for level in (2, 4):
        failure = read(run / broken / f"trials/c000{level}-r0/failure.json")
        assert failure["stage"] == "service"
        assert "kaputt-4711" in failure["error"]
    log_dir = run / failure["log"]
    assert any("kaputt-4711" in log.read_text(errors="replace") for log in log_dir.glob("*.log"))
    assert read(run / "run.json")["status"] == "failed"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_during_deployment(tmp_path: Path, signum: int, code: int) -> None:
    """Without it a Ray cluster that is half up could stay when its run is called off."""
    process = start(tmp_path, *SHORT)
    wait_for(lambda: below(process, "raylet"), process)
    process.send_signal(signum)
    output = finish(process)
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert read(only_run(tmp_path) / "run.json")["status"] == "interrupted"


def resume(run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestrator", f"resume={run}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_interrupted_under_load_and_in_the_teardown_then_resumed(tmp_path: Path) -> None:
    """One run: refused to a second command, interrupted, resumed, interrupted when all is measured, resumed.

    Without it a resumed run could measure again what it has, or lose it; an interrupted teardown could leave Ray.
    """
    process = start(tmp_path, *SHORT, *CALM, "sweep.concurrency=[2,4]", "sweep.duration_s=8")
    wait_for(under_load(tmp_path), process)
    run = only_run(tmp_path)
    meanwhile = resume(run)
    said = finish(meanwhile)
    assert meanwhile.returncode == 2, said
    assert "still being written" in said
    wait_for(lambda: (run / "baseline/trials/c0004-r0/client.log").exists(), process)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert read(run / "run.json")["status"] == "interrupted"
    assert f"resume={run}" in output.replace("\n", "")
    kept = run / "baseline/trials/c0002-r0/trial.json"
    assert read(kept)["valid"]
    before = kept.stat().st_mtime_ns
    assert not any(run.rglob("*.attempt*"))

    again = resume(run)
    second = run / "baseline/trials/c0004-r0"
    wait_for((second / "trial.json").exists, again)
    deadline = time.monotonic() + 30
    while again.poll() is None and time.monotonic() < deadline:  # from the first moment of the teardown to its last
        again.send_signal(signal.SIGINT)
        time.sleep(0.05)
    output = finish(again)
    assert again.returncode == 130, output
    assert "Traceback" not in output
    assert "already stopping" in output
    assert read(run / "run.json")["status"] == "interrupted"
    assert second.with_name("c0004-r0.attempt1").is_dir()

    last = resume(run)
    output = finish(last)
    assert last.returncode == 0, output
    assert read(run / "run.json")["status"] == "complete"
    assert set(pq.read_table(run / "summary.parquet")["state"].to_pylist()) == {"complete"}
    assert not second.with_name("c0004-r0.attempt2").exists()
    assert kept.stat().st_mtime_ns == before


def is_client(process: psutil.Process) -> bool:
    """A live one."""
    try:
        return "orchestrator.clients.locust_worker" in process.cmdline()
    except psutil.Error:
        return False


def test_service_of_a_killed_orchestrator_ends_itself(tmp_path: Path) -> None:
    """Without it a power cut, or `kill -9`, would leave Ray and the clients running."""
    process = start(tmp_path, *SHORT)
    wait_for(under_load(tmp_path), process)
    (raylet,) = below(process, "raylet")
    directory = raylet.environ()[MARKER]
    clients = wait_for(lambda: [each for each in below(process) if is_client(each)], process)
    process.kill()
    process.wait()

    def left() -> list[str]:
        return [str(client) for client in clients if is_client(client)] + processes_with(MARKER, directory)

    deadline = time.monotonic() + 60
    while left() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left() == []
    cleanup = [sys.executable, "-m", "orchestrator.cleanup", "--yes", str(tmp_path)]  # where Hydra wrote is left
    done = subprocess.run(cleanup, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "serve-orchestrator-" in done.stdout) == (0, True), done.stdout + done.stderr


PAIR = {"streaming": "baseline", "recsys": "recsys_study"}


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str, int]]:
    """Two orchestrators beside a Ray of somebody else: streaming and recsys, without and with HAProxy."""
    pytest.importorskip("torch", reason="recsys needs torch: pip install '.[recsys]'")
    directory = tmp_path_factory.mktemp("pair")
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
        pair = {
            workload: start(
                directory / workload, *SHORT, "sweep.concurrency=[4]", f"workload={workload}", f"profile={profile}"
            )
            for workload, profile in PAIR.items()
        }
        outputs = {workload: finish(process) for workload, process in pair.items()}
        answer, _ = foreign.communicate("go on\n", timeout=120)
        assert answer == "alive\n"
    finally:
        foreign.kill()
        foreign.wait()
        shutil.rmtree(short, ignore_errors=True)
    return {name: (only_run(directory / name), outputs[name], process.returncode) for name, process in pair.items()}


@pytest.mark.parametrize(("workload", "listener"), [("streaming", "ray::ProxyActor"), ("recsys", "haproxy")])
def test_two_orchestrators_and_a_foreign_ray_side_by_side(
    side_by_side: dict[str, tuple[Path, str, int]], workload: str, listener: str
) -> None:
    """Without it two runs on one machine could take each other's ports, or end each other's processes."""
    run, output, code = side_by_side[workload]
    assert code in (0, 3), output
    effective = read(run / f"services/{PAIR[workload]}/r0/effective.json")
    assert effective["listener"]["process"].startswith(listener)


@pytest.mark.parametrize("workload", PAIR)
def test_streaming_and_recsys(side_by_side: dict[str, tuple[Path, str, int]], workload: str) -> None:
    """Without it a workload could deploy and answer nothing that its client takes."""
    run, _, _ = side_by_side[workload]
    (row,) = pq.read_table(run / "summary.parquet").to_pylist()
    assert row["num_failed"] == 0
    assert row["num_successful"] > 0
    if workload == "streaming":
        assert row["output_throughput_tok_per_s"] == pytest.approx(50 * row["throughput_rps"])
        assert 0 < row["ttft_mean_ms"] < row["latency_mean_ms"]
    else:
        assert row["ttft_mean_ms"] is None

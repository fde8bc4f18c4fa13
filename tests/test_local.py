"""Parts of the local backend that need no Ray: flag names, isolation, claiming ports, finding processes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from orchestrator.child import ServiceSpec
from orchestrator.clusters import local
from orchestrator.clusters.base import ServiceName
from orchestrator.clusters.flags import check_flags
from orchestrator.clusters.local import _Claim, _Driver
from orchestrator.errors import ConfigError, ServiceError
from orchestrator.process import (
    MARKER,
    Interrupted,
    client_environment,
    end_members,
    interruptible,
    is_claimed,
    members,
    uninterrupted,
)
from tests.conftest import ROOT, Compose

SPEC = ServiceSpec(directory="none", log_dir="none", declared_env={}, cluster_env={})
NAME = ServiceName("so", "run", 0, "baseline", 0)
SLEEP = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    "name", ["RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_event_stats", "OMP_NUM_THREADS"]
)
def test_known_flags_pass(name: str) -> None:
    check_flags({name: "1"})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("RAY_SERVE_USE_GRPC_BY_DEFUALT", "RAY_SERVE_USE_GRPC_BY_DEFAULT"), ("RAY_event_stat", None)],
)
def test_unknown_flags_are_refused(name: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError, match=f"knows no flag {name}") as refused:
        check_flags({name: "1"})
    assert nearest is None or nearest in str(refused.value)


def test_calling_shell_does_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "RAY_ADDRESS",
        "RAY_SERVE_ENABLE_HA_PROXY",
        "LOCUST_HOST",
        "VLLM_USE_V1",
        "OMP_NUM_THREADS",
        "http_proxy",
    ):
        monkeypatch.setenv(name, "1")
    environment = client_environment()
    assert not [
        name for name in environment if name.startswith(("RAY_", "LOCUST_", "VLLM_", "OMP_")) or "proxy" in name
    ]
    assert environment["PATH"] == os.environ["PATH"]


def test_service_yaml_can_be_run_by_hand(compose: Compose) -> None:
    config = compose("profile=grpc")
    text = config.cluster.rendered(config, NAME)
    assert "#   RAY_SERVE_USE_GRPC_BY_DEFAULT=1 serve run service.yaml" in text
    (application,) = yaml.safe_load(text)["applications"]
    assert application["import_path"] == "workloads.unary.app:build"


def test_two_processes_claim_different_blocks() -> None:
    code = (
        "import sys; from orchestrator.clusters.local import _Claim\n"
        "claims = [_Claim() for _ in range(5)]\n"
        "print(*(claim.directory for claim in claims), flush=True); sys.stdin.readline()"
    )
    pair = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    directories: list[Path] = []
    try:
        for process in pair:
            assert process.stdout is not None
            directories += [Path(path) for path in process.stdout.readline().split()]
        assert len(set(directories)) == 10
        assert all(is_claimed(directory) for directory in directories)
        for process in pair:
            process.communicate("go\n")
        assert not any(is_claimed(directory) for directory in directories)
    finally:
        for process in pair:
            process.kill()
            process.wait()
        for directory in directories:
            directory.rmdir()


def test_a_taken_port_spoils_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.clusters.local._is_free", lambda port: port >= 31800)
    claim = _Claim()
    assert claim.base_port == 31800
    assert is_claimed(claim.directory)
    assert claim.release() == []
    assert not claim.directory.exists()


def test_a_service_is_stopped_once_and_says_what_is_left(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_driver_spec", lambda *_: ("code", SPEC))  # reads until its input ends, and ends
    config = compose()
    service = config.cluster.service(config, NAME, tmp_path, print)
    assert service.stop() is None  # nothing was there
    service.start()
    assert service._claim is not None
    assert service._driver is not None
    directory, driver = service._claim.directory, psutil.Process(service._driver.child.pid)
    assert directory.exists()
    release = _Claim.release
    monkeypatch.setattr(_Claim, "release", lambda claim: [*release(claim), "pid 4711"])
    left = service.stop()
    assert left == f"processes of the service would not end: pid 4711; log: {tmp_path}"
    assert not directory.exists()
    assert not driver.is_running()
    assert service.stop() == left


def test_a_driver_that_fails_when_asked_is_not_asked_again(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "from orchestrator.child import ServiceSpec, be_service\n"
        "be_service(ServiceSpec, lambda spec, on_status: {}, lambda spec: 1 / 0)\n"
    )
    env = client_environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    driver = _Driver("failing", replace(SPEC, directory=str(tmp_path / "none")), env, tmp_path / "driver.log")
    try:
        driver.start()
        assert driver.wait_ready(60, print) == {}
        with pytest.raises(ServiceError, match="division by zero"):
            driver.snapshot(60)
        with pytest.raises(ServiceError, match="exit code -9"):
            driver.snapshot(60)
    finally:
        driver.stop()


def spawn(*command: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", *command], env={**os.environ, **env}, start_new_session=True)


def test_members_are_found_by_marker_and_by_open_file(tmp_path: Path) -> None:
    ignores = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
    holds = f"import time; held = open({str(tmp_path / 'log')!r}, 'w'); time.sleep(60)"
    marked = {MARKER: str(tmp_path)}
    # Ray's agents overwrite their environment with their title; a person who reads the log has one.
    agent = subprocess.Popen([sys.executable, "-c", holds], env={}, start_new_session=True)
    mine = [spawn(ignores, **marked), spawn(grandchild, **marked), agent]
    other = spawn(holds, **{MARKER: str(tmp_path) + "-other"})
    try:
        deadline = time.monotonic() + 30
        while len(members(tmp_path)) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert {process.pid for process in mine} < {process.pid for process in members(tmp_path)}
        assert len(members(tmp_path)) == 4
        mine[0].send_signal(signal.SIGTERM)
        assert end_members(tmp_path) == []
        assert members(tmp_path) == []
        assert all(process.poll() is not None for process in mine)
        assert other.poll() is None
    finally:
        for process in [*mine, other]:
            process.kill()
            process.wait()


def test_an_interrupt_waits_for_the_end_of_a_teardown() -> None:
    reached = []

    def tear_down() -> None:
        with interruptible():
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
                reached.append("end of the teardown")
            reached.append("not reached")

    with pytest.raises(Interrupted) as interrupted:
        tear_down()
    assert reached == ["end of the teardown"]
    assert interrupted.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

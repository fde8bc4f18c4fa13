"""Running the command on real Ray Serve, and telling what it left behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.clusters.local import directory_prefix
from orchestrator.process import is_claimed, members
from tests.conftest import ROOT

SHORT = [
    "sweep=quick",
    "sweep.repeats=1",
    "sweep.ramp_up_s=0.5",
    "sweep.warmup_s=1",
    "sweep.duration_s=4",
    "sweep.cooldown_s=0",
]
# Whether the machine is busy is not the question here.
CALM = [
    *("validity.max_drift_ratio=9", "validity.max_client_lag_ratio=9", "validity.max_client_cpu_ratio=9"),
    *("validity.max_window_shortfall_ratio=0.9", "validity.min_in_flight_ratio=0.1"),
]
TIMEOUT_S = 600


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


def below(process: subprocess.Popen[str], name: str = "") -> list[psutil.Process]:
    """Its processes, Ray's among them, whose name begins like that: others may run Ray on this machine."""
    found = []
    with suppress(psutil.Error):
        for each in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if each.name().startswith(name):
                    found.append(each)
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

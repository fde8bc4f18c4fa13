"""The whole command on Anyscale: the real SDK, against a stand-in control plane."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.anyscale_standin import StandIn
from tests.conftest import ROOT
from tests.leaks import processes_with

pytest.importorskip("anyscale")

SHORT = [
    *("cluster=anyscale_1x", "workload=unary", "sweep=quick", "cluster.client_processes=1"),
    *("sweep.ramp_up_s=0.2", "sweep.warmup_s=0.5", "sweep.duration_s=2", "sweep.cooldown_s=0"),
]


def impatient(module: str) -> list[str]:
    """`python -m module` with the backend's waits cut short; the time-outs stay."""
    return [
        *(sys.executable, "-c"),
        "import runpy\n"
        "from orchestrator.clusters import anyscale\n"
        "anyscale._POLL_S, anyscale._SETTLE_S, anyscale._UNHEALTHY_GRACE_S = 0.2, 1.0, 1.0\n"
        "anyscale._RETRY_DELAYS_S = (0.1, 0.2, 0.4)\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)",
    ]


PATIENT = [sys.executable, "-m", "orchestrator"]
IMPATIENT = impatient("orchestrator")


def start(
    command: list[str], folder: Path, *overrides: str, cloud: StandIn | None = None, **env: str
) -> subprocess.Popen[str]:
    """In a session of its own, as in a terminal; what it starts can be told by its temporary directory."""
    (folder / "tmp").mkdir(parents=True)
    if cloud is not None:
        env |= {"ANYSCALE_HOST": cloud.url, "ANYSCALE_CLI_TOKEN": cloud.token}
    return subprocess.Popen(
        [*command, f"outputs={folder}/outputs", *overrides],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder / "tmp"), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def still_there(folder: Path) -> list[str]:
    """Processes that the command left behind."""
    return processes_with("TMPDIR", str(folder / "tmp"))


def states(cloud: StandIn) -> dict[str, str]:
    return {name: service.state for name, service in cloud.services.items()}


def calls(cloud: StandIn) -> list[str]:
    return [entry["call"] for entry in cloud.ledger]

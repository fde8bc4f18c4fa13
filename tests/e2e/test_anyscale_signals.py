"""The whole command on Anyscale, called off or killed; the control plane is a stand-in that answers at once."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.anyscale_standin import Instant, StandIn, healthy
from tests.conftest import ROOT
from tests.e2e.anyscale_run import IMPATIENT, PATIENT, SHORT, impatient, start, states, still_there
from tests.e2e.command import finish, only_run, read, wait_for

pytestmark = pytest.mark.e2e


def in_state(state: str) -> Callable[[StandIn, Path], bool]:
    return lambda cloud, _: len(cloud.services) == 2 and state in states(cloud).values()


def under_load(_: StandIn, folder: Path) -> bool:
    return any(folder.glob("outputs/*/*/trials/*/client.log"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "moment", [in_state("STARTING"), under_load, in_state("TERMINATING")], ids=("starting", "load", "terminating")
)
def test_a_signal_ends_the_run_and_every_service(
    tmp_path: Path, moment: Callable[[StandIn, Path], bool], signum: signal.Signals, code: int
) -> None:
    """Ctrl-C reaches the whole foreground, again and again; SIGTERM the command alone, once.

    Without it an interrupted run could leave services that cost money.
    """
    with StandIn(tmp_path / "bucket", Instant(healthy), startup_s=2, stop_s=1) as cloud:
        overrides = ["profile=baseline,optimized", "sweep.repeats=2", "sweep.concurrency=[2]", "-m"]
        process = start(IMPATIENT, tmp_path, *SHORT, "workload.payload_bytes=100", *overrides, cloud=cloud)
        wait_for(lambda: moment(cloud, tmp_path), process)
        if signum == signal.SIGTERM:
            process.send_signal(signum)
        else:
            while process.poll() is None:
                os.killpg(process.pid, signum)
                time.sleep(0.3)
        output = finish(process)
        assert process.returncode == code, output
        assert set(states(cloud).values()) == {"TERMINATED"}
        assert len(cloud.services) == 2
    assert "Traceback" not in output
    assert signum == signal.SIGTERM or "already stopping" in output
    assert still_there(tmp_path) == []
    run = only_run(tmp_path / "outputs")
    assert read(run / "run.json")["status"] == "interrupted"
    assert f"resume={run}" in output.replace("\n", "")


def test_cleanup_ends_what_a_killed_run_left(tmp_path: Path) -> None:
    """Without it what a power cut leaves would run, and cost, until somebody looks."""
    with StandIn(tmp_path / "bucket", Instant(healthy)) as cloud:
        overrides = ["profile=baseline,optimized", "sweep.repeats=1", "sweep.concurrency=[2]", "-m"]
        process = start(IMPATIENT, tmp_path, *SHORT, "workload.payload_bytes=100", *overrides, cloud=cloud)
        wait_for(lambda: under_load(cloud, tmp_path), process)
        process.kill()
        finish(process)
        assert set(states(cloud).values()) == {"RUNNING"}
        cleanup = [*impatient("orchestrator.cleanup"), str(tmp_path / "outputs")]
        env = {**os.environ, "ANYSCALE_HOST": cloud.url, "ANYSCALE_CLI_TOKEN": cloud.token}
        (run,) = (tmp_path / "outputs").iterdir()
        resume = [*PATIENT, f"resume={run}"]
        refused = subprocess.run(resume, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert (refused.returncode, refused.stderr.count("is RUNNING")) == (2, 2), refused.stdout + refused.stderr
        assert "end what it left first: python -m orchestrator.cleanup" in refused.stderr
        for more, code, state in (([], 1, "RUNNING"), (["--yes"], 0, "TERMINATED"), ([], 0, "TERMINATED")):
            told = subprocess.run([*cleanup, *more], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
            assert told.returncode == code, told.stdout + told.stderr
            assert set(states(cloud).values()) == {state}
        assert told.stdout == "Nothing is left over.\n"

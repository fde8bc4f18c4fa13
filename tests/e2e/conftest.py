"""One run on a cluster of a user, looked at by several files: the deployment costs more than what is asked of it."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.e2e.command import CALM
from tests.e2e.user_cluster import arguments, cluster, environment, orchestrate, until

Done = subprocess.CompletedProcess[str]


@dataclass
class OnUserCluster:
    """What was said on a cluster without flags, and, under the same name, the user's applications just after it."""

    folder: Path  # everything that was written
    said: dict[str, Done]
    theirs: dict[str, dict[str, Any]]
    num_applications: dict[str, int]

    @property
    def run(self) -> Path:
        (run,) = (self.folder / "outputs").iterdir()
        return run


# An effect of known size: 100 ms added.
SWEPT = [
    *("workload.delay_s=0.1,0.2", "compare.treatment=workload.delay_s", "sweep.repeats=2", "sweep.concurrency=[2]"),
    *("sweep.warmup_s=1", "sweep.ramp_up_s=0.5", "sweep.duration_s=4", "sweep.cooldown_s=0", "-m"),
]


@pytest.fixture(scope="session")
def on_user_cluster(tmp_path_factory: pytest.TempPathFactory) -> OnUserCluster:
    """Refused with flags and without a token, run, killed, cleaned up."""
    folder = tmp_path_factory.mktemp("user_cluster")
    seen = OnUserCluster(folder, {}, {}, {})
    with cluster({}) as there:

        def look(when: str, said: Done | None = None) -> None:
            if said is not None:
                seen.said[when] = said
            seen.num_applications[when] = len(there.names())
            if seen.num_applications[when] == 2:
                seen.theirs[when] = there.theirs()

        look("before")
        look("flags", orchestrate(there, folder / "refused", "profile=haproxy"))
        look("no token", orchestrate(there, folder / "refused", "cluster.token_env=null"))
        look("run", orchestrate(there, folder / "outputs", "profile=baseline", *CALM, *SWEPT))
        outputs = folder / "killed"
        killed = subprocess.Popen(arguments(there, outputs, "sweep.duration_s=300"), cwd=ROOT, env=environment())
        until(lambda: next(outputs.glob("*/services/*/r0/effective.json")), StopIteration)
        look("under load")
        killed.kill()
        killed.wait()
        for when, more in (("found", []), ("cleaned up", ["--yes"])):
            command = [sys.executable, "-m", "orchestrator.cleanup", str(outputs), *more]
            told = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
            look(when, told)
    return seen

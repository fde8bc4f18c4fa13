"""The whole command on Anyscale, the real SDK against a stand-in control plane, with real Ray behind it.

No secret may be found in what is written, printed or given as an argument.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from orchestrator.process import members
from tests.anyscale_standin import LocalRay, Service, StandIn, Version
from tests.conftest import ROOT
from tests.e2e.anyscale_run import PATIENT, SHORT, calls, start, states, still_there
from tests.e2e.command import finish, only_run, read
from tests.leaks import canary, leaks, seen_arguments

pytestmark = [pytest.mark.e2e, pytest.mark.serial]

USD_PER_HOUR = 36


def when(service: Service, state: str) -> float:
    return float(next(entry["at_s"] for entry in service.history if entry["state"] == state))


class Watched(LocalRay):
    """Notes which service each request of the load went to, and where each of them ran.

    A directory that is gone may be chosen again: its name is a free block of ports, drawn at random.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.directories: dict[str, Path] = {}

    async def answer(self, request: web.Request, service: Service, version: Version) -> web.StreamResponse:
        if request.query.get("message", "").startswith("xx"):
            self.asked.append(service.name)
        self.directories[version.id] = self._up[version.id][0].directory
        return await super().answer(request, service, version)


@dataclass
class Done:
    folder: Path
    code: int
    output: str
    arguments: bytes
    cloud: StandIn
    behind: Watched

    @property
    def run(self) -> Path:
        return only_run(self.folder / "outputs")


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """Baseline against optimized, two levels, two blocks, as somebody in the cloud would run it.

    Without it nobody would notice that the order of measurement, the flags, the upload or the end of several services
    are right with the stand-in's answers only, and not with those of a real Ray behind the real SDK.
    """
    folder = tmp_path_factory.mktemp("on_ray")
    behind = Watched()
    cloud = StandIn(folder / "bucket", behind)
    cloud.token = canary()
    overrides = [*SHORT, "profile=baseline,optimized", "sweep.repeats=2", "sweep.concurrency=[2,4]"]
    overrides += [
        "sweep.duration_s=4",
        '+cluster.env.OMP_NUM_THREADS="1"',
        f"cluster.usd_per_hour={{m8a.xlarge: {USD_PER_HOUR / 2}, m7a.4xlarge: {USD_PER_HOUR / 2}}}",
        "-m",
    ]
    with cloud, seen_arguments() as arguments:
        process = start(PATIENT, folder, *overrides, cloud=cloud)
        output = finish(process)
        yield Done(folder, process.returncode, output, b"\n".join(arguments), cloud, behind)


def test_two_services_are_up_and_measured_in_turn(on_ray: Done) -> None:
    assert on_ray.code in (0, 3), on_ray.output
    services = on_ray.cloud.services
    assert calls(on_ray.cloud) == ["apply", "apply", "terminate", "terminate"] * 2
    in_order = list(services.values())
    for wave in (in_order[:2], in_order[2:]):
        assert {service.tags["arm"] for service in wave} == {"baseline", "optimized"}
        assert max(when(service, "RUNNING") for service in wave) < min(when(each, "TERMINATING") for each in wave)
    # One at a time, level by level, as planned: what arrived says so.
    name_of = {(service.tags["arm"], service.tags["repeat"]): name for name, service in services.items()}
    planned = [trial.split("/") for trial in read(on_ray.run / "run.json")["plan"]["trials"]]
    arrived = [name for name, _ in itertools.groupby(on_ray.behind.asked)]
    assert arrived == [name_of[arm, trial.partition("-r")[2]] for arm, trial in planned]
    assert len(arrived) == 8


def test_the_run_directory_is_complete(on_ray: Done) -> None:
    record = read(on_ray.run / "run.json")
    assert (record["status"], record["errors"]) == ("complete", [])
    assert {"comparison.csv", "report.html"} <= {path.name for path in on_ray.run.iterdir()}, on_ray.output
    lived_s = [when(each, "TERMINATED") - when(each, "STARTING") for each in on_ray.cloud.services.values()]
    assert record["cost_usd"] > sum(lived_s) * USD_PER_HOUR / 3600
    for path in on_ray.run.glob("*/trials/*/trial.json"):
        trial = read(path)
        assert trial["round_trip_ms"] > 0
        assert trial["metrics"]["num_successful"] > 0
        assert trial["metrics"]["num_failed"] == 0
        assert trial["unchecked"] == []
        assert (trial["server"]["restarted"], trial["server"]["failed"]) == ([], [])
        service = on_ray.run / "services" / trial["arm"] / f"r{trial['repeat']}"
        names = {actor["name"] for actor in read(service / "effective.json")["actors"]}
        assert set(trial["server"]["actors"]) == names
    assert len(list(on_ray.run.glob("*/trials/*/trial.json"))) == 8


def test_each_arm_ran_with_its_flags(on_ray: Done) -> None:
    """The upload, deployed: flags are read back from every Serve actor by the probe beside the workload."""
    optimized = yaml.safe_load((ROOT / "conf/profile/optimized.yaml").read_text())["env"]
    assert read(on_ray.run / "services/optimized/r0/effective.json")["declared_env"] == optimized
    assert read(on_ray.run / "services/optimized/r0/effective.json")["flag_effects"]["RAY_SERVE_ENABLE_HA_PROXY"]
    for arm, enabled in (("baseline", False), ("optimized", True)):
        for repeat in (0, 1):
            effective = read(on_ray.run / f"services/{arm}/r{repeat}/effective.json")
            assert bool(effective["declared_env"]) is enabled
            assert {"ServeController", "ServeReplica"} < {actor["kind"] for actor in effective["actors"]}
            assert effective["flag_effects"].keys() == effective["declared_env"].keys()
            assert effective["versions"]["ray"]
            (node,) = effective["hardware"]["nodes"]
            assert node["num_logical_cpus"] == os.cpu_count()
            for actor in effective["actors"]:
                assert effective["declared_env"].items() <= actor["env"].items()
                assert actor["env"]["OMP_NUM_THREADS"] == "1"
                assert "ANYSCALE_RAY_SERVE_ENABLE_HA_PROXY" not in actor["env"]
                assert actor["constants"]["RAY_SERVE_ENABLE_HA_PROXY"] is enabled, actor["name"]
                assert actor["constants"]["RAY_SERVE_THROUGHPUT_OPTIMIZED"] is enabled, actor["name"]


def test_nothing_is_left(on_ray: Done) -> None:
    assert set(states(on_ray.cloud).values()) == {"TERMINATED"}
    assert len(on_ray.behind.directories) == 4
    assert [path for path in on_ray.behind.directories.values() if path.exists() or members(path)] == []
    assert still_there(on_ray.folder) == []
    assert list((on_ray.folder / "tmp").iterdir()) == []


def test_no_token_is_shown(on_ray: Done) -> None:
    bearers = [service.auth_token for service in on_ray.cloud.services.values()]
    assert len(set(bearers)) == 4
    for secret in (on_ray.cloud.token, *bearers):
        assert secret
        assert leaks(secret, on_ray.folder, output=on_ray.output.encode(), arguments=on_ray.arguments) == []

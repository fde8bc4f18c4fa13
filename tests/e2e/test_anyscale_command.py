"""The whole command on Anyscale: the real SDK, against a stand-in control plane.

Once with real Ray behind it; the misbehaviours and signals with a stand-in that answers at once, and the waits of the
backend cut short. No secret may be found in what is written, printed or given as an argument.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from aiohttp import web

from orchestrator.process import members
from tests.anyscale_standin import Fault, Instant, LocalRay, Service, StandIn, Version, healthy
from tests.conftest import ROOT
from tests.e2e.command import finish, only_run, read, wait_for
from tests.leaks import canary, leaks, processes_with, seen_arguments

pytest.importorskip("anyscale")
pytestmark = pytest.mark.e2e

SHORT = [
    *("cluster=anyscale_1x", "workload=unary", "sweep=quick", "cluster.client_processes=1"),
    *("sweep.ramp_up_s=0.2", "sweep.warmup_s=0.5", "sweep.duration_s=2", "sweep.cooldown_s=0"),
]
COMMAND = [sys.executable, "-m", "orchestrator"]
# The same with the backend's waits cut short; the time-outs stay.
IMPATIENT = [
    *(sys.executable, "-c"),
    "import runpy\n"
    "from orchestrator.clusters import anyscale\n"
    "anyscale._POLL_S, anyscale._SETTLE_S, anyscale._UNHEALTHY_GRACE_S = 0.2, 1.0, 1.0\n"
    "anyscale._RETRY_DELAYS_S = (0.1, 0.2, 0.4)\n"
    "runpy.run_module('orchestrator', run_name='__main__', alter_sys=True)",
]
USD_PER_HOUR = 36
serial = pytest.mark.serial


# Running the command.


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


def when(service: Service, state: str) -> float:
    return float(next(entry["at_s"] for entry in service.history if entry["state"] == state))


# On real Ray.


class Watched(LocalRay):
    """Notes which service each request of the load went to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.directories: set[Path] = set()

    async def answer(self, request: web.Request, service: Service, version: Version) -> web.StreamResponse:
        if request.query.get("message", "").startswith("xx"):
            self.asked.append(service.name)
        self.directories.add(self._up[version.id][0].directory)
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
        process = start(COMMAND, folder, *overrides, cloud=cloud)
        output = finish(process)
        yield Done(folder, process.returncode, output, b"\n".join(arguments), cloud, behind)


@serial
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


@serial
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


@serial
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


@serial
def test_nothing_is_left(on_ray: Done) -> None:
    assert set(states(on_ray.cloud).values()) == {"TERMINATED"}
    assert len(on_ray.behind.directories) == 4
    assert [path for path in on_ray.behind.directories if path.exists() or members(path)] == []
    assert still_there(on_ray.folder) == []
    assert list((on_ray.folder / "tmp").iterdir()) == []


@serial
def test_no_token_is_shown(on_ray: Done) -> None:
    bearers = [service.auth_token for service in on_ray.cloud.services.values()]
    assert len(set(bearers)) == 4
    for secret in (on_ray.cloud.token, *bearers):
        assert secret
        assert leaks(secret, on_ray.folder, output=on_ray.output.encode(), arguments=on_ray.arguments) == []


# Misbehaviours: one run whose services each meet another one.

STUCK, SICK, ENDLESS, KEPT = 6, 7, 8, 9
MET: list[tuple[str, Fault, float, str | None]] = [
    # verb, what happens, how often, what the user is told; None: the service is measured all the same
    ("apply", Fault(delay_s=2), 1, None),
    ("apply", Fault(drop="after"), 1, None),
    ("apply", Fault(status=401, detail="Unauthorized."), inf, "wrong token: Unauthorized."),
    ("apply", Fault(status=404, detail="No such compute config."), inf, "No such compute config."),
    ("apply", Fault(status=429, detail="Too many requests."), inf, "Too many requests."),
    ("apply", Fault(status=500, detail="Out of order."), inf, "the control plane answered 500"),
    ("apply", Fault(state="STARTING"), 1, "not ready after 20 s (cluster.startup_timeout_s): STARTING"),
    ("apply", Fault(state="UNHEALTHY"), 1, "not healthy for 1 s: UNHEALTHY"),
    ("terminate", Fault(state="TERMINATING"), inf, None),
    ("terminate", Fault(status=403, detail="You do not have permission."), inf, None),
    ("apply", Fault(status=409, detail="The name is taken."), inf, "The name is taken."),
    ("apply", Fault(status=403, detail="Not for {token} or {encoded}."), inf, "Not for *** or ***."),
]


def quoting(cloud: StandIn, fault: Fault) -> Fault:
    """The same, whose words hold the token that it was sent, where they say so."""
    return replace(fault, detail=fault.detail.format(token=cloud.token, encoded=quote(cloud.token, safe="")))


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandIn, Path, str, int]]:
    """One run of many services, side by side: their time-outs pass together.

    Without it one service's trouble could end the others' measurements, or be told without its reason.
    """
    folder = tmp_path_factory.mktemp("met")
    with StandIn(folder / "bucket", Instant(healthy)) as cloud:
        cloud.token = canary()
        for number, (verb, fault, times, _) in enumerate(MET):
            cloud.misbehave(verb, quoting(cloud, fault), times=times, service=f"-{number:04d}")
        overrides = [f"sweep.repeats={len(MET)}", f"cluster.max_live_services={len(MET)}", "sweep.concurrency=[2]"]
        overrides += ["cluster.startup_timeout_s=20", "cluster.terminate_timeout_s=15", "workload.payload_bytes=100"]
        process = start(IMPATIENT, folder, *SHORT, *overrides, cloud=cloud)
        output = finish(process)
        assert still_there(folder) == []
        yield cloud, only_run(folder / "outputs"), output, process.returncode


together = pytest.mark.xdist_group("met")


@together
@pytest.mark.parametrize("number", range(len(MET)))
def test_a_service_that_fails_is_told_and_the_others_are_measured(
    met: tuple[StandIn, Path, str, int], number: int
) -> None:
    cloud, run, output, _ = met
    name = f"so-{run.name}-{number:04d}"
    told = MET[number][-1]
    trial = run / f"baseline/trials/c0002-r{number}"
    if told is None:
        assert read(trial / "trial.json")["metrics"]["num_failed"] == 0
    else:
        text = f"service baseline r{number} failed\n{name}: {told}"
        assert text in output
        assert told in read(trial / "failure.json")["error"]
        assert f"Log: {run}/services/baseline/r{number}" in output
    assert (f"anyscale service terminate --name {name}" in output) is (number in (ENDLESS, KEPT))
    if number in (ENDLESS, KEPT):
        assert cloud.services[name].state == ("TERMINATING" if number == ENDLESS else "RUNNING")
    else:
        assert name not in cloud.services or cloud.services[name].state == "TERMINATED"


@together
def test_a_run_with_failures_ends_in_order(met: tuple[StandIn, Path, str, int]) -> None:
    cloud, run, output, code = met
    assert code == 1, output
    assert "Traceback" not in output
    assert f"teardown failed so-{run.name}-{ENDLESS:04d} may still run and cost money" in output
    assert "last seen TERMINATING" in output
    assert "not allowed: You do not have permission." in output
    record = read(run / "run.json")
    assert record["status"] == "failed"
    assert len(record["errors"]) == 2  # what still runs, and nothing else
    assert leaks(cloud.token, run.parent.parent, output=output.encode()) == []  # though the control plane repeated it


@pytest.mark.parametrize(
    ("verb", "fault", "said"),
    [
        ("userinfo", Fault(status=401), "wrong token"),
        ("find_service", Fault(status=403, detail="Not for {token} or {encoded}."), "Not for *** or ***."),
        ("find_service", Fault(status=500, detail="Out of order."), "the control plane answered 500"),
    ],
    ids=("wrong token", "echoed token", "out of order"),
)
def test_refused_before_anything_is_deployed(tmp_path: Path, verb: str, fault: Fault, said: str) -> None:
    with StandIn(tmp_path / "bucket", Instant(healthy)) as cloud, seen_arguments() as arguments:
        cloud.token = canary()
        cloud.misbehave(verb, quoting(cloud, fault), times=inf)
        process = start(IMPATIENT, tmp_path, *SHORT, cloud=cloud)
        output = finish(process)
    assert process.returncode == 2, output
    assert said in output
    assert "Traceback" not in output
    assert calls(cloud) == []
    assert not (tmp_path / "outputs").exists()
    assert leaks(cloud.token, tmp_path, output=output.encode(), arguments=b"\n".join(arguments)) == []
    assert still_there(tmp_path) == []


# Signals.


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
        cleanup = [sys.executable, "-m", "orchestrator.cleanup", str(tmp_path / "outputs")]
        env = {**os.environ, "ANYSCALE_HOST": cloud.url, "ANYSCALE_CLI_TOKEN": cloud.token}
        (run,) = (tmp_path / "outputs").iterdir()
        resume = [sys.executable, "-m", "orchestrator", f"resume={run}"]
        refused = subprocess.run(resume, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert (refused.returncode, refused.stderr.count("is RUNNING")) == (2, 2), refused.stdout + refused.stderr
        assert "end what it left first: python -m orchestrator.cleanup" in refused.stderr
        for more, code, state in (([], 1, "RUNNING"), (["--yes"], 0, "TERMINATED"), ([], 0, "TERMINATED")):
            told = subprocess.run([*cleanup, *more], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
            assert told.returncode == code, told.stdout + told.stderr
            assert set(states(cloud).values()) == {state}
        assert told.stdout == "Nothing is left over.\n"

"""The whole command on Anyscale: the real SDK, against a stand-in control plane.

Once with real Ray behind it; the misbehaviours and signals with a stand-in that answers at once, and the waits of the
backend cut short. No secret may be found in what is written, printed or given as an argument.
"""

import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from urllib.parse import quote, quote_plus

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from orchestrator.process import members
from tests.anyscale_standin import Fault, Instant, LocalRay, Service, StandIn, Version, healthy
from tests.conftest import ROOT
from tests.e2e.test_run import finish, only_run, read, wait_for
from tests.servers import serving

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


def canary() -> str:
    """A token whose URL-encoded form is another."""
    return f"sss_canary+{secrets.token_hex(8)}/{secrets.token_hex(8)}="


# Looking for secrets.


def forms(secret: str) -> set[bytes]:
    """As it stands, URL-encoded, and in base64 wherever in a longer text it began."""
    found = {secret.encode(), quote(secret).encode(), quote(secret, safe="").encode(), quote_plus(secret).encode()}
    for shift in range(3):
        padded = bytes(shift) + secret.encode()
        own = slice(-(-shift * 8 // 6), len(padded) * 8 // 6)  # the digits that no neighbour has a part in
        found |= {b64encode(padded)[own], urlsafe_b64encode(padded)[own]}
    return found


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file, its name and, of a Parquet file, the values that it holds compressed."""
    for path in folder.rglob("*"):
        yield f"name of {path}", str(path.relative_to(folder)).encode()
        if path.is_file():
            yield str(path), path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield f"values of {path}", f"{table.schema.metadata} {table.to_pydict()}".encode()


def leaks(secret: str, folder: Path, **said: bytes) -> list[str]:
    """Where it can be read: below the folder, or in what was said."""
    return [
        where for where, content in [*contents(folder), *said.items()] if any(form in content for form in forms(secret))
    ]


@contextmanager
def seen_arguments() -> Iterator[set[bytes]]:
    """The arguments of every process of this machine, looked at every 50 ms."""
    seen: set[bytes] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for pid in filter(str.isdigit, os.listdir("/proc")):
                with suppress(OSError):
                    seen.add(Path(f"/proc/{pid}/cmdline").read_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_a_secret_would_be_found(tmp_path: Path) -> None:
    secret = canary()
    places = {
        "plain": secret,
        "url": f"https://x/?token={quote(secret, safe='')}&y",
        **{f"header{shift}": b64encode(f"{'u' * shift}:{secret}:end".encode()).decode() for shift in range(3)},
    }
    for name, text in places.items():
        (tmp_path / name).write_text(json.dumps({"log": text}))
    (tmp_path / secret.replace("/", "")).touch()
    pq.write_table(pa.table({"error": [secret] * 1000}), tmp_path / "s.parquet", compression="gzip")
    (tmp_path / "innocent").write_text(json.dumps({"token": "***", "text": secret[:-4]}))
    assert {Path(where).name for where in leaks(secret, tmp_path)} == {*places, "s.parquet"}
    assert leaks(secret.replace("/", ""), tmp_path) == [f"name of {tmp_path / secret.replace('/', '')}"]
    with (
        seen_arguments() as seen,
        subprocess.Popen([sys.executable, "-c", "input()", f"--token={secret}"], stdin=subprocess.PIPE) as child,
    ):
        deadline_s = time.monotonic() + 30
        while not leaks(secret, tmp_path / "none", arguments=b"\n".join(seen)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        child.kill()
    assert leaks(secret, tmp_path / "none", arguments=b"\n".join(seen)) == ["arguments"]


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
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(folder / "tmp") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


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
    """Baseline against optimized, two levels, two blocks."""
    folder = tmp_path_factory.mktemp("on_ray")
    behind = Watched()
    cloud = StandIn(folder / "bucket", behind)
    cloud.token = canary()
    overrides = [*SHORT, "profile=baseline,optimized", "sweep.repeats=2", "sweep.concurrency=[2,4]"]
    overrides += [
        "sweep.duration_s=4",
        f"cluster.usd_per_hour={{m8a.xlarge: {USD_PER_HOUR / 2}, m7a.4xlarge: {USD_PER_HOUR / 2}}}",
        "-m",
    ]
    with cloud, seen_arguments() as arguments:
        process = start(COMMAND, folder, *overrides, cloud=cloud)
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
    assert len(list(on_ray.run.glob("*/trials/*/trial.json"))) == 8


def test_each_arm_ran_with_its_flags(on_ray: Done) -> None:
    for arm, enabled in (("baseline", False), ("optimized", True)):
        for repeat in (0, 1):
            effective = read(on_ray.run / f"services/{arm}/r{repeat}/effective.json")
            assert bool(effective["declared_env"]) is enabled
            assert {"ServeController", "ServeReplica"} <= {actor["kind"] for actor in effective["actors"]}
            for actor in effective["actors"]:
                assert effective["declared_env"].items() <= actor["env"].items()
                assert actor["constants"]["RAY_SERVE_ENABLE_HA_PROXY"] is enabled, actor["name"]
                assert actor["constants"]["RAY_SERVE_THROUGHPUT_OPTIMIZED"] is enabled, actor["name"]


def test_nothing_is_left(on_ray: Done) -> None:
    assert set(states(on_ray.cloud).values()) == {"TERMINATED"}
    assert len(on_ray.behind.directories) == 4
    assert [path for path in on_ray.behind.directories if path.exists() or members(path)] == []
    assert still_there(on_ray.folder) == []
    assert list((on_ray.folder / "tmp").iterdir()) == []


def test_no_token_is_shown(on_ray: Done) -> None:
    bearers = [service.auth_token for service in on_ray.cloud.services.values()]
    assert len(set(bearers)) == 4
    for secret in (on_ray.cloud.token, *bearers):
        assert secret
        assert leaks(secret, on_ray.folder, output=on_ray.output.encode(), arguments=on_ray.arguments) == []


def test_no_token_of_an_endpoint_is_shown(tmp_path: Path) -> None:
    token = canary()
    with serving("static") as server, seen_arguments() as arguments:
        overrides = [f"cluster.url={server.url}", "cluster.token_env=MY_TOKEN", "sweep.concurrency=[2]"]
        process = start(COMMAND, tmp_path, *SHORT[1:], "cluster=endpoint", *overrides, MY_TOKEN=token)
        output = finish(process)
        assert f"Bearer {token}" in server.stats()["headers"]
    assert process.returncode in (0, 3), output
    assert leaks(token, tmp_path, output=output.encode(), arguments=b"\n".join(arguments)) == []
    assert still_there(tmp_path) == []


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
]


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandIn, Path, str, int]]:
    folder = tmp_path_factory.mktemp("met")
    with StandIn(folder / "bucket", Instant(healthy)) as cloud:
        for number, (verb, fault, times, _) in enumerate(MET):
            cloud.misbehave(verb, fault, times=times, service=f"-{number:04d}")
        overrides = [f"sweep.repeats={len(MET)}", f"cluster.max_live_services={len(MET)}", "sweep.concurrency=[2]"]
        overrides += ["cluster.startup_timeout_s=20", "cluster.terminate_timeout_s=15", "workload.payload_bytes=100"]
        process = start(IMPATIENT, folder, *SHORT, *overrides, cloud=cloud)
        output = finish(process)
        assert still_there(folder) == []
        yield cloud, only_run(folder / "outputs"), output, process.returncode


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


def test_a_run_with_failures_ends_in_order(met: tuple[StandIn, Path, str, int]) -> None:
    _, run, output, code = met
    assert code == 1, output
    assert "Traceback" not in output
    assert f"teardown failed so-{run.name}-{ENDLESS:04d} may still run and cost money" in output
    assert "last seen TERMINATING" in output
    assert "not allowed: You do not have permission." in output
    record = read(run / "run.json")
    assert record["status"] == "failed"
    assert len(record["errors"]) == 2  # what still runs, and nothing else


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
        detail = fault.detail.format(token=cloud.token, encoded=quote(cloud.token, safe=""))
        cloud.misbehave(verb, replace(fault, detail=detail), times=inf)
        process = start(IMPATIENT, tmp_path, *SHORT, cloud=cloud)
        output = finish(process)
    assert process.returncode == 2, output
    assert said in output
    assert "Traceback" not in output
    assert calls(cloud) == []
    assert not (tmp_path / "outputs").exists()
    assert leaks(cloud.token, tmp_path, output=output.encode(), arguments=b"\n".join(arguments)) == []
    assert still_there(tmp_path) == []


def test_a_token_that_the_control_plane_repeats_is_not_written(tmp_path: Path) -> None:
    with StandIn(tmp_path / "bucket", Instant(healthy)) as cloud:
        cloud.token = canary()
        detail = f"Not for {cloud.token} or {quote(cloud.token, safe='')}."
        cloud.misbehave("apply", Fault(status=403, detail=detail), times=inf)
        process = start(IMPATIENT, tmp_path, *SHORT, "sweep.repeats=1", cloud=cloud)
        output = finish(process)
    assert process.returncode == 1, output
    assert "Not for *** or ***." in output
    (failure, *_) = only_run(tmp_path / "outputs").glob("baseline/trials/*/failure.json")
    assert "Not for *** or ***." in read(failure)["error"]
    assert leaks(cloud.token, tmp_path, output=output.encode()) == []


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
    """Ctrl-C reaches the whole foreground, again and again; SIGTERM the command alone, once."""
    with StandIn(tmp_path / "bucket", Instant(healthy), startup_s=4, stop_s=2) as cloud:
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

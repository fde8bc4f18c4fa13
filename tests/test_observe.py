"""What is observed beside a measurement: whose CPU, and of which part of the time. With real busy processes.

The machine of the tests may be busy with anything, so processes run until they have used CPU, not for a time, and what
is observed of them is held against their own counters, with room.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import pytest

from orchestrator.errors import ConfigError, TrialError
from orchestrator.kinds import checked
from orchestrator.observe import host
from orchestrator.observe.base import Observer, Period, is_here, observed_facts, observing
from orchestrator.observe.host import CpuSeconds, Host, HostFacts, HostRecording
from orchestrator.process import MARKER

BUSY = "while :; do :; done"
USED_S = 0.4  # CPU that each busy process has used in a window
SERVICE_ROLES = ("proxy", "replicas", "controller", "raylet", "rest_of_service")


@dataclass
class Service:
    marker: str | None = "/tmp/observed-service"
    urls: tuple[str, ...] = ("http://127.0.0.1:8000",)


@pytest.fixture
def started() -> Iterator[list[int]]:
    """Sessions that are killed when the test ends."""
    leaders: list[int] = []
    yield leaders
    for leader in leaders:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def busy(started: list[int], title: str = "sh", marker: str | None = None, script: str = BUSY) -> int:
    """A child of ours that does nothing but work; returns its process id."""
    env = {"PATH": os.environ["PATH"]} | ({MARKER: marker} if marker else {})
    child = subprocess.Popen([title, "-c", script], executable="/bin/sh", env=env, start_new_session=True)
    started.append(child.pid)
    return child.pid


def orphan(started: list[int], marker: str | None = None) -> int:
    """The same, but nobody's child any more, as the work of others on the machine is."""
    env = {"PATH": os.environ["PATH"]} | ({MARKER: marker} if marker else {})
    command = ["sh", "-c", f'sh -c "{BUSY}" >&2 & echo $!']
    shell = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    started.append(shell.pid)
    pid = int(shell.communicate()[0])
    assert psutil.Process(pid).ppid() != os.getpid()
    return pid


def used_s(pid: int) -> float:
    return sum(psutil.Process(pid).cpu_times()[:2])


def observed(service: Service, pids: Mapping[str, int]) -> tuple[HostFacts, dict[str, float]]:
    """Facts of a window in which each process used at least `USED_S`, and what each used by its own counter."""
    with Host(interval_s=0.05).during(service, Path("unused")) as recording:
        time.sleep(0.1)
        start_s, before = time.monotonic(), {name: used_s(pid) for name, pid in pids.items()}
        while any(used_s(pid) < before[name] + USED_S for name, pid in pids.items()):
            assert time.monotonic() < start_s + 120
            time.sleep(0.1)
        end_s, after = time.monotonic(), {name: used_s(pid) for name, pid in pids.items()}
        time.sleep(0.1)
    return recording.facts(Period(start_s, end_s)), {name: after[name] - before[name] for name in pids}


def assert_near(found_s: float | None, own_s: float) -> None:
    assert found_s is not None
    assert 0.5 * own_s < found_s < 1.5 * own_s + 0.3


def test_roles_are_told_apart(started: list[int]) -> None:
    service = Service()
    assert service.marker
    pids = {
        "client": busy(started),
        "replicas": busy(started, "ray::ServeReplica:app:Echo", service.marker),
        "proxy": busy(started, "/opt/ray/haproxy", service.marker),
        "controller": busy(started, "ray::ServeController.listen_for_change", service.marker),
        "raylet": busy(started, "/opt/ray/gcs_server", service.marker),
        "rest_of_service": busy(started, "ray::IDLE", service.marker),
    }
    found, own = observed(service, pids)
    for role in pids:
        assert_near(getattr(found.cpu_s, role), own[role])
    assert found.num_cores == os.cpu_count()
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


def test_other_services_of_this_run_are_no_other_work(started: list[int]) -> None:
    service = Service()
    pids = {
        "another": busy(started, "ray::ServeReplica:app:Echo", "/tmp/another-service"),
        "measured": busy(started, "python -m vllm.entrypoints.openai.api_server", service.marker),
    }
    found, own = observed(service, pids)
    assert_near(found.cpu_s.rest_of_service, own["another"])
    assert_near(found.cpu_s.replicas, own["measured"])


def test_a_child_that_lost_its_environment_or_came_later_still_belongs_to_the_service(started: list[int]) -> None:
    service = Service()
    script = f"sleep 0.3; env -i /bin/sh -c '{BUSY}' & wait"
    leader = busy(started, "ray::ServeReplica:app:Echo", service.marker, script)
    busy(started)  # the client: it must not be given what is the replica's
    with Host(interval_s=0.05).during(service, Path("unused")) as recording:
        start_s = time.monotonic()
        while not (children := psutil.Process(leader).children()) or used_s(children[-1].pid) < USED_S:
            assert time.monotonic() < start_s + 120
            time.sleep(0.1)
        end_s, own_s = time.monotonic(), used_s(children[-1].pid)
    assert_near(recording.facts(Period(start_s, end_s)).cpu_s.replicas, own_s)


def test_the_work_of_others_is_what_is_left(started: list[int]) -> None:
    service = Service()
    pids = {
        "other": orphan(started),
        "marked by another orchestrator": orphan(started, "/tmp/not-of-this-run"),
        "service": busy(started, "ray::IDLE", service.marker),
    }
    start_s = time.monotonic()
    found, own = observed(service, pids)
    most_s = (time.monotonic() - start_s) * found.num_cores
    assert found.other_cpu_ratio is not None
    assert found.other_cpu_ratio * most_s > 0.5 * (own["other"] + own["marked by another orchestrator"])
    assert_near(found.cpu_s.rest_of_service, own["service"])
    assert found.cpu_s.client < 0.3  # none, but for what other tests may have left


def test_what_is_unknown_is_null(started: list[int]) -> None:
    pids = {"client": busy(started)}
    elsewhere, own = observed(Service(None, ("https://example.com",)), pids)
    assert_near(elsewhere.cpu_s.client, own["client"])
    assert [getattr(elsewhere.cpu_s, role) for role in SERVICE_ROLES] == [None] * 5
    assert elsewhere.other_cpu_ratio is not None  # of this machine, which the service does not share
    here, _ = observed(Service(None), pids)
    assert here.other_cpu_ratio is None  # part of what is left is the service, nobody knows which
    assert [getattr(here.cpu_s, role) for role in SERVICE_ROLES] == [None] * 5


def drawn(cores: int) -> HostRecording:
    """Readings at 0, 1, 2, 3 s: from 1 s on the client uses half a core and others a whole one."""
    recording = HostRecording(Service(None, ("http://elsewhere",)))
    recording.sample()
    first = replace(recording.samples.pop(), at_s=0.0, idle_s=0.0, steal_s=0.0, interrupt_s=0.0, load_1m=0.0, cpu_s={})
    roles = dict.fromkeys((*SERVICE_ROLES, "client", "orchestrator"), 0.0)
    for second in range(4):
        busy_s = max(0.0, second - 1.0)
        recording.samples.append(
            replace(
                first,
                at_s=float(second),
                idle_s=cores * second - 1.5 * busy_s - 0.1 * second,
                steal_s=0.1 * second,
                interrupt_s=0.05 * busy_s,
                load_1m=float(second),
                cpu_s=roles | {"client": 0.5 * busy_s},
            )
        )
    return recording


def test_the_window_is_cut_out_between_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    found = drawn(4).facts(Period(1.25, 2.75))
    assert found == HostFacts(
        num_cores=4,
        other_cpu_ratio=pytest.approx(0.25),
        interrupt_ratio=pytest.approx(0.0125),
        steal_ratio=pytest.approx(0.025),
        load_1m_start=2.0,
        load_1m_end=3.0,
        cpu_s=CpuSeconds(pytest.approx(0.75), 0.0, None, None, None, None, None),
    )
    assert drawn(4).facts(Period(0.0, 1.0)).other_cpu_ratio == pytest.approx(0.0)
    assert drawn(4).facts(Period(0.0, 3.0)).cpu_s.client == pytest.approx(1.0)


def test_a_reading_costs_little() -> None:
    recording = HostRecording(Service())
    recording.sample()
    before_s = time.thread_time()
    for _ in range(20):
        recording.sample()
    assert (time.thread_time() - before_s) / 20 < 0.01 * Host().interval_s  # a hundredth of a core, and usually less


def test_trouble_with_the_counters_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, failed = HostRecording.sample, threading.Event()

    def broken(recording: HostRecording) -> None:
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise OSError("no counters")
        sample(recording)

    monkeypatch.setattr(HostRecording, "sample", broken)
    with pytest.raises(OSError, match="no counters"), Host(interval_s=0.01).during(Service(), Path("unused")):
        failed.wait(60)


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan")])
def test_an_interval_is_above_zero(interval_s: float) -> None:
    with pytest.raises(ConfigError, match=r"observe\.host\.interval_s must be a number above 0"):
        checked("observe.host", Host, {"interval_s": interval_s})


def test_processes_that_vanish_or_are_not_ours_to_read_are_skipped(tmp_path: Path) -> None:
    assert host._read(str(tmp_path / "gone")) == b""
    assert host._read(str(tmp_path)) == b""
    assert host._process(1 << 30) is None


@dataclass
class Note:
    start_s: float
    directory: str


@dataclass
class Noting(Observer):
    """An observer that writes down when it is entered and left."""

    name: str
    seen: list[str]

    @contextlib.contextmanager
    def during(self, service: Service, directory: Path) -> Iterator["Noting"]:
        self.seen.append(f"{self.name} in")
        self.directory = directory
        try:
            yield self
        finally:
            self.seen.append(f"{self.name} out")

    def facts(self, window: Period) -> Note:
        return Note(window.start_s, str(self.directory))


def test_observers_are_entered_around_a_measurement_and_asked_afterwards(tmp_path: Path) -> None:
    seen: list[str] = []
    observers = {"one": Noting("one", seen), "two": Noting("two", seen)}
    with observing(observers, Service(), tmp_path) as recordings:
        seen.append("measured")
    assert seen == ["one in", "two in", "measured", "two out", "one out"]
    note = {"start_s": 1.0, "directory": str(tmp_path)}
    assert observed_facts(recordings, Period(1.0, 2.0)) == {"one": note, "two": note}
    with pytest.raises(RuntimeError), observing(observers, Service(), tmp_path):
        raise RuntimeError("the client failed")
    assert seen[-2:] == ["two out", "one out"]


def test_here() -> None:
    assert is_here(["http://127.0.0.1:1", "http://127.0.0.1:2"])
    assert is_here(["http://[::1]:8000"])
    assert not is_here(["https://example.com/path"])


@dataclass
class Failing(Observer):
    """Raises where it is told to, or has no facts."""

    where: str

    @contextlib.contextmanager
    def during(self, service: object, directory: Path) -> Iterator["Failing"]:
        if self.where == "entering":
            raise KeyError("boom")
        yield self
        if self.where == "leaving":
            raise KeyError("boom")

    def facts(self, window: Period) -> object:
        if self.where == "facts":
            raise KeyError("boom")
        return {"a": "dict"}


@pytest.mark.parametrize("where", ["entering", "leaving", "facts", "a dict"])
def test_an_observer_that_fails_fails_the_trial_and_is_named(where: str, tmp_path: Path) -> None:
    with (
        pytest.raises(TrialError, match=r"observer disk failed: (KeyError: 'boom'|TypeError: .*returns a dataclass)"),
        observing({"disk": Failing(where)}, Service(), tmp_path) as recordings,
    ):
        observed_facts(recordings, Period(0, 1))


def test_what_fails_beside_an_observer_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), observing({"disk": Failing("nowhere")}, Service(), tmp_path):
        _ = 1 / 0

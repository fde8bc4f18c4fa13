"""What else did this machine do in the window, and whose CPU did the measurement take?

A thread reads the kernel's counters every `interval_s`; the window is cut out afterwards, linearly between two
readings. Other work is the busy time of the machine less that of our own processes, so processes that come and go
are counted. Our own are found by two traces: they descend from the orchestrator, or they carry the service's marker
(`process.MARKER`), or share a parent or session with one that does, which finds agents whose title has overwritten
their environment.

Not covered: processes of ours that live for less than `interval_s` count as other work, and so does what the kernel
does in its own threads. Of a service elsewhere nothing is known here. Only Linux has these counters.
"""

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from orchestrator.kinds import Positive
from orchestrator.observe.base import Observer, Period, Service, is_here
from orchestrator.process import MARKER

Owner = Literal["other", "orchestrator", "client", "service", "another_service"]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MARKER = MARKER.encode() + b"="
# How the processes of a service call themselves: the start of their title, or the name of their program.
_ROLES = {
    "ray::ProxyActor": "proxy",
    "ray::HAProxyManager": "proxy",
    "haproxy": "proxy",
    "ray::ServeReplica": "replicas",
    "ray::RayWorkerWrapper": "replicas",  # where vLLM lets Ray place the workers of an engine
    "VLLM::": "replicas",
    "ray::ServeController": "controller",
    "raylet": "raylet",
    "gcs_server": "raylet",
}
_VLLM_SERVER = "vllm.entrypoints."  # the module that a server without Ray runs
_HELPERS = "orchestrator.clusters."  # children of ours that are neither load nor service: a cloud's SDK


@dataclass(frozen=True)
class CpuSeconds:
    """CPU seconds in the window by role; those of the service are null where its processes cannot be told here.

    The kernel counts them in ticks of 0.01 s a process, so a process that did less may read 0.
    """

    client: Annotated[float, "the load generator's processes, s"]
    orchestrator: Annotated[float, "this process, its observers, and its helpers, s"]
    proxy: Annotated[float | None, "what listens to HTTP: Serve's proxies; HAProxy and its manager, s"]
    replicas: Annotated[float | None, "the application, and the engines and servers of a model, s"]
    controller: Annotated[float | None, "Serve's controller, s"]
    raylet: Annotated[float | None, "raylet and GCS, s"]
    rest_of_service: Annotated[float | None, "driver, agents, dashboard, idle workers; other services of this run, s"]


@dataclass(frozen=True)
class HostFacts:
    """This machine in the window. Ratios are of the CPU of all its cores, 0 to 1."""

    num_cores: Annotated[int, "logical CPUs"]
    other_cpu_ratio: Annotated[
        float | None, "processes that are none of ours; null if the service's cannot be told from others'"
    ]
    interrupt_ratio: Annotated[float, "interrupts, which no process answers for; part of the former"]
    steal_ratio: Annotated[float, "taken by other virtual machines"]
    load_1m_start: Annotated[float, "load average of the last minute, at the start of the window"]
    load_1m_end: Annotated[float, "the same at its end"]
    cpu_s: Annotated[CpuSeconds, "CPU seconds by role, see below"]


@dataclass
class Host(Observer):
    """Observes the machine that the orchestrator and its client run on.

    `interval_s`: between two readings of the counters, s.
    """

    interval_s: Positive = 0.5

    @contextmanager
    def during(self, service: Service, directory: Path) -> Iterator["HostRecording"]:
        recording, stop = HostRecording(service), threading.Event()
        recording.sample()
        with ThreadPoolExecutor(1, "host") as pool:
            sampling = pool.submit(recording.sample_until, stop, self.interval_s)
            try:
                yield recording
            finally:
                stop.set()
        sampling.result()
        recording.sample()


@dataclass(frozen=True)
class _Sample:
    """Counters that only grow, but for the load."""

    at_s: float
    idle_s: float
    steal_s: float
    interrupt_s: float
    load_1m: float
    cpu_s: dict[str, float]  # role to CPU since the recording began


@dataclass
class _Process:
    started: bytes  # in clock ticks since boot: a process id alone may be taken again
    parent: int
    session: int
    cpu_s: float
    owner: Owner = "other"
    role: str | None = None  # a field of CpuSeconds; None: other work
    is_settled: bool = False  # what it runs is known; before that it may be about to exec


@dataclass
class HostRecording:
    """The readings of one measurement."""

    service: Service
    samples: list[_Sample] = field(default_factory=list)
    _processes: dict[int, _Process] = field(default_factory=dict)
    _cpu_s: dict[str, float] = field(default_factory=lambda: {role.name: 0.0 for role in fields(CpuSeconds)})
    _markers: set[bytes] = field(default_factory=set)  # of this run's services, the one under load included
    _sessions: dict[int, Owner] = field(default_factory=dict)  # of services, whose drivers begin one of their own
    _saw_service: bool = False

    def __post_init__(self) -> None:
        self._marker = None if self.service.marker is None else self.service.marker.encode()
        if self._marker is not None:
            self._markers.add(self._marker)

    def sample_until(self, stop: threading.Event, interval_s: float) -> None:
        """Read the counters at each interval until told to stop."""
        while not stop.wait(interval_s):
            self.sample()

    def sample(self) -> None:
        """Read the counters now: of the machine, and of each process that is ours or was not seen before."""
        self._read_processes()
        ticks = [int(word) for word in _read("/proc/stat").split(b"\n", 1)[0].split()[1:]]
        _user, _nice, _system, idle, iowait, irq, softirq, steal = ticks[:8]
        self.samples.append(
            _Sample(
                at_s=time.monotonic(),
                idle_s=(idle + iowait) / _TICKS_PER_S,
                steal_s=steal / _TICKS_PER_S,
                interrupt_s=(irq + softirq) / _TICKS_PER_S,
                load_1m=os.getloadavg()[0],
                cpu_s=dict(self._cpu_s),
            )
        )

    def facts(self, window: Period) -> HostFacts:
        """The counters' growth from the window's start to its end."""
        start, end = self._at(window.start_s), self._at(window.end_s)
        num_cores = os.cpu_count() or 1
        all_s = num_cores * (end.at_s - start.at_s)
        cpu_s: dict[str, float | None] = {role: end.cpu_s[role] - start.cpu_s[role] for role in end.cpu_s}
        # Not the sum of the busy ticks: those are samples of who was running, and idle time is measured.
        busy_s = all_s - (end.idle_s - start.idle_s) - (end.steal_s - start.steal_s)
        other_s: float | None = busy_s - sum(value for value in cpu_s.values() if value is not None)
        if not self._saw_service:
            cpu_s |= dict.fromkeys(("proxy", "replicas", "controller", "raylet", "rest_of_service"))
            if is_here(self.service.urls):
                other_s = None
        return HostFacts(
            num_cores=num_cores,
            other_cpu_ratio=None if other_s is None else _ratio(other_s, all_s),
            interrupt_ratio=_ratio(end.interrupt_s - start.interrupt_s, all_s),
            steal_ratio=_ratio(end.steal_s - start.steal_s, all_s),
            load_1m_start=start.load_1m,
            load_1m_end=end.load_1m,
            cpu_s=CpuSeconds(**cpu_s),  # type: ignore[arg-type]  # client and orchestrator are never null
        )

    def _at(self, at_s: float) -> _Sample:
        """The counters at a time between two readings; the load is that of the later one."""
        assert self.samples[0].at_s <= at_s <= self.samples[-1].at_s, "the window lies within the recording"
        index = min(bisect_right(self.samples, at_s, key=lambda sample: sample.at_s), len(self.samples) - 1)
        before, after = self.samples[index - 1], self.samples[index]
        part = (at_s - before.at_s) / (after.at_s - before.at_s)

        def between(first: float, second: float) -> float:
            return first + part * (second - first)

        return _Sample(
            at_s=at_s,
            idle_s=between(before.idle_s, after.idle_s),
            steal_s=between(before.steal_s, after.steal_s),
            interrupt_s=between(before.interrupt_s, after.interrupt_s),
            load_1m=after.load_1m,
            cpu_s={role: between(before.cpu_s[role], after.cpu_s[role]) for role in after.cpu_s},
        )

    def _read_processes(self) -> None:
        """Add what our processes used since the last reading to their roles."""
        is_first = not self.samples
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        for gone in self._processes.keys() - pids:
            del self._processes[gone]
        new: dict[int, _Process] = {}
        for pid in pids:
            known = self._processes.get(pid)
            if known is not None and known.owner == "other":
                continue  # not ours: it is told by what is left of the machine's busy time
            process = _process(pid)
            if process is None:
                continue
            if known is None or known.started != process.started:
                new[pid] = process
                continue
            if not known.is_settled:
                self._recognise(pid, known)
                known.is_settled = True
            self._charge(pid, known, process.cpu_s - known.cpu_s)
            known.cpu_s = process.cpu_s
        for pid, process in sorted(new.items(), key=lambda item: int(item[1].started)):  # a parent before its children
            self._processes[pid] = process
            self._recognise(pid, process)
            self._charge(pid, process, 0.0 if is_first else process.cpu_s)

    def _charge(self, pid: int, process: _Process, cpu_s: float) -> None:
        if process.owner in ("service", "another_service"):
            process.role = self._role(pid, process)
        if process.role is not None:
            self._cpu_s[process.role] += cpu_s

    def _recognise(self, pid: int, process: _Process) -> None:
        """Set whose process it is, and its role."""
        parent = self._processes.get(process.parent)
        parent_owner: Owner = parent.owner if parent else "other"
        marker = _marker(pid)
        if pid == os.getpid():
            owner: Owner = "orchestrator"
        elif marker is not None and (marker in self._markers or parent_owner != "other"):
            owner = "service" if marker == self._marker else "another_service"
            self._markers.add(marker)
            if process.session == pid:
                self._sessions[pid] = owner
        elif marker is not None:
            owner = "other"  # a service of another orchestrator
        elif parent_owner in ("service", "another_service"):
            owner = parent_owner
        elif process.session in self._sessions:
            owner = self._sessions[process.session]
        elif parent_owner == "other":
            owner = "other"
        else:
            owner = "orchestrator" if _HELPERS in _command(pid) else "client"
        process.owner = owner
        self._saw_service |= owner == "service"
        process.role = owner if owner in ("orchestrator", "client") else None

    def _role(self, pid: int, process: _Process) -> str:
        """What it does for the service; its title may change at any time, as when an idle worker becomes a replica."""
        if process.owner == "another_service":
            return "rest_of_service"
        command = _command(pid)
        if not command:  # it is ending
            return process.role or "rest_of_service"
        title = command.partition("\0")[0]
        if "::" not in title:
            title = title.rpartition("/")[2]
        for start, role in _ROLES.items():
            if title.startswith(start):
                return role
        if _VLLM_SERVER in command:
            return "replicas"
        parent = self._processes.get(process.parent)
        return parent.role if parent and parent.role in ("proxy", "replicas") else "rest_of_service"


def _ratio(part_s: float, all_s: float) -> float:
    """Counters of the machine and of processes are not read at once: what is out of 0 to 1 by that is cut off."""
    return min(1.0, max(0.0, part_s / all_s))


def _process(pid: int) -> _Process | None:
    words = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()  # a name may hold spaces
    if not words:
        return None
    return _Process(words[19], int(words[1]), int(words[3]), (int(words[11]) + int(words[12])) / _TICKS_PER_S)


def _marker(pid: int) -> bytes | None:
    for entry in _read(f"/proc/{pid}/environ").split(b"\0"):
        if entry.startswith(_MARKER):
            return entry.removeprefix(_MARKER)
    return None


def _command(pid: int) -> str:
    """Its command line, which is its title where it has set one; words end in NUL."""
    return _read(f"/proc/{pid}/cmdline").decode(errors="replace")


def _read(path: str) -> bytes:
    """A file of the kernel's, whole; empty when the process is gone or not ours to read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(descriptor)

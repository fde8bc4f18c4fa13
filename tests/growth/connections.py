"""An observer that counts the connections that the service has, ten times a second."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from orchestrator.kinds import Positive
from orchestrator.observe.base import Observer, Period, Service


@dataclass(frozen=True)
class ConnectionFacts:
    """How many at once in the window."""

    most_connections: int
    num_readings: int


@dataclass
class Connections(Observer):
    """Reads the kernel's table of connections."""

    interval_s: Positive = 0.1

    @contextmanager
    def during(self, service: Service, directory: Path) -> Iterator["Readings"]:
        readings, stop = Readings(), threading.Event()
        port = urlsplit(service.urls[0]).port

        def read() -> None:
            while not stop.wait(self.interval_s):
                inside = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
                readings.counts.append((time.monotonic(), sum(each.laddr[1:] == (port,) for each in inside)))

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield readings
        finally:
            stop.set()
            thread.join()


@dataclass
class Readings:
    """When, and how many."""

    counts: list[tuple[float, int]] = field(default_factory=list)

    def facts(self, window: Period) -> ConnectionFacts:
        inside = [count for at_s, count in self.counts if window.start_s <= at_s < window.end_s]
        return ConnectionFacts(max(inside, default=0), len(inside))

"""A cluster whose services are there at once, and a client that draws its requests: a run without any process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator import execute
from orchestrator.clients.base import Measurement, Window
from orchestrator.config import ClusterKind
from orchestrator.load.level import Level
from orchestrator.results.records import ClientFacts
from orchestrator.results.samples import write_samples
from tests.runs import draw_samples


class Answering:
    """Both of them."""

    def service(self, *_: Any) -> Any:
        nothing = SimpleNamespace(urls=["http://127.0.0.1:1"], token=None, effective={"warnings": ["none is real"]})
        nothing.start = nothing.wait_ready = nothing.begin_stop = nothing.stop = lambda: None
        nothing.snapshot = nothing.round_trip_ms = lambda: None
        return nothing

    def run(self, _urls: object, level: Level, window: Window, directory: Path, _on_progress: object) -> Measurement:
        assert level.concurrency is not None
        samples = draw_samples(level.concurrency, 50, window.duration_s, np.random.default_rng(0))
        write_samples(directory / "samples.parquet", samples)
        return Measurement(window.duration_s, ClientFacts(cpu_ratio=0.5, versions={"none": "1"}))


def install(monkeypatch: pytest.MonkeyPatch, made: type[Answering] = Answering) -> None:
    """In the place of local Ray and of every client."""
    monkeypatch.setitem(execute.CLUSTERS, ClusterKind.local, made)
    monkeypatch.setattr(execute, "_client", lambda *_: made())

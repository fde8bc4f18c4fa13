"""A cluster whose services are there at once, and a client that draws its requests: a run without any process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator.clients.base import Load, Measurement
from orchestrator.clients.locust import Locust
from orchestrator.clusters.local import Local
from orchestrator.results.records import ClientFacts
from orchestrator.results.samples import write_samples
from tests.runs import draw_samples

WINDOW_START_S = 100.0  # on the machine's monotonic clock


class Answering:
    """Both of them."""

    def service(self, *_: Any) -> Any:
        nothing = SimpleNamespace(
            urls=["http://127.0.0.1:1"], token=None, marker=None, effective={"warnings": ["none is real"]}
        )
        nothing.start = nothing.wait_ready = nothing.begin_stop = nothing.stop = lambda: None
        nothing.snapshot = nothing.round_trip_ms = lambda: None
        return nothing

    def run(self, load: Load, directory: Path, _on_progress: object) -> Measurement:
        assert load.level.concurrency is not None
        assert load.urls == ["http://127.0.0.1:1"]
        samples = draw_samples(load.level.concurrency, 50, load.window.duration_s, np.random.default_rng(0))
        write_samples(directory / "samples.parquet", samples)
        facts = ClientFacts(cpu_ratio=0.5, versions={"none": "1"})
        return Measurement(WINDOW_START_S, load.window.duration_s, facts)


def install(monkeypatch: pytest.MonkeyPatch, made: type[Answering] = Answering) -> None:
    """In the place of local Ray and of Locust."""
    monkeypatch.setattr(Local, "service", lambda _cluster, *given: made().service(*given))
    monkeypatch.setattr(Locust, "run", lambda _client, *given: made().run(*given))

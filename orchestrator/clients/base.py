"""The load client: what every client is asked for, and how one drives several processes of its own.

The processes are independent and share only an absolute start on the monotonic clock: no master, no port,
nothing between them that could slow one of them down. A spec and the start time go in, `ready`, one `progress` a
second and `facts` come out (see `orchestrator.child`).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from orchestrator.child import Child, Message, receive_any
from orchestrator.errors import ConfigError, TrialError
from orchestrator.load.level import Level
from orchestrator.process import uninterrupted
from orchestrator.results.records import ClientFacts, WholeRun
from orchestrator.secrets import Secret
from orchestrator.sections import ServiceConfig

CLIENT_START_S = 3.0  # seen on 2 slow cores; only estimates depend on it


@dataclass(frozen=True)
class Window:
    """How long a level is driven: clients start, the service warms up, the window is measured, late replies come."""

    ramp_up_s: float
    warmup_s: float
    duration_s: float
    drain_s: float


@dataclass(frozen=True)
class Live:
    """For the progress display only; nothing is computed from it."""

    elapsed_s: float  # relative to the start of the window
    throughput_rps: float  # over the last second
    num_failed: int  # so far
    latency_p99_ms: float | None  # of the last second, the worst process


class Measurement(NamedTuple):
    """What a client's `run` returns beside `samples.parquet`."""

    window_start_s: float  # start of the measurement window on this machine's monotonic clock
    duration_s: float  # length of the measurement window
    facts: ClientFacts
    whole_run: WholeRun | None = None  # None for a client whose window is its run


@dataclass(frozen=True)
class Load:
    """What one trial sends, and where to."""

    urls: Sequence[str]  # more than one: independent servers, each to get an equal part
    token: Secret | None  # what they want as bearer
    level: Level
    window: Window
    num_replicas: int  # that serve, behind one address or several
    max_processes: int  # of the load generator


@dataclass
class Client(ABC):
    """Derive a dataclass from it: its fields are the keys of its YAML in `conf/client/`."""

    @abstractmethod
    def check(self, config: ServiceConfig, loads: Sequence[Load]) -> None:
        """Refuse what cannot be driven, as far as it can be known without importing anything.

        `loads`: of each level, with as many addresses as there will be, which are not known yet. Raises ConfigError.
        """

    def check_live(self, config: ServiceConfig, timeout_s: float) -> None:  # noqa: B027 - often there is nothing
        """Refuse what takes seconds to find out, such as an import; just before the first deployment.

        Raises ConfigError.
        """

    @abstractmethod
    def run(self, load: Load, directory: Path, on_progress: Callable[[Live], None]) -> Measurement:
        """Drive one level; writes `samples.parquet` and its own output into the trial's `directory`.

        Raises TrialError when it could not be measured.
        """

    def takes_s(self, load: Load) -> float:
        """Estimate of the duration of `run`, in seconds."""
        window = load.window
        return CLIENT_START_S + window.ramp_up_s + window.warmup_s + window.duration_s


def check_clients(load: Load) -> None:
    """Refuse a level with fewer clients than servers. Raises ConfigError."""
    clients, num_servers = load.level.concurrency, len(load.urls)
    if clients is not None and clients < num_servers:
        raise ConfigError(f"{num_servers} servers need as many clients, found a level of {load.level.text}")


def check_fits(config: ServiceConfig, num_input_tokens: int | None, num_output_tokens: int | None) -> None:
    """Refuse a request longer than the engine's `max_model_len`, where both are known. Raises ConfigError."""
    engine = (config.workload.server or config.model).get("engine")
    limit = engine.get("max_model_len") if isinstance(engine, Mapping) else None  # the cluster refuses other shapes
    if not isinstance(limit, int) or num_input_tokens is None or num_output_tokens is None:
        return
    if num_input_tokens + num_output_tokens > limit:
        raise ConfigError(
            f"a request of {num_input_tokens} + {num_output_tokens} tokens does not fit "
            f"model.engine.max_model_len={limit}"
        )


def drive(
    module: str,
    specs: Sequence[Mapping[str, object]],
    env: Mapping[str, str],
    log: Path,
    on_progress: Callable[[Live], None],
    *,
    startup_s: float,
    lead_s: float,
    limit_s: float,
    if_late: str = "",
) -> tuple[float, list[Message]]:
    """Run one process for each spec; returns when they started (monotonic clock, s) and the facts of each, in order.

    They start `lead_s` after all of them are ready.

    Raises TrialError when one fails or needs longer than `startup_s`, or `limit_s` from the start to its end.
    """
    names = [f"load client process {index}" for index in range(len(specs))]
    children = [Child(module, env, log, name, TrialError) for name in names]
    try:
        for child, spec in zip(children, specs, strict=True):
            child.start()
            child.send(spec)
        _one_of_each(children, "ready", time.monotonic() + startup_s)
        start_s = time.monotonic() + lead_s
        for child in children:
            child.send({"start_s": start_s})
        deadline_s = start_s + limit_s
        facts = _one_of_each(children, "facts", deadline_s, on_progress, if_late)
        for child in children:
            _wait_for_end(child, deadline_s)
    finally:
        with uninterrupted():
            for child in children:
                child.hang_up()
            for child in children:
                child.close()
    return start_s, facts


def health(facts: Sequence[Message]) -> ClientFacts:
    """How the processes themselves fared: CPU and lag of the worst one. Nothing else is filled in."""
    cpu_ratios = [fact["cpu_ratio"] for fact in facts]
    return ClientFacts(
        num_processes=len(facts),
        cpu_ratio=max(cpu_ratios),
        cpu_ratios=cpu_ratios,
        lag_p50_ms=max_or_none(fact["lag_p50_ms"] for fact in facts),
        lag_p99_ms=max_or_none(fact["lag_p99_ms"] for fact in facts),
        latency_resolution_ms=0.0,  # raw clock readings, no histogram
    )


def _one_of_each(
    children: Sequence[Child],
    event: str,
    deadline_s: float,
    on_progress: Callable[[Live], None] | None = None,
    if_late: str = "",
) -> list[Message]:
    """Wait for this event from each process; the messages in the order of `children`. Raises TrialError."""
    answers: dict[Child, Message] = {}
    progress: dict[Child, Message] = {}
    while waiting := [child for child in children if child not in answers]:
        received = receive_any(waiting, deadline_s, event)
        if received is None:
            late = f"{', '.join(child.what for child in waiting)} did not come to '{event}' in time{if_late}"
            raise TrialError(f"{late}; {waiting[0].log_end()}")
        child, message = received
        (progress if message["event"] == "progress" else answers)[child] = message
        if on_progress and len(progress) == len(children):
            on_progress(_live(list(progress.values())))
            progress.clear()
    return [answers[child] for child in children]


def _wait_for_end(child: Child, deadline_s: float) -> None:
    status = child.wait(deadline_s)
    if status is None:
        raise TrialError(f"{child.what} did not end in time; {child.log_end()}")
    if status != 0:
        raise TrialError(f"{child.what} ended with exit code {status} at its end; {child.log_end()}")


def _live(progress: Sequence[Message]) -> Live:
    return Live(
        elapsed_s=max(part["elapsed_s"] for part in progress),
        throughput_rps=sum(part["throughput_rps"] for part in progress),
        num_failed=sum(part["num_failed"] for part in progress),
        latency_p99_ms=max_or_none(part["latency_p99_ms"] for part in progress),
    )


def max_or_none(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)

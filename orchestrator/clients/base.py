"""Load generator processes: how a client drives several, and what it is told to do.

The processes are independent and share only an absolute start on the monotonic clock: no master, no port,
nothing between them that could slow one of them down. A spec and the start time go in, `ready`, one `progress` a
second and `facts` come out (see `orchestrator.child`).
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.child import Child, receive_any
from orchestrator.errors import TrialError
from orchestrator.process import uninterrupted
from orchestrator.results.records import ClientFacts, WholeRun


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

    duration_s: float  # length of the measurement window
    facts: ClientFacts
    whole_run: WholeRun | None = None  # None for a client whose window is its run


def drive(
    module: str,
    specs: Sequence[Mapping[str, Any]],
    env: Mapping[str, str],
    log: Path,
    on_progress: Callable[[Live], None],
    *,
    startup_s: float,
    lead_s: float,
    limit_s: float,
    if_late: str = "",
) -> list[dict[str, Any]]:
    """The facts of one process for each spec, in their order. They start `lead_s` after all of them are ready.

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
    return facts


def health(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those of `ClientFacts` that say how the processes themselves fared: the worst counts."""
    cpu_ratios = [fact["cpu_ratio"] for fact in facts]
    return {
        "num_processes": len(facts),
        "cpu_ratio": max(cpu_ratios),
        "cpu_ratios": cpu_ratios,
        "lag_p50_ms": max_or_none(fact["lag_p50_ms"] for fact in facts),
        "lag_p99_ms": max_or_none(fact["lag_p99_ms"] for fact in facts),
        "latency_resolution_ms": 0.0,  # raw clock readings, no histogram
    }


def _one_of_each(
    children: Sequence[Child],
    event: str,
    deadline_s: float,
    on_progress: Callable[[Live], None] | None = None,
    if_late: str = "",
) -> list[dict[str, Any]]:
    """This message from each process, in their order. Raises TrialError when one ends or is late."""
    answers: dict[Child, dict[str, Any]] = {}
    progress: dict[Child, dict[str, Any]] = {}
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


def _live(progress: list[dict[str, Any]]) -> Live:
    return Live(
        elapsed_s=max(part["elapsed_s"] for part in progress),
        throughput_rps=sum(part["throughput_rps"] for part in progress),
        num_failed=sum(part["num_failed"] for part in progress),
        latency_p99_ms=max_or_none(part["latency_p99_ms"] for part in progress),
    )


def max_or_none(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)

"""Load generator processes: how a client drives several, and what it is told to do.

The processes are independent and share only an absolute start on the monotonic clock: no master, no port,
nothing between them that could slow one of them down. They talk to their parent in lines of JSON: a spec and the
start time go in, `ready`, one `progress` a second and `facts` come out, each with its `type`.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.errors import TrialError
from orchestrator.results.records import ClientFacts, WholeRun


@dataclass(frozen=True)
class Level:
    """One load point: `concurrency` clients, each sending its next request when the last was answered."""

    concurrency: int
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
    with Processes(module, len(specs), env, log) as processes:
        for index, spec in enumerate(specs):
            processes.send(index, spec)
        processes.wait_for("ready", time.monotonic() + startup_s)
        start_s = time.monotonic() + lead_s
        for index in range(len(specs)):
            processes.send(index, {"start_s": start_s})
        deadline_s = start_s + limit_s
        facts = processes.wait_for("facts", deadline_s, on_progress, if_late)
        processes.wait_for_end(deadline_s)
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


class Processes:
    """The client processes, which do not outlive the `with` block whatever ends it."""

    def __init__(self, module: str, num_processes: int, env: Mapping[str, str], log: Path) -> None:
        self.module, self.num_processes, self.env, self.log = module, num_processes, env, log
        self.processes: list[subprocess.Popen[bytes]] = []
        self.partial_lines = [b""] * num_processes

    def __enter__(self) -> "Processes":
        command = [sys.executable, "-m", self.module]
        pipe = subprocess.PIPE
        self.selector = selectors.DefaultSelector()
        try:
            with self.log.open("ab") as log:
                for index in range(self.num_processes):
                    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=self.env)
                    self.processes.append(process)
                    assert process.stdout
                    self.selector.register(process.stdout, selectors.EVENT_READ, index)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            assert process.stdin
            assert process.stdout
            process.stdout.close()
            with suppress(BrokenPipeError):  # it died before it had read its spec
                process.stdin.close()
        self.selector.close()

    def send(self, index: int, message: Mapping[str, Any]) -> None:
        stdin = self.processes[index].stdin
        assert stdin
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            self._fail(index, "before it could be told what to do")

    def wait_for(
        self, kind: str, deadline_s: float, on_progress: Callable[[Live], None] | None = None, if_late: str = ""
    ) -> list[dict[str, Any]]:
        """One message of this kind from each process, in their order."""
        answers: dict[int, dict[str, Any]] = {}
        progress: dict[int, dict[str, Any]] = {}
        while len(answers) < self.num_processes:
            events = self.selector.select(max(0.0, deadline_s - time.monotonic()))
            if not events:
                missing = [index for index in range(self.num_processes) if index not in answers]
                late = f"load client process {missing} did not come to '{kind}' in time{if_late}"
                raise TrialError(f"{late}; {self._tail()}")
            for key, _ in events:
                data = os.read(key.fd, 65536)
                if not data:
                    self.selector.unregister(key.fileobj)
                    if key.data not in answers:
                        self._fail(key.data, f"before '{kind}'")
                *lines, self.partial_lines[key.data] = (self.partial_lines[key.data] + data).split(b"\n")
                for message in map(json.loads, lines):
                    (progress if message["type"] == "progress" else answers)[key.data] = message
            if on_progress and len(progress) == self.num_processes:
                on_progress(_live(list(progress.values())))
                progress.clear()
        return [answers[index] for index in range(self.num_processes)]

    def wait_for_end(self, deadline_s: float) -> None:
        for index, process in enumerate(self.processes):
            try:
                status = process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TrialError(f"load client process {index} did not end in time; {self._tail()}") from None
            if status != 0:
                self._fail(index, "at its end")

    def _fail(self, index: int, when: str) -> None:
        status = self.processes[index].wait(10)
        raise TrialError(f"load client process {index} ended with exit code {status} {when}; {self._tail()}")

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return f"see {self.log}, which ends with:\n" + "\n".join(lines)


def _live(progress: list[dict[str, Any]]) -> Live:
    return Live(
        elapsed_s=max(part["elapsed_s"] for part in progress),
        throughput_rps=sum(part["throughput_rps"] for part in progress),
        num_failed=sum(part["num_failed"] for part in progress),
        latency_p99_ms=max_or_none(part["latency_p99_ms"] for part in progress),
    )


def max_or_none(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)

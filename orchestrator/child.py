"""A child process that speaks lines of JSON: the parent's end (`Child`) and the child's (`protocol_channel`, `say`).

One form for all of ours (load processes, the drivers that are local services, the SDK of a cloud): on standard input
come a spec or a call, one object a line; on standard output goes one object a line, each with its `event`; whatever
else a child prints goes to its log. A child ends itself when its standard input closes, so none outlives a parent
that was killed. Each has a session of its own, so that Ctrl-C on a terminal is the orchestrator's alone to handle:
it also reaches a child that is still importing and ignores nothing yet.
"""

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TextIO, TypeVar

from orchestrator.process import end_members, uninterrupted

Message = dict[str, Any]  # one line; from a child with its `event`
Spec = TypeVar("Spec", bound="ServiceSpec")

_LOG_END_LINES = 15
_LOG_END_BYTES = 1 << 16
_EXIT_TIMEOUT_S = 10.0  # from the end of its output to its exit code


class Child:
    """`python -m <module>` with all of its environment in `env` and its standard error appended to `log`.

    Nothing is started before `start`, so that `close` can be registered first; whatever is raised from there on,
    `close` leaves no process and no pipe behind. `error` makes, of a text that says what ended and what its log says
    last, the exception that is raised when the child is gone or says what is no message. `what` names it there.
    """

    def __init__(
        self, module: str, env: Mapping[str, str], log: Path, what: str, error: Callable[[str], Exception]
    ) -> None:
        self.what, self.log = what, log
        self._module, self._env, self._error = module, env, error
        self._started: subprocess.Popen[bytes] | None = None
        self._received = b""

    def start(self) -> None:
        """Start the process; to be called once."""
        assert self._started is None
        with uninterrupted(), self.log.open("ab") as stderr:  # else it could be forked and nobody know it
            self._started = subprocess.Popen(
                [sys.executable, "-m", self._module],
                env=dict(self._env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Mapping[str, object]) -> None:
        """Raises `error` when the child has ended."""
        try:
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise self._gone("before it could be told what to do") from None

    def receive(self, deadline_s: float, awaited: str) -> Message | None:
        """Its next message; None if there is none until `deadline_s` (monotonic clock).

        Raises `error` when the child ended before what is `awaited`.
        """
        received = receive_any([self], deadline_s, awaited)
        return None if received is None else received[1]

    def ask(self, message: Mapping[str, object], timeout_s: float, awaited: str) -> Message | None:
        """Send, and receive the answer; None after `timeout_s`. Raises `error` when the child has ended.

        Whoever does not answer is killed: a late answer would be taken for the next one's.
        """
        answer = None
        try:
            self.send(message)
            answer = self.receive(time.monotonic() + timeout_s, awaited)
        finally:  # also after an interrupt
            if answer is None:
                self.kill()
        return answer

    def wait(self, deadline_s: float) -> int | None:
        """The exit code; None if it has not ended by `deadline_s`."""
        try:
            return self._process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def hang_up(self) -> None:
        """Close its standard input, on which it ends itself, without waiting for that."""
        if self._started is not None:
            with contextlib.suppress(BrokenPipeError):  # it died before it had read all
                self._stdin.close()

    def kill(self) -> None:
        """Kill the process, but not the processes that it started."""
        if self._started is not None:
            self._process.kill()
            self._process.wait()

    def close(self, grace_s: float = 0.0) -> None:
        """Hang up, give it `grace_s` to end itself, then kill it. A second call does nothing."""
        if self._started is not None:
            self.hang_up()
            self.wait(time.monotonic() + grace_s)
            self.kill()
            self._stdout.close()

    def log_end(self) -> str:
        """Where its log is, and the last lines of it."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _LOG_END_BYTES))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return "\n".join([f"see {self.log}{', which ends with:' if lines else ''}", *lines[-_LOG_END_LINES:]])

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        assert self._started is not None, "not started"
        return self._started

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _read(self, awaited: str) -> None:
        data = os.read(self._stdout.fileno(), 1 << 16)
        if not data:
            raise self._gone(f"before '{awaited}'")
        self._received += data

    def _next_message(self) -> Message | None:
        """The first whole line of what was received."""
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict) and isinstance(message.get("event"), str):
                return message
        raise self._error(f"{self.what} said what is no message: {line[:200]!r}; {self.log_end()}")

    def _gone(self, when: str) -> Exception:
        code = self.wait(time.monotonic() + _EXIT_TIMEOUT_S)
        how = "closed its output" if code is None else f"ended with exit code {code}"
        return self._error(f"{self.what} {how} {when}; {self.log_end()}")


def receive_any(children: Sequence[Child], deadline_s: float, awaited: str) -> tuple[Child, Message] | None:
    """The next message of any of them, and whose it is; None if there is none until `deadline_s`.

    Raises the `error` of one that ended before what is `awaited`.
    """
    while True:
        for child in children:
            if (message := child._next_message()) is not None:
                return child, message
        with selectors.DefaultSelector() as selector:
            for child in children:
                selector.register(child._stdout, selectors.EVENT_READ, child)
            readable = selector.select(max(0.0, deadline_s - time.monotonic()))
        if not readable:
            return None
        for key, _ in readable:
            key.data._read(awaited)


# The child's end.


def protocol_channel() -> TextIO:
    """Standard output for our lines alone; whatever else is printed goes to the log, which is standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def say(channel: TextIO, event: str, /, **facts: Any) -> None:
    """One line to the parent."""
    channel.write(json.dumps({"event": event, **facts}) + "\n")
    channel.flush()


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """What every child that is a local service is told first, on one line."""

    directory: str  # its own, for temporary files; every process of the service has it in its environment
    log_dir: str
    declared_env: Mapping[str, str]  # the profile's
    cluster_env: Mapping[str, str]  # that of cluster and workload, the same for every arm


def be_service(
    kind: type[Spec],
    bring_up: Callable[[Spec, Callable[[str], None]], Mapping[str, object]],
    snapshot: Callable[[Spec], Mapping[str, object]],
    ask_to_end: Callable[[], None] = lambda: None,
) -> NoReturn:
    """The life of a child process that is a local service, until its standard input closes.

    It reads the spec, a `kind`; `bring_up(spec, on_status)` returns what the service really runs with, as `ready`
    tells. Each call that follows is answered by `snapshot(spec)`. An exception is told as `failed`. In the end, after
    `ask_to_end`, every process of the service is ended, also when the orchestrator was killed and could clean nothing
    up.
    """
    channel = protocol_channel()
    spec = kind(**json.loads(sys.stdin.readline()))
    directory, parent, told = Path(spec.directory), os.getppid(), ""

    def on_status(text: str) -> None:
        nonlocal told
        if text != told:
            say(channel, "status", text=text)
            told = text

    try:
        say(channel, "ready", effective=bring_up(spec, on_status))
        for line in sys.stdin:
            assert json.loads(line) == {"call": "snapshot"}, line
            say(channel, "snapshot", **snapshot(spec))
    except Exception as error:
        traceback.print_exc()
        say(channel, "failed", error=str(error) or repr(error))
        sys.stdin.read()  # stay until told to go: logs are copied meanwhile
    finally:
        ask_to_end()
        end_members(directory)
        if os.getppid() != parent:  # orphaned; else the parent removes it last, since another may then take its name
            shutil.rmtree(directory, ignore_errors=True)
        os._exit(0)  # exit handlers, Ray's among them, would wait for processes that are gone

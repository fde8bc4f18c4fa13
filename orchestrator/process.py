"""Finding and ending the processes of one service, whoever their parent is by now.

A local Ray cluster is a tree whose members outlive their parents and rename themselves. Two traces stay: the
marker variable in the environment, which holds the service's own directory, and (for agents whose title
overwrites their environment) an open file below that directory.
"""

import contextlib
import ctypes
import fcntl
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import psutil

from orchestrator import provenance
from orchestrator.errors import ConfigError

MARKER = "SERVE_ORCHESTRATOR_SERVICE"
SCRATCH_PREFIX = "serve-orchestrator-"  # of the directories where Hydra writes while it composes

# What a child process may inherit. Everything else (RAY_*, VLLM_*, LOCUST_*, OMP_*, proxies, credentials) stays out:
# a flag exported in the calling shell must not reach a service that does not declare it.
_INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TERM",
    "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
    "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip


# What a service's process reports of its environment, less what must not be written down.
_REPORTED_PREFIXES = ("RAY_", "VLLM_")
_SECRET_PARTS = ("TOKEN", "SECRET", "PASSWORD", "KEY")


class Interrupted(BaseException):
    """A signal asked this process to end. Raised so that every teardown runs."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


_held: list[int] = []  # signals that wait for the end of an `uninterrupted` block
_depth = 0


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold an interrupt back until the block is done: what is being claimed or torn down stays whole."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _held and _depth == 0:
            raise Interrupted(_held.pop())


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Interrupted`; later ones only say that teardown is under way."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def say(*_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"already stopping; this takes some seconds\n")

    def handle(signum: int, _frame: FrameType | None) -> None:
        for number in signals:
            signal.signal(number, say)
        if _depth == 0:
            raise Interrupted(signum)
        _held.append(signum)
        say()

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def claim(root: Path) -> int:
    """Hold a directory until this process ends, so that nobody resumes a run that is still going, or clears it away.

    Raises ConfigError when another one holds it.
    """
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{root} is still being written by another orchestrator") from None
    return descriptor


def clean_environment() -> dict[str, str]:
    """The part of our own environment that child processes start from."""
    return {name: os.environ[name] for name in _INHERITED if name in os.environ}


def reportable(env: Mapping[str, str], declared: Mapping[str, str]) -> dict[str, str]:
    """The part of a service's environment that may be written down and can matter."""
    return {
        name: value
        for name, value in sorted(env.items())
        if (name in declared or name.startswith(_REPORTED_PREFIXES)) and not any(part in name for part in _SECRET_PARTS)
    }


def die_with_parent() -> None:
    """In a child, before exec: ask Linux for SIGKILL when the parent ends, even by SIGKILL."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def listener(port: int) -> dict[str, str | int] | None:
    """Which process listens on this TCP port of this machine (pid and name); None if none does or it is not ours."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid and connection.laddr[1:] == (port,):
            try:
                return {"port": port, "pid": connection.pid, "process": psutil.Process(connection.pid).name()}
            except psutil.NoSuchProcess:  # HAProxy replaces itself when its backends change
                return listener(port)
    return None


def members(directory: Path) -> list[psutil.Process]:
    """Live processes of the service that this directory belongs to, ourselves excluded."""
    found = []
    inside = f"{directory}{os.sep}"
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            # Not everyone who reads a log of ours is ours: the open file counts where there is no environment.
            if environment.get(MARKER) == str(directory) or (
                not environment and any(file.path.startswith(inside) for file in process.open_files())
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def end_members(directory: Path, timeout_s: float = 20.0) -> list[str]:
    """Kill every process of the service until none is left.

    Returns descriptions of those that are still alive after `timeout_s`: empty is success. Members start
    new members while they die, so one pass is not enough.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        alive = members(directory)
        if not alive or time.monotonic() > deadline:
            return [f"pid {process.pid}" for process in alive]
        shared = {path for process in alive for path in _shared_memory(process)}
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=1.0)
        if shared:  # outlives those who made it, unless they end in good order
            elsewhere = {path for process in psutil.process_iter() for path in _shared_memory(process)}
            for path in shared - elsewhere:
                path.unlink(missing_ok=True)


def process_id(process: psutil.Process) -> str:
    """The same for one process only: start in clock ticks since boot, for the time of day may be set.

    Raises OSError when it has ended.
    """
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{process.pid}-{started}"


def _shared_memory(process: psutil.Process) -> set[Path]:
    """Shared memory that Python made and the process has mapped; files that somebody named are theirs."""
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
    except OSError:
        return set()
    return {Path("/dev/shm") / name for name in re.findall(r"/dev/shm/(psm_\w+)$", maps, re.MULTILINE)}


def is_claimed(directory: Path) -> bool:
    """Whether a live orchestrator holds this service directory."""
    claim = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(claim)
    return False


def client_environment() -> dict[str, str]:
    """The clean environment plus what a child needs to import the workloads: nothing of any service's."""
    search = os.pathsep.join(map(str, provenance.search_path()))
    return clean_environment() | {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1"}


@functools.cache  # arms share modules
def import_trouble(module: str, timeout_s: float) -> str | None:
    """Import a module, or run a .py file, in a child process: what went wrong, with the end of its traceback."""
    load = f"import runpy; runpy.run_path({module!r})" if module.endswith(".py") else f"import {module}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", load],
            env=client_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return f"is not imported after {timeout_s:g} s"
    return f"does not import:\n{last_lines(done.stderr, 4)}" if done.returncode else None


def last_lines(text: str, count: int) -> str:
    """The end of a log or a traceback."""
    return "\n".join(text.strip().splitlines()[-count:])

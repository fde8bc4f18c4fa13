"""Finding and ending the processes of one service, whoever their parent is by now.

A local Ray cluster is a tree whose members outlive their parents and rename themselves. Two traces stay: the
marker variable in the environment, and (for agents whose title overwrites it) an open file below the
service's own directory.
"""

import ctypes
import os
import signal
import time
from pathlib import Path

import psutil

MARKER = "SERVE_ORCHESTRATOR_SERVICE"

# What a child process may inherit. Everything else (RAY_*, VLLM_*, LOCUST_*, OMP_*, proxies, credentials) stays out:
# a flag exported in the calling shell must not reach a service that does not declare it.
_INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TERM",
    "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
    "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip


def clean_environment() -> dict[str, str]:
    """The part of our own environment that child processes start from."""
    return {name: os.environ[name] for name in _INHERITED if name in os.environ}


def die_with_parent() -> None:
    """In a child, before exec: ask Linux for SIGKILL when the parent ends, even by SIGKILL."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def members(marker: str, directory: Path) -> list[psutil.Process]:
    """Live processes of the service with this marker value and temp directory, ourselves excluded."""
    found = []
    inside = f"{directory}{os.sep}"
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARKER) == marker or any(
                file.path.startswith(inside) for file in process.open_files()
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def end_members(marker: str, directory: Path, timeout_s: float = 20.0) -> list[str]:
    """Kill every process of the service until none is left.

    Returns descriptions of those that are still alive after `timeout_s`: empty is success. Members start
    new members while they die, so one pass is not enough.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        alive = members(marker, directory)
        if not alive or time.monotonic() > deadline:
            return [f"pid {process.pid}" for process in alive]
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=1.0)

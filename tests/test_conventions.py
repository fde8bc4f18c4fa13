"""Conventions that a reader relies on: who may import what, and no path of a developer's machine."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = sorted(path for folder in ("orchestrator", "workloads", "analysis") for path in (ROOT / folder).rglob("*.py"))
HEAVY = {"ray", "anyscale", "vllm", "torch", "locust", "gevent", "geventhttpclient"}
# The modules that run in child processes of their own.
MAY_BE_HEAVY = {
    "orchestrator/clusters/local_driver.py",
    "orchestrator/clients/locust_worker.py",
    "orchestrator/clients/vllm_bench_worker.py",
    "orchestrator/clusters/anyscale.py",  # inside functions of its child process
}
# What a module of ours may import of ours; absent = anything.
ALLOWED = {
    "orchestrator/errors.py": set(),
    "orchestrator/paths.py": set(),
    "orchestrator/results.py": set(),
    "orchestrator/process.py": {"errors"},
    "orchestrator/provenance.py": set(),
    "orchestrator/config.py": {"errors"},
    "orchestrator/composition.py": {"errors"},
    "orchestrator/plan.py": {"config", "errors", "paths", "provenance"},
    "orchestrator/clients/processes.py": {"errors"},
    "orchestrator/clients/locust.py": {"errors", "results", "clients"},
    "orchestrator/clients/vllm_bench.py": {"errors", "results", "clients"},
    "orchestrator/clients/locust_worker.py": {"clients", "process", "results", "secrets"},
    "orchestrator/clusters/local_ray.py": {"config", "errors", "process", "provenance"},
    "orchestrator/clusters/local_driver.py": {"clusters", "process", "provenance"},
    "orchestrator/clusters/vllm_driver.py": {"clusters", "process", "provenance"},
    "orchestrator/clusters/engine.py": set(),
    "orchestrator/clusters/remote.py": {"clusters", "config", "errors", "provenance", "secrets"},
    "orchestrator/clusters/existing.py": {"clusters", "config", "errors", "process"},
    "orchestrator/clusters/endpoint.py": {"clusters", "config", "errors"},
    "orchestrator/clusters/anyscale.py": {"clusters", "config", "errors", "process", "secrets"},
    "orchestrator/secrets.py": set(),
}


def imports(path: Path) -> set[str]:
    """Dotted names of everything imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    imported = imports(path)
    roots = {each.split(".")[0] for each in imported}
    if name.startswith("workloads/"):
        assert roots.isdisjoint({"orchestrator", "analysis"})
    elif name not in MAY_BE_HEAVY:
        assert roots.isdisjoint(HEAVY)
    if name.startswith("analysis/"):
        ours = {each.split(".")[1] for each in imported if each.startswith("orchestrator.")}
        assert ours <= {"results", "paths", "errors"}
    if name == "analysis/plots.py":  # what is drawn was computed before
        assert not imported & {"analysis.stats", "analysis.compare"}
        assert "scipy" not in roots
    if name.startswith("orchestrator/") and name != "orchestrator/__main__.py":  # which has the report written
        assert "analysis" not in roots
    if name in ALLOWED:
        ours = {each.split(".")[1] for each in imported if each.startswith("orchestrator.")}
        assert ours <= ALLOWED[name]
    if name != "orchestrator/__main__.py":
        assert "hydra.main" not in path.read_text()


def test_allowed_names_exist() -> None:
    assert all((ROOT / name).exists() for name in [*ALLOWED, *MAY_BE_HEAVY])


def test_no_path_of_a_developers_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "README.md" in listed.splitlines()
    needles = [f"/{folder}/".encode() for folder in ("work", "root", "home")]
    for name in listed.splitlines():
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        assert not any(needle in content for needle in needles), name

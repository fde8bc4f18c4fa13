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
    "orchestrator/clusters/anyscale_sdk.py",
}
# What a module of ours may import of ours; absent = anything.
ALLOWED = {
    "orchestrator/errors.py": set(),
    "orchestrator/paths.py": set(),
    "orchestrator/load/level.py": set(),
    "orchestrator/journal.py": {
        *("arms", "config", "errors", "load", "paths", "plan", "process", "provenance", "results"),
    },
    "orchestrator/results/records.py": set(),
    "orchestrator/results/document.py": {"results"},
    "orchestrator/results/samples.py": {"results"},
    "orchestrator/results/validity.py": {"results"},
    "orchestrator/process.py": {"errors", "provenance"},
    "orchestrator/provenance.py": set(),
    "orchestrator/config.py": {"errors", "load"},
    "orchestrator/composition.py": {"errors"},
    "orchestrator/application.py": {"config", "errors", "process", "provenance"},
    "orchestrator/arms.py": {"application", "config", "errors", "load", "paths"},
    "orchestrator/cost.py": {"clients", "config", "load"},
    "orchestrator/plan.py": {"arms", "config", "cost", "errors", "load", "paths"},
    "orchestrator/waiting.py": set(),
    "orchestrator/child.py": {"process"},
    "orchestrator/clients/check.py": {"application", "config", "errors", "load", "provenance"},
    "orchestrator/clients/base.py": {"child", "errors", "process", "results"},
    "orchestrator/clients/locust.py": {"errors", "load", "results", "clients"},
    "orchestrator/clients/vllm_bench.py": {"errors", "load", "results", "clients"},
    "orchestrator/clients/locust_worker.py": {"child", "clients", "results", "secrets"},
    "orchestrator/clusters/flags.py": {"application", "config", "errors", "provenance"},
    "orchestrator/clusters/base.py": {"application", "clusters", "config", "errors", "results", "secrets", "waiting"},
    "orchestrator/clusters/local.py": {"application", "child", "clusters", "config", "errors", "process"},
    "orchestrator/clusters/local_driver.py": {"child", "clusters", "process", "provenance", "waiting"},
    "orchestrator/clusters/vllm_driver.py": {"child", "clusters", "process", "provenance"},
    "orchestrator/clusters/engine.py": set(),
    "orchestrator/clusters/remote.py": {
        *("application", "clusters", "config", "errors", "provenance", "secrets", "waiting"),
    },
    "orchestrator/clusters/existing.py": {"application", "clusters", "config", "errors", "process", "waiting"},
    "orchestrator/clusters/endpoint.py": {"clusters", "config", "errors", "waiting"},
    "orchestrator/clusters/anyscale.py": {
        *("application", "child", "clusters", "config", "errors", "process", "secrets", "waiting"),
    },
    "orchestrator/clusters/anyscale_sdk.py": {"child", "secrets"},
    "orchestrator/observe/base.py": set(),
    "orchestrator/observe/host.py": {"errors", "observe", "process"},
    "orchestrator/secrets.py": set(),
}

SHARED_BY_CLUSTERS = {"base", "engine", "flags", "remote"}


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
        importer = {"journal"} if name == "analysis/published.py" else set()  # which writes a run directory
        assert ours <= {"results", "paths", "errors", "load"} | importer
    if name == "analysis/plots.py":  # what is drawn was computed before
        assert not imported & {"analysis.stats", "analysis.compare", "analysis.contrasts"}
        assert "scipy" not in roots
    if name.startswith("orchestrator/") and name != "orchestrator/__main__.py":  # which has the report written
        assert "analysis" not in roots
    if name in ALLOWED:
        ours = {each.split(".")[1] for each in imported if each.startswith("orchestrator.")}
        assert ours <= ALLOWED[name]
    if name.startswith("orchestrator/clusters/"):  # no backend knows another
        others = {each.split(".")[2] for each in imported if each.startswith("orchestrator.clusters.")}
        assert others <= SHARED_BY_CLUSTERS
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

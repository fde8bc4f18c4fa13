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
# Of orchestrator/, lowest first: a module imports what stands below it. A package stands for those of its modules that
# are not named themselves, which may import each other; what else stands in one row may not.
LAYERS = [
    ("errors",),
    ("secrets", "waiting", "paths", "provenance"),
    ("process", "composition"),
    ("child",),
    ("kinds",),
    ("results",),
    ("load",),
    ("sections",),
    ("clusters.base", "clusters.flags", "clients.base", "observe"),
    ("results.document",),  # tells of what observers record
    ("application",),
    ("clusters", "clients"),  # the kinds, and what runs in their processes
    ("config",),
    ("arms",),
    ("cost",),
    ("plan",),
    ("journal",),
    ("judge",),
    ("progress",),
    ("execute",),
    ("cleanup",),
    ("__main__",),
]

# The kinds are named by `_target_`. Whoever imports one knows one kind from another, as this one does:
KNOWS_A_KIND = {"cleanup": {"clusters.local"}}  # it looks for what was left on this machine
SHARED_BY_CLUSTERS = {"base", "engine", "flags", "remote", "specs"}


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
    roots = {module_name.split(".")[0] for module_name in imported}
    if name.startswith("workloads/"):
        assert roots.isdisjoint({"orchestrator", "analysis"})
    elif name not in MAY_BE_HEAVY:
        assert roots.isdisjoint(HEAVY)
    if name.startswith("analysis/"):
        ours = {module_name.split(".")[1] for module_name in imported if module_name.startswith("orchestrator.")}
        importer = {"journal"} if name == "analysis/published.py" else set()  # which writes a run directory
        assert ours <= {"results", "paths", "errors", "load"} | importer
    if name == "analysis/plots.py":  # what is drawn was computed before
        assert not imported & {"analysis.stats", "analysis.compare", "analysis.contrasts"}
        assert "scipy" not in roots
    if name.startswith("orchestrator/") and name != "orchestrator/__main__.py":  # which has the report written
        assert "analysis" not in roots
    if name.startswith("orchestrator/clusters/"):  # no backend knows another
        others = {
            module_name.split(".")[2] for module_name in imported if module_name.startswith("orchestrator.clusters.")
        }
        assert others <= SHARED_BY_CLUSTERS
    if name != "orchestrator/__main__.py":
        assert "hydra.main" not in path.read_text()


def entry(dotted: str) -> tuple[int, str]:
    """Row and name of the most exact entry of LAYERS that a module, or what is imported of it, belongs to."""
    found = [(row, name) for row, names in enumerate(LAYERS) for name in names if f"{dotted}.".startswith(f"{name}.")]
    assert found, f"orchestrator.{dotted} has no layer"
    return max(found, key=lambda row_and_name: len(row_and_name[1]))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "orchestrator").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_layers(path: Path) -> None:
    ours = sorted(
        dotted.removeprefix("orchestrator.") for dotted in imports(path) if dotted.startswith("orchestrator.")
    )
    module = ".".join(path.relative_to(ROOT / "orchestrator").with_suffix("").parts).removesuffix("__init__")
    if module in ("", "clients.", "clusters.", "load.", "observe.", "results."):
        assert ours == []
        return
    row, name = entry(module)
    for dotted in ours:
        its_row, its_name = entry(dotted)
        assert its_row < row or its_name == name, f"{module} imports {dotted}, which does not stand below it"
        is_kind = its_name in ("clusters", "clients") or dotted.startswith(("observe.host", "load.ladder"))
        if is_kind and its_name != name and name != "results.document":
            assert dotted.rpartition(".")[0] in KNOWS_A_KIND.get(module, ()), f"{module} imports the kind {dotted}"


def test_names_of_the_rules_exist() -> None:
    modules = [name for names in LAYERS for name in names]
    assert len(set(modules)) == len(modules)
    for name in modules:
        path = ROOT / "orchestrator" / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), name
    assert all((ROOT / name).exists() for name in MAY_BE_HEAVY)


def test_no_path_of_a_developers_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "README.md" in listed.splitlines()
    needles = [f"/{folder}/".encode() for folder in ("work", "root", "home")]
    for name in listed.splitlines():
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        assert not any(needle in content for needle in needles), name

"""Which files make a service another one: an edit that a resume must not mix with what was measured before."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.application import service_key, source_digest
from orchestrator.config import Config
from tests.conftest import Compose


@pytest.fixture
def keys(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`keys("pkg.app")`: the service key of an application in that module, as its source is now."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    configs: dict[str, Config] = {}

    def key(module: str) -> str:
        if module not in configs:
            configs[module] = compose(f"workload.application.import_path={module}:build")
        source_digest.cache_clear()  # it holds for one process, in which the source does not change
        return service_key(configs[module], configs[module].cluster)

    return key


FILES = {
    "pkg/__init__.py": "",
    "pkg/shared.py": "FACTOR = 1",
    "pkg/other/app.py": "",
    "pkg/mine/app.py": "from pkg import shared\nfrom .deep import model\ndef build(args): ...",
    "pkg/mine/deep/model.py": "",
    "pkg/mine/deep/__pycache__/model.pyc": "",
    "pkg/mine/vocabulary.json": "{}",
    "pkg/mine/locustfile.py": "",
    "pkg/mine/.hidden": "",
}


@pytest.mark.parametrize(
    ("edited", "is_another"),
    [
        ("pkg/mine/app.py", True),
        ("pkg/mine/deep/model.py", True),  # a subpackage
        ("pkg/mine/vocabulary.json", True),  # data beside it
        ("pkg/mine/locustfile.py", True),  # the client of its package
        ("pkg/shared.py", True),  # imported from outside its package
        ("pkg/__init__.py", True),  # runs on the way to it
        ("pkg/mine/deep/new.py", True),
        ("pkg/other/app.py", False),
        ("pkg/mine/deep/__pycache__/model.pyc", False),
        ("pkg/mine/.hidden", False),
    ],
)
def test_an_edit_makes_another_service(
    keys: Callable[[str], str], tmp_path: Path, edited: str, is_another: bool
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = keys("pkg.mine.app")
    assert keys("pkg.mine.app") == before
    (tmp_path / edited).write_text("# edited")
    assert (keys("pkg.mine.app") != before) is is_another


def test_a_module_without_a_package(keys: Callable[[str], str], tmp_path: Path) -> None:
    """Beside it may lie anything, such as the outputs of runs."""
    (tmp_path / "mine.py").write_text("import helper\ndef build(args): ...")
    (tmp_path / "helper.py").write_text("")
    before = keys("mine")
    (tmp_path / "unrelated.py").write_text("1")
    assert keys("mine") == before
    (tmp_path / "helper.py").write_text("2")
    after = keys("mine")
    assert after != before
    (tmp_path / "mine.py").write_text("def build(args): return 3")
    assert keys("mine") not in (before, after)

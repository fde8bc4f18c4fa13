"""docs/extend.md is true: its files are written as they stand there, and its commands are run in their order.

One run of them is on real Ray Serve; the others on Python's own HTTP server.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.e2e

SHORT = ["sweep.ramp_up_s=0", "sweep.warmup_s=0.5", "sweep.duration_s=2", "sweep.cooldown_s=0"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "docs" / "extend.md").read_text())


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], command
    if words[2] == "orchestrator":
        words += SHORT
    (latest,) = [path for path in sorted(folder.glob("outputs/*")) if path.name != "dry_runs"][-1:] or [None]
    words = [str(latest) if word == "outputs/<run>" else word for word in words[1:]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "MPLBACKEND": "agg"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my/` as the page has it."""
    folder = tmp_path_factory.mktemp("extend")
    for kind, text in blocks():
        if kind != "sh":
            first, _, _ = text.partition("\n")
            path = folder / first.removeprefix("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


def test_every_seam_has_an_example() -> None:
    page = (ROOT / "docs" / "extend.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert [section.split("\n")[0] for section in sections] == [
        *("A profile", "A workload", "A cluster", "A client", "A level rule", "An observer", "A metric", "A plot"),
    ]
    assert all(BLOCK.search(section) for section in sections)
    assert all(len(section.splitlines()) <= 85 for section in sections)  # a screen, and what is copied from it


def test_every_example_runs(folder: Path) -> None:
    commands = [line for kind, text in blocks() if kind == "sh" for line in text.splitlines()]
    assert len(commands) == 8
    for command in commands:
        done = run(command, folder)
        assert done.returncode in (0, 3), f"{command}\n{done.stdout}{done.stderr}"
        if "until_slow" in command:
            (latest,) = sorted(folder.glob("outputs/2*"))[-1:]
            assert [path.name for path in latest.glob("*/trials/*")] == ["c0001-r0"]  # too slow at once
        if "memory" in command:
            (latest,) = sorted(folder.glob("outputs/2*"))[-1:]
            assert all('"used_after_gib"' in path.read_text() for path in latest.glob("*/trials/*/trial.json"))
        if "share_within" in command:
            assert "within 5 ms" in done.stdout
    assert (folder / "my" / "medians.png").stat().st_size > 5000

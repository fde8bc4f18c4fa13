"""Notebooks, report and verdict of a small run on real Ray Serve."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.e2e.conftest import OnUserCluster

pytestmark = [pytest.mark.e2e, pytest.mark.serial]

NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def run(on_user_cluster: OnUserCluster) -> tuple[Path, str]:
    """Two blocks of a delay of 100 ms against 200 ms: an effect of known size."""
    done = on_user_cluster.said["run"]
    return on_user_cluster.run, done.stdout + done.stderr


@pytest.fixture(scope="module")
def executed(run: tuple[Path, str]) -> dict[Path, Any]:
    """Every notebook, executed on the run, all at once: starting a kernel is most of the time."""

    async def execute(path: Path) -> Any:
        notebook = nbformat.read(path, as_version=4)
        place = {"metadata": {"path": str(path.parent)}}
        client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place)
        await client.async_execute(env={**os.environ, "RUN": str(run[0])})
        return notebook

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*map(execute, NOTEBOOKS), return_exceptions=True)

    return dict(zip(NOTEBOOKS, asyncio.run(all_at_once()), strict=True))


def test_the_run_ends_with_verdict_pictures_and_report(run: tuple[Path, str]) -> None:
    directory, output = run
    assert str(directory / "report.html") in output.replace("\n", "")
    assert (directory / "report.html").stat().st_size > 50_000
    assert {"forest", "throughput_over_time"} <= {path.stem for path in (directory / "plots").glob("*.png")}
    cells = pd.read_csv(directory / "comparison.csv")
    throughput = cells[cells.family == "primary"].iloc[0]
    # Each reply takes its delay and a few milliseconds of Serve's own, so the ratio is a little above 0.1 / 0.2.
    assert throughput.num_blocks == 2
    assert 0.5 < throughput.ratio < 0.8
    says = {"SLOWER": "delay_s=0.2 is SLOWER than delay_s=0.1", "INCONCLUSIVE": "against delay_s=0.1 is INCONCLUSIVE"}
    assert says[throughput.verdict] in " ".join(output.split()), output  # two blocks may be too few for SLOWER


def test_an_arm_and_its_own_blocks_are_compared_by_the_command_line(run: tuple[Path, str]) -> None:
    directory, _ = run
    arms = [f"{directory}:delay_s=0.1", f"{directory}:delay_s=0.2"]
    command = [sys.executable, "-m", "analysis", "gate", *arms, "--max-slowdown", "0.03"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (1, 3), done.stdout + done.stderr  # slower; the interval of two blocks may be wide
    assert "throughput (req/s) at 2 clients" in done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_execute_on_a_run(path: Path, executed: dict[Path, Any]) -> None:
    """Without it a renamed function of `analysis` would be found by the first reader of a notebook."""
    notebook = executed[path]
    if isinstance(notebook, BaseException):
        raise notebook
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs
    if path.stem in ("unary_streaming", "compare_runs"):
        assert any("image/png" in output.get("data", {}) for output in outputs)


def test_notebooks_are_committed_without_outputs() -> None:
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        assert all(not cell.get("outputs") for cell in cells), path

"""`python -m analysis` as a user types it: what it prints, what it writes, how it exits."""

import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from analysis.__main__ import main
from tests.conftest import ROOT
from tests.runs import make_run

TWO = {"baseline": 20.0, "optimized": 30.0}


def analysis(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in this process: starting one costs more than nearly all that is asked of it."""
    command = ["analysis", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            code: Any = main()
        except SystemExit as end:  # of Typer
            code = end.code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("outputs") / "run", TWO, repeats=4).root


def test_compare_table(root: Path) -> None:
    command = [sys.executable, "-m", "analysis", "compare", f"{root}:baseline", f"{root}:optimized"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "FASTER" in done.stdout
    assert "optimized is FASTER than baseline: ×1.5" in " ".join(done.stdout.split())


def test_compare_json_keeps_the_contract(root: Path) -> None:
    done = analysis("compare", f"{root}:baseline", f"{root}:optimized", "--format", "json")
    answer = json.loads(done.stdout)
    assert "FASTER" in answer["summary"]
    keys = {"metric", "level", "ratio", "ci_low_ratio", "ci_high_ratio", "verdict", "family"}
    assert all(keys <= cell.keys() for cell in answer["cells"])
    assert answer["cells"][0]["family"] == "primary"


def test_compare_markdown(root: Path) -> None:
    done = analysis("compare", f"{root}:baseline", f"{root}:optimized", "--format", "markdown")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("### ▲ FASTER")


def test_margin(root: Path) -> None:
    done = analysis("compare", f"{root}:baseline", f"{root}:optimized", "--margin", "0.9", "--format", "json")
    assert json.loads(done.stdout)["cells"][0]["verdict"] == "EQUIVALENT"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["compare", "{root}", "{root}:optimized"], 4, "several arms"),
        (["compare", "{root}:baseline", "{root}:optimised"], 4, "no arm 'optimised'"),
        (["compare", "{root}:baseline", "nowhere"], 4, "does not exist"),
        (["compare", "{root}:baseline"], 2, "Missing argument"),
        (["compare", "{root}:baseline", "{root}:optimized", "--format", "xml"], 2, "xml"),
        (["compare", "{root}:baseline", "{root}:optimized", "--margin", "-1"], 2, "--margin"),
        (["gate", "{root}:baseline", "{root}:optimized"], 2, "max-slowdown"),
        (
            ["gate", "{root}:baseline", "{root}:optimized", "--max-slowdown", "0.03", "--metric", "speed"],
            2,
            "throughput_rps",
        ),
        (["report", "{root}/.."], 4, "holds runs: run"),
        (["list", "nowhere"], 4, "not a directory"),
        (["import", "nowhere", "--kind", "locust", "--workload", "w", "--profile", "p"], 2, "nowhere"),
        (["compere"], 2, "compere"),
        (["gate", "{root}:baseline", "{root}:optimized", "--max-slowdown", "3"], 2, "3 % is 0.03"),
        (["compare", "{root}:baseline", "{root}:optimized", "--margin", "5"], 2, "3 % is 0.03"),
    ],
)
def test_refusals(root: Path, arguments: list[str], code: int, says: str) -> None:
    done = analysis(*(argument.format(root=root) for argument in arguments))
    assert done.returncode == code, done.stdout + done.stderr
    assert says in " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_an_invalid_primary_cell_is_exit_4(tmp_path: Path) -> None:
    invalid = [("optimized", 16, repeat) for repeat in range(3)]
    root = make_run(tmp_path / "run", TWO, invalid=invalid).root
    done = analysis("compare", f"{root}:baseline", f"{root}:optimized")
    assert done.returncode == 4
    assert "Post hoc" in done.stdout
    assert "nothing VALID to compare" in done.stderr
    assert analysis("gate", f"{root}:baseline", f"{root}:optimized", "--max-slowdown", 0.9).returncode == 4


def test_gate(tmp_path: Path, root: Path) -> None:
    arms = (f"{root}:baseline", f"{root}:optimized")
    done = analysis(
        "gate", *arms, "--max-slowdown", 0.03, "--junit", tmp_path / "x.xml", "--markdown", tmp_path / "x.md"
    )
    assert done.returncode == 0, done.stdout
    assert "PASS" in done.stdout
    suite = ET.parse(tmp_path / "x.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("1", "0")
    assert "PASS" in (tmp_path / "x.md").read_text()
    other = make_run(tmp_path / "slower", {"baseline": 30.0, "optimized": 20.0}).root
    slower = analysis("gate", f"{other}:baseline", f"{other}:optimized", "--max-slowdown", 0.03)
    assert slower.returncode == 1, slower.stdout
    nowhere = analysis("gate", *arms, "--max-slowdown", 0.03, "--junit", tmp_path / "no" / "x.xml")
    assert nowhere.returncode == 2, nowhere.stderr
    itself = analysis("gate", arms[0], arms[0], "--max-slowdown", 0.03)
    assert itself.returncode == 4
    refused = analysis("gate", arms[0], arms[0], "--max-slowdown", 0.03, "--junit", tmp_path / "r.xml")
    assert refused.returncode == 4
    assert ET.parse(tmp_path / "r.xml").getroot().get("errors") == "1"


def test_report_and_list(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", TWO).root
    done = analysis("report", root)
    assert done.returncode == 0, done.stderr
    assert (root / "report.html").read_text().count("data:image/svg") >= 5
    names = {path.stem for path in (root / "plots").glob("*.png")}
    assert {"forest", "throughput_against_p99", "gain_by_slo", "latency_distribution", "throughput_over_time"} <= names
    assert (root / "comparison.csv").read_text().startswith("metric,level,concurrency")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/run.json").write_text("{")
    done = analysis("list", tmp_path)
    assert done.returncode == 0
    assert "12/12" in done.stdout
    assert "not listed" in done.stderr


def test_import_and_compare(tmp_path: Path) -> None:
    rows = "concurrency,rps,mean_latency_ms,p50_ms,p99_ms,num_requests\n8,{rps},8.0,7.0,20.0,60000\n"
    runs = []
    for profile, rps in (("off", 1000), ("on", 4000)):
        source = tmp_path / f"{profile}.csv"
        source.write_text(rows.format(rps=rps))
        done = analysis(
            "import",
            source,
            "--kind",
            "locust",
            "--workload",
            "unary",
            "--profile",
            profile,
            "--outputs",
            tmp_path / "o",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        runs.append(done.stdout.split()[-1])
    done = analysis("compare", *runs)
    assert done.returncode == 0, done.stderr
    assert "×4.00" in done.stdout
    assert "single run, no interval" in " ".join(done.stdout.split())

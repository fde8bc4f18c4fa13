"""Do two versions of this code write the same run directory? What the comparison must see, and what it must not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from benchmarks import compare_run_directories as comparing
from tests.runs import make_run

TRIAL = "optimized/trials/c0004-r1"
SPEEDS = {"baseline": 10.0, "optimized": 20.0}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of one config, measured at different times: other names, other figures, other places."""
    pair = tmp_path / "before" / "2026-11-21_08-53-15", tmp_path / "after" / "2026-11-22_10-00-00"
    for seed, run in enumerate(pair):
        make_run(run, SPEEDS, repeats=2, seed=seed, invalid=[("baseline", 4, 0)] if seed else [])
        for path in [run / "summary.csv", *run.rglob("*.json")]:
            path.write_text(path.read_text().replace("2026-11-21T07", f"2026-11-2{seed}T09"))
        logs = run / "services" / "optimized" / "r0"
        (logs / "driver.log").write_text(str(seed))
        (logs / f"replica_unary_Echo_{seed}cyir76{seed}.log").touch()
        (logs / f"worker-21cfa9f05437{seed}-01000000-1097{seed}.err.log").touch()
        (logs / f"proxy_192.0.2.{seed}.log").touch()
        change(run / "run.json", lambda record: record["command"].append(f"outputs={run.parent}"))  # noqa: B023
    return pair


def change(path: Path, how: Callable[[Any], object]) -> None:
    load, dump = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    record = load(path.read_text())
    how(record)
    path.write_text(dump(record))


def found(runs: tuple[Path, Path]) -> list[tuple[str, str, str, str]]:
    return [tuple(difference) for difference in comparing.compare(*runs)]


def test_what_is_measured_or_dated_is_no_difference(runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    assert found(runs) == []
    assert comparing.main([str(run) for run in runs]) == 0
    assert "0 differences" in capsys.readouterr().out


def test_a_copy_elsewhere_is_no_difference(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for run in runs:
        for path in run.glob("*/.hydra/config.yaml"):
            change(path, lambda config: config.update(outputs=str(run.parent)))  # noqa: B023
    copy = tmp_path / "renamed"
    shutil.copytree(runs[0], copy)
    assert comparing.compare(copy, runs[1]) == []


def test_a_removed_key(runs: tuple[Path, Path]) -> None:
    change(runs[1] / TRIAL / "trial.json", lambda record: record.pop("unchecked"))
    change(runs[1] / "run.json", lambda record: record.pop("compare"))
    assert found(runs) == [
        (f"{TRIAL}/trial.json", "unchecked", "list", "absent"),
        ("run.json", "compare", "object", "absent"),  # and not each key that stood below it
    ]


def test_an_added_key_of_what_is_measured_is_said_once_for_all_trials(runs: tuple[Path, Path]) -> None:
    for path in runs[1].glob("*/trials/*/trial.json"):
        change(path, lambda record: record["client"].update(num_retries=0))
    assert found(runs) == [("*/trials/*/trial.json", "client.num_retries", "absent", "int")]


def test_a_changed_type(runs: tuple[Path, Path]) -> None:
    change(runs[1] / TRIAL / "trial.json", lambda record: record.update(repeat="1"))
    for path in runs[1].glob("*/trials/*/trial.json"):
        change(path, lambda record: record["metrics"].update(num_failed="none"))
    assert found(runs) == [
        (f"{TRIAL}/trial.json", "repeat", "int", "string"),
        ("*/trials/*/trial.json", "metrics.num_failed", "int", "string"),
    ]


def test_a_changed_value_of_what_is_not_measured(runs: tuple[Path, Path]) -> None:
    change(runs[1] / "optimized" / ".hydra" / "config.yaml", lambda config: config["sweep"].update(repeats=4))
    change(runs[1] / "run.json", lambda record: record["plan"]["trials"].reverse())
    change(runs[1] / "run.json", lambda record: record["plan"]["arms"].pop())
    lines = found(runs)
    assert lines[0] == ("optimized/.hydra/config.yaml", "sweep.repeats", "3", "4")
    assert ("run.json", "plan.arms", "2", "1") in lines  # the lengths
    assert any(key == "plan.trials.*" and before.startswith("baseline/c0004-r0") for _, key, before, _ in lines)


@pytest.mark.parametrize("name", ["trials/c0004-r1/trial.json", ".hydra/config.yaml"])
def test_a_renamed_file(runs: tuple[Path, Path], name: str) -> None:
    path = runs[1] / "optimized" / name
    path.rename(path.with_name("renamed"))
    folder = Path("optimized", name).parent
    assert sorted(found(runs)) == sorted(
        [(f"optimized/{name}", "", "file", "absent"), (f"{folder}/renamed", "", "absent", "file")]
    )


def test_a_log_that_is_no_longer_kept(runs: tuple[Path, Path]) -> None:
    next(runs[1].glob("services/*/*/replica*.log")).unlink()
    assert found(runs) == [("services/optimized/r0/replica_unary_Echo_<id>.log", "", "file", "absent")]


def test_what_became_null_for_good(runs: tuple[Path, Path]) -> None:
    for path in runs[1].glob("*/trials/*/trial.json"):
        change(path, lambda record: record["metrics"].update(throughput_rps=None))
    assert found(runs) == [("*/trials/*/trial.json", "metrics.throughput_rps", "float", "null")]


def test_columns(runs: tuple[Path, Path]) -> None:
    for path in runs[1].glob("*/trials/*/samples.parquet"):
        table = pq.read_table(path)
        table = table.set_column(2, "latency_ms", table["latency_ms"].cast(pa.float32()))
        pq.write_table(table.drop(["ok"]), path)
    summary = pd.read_csv(runs[1] / "summary.csv")
    summary = summary[[*summary.columns[1:], "run_id"]].rename(columns={"workload": "load"})
    summary.assign(profile=["x", *summary.profile[1:]]).to_csv(runs[1] / "summary.csv", index=False)
    lines = found(runs)
    assert [(file, key) for file, key, _, _ in lines] == [
        ("summary.csv", "workload"),
        ("summary.csv", "profile"),
        ("summary.csv", "load"),
        ("summary.csv", "order of columns"),
        ("*/trials/*/samples.parquet", "latency_ms"),
        ("*/trials/*/samples.parquet", "ok"),
    ]
    assert lines[-2:] == [
        ("*/trials/*/samples.parquet", "latency_ms", "double", "float"),
        ("*/trials/*/samples.parquet", "ok", "bool", "absent"),
    ]


def test_only_documented_differences_are_let_pass(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(comparing, "DOCUMENTED", {})
    for path in runs[1].glob("optimized/trials/*/trial.json"):
        change(path, lambda record: record.update(attempt=1))
    arguments = [str(run) for run in runs]
    assert comparing.main(arguments) == 1
    text = capsys.readouterr().out
    line = "optimized/trials/c0004-r0/trial.json and 3 more: attempt: absent -> int  [NOT DOCUMENTED]"
    assert text.splitlines() == [line, "4 differences, 4 of them not documented"]
    monkeypatch.setitem(comparing.DOCUMENTED, "*/trials/*/trial.json:attempt", "a trial says which attempt it is")
    monkeypatch.setitem(comparing.DOCUMENTED, "run.json:nothing", "never happens")
    assert comparing.main(arguments) == 0
    text = capsys.readouterr().out
    assert "[a trial says which attempt it is]" in text
    assert "4 differences, 0 of them not documented" in text
    assert "documented, but not seen: run.json:nothing" in text


def test_what_is_no_run_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        comparing.main([str(tmp_path), str(tmp_path)])
    assert ended.value.code == 2
    assert "has no run.json" in capsys.readouterr().err

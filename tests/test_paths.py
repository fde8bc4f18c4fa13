"""Names are safe, distinct and sortable; a run directory is never shared or overwritten."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.load.level import Level
from orchestrator.paths import RunPaths, create_run_dir, safe_name, set_aside, trial_id

NOW = datetime(2026, 11, 21, 3, 4, 5)


@pytest.mark.parametrize("name", ["optimized", "recsys,optimized", "baseline~2", "env.X=1,y", "a_b-c+d"])
def test_a_safe_name_is_kept(name: str) -> None:
    assert safe_name(name) == name


@given(st.text(min_size=1, max_size=300))
def test_any_name_becomes_one_component_below_the_run_directory(name: str) -> None:
    safe = safe_name(name)
    root = Path("/outputs/run")
    assert (root / safe).resolve().parent == root
    assert not safe.startswith((".", "-", "~"))
    assert len(safe.encode()) <= 120
    assert safe_name(safe) == safe


@pytest.mark.parametrize("name", ["services", "plots", "run.json", "..", ".hydra", "a/b", "a b", "x" * 121])
def test_an_unsafe_or_reserved_name_is_changed(name: str) -> None:
    assert safe_name(name) != name


def test_names_that_clean_to_the_same_stay_distinct() -> None:
    names = ["a/b", "a_b", "a b", "a:b", "x" * 121, "x" * 122, ".a", "_.a", "services", "_services"]
    assert len({safe_name(name) for name in names}) == len(names)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        safe_name("")


def test_trial_names() -> None:
    assert trial_id(Level.of_clients(10).name, 0) == "c0010-r0"
    assert trial_id(Level.of_rate(0.25).name, 3) == "r000000.25-r3"


def test_layout(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "2026-11-21_03-04-05")
    relative = {
        run.run_json: "run.json",
        run.summary_parquet: "summary.parquet",
        run.comparison_csv: "comparison.csv",
        run.report_html: "report.html",
        run.plots_dir: "plots",
        run.service_dir("a,b", 1): "services/a,b/r1",
        run.service_yaml("a,b", 1): "services/a,b/r1/service.yaml",
        run.effective_json("a,b", 1): "services/a,b/r1/effective.json",
        run.hydra_dir("a,b"): "a,b/.hydra",
        run.trial_dir("a,b", "c0010", 2): "a,b/trials/c0010-r2",
        run.trial_json("a,b", "c0010", 2): "a,b/trials/c0010-r2/trial.json",
        run.failure_json("a,b", "c0010", 2): "a,b/trials/c0010-r2/failure.json",
        run.samples("a,b", "c0010", 2): "a,b/trials/c0010-r2/samples.parquet",
        run.raw_dir("a,b", "c0010", 2): "a,b/trials/c0010-r2/raw",
    }
    assert {path.relative_to(run.root).as_posix() for path in relative} == set(relative.values())
    assert all(path == run.root / name for path, name in relative.items())
    assert run.run_id == "2026-11-21_03-04-05"
    with pytest.raises(AssertionError, match="safe_name"):
        run.trial_dir("../elsewhere", "c0010", 0)


def test_a_clash_gets_a_suffix_and_leaves_the_first_alone(tmp_path: Path) -> None:
    outputs = tmp_path / "not" / "there" / "yet"
    first = create_run_dir(outputs, NOW)
    first.run_json.write_text("precious")
    names = [first.run_id, *(create_run_dir(outputs, NOW).run_id for _ in range(2))]
    assert names == ["2026-11-21_03-04-05", "2026-11-21_03-04-05_2", "2026-11-21_03-04-05_3"]
    assert first.run_json.read_text() == "precious"


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "2026-11-21_03-04-05").write_text("a file")
    assert create_run_dir(tmp_path, NOW).run_id.endswith("_2")


def test_racing_runs_get_directories_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        runs = list(pool.map(lambda _: create_run_dir(tmp_path, NOW), range(64)))
    assert len({run.root for run in runs}) == 64
    assert sorted(run.root for run in runs) == sorted(tmp_path.iterdir())


def test_earlier_attempts_are_kept_in_order(tmp_path: Path) -> None:
    trial = tmp_path / "c0010-r0"
    assert set_aside(trial) is None
    for attempt in (1, 2):
        trial.mkdir()
        (trial / "failure.json").write_text(str(attempt))
        kept = set_aside(trial)
        assert kept == tmp_path / f"c0010-r0.attempt{attempt}"
        assert not trial.exists()
    assert [(tmp_path / f"c0010-r0.attempt{k}" / "failure.json").read_text() for k in (1, 2)] == ["1", "2"]

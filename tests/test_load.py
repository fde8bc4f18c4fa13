"""Run directories as frames: what is there, what is not, and what must be refused."""

from pathlib import Path

import numpy as np
import pytest

from analysis import frames, load
from analysis.load import LoadError
from orchestrator.results.records import SummaryRow, keys, read_json, write_json
from tests.runs import make_run

TWO = {"baseline": 20.0, "optimized": 30.0}


def test_points(tmp_path: Path) -> None:
    run = load.load_run(make_run(tmp_path / "run", TWO, missing=[("baseline", 4, 0)]).root)
    assert run.arms == ["baseline", "optimized"]
    assert len(run.points) == 12
    assert set(keys(SummaryRow)) <= set(run.points.columns)
    assert sorted(run.points.level.unique()) == ["c0004", "c0016"]
    assert run.points.valid.tolist().count(None) == 1
    assert load.overview(run.paths.root)["trials"] == "11/12"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ({}, "has no run.json"),
        ({"run.json": "{"}, "not valid JSON"),
        ({"run.json": "{}", "summary.parquet": "x"}, "truncated or corrupt"),
        ({"run.json": '{"schema_version": 99}'}, "summary.parquet"),
        ({"x/run.json": "{}"}, "holds runs: x"),
    ],
)
def test_no_run(tmp_path: Path, content: dict[str, str] | None, says: str) -> None:
    directory = tmp_path / "run"
    for name, text in (content or {}).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    if content == {}:
        directory.mkdir()
    with pytest.raises(LoadError, match=says):
        load.load_run(directory)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run", TWO)
    write_json(paths.run_json, read_json(paths.run_json) | {"schema_version": 2})
    with pytest.raises(LoadError, match="schema 2, this code reads 1"):
        load.load_run(paths.root)


def test_select(tmp_path: Path) -> None:
    root = make_run(tmp_path / "two", TWO).root
    assert load.select(f"{root}:optimized")[1] == "optimized"
    with pytest.raises(LoadError, match=r"several arms: say which; it has .*:baseline, .*:optimized"):
        load.select(str(root))
    with pytest.raises(LoadError, match="no arm 'optimised'"):
        load.select(f"{root}:optimised")
    one = make_run(tmp_path / "one:odd", {"grpc": 20.0}).root
    assert load.select(str(one))[1] == "grpc"


def test_requests_agree_with_the_record(tmp_path: Path) -> None:
    run = load.load_run(make_run(tmp_path / "run", TWO, repeats=1).root)
    [first, *_] = frames.all_requests(run)
    assert first.histograms is not None
    counts, _ = first.histograms
    assert counts.sum() == first.row["num_successful"]
    window = first.over_time[first.over_time.time_s >= 0]
    assert window.throughput_rps.mean() == pytest.approx(first.row["throughput_rps"])
    assert first.over_time.time_s.min() < 0


def test_frames(tmp_path: Path) -> None:
    invalid = [("optimized", 4, repeat) for repeat in range(3)]
    run = load.load_run(make_run(tmp_path / "run", TWO, invalid=invalid).root)
    requests = frames.all_requests(run)
    points = frames.arm_points(run, requests)
    throughput = points[points.metric == "throughput_rps"].set_index(["arm", "level"])
    assert not throughput.loc[("optimized", "c0004")].valid
    assert throughput.loc[("optimized", "c0004")].num_invalid == 3
    good = throughput.loc[("baseline", "c0016")]
    assert good.interval == frames.BETWEEN
    assert good.ci_low < good.value < good.ci_high
    assert good.colocated
    spread = frames.distribution(requests)
    assert set(spread.arm) == {"baseline", "optimized"}
    median = spread[(spread.arm == "baseline") & (spread.level == "c0016")].set_index("quantile").latency_ms
    assert np.interp(0.5, median.index, median) == pytest.approx(
        run.points.latency_p50_ms[run.points.arm == "baseline"].mean(), rel=0.1
    )
    assert not ((spread.arm == "optimized") & (spread.level == "c0004")).any()
    gain = frames.gain_by_slo(run)
    assert gain.ratio.max() > 1
    assert gain.slo_ms.is_monotonic_increasing


def test_one_block_has_an_interval_within_its_deployment(tmp_path: Path) -> None:
    run = load.load_run(make_run(tmp_path / "run", TWO, repeats=1).root)
    points = frames.arm_points(run, frames.all_requests(run))
    p50 = points[(points.metric == "latency_p50_ms") & (points.level == "c0016")]
    assert set(p50.interval) == {frames.WITHIN}
    assert (p50.ci_low < p50.value).all()
    assert (p50.value < p50.ci_high).all()
    assert set(points[points.metric == "latency_mean_ms"].interval) == {""}


def test_gain_by_slo_is_empty_without_p99(tmp_path: Path) -> None:
    run = load.load_run(make_run(tmp_path / "run", TWO, levels=[2]).root)
    assert run.points.latency_p99_ms.isna().all()
    assert frames.gain_by_slo(run).empty


def test_requests_that_cannot_be_read_are_left_out_with_a_warning(tmp_path: Path) -> None:
    run = load.load_run(make_run(tmp_path / "run", TWO, repeats=1).root)
    run.paths.samples("baseline", "c0004", 0).unlink()
    with pytest.warns(UserWarning, match=r"baseline/c0004-r0.*samples\.parquet"):
        assert len(frames.all_requests(run)) == 3

"""Verdicts, families, refusals, looks and the gate, on run directories with a known truth."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from analysis import compare, load
from analysis.cells import Cell, Comparison
from analysis.contrasts import IncomparableError, Pair, pair_of
from analysis.figures import FIGURES, THROUGHPUT
from analysis.load import ArmData, LoadError, RunData
from orchestrator.load.level import Level
from orchestrator.results.records import LookRecord, SummaryRow, keys, read_json, write_json
from orchestrator.results.samples import read_samples, write_samples
from tests.runs import make_run

TWO = {"baseline": 20.0, "optimized": 30.0}
MakeRun = Callable[..., RunData]


@pytest.fixture
def run_of(tmp_path: Path) -> MakeRun:
    """`make_run` in a directory of its own, loaded."""

    def make(name: str = "run", *args: object, **kwargs: object) -> RunData:
        return load.load_run(make_run(tmp_path / name, *args, **kwargs).root)  # type: ignore[arg-type]

    return make


def only(run: RunData, record: bool = True, **kwargs: object) -> Comparison:
    [comparison] = compare.compare_run(run, record=record, **kwargs)  # type: ignore[arg-type]
    return comparison


def cell(comparison: Comparison, metric: str, level: str) -> Cell:
    [found] = [one for one in comparison.cells if (one.metric, one.level) == (metric, level)]
    return found


# ---- Verdicts ----


def test_a_faster_arm_is_called_faster_with_the_paired_interval(run_of: MakeRun) -> None:
    run = run_of("run", TWO, repeats=5)
    comparison = only(run)
    primary = comparison.primary
    assert primary is comparison.cells[0]
    assert primary is not None
    assert (primary.metric, primary.level, primary.family) == ("throughput_rps", "c0016", "primary")
    assert primary.verdict == "FASTER"
    points = run.points[run.points.level == "c0016"]
    sides = [points[points.arm == arm].sort_values("repeat").throughput_rps for arm in TWO]
    truth = ttest_rel(np.log(sides[1]), np.log(sides[0]))
    interval = truth.confidence_interval(0.95)
    assert primary.ratio == pytest.approx(math.exp(np.mean(np.log(sides[1]).to_numpy() - np.log(sides[0]).to_numpy())))
    assert primary.ci_low_ratio == pytest.approx(math.exp(interval.low))
    assert primary.ci_high_ratio == pytest.approx(math.exp(interval.high))
    assert primary.confidence == 0.95
    assert (primary.num_blocks, primary.num_planned) == (5, 5)
    assert "optimized is FASTER than baseline" in comparison.summary
    assert "5 blocks" in comparison.summary
    assert comparison.warnings == ()


def test_latency_ratios_are_oriented_so_that_more_is_better(run_of: MakeRun) -> None:
    comparison = only(run_of("run", TWO))
    p50 = cell(comparison, "latency_p50_ms", "c0016")
    assert p50.baseline_value is not None
    assert p50.candidate_value is not None
    assert p50.candidate_value < p50.baseline_value
    assert p50.ratio == pytest.approx(p50.baseline_value / p50.candidate_value)
    assert p50.verdict == "FASTER"


def test_a_slower_arm(run_of: MakeRun) -> None:
    assert only(run_of("run", {"baseline": 30.0, "optimized": 20.0})).summary.startswith("optimized is SLOWER")


def test_families(run_of: MakeRun) -> None:
    families = {(cell.metric, cell.level): cell.family for cell in only(run_of("run", TWO)).cells}
    assert [key for key, family in families.items() if family == "primary"] == [("throughput_rps", "c0016")]
    assert {key for key, family in families.items() if family == "secondary"} == {
        ("latency_p50_ms", "c0016"),
        ("latency_p99_ms", "c0016"),
        ("throughput_rps", "c0004"),
    }
    comparison = only(run_of("again", TWO))
    assert all(cell.verdict is None for cell in comparison.cells if cell.family == "descriptive")
    assert all(cell.verdict for cell in comparison.cells if cell.family != "descriptive")


def test_primary_cells_of_a_run_share_the_error(run_of: MakeRun) -> None:
    run = run_of("run", {"baseline": 20.0, "optimized": 30.0, "haproxy": 20.5}, repeats=5)
    comparisons = compare.compare_run(run)
    found = {comparison.candidate: comparison.primary for comparison in comparisons}
    optimized, haproxy = found["optimized"], found["haproxy"]
    assert optimized is not None
    assert haproxy is not None
    assert optimized.confidence == pytest.approx(0.975)  # the smaller p-value is judged at alpha / 2
    assert haproxy.confidence == pytest.approx(0.95)
    # One pair asked for on its own is judged in the same family.
    pair, family = pair_of(ArmData(run, "baseline"), ArmData(run, "optimized"))
    [alone] = compare.compare_pairs([pair], family, 0.05)
    assert alone.primary == optimized


def test_equal_arms_are_equivalent_or_inconclusive(run_of: MakeRun) -> None:
    quiet = only(run_of("quiet", {"baseline": 40.0, "baseline~2": 40.0}, levels=[64], repeats=8, noise=0.002))
    assert quiet.primary is not None
    assert quiet.primary.verdict == "EQUIVALENT"
    assert "EQUIVALENT" in quiet.summary
    noisy = only(run_of("noisy", {"baseline": 40.0, "baseline~2": 40.0}, levels=[64], noise=0.1))
    assert noisy.primary is not None
    assert noisy.primary.verdict == "INCONCLUSIVE"
    assert "further blocks" in noisy.primary.reason
    assert "further blocks" in noisy.summary


def test_points_that_are_invalid_do_not_enter(run_of: MakeRun) -> None:
    comparison = only(run_of("run", TWO, repeats=4, invalid=[("baseline", 16, 1)], failed=[("optimized", 16, 3)]))
    primary = comparison.primary
    assert primary is not None
    assert (primary.num_blocks, primary.num_planned) == (2, 4)
    assert cell(comparison, "throughput_rps", "c0004").num_blocks == 4


def test_an_invalid_primary_cell_is_inconclusive_and_the_fallback_post_hoc(run_of: MakeRun) -> None:
    comparison = only(run_of("run", TWO, invalid=[("optimized", 16, repeat) for repeat in range(3)]))
    assert comparison.primary is not None
    assert comparison.primary.ratio is None
    assert comparison.primary.verdict == "INCONCLUSIVE"
    assert "optimized 0 of 3 VALID (drift)" in comparison.summary
    assert "Post hoc: ×1.5" in comparison.summary
    assert "at 4 clients" in comparison.summary


def test_one_block_has_no_interval(run_of: MakeRun) -> None:
    primary = only(run_of("run", TWO, repeats=1)).primary
    assert primary is not None
    assert primary.ratio is not None
    assert primary.ci_low_ratio is None
    assert (primary.verdict, primary.reason.split(":")[0]) == ("INCONCLUSIVE", "one block, no interval")


def test_one_deployment_an_arm_is_no_replicate(run_of: MakeRun) -> None:
    primary = only(run_of("run", TWO, repeats=5, redeploy="never")).primary
    assert primary is not None
    assert primary.ci_low_ratio is None
    assert primary.verdict == "INCONCLUSIVE"
    assert "one deployment an arm" in primary.reason


def test_no_valid_block_at_the_primary_level_is_no_look_spent(run_of: MakeRun) -> None:
    comparison = only(run_of("run", TWO, repeats=3, invalid={("baseline", 16, repeat) for repeat in range(3)}))
    lower = cell(comparison, "throughput_rps", "c0004")
    assert lower.verdict == "INCONCLUSIVE"
    assert "in proportion to the VALID blocks at the primary level, and there is none" in lower.reason


def test_a_way_longer_than_the_effect_is_told(run_of: MakeRun) -> None:
    """The arms' medians are 50 and 33 ms: 10 ms on the way are nothing to say, 20 ms are."""
    for way_ms, told in ((10.0, False), (20.0, True)):
        run = run_of(f"run-{way_ms:g}", TWO, repeats=3)
        for path in run.paths.root.glob("*/trials/*/trial.json"):
            write_json(path, read_json(path) | {"round_trip_ms": way_ms})
        warnings = only(load.load_run(run.paths.root)).warnings
        assert any("the way to the service and back takes 20 ms" in warning for warning in warnings) == told, warnings


def test_a_run_in_progress_has_no_verdict_and_is_no_look(run_of: MakeRun) -> None:
    missing = [(arm, 16, repeat) for arm in TWO for repeat in (2, 3, 4)]
    run = run_of("run", TWO, repeats=5, missing=missing, status="running")
    comparison = only(run)
    assert comparison.primary is not None
    assert comparison.primary.verdict == "INCONCLUSIVE"
    assert comparison.primary.num_blocks == 2
    assert "is running: 14 of 20 trials are done" in comparison.warnings[0]
    assert not run.paths.looks_jsonl.exists()


# ---- Judged by another figure ----


def test_every_figure_is_a_column_whose_unit_it_has() -> None:
    units = {"rps": "req/s", "ms": "ms", "tok_per_s": "tok/s"}
    for name, figure in FIGURES.items():
        assert name == figure.name
        assert name in keys(SummaryRow)
        assert [unit for suffix, unit in units.items() if name.endswith(f"_{suffix}")] == [figure.unit]
        assert figure.more_is_better == (figure.unit != "ms")
        assert all(figure.judged_at(Level.of_clients(1)) for figure in FIGURES.values())


RATES = {"levels": (100, 250), "open_loop": True, "figure": "latency_p95_ms"}


def test_at_a_rate_the_declared_latency_is_judged_and_throughput_is_only_shown(run_of: MakeRun) -> None:
    comparison = only(run_of("run", TWO, repeats=5, **RATES))
    families = {(cell.metric, cell.level): cell.family for cell in comparison.cells}
    assert [key for key, family in families.items() if family == "primary"] == [("latency_p95_ms", "r000250.00")]
    assert {key for key, family in families.items() if family == "secondary"} == {
        ("latency_p50_ms", "r000250.00"),
        ("latency_p99_ms", "r000250.00"),
        ("latency_p95_ms", "r000100.00"),
    }
    primary = comparison.primary
    assert primary is not None
    assert (primary.concurrency, primary.offered_rps) == (None, 250.0)
    assert primary.verdict == "FASTER"
    assert primary.ratio is not None
    assert primary.ratio == pytest.approx(1.5, rel=0.1)
    assert re.fullmatch(
        r"optimized is FASTER than baseline: ×1\.\d\d \(95 % interval .*\) "
        r"in latency p95 \(5\d\.\d against 7\d\.\d ms\) at 250 req/s, 5 blocks\.",
        comparison.summary,
    ), comparison.summary
    throughput = cell(comparison, "throughput_rps", "r000250.00")
    assert throughput.ratio == pytest.approx(1, rel=0.05)
    assert throughput.verdict is None
    assert "says what was sent" in throughput.reason


def test_throughput_is_never_judged_at_a_rate_even_where_it_was_declared(run_of: MakeRun) -> None:
    primary = only(run_of("run", TWO, repeats=5, **RATES | {"figure": "throughput_rps"})).primary
    assert primary is not None
    assert (primary.metric, primary.verdict) == ("throughput_rps", "INCONCLUSIVE")
    assert "says what was sent" in primary.reason


def test_a_closed_loop_may_be_judged_by_a_latency(run_of: MakeRun) -> None:
    comparison = only(run_of("run", TWO, figure="latency_p90_ms"))
    assert comparison.primary is not None
    assert (comparison.primary.metric, comparison.primary.level) == ("latency_p90_ms", "c0016")
    assert {(cell.metric, cell.level) for cell in comparison.family("secondary")} == {
        ("throughput_rps", "c0016"),
        ("latency_p50_ms", "c0016"),
        ("latency_p99_ms", "c0016"),
        ("latency_p90_ms", "c0004"),
    }
    usual = only(run_of("usual", TWO))
    assert not {"latency_p90_ms", "latency_p95_ms"} & {cell.metric for cell in usual.cells}


def test_the_gate_takes_the_runs_figure_or_any_other(run_of: MakeRun) -> None:
    run = run_of("run", {"baseline": 30.0, "optimized": 20.0}, repeats=5, **RATES)
    pair, family = pair_of(ArmData(run, "baseline"), ArmData(run, "optimized"))
    _, [(judged, found)] = compare.gate(pair, family, 0.03)
    assert (judged.metric, judged.level, found) == ("latency_p95_ms", "r000250.00", "slower")
    assert outcome(run, 0.03, "latency_p90_ms", "throughput_rps") == ["slower", "inconclusive"]
    assert outcome(run_of("closed", TWO), 0.03, "latency_p95_ms") == ["ok"]


def test_the_floor_is_of_the_figure_that_is_judged(run_of: MakeRun) -> None:
    small = {"baseline": 40.0, "optimized": 44.0}
    run = run_of("run", small, levels=[32], repeats=5, noise=0.003, figure="latency_p95_ms")
    loud = run_of("loud", {"baseline": 40.0, "baseline~2": 40.0}, levels=[32], repeats=5, noise=0.3)
    floored = only(run, floor=loud).primary
    assert floored is not None
    assert (floored.metric, floored.verdict) == ("latency_p95_ms", "INCONCLUSIVE")
    assert "noise floor" in floored.reason


def test_a_run_that_names_no_figure_of_ours_cannot_be_compared(run_of: MakeRun) -> None:
    run = run_of("run", TWO, figure="speed")
    with pytest.raises(
        LoadError, match=r"run\.json is judged by 'speed', which is no figure; there is throughput_rps, "
    ):
        only(run)


# ---- Noise floor ----


def test_a_difference_below_the_floor_is_no_win(run_of: MakeRun) -> None:
    small = {"baseline": 40.0, "optimized": 44.0}
    run = run_of("run", small, levels=[32], repeats=5, noise=0.003)
    assert only(run).primary.verdict == "FASTER"  # type: ignore[union-attr]
    loud = run_of("loud", {"baseline": 40.0, "baseline~2": 40.0}, levels=[32], repeats=5, noise=0.3)
    floored = only(run, floor=loud).primary
    assert floored is not None
    assert floored.floor_ratio is not None
    assert floored.floor_ratio > 1.1
    assert floored.verdict == "INCONCLUSIVE"
    assert "noise floor" in floored.reason
    quiet = run_of("quiet", {"baseline": 40.0, "baseline~2": 40.0}, levels=[32], repeats=5, noise=0.003)
    assert only(run, floor=quiet).primary.verdict == "FASTER"  # type: ignore[union-attr]


def test_a_floor_must_fit(run_of: MakeRun) -> None:
    run = run_of("run", TWO)
    with pytest.raises(IncomparableError, match="no A/A run"):
        only(run, floor=run_of("ab", TWO, repeats=5))
    twins = {"baseline": 20.0, "baseline~2": 20.0}
    with pytest.raises(IncomparableError, match="3 VALID blocks"):
        only(run, floor=run_of("short", twins, repeats=3))
    other = {arm: {"workload.payload_bytes": 99} for arm in twins}
    with pytest.raises(IncomparableError, match=r"something else: workload\.payload_bytes: 99 \| 10"):
        only(run, floor=run_of("other", twins, repeats=5, config=other))


# ---- Looks and further blocks ----


def looks_of(run: RunData) -> list[tuple[int, float]]:
    found = [json.loads(line) for line in run.paths.looks_jsonl.read_text().splitlines()]
    assert all(list(look) == list(keys(LookRecord)) for look in found)
    return [(look["num_blocks"], round(look["alpha"], 6)) for look in found]


def test_blocks_of_further_runs_are_added_and_looks_are_spent(run_of: MakeRun) -> None:
    first, second, third = (run_of(name, TWO, max_looks=2, seed=seed) for seed, name in enumerate("abc"))
    one = only(first)
    assert one.look == 1
    assert one.primary is not None
    assert one.primary.confidence == pytest.approx(0.975)
    assert only(first).look == 1  # the same points again
    both = only(first, more=[second])
    assert both.look == 2
    assert both.primary is not None
    assert both.primary.num_blocks == 6
    assert both.primary.confidence == pytest.approx(0.9875)
    assert only(second, more=[first]).look == 2  # the same points in another order
    spent = only(first, more=[second, third])
    assert spent.primary is not None
    assert (spent.look, spent.primary.verdict) == (3, "INCONCLUSIVE")
    assert "spent" in spent.primary.reason
    assert looks_of(first) == [(3, 0.025), (6, 0.0125)]


def test_choosing_among_sets_of_one_size_is_looking_again(run_of: MakeRun) -> None:
    runs = [run_of(name, TWO, max_looks=4, seed=seed) for seed, name in enumerate("abc")]
    found = [only(runs[0], more=[other]).look for other in runs[1:]]
    assert [*found, only(runs[0]).look] == [1, 2, 3]


def test_with_one_look_declared_it_has_the_whole_error(run_of: MakeRun) -> None:
    run, more = run_of("a", TWO), run_of("b", TWO, seed=1)
    assert only(run).primary.confidence == 0.95  # type: ignore[union-attr]
    again = only(run, more=[more])
    assert again.primary is not None
    assert again.primary.verdict == "INCONCLUSIVE"
    assert again.primary.num_blocks == 6
    assert looks_of(run) == [(3, 0.05)]


def test_blocks_that_are_not_there_yet_keep_their_share_of_the_error(run_of: MakeRun) -> None:
    invalid = [("baseline", 16, 3), ("optimized", 16, 4)]
    before = only(run_of("run", TWO, repeats=5, invalid=invalid))
    assert before.primary is not None
    assert before.primary.confidence == pytest.approx(0.97)
    assert "2 of 5 blocks are missing at the primary level" in before.warnings[-1]
    looks = (Path(before.baseline_run) / "looks.jsonl").read_text()
    resumed = run_of("resumed", TWO, repeats=5)
    resumed.paths.looks_jsonl.write_text(looks)  # as if the same run had been filled
    after = only(resumed)
    assert after.primary is not None
    assert after.look == 2
    assert after.primary.confidence == pytest.approx(0.98)


def test_a_notebook_may_look_without_spending(run_of: MakeRun) -> None:
    run = run_of("run", TWO)
    assert only(run, record=False).look == 1
    assert not run.paths.looks_jsonl.exists()


def test_runs_that_add_blocks_must_be_alike(run_of: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("a", TWO, max_looks=2)
    with pytest.raises(IncomparableError, match=r"compare\.max_looks=1"):
        only(run, more=[run_of("b", TWO)])
    other = {arm: {"workload.payload_bytes": 99} for arm in TWO}
    with pytest.raises(IncomparableError, match=r"workload\.payload_bytes: 10 \| 99"):
        only(run, more=[run_of("c", TWO, config=other, max_looks=2)])
    newer = {arm: {"versions": {"ray": "2.61.0"}} for arm in TWO}
    with pytest.raises(IncomparableError, match=r"versions\.ray"):
        only(run, more=[run_of("d", TWO, effective=newer, max_looks=2)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match="cannot add blocks to itself"):
        only(run, more=[load.load_run(Path("a"))])
    with pytest.raises(LoadError, match="cannot add blocks to itself"):
        only(run, more=[load.load_run(Path(shutil.copytree("a", "copy")))])


# ---- Refusals ----


@pytest.mark.parametrize(
    ("over", "key"),
    [
        ({"config": {"optimized": {"workload.payload_bytes": 0}}}, r"workload\.payload_bytes: 10 \| 0"),
        ({"config": {"optimized": {"workload.num_replicas": 2}}}, r"workload\.num_replicas"),
        ({"config": {"optimized": {"sweep.duration_s": 60}}}, r"sweep\.duration_s"),
        ({"effective": {"optimized": {"versions": {"ray": "2.61.0"}}}}, r"versions\.ray: 2\.60\.0 \| 2\.61\.0"),
        ({"effective": {"optimized": {"hardware": {"num_logical_cpus": 8}}}}, r"hardware\.num_logical_cpus"),
        ({"effective": {"optimized": {"env": {"RAY_SERVE_SNEAKED_IN": "1"}}}}, r"env\.RAY_SERVE_SNEAKED_IN"),
        ({"effective": {"baseline": {"env": {"RAY_SERVE_FLAG": "1"}}}}, "declared .* but found the same"),
    ],
)
def test_arms_that_differ_in_more_than_the_treatment(run_of: MakeRun, over: dict[str, object], key: str) -> None:
    run = run_of("run", TWO, **over)
    with pytest.raises(IncomparableError, match=key) as refusal:
        only(run)
    assert "--allow-diff" in str(refusal.value)
    listed = str(refusal.value).rsplit("--allow-diff ", 1)[1].split(",")
    allowed = only(run, allow_diff=listed)
    assert "--allow-diff" in allowed.warnings[0]
    assert any(not difference.allowed for difference in allowed.differences)


def test_the_declared_treatment_may_be_something_else(run_of: MakeRun) -> None:
    over = {"optimized": {"workload.num_replicas": 2}}
    both = run_of("run", TWO, config=over, treatment=["profile", "workload.num_replicas"])
    assert only(both).treatment == "profile, workload.num_replicas"


def test_what_the_flags_entail_is_a_consequence(run_of: MakeRun) -> None:
    found = {difference.key: difference for difference in only(run_of("run", TWO)).differences}
    assert found["constant.RAY_SERVE_COMPUTED"].where == "consequence"
    assert found["env.RAY_SERVE_FLAG"].allowed
    assert not any("RAY_PORT" in key or "RAY_JOB_ID" in key or "ray_resources" in key for key in found)


def test_samples_that_do_not_say_what_the_record_says(run_of: MakeRun) -> None:
    run = run_of("run", TWO)
    path = run.paths.samples("baseline", "c0016", 1)
    samples = read_samples(path)
    write_samples(path, samples.slice(0, len(samples) // 2))
    with pytest.raises(IncomparableError, match=r"c0016-r1.*trial\.json says"):
        only(run)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IncomparableError, match="truncated or corrupt"):
        only(run)
    path.unlink()
    with pytest.raises(IncomparableError, match=r"samples\.parquet"):
        only(run)


def test_arms_of_different_runs_have_a_ratio_but_no_verdict(run_of: MakeRun) -> None:
    a, b = run_of("a", {"baseline": 20.0}), run_of("b", {"optimized": 30.0})
    pair, family = pair_of(ArmData(a, "baseline"), ArmData(b, "optimized"))
    [comparison] = compare.compare_pairs([pair], family, 0.05)
    assert comparison.primary is not None
    assert comparison.primary.ratio == pytest.approx(1.5, rel=0.1)
    assert comparison.primary.ci_low_ratio is not None
    assert comparison.primary.verdict == "INCONCLUSIVE"
    assert "not interleaved" in comparison.primary.reason
    assert any("different runs" in warning for warning in comparison.warnings)


def test_runs_of_one_arm_declared_no_treatment(run_of: MakeRun) -> None:
    a, b = run_of("a", {"baseline": 20.0}, treatment=[]), run_of("b", {"optimized": 30.0}, treatment=[])
    pair, family = pair_of(ArmData(a, "baseline"), ArmData(b, "optimized"))
    [comparison] = compare.compare_pairs([pair], family, 0.05)
    assert comparison.treatment == "profile"


@pytest.mark.parametrize("arms", [("optimized", "haproxy"), ("optimized", "baseline")])
def test_a_pair_that_was_not_declared_has_no_verdict(run_of: MakeRun, arms: tuple[str, str]) -> None:
    run = run_of("run", {"baseline": 20.0, "optimized": 30.0, "haproxy": 25.0})
    pair, family = pair_of(ArmData(run, arms[0]), ArmData(run, arms[1]))
    [comparison] = compare.compare_pairs([pair], family, 0.05)
    assert any("post hoc" in warning for warning in comparison.warnings)
    assert comparison.primary is not None
    assert comparison.primary.verdict == "INCONCLUSIVE"
    assert comparison.primary.ci_low_ratio is not None
    with pytest.raises(IncomparableError, match="cannot be compared with itself"):
        pair_of(ArmData(run, "optimized"), ArmData(run, "optimized"))


def test_a_pair_that_was_not_declared_is_refused_as_any_other(run_of: MakeRun) -> None:
    over = {"haproxy": {"workload.payload_bytes": 0}}
    root = run_of("run", {"baseline": 20.0, "optimized": 30.0, "haproxy": 25.0}, config=over).paths.root
    pair, family = pair_of(load.select(f"{root}:optimized"), load.select(f"{root}:haproxy"))
    with pytest.raises(IncomparableError, match=r"workload\.payload_bytes: 10 \| 0"):
        compare.compare_pairs([pair], family, 0.05)


def test_one_refused_pair_does_not_cost_the_others_theirs(run_of: MakeRun) -> None:
    arms = {"baseline": 20.0, "optimized": 30.0, "haproxy": 25.0}
    run = run_of("run", arms, config={"haproxy": {"workload.payload_bytes": 0}})
    optimized, haproxy = compare.compare_run(run)
    assert optimized.primary is not None
    assert haproxy.primary is not None
    assert (optimized.primary.verdict, haproxy.primary.verdict) == ("FASTER", "INCONCLUSIVE")
    assert "differ in more than the treatment" in haproxy.summary
    assert "payload_bytes" in haproxy.warnings[-1]


def test_missing_proof_is_said(run_of: MakeRun) -> None:
    run = run_of("run", TWO)
    run.paths.effective_json("optimized", 1).unlink()
    assert any("not every live service was read back" in warning for warning in only(run).warnings)


def test_the_client_must_be_the_same_in_every_trial(run_of: MakeRun) -> None:
    run = run_of("run", TWO)
    path = run.paths.trial_json("optimized", "c0016", 2)
    record = read_json(path)
    record["client"]["versions"] = {"locust": "9.9"}
    write_json(path, record)
    with pytest.raises(IncomparableError, match=r"client\.versions\.locust: 2\.47\.0 \| 2\.47\.0 / 9\.9"):
        only(run)


def test_a_summary_that_does_not_say_what_the_records_say(run_of: MakeRun) -> None:
    run = run_of("run", TWO)
    run.points.loc[0, "throughput_rps"] *= 2
    with pytest.raises(IncomparableError, match=r"summary and trial\.json disagree"):
        only(run)


def test_no_level_in_common(run_of: MakeRun) -> None:
    a, b = run_of("a", {"baseline": 20.0}, levels=[2]), run_of("b", {"optimized": 20.0}, levels=[4])
    with pytest.raises(IncomparableError, match=r"share no level: baseline: c0002; optimized: c0004"):
        pair_of(ArmData(a, "baseline"), ArmData(b, "optimized"))


# ---- Gate ----


def outcome(run: RunData, max_slowdown: float, *metrics: str) -> list[str]:
    pair, family = pair_of(ArmData(run, "baseline"), ArmData(run, "optimized"))
    _, outcomes = compare.gate(pair, family, max_slowdown, metrics or ["throughput_rps"])
    return [found for _, found in outcomes]


def test_gate(run_of: MakeRun) -> None:
    slower = run_of("slower", {"baseline": 40.0, "optimized": 36.0}, levels=[32], repeats=5, noise=0.003)
    assert outcome(slower, 0.03) == ["slower"]
    assert outcome(slower, 0.25) == ["ok"]
    assert outcome(slower, 0.03, "throughput_rps", "latency_p50_ms") == ["slower", "slower"]
    noisy = run_of("noisy", {"baseline": 40.0, "optimized": 40.0}, levels=[32], noise=0.1)
    assert outcome(noisy, 0.03) == ["inconclusive"]
    none = run_of("none", TWO, invalid=[("baseline", 16, repeat) for repeat in range(3)])
    assert outcome(none, 0.03) == ["invalid"]
    with pytest.raises(IncomparableError, match="ttft_p50_ms was not measured"):
        outcome(slower, 0.03, "ttft_p50_ms")


def test_several_gated_metrics_share_the_error(run_of: MakeRun) -> None:
    run = run_of("run", TWO)
    pair, family = pair_of(ArmData(run, "baseline"), ArmData(run, "optimized"))
    _, outcomes = compare.gate(pair, family, 0.03, ["throughput_rps", "latency_p50_ms"])
    assert [found.confidence for found, _ in outcomes] == [pytest.approx(0.975)] * 2


def test_interleaved_only_with_both_arms_in_each_run(run_of: MakeRun) -> None:
    a, b = run_of("a", TWO), run_of("b", TWO)
    assert Pair(
        (ArmData(a, "baseline"),), (ArmData(a, "optimized"),), THROUGHPUT, Level.of_clients(16), "", declared=True
    ).interleaved
    assert not Pair(
        (ArmData(a, "baseline"),), (ArmData(b, "optimized"),), THROUGHPUT, Level.of_clients(16), "", declared=True
    ).interleaved

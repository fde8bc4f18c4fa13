"""Known values from scipy.stats, textbook rules written the other way round, edges, and a small calibration."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from scipy.stats import binom, nct, t, ttest_ind, ttest_rel

from analysis import stats
from analysis.stats import (
    Effect,
    Verdict,
    at_alpha,
    blocks_to_settle,
    geometric_mean_interval,
    histogram_quantiles,
    holm_alphas,
    judge,
    look_alpha,
    minimum_detectable_ratio,
    paired_effect,
    slice_histograms,
    slice_percentile_interval,
    slice_rate_interval,
    unpaired_effect,
)
from benchmarks import calibration


def given(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis without its limit on the time of an example."""
    return lambda test: settings(deadline=None)(hypothesis_given(*strategies)(test))


BASELINE = np.array([182.0, 214.0, 199.5, 205.1, 190.7])
CANDIDATE = np.array([201.0, 230.4, 222.2, 214.9, 215.3])

positive = st.floats(1e-3, 1e6)
pairs = st.lists(st.tuples(positive, positive), min_size=2, max_size=12)
alphas = st.sampled_from([0.2, 0.05, 0.0125, 0.05 / 7])
margins = st.sampled_from([0.0, 0.02, 0.05, 0.5])


def effect(low: float | None, high: float | None) -> Effect:
    ratio = 1.0 if low is None or high is None else math.sqrt(low * high)
    return Effect(ratio, 5, low, high)


def interval(found: Effect) -> tuple[float, float]:
    assert found.ci_low_ratio is not None
    assert found.ci_high_ratio is not None
    return found.ci_low_ratio, found.ci_high_ratio


# ---- Effects ----


def test_paired_effect_is_the_paired_t_test_on_logs() -> None:
    found = paired_effect(BASELINE, CANDIDATE, higher_is_better=True)
    expected = ttest_rel(np.log(CANDIDATE), np.log(BASELINE))
    low, high = expected.confidence_interval(0.95)
    assert found.ratio == pytest.approx(np.exp(np.log(CANDIDATE / BASELINE).mean()), rel=1e-12)
    assert interval(found) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-9)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.log_sd == pytest.approx(np.log(CANDIDATE / BASELINE).std(ddof=1))
    assert (found.num_blocks, found.dof, found.confidence) == (5, 4, 0.95)


@pytest.mark.parametrize("num_baseline", [2, 5])
def test_unpaired_effect_is_welchs_t_test_on_logs(num_baseline: int) -> None:
    baseline = BASELINE[:num_baseline]
    found = unpaired_effect(baseline, CANDIDATE, higher_is_better=False)
    expected = ttest_ind(np.log(baseline), np.log(CANDIDATE), equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert interval(found) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-9)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.dof == pytest.approx(expected.df)
    assert found.num_blocks == num_baseline


def test_half_the_latency_is_a_ratio_of_two() -> None:
    assert paired_effect([20.0], [10.0], higher_is_better=False).ratio == pytest.approx(2)
    assert unpaired_effect([20.0], [10.0], higher_is_better=False).ratio == pytest.approx(2)
    assert paired_effect([20.0], [10.0], higher_is_better=True).ratio == pytest.approx(0.5)


@pytest.mark.parametrize("compare", [paired_effect, unpaired_effect])
def test_one_block_has_a_ratio_and_no_interval(compare) -> None:
    found = compare([100.0], [110.0], True)
    assert found == Effect(found.ratio, 1)
    assert found.ratio == pytest.approx(1.1)
    assert at_alpha(found, 0.01) == found
    assert judge(found, 0.05, equivalence_alpha=0.01) == Verdict.INCONCLUSIVE
    assert blocks_to_settle(found, 0.05) == (2, None)


def test_welch_needs_two_blocks_in_each_arm() -> None:
    assert unpaired_effect([100.0], [110.0, 112.0], True).log_se is None


@pytest.mark.parametrize("compare", [paired_effect, unpaired_effect])
@pytest.mark.parametrize(("factor", "p_value", "verdict"), [(1.0, 1.0, "EQUIVALENT"), (1.1, 0.0, "FASTER")])
def test_zero_variance_has_an_interval_without_width(compare, factor: float, p_value: float, verdict: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare([70.0] * 4, [70.0 * factor] * 4, True)
        assert interval(found) == pytest.approx((factor, factor), rel=1e-12)
        assert (found.p_value, found.log_sd) == (p_value, 0)
        assert judge(found, 0.05) == verdict
        assert minimum_detectable_ratio(found, 5) == 1
        assert blocks_to_settle(found, 0.05) == (5, 5)


def test_rounding_is_not_variance() -> None:
    """One and the same ratio in each block, though the logs differ in their last bits."""
    for factor in np.arange(1.01, 3, 0.01):
        found = paired_effect(BASELINE, factor * BASELINE, True)
        assert (found.log_sd, found.p_value) == (0, 0)
    assert paired_effect([0.1 * 3] * 2, [0.3] * 2, True).p_value == 1


def test_an_interval_too_wide_for_a_float_is_unbounded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_effect([1.0, 2.0], [2.0, 1.0], True, alpha=1e-6)
    assert interval(found) == (0, math.inf)
    assert judge(found, 0.05) == Verdict.INCONCLUSIVE


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_values_must_be_positive_and_finite(bad: float) -> None:
    for compare in (paired_effect, unpaired_effect):
        with pytest.raises(ValueError, match="candidate must be positive and finite"):
            compare([1.0, 2.0], [1.0, bad], True)
        with pytest.raises(ValueError, match="baseline must be positive and finite"):
            compare([bad, 2.0], [1.0, 2.0], True)
    with pytest.raises(ValueError, match="values must be positive and finite"):
        geometric_mean_interval([1.0, bad])


def test_no_blocks_and_unequal_blocks_are_refused() -> None:
    for compare in (paired_effect, unpaired_effect):
        with pytest.raises(ValueError, match="at least one block"):
            compare([], [], True)
    with pytest.raises(ValueError, match="2 of the baseline, 1 of the candidate"):
        paired_effect([1.0, 2.0], [1.0], True)
    with pytest.raises(ValueError, match="one value a block"):
        paired_effect([[1.0, 2.0]], [[1.0, 2.0]], True)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.05, math.nan])
def test_alpha_is_a_probability(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        paired_effect(BASELINE, CANDIDATE, True, alpha)


@given(pairs, st.booleans(), margins)
def test_swapping_arms_inverts_the_ratio_and_the_verdict(blocks, higher_is_better: bool, margin: float) -> None:
    one, other = np.array(blocks).T
    for compare in (paired_effect, unpaired_effect):
        there, back = compare(one, other, higher_is_better), compare(other, one, higher_is_better)
        assert there.ratio == pytest.approx(1 / back.ratio)
        low, high = interval(there)
        low_back, high_back = interval(back)
        assert low == pytest.approx(1 / high_back if high_back else math.inf, rel=1e-6)
        assert high == pytest.approx(1 / low_back if low_back else math.inf, rel=1e-6)
        swapped = {Verdict.FASTER: Verdict.SLOWER, Verdict.SLOWER: Verdict.FASTER}
        if not near_a_boundary(there, margin):
            assert judge(back, margin) == swapped.get(judge(there, margin), judge(there, margin))


def near_a_boundary(found: Effect, margin: float) -> bool:
    """Where rounding may decide."""
    bounds = (1.0, 1 + margin, 1 / (1 + margin))
    return any(math.isclose(end, bound, rel_tol=1e-9) for end in interval(found) for bound in bounds)


@given(pairs, st.floats(0.01, 100))
def test_the_unit_does_not_matter(blocks, factor: float) -> None:
    one, other = np.array(blocks).T
    for compare in (paired_effect, unpaired_effect):
        plain, scaled = compare(one, other, True), compare(factor * one, factor * other, True)
        assert scaled.ratio == pytest.approx(plain.ratio)
        assert scaled.log_se == pytest.approx(plain.log_se, abs=1e-11)
        assert scaled.dof == pytest.approx(plain.dof, rel=1e-3)


@given(pairs, alphas, alphas)
def test_less_confidence_is_a_narrower_interval(blocks, alpha: float, other_alpha: float) -> None:
    one, other = np.array(blocks).T
    for compare in (paired_effect, unpaired_effect):
        found = compare(one, other, True, alpha)
        again = at_alpha(found, other_alpha)
        assert interval(again) == pytest.approx(interval(compare(one, other, True, other_alpha)), rel=1e-6)
        assert replace(again, ci_low_ratio=None, ci_high_ratio=None, confidence=None) == replace(
            found, ci_low_ratio=None, ci_high_ratio=None, confidence=None
        )
        assert again.confidence == 1 - other_alpha
        wide, narrow = (found, again) if alpha <= other_alpha else (again, found)
        assert interval(wide)[0] <= interval(narrow)[0] * (1 + 1e-9)
        assert interval(wide)[1] >= interval(narrow)[1] * (1 - 1e-9)


@given(pairs, alphas)
def test_the_interval_excludes_1_where_p_is_below_alpha(blocks, alpha: float) -> None:
    one, other = np.array(blocks).T
    for compare in (paired_effect, unpaired_effect):
        found = compare(one, other, True, alpha)
        low, high = interval(found)
        assert found.p_value is not None
        if not near_a_boundary(found, 0.0):
            assert (low > 1 or high < 1) == (found.p_value < alpha)


def test_geometric_mean_interval_is_students_t_on_logs() -> None:
    value, low, high = geometric_mean_interval(BASELINE, alpha=0.1)
    logs = np.log(BASELINE)
    expected = t.interval(0.9, 4, loc=logs.mean(), scale=logs.std(ddof=1) / math.sqrt(5))
    assert value == pytest.approx(np.exp(logs.mean()))
    assert (low, high) == pytest.approx(tuple(np.exp(expected)))
    assert geometric_mean_interval([4.0]) == (pytest.approx(4), None, None)


# ---- Holm, looks ----


def test_holm_by_hand() -> None:
    # 0.01 <= 0.05 / 4, 0.013 <= 0.05 / 3, 0.03 > 0.05 / 2: two rejected, the rest at 0.025.
    levels = holm_alphas([0.03, 0.01, 0.04, 0.013], 0.05)
    assert levels == pytest.approx([0.025, 0.0125, 0.025, 0.05 / 3])
    assert holm_alphas([0.03, 0.03], 0.05) == pytest.approx([0.025, 0.025])
    assert holm_alphas([0.02, 0.02], 0.05) == pytest.approx([0.025, 0.05])
    assert holm_alphas([0.2], 0.05) == [0.05]
    assert holm_alphas([], 0.05) == []


def test_what_was_planned_and_not_measured_counts_in_the_family() -> None:
    assert holm_alphas([None, 0.02, None], 0.05) == pytest.approx([0.05 / 3] * 3)
    assert holm_alphas([None, 0.016, None], 0.05) == pytest.approx([0.025, 0.05 / 3, 0.025])


def test_holm_refuses_what_is_no_p_value() -> None:
    for bad in (math.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            holm_alphas([0.1, bad])


@given(st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.001, 0.01, 0.04])), min_size=1, max_size=9), alphas)
def test_holm_is_the_textbook_step_down(p_values, alpha: float) -> None:
    """By adjusted p-values (Wright 1992): the running maximum of (m - i + 1) p_(i)."""
    m = len(p_values)
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(m)
    adjusted[order] = np.maximum.accumulate((m - np.arange(m)) * np.array(p_values)[order])
    levels = holm_alphas(p_values, alpha)
    for p_value, level, expected in zip(p_values, levels, adjusted, strict=True):
        if not math.isclose(expected, alpha, rel_tol=1e-9):
            assert (p_value <= level) == (expected <= alpha)
        assert alpha / m <= level <= alpha


def test_looks_spend_no_more_than_alpha() -> None:
    assert look_alpha(1, 1) == 0.05
    assert look_alpha(2, 1) is None
    assert [look_alpha(look, 3) for look in (1, 2, 3, 4)] == [0.025, 0.0125, 0.00625, None]
    assert sum(look_alpha(look, 20, 0.1) or 0 for look in range(1, 21)) < 0.1
    for look, max_looks in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="looks count from 1"):
            look_alpha(look, max_looks)


# ---- Verdict, planning ----


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.06, 1.2, "FASTER"),
        (1.0001, 1.2, "FASTER"),
        (1.0, 1.2, "INCONCLUSIVE"),  # 1 is not excluded
        (0.9, 1.0, "INCONCLUSIVE"),
        (0.8, 0.9999, "SLOWER"),
        (1 / 1.05, 1.05, "EQUIVALENT"),  # the margin is inside
        (0.9999 / 1.05, 1.05, "INCONCLUSIVE"),
        (1 / 1.05, 1.0501, "INCONCLUSIVE"),
        (1.01, 1.05, "EQUIVALENT"),  # real, and too small to matter
        (1.01, 1.0501, "FASTER"),
        (0.5, 2.0, "INCONCLUSIVE"),
        (None, None, "INCONCLUSIVE"),
    ],
)
def test_verdict_by_interval(low: float | None, high: float | None, verdict: str) -> None:
    found = judge(effect(low, high), 0.05)
    assert found == verdict
    assert f"{found}" == verdict


def test_margin_of_nothing_and_below() -> None:
    assert judge(effect(1.0, 1.0), 0.0) == Verdict.EQUIVALENT
    with pytest.raises(ValueError, match="margin"):
        judge(effect(1.0, 1.0), -0.01)


def test_equivalence_in_a_family_has_its_own_level() -> None:
    found = paired_effect([100.0] * 5, [100.0, 101.0, 102.0, 103.0, 104.0], True)
    low, high = interval(at_alpha(found, 0.05 / 7))
    assert 1 / 1.05 < low < 1 < interval(found)[0]
    assert interval(found)[1] < 1.05 < high
    assert judge(found, 0.05) == Verdict.EQUIVALENT
    assert judge(found, 0.05, equivalence_alpha=0.05 / 7) == Verdict.FASTER


def test_blocks_to_settle_asks_for_more_of_noisier_comparisons() -> None:
    quiet, noisy = (paired_effect([1.0] * 5, np.exp(sd * np.array([-2, -1, 0.5, 1, 2])), True) for sd in (0.03, 0.06))
    for found in (quiet, noisy):
        assert judge(found, 0.05) == Verdict.INCONCLUSIVE
        assert blocks_to_settle(found, 0.05) == blocks_to_settle(found, 0.05)
    (low, high), (noisy_low, noisy_high) = blocks_to_settle(quiet, 0.05), blocks_to_settle(noisy, 0.05)
    assert high is not None
    assert noisy_high is not None
    assert 5 < low < high < noisy_high
    assert low < noisy_low
    assert blocks_to_settle(quiet, 0.05, alpha=0.00625)[0] > low
    hopeless = paired_effect([1.0] * 40, [10.0, 0.1] * 20, True)
    assert blocks_to_settle(hopeless, 0.001)[1] is None


def test_blocks_to_settle_by_brute_force() -> None:
    """Draws the truth, then every further block, and asks `judge`: 20 % at the lower number, 90 % at the upper one."""
    logs = np.array([0.15, -0.13, 0.01])
    low, high = blocks_to_settle(calibration.log_ratio_effect(logs), 0.05)
    assert high is not None
    rng = np.random.default_rng(9)

    def chance(total: int) -> float:
        sds = logs.std(ddof=1) * np.sqrt(2 / rng.chisquare(2, 3_000))
        means = logs.mean() + sds / math.sqrt(3) * rng.standard_normal(3_000)
        new = means[:, None] + sds[:, None] * rng.standard_normal((3_000, total - 3))
        return float(np.mean([calibration.settled(np.concatenate([logs, more])) for more in new]))

    # Numbers are tried in steps of some 10 %, so the chance at the lower one may be a little more than 20 %.
    assert chance(low - 2) < 0.2 < chance(low) + 0.02
    assert chance(low) < 0.26
    assert chance(high) == pytest.approx(0.9, abs=0.03)


def test_blocks_to_settle_is_kept_by_further_blocks() -> None:
    """At the upper number most comparisons are settled, at the lower one some are."""
    rng = np.random.default_rng(3)
    at_low, at_high = [], []
    for logs in 0.07 * rng.standard_normal((300, stats.MAX_BLOCKS)):
        found = calibration.log_ratio_effect(logs[:5])
        if judge(found, 0.05) == Verdict.INCONCLUSIVE:
            low, high = blocks_to_settle(found, 0.05)
            assert high is not None
            at_low.append(calibration.settled(logs[:low]))
            at_high.append(calibration.settled(logs[:high]))
    assert 0.1 < np.mean(at_low) < 0.6
    assert np.mean(at_high) > 0.8


@pytest.mark.parametrize("num_blocks", [2, 3, 5, 10, 200])
@pytest.mark.parametrize("alpha", [0.05, 0.00625])
def test_minimum_detectable_ratio_has_the_power_by_scipys_noncentral_t(num_blocks: int, alpha: float) -> None:
    aa = paired_effect(BASELINE, CANDIDATE, True)
    assert aa.log_sd is not None
    ratio = minimum_detectable_ratio(aa, num_blocks, alpha, power=0.8)
    assert ratio > 1
    noncentrality = math.log(ratio) * math.sqrt(num_blocks) / aa.log_sd
    limit = t.isf(alpha / 2, num_blocks - 1)
    assert nct.sf(limit, num_blocks - 1, noncentrality) == pytest.approx(0.8, abs=1e-6)


def test_minimum_detectable_ratio_is_called_in_four_of_five_simulated_comparisons() -> None:
    aa = paired_effect([1.0, 1.0, 1.0], np.exp([-0.05, 0.0, 0.05]), True)
    assert aa.log_sd == pytest.approx(0.05)
    logs = math.log(minimum_detectable_ratio(aa, 5)) + 0.05 * np.random.default_rng(4).standard_normal((4_000, 5))
    found = np.mean([interval(calibration.log_ratio_effect(blocks))[0] > 1 for blocks in logs])
    assert found == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 4_000))


def test_minimum_detectable_ratio_needs_noise_to_go_by() -> None:
    aa = paired_effect(BASELINE, CANDIDATE, True)
    with pytest.raises(ValueError, match="needs two blocks"):
        minimum_detectable_ratio(aa, 1)
    with pytest.raises(ValueError, match="needs two blocks, found 1 in the A/A"):
        minimum_detectable_ratio(paired_effect([1.0], [1.0], True), 5)


# ---- Within one deployment ----


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=60),
    st.sampled_from([1.0, 60.0, 0.7]),
    st.sampled_from([2, 20]),
)
def test_slice_histograms_by_brute_force(samples, duration_s: float, num_slices: int) -> None:
    values = np.array([value for value, _ in samples])
    times_s = np.minimum([duration_s * time for _, time in samples], np.nextafter(duration_s, 0))
    counts, edges = slice_histograms(values, times_s, duration_s, num_slices)
    assert counts.shape == (num_slices, len(edges) - 1)
    assert np.diff(np.log(edges)) == pytest.approx(math.log(1.005))
    expected = np.zeros(num_slices, dtype=int)
    for time_s in times_s:
        expected[min(int(time_s * (num_slices / duration_s)), num_slices - 1)] += 1
    assert counts.sum(axis=1).tolist() == expected.tolist()
    # Each value is in its bin, but for rounding at an edge.
    found = np.repeat(np.arange(len(edges) - 1), counts.sum(axis=0))
    values = np.sort(values)
    assert np.all(edges[found] <= values * (1 + 1e-9))
    assert np.all(values <= edges[found + 1] * (1 + 1e-9))


def test_a_time_that_rounds_up_to_the_end_is_in_the_last_slice() -> None:
    duration_s = 0.1
    assert np.nextafter(duration_s, 0) * (20 / duration_s) == 20
    counts, _ = slice_histograms([5.0], [np.nextafter(duration_s, 0)], duration_s)
    assert counts[-1].sum() == 1


def test_histograms_of_different_trials_line_up() -> None:
    _, edges = slice_histograms([3.0, 700.0], [0.0, 0.5], 1.0)
    _, others = slice_histograms([11.0, 12.0], [0.0, 0.5], 1.0)
    assert np.abs(edges[:, None] / others - 1).min(axis=0) == pytest.approx(0, abs=1e-9)


def test_slice_histograms_refuse_what_is_not_in_the_window() -> None:
    with pytest.raises(ValueError, match="times must be in"):
        slice_histograms([1.0], [60.0], 60.0)
    with pytest.raises(ValueError, match="times must be in"):
        slice_histograms([1.0], [-0.1], 60.0)
    with pytest.raises(ValueError, match="times must be in"):
        slice_histograms([1.0], [math.nan], 60.0)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="values must be positive and finite"):
            slice_histograms([1.0, bad], [1.0, 2.0], 60.0)
    for values, times in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="at least one value"):
            slice_histograms(values, times, 60.0)


def test_histogram_quantiles_are_within_a_bin_of_the_exact_ones() -> None:
    rng = np.random.default_rng(5)
    values, times_s = rng.lognormal(3, 0.6, 20_000), rng.uniform(0, 30, 20_000)
    counts, edges = slice_histograms(values, times_s, 30.0)
    ps = np.array([0.01, 0.5, 0.9, 0.99])
    assert histogram_quantiles(counts.sum(axis=0), edges, ps)[0] == pytest.approx(np.quantile(values, ps), rel=0.006)
    rows = histogram_quantiles(counts, edges, [0.5])
    index = (times_s / 1.5).astype(int)
    assert rows[:, 0] == pytest.approx([np.median(values[index == k]) for k in range(20)], rel=0.006)


@pytest.mark.parametrize("num_slices", [3, 20])
def test_slice_percentile_interval_by_brute_force(num_slices: int) -> None:
    """Against resampling the slices' raw values; the same window always gives the same interval."""
    rng = np.random.default_rng(6)
    values, times_s = rng.lognormal(3, 0.6, 5_000), rng.uniform(0, 30, 5_000)
    counts, edges = slice_histograms(values, times_s, 30.0, num_slices)
    ps, points = np.array([0.5, 0.99]), np.quantile(values, [0.5, 0.99])
    low, high = slice_percentile_interval(counts, edges, ps, points)
    assert np.sqrt(low * high) == pytest.approx(points)
    again = slice_percentile_interval(counts, edges, ps, points)
    assert (low.tolist(), high.tolist()) == (again[0].tolist(), again[1].tolist())

    index = (times_s / (30 / num_slices)).astype(int)
    parts = [values[index == k] for k in range(num_slices)]
    draws = rng.integers(num_slices, size=(2_000, num_slices))
    logs = np.log([np.quantile(np.concatenate([parts[k] for k in draw]), ps) for draw in draws])
    expected = t.isf(0.025, num_slices - 1) * logs.std(axis=0, ddof=1) * math.sqrt(num_slices / (num_slices - 1))
    assert np.log(high / points) == pytest.approx(expected, rel=0.1)

    one_low, one_high = slice_percentile_interval(counts, edges, 0.99, points[1], alpha=0.01)
    assert one_low < low[1] < high[1] < one_high
    assert one_low.shape == ()


def test_no_interval_where_most_slices_are_empty() -> None:
    counts, edges = slice_histograms(np.full(1_000, 5.0), np.linspace(0, 13, 1_000), 30.0)
    assert all(np.isnan(end) for end in slice_percentile_interval(counts, edges, 0.5, 5.0))


def test_slice_rate_interval_is_batch_means() -> None:
    counts = np.array([90, 110, 105, 95])
    rates = counts / (40 / 4)
    expected = t.interval(0.95, 3, loc=rates.mean(), scale=rates.std(ddof=1) / 2)
    assert slice_rate_interval(counts, 40.0) == pytest.approx(expected)
    assert slice_rate_interval([0, 0, 0, 100], 40.0)[0] == 0


# ---- Calibration, in small ----


def test_verdicts_keep_their_promise_on_simulated_deployments() -> None:
    """False claims and coverage within what 2,000 comparisons can tell: beyond it only in 1 of 10,000 seeds."""
    simulations = 2_000
    most_wrong = binom.isf(1e-4, simulations, 0.05) / simulations
    rng = np.random.default_rng(7)
    baseline, candidates = calibration.simulate_arms(rng, simulations, 5, 0.05, [1.0, 1.2])
    for metric in calibration.METRICS:
        same, faster = (calibration.compare(baseline, candidate, metric, 5) for candidate in candidates)
        assert same.false_claims() <= most_wrong
        assert 1 - same.coverage(1.0) <= most_wrong
        assert 1 - faster.coverage(1.2) <= most_wrong
        assert faster.share(Verdict.SLOWER) == 0
        assert faster.share(Verdict.FASTER) > 0.8


def test_a_family_keeps_its_promise() -> None:
    families, most_wrong = 2_000, binom.isf(1e-4, 2_000, 0.05)
    rng = np.random.default_rng(8)
    wrong = 0
    for cells in 0.05 * rng.standard_normal((families, 7, 5)):
        found = [calibration.log_ratio_effect(cell) for cell in cells]
        levels = holm_alphas([one.p_value for one in found])
        verdicts = [
            judge(at_alpha(one, level), 0.05, stats.ALPHA / 7) for one, level in zip(found, levels, strict=True)
        ]
        wrong += Verdict.FASTER in verdicts or Verdict.SLOWER in verdicts
    assert wrong <= most_wrong


@pytest.mark.parametrize("table", ["no_effect", "true_effects", "families", "settling", "slices", "beyond"])
def test_each_table_of_the_calibration_can_be_made(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(calibration, table)(calibration.Report(), np.random.default_rng(0), 4)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("|---|") for line in lines)


def test_a_broken_bound_is_reported() -> None:
    report = calibration.Report()
    assert report.at_most(0.058, 0.057, "false claims") == "5.8 %"
    assert report.at_least(0.95, 0.94, "coverage") == "95.0 %"
    assert report.broken == ["false claims: 5.8 %, promised at most 5.7 %"]

"""How large is an effect, and may we call it one? Every statistic of a comparison, and nothing else.

The replicate is the *block*: one fresh deployment of each arm, measured near each other in time. Thousands of requests
to one deployment are not replicates, for they share whatever that deployment drew (placement, memory layout,
neighbours); within one deployment only `slice_*` speaks, and what it says must be labelled so.

An effect is a ratio oriented so that > 1 is better, whatever the metric. It is computed on logs, where a speedup of 2
and a slowdown of 2 are equally far from 1: Student's t over blocks. No bootstrap over blocks: with 3 to 10 of them a
percentile bootstrap covers 75 to 90 % where it says 95 %.

`benchmarks/calibration.py` runs these functions on simulated comparisons of known truth and checks what they promise.
Not covered: blocks that depend on each other, arms whose noise has different skew, and arms measured in different runs
on machines that changed in between (`unpaired_effect` cannot see that).

The distributions are those of `scipy.special`, which `scipy.stats` is built on, at a fiftieth of the cost of a call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import gammaincinv, nctdtr, ndtri, stdtr, stdtrit

ALPHA = 0.05
MAX_BLOCKS = 1_000  # `blocks_to_settle` looks no further
NUM_SLICES = 20
_LOG_BIN = math.log(1.005)  # width of a histogram's bins: 0.5 %
_ROUNDING = 1e-12  # of a difference of logs: less is rounding, not variance

Floats = NDArray[np.float64]


class Verdict(StrEnum):
    """What is said of the candidate against the baseline."""

    FASTER = "FASTER"
    SLOWER = "SLOWER"
    EQUIVALENT = "EQUIVALENT"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class Effect:
    """A ratio (> 1 is better) and how well it is known. All but the first two are None with fewer than two blocks.

    An interval's upper end may be infinite, where very few blocks meet a very small alpha.
    """

    ratio: float
    num_blocks: int
    ci_low_ratio: float | None = None
    ci_high_ratio: float | None = None
    confidence: float | None = None  # 1 - alpha of the interval
    log_sd: float | None = None  # standard deviation, between blocks, of the log-ratio
    p_value: float | None = None  # two-sided, of ratio == 1
    log_se: float | None = None  # standard error of the log of `ratio`
    dof: float | None = None  # degrees of freedom of `log_se`


# ---- Effects ----


def paired_effect(baseline: ArrayLike, candidate: ArrayLike, higher_is_better: bool, alpha: float = ALPHA) -> Effect:
    """Effect of arms measured side by side: one value a block and arm, in the same order. Paired t on log-ratios.

    Raises `ValueError` for no blocks, unequal lengths, or a value that is not positive and finite.
    """
    logs = _logs(baseline, "baseline"), _logs(candidate, "candidate")
    if len(logs[0]) != len(logs[1]):
        raise ValueError(f"blocks must have both arms: {len(logs[0])} of the baseline, {len(logs[1])} of the candidate")
    difference = logs[1] - logs[0] if higher_is_better else logs[0] - logs[1]
    num_blocks, mean, sd = len(difference), *_mean_and_sd(difference)
    if sd is None:
        return Effect(_exp(mean), num_blocks)
    return _effect(mean, sd, sd / math.sqrt(num_blocks), num_blocks - 1, num_blocks, alpha)


def unpaired_effect(baseline: ArrayLike, candidate: ArrayLike, higher_is_better: bool, alpha: float = ALPHA) -> Effect:
    """Effect of arms measured in different runs: Welch's t on logs. `num_blocks` is that of the smaller arm.

    What changed between the runs besides the treatment is part of the ratio and in no interval. Degrees of freedom:
    Welch 1947 and Satterthwaite 1946. Raises `ValueError` as `paired_effect`, but the lengths may differ.
    """
    logs = _logs(baseline, "baseline"), _logs(candidate, "candidate")
    (mean_b, sd_b), (mean_c, sd_c) = (_mean_and_sd(values) for values in logs)
    num_b, num_c = len(logs[0]), len(logs[1])
    mean = mean_c - mean_b if higher_is_better else mean_b - mean_c
    if sd_b is None or sd_c is None:
        return Effect(_exp(mean), min(num_b, num_c))
    var_b, var_c = sd_b**2 / num_b, sd_c**2 / num_c  # of the means
    dof: float = num_b + num_c - 2
    if var_b + var_c > 0:
        share_b = var_b / (var_b + var_c)
        dof = 1 / (share_b**2 / (num_b - 1) + (1 - share_b) ** 2 / (num_c - 1))
    return _effect(mean, math.hypot(sd_b, sd_c), math.sqrt(var_b + var_c), dof, min(num_b, num_c), alpha)


def at_alpha(effect: Effect, alpha: float) -> Effect:
    """The same effect with its interval at confidence 1 - `alpha`; unchanged if it has none."""
    if effect.log_se is None or effect.dof is None:
        return effect
    mean, half = math.log(effect.ratio), _t_quantile(alpha, effect.dof) * effect.log_se
    return replace(effect, ci_low_ratio=_exp(mean - half), ci_high_ratio=_exp(mean + half), confidence=1 - alpha)


def geometric_mean_interval(values: ArrayLike, alpha: float = ALPHA) -> tuple[float, float | None, float | None]:
    """Geometric mean of one value a block, and its interval (None, None with one block). Student's t on logs.

    Raises `ValueError` for no values, or one that is not positive and finite.
    """
    logs = _logs(values, "values")
    mean, sd = _mean_and_sd(logs)
    if sd is None:
        return _exp(mean), None, None
    half = _t_quantile(alpha, len(logs) - 1) * sd / math.sqrt(len(logs))
    return _exp(mean), _exp(mean - half), _exp(mean + half)


def _effect(mean: float, sd: float, se: float, dof: float, num_blocks: int, alpha: float) -> Effect:
    mean = 0.0 if abs(mean) < _ROUNDING else mean
    p_value = 2 * float(stdtr(dof, -abs(mean) / se)) if se > 0 else float(mean == 0)
    effect = Effect(_exp(mean), num_blocks, log_sd=sd, p_value=p_value, log_se=se, dof=dof)
    return at_alpha(effect, alpha)


def _logs(values: ArrayLike, what: str) -> Floats:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{what} needs one value a block and at least one block, found shape {values.shape}")
    if not np.all((values > 0) & np.isfinite(values)):
        raise ValueError(f"{what} must be positive and finite, found {values.tolist()}")
    return np.asarray(np.log(values))


def _mean_and_sd(values: Floats) -> tuple[float, float | None]:
    """Sample deviation (n - 1): None with one value, 0 where there is nothing but rounding."""
    mean = float(values.mean())
    if len(values) == 1:
        return mean, None
    sd = float(values.std(ddof=1))
    return mean, sd if sd > _ROUNDING else 0.0


def _t_quantile(alpha: float, dof: float) -> float:
    """Half-width, in standard errors, of a two-sided interval."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, found {alpha}")
    return -float(stdtrit(dof, alpha / 2))


def _exp(log: float) -> float:
    with np.errstate(over="ignore"):  # an unbounded interval is infinite
        return float(np.exp(log))


# ---- Error that several questions and several looks share ----


def holm_alphas(p_values: Sequence[float | None], alpha: float = ALPHA) -> list[float]:
    """The level to judge each hypothesis at, so that "its interval at 1 - level excludes 1" is Holm's decision.

    Step-down: the i-th smallest of m p-values at alpha / (m - i + 1); the first that fails ends it, and the rest are
    judged at its level, where they fail too. None (planned, but not measured) is never rejected and counts in m: the
    family was fixed before the data. Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    known = [1.0 if p_value is None else p_value for p_value in p_values]
    if not all(0 <= p_value <= 1 for p_value in known):
        raise ValueError(f"p-values must be between 0 and 1, found {known}")
    levels, level, failed = [alpha] * len(known), alpha, False
    for rank, index in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        if not failed:
            level = alpha / (len(known) - rank)
            failed = known[index] > level
        levels[index] = level
    return levels


def look_alpha(look: int, max_looks: int, alpha: float = ALPHA) -> float | None:
    """The level of the `look`-th look (from 1) at a comparison that gets more blocks; None once the error is spent.

    Whoever declared one look gets all of `alpha` in it. Whoever declared more pays from the first: alpha / 2**look,
    which sums to less than `alpha` however the looks depend on each other (Bonferroni; any stopping rule is allowed).
    Declared before the run: alpha in look 1 and alpha / 2**k later would sum to more.
    """
    if look < 1 or max_looks < 1:
        raise ValueError(f"looks count from 1, found look {look} of {max_looks}")
    if look > max_looks:
        return None
    return alpha if max_looks == 1 else alpha / 2**look


# ---- Verdict, and what it would take ----


def judge(effect: Effect, margin: float, equivalence_alpha: float | None = None) -> Verdict:
    """EQUIVALENT if the interval is inside [1 / (1 + margin), 1 + margin], else by the side of 1 that it is on.

    EQUIVALENT comes first: a difference that is real and too small to matter is not a win. In a Holm family of m,
    Holm's levels hold for rejections of "no difference" only, so EQUIVALENT is judged by the interval at
    `equivalence_alpha` = alpha / m; FASTER and SLOWER always by the interval that `effect` has.
    """
    if margin < 0:
        raise ValueError(f"margin must not be negative, found {margin}")
    narrow = effect if equivalence_alpha is None else at_alpha(effect, equivalence_alpha)
    if effect.ci_low_ratio is None or effect.ci_high_ratio is None:
        return Verdict.INCONCLUSIVE
    assert narrow.ci_low_ratio is not None
    assert narrow.ci_high_ratio is not None
    if 1 / (1 + margin) <= narrow.ci_low_ratio and narrow.ci_high_ratio <= 1 + margin:
        return Verdict.EQUIVALENT
    if effect.ci_low_ratio > 1:
        return Verdict.FASTER
    if effect.ci_high_ratio < 1:
        return Verdict.SLOWER
    return Verdict.INCONCLUSIVE


def blocks_to_settle(effect: Effect, margin: float, alpha: float = ALPHA) -> tuple[int, int | None]:
    """Total blocks (those there included) for a verdict at `alpha` other than INCONCLUSIVE: a range.

    With the lower number a verdict has a chance of 20 %, with the upper one of 90 %; None = more than `MAX_BLOCKS`.
    Both are more than there are now. The chances are predictive: draw a true variance and a true ratio that fit the
    blocks so far (flat prior: scaled inverse chi-square, then normal; Gelman et al., "Bayesian Data Analysis", 3.2),
    draw further blocks given both, look up the verdict. (A formula that takes the estimate for the truth and allows for
    the deviation alone settled only two in three where the noise is large and the truth near 1, even from 10 blocks.)
    90 %, because a flat prior hopes for too much there: the calibration shows what either end is worth. Seeded.
    """
    done = effect.num_blocks
    if effect.log_se is None or effect.dof is None:
        return max(2, done + 1), None
    totals = np.unique(np.geomspace(done + 1, max(MAX_BLOCKS, done + 1), 64).astype(np.int64))
    more = totals - done
    # Welch's degrees of freedom are taken to grow with the number of blocks, as those of the paired t do exactly.
    dof = effect.dof * (totals - 1) / (done - 1)
    mean, var = math.log(effect.ratio), effect.log_se**2 * done  # of a block

    rng, draws = np.random.default_rng(0), (1_000, 1)

    def chi_square(degrees: ArrayLike) -> Floats:
        return 2 * rng.standard_gamma(np.asarray(degrees) / 2, (draws[0], np.size(degrees)))

    true_var = var * effect.dof / chi_square(effect.dof)
    true_mean = mean + np.sqrt(true_var / done) * rng.standard_normal(draws)
    new_mean = true_mean + np.sqrt(true_var / more) * rng.standard_normal((draws[0], len(totals)))
    # Sums of squares about the common mean: of the old blocks, of the new ones, and of the two means about it.
    squares = var * effect.dof + true_var * chi_square(np.maximum(dof - effect.dof - 1, 0))
    squares += (done * more / totals) * (new_mean - mean) ** 2
    distance = np.abs(done * mean + more * new_mean) / totals
    half = -stdtrit(dof, alpha / 2) * np.sqrt(squares / dof / totals)
    chance = np.mean((distance > half) | (distance + half <= math.log1p(margin)), axis=0)

    low, high = ([int(total) for total in totals[chance >= least]] for least in (0.2, 0.9))
    return low[0] if low else int(totals[-1]), high[0] if high else None


def minimum_detectable_ratio(aa_effect: Effect, num_blocks: int, alpha: float = ALPHA, power: float = 0.8) -> float:
    """The smallest true ratio (> 1) that a paired comparison of `num_blocks` blocks calls with probability `power`.

    The noise is the `log_sd` of an A/A comparison, taken as known. Power of the t-test by the noncentral t
    distribution (O'Brien and Lohr 1984; Cohen 1988, ch. 2), the side of the effect only. Exactly 1 without noise.
    Raises `ValueError` if the A/A has no `log_sd`, or for fewer than two blocks.
    """
    if aa_effect.log_sd is None or num_blocks < 2:
        raise ValueError(f"needs two blocks, found {aa_effect.num_blocks} in the A/A and {num_blocks} to plan for")
    dof, limit = num_blocks - 1, _t_quantile(alpha, num_blocks - 1)
    # An upper bracket: (Z + shift) / S > limit with `power` at least, if Z and S each keep to that of its square root.
    share = math.sqrt(power)
    bracket = limit * math.sqrt(2 * gammaincinv(dof / 2, share) / dof) + ndtri(share)
    shift = brentq(lambda noncentrality: 1 - nctdtr(dof, noncentrality, limit) - power, 0, bracket)
    return _exp(shift * aa_effect.log_sd / math.sqrt(num_blocks))


# ---- Within one deployment: always to be labelled so ----


def slice_histograms(
    values: ArrayLike, times_s: ArrayLike, duration_s: float, num_slices: int = NUM_SLICES
) -> tuple[NDArray[np.int64], Floats]:
    """Counts (num_slices, num_bins) of values by equal slices of [0, `duration_s`), and the bins' edges (num_bins + 1).

    Edges are powers of 1.005, so histograms of different trials line up. `times_s` are of completion. Raises
    `ValueError` for no values, a value that is not positive and finite, or a time outside the window.
    """
    values, times_s = np.asarray(values, dtype=np.float64), np.asarray(times_s, dtype=np.float64)
    if values.ndim != 1 or values.shape != times_s.shape or not len(values):
        raise ValueError(f"needs a time for each of at least one value, found shapes {values.shape}, {times_s.shape}")
    if not (values.min() > 0 and values.max() < math.inf):  # NaN fails too
        raise ValueError(f"values must be positive and finite, found {values.min()} to {values.max()}")
    if not (times_s.min() >= 0 and times_s.max() < duration_s):
        raise ValueError(f"times must be in [0, {duration_s}), found {times_s.min()} to {times_s.max()}")
    # In place where it can be: ten million values must not take a second.
    logs = np.log(values)
    logs /= _LOG_BIN
    bins = np.floor(logs, out=logs).astype(np.int64)
    first, num_bins = int(bins.min()), int(np.ptp(bins)) + 1
    index = (times_s * (num_slices / duration_s)).astype(np.int64)
    np.minimum(index, num_slices - 1, out=index)  # one ulp below the end can round up
    index *= num_bins
    index += bins
    index -= first
    counts = np.bincount(index, minlength=num_slices * num_bins).reshape(num_slices, num_bins)
    return counts, np.exp(_LOG_BIN * (first + np.arange(num_bins + 1)))


def merge_histograms(histograms: Sequence[tuple[NDArray[np.int64], Floats]]) -> tuple[NDArray[np.int64], Floats]:
    """Counts (num_bins) and edges (num_bins + 1) of several results of `slice_histograms` taken together."""
    firsts = [round(math.log(edges[0]) / _LOG_BIN) for _, edges in histograms]
    ends = [first + counts.shape[1] for first, (counts, _) in zip(firsts, histograms, strict=True)]
    low = min(firsts)
    total = np.zeros(max(ends) - low, dtype=np.int64)
    for first, end, (counts, _) in zip(firsts, ends, histograms, strict=True):
        total[first - low : end - low] += counts.sum(axis=0)
    return total, np.exp(_LOG_BIN * (low + np.arange(len(total) + 1)))


def histogram_quantiles(counts: ArrayLike, edges: ArrayLike, ps: ArrayLike) -> Floats:
    """Quantiles (rows, len(ps)) of histograms (rows, num_bins), within one bin; interpolated on the log scale."""
    below = np.pad(np.cumsum(np.atleast_2d(counts), axis=1), ((0, 0), (1, 0)))
    log_edges, ps = np.log(edges), np.atleast_1d(ps)
    return np.asarray(np.exp(np.stack([np.interp(ps * row[-1], row, log_edges) for row in below])))


def slice_percentile_interval(
    counts: ArrayLike,
    edges: ArrayLike,
    p: ArrayLike,
    point: ArrayLike,
    alpha: float = ALPHA,
    num_resamples: int = 1_000,
) -> tuple[Floats, Floats]:
    """Interval of percentiles *within this deployment*: low and high, of the shape of `p` (fractions, 0.99 for p99).

    Centred (on the log scale) at `point`, the exact percentiles. The standard error is that of resampled slices, not
    of resampled requests: neighbours in time are alike. (Bootstrap of batches; n / (n - 1) corrects its variance, and
    Student's t with num_slices - 1 accounts for their number.) Too narrow where slices depend on each other, i.e. where
    the service's state lasts as long as a slice. Seeded. NaN where fewer than half of the slices hold any value.
    """
    counts, p, point = np.asarray(counts, dtype=np.float64), np.asarray(p, dtype=np.float64), np.asarray(point)
    num_slices = len(counts)
    if np.count_nonzero(counts.sum(axis=1)) < num_slices / 2:
        return np.full(p.shape, np.nan), np.full(p.shape, np.nan)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(num_slices, np.full(num_slices, 1 / num_slices), size=num_resamples)
    logs = np.log(histogram_quantiles(weights @ counts, edges, p.ravel()))
    se = logs.std(axis=0, ddof=1).reshape(p.shape) * math.sqrt(num_slices / (num_slices - 1))
    half = _t_quantile(alpha, num_slices - 1) * se
    return point * np.exp(-half), point * np.exp(half)


def slice_rate_interval(counts: ArrayLike, duration_s: float, alpha: float = ALPHA) -> tuple[float, float]:
    """Interval of a rate, 1/s, *within this deployment*, from the count in each slice of the window: batch means.

    Too narrow where slices depend on each other, as `slice_percentile_interval`.
    """
    counts = np.asarray(counts, dtype=np.float64)
    half = _t_quantile(alpha, len(counts) - 1) * counts.std(ddof=1) * math.sqrt(len(counts))
    total = counts.sum()
    return max(0.0, float(total - half) / duration_s), float(total + half) / duration_s

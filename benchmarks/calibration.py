"""Do our verdicts hold what they promise? Run as `python -m benchmarks.calibration [--simulations 4000]`.

Simulates comparisons of known truth, judges them by the very functions of `analysis.stats`, and prints Markdown tables.
Exits 1 if a promised bound is broken: false FASTER or SLOWER <= 5.7 % and coverage of the true ratio >= 94 %, for
throughput and p99 alike, for looks and for families; at the upper end of `blocks_to_settle`, >= 80 % settled. Rates
without an effect come from five times the simulations: a rate of 5 % among 4,000 has a standard error of 0.34 %.

The simulated system: a closed loop of clients; a latency is log-normal around a server state that wanders (AR(1), log
scale). A fresh deployment multiplies the speed by exp(N(0, noise)), a block that of both arms by exp(N(0, 10 %)).
So p99 and throughput of a trial share their deployment. Windows are short (about 1,100 requests), so the noise within a
window is larger than in practice: 2 % of throughput, 5 % of p99.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.signal import lfilter

from analysis import stats
from analysis.stats import Effect, Floats, Verdict

MAX_FALSE, MIN_COVERAGE, MARGIN = 0.057, 0.94, 0.05
NOISES = (0.01, 0.03, 0.05, 0.15)
BLOCKS = (3, 5, 10)
LOOKS = (5, 10, 15)  # blocks there are at each look
SPEEDUPS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5)
METRICS = {"throughput": True, "p99": False}  # higher is better

NUM_CLIENTS, WINDOW, WARM_UP = 8, 150.0, 10.0  # times in median latencies of a typical deployment
REQUEST_SD, STATE_SD, STATE_ROUNDS = 0.4, 0.05, 5.0  # log scale; length of the state's memory in requests of a client
BLOCK_SD = 0.1


# ---- The simulated system ----


def simulate_requests(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Latencies and times of completion (trials, clients, requests of a client) of a typical deployment."""
    trials, _, rounds = shape
    memory = np.exp(-1 / STATE_ROUNDS)
    innovation = rng.standard_normal((trials, rounds), dtype=np.float32) * np.float32(np.sqrt(1 - memory**2))
    innovation[:, 0] /= np.sqrt(1 - memory**2)  # stationary from the first
    state = lfilter([1.0], [1.0, -memory], innovation, axis=1).astype(np.float32)
    latencies = rng.standard_normal(shape, dtype=np.float32)
    latencies *= np.float32(REQUEST_SD)
    latencies += np.float32(STATE_SD) * state[:, None, :]
    np.exp(latencies, out=latencies)
    return latencies, np.cumsum(latencies, axis=2)  # both float32


def simulate_trials(rng: np.random.Generator, slowdown: Floats) -> dict[str, Floats]:
    """Throughput and p99 of one window for each deployment; `slowdown` multiplies its latencies, of any shape."""
    order = np.argsort(slowdown, axis=None)
    throughput, p99 = np.empty(slowdown.size), np.empty(slowdown.size)
    for chunk in np.array_split(order, max(1, slowdown.size // 200)):
        slow = slowdown.ravel()[chunk]
        end = WARM_UP + WINDOW / slow  # in the time of a typical deployment, where all latencies are 1 / slow
        rounds = int(1.2 * end.max())
        latencies, completed = simulate_requests(rng, (len(chunk), NUM_CLIENTS, rounds))
        assert np.all(completed[:, :, -1] >= end[:, None]), "a client ran out of requests"
        latencies[(completed < WARM_UP) | (completed >= end[:, None, None])] = 0
        count = np.count_nonzero(latencies, axis=(1, 2))
        throughput[chunk] = count / WINDOW
        # The exact percentile, linear between order statistics; only the tail has to be sorted.
        from_top = 0.01 * (count - 1)
        keep = int(from_top.max()) + 2
        tail = np.sort(np.partition(latencies.reshape(len(chunk), -1), -keep, axis=1)[:, -keep:], axis=1)[:, ::-1]
        rank = from_top.astype(int)
        rows, part = np.arange(len(chunk)), from_top - rank
        p99[chunk] = slow * ((1 - part) * tail[rows, rank] + part * tail[rows, rank + 1])
    return {"throughput": throughput.reshape(slowdown.shape), "p99": p99.reshape(slowdown.shape)}


def simulate_arms(
    rng: np.random.Generator, simulations: int, num_blocks: int, noise: float, speedups: Sequence[float]
) -> tuple[dict[str, Floats], list[dict[str, Floats]]]:
    """Trials (simulations, num_blocks) of the baseline, and of a candidate for each true speedup."""
    shape = (simulations, num_blocks)
    block = BLOCK_SD * rng.standard_normal(shape)
    arms = [
        simulate_trials(rng, np.exp(block + noise * rng.standard_normal(shape)) / speedup) for speedup in (1, *speedups)
    ]
    return arms[0], arms[1:]


class Outcomes(NamedTuple):
    """Of all simulated comparisons of a setting: verdicts, and both ends of the interval."""

    verdicts: np.ndarray
    low: Floats
    high: Floats

    def share(self, *verdicts: Verdict) -> float:
        return float(np.isin(self.verdicts, verdicts).mean())

    def false_claims(self) -> float:
        return self.share(Verdict.FASTER, Verdict.SLOWER)

    def coverage(self, true_ratio: float) -> float:
        return float(np.mean((self.low <= true_ratio) & (true_ratio <= self.high)))


def outcomes(effects: Sequence[Effect], margin: float = MARGIN) -> Outcomes:
    return Outcomes(
        np.array([stats.judge(effect, margin) for effect in effects]),
        np.array([effect.ci_low_ratio for effect in effects], dtype=float),
        np.array([effect.ci_high_ratio for effect in effects], dtype=float),
    )


def compare(baseline: dict[str, Floats], candidate: dict[str, Floats], metric: str, num_blocks: int) -> Outcomes:
    """One comparison a simulation, from its first `num_blocks` blocks."""
    pairs = zip(baseline[metric][:, :num_blocks], candidate[metric][:, :num_blocks], strict=True)
    return outcomes([stats.paired_effect(one, other, METRICS[metric]) for one, other in pairs])


# ---- Tables ----


class Report:
    """Prints tables; remembers which promised bounds were broken."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def table(self, title: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Rows of the same headings."""
        print(f"\n### {title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(row.values())} |", flush=True)

    def at_most(self, rate: float, limit: float, what: str) -> str:
        if rate > limit:
            self.broken.append(f"{what}: {percent(rate)}, promised at most {percent(limit)}")
        return percent(rate)

    def at_least(self, rate: float, limit: float, what: str) -> str:
        if rate < limit:
            self.broken.append(f"{what}: {percent(rate)}, promised at least {percent(limit)}")
        return percent(rate)


def percent(rate: float) -> str:
    return "-" if np.isnan(rate) else f"{100 * rate:.1f} %"


def no_effect(report: Report, rng: np.random.Generator, simulations: int) -> None:
    """False claims, in one look and in three."""
    rows, look_rows = [], []
    for noise in NOISES:
        baseline, (candidate,) = simulate_arms(rng, simulations, max(LOOKS), noise, [1.0])
        for num_blocks in BLOCKS:
            row = {"noise": f"{noise:.0%}", "blocks": f"{num_blocks}"}
            for metric in METRICS:
                found = compare(baseline, candidate, metric, num_blocks)
                what = f"no effect, noise {noise:.0%}, {num_blocks} blocks, {metric}"
                row[f"{metric}: FASTER/SLOWER"] = report.at_most(found.false_claims(), MAX_FALSE, what)
                outside = report.at_most(1 - found.coverage(1.0), MAX_FALSE, f"{what}, interval excludes 1")
                row[f"{metric}: 1 outside"] = outside
            rows.append(row)
        for metric in METRICS:
            found_in = looks(report, baseline[metric], candidate[metric], metric, f"looks, noise {noise:.0%}, {metric}")
            look_rows.append({"noise": f"{noise:.0%}", "metric": metric} | found_in)
    report.table(f"True ratio 1: false claims ({simulations:,} comparisons a row, margin 5 %)", rows)
    report.table(f"True ratio 1: looks after {', '.join(map(str, LOOKS))} blocks, until settled", look_rows)


def looks(report: Report, baseline: Floats, candidate: Floats, metric: str, what: str) -> dict[str, str]:
    """Claims of the first look that settles it; with the declared alphas, and with all of alpha in the first look."""
    simulations = len(baseline)
    final = np.full(simulations, Verdict.INCONCLUSIVE, dtype=object)
    outside, outside_late = np.zeros(simulations, dtype=bool), np.zeros(simulations, dtype=bool)
    for look, num_blocks in enumerate(LOOKS, start=1):
        alpha = stats.look_alpha(look, len(LOOKS))
        assert alpha is not None
        pairs = zip(baseline[:, :num_blocks], candidate[:, :num_blocks], strict=True)
        effects = [stats.paired_effect(one, other, METRICS[metric], alpha) for one, other in pairs]
        final = np.where(final == Verdict.INCONCLUSIVE, outcomes(effects).verdicts, final)
        p_values = np.array([effect.p_value for effect in effects], dtype=float)
        outside |= p_values < alpha
        outside_late |= p_values < (stats.ALPHA if look == 1 else alpha)
    false = float(np.isin(final, [Verdict.FASTER, Verdict.SLOWER]).mean())
    return {
        "false FASTER/SLOWER": report.at_most(false, MAX_FALSE, what),
        "1 outside in any look": report.at_most(float(outside.mean()), MAX_FALSE, f"{what}, interval excludes 1"),
        "the same with alpha, alpha/4, alpha/8": percent(float(outside_late.mean())),
    }


def true_effects(report: Report, rng: np.random.Generator, simulations: int) -> None:
    """Coverage, power, and wrong claims of every kind."""
    coverage_rows: list[dict[str, str]] = []
    power_rows: dict[str, list[dict[str, str]]] = {metric: [] for metric in METRICS}
    wrong_side = wrong_equivalent = 0.0
    for noise in NOISES:
        baseline, candidates = simulate_arms(rng, simulations, max(BLOCKS), noise, SPEEDUPS)
        for num_blocks in BLOCKS:
            setting = {"noise": f"{noise:.0%}", "blocks": f"{num_blocks}"}
            covered = {}
            for metric in METRICS:
                found = {
                    ratio: compare(baseline, candidate, metric, num_blocks)
                    for ratio, candidate in zip(SPEEDUPS, candidates, strict=True)
                }
                what = f"coverage, noise {noise:.0%}, {num_blocks} blocks, {metric}"
                mean = float(np.mean([one.coverage(ratio) for ratio, one in found.items()]))
                covered[metric] = report.at_least(mean, MIN_COVERAGE, what)
                shares = {
                    f"ratio {ratio:g}": f"{100 * f.share(Verdict.FASTER):.0f} / {100 * f.share(Verdict.EQUIVALENT):.0f}"
                    for ratio, f in found.items()
                }
                power_rows[metric].append(setting | shares)
                wrong_side = max(wrong_side, *(f.share(Verdict.SLOWER) for ratio, f in found.items() if ratio > 1))
                at_margin = [f.share(Verdict.EQUIVALENT) for ratio, f in found.items() if ratio >= 1 + MARGIN]
                wrong_equivalent = max(wrong_equivalent, *at_margin)
            coverage_rows.append(setting | covered)
    report.table(
        f"Coverage of the true ratio by 95 % intervals (mean of ratios {', '.join(f'{r:g}' for r in SPEEDUPS)}; "
        f"{simulations:,} comparisons each)",
        coverage_rows,
    )
    for metric, rows in power_rows.items():
        report.table(f"Verdicts on {metric} by true ratio: FASTER / EQUIVALENT, %", rows)
    side = report.at_most(wrong_side, MAX_FALSE, "SLOWER where the candidate is faster")
    equivalent = report.at_most(wrong_equivalent, MAX_FALSE, "EQUIVALENT where the ratio is at or beyond the margin")
    print(f"\nWorst setting: SLOWER where the candidate is faster {side}; EQUIVALENT at a ratio >= 1.05 {equivalent}.")


def log_ratio_effect(log_ratios: Floats, alpha: float = stats.ALPHA) -> Effect:
    """The effect of blocks of which only the log-ratio is simulated: cheap, where the requests do not matter."""
    return stats.paired_effect(np.ones(len(log_ratios)), np.exp(log_ratios), True, alpha)


def families(report: Report, rng: np.random.Generator, simulations: int) -> None:
    """Seven cells without an effect, judged by Holm; their log-ratios share part of their noise, as levels do."""
    rows = []
    for correlation, num_blocks in itertools.product((0.0, 0.7), (3, 5)):
        shared = rng.standard_normal((simulations, 1, num_blocks)) * np.sqrt(correlation)
        own = rng.standard_normal((simulations, 7, num_blocks)) * np.sqrt(1 - correlation)
        wrong = single = 0
        for cells in 0.05 * (shared + own):
            effects = [log_ratio_effect(cell) for cell in cells]
            p_values = [effect.p_value for effect in effects]
            judged = [
                stats.judge(stats.at_alpha(effect, level), MARGIN, stats.ALPHA / 7)
                for effect, level in zip(effects, stats.holm_alphas(p_values), strict=True)
            ]
            wrong += Verdict.FASTER in judged or Verdict.SLOWER in judged
            single += min(p for p in p_values if p is not None) < stats.ALPHA
        what = f"Holm, correlation {correlation}, {num_blocks} blocks"
        rows.append(
            {
                "correlation of cells": f"{correlation:g}",
                "blocks": f"{num_blocks}",
                "any FASTER/SLOWER, Holm": report.at_most(wrong / simulations, MAX_FALSE, what),
                "any interval without 1, each at 95 %": percent(single / simulations),
            }
        )
    report.table(f"Families of 7 cells without an effect ({simulations:,} families a row)", rows)


def settling(report: Report, rng: np.random.Generator, simulations: int) -> None:
    """Are INCONCLUSIVE comparisons settled once there are as many blocks as `blocks_to_settle` said?"""
    settings = [(0.03, 1.0), (0.03, 1.02), (0.03, 1.05), (0.05, 1.0), (0.05, 1.1), (0.15, 1.05), (0.15, 1.2)]
    rows, everything = [], []
    for num_blocks, (noise, ratio) in itertools.product(BLOCKS, settings):
        logs = np.log(ratio) + np.sqrt(2) * noise * rng.standard_normal((simulations, stats.MAX_BLOCKS))
        found = []  # both ends of the range, whether it was settled at either
        for blocks in logs:
            effect = log_ratio_effect(blocks[:num_blocks])
            if stats.judge(effect, MARGIN) == Verdict.INCONCLUSIVE:
                low, high = stats.blocks_to_settle(effect, MARGIN)
                at_high = settled(blocks[:high]) if high else np.nan
                found.append([low, high or np.inf, settled(blocks[:low]), at_high])
        if found:
            everything += found
            low, high, at_low, at_high = np.array(found, dtype=float).T
            rows.append(
                {
                    "blocks": f"{num_blocks}",
                    "noise": f"{noise:.0%}",
                    "ratio": f"{ratio:g}",
                    "inconclusive": percent(len(found) / simulations),
                    "median range": f"{np.median(low):.0f} to {np.median(high):.0f}",
                    "settled at low end": percent(at_low.mean()),
                    "at high end": percent(np.nanmean(at_high)) if np.isfinite(high).any() else "-",
                }
            )
    report.table("INCONCLUSIVE now: settled with as many blocks as `blocks_to_settle` said?", rows)
    _, _, at_low, at_high = np.array(everything, dtype=float).T
    low_end = report.at_least(at_low.mean(), 0.1, "blocks_to_settle: settled at the low end")
    high_end = report.at_least(np.nanmean(at_high), 0.8, "blocks_to_settle: settled at the high end")
    print(f"\nAll rows together: settled at the low end {low_end} (meant: 20 %), at the high end {high_end} (90 %).")


def settled(log_ratios: Floats) -> bool:
    return stats.judge(log_ratio_effect(log_ratios), MARGIN) != Verdict.INCONCLUSIVE


def slices(report: Report, rng: np.random.Generator, simulations: int) -> None:
    """Coverage, within one deployment, of what it would show in an endless window: here that of all windows together.

    The state of the server is one of time, so that how long it lasts can be set against the length of a slice.
    """
    window, clients, state_sd, step, ps, rows = 300.0, 16, 0.15, 0.5, [0.5, 0.99], []
    for memory in (0.0, 0.2, 1.0, 3.0):  # in slices
        steps = int((WARM_UP + window) / step) + 1
        state = np.zeros((simulations, steps))
        if memory:
            kept = np.exp(-step / (memory * window / stats.NUM_SLICES))
            innovation = rng.standard_normal((simulations, steps)) * np.sqrt(1 - kept**2)
            innovation[:, 0] /= np.sqrt(1 - kept**2)  # stationary from the first
            state = state_sd * lfilter([1.0], [1.0, -kept], innovation, axis=1)
        now, row = np.zeros((simulations, clients)), np.arange(simulations)[:, None]
        requests = []
        while now.min() < WARM_UP + window:
            at = np.minimum((now / step).astype(int), steps - 1)
            latency = np.exp(state[row, at] + REQUEST_SD * rng.standard_normal(now.shape))
            now = now + latency
            requests.append((latency, now - WARM_UP))
        latencies, completed = (np.stack(part, axis=2) for part in zip(*requests, strict=True))
        inside = (completed >= 0) & (completed < window)
        truth = np.quantile(latencies[inside], ps)
        true_rate = np.count_nonzero(inside) / window / simulations
        hits = np.zeros(3)
        for one in range(simulations):
            values, times_s = latencies[one][inside[one]], completed[one][inside[one]]
            counts, edges = stats.slice_histograms(values, times_s, window)
            low, high = stats.slice_percentile_interval(counts, edges, ps, np.quantile(values, ps))
            rate_low, rate_high = stats.slice_rate_interval(counts.sum(axis=1), window)
            hits[:2] += (low <= truth) & (truth <= high)
            hits[2] += rate_low <= true_rate <= rate_high
        shares = dict(zip(("p50", "p99", "throughput"), map(percent, hits / simulations), strict=True))
        rows.append({"memory of the server's state / slice": f"{memory:g}"} | shares)
    report.table(
        f"Within one deployment: coverage of 95 % intervals, {stats.NUM_SLICES} slices ({simulations:,} windows a row)",
        rows,
    )


def beyond(report: Report, rng: np.random.Generator, simulations: int) -> None:
    """What is not promised: how wrong it gets where an assumption is broken. True ratio 1, margin 0."""
    num_blocks, noise = 5, 0.05
    shape = (simulations, num_blocks)

    def normal(sd: float, *size: int) -> Floats:
        return sd * rng.standard_normal(size or shape)

    def slow_placement() -> Floats:
        """One deployment in five is 30 % slower."""
        slow: Floats = np.log(0.7) * (rng.random(shape) < 0.2)
        return normal(noise) + slow

    def rate(baseline: Floats, candidate: Floats, unpaired: bool = False) -> float:
        effect = stats.unpaired_effect if unpaired else stats.paired_effect
        pairs = zip(np.exp(baseline), np.exp(candidate), strict=True)
        return float(np.mean([(effect(one, other, True).p_value or 0) < stats.ALPHA for one, other in pairs]))

    in_candidate = slow_placement() - 0.2 * np.log(0.7)  # the geometric mean is what a ratio of 1 is about
    machine = normal(2 * noise)
    drifting = machine + normal(noise), machine + normal(noise)
    cases = {
        "One deployment in five is 30 % slower, in both arms": rate(slow_placement(), slow_placement()),
        "The same in the candidate alone (geometric means equal)": rate(normal(noise), in_candidate),
        "Noise 5 % in the baseline, 15 % in the candidate": rate(normal(noise), normal(3 * noise)),
        "Machine drifts 10 % between blocks, arms interleaved": rate(*drifting),
        "The same blocks, compared as if unpaired (Welch)": rate(*drifting, unpaired=True),
        "Different runs (Welch), same machine state": rate(normal(noise), normal(noise), True),
        "Different runs (Welch), machine 5 % off between the runs": rate(
            normal(noise), normal(noise) + normal(noise, simulations, 1), True
        ),
        "One deployment an arm, measured five times (2 % within)": rate(
            normal(0.02) + normal(noise, simulations, 1), normal(0.02) + normal(noise, simulations, 1)
        ),
    }
    report.table(
        f"Beyond the promise: 95 % interval excludes the true ratio (5 blocks, noise 5 %, {simulations:,} comparisons)",
        [{"case": case, "wrong (5 % if calibrated)": percent(rate)} for case, rate in cases.items()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=4_000, help="comparisons a setting")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    simulations = arguments.simulations
    if simulations < 4_000:
        parser.error("below 4,000 comparisons a setting the promised bounds are broken by chance")
    tables = {no_effect: 5 * simulations, true_effects: simulations, families: simulations}
    tables |= {settling: simulations // 10, slices: simulations // 10, beyond: simulations}
    report, seeds = Report(), np.random.SeedSequence(arguments.seed).spawn(len(tables))
    for (table, number), seed in zip(tables.items(), seeds, strict=True):
        table(report, np.random.default_rng(seed), number)
    if report.broken:
        sys.exit("\nBroken bounds:\n" + "\n".join(report.broken))
    print("\nAll promised bounds hold.")


if __name__ == "__main__":
    main()

"""The figures hold what the frames hold, say what is missing, and no text lies on another."""

import itertools
import math
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from analysis import plots

METRICS = ["throughput_rps", "latency_mean_ms", "latency_p50_ms", "latency_p99_ms"]
TOKENS = ["ttft_p50_ms", "tpot_p50_ms", "input_throughput_tok_per_s", "output_throughput_tok_per_s"]
UNARY = [1, 2, 4, 8, 16, 32, 64, 128, 256]
RECSYS = [10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500]


def arm_points(
    arms: Sequence[str] = ("baseline", "optimized"),
    levels: Sequence[float] = UNARY,
    *,
    workload: str = "unary",
    metrics: Sequence[str] = METRICS,
    scale: float = 1.0,
    num_replicas: float = 1,
    no_p99: Sequence[float] = (),
    invalid: Sequence[float] = (),
    blocks: int = 5,
    interval: str = "between deployments",
    open_loop: bool = False,
) -> pd.DataFrame:
    """A service that saturates: throughput rises to a peak, latency follows from the number of clients."""
    rows = []
    for i, arm in enumerate(arms):
        peak = 210 * scale * 1.6**i
        for level in levels:
            rps = peak * level / (level + 12 + 6 * i) if not open_loop else min(level, peak)
            mean = 1e3 * level / rps if not open_loop else 8 / max(0.05, 1 - level / peak / 1.1)
            figures = {
                "throughput_rps": rps,
                "latency_mean_ms": mean,
                "latency_p50_ms": 0.9 * mean,
                "latency_p99_ms": 2.2 * mean,
                "ttft_p50_ms": 0.3 * mean,
                "tpot_p50_ms": 0.02 * mean,
                "input_throughput_tok_per_s": 512 * rps,
                "output_throughput_tok_per_s": 128 * rps,
            }
            for metric in metrics:
                value = math.nan if metric == "latency_p99_ms" and level in no_p99 else figures[metric]
                spread = 1.06 if interval and level not in invalid else math.nan
                rows.append(
                    {
                        "arm": arm,
                        "profile": arm.split(",")[1] if "," in arm else arm,
                        "workload": workload,
                        "cluster": "local",
                        "num_replicas": num_replicas,
                        "axes": "",
                        "level": f"r{level:09.2f}" if open_loop else f"c{level:04d}",
                        "concurrency": None if open_loop else level,
                        "offered_rps": float(level) if open_loop else None,
                        "metric": metric,
                        "value": value,
                        "ci_low": value / spread,
                        "ci_high": value * spread,
                        "interval": interval,
                        "num_blocks": 0 if level in invalid else blocks,
                        "num_invalid": blocks if level in invalid else 0,
                        "valid": level not in invalid,
                        "invalid_reasons": "client_saturated" if level in invalid else "",
                        "colocated": True,
                        "load_mode": "open" if open_loop else "closed",
                        "single_run": blocks == 1,
                    }
                )
    return pd.DataFrame(rows)


def cells(
    pairs: Sequence[tuple[str, str, str]] = (("baseline", "optimized", ""),),
    levels: Sequence[int] = (4, 16, 64),
    *,
    floor: float | None = None,
    blocks: int = 5,
    ratio: float = 3.6,
) -> pd.DataFrame:
    rows = []
    generator = np.random.default_rng(1)
    for baseline, candidate, axes in pairs:
        for level, metric in itertools.product(
            reversed(levels), ["throughput_rps", "latency_p50_ms", "latency_p99_ms"]
        ):
            top = level == max(levels)
            primary = top and metric == "throughput_rps"
            family = "primary" if primary else "secondary" if top or "throughput" in metric else "descriptive"
            value = ratio * generator.lognormal(0, 0.25)
            spread = generator.uniform(1.04, 1.3)
            bare = blocks < 2 or (family == "descriptive" and level == levels[0])
            verdict = "INCONCLUSIVE" if bare else "FASTER" if value / spread > 1 else "SLOWER"
            rows.append(
                {
                    "metric": metric,
                    "level": f"c{level:04d}",
                    "concurrency": level,
                    "offered_rps": None,
                    "axes": axes,
                    "baseline": baseline,
                    "candidate": candidate,
                    "baseline_value": 100.0,
                    "candidate_value": 100 * value,
                    "ratio": value,
                    "ci_low_ratio": None if bare else value / spread,
                    "ci_high_ratio": None if bare else value * spread,
                    "confidence": None if bare else 0.95 if primary else 0.9875,
                    "num_blocks": blocks,
                    "num_planned": 5,
                    "family": family,
                    "verdict": None if family == "descriptive" else verdict,
                    "reason": "",
                    "floor_ratio": floor,
                }
            )
    return pd.DataFrame(rows)


def gain_by_slo(pairs: Sequence[tuple[str, str, str]] = (("baseline", "optimized", ""),)) -> pd.DataFrame:
    rows = []
    for baseline, candidate, axes in pairs:
        for slo in np.geomspace(5, 1000, 40):
            base = np.floor(math.log2(slo / 15)) * 35 + 90 if slo > 15 else math.nan
            candi = np.floor(math.log2(slo / 6)) * 90 + 300 if slo > 6 else math.nan
            ratio = candi / base
            rows.append([baseline, candidate, axes, slo, base, candi, ratio, ratio / 1.1, ratio * 1.1, 5])
    names = "baseline candidate axes slo_ms baseline_peak_rps candidate_peak_rps ratio ci_low_ratio ci_high_ratio "
    names += "num_blocks"
    return pd.DataFrame(rows, columns=names.split())


def distribution(arms: Sequence[str] = ("baseline", "optimized"), levels: Sequence[int] = (4, 16, 64)) -> pd.DataFrame:
    rows = []
    names = "arm level concurrency quantile latency_ms ci_low_ms ci_high_ms"
    for (i, arm), level in itertools.product(enumerate(arms), levels):
        for q in [*np.linspace(0, 0.9, 19), *(1 - np.geomspace(0.08, 0.0005, 20))]:
            latency = level * 6 / 1.5**i * (0.4 + 0.25 * math.log(1 / (1 - q)))
            rows.append([arm, f"c{level:04d}", level, q, latency, latency * 0.96, latency * 1.05])
    return pd.DataFrame(rows, columns=names.split())


def over_time(
    arms: Sequence[str] = ("baseline", "optimized"), levels: Sequence[int] = (4, 16, 64), repeats: int = 3
) -> pd.DataFrame:
    rows = []
    generator = np.random.default_rng(2)
    for (i, arm), level, repeat in itertools.product(enumerate(arms), levels, range(repeats)):
        for t in np.arange(-4, 10, 0.5):
            rps = 200 * 1.6**i * level / (level + 12) * min(1, (t + 4.5) / 1.5) * generator.normal(1, 0.05)
            rows.append([arm, repeat, f"c{level:04d}", level, t, rps, 3.0, 1.0, 10.0, (repeat, level) != (1, 4)])
    names = "arm repeat level concurrency time_s throughput_rps warmup_s ramp_up_s duration_s valid"
    return pd.DataFrame(rows, columns=names.split())


def peak(workloads: Sequence[str] = ("unary", "streaming", "recsys")) -> pd.DataFrame:
    rows = []
    for i, workload in enumerate(workloads):
        speedup, fraction = 2.0 + i, 0.5 / (i + 1)
        common = [workload, "baseline", "optimized", f"workload={workload}", "c0256", 0.95, 5]
        rows.append([*common, "throughput_rps", speedup, speedup / 1.1, speedup * 1.1])
        rows.append([*common, "latency_p99_ms", fraction, fraction / 1.2, fraction * 1.2])
    names = "workload baseline candidate axes level confidence num_blocks metric ratio ci_low_ratio ci_high_ratio"
    return pd.DataFrame(rows, columns=names.split())


LONG = [f"recsys,{profile},num_replicas={n}" for profile in ("baseline", "optimized") for n in (1, 2, 4, 8)]


def replicas(tokens: bool = True) -> pd.DataFrame:
    frames = []
    metrics = [*METRICS, *TOKENS] if tokens else METRICS
    for profile, n in itertools.product(("baseline", "optimized"), (1, 2, 4, 8)):
        arm, scale = f"llm,{profile},num_replicas={n}", (1.0 if profile == "baseline" else 2.4) * n**0.9
        frames.append(arm_points([arm], [8, 32], workload="llm", metrics=metrics, num_replicas=n, scale=scale))
    frames.append(arm_points(["vllm,baseline"], [8, 32], workload="vllm", metrics=[*METRICS, *TOKENS], scale=6))
    return pd.concat(frames, ignore_index=True)


def texts(fig: Figure) -> list[Text]:
    """Every text that is drawn. The figure must have been laid out."""
    shown = [t for t in fig.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text().strip()]
    # matplotlib keeps ticks beyond the limits, undrawn, as artists
    limits = {
        id(label): low <= tick <= high
        for ax in fig.axes
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim())))
        for tick, line in zip(axis.get_majorticklocs(), axis.get_major_ticks(), strict=False)
        for label in (line.label1, line.label2)
    }
    return [t for t in shown if limits.get(id(t), True)]


def all_text(fig: Figure) -> str:
    fig.draw_without_rendering()
    return "\n".join(t.get_text() for t in texts(fig))


def check(fig: Figure, crowded: bool = False) -> Figure:
    """What holds for every figure: titled, labelled with units, fonts of 8 and more, no text clipped or on another.

    `crowded`: the levels written at the points may lie on one another.
    """
    fig.draw_without_rendering()
    shown = texts(fig)
    assert fig.texts[0].get_text()
    assert 7 <= fig.get_figwidth() <= 10
    for ax in fig.axes:
        names = any(t.get_text()[:1].isalpha() for t in ax.get_yticklabels()) or ax is not fig.axes[0]
        assert "(" in ax.get_xlabel() or ax.get_shared_x_axes().joined(ax, fig.axes[-1])
        assert "(" in ax.get_ylabel() or (names and not ax.get_ylabel())
    assert min(t.get_fontsize() for t in shown) >= 8
    boxes = [(t.get_text(), t.get_window_extent().padded(-0.5), t.get_gid() == "level") for t in shown]
    for text, box, _ in boxes:
        assert "nan" not in text.lower()
        assert "None" not in text
        assert "$" not in text.replace("dollar$in$name", "")
        assert "e+" not in text
        assert min(box.x0, box.y0, fig.bbox.x1 - box.x1, fig.bbox.y1 - box.y1) >= 0, f"clipped: {text}"
    for (one, box, level), (other, another, level_too) in itertools.combinations(boxes, 2):
        assert (crowded and level and level_too) or not box.overlaps(another), f"{one!r} lies on {other!r}"
    return fig


def lines(ax: Axes, gid: str) -> list[Line2D]:
    return [line for line in ax.lines if line.get_gid() == gid]


def colours(fig: Figure) -> dict[str, str]:
    """Colour of each arm as drawn, which must be the same in all panels."""
    pairs = {
        (str(line.get_label()), to_hex(line.get_color()))
        for ax in fig.axes
        for line in ax.lines
        if line.get_gid() in ("line", "valid", "invalid") and not str(line.get_label()).startswith("_")
    }
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


# --- Throughput against p99 -------------------------------------------------------------------------------------------


def test_a_point_a_level_and_labels_with_its_concurrency() -> None:
    fig = check(plots.throughput_against_p99(arm_points(), {"unary": 200.0}))
    (ax,) = fig.axes
    assert [len(line.get_xdata()) for line in lines(ax, "line")] == [len(UNARY)] * 2
    written = [t.get_text() for t in ax.texts if t.get_gid() == "level"]
    assert written.count("256") == 2
    assert ax.get_xlabel() == "latency p99 (ms)"
    assert ax.get_ylabel() == "throughput (req/s)"
    assert ax.get_xscale() == "log"
    assert [line.get_xdata()[0] for line in lines(ax, "slo")] == [200.0]
    assert "SLO of unary: p99 200 ms" in all_text(fig)
    assert "coordinated omission" in all_text(fig)
    assert "same machine" in all_text(fig)
    assert "between deployments over 5 blocks" in all_text(fig)


def test_levels_are_joined_in_order_of_load_whatever_the_order_of_rows() -> None:
    fig = plots.throughput_against_p99(arm_points().sample(frac=1, random_state=1))
    for line in lines(fig.axes[0], "line"):
        assert np.all(np.diff(line.get_ydata()) > 0)


def test_workloads_are_side_by_side_each_with_its_slo() -> None:
    both = pd.concat([arm_points(), arm_points(workload="streaming", scale=0.3)])
    fig = check(plots.throughput_against_p99(both, {"unary": 200.0, "streaming": 700.0}))
    assert [ax.get_title() for ax in fig.axes] == ["unary", "streaming"]
    assert [lines(ax, "slo")[0].get_xdata()[0] for ax in fig.axes] == [200.0, 700.0]


def test_levels_without_p99_are_left_out_and_said() -> None:
    fig = check(plots.throughput_against_p99(arm_points(no_p99=[4, 16])))
    assert "or not in the source): baseline at c=4, c=16; optimized at c=4, c=16." in all_text(fig)
    assert len(lines(fig.axes[0], "line")[0].get_xdata()) == len(UNARY) - 2


def test_an_arm_without_any_p99_is_named() -> None:
    frame = pd.concat([arm_points(["baseline"], no_p99=UNARY), arm_points(["optimized"])])
    said = " ".join(all_text(plots.throughput_against_p99(frame)).split())
    assert f"baseline at {', '.join(f'c={level}' for level in UNARY)}." in said


@pytest.mark.parametrize("latency_ms", [True, False])
def test_axes_are_linear_within_tenfold_and_log_beyond(latency_ms: bool) -> None:
    frame = arm_points(levels=[16, 32] if latency_ms else UNARY)
    assert plots.throughput_against_p99(frame).axes[0].get_xscale() == ("linear" if latency_ms else "log")


# --- Grids and replicas -----------------------------------------------------------------------------------------------


def test_recsys_grid_has_the_true_levels_as_ticks_on_a_log2_axis() -> None:
    fig = check(plots.recsys_grid(arm_points(levels=RECSYS, workload="recsys", scale=5)))
    assert [ax.get_ylabel() for ax in fig.axes] == [
        "throughput (req/s)",
        "latency mean (ms)",
        "latency p50 (ms)",
        "latency p99 (ms)",
    ]
    for ax in fig.axes:
        assert list(ax.get_xticks()) == RECSYS
        assert ax.get_xlabel() == "concurrency (clients)"
        assert ax.get_xscale() == "log"


def test_open_loop_has_the_offered_load_on_the_x_axis_and_no_word_of_coordinated_omission() -> None:
    fig = check(plots.recsys_grid(arm_points(levels=[100, 250, 300], open_loop=True)))
    assert {ax.get_xlabel() for ax in fig.axes} == {"offered load (req/s)"}
    assert list(fig.axes[0].get_xticks()) == [100, 250, 300]
    assert "coordinated" not in all_text(fig)


def test_closed_and_open_loop_do_not_share_an_axis() -> None:
    both = pd.concat([arm_points(), arm_points(levels=[100], open_loop=True)])
    with pytest.raises(ValueError, match="load_mode"):
        plots.recsys_grid(both)
    assert {"throughput_against_p99_closed", "throughput_against_p99_open"} <= set(plots.all_figures(both))


def test_vllm_grid_takes_the_mean_where_there_is_no_median() -> None:
    frame = arm_points(metrics=TOKENS, workload="vllm")
    frame["metric"] = frame["metric"].replace("tpot_p50_ms", "tpot_mean_ms")
    fig = check(plots.vllm_grid(frame))
    units = ["TTFT p50 (ms)", "TPOT mean (ms)", "input throughput (tok/s)", "output throughput (tok/s)"]
    assert [ax.get_ylabel() for ax in fig.axes] == units
    assert "not measured" in all_text(plots.vllm_grid(frame[frame["metric"] != "tpot_mean_ms"]))


def test_replica_scaling_has_a_line_a_profile_linear_scaling_and_vllm_alone() -> None:
    fig = check(plots.replica_scaling(replicas()))
    (ax,) = fig.axes
    assert [line.get_label() for line in lines(ax, "line")] == ["baseline", "optimized"]
    measured, linear = lines(ax, "line")[0].get_ydata(), lines(ax, "linear")[0].get_ydata()
    assert list(linear) == pytest.approx([measured[0] * n for n in (1, 2, 4, 8)])
    assert len(lines(ax, "vllm")) == 1
    assert ax.get_ylabel() == "output throughput (tok/s)"
    assert list(ax.get_xticks()) == [1, 2, 4, 8]
    assert "highest level: c=32" in all_text(fig)


def test_replica_scaling_falls_back_to_requests() -> None:
    fig = check(plots.replica_scaling(replicas(tokens=False).query("workload != 'vllm'")))
    assert fig.axes[0].get_ylabel() == "throughput (req/s)"
    assert not lines(fig.axes[0], "vllm")


# --- Validity and intervals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [plots.throughput_against_p99, plots.recsys_grid, plots.replica_scaling])
@pytest.mark.parametrize("invalid", [(), (64,), UNARY])
def test_invalid_points_are_hollow_and_in_the_legend(draw: Callable[..., Figure], invalid: Sequence[int]) -> None:
    fig = check(draw(arm_points(invalid=invalid, levels=[4, 16, 64])))
    hollow = [line for ax in fig.axes for line in lines(ax, "invalid")]
    assert {line.get_markerfacecolor() for line in hollow} <= {"white"}
    assert bool(hollow) == bool(invalid)
    assert ("INVALID" in all_text(fig)) == bool(invalid)
    for ax in fig.axes:
        points = {x for line in lines(ax, "line") for x in line.get_xdata()}
        assert {x for line in lines(ax, "invalid") for x in line.get_xdata()} <= points


@pytest.mark.parametrize(
    ("interval", "blocks", "said"),
    [
        ("between deployments", 5, "95 % interval between deployments over 5 blocks"),
        ("within this deployment", 1, "interval within this deployment"),
        ("", 1, "Single run, no interval."),
    ],
)
def test_the_caption_says_which_interval(interval: str, blocks: int, said: str) -> None:
    for draw in (plots.throughput_against_p99, plots.recsys_grid, plots.replica_scaling):
        fig = draw(arm_points(interval=interval, blocks=blocks))
        assert said in all_text(fig)
        assert any(bars.has_yerr for ax in fig.axes for bars in ax.containers) == bool(interval)  # type: ignore[attr-defined]


def test_the_caption_says_why_a_point_has_no_bar_and_what_an_invalid_point_is() -> None:
    frame = arm_points(levels=[4, 16, 64], invalid=[4]).assign(single_run=False)
    frame = frame.assign(ci_low=frame["value"] / 1.1, ci_high=frame["value"] * 1.1)
    frame.loc[frame["level"] == "c0016", ["ci_low", "ci_high", "num_blocks"]] = [math.nan, math.nan, 1]
    said = all_text(check(plots.recsys_grid(frame)))
    assert "over 5 blocks" in said  # not 0, though no block at c=4 is VALID
    assert "No bar: fewer than two blocks." in said
    assert "INVALID: no block is VALID" in said


# --- Ratios -----------------------------------------------------------------------------------------------------------


def test_forest_draws_every_cell_in_order_of_family() -> None:
    frame = cells(floor=1.1).sample(frac=1, random_state=3)
    fig = check(plots.forest(frame))
    assert [ax.get_title("left") for ax in fig.axes] == ["primary", "secondary", "descriptive"]
    points = [line for ax in fig.axes for line in lines(ax, "ratio")]
    assert len(points) == len(frame)
    assert points[0].get_xdata()[0] == frame.query("family == 'primary'")["ratio"].iloc[0]
    assert fig.axes[0].get_yticklabels()[0].get_text() == "throughput at c=64"
    assert {text.get_fontweight() for text in fig.axes[0].texts} == {"bold"}
    hollow = [line for line in points if line.get_markerfacecolor() == "white"]
    assert len(hollow) == frame["ci_low_ratio"].isna().sum()
    assert "no interval" in all_text(fig)
    assert all_text(fig).count("FASTER") == (frame["verdict"] == "FASTER").sum()
    assert {ax.get_xscale() for ax in fig.axes} == {"log"}
    assert len([p for ax in fig.axes for p in ax.patches if p.get_gid() == "floor"]) == len(frame)
    assert "noise floor" in all_text(fig)
    assert "95 % to 98.75 %" in all_text(fig)


@pytest.mark.parametrize("margin", [0.02, 0.1])
def test_the_margin_is_symmetric_in_the_logarithm(margin: float) -> None:
    ax = plots.forest(cells(), margin).axes[0]
    (band,) = [p for p in ax.patches if p.get_gid() == "margin"]
    assert band.get_window_extent().transformed(ax.transData.inverted()).intervalx == pytest.approx(
        [1 / (1 + margin), 1 + margin]
    )


def test_forest_is_readable_with_three_and_with_many_cells() -> None:
    few = check(plots.forest(cells(levels=[64])))
    pairs = [(f"recsys,baseline,num_replicas={n}", f"recsys,optimized,num_replicas={n}", f"n={n}") for n in (1, 2, 4)]
    many = check(plots.forest(cells(pairs, UNARY)))
    assert many.get_figheight() > 0.23 * len(cells(pairs, UNARY)) > few.get_figheight()
    headers = [ax.get_title("left") for ax in many.axes]
    assert len(headers) == 9
    assert headers[0] == "primary: recsys,optimized,num_replicas=1 against recsys,baseline,num_replicas=1"


def test_an_interval_of_two_blocks_does_not_squeeze_the_rest() -> None:
    frame = cells()
    frame.loc[1, ["ci_low_ratio", "ci_high_ratio"]] = [0.001, 900.0]
    fig = check(plots.forest(frame))
    low, high = fig.axes[0].get_xlim()
    assert high / low < 100
    assert "goes on beyond the axis" in all_text(fig)


@pytest.mark.parametrize("ratio", [0.0003, 1.0, 130_000.0])
def test_forest_of_extreme_ratios(ratio: float) -> None:
    check(plots.forest(cells(ratio=ratio)))


def test_a_cell_without_ratio_is_a_row_without_a_point() -> None:
    frame = cells()
    frame.loc[0, ["ratio", "ci_low_ratio", "ci_high_ratio"]] = None
    fig = check(plots.forest(frame))
    assert "–" in [text.get_text() for ax in fig.axes for text in ax.texts]


def test_peak_gains_has_a_row_a_workload() -> None:
    fig = check(plots.peak_gains(peak()))
    assert [line.get_xdata()[0] for line in lines(fig.axes[0], "ratio")] == [2.0, 3.0, 4.0]
    assert "×4.00   3.64 to 4.40" in all_text(fig)
    assert fig.axes[0].get_yticklabels()[0].get_text().startswith("unary at c=256")


def test_gain_by_slo_has_the_ratio_its_interval_and_both_peaks() -> None:
    fig = check(plots.gain_by_slo(gain_by_slo()))
    upper, lower = fig.axes
    assert len(lines(upper, "ratio")) == 1
    assert [line.get_label() for line in lines(lower, "line")] == ["baseline", "optimized"]
    assert lower.get_xscale() == upper.get_yscale() == "log"
    assert "p99" in lower.get_xlabel()
    assert "No ratio where" in all_text(fig)
    assert "over 5 blocks" in all_text(fig)


def test_gain_by_slo_that_no_pair_meets_says_so() -> None:
    frame = gain_by_slo().assign(ratio=None, ci_low_ratio=None, ci_high_ratio=None, baseline_peak_rps=None)
    assert "No ratio where" in all_text(check(plots.gain_by_slo(frame)))


# --- Requests ---------------------------------------------------------------------------------------------------------


def test_latency_distribution_stretches_the_tail() -> None:
    fig = check(plots.latency_distribution(distribution()))
    assert [ax.get_title() for ax in fig.axes] == ["c=4", "c=16", "c=64"]
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "50", "90", "99", "99.9"]
    assert lines(ax, "line")[0].get_xdata()[-1] == pytest.approx(2000)


def test_throughput_over_time_has_a_line_a_repeat_and_dashes_invalid_ones() -> None:
    fig = check(plots.throughput_over_time(over_time()))
    first = fig.axes[0]
    assert len(lines(first, "valid")) == 4
    assert [line.get_linestyle() for line in lines(first, "invalid")] == ["--", "--"]
    assert not lines(fig.axes[1], "invalid")
    spans = {p.get_gid(): (p.get_x(), p.get_x() + p.get_width()) for p in first.patches}  # type: ignore[attr-defined]
    assert spans == {"ramp_up": (-4, -3), "warmup": (-3, 0)}


# --- All figures ------------------------------------------------------------------------------------------------------

FRAMES: dict[str, Any] = {
    "cells": cells(),
    "gains": gain_by_slo(),
    "distribution": distribution(),
    "over_time": over_time(),
    "peak": peak(["unary"]),
}
QUICK = {"forest", "gain_by_slo", "latency_distribution", "throughput_over_time"}


def test_a_quick_run_gets_its_figures_and_no_empty_ones() -> None:
    figures = plots.all_figures(arm_points(levels=[4, 16, 64], blocks=3), **FRAMES, slo_p99_ms={"unary": 200.0})
    assert set(figures) == {*QUICK, "throughput_against_p99"}
    for figure in figures.values():
        assert "same machine" in all_text(check(figure))


def test_a_run_too_short_for_a_p99_is_drawn_by_its_p50() -> None:
    levels = [4, 16, 64]
    figures = plots.all_figures(arm_points(levels=levels, no_p99=levels), **FRAMES, slo_p99_ms={"unary": 200.0})
    assert set(figures) == {*QUICK, "throughput_against_p50"}
    fig = check(figures["throughput_against_p50"])
    assert "because no level has a p99" in all_text(fig)
    assert not lines(fig.axes[0], "slo")


def test_figures_of_the_study_come_with_its_data() -> None:
    recsys = arm_points(levels=RECSYS, workload="recsys")
    assert "recsys_grid" in plots.all_figures(recsys)
    assert {"vllm_grid", "replica_scaling"} <= set(plots.all_figures(replicas()))
    assert "peak_gains" in plots.all_figures(None, peak=peak())


def test_nothing_to_draw() -> None:
    assert plots.all_figures(None) == {}
    empty = {name: frame.iloc[:0] for name, frame in FRAMES.items()}
    assert plots.all_figures(arm_points().iloc[:0], **empty) == {}
    assert plots.all_figures(arm_points().assign(value=None), **empty) == {}
    with pytest.raises(ValueError, match="to draw"):
        plots.throughput_against_p99(arm_points().iloc[:0])
    with pytest.raises(ValueError, match="there is no value"):
        plots.recsys_grid(arm_points().assign(value=None))
    for draw in (plots.forest, plots.peak_gains, plots.gain_by_slo, plots.latency_distribution):
        with pytest.raises(ValueError, match="to draw"):
            draw(pd.DataFrame())


@pytest.mark.parametrize("arms", [["baseline", "optimized"], ["optimized", "baseline"], LONG])
def test_an_arm_has_one_colour_and_marker_in_all_figures(arms: list[str]) -> None:
    frames = {
        "cells": cells([(arms[0], arms[-1], "")]),
        "gains": gain_by_slo([(arms[0], arms[-1], "")]),
        "distribution": distribution(arms[1:]),  # an arm may be missing from a frame
        "over_time": over_time(arms),
    }
    figures = plots.all_figures(arm_points(arms, workload="recsys"), **frames)
    expected = plots.arm_styles(arms)
    assert len(figures) == 6
    assert len({(s["color"], s["marker"]) for s in expected.values()}) == len(arms)
    for name in figures.keys() - {"forest"}:
        drawn = colours(figures[name])
        assert drawn
        assert drawn == {arm: to_hex(expected[arm]["color"]) for arm in drawn}


@pytest.mark.parametrize(
    "points",
    [
        arm_points(["baseline"], [64]),
        arm_points(["baseline"], [64], interval="", blocks=1, no_p99=[64]),
        arm_points(LONG, RECSYS, workload="recsys", no_p99=[10, 20]),
        arm_points(LONG[3:5], [8, 32], workload="recsys", invalid=[8, 32], interval=""),
        pd.concat([arm_points(["slow"], scale=0.002), arm_points(["fast"], scale=900)]),
        arm_points(levels=[1, 2, 3, 5000]),
        arm_points(["dollar$in$name", "with_underscore"]),
        replicas(),
    ],
    ids=["one_point", "one_point_no_p99", "many", "all_invalid", "extreme", "far_levels", "names", "replicas"],
)
def test_no_text_touches_another_in_any_shape(points: pd.DataFrame) -> None:
    points = points.astype({"concurrency": object}).where(points.notna(), None)  # as from records with None
    names = list(dict.fromkeys(points["arm"]))
    levels = [int(x) for x in dict.fromkeys(points["concurrency"])]
    figures = plots.all_figures(
        points,
        cells([(names[0], names[-1], "")], levels),
        None,
        distribution(names, levels),
        over_time(names, levels, 2),
    )
    assert len(figures) >= 4
    for figure in figures.values():
        check(figure, crowded=True)


def test_saved_files_are_whole_images(tmp_path: Path) -> None:
    figures = {"forest": plots.forest(cells()), "over_time": plots.throughput_over_time(over_time())}
    paths = plots.save(figures, tmp_path / "plots")
    assert [p.name for p in paths] == ["forest.png", "forest.svg", "over_time.png", "over_time.svg"]
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == sorted(p.name for p in paths)
    for path in paths:
        if path.suffix == ".png":
            height, width = matplotlib.image.imread(path).shape[:2]
            figure = figures[path.stem]
            assert (width, height) == pytest.approx(figure.get_size_inches() * 150, abs=1)
        else:
            assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
    _, again = plots.save({"over_time": plots.throughput_over_time(over_time())}, tmp_path / "again")
    assert again.read_bytes() == paths[3].read_bytes()

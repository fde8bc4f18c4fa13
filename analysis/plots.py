"""What do the figures of a run look like?  Frames in, `matplotlib.figure.Figure` out; without pyplot, thus headless.

Nothing is estimated here: every mean, percentile, interval and verdict comes in the frames. What is missing there is
left out and the caption says so; an INVALID point is hollow.

An arm's colour and marker follow from its place in `arms` (all arms of the report, in order): give every function the
same. `captions` are further lines below a figure, for facts that its frame does not hold.
"""

import contextlib
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from analysis.cells import FAMILIES
from analysis.figures import FIGURES, heading
from analysis.wording import confidence_text, ratio_texts
from orchestrator.load.level import Level, Unit

Frame = pd.DataFrame
Names = Sequence[str]
Style = dict[str, Any]  # keywords of `Axes.plot`
Notes = dict[str, object]  # caption -> whether it holds (anything true)

# seaborn's "colorblind" palette without the yellow and pink that fade on white, and with black. Written out, because to
# import seaborn takes seconds. Nine colours and ten markers: a pair comes back only after ninety arms.
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#d55e00", "#56b4e9", "#949494", "#000000", "#8c613c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
INK, GREY, RED, MARGIN, FLOOR = "#222222", "#555555", "#b00020", "#cfe3f3", "#f6d9b8"
VERDICTS = {"FASTER": "#00695c", "SLOWER": "#a11212", "EQUIVALENT": "#0b3d91", "INCONCLUSIVE": "#666666"}
RATIO = ["ratio", "ci_low_ratio", "ci_high_ratio"]
RC_PARAMS: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "lines.markersize": 5,
    "text.parse_math": False,  # an arm's name may hold dollar signs
    "svg.hashsalt": "serve-orchestrator",  # else its ids are random
}
CLOSED_LOOP = "Closed loop: a slow reply holds back its client's next request (coordinated omission hides latency)."
COLOCATED = "The client ran on the same machine as the service and took part of its CPU."

_styled = mpl.rc_context(RC_PARAMS)  # as decorator: entered anew at each call


class NothingToDraw(ValueError):
    """The frame does not hold what the figure shows."""


def arm_styles(arms: Iterable[str], more: Iterable[str] = ()) -> dict[str, Style]:
    """Colour and marker of each arm, by its place; `more`: arms that may be missing from `arms`."""
    places = enumerate(dict.fromkeys([*arms, *sorted(set(more))]))
    return {arm: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, arm in places}


def _prepare(frame: Frame | None, value: str) -> Frame:
    """A copy with numbers as floats, not as objects beside None, and at least one `value`."""
    if frame is None or value not in frame or frame[value].isna().all():
        raise NothingToDraw(f"nothing to draw: there is no {value}")
    return frame.where(frame.notna(), np.nan).infer_objects()


def _points(frame: Frame | None) -> Frame:
    """Rows with a value, in order of load `x`."""
    points = _prepare(frame, "value").dropna(subset=["value"])
    levels = points["level"].map(Level.parse)
    if levels.map(lambda level: level.unit).nunique() > 1:
        raise ValueError("closed-loop and open-loop levels do not fit on one axis: draw each load_mode apart")
    return points.assign(x=levels.map(lambda level: float(level.amount))).sort_values("x", kind="stable")


def _closed(frame: Frame) -> bool:
    return any(Level.parse(name).unit is Unit.clients for name in frame["level"].unique())


def _percentile(points: Frame) -> str:
    """The p99, or the p50 of a run too short for one."""
    return "p99" if points["metric"].eq("latency_p99_ms").any() else "p50"


def _levels(levels: Iterable[str]) -> str:
    return ", ".join(Level.parse(name).short_text for name in dict.fromkeys(levels))


def _by_level(frame: Frame) -> list[tuple[str, Frame]]:
    """The rows of each level, the lowest first."""
    return [(name, frame[frame["level"] == name]) for name in sorted(frame["level"].unique(), key=Level.parse)]


def _blocks(frame: Frame) -> str:
    numbers = sorted({int(n) for n in (frame["num_blocks"].min(), frame["num_blocks"].max()) if n > 0})
    return f" over {' to '.join(map(str, numbers))} blocks" if numbers else ""


def _intervals(cells: Frame) -> Notes:
    """Of those cells that have an interval: its confidence, and over how many blocks."""
    known = cells[cells["ci_low_ratio"].notna()]
    percents = " to ".join(map(confidence_text, sorted({known["confidence"].min(), known["confidence"].max()})))
    return {f"Lines: intervals of {percents} between deployments{_blocks(known)}.": len(known)}


def _captions(rows: Frame) -> Notes:
    """What the reader of these points must know: kind of interval, load, place of the client."""
    bars = rows[rows["ci_low"].notna()]
    between = bars[bars["interval"] == "between deployments"]
    single, bare = rows["single_run"].eq(True), rows["ci_low"].isna()
    return {
        f"Bars: 95 % interval between deployments{_blocks(between)}.": len(between),
        "Bars: interval within this deployment; another may lie outside.": len(between) < len(bars),
        "No bar: fewer than two blocks.": len(between) and (bare & ~single).any(),
        "Single run, no interval.": (bare & single).any(),
        "INVALID: no block is VALID; the point is over those there are.": not rows["valid"].all(),
        CLOSED_LOOP: _closed(rows),
        COLOCATED: rows["colocated"].eq(True).any(),
    }


def _scale(ax: Axes, which: str, values: Any, log_from: float = 10) -> None:
    """Log axis where the values span more than `log_from`-fold, else linear from 0; plain numbers at the ticks."""
    axis, low, high = getattr(ax, f"{which}axis"), np.nanmin(values), np.nanmax(values)
    if low > 0 and high / low > log_from:
        decades, margin = math.log10(high / low), (high / low) ** 0.08
        ax.set(**{f"{which}scale": "log", f"{which}lim": (low / margin, high * margin)})
        steps = (1, 2, 5) if decades < 1.2 else (1, 3) if decades < 2.5 else (1,)
        axis.set_major_locator(MaxNLocator(5) if decades < 0.6 else LogLocator(subs=steps, numticks=6))
        axis.set_minor_locator(NullLocator())
    else:
        ax.set(**{f"{which}lim": (0, high * 1.08 or 1)})
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter("{x:,.10g}")


def _extent(rows: Frame, suffix: str = "") -> np.ndarray:
    """Values and intervals, these cut where they would squeeze the points (two blocks: 10 times the value)."""
    value, low, high = (rows[name + suffix] for name in ("value", "ci_low", "ci_high"))
    return np.concatenate([value, np.maximum(low, value / 1.5), np.minimum(high, value * 1.5)])


def _draw(ax: Axes, rows: Frame, styles: Mapping[str, Style], by: str = "arm", x: str = "x") -> None:
    """Line, points and intervals of each arm; INVALID points hollow."""
    for line, group in rows.groupby(by, sort=False):
        style = styles[str(line)]
        ax.plot(group[x], group["value"], label=line, gid="line", **style)
        bar: Any = {"fmt": "none", "ecolor": style["color"], "elinewidth": 1, "capsize": 2.5, "alpha": 0.8}
        for side, suffix in {"yerr": "", "xerr": "_ms"}.items():
            if f"ci_low{suffix}" in group and group[f"ci_low{suffix}"].notna().any():
                value, low, high = (group[name + suffix] for name in ("value", "ci_low", "ci_high"))
                ax.errorbar(group[x], group["value"], **bar | {side: [value - low, high - value]})
        hollow = group[~group["valid"]]
        if not hollow.empty:
            ax.plot(hollow[x], hollow["value"], ls="", mfc="white", zorder=3, gid="invalid", **style)
            ax.plot([], [], "o", color=GREY, mfc="white", label="INVALID")


def _panels(count: int, height: float, across: int = 0, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels `height` inches high; title, legend and captions come on top of that."""
    across = across or (2 if count == 4 else min(count, 3))
    down = math.ceil(count / across)
    fig = Figure(figsize=((8.5, 9, 10)[across - 1], height * down), facecolor="white")
    axes = list(fig.subplots(down, across, squeeze=False, **options).flat)
    for ax in axes[count:]:
        ax.remove()
    return fig, axes[:count]


def _finish(fig: Figure, title: str, notes: Notes, captions: Names = ()) -> Figure:
    """Title and legend above the panels, captions below: the figure grows by what these need, the panels do not."""
    width, height = fig.get_size_inches()
    wrapped = textwrap.fill(title, int(width * 10))
    entries: dict[str, Artist] = {}
    for ax in fig.axes:
        entries = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)) | entries
    columns = max(1, int(width * 14 // (8 + max(map(len, entries), default=0))))
    captions = list(dict.fromkeys([*(note for note, holds in notes.items() if holds), *captions]))
    lines = [line for caption in captions for line in textwrap.wrap(caption, int(width * 15))]
    legend_at = 0.15 + 0.19 * (1 + wrapped.count("\n"))
    above, below = legend_at + 0.1 + 0.19 * math.ceil(len(entries) / columns), 0.15 + 0.155 * len(lines)
    total = height + above + below
    fig.set_size_inches(width, total)
    fig.text(0.1 / width, 1 - 0.1 / total, wrapped, fontsize=11, fontweight="bold", va="top")
    fig.text(0.1 / width, 0.08 / total, "\n".join(lines), fontsize=8, color=GREY, va="bottom", linespacing=1.3)
    place: Any = {"loc": "upper left", "bbox_to_anchor": (0.1 / width, 1 - legend_at / total), "borderaxespad": 0}
    fig.legend(entries.values(), entries.keys(), ncols=columns, frameon=False, borderpad=0, **place)
    fig.set_layout_engine("constrained", rect=(0, below / total, 1, height / total), w_pad=0.08, h_pad=0.07)
    return fig


@_styled
def throughput_against_p99(
    arm_points: Frame, slo_p99_ms: Mapping[str, float] | None = None, *, arms: Names = ()
) -> Figure:
    """Throughput against p99 latency: a panel a workload, a line an arm in order of load, at the points their level.

    `slo_p99_ms`: by workload. A run too short for a p99 is drawn by its p50, without the SLO.
    """
    points, key = _points(arm_points), ["arm", "workload", "level"]
    name, styles = _percentile(points), arm_styles(arms, points["arm"])
    latency, slo_p99_ms = f"latency_{name}_ms", slo_p99_ms if name == "p99" else None
    slow = points.loc[points["metric"] == latency, [*key, "value", "ci_low", "ci_high"]]
    both = points[points["metric"] == "throughput_rps"].merge(slow, "left", key, suffixes=("", "_ms"))
    shown = _prepare(both[both["value_ms"].notna()], "value")
    workloads = list(dict.fromkeys(shown["workload"]))
    fig, axes = _panels(len(workloads), 3.7)
    for ax, workload in zip(axes, workloads, strict=True):
        rows, slo = shown[shown["workload"] == workload], (slo_p99_ms or {}).get(workload)
        _draw(ax, rows, styles, x="value_ms")
        ax.set(xlabel=heading(latency), ylabel=heading("throughput_rps"), title=workload)
        _scale(ax, "x", [*_extent(rows, "_ms"), slo or math.nan])
        _scale(ax, "y", _extent(rows), log_from=50)
        if slo:
            ax.axvline(slo, color=RED, ls="--", gid="slo", label=f"SLO of {workload}: p99 {slo:,g} ms")
        for i, (arm, group) in enumerate(rows.groupby("arm", sort=False)):  # numbers below and above the line, in turn
            text: Any = {"color": styles[str(arm)]["color"], "fontsize": 8, "textcoords": "offset points"}
            text |= {"xytext": (-4, 3), "ha": "right"} if i % 2 else {"xytext": (4, -3), "va": "top"}
            for row in (group if len(rows) <= 30 else group.iloc[[0, -1]]).itertuples():
                ax.annotate(f"{row.x:,g}", (row.value_ms, row.value), gid="level", **text)
    without = both[both["value_ms"].isna()].groupby("arm", sort=False)["level"]
    missing = "; ".join(f"{arm} at {_levels(levels)}" for arm, levels in without)
    notes = {
        f"Number at a point: {'clients (concurrency)' if _closed(both) else 'requests/s offered'}.": True,
        "The p50, because no level has a p99 (fewer than 1,000 requests).": name == "p50",
        f"No {name} (fewer requests than it needs, 1,000 for a p99, or not in the source): {missing}.": missing,
    }
    return _finish(fig, f"Throughput against {name} latency", notes | _captions(shown))


def _grid(points: Frame, panels: Sequence[Names], title: str, arms: Names, *captions: str) -> Figure:
    """2x2 metrics against the level; of each panel's metrics the first that was measured."""
    styles = arm_styles(arms, points["arm"])
    ticks = np.sort(points["x"].unique())
    near = len(ticks) > 1 and np.diff(np.log(ticks)).min() < 0.1 * math.log(ticks[-1] / ticks[0])
    fig, axes = _panels(4, 2.9)
    shown = []
    for ax, metrics in zip(axes, panels, strict=True):
        metric = next((m for m in metrics if (points["metric"] == m).any()), metrics[0])
        rows = points[points["metric"] == metric]
        shown.append(rows)
        load = "concurrency (clients)" if _closed(points) else "offered load (req/s)"
        ax.set(xlabel=load, ylabel=heading(metric))
        if rows.empty:
            ax.set(xticks=[], yticks=[], title="not measured, or too few requests")
            continue
        _draw(ax, rows, styles)
        ax.set_xscale("log", base=2)
        ax.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
        ax.set_xticks(ticks, [f"{tick:,g}" for tick in ticks], rotation=90 if near else 0)
        ax.xaxis.set_minor_locator(NullLocator())
        _scale(ax, "y", _extent(rows))
    return _finish(fig, title, _captions(pd.concat(shown)), captions)


@_styled
def recsys_grid(arm_points: Frame, *, arms: Names = ()) -> Figure:
    """Throughput and mean, p50 and p99 latency against the level; of the workload `recsys` if there are several."""
    points = _points(arm_points)
    if points["workload"].eq("recsys").any():
        points = points[points["workload"] == "recsys"]
    panels = [["throughput_rps"], ["latency_mean_ms"], ["latency_p50_ms"], ["latency_p99_ms"]]
    return _grid(points, panels, f"{', '.join(points['workload'].unique())}: throughput and latency by load", arms)


@_styled
def vllm_grid(arm_points: Frame, *, arms: Names = ()) -> Figure:
    """Time to first token, time per output token, input and output tokens/s against the level; of arms with tokens."""
    points = _points(arm_points)
    with_tokens = points.loc[points["metric"] == "input_throughput_tok_per_s", "arm"]
    points = _prepare(points[points["arm"].isin(with_tokens)], "value")
    panels = [["ttft_p50_ms", "ttft_mean_ms"], ["tpot_p50_ms", "tpot_mean_ms"]]
    panels += [["input_throughput_tok_per_s"], ["output_throughput_tok_per_s"]]
    note = "TTFT: time to the first token. TPOT: time per output token after the first."
    return _grid(points, panels, "Tokens: latency and throughput by load", arms, note)


@_styled
def replica_scaling(arm_points: Frame) -> Figure:
    """Output tokens/s, else requests/s, by replicas: a line a profile, each arm at its highest level.

    With linear scaling from the profile's fewest replicas. Arms of the workload `vllm` are a line of their own, N
    servers measured; a single one is drawn level.
    """
    points, metric = _points(arm_points), "output_throughput_tok_per_s"
    metric = metric if points["metric"].eq(metric).any() else "throughput_rps"
    top = points[points["metric"] == metric].groupby("arm", sort=False).tail(1)
    rows = top[(top["workload"] != "vllm") & top["num_replicas"].notna()].sort_values("num_replicas", kind="stable")
    rows = _prepare(rows, "value")
    rows["line"] = rows["profile"] if rows["workload"].nunique() == 1 else rows["workload"] + ", " + rows["profile"]
    fig, [ax] = _panels(1, 3.9)
    _draw(ax, rows, arm_styles(dict.fromkeys(rows["line"])), "line", "num_replicas")
    for _, group in rows.groupby("line"):
        linear = group["num_replicas"] * (group["value"] / group["num_replicas"]).iloc[0]
        ax.plot(group["num_replicas"], linear, color=GREY, ls=":", gid="linear", label="linear scaling")
    alone = top[top["workload"] == "vllm"].sort_values("num_replicas", kind="stable")
    line: Any = {"color": "black", "ls": "-.", "lw": 1.2, "gid": "vllm", "label": "vLLM alone"}
    if alone["num_replicas"].nunique() > 1:
        ax.plot(alone["num_replicas"], alone["value"], marker="x", **line)
    else:
        for value in alone["value"]:
            ax.axhline(value, **line)
    ax.set(xlabel="replicas (number)", ylabel=heading(metric), xlim=(0, rows["num_replicas"].max() * 1.08))
    ax.set_xticks(sorted(rows["num_replicas"].unique()))
    _scale(ax, "y", np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines]), log_from=math.inf)
    notes = {f"Each arm at its highest level: {_levels(top.sort_values('x')['level'])}.": True}
    title = f"{', '.join(rows['workload'].unique())}: {FIGURES[metric].text} by replicas"
    return _finish(fig, title, notes | _captions(top))


def _ratio_rows(panels: Sequence[tuple[Axes, Frame]], near: float = 1.1) -> Notes:
    """Points and intervals on one log x axis that holds [1/near, near], verdicts and figures right of it.

    The frames: RATIO, `family`, `verdict` and the `label` of each row.
    """
    ratio, low, high = (pd.concat([rows[name] for _, rows in panels]) for name in RATIO)
    # An interval from two blocks can span decades: it gets three times the points' own room, no more.
    left, right = min(1 / near, ratio.min()), max(near, ratio.max())
    extent = [left, right, np.fmax(low.min(), left / 3), np.fmin(high.max(), right * 3)]
    judged = any(rows["verdict"].isin(VERDICTS).any() for _, rows in panels)
    for ax, rows in panels:
        _scale(ax, "x", extent, log_from=0)
        ax.axvline(1, color=INK, lw=1, zorder=1.5)
        for y, row in enumerate(rows.itertuples(index=False)):
            cell: Any = row
            strong = cell.family == "primary"
            face = INK if cell.ci_low_ratio <= cell.ci_high_ratio else "white"
            ax.plot([cell.ci_low_ratio, cell.ci_high_ratio], [y, y], color=INK, lw=2.2 if strong else 1.3, zorder=2)
            ax.plot(cell.ratio, y, "D" if strong else "o", color=INK, mfc=face, gid="ratio")
            text: Any = {"textcoords": "offset points", "va": "center", "fontweight": "bold" if strong else "normal"}
            text |= {"xy": (1, y), "xycoords": ax.get_yaxis_transform(), "annotation_clip": False}
            if cell.verdict in VERDICTS:
                ax.annotate(cell.verdict, xytext=(8, 0), color=VERDICTS[cell.verdict], **text)
            ax.annotate("   ".join(filter(None, ratio_texts(cell))), xytext=(95 if judged else 8, 0), **text)
        if (rows["ratio"].notna() & rows["ci_low_ratio"].isna()).any():
            ax.plot([], [], "o", color=INK, mfc="white", label="no interval")
        ax.set_yticks(range(len(rows)), rows["label"])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
    left, right = panels[0][0].get_xlim()
    return {"A line that ends at the edge goes on beyond the axis.": ((low < left) | (high > right)).any()}


@_styled
def forest(cells: Frame, margin: float = 0.05, *, captions: Names = ()) -> Figure:
    """Every ratio with its interval and verdict, the primary on top; > 1 is better, whatever the metric.

    `margin`: of equivalence; the band is [1/(1+margin), 1+margin].
    """
    cells = _prepare(cells, "ratio").assign(floor=lambda rows: rows["floor_ratio"].fillna(1))
    where = zip(cells["metric"], cells["level"], strict=True)
    cells["label"] = [f"{FIGURES[metric].text} at {_levels([level])}" for metric, level in where]
    cells = cells.sort_values("family", key=lambda family: family.map(FAMILIES.index), kind="stable")
    groups = [rows for _, rows in cells.groupby(["family", "baseline", "candidate"], sort=False)]
    whose = dict.fromkeys(cells["candidate"] + " against " + cells["baseline"])
    ratios: Any = {"sharex": True, "height_ratios": [len(rows) for rows in groups]}
    fig, axes = _panels(len(groups), 0.5 + 0.24 * len(cells) / len(groups), 1, **ratios)
    panels = list(zip(axes, groups, strict=True))
    cut = _ratio_rows(panels, max(1.1, 1 + margin, cells["floor"].max()))
    for ax, rows in panels:
        family, who = rows["family"].iloc[0], f"{rows['candidate'].iloc[0]} against {rows['baseline'].iloc[0]}"
        ax.set_title(family if len(whose) == 1 else f"{family}: {who}", loc="left", fontweight="bold")
        band = f"equivalence margin, {100 * margin:g} %"
        ax.axvspan(1 / (1 + margin), 1 + margin, color=MARGIN, lw=0, zorder=0.6, gid="margin", label=band)
        if rows["floor"].max() > 1:
            floor: Any = {"height": 1, "color": FLOOR, "zorder": 0.5, "gid": "floor", "label": "noise floor (A/A)"}
            ax.barh(range(len(rows)), rows["floor"] - 1 / rows["floor"], left=1 / rows["floor"], **floor)
    axes[-1].set_xlabel("speed-up (ratio, > 1 is better)")
    notes = {
        "Primary: fixed before the run. Secondary: corrected for their number. Descriptive: no verdict.": True,
        "Ratio: candidate / baseline for throughput, baseline / candidate for latency.": True,
        **_intervals(cells),
        CLOSED_LOOP: cells["metric"].str.startswith("latency").any() and _closed(cells),
    }
    title = f"Speed-up of {next(iter(whose)) if len(whose) == 1 else 'each candidate'}"
    return _finish(fig, title, notes | cut, captions)


@_styled
def peak_gains(peak: Frame, *, captions: Names = ()) -> Figure:
    """By workload, at the level of the frame: speed-up of throughput, and p99 latency as a fraction of baseline's."""
    peak = _prepare(peak, "ratio").assign(family="", verdict="")
    peak["label"] = peak["workload"] + " at " + peak["level"].map(lambda level: _levels([level]))
    peak["label"] += "\n" + peak["candidate"] + "\nagainst " + peak["baseline"]
    titles = {
        "throughput_rps": "throughput: right of 1 is better",
        "latency_p99_ms": "p99 latency: left of 1 is better",
    }
    fig, axes = _panels(2, 0.8 + 0.33 * len(peak), sharey=True)
    panels = [(ax, peak[peak["metric"] == metric]) for ax, metric in zip(axes, titles, strict=True)]
    for ax, title in zip(axes, titles.values(), strict=True):
        ax.set(title=title, xlabel="candidate / baseline (ratio)")
    notes = _intervals(peak) | {CLOSED_LOOP: _closed(peak)}
    return _finish(fig, "Gains by workload", notes | _ratio_rows(panels), captions)


@_styled
def gain_by_slo(gains: Frame, *, arms: Names = (), captions: Names = ()) -> Figure:
    """Ratio of the peak throughputs within an SLO as a function of that SLO (p99, ms); below, the peaks themselves."""
    gains = _prepare(gains, "candidate_peak_rps").sort_values("slo_ms", kind="stable")
    styles = arm_styles(arms, [*gains["baseline"], *gains["candidate"]])
    fig, [upper, lower] = _panels(2, 2.2, 1, sharex=True, height_ratios=[2, 1.2])
    # A peak changes only where the SLO lets one more level in.
    steps: Any = {"drawstyle": "steps-post", "markevery": 8, "ms": 4}
    for key, rows in gains.groupby(["baseline", "candidate"], sort=False):
        slo, candidate = rows["slo_ms"], str(key[1])
        upper.plot(slo, rows["ratio"], gid="ratio", **styles[candidate], **steps)
        band: Any = {"step": "post", "color": styles[candidate]["color"], "alpha": 0.18, "lw": 0}
        upper.fill_between(slo, rows["ci_low_ratio"], rows["ci_high_ratio"], **band)
        for side in ("baseline", "candidate"):
            arm = rows[side].iloc[0]
            lower.plot(slo, rows[f"{side}_peak_rps"], label=arm, gid="line", **styles[arm], **steps)
    ratio = gains["ratio"]
    bounds = [*np.fmax(gains["ci_low_ratio"], ratio / 2), *np.fmin(gains["ci_high_ratio"], ratio * 2)]
    _scale(upper, "y", [*ratio, *bounds, 1 / 1.1, 1.1], log_from=0)
    upper.axhline(1, color=INK, lw=1)
    _scale(lower, "y", gains[["baseline_peak_rps", "candidate_peak_rps"]], log_from=50)
    _scale(lower, "x", gains["slo_ms"], log_from=0)
    upper.set_ylabel("candidate / baseline (ratio)")
    lower.set(ylabel="peak (req/s)", xlabel="SLO: p99 latency at most (ms)")
    known = gains[gains["ci_low_ratio"].notna()]
    notes = {
        "Peak: highest throughput at a measured level whose p99 meets the SLO.": True,
        "No ratio where no block has such a VALID level of both arms.": ratio.isna().any(),
        f"Band: 95 % interval between deployments{_blocks(known)}.": len(known),
        CLOSED_LOOP: True,
    }
    title = f"Gain in peak throughput within an SLO, against {', '.join(dict.fromkeys(gains['baseline']))}"
    return _finish(fig, title, notes, captions)


@_styled
def latency_distribution(distribution: Frame, *, arms: Names = (), captions: Names = ()) -> Figure:
    """Latency (ms) against the percentile of requests, the tail stretched; a panel a level."""
    frame = _prepare(distribution, "latency_ms")
    styles, frame = arm_styles(arms, frame["arm"]), frame[frame["quantile"] < 1]
    levels = _by_level(frame.assign(tail=1 / (1 - frame["quantile"])))
    fig, axes = _panels(len(levels), 2.7)
    for ax, (level, rows) in zip(axes, levels, strict=True):
        for arm, group in rows.sort_values("tail").groupby("arm", sort=False):
            line: Any = {"label": arm, "gid": "line", "markevery": 0.2, "ms": 4, **styles[str(arm)]}
            ax.plot(group["tail"], group["latency_ms"], **line)
        ax.set(xscale="log", xlabel="percentile of requests (%)", ylabel="latency (ms)", title=_levels([level]))
        ticks = [t for t in (1, 2, 10, 100, 1e3, 1e4, 1e5) if t <= rows["tail"].max()]
        ax.set_xticks(ticks, [f"{100 - 100 / t:.10g}" for t in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        _scale(ax, "y", rows["latency_ms"])
    notes: Notes = {"All VALID repeats together; each line ends where fewer than ten requests lie beyond.": True}
    return _finish(fig, "Distribution of latency", notes | {CLOSED_LOOP: _closed(frame)}, captions)


@_styled
def throughput_over_time(over_time: Frame, *, arms: Names = (), captions: Names = ()) -> Figure:
    """Throughput (requests/s) over the seconds of each trial: ramp-up, warm-up, window; a panel a level."""
    frame = _prepare(over_time, "throughput_rps")
    styles, levels = arm_styles(arms, frame["arm"]), _by_level(frame)
    fig, axes = _panels(len(levels), 2.6)
    for ax, (level, rows) in zip(axes, levels, strict=True):
        warmup, ramp_up = rows["warmup_s"].max(), rows["ramp_up_s"].max()
        for key, group in rows.sort_values(["valid", "time_s"]).groupby(["arm", "repeat"], sort=False):
            arm, valid = str(key[0]), group["valid"].eq(True).all()
            line: Any = {"lw": 1.1} if valid else {"lw": 0.7, "ls": "--", "mfc": "white"}
            line |= {"label": arm, "gid": "valid" if valid else "invalid", "markevery": 0.3, "ms": 3.5, **styles[arm]}
            ax.plot(group["time_s"], group["throughput_rps"], **line)
        ax.axvspan(-warmup - ramp_up, -warmup, color="#d4d4d4", lw=0, zorder=0, gid="ramp_up", label="ramp-up")
        ax.axvspan(-warmup, 0, color="#ededed", lw=0, zorder=0, gid="warmup", label="warm-up")
        ax.margins(x=0)
        _scale(ax, "y", rows["throughput_rps"], log_from=math.inf)
        ax.set(xlabel="time from window start (s)", ylabel=heading("throughput_rps"), title=_levels([level]))
    notes: Notes = {"A line a repeat, dashed if INVALID. White: the measurement window.": True}
    return _finish(fig, "Throughput over time", notes, captions)


def all_figures(
    arm_points: Frame | None,
    cells: Frame | None = None,
    gains: Frame | None = None,
    distribution: Frame | None = None,
    over_time: Frame | None = None,
    peak: Frame | None = None,
    *,
    slo_p99_ms: Mapping[str, float] | None = None,
    margin: float = 0.05,
) -> dict[str, Figure]:
    """The figures that these frames can fill, by file name, in the order of a report. A frame may be None or empty."""
    figures: dict[str, Figure] = {}

    def add(name: str, draw: Callable[..., Figure], *args: Any, **options: Any) -> None:
        with contextlib.suppress(NothingToDraw):
            figures[name] = draw(*args, **options)

    points = pd.DataFrame(columns=["arm", "colocated", "load_mode", "value"])
    points = (points if arm_points is None or arm_points.empty else arm_points).dropna(subset=["value"])
    arms = list(dict.fromkeys(points["arm"]))
    captions = [COLOCATED] if points["colocated"].eq(True).any() else []
    add("forest", forest, cells, margin, captions=captions)
    modes = list(points.groupby("load_mode", sort=False))
    for mode, rows in modes:  # closed and open loop have different x axes
        suffix = "" if len(modes) == 1 else f"_{mode}"
        add(f"throughput_against_{_percentile(rows)}{suffix}", throughput_against_p99, rows, slo_p99_ms, arms=arms)
        add(f"recsys_grid{suffix}", recsys_grid, rows[rows["workload"] == "recsys"], arms=arms)
        add(f"vllm_grid{suffix}", vllm_grid, rows, arms=arms)
        served = rows[rows["workload"] != "vllm"].groupby(["workload", "profile"])["num_replicas"]
        if served.nunique().gt(1).any():
            add(f"replica_scaling{suffix}", replica_scaling, rows)
    add("gain_by_slo", gain_by_slo, gains, arms=arms, captions=captions)
    add("latency_distribution", latency_distribution, distribution, arms=arms, captions=captions)
    add("throughput_over_time", throughput_over_time, over_time, arms=arms, captions=captions)
    if peak is not None and len(peak) > 2:  # one comparison alone is already in the forest
        add("peak_gains", peak_gains, peak, captions=captions)
    return figures


def save(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write `<name>.png` (150 dpi) and `.svg` of each and return the paths; a file exists only when it is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
    for path in paths:
        partial = path.with_name(f".{path.name}.partial")
        metadata: Any = {"Date": None} if path.suffix == ".svg" else None
        with mpl.rc_context(RC_PARAMS):
            figures[path.stem].savefig(partial, format=path.suffix[1:], dpi=150, metadata=metadata)
        os.replace(partial, path)
    return paths

"""What do the figures of a run look like?  Frames in, `matplotlib.figure.Figure` out.

Nothing is estimated here: every mean, percentile, interval and verdict comes in the frames. What is missing there is
left out and the caption says so; an INVALID point is hollow. Made without pyplot, so it works headless and leaves no
figure open; a notebook shows the figures after `%matplotlib inline`. A frame with nothing to draw is a `ValueError`;
`all_figures` draws only what the data can fill.

An arm's colour and marker follow from its place in `arms` (all arms of the report, in order): give every function the
same. `captions` are further lines below a figure, for facts that its frame does not hold.
"""

import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import blended_transform_factory

Frame = pd.DataFrame
Names = Sequence[str]
Style = dict[str, Any]  # colour and marker, as keywords of `Axes.plot`
Handles = list[Line2D | Patch]

# seaborn's "colorblind" palette without the yellow and pink that fade on white, and with black. Written out, because to
# import seaborn takes seconds. Nine colours and ten markers: a pair comes back only after ninety arms.
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#d55e00", "#56b4e9", "#949494", "#000000", "#8c613c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
INK, GREY, RED, MARGIN, FLOOR = "#222222", "#555555", "#b00020", "#cfe3f3", "#f6d9b8"
VERDICTS = {"FASTER": "#00695c", "SLOWER": "#a11212", "EQUIVALENT": "#0b3d91", "INCONCLUSIVE": "#666666"}
FAMILIES = {
    "primary": "primary, fixed before the run",
    "secondary": "secondary, corrected for their number",
    "descriptive": "descriptive, no verdict",
}
LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "text.parse_math": False,  # an arm's name may hold dollar signs
    "svg.hashsalt": "serve-orchestrator",  # the same data give the same file
}
CLOSED_LOOP = (
    "Closed loop: a slow reply holds back its client's next request (coordinated omission hides high latency)."
)
COLOCATED = "The client ran on the same machine as the service and took part of its CPU."
CUT = "Arrow: the interval goes on beyond the axis."
UNITS = {"_tok_per_s": "tokens/s", "_rps": "requests/s", "_ms": "ms", "_ratio": "ratio"}
FEWEST = {"p50": "20", "p99": "1,000"}  # requests below which there is no such percentile

_look = mpl.rc_context(LOOK)  # as decorator: entered anew at each call


def arm_styles(arms: Iterable[str]) -> dict[str, Style]:
    """Colour and marker of each arm, by its place."""
    places = enumerate(dict.fromkeys(arms))
    return {arm: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, arm in places}


def metric_label(metric: str) -> str:
    """`latency_p99_ms` -> `p99 latency (ms)`."""
    suffix = next((s for s in UNITS if metric.endswith(s)), "")
    words = metric.removesuffix(suffix).replace("p999", "p99.9").split("_")
    if words[0] in ("latency", "ttft", "tpot"):
        words = [*words[1:], words[0].upper().replace("LATENCY", "latency")]
    return " ".join(words) + (f" ({UNITS[suffix]})" if suffix else "")


def _metric_name(metric: str) -> str:
    return metric_label(metric).split(" (")[0]


# --- Frames ---------------------------------------------------------------------------------------------------------


def _prepare(frame: Frame | None, what: str, value: str = "") -> Frame:
    """A copy, numbers as floats; with `value`: its rows with one, in order of load. `ValueError` if none is left."""
    if frame is None or frame.empty:
        raise ValueError(f"no {what} to draw: the frame is empty")
    frame = frame.copy()
    for column in [
        c for c in frame.columns if frame[c].dtype.kind == "O"
    ]:  # a column with None may hold numbers as objects
        numbers = pd.to_numeric(frame[column], errors="coerce")
        if numbers.notna().any() or frame[column].isna().all():
            frame[column] = numbers.astype(float)
    if "valid" in frame.columns:
        frame["valid"] = frame["valid"].eq(True)
    if value:
        frame = frame[np.isfinite(frame[value])]
        if frame.empty:
            raise ValueError(f"no {what} to draw: {value} is nowhere a number")
    if "level" in frame.columns and value:
        frame["x"] = frame["level"].str[1:].astype(float)
        frame = frame.sort_values("x", kind="stable")
    return frame


def _present(frame: Frame | None, column: str) -> bool:
    return frame is not None and column in frame and bool(pd.to_numeric(frame[column], errors="coerce").notna().any())


def _closed(frame: Frame) -> bool:
    return bool(frame["level"].str.startswith("c").any())


def _load_label(frame: Frame) -> str:
    if frame["level"].str[0].nunique() > 1:
        raise ValueError("closed-loop and open-loop levels do not fit on one axis: draw each load_mode apart")
    return "concurrency (clients)" if _closed(frame) else "offered load (requests/s)"


def _level_name(level: str) -> str:
    number = _number(float(level[1:]))
    return f"c={number}" if level.startswith("c") else f"{number} requests/s"


def _blocks(frame: Frame) -> str:
    used = frame["num_blocks"]
    if "num_invalid" in frame.columns:  # without a VALID block, a point is over the INVALID ones
        used = used.where(used > 0, frame["num_invalid"])
    numbers = sorted({int(n) for n in (used.min(), used.max()) if n > 0})
    return f" over {' to '.join(map(str, numbers))} blocks" if numbers else ""


def _captions(rows: Frame, latency: bool = True) -> list[str]:
    """What the reader of these points must know: kind of interval, load, place of the client."""
    captions = []
    drawn = rows[rows["ci_low"].notna()]
    between = drawn[drawn["interval"] == "between deployments"]
    if not between.empty:
        captions.append(f"Bars: 95 % interval between deployments{_blocks(between)}.")
    if drawn["interval"].eq("within this deployment").any():
        captions.append("Bars: interval within this deployment; another deployment of the same may lie outside.")
    if not between.empty and rows.loc[~rows["single_run"].eq(True), "ci_low"].isna().any():
        captions.append("No bar: fewer than two blocks.")
    if not rows["valid"].all():
        captions.append("INVALID: no block is VALID; the point is over those there are.")
    single = rows[rows["single_run"].eq(True) & rows["ci_low"].isna()]
    if not single.empty:
        who = "" if len(single) == len(rows) else ": " + ", ".join(sorted(single["arm"].unique()))
        captions.append(f"Single run, no interval{who}.")
    captions += [CLOSED_LOOP] * (latency and _closed(rows))
    return captions + [COLOCATED] * bool(rows["colocated"].eq(True).any())


# --- Axes -----------------------------------------------------------------------------------------------------------


def _number(value: float, _position: int | None = None) -> str:
    return f"{value:,.10g}"


def _ratio(ratio: float, low: float = math.nan, high: float = math.nan) -> str:
    def text(value: float) -> str:
        return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}" if value >= 0.001 else "<0.001"

    if math.isnan(ratio):
        return "not measured"
    return text(ratio) + (f" [{text(low)}, {text(high)}]" if low <= high else ", no interval")


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers in [low, high], as many as that allows."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [t for d in decades for s in steps if low <= (t := s * 10.0**d) <= high]
        if len(ticks) > most:
            break
        best = ticks
    if not best:  # more decades than ticks
        return ticks[:: math.ceil(len(ticks) / most)]
    return (
        best if len(best) > 1 else [float(t) for t in MaxNLocator(most - 1).tick_values(low, high) if low <= t <= high]
    )


def _set_ticks(ax: Axes, which: str, ticks: Sequence[float], labels: Names | None = None) -> None:
    names = dict(zip(ticks, labels or [_number(t) for t in ticks], strict=True))
    axis = getattr(ax, f"{which}axis")
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(lambda tick, _: names.get(tick, "")))


def _set_log(ax: Axes, which: str, low: float, high: float, most: int = 7) -> None:
    """Log axis a little wider than [low, high], with plain numbers at the ticks."""
    margin = (high / low) ** 0.08 if high > low else 1.5
    ax.set(**{f"{which}scale": "log", f"{which}lim": (low / margin, high * margin)})
    _set_ticks(ax, which, _log_ticks(low / margin, high * margin, most))


def _scale(ax: Axes, which: str, values: Any, log_from: float = 10, most: int = 7) -> None:
    """Log axis where the values span more than `log_from`-fold, else linear from 0."""
    values = np.asarray(values, dtype=float)
    low, high = np.nanmin(values), np.nanmax(values)
    if low > 0 and high / low > log_from:
        return _set_log(ax, which, low, high, most)
    ax.set(**{f"{which}lim": (0, high * 1.08 or 1)})
    axis = getattr(ax, f"{which}axis")
    axis.set_major_locator(MaxNLocator(min(most, 6), steps=[1, 2, 2.5, 5, 10]))
    return axis.set_major_formatter(FuncFormatter(_number))


def _extent(rows: Frame, suffix: str = "") -> np.ndarray:
    """Values and intervals, these cut where they would squeeze the points (two blocks: 10 times the value)."""
    value, low, high = (rows[name + suffix] for name in ("value", "ci_low", "ci_high"))
    return np.concatenate([value, np.maximum(low, value / 1.5), np.minimum(high, value * 1.5)])


def _set_levels(ax: Axes, levels: Iterable[float], inches: float) -> None:
    """Log2 x axis with the true levels as ticks; a label that would touch its right neighbour is left out."""
    ticks = sorted(set(levels))
    margin = (ticks[-1] / ticks[0]) ** 0.05 if len(ticks) > 1 else 2.0
    ax.set_xscale("log", base=2)
    ax.set_xlim(ticks[0] / margin, ticks[-1] * margin)
    labels, edge = [], math.inf
    for tick in reversed(ticks):
        half = len(_number(tick)) * 5.5 / 2  # points
        centre = math.log2(tick) * inches * 72 / math.log2(ticks[-1] / ticks[0] * margin**2)
        fits = centre + half + 3 <= edge
        labels.append(_number(tick) if fits else "")
        edge = centre - half if fits else edge
    _set_ticks(ax, "x", ticks, labels[::-1])


def _errors(rows: Frame, name: str) -> np.ndarray | None:
    if not name.startswith("value") or rows[name.replace("value", "ci_low")].isna().all():
        return None
    low, high = (rows[name.replace("value", end)] for end in ("ci_low", "ci_high"))
    return np.maximum([rows[name] - low, high - rows[name]], 0)


def _draw(ax: Axes, rows: Frame, style: Style, arm: str, x: str = "x", y: str = "value") -> None:
    """Line, points and intervals of an arm; INVALID points hollow."""
    bars = {"fmt": "none", "ecolor": style["color"], "elinewidth": 1, "capsize": 2.5, "alpha": 0.8}
    ax.plot(rows[x], rows[y], color=style["color"], label=arm, gid="line", zorder=2)
    ax.errorbar(rows[x], rows[y], xerr=_errors(rows, x), yerr=_errors(rows, y), **bars)
    for gid, face, some in (("valid", style["color"], rows["valid"]), ("invalid", "white", ~rows["valid"])):
        if some.any():
            ax.plot(rows[x][some], rows[y][some], ls="", mfc=face, mew=1.2, gid=gid, label="_", zorder=3, **style)


def _place_labels(fig: Figure, labels: list[tuple[Axes, pd.Series, str]]) -> int:
    """Write each point's level, in (axes, row, colour), where it touches nothing; returns how many had no place."""
    fig.draw_without_rendering()  # fixes the layout, so that data can be turned into pixels
    unit = fig.dpi / 72
    taken: dict[Axes, list[Any]] = {ax: [] for ax, _, _ in labels}
    points: dict[Axes, list[Any]] = {ax: [] for ax, _, _ in labels}
    for ax, row, _ in labels:
        (x, y), bar = ax.transData.transform((row["value_ms"], row["value"])), row.fillna(0)
        points[ax].append((x, y))
        taken[ax].append((x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit))
        if bar["ci_low_ms"] > 0 < bar["ci_low"]:
            ends = ax.transData.transform([(bar["ci_low_ms"], bar["ci_low"]), (bar["ci_high_ms"], bar["ci_high"])])
            taken[ax] += [(ends[0, 0], y - unit, ends[1, 0], y + unit), (x - unit, ends[0, 1], x + unit, ends[1, 1])]
    for ax, boxes in taken.items():
        for line in (line for line in ax.lines if line.get_gid() == "slo"):
            x, y = ax.transData.transform((np.asarray(line.get_xdata())[0], ax.get_ylim()[1]))
            boxes.append((x - unit, ax.bbox.y0, x + unit, y))
    omitted = 0
    for ax, row, colour in labels:
        at = (row["value_ms"], row["value"])
        dark = tuple(0.7 * part for part in to_rgb(colour))
        look: Any = {"ha": "center", "va": "center", "fontsize": 8, "color": dark, "annotation_clip": False}
        note = ax.annotate(_number(row["x"]), at, (0, 0), textcoords="offset points", gid="level", **look)
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])
        box, (x, y) = note.get_window_extent(), ax.transData.transform(at)
        for right, up in ((-1, 1), (1, -1), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (0, 2), (0, -2)):
            dx, dy = right * (box.width / 2 + 6 * unit), up * (box.height / 2 + 4.5 * unit)
            x0, x1 = x + dx - box.width / 2 - unit, x + dx + box.width / 2 + unit
            y0, y1 = y + dy - box.height / 2, y + dy + box.height / 2
            inside = ax.bbox.x0 <= x0 and x1 <= ax.bbox.x1 + 5 * unit and ax.bbox.y0 <= y0 and y1 <= ax.bbox.y1
            own = math.hypot(dx, dy) <= min(math.dist((x + dx, y + dy), point) for point in points[ax]) + 1
            if inside and own and all(x1 < a or c < x0 or y1 < b or d < y0 for a, b, c, d in taken[ax]):
                taken[ax].append((x0, y0, x1, y1))
                note.set_position((dx / unit, dy / unit))
                break
        else:
            note.remove()
            omitted += 1
    return omitted


def _panels(count: int, across: int, height: float, width: float = 0, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels `height` inches high; title, legend and captions come on top of that."""
    down = math.ceil(count / across)
    fig = Figure(
        figsize=(width or (7.0, 9.0, 10.0)[across - 1], height * down), layout="constrained", facecolor="white"
    )
    axes = list(fig.subplots(down, across, squeeze=False, **options).flat)
    for ax in axes[count:]:
        ax.remove()
    return fig, axes[:count]


def _handles(styles: Mapping[str, Style], arms: Iterable[str], invalid: bool = False) -> Handles:
    drawn = set(arms)
    handles: Handles = [Line2D([], [], label=arm, **style) for arm, style in styles.items() if arm in drawn]
    hollow = Line2D([], [], ls="", marker="o", color=GREY, mfc="white", label="INVALID")
    return [*handles, hollow] if invalid else handles


def _finish(fig: Figure, title: str, handles: Handles, captions: Iterable[str]) -> Figure:
    """Title and legend above the panels, captions below: the figure grows by what these need, the panels do not."""
    width, height = fig.get_size_inches()
    heading = fig.text(0, 1, textwrap.fill(title, int(width * 10)), fontsize=11, fontweight="bold", va="top")
    legend_at = above = 0.2 + heading.get_window_extent().height / fig.dpi
    for columns in range(len(handles), 0, -1):
        look: Any = {"loc": "upper left", "frameon": False, "borderaxespad": 0, "borderpad": 0}
        legend = fig.legend(handles=handles, ncols=columns, **look)
        if columns == 1 or legend.get_window_extent().width / fig.dpi <= width - 0.2:
            above += 0.04 + legend.get_window_extent().height / fig.dpi
            break
        legend.remove()
    lines = [textwrap.fill(c, int(width * 15), subsequent_indent="   ") for c in dict.fromkeys(captions)]
    caption = fig.text(0, 0, "\n".join(lines), fontsize=8, color=GREY, va="bottom", linespacing=1.3)
    below = 0.16 + caption.get_window_extent().height / fig.dpi if lines else 0.05
    total = height + above + below
    fig.set_size_inches(width, total)
    heading.set_position((0.1 / width, 1 - 0.1 / total))
    caption.set_position((0.1 / width, 0.08 / total))
    for legend in fig.legends:
        legend.set_bbox_to_anchor((0.1 / width, 1 - legend_at / total), transform=fig.transFigure)
    rect = (0, below / total, 1, height / total)
    fig.set_layout_engine("constrained", rect=rect, w_pad=0.08, h_pad=0.07)
    return fig


# --- Figures of points ----------------------------------------------------------------------------------------------


@_look
def throughput_against_p99(
    arm_points: Frame,
    slo_p99_ms: Mapping[str, float] | float | None = None,
    *,
    latency: str = "latency_p99_ms",
    arms: Names = (),
    captions: Names = (),
) -> Figure:
    """Throughput (requests/s) against p99 latency (ms): a panel a workload, a line an arm in order of load.

    `slo_p99_ms`: by workload, or one for all. `latency`: another percentile, for runs too short for a p99; the SLO is
    then not drawn, for it is on the p99.
    """
    points = _prepare(arm_points, "throughput against latency", "value")
    _load_label(points)
    styles = arm_styles([*arms, *sorted(points["arm"].unique())])
    name = _metric_name(latency).removesuffix(" latency")
    few = f" (fewer than {FEWEST[name]} requests)" if name in FEWEST else ""
    key = ["arm", "workload", "level"]
    slow = points.loc[points["metric"] == latency, [*key, "value", "ci_low", "ci_high", "valid"]]
    both = points[points["metric"] == "throughput_rps"].merge(slow, "left", key, suffixes=("", "_ms"))
    both["valid"] &= both["valid_ms"].eq(True)
    if both.empty:
        raise ValueError("no throughput against latency to draw: there is no throughput_rps")
    workloads = list(dict.fromkeys(both["workload"]))
    fig, axes = _panels(len(workloads), min(len(workloads), 3), 3.7)
    missing, labels = [], []
    for ax, workload in zip(axes, workloads, strict=True):
        rows = both[both["workload"] == workload]
        drawn = rows[rows["value_ms"].notna()]
        slo = slo_p99_ms.get(workload) if isinstance(slo_p99_ms, Mapping) else slo_p99_ms
        slo = slo if latency == "latency_p99_ms" else None
        ax.set(xlabel=metric_label(latency), ylabel="throughput (requests/s)")
        ax.set_title(workload + (f", SLO {_number(slo)} ms" if slo else ""))
        without: dict[str, list[str]] = {}
        for arm, group in rows[rows["value_ms"].isna()].groupby("arm", sort=False):
            names = ", ".join(map(_level_name, group["level"])).replace(", c=", ", ")
            without.setdefault("any level" if arm not in set(drawn["arm"]) else names, []).append(str(arm))
        for levels, who in without.items():
            which = "" if len(who) == rows["arm"].nunique() else f": {', '.join(who)}"
            missing.append(f"{workload}: no {name} at {levels}{few}{which}.")
        if drawn.empty:
            ax.set(xticks=[], yticks=[])
            ax.text(0.5, 0.5, f"no {name} at any level\n{few.strip()}", transform=ax.transAxes, ha="center", color=GREY)
            continue
        if slo:
            ax.axvline(slo, color=RED, ls="--", lw=1.2, gid="slo")
        for arm, group in drawn.groupby("arm", sort=False):
            _draw(ax, group, styles[str(arm)], str(arm), x="value_ms")
            order = dict.fromkeys([0, len(group) - 1, *range(len(group))])  # the ends get a place first
            labels += [(ax, group.iloc[i], styles[str(arm)]["color"]) for i in order]
        _scale(ax, "x", [*_extent(drawn, "_ms"), slo or math.nan], most=7 if len(workloads) == 1 else 5)
        _scale(ax, "y", _extent(drawn), log_from=50)
    shown = both[both["value_ms"].notna()]
    omitted = " Left out where it would touch another." if _place_labels(fig, labels) else ""
    number = "clients (concurrency)" if _closed(both) else "requests/s offered"
    handles = _handles(styles, shown["arm"], invalid=not shown["valid"].all())
    if any(line.get_gid() == "slo" for ax in axes for line in ax.lines):
        handles.append(Line2D([], [], color=RED, ls="--", label=f"SLO of the {name}"))
    notes = [f"Number at a point: {number}.{omitted}"] * bool(labels) + missing + _captions(shown)
    return _finish(fig, f"Throughput against {name} latency", handles, [*notes, *captions])


def _grid(points: Frame, panels: Sequence[Names], title: str, arms: Names, captions: Names) -> Figure:
    """2x2 metrics against the level; of each panel's metrics the first that was measured."""
    styles = arm_styles([*arms, *sorted(points["arm"].unique())])
    fig, axes = _panels(4, 2, 2.9)
    shown = []
    for ax, metrics in zip(axes, panels, strict=True):
        metric = next((m for m in metrics if (points["metric"] == m).any()), metrics[0])
        rows = points[points["metric"] == metric]
        shown.append(rows)
        ax.set(xlabel=_load_label(points), ylabel=metric_label(metric))
        if rows.empty:
            ax.set(xticks=[], yticks=[])
            why = "not measured" + ("\n(or too few requests)" if "_p" in metric else "")
            ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", color=GREY)
            continue
        for arm, group in rows.groupby("arm", sort=False):
            _draw(ax, group, styles[str(arm)], str(arm))
        _set_levels(ax, points["x"], 3.5)
        _scale(ax, "y", _extent(rows))
    drawn = pd.concat(shown)
    handles = _handles(styles, drawn["arm"], invalid=not drawn["valid"].all())
    return _finish(fig, title, handles, [*_captions(drawn), *captions])


@_look
def recsys_grid(arm_points: Frame, *, arms: Names = (), captions: Names = ()) -> Figure:
    """Throughput and mean, p50 and p99 latency against the level; of the workload `recsys` if there are several."""
    points = _prepare(arm_points, "points", "value")
    if points["workload"].eq("recsys").any():
        points = points[points["workload"] == "recsys"]
    panels = [["throughput_rps"], ["latency_mean_ms"], ["latency_p50_ms"], ["latency_p99_ms"]]
    title = f"{', '.join(points['workload'].unique())}: throughput and latency by load"
    return _grid(points, panels, title, arms, captions)


@_look
def vllm_grid(arm_points: Frame, *, arms: Names = (), captions: Names = ()) -> Figure:
    """Time to first token, time per output token, input and output tokens/s against the level."""
    panels = [["ttft_p50_ms", "ttft_mean_ms"], ["tpot_p50_ms", "tpot_mean_ms"]]
    panels += [["input_throughput_tok_per_s"], ["output_throughput_tok_per_s"]]
    notes = ["TTFT: time to the first token. TPOT: time per output token after the first.", *captions]
    return _grid(_prepare(arm_points, "tokens", "value"), panels, "Tokens: latency and throughput by load", arms, notes)


@_look
def replica_scaling(
    arm_points: Frame,
    metric: str = "output_throughput_tok_per_s",
    *,
    profiles: Names = (),
    captions: Names = (),
) -> Figure:
    """`metric` (`throughput_rps` where there is none) by replicas, a line a profile, each arm at its highest level.

    With linear scaling from the profile's fewest replicas. Arms of the workload `vllm` are a level line: vLLM alone.
    """
    points = _prepare(arm_points, "replicas", "value")
    metric = metric if points["metric"].eq(metric).any() else "throughput_rps"
    top = points[points["metric"] == metric].groupby("arm", sort=False).tail(1)
    alone = top[top["workload"] == "vllm"]
    rows = top[(top["workload"] != "vllm") & top["num_replicas"].notna()].sort_values("num_replicas", kind="stable")
    if rows.empty:
        raise ValueError(f"no replicas to draw: no {metric} of an arm with num_replicas")
    several = rows["workload"].nunique() > 1
    rows["line"] = rows["workload"] + ", " + rows["profile"] if several else rows["profile"]
    styles = arm_styles([*profiles, *sorted(rows["line"].unique())])
    fig, [ax] = _panels(1, 1, 3.9)
    for line, group in rows.groupby("line", sort=False):
        _draw(ax, group, styles[str(line)], str(line), x="num_replicas")
        linear = group["num_replicas"] * (group["value"] / group["num_replicas"]).iloc[0]
        ax.plot(group["num_replicas"], linear, color=styles[str(line)]["color"], ls=":", lw=1.2, gid="linear")
    for value in alone["value"]:
        ax.axhline(value, color="black", ls="-.", lw=1.2, gid="vllm")
    ax.set(xlabel="replicas (number)", ylabel=metric_label(metric), xlim=(0, rows["num_replicas"].max() * 1.08))
    _set_ticks(ax, "x", sorted(rows["num_replicas"].unique()))
    _scale(ax, "y", np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines]), log_from=math.inf)
    handles = _handles(styles, rows["line"], invalid=not top["valid"].all())
    handles.append(Line2D([], [], color=GREY, ls=":", label="linear scaling"))
    handles += [Line2D([], [], color="black", ls="-.", label="vLLM alone")] * (not alone.empty)
    levels = ", ".join(dict.fromkeys(map(_level_name, top.sort_values("x")["level"])))
    title = f"{', '.join(rows['workload'].unique())}: {_metric_name(metric)} by replicas"
    notes = [f"Each arm at its highest level: {levels}.", *_captions(top, latency=False), *captions]
    return _finish(fig, title, handles, notes)


# --- Figures of ratios ----------------------------------------------------------------------------------------------


def _ratio_rows(ax: Axes, y: Sequence[float], rows: Frame, names: Names, near: float, bold: Sequence[bool]) -> bool:
    """Points and intervals on a log x axis, a line at 1. True if an interval was cut, with an arrow at the edge.

    `names`: columns of the ratio and its lower and upper limit; `near`: the axis holds [1/near, near] at least.
    """
    ratio, low, high = (rows[name] for name in names)
    left, right = np.nanmin([*ratio, 1 / near]), np.nanmax([*ratio, near])
    # An interval from two blocks can span decades: it gets three times the points' own room, no more.
    left, right = np.nanmin([left, np.fmax(low.min(), left / 3)]), np.nanmax([right, np.fmin(high.max(), right * 3)])
    _set_log(ax, "x", left, right, most=6)
    left, right = ax.get_xlim()
    ax.axvline(1, color=INK, lw=1, zorder=1.5, gid="one")
    cut = False
    for at, value, a, b, strong in zip(y, ratio, low, high, bold, strict=True):
        ax.plot([max(a, left), min(b, right)], [at, at], color=INK, lw=2.2 if strong else 1.3, zorder=2, gid="interval")
        for end, marker in [(left, "<")] * bool(a < left) + [(right, ">")] * bool(b > right):
            cut = True
            ax.plot(end, at, marker=marker, color=INK, clip_on=False, gid="cut")
        face, marker, size = INK if a <= b else "white", "D" if strong else "o", 7 if strong else 5
        ax.plot(value, at, marker, color=INK, mfc=face, ms=size, zorder=3, gid="ratio")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0, pad=8)
    ax.grid(axis="y", visible=False)
    return cut


def _beside(ax: Axes, y: float, text: str, offset: float, **options: Any) -> float:
    """Text right of a row, `offset` points from the axes; returns where it ends, in points."""
    place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
    note = ax.annotate(text, (1, y), (offset, 0), va="center", fontsize=8.5, **place, **options)
    return offset + note.get_window_extent().width * 72 / ax.figure.dpi


@_look
def forest(cells: Frame, margin: float = 0.05, *, captions: Names = ()) -> Figure:
    """Every ratio with its interval and verdict, the primary on top; > 1 is better, whatever the metric.

    `margin`: of equivalence; the band is [1/(1+margin), 1+margin].
    """
    cells = _prepare(cells, "cells")
    cells["rank"] = cells["family"].map({family: i for i, family in enumerate(FAMILIES)})
    pair, names = ["baseline", "candidate"], ["ratio", "ci_low_ratio", "ci_high_ratio"]
    pairs = cells.drop_duplicates(pair)
    key = ["rank", *pair, "axes"]
    groups = [group for _, group in cells.sort_values("rank", kind="stable").groupby(key, sort=False, dropna=False)]
    rows = pd.concat(groups)
    height = len(rows) + len(groups)
    fig, [ax] = _panels(1, 1, 0.55 + 0.24 * height, width=8.5)
    ax.set_ylim(height - 0.5, -0.42)
    y: list[float] = []
    for group in groups:
        first, at = group.iloc[0], (y[-1] if y else -1) + 1
        who = [f"{first['candidate']} against {first['baseline']}"] if len(pairs) > 1 else []
        held = [str(first["axes"])] if len(cells.drop_duplicates([*pair, "axes"])) > len(pairs) else []
        text = ":  ".join([first["family"] if who else FAMILIES[first["family"]], ", ".join(who + held)]).rstrip(": ")
        across = blended_transform_factory(fig.transFigure, ax.transData)
        strip = Rectangle((0, at - 0.42), 1, 0.84, transform=across, color="#efefef", lw=0, clip_on=False, zorder=4)
        ax.add_patch(strip).set_in_layout(False)
        place: Any = {"fontsize": 8.5, "fontweight": "bold", "va": "center", "gid": "header", "zorder": 5}
        header = ax.text(0.1 / 8.5, at, textwrap.shorten(text, 105, placeholder=" ..."), transform=across, **place)
        header.set_in_layout(False)
        y += [at + 1.0 + i for i in range(len(group))]
    bold = list(rows["family"] == "primary")
    weights = ["bold" if strong else "normal" for strong in bold]
    floors = rows["floor_ratio"]
    cut = _ratio_rows(ax, y, rows, names, max(1.1, 1 + margin, floors.fillna(1).max()), bold)
    ax.axvspan(1 / (1 + margin), 1 + margin, color=MARGIN, lw=0, zorder=0.6, gid="margin")
    for at, floor in zip(y, floors, strict=True):
        if floor > 1:
            box = Rectangle((1 / floor, at - 0.5), floor - 1 / floor, 1, color=FLOOR, lw=0, zorder=0.5, gid="floor")
            ax.add_patch(box)
    ratios = [_ratio(*figures) for figures in rows[names].itertuples(index=False)]
    ends = [_beside(ax, at, r, 10, fontweight=w) for at, r, w in zip(y, ratios, weights, strict=True)]
    for at, verdict, weight in zip(y, rows["verdict"], weights, strict=True):
        if isinstance(verdict, str):
            _beside(ax, at, verdict, max(ends) + 14, fontweight=weight, color=VERDICTS.get(verdict, GREY))
    where = zip(rows["metric"], rows["level"], strict=True)
    ax.set_yticks(y, [f"{_metric_name(metric)} at {_level_name(level)}" for metric, level in where])
    for tick, weight in zip(ax.get_yticklabels(), weights, strict=True):
        tick.set_fontweight(weight)
    ax.set_xlabel("speed-up (ratio, > 1 is better)")
    ax.tick_params(axis="x", labeltop=height > 25)  # the axis is far from the first rows
    handles: Handles = [Patch(color=MARGIN, label=f"equivalence margin, {_number(round(100 * margin, 2))} %")]
    handles += [Patch(color=FLOOR, label="noise floor (A/A)")] * bool(floors.notna().any())
    bare = (rows["ratio"].notna() & rows["ci_low_ratio"].isna()).any()
    handles += [Line2D([], [], ls="", marker="o", color=INK, mfc="white", label="no interval")] * bool(bare)
    notes = ["Ratio: candidate / baseline for throughput, baseline / candidate for latency."]
    if _present(rows, "confidence"):
        spread = sorted({rows["confidence"].min(), rows["confidence"].max()})
        percents = " to ".join(f"{_number(round(100 * c, 1))} %" for c in spread)
        notes.append(
            f"Lines: intervals of {percents} between deployments{_blocks(rows[rows['ci_low_ratio'].notna()])}."
        )
    notes += [CUT] * cut + [CLOSED_LOOP] * bool(rows["metric"].str.startswith("latency").any() and _closed(rows))
    title = f"{rows['candidate'].iloc[0]} against {rows['baseline'].iloc[0]}" if len(pairs) == 1 else "each candidate"
    return _finish(fig, f"Speed-up of {title}", handles, [*notes, *captions])


@_look
def peak_gains(peak: Frame, *, arms: Names = (), captions: Names = ()) -> Figure:
    """By workload, at the level of the frame: speed-up of throughput, and p99 latency as a fraction of baseline's."""
    peak = _prepare(peak, "peak gains")
    y = [float(i) for i in range(len(peak))]
    titles = {"speedup": "throughput: right of 1 is better", "latency_fraction": "p99 latency: left of 1 is better"}
    fig, axes = _panels(2, 2, 0.8 + 0.66 * len(peak), sharey=True)
    cut = False
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        names = [name, f"{name}_ci_low", f"{name}_ci_high"]
        cut |= _ratio_rows(ax, y, peak, names, 1.1, [False] * len(peak))
        for at, figures in zip(y, peak[names].itertuples(index=False), strict=True):
            _beside(ax, at, _ratio(*figures), 10)
        ax.set(title=title, xlabel="candidate / baseline (ratio)")
    at_level = [f" at {_level_name(level)}" if isinstance(level, str) else "" for level in peak["level"]]
    rows = zip(peak["workload"], at_level, peak["candidate"], peak["baseline"], strict=True)
    texts = [f"{workload}{level}\n{candidate}\nagainst {baseline}" for workload, level, candidate, baseline in rows]
    axes[0].set_ylim(len(peak) - 0.5, -0.5)
    axes[0].set_yticks(y, texts)
    notes = [f"Lines: 95 % intervals between deployments{_blocks(peak)}."] * _present(peak, "speedup_ci_low")
    notes += [CUT] * cut + [CLOSED_LOOP] * _closed(peak)
    return _finish(fig, "Gains by workload", [], [*notes, *captions])


@_look
def gain_by_slo(gain_by_slo: Frame, *, arms: Names = (), captions: Names = ()) -> Figure:
    """Ratio of the peak throughputs within an SLO as a function of that SLO (p99, ms); below, the peaks themselves."""
    gains = _prepare(gain_by_slo, "gain by SLO", "slo_ms").sort_values("slo_ms", kind="stable")
    styles = arm_styles([*arms, *sorted({*gains["baseline"], *gains["candidate"]})])
    fig, [upper, lower] = _panels(2, 1, 2.2, sharex=True, gridspec_kw={"height_ratios": [2, 1.2]})
    steps: Any = {"drawstyle": "steps-post"}  # a peak changes only where the SLO lets one more level in
    peaks: dict[str, tuple[pd.Series, pd.Series]] = {}
    for pair, rows in gains.groupby(["baseline", "candidate", "axes"], sort=False, dropna=False):
        baseline, candidate = map(str, pair[:2])
        slo, style = rows["slo_ms"], styles[candidate]
        marks: Any = {"markevery": max(1, len(rows) // 8), "ms": 4}
        upper.plot(slo, rows["ratio"], gid="ratio", label=candidate, **style, **marks, **steps)
        low, high = rows["ci_low_ratio"], rows["ci_high_ratio"]
        upper.fill_between(slo, low, high, step="post", color=style["color"], alpha=0.18, lw=0, gid="interval")
        peaks |= {baseline: (slo, rows["baseline_peak_rps"]), candidate: (slo, rows["candidate_peak_rps"])}
    for arm, (slo, peak) in peaks.items():
        marks = {"markevery": max(1, len(slo) // 8), "ms": 4}
        lower.plot(slo, peak, gid="line", label=arm, **styles[arm], **marks, **steps)
    ratio = gains["ratio"]
    bounds = [*np.fmax(gains["ci_low_ratio"], ratio / 2), *np.fmin(gains["ci_high_ratio"], ratio * 2)]
    _set_log(upper, "y", np.nanmin([*ratio, *bounds, 1 / 1.1]), np.nanmax([*ratio, *bounds, 1.1]))
    upper.axhline(1, color=INK, lw=1, gid="one")
    if ratio.isna().all():
        upper.text(
            0.5,
            0.7,
            "no SLO within which both arms have a VALID level in one block",
            transform=upper.transAxes,
            ha="center",
            color=GREY,
        )
    _scale(lower, "y", gains[["baseline_peak_rps", "candidate_peak_rps"]], log_from=50, most=5)
    _set_log(lower, "x", gains["slo_ms"].min(), gains["slo_ms"].max(), most=8)
    upper.set_ylabel("candidate / baseline (ratio)")
    lower.set(ylabel="peak (requests/s)", xlabel="SLO: p99 latency at most (ms)")
    notes = ["Peak: highest throughput at a measured level whose p99 meets the SLO."]
    notes += ["No ratio where no block has such a level of both arms."] * bool(ratio.isna().any())
    known = gains[gains["ci_low_ratio"].notna()]
    notes += [f"Band: 95 % interval between deployments{_blocks(known)}."] * (not known.empty)
    one = len(gains.drop_duplicates(["baseline", "candidate"])) == 1
    who = f"{gains['candidate'].iloc[0]} against {gains['baseline'].iloc[0]}" if one else "each candidate"
    title = f"Gain of {who} in peak throughput within an SLO"
    return _finish(fig, title, _handles(styles, peaks), [*notes, CLOSED_LOOP, *captions])


# --- Figures of requests --------------------------------------------------------------------------------------------


def _by_level(frame: Frame, height: float) -> tuple[Figure, list[tuple[Axes, Frame]]]:
    """A panel a level, in order of load."""
    levels = [rows for _, rows in frame.groupby("level", sort=False)]
    fig, axes = _panels(len(levels), 2 if len(levels) == 4 else min(len(levels), 3), height)
    for ax, rows in zip(axes, levels, strict=True):
        ax.set_title(_level_name(rows["level"].iloc[0]))
    return fig, list(zip(axes, levels, strict=True))


@_look
def latency_distribution(
    distribution: Frame, level: str | None = None, *, arms: Names = (), captions: Names = ()
) -> Figure:
    """Latency (ms) against the percentile of requests, the tail stretched; a panel a level, or only `level`."""
    frame = _prepare(distribution, "latency distribution", "latency_ms")
    styles = arm_styles([*arms, *sorted(frame["arm"].unique())])
    frame = frame[(frame["quantile"] < 1) & (frame["level"].eq(level or "") | (level is None))]
    if frame.empty:
        raise ValueError(f"no latency distribution at {level}; there is {', '.join(distribution['level'].unique())}")
    frame = frame.assign(tail=1 / (1 - frame["quantile"]))
    fig, panels = _by_level(frame, 2.7)
    for ax, rows in panels:
        for arm, group in rows.sort_values("tail").groupby("arm", sort=False):
            style, tail = styles[str(arm)], group["tail"]
            marks: Any = {"markevery": max(1, len(group) // 6), "ms": 4}
            ax.plot(tail, group["latency_ms"], label=str(arm), gid="line", **style, **marks)
            ax.fill_between(tail, group["ci_low_ms"], group["ci_high_ms"], color=style["color"], alpha=0.2, lw=0)
        last = max(rows["tail"].max(), 10)
        ax.set(xscale="log", xlim=(rows["tail"].min() / 1.1, last * 1.1))
        ticks = [t for t in (1, 2, 10, 100, 1e3, 1e4, 1e5, 1e6) if rows["tail"].min() <= t <= last]
        _set_ticks(ax, "x", ticks, [_number(100 - 100 / t) for t in ticks])
        _scale(ax, "y", rows["latency_ms"], most=6)
        ax.set(xlabel="percentile of requests (%)", ylabel="latency (ms)")
    notes = ["All VALID repeats together; each line ends where fewer than ten requests lie beyond."]
    notes += ["Bands: 95 % interval."] * bool(frame["ci_low_ms"].notna().any()) + [CLOSED_LOOP] * _closed(frame)
    return _finish(fig, "Distribution of latency", _handles(styles, frame["arm"]), [*notes, *captions])


@_look
def throughput_over_time(over_time: Frame, *, arms: Names = (), captions: Names = ()) -> Figure:
    """Throughput (requests/s) over the seconds of each trial: ramp-up, warm-up, window; a panel a level."""
    frame = _prepare(over_time, "throughput over time", "throughput_rps")
    styles = arm_styles([*arms, *sorted(frame["arm"].unique())])
    fig, panels = _by_level(frame, 2.6)
    for ax, rows in panels:
        warmup, ramp_up, end = (rows[name].max() for name in ("warmup_s", "ramp_up_s", "duration_s"))
        start = -warmup - ramp_up
        ax.axvspan(start, -warmup, color="#d4d4d4", lw=0, zorder=0, gid="ramp_up")
        ax.axvspan(-warmup, 0, color="#ededed", lw=0, zorder=0, gid="warmup")
        for key, group in rows.sort_values("time_s").groupby(["arm", "repeat"], sort=False):
            arm, repeat = str(key[0]), group["repeat"].iloc[0]
            valid = bool(group["valid"].all())
            look: Any = {"lw": 1.1, "ls": "-"} if valid else {"lw": 0.7, "ls": "--"}
            every = max(1, len(group) // 4)  # repeats take turns, so that their markers do not pile up
            marks: Any = {"markevery": (int(repeat) * 2 % every, every), "ms": 3.5, "mfc": None if valid else "white"}
            gid = "valid" if valid else "invalid"
            ax.plot(group["time_s"], group["throughput_rps"], label=arm, gid=gid, **styles[arm], **look, **marks)
        ax.set_xlim(min(start, rows["time_s"].min()), max(end, rows["time_s"].max()))
        ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        _scale(ax, "y", rows["throughput_rps"], log_from=math.inf)
        ax.set(xlabel="time from the window's start (s)", ylabel="throughput (requests/s)")
    handles = _handles(styles, frame["arm"])
    handles += [Line2D([], [], color=GREY, ls="--", lw=0.9, label="INVALID repeat")] * (not frame["valid"].all())
    handles += [Patch(color="#d4d4d4", label="ramp-up"), Patch(color="#ededed", label="warm-up")]
    notes = ["A line a repeat. White: the measurement window.", *captions]
    return _finish(fig, "Throughput over time", handles, notes)


# --- All of them ----------------------------------------------------------------------------------------------------

_FROM_ONE_FRAME: tuple[tuple[Callable[..., Figure], str], ...] = (
    (gain_by_slo, "candidate_peak_rps"),
    (latency_distribution, "latency_ms"),
    (throughput_over_time, "throughput_rps"),
    (peak_gains, "speedup"),
)


def all_figures(
    arm_points: Frame | None,
    cells: Frame | None = None,
    gain_by_slo: Frame | None = None,
    distribution: Frame | None = None,
    over_time: Frame | None = None,
    peak: Frame | None = None,
    *,
    slo_p99_ms: Mapping[str, float] | float | None = None,
    margin: float = 0.05,
) -> dict[str, Figure]:
    """The figures that these frames can fill, by file name, in the order of a report. A frame may be None or empty."""
    figures: dict[str, Figure] = {}
    points = arm_points if arm_points is not None and _present(arm_points, "value") else None
    arms = [] if points is None else list(dict.fromkeys(points["arm"]))
    captions = [COLOCATED] * bool(points is not None and points["colocated"].eq(True).any())
    if cells is not None and _present(cells, "ratio"):
        figures["forest"] = forest(cells, margin, captions=captions)
    modes = [] if points is None else list(points.groupby("load_mode", sort=False))
    for mode, rows in modes:  # closed and open loop have different x axes
        suffix = "" if len(modes) == 1 else f"_{mode}"
        measured = set(rows.loc[pd.to_numeric(rows["value"]).notna(), "metric"])
        latency = next((m for m in ("latency_p99_ms", "latency_p50_ms") if m in measured), "")
        if latency and "throughput_rps" in measured:
            p99 = "p99" in latency
            why = [] if p99 else ["The p50, because no level has a p99 (fewer than 1,000 requests)."]
            name = f"throughput_against_{'p99' if p99 else 'p50'}{suffix}"
            figures[name] = throughput_against_p99(rows, slo_p99_ms, latency=latency, arms=arms, captions=why)
        if rows["workload"].eq("recsys").any() and _present(rows[rows["workload"] == "recsys"], "value"):
            figures[f"recsys_grid{suffix}"] = recsys_grid(rows, arms=arms)
        if measured & {"ttft_p50_ms", "ttft_mean_ms"} and "input_throughput_tok_per_s" in measured:
            with_tokens = set(rows.loc[rows["metric"].eq("input_throughput_tok_per_s") & rows["value"].notna(), "arm"])
            figures[f"vllm_grid{suffix}"] = vllm_grid(rows[rows["arm"].isin(with_tokens)], arms=arms)
        served = rows[(rows["workload"] != "vllm") & rows["value"].notna()]
        if served.groupby(["workload", "profile"])["num_replicas"].nunique().gt(1).any():
            profiles = list(dict.fromkeys(rows["profile"]))
            figures[f"replica_scaling{suffix}"] = replica_scaling(rows, profiles=profiles)
    several = peak if peak is not None and len(peak) > 1 else None  # one gain alone is already in the forest
    others = (gain_by_slo, distribution, over_time, several)
    for (draw, column), frame in zip(_FROM_ONE_FRAME, others, strict=True):
        if _present(frame, column):
            figures[draw.__name__] = draw(frame, arms=arms, captions=captions)
    return figures


def save(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write `<name>.png` (150 dpi) and `.svg` of each and return the paths; a file exists only when it is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
    for path in paths:
        partial = path.with_name(f".{path.name}.partial")
        metadata: Any = {"Date": None} if path.suffix == ".svg" else None
        with mpl.rc_context(LOOK):
            figures[path.stem].savefig(partial, format=path.suffix[1:], dpi=150, metadata=metadata)
        os.replace(partial, path)
    return paths

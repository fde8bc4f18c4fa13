"""What do the figures of a run look like?  Frames in, `matplotlib.figure.Figure` out.

Nothing is estimated here: every mean, percentile, interval and verdict comes in the frames of `analysis/load.py` and
`analysis/compare.py`. What is missing there is left out and the caption says so; an INVALID point is drawn hollow.
The figures are made without pyplot, so the module works headless and leaves no figure open; a notebook shows them
after `%matplotlib inline`. An empty frame, or one without a needed column, is a `ValueError`; `all_figures` draws only
what the data can fill.

An arm has a colour and a marker, given by its place in `arms` (every arm of the report, in order): give the same list
to every function. `captions` are further lines below the figure, for facts that a frame does not hold.
"""

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# seaborn's "colorblind" palette without its yellow and pink, which fade on white, and with black. Written out because
# importing seaborn takes seconds. Nine colours and ten markers: a pair comes back only after ninety arms.
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#d55e00", "#56b4e9", "#949494", "#000000", "#8c613c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
VERDICT_COLOURS = {"FASTER": "#00695c", "SLOWER": "#a11212", "EQUIVALENT": "#0b3d91", "INCONCLUSIVE": "#666666"}
GREY = "#555555"
LOOK = {
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
    "lines.markersize": 5,
    "figure.facecolor": "white",
    "text.parse_math": False,  # an arm's name may hold a dollar sign
    "svg.hashsalt": "serve-orchestrator",  # the same data give the same file
}
CLOSED_LOOP = (
    "Closed loop: a slow reply holds back its client's next request, so high latency is under-sampled "
    "(coordinated omission)."
)
COLOCATED = "The client ran on the same machine as the service and took part of its CPU."
UNITS = {"_tok_per_s": "tokens/s", "_rps": "requests/s", "_ms": "ms", "_ratio": "ratio"}
NUMBERS = (
    "concurrency offered_rps num_replicas value ci_low ci_high num_blocks slo_ms baseline_peak_rps candidate_peak_rps "
    "ratio ci_low_ratio ci_high_ratio confidence floor_ratio quantile latency_ms ci_low_ms ci_high_ms time_s "
    "throughput_rps warmup_s ramp_up_s duration_s speedup speedup_ci_low speedup_ci_high latency_fraction "
    "latency_fraction_ci_low latency_fraction_ci_high"
).split()
FAMILIES = {
    "primary": "primary, fixed before the run",
    "secondary": "secondary, corrected for their number",
    "descriptive": "descriptive, no verdict",
}

_look = mpl.rc_context(LOOK)


class Style(NamedTuple):
    colour: str
    marker: str


def arm_styles(arms: Iterable[str]) -> dict[str, Style]:
    """Colour and marker of each arm, by its place in `arms`."""
    unique = dict.fromkeys(arms)
    return {a: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, a in enumerate(unique)}


def metric_label(metric: str) -> str:
    """`latency_p99_ms` -> `p99 latency (ms)`."""
    name, unit = _metric(metric)
    return f"{name} ({unit})" if unit else name


def _metric(metric: str) -> tuple[str, str]:
    suffix = next((s for s in UNITS if metric.endswith(s)), "")
    words = metric.removesuffix(suffix).replace("p999", "p99.9").split("_")
    if words[0] in ("latency", "ttft", "tpot"):
        words = [*words[1:], words[0] if words[0] == "latency" else words[0].upper()]
    return " ".join(words), UNITS.get(suffix, "")


# --- Frames ---------------------------------------------------------------------------------------------------------


def _prepare(frame: pd.DataFrame | None, what: str, *required: str) -> pd.DataFrame:
    """A copy with floats for numbers (None becomes NaN) and `x`, the level as a number; `ValueError` if unusable."""
    if frame is None or frame.empty:
        raise ValueError(f"no {what} to draw: the frame is empty")
    missing = [c for c in required if c not in frame.columns]
    if missing:
        raise ValueError(f"cannot draw {what}: no column {', '.join(missing)}; there are {', '.join(frame.columns)}")
    frame = frame.copy()
    for column in frame.columns.intersection(NUMBERS):
        frame[column] = pd.to_numeric(frame[column], errors="coerce").astype(float)
    if "concurrency" in frame.columns:
        offered = frame["offered_rps"] if "offered_rps" in frame.columns else math.nan
        frame["x"] = frame["concurrency"].fillna(offered)
    return frame


def _points(arm_points: pd.DataFrame | None) -> pd.DataFrame:
    points = _prepare(arm_points, "points", "arm", "workload", "level", "concurrency", "metric", "value", "valid")
    for column, default in {"ci_low": math.nan, "ci_high": math.nan, "offered_rps": math.nan, "load_mode": ""}.items():
        if column not in points.columns:
            points[column] = default
    points = points[np.isfinite(points["value"])].sort_values("x", kind="stable")
    if points.empty:
        raise ValueError("no points to draw: no value is a number")
    return points


def _level_label(frame: pd.DataFrame) -> str:
    closed = frame["concurrency"].notna()
    if closed.any() and not closed.all():
        raise ValueError("closed-loop and open-loop levels do not fit on one axis: draw them apart (load_mode)")
    return "concurrency (clients)" if closed.any() else "offered load (requests/s)"


def _level_name(row: Any) -> str:
    concurrency = pd.to_numeric(getattr(row, "concurrency", math.nan))
    if pd.notna(concurrency):
        return f"c={_number(concurrency)}"
    offered = pd.to_numeric(getattr(row, "offered_rps", math.nan))
    return f"{_number(offered)} requests/s" if pd.notna(offered) else str(row.level)


def _present(frame: pd.DataFrame | None, *columns: str) -> bool:
    """Whether each column has at least one number."""
    return frame is not None and all(c in frame and pd.to_numeric(frame[c]).notna().any() for c in columns)


def _arms(frame: pd.DataFrame, arms: Sequence[str] | None) -> dict[str, Style]:
    return arm_styles([*(arms or ()), *sorted(frame["arm"].unique())])


def _blocks(frame: pd.DataFrame) -> str:
    numbers = frame["num_blocks"].dropna().astype(int) if "num_blocks" in frame.columns else pd.Series(dtype=int)
    if numbers.empty:
        return ""
    low, high = numbers.min(), numbers.max()
    return f" over {high} blocks" if low == high else f" over {low} to {high} blocks"


def _captions(rows: pd.DataFrame, latency: bool = True) -> list[str]:
    """What the reader of these points must know: kind of interval, load, place of the client."""
    captions = []
    with_interval = rows[rows["ci_low"].notna()]
    if "interval" in rows.columns:
        if not (between := with_interval[with_interval["interval"] == "between deployments"]).empty:
            captions.append(f"Bars: 95 % interval between deployments{_blocks(between)}.")
        if (with_interval["interval"] == "within this deployment").any():
            captions.append("Bars: interval within this deployment; another deployment of it may lie outside.")
    if "single_run" in rows.columns:
        bare = rows[rows["single_run"].eq(True) & rows["ci_low"].isna()]
        names = list(dict.fromkeys(bare["arm"]))
        if names:
            captions.append(
                "Single run, no interval" + ("." if len(bare) == len(rows) else f": {', '.join(sorted(names))}.")
            )
    if latency and rows["load_mode"].eq("closed").any():
        captions.append(CLOSED_LOOP)
    if "colocated" in rows.columns and rows["colocated"].eq(True).any():
        captions.append(COLOCATED)
    return captions


# --- Axes -----------------------------------------------------------------------------------------------------------


def _number(value: float, _position: int | None = None) -> str:
    return f"{value:,.10g}"


def _three_digits(value: float) -> str:
    return _number(float(f"{value:.3g}"))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers in [low, high], as many as that allows."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for subs in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [t for d in decades for s in subs if low <= (t := s * 10.0**d) <= high]
        if len(ticks) <= most:
            best = ticks
    if len(best) < 2:  # many decades, or a range so narrow that steps of a ratio find nothing round
        ticks = [10.0**d for d in decades if low <= 10.0**d <= high]
        best = ticks[:: math.ceil(len(ticks) / most)] if len(ticks) > most else []
    return best or [t for t in MaxNLocator(max(most - 1, 1)).tick_values(low, high) if low <= t <= high]


def _set_ticks(axis: Axis, ticks: Sequence[float], labels: Sequence[str] | None = None) -> None:
    names = dict(zip(ticks, labels or map(_number, ticks), strict=True))
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(lambda tick, _: names.get(tick, "")))


def _set_log(ax: Axes, which: str, low: float, high: float, most: int = 7) -> None:
    """Log axis with plain numbers at the ticks."""
    ax.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    _set_ticks(getattr(ax, f"{which}axis"), _log_ticks(low, high, most))


def _scale(ax: Axes, which: str, values: np.ndarray, log_from: float = 10, most: int = 7) -> None:
    """Log axis where the values span more than `log_from`-fold, else linear from 0."""
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    if low > 0 and high / low > log_from:
        margin = (high / low) ** 0.06
        _set_log(ax, which, low / margin, high * margin, most)
    else:
        ax.set(**{f"{which}lim": (0, high * 1.08 or 1)})
        axis = getattr(ax, f"{which}axis")
        axis.set_major_locator(MaxNLocator(min(most, 6), steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(_number))


def _extent(value: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """Values and their intervals, but no more of an interval than keeps the points readable (2 blocks: x 10 and more)."""
    return np.concatenate([value, np.fmax(low, value / 1.5), np.fmin(high, value * 1.5)])


def _set_levels(ax: Axes, levels: Iterable[float], inches: float) -> None:
    """Log2 x axis with the true levels as ticks; a label that would touch its right neighbour is left out."""
    ticks = sorted(set(levels))
    margin = (ticks[-1] / ticks[0]) ** 0.05 if len(ticks) > 1 else 2.0
    ax.set_xscale("log", base=2)
    ax.set_xlim(ticks[0] / margin, ticks[-1] * margin)
    points_per_octave = inches * 72 / math.log2(ticks[-1] / ticks[0] * margin**2)
    labels, edge = [], math.inf
    for tick in reversed(ticks):
        half = len(_number(tick)) * 5.6 / 2
        centre = math.log2(tick) * points_per_octave
        fits = centre + half + 4 <= edge
        labels.append(_number(tick) if fits else "")
        edge = centre - half if fits else edge
    _set_ticks(ax.xaxis, ticks, labels[::-1])


def _draw(ax: Axes, rows: pd.DataFrame, style: Style, arm: str, x: str = "x", y: str = "value") -> None:
    """Line, points and intervals of an arm; INVALID points hollow."""
    ax.plot(rows[x], rows[y], color=style.colour, lw=1.4, label=arm, gid="line", zorder=2)
    for name in (x, y):
        suffix = name.removeprefix("value")
        if f"ci_low{suffix}" in rows.columns and rows[f"ci_low{suffix}"].notna().any():
            error = [
                (rows[name] - rows[f"ci_low{suffix}"]).clip(lower=0),
                (rows[f"ci_high{suffix}"] - rows[name]).clip(lower=0),
            ]
            bars = {"xerr" if name == x else "yerr": error}
            ax.errorbar(rows[x], rows[y], **bars, fmt="none", ecolor=style.colour, elinewidth=1, capsize=2.5, alpha=0.8)
    for valid, face in ((True, style.colour), (False, "white")):
        some = rows[rows["valid"].eq(True) == valid]
        if not some.empty:
            ax.plot(
                some[x],
                some[y],
                ls="",
                marker=style.marker,
                color=style.colour,
                markerfacecolor=face,
                markeredgewidth=1.2,
                gid="valid" if valid else "invalid",
                label="_",
                zorder=3,
            )


def _say(ax: Axes, text: str) -> None:
    """A sentence in place of a picture."""
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, textwrap.fill(text, 32), transform=ax.transAxes, ha="center", va="center", color=GREY)


def _place_labels(fig: Figure, labels: Sequence[tuple[Axes, float, float, str, str]]) -> int:
    """Write (axes, x, y, text, colour) beside each point where it touches nothing; returns how many had no place."""
    fig.draw_without_rendering()  # fixes the layout, so that data can be turned into pixels
    unit = fig.dpi / 72
    omitted = 0
    taken: dict[Axes, list[tuple[float, float, float, float]]] = {}
    for ax, x, y, _, _ in labels:
        px, py = ax.transData.transform((x, y))
        taken.setdefault(ax, []).append((px - 3 * unit, py - 3 * unit, px + 3 * unit, py + 3 * unit))
    for ax, x, y, text, colour in labels:
        note = ax.annotate(text, (x, y), textcoords="offset points", ha="center", va="center", fontsize=8, color=colour)
        box, frame = note.get_window_extent(), ax.bbox
        px, py = ax.transData.transform((x, y))
        width, height = box.width, box.height
        for right, up in ((0, 1), (1, 0), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            dx, dy = right * (width / 2 + 5 * unit), up * (height / 2 + 4.5 * unit)
            x0, y0 = px + dx - width / 2, py + dy - height / 2
            x1, y1 = x0 + width, y0 + height
            inside = x0 >= frame.x0 and x1 <= frame.x1 + 12 * unit and y0 >= frame.y0 and y1 <= frame.y1
            if inside and all(x1 < a or c < x0 or y1 < b or d < y0 for a, b, c, d in taken[ax]):
                taken[ax].append((x0, y0, x1, y1))
                note.set_position((dx / unit, dy / unit))
                break
        else:
            note.remove()
            omitted += 1
    return omitted


def _panels(
    rows: int, columns: int, width: float, height: float, used: int, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Figure of `width` x `height` inches (before title, legend and caption) and its first `used` axes."""
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = list(fig.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes[used:]:
        ax.remove()
    return fig, axes[:used]


def _handles(styles: Mapping[str, Style], arms: Iterable[str], invalid: bool = False) -> list[Line2D | Patch]:
    drawn = set(arms)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=s.colour, marker=s.marker, label=a) for a, s in styles.items() if a in drawn
    ]
    if invalid:
        handles.append(Line2D([], [], ls="", marker="o", color=GREY, markerfacecolor="white", label="INVALID"))
    return handles


def _finish(fig: Figure, title: str, handles: Sequence[Line2D | Patch], captions: Iterable[str]) -> Figure:
    """Title and legend above the panels, captions below: the figure grows by what they need, the panels keep theirs."""
    width, height = fig.get_size_inches()
    per_line = int(width * 72 / 4.6)  # characters of a caption
    top = [fig.text(0, 1, textwrap.fill(title, int(width * 72 / 7)), fontsize=11, fontweight="bold", va="top")]
    above = top[0].get_window_extent().height / fig.dpi + 0.12
    legend = None
    for columns in range(len(handles), 0, -1):
        legend = fig.legend(
            handles=handles, ncols=columns, loc="upper left", frameon=False, borderaxespad=0, borderpad=0
        )
        if legend.get_window_extent().width / fig.dpi <= width - 0.2 or columns == 1:
            break
        legend.remove()
    legend_at = above + 0.06
    if legend:
        above = legend_at + legend.get_window_extent().height / fig.dpi
    lines = [textwrap.fill(c, per_line, subsequent_indent="   ") for c in dict.fromkeys(captions) if c]
    caption = fig.text(0, 0, "\n".join(lines), fontsize=8, color=GREY, va="bottom", linespacing=1.25)
    below = caption.get_window_extent().height / fig.dpi + 0.14 if lines else 0.04
    above += 0.1
    total = height + above + below
    fig.set_size_inches(width, total)
    top[0].set_position((0.1 / width, 1 - 0.1 / total))
    caption.set_position((0.1 / width, 0.08 / total))
    if legend:
        legend.set_bbox_to_anchor((0.1 / width, 1 - legend_at / total), transform=fig.transFigure)
    fig.set_layout_engine("constrained", rect=(0, below / total, 1, height / total))
    return fig


# --- Figures of points ----------------------------------------------------------------------------------------------


@_look
def throughput_against_p99(
    arm_points: pd.DataFrame | None,
    slo_p99_ms: Mapping[str, float] | float | None = None,
    *,
    latency: str = "latency_p99_ms",
    arms: Sequence[str] | None = None,
    captions: Sequence[str] = (),
) -> Figure:
    """Throughput (requests/s) against p99 latency (ms), a line an arm through its levels, a panel a workload.

    `slo_p99_ms`: by workload, or one for all. `latency`: another percentile for runs too short for a p99; the SLO is
    then not drawn, for it is on the p99.
    """
    points = _points(arm_points)
    _level_label(points)
    quantile = _metric(latency)[0].removesuffix(" latency")
    styles = _arms(points, arms)
    columns = ["arm", "workload", "level", "x", "value", "ci_low", "ci_high", "valid"]
    throughput = points[points["metric"] == "throughput_rps"]
    both = throughput.merge(
        points.loc[points["metric"] == latency, columns],
        "left",
        ["arm", "workload", "level", "x"],
        suffixes=("", "_ms"),
    ).sort_values("x", kind="stable")
    both["valid"] = both["valid"].eq(True) & both["valid_ms"].eq(True)
    if both.empty:
        raise ValueError("no points to draw: there is no throughput_rps")
    workloads = list(dict.fromkeys(both["workload"]))
    across = min(len(workloads), 3)
    down = math.ceil(len(workloads) / across)
    width = (7.0, 9.0, 10.0)[across - 1]
    fig, axes = _panels(down, across, width, 3.7 * down, len(workloads))
    notes: list[str] = []
    labels = []
    slo_drawn = False
    for ax, workload in zip(axes, workloads, strict=True):
        rows = both[both["workload"] == workload]
        drawn = rows[rows["value_ms"].notna()]
        slo = slo_p99_ms.get(workload) if isinstance(slo_p99_ms, Mapping) else slo_p99_ms
        slo = slo if latency == "latency_p99_ms" else None
        without: dict[str, list[str]] = {}
        for arm, group in rows[rows["value_ms"].isna()].groupby("arm", sort=False):
            every = len(group) == (rows["arm"] == arm).sum()
            levels = "any level" if every else ", ".join(map(_level_name, group.itertuples())).replace(", c=", ", ")
            without.setdefault(levels, []).append(str(arm))
        fewest = {"p99": 1000, "p50": 20}.get(quantile)
        few = f" (fewer than {fewest:,} requests)" if fewest else ""
        for levels, names in without.items():
            who = "" if len(names) == rows["arm"].nunique() else f": {', '.join(names)}"
            notes.append(f"{workload}: no {quantile} at {levels}{few}{who}.")
        ax.set(title=workload + (f", SLO {_number(slo)} ms" if slo else ""))
        ax.set(xlabel=metric_label(latency), ylabel="throughput (requests/s)")
        if drawn.empty:
            _say(ax, f"no {quantile} at any level{few}")
            continue
        if slo:
            slo_drawn = True
            ax.axvline(slo, color="#b00020", ls="--", lw=1.2, gid="slo")
        for arm, group in drawn.groupby("arm", sort=False):
            _draw(ax, group, styles[str(arm)], str(arm), x="value_ms")
            ends = group.index[[0, -1]]
            order = [*ends, *group.index.difference(ends)]  # the ends matter most, so they get a place first
            labels += [
                (ax, r["value_ms"], r["value"], _number(r["x"]), styles[str(arm)].colour)
                for _, r in group.loc[list(dict.fromkeys(order))].iterrows()
            ]
        latencies = _extent(drawn["value_ms"], drawn["ci_low_ms"], drawn["ci_high_ms"])
        _scale(ax, "x", np.append(latencies, slo or math.nan), most=7 if across == 1 else 5)
        _scale(ax, "y", _extent(drawn["value"], drawn["ci_low"], drawn["ci_high"]), log_from=50)
    shown = both[both["value_ms"].notna()]
    omitted = _place_labels(fig, labels)
    unit = "clients (concurrency)" if both["concurrency"].notna().any() else "requests/s offered"
    what = f"Number at a point: {unit}" + ("; left out where it would touch another." if omitted else ".")
    handles = _handles(styles, shown["arm"], invalid=not shown["valid"].all())
    if slo_drawn:
        handles.append(Line2D([], [], color="#b00020", ls="--", label=f"SLO of the {quantile}"))
    notes = [what] * bool(labels) + notes + _captions(shown) + list(captions)
    return _finish(fig, f"Throughput against {quantile} latency", handles, notes)


def _grid(
    points: pd.DataFrame,
    panels: Sequence[Sequence[str]],
    title: str,
    arms: Sequence[str] | None,
    captions: Sequence[str],
) -> Figure:
    """2x2 metrics against the level; of each panel's metrics the first that was measured."""
    styles = _arms(points, arms)
    label = _level_label(points)
    fig, axes = _panels(2, 2, 9.0, 6.0, 4)
    shown = []
    for ax, metrics in zip(axes, panels, strict=True):
        metric = next((m for m in metrics if (points["metric"] == m).any()), metrics[0])
        rows = points[points["metric"] == metric]
        name = _metric(metric)[0]
        ax.set(title=name[0].upper() + name[1:] if name.islower() else name, xlabel=label, ylabel=metric_label(metric))
        if rows.empty:
            _say(ax, "not measured" + (", or too few requests" if "_p" in metric else ""))
            continue
        for arm, group in rows.groupby("arm", sort=False):
            _draw(ax, group, styles[str(arm)], str(arm))
        _set_levels(ax, points["x"], 3.4)
        _scale(ax, "y", _extent(rows["value"], rows["ci_low"], rows["ci_high"]))
        shown.append(rows)
    drawn = pd.concat(shown) if shown else points.iloc[:0]
    handles = _handles(styles, drawn["arm"], invalid=not drawn["valid"].eq(True).all())
    return _finish(fig, title, handles, [*_captions(drawn), *captions])


@_look
def recsys_grid(
    arm_points: pd.DataFrame | None, *, arms: Sequence[str] | None = None, captions: Sequence[str] = ()
) -> Figure:
    """Throughput and mean, p50 and p99 latency against the level, of the workload `recsys` if there are several."""
    points = _points(arm_points)
    if (points["workload"] == "recsys").any():
        points = points[points["workload"] == "recsys"]
    panels = [["throughput_rps"], ["latency_mean_ms"], ["latency_p50_ms"], ["latency_p99_ms"]]
    title = f"Throughput and latency of {', '.join(dict.fromkeys(points['workload']))}"
    return _grid(points, panels, title, arms, captions)


@_look
def vllm_grid(
    arm_points: pd.DataFrame | None, *, arms: Sequence[str] | None = None, captions: Sequence[str] = ()
) -> Figure:
    """Time to first token, time per output token, input and output tokens/s against the level."""
    panels = [
        ["ttft_p50_ms", "ttft_mean_ms"],
        ["tpot_p50_ms", "tpot_mean_ms"],
        ["input_throughput_tok_per_s"],
        ["output_throughput_tok_per_s"],
    ]
    notes = ["TTFT: time to first token. TPOT: time per output token after the first.", *captions]
    return _grid(_points(arm_points), panels, "Tokens: latency and throughput", arms, notes)


@_look
def replica_scaling(
    arm_points: pd.DataFrame | None,
    metric: str = "output_throughput_tok_per_s",
    *,
    profiles: Sequence[str] | None = None,
    captions: Sequence[str] = (),
) -> Figure:
    """`metric` (or `throughput_rps` where there is none) at each arm's highest level against its replicas.

    A line a profile, with linear scaling from its fewest replicas; the workload `vllm` is a level line: vLLM alone.
    """
    points = _points(arm_points)
    if not (points["metric"] == metric).any():
        metric = "throughput_rps"
    points = points[points["metric"] == metric]
    top = points.loc[points.groupby("arm", sort=False)["x"].idxmax()]
    alone, rows = top[top["workload"] == "vllm"], top[(top["workload"] != "vllm") & top["num_replicas"].notna()]
    if rows.empty:
        raise ValueError(f"no points to draw: no {metric} of an arm with num_replicas")
    styles = arm_styles([*(profiles or ()), *sorted(rows["profile"].unique())])
    workloads = list(dict.fromkeys(rows["workload"]))
    fig, axes = _panels(1, len(workloads), (7.0, 9.0)[len(workloads) > 1], 3.9, len(workloads))
    for ax, workload in zip(axes, workloads, strict=True):
        here = rows[rows["workload"] == workload].sort_values("num_replicas", kind="stable")
        for profile, group in here.groupby("profile", sort=False):
            style = styles[str(profile)]
            _draw(ax, group, style, str(profile), x="num_replicas")
            first = group.iloc[0]
            linear = first["value"] * group["num_replicas"] / first["num_replicas"]
            ax.plot(group["num_replicas"], linear, color=style.colour, ls=":", lw=1.2, gid="linear")
        for value in alone["value"]:
            ax.axhline(value, color="black", ls="-.", lw=1.2, gid="vllm")
        replicas = sorted(here["num_replicas"].unique())
        ax.set(title=workload, xlabel="replicas (number)", ylabel=metric_label(metric))
        ax.set_xlim(0, replicas[-1] * 1.08)
        _set_ticks(ax.xaxis, replicas)
        ideal = here["value"].max(), *(line.get_ydata().max() for line in ax.lines if line.get_gid() == "linear")
        _scale(ax, "y", np.array([*ideal, *alone["value"]]), log_from=1e9)
    handles = _handles(styles, rows["profile"], invalid=not top["valid"].eq(True).all())
    handles.append(Line2D([], [], color=GREY, ls=":", label="linear scaling"))
    if not alone.empty:
        handles.append(Line2D([], [], color="black", ls="-.", label="vLLM alone"))
    levels = ", ".join(dict.fromkeys(_level_name(r) for r in top.sort_values("x").itertuples()))
    notes = [f"At the highest level of each arm: {levels}.", *_captions(top, latency=False), *captions]
    return _finish(fig, f"{_metric(metric)[0].capitalize()} against replicas", handles, notes)


# --- Figures of ratios ----------------------------------------------------------------------------------------------


def _ratio_rows(
    ax: Axes, y: Sequence[float], ratio: pd.Series, low: pd.Series, high: pd.Series, strong: Sequence[bool], near: float
) -> bool:
    """Points with intervals on a log x axis, a line at 1; true if an interval had to be cut (arrow at the edge)."""
    known = ratio.dropna()
    left, right = min([*known, 1 / near]), max([*known, near])
    # An interval from two blocks can span decades; it may take three times the points' own room, no more.
    left = min(left, max(left / 3, low.min())) if low.notna().any() else left
    right = max(right, min(right * 3, high.max())) if high.notna().any() else right
    margin = (right / left) ** 0.06
    left, right = left / margin, right * margin
    _set_log(ax, "x", left, right, most=6)
    ax.axvline(1, color="#333333", lw=1, zorder=1.5, gid="one")
    cut = False
    for at, value, a, b, bold in zip(y, ratio, low, high, strong, strict=True):
        interval = pd.notna(a) and pd.notna(b)
        if interval:
            ends = max(a, left), min(b, right)
            ax.plot(ends, [at, at], color="#222222", lw=2.2 if bold else 1.3, zorder=2, gid="interval")
            for outside, end, marker in ((a < left, left, "<"), (b > right, right, ">")):
                if outside:
                    cut = True
                    ax.plot(end, at, marker=marker, color="#222222", clip_on=False, gid="cut")
        if pd.notna(value):
            face = "#222222" if interval else "white"
            size = 7 if bold else 5
            ax.plot(value, at, "D" if bold else "o", color="#222222", mfc=face, ms=size, zorder=3, gid="ratio")
    return cut


def _beside(ax: Axes, y: float, text: str, offset: float, **options: Any) -> float:
    """Text to the right of a row, `offset` points from the axes; returns its width in points."""
    note = ax.annotate(
        text, (1, y), xycoords=("axes fraction", "data"), xytext=(offset, 0), textcoords="offset points", va="center",
        annotation_clip=False, fontsize=8.5, **options,
    )  # fmt: skip
    return note.get_window_extent().width * 72 / ax.figure.dpi


def _ratio_text(ratio: float, low: float, high: float) -> str:
    if pd.isna(ratio):
        return "no ratio"
    interval = (
        f" [{_three_digits(low)}, {_three_digits(high)}]" if pd.notna(low) and pd.notna(high) else ", no interval"
    )
    return _three_digits(ratio) + interval


@_look
def forest(cells: pd.DataFrame | None, margin: float = 0.05, *, captions: Sequence[str] = ()) -> Figure:
    """Every ratio with its interval and verdict, the primary on top; > 1 is better, whatever the metric.

    `margin`: of equivalence; the band is [1/(1+margin), 1+margin].
    """
    needed = "metric level axes baseline candidate ratio ci_low_ratio ci_high_ratio family verdict".split()
    cells = _prepare(cells, "cells", *needed)
    if "floor_ratio" not in cells.columns:
        cells["floor_ratio"] = math.nan
    cells["order"] = cells["family"].map({f: i for i, f in enumerate(FAMILIES)})
    cells["axes"] = cells["axes"].fillna("")
    groups = list(
        cells.sort_values("order", kind="stable").groupby(["order", "baseline", "candidate", "axes"], sort=False)
    )
    one_pair = len(cells.drop_duplicates(["baseline", "candidate"])) == 1
    rows = pd.concat([group for _, group in groups])
    height = len(rows) + len(groups)
    fig, [ax] = _panels(1, 1, 8.5, 0.55 + 0.24 * height, 1)
    ax.set_ylim(height - 0.5, -0.5)
    at = iter(range(height))
    y, headers = [], []
    for _, group in groups:
        first = group.iloc[0]
        parts = [FAMILIES[first["family"]], "" if one_pair else f"{first['candidate']} against {first['baseline']}"]
        headers.append((next(at), "   |   ".join(p for p in [*parts, first["axes"]] if p)))
        y += [next(at) for _ in range(len(group))]
    strong = list(rows["family"] == "primary")
    floors = rows["floor_ratio"].dropna()
    near = max(1 + margin, *floors, 1.1)
    cut = _ratio_rows(ax, y, rows["ratio"], rows["ci_low_ratio"], rows["ci_high_ratio"], strong, near)
    ax.axvspan(1 / (1 + margin), 1 + margin, color="#cfe3f3", lw=0, zorder=0.6, gid="margin")
    for row_at, floor in zip(y, rows["floor_ratio"], strict=True):
        if pd.notna(floor):
            box = Rectangle((1 / floor, row_at - 0.5), floor - 1 / floor, 1, color="#f6d9b8", lw=0, zorder=0.5)
            box.set_gid("floor")
            ax.add_patch(box)
    texts = [_ratio_text(*r) for r in rows[["ratio", "ci_low_ratio", "ci_high_ratio"]].itertuples(index=False)]
    weights = ["bold" if s else "normal" for s in strong]
    widest = max(_beside(ax, a, t, 8, fontweight=w) for a, t, w in zip(y, texts, weights, strict=True))
    for a, verdict, weight in zip(y, rows["verdict"], weights, strict=True):
        if isinstance(verdict, str):
            _beside(ax, a, verdict, widest + 16, fontweight=weight, color=VERDICT_COLOURS.get(verdict, GREY))
    names = [f"{_metric(r.metric)[0]} at {_level_name(r)}" for r in rows.itertuples()]
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_yticks(y, names)
    for tick, bold in zip(ax.get_yticklabels(), strong, strict=True):
        tick.set_fontweight("bold" if bold else "normal")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("speed-up (ratio, > 1 is better)")
    if height > 25:  # the axis is far from the first rows
        ax.tick_params(labeltop=True)
    for a, header in headers:
        ax.axhspan(a - 0.42, a + 0.42, color="#f1f1f1", lw=0, zorder=4)
        ax.annotate(
            header, (0, a), xycoords=("figure fraction", "data"), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=GREY, fontweight="bold", annotation_clip=False, zorder=5,
        ).set_in_layout(False)  # fmt: skip
    handles: list[Line2D | Patch] = [
        Patch(color="#cfe3f3", label=f"equivalence margin, ±{_three_digits(100 * margin)} %")
    ]
    if len(floors):
        handles.append(Patch(color="#f6d9b8", label="noise floor (A/A)"))
    if (rows["ratio"].notna() & rows["ci_low_ratio"].isna()).any():
        handles.append(Line2D([], [], ls="", marker="o", color="#222222", mfc="white", label="no interval"))
    notes = ["Ratio: candidate / baseline for throughput, baseline / candidate for latency."]
    if "confidence" in rows.columns and (levels := sorted(rows["confidence"].dropna().unique())):
        spread = " to ".join(f"{_three_digits(100 * c)} %" for c in dict.fromkeys([levels[0], levels[-1]]))
        notes.append(f"Lines: intervals of {spread} between deployments{_blocks(rows[rows['ci_low_ratio'].notna()])}.")
    if cut:
        notes.append("Arrow: the interval goes on beyond the axis.")
    if rows["metric"].str.startswith("latency").any() and _present(rows, "concurrency"):
        notes.append(CLOSED_LOOP)
    who = (
        f"{rows['candidate'].iloc[0]} against {rows['baseline'].iloc[0]}"
        if one_pair
        else "each candidate against its baseline"
    )
    return _finish(fig, f"Speed-up of {who}", handles, [*notes, *captions])


@_look
def peak_gains(peak: pd.DataFrame | None, *, captions: Sequence[str] = ()) -> Figure:
    """Per workload, at the level of the frame: speed-up of throughput, and p99 latency as a fraction of baseline's."""
    needed = "workload baseline candidate speedup latency_fraction level".split()
    peak = _prepare(peak, "peak gains", *needed)
    pairs = len(peak.drop_duplicates(["baseline", "candidate"])) > 1 and peak["workload"].duplicated().any()
    y = list(range(len(peak)))
    fig, axes = _panels(1, 2, 9.0, 0.9 + (0.62 if pairs else 0.45) * len(peak), 2, sharey=True)
    names = []
    for row in peak.itertuples():
        level = _level_text(str(row.level))
        names.append(f"{row.workload} at {level}" + (f"\n{row.candidate}\nagainst {row.baseline}" if pairs else ""))
    cut = False
    for ax, column, title, label in (
        (axes[0], "speedup", "Throughput: right of 1 is better", "candidate / baseline (ratio)"),
        (axes[1], "latency_fraction", "p99 latency: left of 1 is better", "candidate / baseline (ratio)"),
    ):
        empty = pd.Series(math.nan, peak.index)
        low, high = peak.get(f"{column}_ci_low", empty), peak.get(f"{column}_ci_high", empty)
        cut |= _ratio_rows(ax, y, peak[column], low, high, [False] * len(peak), 1.1)
        for at, *figures in zip(y, peak[column], low, high, strict=True):
            _beside(ax, at, _ratio_text(*figures).replace("no ratio", "not measured"), 8)
        ax.set(title=title, xlabel=label)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    axes[0].set_ylim(len(peak) - 0.5, -0.5)
    axes[0].set_yticks(y, names)
    axes[1].tick_params(labelleft=False)
    notes = [f"Lines: 95 % intervals between deployments{_blocks(peak[peak['num_blocks'] > 1])}."] if (
        _present(peak, "speedup_ci_low") and "num_blocks" in peak.columns
    ) else []  # fmt: skip
    if cut:
        notes.append("Arrow: the interval goes on beyond the axis.")
    if peak["level"].str.startswith("c").any():
        notes.append(CLOSED_LOOP)
    return _finish(fig, "Gains at the highest level of each workload", [], [*notes, *captions])


def _level_text(level: str) -> str:
    number = float(level[1:])
    return f"c={_number(number)}" if level.startswith("c") else f"{_number(number)} requests/s"


@_look
def gain_by_slo(
    gain_by_slo: pd.DataFrame | None, *, arms: Sequence[str] | None = None, captions: Sequence[str] = ()
) -> Figure:
    """Ratio of the peak throughputs within an SLO, as a function of that SLO (p99, ms), over the two peaks."""
    gains = _prepare(
        gain_by_slo, "gain by SLO", *"baseline candidate slo_ms ratio baseline_peak_rps candidate_peak_rps".split()
    )
    gains["axes"] = gains["axes"].fillna("") if "axes" in gains.columns else ""
    groups = list(gains.sort_values("slo_ms", kind="stable").groupby(["baseline", "candidate", "axes"], sort=False))
    styles = arm_styles([*(arms or ()), *sorted({*gains["baseline"], *gains["candidate"]})])
    across = min(len(groups), 2)
    down = math.ceil(len(groups) / across)
    fig, axes = _panels(
        2 * down,
        across,
        (7.0, 9.0)[across - 1],
        4.2 * down,
        2 * down * across,
        gridspec_kw={"height_ratios": [2, 1] * down},
    )
    drawn: list[str] = []
    notes = []
    for i, ((baseline, candidate, held), rows) in enumerate(groups):
        upper = axes[(i // across) * 2 * across + i % across]
        lower = axes[((i // across) * 2 + 1) * across + i % across]
        title = f"{candidate} against {baseline}" if len(groups) > 1 else ""
        upper.set_title(textwrap.fill(", ".join(p for p in (title, held) if p), 60 if across == 1 else 44))
        slo = rows["slo_ms"]
        # A peak changes only where the SLO lets one more level in, hence steps.
        upper.plot(slo, rows["ratio"], color="#222222", lw=1.6, drawstyle="steps-post", gid="ratio")
        alone = rows["ratio"].notna() & rows["ratio"].shift().isna() & rows["ratio"].shift(-1).isna()
        upper.plot(slo[alone], rows["ratio"][alone], "o", color="#222222", ms=3)
        with_interval = {"ci_low_ratio", "ci_high_ratio"} <= set(rows.columns) and rows["ci_low_ratio"].notna().any()
        extent = [rows["ratio"].min(), rows["ratio"].max(), 1 / 1.1, 1.1]
        if with_interval:
            low, high = rows["ci_low_ratio"], rows["ci_high_ratio"]
            upper.fill_between(slo, low, high, step="post", color="#222222", alpha=0.15, lw=0, gid="interval")
            extent += [max(low.min(), np.nanmin(extent) / 2), min(high.max(), np.nanmax(extent) * 2)]
            notes.append(f"Band: 95 % interval between deployments{_blocks(rows[low.notna()])}.")
        pad = (np.nanmax(extent) / np.nanmin(extent)) ** 0.06
        _set_log(upper, "y", np.nanmin(extent) / pad, np.nanmax(extent) * pad)
        upper.axhline(1, color="#333333", lw=1, gid="one")
        if rows["ratio"].isna().all():
            upper.text(0.5, 0.6, "no SLO that both arms meet", transform=upper.transAxes, ha="center", color=GREY)
        elif rows["ratio"].isna().any():
            notes.append("No ratio where an arm has no measured level within the SLO.")
        for arm, column in ((baseline, "baseline_peak_rps"), (candidate, "candidate_peak_rps")):
            style = styles[str(arm)]
            every = max(1, len(rows) // 8)
            lower.plot(
                slo, rows[column], color=style.colour, marker=style.marker, markevery=every, ms=4, lw=1.4,
                drawstyle="steps-post", label=str(arm), gid="line",
            )  # fmt: skip
            drawn.append(str(arm))
        _scale(lower, "y", rows[["baseline_peak_rps", "candidate_peak_rps"]].to_numpy().ravel(), 50, most=4)
        for ax in (upper, lower):
            span = slo.max() / slo.min()
            pad = span**0.03 if span > 1 else 1.5
            _set_log(ax, "x", slo.min() / pad, slo.max() * pad, most=8 if across == 1 else 6)
        upper.tick_params(labelbottom=False)
        upper.set(ylabel="candidate / baseline (ratio)")
        lower.set(ylabel="peak\n(requests/s)", xlabel="SLO: p99 latency at most (ms)")
    for ax in axes:
        if not ax.lines:
            ax.remove()
    notes.insert(0, "Peak: highest throughput at a measured level whose p99 meets the SLO.")
    handles = _handles(styles, drawn)
    who = f" of {groups[0][0][1]} against {groups[0][0][0]}" if len(groups) == 1 else ""
    return _finish(fig, f"Gain in peak throughput{who}, by SLO", handles, [*notes, CLOSED_LOOP, *captions])


# --- Figures of requests --------------------------------------------------------------------------------------------


def _small_multiples(frame: pd.DataFrame, height: float) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A panel a level, in order of load; at most three beside each other."""
    levels = [group for _, group in frame.sort_values("x", kind="stable").groupby("level", sort=False)]
    across = 2 if len(levels) == 4 else min(len(levels), 3)
    down = math.ceil(len(levels) / across)
    fig, axes = _panels(down, across, (7.0, 9.0, 10.0)[across - 1], height * down, len(levels))
    for ax, rows in zip(axes, levels, strict=True):
        ax.set_title(
            _level_name(next(rows.itertuples())) if rows["x"].notna().any() else _level_text(rows["level"].iloc[0])
        )
    return fig, list(zip(axes, levels, strict=True))


@_look
def latency_distribution(
    distribution: pd.DataFrame | None,
    level: str | None = None,
    *,
    arms: Sequence[str] | None = None,
    captions: Sequence[str] = (),
) -> Figure:
    """Latency (ms) against the percentile of requests, the tail stretched; a panel a level, or only `level`."""
    frame = _prepare(distribution, "latency distribution", "arm", "level", "concurrency", "quantile", "latency_ms")
    if level is not None and level not in set(frame["level"]):
        raise ValueError(f"no latency distribution at level {level}; there is {', '.join(sorted(set(frame['level'])))}")
    frame = frame[(frame["quantile"] < 1) & frame["latency_ms"].notna() & ((frame["level"] == level) | (level is None))]
    if frame.empty:
        raise ValueError("no latency distribution to draw: no value is a number")
    frame["x"] = frame["x"].fillna(frame["level"].str[1:].astype(float))
    frame["tail"] = 1 / (1 - frame["quantile"])
    styles = _arms(frame, arms)
    fig, panels = _small_multiples(frame, 2.6)
    with_interval = "ci_low_ms" in frame.columns and frame["ci_low_ms"].notna().any()
    for ax, rows in panels:
        for arm, group in rows.sort_values("tail").groupby("arm", sort=False):
            style = styles[str(arm)]
            every = max(1, len(group) // 6)
            ax.plot(
                group["tail"], group["latency_ms"], color=style.colour, marker=style.marker, markevery=every, ms=4,
                lw=1.4, label=str(arm), gid="line",
            )  # fmt: skip
            if with_interval:
                ax.fill_between(
                    group["tail"], group["ci_low_ms"], group["ci_high_ms"], color=style.colour, alpha=0.2, lw=0
                )
        ends = rows["tail"].min(), rows["tail"].max()
        ax.set_xscale("log")
        ax.set_xlim(ends[0] / 1.1, max(ends[1], ends[0] * 2) * 1.1)
        ticks = [t for t in (1, 2, 10, 100, 1e3, 1e4, 1e5) if ax.get_xlim()[0] <= t <= ax.get_xlim()[1]]
        _set_ticks(ax.xaxis, ticks, [_number(100 * (1 - 1 / t)) for t in ticks])
        _scale(ax, "y", rows["latency_ms"].to_numpy(), most=6)
        ax.set(xlabel="percentile of requests (%)", ylabel="latency (ms)")
    notes = ["All VALID repeats together, to the percentile that ten requests lie beyond."]
    if with_interval:
        notes.append("Bands: 95 % interval.")
    if frame["concurrency"].notna().any():
        notes.append(CLOSED_LOOP)
    return _finish(fig, "Distribution of latency", _handles(styles, frame["arm"]), [*notes, *captions])


@_look
def throughput_over_time(
    over_time: pd.DataFrame | None, *, arms: Sequence[str] | None = None, captions: Sequence[str] = ()
) -> Figure:
    """Throughput (requests/s) over the seconds of each trial: ramp-up, warm-up, window; a panel a level."""
    needed = "arm repeat level concurrency time_s throughput_rps warmup_s ramp_up_s duration_s valid".split()
    frame = _prepare(over_time, "throughput over time", *needed)
    frame = frame[frame["throughput_rps"].notna()]
    if frame.empty:
        raise ValueError("no throughput over time to draw: no value is a number")
    frame["x"] = frame["x"].fillna(frame["level"].str[1:].astype(float))
    styles = _arms(frame, arms)
    fig, panels = _small_multiples(frame, 2.5)
    for ax, rows in panels:
        warmup, ramp_up, end = rows["warmup_s"].max(), rows["ramp_up_s"].max(), rows["duration_s"].max()
        ax.axvspan(-warmup - ramp_up, -warmup, color="#d9d9d9", lw=0, zorder=0, gid="ramp_up")
        ax.axvspan(-warmup, 0, color="#ededed", lw=0, zorder=0, gid="warmup")
        ax.set_xlim(min(rows["time_s"].min(), -warmup - ramp_up), max(end, rows["time_s"].max()))
        for (arm, _), group in rows.sort_values("time_s").groupby(["arm", "repeat"], sort=False):
            style = styles[str(arm)]
            valid = group["valid"].eq(True).all()
            ax.plot(
                group["time_s"], group["throughput_rps"], color=style.colour, marker=style.marker, ms=3.5,
                markevery=(0.1, 0.3), lw=1.1 if valid else 0.7, ls="-" if valid else "--", label=str(arm),
                gid="valid" if valid else "invalid",
            )  # fmt: skip
        _scale(ax, "y", rows["throughput_rps"].to_numpy(), log_from=math.inf)
        ax.set(xlabel="time from the window's start (s)", ylabel="throughput (requests/s)")
    handles = _handles(styles, frame["arm"])
    if not frame["valid"].eq(True).all():
        handles.append(Line2D([], [], color=GREY, ls="--", lw=0.9, label="INVALID repeat"))
    handles += [Patch(color="#d9d9d9", label="ramp-up"), Patch(color="#ededed", label="warm-up")]
    notes = ["A line a repeat (a fresh deployment). White: the measurement window.", *captions]
    return _finish(fig, "Throughput over time", handles, notes)


# --- All of them ----------------------------------------------------------------------------------------------------


def all_figures(
    arm_points: pd.DataFrame | None,
    cells: pd.DataFrame | None = None,
    gain_by_slo: pd.DataFrame | None = None,
    distribution: pd.DataFrame | None = None,
    over_time: pd.DataFrame | None = None,
    peak: pd.DataFrame | None = None,
    *,
    slo_p99_ms: Mapping[str, float] | float | None = None,
    margin: float = 0.05,
) -> dict[str, Figure]:
    """The figures that these frames can fill, by file name, in the order of a report. A frame may be None or empty."""
    figures: dict[str, Figure] = {}
    arms: list[str] = []
    colocated: list[str] = []
    modes: dict[str, pd.DataFrame] = {}
    if arm_points is not None and _present(arm_points, "value"):
        arms = list(dict.fromkeys(arm_points["arm"]))
        if "colocated" in arm_points.columns and arm_points["colocated"].eq(True).any():
            colocated = [COLOCATED]
        modes = {str(mode): rows for mode, rows in arm_points.groupby("load_mode", sort=False)}
    if _present(cells, "ratio"):
        figures["forest"] = forest(cells, margin, captions=colocated)
    for mode, points in modes.items():  # closed and open loop have different x axes
        suffix = "" if len(modes) == 1 else f"_{mode}"
        measured = {str(m) for m in points.loc[pd.to_numeric(points["value"]).notna(), "metric"]}
        latency = next((m for m in ("latency_p99_ms", "latency_p50_ms") if m in measured), None)
        if latency and "throughput_rps" in measured:
            short = [] if "p99" in latency else ["p50, because no level has a p99 (fewer than 1,000 requests)."]
            figures[f"throughput_against_{latency.split('_')[1]}{suffix}"] = throughput_against_p99(
                points, slo_p99_ms, latency=latency, arms=arms, captions=short
            )
        if (points["workload"] == "recsys").any() and "throughput_rps" in measured:
            figures[f"recsys_grid{suffix}"] = recsys_grid(points, arms=arms)
        if {"ttft_p50_ms", "ttft_mean_ms"} & measured and "input_throughput_tok_per_s" in measured:
            tokens = points[points.groupby("arm")["metric"].transform(lambda m: m.str.contains("tok_per_s").any())]
            figures[f"vllm_grid{suffix}"] = vllm_grid(tokens, arms=arms)
        served = points[points["workload"] != "vllm"]
        if (served.groupby(["workload", "profile"])["num_replicas"].nunique() > 1).any():
            figures[f"replica_scaling{suffix}"] = replica_scaling(points)
    if peak is not None and len(peak) > 1 and _present(peak, "speedup"):
        figures["peak_gains"] = peak_gains(peak, captions=colocated)
    if _present(gain_by_slo, "candidate_peak_rps") or _present(gain_by_slo, "baseline_peak_rps"):
        figures["gain_by_slo"] = globals()["gain_by_slo"](gain_by_slo, arms=arms, captions=colocated)
    if _present(distribution, "latency_ms"):
        figures["latency_distribution"] = latency_distribution(distribution, arms=arms, captions=colocated)
    if _present(over_time, "throughput_rps"):
        figures["throughput_over_time"] = throughput_over_time(over_time, arms=arms, captions=colocated)
    return figures


def save(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write `<name>.png` (150 dpi) and `<name>.svg` of each; a file exists only when it is whole. Returns the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            path = directory / f"{name}.{kind}"
            partial = directory / f".{name}.{kind}.partial"
            with mpl.rc_context(LOOK):
                figure.savefig(partial, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            os.replace(partial, path)
            paths.append(path)
    return paths

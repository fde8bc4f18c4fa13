"""What does a person need to read to believe, or doubt, a verdict? The page of a run, `report.html`.

Computes no statistics: every figure comes from `analysis/compare.py` or from the records of the run. What came from
outside (names, errors, flags) is escaped. The same facts as Markdown, in a terminal, as JSON and JUnit: `formats.py`.
"""

import base64
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis import cells, compare, load, published
from analysis.cells import Cell, Comparison
from analysis.differences import Difference
from analysis.figures import heading
from analysis.load import ArmData, Row, RunData
from analysis.wording import MISSING, confidence_text, is_missing, number, ratio_texts
from orchestrator.load.level import Level
from orchestrator.results.records import Effective, Failure, RunRecord
from orchestrator.results.validity import RULES

# A sign beside the word, so that neither colour nor a small screen hides which it is.
SIGNS = {"FASTER": "▲", "SLOWER": "▼", "EQUIVALENT": "=", "INCONCLUSIVE": "?"}
NOTES = published.NOTES | {
    "colocated_client": "The load client shared the machine with the service: they compete for cores. Ratios between "
    "arms hold better than absolute figures.",
    "far_client": "At least half of the median latency is the way from the client to the service and back.",
    "bunched_tokens": "More than a tenth of the replies brought all of their tokens at once (TPOT below "
    "0.05 ms): somebody on the way collects the stream, so TTFT is nearly the latency and TPOT says nothing.",
    "coordinated_omission": "Closed loop: each client waits for its reply before it sends again. While the service "
    "stalls nobody sends, so tail latencies are lower than arrivals independent of replies would see.",
}
WHERE = {
    "declared": "Declared in the configs",
    "effective": "Read back from the live services",
    "consequence": "Consequences: constants that Ray computed from the flags",
}
_MEANINGS = {rule.code: rule.meaning for rule in RULES}


def _time(text: str | None) -> str:
    return (text or MISSING).replace("T", " ").replace("+00:00", " UTC")


def judged(comparison: Comparison) -> list[str]:
    """How the verdict came about, as short facts."""
    cell, margin = comparison.primary, comparison.margin
    if cell is None:
        return ["No primary cell: nothing was fixed before the run to be judged on"]
    floor = "no noise floor given" if is_missing(cell.floor_ratio) else f"noise floor ×{number(cell.floor_ratio)}"
    return [
        f"Judged on {heading(cell.metric)} at {Level.parse(cell.level)}",
        f"{cell.num_blocks} of {cell.num_planned} blocks usable",
        f"equivalent means within ×{number(1 / (1 + margin))} to ×{number(1 + margin)} (margin {100 * margin:g} %)",
        f"look {comparison.look}",
        f"{confidence_text(cell.confidence)} confidence" if not is_missing(cell.confidence) else "no interval",
        floor,
    ]


# ---- What may be doubted ----


@dataclass(frozen=True)
class TrialDetail:
    """Of a trial without a VALID point: the sentences of its trial.json by code, or its failure.json."""

    arm: str
    trial_id: str
    run_dir: str | None = None
    invalid_details: Mapping[str, str] = field(default_factory=dict)
    failure: Failure | None = None


@dataclass(frozen=True)
class Problem:
    """Why one trial is INVALID or failed. `block`: "block 2", with the run's id where there are several."""

    block: str
    code: str
    text: str


@dataclass(frozen=True)
class Trouble:
    """What went wrong at one arm and level, its `title`. `count`: how many blocks are VALID, as a sentence."""

    title: str
    count: str
    problems: Sequence[Problem]


@dataclass(frozen=True)
class Findings:
    """What may be doubted: `counts` of trials in a sentence, troubles, and caveats in words."""

    counts: str
    troubles: Sequence[Trouble] = ()
    notes: Sequence[str] = ()


def findings(points: pd.DataFrame, details: Iterable[TrialDetail] = ()) -> Findings:
    """What the trials of `points` and their `details` say."""
    if points.empty:
        return Findings("No trial was planned.")
    by_trial = {(detail.run_dir, detail.arm, detail.trial_id): detail for detail in details}
    several = "run_dir" in points and points.run_dir.nunique() > 1
    complete = points.state == "complete"
    # `valid` may hold None or NaN: only a real False is INVALID, and only in a complete trial.
    valid, invalid = points.valid.eq(True), complete & points.valid.eq(False)
    others = {"INVALID": invalid, "failed": points.state == "failed", "not run": points.state == "planned"}
    troubles = []
    for (arm, level), group in points[invalid | others["failed"]].groupby(["arm", "level"], sort=False):
        here = valid[(points.arm == arm) & (points.level == level)]
        problems = [
            problem
            for row in load.records(group)
            for problem in _problems(row, by_trial.get((row.get("run_dir"), row["arm"], row["trial_id"])), several)
        ]
        title = f"{arm}, {Level.parse(str(level))}"
        troubles.append(Trouble(title, f"{here.sum()} of {len(here)} blocks VALID", problems))
    counts = f"{valid.sum()} of {len(points)} planned trials are VALID"
    counts += "".join(f", {found.sum()} {kind}" for kind, found in others.items() if found.any()) + "."
    counts += " An INVALID point never enters a ratio." if invalid.any() else ""
    return Findings(counts, troubles, _caveats(points[complete]))


def _problems(row: Row, detail: TrialDetail | None, several: bool) -> list[Problem]:
    block = f"block {row['repeat'] + 1}{' of ' + row['run_id'] if several else ''}"
    if row["state"] == "failed":
        failure = detail.failure if detail else None
        if failure is None:
            return [Problem(block, "FAILED", "see failure.json")]
        log = f" (log: {failure.log})" if failure.log else ""
        what = {"service": " (the service never came up)", "trial": " (the measurement failed)"}
        return [Problem(block, f"FAILED{what.get(failure.stage, '')}", failure.error.strip() + log)]
    sentences = _MEANINGS | dict(detail.invalid_details if detail else {})
    codes = load.codes([row["invalid_reasons"]])
    problems = [Problem(block, f"INVALID {code}", sentences.get(code, "")) for code in codes]
    return problems or [Problem(block, "INVALID", "no reason was recorded")]


def _caveats(complete: pd.DataFrame) -> list[str]:
    """Notes in words, with how many of the complete trials each is about."""
    found = Counter(code for notes in complete.notes for code in load.codes([notes]))
    found["coordinated_omission"] = int((complete.load_mode == "closed").sum())
    texts = []
    for code, count in found.items():
        about = "" if count == len(complete) else f" (in {count} of {len(complete)} complete trials)"
        kind, _, rule = code.partition(":")
        text = NOTES.get(code, code.replace("_", " "))
        if kind == "unchecked":
            text = f"Not checked, which is not passed: {rule} ({_MEANINGS.get(rule, 'unknown rule')})."
        texts += [f"{text[0].upper()}{text[1:].removesuffix('.')}.{about}"] if count else []
    return texts


@dataclass(frozen=True)
class DifferenceGroup:
    """The differences that the comparisons called `labels` have in common, by where they were found (its title)."""

    labels: Sequence[str]
    num_unallowed: int
    parts: Sequence[tuple[str, Sequence[Difference]]]


def grouped_differences(comparisons: Sequence[Comparison]) -> list[DifferenceGroup]:
    """Comparisons of one run mostly differ in the same flags: each set of differences is shown once."""
    groups: dict[tuple[Difference, ...], list[str]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.differences, []).append(comparison.label)
    return [
        DifferenceGroup(
            labels,
            sum(not difference.allowed for difference in differences),
            [
                (title, [difference for difference in differences if difference.where == where])
                for where, title in WHERE.items()
                if any(difference.where == where for difference in differences)
            ],
        )
        for differences, labels in groups.items()
    ]


def provenance(
    comparisons: Sequence[Comparison], record: RunRecord, services: Mapping[str, Effective]
) -> list[tuple[str, str]]:
    provenance = record.provenance
    program = "analysis" if "imported" in provenance else "orchestrator"
    git, host = provenance.get("git") or {}, provenance.get("host") or {}
    dirty = (
        "" if git.get("dirty") is False else " with uncommitted changes" if git.get("dirty") else " (changes unknown)"
    )
    runs = dict.fromkeys(run for one in comparisons for run in (one.baseline_run, one.candidate_run))
    rows = [
        ("Run", record.run_id),
        ("Compared directories", ", ".join(runs) if len(runs) > 1 else None),
        ("Status", record.status),
        ("Started", _time(record.started_at)),
        ("Finished", _time(record.finished_at)),
        ("Command", shlex.join(["python", "-m", program, *record.command])),
        ("Seed", record.seed),
        ("Orchestrator commit", f"{git['commit']}{dirty}" if git.get("commit") else None),
        ("Client host", _versions(host)),
        ("Client packages", _versions({"python": provenance.get("python"), **(provenance.get("packages") or {})})),
    ]
    facts: dict[tuple[str, str], list[str]] = {}  # what all arms share is said once
    for arm, service in services.items():
        for what, told in (("versions", service.versions), ("hardware", service.hardware)):
            facts.setdefault((what, _versions(told)), []).append(arm)
    rows += [(f"Service {what}, {', '.join(arms)}", text) for (what, text), arms in facts.items()]
    rows += [("Error outside any trial", error) for error in record.errors]
    return [
        (label, MISSING if value in (None, "") else str(value)) for label, value in rows if value or label == "Seed"
    ]


def _versions(values: Mapping[str, object]) -> str:
    """Flat values only: what Ray calls its resources is neither for people nor the same twice."""
    flat = {name: value for name, value in values.items() if value not in (None, []) and not isinstance(value, dict)}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in flat.items())


# ---- HTML ----


def _bar(cell: Cell, span: float, margin: float) -> dict[str, float] | None:
    """Positions in per cent on a log axis whose middle is a ratio of 1; what lies beyond `span` is cut at the edge."""
    if is_missing(cell.ratio) or is_missing(cell.ci_low_ratio) or is_missing(cell.ci_high_ratio):
        return None
    ratios = {"low": cell.ci_low_ratio, "point": cell.ratio, "high": cell.ci_high_ratio}
    ratios |= {"margin_low": 1 / (1 + margin), "margin_high": 1 + margin}
    return {
        name: round(50 + 48 * max(-1.0, min(1.0, math.log(max(value or 0, 1e-9)) / span)), 2)
        for name, value in ratios.items()
    }


def _span(cells: Iterable[Cell], margin: float) -> float:
    """Half the axis: holds every estimate, but not every bound, for one of two blocks would flatten all others."""
    effects = [abs(math.log(cell.ratio)) for cell in cells if cell.ratio is not None and not is_missing(cell.ratio)]
    return max([2.5 * math.log(1 + margin), *(1.3 * effect for effect in effects)])


def _breakable(text: str) -> Markup:
    """A long key may break after _ . / and, not in the middle of a word; copied, it is still the key."""
    return Markup("<wbr>").join(re.split(r"(?<=[_./,=])", text))


def render(name: str, filters: Mapping[str, Callable[..., object]], **values: Any) -> str:
    """A template of this directory, with the ways of `wording` to write a figure."""
    html = name.endswith(".html.jinja")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "metric": heading,
        "level": lambda name: Level.parse(name).text,
        "judged": judged,
        **filters,
    }
    return environment.get_template(name).render(signs=SIGNS, **values)


def render_html(
    comparisons: Sequence[Comparison],
    record: RunRecord,
    points: pd.DataFrame,
    figures: Mapping[str, tuple[str, bytes]],
    details: Sequence[TrialDetail] = (),
    services: Mapping[str, Effective] | None = None,
) -> str:
    """One HTML file that needs nothing else: no script, no request.

    `points`: as in `load.RunData`. `figures`: name -> (caption, SVG), which as an image stays sharp and cannot run
    anything. `details`: of the INVALID and the failed trials. `services`: arm -> what one of its services told.
    """
    verdicts = Counter(comparison.verdict for comparison in comparisons)
    return render(
        "report.html.jinja",
        {"breakable": _breakable, "confidence": confidence_text, "ratio_texts": ratio_texts, "bar": _bar},
        comparisons=comparisons,
        tally=", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()),
        span=_span,
        # One axis for all verdicts, so that their bars can be compared by eye.
        verdicts_span=max((_span([one.primary], one.margin) for one in comparisons if one.primary), default=1.0),
        figures=[
            {
                "id": re.sub(r"[^A-Za-z0-9_-]+", "-", name),
                "caption": caption,
                "uri": f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}",
            }
            for name, (caption, svg) in figures.items()
        ],
        differences=grouped_differences(comparisons),
        findings=findings(points, details),
        provenance=provenance(comparisons, record, services or {}),
        run_id=record.run_id,
        status=record.status,
    )


# ---- The files of a run ----


def points_of(runs: Iterable[RunData]) -> pd.DataFrame:
    return pd.concat([run.points for run in runs], ignore_index=True)


def trial_details(run: RunData) -> list[TrialDetail]:
    """Of the INVALID and the failed trials. Raises LoadError for a record that cannot be read."""
    found = []
    for row in load.records(run.points):
        arm, trial_id, run_dir = row["arm"], row["trial_id"], str(run.paths.root)
        if row["state"] == "complete" and not row["valid"]:
            sentences = load.trial(run, row).invalid_details
            found.append(TrialDetail(arm, trial_id, run_dir, invalid_details=sentences))
        elif row["state"] == "failed" and (failure := load.failure(run, row)) is not None:
            found.append(TrialDetail(arm, trial_id, run_dir, failure=failure))
    return found


def write(
    run: RunData, floor: RunData | None = None, more: Sequence[RunData] = (), allow_diff: Sequence[str] = ()
) -> list[Comparison]:
    """Compare the arms of a run; write comparison.csv, plots/ and, last, report.html.

    Raises IncomparableError, LoadError.
    """
    from analysis import frames, plots  # matplotlib takes a second, which a gate need not wait for

    comparisons = compare.compare_run(run, floor, more, allow_diff, record=True)
    table, requests = cells.cells_frame(comparisons), frames.all_requests(run)
    drawn = plots.all_figures(
        frames.arm_points(run, requests),
        table,
        frames.gain_by_slo(run),
        frames.distribution(requests),
        load.over_time(requests),
        frames.peak(comparisons),
        slo_p99_ms=frames.slo_p99_ms(run),
        margin=comparisons[0].margin if comparisons else 0.05,
    )
    plots.save(drawn, run.paths.plots_dir)
    # The title is drawn into the picture, so it is what the picture is called for who cannot see it.
    figures = {
        name: (" ".join(figure.texts[0].get_text().split()), (run.paths.plots_dir / f"{name}.svg").read_bytes())
        for name, figure in drawn.items()
    }
    services = {arm: service for arm in run.arms if (service := ArmData(run, arm).effective(0))}
    runs = [run, *more]
    details = [record for one in runs for record in trial_details(one)]
    html = render_html(comparisons, run.record, points_of(runs), figures, details, services)
    table.to_csv(run.paths.comparison_csv, index=False)
    partial = run.paths.report_html.with_suffix(".html.partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(run.paths.report_html)
    return comparisons

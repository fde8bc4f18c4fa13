"""Which arm is faster, by how much, and may that be said at all? Points in, verdicts out.

What is compared, the primary cell and the error that a verdict may have were fixed in run.json before the first
service came up. The primary cells of a run are one Holm family, its secondary cells another; everything else is
described, not judged. Nothing here looks at a figure before the arms are known to be comparable.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import differences, load, looks, stats
from analysis.differences import Difference
from analysis.load import Run
from analysis.wording import effect_text, level_text, metric_text

# Metric -> whether more is better, in the order of the tables.
METRICS = {
    "throughput_rps": True,
    "goodput_rps": True,
    "input_throughput_tok_per_s": True,
    "output_throughput_tok_per_s": True,
    "latency_mean_ms": False,
    "latency_p50_ms": False,
    "latency_p99_ms": False,
    "ttft_mean_ms": False,
    "ttft_p50_ms": False,
    "ttft_p99_ms": False,
    "tpot_mean_ms": False,
    "tpot_p50_ms": False,
    "tpot_p99_ms": False,
}
THROUGHPUT, AT_PRIMARY_LEVEL = "throughput_rps", ("latency_p50_ms", "latency_p99_ms")
PRIMARY, SECONDARY, DESCRIPTIVE = "primary", "secondary", "descriptive"
MIN_FLOOR_BLOCKS = 5
_SPENT = "the looks that were declared (compare.max_looks) are spent; start a new run, which is judged on its own"


class IncomparableError(ValueError):
    """These arms must not be put side by side; says why, and what would let them be."""


@dataclass(frozen=True)
class Cell:
    """One figure of two arms at one level. `ratio` > 1 is better, whatever the metric; None = cannot be said."""

    metric: str
    level: str
    concurrency: int | None
    offered_rps: float | None
    axes: str
    baseline: str
    candidate: str
    baseline_value: float | None
    candidate_value: float | None
    ratio: float | None
    ci_low_ratio: float | None
    ci_high_ratio: float | None
    confidence: float | None
    num_blocks: int
    num_planned: int
    family: str
    verdict: str | None
    reason: str
    floor_ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """Two arms compared. `primary` is the first of `cells`; `summary` the sentence to repeat."""

    baseline: str
    candidate: str
    baseline_run: str
    candidate_run: str
    axes: str
    treatment: str
    margin: float
    look: int
    primary: Cell | None
    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    summary: str
    workload: str = ""  # of the candidate


@dataclass(frozen=True, eq=False)
class Pair:
    """Two arms, each in one run or in several that add blocks to each other."""

    baselines: tuple[tuple[Run, str], ...]
    candidates: tuple[tuple[Run, str], ...]
    axes: str
    level: str  # of the primary cell
    declared: bool  # compared as run.json said before the run

    @property
    def interleaved(self) -> bool:
        """Whether each block holds both arms, so that what drifts hits both."""
        return {run.paths.root for run, _ in self.baselines} == {run.paths.root for run, _ in self.candidates}

    @property
    def runs(self) -> list[Run]:
        return list({run.paths.root: run for run, _ in [*self.baselines, *self.candidates]}.values())

    @property
    def names(self) -> tuple[str, str]:
        return self.baselines[0][1], self.candidates[0][1]

    @property
    def num_planned(self) -> int:
        return min(sum(_declared(run)["repeats"] for run, _ in side) for side in (self.baselines, self.candidates))

    @property
    def may_grow(self) -> bool:
        """Whether further blocks may be added; else they are those of a new run."""
        return bool(_declared(self.runs[0])["max_looks"] > 1)

    @property
    def treatment(self) -> list[str]:
        """What every run of the pair declared as compared. A run of one arm could declare nothing."""
        declared = [_declared(run)["treatment"] for run in self.runs]
        shared = [axis for axis in declared[0] if all(axis in each for each in declared)]
        return shared or ([] if self.interleaved else ["profile"])


@dataclass(eq=False)
class _Draft:
    """A cell before its family is known. `blocked`: why there can be no verdict, whatever the figures say."""

    cell: Cell
    effect: stats.Effect | None
    blocked: str
    floor: stats.Effect | None  # of the A/A run, for the same figure
    may_grow: bool  # whether blocks may be added to this run


def compare_run(
    run: Run,
    floor: Run | None = None,
    more: Sequence[Run] = (),
    allow_diff: Sequence[str] = (),
    record: bool = False,
) -> list[Comparison]:
    """Every comparison that the run declared; one that must be refused has no verdict, and says why.

    `more`: runs that add blocks. Raises IncomparableError if all are refused, LoadError.
    """
    pairs = declared_pairs(run, more)
    return compare_pairs(pairs, pairs, _declared(run)["margin"], floor, allow_diff, record, keep_refused=True)


def declared_pairs(run: Run, more: Sequence[Run] = ()) -> list[Pair]:
    """As fixed in run.json before the first service came up.

    Raises LoadError if `more` lack an arm or hold a run twice, IncomparableError if they declared something else.
    """
    runs = [run, *more]
    if len({(each.record["run_id"], each.record["started_at"]) for each in runs}) < len(runs):  # a copy is the same run
        raise load.LoadError("a run cannot add blocks to itself: " + ", ".join(str(each.paths.root) for each in runs))
    if more and not any(cell.get("candidate") for cell in run.record["primary_cells"]):
        raise IncomparableError(f"{run.paths.root} declares no comparison that blocks could be added to")
    for each in more:
        for name in ("treatment", "margin", "max_looks", "redeploy"):
            if _declared(each)[name] != _declared(run)[name]:
                raise IncomparableError(
                    f"{each.paths.root} declared compare.{name}={_declared(each)[name]}, {run.paths.root} "
                    f"{_declared(run)[name]}: their blocks cannot be judged together"
                )
    pairs = []
    for cell in run.record["primary_cells"]:
        if cell.get("candidate") is None:
            continue
        for each in runs:
            if lacking := {cell["baseline"], cell["candidate"]} - set(each.arms):
                raise load.LoadError(
                    f"{each.paths.root} has no arm {', '.join(lacking)}; it has {', '.join(each.arms)}"
                )
        axes = ", ".join(f"{axis}={value}" for axis, value in cell["axes"].items())
        sides = [tuple((each, cell[side]) for each in runs) for side in ("baseline", "candidate")]
        pairs.append(Pair(sides[0], sides[1], axes, cell["level"], declared=True))
    return pairs


def pair_of(baseline: tuple[Run, str], candidate: tuple[Run, str], more: Sequence[Run] = ()) -> tuple[Pair, list[Pair]]:
    """The pair of these arms, and the pairs that are judged together with it.

    Raises IncomparableError where there is nothing to compare: no shared level, or the same arm twice.
    """
    if same_run := baseline[0].paths.root == candidate[0].paths.root:
        if baseline[1] == candidate[1]:
            raise IncomparableError(f"{baseline[1]} cannot be compared with itself; an A/A run has a second arm of it")
        pairs = declared_pairs(baseline[0], more)
        for pair in pairs:
            if pair.names == (baseline[1], candidate[1]):
                return pair, pairs
    elif more:
        raise IncomparableError("--add needs both arms in one run: blocks of different runs cannot be matched")
    shared = set(_levels(*baseline)) & set(_levels(*candidate))
    if not shared:
        sides = "; ".join(f"{arm}: {', '.join(_levels(run, arm))}" for run, arm in (baseline, candidate))
        raise IncomparableError(f"the arms share no level: {sides}")
    baselines, candidates = (
        tuple((run, side[1]) for run in ([side[0], *more] if same_run else [side[0]])) for side in (baseline, candidate)
    )
    pair = Pair(baselines, candidates, "", max(shared, key=load.level_order), declared=False)
    return pair, [pair]


def compare_pairs(
    pairs: Sequence[Pair],
    family: Sequence[Pair],
    margin: float,
    floor: Run | None = None,
    allow_diff: Sequence[str] = (),
    record: bool = False,
    keep_refused: bool = False,
) -> list[Comparison]:
    """Compare `pairs`, judged as members of `family`, which holds them. `margin`: 0.05 = 5 %.

    `record`: note the look, which whoever acts on the verdict must do. Raises LoadError, and IncomparableError for
    arms that differ in more than the treatment, unless `allow_diff` names those keys or their beginnings; with
    `keep_refused` only if that is so of all pairs.
    """
    if not pairs:
        return []
    checked = _check_all(pairs, allow_diff, keep_refused)
    floors = _floors(floor, pairs)
    drafts = {pair: _drafts(pair, floors.get(pair, {})) for pair in family}
    for pair, (_, _, refusal) in checked.items():
        for draft in drafts[pair]:
            draft.blocked = refusal or draft.blocked
    look = _look(family, drafts)
    everything = [draft for each in drafts.values() for draft in each]
    if look.alpha is None:
        for draft in everything:
            draft.blocked = draft.blocked or _SPENT
    next_alpha = looks.after(look, _declared(pairs[0].runs[0])["max_looks"])
    judged = _judge(everything, margin, look.alpha or stats.ALPHA, next_alpha)
    if record and any(not draft.blocked and draft.cell.family != DESCRIPTIVE for draft in everything):
        looks.record(pairs[0].runs, look)
    return [
        _comparison(pair, [judged[id(draft)] for draft in drafts[pair]], checked[pair], margin, look) for pair in pairs
    ]


def _comparison(
    pair: Pair, cells: list[Cell], checked: tuple[list[Difference], list[str], str], margin: float, look: looks.Look
) -> Comparison:
    cells.sort(key=lambda cell: (PRIMARY, SECONDARY, DESCRIPTIVE).index(cell.family))
    found, warnings, _ = checked
    warnings = [*warnings, *_bunched(pair)]
    primary = next((cell for cell in cells if cell.family == PRIMARY), None)
    if primary and primary.ratio is not None and primary.num_blocks < primary.num_planned:
        missing = f"{primary.num_planned - primary.num_blocks} of {primary.num_planned}"
        why = "not run yet" if any(run.in_progress for run in pair.runs) else "failed or INVALID"
        again = "; ".join(f"python -m orchestrator resume={run.paths.root}" for run in pair.runs)
        warnings = [*warnings, f"{missing} blocks are missing at the primary level: {why} ({again})"]
    if margin != _declared(pair.runs[0])["margin"]:
        warnings = [*warnings, f"the margin is not the declared one ({_declared(pair.runs[0])['margin']:g})"]
    return Comparison(
        baseline=pair.names[0],
        candidate=pair.names[1],
        baseline_run=", ".join(str(run.paths.root) for run, _ in pair.baselines),
        candidate_run=", ".join(str(run.paths.root) for run, _ in pair.candidates),
        axes=pair.axes,
        treatment=", ".join(pair.treatment) or "none (the same arm twice)",
        margin=margin,
        look=look.look,
        primary=primary,
        cells=tuple(cells),
        differences=tuple(found),
        warnings=tuple(warnings),
        summary=_summary(pair, cells, primary, margin),
        workload=str(_rows(*pair.candidates[0]).workload.iloc[0]),
    )


def _look(family: Sequence[Pair], drafts: Mapping[Pair, Sequence["_Draft"]]) -> looks.Look:
    """What is judged together is looked at together."""
    points = pd.concat([_rows(run, arm) for pair in family for run, arm in [*pair.baselines, *pair.candidates]])
    points = points[points.valid == True].drop_duplicates(["run_id", "arm", "trial_id"])  # noqa: E712
    primary = [draft.cell for each in drafts.values() for draft in each if draft.cell.family == PRIMARY]
    return looks.take(
        family[0].runs,
        points,
        sum(cell.num_blocks for cell in primary),
        sum(cell.num_planned for cell in primary),
        _declared(family[0].runs[0])["max_looks"],
    )


def gate(
    pair: Pair, family: Sequence[Pair], max_slowdown: float, metrics: Sequence[str], allow_diff: Sequence[str] = ()
) -> tuple[Comparison, list[tuple[Cell, str]]]:
    """Is the candidate at most `max_slowdown` slower (0.03 = 3 %) at the primary level? A cell and outcome a metric.

    "slower": the whole interval is below 1 / (1 + max_slowdown). "ok": it lies above. "inconclusive": it holds it, or
    there is none. "invalid": no block with both points VALID. Several metrics share the error (Bonferroni). Raises
    IncomparableError as `compare_pairs` does, and for a metric that was not measured. Records the look.
    """
    limit = 1 / (1 + max_slowdown)
    drafts = {draft.cell.metric: draft for draft in _drafts(pair, {}) if draft.cell.level == pair.level}
    if missing := [metric for metric in metrics if metric not in drafts]:
        found = ", ".join(drafts)
        raise IncomparableError(f"{', '.join(missing)} was not measured in both arms at {pair.level}; there is {found}")
    look = _look(family, {each: _drafts(each, {}) for each in family})
    [comparison] = compare_pairs([pair], family, _declared(pair.runs[0])["margin"], None, allow_diff, record=True)
    outcomes = []
    for metric in dict.fromkeys(metrics):
        draft = drafts[metric]
        level = (look.alpha or stats.ALPHA) / len(set(metrics))
        effect = draft.effect and stats.at_alpha(draft.effect, level)
        cell, reason = _with_effect(draft.cell, effect), draft.blocked or ("" if look.alpha else _SPENT)
        outcome = _outcome(cell, reason, limit)
        if outcome == "inconclusive" and not reason and effect is not None:
            reason = _further(stats.blocks_to_settle(effect, max_slowdown, level), cell.num_blocks, pair.may_grow)
        outcomes.append((dataclasses.replace(cell, reason=reason), outcome))
    return comparison, outcomes


def _outcome(cell: Cell, blocked: str, limit: float) -> str:
    if cell.num_blocks == 0:
        return "invalid"
    if blocked or cell.ci_low_ratio is None or cell.ci_high_ratio is None:
        return "inconclusive"
    if cell.ci_high_ratio < limit:
        return "slower"
    return "ok" if cell.ci_low_ratio > limit else "inconclusive"


# ---- May they be compared? ----


def _check_all(
    pairs: Sequence[Pair], allow_diff: Sequence[str], keep_refused: bool
) -> dict[Pair, tuple[list[Difference], list[str], str]]:
    """Differences, warnings, and why it is refused ("" if it is not), of each pair.

    Every request of every arm is read once and checked against its record. Raises IncomparableError, LoadError.
    """
    sides = {(run.paths.root, arm): (run, arm) for pair in pairs for run, arm in [*pair.baselines, *pair.candidates]}
    broken: dict[tuple[Any, str], str] = {}
    for key, (run, arm) in sides.items():
        try:
            load.verify(run, arm)
        except load.LoadError as error:
            if not keep_refused:
                raise
            broken[key] = str(error)
    checked, errors = {}, []
    for pair in pairs:
        found = _differences(pair)
        both = [(run.paths.root, arm) for run, arm in [*pair.baselines, *pair.candidates]]
        refusal = next((broken[key] for key in both if key in broken), "") or _refusal(pair, found, allow_diff)
        if refusal:
            errors.append(refusal)
        checked[pair] = found, [*_warnings(pair, found), *([refusal] if refusal else [])], refusal.split("\n")[0]
    if errors and not (keep_refused and len(errors) < len(pairs)):
        raise IncomparableError(errors[0])
    return checked


def _differences(pair: Pair) -> list[Difference]:
    """Between the arms of each run; and between runs that add blocks, where none is due."""
    found: dict[Difference, None] = {}
    for baseline in pair.baselines:
        for candidate in pair.candidates:
            if baseline[0] is candidate[0] or not pair.interleaved:
                found |= dict.fromkeys(differences.find(baseline, candidate, pair.treatment))
    for side in (pair.baselines, pair.candidates):
        for other in side[1:]:
            found |= dict.fromkeys(differences.find(side[0], other, []))
    return list(found)


def _refusal(pair: Pair, found: Sequence[Difference], allow_diff: Sequence[str]) -> str:
    refused = [each for each in found if not each.allowed and not _is_listed(each.key, allow_diff)]
    if not refused:
        return ""
    lines = [f"  {each.key}: {each.baseline} | {each.candidate}  ({each.where})" for each in refused[:10]]
    more = [f"  and {len(refused) - 10} more"] if len(refused) > 10 else []
    keys = ",".join(dict.fromkeys(each.key for each in refused))
    treatment = ", ".join(pair.treatment) or "nothing: the same arm twice"
    head = f"{' and '.join(pair.names)} differ in more than the treatment ({treatment}):"
    advice = f"Declare it as compare.treatment, or compare all the same with --allow-diff {keys}"
    return "\n".join([head, *lines, *more, advice])


def _is_listed(key: str, listed: Sequence[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in listed)


def _warnings(pair: Pair, found: Sequence[Difference]) -> list[str]:
    warnings = [warning for run in pair.runs for warning in run.warnings]
    if unlike := [each.key for each in found if not each.allowed]:
        warnings.append(f"the arms differ in more than the treatment: {', '.join(unlike)} (--allow-diff)")
    if not pair.interleaved:
        warnings.append("the arms were measured in different runs, so a drift of the machines is part of the ratio")
    elif not pair.declared:
        warnings.append("this pair was not declared before the run: a finding after the fact (post hoc)")
    for run, arm in [*pair.baselines, *pair.candidates]:
        services = [load.effective(run, arm, repeat) for repeat in load.repeats(run, arm)]
        if None in services and not load.is_imported(run):
            warnings.append(f"{arm}: not every live service was read back: whether its flags arrived is not known")
        flags = {warning: None for service in services if service for warning in service["warnings"]}
        warnings += [f"{arm}: {warning}" for warning in flags]
    return list(dict.fromkeys(warnings))


def _levels(run: Run, arm: str) -> list[str]:
    return sorted(run.points[run.points.arm == arm].level.unique(), key=load.level_order)


def _declared(run: Run) -> Mapping[str, Any]:
    """How the run said that it would be compared."""
    defaults = {"treatment": ["profile"], "margin": 0.05, "max_looks": 1, "repeats": 1, "redeploy": "per_repeat"}
    return defaults | run.record["compare"]


# ---- Figures ----


def _drafts(pair: Pair, floors: Mapping[tuple[str, str], stats.Effect]) -> list[_Draft]:
    sides = [
        pd.concat([_rows(*each) for each in side], ignore_index=True) for side in (pair.baselines, pair.candidates)
    ]
    shared = sorted(set(sides[0].level) & set(sides[1].level), key=load.level_order, reverse=True)
    drafts = []
    for level in shared:
        frames = [side[side.level == level] for side in sides]
        for metric, higher_is_better in METRICS.items():
            family = _family(metric, level, pair.level)
            if family == DESCRIPTIVE and not all(frame[metric].notna().any() for frame in frames):
                continue
            drafts.append(_draft(pair, metric, higher_is_better, level, frames, family, floors.get((metric, level))))
    return drafts


def _rows(run: Run, arm: str) -> pd.DataFrame:
    return run.points[run.points.arm == arm]


def _family(metric: str, level: str, primary_level: str) -> str:
    if metric == THROUGHPUT:
        return PRIMARY if level == primary_level else SECONDARY
    return SECONDARY if metric in AT_PRIMARY_LEVEL and level == primary_level else DESCRIPTIVE


def _draft(
    pair: Pair,
    metric: str,
    higher_is_better: bool,
    level: str,
    frames: Sequence[pd.DataFrame],
    family: str,
    floor: stats.Effect | None,
) -> _Draft:
    values = [_valid_values(frame, metric) for frame in frames]
    blocks = values[0].keys() & values[1].keys() if pair.interleaved else set()
    used = [[side[block] for block in sorted(blocks)] if pair.interleaved else list(side.values()) for side in values]
    effect = None
    if all(used) and min(min(side) for side in used) > 0:
        estimate = stats.paired_effect if pair.interleaved else stats.unpaired_effect
        effect = estimate(used[0], used[1], higher_is_better)
    num_blocks = min(len(side) for side in used)
    first = frames[0].iloc[0]
    cell = Cell(
        metric=metric,
        level=level,
        concurrency=None if pd.isna(first.concurrency) else int(first.concurrency),
        offered_rps=None if pd.isna(first.offered_rps) else float(first.offered_rps),
        axes=pair.axes,
        baseline=pair.names[0],
        candidate=pair.names[1],
        baseline_value=stats.geometric_mean_interval(used[0])[0] if effect else None,
        candidate_value=stats.geometric_mean_interval(used[1])[0] if effect else None,
        ratio=None,
        ci_low_ratio=None,
        ci_high_ratio=None,
        confidence=None,
        num_blocks=num_blocks,
        num_planned=pair.num_planned,
        family=family,
        verdict=None,
        reason="",
        floor_ratio=None,
    )
    if any(_declared(run)["redeploy"] == "never" for run in pair.runs) and effect is not None:
        # Repeats in one deployment are no replicates: their scatter says nothing of the next deployment.
        effect = stats.Effect(ratio=effect.ratio, num_blocks=effect.num_blocks)
    return _Draft(cell, effect, _blocked(pair, metric, frames, used, effect), floor, pair.may_grow)


def _valid_values(frame: pd.DataFrame, metric: str) -> dict[tuple[str, int], float]:
    """Block (run and repeat) -> value of its VALID point."""
    rows = frame[(frame.state == "complete") & (frame.valid == True) & frame[metric].notna()]  # noqa: E712 (None too)
    return {(row["run_dir"], row["repeat"]): float(row[metric]) for row in load.records(rows)}


def _bunched(pair: Pair) -> list[str]:
    """Where replies came in one piece, TPOT says nothing and TTFT is the latency."""
    told = []
    for name, sides in zip(pair.names, (pair.baselines, pair.candidates), strict=True):
        frames = [run.points[(run.points.arm == arm) & (run.points.level == pair.level)] for run, arm in sides]
        notes = [str(each) for frame in frames for each in frame.notes]
        if count := sum("bunched_tokens" in each for each in notes):
            told.append(
                f"{name}: in {count} of {len(notes)} trials at {level_text(pair.level)} over a tenth of the replies "
                "came in one piece, so TPOT says little there"
            )
    return told


def _blocked(
    pair: Pair,
    metric: str,
    frames: Sequence[pd.DataFrame],
    used: Sequence[Sequence[float]],
    effect: stats.Effect | None,
) -> str:
    """Why there can be no verdict, whatever the figures; "" if there can be one."""
    if not all(used) and any(frame[metric].isna().all() and (frame.valid == True).any() for frame in frames):  # noqa: E712
        return f"no block has a {metric_text(metric)} of both arms: too few requests"
    if not all(used):
        return "no block with both points VALID: " + "; ".join(
            f"{name} {_state(frame, metric)}" for name, frame in zip(pair.names, frames, strict=True)
        )
    if effect is None:
        return "a value of 0 has no ratio"
    if any("single_run" in str(notes) for frame in frames for notes in frame.notes):
        return "single run, no interval"
    if any(run.in_progress for run in pair.runs):
        return "the run is not complete yet; a verdict now would be one more look"
    if any(_declared(run)["redeploy"] == "never" for run in pair.runs):
        return "one deployment an arm (cluster.redeploy=never): repeats of it are no replicates"
    if not pair.interleaved:
        return "the arms were not interleaved in one run, so drift and treatment cannot be told apart"
    if not pair.declared:
        return "this pair was not declared before the run (post hoc)"
    if effect.num_blocks < 2:
        return "one block, no interval: sweep.repeats=5 gives one"
    if effect.log_se is not None and effect.log_se < 1e-9:
        return "all blocks have the same ratio: counts too small, or not measured, to tell noise"
    return ""


def _state(frame: pd.DataFrame, metric: str) -> str:
    valid = int((frame.valid == True).sum())  # noqa: E712
    text = f"{valid} of {len(frame)} VALID"
    reasons = sorted({code for row in frame.invalid_reasons.dropna() for code in row.split(";") if code})
    if failed := int((frame.state == "failed").sum()):
        reasons.append(f"{failed} failed")
    if valid and frame[metric].isna().all():
        reasons.append(f"no {metric}: too few requests")
    return f"{text} ({', '.join(reasons)})" if reasons else text


def _judge(drafts: Sequence[_Draft], margin: float, alpha: float, next_alpha: float) -> dict[int, Cell]:
    """id of each draft -> its cell with interval and verdict. `next_alpha`: what further blocks would be judged at."""
    cells = {}
    for family in (PRIMARY, SECONDARY, DESCRIPTIVE):
        members = [draft for draft in drafts if draft.cell.family == family]
        levels = [stats.ALPHA] * len(members)
        if family != DESCRIPTIVE:
            levels = stats.holm_alphas([draft.effect.p_value if draft.effect else None for draft in members], alpha)
        for draft, level in zip(members, levels, strict=True):
            effect = draft.effect and stats.at_alpha(draft.effect, level)
            cell = _with_effect(draft.cell, effect)
            if draft.floor and cell.num_blocks >= 2:
                detectable = stats.minimum_detectable_ratio(draft.floor, cell.num_blocks, level)
                cell = dataclasses.replace(cell, floor_ratio=detectable)
            if family == DESCRIPTIVE:
                cells[id(draft)] = dataclasses.replace(cell, reason=draft.blocked)
            else:
                shares = alpha / len(members), next_alpha / len(members)
                cells[id(draft)] = _verdict(cell, effect, draft, margin, *shares)
    return cells


def _with_effect(cell: Cell, effect: stats.Effect | None) -> Cell:
    if effect is None:
        return cell
    return dataclasses.replace(
        cell,
        ratio=effect.ratio,
        ci_low_ratio=effect.ci_low_ratio,
        ci_high_ratio=effect.ci_high_ratio,
        confidence=effect.confidence,
    )


def _verdict(
    cell: Cell, effect: stats.Effect | None, draft: _Draft, margin: float, alpha: float, next_alpha: float
) -> Cell:
    """`alpha`: the cell's equal share of its family's error, which EQUIVALENT is held to; likewise `next_alpha`."""
    if draft.blocked or effect is None:
        return dataclasses.replace(cell, verdict=str(stats.Verdict.INCONCLUSIVE), reason=draft.blocked)
    verdict, reason = stats.judge(effect, margin, alpha), ""
    if verdict == stats.Verdict.INCONCLUSIVE:
        reason = _further(stats.blocks_to_settle(effect, margin, next_alpha), effect.num_blocks, draft.may_grow)
    elif (
        verdict != stats.Verdict.EQUIVALENT
        and cell.floor_ratio
        and abs(math.log(effect.ratio)) < math.log(cell.floor_ratio)
    ):
        reason = (
            f"{verdict} but for the noise floor: the A/A run cannot tell less than x{cell.floor_ratio:.3g} from noise"
        )
        verdict = stats.Verdict.INCONCLUSIVE
    return dataclasses.replace(cell, verdict=str(verdict), reason=reason)


def _further(total: tuple[int, int | None], done: int, may_grow: bool) -> str:
    """In words: the range of further blocks, and where to measure them."""
    low, high = total
    if high is None:
        return f"more than {max(1, low - done)} further blocks would be needed, if any number settles it"
    few, many = max(1, low - done), max(1, high - done)
    count = f"{few} to {many} further blocks" if few < many else f"{few} further block{'s' if few > 1 else ''}"
    where = "--add another run" if may_grow else f"in a new run: sweep.repeats={done + few} to {done + many}"
    return f"about {count} would settle it ({where})"


# ---- Noise floor ----


def _floors(floor: Run | None, pairs: Sequence[Pair]) -> dict[Pair, dict[tuple[str, str], stats.Effect]]:
    """Effects of an A/A run by metric and level, for the pairs it fits.

    Raises IncomparableError if it can serve none of them.
    """
    if floor is None:
        return {}
    found, errors = {}, []
    for pair in pairs:
        try:
            found[pair] = _floor(floor, pair)
        except IncomparableError as error:
            errors.append(str(error))
    if not found:
        raise IncomparableError(errors[0])
    return found


def _floor(floor: Run, pair: Pair) -> dict[tuple[str, str], stats.Effect]:
    if floor.in_progress:
        raise IncomparableError(f"--floor {floor.paths.root} is not complete")
    twins = [
        each
        for each in declared_pairs(floor)
        if len({load.arm_record(floor, arm)["service_key"] for _, arm in (each.baselines[0], each.candidates[0])}) == 1
    ]
    if not twins:
        raise IncomparableError(f"--floor {floor.paths.root} is no A/A run: it compares no arm with itself")
    for twin in twins:
        # Whose noise it is may be either arm's, so the profile is free.
        unlike = [
            each for each in differences.find(twin.baselines[0], pair.baselines[0], ["profile"]) if not each.allowed
        ]
        if not unlike:
            break
    else:
        text = "; ".join(f"{each.key}: {each.baseline} | {each.candidate}" for each in unlike[:5])
        raise IncomparableError(f"--floor {floor.paths.root} measured something else: {text}")
    effects = {(draft.cell.metric, draft.cell.level): draft.effect for draft in _drafts(twin, {})}
    usable = {
        key: effect
        for key, effect in effects.items()
        if effect and effect.log_sd is not None and effect.num_blocks >= MIN_FLOOR_BLOCKS
    }
    if (THROUGHPUT, pair.level) not in usable:
        primary = effects.get((THROUGHPUT, pair.level))
        raise IncomparableError(
            f"--floor {floor.paths.root} has {primary.num_blocks if primary else 0} VALID blocks of throughput at "
            f"{pair.level}; an A/A run needs {MIN_FLOOR_BLOCKS} there, each freshly deployed"
        )
    return usable


# ---- In words ----


def _summary(pair: Pair, cells: Sequence[Cell], primary: Cell | None, margin: float) -> str:
    """The sentence an engineer would repeat."""
    baseline, candidate = pair.names
    if baseline == candidate:
        baseline, candidate = (
            f"{side[0][1]} of {side[0][0].paths.run_id}" for side in (pair.baselines, pair.candidates)
        )
    start = f"{pair.axes}: " if pair.axes else ""
    if primary is None or primary.ratio is None:
        why = primary.reason if primary else "no level in common"
        return f"{start}{candidate} against {baseline} is INCONCLUSIVE: {why}.{_fallback(cells)}"
    how = _throughput(primary)
    if primary.verdict == "INCONCLUSIVE":
        return f"{start}{candidate} against {baseline} is INCONCLUSIVE: {how}; {primary.reason}."
    if primary.verdict == "EQUIVALENT":
        return f"{start}{candidate} is EQUIVALENT to {baseline} within {100 * margin:.3g} %: {how}."
    return f"{start}{candidate} is {primary.verdict} than {baseline}: {how}."


def _fallback(cells: Sequence[Cell]) -> str:
    """The highest level that has a ratio, when the primary has none: after the fact, so no verdict."""
    known = [cell for cell in cells if cell.metric == THROUGHPUT and cell.ratio is not None]
    return f" Post hoc: {_throughput(max(known, key=lambda cell: load.level_order(cell.level)))}." if known else ""


def _throughput(cell: Cell) -> str:
    of = f" of {cell.num_planned}" if cell.num_blocks < cell.num_planned else ""
    blocks = f"{cell.num_blocks}{of} block{'s' if (cell.num_planned if of else cell.num_blocks) != 1 else ''}"
    return f"{effect_text(cell)} the throughput at {level_text(cell.level)}, {blocks}"


def compare_runs(runs: Sequence[Run]) -> list[Comparison]:
    """All that these runs declared; runs of one arm, such as imported results, in pairs: baseline, candidate."""
    found = [comparison for run in runs for comparison in compare_run(run)]
    singles = [(run, run.arms[0]) for run in runs if len(run.arms) == 1]
    for baseline, candidate in zip(singles[::2], singles[1::2], strict=False):
        pair, family = pair_of(baseline, candidate)
        found += compare_pairs([pair], family, _declared(baseline[0])["margin"])
    return found


def cells_frame(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """One row a cell."""
    cells = [dataclasses.asdict(cell) for comparison in comparisons for cell in comparison.cells]
    return pd.DataFrame(cells, columns=[field.name for field in dataclasses.fields(Cell)])

"""Which arm is faster, by how much, and may that be said at all? Points in, verdicts out.

What is compared, the primary cell and the error that a verdict may have were fixed in run.json before the first
service came up. The primary cells of a run are one Holm family, its secondary cells another; everything else is
described, not judged. Nothing here looks at a figure before the arms are known to be comparable.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pandas as pd

from analysis import differences, load, looks, stats
from analysis.differences import Difference
from analysis.load import Arm, LoadError, Run
from analysis.wording import effect_text, level_text, metric_text

# In the order of the tables. Of a time (`_ms`) less is better.
METRICS = (
    *("throughput_rps", "goodput_rps", "input_throughput_tok_per_s", "output_throughput_tok_per_s"),
    *(f"{time}_{figure}_ms" for time in ("latency", "ttft", "tpot") for figure in ("mean", "p50", "p99")),
)
THROUGHPUT, AT_PRIMARY_LEVEL = "throughput_rps", ("latency_p50_ms", "latency_p99_ms")
FAMILIES = PRIMARY, SECONDARY, DESCRIPTIVE = "primary", "secondary", "descriptive"
INCONCLUSIVE = str(stats.Verdict.INCONCLUSIVE)
MIN_FLOOR_BLOCKS = 5
_SPENT = "the looks that were declared (compare.max_looks) are spent; start a new run, which is judged on its own"

_NONE_YET = (
    "the error is spent in proportion to the VALID blocks at the primary level, and there is none: resume the run"
)


class IncomparableError(ValueError):
    """These arms must not be put side by side; says why, and what would let them be."""


@dataclass(frozen=True, kw_only=True)
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
    ratio: float | None = None
    ci_low_ratio: float | None = None
    ci_high_ratio: float | None = None
    confidence: float | None = None
    num_blocks: int
    num_planned: int
    family: str
    verdict: str | None = None
    reason: str = ""
    floor_ratio: float | None = None


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

    @property
    def verdict(self) -> str:
        return (self.primary.verdict if self.primary else None) or "NO VERDICT"

    @property
    def label(self) -> str:
        return f"{self.candidate} against {self.baseline}" + (f" ({self.axes})" if self.axes else "")

    def family(self, *names: str) -> list[Cell]:
        return [cell for name in names for cell in self.cells if cell.family == name]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two arms, each in one run or in several that add blocks to each other."""

    baselines: tuple[Arm, ...]
    candidates: tuple[Arm, ...]
    axes: str
    level: str  # of the primary cell
    declared: bool  # compared as run.json said before the run

    @property
    def interleaved(self) -> bool:
        """Whether each block holds both arms, so that what drifts hits both."""
        return {arm.run.paths.root for arm in self.baselines} == {arm.run.paths.root for arm in self.candidates}

    @property
    def arms(self) -> list[Arm]:
        return [*self.baselines, *self.candidates]

    @property
    def runs(self) -> list[Run]:
        return list({arm.run.paths.root: arm.run for arm in self.arms}.values())

    @property
    def names(self) -> tuple[str, str]:
        return self.baselines[0].name, self.candidates[0].name

    @property
    def declaration(self) -> Mapping[str, Any]:
        """Margin and looks are those of the first run; runs that add blocks declared the same."""
        return self.runs[0].declared

    @property
    def treatment(self) -> list[str]:
        """What every run of the pair declared as compared. A run of one arm could declare nothing."""
        declared = [run.declared["treatment"] for run in self.runs]
        shared = [axis for axis in declared[0] if all(axis in each for each in declared)]
        return shared or ([] if self.interleaved else ["profile"])


@dataclass(eq=False)
class _Draft:
    """A cell and what it is judged by. `blocked`: why there can be no verdict, whatever the figures say."""

    pair: Pair
    cell: Cell
    effect: stats.Effect | None
    blocked: str
    floor: stats.Effect | None  # of the A/A run, for the same figure


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
    return compare_pairs(pairs, pairs, run.declared["margin"], floor, allow_diff, record)


def compare_runs(runs: Sequence[Run]) -> list[Comparison]:
    """All that these runs declared; runs of one arm, such as imported results, in pairs: baseline, candidate."""
    found = [comparison for run in runs for comparison in compare_run(run)]
    singles = [Arm(run, run.arms[0]) for run in runs if len(run.arms) == 1]
    for baseline, candidate in zip(singles[::2], singles[1::2], strict=False):
        pair, family = pair_of(baseline, candidate)
        found += compare_pairs([pair], family, pair.declaration["margin"])
    return found


def declared_pairs(run: Run, more: Sequence[Run] = ()) -> list[Pair]:
    """As fixed in run.json before the first service came up.

    Raises LoadError if `more` lack an arm or hold a run twice, IncomparableError if they declared something else.
    """
    runs = [run, *more]
    cells = [cell for cell in run.record["primary_cells"] if cell.get("candidate") is not None]
    if len({(each.record["run_id"], each.record["started_at"]) for each in runs}) < len(runs):  # a copy is the same run
        raise LoadError("a run cannot add blocks to itself: " + ", ".join(str(each.paths.root) for each in runs))
    if more and not cells:
        raise IncomparableError(f"{run.paths.root} declares no comparison that blocks could be added to")
    for each in more:
        for name in ("treatment", "margin", "max_looks", "redeploy"):
            if each.declared[name] != run.declared[name]:
                raise IncomparableError(
                    f"{each.paths.root} declared compare.{name}={each.declared[name]}, {run.paths.root} "
                    f"{run.declared[name]}: their blocks cannot be judged together"
                )
        if lacking := {cell[side] for cell in cells for side in ("baseline", "candidate")} - set(each.arms):
            raise LoadError(f"{each.paths.root} has no arm {', '.join(lacking)}; it has {', '.join(each.arms)}")
    pairs = []
    for cell in cells:
        axes = ", ".join(f"{axis}={value}" for axis, value in cell["axes"].items())
        sides = [tuple(Arm(each, cell[side]) for each in runs) for side in ("baseline", "candidate")]
        pairs.append(Pair(sides[0], sides[1], axes, cell["level"], declared=True))
    return pairs


def pair_of(baseline: Arm, candidate: Arm, more: Sequence[Run] = ()) -> tuple[Pair, list[Pair]]:
    """The pair of these arms, and the pairs that are judged together with it.

    Raises IncomparableError where there is nothing to compare: no shared level, or the same arm twice.
    """
    if baseline.run.paths.root == candidate.run.paths.root:
        if baseline.name == candidate.name:
            raise IncomparableError(
                f"{baseline.name} cannot be compared with itself; an A/A run has a second arm of it"
            )
        pairs = declared_pairs(baseline.run, more)
        for pair in pairs:
            if pair.names == (baseline.name, candidate.name):
                return pair, pairs
    elif more:
        raise IncomparableError("--add needs both arms in one run: blocks of different runs cannot be matched")
    shared = set(baseline.levels) & set(candidate.levels)
    if not shared:
        sides = "; ".join(f"{arm.name}: {', '.join(arm.levels)}" for arm in (baseline, candidate))
        raise IncomparableError(f"the arms share no level: {sides}")
    pair = Pair(
        (baseline, *(Arm(run, baseline.name) for run in more)),
        (candidate, *(Arm(run, candidate.name) for run in more)),
        axes="",
        level=max(shared, key=load.level_order),
        declared=False,
    )
    return pair, [pair]


def compare_pairs(
    pairs: Sequence[Pair],
    family: Sequence[Pair],
    margin: float,
    floor: Run | None = None,
    allow_diff: Sequence[str] = (),
    record: bool = False,
) -> list[Comparison]:
    """Compare `pairs`, judged as members of `family`, which holds them. `margin`: 0.05 = 5 %.

    `record`: note the look, which whoever acts on the verdict must do. A pair is refused if its requests are not what
    its records say, or if its arms differ in more than the treatment, unless `allow_diff` names those keys or their
    beginnings. Raises IncomparableError if all are refused, LoadError.
    """
    if not pairs:
        return []
    checked = _check(pairs, allow_diff)
    floors = _floors(floor, pairs)
    drafts = {pair: _drafts(pair, floors.get(pair, {})) for pair in family}
    everything = [draft for each in drafts.values() for draft in each]
    look = _look(family, everything)
    for draft in everything:
        refusal = checked[draft.pair][2] if draft.pair in checked else ""
        draft.blocked = refusal or draft.blocked or _unjudged(look)
    next_alpha = looks.after(look, pairs[0].declaration["max_looks"])
    _judge(everything, margin, look.alpha or stats.ALPHA, next_alpha)
    if record and any(not draft.blocked and draft.cell.family != DESCRIPTIVE for draft in everything):
        looks.record(pairs[0].runs, look)
    found = []
    for pair in pairs:
        cells = sorted((draft.cell for draft in drafts[pair]), key=lambda cell: FAMILIES.index(cell.family))
        primary = cells[0] if cells and cells[0].family == PRIMARY else None
        unlike, warnings, _ = checked[pair]
        found.append(
            Comparison(
                baseline=pair.names[0],
                candidate=pair.names[1],
                baseline_run=", ".join(str(arm.run.paths.root) for arm in pair.baselines),
                candidate_run=", ".join(str(arm.run.paths.root) for arm in pair.candidates),
                axes=pair.axes,
                treatment=", ".join(pair.treatment) or "none (the same arm twice)",
                margin=margin,
                look=look.look,
                primary=primary,
                cells=tuple(cells),
                differences=tuple(unlike),
                warnings=(*warnings, *_bunched(pair), *_distant(pair), *_shortfalls(pair, primary, margin)),
                summary=_summary(pair, cells, primary, margin),
                workload=str(pair.candidates[0].points.workload.iloc[0]),
            )
        )
    return found


def _look(family: Sequence[Pair], drafts: Sequence[_Draft]) -> looks.Look:
    """What is judged together is looked at together."""
    points = pd.concat([arm.points for pair in family for arm in pair.arms])
    points = points[points.valid.eq(True)].drop_duplicates(["run_id", "arm", "trial_id"])
    primary = [draft.cell for draft in drafts if draft.cell.family == PRIMARY]
    num_blocks, num_planned = (sum(getattr(cell, name) for cell in primary) for name in ("num_blocks", "num_planned"))
    return looks.take(family[0].runs, points, num_blocks, num_planned, family[0].declaration["max_looks"])


def _unjudged(look: looks.Look) -> str:
    """Why nothing may be judged at this look; empty if it may."""
    return "" if look.alpha else _SPENT if look.num_blocks else _NONE_YET


def gate(
    pair: Pair, family: Sequence[Pair], max_slowdown: float, metrics: Sequence[str], allow_diff: Sequence[str] = ()
) -> tuple[Comparison, list[tuple[Cell, str]]]:
    """Is the candidate at most `max_slowdown` slower (0.03 = 3 %) at the primary level? A cell and outcome a metric.

    "slower": the whole interval is below 1 / (1 + max_slowdown). "ok": it lies above. "inconclusive": it holds it, or
    there is none. "invalid": no block with both points VALID. Several metrics share the error (Bonferroni). Raises
    IncomparableError as `compare_pairs` does, and for a metric that was not measured. Records the look.
    """
    limit = 1 / (1 + max_slowdown)
    everything = [draft for each in family for draft in _drafts(each)]
    drafts = {each.cell.metric: each for each in everything if each.pair is pair and each.cell.level == pair.level}
    if missing := [metric for metric in metrics if metric not in drafts]:
        found = ", ".join(drafts)
        raise IncomparableError(f"{', '.join(missing)} was not measured in both arms at {pair.level}; there is {found}")
    look = _look(family, everything)
    [comparison] = compare_pairs([pair], family, pair.declaration["margin"], None, allow_diff, record=True)
    outcomes = []
    for metric in dict.fromkeys(metrics):
        draft = drafts[metric]
        level = (look.alpha or stats.ALPHA) / len(set(metrics))
        effect = draft.effect and stats.at_alpha(draft.effect, level)
        cell, reason = _with_effect(draft.cell, effect), draft.blocked or _unjudged(look)
        outcome = "inconclusive"
        if cell.num_blocks == 0:
            outcome = "invalid"
        elif not reason and cell.ci_high_ratio is not None and cell.ci_high_ratio < limit:
            outcome = "slower"
        elif not reason and cell.ci_low_ratio is not None and cell.ci_low_ratio > limit:
            outcome = "ok"
        elif not reason and effect is not None:
            reason = _further(stats.blocks_to_settle(effect, max_slowdown, level), pair, cell.num_blocks)
        outcomes.append((replace(cell, reason=reason), outcome))
    return comparison, outcomes


# ---- May they be compared? ----


def _check(pairs: Sequence[Pair], allow_diff: Sequence[str]) -> dict[Pair, tuple[list[Difference], list[str], str]]:
    """Differences, warnings, and why it is refused ("" if it is not), of each pair.

    Every request of every arm is read once and checked against its record. Raises IncomparableError, LoadError.
    """
    broken = {}
    for arm in {arm for pair in pairs for arm in pair.arms}:
        try:
            arm.verify()
        except LoadError as error:
            broken[arm] = str(error)
    checked, errors = {}, []
    for pair in pairs:
        found = _differences(pair)
        refusal = next((broken[arm] for arm in pair.arms if arm in broken), "") or _refusal(pair, found, allow_diff)
        errors += [refusal] if refusal else []
        checked[pair] = found, _warnings(pair, found) + [refusal] * bool(refusal), refusal.split("\n")[0]
    if len(errors) == len(pairs):
        raise IncomparableError(errors[0])
    return checked


def _differences(pair: Pair) -> list[Difference]:
    """Between the arms of each run; and between runs that add blocks, where none is due."""
    found = []
    for baseline, candidate in zip(pair.baselines, pair.candidates, strict=True):
        found += differences.find(baseline, candidate, pair.treatment)
    for first, *others in (pair.baselines, pair.candidates):
        for other in others:
            found += differences.find(first, other, [])
    return list(dict.fromkeys(found))


def _refusal(pair: Pair, found: Sequence[Difference], allow_diff: Sequence[str]) -> str:
    refused = [each for each in found if not each.allowed and not differences.below(each.key, allow_diff)]
    if not refused:
        return ""
    lines = [f"  {each.key}: {each.baseline} | {each.candidate}  ({each.where})" for each in refused[:10]]
    more = [f"  and {len(refused) - 10} more"] if len(refused) > 10 else []
    keys = ",".join(dict.fromkeys(each.key for each in refused))
    treatment = ", ".join(pair.treatment) or "nothing: the same arm twice"
    head = f"{' and '.join(pair.names)} differ in more than the treatment ({treatment}):"
    advice = f"Declare it as compare.treatment, or compare all the same with --allow-diff {keys}"
    return "\n".join([head, *lines, *more, advice])


def _warnings(pair: Pair, found: Sequence[Difference]) -> list[str]:
    warnings = [warning for run in pair.runs for warning in run.warnings]
    if unlike := [each.key for each in found if not each.allowed]:
        warnings.append(f"the arms differ in more than the treatment: {', '.join(unlike)} (--allow-diff)")
    if not pair.interleaved:
        warnings.append("the arms were measured in different runs, so a drift of the machines is part of the ratio")
    elif not pair.declared:
        warnings.append("this pair was not declared before the run: a finding after the fact (post hoc)")
    for arm in pair.arms:
        services = arm.effectives().values()
        if None in services and not arm.run.imported:
            warnings.append(f"{arm.name}: not every live service was read back: whether its flags arrived is not known")
        warnings += [f"{arm.name}: {warning}" for each in services if each for warning in each["warnings"]]
    return list(dict.fromkeys(warnings))


def _bunched(pair: Pair) -> list[str]:
    """Where replies came in one piece, TPOT says nothing and TTFT is the latency."""
    told = []
    for name, arms in zip(pair.names, (pair.baselines, pair.candidates), strict=True):
        points = pd.concat([arm.points for arm in arms])
        notes = points[points.level == pair.level].notes
        if count := notes.str.contains("bunched_tokens", na=False).sum():
            told.append(
                f"{name}: in {count} of {len(notes)} trials at {level_text(pair.level)} over a tenth of the replies "
                "came in one piece, so TPOT says little there"
            )
    return told


def _distant(pair: Pair) -> list[str]:
    """Where the way to the service takes longer than what the arms differ by, that is most of what was measured."""
    away_ms: list[float | None] = []
    medians_ms = []
    for arms in (pair.baselines, pair.candidates):
        rows = [(arm.run, row) for arm in arms for row in load.records(arm.complete) if row["level"] == pair.level]
        away_ms += [load.trial(run, row).get("round_trip_ms") for run, row in rows]
        medians_ms.append(pd.Series([row["latency_p50_ms"] for _, row in rows], dtype=float).median())
    way_ms, differ_ms = pd.Series(away_ms, dtype=float).median(), abs(medians_ms[0] - medians_ms[1])
    if not way_ms > differ_ms:  # or one is not known
        return []
    return [
        f"the way to the service and back takes {way_ms:.3g} ms, more than the {differ_ms:.3g} ms by which "
        f"the median latencies at {level_text(pair.level)} differ: ratios are diluted by it; drive the load from nearer"
    ]


def _shortfalls(pair: Pair, primary: Cell | None, margin: float) -> list[str]:
    """What is not as it was declared: blocks, margin."""
    told = []
    if primary and primary.ratio is not None and primary.num_blocks < primary.num_planned:
        missing = f"{primary.num_planned - primary.num_blocks} of {primary.num_planned}"
        why = "not run yet" if any(run.in_progress for run in pair.runs) else "failed or INVALID"
        again = "; ".join(f"python -m orchestrator resume={run.paths.root}" for run in pair.runs)
        told.append(f"{missing} blocks are missing at the primary level: {why} ({again})")
    if margin != pair.declaration["margin"]:
        told.append(f"the margin is not the declared one ({pair.declaration['margin']:g})")
    return told


# ---- Figures ----


def _drafts(pair: Pair, floors: Mapping[tuple[str, str], stats.Effect] = {}) -> list[_Draft]:
    """Every figure that both arms have. `floors`: effects of an A/A run by metric and level."""
    # By block (run and repeat), so that the two arms can be matched.
    sides = [
        pd.concat([arm.points for arm in arms]).set_index(["run_dir", "repeat"]).sort_index()
        for arms in (pair.baselines, pair.candidates)
    ]
    drafts = []
    for level in sorted(set(sides[0].level) & set(sides[1].level), key=load.level_order, reverse=True):
        frames = [side[side.level == level] for side in sides]
        for metric in METRICS:
            if level == pair.level and metric == THROUGHPUT:
                family = PRIMARY
            elif metric == THROUGHPUT or (level == pair.level and metric in AT_PRIMARY_LEVEL):
                family = SECONDARY
            else:
                family = DESCRIPTIVE
            if family != DESCRIPTIVE or all(frame[metric].notna().any() for frame in frames):
                drafts.append(_draft(pair, metric, family, frames, floors.get((metric, level))))
    return drafts


def _draft(pair: Pair, metric: str, family: str, frames: Sequence[pd.DataFrame], floor: stats.Effect | None) -> _Draft:
    one, other = (frame.loc[(frame.state == "complete") & frame.valid.eq(True), metric].dropna() for frame in frames)
    if pair.interleaved:
        one, other = one[one.index.isin(other.index)], other[other.index.isin(one.index)]
    effect = effect_of(pair, one, other, higher_is_better=not metric.endswith("_ms"))
    first = frames[0].iloc[0]
    repeats = [sum(arm.run.declared["repeats"] for arm in arms) for arms in (pair.baselines, pair.candidates)]
    cell = Cell(
        metric=metric,
        level=first.level,
        concurrency=None if pd.isna(first.concurrency) else int(first.concurrency),
        offered_rps=None if pd.isna(first.offered_rps) else float(first.offered_rps),
        axes=pair.axes,
        baseline=pair.names[0],
        candidate=pair.names[1],
        baseline_value=stats.geometric_mean_interval(one)[0] if effect else None,
        candidate_value=stats.geometric_mean_interval(other)[0] if effect else None,
        num_blocks=min(len(one), len(other)),
        num_planned=min(repeats),
        family=family,
    )
    return _Draft(pair, cell, effect, _blocked(pair, cell, frames, effect), floor)


def effect_of(pair: Pair, baseline: pd.Series, candidate: pd.Series, higher_is_better: bool) -> stats.Effect | None:
    """Of one value a block; None where there is none, or a 0."""
    if not min(len(baseline), len(candidate)) or min(baseline.min(), candidate.min()) <= 0:
        return None
    estimate = stats.paired_effect if pair.interleaved else stats.unpaired_effect
    effect = estimate(baseline, candidate, higher_is_better)
    if any(run.declared["redeploy"] == "never" for run in pair.runs):
        # Repeats in one deployment are no replicates: their scatter says nothing of the next deployment.
        return stats.Effect(ratio=effect.ratio, num_blocks=effect.num_blocks)
    return effect


def _blocked(pair: Pair, cell: Cell, frames: Sequence[pd.DataFrame], effect: stats.Effect | None) -> str:
    """Why there can be no verdict, whatever the figures; "" if there can be one."""
    if not cell.num_blocks:
        if any(frame[cell.metric].isna().all() and frame.valid.eq(True).any() for frame in frames):
            return f"no block has a {metric_text(cell.metric)} of both arms: too few requests"
        sides = zip(pair.names, frames, strict=True)
        return "no block with both points VALID: " + "; ".join(f"{name} {_state(frame)}" for name, frame in sides)
    if effect is None:
        return "a value of 0 has no ratio"
    if any("single_run" in str(notes) for frame in frames for notes in frame.notes):
        return "single run, no interval"
    if any(run.in_progress for run in pair.runs):
        return "the run is not complete yet; a verdict now would be one more look"
    if any(run.declared["redeploy"] == "never" for run in pair.runs):
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


def _state(frame: pd.DataFrame) -> str:
    text = f"{frame.valid.eq(True).sum()} of {len(frame)} VALID"
    failed = (frame.state == "failed").sum()
    reasons = load.codes(frame.invalid_reasons) + [f"{failed} failed"] * bool(failed)
    return f"{text} ({', '.join(reasons)})" if reasons else text


def _judge(drafts: Sequence[_Draft], margin: float, alpha: float, next_alpha: float) -> None:
    """Give each cell its interval and verdict. `next_alpha`: what further blocks would be judged at."""
    for family in FAMILIES:
        members = [draft for draft in drafts if draft.cell.family == family]
        levels = [stats.ALPHA] * len(members)
        if family != DESCRIPTIVE:
            levels = stats.holm_alphas([draft.effect.p_value if draft.effect else None for draft in members], alpha)
        for draft, level in zip(members, levels, strict=True):
            effect = draft.effect and stats.at_alpha(draft.effect, level)
            draft.cell = replace(_with_effect(draft.cell, effect), reason=draft.blocked)
            if draft.floor and draft.cell.num_blocks >= 2:
                detectable = stats.minimum_detectable_ratio(draft.floor, draft.cell.num_blocks, level)
                draft.cell = replace(draft.cell, floor_ratio=detectable)
            if family != DESCRIPTIVE:
                # Each has an equal share of the family's error, which EQUIVALENT is held to.
                verdict, reason = _verdict(draft, effect, margin, alpha / len(members), next_alpha / len(members))
                draft.cell = replace(draft.cell, verdict=verdict, reason=reason)


def _with_effect(cell: Cell, effect: stats.Effect | None) -> Cell:
    if effect is None:
        return cell
    names = ("ratio", "ci_low_ratio", "ci_high_ratio", "confidence")
    return replace(cell, **{name: getattr(effect, name) for name in names})


def _verdict(
    draft: _Draft, effect: stats.Effect | None, margin: float, alpha: float, next_alpha: float
) -> tuple[str, str]:
    """Verdict and, where it needs one, reason."""
    if draft.blocked or effect is None:
        return INCONCLUSIVE, draft.blocked
    verdict, floor = str(stats.judge(effect, margin, alpha)), draft.cell.floor_ratio
    if verdict == INCONCLUSIVE:
        return verdict, _further(stats.blocks_to_settle(effect, margin, next_alpha), draft.pair, effect.num_blocks)
    if verdict != stats.Verdict.EQUIVALENT and floor and abs(math.log(effect.ratio)) < math.log(floor):
        noise = f"the A/A run cannot tell less than x{floor:.3g} from noise"
        return INCONCLUSIVE, f"{verdict} but for the noise floor: {noise}"
    return verdict, ""


def _further(total: tuple[int, int | None], pair: Pair, done: int) -> str:
    """In words: the range of further blocks, and where to measure them."""
    low, high = total
    few = max(1, low - done)
    if high is None:
        return f"more than {few} further blocks would be needed, if any number settles it"
    many = max(1, high - done)
    count = f"{few} to {many} further blocks" if few < many else f"{few} further block{'s' if few > 1 else ''}"
    where = f"in a new run: sweep.repeats={done + few} to {done + many}"
    return f"about {count} would settle it ({'--add another run' if pair.declaration['max_looks'] > 1 else where})"


# ---- Noise floor ----


def _floors(floor: Run | None, pairs: Sequence[Pair]) -> dict[Pair, dict[tuple[str, str], stats.Effect]]:
    """Effects of an A/A run by metric and level, for the pairs it fits.

    Raises IncomparableError if it can serve none of them.
    """
    if floor is None:
        return {}
    root, found, why = floor.paths.root, {}, ""
    if floor.in_progress:
        raise IncomparableError(f"--floor {root} is not complete")
    twins = [each for each in declared_pairs(floor) if len({arm.record["service_key"] for arm in each.arms}) == 1]
    if not twins:
        raise IncomparableError(f"--floor {root} is no A/A run: it compares no arm with itself")
    for pair in pairs:
        # Whose noise it is may be either arm's, so the profile is free.
        unlike = {
            twin: [
                each for each in differences.find(twin.baselines[0], pair.baselines[0], ["profile"]) if not each.allowed
            ]
            for twin in twins
        }
        twin = min(twins, key=lambda twin: len(unlike[twin]))
        if unlike[twin]:
            text = "; ".join(f"{each.key}: {each.baseline} | {each.candidate}" for each in unlike[twin][:5])
            why = f"measured something else: {text}"
            continue
        effects = {(draft.cell.metric, draft.cell.level): draft.effect for draft in _drafts(twin)}
        usable = {at: each for at, each in effects.items() if each and each.log_sd is not None}
        usable = {at: each for at, each in usable.items() if each.num_blocks >= MIN_FLOOR_BLOCKS}
        if (THROUGHPUT, pair.level) in usable:
            found[pair] = usable
        else:
            effect = effects.get((THROUGHPUT, pair.level))
            why = f"has {effect.num_blocks if effect else 0} VALID blocks of throughput at {pair.level}; "
            why += f"an A/A run needs {MIN_FLOOR_BLOCKS} there, each freshly deployed"
    if not found:
        raise IncomparableError(f"--floor {root} {why}")
    return found


# ---- In words ----


def _summary(pair: Pair, cells: Sequence[Cell], primary: Cell | None, margin: float) -> str:
    """The sentence an engineer would repeat."""
    baseline, candidate = pair.names
    if baseline == candidate:
        baseline, candidate = (
            f"{arm.name} of {arm.run.paths.run_id}" for arm in (pair.baselines[0], pair.candidates[0])
        )
    start = f"{pair.axes}: " if pair.axes else ""
    if primary is None or primary.ratio is None:
        why = primary.reason if primary else "no level in common"
        # After the fact, so no verdict.
        known = [cell for cell in cells if cell.metric == THROUGHPUT and cell.ratio is not None]
        highest = max(known, key=lambda cell: load.level_order(cell.level), default=None)
        fallback = f" Post hoc: {_throughput(highest)}." if highest else ""
        return f"{start}{candidate} against {baseline} is INCONCLUSIVE: {why}.{fallback}"
    how = _throughput(primary)
    if primary.verdict == INCONCLUSIVE:
        return f"{start}{candidate} against {baseline} is INCONCLUSIVE: {how}; {primary.reason}."
    if primary.verdict == "EQUIVALENT":
        return f"{start}{candidate} is EQUIVALENT to {baseline} within {100 * margin:.3g} %: {how}."
    return f"{start}{candidate} is {primary.verdict} than {baseline}: {how}."


def _throughput(cell: Cell) -> str:
    of = f" of {cell.num_planned}" if cell.num_blocks < cell.num_planned else ""
    blocks = f"{cell.num_blocks}{of} block{'s' if (cell.num_planned if of else cell.num_blocks) != 1 else ''}"
    return f"{effect_text(cell)} the throughput at {level_text(cell.level)}, {blocks}"


def cells_frame(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """One row a cell."""
    cells = [asdict(cell) for comparison in comparisons for cell in comparison.cells]
    return pd.DataFrame(cells, columns=[field.name for field in fields(Cell)])

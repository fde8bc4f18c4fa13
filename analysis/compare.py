"""Which arm is faster, by how much, and may that be said at all? Points in, verdicts out.

What is compared, the primary cell and the error that a verdict may have were fixed in run.json before the first
service came up. The primary cells of a run are one Holm family, its secondary cells another; everything else is
described, not judged. No value is looked at before the arms are known to be comparable (`contrasts.check`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from analysis import contrasts, differences, figures, load, looks, stats
from analysis.cells import DESCRIPTIVE, FAMILIES, PRIMARY, SECONDARY, Cell, Comparison
from analysis.contrasts import Check, IncomparableError, Pair, declared_pairs, pair_of
from analysis.figures import FIGURES, Figure
from analysis.load import ArmData, RunData
from analysis.wording import result_text
from orchestrator.load.level import Level

# Judged beside the primary figure, at its level.
AT_PRIMARY_LEVEL = ("throughput_rps", "latency_p50_ms", "latency_p99_ms")
INCONCLUSIVE = str(stats.Verdict.INCONCLUSIVE)
MIN_FLOOR_BLOCKS = 5
_SPENT = "the looks that were declared (compare.max_looks) are spent; start a new run, which is judged on its own"
_NONE_YET = (
    "the error is spent in proportion to the VALID blocks at the primary level, and there is none: resume the run"
)
# Effects of an A/A run, by name of the figure and of the level.
Effects = Mapping[tuple[str, str], stats.Effect]
_NO_EFFECTS: Effects = {}


@dataclass(eq=False)
class _Draft:
    """A cell and what it is judged by. `blocked`: why there can be no verdict, whatever its value; "" if not."""

    pair: Pair
    cell: Cell
    effect: stats.Effect | None
    blocked: str
    floor: stats.Effect | None  # of the A/A run, for the same figure


def compare_run(
    run: RunData,
    floor: RunData | None = None,
    more: Sequence[RunData] = (),
    allow_diff: Sequence[str] = (),
    record: bool = False,
) -> list[Comparison]:
    """Every comparison that the run declared; one that must be refused has no verdict, and says why.

    `more`: runs that add blocks. Raises IncomparableError if all are refused, LoadError.
    """
    pairs = declared_pairs(run, more)
    return compare_pairs(pairs, pairs, run.declared.margin, floor, allow_diff, record)


def compare_runs(runs: Sequence[RunData]) -> list[Comparison]:
    """All that these runs declared; runs of one arm, such as imported results, in pairs: baseline, candidate."""
    found = [comparison for run in runs for comparison in compare_run(run)]
    singles = [ArmData(run, run.arms[0]) for run in runs if len(run.arms) == 1]
    for baseline, candidate in zip(singles[::2], singles[1::2], strict=False):
        pair, family = pair_of(baseline, candidate)
        found += compare_pairs([pair], family, pair.declaration.margin)
    return found


def compare_pairs(
    pairs: Sequence[Pair],
    family: Sequence[Pair],
    margin: float,
    floor: RunData | None = None,
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
    checked = contrasts.check(pairs, allow_diff)
    floors = _floors(floor, pairs)
    drafts = {pair: _drafts(pair, floors.get(pair, _NO_EFFECTS)) for pair in family}
    everything = [draft for of_pair in drafts.values() for draft in of_pair]
    look = _look(family, everything)
    for draft in everything:
        refusal = checked[draft.pair].refusal if draft.pair in checked else ""
        draft.blocked = refusal or draft.blocked or _unjudged(look)
    next_alpha = looks.after(look, pairs[0].declaration.max_looks)
    _judge(everything, margin, look.alpha or stats.ALPHA, next_alpha)
    if record and any(not draft.blocked and draft.cell.family != DESCRIPTIVE for draft in everything):
        looks.record(pairs[0].runs, look)
    return [_comparison(pair, drafts[pair], checked[pair], look, margin) for pair in pairs]


def _comparison(pair: Pair, drafts: Sequence[_Draft], checked: Check, look: looks.Look, margin: float) -> Comparison:
    cells = sorted((draft.cell for draft in drafts), key=lambda cell: FAMILIES.index(cell.family))
    primary = cells[0] if cells and cells[0].family == PRIMARY else None
    return Comparison(
        baseline=pair.names[0],
        candidate=pair.names[1],
        baseline_run=", ".join(str(arm.run.paths.root) for arm in pair.baselines),
        candidate_run=", ".join(str(arm.run.paths.root) for arm in pair.candidates),
        axes=pair.axes,
        treatment=", ".join(pair.treatment) or "none (the same arm twice)",
        margin=margin,
        look=look.number,
        primary=primary,
        cells=tuple(cells),
        differences=checked.differences,
        warnings=(*checked.warnings, *_shortfalls(pair, primary, margin)),
        summary=_summary(pair, cells, primary, margin),
        workload=str(pair.candidates[0].points.workload.iloc[0]),
    )


def _look(family: Sequence[Pair], drafts: Sequence[_Draft]) -> looks.Look:
    """The look at the data of all pairs that are judged together."""
    points = pd.concat([arm.points for pair in family for arm in pair.arms])
    points = points[points.valid.eq(True)].drop_duplicates(["run_id", "arm", "trial_id"])
    primary = [draft.cell for draft in drafts if draft.cell.family == PRIMARY]
    num_blocks, num_planned = sum(cell.num_blocks for cell in primary), sum(cell.num_planned for cell in primary)
    return looks.take(family[0].runs, points, num_blocks, num_planned, family[0].declaration.max_looks)


def _unjudged(look: looks.Look) -> str:
    """Why nothing may be judged at this look; empty if it may."""
    return "" if look.alpha else _SPENT if look.num_blocks else _NONE_YET


def _shortfalls(pair: Pair, primary: Cell | None, margin: float) -> list[str]:
    """Warnings where blocks are missing, or the margin is not the declared one."""
    told = []
    if primary and primary.ratio is not None and primary.num_blocks < primary.num_planned:
        missing = f"{primary.num_planned - primary.num_blocks} of {primary.num_planned}"
        why = "not run yet" if any(run.in_progress for run in pair.runs) else "failed or INVALID"
        again = "; ".join(f"python -m orchestrator resume={run.paths.root}" for run in pair.runs)
        told.append(f"{missing} blocks are missing at the primary level: {why} ({again})")
    if margin != pair.declaration.margin:
        told.append(f"the margin is not the declared one ({pair.declaration.margin:g})")
    return told


# ---- The gate ----


def gate(
    pair: Pair, family: Sequence[Pair], max_slowdown: float, metrics: Sequence[str] = (), allow_diff: Sequence[str] = ()
) -> tuple[Comparison, list[tuple[Cell, str]]]:
    """Is the candidate at most `max_slowdown` slower (0.03 = 3 %) at the primary level? A cell and outcome a metric.

    `metrics`: names of figures; the pair's own if none. Several share the error (Bonferroni). "slower": the whole
    interval is below 1 / (1 + max_slowdown). "ok": it lies above. "inconclusive": it holds it, or there is none.
    "invalid": no block with both points VALID. Raises IncomparableError as `compare_pairs` does, and for a metric that
    was not measured. Records the look.
    """
    wanted = [FIGURES[name] for name in dict.fromkeys(metrics)] or [pair.figure]
    everything = [draft for member in family for draft in _drafts(member, asked=wanted)]
    drafts = {
        draft.cell.metric: draft for draft in everything if draft.pair is pair and draft.cell.level == pair.level.name
    }
    if missing := [figure.name for figure in wanted if figure.name not in drafts]:
        raise IncomparableError(
            f"{', '.join(missing)} was not measured in both arms at {pair.level.name}; there is {', '.join(drafts)}"
        )
    look = _look(family, everything)
    [comparison] = compare_pairs([pair], family, pair.declaration.margin, None, allow_diff, record=True)
    level = (look.alpha or stats.ALPHA) / len(wanted)
    outcomes = [_outcome(drafts[figure.name], max_slowdown, level, _unjudged(look)) for figure in wanted]
    return comparison, outcomes


def _outcome(draft: _Draft, max_slowdown: float, alpha: float, unjudged: str) -> tuple[Cell, str]:
    """The cell with its interval at 1 - `alpha`, and what the gate makes of it."""
    limit, reason = 1 / (1 + max_slowdown), draft.blocked or unjudged
    effect = draft.effect and stats.at_alpha(draft.effect, alpha)
    cell, outcome = _with_effect(draft.cell, effect), "inconclusive"
    if cell.num_blocks == 0:
        outcome = "invalid"
    elif not reason and cell.ci_high_ratio is not None and cell.ci_high_ratio < limit:
        outcome = "slower"
    elif not reason and cell.ci_low_ratio is not None and cell.ci_low_ratio > limit:
        outcome = "ok"
    elif not reason and effect is not None:
        reason = _further(stats.blocks_to_settle(effect, max_slowdown, alpha), draft.pair, cell.num_blocks)
    return replace(cell, reason=reason), outcome


# ---- Cells ----


def _drafts(pair: Pair, floors: Effects = _NO_EFFECTS, asked: Sequence[Figure] = ()) -> list[_Draft]:
    """Every figure that both arms have. `floors`: of an A/A run. `asked`: figures to add to those that are shown."""
    # By block (run and repeat), so that the two arms can be matched.
    sides = [
        pd.concat([arm.points for arm in arms]).set_index(["run_dir", "repeat"]).sort_index()
        for arms in (pair.baselines, pair.candidates)
    ]
    drafts = []
    shared = set(sides[0].level) & set(sides[1].level)
    for level in sorted(map(Level.parse, shared), reverse=True):
        points = [side[side.level == level.name] for side in sides]
        for figure in figures.shown(pair.figure, *asked):
            family = _family(pair, figure, level)
            if family != DESCRIPTIVE or all(side[figure.name].notna().any() for side in points):
                drafts.append(_draft(pair, figure, level, points, floors.get((figure.name, level.name))))
    return drafts


def _family(pair: Pair, figure: Figure, level: Level) -> str:
    """Which cells are judged together: fixed by what run.json declares, before any value is known."""
    if level == pair.level and figure == pair.figure:
        return PRIMARY
    judged = figure == pair.figure or (level == pair.level and figure.name in AT_PRIMARY_LEVEL)
    return SECONDARY if judged and figure.judged_at(level) else DESCRIPTIVE


def _draft(
    pair: Pair, figure: Figure, level: Level, points: Sequence[pd.DataFrame], floor: stats.Effect | None
) -> _Draft:
    """`points`: of either arm at the level, one row a block."""
    one, other = (figures.by_block(side, figure) for side in points)
    if pair.interleaved:
        one, other = one[one.index.isin(other.index)], other[other.index.isin(one.index)]
    effect = pair.effect(one, other, figure.more_is_better)
    repeats = [sum(arm.run.declared.repeats for arm in arms) for arms in (pair.baselines, pair.candidates)]
    cell = Cell(
        metric=figure.name,
        level=level.name,
        concurrency=level.concurrency,
        offered_rps=level.offered_rps,
        axes=pair.axes,
        baseline=pair.names[0],
        candidate=pair.names[1],
        baseline_value=stats.geometric_mean_interval(one)[0] if effect else None,
        candidate_value=stats.geometric_mean_interval(other)[0] if effect else None,
        num_blocks=min(len(one), len(other)),
        num_planned=min(repeats),
        family=_family(pair, figure, level),
    )
    blocked = _unmeasured(pair, cell, points, effect) or _undecidable(pair, figure, level, points, effect)
    return _Draft(pair, cell, effect, blocked, floor)


def _unmeasured(pair: Pair, cell: Cell, points: Sequence[pd.DataFrame], effect: stats.Effect | None) -> str:
    """Why there is no ratio; "" if there is one."""
    if not cell.num_blocks:
        if any(side[cell.metric].isna().all() and side.valid.eq(True).any() for side in points):
            return f"no block has a {figures.heading(cell.metric)} of both arms: too few requests"
        sides = zip(pair.names, points, strict=True)
        return "no block with both points VALID: " + "; ".join(f"{name} {_state(side)}" for name, side in sides)
    return "a value of 0 has no ratio" if effect is None else ""


def _undecidable(
    pair: Pair, figure: Figure, level: Level, points: Sequence[pd.DataFrame], effect: stats.Effect | None
) -> str:
    """Why a ratio can have no verdict, whatever it is; "" if it can have one."""
    if not figure.judged_at(level):
        return f"at a rate that is offered, {figure.text} says what was sent: it is shown and not judged"
    if any("single_run" in str(notes) for side in points for notes in side.notes):
        return "single run, no interval"
    if any(run.in_progress for run in pair.runs):
        return "the run is not complete yet; a verdict now would be one more look"
    if pair.one_deployment:
        return "one deployment an arm (cluster.redeploy=never): repeats of it are no replicates"
    if not pair.interleaved:
        return "the arms were not interleaved in one run, so drift and treatment cannot be told apart"
    if not pair.declared:
        return "this pair was not declared before the run (post hoc)"
    if effect and effect.num_blocks < 2:
        return "one block, no interval: sweep.repeats=5 gives one"
    if effect and effect.log_se is not None and effect.log_se < 1e-9:
        return "all blocks have the same ratio: counts too small, or not measured, to tell noise"
    return ""


def _state(points: pd.DataFrame) -> str:
    text = f"{points.valid.eq(True).sum()} of {len(points)} VALID"
    failed = (points.state == "failed").sum()
    reasons = load.codes(points.invalid_reasons) + [f"{failed} failed"] * bool(failed)
    return f"{text} ({', '.join(reasons)})" if reasons else text


# ---- Verdicts ----


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
    return replace(
        cell,
        ratio=effect.ratio,
        ci_low_ratio=effect.ci_low_ratio,
        ci_high_ratio=effect.ci_high_ratio,
        confidence=effect.confidence,
    )


def _verdict(
    draft: _Draft, effect: stats.Effect | None, margin: float, alpha: float, next_alpha: float
) -> tuple[str, str]:
    """The verdict, and its reason where it needs one ("" else)."""
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
    """A clause with the range of further blocks that would settle it, and where to measure them."""
    low, high = total
    few = max(1, low - done)
    if high is None:
        return f"more than {few} further blocks would be needed, if any number settles it"
    many = max(1, high - done)
    count = f"{few} to {many} further blocks" if few < many else f"{few} further block{'s' if few > 1 else ''}"
    where = f"in a new run: sweep.repeats={done + few} to {done + many}"
    return f"about {count} would settle it ({'--add another run' if pair.declaration.max_looks > 1 else where})"


# ---- Noise floor ----


def _floors(floor: RunData | None, pairs: Sequence[Pair]) -> dict[Pair, Effects]:
    """Effects of an A/A run, for the pairs it fits.

    Raises IncomparableError if it can serve none of them.
    """
    if floor is None:
        return {}
    found: dict[Pair, Effects] = {}
    root, why = floor.paths.root, ""
    if floor.in_progress:
        raise IncomparableError(f"--floor {root} is not complete")
    twins = [twin for twin in declared_pairs(floor) if len({arm.record.service_key for arm in twin.arms}) == 1]
    if not twins:
        raise IncomparableError(f"--floor {root} is no A/A run: it compares no arm with itself")
    for pair in pairs:
        # Whose noise it is may be either arm's, so the profile is free.
        unlike = {
            twin: contrasts.unallowed(differences.find(twin.baselines[0], pair.baselines[0], ["profile"]))
            for twin in twins
        }
        twin = min(twins, key=lambda twin: len(unlike[twin]))
        if unlike[twin]:
            text = "; ".join(f"{one.key}: {one.baseline} | {one.candidate}" for one in unlike[twin][:5])
            why = f"measured something else: {text}"
            continue
        effects = {
            (draft.cell.metric, draft.cell.level): draft.effect
            for draft in _drafts(twin, asked=[pair.figure])
            if draft.effect
        }
        primary = (pair.figure.name, pair.level.name)
        usable = {
            at: effect
            for at, effect in effects.items()
            if effect.log_sd is not None and effect.num_blocks >= MIN_FLOOR_BLOCKS
        }
        if primary in usable:
            found[pair] = usable
        else:
            num_blocks = effects[primary].num_blocks if primary in effects else 0
            why = f"has {num_blocks} VALID blocks of {pair.figure.text} at {pair.level.name}; "
            why += f"an A/A run needs {MIN_FLOOR_BLOCKS} there, each freshly deployed"
    if not found:
        raise IncomparableError(f"--floor {root} {why}")
    return found


# ---- In words ----


def _summary(pair: Pair, cells: Sequence[Cell], primary: Cell | None, margin: float) -> str:
    """The comparison in one sentence: verdict, ratio, interval, level and blocks."""
    baseline, candidate = pair.names
    if baseline == candidate:
        baseline, candidate = (
            f"{arm.name} of {arm.run.paths.run_id}" for arm in (pair.baselines[0], pair.candidates[0])
        )
    start = f"{pair.axes}: " if pair.axes else ""
    if primary is None or primary.ratio is None:
        why = primary.reason if primary else "no level in common"
        # After the fact, so no verdict.
        known = [cell for cell in cells if cell.metric == pair.figure.name and cell.ratio is not None]
        highest = max(known, key=lambda cell: Level.parse(cell.level), default=None)
        fallback = f" Post hoc: {result_text(highest)}." if highest else ""
        return f"{start}{candidate} against {baseline} is INCONCLUSIVE: {why}.{fallback}"
    how = result_text(primary)
    if primary.verdict == INCONCLUSIVE:
        return f"{start}{candidate} against {baseline} is INCONCLUSIVE: {how}; {primary.reason}."
    if primary.verdict == "EQUIVALENT":
        return f"{start}{candidate} is EQUIVALENT to {baseline} within {100 * margin:.3g} %: {how}."
    return f"{start}{candidate} is {primary.verdict} than {baseline}: {how}."

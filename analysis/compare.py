"""Which arm is faster, by how much, and may that be said at all? Points in, verdicts out.

What is compared, the primary cell and the error that a verdict may have were fixed in run.json before the first
service came up. The primary cells of a run are one Holm family, its secondary cells another; everything else is
described, not judged. Nothing here looks at a figure before the arms are known to be comparable.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from analysis import differences, load, stats
from analysis.differences import Difference
from analysis.load import Run
from analysis.wording import effect_text, level_text
from orchestrator import results

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
    def num_planned(self) -> int:
        sides = [sum(_repeats(run) for run, _ in side) for side in (self.baselines, self.candidates)]
        return min(sides)


@dataclass(eq=False)
class _Draft:
    """A cell before its family is known. `blocked`: why there can be no verdict, whatever the figures say."""

    cell: Cell
    effect: stats.Effect | None
    blocked: str
    floor: stats.Effect | None  # of the A/A run, for the same figure


def compare_run(
    run: Run,
    floor: Run | None = None,
    more: Sequence[Run] = (),
    allow_diff: Sequence[str] = (),
    record: bool = True,
) -> list[Comparison]:
    """Every comparison that the run declared. Raises IncomparableError, LoadError."""
    pairs = declared_pairs(run, more)
    return compare_pairs(pairs, pairs, _declared(run)["margin"], floor, allow_diff, record)


def declared_pairs(run: Run, more: Sequence[Run] = ()) -> list[Pair]:
    """As fixed in run.json before the first service came up. Raises LoadError if `more` lack an arm."""
    pairs = []
    for cell in run.record["primary_cells"]:
        if cell.get("candidate") is None:
            continue
        runs = [run, *more]
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

    Raises IncomparableError where the two share no level.
    """
    same_run = baseline[0].paths.root.resolve() == candidate[0].paths.root.resolve()
    if same_run:
        pairs = declared_pairs(baseline[0], more)
        for pair in pairs:
            if (pair.baselines[0][1], pair.candidates[0][1]) == (baseline[1], candidate[1]):
                return pair, pairs
    elif more:
        raise IncomparableError("--add needs both arms in one run: blocks of different runs cannot be matched")
    shared = set(_levels(*baseline)) & set(_levels(*candidate))
    if not shared:
        sides = "; ".join(f"{arm}: {', '.join(_levels(run, arm))}" for run, arm in (baseline, candidate))
        raise IncomparableError(f"the arms share no level: {sides}")
    runs = [baseline[0], *more] if same_run else [baseline[0]]
    pair = Pair(
        tuple((run, baseline[1]) for run in runs),
        tuple((run, candidate[1]) for run in runs) if same_run else (candidate,),
        "",
        max(shared),
        declared=not same_run and all(_primary_level(*side) == max(shared) for side in (baseline, candidate)),
    )
    return pair, [pair]


def compare_pairs(
    pairs: Sequence[Pair],
    family: Sequence[Pair],
    margin: float,
    floor: Run | None = None,
    allow_diff: Sequence[str] = (),
    record: bool = True,
) -> list[Comparison]:
    """Compare `pairs`, judged as members of `family`, which holds them. `margin`: 0.05 = 5 %.

    `record`: note the look in run.json. Raises IncomparableError for arms that differ in more than the treatment,
    unless `allow_diff` names those keys (or their beginnings).
    """
    if not pairs:
        return []
    checked = {pair: _check(pair, allow_diff) for pair in pairs}
    drafts = {pair: _drafts(pair, _floor(floor, pair)) for pair in family}
    look = max(_look(pair) for pair in family)  # what is judged together has been looked at together
    max_looks = _declared(pairs[0].runs[0])["max_looks"]
    alpha = stats.look_alpha(look, max_looks)
    everything = [draft for each in drafts.values() for draft in each]
    if alpha is None:
        for draft in everything:
            draft.blocked = draft.blocked or _SPENT
    # Where the error is spent, further blocks can only be those of a new run, which has all of its own.
    judged = _judge(everything, margin, alpha or stats.ALPHA, stats.look_alpha(look + 1, max_looks) or stats.ALPHA)
    comparisons = []
    for pair in pairs:
        cells = [judged[id(draft)] for draft in drafts[pair]]
        cells.sort(key=lambda cell: (PRIMARY, SECONDARY, DESCRIPTIVE).index(cell.family))
        found, warnings = checked[pair]
        primary = next((cell for cell in cells if cell.family == PRIMARY), None)
        comparisons.append(
            Comparison(
                baseline=pair.baselines[0][1],
                candidate=pair.candidates[0][1],
                baseline_run=", ".join(str(run.paths.root) for run, _ in pair.baselines),
                candidate_run=", ".join(str(run.paths.root) for run, _ in pair.candidates),
                axes=pair.axes,
                treatment=", ".join(_treatment(pair)) or "none (the same arm twice)",
                margin=margin,
                look=look,
                primary=primary,
                cells=tuple(cells),
                differences=tuple(found),
                warnings=tuple(warnings),
                summary=_summary(pair, cells, primary, margin),
            )
        )
        if record:
            _record_look(pair, look)
    return comparisons


def gate(
    pair: Pair, family: Sequence[Pair], max_slowdown: float, metrics: Sequence[str], allow_diff: Sequence[str] = ()
) -> tuple[Comparison, list[tuple[Cell, str]]]:
    """Is the candidate at most `max_slowdown` slower (0.03 = 3 %) at the primary level? A cell and outcome a metric.

    "slower": the whole interval is below 1 / (1 + max_slowdown). "ok": it lies above. "inconclusive": it holds it, or
    there is none. "invalid": no block with both points VALID. Several metrics share the error (Bonferroni). Raises
    IncomparableError as `compare_pairs` does, and for a metric that was not measured.
    """
    limit = 1 / (1 + max_slowdown)
    alpha = stats.look_alpha(_look(pair), _declared(pair.runs[0])["max_looks"])
    [comparison] = compare_pairs([pair], family, _declared(pair.runs[0])["margin"], allow_diff=allow_diff)
    drafts = {draft.cell.metric: draft for draft in _drafts(pair, {}) if draft.cell.level == pair.level}
    outcomes = []
    for metric in metrics:
        if metric not in drafts:
            raise IncomparableError(
                f"{metric} was not measured in both arms at {pair.level}; there is {', '.join(drafts)}"
            )
        draft = drafts[metric]
        level = (alpha or stats.ALPHA) / len(metrics)
        effect = draft.effect and stats.at_alpha(draft.effect, level)
        cell, reason = _with_effect(draft.cell, effect), draft.blocked or ("" if alpha else _SPENT)
        outcome = _outcome(cell, reason, limit)
        if outcome == "inconclusive" and not reason and effect is not None:
            reason = _further(stats.blocks_to_settle(effect, max_slowdown, level), cell.num_blocks)
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


def _check(pair: Pair, allow_diff: Sequence[str]) -> tuple[list[Difference], list[str]]:
    """Differences and warnings. Reads every request of both arms once. Raises IncomparableError, LoadError."""
    warnings = [warning for run in pair.runs for warning in run.warnings]
    found: dict[Difference, None] = {}
    for baseline in pair.baselines:
        for candidate in pair.candidates:
            if pair.interleaved and baseline[0] is not candidate[0]:
                continue
            repeats = sorted(set(baseline[0].points.repeat) & set(candidate[0].points.repeat))
            found |= dict.fromkeys(differences.find(baseline, candidate, _treatment(pair), repeats))
    refused = [each for each in found if not each.allowed and not _is_listed(each.key, allow_diff)]
    if refused:
        lines = [f"  {each.key}: {each.baseline} | {each.candidate}  ({each.where})" for each in refused[:10]]
        more = [f"  and {len(refused) - 10} more"] if len(refused) > 10 else []
        keys = ",".join(dict.fromkeys(each.key for each in refused[:5]))
        names = f"{pair.baselines[0][1]} and {pair.candidates[0][1]}"
        treatment = ", ".join(_treatment(pair)) or "nothing: the same arm twice"
        advice = f"Declare it as compare.treatment, or compare all the same with --allow-diff {keys}"
        head = f"{names} differ in more than the treatment ({treatment}):"
        raise IncomparableError("\n".join([head, *lines, *more, advice]))
    tolerated = [each.key for each in found if not each.allowed]
    if tolerated:
        warnings.append(f"compared although the arms also differ in {', '.join(tolerated)} (--allow-diff)")
    if not pair.declared:
        warnings.append("this pair or its level was not declared before the run: a finding after the fact (post hoc)")
    if not pair.interleaved:
        warnings.append("the arms were measured in different runs, so a drift of the machines is part of the ratio")
    for run, arm in [*pair.baselines, *pair.candidates]:
        complete = run.points[(run.points.arm == arm) & (run.points.state == "complete")]
        for _ in load.read_requests(run, complete):
            pass
        if (
            not load.is_imported(run)
            and len(complete)
            and load.effective(run, arm, int(complete.repeat.iloc[0])) is None
        ):
            warnings.append(
                f"{arm}: nothing was read back from the live service: whether the flags arrived is not known"
            )
    return list(found), warnings + _no_effect(pair)


def _is_listed(key: str, listed: Sequence[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in listed)


def _no_effect(pair: Pair) -> list[str]:
    """Declared flags that change nothing in this version of Ray."""
    run, arm = pair.candidates[0]
    service = load.effective(run, arm, 0)
    return [] if service is None else [f"{arm}: {warning}" for warning in service["warnings"]]


def _levels(run: Run, arm: str) -> list[str]:
    return sorted(run.points[run.points.arm == arm].level.unique())


def _primary_level(run: Run, arm: str) -> str | None:
    for cell in run.record["primary_cells"]:
        if arm in (cell.get("baseline"), cell.get("candidate")):
            return str(cell["level"])
    return None


def _declared(run: Run) -> Mapping[str, Any]:
    """How the run said that it would be compared."""
    defaults = {"treatment": ["profile"], "margin": 0.05, "max_looks": 1, "repeats": 1, "redeploy": "per_repeat"}
    return defaults | run.record["compare"]


def _treatment(pair: Pair) -> list[str]:
    return list(dict.fromkeys(axis for run in pair.runs for axis in _declared(run)["treatment"]))


def _repeats(run: Run) -> int:
    return int(_declared(run)["repeats"])


# ---- Figures ----


def _drafts(pair: Pair, floors: Mapping[tuple[str, str], stats.Effect]) -> list[_Draft]:
    sides = [
        pd.concat([_rows(*each) for each in side], ignore_index=True) for side in (pair.baselines, pair.candidates)
    ]
    shared = sorted(set(sides[0].level) & set(sides[1].level), reverse=True)
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
        baseline=pair.baselines[0][1],
        candidate=pair.candidates[0][1],
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
    return _Draft(cell, effect, _blocked(pair, metric, frames, used, effect), floor)


def _valid_values(frame: pd.DataFrame, metric: str) -> dict[tuple[str, int], float]:
    """Block (run and repeat) -> value of its VALID point."""
    rows = frame[(frame.state == "complete") & (frame.valid == True) & frame[metric].notna()]  # noqa: E712 (None too)
    return {(row["run_dir"], row["repeat"]): float(row[metric]) for row in load.records(rows)}


def _blocked(
    pair: Pair,
    metric: str,
    frames: Sequence[pd.DataFrame],
    used: Sequence[Sequence[float]],
    effect: stats.Effect | None,
) -> str:
    """Why there can be no verdict, whatever the figures; "" if there can be one."""
    if not all(used):
        names = (pair.baselines[0][1], pair.candidates[0][1])
        return "no block with both points VALID: " + "; ".join(
            f"{name} {_state(frame, metric)}" for name, frame in zip(names, frames, strict=True)
        )
    if effect is None:
        return "a value of 0 has no ratio"
    if any("single_run" in str(notes) for frame in frames for notes in frame.notes):
        return "single run, no interval"
    if any(run.in_progress for run in pair.runs):
        return "the run is not complete yet; a verdict now would be a look too many"
    if any(_declared(run)["redeploy"] == "never" for run in pair.runs):
        return "one deployment an arm (cluster.redeploy=never): repeats of it are no replicates"
    if not pair.interleaved:
        return "the arms were not interleaved in one run, so drift and treatment cannot be told apart"
    if effect.num_blocks < 2:
        return "one block, no interval: sweep.repeats=5 gives one"
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
                cells[id(draft)] = _verdict(cell, effect, draft.blocked, margin, *shares)
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
    cell: Cell, effect: stats.Effect | None, blocked: str, margin: float, alpha: float, next_alpha: float
) -> Cell:
    """`alpha`: the cell's equal share of its family's error, which EQUIVALENT is held to; likewise `next_alpha`."""
    if blocked or effect is None:
        return dataclasses.replace(cell, verdict=str(stats.Verdict.INCONCLUSIVE), reason=blocked)
    verdict, reason = stats.judge(effect, margin, alpha), ""
    if verdict == stats.Verdict.INCONCLUSIVE:
        reason = _further(stats.blocks_to_settle(effect, margin, next_alpha), effect.num_blocks)
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


def _further(total: tuple[int, int | None], done: int) -> str:
    low, high = total
    if high is None:
        return f"more than {max(1, low - done)} further blocks would be needed, if any number settles it"
    few, many = max(1, low - done), max(1, high - done)
    return (
        f"about {few} to {many} further blocks would settle it" if few < many else f"about {few} further blocks would"
    )


# ---- Noise floor and looks ----


def _floor(floor: Run | None, pair: Pair) -> dict[tuple[str, str], stats.Effect]:
    """Effects of an A/A run by metric and level. Raises IncomparableError for one that cannot serve."""
    if floor is None:
        return {}
    twins = [
        each
        for each in declared_pairs(floor)
        if len({load.arm_record(floor, arm)["service_key"] for _, arm in (each.baselines[0], each.candidates[0])}) == 1
    ]
    if not twins:
        raise IncomparableError(f"--floor {floor.paths.root} is no A/A run: it compares no arm with itself")
    for twin in twins:
        unlike = differences.find(twin.baselines[0], pair.baselines[0], ["profile"], [])
        unlike = [each for each in unlike if not each.allowed]
        if not unlike:
            break
    else:
        text = "; ".join(f"{each.key}: {each.baseline} | {each.candidate}" for each in unlike[:5])
        raise IncomparableError(f"--floor {floor.paths.root} measured something else: {text}")
    effects = {(draft.cell.metric, draft.cell.level): draft.effect for draft in _drafts(twin, {})}
    primary = effects.get((THROUGHPUT, pair.level))
    if primary is None or primary.num_blocks < MIN_FLOOR_BLOCKS:
        found = 0 if primary is None else primary.num_blocks
        raise IncomparableError(
            f"--floor {floor.paths.root} has {found} VALID blocks of throughput at {pair.level}; an A/A run needs "
            f"{MIN_FLOOR_BLOCKS} there"
        )
    return {
        key: effect for key, effect in effects.items() if effect is not None and effect.num_blocks >= MIN_FLOOR_BLOCKS
    }


def _look(pair: Pair) -> int:
    """Which look this is, from 1: one more than the looks at fewer blocks. Looking at the same blocks again is none."""
    earlier = {look["num_blocks"] for run in pair.runs for look in _looks(run, pair)}
    return 1 + sum(num_blocks < pair.num_planned for num_blocks in earlier)


def _looks(run: Run, pair: Pair) -> Iterable[Mapping[str, Any]]:
    arms = (pair.baselines[0][1], pair.candidates[0][1])
    return [look for look in run.record["looks"] if (look["baseline"], look["candidate"]) == arms]


def _record_look(pair: Pair, look: int) -> None:
    """Note in each run.json that these blocks have been looked at. A comparison without verdict is no look."""
    if not pair.interleaved or any(run.in_progress or load.is_imported(run) for run in pair.runs):
        return
    for run in pair.runs:
        if any(each["num_blocks"] == pair.num_planned for each in _looks(run, pair)):
            continue
        entry = {
            "baseline": pair.baselines[0][1],
            "candidate": pair.candidates[0][1],
            "num_blocks": pair.num_planned,
            "look": look,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        run.record["looks"].append(entry)
        results.write_json(run.paths.run_json, run.record)


# ---- In words ----


def _summary(pair: Pair, cells: Sequence[Cell], primary: Cell | None, margin: float) -> str:
    """The sentence an engineer would repeat."""
    baseline, candidate = pair.baselines[0][1], pair.candidates[0][1]
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
    return f" Post hoc: {_throughput(max(known, key=lambda cell: cell.level))}." if known else ""


def _throughput(cell: Cell) -> str:
    blocks = f"{cell.num_blocks} block{'s' if cell.num_blocks != 1 else ''}"
    return f"{effect_text(cell)} the throughput at {level_text(cell.level)}, {blocks}"


def cells_frame(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """One row a cell."""
    cells = [dataclasses.asdict(cell) for comparison in comparisons for cell in comparison.cells]
    return pd.DataFrame(cells, columns=[field.name for field in dataclasses.fields(Cell)])

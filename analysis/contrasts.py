"""Which arms are put side by side, and may they be? Two sides of arms, checked before any figure is looked at.

What is compared was fixed in run.json before the first service came up. Any other pair can be looked at, but not
judged. A pair whose arms differ in more than the treatment is refused.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis import differences, load, stats
from analysis.differences import Difference
from analysis.figures import FIGURES, Figure
from analysis.load import ArmData, LoadError, RunData
from orchestrator.load.level import Level
from orchestrator.results.records import Declaration, PrimaryCell

_SIDES = ("baseline", "candidate")
_DECLARED_ALIKE = ("treatment", "margin", "max_looks", "redeploy")  # by runs that add blocks to each other
_MAX_LISTED = 10  # differences in a refusal


class IncomparableError(ValueError):
    """These arms must not be put side by side; says why, and what would let them be."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two arms, each in one run or in several that add blocks. `figure` at `level` is the primary cell.

    `declared`: compared as run.json said before the run.
    """

    baselines: tuple[ArmData, ...]
    candidates: tuple[ArmData, ...]
    figure: Figure
    level: Level
    axes: str
    declared: bool

    @property
    def interleaved(self) -> bool:
        """Whether each block holds both arms, so that what drifts hits both."""
        return {arm.run.paths.root for arm in self.baselines} == {arm.run.paths.root for arm in self.candidates}

    @property
    def one_deployment(self) -> bool:
        """Whether repeats are of one deployment: they are no replicates."""
        return any(run.declared.redeploy == "never" for run in self.runs)

    @property
    def arms(self) -> list[ArmData]:
        return [*self.baselines, *self.candidates]

    @property
    def runs(self) -> list[RunData]:
        return list({arm.run.paths.root: arm.run for arm in self.arms}.values())

    @property
    def names(self) -> tuple[str, str]:
        return self.baselines[0].name, self.candidates[0].name

    @property
    def declaration(self) -> Declaration:
        """Margin and looks are those of the first run; runs that add blocks declared the same."""
        return self.runs[0].declared

    @property
    def treatment(self) -> list[str]:
        """What every run of the pair declared as compared. A run of one arm could declare nothing."""
        declared = [run.declared.treatment for run in self.runs]
        shared = [axis for axis in declared[0] if all(axis in axes for axes in declared)]
        return shared or ([] if self.interleaved else ["profile"])

    def effect(self, baseline: pd.Series, candidate: pd.Series, more_is_better: bool) -> stats.Effect | None:
        """The effect of values, one a block; None where an arm has no value, or one that is not above 0."""
        if not min(len(baseline), len(candidate)) or min(baseline.min(), candidate.min()) <= 0:
            return None
        estimate = stats.paired_effect if self.interleaved else stats.unpaired_effect
        effect = estimate(baseline, candidate, more_is_better)
        if self.one_deployment:  # the scatter of its repeats says nothing of the next deployment
            return stats.Effect(ratio=effect.ratio, num_blocks=effect.num_blocks)
        return effect


# ---- Which pairs there are ----


def declared_pairs(run: RunData, more: Sequence[RunData] = ()) -> list[Pair]:
    """As fixed in run.json before the first service came up.

    Raises LoadError if `more` lack an arm or hold a run twice, or if run.json names a figure or a level that there is
    not; IncomparableError if they declared something else.
    """
    runs = [run, *more]
    cells = [cell for cell in run.record.primary_cells if cell.candidate is not None]
    _check_added(run, more, cells)
    pairs = []
    for cell in cells:
        axes = ", ".join(f"{axis}={value}" for axis, value in cell.axes.items())
        baselines, candidates = (tuple(ArmData(one, name) for one in runs) for name in _sides(cell))
        try:
            level = Level.parse(cell.level)
        except ValueError as error:
            raise LoadError(f"{run.paths.run_json}, primary_cells: {error}") from error
        pairs.append(Pair(baselines, candidates, _judged_by(run, cell.metric), level, axes, declared=True))
    return pairs


def _check_added(run: RunData, more: Sequence[RunData], cells: Sequence[PrimaryCell]) -> None:
    """May the blocks of these runs be judged together? Raises as `declared_pairs`."""
    runs = [run, *more]
    # A copy is the same run.
    if len({(one.record.run_id, one.record.started_at) for one in runs}) < len(runs):
        raise LoadError("a run cannot add blocks to itself: " + ", ".join(str(one.paths.root) for one in runs))
    if more and not cells:
        raise IncomparableError(f"{run.paths.root} declares no comparison that blocks could be added to")
    for added in more:
        for name in _DECLARED_ALIKE:
            found, wanted = getattr(added.declared, name), getattr(run.declared, name)
            if found != wanted:
                raise IncomparableError(
                    f"{added.paths.root} declared compare.{name}={found}, {run.paths.root} {wanted}: "
                    "their blocks cannot be judged together"
                )
        if lacking := {name for cell in cells for name in _sides(cell)} - set(added.arms):
            raise LoadError(f"{added.paths.root} has no arm {', '.join(lacking)}; it has {', '.join(added.arms)}")


def _sides(cell: PrimaryCell) -> tuple[str, str]:
    assert cell.candidate is not None, cell
    return cell.baseline, cell.candidate


def _judged_by(run: RunData, name: str) -> Figure:
    if name not in FIGURES:
        raise LoadError(
            f"{run.paths.run_json} is judged by {name!r}, which is no figure; there is {', '.join(FIGURES)}"
        )
    return FIGURES[name]


def pair_of(baseline: ArmData, candidate: ArmData, more: Sequence[RunData] = ()) -> tuple[Pair, list[Pair]]:
    """The pair of these arms, and the pairs that are judged together with it.

    Raises IncomparableError where there is nothing to compare: no shared level, or the same arm twice; LoadError as
    `declared_pairs`.
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
        (baseline, *(ArmData(run, baseline.name) for run in more)),
        (candidate, *(ArmData(run, candidate.name) for run in more)),
        # By what the baseline's run is judged, whatever its other arms are.
        _judged_by(baseline.run, baseline.run.record.primary_cells[0].metric),
        max(map(Level.parse, shared)),
        axes="",
        declared=False,
    )
    return pair, [pair]


# ---- May they be compared? ----


@dataclass(frozen=True)
class Check:
    """What was found between the arms of a pair. `refusal`: why they may not be compared, in a line; "" if they may."""

    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    refusal: str


def check(pairs: Sequence[Pair], allow_diff: Sequence[str]) -> dict[Pair, Check]:
    """Every request of every arm is read once and checked against its record.

    `allow_diff`: keys, or their beginnings, that may differ. Raises IncomparableError if all pairs are refused,
    LoadError.
    """
    broken = {}
    for arm in {arm for pair in pairs for arm in pair.arms}:
        try:
            arm.verify()
        except LoadError as error:
            broken[arm] = str(error)
    checked, refusals = {}, []
    for pair in pairs:
        found = _differences(pair)
        refusal = next((broken[arm] for arm in pair.arms if arm in broken), "") or _refusal(pair, found, allow_diff)
        told = [*_warnings(pair, found), *([refusal] if refusal else []), *_bunched(pair), *_distant(pair)]
        checked[pair] = Check(tuple(found), tuple(told), refusal.split("\n")[0])
        refusals += [refusal] if refusal else []
    if len(refusals) == len(pairs):
        raise IncomparableError(refusals[0])
    return checked


def unallowed(found: Iterable[Difference]) -> list[Difference]:
    """Those that are not part of the treatment."""
    return [difference for difference in found if not difference.allowed]


def _differences(pair: Pair) -> list[Difference]:
    """Differences between the arms of each run, and, where none is due, between runs that add blocks."""
    found = []
    for baseline, candidate in zip(pair.baselines, pair.candidates, strict=True):
        found += differences.find(baseline, candidate, pair.treatment)
    for first, *others in (pair.baselines, pair.candidates):
        for other in others:
            found += differences.find(first, other, [])
    return list(dict.fromkeys(found))


def _refusal(pair: Pair, found: Sequence[Difference], allow_diff: Sequence[str]) -> str:
    refused = [one for one in unallowed(found) if not differences.below(one.key, allow_diff)]
    if not refused:
        return ""
    lines = [f"  {one.key}: {one.baseline} | {one.candidate}  ({one.where})" for one in refused[:_MAX_LISTED]]
    more = [f"  and {len(refused) - _MAX_LISTED} more"] if len(refused) > _MAX_LISTED else []
    keys = ",".join(dict.fromkeys(one.key for one in refused))
    treatment = ", ".join(pair.treatment) or "nothing: the same arm twice"
    head = f"{' and '.join(pair.names)} differ in more than the treatment ({treatment}):"
    advice = f"Declare it as compare.treatment, or compare all the same with --allow-diff {keys}"
    return "\n".join([head, *lines, *more, advice])


# ---- What a reader of the pair's figures must know ----


def _warnings(pair: Pair, found: Sequence[Difference]) -> list[str]:
    warnings = [warning for run in pair.runs for warning in run.warnings]
    if unlike := [difference.key for difference in unallowed(found)]:
        warnings.append(f"the arms differ in more than the treatment: {', '.join(unlike)} (--allow-diff)")
    if not pair.interleaved:
        warnings.append("the arms were measured in different runs, so a drift of the machines is part of the ratio")
    elif not pair.declared:
        warnings.append("this pair was not declared before the run: a finding after the fact (post hoc)")
    for arm in pair.arms:
        services = arm.effectives().values()
        if None in services and not arm.run.imported:
            warnings.append(f"{arm.name}: not every live service was read back: whether its flags arrived is not known")
        warnings += [f"{arm.name}: {warning}" for service in services if service for warning in service.warnings]
    return list(dict.fromkeys(warnings))


def _bunched(pair: Pair) -> list[str]:
    """Warnings where replies came in one piece: TPOT says nothing then, and TTFT is the latency."""
    told = []
    for name, arms in zip(pair.names, (pair.baselines, pair.candidates), strict=True):
        points = pd.concat([arm.points for arm in arms])
        notes = points[points.level == pair.level.name].notes
        if count := notes.str.contains("bunched_tokens", na=False).sum():
            told.append(
                f"{name}: in {count} of {len(notes)} trials at {pair.level} over a tenth of the replies "
                "came in one piece, so TPOT says little there"
            )
    return told


def _distant(pair: Pair) -> list[str]:
    """A warning where the way to the service takes longer than the median latencies differ by."""
    away_ms: list[float | None] = []
    medians_ms = []
    for arms in (pair.baselines, pair.candidates):
        rows = [(arm.run, row) for arm in arms for row in load.records(arm.complete) if row["level"] == pair.level.name]
        away_ms += [load.trial(run, row).round_trip_ms for run, row in rows]
        medians_ms.append(pd.Series([row["latency_p50_ms"] for _, row in rows], dtype=float).median())
    way_ms, differ_ms = pd.Series(away_ms, dtype=float).median(), abs(medians_ms[0] - medians_ms[1])
    if not way_ms > differ_ms:  # or one is not known
        return []
    return [
        f"the way to the service and back takes {way_ms:.3g} ms, more than the {differ_ms:.3g} ms by which "
        f"the median latencies at {pair.level} differ: ratios are diluted by it; drive the load from nearer"
    ]

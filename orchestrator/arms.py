"""Which arms there are, and which of them are compared: jobs (composed configs) less their load levels. Pure."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import paths
from orchestrator.application import digest, service_key
from orchestrator.config import Config
from orchestrator.errors import ConfigError
from orchestrator.kinds import target_of
from orchestrator.load.base import LevelRule
from orchestrator.load.level import Level, Unit
from orchestrator.results.figures import FIGURES, SET_BY_RATE
from orchestrator.results.records import PrimaryCell

LEVEL_AXES = ("sweep.concurrency", "sweep.offered_rps")  # swept or listed, they make levels and not arms
PROFILE_AXIS = "profile"
PROFILE_BASELINE = "baseline"
_GROUPS = ("client", "cluster", "model", "profile", "sweep", "workload")


@dataclass(frozen=True)
class Job:
    """One composed config with the overrides that made it (`key -> value`, as typed) and Hydra's record of it."""

    config: Config
    overrides: Mapping[str, str]
    profile: str
    hydra_dir: Path | None = None


@dataclass(frozen=True, eq=False)
class Arm:
    """One composed config less its levels. `axes`: what varies between arms, e.g. {"profile": "optimized"}."""

    name: str
    axes: Mapping[str, str]
    config: Config
    levels: tuple[Level, ...]
    key: str  # identity of its service; equal keys share a service, but for the copies of an A/A comparison
    copy: int = 0
    hydra_dir: Path | None = None

    @property
    def rule(self) -> LevelRule:
        """Which of its levels is measured next."""
        return self.config.sweep.load

    @property
    def treatment(self) -> tuple[str, ...]:
        """The axes whose values are compared: as declared, else the profile, else the last one swept.

        Workloads and clusters are compared only where that is declared.
        """
        if self.config.compare.axes:
            return self.config.compare.axes
        swept = [axis for axis in self.axes if axis not in ("cluster", "workload")]
        return (PROFILE_AXIS,) if PROFILE_AXIS in swept else tuple(swept[-1:])

    @property
    def other_axes(self) -> tuple[tuple[str, str], ...]:
        """The axes that are held fixed in a comparison."""
        return tuple((axis, value) for axis, value in self.axes.items() if axis not in self.treatment)


def _with_effect(jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose profile can have an effect: a workload without Ray Serve has no flags, and is measured once.

    Raises ConfigError where nothing but such a job was asked for.
    """
    kept = [
        job for job in jobs if not (job.config.workload.server and (job.config.profile.env or job.config.profile.app))
    ]
    names = {job.config.workload.name for job in jobs} - {job.config.workload.name for job in kept}
    if names:
        raise ConfigError(
            f"workload {', '.join(sorted(names))} has no Ray Serve, so a profile's flags cannot reach it; "
            "use profile=baseline (among others)"
        )
    return kept


def make_arms(jobs: Sequence[Job]) -> list[Arm]:
    """Jobs that differ in their levels alone are one arm; a second equal job is a second arm (A/A).

    Raises ConfigError when nothing of what was asked for has an effect.
    """
    jobs = _with_effect(jobs)
    axes = _varying(jobs)
    arms: list[Arm] = []
    same: dict[str, list[int]] = {}  # identity -> indices of its arms
    for job in jobs:
        levels = job.config.sweep.levels(job.config.workload.num_replicas)
        equal = same.setdefault(_identity(job.config), [])
        mergeable = [index for index in equal if not set(levels) & set(arms[index].levels)]
        if mergeable:
            index = mergeable[0]
            merged = tuple(sorted(arms[index].levels + levels))
            arms[index] = dataclasses.replace(arms[index], levels=merged)
            continue
        values = {axis: job.overrides.get(axis, job.profile if axis == PROFILE_AXIS else "default") for axis in axes}
        plain = {axis: value.strip("'\"") for axis, value in values.items()}
        if job.config.workload.server is not None and len(axes) > 1:
            plain.pop(PROFILE_AXIS, None)  # it has none
        parts = [value if axis in _GROUPS else f"{axis.split('.')[-1]}={value}" for axis, value in plain.items()]
        name = ",".join(parts) or job.profile
        copy = len(equal)
        equal.append(len(arms))
        arms.append(
            Arm(
                name=paths.safe_name(name if copy == 0 else f"{name}~{copy + 1}"),
                axes=values,
                config=job.config,
                levels=levels,
                key=service_key(job.config, job.config.cluster),
                copy=copy,
                hydra_dir=job.hydra_dir,
            )
        )
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names), names
    return arms


def _varying(jobs: Sequence[Job]) -> list[str]:
    """Override keys whose values differ between jobs: workload first, profile last."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    varying = [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1 and key not in LEVEL_AXES]
    rank = {"cluster": 0, "workload": 1, PROFILE_AXIS: 3}
    return sorted(varying, key=lambda key: rank.get(key, 2))


def _identity(config: Config) -> str:
    """Digest of the config without its levels; equal for jobs that are the same arm or copies of it."""
    plain = dataclasses.asdict(config)
    for axis in LEVEL_AXES:
        del plain["sweep"][axis.partition(".")[2]]
    kinds = [config.cluster, config.client, config.sweep.load, *config.observe.values()]
    return digest([plain, [target_of(kind) for kind in kinds]])


def _figure(config: Config, level: Level) -> str:
    """The figure that is judged at this level. Raises ConfigError where none is called so, or a rate sets it."""
    is_rate = level.unit is Unit.requests_per_s
    name = config.compare.figure or ("latency_p95_ms" if is_rate else "throughput_rps")
    available = [figure for figure in FIGURES if not (is_rate and figure in SET_BY_RATE)]
    if name not in available:
        why = (
            f"follows from the {level.text} that are offered" if name in FIGURES else "is no figure that can be judged"
        )
        raise ConfigError(f"compare.figure={name} {why}; choose one of {', '.join(available)}")
    return name


def comparisons(arms: Iterable[Arm]) -> list[list[Arm]]:
    """Groups of arms that are compared with each other, or shown together."""
    groups: dict[tuple[tuple[str, str], ...], list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.other_axes, []).append(arm)
    return list(groups.values())


def primary_cells(arms: Sequence[Arm]) -> list[PrimaryCell]:
    """What the verdicts will be about, fixed before the first deployment: one figure at the highest level.

    One cell for each arm that is compared with its baseline, at the highest level that they share; an arm that
    stands alone is its own baseline, without a candidate. Raises ConfigError where arms that are compared cannot be.
    """
    declared, varying = arms[0].config.compare.axes, arms[0].axes
    if unknown := [axis for axis in declared if axis not in varying]:
        raise ConfigError(
            f"compare.treatment={','.join(declared)}, but {', '.join(unknown)} is the same in all arms; "
            f"what varies: {', '.join(varying) or 'nothing'}"
        )
    cells = []
    for members in comparisons(arms):
        baseline = _baseline(members)
        candidates: list[Arm | None] = [arm for arm in members if arm is not baseline]
        for candidate in candidates or [None]:
            shared = set(baseline.levels) & set((candidate or baseline).levels)
            if not shared:
                levels = "; ".join(
                    f"{arm.name}: {', '.join(level.short_text for level in arm.levels)}" for arm in members
                )
                raise ConfigError(
                    f"arms that are compared need a level in common ({' or '.join(LEVEL_AXES)}), found {levels}"
                )
            cells.append(
                PrimaryCell(
                    axes=dict(baseline.other_axes),
                    baseline=baseline.name,
                    candidate=candidate.name if candidate else None,
                    metric=_figure(baseline.config, max(shared)),
                    level=max(shared).name,
                )
            )
    return cells


def _baseline(members: Sequence[Arm]) -> Arm:
    declared = members[0].config.compare.baseline
    wanted = declared or PROFILE_BASELINE
    if named := [arm for arm in members if arm.name == wanted]:
        return named[0]
    found = ", ".join(arm.name for arm in members)
    matching = [arm for arm in members if wanted in [arm.axes.get(axis) for axis in arm.treatment]]
    if len(matching) > 1 and any(arm.axes != matching[0].axes for arm in matching):
        raise ConfigError(f"compare.baseline={wanted!r} fits several of the arms that are compared; name one: {found}")
    if declared and not matching and len(members) > 1:
        raise ConfigError(f"compare.baseline={declared!r} is none of the arms that are compared: {found}")
    return matching[0] if matching else members[0]

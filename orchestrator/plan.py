"""What will be run, and in which order. Pure.

Repeats turn arms into blocks; a block's services are brought up wave by wave. The order of arms inside a block is
shuffled with a recorded seed, so a drifting machine cannot favour one arm.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from orchestrator.arms import Arm, Job, comparisons, make_arms, primary_cells
from orchestrator.config import Config, Redeploy
from orchestrator.cost import TEAR_DOWN_S, bring_up_s, cost_usd, trial_s
from orchestrator.errors import ConfigError
from orchestrator.load.level import Level
from orchestrator.paths import trial_id


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
    level: Level

    @property
    def id(self) -> str:
        return trial_id(self.level.name, self.repeat)


@dataclass(frozen=True, eq=False)
class Wave:
    """Services that live at the same time, and their trials in the order of measurement."""

    services: tuple[Service, ...]
    trials: tuple[Trial, ...]

    @property
    def duration_s(self) -> float:
        """Estimate in seconds; services come up side by side."""
        up_s = max(bring_up_s(service.config) for service in self.services)
        return sum(trial_s(trial.arm.config, trial.level) for trial in self.trials) + up_s + TEAR_DOWN_S


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
    return plan_arms(make_arms(jobs), seed)


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
    first = arms[0].config
    blocks = _blocks(arms, first.sweep.repeats, first.cluster.redeploy, random.Random(seed))
    waves = [_wave(services) for services in _chunks(blocks, first.cluster.max_live_services, first.cluster.redeploy)]
    plan = Plan(tuple(arms), tuple(waves), seed)
    planned = sum(len(arm.levels) for arm in arms) * first.sweep.repeats
    assert len(plan.trials) == planned, (len(plan.trials), planned)
    return plan


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

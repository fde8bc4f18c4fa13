"""What will be run, and in which order. Pure.

Repeats turn arms into blocks; a block's services are brought up wave by wave. The order of arms inside a block is
shuffled with a recorded seed, so a drifting machine cannot favour one arm.

Levels are asked for, one after the other: what comes next may depend on what was measured before, and on nothing
else. So a run that was cut off goes on by walking the same steps again from the start, past what is on record.
"""

import itertools
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

from orchestrator.arms import Arm, Job, comparisons, make_arms, primary_cells
from orchestrator.clients.base import Load, Window
from orchestrator.config import Config
from orchestrator.cost import TEAR_DOWN_S, cost_usd
from orchestrator.errors import ConfigError, RuleError
from orchestrator.load.base import Measured
from orchestrator.load.level import Level
from orchestrator.paths import trial_id
from orchestrator.results.records import SummaryRow

_T = TypeVar("_T")


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


@dataclass(frozen=True)
class Trial:
    """One measurement: a service at a level."""

    service: Service
    arm: Arm
    repeat: int
    level: Level

    @property
    def id(self) -> str:
        return trial_id(self.level.name, self.repeat)


Known = Callable[[Trial], SummaryRow | None]  # a trial's row once it was measured or has failed, else None


@dataclass(frozen=True, eq=False)
class Replicate:
    """One arm in one block. Its next level depends on what it did in this block alone."""

    service: Service
    arm: Arm
    repeat: int

    @property
    def listed(self) -> list[Trial]:
        """The trials at the listed levels."""
        return [Trial(self.service, self.arm, self.repeat, level) for level in self.arm.levels]

    @property
    def num_trials(self) -> int:
        """The largest number of trials that there can be."""
        return self.arm.rule.most(self.arm.levels)

    @property
    def duration_s(self) -> float:
        """Estimate in seconds: a level that is not listed takes as long as those that are."""
        listed_s = sum(_trial_s(self.arm.config, level) for level in self.arm.levels)
        return listed_s * self.num_trials / len(self.arm.levels)

    def steps(self, known: Known) -> Iterator[Trial]:
        """The trials that the arm's rule asks for, from the first. One must be known before the next is taken.

        Raises RuleError when the rule gives no level that can be measured now.
        """
        done: list[Measured] = []
        while (level := next_level(self.arm, done)) is not None:
            trial = Trial(self.service, self.arm, self.repeat, level)
            yield trial
            row = known(trial)
            assert row is not None, f"{self.arm.name}/{trial.id} was asked for and not measured"
            done.append(Measured(level, row))

    def next(self, known: Known) -> Trial | None:
        """The first trial that is not known; None: this arm is done in this block."""
        return next((trial for trial in self.steps(known) if known(trial) is None), None)

    def expected(self, known: Known) -> list[Trial]:
        """The trials left that are known now: the next one, and the listed ones. Empty: the arm is done here."""
        following = self.next(known)
        if following is None:
            return []
        return list(dict.fromkeys([*(trial for trial in self.listed if known(trial) is None), following]))

    def num_left(self, known: Known) -> int:
        """How many trials are still to be measured, at most."""
        try:
            if self.next(known) is None:
                return 0
        except RuleError:
            return 0
        done = [*itertools.takewhile(known, self.steps(known)), *filter(known, self.listed)]
        return max(1, self.num_trials - len(set(done)))


@dataclass(frozen=True, eq=False)
class Wave:
    """Services that live at the same time."""

    services: tuple[Service, ...]

    @property
    def blocks(self) -> list[list[Replicate]]:
        """Block by block, the arms in the order in which they take turns."""
        return [
            [
                Replicate(service, arm, repeat)
                for service in self.services
                if repeat in service.repeats
                for arm in service.arms
            ]
            for repeat in sorted({repeat for service in self.services for repeat in service.repeats})
        ]

    @property
    def replicates(self) -> list[Replicate]:
        return [replicate for block in self.blocks for replicate in block]

    @property
    def trials(self) -> list[Trial]:
        """The trials at the listed levels, in the order of measurement."""
        return [trial for block in self.blocks for trial in _taking_turns(replicate.listed for replicate in block)]

    @property
    def duration_s(self) -> float:
        """Estimate in seconds; services come up side by side."""
        up_s = max(service.config.cluster.bring_up_s(service.config) for service in self.services)
        return sum(replicate.duration_s for replicate in self.replicates) + up_s + TEAR_DOWN_S

    def steps(self, known: Known, services: Collection[Service]) -> Iterator[Trial]:
        """The trials of these services in the order of measurement, from the start; those that are known included.

        One at a time, block by block, and in a block the arms take turns. Each is asked for its next level when its
        turn comes, so a trial must be known before the step after it is taken.
        """
        for block in self.blocks:
            replicates = [replicate for replicate in block if replicate.service in services]
            yield from _taking_turns(replicate.steps(known) for replicate in replicates)

    def expected(self, known: Known) -> list[Trial]:
        """The trials left that are known now; empty: the wave needs no service."""
        return [trial for replicate in self.replicates for trial in replicate.expected(known)]


@dataclass(frozen=True, eq=False)
class Plan:
    arms: tuple[Arm, ...]
    waves: tuple[Wave, ...]
    seed: int

    @property
    def services(self) -> list[Service]:
        return [service for wave in self.waves for service in wave.services]

    @property
    def replicates(self) -> list[Replicate]:
        return [replicate for wave in self.waves for replicate in wave.replicates]

    @property
    def trials(self) -> list[Trial]:
        """The trials at the listed levels, in the order of measurement."""
        return [trial for wave in self.waves for trial in wave.trials]

    @property
    def num_trials(self) -> int:
        """The largest number of trials that there can be."""
        return sum(replicate.num_trials for replicate in self.replicates)

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

    def num_left(self, known: Known) -> int:
        """How many trials are still to be measured, at most."""
        return sum(replicate.num_left(known) for replicate in self.replicates)


def next_level(arm: Arm, done: Sequence[Measured]) -> Level | None:
    """The level that the arm's rule asks for after these.

    Raises RuleError when it raises, answers something that is no level, or asks for one again: anybody may have
    written it.
    """
    rule = f"the rule {type(arm.rule).__name__} of {arm.name}"
    after = f" after {', '.join(measured.level.text for measured in done)}" if done else ""
    try:
        level = arm.rule.next(arm.levels, done)
    except Exception as error:
        raise RuleError(f"{rule} failed{after}: {type(error).__name__}: {error}") from error
    if level is not None and not isinstance(level, Level):
        raise RuleError(f"{rule} answered {level!r}{after}; it must answer a Level or None")
    if level in [measured.level for measured in done]:
        raise RuleError(f"{rule} asks for {level} again{after}")
    return level


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
    for arm in arms:
        try:
            first_level = next_level(arm, [])
        except RuleError as error:
            raise ConfigError(f"sweep.load: {error}") from error
        if first_level is None:
            raise ConfigError(f"sweep.load: the rule {type(arm.rule).__name__} of {arm.name} asks for no level at all")
    first = arms[0].config
    blocks = _blocks(arms, first.sweep.repeats, first.cluster.redeploy, random.Random(seed))
    waves = [
        Wave(tuple(services)) for services in _chunks(blocks, first.cluster.max_live_services, first.cluster.redeploy)
    ]
    plan = Plan(tuple(arms), tuple(waves), seed)
    planned = sum(len(arm.levels) for arm in arms) * first.sweep.repeats
    assert len(plan.trials) == planned, (len(plan.trials), planned)
    return plan


def expected_load(config: Config, level: Level) -> Load:
    """What one trial will send, before the addresses are known: as many as there will be, all empty."""
    sweep, workload = config.sweep, config.workload
    window = Window(sweep.ramp_up_s, sweep.warmup_s, sweep.duration_s, sweep.drain_s)
    num_servers = workload.num_replicas if workload.server else 1
    return Load([""] * num_servers, None, level, window, workload.num_replicas, config.cluster.client_processes)


def _trial_s(config: Config, level: Level) -> float:
    return config.client.takes_s(expected_load(config, level)) + config.sweep.cooldown_s


def _blocks(arms: Sequence[Arm], repeats: int, redeploy: str, rng: random.Random) -> list[list[Service]]:
    """The services of each block, shuffled within the block."""
    shared: dict[tuple[str, int], list[Arm]] = {}
    for arm in arms:
        shared.setdefault((arm.key, arm.copy), []).append(arm)
    spans = [tuple(range(repeats))] if redeploy == "never" else [(repeat,) for repeat in range(repeats)]
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


def _chunks(blocks: list[list[Service]], max_live: int, redeploy: str) -> Iterable[list[Service]]:
    """Services that live together: whole blocks where `max_live` allows, else parts of one block."""
    size = len(blocks[0])
    if redeploy == "never" and size > max_live:
        raise ConfigError(
            f"cluster.redeploy=never keeps all {size} services up at once, but cluster.max_live_services={max_live}; "
            "raise it, or use cluster.redeploy=per_repeat"
        )
    num_blocks = max(1, max_live // size)
    for first in range(0, len(blocks), num_blocks):
        services = list(itertools.chain.from_iterable(blocks[first : first + num_blocks]))
        yield from (services[start : start + max_live] for start in range(0, len(services), max_live))


def _taking_turns(queues: Iterable[Iterable[_T]]) -> Iterator[_T]:
    """An item of each queue in turn, until all have ended. An item is taken from its queue when its turn comes."""
    waiting = [iter(queue) for queue in queues]
    while waiting:
        for queue in [*waiting]:
            try:
                found = next(queue)
            except StopIteration:
                waiting.remove(queue)
            else:
                yield found

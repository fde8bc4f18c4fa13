"""Which arms, services and trials come of which jobs, in which order?"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.application import service_key
from orchestrator.arms import Arm, Job, primary_cells
from orchestrator.config import Config
from orchestrator.errors import ConfigError, RuleError
from orchestrator.load.base import LevelRule, Measured
from orchestrator.load.level import Level
from orchestrator.plan import Plan, Trial, Wave, make_plan, plan_arms
from orchestrator.results.records import SummaryRow
from tests.conftest import Compose
from tests.runs import planned_row


def jobs(compose: Compose, *each: Sequence[str]) -> list[Job]:
    """One job for each list of overrides."""
    made = []
    for overrides in each:
        pairs = dict(override.lstrip("+").split("=", 1) for override in overrides)
        made.append(Job(compose(*overrides), pairs, pairs.get("profile", "baseline")))
    return made


def names(plan: Plan) -> list[str]:
    return [arm.name for arm in plan.arms]


def clients(*amounts: int) -> tuple[Level, ...]:
    return tuple(map(Level.of_clients, amounts))


def test_arms_are_named_after_what_varies(compose: Compose) -> None:
    assert names(make_plan(jobs(compose, ["workload=recsys", "profile=grpc"]), 0)) == ["grpc"]
    two = jobs(compose, ["profile=baseline"], ["profile=grpc"])
    assert names(make_plan(two, 0)) == ["baseline", "grpc"]
    four = jobs(
        compose, *(["workload=" + w, "profile=" + p] for w in ("unary", "streaming") for p in ("baseline", "grpc"))
    )
    plan = make_plan(four, 0)
    assert names(plan) == ["unary,baseline", "unary,grpc", "streaming,baseline", "streaming,grpc"]
    assert plan.arms[3].axes == {"workload": "streaming", "profile": "grpc"}
    assert plan.arms[3].other_axes == (("workload", "streaming"),)
    replicas = jobs(compose, ["workload.num_replicas=1"], ["workload.num_replicas=2"])
    assert names(make_plan(replicas, 0)) == ["num_replicas=1", "num_replicas=2"]


def test_swept_levels_are_one_arm(compose: Compose) -> None:
    swept = make_plan(jobs(compose, ["sweep.concurrency=4"], ["sweep.concurrency=2"]), 0)
    listed = make_plan(jobs(compose, ["sweep.concurrency=[2,4]"]), 0)
    assert names(swept) == names(listed) == ["baseline"]
    assert swept.arms[0].levels == listed.arms[0].levels == clients(2, 4)
    assert [trial.id for trial in swept.trials] == [trial.id for trial in listed.trials]


def test_equal_jobs_are_an_a_a_comparison_with_services_of_their_own(compose: Compose) -> None:
    plan = make_plan(jobs(compose, ["profile=baseline", "sweep=quick"], ["profile=baseline", "sweep=quick"]), 0)
    assert names(plan) == ["baseline", "baseline~2"]
    assert plan.arms[0].key == plan.arms[1].key
    assert len(plan.services) == 2 * 3


def test_a_a_with_swept_levels(compose: Compose) -> None:
    each = [["profile=baseline", f"sweep.concurrency={level}"] for level in (2, 4) for _ in range(2)]
    plan = make_plan(jobs(compose, *each), 0)
    assert {arm.name: arm.levels for arm in plan.arms} == {"baseline": clients(2, 4), "baseline~2": clients(2, 4)}


def test_every_block_has_every_arm_once_in_shuffled_order(compose: Compose) -> None:
    three = jobs(compose, *([f"profile={name}", "sweep.repeats=12"] for name in ("baseline", "grpc", "haproxy")))
    plan = make_plan(three, seed=7)
    blocks = [tuple(service.arms[0].name for service in plan.services if service.repeats == (r,)) for r in range(12)]
    assert [service.repeats[0] for service in plan.services] == sorted(3 * list(range(12)))
    assert all(sorted(block) == ["baseline", "grpc", "haproxy"] for block in blocks)
    assert len(set(blocks)) > 1
    assert [s.label for s in make_plan(three, seed=7).services] == [s.label for s in plan.services]
    assert [s.label for s in make_plan(three, seed=8).services] != [s.label for s in plan.services]
    counts = Counter((trial.arm.name, trial.id) for trial in plan.trials)
    assert set(counts.values()) == {1}
    assert len(counts) == 3 * 9 * 12


def test_arms_to_be_compared_stay_next_to_each_other(compose: Compose) -> None:
    four = jobs(
        compose, *(["workload=" + w, "profile=" + p] for p in ("baseline", "grpc") for w in ("unary", "streaming"))
    )
    first = set()
    for seed in range(20):
        workloads = [service.config.workload.name for service in make_plan(four, seed).services]
        assert all(workloads[i] == workloads[i + 1] for i in range(0, len(workloads), 2)), seed
        first.add(workloads[0])
    assert first == {"unary", "streaming"}  # the comparisons are shuffled too


def test_local_services_live_one_at_a_time(compose: Compose) -> None:
    plan = make_plan(jobs(compose, ["profile=baseline"], ["profile=grpc"]), 0)
    for wave in plan.waves:
        assert len(wave.services) == 1
        assert [trial.level for trial in wave.trials] == list(wave.services[0].arms[0].levels)
        assert {trial.service for trial in wave.trials} == set(wave.services)


def test_services_that_live_together_are_measured_level_by_level(compose: Compose) -> None:
    both = [
        [f"profile={name}", "cluster.max_live_services=2", "sweep.concurrency=[1,2]", "sweep.repeats=2"]
        for name in ("baseline", "grpc")
    ]
    plan = make_plan(jobs(compose, *both), 0)
    assert [len(wave.services) for wave in plan.waves] == [2, 2]
    for wave in plan.waves:
        assert [trial.level.concurrency for trial in wave.trials] == [1, 1, 2, 2]
        assert wave.trials[0].arm is wave.trials[2].arm
        assert wave.trials[0].arm is not wave.trials[1].arm


def test_a_wave_holds_whole_blocks(compose: Compose) -> None:
    each = [[f"profile={name}", "cluster.max_live_services=5", "sweep.repeats=3"] for name in ("baseline", "grpc")]
    assert [len(wave.services) for wave in make_plan(jobs(compose, *each), 0).waves] == [4, 2]


def test_redeploy_never_needs_room_for_all_arms(compose: Compose) -> None:
    def each(live: int) -> list[list[str]]:
        return [
            [f"profile={name}", "cluster.redeploy=never", f"cluster.max_live_services={live}", "sweep.repeats=3"]
            for name in ("baseline", "grpc")
        ]

    with pytest.raises(ConfigError, match="max_live_services=1"):
        make_plan(jobs(compose, *each(1)), 0)
    plan = make_plan(jobs(compose, *each(2)), 0)
    assert [service.repeats for service in plan.services] == [(0, 1, 2), (0, 1, 2)]
    assert len(plan.trials) == 2 * 9 * 3


def test_service_key_is_what_is_deployed(compose: Compose) -> None:
    def key(*overrides: str) -> str:
        config = compose(*overrides)
        return service_key(config, config.cluster)

    base = key()
    for same in ("workload.payload_bytes=0", "sweep=quick", "validity.max_drift_ratio=1", "cluster.client_processes=1"):
        assert key(same) == base, same
    for other in (
        "profile=grpc",
        "workload.num_replicas=2",
        "cluster.num_cpus=8",
        "cluster.http_port=9000",
        "workload.max_ongoing_requests=5",
    ):
        assert key(other) != base, other
    assert key("workload=streaming") != key("workload=streaming", "workload.ttft_s=1")


def test_arms_that_differ_in_the_client_share_a_service(compose: Compose) -> None:
    plan = make_plan(
        jobs(compose, ["workload.payload_bytes=0", "sweep=quick"], ["workload.payload_bytes=9", "sweep=quick"]), 0
    )
    assert names(plan) == ["payload_bytes=0", "payload_bytes=9"]
    assert len(plan.services) == 3
    assert [arm.name for arm in plan.services[0].arms] == names(plan)
    assert len(plan.trials) == 2 * 3 * 3


def test_primary_cell_is_throughput_at_the_highest_level(compose: Compose) -> None:
    four = jobs(
        compose, *(["workload=" + w, "profile=" + p] for p in ("baseline", "grpc") for w in ("unary", "streaming"))
    )
    cells = primary_cells(make_plan(four, 0).arms)
    assert dataclasses.asdict(cells[0]) == {
        "axes": {"workload": "unary"},
        "baseline": "unary,baseline",
        "candidate": "unary,grpc",
        "metric": "throughput_rps",
        "level": "c0256",
    }
    assert [(cell.candidate, cell.level) for cell in cells] == [
        ("unary,grpc", "c0256"),
        ("streaming,grpc", "c0128"),
    ]


def pairs(arms: Sequence[Arm]) -> list[tuple[str, str | None]]:
    return [(cell.baseline, cell.candidate) for cell in primary_cells(arms)]


def test_what_is_compared_is_declared(compose: Compose) -> None:
    by_replicas = jobs(compose, ["workload.num_replicas=1"], ["workload.num_replicas=2"])
    assert pairs(make_plan(by_replicas, 0).arms) == [("num_replicas=1", "num_replicas=2")]
    workloads = (["workload=unary"], ["workload=streaming"])
    assert pairs(make_plan(jobs(compose, *workloads), 0).arms) == [("unary", None), ("streaming", None)]
    declared = ["compare.treatment=workload", "compare.baseline=streaming"]
    each = jobs(compose, *([*workload, *declared] for workload in workloads))
    assert pairs(make_plan(each, 0).arms) == [("streaming", "unary")]
    assert primary_cells(make_plan(each, 0).arms)[0].level == "c0128"  # the highest that both have
    three = jobs(compose, *([f"profile={p}"] for p in ("grpc", "baseline", "haproxy")))
    assert pairs(make_plan(three, 0).arms) == [("baseline", "grpc"), ("baseline", "haproxy")]
    both = [
        ["compare.treatment=[workload,profile]", "sweep=quick", f"workload={w}", f"profile={p}"]
        for w, p in (("unary", "baseline"), ("streaming", "baseline"), ("streaming", "grpc"))
    ]
    with pytest.raises(ConfigError, match=r"fits several .* name one: unary,baseline, streaming,baseline"):
        make_plan(jobs(compose, *both), 0)
    named = jobs(compose, *([*overrides, "compare.baseline='unary,baseline'"] for overrides in both))
    assert len(pairs(make_plan(named, 0).arms)) == 2
    twice = jobs(compose, ["profile=baseline"], ["profile=baseline"])
    assert pairs(make_plan(twice, 0).arms) == [("baseline", "baseline~2")]


def test_a_treatment_must_vary_and_share_a_level(compose: Compose) -> None:
    profiles = (["profile=baseline"], ["profile=grpc"])
    with pytest.raises(ConfigError, match="what varies: profile"):
        make_plan(jobs(compose, *([*profile, "compare.treatment=workload"] for profile in profiles)), 0)
    with pytest.raises(ConfigError, match=r"compare\.baseline='haproxy' is none of .* baseline, grpc"):
        make_plan(jobs(compose, *([*profile, "compare.baseline=haproxy"] for profile in profiles)), 0)
    apart = [[*profile, f"sweep.concurrency=[{level}]"] for level, profile in enumerate(profiles, 1)]
    with pytest.raises(ConfigError, match="a level in common"):
        make_plan(jobs(compose, *apart), 0)


def test_blocks_need_the_same_repeats_everywhere(compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.repeats must be the same"):
        make_plan(jobs(compose, ["sweep.repeats=2"], ["sweep.repeats=3"]), 0)


def test_rates_are_levels(compose: Compose) -> None:
    model = ["workload=llm", "model=tiny", "sweep=quick", "sweep.concurrency=null"]
    profiles = ("profile=baseline", "profile=optimized")
    listed = make_plan(jobs(compose, *([*model, "sweep.offered_rps=[20,2.5]", profile] for profile in profiles)), 0)
    assert names(listed) == ["baseline", "optimized"]
    assert [level.name for level in listed.arms[0].levels] == ["r000020.00", "r000002.50"]
    assert {(trial.id, trial.level.concurrency) for trial in listed.trials if trial.repeat == 0} == {
        ("r000002.50-r0", None),
        ("r000020.00-r0", None),
    }
    (cell,) = primary_cells(listed.arms)
    assert (cell.metric, cell.level) == ("latency_p95_ms", "r000020.00")
    swept = make_plan(jobs(compose, [*model, "sweep.offered_rps=4"], [*model, "sweep.offered_rps=2"]), 0)
    assert [arm.levels for arm in swept.arms] == [(Level.of_rate(2), Level.of_rate(4))]


def test_per_replica_multiplies_rates_as_well(compose: Compose) -> None:
    model = ["workload=llm", "model=tiny", "workload.num_replicas=3", "client.timeout_s=9000"]
    (arm,) = make_plan(
        jobs(compose, [*model, "sweep.per_replica=true", "sweep.concurrency=null", "sweep.offered_rps=[0.1,5]"]), 0
    ).arms
    assert arm.levels == (Level.of_rate(0.3), Level.of_rate(15))


def test_what_is_judged_is_chosen(compose: Compose) -> None:
    at_rate = ["workload=llm", "model=tiny", "sweep=quick", "sweep.concurrency=null", "sweep.offered_rps=2"]
    for load, figure in (([], "latency_p99_ms"), (at_rate, "ttft_p99_ms"), (at_rate, "goodput_rps")):
        plan = make_plan(jobs(compose, [*load, f"compare.figure={figure}"]), 0)
        assert [cell.metric for cell in primary_cells(plan.arms)] == [figure]
    for load, figure, says in (
        (
            at_rate,
            "throughput_rps",
            "follows from the 2 req/s that are offered; choose one of goodput_rps, latency_mean",
        ),
        ([], "latency_p98_ms", "is no figure that can be judged; choose one of throughput_rps, goodput_rps"),
    ):
        with pytest.raises(ConfigError, match=f"compare.figure={figure} {says}"):
            make_plan(jobs(compose, [*load, f"compare.figure={figure}"]), 0)


# ---- Steps ----


def walk(plan: Plan, known: dict[Trial, SummaryRow], measure: Callable[[Trial], SummaryRow], limit: int) -> list[Trial]:
    """As a run does: at most `limit` trials, which are added to what is known. Returns them."""
    measured: list[Trial] = []
    for wave in plan.waves:
        needed = {trial.service for trial in wave.expected(known.get)}
        for trial in wave.steps(known.get, needed):
            if trial not in known:
                if len(measured) == limit:
                    return measured
                known[trial] = measure(trial)
                measured.append(trial)
        assert wave.expected(known.get) == []
    return measured


def of_latency(latency_ms: Callable[[Trial], float]) -> Callable[[Trial], SummaryRow]:
    return lambda trial: planned_row(state="complete", valid=True, latency_p99_ms=latency_ms(trial))


def listed_order(wave: Wave) -> list[tuple[str, int, Level]]:
    """What the order was before levels were asked for: repeat by repeat, arms interleaved level by level."""
    order: list[tuple[str, int, Level]] = []
    for repeat in sorted({repeat for service in wave.services for repeat in service.repeats}):
        pairs = [(service, arm) for service in wave.services if repeat in service.repeats for arm in service.arms]
        by_level = itertools.zip_longest(*([(arm.name, repeat, level) for level in arm.levels] for _, arm in pairs))
        order += [place for row in by_level for place in row if place is not None]
    return order


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 99), repeats=st.integers(1, 4), max_live=st.integers(1, 7))
def test_a_ladder_gives_the_listed_levels_in_the_order_of_before(
    compose: Compose, data: st.DataObject, seed: int, repeats: int, max_live: int
) -> None:
    config = _composed(compose)
    never = data.draw(st.booleans())
    config = dataclasses.replace(
        config,
        sweep=dataclasses.replace(config.sweep, repeats=repeats),
        cluster=dataclasses.replace(
            config.cluster,
            max_live_services=7 if never else max_live,
            redeploy="never" if never else "per_repeat",
        ),
    )
    arms = []
    for number in range(data.draw(st.integers(1, 4))):
        levels = [*data.draw(st.lists(st.integers(2, 99), unique=True, max_size=3)), 1]
        key = str(data.draw(st.integers(0, 3)))  # equal keys share a service
        arms.append(Arm(f"arm{number}", {"profile": str(number)}, config, clients(*levels), key))
    plan = plan_arms(arms, seed)
    before = [place for wave in plan.waves for place in listed_order(wave)]
    assert [(trial.arm.name, trial.repeat, trial.level) for trial in plan.trials] == before
    known: dict[Trial, SummaryRow] = {}
    assert walk(plan, known, of_latency(lambda _: 1.0), 10_000) == plan.trials
    assert plan.num_trials == len(plan.trials) == len(before)
    for trial in data.draw(st.lists(st.sampled_from(plan.trials), unique=True)):
        del known[trial]
    missing = [trial for trial in plan.trials if trial not in known]
    assert plan.num_left(known.get) == len(missing)
    assert sorted(map(str, (trial for wave in plan.waves for trial in wave.expected(known.get)))) == sorted(
        map(str, missing)
    )
    assert walk(plan, known, of_latency(lambda _: 1.0), 10_000) == missing


_configs: list[Config] = []


def _composed(compose: Compose) -> Config:
    """Once, for it takes half a second."""
    if not _configs:
        _configs.append(compose())
    return _configs[0]


@dataclass
class UntilSlow(LevelRule):
    """The listed levels, up to the first whose p99 is above a limit."""

    max_latency_p99_ms: float

    def next(self, listed: Sequence[Level], done: Sequence[Measured]) -> Level | None:
        if done and (done[-1].row.latency_p99_ms is None or done[-1].row.latency_p99_ms > self.max_latency_p99_ms):
            return None
        return next((level for level in listed if level not in [measured.level for measured in done]), None)


@dataclass
class Doubling(LevelRule):
    """From the first listed level: twice as much while p99 is within a limit, then halfway back until one apart."""

    max_latency_p99_ms: float

    def next(self, listed: Sequence[Level], done: Sequence[Measured]) -> Level | None:
        if any(measured.row.latency_p99_ms is None for measured in done):
            return None
        found = {measured.level.amount: measured.row.latency_p99_ms or 0 for measured in done}
        good = [amount for amount, p99_ms in found.items() if p99_ms <= self.max_latency_p99_ms]
        bad = [amount for amount, p99_ms in found.items() if p99_ms > self.max_latency_p99_ms]
        if not done:
            return listed[0]
        wanted = (max(good, default=0) + min(bad)) // 2 if bad else 2 * max(good)
        return Level.of_clients(int(wanted)) if wanted >= 1 and wanted not in found else None

    def most(self, listed: Sequence[Level]) -> int:
        return 20


@pytest.fixture
def two_arms(compose: Compose) -> Plan:
    """Side by side, two blocks."""
    each = [
        [f"profile={name}", "sweep.concurrency=[4,8,16]", "sweep.repeats=2", "cluster.max_live_services=2"]
        for name in ("baseline", "grpc")
    ]
    return make_plan(jobs(compose, *each), 0)


def p99_ms(trial: Trial) -> float:
    """More with every client, sooner in one arm; the blocks differ as well."""
    assert trial.level.concurrency is not None
    return trial.level.concurrency * (2 if trial.arm.name == "grpc" else 1) + trial.repeat


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        (
            UntilSlow(10),
            {("baseline", 0): [4, 8, 16], ("grpc", 0): [4, 8], ("baseline", 1): [4, 8, 16], ("grpc", 1): [4, 8]},
        ),
        (
            Doubling(20),
            {
                ("baseline", 0): [4, 8, 16, 32, 24, 20, 22, 21],
                ("grpc", 0): [4, 8, 16, 12, 10, 11],
                ("baseline", 1): [4, 8, 16, 32, 24, 20, 18, 19],
                ("grpc", 1): [4, 8, 16, 12, 10, 9],
            },
        ),
    ],
    ids=lambda each: type(each).__name__,
)
def test_cut_off_anywhere_and_resumed_the_same_trials_come(
    two_arms: Plan, monkeypatch: pytest.MonkeyPatch, rule: LevelRule, found: dict[tuple[str, int], list[int]]
) -> None:
    monkeypatch.setattr(Arm, "rule", rule)
    whole = walk(two_arms, {}, of_latency(p99_ms), 1000)
    levels: dict[tuple[str, int], list[int | None]] = {}
    for trial in whole:
        levels.setdefault((trial.arm.name, trial.repeat), []).append(trial.level.concurrency)
    assert levels == found
    repeats = [trial.repeat for trial in whole]
    assert repeats == sorted(repeats)
    first = [trial.arm.name for trial in whole if trial.repeat == 0][:4]
    assert first == first[:2] * 2  # they take turns
    for cut in range(len(whole) + 1):
        known: dict[Trial, SummaryRow] = {}
        begun = walk(two_arms, known, of_latency(p99_ms), cut)
        left = two_arms.num_left(known.get)
        assert (left == 0) == (cut == len(whole))
        assert left >= len(whole) - cut
        assert begun + walk(two_arms, known, of_latency(p99_ms), 1000) == whole


def test_a_service_that_has_nothing_left_to_measure_is_not_needed(
    two_arms: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Arm, "rule", UntilSlow(10))
    known: dict[Trial, SummaryRow] = {}
    walk(two_arms, known, of_latency(p99_ms), 4)  # all of the first block, but for the last level of the baseline
    (trial,) = two_arms.waves[0].expected(known.get)
    assert (trial.arm.name, trial.id) == ("baseline", "c0016-r0")
    assert len(two_arms.waves[1].expected(known.get)) == 6  # what is listed; that one arm stops early is not known yet


def test_what_fails_with_a_service_is_what_is_listed_and_what_comes_next(
    two_arms: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Arm, "rule", Doubling(20))
    known = {trial: of_latency(p99_ms)(trial) for trial in two_arms.trials if trial.arm.name == "baseline"}
    block = two_arms.waves[0]
    assert {trial.id for trial in block.expected(known.get) if trial.arm.name == "grpc"} == {
        "c0004-r0",
        "c0008-r0",
        "c0016-r0",
    }
    assert [trial.id for trial in block.expected(known.get) if trial.arm.name == "baseline"] == ["c0032-r0"]


def test_a_rule_that_asks_again_for_the_same_is_refused(two_arms: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(LevelRule):
        def next(self, listed: Sequence[Level], done: Sequence[Measured]) -> Level | None:
            return listed[0]

    monkeypatch.setattr(Arm, "rule", Stuck())
    with pytest.raises(RuleError, match=r"Stuck of (baseline|grpc) asks for 4 clients again after 4 clients"):
        walk(two_arms, {}, of_latency(p99_ms), 1000)


def test_estimates_are_of_the_most_that_a_rule_can_ask_for(two_arms: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    listed_s = two_arms.duration_s
    trials_s = sum(replicate.duration_s for replicate in two_arms.replicates)
    monkeypatch.setattr(Arm, "rule", Doubling(20))
    assert two_arms.num_trials == 4 * 20
    assert two_arms.duration_s == pytest.approx(listed_s + trials_s * (20 / 3 - 1))


class Faulty(LevelRule):
    """Fails, answers what is no level, or asks for nothing: at once, or after a level."""

    def __init__(self, answer: object, after: int) -> None:
        self.answer, self.after = answer, after

    def next(self, listed: Sequence[Level], done: Sequence[Measured]) -> Level | None:
        if len(done) < self.after:
            return listed[len(done)]
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (KeyError("boom"), r"the rule Faulty of baseline failed: KeyError: 'boom'"),
        ("c4", r"the rule Faulty of baseline answered 'c4'; it must answer a Level or None"),
        (None, r"the rule Faulty of baseline asks for no level at all"),
    ],
)
def test_a_rule_that_gives_no_first_level_is_refused_before_anything_is_deployed(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, answer: object, says: str
) -> None:
    monkeypatch.setattr(Arm, "rule", Faulty(answer, after=0))
    with pytest.raises(ConfigError, match=rf"sweep\.load: {says}"):
        make_plan(jobs(compose, ["profile=baseline"]), 0)

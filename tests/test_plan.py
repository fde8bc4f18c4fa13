"""Which arms, services and trials come of which jobs, in which order?"""

from collections import Counter
from collections.abc import Sequence

import pytest

from orchestrator.application import service_key
from orchestrator.arms import Arm, Job, primary_cells
from orchestrator.errors import ConfigError
from orchestrator.load.level import Level
from orchestrator.plan import Plan, make_plan
from tests.conftest import Compose


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
    assert cells[0] == {
        "axes": {"workload": "unary"},
        "baseline": "unary,baseline",
        "candidate": "unary,grpc",
        "metric": "throughput_rps",
        "level": "c0256",
    }
    assert [(cell["candidate"], cell["level"]) for cell in cells] == [
        ("unary,grpc", "c0256"),
        ("streaming,grpc", "c0128"),
    ]


def pairs(arms: Sequence[Arm]) -> list[tuple[str, str | None]]:
    return [(cell["baseline"], cell["candidate"]) for cell in primary_cells(arms)]


def test_what_is_compared_is_declared(compose: Compose) -> None:
    by_replicas = jobs(compose, ["workload.num_replicas=1"], ["workload.num_replicas=2"])
    assert pairs(make_plan(by_replicas, 0).arms) == [("num_replicas=1", "num_replicas=2")]
    workloads = (["workload=unary"], ["workload=streaming"])
    assert pairs(make_plan(jobs(compose, *workloads), 0).arms) == [("unary", None), ("streaming", None)]
    declared = ["compare.treatment=workload", "compare.baseline=streaming"]
    each = jobs(compose, *([*workload, *declared] for workload in workloads))
    assert pairs(make_plan(each, 0).arms) == [("streaming", "unary")]
    assert primary_cells(make_plan(each, 0).arms)[0]["level"] == "c0128"  # the highest that both have
    three = jobs(compose, *([f"profile={p}"] for p in ("grpc", "baseline", "haproxy")))
    assert pairs(make_plan(three, 0).arms) == [("baseline", "grpc"), ("baseline", "haproxy")]
    both = [
        ["compare.treatment=[workload,profile]", "sweep=quick", f"workload={w}", f"profile={p}"]
        for w, p in (("unary", "baseline"), ("streaming", "baseline"), ("streaming", "grpc"))
    ]
    with pytest.raises(ConfigError, match=r"fits several .* name one: unary,baseline, streaming,baseline"):
        make_plan(jobs(compose, *both), 0)
    named = jobs(compose, *([*each, "compare.baseline='unary,baseline'"] for each in both))
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
    listed = make_plan(jobs(compose, *([*model, "sweep.offered_rps=[20,2.5]", each] for each in profiles)), 0)
    assert names(listed) == ["baseline", "optimized"]
    assert [level.name for level in listed.arms[0].levels] == ["r000020.00", "r000002.50"]
    assert {(trial.id, trial.level.concurrency) for trial in listed.trials if trial.repeat == 0} == {
        ("r000002.50-r0", None),
        ("r000020.00-r0", None),
    }
    (cell,) = primary_cells(listed.arms)
    assert (cell["metric"], cell["level"]) == ("latency_p95_ms", "r000020.00")
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
        assert [cell["metric"] for cell in primary_cells(plan.arms)] == [figure]
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

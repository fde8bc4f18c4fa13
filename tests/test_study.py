"""Does each experiment, on its published cluster, deploy and load what the study did?

The study is anyscale/serve-performance-blog at 13f8b40b: features/configs and sweep.py, recsys/*.yaml and
run_locust.py, llm-single-node/*. Values alone are compared; docs/study.md says where its text and its configs disagree.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from orchestrator import arms, execute, paths, plan, progress
from orchestrator.clusters.anyscale import PROBE_ROUTE
from orchestrator.config import parse, register
from orchestrator.errors import ConfigError
from tests.conftest import ROOT, Compose

IMAGE = "anyscale/ray-llm:nightly-py311-cu128"  # of every service
HEAD = "m8a.xlarge"  # of every service but the LLM's

# In both arms. The study has the first, in all services but three; the second is what Ray has called it since.
TRACING_OFF = {"ANYSCALE_TRACING_EXPORTER_IMPORT_PATH": "", "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": ""}
# The study's feature services have both; its recommender the first alone.
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "ANYSCALE_RAY_SERVE_ENABLE_HA_PROXY": "1"}
NODELAY = {"RAY_SERVE_HAPROXY_TCP_NODELAY": "1"}
THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
GRPC = {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}
ONE_LOOP = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
ALL_SIX = {  # the table of the study's README; no service of its repository sets them
    **(HAPROXY | NODELAY | GRPC | THROUGHPUT),
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
DIRECT_STREAMING = HAPROXY | NODELAY | {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}  # ours: later than the study

UNARY_LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STREAMING_LEVELS = (1, 2, 4, 8, 16, 32, 64, 128)
RECSYS_LEVELS = (10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500)  # 400: not in its list, but in its results
VLLM_LEVELS = (16, 32, 64, 128, 256)


class Arm(NamedTuple):
    env: dict[str, str]  # besides TRACING_OFF
    levels: tuple[int, ...]
    deployments: list[tuple[str, int, int]]  # name (ours), replicas, max_ongoing_requests


class Experiment(NamedTuple):
    cluster: str
    machines: tuple[str, list[tuple[str, int, int]]]  # head; workers with the fewest and most of them
    num_services: int  # arms x 5 repeats: the repeats are ours, the study ran each service once
    arms: dict[str, Arm]


def features(cluster: str, worker: str, profile: str, env: Mapping[str, str], num_replicas: int = 1) -> Experiment:
    unary = [("Ingress", num_replicas, 100_000), ("Echo", num_replicas, 100_000)]
    streaming = [("Ingress", num_replicas, 10_000), ("TokenSource", num_replicas, 10_000)]
    arms = {
        "unary,baseline": Arm({}, UNARY_LEVELS, unary),
        f"unary,{profile}": Arm(dict(env), UNARY_LEVELS, unary),
        "streaming,baseline": Arm({}, STREAMING_LEVELS, streaming),
        f"streaming,{profile}": Arm(dict(env), STREAMING_LEVELS, streaming),
    }
    return Experiment(cluster, (HEAD, [(worker, 1, 1)]), 20, arms)


ECHO = [("Ingress", 1, 100_000), ("Echo", 1, 100_000)]
DLRM = [("Ingress", 2, 1_000), ("Ranker", 1, 1_000)]
LLM = {"baseline": {}, "optimized": ALL_SIX, "direct_streaming": DIRECT_STREAMING}
STUDY = {
    "grpc": features("anyscale_1x", "m7a.4xlarge", "grpc", GRPC),
    "haproxy": features("anyscale_1x", "m7a.4xlarge", "haproxy", HAPROXY | NODELAY),
    "event_loop": features("anyscale_1x", "m7a.4xlarge", "single_event_loop", ONE_LOOP),
    "all_on": features("anyscale_1x", "m7a.4xlarge", "all_on", HAPROXY | NODELAY | THROUGHPUT),
    "all_on_8x": features("anyscale_8x", "m7a.8xlarge", "all_on", HAPROXY | NODELAY | THROUGHPUT, num_replicas=8),
    "recsys": Experiment(
        "anyscale_l4",
        (HEAD, [("g6.12xlarge", 0, 1)]),
        10,
        {"baseline": Arm({}, RECSYS_LEVELS, DLRM), "recsys_study": Arm(HAPROXY | THROUGHPUT, RECSYS_LEVELS, DLRM)},
    ),
    "llm_replicas": Experiment(
        "anyscale_h100",
        ("p5.48xlarge", []),
        60,
        {
            f"num_replicas={replicas},{profile}": Arm(env, (256 * replicas,), [])
            for replicas, (profile, env) in itertools.product((1, 2, 4, 8), LLM.items())
        },
    ),
    "aa": Experiment(  # ours
        "anyscale_1x",
        (HEAD, [("m7a.4xlarge", 1, 1)]),
        10,
        {"baseline": Arm({}, UNARY_LEVELS, ECHO), "baseline~2": Arm({}, UNARY_LEVELS, ECHO)},
    ),
}

ENGINE = {
    "tensor_parallel_size": 1,
    "max_model_len": 4096,
    "gpu_memory_utilization": 0.95,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 16384,
    "enable_prefix_caching": False,
}

# What each client was started with. Where ours differs, `docs/study.md` has the reason.
LOADS: dict[str, dict[str, Any]] = {
    "unary": {
        "cluster.client_processes": 128,
        "sweep.duration_s": 60,
        "sweep.cooldown_s": 15,
        "workload.options.headers": {"x-request-disconnect-disabled": "?1"},
        "workload.options.payload_bytes": 10240,  # of the text; the published figures are of an empty message
        "slo.latency_p99_ms": 200,
    },
    "streaming": {
        "cluster.client_processes": 128,  # of the text; the script has 8
        "sweep.duration_s": 60,  # of the text; the script counts requests
        "sweep.cooldown_s": 15,
        "workload.options.headers": {"Cache-Control": "no-cache"},
        "workload.options.num_chunks": 50,
        "slo.latency_p99_ms": 700,
    },
    "recsys": {
        "cluster.client_processes": 4,
        "sweep.duration_s": 60,
        "workload.options.headers": {},
        "workload.options.num_candidates": 32,
    },
    "llm": {
        "sweep.concurrency": [256],
        "sweep.per_replica": True,
        "client.num_input_tokens": 512,
        "client.num_output_tokens": 128,
    },
    "vllm": {
        "sweep.concurrency": list(VLLM_LEVELS),
        "client.num_input_tokens": 512,
        "client.num_output_tokens": 128,
    },
}
CLUSTERS = {
    "unary": "anyscale_1x",
    "streaming": "anyscale_8x",
    "recsys": "anyscale_l4",
    "llm": "anyscale_h100",
    "vllm": "local_h100",
}


def planned(experiment: str, *overrides: str) -> plan.Plan:
    """What the command plans: Hydra's sweep of the experiment's own parameters, without its command line."""
    register()
    overrides = (f"+experiment={experiment}", *overrides, "dry_run=true")
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        fixed = [override for override in overrides if "," not in override]
        composed = hydra.compose("config", fixed, return_hydra_config=True)
        swept = {key: str(values).split(",") for key, values in composed.hydra.sweeper.params.items()}
        given = dict(override.split("=") for override in overrides)
        swept |= {key: values.split(",") for key, values in given.items() if key in swept or "," in values}
        jobs = []
        for values in itertools.product(*swept.values()):
            chosen = dict(zip(swept, values, strict=True))
            job = hydra.compose("config", [*fixed, *(f"{key}={value}" for key, value in chosen.items())])
            jobs.append(arms.Job(parse(job), chosen, chosen["profile"]))
    return plan.make_plan(jobs, seed=0)


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_ORCHESTRATOR_SCRATCH", "unused")


def test_every_experiment_is_held_against_the_study() -> None:
    committed = {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")}
    assert committed == STUDY.keys() | {"vllm_baseline", "llm_overhead"}


@pytest.mark.parametrize("experiment", STUDY)
def test_the_services_are_the_studys(experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = pytest.importorskip("anyscale.service.models", reason="the anyscale SDK is not installed")
    expected = STUDY[experiment]
    the_plan = planned(experiment, f"cluster={expected.cluster}")
    execute.preflight(the_plan, live=False)
    assert {arm.name: clients_of(arm) for arm in the_plan.arms} == {
        name: arm.levels for name, arm in expected.arms.items()
    }

    run_paths = paths.RunPaths(tmp_path)
    execute.write_service_files(the_plan, run_paths)
    head, workers = expected.machines
    for name, arm in expected.arms.items():
        file = run_paths.service_yaml(name, 0)
        loaded = models.ServiceConfig.from_yaml(str(file))
        assert loaded == models.ServiceConfig(**yaml.safe_load(file.read_text()))
        assert loaded.image_uri == IMAGE
        assert loaded.compute_config.head_node.instance_type == head
        nodes = [(node.instance_type, node.min_nodes, node.max_nodes) for node in loaded.compute_config.worker_nodes]
        assert nodes == workers
        assert loaded.env_vars == TRACING_OFF | arm.env
        application, probe = loaded.applications
        assert (application["route_prefix"], probe["route_prefix"]) == ("/", PROBE_ROUTE)
        found = [
            (each["name"], each["num_replicas"], each["max_ongoing_requests"]) for each in application["deployments"]
        ]
        assert found == arm.deployments
        if experiment == "recsys":
            assert application["deployments"][1]["ray_actor_options"]["num_gpus"] == 1
        if experiment == "llm_replicas":
            assert application["args"] == llm_arguments(arm.levels[0] // 256, "direct_streaming" in name)

    progress.print_plan(the_plan)
    said = capsys.readouterr().out
    assert f"{len(expected.arms)} arms x 5 repeats: {expected.num_services} services, " in said
    rented = ", ".join(f"1 x {machine}" for machine in (head, *(worker for worker, _, _ in workers)))
    assert re.search(rf"Each service: {rented}\. About [\d.]+ service hours, about [\d.]+ USD at", said)


def llm_arguments(num_replicas: int, direct_streaming: bool) -> dict[str, Any]:
    """Of `build_openai_app`. The study says min_replicas = max_replicas where this says num_replicas."""
    model = "openai/gpt-oss-20b"
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": model, "model_source": model},
                "engine_kwargs": ENGINE,
                "placement_group_config": None,
                "deployment_config": {"num_replicas": num_replicas, "max_ongoing_requests": 8192},
            }
        ],
        "ingress_deployment_config": None if direct_streaming else {"num_replicas": 4 * num_replicas},
    }


def clients_of(arm: arms.Arm) -> tuple[int | None, ...]:
    return tuple(level.concurrency for level in arm.levels)


@pytest.mark.parametrize(
    ("experiment", "levels"),
    [
        ("vllm_baseline", {"baseline": VLLM_LEVELS}),
        ("llm_overhead", dict.fromkeys(("vllm", "llm,baseline", "llm,optimized", "llm,direct_streaming"), (256,))),
    ],
)
def test_vllm_runs_on_the_machine_itself(experiment: str, levels: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match=r"workload vllm has no Serve application.*cluster=local_h100"):
        execute.preflight(planned(experiment, "cluster=anyscale_h100"), live=False)
    the_plan = planned(experiment, "cluster=local_h100")
    execute.preflight(the_plan, live=False)
    assert {arm.name: clients_of(arm) for arm in the_plan.arms} == levels
    server = the_plan.arms[0].config.workload.server
    assert (server["source"], server["engine"]) == ("openai/gpt-oss-20b", ENGINE)


def commands() -> list[tuple[str, ...]]:
    """Of the table in docs/study.md: each experiment in miniature."""
    rows = re.findall(
        r"^\|.*`\+experiment=(\w+) .*\| `([^`]+)` \|$", (ROOT / "docs/study.md").read_text(), re.MULTILINE
    )
    return [(experiment, *overrides.split()) for experiment, overrides in rows]


def test_every_experiment_is_documented() -> None:
    assert {experiment for experiment, *_ in commands()} == STUDY.keys() | {"vllm_baseline", "llm_overhead"}


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[0])
def test_in_miniature_it_fits_a_laptop(command: tuple[str, ...]) -> None:
    the_plan = planned(*command)
    execute.preflight(the_plan, live=False)
    assert the_plan.duration_s < 2 * 3600  # an estimate, of the plan alone


def test_a_run_without_a_price_says_how_to_declare_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    the_plan = planned("recsys", "cluster=anyscale_l4")
    for arm in the_plan.arms:
        monkeypatch.setattr(arm.config.cluster, "usd_per_hour", {"m8a.xlarge": 0.25})
    progress.print_plan(the_plan)
    said = " ".join(capsys.readouterr().out.split())
    assert "cost unknown: declare the price of a machine, '++cluster.usd_per_hour={g6.12xlarge: <USD>}'" in said


@pytest.mark.parametrize(
    ("workers", "usd"),
    [
        ("[{instance_type: m7a.4xlarge}]", 0.243 + 10 * 0.927),  # as many as the SDK allows where nothing is said
        ("[{instance_type: m7a.4xlarge, min_nodes: 1, max_nodes: 1}]", 0.243 + 0.927),
        ("[{instance_type: m7a.4xlarge, min_nodes: 1, max_nodes: 3}]", 0.243 + 3 * 0.927),
        ("[{instance_type: m7a.48xlarge}]", None),
    ],
)
def test_what_is_rented_is_what_is_paid_for(compose: Compose, workers: str, usd: float | None) -> None:
    """Other machines than the config's have another price, or none: the limit must not be held by the old one."""
    config = compose("cluster=anyscale_1x", f"cluster.worker_nodes={workers}")
    assert config.cluster.hourly_usd() == (None if usd is None else pytest.approx(usd))


@pytest.mark.parametrize("workload", LOADS)
def test_the_load_is_the_studys(compose: Compose, workload: str) -> None:
    config = OmegaConf.create(dataclasses.asdict(compose(f"workload={workload}", f"cluster={CLUSTERS[workload]}")))
    assert {key: OmegaConf.select(config, key) for key in LOADS[workload]} == LOADS[workload]

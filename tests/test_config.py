"""Do the committed configs say what the study set, and is bad input refused with the fix?"""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from orchestrator.application import check_deployed, render_application
from orchestrator.clusters.flags import check_flags
from orchestrator.errors import ConfigError
from orchestrator.load.level import Level
from tests.conftest import ROOT, Compose

HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_TCP_NODELAY": "1"}
THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
PROFILES = {
    "baseline": {},
    "haproxy": HAPROXY,
    "grpc": {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"},
    "single_event_loop": {
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    },
    "throughput": THROUGHPUT,
    "all_on": HAPROXY | THROUGHPUT,
    "recsys_study": {"RAY_SERVE_ENABLE_HA_PROXY": "1"} | THROUGHPUT,
    "optimized": HAPROXY
    | THROUGHPUT
    | {
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    },
    "direct_streaming": HAPROXY | {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"},
    "ray_v2_executor": {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1"},
}
AT_RATE = ["sweep=quick", "sweep.concurrency=null"]
GRIDS = {
    "unary": ([1, 2, 4, 8, 16, 32, 64, 128, 256], 200),
    "streaming": ([1, 2, 4, 8, 16, 32, 64, 128], 700),
    "recsys": ([10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500], 500),
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_name_is_file_name(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    if path.parent.name == "experiment":
        assert f"+experiment={path.stem} " in path.read_text()  # the command in its comment
    elif path.parent.name == "client":
        assert content["_target_"].split(".")[-2] == path.stem
    elif path.parent.name == "observe":
        assert list(content) == [path.stem]
    else:
        assert content["name"] == path.stem


@pytest.mark.parametrize(("workload", "profile"), [*itertools.product(options("workload"), options("profile"))])
def test_every_combination_composes(compose: Compose, workload: str, profile: str) -> None:
    cluster = {"llm": "local_h100", "vllm": "local_h100", "http": "endpoint"}.get(workload, "local")
    if profile == "direct_streaming" and cluster == "local":
        with pytest.raises(ConfigError, match=r"ingress_deployment_config away.*does not have"):
            compose(f"workload={workload}", f"profile={profile}")
        return
    for sweep in (workload, "quick"):
        config = compose(f"workload={workload}", f"profile={profile}", f"sweep={sweep}", f"cluster={cluster}")
        assert (config.workload.name, config.profile.name, config.sweep.name) == (workload, profile, sweep)
        if workload not in ("vllm", "http"):
            assert render_application(config)["import_path"] == f"workloads.{workload}.app:build"


def test_vllm_alone_has_the_same_engine(compose: Compose) -> None:
    served = compose("workload=vllm", "cluster=local_h100")
    behind_ray = compose("workload=llm", "cluster=local_h100")
    assert (
        served.workload.server["engine"] == behind_ray.workload.application["args"]["llm_configs"][0]["engine_kwargs"]
    )
    assert served.client == behind_ray.client
    assert served.workload.options == behind_ray.workload.options
    assert served.sweep.concurrency == [16, 32, 64, 128, 256]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["workload=llm"], "cluster local hands out 32 CPU and 0 GPU (cluster.num_*); model=tiny needs no GPU"),
        (["workload=vllm"], "server 1 x (1 CPU, 1 GPU)"),
        (["workload=llm", "cluster=local_h100", "workload.num_replicas=9"], "asks for 45 CPU and 9 GPU"),
        (["workload=llm", "cluster=local_h100", "model.engine.tensor_parallel_size=16"], "and 16 GPU"),
        (["workload=llm", "model=tiny", "workload.num_replicas=8"], "model replica 8 x (2 CPU, 0 GPU)"),
        (["workload=llm", "model=tiny", "model.num_input_tokens=512"], "512 + 16 tokens does not fit"),
        (["workload=llm", "model=tiny", "client.num_prompts=0"], "must be a whole number above 0"),
        (["workload=llm", "model=tiny", "client.timeout_s=soon"], "timeout_s must be a number"),
        (["workload=llm", "model=tiny", *AT_RATE, "sweep.offered_rps=inf"], "sweep.offered_rps must be a"),
        (["workload=llm", "model=tiny", *AT_RATE, "sweep.offered_rps=0.5"], "take 2,400 s, more than"),
        (
            ["workload=llm", "model=tiny", *AT_RATE, "sweep.offered_rps=5", "client.num_prompts=1"],
            "two requests a replica begin and end one",
        ),
        (
            ["workload=llm", "model=tiny", *AT_RATE, "sweep.offered_rps=5", "client=locust"],
            "Locust drives closed loop only, found a level of 5 req/s: give sweep.concurrency, or choose a client",
        ),
        ([*AT_RATE, "sweep.offered_rps=5"], "Locust drives closed loop only"),
        (["workload=llm", "model=tiny", "client.num_prompts=300"], "leave no time"),
        (["workload=llm", "model=tiny", "model.engine=3"], "do not have the shape"),
        (["workload=llm", "model=tiny", "model.engine.tensor_parallel_size=foo"], "do not have the shape"),
        (["workload=llm", "model=tiny", "workload.application.args.llm_configs=[3]"], "do not have the shape"),
        (["workload=vllm", "model=tiny", "workload.num_replicas=0"], "must be a whole number above 0"),
        (["workload=vllm", "model=tiny", "workload.server.num_gpus=null"], "do not have the shape"),
        (["workload=vllm", "cluster=local_h100", "model.engine.tensor_parallel_size=16"], "server 1 x (1 CPU, 16 GPU)"),
        (["workload=vllm", "model=tiny", "workload.num_replicas=4", "client=locust"], "as many Locust"),
        (
            ["workload=vllm", "model=tiny", "workload.num_replicas=3", "sweep=quick", "sweep.concurrency=2"],
            "as many clients",
        ),
        (["client=vllm_bench"], "'model.id' not found\n    full_key: client.model"),
        (["workload=llm", "model=tiny", "client=vllm_bench", "~client.tokenizer"], "client.tokenizer is missing"),
    ],
)
def test_llm_that_cannot_work_is_refused(compose: Compose, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        compose(*overrides)


@pytest.mark.parametrize("workload", ["llm", "vllm"])
def test_what_the_orchestrator_says_to_an_engine_is_refused(compose: Compose, workload: str) -> None:
    config = compose(f"workload={workload}", "model=tiny", "+model.engine.port=3")
    with pytest.raises(ConfigError, match=re.escape("model.engine.port is set by the orchestrator")):
        check_deployed(config, config.cluster)


def test_direct_streaming_needs_haproxy(compose: Compose) -> None:
    config = compose("workload=llm", "model=tiny", "profile=direct_streaming")
    check_flags(config.profile.env)
    with pytest.raises(ConfigError, match="needs RAY_SERVE_ENABLE_HA_PROXY=1 in the same profile, found nothing"):
        check_flags({"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"})


def test_missing_vllm_is_said_with_the_command_that_installs_it(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose("workload=vllm", "model=tiny")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for check in (lambda: config.client.check_live(config, 1), lambda: config.cluster.check_live(config)):
        with pytest.raises(ConfigError, match=r"needs? vLLM.*pip install '\.\[llm\]'.*make llm"):
            check()


def test_profiles_set_what_the_study_set(compose: Compose) -> None:
    assert options("profile") == sorted(PROFILES)
    for name, env in PROFILES.items():
        assert compose(f"profile={name}", "workload=llm", "model=tiny").profile.env == env


@pytest.mark.parametrize("workload", GRIDS)
def test_sweep_follows_the_workload(compose: Compose, workload: str) -> None:
    config = compose(f"workload={workload}")
    levels, latency_p99_ms = GRIDS[workload]
    assert config.sweep.concurrency == levels
    assert (config.sweep.duration_s, config.sweep.cooldown_s, config.sweep.repeats) == (60, 15, 5)
    assert config.slo.latency_p99_ms == latency_p99_ms
    quick = compose(f"workload={workload}", "sweep=quick")
    assert len(quick.sweep.concurrency) == 3
    assert quick.slo.latency_p99_ms == latency_p99_ms  # the target belongs to the workload, not to the grid


def test_overrides_reach_the_application_and_the_client(compose: Compose) -> None:
    config = compose("workload.num_replicas=3", "workload.max_ongoing_requests=7", "workload.payload_bytes=0")
    assert render_application(config)["deployments"] == [
        {"name": "Ingress", "num_replicas": 3, "max_ongoing_requests": 7},
        {"name": "Echo", "num_replicas": 3, "max_ongoing_requests": 7},
    ]
    assert config.workload.options["payload_bytes"] == 0
    recsys = compose("workload=recsys", "workload.model.cardinality=10", "workload.num_ingress_replicas=5")
    application = render_application(recsys)
    assert application["args"]["model"]["cardinality"] == 10
    assert {each["name"]: each["num_replicas"] for each in application["deployments"]} == {"Ingress": 5, "Ranker": 1}


def test_recsys_is_the_studys(compose: Compose) -> None:
    args = render_application(compose("workload=recsys"))["args"]
    assert args["model"] == {
        "embedding_dim": 64,
        "cardinality": 100000,
        "bottom_mlp": [256, 64],
        "top_mlp": [256, 128, 64],
    }
    assert (args["num_candidates"], args["max_batch_size"], args["batch_wait_timeout_s"]) == (32, 100, 0.05)


def test_profile_app_lies_over_the_workloads(compose: Compose) -> None:
    config = compose("+profile.app.deployments.Echo.max_ongoing_requests=5", "+profile.app.args.extra=1")
    application = render_application(config)
    assert {each["name"]: each["max_ongoing_requests"] for each in application["deployments"]} == {
        "Ingress": 100000,
        "Echo": 5,
    }
    assert application["args"] == {"delay_s": 0, "extra": 1}


@pytest.mark.parametrize(
    ("value", "fix"), [("true", "1"), ("on", "1"), ("1", "1"), ("0", "0"), ("false", "0"), ("No", "0")]
)
def test_unquoted_flag_is_refused_with_the_quoting_that_works(compose: Compose, value: str, fix: str) -> None:
    key = "profile.env.RAY_SERVE_ENABLE_HA_PROXY"
    with pytest.raises(ConfigError) as refused:
        compose("profile=haproxy", f"{key}={value}")
    assert f"'++{key}=\"{fix}\"'" in str(refused.value)
    assert compose("profile=haproxy", f'{key}="{fix}"').profile.env["RAY_SERVE_ENABLE_HA_PROXY"] == fix


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sweep.concurrency=[]", "empty"),
        ("sweep.concurrency=-1", "-1"),
        ("sweep.concurrency=0", "found 0"),
        ("sweep.concurrency=[1,2.5]", "2.5"),
        ("sweep.concurrency=[true]", "True"),
        ("sweep.concurrency=null", "None"),
        ("sweep.concurrency=many", "'many'"),
        ("sweep.concurrency=[4,4]", "twice"),
        ("sweep.offered_rps=10", "is given and the other null, found sweep.concurrency=[1, 2"),
        ("workload.payload_bytes=-5", "workload.payload_bytes"),
        ("workload.payload_bytes=abc", "'abc'"),
        ("workload.max_ongoing_requests=1.5", "whole number"),
        ("sweep.duration_s=0", "sweep.duration_s"),
        ("sweep.duration_s=inf", "sweep.duration_s"),
        ("sweep.repeats=0", "sweep.repeats"),
        ("sweep.drain_s=-1", "sweep.drain_s"),
        ("validity.max_error_ratio=-0.1", "validity.max_error_ratio"),
        ("cluster.http_port=1023", "1024..65535"),
        ("cluster.http_port=65536", "1024..65535"),
        ("+workload.application.deployments.Echo.ray_actor_options.num_cpus=many", "'many'"),
        ("+workload.application.deployments.Echo.ray_actor_options=3", "mapping"),
        ("+profile.app.deployments=[1]", "profile.app.deployments"),
        ("+profile.app.deployments.Echoo.num_replicas=3", "has Ingress, Echo"),
        ("+profile.app.deployments.Echo.num_replicas=300", "301 CPU"),
        ("workload.ready_path=echo", "start with /"),
        ("workload.num_replicas=17", "34 CPU"),
        ("workload.num_replicas=0", "num_replicas"),
        ("cluster.gpus_per_model_replica=1", None),
        ("slo.latency_p99_ms=-3", "slo.latency_p99_ms"),
        ("+workload.env={1A: x}", "1A"),
    ],
)
def test_bad_values_are_refused(compose: Compose, override: str, says: str | None) -> None:
    if says is None:  # a GPU that the cluster has not, asked for by a workload that holds a model
        with pytest.raises(ConfigError, match="1 GPU"):
            compose("workload=recsys", override)
        return
    with pytest.raises(ConfigError) as refused:
        compose(override)
    assert says in str(refused.value)


def test_one_level_need_not_be_a_list(compose: Compose) -> None:
    assert compose("sweep.concurrency=8").sweep.levels(1) == (Level.of_clients(8),)
    model = ("workload=llm", "model=tiny", *AT_RATE)
    assert compose(*model, "sweep.offered_rps=2.5").sweep.levels(1) == (Level.of_rate(2.5),)
    for bad, says in (
        ("0", "above 0"),
        ("[]", "is empty"),
        ("[2,2]", "twice"),
        ("0.001", "two decimals"),
        ("x", "'x'"),
    ):
        with pytest.raises(ConfigError, match=rf"sweep\.offered_rps.*{says}"):
            compose(*model, f"sweep.offered_rps={bad}")

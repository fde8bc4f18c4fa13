"""The Anyscale backend: what it renders, and with the real SDK and a stand-in control plane, a service's whole life."""

import dataclasses
import importlib.util
import os
import re
import signal
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.clusters import anyscale as backend
from orchestrator.clusters.anyscale import (
    PROBE_ROUTE,
    Anyscale,
    AnyscaleService,
    _explained,
    render_service,
)
from orchestrator.clusters.base import ServiceName
from orchestrator.clusters.remote import stage
from orchestrator.config import Config
from orchestrator.errors import ConfigError, ServiceError
from orchestrator.process import Interrupted, interruptible
from orchestrator.results.records import Effective, keys
from tests.anyscale_standin import Fault, Instant, Service, StandIn, healthy
from tests.conftest import Compose

NAME = ServiceName(prefix="so", run_id="2026-01-02_03-04-05", index=7, arm="optimized", repeat=1)
SERVICE = "so-2026-01-02_03-04-05-0007"

needs_sdk = pytest.mark.skipif(importlib.util.find_spec("anyscale") is None, reason="the anyscale SDK is not installed")


Make = Callable[..., Config]


@pytest.fixture
def make(compose: Compose) -> Make:
    """`make("profile=optimized", cloud="x")`: a composed config on an Anyscale cluster with these settings.

    What ends, ends well within `terminate_timeout_s`, also where the SDK is imported again on a busy machine.
    """

    def run(*overrides: str, **settings: Any) -> Config:
        config = compose("cluster=anyscale_1x", *overrides)
        config.cluster = dataclasses.replace(config.cluster, **{"terminate_timeout_s": 60, **settings})
        return config

    return run


def ours(config: Config) -> Anyscale:
    """Its cluster, with what only Anyscale's has."""
    assert isinstance(config.cluster, Anyscale)
    return config.cluster


# What is rendered.


def rendering(config: Config, name: ServiceName = NAME) -> dict[str, Any]:
    return render_service(ours(config), config, name)


def test_rendered_service(make: Make) -> None:
    config = make("profile=optimized", cloud="my-cloud", env={"RAY_SERVE_HTTP_REQUEST_MAX_RETRIES": "0"})
    rendered = rendering(config)
    assert rendered["name"] == SERVICE
    assert rendered["cloud"] == "my-cloud"
    assert "project" not in rendered
    assert rendered["compute_config"] == {
        "head_node": {"instance_type": "m8a.xlarge"},
        "worker_nodes": [{"instance_type": "m7a.4xlarge", "min_nodes": 1, "max_nodes": 1}],
    }
    expected = {**config.cluster.env, **config.profile.env, "ANYSCALE_RAY_SERVE_ENABLE_HA_PROXY": "1"}
    assert rendered["env_vars"] == expected
    assert [application["route_prefix"] for application in rendered["applications"]] == ["/", PROBE_ROUTE]
    assert rendered["query_auth_token_enabled"] is True
    tags = rendered["tags"]
    assert (tags["arm"], tags["repeat"], tags["run-id"]) == ("optimized", "1", NAME.run_id)
    expires_at = datetime.strptime(tags["expires-at"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert timedelta(hours=11) < expires_at - datetime.now(UTC) <= timedelta(hours=12)


def test_anyscales_own_switch_follows_the_flag(make: Make) -> None:
    assert "ANYSCALE_RAY_SERVE_ENABLE_HA_PROXY" not in rendering(make())["env_vars"]
    config = make(env={"RAY_SERVE_ENABLE_HA_PROXY": "0"})
    assert rendering(config)["env_vars"]["ANYSCALE_RAY_SERVE_ENABLE_HA_PROXY"] == "0"


@needs_sdk
@pytest.mark.parametrize("workload", ["unary", "streaming", "recsys"])
def test_the_file_loads_in_the_sdks_own_type(make: Make, workload: str) -> None:
    from anyscale.service.models import ServiceConfig

    config = make(f"workload={workload}", "profile=all_on", worker_nodes=[])
    text = config.cluster.rendered(config, NAME)
    loaded = ServiceConfig(**yaml.safe_load(text))
    assert loaded.name == SERVICE
    assert loaded.compute_config.head_node.instance_type == "m8a.xlarge"
    assert loaded.compute_config.worker_nodes == []


def test_tags_hold_what_clouds_accept(make: Make) -> None:
    arm = "recsys,num_replicas=8~2"
    tags = rendering(make(), dataclasses.replace(NAME, arm=arm + "x" * 80))["tags"]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,63}", value) for value in tags.values()), tags


@pytest.mark.parametrize("prefix", ["so", "team/a b", "x" * 80, "é"])
def test_names_are_legal_and_unique(prefix: str) -> None:
    names = [
        ServiceName(prefix + tail, run_id, index, "a", 0).service
        for tail in ("", "!", "y")
        for run_id in ("2026-01-02_03-04-05", "2026-01-02_03-04-05_2")
        for index in (0, 1, 10, 100)
    ]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,50}", name) for name in names)
    # A look-up by name finds substrings.
    assert not [(a, b) for a in names for b in names if a != b and a in b]


def test_a_run_id_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="too long"):
        ServiceName("so", "r" * 60, 0, "a", 0).service  # noqa: B018


def test_the_upload_is_the_workloads_alone(tmp_path: Path) -> None:
    stage(tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"workloads/__init__.py", "workloads/unary/app.py", "workloads/probe/app.py"} <= found
    assert {path.split("/")[0] for path in found} == {"workloads"}
    assert not [path for path in found if "__pycache__" in path or "/." in path]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Your user credentials for https://x are invalid or have expired.", "wrong token"),
        ("Cloud with name nowhere was not found.", "unknown cloud"),
        ("Quota exceeded: 8 of 8 p5.48xlarge", "quota"),
        ("You do not have permission to create services.", "not allowed"),
        ("The image anyscale/ray:nope could not be pulled.", "image"),
        ("HTTPConnectionPool: Max retries exceeded with url: /api/v2/userinfo/", "unreachable"),
    ],
)
def test_a_refusal_is_named_by_its_words(said: str, reason: str) -> None:
    assert _explained(said) == f"{reason}: {said}"
    assert _explained("Something else.") == "Something else."


# What is refused before anything is deployed.


def test_check_refuses_what_cannot_work(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "sss_c4n4ry")
    monkeypatch.delenv("NO_TOKEN", raising=False)
    good = make(token_env="MY_TOKEN")
    dry = make("dry_run=true", token_env="NO_TOKEN")
    for config in (good, dry):
        config.cluster.check(config)
    for config, said in (
        (make(token_env="NO_TOKEN"), "NO_TOKEN"),
        (make(token_env="MY_TOKEN", service_prefix="a b"), "service_prefix"),
        (
            make("workload.application.import_path=orchestrator.results:read_json", token_env="MY_TOKEN"),
            "below workloads/",
        ),
        (make("++profile.env.RAY_SERVE_NO_SUCH='1'", token_env="MY_TOKEN"), "RAY_SERVE_NO_SUCH"),
    ):
        with pytest.raises(ConfigError, match=said) as refused:
            config.cluster.check(config)
        assert "c4n4ry" not in str(refused.value)


# With the real SDK, against the stand-in.


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name, value in (
        ("_POLL_S", 0.1),
        ("_RETRY_DELAYS_S", (0.1, 0.2, 0.4)),
        ("_SETTLE_S", 1.0),
        ("_UNHEALTHY_GRACE_S", 0.5),
    ):
        monkeypatch.setattr(backend, name, value)
    with StandIn(tmp_path / "bucket", Instant(healthy)) as standin:
        monkeypatch.setenv("ANYSCALE_HOST", standin.url + "/")
        monkeypatch.setenv("ANYSCALE_CLI_TOKEN", standin.token)
        yield standin
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        secret = [standin.token, *(service.auth_token for service in standin.services.values())]
        for path in written:
            assert not [value for value in secret if value and value.encode() in path.read_bytes()], path


@contextmanager
def living(
    config: Config, name: ServiceName, log_dir: Path, on_status: Callable[[str], None]
) -> Iterator[AnyscaleService]:
    """As `execute` has it: stopped whatever happens. Raises ServiceError with what is left."""
    service = ours(config).service(config, name, log_dir, on_status)
    try:
        service.start()
        yield service
    finally:
        left = service.stop()
        assert service.stop() == left
        if left:
            raise ServiceError(left)


def run(config: Config, log_dir: Path, on_status: Callable[[str], None] = lambda text: None) -> AnyscaleService:
    """A whole life, up to ready and down again."""
    log_dir.mkdir()
    with living(config, NAME, log_dir, on_status) as service:
        service.wait_ready()
        service.snapshot()
    return service


def calls(cloud: StandIn) -> list[str]:
    return [entry["call"] for entry in cloud.ledger]


def states(cloud: StandIn) -> set[str]:
    return {service.state for service in cloud.services.values()}


@needs_sdk
def test_life_of_a_service(cloud: StandIn, make: Make, tmp_path: Path) -> None:
    config = make("profile=optimized", cloud="standin-cloud", project="default")
    config.cluster.check_live(config)
    texts: list[str] = []
    log_dir = tmp_path / "service"
    log_dir.mkdir()
    with living(config, NAME, log_dir, texts.append) as service:
        assert calls(cloud) == ["apply"]
        service.wait_ready()
        known = cloud.services[SERVICE]
        assert service.urls == [known.base_url]
        assert service.token is not None
        assert service.token.reveal() == known.auth_token
        assert service.effective.keys() == keys(Effective).keys() - {"schema_version", "service_key"}
        assert [actor.name for actor in service.snapshot().actors or ()] == ["SERVE_CONTROLLER_ACTOR"]
        assert known.env_vars["ANYSCALE_RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert known.image_uri == ours(config).image_uri
        assert known.compute_config["head_node_type"]["instance_type"] == "m8a.xlarge"
    assert calls(cloud) == ["apply", "terminate"]
    assert known.state == "TERMINATED"
    assert texts[0] == "deploying"
    assert texts[-1] == "terminating: TERMINATED"
    assert yaml.safe_load((log_dir / "service.yaml").read_text())["name"] == SERVICE
    log = (log_dir / "anyscale.log").read_text()
    assert "Bearer ***" in log
    assert "\x1b" not in log
    (upload,) = (tmp_path / "bucket").iterdir()
    inside = {name.split("/", 1)[1] for name in zipfile.ZipFile(upload).namelist()}
    assert "workloads/probe/app.py" in inside
    assert {name.split("/")[0] for name in inside if name} == {"workloads"}


@needs_sdk
@pytest.mark.parametrize(
    ("verb", "fault", "times", "applies"),
    [
        ("userinfo", Fault(status=503), 1, 1),
        ("find_service", Fault(status=500), 2, 1),
        ("find_service", Fault(drop="after"), 5, 1),
        ("find_service", Fault(status=503, retry_after_s=1), 1, 1),
        ("build", Fault(status=502), 2, 1),
        ("apply", Fault(status=500), 2, 1),
        ("apply", Fault(status=429, retry_after_s=1), 1, 1),
        ("apply", Fault(drop="before"), 1, 1),
        ("apply", Fault(drop="after"), 1, 2),  # the SDK itself sends it again
        ("apply", Fault(drop="after"), 4, 4),  # and gives up, though it acted
        ("apply", Fault(state="UNHEALTHY", for_s=0.3), 1, 1),
        ("terminate", Fault(status=500), 2, 1),
        ("terminate", Fault(status=409), 2, 1),
        ("terminate", Fault(drop="after"), 1, 1),
    ],
    ids=lambda value: str(value) if isinstance(value, str | int) else None,
)
def test_passing_trouble_is_outlived(
    cloud: StandIn, make: Make, tmp_path: Path, verb: str, fault: Fault, times: int, applies: int
) -> None:
    cloud.misbehave(verb, fault, times=times)
    run(make(), tmp_path / "service")
    assert calls(cloud).count("apply") == applies
    assert states(cloud) == {"TERMINATED"}


@needs_sdk
@pytest.mark.parametrize(
    ("verb", "fault", "said"),
    [
        ("userinfo", Fault(status=401), "wrong token"),
        ("apply", Fault(status=403, detail="You do not have permission."), "not allowed: You do not"),
        ("apply", Fault(status=404, detail="Nothing here."), "Nothing here."),
        ("apply", Fault(status=409, detail="Name in use."), "Name in use."),
        ("apply", Fault(status=429, detail="Quota exceeded."), "quota: Quota exceeded."),
        ("create_build", Fault(status=400, detail="No such image."), "image: No such image."),
        ("apply", Fault(status=500, detail="Out of order."), "500.*Out of order."),
        ("upload", Fault(status=500), "500"),
        ("apply", Fault(state="STARTING"), "not ready after 4 s .*STARTING"),
        ("apply", Fault(state="UNHEALTHY"), "not healthy for 0.5 s"),
        ("apply", Fault(state="UNHEALTHY", of="version"), "not healthy for 0.5 s"),
        ("apply", Fault(state="SYSTEM_FAILURE"), "will not run: SYSTEM_FAILURE"),
    ],
)
def test_lasting_trouble_is_told_and_nothing_is_left(
    cloud: StandIn, make: Make, tmp_path: Path, verb: str, fault: Fault, said: str
) -> None:
    cloud.misbehave(verb, fault, times=1000)
    with pytest.raises(ServiceError, match=said) as failed:
        run(make(startup_timeout_s=4), tmp_path / "service")
    assert str(tmp_path / "service") in str(failed.value)
    assert cloud.token not in str(failed.value)
    assert states(cloud) <= {"TERMINATED"}
    assert bool(cloud.services) == (fault.state is not None)
    if fault.state in ("STARTING", "UNHEALTHY"):  # after a while there is a log
        log = (tmp_path / "service" / "controller.log").read_text()
        assert log == f"controller of version {cloud.services[SERVICE].primary.name}\n"


def ask_to_terminate(cloud: StandIn) -> None:
    """As somebody else would."""
    url = f"{cloud.url}/api/v2/services-v2/{cloud.services[SERVICE].id}/terminate"
    request = urllib.request.Request(url, method="POST", headers={"Cookie": f"cli_token={cloud.token}"})
    urllib.request.urlopen(request).close()


@needs_sdk
def test_somebody_else_ends_it_while_it_starts(cloud: StandIn, make: Make, tmp_path: Path) -> None:
    cloud.misbehave("apply", Fault(state="STARTING"))

    def on_status(text: str) -> None:
        if "version STARTING" in text and cloud.services[SERVICE].goal_state == "RUNNING":
            ask_to_terminate(cloud)

    with pytest.raises(ServiceError, match="will not run: TERMINAT"):
        run(make(), tmp_path / "service", on_status)
    assert states(cloud) == {"TERMINATED"}


@needs_sdk
def test_somebody_else_ends_it_while_it_runs(cloud: StandIn, make: Make, tmp_path: Path) -> None:
    with living(make(), NAME, tmp_path, lambda text: None) as service:
        service.wait_ready()
        ask_to_terminate(cloud)
        with pytest.raises(ServiceError, match=f"{SERVICE}: it is TERMINAT.*, not RUNNING"):
            service.snapshot()
    assert states(cloud) == {"TERMINATED"}


@needs_sdk
@pytest.mark.parametrize(
    ("fault", "times", "said"),
    [
        (Fault(status=403, detail="You do not have permission."), 1000, "not allowed: You do not have permission."),
        (Fault(status=500, detail="Out of order."), 1000, "Out of order."),
        (Fault(state="TERMINATING"), 1000, "last seen TERMINATING"),
        (Fault(delay_s=60), 1000, "no answer to terminate within 0.5 s"),
    ],
    ids=("forbidden", "out of order", "never ends", "silent"),
)
def test_what_will_not_end_is_told_with_the_command(
    cloud: StandIn, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, times: int, said: str
) -> None:
    cloud.misbehave("terminate", fault, times=times)

    def on_status(text: str) -> None:
        if text.startswith("terminating") and fault.delay_s:
            monkeypatch.setattr(backend, "_CALL_TIMEOUT_S", 0.5)

    with pytest.raises(ServiceError, match=re.escape(said)) as failed:
        run(make(terminate_timeout_s=4), tmp_path / "service", on_status)
    assert f"anyscale service terminate --name {SERVICE}" in str(failed.value)


@needs_sdk
def test_a_service_of_somebody_else_is_left_alone(cloud: StandIn, make: Make, tmp_path: Path) -> None:
    with living(make(), NAME, tmp_path, lambda text: None) as service:
        service.wait_ready()
        with pytest.raises(ServiceError, match="exists already and is RUNNING"):
            run(make(), tmp_path / "second")
        assert calls(cloud) == ["apply"]
        service.snapshot()
    assert states(cloud) == {"TERMINATED"}


@needs_sdk
def test_the_same_name_again(cloud: StandIn, make: Make, tmp_path: Path) -> None:
    """A resumed run deploys under the name of a service that was terminated."""
    run(make(), tmp_path / "first")
    run(make(), tmp_path / "second")
    assert calls(cloud) == ["apply", "terminate"] * 2
    assert len({version.name for version in cloud.services[SERVICE].versions}) == 2
    assert states(cloud) == {"TERMINATED"}


@needs_sdk
def test_ready_is_when_the_last_version_is_alone(cloud: StandIn, make: Make, tmp_path: Path) -> None:
    """Lost answers make the SDK apply four times; meanwhile the service says RUNNING, of an earlier one."""
    cloud._startup_s = 2.0
    cloud.misbehave("apply", Fault(drop="after", state="RUNNING", for_s=1.0), times=3)
    with living(make(), NAME, tmp_path, lambda text: None) as service:
        service.wait_ready()
        known = cloud.services[SERVICE]
        assert len(known.versions) == 4
        assert known.primary is known.versions[-1]
        assert known.canary is None
    assert calls(cloud) == ["apply"] * 4 + ["terminate"]
    assert [version.state for version in known.versions] == ["TERMINATED"] * 4


@needs_sdk
def test_running_is_not_enough(cloud: StandIn, make: Make, tmp_path: Path) -> None:
    """The service says RUNNING while our version does not."""
    cloud.misbehave("apply", Fault(state="STARTING", of="version"))
    with pytest.raises(ServiceError, match=r"not ready after 2 s .*: RUNNING, our version STARTING"):
        run(make(startup_timeout_s=2), tmp_path / "service")
    assert states(cloud) == {"TERMINATED"}


@needs_sdk
def test_an_apply_that_acts_after_its_time_is_up(
    cloud: StandIn, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_SETTLE_S", 14.0)
    monkeypatch.setattr(backend, "_DEPLOY_TIMEOUT_S", 2.0)
    cloud.misbehave("apply", Fault(delay_s=12.0))  # longer than the SDK takes to be imported again
    with pytest.raises(ServiceError, match="no answer to deploy within 2 s"):
        run(make(), tmp_path / "service")
    assert calls(cloud) == ["apply", "terminate"]
    assert states(cloud) == {"TERMINATED"}


@needs_sdk
@pytest.mark.parametrize("when", ["deploying", "STARTING", "waiting for the first reply", "terminating"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(
    cloud: StandIn, make: Make, tmp_path: Path, when: str, signum: signal.Signals
) -> None:
    def on_status(text: str) -> None:
        if text.startswith(when):
            threading.Timer(0.2 if when == "deploying" else 0, os.kill, (os.getpid(), signum)).start()

    cloud.misbehave("apply", Fault(delay_s=1.0, state="STARTING", for_s=2.0))
    with pytest.raises(Interrupted) as interrupted, interruptible():
        # The SDK's process was ended with what it was asked, and takes seconds to start again.
        run(make(terminate_timeout_s=60), tmp_path / "service", on_status)
    assert interrupted.value.signum == signum
    assert states(cloud) == {"TERMINATED"} or (when == "deploying" and not cloud.services)


@needs_sdk
def test_several_end_side_by_side(cloud: StandIn, make: Make, tmp_path: Path) -> None:
    with ExitStack() as live:
        services = []
        for index in range(2):
            (tmp_path / str(index)).mkdir()
            name = dataclasses.replace(NAME, index=index)
            services.append(live.enter_context(living(make(), name, tmp_path / str(index), lambda text: None)))
        for service in services:
            service.wait_ready()
        for service in services:
            service.begin_stop()
        assert calls(cloud) == ["apply", "apply", "terminate", "terminate"]
    assert states(cloud) == {"TERMINATED"}
    assert calls(cloud) == ["apply", "apply", "terminate", "terminate"]


@needs_sdk
def test_flags_that_do_not_arrive_fail_the_service(
    cloud: StandIn, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Service, "env_vars", {})
    with pytest.raises(ServiceError, match=r"did not reach every Serve actor:\n(.*\n)*RAY_SERVE_ENABLE_HA_PROXY"):
        run(make("profile=haproxy"), tmp_path / "service")
    assert states(cloud) == {"TERMINATED"}


@needs_sdk
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cloud": "nowhere"}, "unknown cloud: .*nowhere"),
        ({"token_env": "BAD_TOKEN"}, "wrong token"),
        ({"token_env": "NOT_A_TOKEN"}, "wrong token"),
        ({"host_env": "BAD_HOST"}, "unreachable"),
    ],
)
def test_credentials_are_checked_first(
    cloud: StandIn, make: Make, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("BAD_TOKEN", "sss_c4n4ry")
    monkeypatch.setenv("NOT_A_TOKEN", "c4n4ry")
    monkeypatch.setenv("BAD_HOST", "http://127.0.0.1:9")
    config = make(**settings)
    with pytest.raises(ConfigError, match=said) as refused:
        config.cluster.check_live(config)
    assert "c4n4ry" not in str(refused.value)
    assert calls(cloud) == []

"""The stand-in control plane, seen through the real SDK: what a well-behaved one does, and each misbehaviour."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest

anyscale: Any = pytest.importorskip("anyscale")

from anyscale.client.openapi_client.rest import ApiException  # noqa: E402
from anyscale.service.models import ServiceConfig  # noqa: E402

from orchestrator.process import members  # noqa: E402
from tests.anyscale_standin import Fault, Instant, LocalRay, Service, StandIn  # noqa: E402

APP = """
import os
import time

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve

api = FastAPI()


@serve.deployment
@serve.ingress(api)
class Told:
    @api.get("/told")
    def told(self, name: str) -> dict[str, str | None]:
        return {"value": os.environ.get(name), "file": __file__}

    @api.get("/slowly")
    def slowly(self) -> StreamingResponse:
        def parts():
            yield b"first\\n"
            time.sleep(2)
            yield b"second\\n"

        return StreamingResponse(parts(), media_type="text/plain")


app = Told.bind()
"""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[StandIn]:
    with StandIn(tmp_path / "bucket", Instant(), startup_s=0.1, stop_s=0.1) as standin:
        yield standin


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    directory = tmp_path / "upload"
    directory.mkdir()
    (directory / "uploaded_app.py").write_text(APP)
    return directory


def sdk(cloud: StandIn, token: str | None = None) -> Any:
    return anyscale.Anyscale(auth_token=token or cloud.token, _host=cloud.url).service


def config(upload: Path, name: str = "svc-1", version: str = "v1", **more: Any) -> ServiceConfig:
    return ServiceConfig(
        name=name,
        image_uri="anyscale/ray-llm:nightly-py311-cu128",
        compute_config={
            "head_node": {"instance_type": "m8a.xlarge"},
            "worker_nodes": [{"instance_type": "m7a.4xlarge", "min_nodes": 1, "max_nodes": 1}],
        },
        working_dir=str(upload),
        env_vars={"RAY_SERVE_ENABLE_HA_PROXY": "1"},
        applications=[{"name": "told", "import_path": "uploaded_app:app", "route_prefix": "/"}],
        version_name=version,
        tags={"run-id": "r1", "arm": name},
        **more,
    )


def wait_for(what: Callable[[], Any], timeout_s: float = 20) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("did not come about")


def in_state(service: Any, name: str, state: str, timeout_s: float = 20) -> Any:
    return wait_for(lambda: (now := service.status(name)).state == state and now, timeout_s)


def get(url: str, token: str | None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def states(service: Service) -> list[str]:
    return [each["state"] for each in service.history]


def calls(cloud: StandIn) -> list[tuple[str, str]]:
    return [(each["call"], each["service"]) for each in cloud.ledger]


def answers(cloud: StandIn, verb: str) -> list[int]:
    return [status for each, status in cloud.requests if each == verb]


def test_from_deploy_to_terminated(cloud: StandIn, upload: Path) -> None:
    service = sdk(cloud)
    service.deploy(config(upload, cloud="standin-cloud", project="default"))
    status = in_state(service, "svc-1", "RUNNING")
    assert (status.primary_version.name, status.primary_version.state) == ("v1", "RUNNING")
    assert status.primary_version.config.image_uri == "anyscale/ray-llm:nightly-py311-cu128"
    assert status.query_auth_token == cloud.services["svc-1"].auth_token
    assert get(status.query_url, None)[0] == 401
    assert get(status.query_url, "other")[0] == 401
    code, body = get(f"{status.query_url}/any?x=1", status.query_auth_token)
    told = json.loads(body)
    assert code == 200
    assert told["path"] == "/any?x=1"
    assert told["env_vars"] == {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    assert told["applications"][0]["runtime_env"]["working_dir"].startswith(f"file://{upload.parent / 'bucket'}")
    assert service.controller_logs("svc-1") == "controller of version v1\n"
    service.terminate(name="svc-1")
    status = in_state(service, "svc-1", "TERMINATED")
    assert get(status.query_url, status.query_auth_token)[0] == 503

    record = cloud.services["svc-1"]
    assert calls(cloud) == [("apply", "svc-1"), ("terminate", "svc-1")]
    assert states(record) == ["STARTING", "RUNNING", "TERMINATING", "TERMINATED"]
    assert record.compute_config["head_node_type"]["instance_type"] == "m8a.xlarge"
    assert record.compute_config["worker_node_types"][0]["instance_type"] == "m7a.4xlarge"
    assert record.image_uri == "anyscale/ray-llm:nightly-py311-cu128"
    assert 0 not in (each for _, each in cloud.requests)
    assert max(each for _, each in cloud.requests) == 200


def test_defaults_and_no_token(cloud: StandIn) -> None:
    """Neither image, compute config nor upload: what the SDK then asks for has answers, too."""
    service = sdk(cloud)
    application = {"import_path": "ray.serve.llm:build_openai_app"}
    service.deploy(ServiceConfig(name="plain", applications=[application], query_auth_token_enabled=False))
    status = in_state(service, "plain", "RUNNING")
    assert status.query_auth_token is None
    assert get(status.query_url, None)[0] == 200


def test_lookups(cloud: StandIn, upload: Path) -> None:
    service = sdk(cloud)
    for number in range(12):
        service.deploy(config(upload, f"svc-{number}"))
    assert len(list(service.list(page_size=5))) == 12
    (found,) = service.list(tags_filter={"run-id": ["r1"], "arm": ["svc-3", "other"]})
    assert found.name == "svc-3"
    assert service.list_tags(name="svc-3") == {"run-id": "r1", "arm": "svc-3"}
    with pytest.raises(RuntimeError, match="'svc' was not found"):
        service.status("svc")  # part of a name is not a name
    with pytest.raises(ValueError, match="other-cloud"):
        service.deploy(config(upload, cloud="other-cloud"))


def test_wrong_token(cloud: StandIn) -> None:
    with pytest.raises(Exception, match="invalid or have expired"):
        sdk(cloud, token="sss_other").status("svc-1")
    assert answers(cloud, "userinfo") == [401]


def test_the_command_that_terminates(cloud: StandIn, upload: Path) -> None:
    sdk(cloud).deploy(config(upload))
    done = subprocess.run(
        [Path(sys.executable).with_name("anyscale"), "service", "terminate", "--name", "svc-1"],
        env={
            **os.environ,
            "ANYSCALE_HOST": cloud.url,
            "ANYSCALE_CLI_TOKEN": cloud.token,
            "ANYSCALE_TELEMETRY_SAMPLE_RATE": "0",
            "ANYSCALE_SUPPRESS_UPGRADE_WARNING": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wait_for(lambda: cloud.services["svc-1"].state == "TERMINATED")


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429])
def test_refusals_lose_their_code(cloud: StandIn, upload: Path, status: int) -> None:
    cloud.misbehave("apply", Fault(status=status, detail=f"because of {status}"))
    with pytest.raises(ValueError, match=f"because of {status}"):
        sdk(cloud).deploy(config(upload))
    assert answers(cloud, "apply") == [status]
    assert cloud.ledger == []
    assert cloud.services == {}


@pytest.mark.parametrize("status", [500, 503])
def test_server_errors_keep_their_code(cloud: StandIn, upload: Path, status: int) -> None:
    cloud.misbehave("apply", Fault(status=status))
    with pytest.raises(ApiException) as error:
        sdk(cloud).deploy(config(upload))
    assert error.value.status == status
    assert answers(cloud, "apply") == [status]


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(cloud: StandIn, upload: Path, status: int) -> None:
    cloud.misbehave("apply", Fault(status=status, retry_after_s=0))
    sdk(cloud).deploy(config(upload))
    assert answers(cloud, "apply") == [status, 200]


@pytest.mark.parametrize(("drop", "num_applied"), [("before", 1), ("after", 2)])
def test_a_dropped_apply_is_sent_again(cloud: StandIn, upload: Path, drop: Any, num_applied: int) -> None:
    cloud.misbehave("apply", Fault(drop=drop))
    sdk(cloud).deploy(config(upload))
    assert answers(cloud, "apply") == [0, 200]
    assert calls(cloud) == [("apply", "svc-1")] * num_applied
    status = in_state(sdk(cloud), "svc-1", "RUNNING")
    assert status.primary_version.name == "v1"


def test_a_dropped_terminate_is_not_sent_again(cloud: StandIn, upload: Path) -> None:
    service = sdk(cloud)
    service.deploy(config(upload))
    cloud.misbehave("terminate", Fault(drop="after"))
    with pytest.raises(Exception, match="Connection aborted"):
        service.terminate(name="svc-1")
    assert answers(cloud, "terminate") == [0]
    assert calls(cloud) == [("apply", "svc-1"), ("terminate", "svc-1")]
    in_state(service, "svc-1", "TERMINATED")


def test_slow_and_only_one_service(cloud: StandIn, upload: Path) -> None:
    """The SDK has no time-out: a call takes what the server takes. Others are answered meanwhile."""
    service = sdk(cloud)
    cloud.misbehave("apply", Fault(delay_s=inf), service="svc-2")
    service.deploy(config(upload, "svc-1"))
    hung = threading.Thread(target=lambda: sdk(cloud).deploy(config(upload, "svc-2")), daemon=True)
    hung.start()
    wait_for(lambda: answers(cloud, "upload") == [200, 200])
    in_state(service, "svc-1", "RUNNING")
    assert hung.is_alive()
    assert list(cloud.services) == ["svc-1"]


@pytest.mark.parametrize("state", ["STARTING", "UNHEALTHY", "SYSTEM_FAILURE"])
def test_a_service_that_does_not_come_up(cloud: StandIn, upload: Path, state: str) -> None:
    service = sdk(cloud)
    cloud.misbehave("apply", Fault(state=state))
    service.deploy(config(upload))
    wait_for(lambda: cloud.services["svc-1"].primary.state == "RUNNING")  # in truth
    status = service.status("svc-1")
    assert (status.state, status.primary_version.state) == (state, state)
    assert get(status.query_url, status.query_auth_token)[0] == 503
    with pytest.raises(TimeoutError, match=state):
        service.wait("svc-1", timeout_s=1, _interval_s=0.1)
    service.terminate(name="svc-1")
    in_state(service, "svc-1", "TERMINATED")
    assert states(cloud.services["svc-1"])[-3:] == [state, "TERMINATING", "TERMINATED"]


def test_a_version_that_is_unhealthy_for_a_while(cloud: StandIn, upload: Path) -> None:
    service = sdk(cloud)
    cloud.misbehave("apply", Fault(state="UNHEALTHY", of="version", for_s=1))
    service.deploy(config(upload))
    status = in_state(service, "svc-1", "RUNNING")
    assert status.primary_version.state == "UNHEALTHY"
    wait_for(lambda: service.status("svc-1").primary_version.state == "RUNNING")


def test_unhealthy_later(cloud: StandIn, upload: Path) -> None:
    service = sdk(cloud)
    cloud.misbehave("apply", Fault(state="UNHEALTHY", after_s=1))
    service.deploy(config(upload))
    in_state(service, "svc-1", "RUNNING")
    in_state(service, "svc-1", "UNHEALTHY")


def test_termination_that_does_not_end(cloud: StandIn, upload: Path) -> None:
    service = sdk(cloud)
    service.deploy(config(upload))
    cloud.misbehave("terminate", Fault(status=403, detail="not yours"))
    cloud.misbehave("terminate", Fault(state="TERMINATING"))
    with pytest.raises(ValueError, match="not yours"):
        service.terminate(name="svc-1")
    assert cloud.services["svc-1"].goal_state == "RUNNING"
    service.terminate(name="svc-1")
    with pytest.raises(TimeoutError, match="TERMINATING"):
        service.wait("svc-1", state="TERMINATED", timeout_s=1, _interval_s=0.1)
    service.terminate(name="svc-1")
    in_state(service, "svc-1", "TERMINATED")


def test_an_update(cloud: StandIn, upload: Path) -> None:
    service = sdk(cloud)
    service.deploy(config(upload))
    in_state(service, "svc-1", "RUNNING")
    cloud.misbehave("apply", Fault(old_stays_s=0.5))
    service.deploy(config(upload, version="v2"))
    service.wait("svc-1", timeout_s=5, _interval_s=0.1)  # returns on the old one
    assert service.status("svc-1").primary_version.name == "v1"
    status = wait_for(lambda: (now := service.status("svc-1")).primary_version.name == "v2" and now)
    assert (status.state, status.canary_version) == ("RUNNING", None)
    assert states(cloud.services["svc-1"]) == ["STARTING", "RUNNING", "UPDATING", "RUNNING"]
    assert [version.state for version in cloud.services["svc-1"].versions] == ["TERMINATED", "RUNNING"]


def test_what_was_not_uploaded_is_not_there(tmp_path: Path, upload: Path) -> None:
    """Though it is installed here."""
    with StandIn(tmp_path / "bucket", LocalRay()) as cloud:
        lacking = dataclasses.replace(config(upload), applications=[{"import_path": "workloads.unary.app:build"}])
        sdk(cloud).deploy(lacking)
        in_state(sdk(cloud), "svc-1", "UNHEALTHY")
        assert cloud.services["svc-1"].primary.message == "workloads.unary.app:build is not in the upload"


@pytest.mark.e2e
@pytest.mark.serial
def test_on_local_ray(tmp_path: Path, upload: Path) -> None:
    """Two services at once, each on a cluster of its own with its own upload; one cannot be imported."""
    deployer = LocalRay()
    with StandIn(tmp_path / "bucket", deployer) as cloud:
        service = sdk(cloud)
        service.deploy(config(upload, "svc-1"))
        in_state(service, "svc-1", "RUNNING", timeout_s=180)
        (upload / "uploaded_app.py").write_text("raise RuntimeError('broken on purpose')")
        service.deploy(config(upload, "svc-2"))
        in_state(service, "svc-2", "UNHEALTHY", timeout_s=180)
        assert "broken on purpose" in cloud.services["svc-2"].primary.message
        directories = [claim.directory for claim, _ in deployer._up.values()]
        assert len(directories) == 2

        status = service.status("svc-1")
        asked = f"{status.query_url}/told?name=RAY_SERVE_ENABLE_HA_PROXY"
        assert get(asked, None)[0] == 401
        code, body = get(asked, status.query_auth_token)
        told = json.loads(body)
        assert (code, told["value"]) == (200, "1")
        assert "working_dir_files" in told["file"]
        request = urllib.request.Request(
            f"{status.query_url}/slowly", headers={"Authorization": f"Bearer {status.query_auth_token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.readline() == b"first\n"
            began = time.monotonic()
            assert answer.readline() == b"second\n"
            assert time.monotonic() - began > 1  # it came when it was sent
        assert "Deploying" in service.controller_logs("svc-1")

        service.terminate(name="svc-1")
        in_state(service, "svc-1", "TERMINATED", timeout_s=90)
        assert members(directories[0]) == []
        assert members(directories[1]) != []
        service.terminate(name="svc-2")
        wait_for(cloud.services["svc-2"].primary.task.cancelling)  # leave while it ends
    assert members(directories[1]) == []
    assert not any(directory.exists() for directory in directories)

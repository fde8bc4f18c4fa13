"""The child process that is one local service: it starts Ray, deploys the application, and answers questions.

Run as `python -m orchestrator.clusters.local_driver`, with the service's environment, a spec as the first line
of standard input, and one command a line after that. Answers and status lines are JSON on standard output.
It ends, and takes the whole process tree with it, when standard input closes: also when the orchestrator
was killed and could clean nothing up.
"""

import importlib.util
import json
import os
import platform
import shutil
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import psutil
import ray
from ray import serve
from ray._private import state as ray_state
from ray.serve._private import constants as serve_constants
from ray.serve._private.api import serve_start
from ray.serve.schema import ApplicationStatus, DeploymentStatus, ServeDeploySchema

from orchestrator import provenance
from orchestrator.clusters.engine import declared_differences, engine_settings
from orchestrator.process import end_members, listener, process_id

# Read back from the actors, less what must not be written down.
_REPORTED_PREFIXES = ("RAY_", "VLLM_")
_SECRET_PARTS = ("TOKEN", "SECRET", "PASSWORD", "KEY")
_ACTOR_ANSWER_TIMEOUT_S = 60.0


def main() -> NoReturn:
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever Ray prints goes to the log, not into the protocol
    spec = json.loads(sys.stdin.readline())
    directory = Path(spec["directory"])
    parent = os.getppid()
    try:
        _bring_up(spec, channel)
        _say(channel, event="ready", effective=_effective(spec))
        for line in sys.stdin:
            assert line.strip() == "snapshot", line
            _say(channel, event="snapshot", **_snapshot(spec))
    except Exception as error:
        traceback.print_exc()
        _say(channel, event="failed", error=str(error) or repr(error))
        sys.stdin.read()  # stay until told to go: logs are copied meanwhile
    finally:
        end_members(directory)
        if os.getppid() != parent:  # orphaned; else the parent removes it last, since another may then take its name
            shutil.rmtree(directory, ignore_errors=True)
        os._exit(0)  # Ray's exit handlers would wait for processes that are gone


def _say(channel: TextIO, **message: Any) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def _bring_up(spec: Mapping[str, Any], channel: TextIO) -> None:
    _say(channel, event="status", text="starting Ray")
    ray.init(
        address="local",  # never a cluster that happens to run here
        num_cpus=spec["num_cpus"],
        num_gpus=spec["num_gpus"],
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=spec["directory"],
        _metrics_export_port=spec["metrics_export_port"],
    )
    config = ServeDeploySchema.model_validate(spec["serve_config"])
    client = serve_start(
        http_options=config.http_options.model_dump(), proxy_location=config.proxy_location, grpc_options=None
    )
    client.deploy_apps(config)
    name = config.applications[0].name
    last_text = ""
    while True:
        application = serve.status().applications.get(name)
        if application is not None and application.status in (
            ApplicationStatus.DEPLOY_FAILED,
            ApplicationStatus.UNHEALTHY,
        ):
            raise RuntimeError(_failure_text(application))
        if application is not None and application.status == ApplicationStatus.RUNNING:
            break
        text = _progress_text(application)
        if text != last_text:
            _say(channel, event="status", text=text)
            last_text = text
        time.sleep(0.5)
    _say(channel, event="status", text="waiting for the first reply")
    _wait_for_reply(spec["ready_url"], channel)


def _progress_text(application: Any) -> str:
    if application is None:
        return "building the application"
    parts = [application.status.value]
    for name, deployment in application.deployments.items():
        running = deployment.replica_states.get("RUNNING", 0)
        parts.append(f"{name} {running}/{sum(deployment.replica_states.values())}")
        if deployment.message:
            parts.append(deployment.message.splitlines()[0][:200])
    return "; ".join(parts)


def _failure_text(application: Any) -> str:
    messages = [application.message] + [
        f"{name}: {deployment.message}"
        for name, deployment in application.deployments.items()
        if deployment.status in (DeploymentStatus.UNHEALTHY, DeploymentStatus.DEPLOY_FAILED)
    ]
    return f"{application.status.value}: " + "\n".join(message for message in messages if message)


def _wait_for_reply(url: str, channel: TextIO) -> None:
    """Until the application itself answers 200; the orchestrator's start-up time-out bounds the wait."""
    last = ""
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                reply.read()
                return
        except (urllib.error.URLError, OSError) as error:
            text = f"waiting for the first reply: {error}"
        if text != last:
            _say(channel, event="status", text=text)
            last = text
        time.sleep(0.25)


def _snapshot(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Which Serve actors live now, who listens, and whether Serve itself calls the application healthy."""
    actors: list[dict[str, Any]] = [
        {
            "id": actor_id,
            "name": actor["Name"],
            "kind": actor["ActorClassName"].split(":")[0],
            "pid": actor["Pid"],
        }
        for actor_id, actor in ray_state.actors().items()
        if actor["State"] == "ALIVE" and actor["Name"].startswith("SERVE_")
    ]
    actors += [engine for actor in actors if actor["kind"] == "ServeReplica" for engine in _engines(actor, spec)]
    applications = serve.status().applications.values()
    unhealthy = [
        f"{name}: {deployment.status.value} {deployment.message}"
        for application in applications
        for name, deployment in application.deployments.items()
        if deployment.status != DeploymentStatus.HEALTHY
    ]
    return {"actors": actors, "listener": listener(spec["http_port"]), "unhealthy": unhealthy}


def _engines(replica: Mapping[str, Any], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The processes in which vLLM runs the model of a replica, as if they were actors of their own."""
    if spec.get("engine") is None:
        return []
    try:
        children = psutil.Process(replica["pid"]).children(recursive=True)
        engines = [each for each in children if each.name().startswith("VLLM::Eng")]  # Linux keeps 15 characters
        return [
            {
                "id": process_id(each),
                "name": f"{replica['name']}-engine",
                "kind": "VllmEngine",
                "pid": each.pid,
                "log": f"{spec['log_dir']} (worker-*-{replica['pid']}.err.log, replica_*.log)",
            }
            for each in engines
        ]
    except (psutil.NoSuchProcess, OSError):
        return []


def _report(actor: Any) -> dict[str, Any]:
    """Runs inside each Serve actor: what it was given and what Ray and vLLM made of that."""
    import os as actor_os
    import sys as actor_sys

    from ray.serve._private import constants as actor_constants

    constants = {name: value for name, value in vars(actor_constants).items() if name.isupper()}
    if llm := actor_sys.modules.get("ray.llm._internal.serve.constants"):
        constants |= {name: value for name, value in vars(llm).items() if name.isupper()}
    engine = None
    if "vllm.config" in actor_sys.modules:
        # Breadth first through attributes, wherever Ray keeps it (frozen objects are not among gc.get_objects()).
        reached, seen = [actor], {id(actor)}
        for each in reached:
            if type(each).__name__ == "VllmConfig":
                import pydantic

                engine = pydantic.TypeAdapter(type(each)).dump_python(each, mode="json", fallback=str)
                break
            inner = [value for value in getattr(each, "__dict__", {}).values() if id(value) not in seen]
            seen.update(map(id, inner))
            reached += inner[: 100_000 - len(reached)]
    return {"pid": actor_os.getpid(), "env": dict(actor_os.environ), "constants": constants, "engine": engine}


def _effective(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What the live service really runs with, read back from every Serve actor.

    Raises RuntimeError when a declared variable did not arrive in one of them.
    """
    declared: dict[str, str] = spec["declared_env"]
    actors: list[dict[str, Any]] = []
    missing: list[str] = []
    engines: list[dict[str, Any]] = []
    for actor in _snapshot(spec)["actors"]:
        if actor["kind"] == "VllmEngine":
            continue  # no actor, and told by its replica
        handle = ray.get_actor(actor["name"], namespace="serve")
        report = ray.get(handle.__ray_call__.remote(_report), timeout=_ACTOR_ANSWER_TIMEOUT_S)
        missing += [
            f"{actor['name']}: {name} is {report['env'].get(name)!r}, declared {value!r}"
            for name, value in (spec["cluster_env"] | declared).items()
            if report["env"].get(name) != value
        ]
        actors.append(
            {
                "name": actor["name"],
                "kind": actor["kind"],
                "pid": report["pid"],
                "env": _reportable(report["env"], spec["cluster_env"] | declared),
                "constants": _plain(report["constants"]),
            }
        )
        if report["engine"] is not None:
            engines.append(engine_settings(report["engine"]))
    if missing:
        raise RuntimeError("declared environment did not reach every Serve actor:\n" + "\n".join(missing))
    engine = _one_engine(engines, spec.get("engine"))
    effects, consequences, warnings = _flag_effects(declared)
    return {
        "declared_env": declared,
        "actors": actors,
        "engine": engine,
        "flag_effects": effects,
        "consequences": consequences,
        "warnings": warnings,
        "listener": listener(spec["http_port"]),
        "versions": {
            "python": platform.python_version(),
            "ray_commit": ray.__commit__,
            **provenance.package_versions(),
        },
        "hardware": provenance.host() | {"ray_resources": ray.cluster_resources()},
    }


def _one_engine(found: list[dict[str, Any]], declared: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The engine settings that all replicas share. Raises RuntimeError where they differ from the declared ones."""
    if declared is None:
        return None
    if not found or any(each != found[0] for each in found):
        raise RuntimeError(f"the replicas do not tell one and the same engine: {found}")
    if wrong := declared_differences(declared, found[0]):
        raise RuntimeError("declared engine arguments did not reach the engine: " + "; ".join(wrong))
    return found[0]


def _reportable(env: Mapping[str, str], declared: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(env.items())
        if (name in declared or name.startswith(_REPORTED_PREFIXES)) and not any(part in name for part in _SECRET_PARTS)
    }


def _plain(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Those constants that JSON can hold."""
    return {
        name: value
        for name, value in sorted(constants.items())
        if value is None or isinstance(value, bool | int | float | str)
    }


def _flag_effects(
    declared: Mapping[str, str],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], list[str]]:
    """What each flag changes: alone on top of the baseline, or else when it alone is taken away.

    Ray's constants module is evaluated afresh under each environment. Returns (constants changed by each flag,
    constants that follow without being declared, warnings for flags that change none).
    """
    baseline = _constants_under({}, without=declared)
    here = _constants_under(declared, without=declared)
    effects: dict[str, dict[str, Any]] = {}
    warnings = []
    for name, value in declared.items():
        alone = _difference(baseline, _constants_under({name: value}, without=declared))
        rest = {other: setting for other, setting in declared.items() if other != name}
        effects[name] = alone or _difference(_constants_under(rest, without=declared), here)
        if not effects[name]:
            known = name.startswith(("RAY_SERVE_", "VLLM_"))
            expected = "no effect expected" if known else "its effect cannot be shown here"
            warnings.append(f"{name}={value} changes no constant of Ray {ray.__version__} or vLLM: {expected}")
    consequences = {name: change for name, change in _difference(baseline, here).items() if name not in declared}
    return effects, consequences, warnings


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"from": before.get(name), "to": after.get(name)}
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def _constants_under(env: Mapping[str, str], without: Mapping[str, str]) -> dict[str, Any]:
    """Constants of Ray Serve, and of Ray Serve LLM and vLLM where a flag is theirs, evaluated afresh."""
    places = [serve_constants.__file__]
    if any(name.startswith("RAY_SERVE_LLM_") for name in without):
        places.append(str(Path(ray.__file__).parent / "llm" / "_internal" / "serve" / "constants.py"))
    found: dict[str, Any] = {}
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
    return _plain(found)


@contextmanager
def _environment(env: Mapping[str, str], without: Mapping[str, str]) -> Any:
    saved = dict(os.environ)
    for name in without:
        os.environ.pop(name, None)
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


if __name__ == "__main__":
    main()

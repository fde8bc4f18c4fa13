"""The child process that is one local service: it starts Ray, deploys the application, and answers questions.

Run as `python -m orchestrator.clusters.local_driver` with the service's environment; see `child.be_service` for what
it is told and says, and when it ends.
"""

import platform
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NoReturn

import psutil
import ray
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ApplicationStatus, DeploymentStatus, ServeDeploySchema

from orchestrator import provenance
from orchestrator.child import be_service
from orchestrator.clusters.base import ENGINE_KIND, REPLICA_KIND, ActorState, Snapshot
from orchestrator.clusters.engine import arrived
from orchestrator.clusters.specs import RayServeSpec
from orchestrator.process import listener, process_id
from orchestrator.waiting import poll
from workloads.probe import readback


def main() -> NoReturn:
    be_service(RayServeSpec, _bring_up, _snapshot)


def _bring_up(spec: RayServeSpec, on_status: Callable[[str], None]) -> Mapping[str, object]:
    on_status("starting Ray")
    ray.init(
        address="local",  # never a cluster that happens to run here
        num_cpus=spec.num_cpus,
        num_gpus=spec.num_gpus,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=spec.directory,
        _metrics_export_port=spec.metrics_export_port,
    )
    config = ServeDeploySchema.model_validate(spec.serve_config)
    client = serve_start(
        http_options=config.http_options.model_dump(), proxy_location=config.proxy_location, grpc_options=None
    )
    client.deploy_apps(config)
    _wait_running(config.applications[0].name, on_status)
    _wait_for_reply(spec.ready_url, on_status)
    return _effective(spec)


def _wait_running(name: str, on_status: Callable[[str], None]) -> None:
    """Until Serve calls the application RUNNING. Raises RuntimeError when it failed. The orchestrator ends the wait."""
    for _ in poll(0.5):
        application = serve.status().applications.get(name)
        if application is not None and application.status in (
            ApplicationStatus.DEPLOY_FAILED,
            ApplicationStatus.UNHEALTHY,
        ):
            raise RuntimeError(_failure_text(application))
        if application is not None and application.status == ApplicationStatus.RUNNING:
            return
        on_status(_progress_text(application))


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


def _wait_for_reply(url: str, on_status: Callable[[str], None]) -> None:
    """Until the application itself answers 200; the orchestrator's start-up time-out bounds the wait."""
    on_status("waiting for the first reply")
    for _ in poll(0.25):
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                reply.read()
                return
        except (urllib.error.URLError, OSError) as error:
            on_status(f"waiting for the first reply: {error}")


def _snapshot(spec: RayServeSpec) -> Mapping[str, object]:
    """Which Serve actors live now, who listens, and whether Serve itself calls the application healthy."""
    name = _application(spec)
    actors = [ActorState(**actor) for actor in readback.actors(name)]
    actors += [engine for actor in actors if actor.kind == REPLICA_KIND for engine in _engines(actor, spec)]
    return asdict(Snapshot(actors=actors, listener=listener(spec.http_port), unhealthy=readback.unhealthy(name)))


def _application(spec: RayServeSpec) -> str:
    return str(ServeDeploySchema.model_validate(spec.serve_config).applications[0].name)


def _engines(replica: ActorState, spec: RayServeSpec) -> list[ActorState]:
    """The processes in which vLLM runs the model of a replica, as if they were actors of their own."""
    if spec.engine is None:
        return []
    try:
        children = psutil.Process(replica.pid).children(recursive=True)
        engines = [child for child in children if child.name().startswith("VLLM::Eng")]  # Linux keeps 15 characters
        return [
            ActorState(
                id=process_id(engine),
                name=f"{replica.name}-engine",
                kind=ENGINE_KIND,
                pid=engine.pid,
                log=f"{spec.log_dir} (worker-*-{replica.pid}.err.log, replica_*.log)",
            )
            for engine in engines
        ]
    except (psutil.NoSuchProcess, OSError):
        return []


def _effective(spec: RayServeSpec) -> Mapping[str, object]:
    """What the live service really runs with. Raises RuntimeError when something declared did not arrive."""
    declared = dict(spec.declared_env)
    actors = readback.actors(_application(spec))
    handles = [ray.get_actor(actor["name"], namespace="serve") for actor in actors]
    reports = ray.get(
        [handle.__ray_call__.remote(readback.reporter()) for handle in handles],
        timeout=readback.ACTOR_ANSWER_TIMEOUT_S,
    )
    told = readback.summary(actors, reports, declared, {**spec.cluster_env, **declared})
    return {
        "declared_env": declared,
        **arrived(told, spec.engine),
        "listener": listener(spec.http_port),
        "versions": {
            "python": platform.python_version(),
            "ray_commit": ray.__commit__,
            **provenance.package_versions(),
        },
        "hardware": provenance.host() | {"ray_resources": ray.cluster_resources()},
    }


if __name__ == "__main__":
    main()

"""What a local cluster tells the child that is the service; sent as one line of JSON, see `child.be_service`."""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.child import ServiceSpec


@dataclass(frozen=True, kw_only=True)
class RayServeSpec(ServiceSpec):
    """Of an application on a Ray of its own."""

    num_cpus: int
    num_gpus: int
    metrics_export_port: int
    serve_config: Mapping[str, object]  # as `serve deploy` takes it
    http_port: int
    ready_url: str  # answers 200 once the application does
    engine: Mapping[str, object] | None  # declared engine arguments; None: no language model


@dataclass(frozen=True, kw_only=True)
class VllmSpec(ServiceSpec):
    """Of vLLM's own servers, one for each port."""

    model: str  # the name in requests
    source: str  # where vLLM finds the weights
    engine: Mapping[str, object]  # declared engine arguments
    ports: list[int]
    gpus: int  # of each server

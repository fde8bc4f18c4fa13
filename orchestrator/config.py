"""A composed config, as the code that runs it has it: sections, and the kinds that its YAMLs name.

Hydra composes and refuses names that no YAML has. `parse` resolves interpolations, makes the objects, and checks what a
type cannot say; it fails with `ConfigError` before anything is deployed.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.clients.base import Client
from orchestrator.clusters.base import Cluster
from orchestrator.errors import ConfigError
from orchestrator.kinds import checked, named
from orchestrator.load.base import LevelRule
from orchestrator.observe.base import Observer
from orchestrator.sections import Compare, ServiceConfig, Slo, Sweep, Validity, check_env, workload_of


@dataclass(kw_only=True)
class Config(ServiceConfig):
    """One composed config: what is served (`ServiceConfig`), and who runs, loads and watches it."""

    cluster: Cluster
    client: Client
    observe: dict[str, Observer] = field(default_factory=dict)
    sweep: Sweep
    slo: Slo
    validity: Validity
    compare: Compare
    outputs: str = "outputs"
    seed: int | None = None
    resume: str | None = None
    trust: str | None = None  # modules or packages that the record of a resumed run may name, comma-separated


def register() -> None:
    """Make `${mul:a,b}` known to configs."""
    OmegaConf.register_new_resolver("mul", lambda a, b: a * b, replace=True)


def parse(composed: DictConfig, trusted: Collection[str] | None = None) -> Config:
    """Resolve and check one composed config.

    `trusted`: it comes from a record, see `kinds.named`. Raises ConfigError naming the key, what was found and what
    would work.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        hint = "\nmodel.* is there with workload=llm and workload=vllm" if "'model." in str(error) else ""
        raise ConfigError(f"{error}{hint}") from error
    assert isinstance(plain, dict)
    values = {str(name): value for name, value in plain.items()}
    values["workload"] = workload_of(values.get("workload"))
    values["cluster"] = named("cluster", values.get("cluster"), Cluster, trusted)
    values["client"] = named("client", values.get("client"), Client, trusted)
    observers = values.get("observe") or {}
    values["observe"] = {name: named(f"observe.{name}", node, Observer, trusted) for name, node in observers.items()}
    if isinstance(values.get("sweep"), dict):
        load = named("sweep.load", values["sweep"].get("load"), LevelRule, trusted)
        values["sweep"] = values["sweep"] | {"load": load}
    config = checked("", Config, values)
    check_env("cluster.env", config.cluster.env)
    for section in (config.workload, config.profile, config.sweep, config.compare):
        section.check()
    if config.cluster.deploys and not (config.workload.application or config.workload.server):
        raise ConfigError(
            f"workload {config.workload.name} has nothing to deploy, only a client: it needs cluster=endpoint "
            f"cluster.url=http://..., found cluster={config.cluster.name}"
        )
    return config

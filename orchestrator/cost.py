"""How long a run will take and what it will cost: estimates before it, and what its services cost by the clock."""

from collections.abc import Iterable, Mapping, Sequence

from orchestrator.clients.check import num_prompts
from orchestrator.config import SDK_MAX_NODES, ClientKind, ClusterConfig, ClusterKind, Config
from orchestrator.errors import ConfigError
from orchestrator.load.level import Level
from orchestrator.results.records import Span

# Seen on 2 slow cores, and assumed for a cloud; only the estimates of duration and cost depend on them.
_BRING_UP_S, _LLM_BRING_UP_S, _CLOUD_BRING_UP_S, TEAR_DOWN_S, _CLIENT_START_S = 20.0, 60.0, 600.0, 3.0, 3.0
_COUNTED_REQUESTS_S = 45.0  # of a level of vLLM's client in closed loop, which has no window in seconds


def bring_up_s(config: Config) -> float:
    """Estimate in seconds, of one service."""
    if config.cluster.kind is ClusterKind.anyscale:
        return _CLOUD_BRING_UP_S
    return _LLM_BRING_UP_S if config.model else _BRING_UP_S


def trial_s(config: Config, level: Level) -> float:
    """Estimate in seconds, of one level."""
    sweep = config.sweep
    if config.workload.client.kind is ClientKind.vllm_bench:
        counted_s = _COUNTED_REQUESTS_S
        if level.offered_rps is not None:
            options, num_replicas = config.workload.client.options, config.workload.num_replicas
            num_requests = num_prompts(options, num_replicas, level, sweep.duration_s)
            counted_s = num_requests / level.offered_rps + sweep.warmup_s
        return _CLIENT_START_S + counted_s + sweep.cooldown_s
    return _CLIENT_START_S + sweep.ramp_up_s + sweep.warmup_s + sweep.duration_s + sweep.cooldown_s


def machines(cluster: ClusterConfig) -> list[tuple[str, int]]:
    """Instance types that one service rents, and how many of each at most."""
    if cluster.kind is not ClusterKind.anyscale:
        return []
    workers = [(each["instance_type"], each.get("max_nodes", SDK_MAX_NODES)) for each in cluster.worker_nodes]
    return [(cluster.head_node["instance_type"], 1), *workers]


def cost_usd(lives: Iterable[tuple[float, ClusterConfig]]) -> float | None:
    """What services cost that lived so long, in seconds; None where a price is missing, or nothing is rented."""
    priced = [(life_s, hourly_usd(cluster)) for life_s, cluster in lives if machines(cluster)]
    if not priced:
        return None
    return None if any(price is None for _, price in priced) else sum(s / 3600 * (price or 0) for s, price in priced)


def spent_usd(timeline: Iterable[Span], clusters: Mapping[str, ClusterConfig]) -> float | None:
    """What the services of this timeline have cost, by the declared prices; None where one is missing.

    `clusters`: where each service ran, by its name in the timeline.
    """
    return cost_usd((span.end_s - span.start_s, clusters[span.name]) for span in timeline if span.what == "service")


def check_limit(clusters: Sequence[ClusterConfig], estimate_usd: float | None, service_hours: float) -> None:
    """Refuse what is likely to cost more than `cluster.max_cost_usd` of the first. Raises ConfigError."""
    limit = clusters[0].max_cost_usd
    if limit is None:
        return
    if not any(map(machines, clusters)):
        raise ConfigError(
            f"cluster.max_cost_usd={limit:g}, but nothing is rented: only machines of Anyscale have a price"
        )
    if estimate_usd is None:
        raise ConfigError(
            f"cluster.max_cost_usd={limit:g} cannot be held without a price of each machine: cluster.usd_per_hour"
        )
    if estimate_usd > limit:
        raise ConfigError(
            f"the run is estimated at {estimate_usd:.2f} USD ({service_hours:.1f} service hours), more than "
            f"cluster.max_cost_usd={limit:g}"
        )


def hourly_usd(cluster: ClusterConfig) -> float | None:
    """All machines of one service; None where the price of one is not declared."""
    rented = machines(cluster)
    if any(name not in cluster.usd_per_hour for name, _ in rented):
        return None
    return sum(count * cluster.usd_per_hour[name] for name, count in rented)

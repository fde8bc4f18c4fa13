"""How long a run will take and what it will cost: estimates before it, and what its services cost by the clock."""

from collections.abc import Iterable, Mapping, Sequence

from orchestrator.clusters.base import Cluster
from orchestrator.errors import ConfigError
from orchestrator.results.records import Span

TEAR_DOWN_S = 3.0  # seen on 2 slow cores; only the estimates of duration and cost depend on it


def cost_usd(lives: Iterable[tuple[float, Cluster]]) -> float | None:
    """What services cost that lived so long, in seconds; None where a price is missing, or nothing is rented."""
    priced = [(life_s, cluster.hourly_usd()) for life_s, cluster in lives if cluster.machines()]
    if not priced:
        return None
    return None if any(price is None for _, price in priced) else sum(s / 3600 * (price or 0) for s, price in priced)


def spent_usd(timeline: Iterable[Span], clusters: Mapping[str, Cluster]) -> float | None:
    """What the services of this timeline have cost, by the declared prices; None where one is missing.

    `clusters`: where each service ran, by its name in the timeline.
    """
    return cost_usd((span.end_s - span.start_s, clusters[span.name]) for span in timeline if span.what == "service")


def check_limit(clusters: Sequence[Cluster], estimate_usd: float | None, service_hours: float) -> None:
    """Refuse what is likely to cost more than the first allows. Raises ConfigError."""
    limit = clusters[0].cost_limit_usd()
    if limit is None:
        return
    if estimate_usd is None:
        raise ConfigError(
            f"cluster.max_cost_usd={limit:g} cannot be held without a price of each machine: cluster.usd_per_hour"
        )
    if estimate_usd > limit:
        raise ConfigError(
            f"the run is estimated at {estimate_usd:.2f} USD ({service_hours:.1f} service hours), more than "
            f"cluster.max_cost_usd={limit:g}"
        )

"""How long a run will take and what it will cost: estimates before it, and what its services cost by the clock."""

from collections.abc import Iterable

from orchestrator.clusters.base import Cluster

TEAR_DOWN_S = 3.0  # seen on 2 slow cores; only the estimates of duration and cost depend on it


def cost_usd(lives: Iterable[tuple[float, Cluster]]) -> float | None:
    """What services cost that lived so long, in seconds; None where a price is missing, or nothing is rented."""
    priced = [(life_s, cluster.hourly_usd()) for life_s, cluster in lives if cluster.machines()]
    if not priced:
        return None
    return None if any(price is None for _, price in priced) else sum(s / 3600 * (price or 0) for s, price in priced)

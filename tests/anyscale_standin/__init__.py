"""A stand-in for the Anyscale control plane on loopback; see `server`."""

from tests.anyscale_standin.backend import Instant, LocalRay, Service, Version, healthy
from tests.anyscale_standin.server import Fault, StandIn

__all__ = ["Fault", "Instant", "LocalRay", "Service", "StandIn", "Version", "healthy"]

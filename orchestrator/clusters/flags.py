"""Which environment variables Ray knows, and which of them a config may not declare. Ray is read and not imported."""

import difflib
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from orchestrator import provenance
from orchestrator.errors import ConfigError

DIRECT_STREAMING = "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"
# A flag that Ray refuses, or ignores, without another.
_NEEDS = {DIRECT_STREAMING: "RAY_SERVE_ENABLE_HA_PROXY"}
# What isolates a service from its neighbours, so no profile may declare it.
OURS = frozenset({"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", "RAY_TMPDIR", "RAY_ADDRESS"})


def check_flags(env: Mapping[str, str]) -> None:
    """Refuse RAY_* variables that the installed Ray does not know. Raises ConfigError with the nearest names.

    The names are read from Ray's source, which takes a fraction of a second where importing Ray takes several.
    """
    asked = [name for name in env if name.startswith("RAY_")]
    if not asked:
        return
    root = _ray_root()
    known = _known_flags(root)
    for name, needed in _NEEDS.items():
        if env.get(name) == "1" and env.get(needed) != "1":
            raise ConfigError(f"{name}=1 needs {needed}=1 in the same profile, found {env.get(needed, 'nothing')}")
    for name in asked:
        if name in OURS:
            raise ConfigError(f"{name} is set by the orchestrator for each service and cannot be declared")
        # Ray's C++ settings (RAY_<lower case>) stand in the binary without their prefix.
        if name in known or (not name.isupper() and _in_raylet(root, name.removeprefix("RAY_"))):
            continue
        nearest = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
        advice = f"; nearest known: {', '.join(nearest)}" if nearest else ""
        raise ConfigError(f"Ray {provenance.package_versions().get('ray')} knows no flag {name}{advice}")


@functools.cache  # every arm asks
def _known_flags(root: Path) -> frozenset[str]:
    """Names of RAY_* variables in the Python sources of this Ray."""
    known: set[str] = set()
    for folder in ("serve", "llm", "_private", "_common"):
        for path in (root / folder).rglob("*.py"):
            known.update(re.findall(r"\bRAY_[A-Za-z0-9_]+\b", path.read_text(errors="replace")))
    return frozenset(known)


def _ray_root() -> Path:
    found = importlib.util.find_spec("ray")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("Ray is not installed here: pip install -e .")
    return Path(found.submodule_search_locations[0])


def _in_raylet(root: Path, name: str) -> bool:
    binary = (root / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    return re.search(rb"(?<!\w)%s(?!\w)" % re.escape(name).encode(), binary) is not None

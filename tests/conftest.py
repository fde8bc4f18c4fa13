"""What the tests share: composing the real configs, and the promise that nothing is left running."""

from collections.abc import Callable
from pathlib import Path

import hydra
import hypothesis
import pytest

from orchestrator.application import check_replicas
from orchestrator.config import Config, parse, register
from orchestrator.plan import expected_load

ROOT = Path(__file__).resolve().parent.parent
Compose = Callable[..., Config]

hypothesis.settings.register_profile("shared machine", deadline=None)  # no test depends on how long it takes
hypothesis.settings.load_profile("shared machine")


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch) -> Compose:
    """`compose("workload=recsys", ...)`: the config that these overrides give, parsed and checked."""
    monkeypatch.setenv("SERVE_ORCHESTRATOR_SCRATCH", "unused")
    register()

    def run(*overrides: str) -> Config:
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = parse(hydra.compose("config", overrides=list(overrides)))
        check_replicas(config, config.cluster)
        levels = config.sweep.levels(config.workload.num_replicas)
        config.client.check(config, [expected_load(config, level) for level in levels])
        return config

    return run

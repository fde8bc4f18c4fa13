"""What is changed about Hydra while it composes: the same jobs and the same records, in less time.

Hydra composes every job twice: first to find mistakes before a launcher sends jobs to other machines, then in the
launcher. Ours is in this process and its task only collects, so a mistake in the last job is found in time all the
same. Hydra also reads and parses every file anew for each job.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.sweeper import Sweeper


@contextmanager
def once_a_job() -> Iterator[None]:
    """Within it, Hydra composes each job of a sweep once and reads each file once."""
    files: dict[tuple[str, ...], ConfigResult | None] = {}
    load_config, validate_batch_is_legal = ConfigRepository.load_config, Sweeper.validate_batch_is_legal

    def read_once(repository: ConfigRepository, config_path: str) -> ConfigResult | None:
        key = (config_path, *map(repr, repository.get_sources()))
        if key not in files:
            files[key] = load_config(repository, config_path)
        found = files[key]  # its config is copied, for Hydra merges into what it is given
        return found and dataclasses.replace(found, config=copy.deepcopy(found.config))

    def leave_it_to_the_launcher(_sweeper: Sweeper, _batch: Sequence[Sequence[str]]) -> None:
        pass

    replaced: Any = ConfigRepository, Sweeper  # mypy: methods are not to be assigned
    replaced[0].load_config, replaced[1].validate_batch_is_legal = read_once, leave_it_to_the_launcher
    try:
        yield
    finally:
        replaced[0].load_config, replaced[1].validate_batch_is_legal = load_config, validate_batch_is_legal

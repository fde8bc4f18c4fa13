"""What is changed about Hydra while it composes: the same jobs and the same records, in less time.

Hydra composes every job twice: first to find mistakes before a launcher sends jobs to other machines, then in the
launcher. Ours is in this process and its task only collects, so a mistake in the last job is found in time all the
same. Hydra also reads and parses every file anew for each job, and composes once more to learn `hydra.mode`, which
conf/config.yaml fixes; where that fails it would blame the commas of a sweep for what is wrong elsewhere.
"""

import copy
import dataclasses
import gc
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, ValueType
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode

from orchestrator.errors import ConfigError


@contextmanager
def once_a_job() -> Iterator[None]:
    """Within it, Hydra composes each job of a sweep once and reads each file once."""
    files: dict[tuple[str, ...], ConfigResult | None] = {}
    load_config = ConfigRepository.load_config

    def read_once(repository: ConfigRepository, config_path: str) -> ConfigResult | None:
        key = (config_path, *map(repr, repository.get_sources()))
        if key not in files:
            files[key] = load_config(repository, config_path)
        found = files[key]  # its config is copied, for Hydra merges into what it is given
        return found and dataclasses.replace(found, config=copy.deepcopy(found.config))

    ours: list[tuple[Any, str, Callable[..., Any]]] = [
        (ConfigRepository, "load_config", read_once),
        (Sweeper, "validate_batch_is_legal", lambda _sweeper, _batch: None),  # the launcher does
        (Hydra, "get_mode", lambda _hydra, **_: RunMode.MULTIRUN),
    ]
    theirs = [(owner, name, getattr(owner, name)) for owner, name, _ in ours]
    for owner, name, function in ours:
        setattr(owner, name, function)
    gc.disable()  # a config is full of cycles and lives on: to look for garbage is a sixth of the time
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        for owner, name, function in theirs:
            setattr(owner, name, function)


ONE_CHOICE = ("cluster", "workload", "profile", "client", "sweep", "model")  # groups; observe takes a list


def check_lists(overrides: Sequence[str]) -> None:
    """Refuse a list for a group that takes one choice: Hydra would merge them into one. Raises ConfigError."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        chosen = override.value()
        if isinstance(chosen, list) and override.key_or_group in ONE_CHOICE:
            names = ",".join(map(str, chosen))
            raise ConfigError(
                f"{override.input_line}: {override.key_or_group} is one choice; {override.key_or_group}={names} makes "
                "an arm of each"
            )


def check_commas(overrides: Sequence[str], groups: Collection[str]) -> None:
    """Refuse a comma that may be part of a value. Raises ConfigError with the quoted form.

    Config groups, numbers and booleans are swept by a comma; of text, such as a header, nobody can tell.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        swept = override.value()
        if override.value_type is not ValueType.SIMPLE_CHOICE_SWEEP or override.key_or_group in groups:
            continue
        assert isinstance(swept, ChoiceSweep)
        if not all(isinstance(value, int | float | None) for value in swept.list):
            key, _, text = str(override.input_line).partition("=")
            one = shlex.quote('{}="{}"'.format(key, text.replace('"', '\\"')))
            raise ConfigError(
                f"{override.input_line}: one value with a comma in it, or several?   As one value: {one}   "
                f"As several: {shlex.quote(f'{key}=choice({text})')}"
            )

"""From values of a config to objects: each section of it is a dataclass, and a kind is one that the YAML names.

`_target_: package.module.Class` is how a YAML says which cluster, client, load or observer it is for. The class is a
dataclass: its fields are the keys that the YAML may have, their types are what is checked before anything is deployed.
We import it ourselves, not by Hydra's `instantiate`, whose errors are about Hydra and not about the config.

A `_target_` is code. On the command line the user chose it. In the record of an earlier run somebody else may have
written it, so there only classes of ours are taken, and modules that the user says are trusted.
"""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from orchestrator.errors import ConfigError
from orchestrator.provenance import search_path

TARGET = "_target_"
# Every kind of ours: what a record may name.
OURS = frozenset(
    {
        "orchestrator.clusters.anyscale.Anyscale",
        "orchestrator.clusters.endpoint.Endpoint",
        "orchestrator.clusters.existing.Existing",
        "orchestrator.clusters.local.Local",
        "orchestrator.clients.locust.Locust",
        "orchestrator.clients.vllm_bench.VllmBench",
        "orchestrator.load.ladder.Ladder",
        "orchestrator.observe.host.Host",
    }
)

# What a field may hold; the description completes the sentence "<key> must be ...".
Count = Annotated[int, Field(strict=True, gt=0, description="a whole number above 0")]
WholeNumber = Annotated[int, Field(strict=True, ge=0, description="a whole number and not negative")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number above 0")]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number and not negative")]
Port = Annotated[int, Field(strict=True, ge=1024, le=65535, description="a port in 1024..65535, or null")]

T = TypeVar("T")


def checked(key: str, section: type[T], values: Mapping[str, Any]) -> T:
    """`values` as an object of the dataclass `section`; `key` is where they stand in the config ("" = at the top).

    Raises ConfigError naming the key, what it must be and what was found.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key} must be a mapping of {', '.join(_names(section))}, found {values!r}")
    _refuse_unknown(key, section, values)
    try:
        made: Any = _adapter(typing.cast(Any, section)).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_in_words(key, section, detail) for detail in error.errors())) from None
    return typing.cast(T, made)


def named(key: str, values: Any, base: type[T], trusted: Collection[str] | None = None) -> T:
    """The object of the class that `values` name by `_target_`, a subclass of `base`.

    `trusted`: the values come from a record, so beside `OURS` only modules and packages of this collection are
    imported; None: they come from the user. Raises ConfigError.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get(TARGET), str):
        raise ConfigError(
            f"{key} needs {TARGET}: the class that it is for, one of {_available(base)}; found {values!r}"
        )
    target: str = values[TARGET]
    what = f"{key}.{TARGET}={target}"
    module_name, _, class_name = target.rpartition(".")
    if not module_name:
        raise ConfigError(f"{what} must be module.Class, such as one of {_available(base)}")
    if (
        trusted is not None
        and target not in OURS
        and not any(f"{module_name}.".startswith(f"{name}.") for name in trusted)
    ):
        raise ConfigError(
            f"{what} in the run's record is code that is not ours; to run it, name its module, or a "
            f"package it is in: trust={module_name} with resume=, --trust={module_name} with cleanup"
        )
    module = _imported(what, module_name)
    kind = getattr(module, class_name, None)
    if kind is None:
        nearest = difflib.get_close_matches(class_name, [name for name in vars(module) if name[0].isupper()], n=3)
        raise ConfigError(f"{what}: {module_name} has no {class_name}; nearest: {', '.join(nearest) or 'none'}")
    _check_kind(what, kind, base)
    found: Any = checked(key, kind, {name: value for name, value in values.items() if name != TARGET})
    return typing.cast(T, found)


def _check_kind(what: str, kind: Any, base: type) -> None:
    """It is a dataclass of its own, derived from the base and complete. Raises ConfigError."""
    derived = inspect.isclass(kind) and issubclass(kind, base) and kind is not base
    if not derived or "__dataclass_fields__" not in vars(kind):  # a base's decorator makes no dataclass of it
        raise ConfigError(
            f"{what} must be a dataclass derived from {base.__module__}.{base.__name__}, with a @dataclass of its own; "
            f"found {kind!r}; ours: {_available(base)}"
        )
    if lacking := sorted(getattr(kind, "__abstractmethods__", ())):
        raise ConfigError(f"{what} lacks {', '.join(f'{name}()' for name in lacking)}, see {base.__module__}")
    try:
        typing.get_type_hints(kind)
        _adapter(kind)
    except Exception as error:  # of whatever the annotations name
        raise ConfigError(f"{what}: the types of its fields cannot be read: {type(error).__name__}: {error}") from error


def check_number(key: str, value: Any, *, whole: bool = False, above_0: bool = False) -> None:
    """For a value that no dataclass declares, such as a workload's own. Raises ConfigError for what is none."""
    kind = (Count if above_0 else WholeNumber) if whole else (Positive if above_0 else Amount)
    try:
        _adapter(kind).validate_python(value)
    except ValidationError:
        raise ConfigError(f"{key} must be {_described(kind)}, found {value!r}") from None


def target_of(kind: object) -> str:
    """The `_target_` of an object that `named` made."""
    return f"{type(kind).__module__}.{type(kind).__qualname__}"


@functools.cache  # building one takes longer than using it a hundred times
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _imported(what: str, module_name: str) -> Any:
    """The module, looked for where workloads are looked for too. Raises ConfigError."""
    where = [str(folder) for folder in search_path()]
    sys.path.extend(folder for folder in where if folder not in sys.path)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(f"{what}: there is no module {error.name} in {', '.join(where)}") from None
        raise ConfigError(f"{what}: {module_name} does not import: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the user's module does
        raise ConfigError(f"{what}: {module_name} does not import: {type(error).__name__}: {error}") from error


def _available(base: type) -> str:
    room = base.__module__.rpartition(".")[0]
    return ", ".join(sorted(target for target in OURS if target.startswith(f"{room}."))) or "none of ours"


def _names(section: type) -> list[str]:
    assert dataclasses.is_dataclass(section), section
    return [field.name for field in dataclasses.fields(section) if field.init]


def _refuse_unknown(key: str, section: type, values: Mapping[str, object]) -> None:
    names, types = _names(section), typing.get_type_hints(section)
    for name, value in values.items():
        where = f"{key}.{name}".removeprefix(".")
        if name not in names:
            if hasattr(section, str(name)):
                raise ConfigError(
                    f"{where}: {section.__name__}.{name} has no type, so it is no key; write {name}: type"
                )
            nearest = difflib.get_close_matches(str(name), names, n=3)
            advice = f"; nearest: {', '.join(nearest)}" if nearest else ""
            raise ConfigError(
                f"{where} is no key of {key or 'the config'}{advice}. It has {', '.join(names) or 'none'}"
            )
        if dataclasses.is_dataclass(types[name]) and isinstance(value, Mapping):
            _refuse_unknown(where, typing.cast(type, types[name]), value)


def _in_words(key: str, section: type, error: Any) -> str:
    where = ".".join(map(str, (key, *error["loc"]))).removeprefix(".")
    if error["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"{where} is missing"
    wanted = _wanted(section, [part for part in error["loc"] if isinstance(part, str)])
    if error["type"] == "literal_error":
        wanted = error["ctx"]["expected"]
    if error["type"] == "value_error":  # of a check of the class itself
        return f"{where}: {error['ctx']['error']}" if where else str(error["ctx"]["error"])
    return (
        f"{where} must be {wanted}, found {error['input']!r}"
        if wanted
        else f"{where}: {error['msg']}, found {error['input']!r}"
    )


def _wanted(section: Any, path: list[str]) -> str:
    """What the field that `path` leads to may hold; "" where its type says it in pydantic's words alone."""
    for name in path:
        if not dataclasses.is_dataclass(section):
            break
        section = typing.get_type_hints(typing.cast(type, section), include_extras=True).get(name)
    return _described(section)


def _described(kind: Any) -> str:
    """The description in an annotation, alone or in a union with None."""
    for one in (kind, *typing.get_args(kind)):
        if typing.get_origin(one) is Annotated:
            for extra in typing.get_args(one)[1:]:
                if isinstance(extra, FieldInfo) and extra.description:
                    return extra.description
    return ""

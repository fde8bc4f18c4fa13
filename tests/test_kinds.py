"""What a YAML may hold, and what a `_target_` may name: everything else is refused in words."""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from orchestrator.errors import ConfigError
from orchestrator.kinds import OURS, Amount, Count, Positive, checked, named, target_of


@dataclass
class Inner:
    ratio: Positive | None = None


@dataclass
class Section:
    name: str
    num_cpus: Count
    warmup_s: Amount = 0
    redeploy: Literal["per_repeat", "never"] = "per_repeat"
    env: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


class Base:
    """What kinds of these tests derive from."""


@dataclass
class Toy(Base):
    limit_ms: Positive = 1


@dataclass
class Stranger:
    limit_ms: Positive = 1


def test_values_become_an_object() -> None:
    values = {"name": "a", "num_cpus": 2, "warmup_s": 1, "env": {"A": 1}, "inner": {"ratio": 0.5}}
    found = checked("cluster", Section, values)
    assert found == Section("a", 2, 1, "per_repeat", {"A": 1}, Inner(0.5))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_cpus": 1}, "cluster.name is missing"),
        ({"num_cpus": 0}, "cluster.num_cpus must be a whole number above 0, found 0"),
        ({"num_cpus": 1.5}, "cluster.num_cpus must be a whole number above 0, found 1.5"),
        ({"num_cpus": True}, "cluster.num_cpus must be a whole number above 0, found True"),
        ({"num_cpus": "4"}, "cluster.num_cpus must be a whole number above 0, found '4'"),
        ({"warmup_s": -1}, "cluster.warmup_s must be a number and not negative, found -1"),
        ({"warmup_s": float("nan")}, "cluster.warmup_s must be a number and not negative, found nan"),
        ({"redeploy": "always"}, "cluster.redeploy must be 'per_repeat' or 'never', found 'always'"),
        ({"warmup": 1}, "cluster.warmup is no key of cluster; nearest: warmup_s. It has name, num_cpus"),
        ({"inner": {"ratio": 0}}, "cluster.inner.ratio must be a number above 0, found 0"),
        ({"inner": {"rate": 1}}, "cluster.inner.rate is no key of cluster.inner; nearest: ratio"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], says: str) -> None:
    whole = values if "name is missing" in says else {"name": "a", "num_cpus": 1} | values
    with pytest.raises(ConfigError) as refused:
        checked("cluster", Section, whole)
    assert says in str(refused.value)


def test_several_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"num_cpus must be .*\ncluster.warmup_s must be"):
        checked("cluster", Section, {"name": "a", "num_cpus": 0, "warmup_s": "x"})


def test_a_kind_is_made_of_the_class_that_is_named() -> None:
    found = named("sweep.load", {"_target_": f"{__name__}.Toy", "limit_ms": 3}, Base)
    assert found == Toy(3)
    assert target_of(found) == f"{__name__}.Toy"


class Abstract(ABC):
    @abstractmethod
    def during(self) -> None: ...


@dataclass
class Lacking(Abstract):
    """It says nothing about what it must."""


class Undecorated(Toy):
    """A dataclass by its base alone."""

    def __init__(self, more: int = 1) -> None:
        self.more = more


@dataclass
class Untyped(Base):
    size = 3


@dataclass
class Unresolved(Base):
    size: "NoSuchType" = 1  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("name", "base", "values", "says"),
    [
        ("Lacking", Abstract, {}, "lacks during()"),
        ("Undecorated", Base, {}, "with a @dataclass of its own"),
        ("Untyped", Base, {"size": 4}, "Untyped.size has no type, so it is no key"),
        ("Unresolved", Base, {}, "the types of its fields cannot be read: NameError"),
        ("Toi", Base, {}, "has no Toi; nearest: Toy"),
    ],
)
def test_a_class_that_is_not_whole_is_refused_in_words(
    name: str, base: type, values: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        named("cluster", {"_target_": f"{__name__}.{name}", **values}, base)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (None, "cluster needs _target_"),
        ({"name": "local"}, "cluster needs _target_"),
        ({"_target_": "nowhere_at_all.Toy"}, "there is no module nowhere_at_all in"),
        ({"_target_": "Toy"}, "cluster._target_=Toy must be module.Class"),
        ({"_target_": f"{__name__}.Nothing"}, "has no Nothing; nearest: none"),
        ({"_target_": f"{__name__}.Stranger"}, "must be a dataclass derived from"),
        ({"_target_": f"{__name__}.Base"}, "must be a dataclass derived from"),
        ({"_target_": "os.system"}, "must be a dataclass derived from"),
        ({"_target_": f"{__name__}.Toy", "limit": 3}, "cluster.limit is no key of cluster; nearest: limit_ms"),
    ],
)
def test_what_is_no_kind_is_refused(values: Any, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        named("cluster", values, Base)
    assert says in str(refused.value)


def test_a_module_that_does_not_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kinds_broken.py").write_text("raise RuntimeError('kaputt-81')\n")
    (tmp_path / "kinds_exits.py").write_text("raise SystemExit(7)\n")
    (tmp_path / "kinds_lacking.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="kinds_broken does not import: RuntimeError: kaputt-81"):
        named("cluster", {"_target_": "kinds_broken.Toy"}, Base)
    with pytest.raises(ConfigError, match="kinds_exits does not import: SystemExit: 7"):
        named("cluster", {"_target_": "kinds_exits.Toy"}, Base)
    with pytest.raises(
        ConfigError, match="kinds_lacking does not import: No module named 'a_package_that_is_not_there'"
    ):
        named("cluster", {"_target_": "kinds_lacking.Toy"}, Base)


def test_a_record_names_no_code_that_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kinds_stranger.py").write_text("import pathlib; pathlib.Path('was_run').touch()\n")
    monkeypatch.chdir(tmp_path)
    values = {"_target_": "kinds_stranger.Toy"}
    with pytest.raises(ConfigError, match="trust=kinds_stranger"):
        named("cluster", values, Base, trusted=())
    assert "kinds_stranger" not in sys.modules
    assert not (tmp_path / "was_run").exists()
    with pytest.raises(ConfigError, match="has no Toy"):
        named("cluster", values, Base, trusted=("kinds_stranger",))
    assert (tmp_path / "was_run").exists()


def test_ours_exist() -> None:
    assert all(target.startswith("orchestrator.") for target in OURS)

"""Do two versions of this code write the same run directory? Two runs of one config, compared file by file.

Run as `python -m benchmarks.compare_run_directories <run before> <run after>`. Compared are: which files there are;
in every JSON and YAML file the keys, their types and their values; in every Parquet and CSV file the columns, their
types, their order and their values. Of what is measured, dated or drawn (ports, process ids) only the type counts,
over all files of a kind, for a measured value may be null in one file and not in the next. Logs, pictures and the
report are compared by name only. Prints one line a difference, and exits with 1 if one is not in `DOCUMENTED`.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import yaml

OTHERS = (  # keys of the clusters that are not local Ray
    *("token_env", "dashboard_url", "url", "host_env", "terminate_timeout_s", "cloud", "project", "image_uri"),
    *("head_node", "worker_nodes", "service_prefix", "expires_after_h", "usd_per_hour", "max_cost_usd"),
)
# `kind of file:key` -> why it differs. An element of a list is `*` in a key; a pattern's `*` matches anything.
DOCUMENTED: dict[str, str] = {
    # Since 0.1.0:
    "*/.hydra/config.yaml:cluster._target_": "a cluster is named by its class, no longer by a kind",
    "*/.hydra/config.yaml:cluster.kind": "a cluster is named by its class, no longer by a kind",
    "*/.hydra/config.yaml:cluster.startup_timeout_s": "a number stands as the YAML file has it",
    "*/.hydra/config.yaml:cluster.gpus_per_model_replica": "a number stands as the YAML file has it",
    **{f"*/.hydra/config.yaml:cluster.{key}": "a key that only another cluster reads is not written" for key in OTHERS},
    "*/.hydra/config.yaml:workload.client": "the client is a config group of its own, client=",
    "*/.hydra/config.yaml:client": "the client is a config group of its own, client=",
    "*/.hydra/hydra.yaml:hydra.runtime.choices.client": "the client is a config group of its own, client=",
    "*/.hydra/config.yaml:workload.locustfile": "what is sent belongs to the workload, not to the client",
    "*/.hydra/config.yaml:workload.options": "what is sent belongs to the workload, not to the client",
    "*/.hydra/config.yaml:sweep.load*": "a load is named by its class and has keys of its own",
    "*/.hydra/config.yaml:sweep.offered_rps": "the levels of a load that is a rate",
    "*/.hydra/config.yaml:sweep.*_s": "a number stands as the YAML file has it",
    "*/.hydra/config.yaml:observe": "observers are a new config group, observe=",
    "*/.hydra/config.yaml:trust": "modules whose classes a resumed run may import",
    "*/.hydra/config.yaml:compare.figure": "the figure that is judged can be chosen",
    "*/.hydra/hydra.yaml:hydra.help.template": "--help shows a sweep without -m",
    "*/.hydra/hydra.yaml:hydra.overrides.hydra": "every run is a sweep, so -m overrides nothing",
    "*/trials/*/trial.json:observed": "what the observers found; the observer of the host is on",
    "*:*service_key": "the key covers the source of the workloads, which has changed",
    "run.json:command*": "every run is a sweep, so -m is not needed",
    "run.json:plan.arms.*.levels.*": "a level is stored by its name, c0002",
    "plots/*:": "a plot is drawn where a point is VALID, which is measured",
}

# What no two runs have in common, in the same form: compared by type.
MEASURED = (
    "run.json:provenance.*",
    "run.json:errors*",
    "run.json:resumed*",
    "run.json:cost_usd",
    "run.json:timeline.*_s",
    "*/trials/*/trial.json:client.*",
    "*/trials/*/trial.json:server*",
    "*/trials/*/trial.json:round_trip_ms",
    "*/trials/*/trial.json:metrics.*",
    "*/trials/*/trial.json:whole_run*",
    "*/trials/*/trial.json:observed*",
    "*/trials/*/trial.json:valid",
    "*/trials/*/trial.json:invalid_*",
    "*/trials/*/trial.json:notes*",
    "*/trials/*/samples.parquet:*",
    "*/trials/*/failure.json:error",
    "services/*/r*/effective.json:actors*",
    "services/*/r*/effective.json:listener.p*",
    "services/*/r*/effective.json:hardware.*",
    "services/*/r*/service.yaml:http_options.port",
    "*/.hydra/hydra.yaml:hydra.runtime.*",
    "summary.*:num_successful",
    "summary.*:num_failed",
    "summary.*:*_ratio",
    "summary.*:throughput_rps",
    "summary.*:goodput_rps",
    "summary.*:*_per_s",
    "summary.*:*_ms",
    "summary.*:valid",
    "summary.*:invalid_reasons",
    "summary.*:notes",
    "comparison.csv:*_value",
    "comparison.csv:*ratio",
    "comparison.csv:num_blocks",
    "comparison.csv:confidence",  # follows how many cells have an interval
    "comparison.csv:verdict",
    "comparison.csv:reason",
    "looks.jsonl:*.points",
    "looks.jsonl:*.num_blocks",
)
# Of these, what may be null in the whole of one run, and nowhere in the other, by the luck of the measurement.
NULLABLE = (
    "comparison.csv:*",
    "summary.*:invalid_reasons",
    "summary.*:notes",
    "summary.*:*_p9*_ms",
    "*/trials/*/trial.json:metrics.*_p9*_ms",
)
# Objects whose keys are data (codes, nodes): flattened like lists.
MAPPINGS = (
    "*/trials/*/trial.json:invalid_details",
    "services/*/r*/effective.json:hardware.ray_resources",
)
# Parts of names and texts that are drawn, dated or this run's own.
DRAWN = (
    (re.compile(r"\d{4}-\d\d-\d\d[T_ ]\d\d[:-]\d\d[:-]\d\d(\.\d+)?(\+00:00|Z)?(_\d+)?"), "<time>"),
    (re.compile(r"/so-\d+"), "/so-<n>"),
    (re.compile(r"/serve-orchestrator-\w+"), "/serve-orchestrator-<n>"),
    (re.compile(r"[0-9a-f]{16,}"), "<hex>"),
    (re.compile(r"#[a-z0-9]{8}\b"), "#<id>"),
)
# The same for names of logs, where Ray puts addresses, process ids and replicas.
DRAWN_LOG = (
    (re.compile(r"\d+\.\d+\.\d+\.\d+"), "<ip>"),
    (re.compile(r"[0-9a-f]{8,}"), "<hex>"),
    (re.compile(r"([_-])\d+(?=[._-])"), r"\1<n>"),
    (re.compile(r"_[a-z0-9]{8}(?=\.)"), "_<id>"),
)
ABSENT = "absent"


class Difference(NamedTuple):
    """One line of the answer."""

    file: str  # below the run directory
    key: str  # "" where the file itself is meant
    before: str
    after: str

    @property
    def subject(self) -> str:
        """What the patterns are held against."""
        return f"{kind_of(self.file)}:{self.key}"


@dataclass
class Values:
    """What stands at one key of one file, once or (below a list) many times."""

    types: set[str] = field(default_factory=set)
    values: list[Any] = field(default_factory=list)  # of a container: its length


Content = dict[str, Values]
Own = Sequence[tuple[str, str]]  # what only this run is called, or where it lay -> what to read instead


def kind_of(name: str) -> str:
    """The file with every arm, service and trial for which there is one."""
    name = re.sub(r"^services/[^/]+/r\d+/", "services/*/r*/", name)
    name = re.sub(r"^[^/]+/trials/[^/]+/", "*/trials/*/", name)
    return re.sub(r"^[^/]+/\.hydra/", "*/.hydra/", name)


def files(run: Path) -> dict[str, Path]:
    """Name without what is drawn -> file. Of several logs that differ in nothing else, one."""
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        folder, name = path.relative_to(run).parent, path.name
        if path.suffix in (".log", ".out", ".err"):
            for pattern, instead in DRAWN_LOG:
                name = pattern.sub(instead, name)
        found[(folder / name).as_posix()] = path
    return found


def own_names(run: Path) -> Own:
    """The run's name and the directories that held it when it was written and now. Raises OSError."""
    configs = [yaml.safe_load(path.read_text()) for path in sorted(run.glob("*/.hydra/config.yaml"))]
    places = {str(run.parent), *(str(config["outputs"]) for config in configs if "outputs" in config)}
    names = {run.name, str(json.loads((run / "run.json").read_text())["run_id"])}
    absolute = sorted((place for place in places if place.startswith("/")), key=len, reverse=True)
    return [*((place, "<outputs>") for place in absolute), *((name, "<run>") for name in names)]


def content(path: Path, kind: str, own: Own) -> Content:
    """Key -> values of a file that has keys or columns; nothing of one that has not. Raises ValueError."""
    found: Content = defaultdict(Values)
    if path.suffix == ".parquet":
        _add_table(found, pyarrow.parquet.read_table(path), own)
    elif path.suffix == ".csv":
        empty_is_null = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
        _add_table(found, pyarrow.csv.read_csv(path, convert_options=empty_is_null), own)
    elif path.suffix == ".json":
        _add(found, json.loads(path.read_text()), kind, "", own)
    elif path.suffix == ".jsonl":
        _add(found, [json.loads(line) for line in path.read_text().splitlines()], kind, "", own)
    elif path.suffix in (".yaml", ".yml"):
        _add(found, yaml.safe_load(path.read_text()), kind, "", own)
    return dict(found)


def _add_table(found: Content, table: pa.Table, own: Own) -> None:
    for column in table.schema:
        values = table.column(column.name).to_pylist()
        found[column.name] = Values({str(column.type)}, [_plain(value, own) for value in values])


def _add(found: Content, value: Any, kind: str, key: str, own: Own) -> None:
    names = {dict: "object", list: "list", str: "string", type(None): "null"}
    if key:
        found[key].types.add(names.get(type(value), type(value).__name__))
    if isinstance(value, dict):
        if _matches(kind, key, MAPPINGS):
            value = list(value.values())
        else:
            for name, part in value.items():
                _add(found, part, kind, f"{key}.{name}" if key else str(name), own)
            return
    if isinstance(value, list):
        found[key].values.append(len(value))
        for part in value:
            _add(found, part, kind, f"{key}.*" if key else "*", own)
        return
    found[key].values.append(_plain(value, own))


def _plain(value: Any, own: Own) -> Any:
    """The value without what is drawn, dated, or the run's own name and place."""
    if isinstance(value, datetime):  # a CSV's
        return "<time>"
    if not isinstance(value, str):
        return value
    for text, instead in own:
        value = value.replace(text, instead)
    for pattern, instead in DRAWN:
        value = pattern.sub(instead, value)
    return value


def compare(before: Path, after: Path) -> list[Difference]:
    """All differences between two run directories, the documented ones included, in the order of the files."""
    before, after = before.resolve(), after.resolve()
    sides, own = (files(before), files(after)), (own_names(before), own_names(after))
    found: list[Difference] = []
    measured: dict[str, tuple[Content, Content]] = {}  # kind of file -> what is measured in all of them
    for name in sorted(sides[0].keys() | sides[1].keys()):
        if not (name in sides[0] and name in sides[1]):
            present = ["file" if name in side else ABSENT for side in sides]
            found.append(Difference(name, "", *present))
            continue
        kind = kind_of(name)
        first, second = content(sides[0][name], kind, own[0]), content(sides[1][name], kind, own[1])
        found += _declared_differences(name, first, second)
        of_kind = measured.setdefault(kind, (defaultdict(Values), defaultdict(Values)))
        for whole, part in zip(of_kind, (first, second), strict=True):
            for key, values in part.items():
                whole[key].types |= values.types
                whole[key].values += values.values
    for kind, (first, second) in measured.items():
        found += _measured_differences(kind, first, second)
    return found


def _declared_differences(name: str, first: Content, second: Content) -> list[Difference]:
    found = []
    for key in _keys(first, second):
        if _matches(name, key, MEASURED) or _is_below_a_difference(key, first, second):
            continue
        if key not in first or key not in second:
            found.append(Difference(name, key, _types(first.get(key)), _types(second.get(key))))
        elif first[key].types != second[key].types:
            found.append(Difference(name, key, _types(first[key]), _types(second[key])))
        elif first[key].values != second[key].values:
            found.append(Difference(name, key, _text(first[key]), _text(second[key])))
    common = [[key for key in side if key in first and key in second] for side in (first, second)]
    if common[0] != common[1] and Path(name).suffix in (".csv", ".parquet"):
        found.append(Difference(name, "order of columns", ", ".join(common[0]), ", ".join(common[1])))
    return found


def _measured_differences(kind: str, first: Content, second: Content) -> list[Difference]:
    """A key that one side never has, other types, and what is always null on one side and never on the other."""
    found = []
    for key in _keys(first, second):
        if not _matches(kind, key, MEASURED) or _is_below_a_difference(key, first, second):
            continue
        types = [side[key].types - {"null"} if key in side else set() for side in (first, second)]
        is_other = types[0] != types[1]
        if is_other and not all(types):  # one side has nothing but null here, if it has the key
            is_other = not _matches(kind, key, NULLABLE) and None not in (first if types[0] else second)[key].values
        if is_other or (key in first) != (key in second):
            found.append(Difference(kind, key, _types(first.get(key)), _types(second.get(key))))
    return found


def _keys(first: Content, second: Content) -> list[str]:
    return list(dict.fromkeys([*first, *second]))


def _matches(name: str, key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(f"{kind_of(name)}:{key}", pattern) for pattern in patterns)


def _is_below_a_difference(key: str, first: Content, second: Content) -> bool:
    """Whether what it is part of is absent, empty or null on a side, which says it all."""
    while "." in key:
        key = key.rpartition(".")[0]
        if (key in first) != (key in second):
            return True
        if any(key in side and set(side[key].values) in ({0}, {None}) for side in (first, second)):
            return True
    return False


def _types(values: Values | None) -> str:
    return ABSENT if values is None else " or ".join(sorted(values.types))


def _text(values: Values) -> str:
    return ", ".join("null" if value is None else str(value) for value in values.values)


def reason(difference: Difference, documented: Mapping[str, str]) -> str | None:
    """The sentence that documents it; None if there is none."""
    return next((text for pattern, text in documented.items() if fnmatchcase(difference.subject, pattern)), None)


def lines(differences: Sequence[Difference], documented: Mapping[str, str]) -> list[str]:
    """One line each; what is the same in several files of a kind is said once, with their number."""
    same: dict[Difference, list[Difference]] = {}
    for difference in differences:
        same.setdefault(difference._replace(file=kind_of(difference.file)), []).append(difference)
    return [
        f"{alike[0].file}{f' and {len(alike) - 1} more' if len(alike) > 1 else ''}: {key or 'the file'}: "
        f"{before[:200]} -> {after[:200]}  [{reason(alike[0], documented) or 'NOT DOCUMENTED'}]"
        for (_, key, before, after), alike in same.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """0: no difference but documented ones; 1: others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="run directory that the code before has written")
    parser.add_argument("after", type=Path, help="run directory of the same config by the code after")
    asked = parser.parse_args(arguments)
    for run in (asked.before, asked.after):
        if not (run / "run.json").is_file():
            parser.error(f"{run} is no run directory: it has no run.json")
    differences = compare(asked.before, asked.after)
    print("\n".join(lines(differences, DOCUMENTED)))
    undocumented = [difference for difference in differences if reason(difference, DOCUMENTED) is None]
    print(f"{len(differences)} differences, {len(undocumented)} of them not documented")
    for pattern in DOCUMENTED:
        if not any(fnmatchcase(difference.subject, pattern) for difference in differences):
            print(f"documented, but not seen: {pattern}")
    return 1 if undocumented else 0


if __name__ == "__main__":
    sys.exit(main())

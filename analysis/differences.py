"""What differs between two arms, and is it what was declared to differ?

Three places are compared. *Declared*: the composed configs. *Effective*: environment, versions and hardware as read
back from the live services, and the load client. *Consequence*: constants that Ray computed from the environment.
A declared difference that is not found in the live services is a difference too: the treatment did not arrive.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import load
from analysis.load import Run

UNSET = "(unset)"
# Neither the service nor how it is loaded. Levels are matched one by one; blocks are counted.
_NOT_COMPARED = (
    *("outputs", "seed", "dry_run", "resume", "compare"),
    *("sweep.name", "sweep.concurrency", "sweep.repeats"),
)
# Of a process, not of the service.
_OF_A_PROCESS = frozenset({"RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_WORKER_ID", "RAY_NODE_ID"})
_COLUMNS = ("workload", "cluster", "num_replicas", "load_mode")


@dataclass(frozen=True)
class Difference:
    """`where`: declared, effective or consequence. `allowed`: part of the treatment, or a consequence of it."""

    key: str
    baseline: str
    candidate: str
    where: str
    allowed: bool


def find(baseline: tuple[Run, str], candidate: tuple[Run, str], treatment: Sequence[str]) -> list[Difference]:
    """All differences between two arms, each once, over all repeats that both have."""
    declared = _declared(baseline, candidate, treatment)
    found = dict.fromkeys([*declared, *_client(baseline, candidate, treatment)])
    if not treatment:
        keys = [{"service_key": load.arm_record(run, arm)["service_key"]} for run, arm in (baseline, candidate)]
        found |= dict.fromkeys(_diff(keys[0], keys[1], "declared", lambda key: False))
    services = [
        {repeat: load.effective(run, arm, repeat) for repeat in load.repeats(run, arm)}
        for run, arm in (baseline, candidate)
    ]
    for repeat in sorted(services[0].keys() & services[1].keys()):
        a, b = services[0][repeat], services[1][repeat]
        if a is not None and b is not None:
            found |= dict.fromkeys(_effective(a, b, _env_of(declared), treatment))
    return list(found)


def _declared(baseline: tuple[Run, str], candidate: tuple[Run, str], treatment: Sequence[str]) -> list[Difference]:
    configs = load.config(*baseline), load.config(*candidate)
    if configs[0] is not None and configs[1] is not None:
        flat = [flatten(each) for each in configs]
        # A workload or sweep that follows another choice differs in what it says, not in what it is asked.
        pairs = [(key, flat[0].get(key, UNSET), flat[1].get(key, UNSET)) for key in {**flat[0], **flat[1]}]
        pairs = [each for each in pairs if not _below(each[0], _NOT_COMPARED)]
    else:  # imported results have no config: what their rows say
        rows = [_first_row(*side) for side in (baseline, candidate)]
        pairs = [(f"{name}", _text(rows[0][name]), _text(rows[1][name])) for name in _COLUMNS]
        pairs = [each for each in pairs if UNSET not in each]
        treatment = [*treatment, *(axis.rpartition(".")[2] for axis in treatment)]  # num_replicas is a column
    # Another workload may be the treatment, other requests are another question.
    whole = [axis for axis in treatment if axis != "workload"]
    return [
        Difference(key, a, b, "declared", _below(key, whole if _below(key, ["workload.client"]) else treatment))
        for key, a, b in pairs
        if a != b
    ]


def _below(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _first_row(run: Run, arm: str) -> Mapping[str, Any]:
    return load.records(run.points[run.points.arm == arm])[0]


def _env_of(declared: Sequence[Difference]) -> dict[str, tuple[str, str]]:
    """Environment variables that the configs say differ."""
    return {
        each.key.rpartition(".env.")[2]: (each.baseline, each.candidate) for each in declared if ".env." in each.key
    }


def _client(baseline: tuple[Run, str], candidate: tuple[Run, str], treatment: Sequence[str]) -> list[Difference]:
    """The load client, level by level: its versions and number of processes over all trials."""
    compared = any(_below(axis, ["workload.client"]) for axis in treatment)

    def follows(key: str) -> bool:
        return compared or (key == "client.num_processes" and "workload.num_replicas" in treatment)

    facts = [_client_facts(*side) for side in (baseline, candidate)]
    shared = facts[0].keys() & facts[1].keys()
    found = [_diff(facts[0][level], facts[1][level], "effective", follows) for level in sorted(shared)]
    return [each for differences in found for each in differences]


def _client_facts(run: Run, arm: str) -> dict[str, dict[str, str]]:
    levels: dict[str, dict[str, set[str]]] = {}
    for row in load.records(run.points[(run.points.arm == arm) & (run.points.state == "complete")]):
        client = load.trial(run, row)["client"]
        known = flatten({"client": {name: client.get(name) for name in ("num_processes", "versions")}})
        for key, value in known.items():
            levels.setdefault(row["level"], {}).setdefault(key, set()).add(value)
    return {
        level: {key: " / ".join(sorted(values)) for key, values in facts.items()} for level, facts in levels.items()
    }


def _effective(
    baseline: Mapping[str, Any],
    candidate: Mapping[str, Any],
    declared_env: Mapping[str, tuple[str, str]],
    treatment: Sequence[str],
) -> list[Difference]:
    """What the live services of one block say of themselves."""
    ignored = {*_OF_A_PROCESS, *baseline.get("isolation_env", []), *candidate.get("isolation_env", [])}
    found: list[Difference] = []
    kinds = {actor["kind"] for actor in baseline["actors"]} & {actor["kind"] for actor in candidate["actors"]}
    env = [_by_name(service, "env", kinds, ignored) for service in (baseline, candidate)]
    found += _diff(env[0], env[1], "effective", lambda name: name in declared_env, prefix="env.")
    found += [
        Difference(f"env.{name}", f"declared {a}", f"declared {b}, but found the same", "effective", allowed=False)
        for name, (a, b) in declared_env.items()
        # One that is reported by neither is not of the kind that is read back; its arrival was checked at the start.
        if (name in env[0] or name in env[1]) and env[0].get(name, UNSET) == env[1].get(name, UNSET)
    ]
    constants = [_by_name(service, "constants", kinds, ignored) for service in (baseline, candidate)]
    found += _diff(constants[0], constants[1], "consequence", lambda name: True, prefix="constant.")
    if baseline.get("engine") or candidate.get("engine"):
        engines = [flatten({"engine": each.get("engine")}) for each in (baseline, candidate)]
        found += _diff(engines[0], engines[1], "effective", lambda key: _below(key, _engine_axes(treatment)))
    for what in ("versions", "hardware"):
        facts = [flatten({what: _comparable(service[what])}) for service in (baseline, candidate)]
        if what == "versions" and "workload" in treatment:  # an arm without Ray has no Ray version
            facts = [{key: side[key] for key in facts[0].keys() & facts[1].keys()} for side in facts]
        found += _diff(facts[0], facts[1], "effective", lambda key: "cluster" in treatment)
    return found


def _engine_axes(treatment: Sequence[str]) -> list[str]:
    """What may differ in the engines. Of a compared `model.engine.*` others follow; Serve LLM chooses its executor."""
    if any(_below(axis, ["model"]) for axis in treatment):
        return ["engine"]
    return ["engine.distributed_executor_backend"] * ("workload" in treatment)


def _by_name(service: Mapping[str, Any], what: str, kinds: set[str], ignored: set[str]) -> dict[str, str]:
    """Environment or constants over those kinds of actors: HAProxy's manager, say, lives in one arm alone."""
    values: dict[str, set[str]] = {}
    for actor in service["actors"]:
        if actor["kind"] in kinds:
            for name, value in actor[what].items():
                values.setdefault(name, set()).add(_text(value))
    return {name: " / ".join(sorted(each)) for name, each in values.items() if name not in ignored}


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Less what changes by itself: free memory, node addresses."""
    return {name: value for name, value in facts.items() if name != "ray_resources"}


def _diff(a: Mapping[str, str], b: Mapping[str, str], where: str, allowed: Any, prefix: str = "") -> list[Difference]:
    return [
        Difference(f"{prefix}{key}", a.get(key, UNSET), b.get(key, UNSET), where, allowed(key))
        for key in sorted({**a, **b})
        if a.get(key, UNSET) != b.get(key, UNSET)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` to `{"a.b": "1"}`; lists and empty mappings stay whole."""
    if isinstance(value, Mapping) and value:
        return {name: text for key, inner in value.items() for name, text in flatten(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): _text(value)} if value not in ({}, None) else {}


def _text(value: Any) -> str:
    if value is None or (not isinstance(value, list | dict) and pd.isna(value)):
        return UNSET
    return value if isinstance(value, str) else json.dumps(value)

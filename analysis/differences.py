"""What differs between two arms, and is it what was declared to differ?

Three places are compared. *Declared*: the composed configs. *Effective*: environment, versions and hardware as read
back from the live services, and the load client. *Consequence*: constants that Ray computed from the environment.
A declared difference that is not found in the live services is a difference too: the treatment did not arrive.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import load
from analysis.load import ArmData
from orchestrator.results.records import Actor, Effective

UNSET = "(unset)"
# Neither the service nor how it is loaded. Levels are matched one by one; blocks are counted.
_NOT_COMPARED = (
    *("outputs", "seed", "dry_run", "resume", "compare"),
    *("sweep.name", "sweep.concurrency", "sweep.offered_rps", "sweep.repeats"),
)
# Of a process, not of the service.
_OF_A_PROCESS = frozenset({"RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_WORKER_ID", "RAY_NODE_ID"})


@dataclass(frozen=True)
class Difference:
    """`where`: declared, effective or consequence. `allowed`: part of the treatment, or a consequence of it."""

    key: str
    baseline: str
    candidate: str
    where: str
    allowed: bool


def find(baseline: ArmData, candidate: ArmData, treatment: Sequence[str]) -> list[Difference]:
    """All differences between two arms, each once, over all repeats that both have."""
    declared = _declared(baseline, candidate, treatment)
    found = [*declared, *_client(baseline, candidate, treatment)]
    if not treatment:
        keys = [{"service_key": arm.record.service_key} for arm in (baseline, candidate)]
        found += _diff(keys[0], keys[1], "declared", lambda key: False)
    # Environment variables that the configs say differ.
    env = {one.key.rpartition(".env.")[2]: one for one in declared if ".env." in one.key}
    services = baseline.effectives(), candidate.effectives()
    for repeat in sorted(services[0].keys() & services[1].keys()):
        a, b = services[0][repeat], services[1][repeat]
        if a is not None and b is not None:
            found += _effective(a, b, env, treatment)
    return list(dict.fromkeys(found))


def below(key: str, prefixes: Iterable[str]) -> bool:
    """Whether the key is one of these or a part of one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _declared(baseline: ArmData, candidate: ArmData, treatment: Sequence[str]) -> list[Difference]:
    configs = baseline.config(), candidate.config()
    if None not in configs:
        # A workload or sweep that follows another choice differs in what it says, not in what it is asked.
        sides = [{k: v for k, v in flatten(config).items() if not below(k, _NOT_COMPARED)} for config in configs]
    else:  # imported results have no config: what both of their rows say
        names = ["workload", "cluster", "num_replicas", "load_mode"]
        known = pd.concat([arm.points[names].iloc[:1] for arm in (baseline, candidate)]).dropna(axis=1)
        sides = [flatten(row) for row in load.records(known)]
        treatment = [*treatment, *(axis.rpartition(".")[2] for axis in treatment)]  # num_replicas is a column
    # Another workload may be the treatment, other requests are another question.
    whole = [axis for axis in treatment if axis != "workload"]
    part = ["client", "workload.options", "workload.locustfile"]
    return _diff(sides[0], sides[1], "declared", lambda key: below(key, whole if below(key, part) else treatment))


def _client(baseline: ArmData, candidate: ArmData, treatment: Sequence[str]) -> list[Difference]:
    """The load client, level by level: its versions and number of processes over all trials."""
    compared = any(below(axis, ["client"]) for axis in treatment)

    def follows(key: str) -> bool:
        return compared or (key == "client.num_processes" and "workload.num_replicas" in treatment)

    facts = [_client_facts(arm) for arm in (baseline, candidate)]
    shared = sorted(facts[0].keys() & facts[1].keys())
    by_level = (_diff(facts[0][level], facts[1][level], "effective", follows) for level in shared)
    return [difference for found in by_level for difference in found]


def _client_facts(arm: ArmData) -> dict[str, dict[str, str]]:
    levels: dict[str, list[dict[str, str]]] = {}
    for row in load.records(arm.complete):
        client = load.trial(arm.run, row).client
        known = flatten({"client": {"num_processes": client.num_processes, "versions": client.versions}})
        levels.setdefault(row["level"], []).append(known)
    return {level: _merged(facts) for level, facts in levels.items()}


def _effective(
    baseline: Effective,
    candidate: Effective,
    declared_env: Mapping[str, Difference],
    treatment: Sequence[str],
) -> list[Difference]:
    """What the live services of one block say of themselves."""
    both = baseline, candidate
    of_the_place = {*baseline.isolation_env, *candidate.isolation_env}
    ignored = _OF_A_PROCESS | (of_the_place - baseline.declared_env.keys() - candidate.declared_env.keys())
    kinds = {actor.kind for actor in baseline.actors} & {actor.kind for actor in candidate.actors}

    def reported(what: Callable[[Actor], Mapping[str, object]]) -> list[dict[str, str]]:
        """Over those kinds of actors that both have: HAProxy's manager, say, lives in one arm alone."""
        actors = ([what(actor) for actor in service.actors if actor.kind in kinds] for service in both)
        merged = (_merged([{name: _text(value) for name, value in one.items()} for one in side]) for side in actors)
        return [{name: text for name, text in side.items() if name not in ignored} for side in merged]

    env, constants = reported(lambda actor: actor.env), reported(lambda actor: actor.constants)
    found = _diff(env[0], env[1], "effective", lambda name: name in declared_env, prefix="env.")
    for name, declared in declared_env.items():
        # One that is reported by neither is not of the kind that is read back; its arrival was checked at the start.
        if (name in env[0] or name in env[1]) and env[0].get(name, UNSET) == env[1].get(name, UNSET):
            same = f"declared {declared.candidate}, but found the same"
            found.append(Difference(f"env.{name}", f"declared {declared.baseline}", same, "effective", allowed=False))
    found += _diff(constants[0], constants[1], "consequence", lambda name: True, prefix="constant.")
    engines = [flatten({"engine": service.engine or {}}) for service in both]
    found += _diff(engines[0], engines[1], "effective", lambda key: below(key, _engine_axes(treatment)))
    versions = [flatten({"versions": service.versions}) for service in both]
    if "workload" in treatment:  # an arm without Ray has no Ray version
        versions = [{key: side[key] for key in versions[0].keys() & versions[1].keys()} for side in versions]
    # Less what changes by itself: free memory, node addresses.
    facts = [{key: value for key, value in service.hardware.items() if key != "ray_resources"} for service in both]
    hardware = [flatten({"hardware": side}) for side in facts]
    for one, other in (versions, hardware):
        found += _diff(one, other, "effective", lambda key: "cluster" in treatment)
    return found


def _engine_axes(treatment: Sequence[str]) -> list[str]:
    """What may differ in the engines. Of a compared `model.engine.*` others follow; Serve LLM chooses its executor."""
    if any(below(axis, ["model"]) for axis in treatment):
        return ["engine"]
    return ["engine.distributed_executor_backend"] * ("workload" in treatment)


def _merged(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """All distinct values of each name: `a / b`."""
    names = dict.fromkeys(name for known in facts for name in known)
    return {name: " / ".join(sorted({known[name] for known in facts if name in known})) for name in names}


def _diff(
    a: Mapping[str, str], b: Mapping[str, str], where: str, allowed: Callable[[str], bool], prefix: str = ""
) -> list[Difference]:
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

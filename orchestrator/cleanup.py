"""`python -m orchestrator.cleanup [OUTPUTS] [--yes]`: what did a killed run leave behind, and end it.

A run tears its services down itself, also on Ctrl-C and SIGTERM, and a local service whose orchestrator was killed
ends itself. What is left when both were killed is found by the service directories: one is stale when no orchestrator
holds its lock any more. Services elsewhere are found by the runs in OUTPUTS that were cut off or could not end one.
"""

import argparse
import glob
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from orchestrator import execute, results
from orchestrator.clusters.local_ray import directory_prefix, is_claimed
from orchestrator.config import ClusterKind, register
from orchestrator.errors import ConfigError, ServiceError
from orchestrator.paths import RunPaths
from orchestrator.process import end_members, members

_OUTLIVE_US = (ClusterKind.anyscale, ClusterKind.existing)
_Left = tuple[str, Callable[[], None]]  # what it is, and how it is ended


def main(arguments: list[str] | None = None) -> int:
    """Exit 0: nothing was left, or all of it was ended. 1: something is left."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.cleanup", description=__doc__)
    parser.add_argument("outputs", nargs="?", default="outputs", type=Path, help="where the runs are (outputs)")
    parser.add_argument("--yes", action="store_true", help="end the processes and services, remove the directories")
    asked = parser.parse_args(arguments)
    register()
    found = [*_local(), *_elsewhere(asked.outputs)]
    if not found:
        print("Nothing is left over.")
        return 0
    ended = 0
    for what, end in found:
        print(what)
        if asked.yes:
            try:
                end()
                ended += 1
            except ServiceError as error:
                print(f"  not ended: {error}")
    if not asked.yes:
        print("End these with: python -m orchestrator.cleanup --yes")
    return 0 if ended == len(found) else 1


def _local() -> Iterator[_Left]:
    for directory in map(Path, sorted(glob.glob(f"{directory_prefix()}[0-9]*"))):
        if not is_claimed(directory):
            names = ", ".join(f"{process.name()} ({process.pid})" for process in members(directory))
            yield f"{directory}: {names or 'no process'}", partial(_end_local, directory)


def _end_local(directory: Path) -> None:
    survivors = end_members(directory)
    shutil.rmtree(directory, ignore_errors=True)
    if survivors or directory.exists():
        raise ServiceError(f"{', '.join(survivors) or 'the directory cannot be removed'}")


def _elsewhere(outputs: Path) -> Iterator[_Left]:
    """Of runs that are not going any more, and that did not end as they should have."""
    for run_json in sorted(outputs.glob("*/run.json")):
        paths = RunPaths(run_json.parent)
        record = results.read_json(run_json)
        if is_claimed(paths.root) or not (record["status"] == "running" or record["errors"]):
            continue
        try:
            yield from _services(paths)
        except (ConfigError, ServiceError) as error:
            yield f"{paths.root}: {error}", partial(_cannot, str(error))


def _services(paths: RunPaths) -> Iterator[_Left]:
    plan = execute.recorded_plan(paths)
    for service in plan.services:
        backend = execute.CLUSTERS[service.config.cluster.kind]()
        log_dir = paths.service_dir(service.arms[0].name, service.repeats[0])
        if service.config.cluster.kind not in _OUTLIVE_US or not log_dir.exists():  # else it was never asked for
            continue
        name = execute.service_name(plan, paths, service)
        if state := backend.state_of(service.config, name):
            what = f"{service.config.cluster.name}: {name.service} ({service.label} of {paths.root}) is {state}"
            yield what, partial(backend.end, service.config, name, log_dir)


def _cannot(why: str) -> None:
    raise ServiceError(why)


if __name__ == "__main__":
    sys.exit(main())

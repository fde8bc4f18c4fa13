"""`python -m orchestrator.cleanup [OUTPUTS] [--yes]`: what did a killed run leave behind, and end it.

A run tears its services down itself, also on Ctrl-C and SIGTERM, and a local service whose orchestrator was killed
ends itself. What is left when both were killed is found by the service directories: one is stale when no orchestrator
holds its lock any more. Services elsewhere are found by the runs in OUTPUTS that were cut off or could not end one.
"""

import argparse
import contextlib
import glob
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from orchestrator import execute
from orchestrator.clusters.base import SharedCluster
from orchestrator.clusters.local import directory_prefix
from orchestrator.config import register
from orchestrator.errors import ConfigError, ServiceError
from orchestrator.journal import recorded_plan
from orchestrator.paths import RunPaths
from orchestrator.process import SCRATCH_PREFIX, end_members, is_claimed, members
from orchestrator.results.records import read_json

_Left = tuple[str, Callable[[], str | None]]  # what it is, and what ends it and says what is left then


def main(arguments: list[str] | None = None) -> int:
    """Exit 0: nothing was left, or all of it was ended. 1: something is left."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.cleanup", description=__doc__)
    parser.add_argument("outputs", nargs="?", type=Path, help="where the runs are (outputs)")
    parser.add_argument("--yes", action="store_true", help="end the processes and services, remove the directories")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="MODULE", help="code of yours that the run's record names"
    )
    asked = parser.parse_args(arguments)
    if asked.outputs is not None and not asked.outputs.is_dir():
        parser.error(f"there is no directory {asked.outputs}")
    register()
    found = [*_local(), *_elsewhere(asked.outputs or Path("outputs"), asked.trust)]
    if not found:
        print("Nothing is left over.")
        return 0
    ended = 0
    for what, end in found:
        print(what)
        if asked.yes:
            try:
                left = end()
            except (ConfigError, ServiceError) as error:
                left = str(error)
            if left is None:
                ended += 1
            else:
                print(f"  not ended: {left}")
    if not asked.yes:
        where = [] if asked.outputs is None else [str(asked.outputs)]
        again = shlex.join([*where, *(f"--trust={module}" for module in asked.trust), "--yes"])
        print(f"End these with: python -m orchestrator.cleanup {again}")
    return 0 if ended == len(found) else 1


def _local() -> Iterator[_Left]:
    scratch = str(Path(tempfile.gettempdir()) / SCRATCH_PREFIX)
    for directory in map(Path, sorted([*glob.glob(f"{directory_prefix()}[0-9]*"), *glob.glob(f"{scratch}*")])):
        if not is_claimed(directory):
            names = ", ".join(f"{process.name()} ({process.pid})" for process in members(directory))
            yield f"{directory}: {names or 'no process'}", partial(_end_local, directory)


def _end_local(directory: Path) -> str | None:
    survivors = end_members(directory)
    shutil.rmtree(directory, ignore_errors=True)
    if survivors or directory.exists():
        return ", ".join(survivors) or "the directory cannot be removed"
    return None


def _elsewhere(outputs: Path, trusted: Collection[str]) -> Iterator[_Left]:
    """Of runs that are not going any more, and that did not end as they should have."""
    for run_json in sorted(outputs.glob("*/run.json")):
        paths = RunPaths(run_json.parent)
        try:
            if not is_claimed(paths.root):
                yield from left_elsewhere(paths, trusted)
        except (ConfigError, ServiceError, OSError) as error:  # of one run, which must not keep us from the others
            yield f"{paths.root}: what it left cannot be found out: {error}", partial(str, error)


def left_elsewhere(paths: RunPaths, trusted: Collection[str]) -> Iterator[_Left]:
    """Services of a run that outlived it; its records may name modules that are `trusted`.

    Raises ConfigError or ServiceError when that cannot be found out.
    """
    with contextlib.suppress(
        OSError, ValueError, TypeError, KeyError
    ):  # no record of ours: the plan says what is wrong
        record = read_json(paths.run_json)  # and not as its type: of any version, these two say enough
        if record["status"] == "complete" and not record["errors"]:
            return  # whoever ends so has ended its services
    plan = recorded_plan(paths, trusted)
    for arm in plan.arms:
        cluster = arm.config.cluster
        if not isinstance(cluster, SharedCluster):
            continue
        asked_for = {
            execute.service_name(plan, paths, service): paths.service_dir(arm.name, service.repeats[0])
            for service in plan.services
            if service.arms[0] is arm and paths.service_dir(arm.name, service.repeats[0]).exists()
        }
        for name, state in cluster.left_over(arm.config, list(asked_for)).items():
            what = f"{cluster.name}: {name.service} ({arm.name} r{name.repeat} of {paths.root}) is {state}"
            yield what, partial(cluster.end, arm.config, name, asked_for[name])


if __name__ == "__main__":
    sys.exit(main())

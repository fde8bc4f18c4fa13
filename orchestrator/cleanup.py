"""`python -m orchestrator.cleanup [--yes]`: what did a killed run leave on this machine, and end it.

A run tears its services down itself, also on Ctrl-C and SIGTERM, and a service whose orchestrator was killed ends
itself. What is left when both were killed is found by the service directories: one is stale when no orchestrator
holds its lock any more.
"""

import argparse
import glob
import shutil
import sys
from pathlib import Path

from orchestrator.clusters.local_ray import directory_prefix, is_claimed
from orchestrator.process import end_members, members


def main(arguments: list[str] | None = None) -> int:
    """Exit 0: nothing was left, or all of it was ended. 1: something is left."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.cleanup", description=__doc__)
    parser.add_argument("--yes", action="store_true", help="end the processes and remove the directories")
    ask = not parser.parse_args(arguments).yes
    stale = [Path(path) for path in sorted(glob.glob(f"{directory_prefix()}[0-9]*")) if not is_claimed(Path(path))]
    if not stale:
        print("Nothing is left over.")
        return 0
    left = False
    for directory in stale:
        processes = members(directory)
        names = ", ".join(f"{process.name()} ({process.pid})" for process in processes) or "no process"
        print(f"{directory}: {names}")
        if ask:
            left = True
            continue
        survivors = end_members(directory)
        shutil.rmtree(directory, ignore_errors=True)
        left = left or bool(survivors) or directory.exists()
    if ask:
        print("End these with: python -m orchestrator.cleanup --yes")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())

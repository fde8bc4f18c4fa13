"""The child process that is the Ray cluster of one version: it deploys, then says what Serve says.

A spec is the first line of standard input; states are JSON lines on standard output. It ends, with everything
that belongs to it, when standard input closes.
"""

import json
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from orchestrator.process import end_members

FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


def main() -> NoReturn:
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever Ray prints goes to the log, not into the protocol
    parent = os.getppid()
    spec = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_stdin, args=(Path(spec["directory"]), parent), daemon=True).start()

    def say(state: str, message: str) -> None:
        channel.write(json.dumps({"state": state, "message": message[:4000]}) + "\n")

    try:
        names = bring_up(spec)
        last = ("", "")
        while True:
            if (now := state_of(names)) != last:
                say(*now)
                last = now
            time.sleep(0.5 if now[0] == "STARTING" else 2)
    except Exception as error:
        traceback.print_exc()
        say("UNHEALTHY", repr(error))
    while True:
        time.sleep(60)  # until told to go


def end_with_stdin(directory: Path, parent: int) -> None:
    sys.stdin.read()
    end_members(directory)
    if os.getppid() != parent:  # orphaned; else the parent removes it
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


def bring_up(spec: dict[str, Any]) -> list[str]:
    os.chdir(spec["directory"])  # else Ray would put the repository on the workers' path
    ray.init(
        address="local",
        num_cpus=spec["num_cpus"],
        num_gpus=spec["num_gpus"],
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=spec["directory"],
        _metrics_export_port=spec["metrics_export_port"],
    )
    config = ServeDeploySchema.model_validate(spec["serve_config"])
    client = serve_start(
        http_options=config.http_options.model_dump(), proxy_location=config.proxy_location, grpc_options=None
    )
    client.deploy_apps(config)
    return [application.name for application in config.applications]


def state_of(names: list[str]) -> tuple[str, str]:
    """The service's state as its applications' statuses make it, and what Serve says about them."""
    applications = serve.status().applications
    found = {name: applications[name] for name in names if name in applications}
    message = "; ".join(f"{name}: {each.status.value} {each.message}".strip() for name, each in found.items())
    if any(each.status in FAILED for each in found.values()):
        return "UNHEALTHY", message
    if len(found) == len(names) and all(each.status == ApplicationStatus.RUNNING for each in found.values()):
        return "RUNNING", message
    return "STARTING", message


if __name__ == "__main__":
    main()

"""The child process that is one local service of standalone vLLM servers, without Ray: one server a replica.

Run as `python -m orchestrator.clusters.vllm_driver` with the service's environment; see `child.be_service` for what
it is told and says. It ends when standard input closes, also while the servers come up.

The servers are vLLM's own, with its defaults, except:
- `VLLM_SERVER_DEV_MODE=1`, only because /server_info then tells the engine's configuration.
- Uvicorn's access log, a line a request, is off, as it is under Serve (whose own access log stays as it is).
- On CPU, unless declared otherwise, `VLLM_CPU_OMP_THREADS_BIND=nobind` and `OMP_NUM_THREADS` = a server's share of the
  cores less one. By default each server binds its worker's threads to all cores but the last of the NUMA node, so N
  servers would be bound to the same cores, one thread each, while the last core stays reserved. The share keeps
  vLLM's own rule (one core is for the scheduler and the API) without binding anybody.
"""

import json
import os
import platform
import re
import select
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from orchestrator import provenance
from orchestrator.child import be_service
from orchestrator.clusters.base import ENGINE_KIND, ActorState, Snapshot
from orchestrator.clusters.engine import declared_differences, engine_settings
from orchestrator.clusters.specs import VllmSpec
from orchestrator.process import die_with_parent, listener, process_id, reportable
from workloads.llm import tiny

_ENGINE_TITLE = "VLLM::EngineCore"
_HEALTH_TIMEOUT_S = 30.0  # a saturated server answers late, and that is not ill health
_ANSWER_TIMEOUT_S = 300.0  # the first completion may compile
_END_TIMEOUT_S = 8.0  # the parent waits for 30 s, and the sweep that follows may take 20 s
_ONLY_TRUE = frozenset({"disable_log_stats", "aggregate_engine_logging"})  # flags that have no `--no-` form
_LOG_PREFIX = re.compile(r"^(\([^()]*pid=\d+\) )?((ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
_ERROR_LINE = re.compile(r"^([\w.]*(Error|Exception)|[\w.]+: error): ")


@dataclass
class _Server:
    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path


def main() -> NoReturn:
    servers: list[_Server] = []

    def bring_up(spec: VllmSpec, on_status: Callable[[str], None]) -> Mapping[str, object]:
        _start(spec, servers)
        _wait_ready(servers, spec.model, on_status)
        return _effective(spec, servers)

    be_service(VllmSpec, bring_up, lambda spec: _snapshot(spec, servers), lambda: _ask_to_end(servers))


def flags(engine: Mapping[str, Any]) -> list[str]:
    """vLLM's command line for engine arguments as ray.serve.llm's `engine_kwargs` has them; null is left out."""
    words: list[str] = []
    for name, value in engine.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            if value or name not in _ONLY_TRUE:
                words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, Mapping) else value]
            words += [f"--{flag}", *map(str, values)]
    return words


def placement(num_servers: int, gpus: int, visible: Sequence[str], num_cores: int) -> list[dict[str, str]]:
    """Per server, the variables that say where it computes: its own GPUs, or its share of the cores."""
    if gpus == 0:
        threads = max(1, num_cores // num_servers - 1)
        return [{"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}] * num_servers
    if len(visible) < num_servers * gpus:
        raise RuntimeError(
            f"{num_servers} vLLM servers with {gpus} GPUs each need {num_servers * gpus}; "
            f"visible here: {', '.join(visible) or 'none'}"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[i * gpus : (i + 1) * gpus])} for i in range(num_servers)]


def _start(spec: VllmSpec, servers: list[_Server]) -> None:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = range(len(provenance.host()["gpus"])) if chosen is None else filter(None, chosen.split(","))
    num_cores = len(os.sched_getaffinity(0))
    places = placement(len(spec.ports), spec.gpus, [str(gpu) for gpu in here], num_cores)
    ours = {
        "VLLM_SERVER_DEV_MODE": "1",
        "TMPDIR": spec.directory,  # its sockets go with the service
        "SPT_NOENV": "1",  # else an engine's title overwrites its environment, and with it the service's marker
    }
    if spec.source == tiny.NAME:
        ours["HF_HUB_OFFLINE"] = "1"
    source = tiny.resolve(spec.source)
    for index, (port, place) in enumerate(zip(spec.ports, places, strict=True)):
        # The `vllm` command looks up the distribution name `vllm`, which its CPU build does not have.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--model", source, "--served-model-name", spec.model]
        command += ["--disable-uvicorn-access-log", *flags(spec.engine)]
        log = Path(spec.log_dir) / f"server-{index}.log"
        with log.open("wb") as output:
            output.write(f"{shlex.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command,
                env={**os.environ, **ours, **place, **spec.cluster_env, **spec.declared_env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,
            )
        servers.append(_Server(f"vllm-{index}", f"http://127.0.0.1:{port}", process, log))


def _ask_to_end(servers: Sequence[_Server]) -> None:
    """Terminate the servers and wait a while: a killed one would leave 400 MiB of shared memory behind."""
    tree = psutil.Process().children(recursive=True)
    for server in servers:
        server.process.terminate()
    psutil.wait_procs(tree, timeout=_END_TIMEOUT_S)


def _wait_ready(servers: Sequence[_Server], model: str, on_status: Callable[[str], None]) -> None:
    """Until each server has completed a request; the orchestrator's start-up time-out bounds the wait."""
    waiting = list(servers)
    while waiting:
        for server in list(waiting):
            if server.process.poll() is not None:
                raise RuntimeError(_trouble(server))
            if _completes(server, model):
                waiting.remove(server)
        text = f"vLLM {len(servers) - len(waiting)}/{len(servers)} ready"
        if waiting and (lines := _lines(waiting[0].log)):
            text += f"; {waiting[0].name}: {lines[-1][:200]}"
        on_status(text)
        if waiting and select.select([sys.stdin], [], [], 0.5)[0]:  # nothing is asked before we are ready: its end
            raise RuntimeError("told to end before the servers were ready")


def _completes(server: _Server, model: str) -> bool:
    """Whether the server is up and completes a request; RuntimeError when it refuses one."""
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 4}).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        _get(f"{server.url}/health", _HEALTH_TIMEOUT_S)
        _get(request, _ANSWER_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        answer = error.read().decode(errors="replace")
        raise RuntimeError(
            f"{server.name} answers {error.code} to its first request ({error.url}): {answer}\nLog: {server.log}"
        ) from error
    except OSError:
        return False
    return True


def _get(request: str | urllib.request.Request, timeout_s: float) -> bytes:
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        return bytes(reply.read())


def _trouble(server: _Server) -> str | None:
    """What is wrong with a server, in its own words and with its log's path; None if nothing is."""
    code = server.process.poll()
    what = f"ended (exit code {code})"
    if code is None:
        try:
            _get(f"{server.url}/health", _HEALTH_TIMEOUT_S)
            return None
        except OSError as error:
            what = f"fails /health: {error}"
    return f"{server.name} {what}:\n{root_cause(_lines(server.log))}\nLog: {server.log}"


def root_cause(lines: Sequence[str]) -> str:
    """The first error of a server's log, which vLLM buries under those that follow from it, and the log's end."""
    bare = [_LOG_PREFIX.sub("", line) for line in lines]
    start = next((i for i, line in enumerate(bare) if _ERROR_LINE.match(line)), None)
    if start is None:
        return "\n".join(bare[-15:])
    end = start + 1
    while end < min(len(bare), start + 6) and bare[end].startswith(" "):  # pydantic says what on the lines below
        end += 1
    return "\n".join([*bare[start:end], *(["...", bare[-1]] if end < len(bare) else [])])


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()]


def _snapshot(spec: VllmSpec, servers: Sequence[_Server]) -> Mapping[str, object]:
    """Which servers and engine processes live now, who listens, and which servers are not healthy."""
    actors = [actor for server in servers for actor in _actors(server)]
    with ThreadPoolExecutor(len(servers)) as pool:
        unhealthy = [trouble for trouble in pool.map(_trouble, servers) if trouble]
    return asdict(Snapshot(actors=actors, listener=listener(spec.ports[0]), unhealthy=unhealthy))


def _actors(server: _Server) -> list[ActorState]:
    """The server and its engine processes, as far as they live."""
    found = []
    try:
        process = psutil.Process(server.process.pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            found.append(ActorState(id=process_id(process), name=server.name, kind="VllmServer", pid=process.pid))
        for child in process.children(recursive=True):
            title = " ".join(child.cmdline()).strip()  # empty once it is a zombie
            if title.startswith(_ENGINE_TITLE):
                name = f"{server.name}-engine{title.removeprefix(_ENGINE_TITLE)}"
                found.append(
                    ActorState(id=process_id(child), name=name, kind=ENGINE_KIND, pid=child.pid, log=str(server.log))
                )
    except (psutil.NoSuchProcess, OSError):
        pass  # ended while we looked: it is then not among them
    return found


def _effective(spec: VllmSpec, servers: Sequence[_Server]) -> Mapping[str, object]:
    """What the live servers really run with, read back from each.

    Raises RuntimeError when a declared variable or engine argument did not arrive, or two servers differ.
    """
    declared = {**spec.cluster_env, **spec.declared_env}
    wrong: list[str] = []
    environments = [psutil.Process(server.process.pid).environ() for server in servers]
    engines = [
        engine_settings(
            json.loads(_get(f"{server.url}/server_info?config_format=json", _ANSWER_TIMEOUT_S))["vllm_config"]
        )
        for server in servers
    ]
    for server, env, engine in zip(servers, environments, engines, strict=True):
        differences = [
            *(
                f"{name} is {env.get(name)!r}, declared {value!r}"
                for name, value in declared.items()
                if env.get(name) != value
            ),
            *declared_differences(spec.engine, engine),
            *(
                f"{name} is {engine.get(name)}, {servers[0].name} has {engines[0].get(name)}"
                for name in sorted(engine.keys() | engines[0].keys())
                if engine.get(name) != engines[0].get(name)
            ),
        ]
        wrong += [f"{server.name}: {difference}" for difference in differences]
    if wrong:
        logs = ", ".join(str(server.log) for server in servers)
        raise RuntimeError("what was declared did not reach every vLLM server:\n" + "\n".join(wrong) + f"\nLog: {logs}")
    return {
        "declared_env": spec.declared_env,
        "actors": [
            {
                "name": server.name,
                "kind": "VllmServer",
                "pid": server.process.pid,
                "env": reportable(env, declared),
                "constants": {},
            }
            for server, env in zip(servers, environments, strict=True)
        ],
        "engine": engines[0],
        "flag_effects": {},
        "consequences": {},
        "warnings": [],
        "listener": listener(spec.ports[0]),
        "versions": {"python": platform.python_version(), **provenance.package_versions()},
        "hardware": provenance.host(),
    }


if __name__ == "__main__":
    main()

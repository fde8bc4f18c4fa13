"""A client that wraps wrk: closed loop, one connection a thread, every request on record."""

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from orchestrator.clients.base import Client, Live, Load, Measurement
from orchestrator.errors import ConfigError, TrialError
from orchestrator.process import clean_environment, die_with_parent
from orchestrator.results.records import ClientFacts
from orchestrator.results.samples import SAMPLES_SCHEMA, write_samples
from orchestrator.sections import ServiceConfig

# wrk keeps a histogram alone; with one connection a thread, a thread's own requests and replies follow each other.
SCRIPT = """
local ffi = require("ffi")
ffi.cdef[[typedef struct { long s; long ns; } stamp; int clock_gettime(int, stamp *);]]
local clock, threads = ffi.new("stamp"), {}
local function now()
    ffi.C.clock_gettime(1, clock)
    return tonumber(clock.s) + tonumber(clock.ns) * 1e-9
end
function setup(thread) table.insert(threads, thread) end
function init(_) rows = {} end
function request()
    sent = now()
    return wrk.format("GET", wrk.path)
end
function response(status) rows[#rows + 1] = string.format("%.9f %.9f %d", sent, now() - sent, status) end
function done()
    for _, thread in ipairs(threads) do print("rows", table.concat(thread:get("rows"), "\\nrows ")) end
end
"""


@dataclass
class Wrk(Client):
    """wrk must be installed."""

    path: str = "/"

    def check(self, config: ServiceConfig, loads: Sequence[Load]) -> None:
        if shutil.which("wrk") is None:
            raise ConfigError("client=wrk needs wrk: apt-get install wrk")
        if any(load.level.concurrency is None or len(load.urls) > 1 for load in loads):
            raise ConfigError("client=wrk drives one address in closed loop only")

    def run(self, load: Load, directory: Path, on_progress: Callable[[Live], None]) -> Measurement:
        window, clients = load.window, load.level.concurrency
        script = directory / "wrk.lua"
        script.write_text(SCRIPT)
        began_s = time.monotonic()
        length_s = window.ramp_up_s + window.warmup_s + window.duration_s
        command = ["wrk", f"-t{clients}", f"-c{clients}", f"-d{length_s:.0f}s", "-s", str(script)]
        done = subprocess.run(
            [*command, load.urls[0] + self.path],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=length_s + 60,
            preexec_fn=die_with_parent,
        )
        (directory / "client.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            raise TrialError(f"wrk ended with exit code {done.returncode}; see {directory / 'client.log'}")
        window_start_s = began_s + window.ramp_up_s + window.warmup_s
        rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("rows ")]
        samples = [
            {
                "sent_at_s": float(sent_s) - window_start_s,
                "latency_ms": float(took_s) * 1000,
                "ok": status == "200",
                "error": None if status == "200" else f"http_{status}",
                "client_process": 0,
            }
            for sent_s, took_s, status in filter(None, rows)
        ]
        table = pa.Table.from_pylist(samples, schema=SAMPLES_SCHEMA).sort_by("sent_at_s")
        write_samples(directory / "samples.parquet", table)
        facts = ClientFacts(num_processes=1, num_requests=len(samples), latency_resolution_ms=0.0)
        return Measurement(window_start_s, window.duration_s, facts)

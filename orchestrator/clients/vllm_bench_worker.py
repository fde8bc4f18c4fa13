"""One process of load: vLLM's own benchmark client, `vllm bench serve`, with a warm-up and an observer around it.

Started by `orchestrator.clients.vllm_bench`, which talks to it in lines of JSON (see `orchestrator.child`). On stdin
come the spec, then the start time, then nothing: end of file means that the parent is gone, and this process ends.
On stdout go `ready`, one `progress` a second, `facts`; what vLLM prints goes to the log.

What is sent, when, and how it is timed is the client's own code, and so is the JSON it leaves. Added is what it
lacks: a warm-up of distinct prompts under the measured load (its own repeats one prompt, which a prefix cache
answers), a start that all processes share, and the CPU and event-loop lag of the client itself.
"""

import asyncio
import importlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from orchestrator.child import Message, protocol_channel, say
from workloads.llm import tiny

BACKEND = "openai"
LAG_INTERVAL_S = 0.01


class Observer:
    """Stands in for functions of `vllm.benchmarks.serve`, each of which it calls in turn.

    One of them is the progress bar: the client makes it as the load begins and closes it at the last reply.
    """

    def __init__(self, serve: Any, spec: Message, messages: "queue.SimpleQueue[Message]", protocol: TextIO) -> None:
        self.spec, self.messages, self.protocol = spec, messages, protocol
        self.phase = "preparing"
        self.num_successful = self.num_failed = 0
        self.lags_ms: list[float] = []
        self.occupied: list[tuple[float, float]] = []  # from when to when each client waited for a reply
        self.facts: Mapping[str, float | None] = {}
        self._benchmark, self._request = serve.benchmark, serve.ASYNC_REQUEST_FUNCS[BACKEND]
        serve.benchmark = self.benchmark
        serve.ASYNC_REQUEST_FUNCS[BACKEND] = self.request
        serve.tqdm = self.begin
        serve.print = self.print

    def print(self, *values: object) -> None:
        """In the place of `print`: says whose lines they are, since all processes and the warm-up share one log."""
        print(f"[client_process={self.spec['index']} {self.phase}]", *values, flush=True)

    async def benchmark(self, *, input_requests: list[Any], request_rate: float, **settings: Any) -> dict[str, Any]:
        num_warmups = self.spec["num_warmups"]
        self.phase = "WARM-UP"
        warm_up = {**settings, "input_requests": input_requests[:num_warmups], "disable_tqdm": True}
        await self._benchmark(request_rate=request_rate, **warm_up)  # in closed loop: inf
        say(self.protocol, "ready")
        self.start_s = (await asyncio.to_thread(self.messages.get))["start_s"]
        self.phase = "measured"
        measured = {**settings, "input_requests": input_requests[num_warmups:]}
        result: dict[str, Any] = await self._benchmark(request_rate=request_rate, **measured)
        del result["generated_texts"]  # not ours to keep, and large
        # A reply's latency ends at its last token, its client is free for the next request when the stream has ended.
        return result | {"num_prompts": len(measured["input_requests"]), "occupied": sorted(self.occupied)}

    async def request(self, *args: Any, **kwargs: Any) -> Any:
        output = await self._request(*args, **kwargs)
        self.num_successful += output.success
        self.num_failed += not output.success
        self.occupied.append((output.start_time, time.monotonic()))
        return output

    def begin(self, total: int) -> "Observer":
        # Nothing else runs in the loop yet. What the client asks the server before its load was asked by now.
        time.sleep(max(0.0, self.start_s - time.monotonic()))
        self.num_successful = self.num_failed = 0  # without the warm-up
        self.occupied.clear()
        self.watcher = asyncio.get_running_loop().create_task(self.watch())
        self.began_s, self.cpu_began_s = time.monotonic(), time.process_time()
        return self

    def update(self, n: int) -> None:
        """A method of the progress bar, which does nothing: `request` counts."""

    def close(self) -> None:
        ended_s, cpu_ended_s = time.monotonic(), time.process_time()
        self.watcher.cancel()
        self.facts = {
            "began_s": self.began_s,
            "cpu_ratio": (cpu_ended_s - self.cpu_began_s) / (ended_s - self.began_s),
            "lag_p50_ms": float(np.percentile(self.lags_ms, 50)) if self.lags_ms else None,
            "lag_p99_ms": float(np.percentile(self.lags_ms, 99)) if self.lags_ms else None,
        }

    async def watch(self) -> None:
        """Record the event loop's lag, to within the 1 ms to which it rounds up, and tell the progress each second."""
        tick, num_reported = self.began_s + 1.0, 0
        while True:
            slept_s = time.monotonic()
            await asyncio.sleep(LAG_INTERVAL_S)
            now = time.monotonic()
            self.lags_ms.append((now - slept_s - LAG_INTERVAL_S) * 1000)
            if now >= tick:
                say(
                    self.protocol,
                    "progress",
                    elapsed_s=now - self.began_s,
                    throughput_rps=(self.num_successful - num_reported) / (now - tick + 1.0),
                    num_failed=self.num_failed,
                    latency_p99_ms=None,
                )
                tick, num_reported = now + 1.0, self.num_successful


def arguments(spec: Message, tokenizer: str) -> list[str]:
    """The command line of `vllm bench serve`, to which the environment adds an OPENAI_API_KEY."""
    rate_rps = spec["request_rate_rps"]
    result = Path(spec["result"])
    settings = {
        "backend": BACKEND,
        "base-url": spec["url"],
        "endpoint": "/v1/completions",
        "model": spec["model"],
        "tokenizer": tokenizer,
        "dataset-name": "random",
        "random-input-len": spec["num_input_tokens"],
        "random-output-len": spec["num_output_tokens"],
        "num-prompts": spec["num_warmups"] + spec["num_prompts"],
        "request-rate": "inf" if rate_rps is None else rate_rps,
        "temperature": spec["temperature"],
        "seed": spec["seed"],
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "metric-percentiles": "50,90,95,99",
        "ready-check-timeout-sec": 0,
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    if spec["concurrency"] is not None:
        settings["max-concurrency"] = spec["concurrency"]
    flags = ["--ignore-eos", "--save-result", "--save-detailed"]
    return [*(f"--{name}={value}" for name, value in settings.items()), *flags]


def listen(messages: "queue.SimpleQueue[Message]") -> None:
    """Pass the parent's messages on, and exit when the parent is gone. Runs in a thread of its own."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # a buffer's lock would hold up a normal exit
        for line in stdin:
            messages.put(json.loads(line))
    os._exit(1)


def main() -> None:
    protocol = protocol_channel()
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(messages,), daemon=True).start()
    spec = messages.get()
    # The client's send times are of the one, the shared start is of the other.
    assert time.get_clock_info("perf_counter").implementation == time.get_clock_info("monotonic").implementation

    tokenizer = tiny.resolve(spec["tokenizer"])
    if Path(tokenizer).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("SAVE_TO_PYTORCH_BENCHMARK_FORMAT", None)  # a second file beside the result
    # Only now: importing it prints, takes 8 s of CPU, and reads the environment.
    vllm, serve = importlib.import_module("vllm"), importlib.import_module("vllm.benchmarks.serve")
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    serve.add_cli_args(parser)
    observer = Observer(serve, spec, messages, protocol)
    serve.main(parser.parse_args(arguments(spec, tokenizer)))
    versions = {"vllm": vllm.__version__, "aiohttp": serve.aiohttp.__version__}
    say(protocol, "facts", **observer.facts, versions=versions)
    sys.stdout.flush()
    os._exit(0)  # a thread of vLLM's must not hold up the next trial


if __name__ == "__main__":
    main()

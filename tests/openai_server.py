"""An OpenAI completions server of known behaviour, in a process of its own, that says what it saw.

    with serving(gap_ms=5, fail_every=10) as server: ...   server.url, server.stats()

As a program, `python -m tests.openai_server '{"gap_ms": 5}'` prints its port and serves until stdin ends.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.servers import Server

TEXT = "GENERATED-TEXT "  # of each token: to be found on no disk


@dataclass
class Settings:
    """Every `n`th request, counted from 1, meets what is set for `*_every`; 0 = none."""

    first_ms: float = 20
    gap_ms: float = 5
    num_prompt_tokens: int = 31  # as usage tells
    fail_every: int = 0  # answered with status 500
    short_every: int = 0  # one token fewer than asked
    cut_every: int = 0  # the connection is closed half way
    hang_after: int | None = None  # no answer after that many requests


@dataclass
class Stats:
    num_requests: int = 0
    num_failed: int = 0
    num_short: int = 0
    num_cut: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    authorizations: set[str] = field(default_factory=set)
    prompts: list[str] = field(default_factory=list)
    bodies: dict[str, Any] = field(default_factory=dict)  # the last one, without its prompt
    arrived_s: list[float] = field(default_factory=list)  # monotonic clock
    latencies_ms: list[float] = field(default_factory=list)  # of whole replies


class Completions:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.stats = settings, Stats()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        settings, stats = self.settings, self.stats
        began = time.monotonic()
        stats.num_requests += 1
        number = stats.num_requests
        stats.arrived_s.append(began)
        stats.authorizations.add(request.headers.get("Authorization", ""))
        stats.bodies = await request.json()
        stats.prompts.append(stats.bodies.pop("prompt"))
        num_tokens = stats.bodies["max_tokens"]
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        try:
            if settings.hang_after is not None and number > settings.hang_after:
                await asyncio.sleep(3600)
            await asyncio.sleep(settings.first_ms / 1000)
            if settings.fail_every and number % settings.fail_every == 0:
                stats.num_failed += 1
                return web.Response(status=500)
            if settings.short_every and number % settings.short_every == 0:
                stats.num_short += 1
                num_tokens -= 1
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for token in range(num_tokens):
                await asyncio.sleep(settings.gap_ms / 1000 if token else 0)
                if settings.cut_every and number % settings.cut_every == 0 and token == num_tokens // 2:
                    stats.num_cut += 1
                    assert request.transport
                    request.transport.abort()
                    return response
                await response.write(event({"choices": [{"index": 0, "text": TEXT}]}))
            usage = {"prompt_tokens": settings.num_prompt_tokens, "completion_tokens": num_tokens}
            await response.write(event({"choices": [], "usage": usage}))
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
            stats.latencies_ms.append((time.monotonic() - began) * 1000)
            return response
        finally:
            stats.in_flight -= 1

    async def tell(self, request: web.Request) -> web.Response:
        return web.json_response({**vars(self.stats), "authorizations": sorted(self.stats.authorizations)})


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


async def serve(settings: Settings) -> None:
    completions = Completions(settings)
    app = web.Application()
    app.add_routes([web.post("/v1/completions", completions.complete), web.get("/_stats", completions.tell)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started us is gone


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    command = [sys.executable, "-m", "tests.openai_server", json.dumps(settings)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        try:
            yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}", process.pid)
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(serve(Settings(**json.loads(sys.argv[1]))))

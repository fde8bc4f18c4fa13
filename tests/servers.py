"""Real HTTP servers of known behaviour, each in its own process, that say what they saw.

    with serving("delay", delay_ms=20) as server: ...   server.url, server.stats()

As a program, `python -m tests.servers delay '{"delay_ms": 20}'` prints its port and serves until stdin ends.
"""

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

HEADERS = "HTTP/1.1 {status}\r\nContent-Type: {type}\r\nContent-Length: {length}\r\n{more}\r\n"
SSE_HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def reply(body: bytes, status: str = "200 OK", more: str = "", kind: str = "application/json") -> bytes:
    return HEADERS.format(status=status, type=kind, length=len(body), more=more).encode() + body


def echo_body(path: str) -> bytes:
    return json.dumps({"message": path.partition("message=")[2]}, separators=(",", ":")).encode()


def event(data: str) -> bytes:
    body = f"data: {data}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(body), body)


def completion(text: str) -> str:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
    return json.dumps({**head, "choices": [choice]})


class Stats:
    """What happened, as the server saw it; times on its own clock."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_connections = 0
        self.in_flight = 0
        self.max_in_flight = 0
        self.paths: set[str] = set()
        self.headers: str = ""
        self.latencies_ms: list[float] = []


class Connection(asyncio.Protocol):
    def __init__(self, behaviour: "Behaviour", stats: Stats) -> None:
        self.behaviour, self.stats = behaviour, stats
        self.received = b""
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.stats.num_connections += 1

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, _, self.received = self.received.partition(b"\r\n\r\n")
            request_line, _, headers = head.decode().partition("\r\n")
            path = request_line.split(" ")[1]
            if path == "/_stats":
                self.stats.num_connections -= 1
                seen = {**vars(self.stats), "paths": sorted(self.stats.paths)}
                self.transport.write(reply(json.dumps(seen).encode()))
                continue
            self.stats.num_requests += 1
            self.stats.in_flight += 1
            self.stats.max_in_flight = max(self.stats.max_in_flight, self.stats.in_flight)
            self.stats.paths.add(path.partition("?")[0])
            self.stats.headers = headers
            self.busy, self.began = True, time.perf_counter()
            self.behaviour(self, path, self.stats.num_requests)

    def finish(self, data: bytes = b"", close: bool = False) -> None:
        if self.busy:
            self.stats.in_flight -= 1
            self.stats.latencies_ms.append((time.perf_counter() - self.began) * 1000)
        self.busy = False
        if data:
            self.transport.write(data)
        if close:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.finish()


Behaviour = Callable[[Connection, str, int], None]


def static() -> Behaviour:
    """The echo reply at once, made only once: for measuring clients."""
    cache: dict[str, bytes] = {}

    def behaviour(connection: Connection, path: str, number: int) -> None:
        connection.busy = False
        connection.stats.in_flight = 0
        connection.transport.write(cache.get(path) or cache.setdefault(path, reply(echo_body(path))))

    return behaviour


def static_stream(num_chunks: int = 50) -> Behaviour:
    """A whole stream at once."""
    whole = SSE_HEADERS + event(completion("word ")) * num_chunks + event("[DONE]") + b"0\r\n\r\n"

    def behaviour(connection: Connection, path: str, number: int) -> None:
        connection.busy = False
        connection.stats.in_flight = 0
        connection.transport.write(whole)

    return behaviour


def delay(delay_ms: float = 20, slow_ms: float | None = None, slow_every: int = 10, spaced: bool = False) -> Behaviour:
    """Echo after `delay_ms`; every `slow_every`th request after `slow_ms` instead."""

    def behaviour(connection: Connection, path: str, number: int) -> None:
        ms = slow_ms if slow_ms is not None and number % slow_every == 0 else delay_ms
        body = echo_body(path).replace(b'":"', b'": "') if spaced else echo_body(path)
        asyncio.get_running_loop().call_later(ms / 1000, connection.finish, reply(body))

    return behaviour


def stream(
    num_chunks: int = 10,
    gap_ms: float = 50,
    first_ms: float = 100,
    num_sent: int | None = None,
    done: bool = True,
    cut: bool = False,
    malformed_at: int | None = None,
    empty_first: bool = False,
) -> Behaviour:
    """Events `gap_ms` apart after `first_ms`; ends early, cuts the connection or garbles one, as told."""

    async def send(connection: Connection) -> None:
        began = time.perf_counter()
        connection.transport.write(SSE_HEADERS)
        for k in range(num_chunks if num_sent is None else num_sent):
            await asyncio.sleep(began + (first_ms + k * gap_ms) / 1000 - time.perf_counter())
            data = "{not json" if k == malformed_at else completion("" if empty_first and k == 0 else "word ")
            connection.transport.write(event(data))
        if cut:
            connection.finish(close=True)
        else:
            connection.finish((event("[DONE]") if done else b"") + b"0\r\n\r\n")

    def behaviour(connection: Connection, path: str, number: int) -> None:
        connection.task = asyncio.ensure_future(send(connection))  # type: ignore[attr-defined]

    return behaviour


def drop(every: int = 1, delay_ms: float = 10) -> Behaviour:
    """Every `every`th request is read, and its connection closed without an answer; the others are echoed."""

    def behaviour(connection: Connection, path: str, number: int) -> None:
        dropped = number % every == 0
        asyncio.get_running_loop().call_later(
            delay_ms / 1000, connection.finish, b"" if dropped else reply(echo_body(path)), dropped
        )

    return behaviour


def fixed(status: str = "200 OK", body: str = "", more: str = "", delay_ms: float = 10) -> Behaviour:
    """One and the same reply to everything."""

    def behaviour(connection: Connection, path: str, number: int) -> None:
        data = reply(body.encode(), status, more)
        asyncio.get_running_loop().call_later(delay_ms / 1000, connection.finish, data)

    return behaviour


def short_body(delay_ms: float = 10) -> Behaviour:
    """Promises 1,000 bytes, sends ten and closes."""

    def behaviour(connection: Connection, path: str, number: int) -> None:
        data = HEADERS.format(status="200 OK", type="text/plain", length=1000, more="").encode() + b"0123456789"
        asyncio.get_running_loop().call_later(delay_ms / 1000, connection.finish, data, True)

    return behaviour


def hang(after: int = 0, delay_ms: float = 10) -> Behaviour:
    """Echoes the first `after` requests and never answers again."""

    def behaviour(connection: Connection, path: str, number: int) -> None:
        if number <= after:
            asyncio.get_running_loop().call_later(delay_ms / 1000, connection.finish, reply(echo_body(path)))

    return behaviour


def in_turn(replies: list[tuple[str, dict[str, Any]]]) -> Behaviour:
    """The first request meets the first of these behaviours, and so on, round and round."""
    made = [BEHAVIOURS[name](**settings) for name, settings in replies]

    def behaviour(connection: Connection, path: str, number: int) -> None:
        made[(number - 1) % len(made)](connection, path, number)

    return behaviour


BEHAVIOURS: dict[str, Callable[..., Behaviour]] = {
    function.__name__: function
    for function in (static, static_stream, delay, stream, drop, fixed, short_body, hang, in_turn)
}


async def serve(behaviour: Behaviour) -> None:
    loop, stats = asyncio.get_running_loop(), Stats()
    server = await loop.create_server(lambda: Connection(behaviour, stats), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until whoever started us is gone


@dataclass(frozen=True)
class Server:
    url: str
    pid: int

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/_stats", timeout=10) as response:
            seen: dict[str, Any] = json.load(response)
        return seen


@contextmanager
def serving(behaviour: str, **settings: Any) -> Iterator[Server]:
    command = [sys.executable, "-m", "tests.servers", behaviour, json.dumps(settings)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        try:
            yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}", process.pid)
        finally:
            process.kill()


if __name__ == "__main__":
    import uvloop

    made = BEHAVIOURS[sys.argv[1]](**json.loads(sys.argv[2]))
    uvloop.run(serve(made))

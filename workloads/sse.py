"""When did each part of a streamed reply arrive? Reads server-sent events in OpenAI text-completion form.

Locust's `iter_lines` waits for blocks of 1,024 bytes and its clock stops at the headers, so ten chunks sent
50 ms apart seem to arrive together. Here lines are taken as they come, and nothing is parsed before the last
has come. One `data:` line is one event (OpenAI servers send no others). One event is one token, unless a last event
tells the usage: vLLM puts tokens that are ready together into one event.
"""

import json
import time
from typing import Any, NamedTuple

from geventhttpclient.response import HTTPParseError


class Stream(NamedTuple):
    latency_ms: float  # to the last byte
    ttft_ms: float | None  # to the first event with a choice in it
    tpot_ms: float | None  # (latency - TTFT) / (tokens - 1); None below two tokens
    num_output_tokens: int
    error: str | None

    def record(self, response: Any) -> None:
        """Put our clock's numbers into a Locust response (`catch_response=True`, inside its `with` block)."""
        response.request_meta["response_time"] = self.latency_ms
        response.request_meta["context"] = {
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "num_output_tokens": self.num_output_tokens,
        }
        if self.error:
            response.failure(self.error)


def read_stream(response: Any, sent_s: float, num_tokens: int | None = None) -> Stream:
    """Read to the end a response got with `stream=True` that was sent at `sent_s` (`time.perf_counter()`).

    One that holds not exactly `num_tokens` is an error, where they are told.
    """
    arrivals: list[tuple[float, bytes]] = []
    readline = response._response.readline  # what FastResponse wraps: its reads return what has come so far
    error = None
    try:
        while line := readline(b"\n"):
            if line.startswith(b"data:"):
                arrivals.append((time.perf_counter(), line[5:].strip()))
    except TimeoutError:
        error = "timeout"
    except (OSError, HTTPParseError):  # the connection ended before the reply did
        error = "truncated_stream"
    end_s = time.perf_counter()

    done = bool(arrivals) and arrivals[-1][1] == b"[DONE]"
    if done:
        arrivals.pop()
    first_s, counted = None, 0
    for arrived_s, data in arrivals:
        try:
            event = json.loads(data)
            if event["choices"]:
                first_s = arrived_s if first_s is None else first_s
                counted += 1
            else:
                counted = event["usage"]["completion_tokens"]
        except (ValueError, LookupError, TypeError):
            error = error or f"malformed_event: {data[:80]!r}"
    if not done:
        error = error or "truncated_stream"
    if num_tokens is not None and counted != num_tokens:
        error = error or f"{'short' if counted < num_tokens else 'long'}_reply: got {counted}, want {num_tokens}"

    tpot_ms = None
    if first_s is not None and counted >= 2:
        tpot_ms = (end_s - first_s) * 1000 / (counted - 1)
    return Stream(
        latency_ms=(end_s - sent_s) * 1000,
        ttft_ms=None if first_s is None else (first_s - sent_s) * 1000,
        tpot_ms=tpot_ms,
        num_output_tokens=counted,
        error=error,
    )

"""When did each part of a streamed reply arrive? Reads server-sent events in OpenAI text-completion form.

Locust's `iter_lines` waits for blocks of 1,024 bytes and its clock stops at the headers, so ten chunks sent
50 ms apart seem to arrive together. Here lines are taken as they come, and nothing is parsed before the last
has come. One `data:` line is one event (OpenAI servers send no others), one event is one token.
"""

import json
import time
from typing import Any, NamedTuple

from geventhttpclient.response import HTTPParseError


class Stream(NamedTuple):
    latency_ms: float  # to the last byte
    ttft_ms: float | None  # to the first event with text in it
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


def read_stream(response: Any, sent_s: float, num_chunks: int | None = None) -> Stream:
    """Read to the end a response got with `stream=True` that was sent at `sent_s` (`time.perf_counter()`)."""
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
    first_text_s = None
    for arrived_s, data in arrivals:
        try:
            text = json.loads(data)["choices"][0]["text"]
        except (ValueError, LookupError, TypeError):
            error = error or f"malformed_event: {data[:80]!r}"
            break
        if text and first_text_s is None:
            first_text_s = arrived_s
    if not done:
        error = error or "truncated_stream"
    if num_chunks is not None and len(arrivals) != num_chunks:
        error = error or f"wrong_num_chunks: got {len(arrivals)}, want {num_chunks}"

    tpot_ms = None
    if first_text_s is not None and len(arrivals) >= 2:
        tpot_ms = (end_s - first_text_s) * 1000 / (len(arrivals) - 1)
    return Stream(
        latency_ms=(end_s - sent_s) * 1000,
        ttft_ms=None if first_text_s is None else (first_text_s - sent_s) * 1000,
        tpot_ms=tpot_ms,
        num_output_tokens=len(arrivals),
        error=error,
    )

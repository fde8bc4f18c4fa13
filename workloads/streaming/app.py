"""Streaming echo chain: what does Serve cost per streamed chunk, and per first chunk?

A FastAPI ingress relays the chunks that a second deployment generates, as server-sent events in the form of
an OpenAI text completion, closed by `[DONE]`. With `ttft_s` and `tpot_s` at 0 nothing is waited for, so the
rate is Serve's own; set them to imitate a model's pace.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

api = FastAPI()


@serve.deployment
class TokenSource:
    """Yields `num_chunks` pieces of text: the first after `ttft_s`, the next ones `tpot_s` apart."""

    def __init__(self, num_chunks: int, ttft_s: float, tpot_s: float) -> None:
        self._num_chunks = num_chunks
        self._ttft_s = ttft_s
        self._tpot_s = tpot_s

    async def __call__(self) -> AsyncIterator[str]:
        for index in range(self._num_chunks):
            delay_s = self._ttft_s if index == 0 else self._tpot_s
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            yield f"token{index} "


@serve.deployment
@serve.ingress(api)
class Ingress:
    def __init__(self, source: DeploymentHandle) -> None:
        self._source = source.options(stream=True)

    @api.get("/stream")
    async def stream(self) -> StreamingResponse:
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        created = int(time.time())
        async for text in self._source.remote():
            chunk = {
                "id": "cmpl-echo",
                "object": "text_completion",
                "created": created,
                "model": "echo",
                "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}],
            }
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"


def build(args: Mapping[str, Any]) -> Application:
    """`num_chunks` (count), `ttft_s` and `tpot_s` (seconds; 0 = as fast as Serve can)."""
    return Ingress.bind(TokenSource.bind(int(args["num_chunks"]), float(args["ttft_s"]), float(args["tpot_s"])))

"""Unary echo chain: how much does Serve itself cost for one small request and reply?

A FastAPI ingress forwards the message to a second deployment and returns what comes back, so one request
crosses the proxy, the ingress replica and one inter-deployment call, and nothing else.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

api = FastAPI()


@serve.deployment
class Echo:
    """Waits `delay_s` before it answers: an effect of known size, to check a measurement with."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    async def __call__(self, message: str) -> str:
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        return message


@serve.deployment
@serve.ingress(api)
class Ingress:
    def __init__(self, echo: DeploymentHandle) -> None:
        self._echo = echo

    @api.get("/echo")
    async def echo(self, message: str = "") -> dict[str, str]:
        return {"message": await self._echo.remote(message)}


def build(args: Mapping[str, Any]) -> Application:
    """`args`: `delay_s`. Replica counts come from the application config."""
    return Ingress.bind(Echo.bind(args["delay_s"]))

"""Unary echo chain: how much does Serve itself cost for one small request and reply?

A FastAPI ingress forwards the message to a second deployment and returns what comes back, so one request
crosses the proxy, the ingress replica and one inter-deployment call, and nothing else.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

api = FastAPI()


@serve.deployment
class Echo:
    async def __call__(self, message: str) -> str:
        return message


@serve.deployment
@serve.ingress(api)
class Ingress:
    def __init__(self, echo: DeploymentHandle) -> None:
        self._echo = echo

    @api.get("/echo")
    async def echo(self, message: str = "") -> dict[str, str]:
        return {"message": await self._echo.remote(message)}


def build(args: dict[str, Any]) -> Application:
    """Takes no arguments; replica counts come from the application config."""
    return Ingress.bind(Echo.bind())

"""An application whose constructor raises, for the test that says so to the user."""

from typing import Any

from ray import serve


@serve.deployment
class Broken:
    def __init__(self) -> None:
        raise RuntimeError("the embedding table is missing: kaputt-4711")

    async def __call__(self) -> str:
        return "never"


def build(args: dict[str, Any]) -> Any:
    return Broken.bind()

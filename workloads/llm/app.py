"""Ray Serve LLM as it comes: `ray.serve.llm.build_openai_app`, with two things it does not know.

The model `tiny` is made where the service runs, and a setting that is null is left out, so that a profile can take
one away.
"""

from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from workloads.llm import tiny


def build(args: Mapping[str, Any]) -> Application:
    """`args` are those of `build_openai_app`: `llm_configs` and, unless null, `ingress_deployment_config`."""
    from ray.serve.llm import build_openai_app  # brings vLLM along, which takes seconds

    llm_configs = []
    for config in args["llm_configs"]:
        loading = config["model_loading_config"]
        source = tiny.resolve(loading["model_source"])
        llm_configs.append(_given(config) | {"model_loading_config": {**loading, "model_source": source}})
    return build_openai_app(_given(args) | {"llm_configs": llm_configs})


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are null."""
    return {name: value for name, value in settings.items() if value is not None}

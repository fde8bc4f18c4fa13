"""What a vLLM engine runs with, in one flat form for standalone servers and for Ray Serve's replicas.

Both can give `pydantic.TypeAdapter(VllmConfig).dump_python(config, mode="json", fallback=str)`: a standalone server
under "vllm_config" of /server_info, a replica from its own config object. It is the config after vLLM filled in its
defaults and the platform overruled it, so it says what was made of the arguments. Sizes that follow from the memory
that happened to be free (number of cache blocks) are left out: they differ between any two deployments.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Where vLLM 0.29 keeps what, under the names of the engine's arguments but for those in `_NAMES`.
_PLACES = {
    "model_config": ("model", "dtype", "max_model_len", "seed", "quantization", "enforce_eager"),
    "parallel_config": (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "distributed_executor_backend",
    ),
    "cache_config": ("gpu_memory_utilization", "block_size", "cache_dtype", "enable_prefix_caching"),
    "scheduler_config": ("max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "async_scheduling"),
    "load_config": ("load_format",),
    "compilation_config": ("mode", "cudagraph_mode"),
    "speculative_config": ("method",),
}
_NAMES = {"cache_dtype": "kv_cache_dtype", "mode": "compilation_mode", "method": "speculative_method"}
_VLLM_CHOOSES = (None, "auto", -1)
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}


def engine_settings(vllm_config: Mapping[str, Any]) -> Mapping[str, object]:
    """The settings that decide what an engine does, by name; what this vLLM does not tell is left out."""
    found: dict[str, object] = {}
    for section, keys in _PLACES.items():
        settings = vllm_config.get(section, {})
        for key in keys:
            name = _NAMES.get(key, key)
            if settings is None:  # a feature that is off
                found[name] = None
            elif key in settings:
                found[name] = _comparable(name, settings[key])
    return found


def declared_differences(declared: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    """Declared engine arguments that did not arrive: "max_num_seqs is 64, declared 256".

    Arguments that `engine_settings` does not report, and those that leave the choice to vLLM, are not checked.
    """
    return [
        f"{name} is {found[name]}, declared {wanted}"
        for name, wanted in declared.items()
        if name in found and wanted not in _VLLM_CHOOSES and not _same(_comparable(name, wanted), found[name])
    ]


def _comparable(name: str, value: object) -> object:
    if name == "model" and isinstance(value, str) and value.startswith(("/", ".", "~")):
        return Path(value).name  # where a machine keeps it makes no difference
    if name == "dtype" and isinstance(value, str):
        value = value.removeprefix("torch.")
        return _DTYPE_ALIASES.get(value, value)
    return value


def _same(wanted: Any, found: Any) -> bool:
    try:
        return float(wanted) == float(found)
    except (TypeError, ValueError):
        return bool(wanted == found)


def arrived(told: Mapping[str, Any], declared: Mapping[str, object] | None) -> Mapping[str, Any]:
    """What `workloads.probe.readback` summarised, with the one engine that all replicas run (None: no model).

    Raises ValueError when a variable or an engine argument did not arrive everywhere.
    """
    if missing := told["missing"]:
        raise ValueError("declared environment did not reach every Serve actor:\n" + "\n".join(missing))
    engines = [engine_settings(vllm_config) for vllm_config in told["engines"]]
    effective = {key: value for key, value in told.items() if key not in ("missing", "engines")}
    if declared is None:
        return effective | {"engine": None}
    if not engines or any(engine != engines[0] for engine in engines):
        raise ValueError(f"the replicas do not tell one and the same engine: {engines}")
    if wrong := declared_differences(declared, engines[0]):
        raise ValueError("declared engine arguments did not reach the engine: " + "; ".join(wrong))
    return effective | {"engine": engines[0]}

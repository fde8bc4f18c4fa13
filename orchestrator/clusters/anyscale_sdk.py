"""The child process that calls the Anyscale SDK: one call after the other, each with plain values.

Run as `python -m orchestrator.clusters.anyscale_sdk` by `orchestrator.clusters.anyscale`, which tells why it is a
process of its own. On standard input come calls, each `{"call": ..., "arguments": {...}}`, the first of them `login`;
each is answered by `result` or `failed`. It ends when standard input closes, whatever request is in flight.
"""

import json
import os
import queue
import re
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn, TextIO

from orchestrator.child import protocol_channel, say
from orchestrator.secrets import Secret, redact


def main() -> NoReturn:
    """Answers calls until standard input closes."""
    channel = protocol_channel()
    filtered: Any = _Filtered(sys.stderr)
    sys.stdout = sys.stderr = filtered
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    client: _Client | None = None
    while True:
        message = json.loads(lines.get())
        call, arguments = message["call"], message["arguments"]
        result = None
        try:
            if call == "login":
                client = _Client(**arguments)
            else:
                assert client is not None, "the first call is login"
                result = getattr(client, call)(**arguments)
        except Exception as error:
            text = redact(_error_text(error))
            print(f"{call}: {type(error).__name__}: {text}")
            say(channel, "failed", error=text, transient=_is_transient(error))
        else:
            say(channel, "result", result=result)


def _read(lines: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # whatever request is in flight


class _Filtered:
    """A text stream without secrets and colours. It writes whole lines, so that no token is cut in two unseen."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._stream.write(redact(re.sub(r"\x1b\[[0-9;]*m", "", line)) + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


class _Client:
    """The SDK's calls with plain values: what comes in and goes out is JSON."""

    def __init__(self, token: str, host: str | None, cloud: str | None, project: str | None) -> None:
        import anyscale

        self._config_type = anyscale.service.models.ServiceConfig
        self._services = anyscale.Anyscale(auth_token=Secret(token).reveal(), _host=host).service
        self._where = {"cloud": cloud, "project": project}

    def deploy(self, config: Mapping[str, Any]) -> str:
        return str(self._services.deploy(self._config_type(**config)))

    def terminate(self, service_id: str) -> str:
        return str(self._services.terminate(id=service_id))

    def logs(self, name: str) -> str:
        return str(self._services.controller_logs(name, **self._where))

    def image(self, name: str) -> dict[str, str]:
        """Which image the service runs: a floating tag may name another one tomorrow. No public call tells.

        Where Anyscale tells no digest, its number of the build stands for it, and is not taken for one.
        """
        sdk = self._services._private_sdk
        service = sdk.client.get_service(name=name, **self._where)
        build = sdk.client.get_cluster_env_build(service.primary_version.build_id)
        return {"image_uri": build.docker_image_name, "image_digest": build.digest or f"unknown: build {build.id}"}

    def status(self, name: str) -> Mapping[str, object] | None:
        try:
            status = self._services.status(name, **self._where)
        except RuntimeError as error:
            if "was not found" in str(error):
                return None
            raise
        primary, canary = status.primary_version, status.canary_version
        if status.query_auth_token:
            Secret(status.query_auth_token)  # from here on nothing shows it
        return {
            "id": status.id,
            "state": status.state.value,
            "url": status.query_url,
            "token": status.query_auth_token,
            "primary": primary and primary.name,
            "canary": canary and canary.name,
            "versions": {version.name: version.state.value for version in (primary, canary) if version},
            "messages": _messages(status.service_status_checklist),
        }


def _messages(checklist: Any) -> list[str]:
    """ "<step>: <message>" for each step of the rollout that the control plane has a message on."""
    if checklist is None:
        return []
    items = [*checklist.shared, *(item for version in checklist.per_version for item in version.items)]
    return [f"{item.label}: {item.message}" for item in items if item.message]


def _error_text(error: Exception) -> str:
    status, body = getattr(error, "status", None), getattr(error, "body", None)
    if isinstance(status, int):  # the SDK's ApiException, whose own text is all headers
        return f"the control plane answered {status} {getattr(error, 'reason', '')}: {str(body or '')[:500]}"
    return getattr(error, "message", None) or str(error) or repr(error)


def _is_transient(error: Exception) -> bool:
    """Whether a later call may succeed: the server or the network failed. A refusal (ValueError) is final."""
    import requests
    import urllib3
    from anyscale.errors import InfraError

    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status == 429
    return isinstance(error, InfraError | urllib3.exceptions.HTTPError | requests.RequestException | ConnectionError)


if __name__ == "__main__":
    main()

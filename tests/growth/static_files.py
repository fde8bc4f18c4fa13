"""A cluster that serves files from this machine with Python's own HTTP server."""

import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from orchestrator.clusters.base import Cluster, ServiceName
from orchestrator.clusters.remote import Address, Timeout
from orchestrator.errors import ServiceError
from orchestrator.process import MARKER, clean_environment, die_with_parent, uninterrupted
from orchestrator.secrets import Secret
from orchestrator.sections import ServiceConfig


@dataclass(kw_only=True)
class StaticFiles(Cluster):
    """Serves one file of `file_bytes` at /."""

    file_bytes: int = 1024

    deploys: ClassVar[bool] = False  # it knows nothing of Serve applications

    def check(self, config: ServiceConfig) -> None:
        """Nothing can be wrong beforehand."""

    def rendered(self, config: ServiceConfig, name: ServiceName) -> str:
        return f"# One file of {self.file_bytes} bytes, by python -m http.server\n"

    def service(
        self, config: ServiceConfig, name: ServiceName, log_dir: Path, on_status: Callable[[str], None]
    ) -> "FileServer":
        (log_dir / "service.yaml").write_text(self.rendered(config, name))
        return FileServer(self, config, log_dir, on_status)


class FileServer:
    """One process in a directory of its own."""

    def __init__(
        self, cluster: StaticFiles, config: ServiceConfig, log_dir: Path, on_status: Callable[[str], None]
    ) -> None:
        self.urls: list[str] = []
        self.token: Secret | None = None
        self.marker: str | None = None
        self.effective: Mapping[str, Any] = {}
        self._cluster, self._config, self._log_dir, self._on_status = cluster, config, log_dir, on_status
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with uninterrupted():
            self._folder = tempfile.TemporaryDirectory(prefix="growth-")
        self.marker = self._folder.name
        Path(self._folder.name, "index.html").write_bytes(b"x" * self._cluster.file_bytes)
        with uninterrupted(), (self._log_dir / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--protocol", "HTTP/1.1"],
                cwd=self._folder.name,
                env=clean_environment() | {MARKER: self._folder.name},
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        self.urls = [f"http://127.0.0.1:{port}"]

    def wait_ready(self) -> None:
        ready_path = self._config.workload.ready_path
        Address(self.urls[0]).wait_for(ready_path, Timeout(self._cluster.startup_timeout_s), self._on_status)
        self.effective = {"warnings": []}

    def begin_stop(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> str | None:
        with uninterrupted():
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            if self._folder is not None:
                self._folder.cleanup()
        return None

    def snapshot(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise ServiceError(f"the file server ended; log: {self._log_dir}")

    def round_trip_ms(self) -> float | None:
        return None

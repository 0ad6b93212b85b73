"""A real Ray head on private ports with token authentication, in a process tree that is ended by pid."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_DEADLINE_S = 90.0


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@dataclass(frozen=True)
class Head:
    """A running head."""

    address: str
    """Of the dashboard."""
    metrics_port: int


@contextmanager
def ray_head(num_cpus: int = 0) -> Iterator[Head]:
    """A head whose token is the one in RAY_AUTH_TOKEN_PATH; nothing of the real home is touched."""
    gcs, dashboard, agent, metrics, client = free_ports(5)
    home = Path(tempfile.mkdtemp(prefix="sg"))  # short: Ray's socket paths are limited to 107 bytes
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={num_cpus}"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--temp-dir={home}"),
        *("--disable-usage-stats", "--include-dashboard=true"),
    ]
    environment = {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "token"}
    log = (home / "start.log").open("wb")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_healthy(head, address, home / "start.log")
        yield Head(address, metrics)
    finally:
        end_tree(head)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


def _wait_until_healthy(head: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if head.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/api/gcs_healthz", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the head did not come up:\n{log.read_text(errors='replace')[-2000:]}")


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything that it started, by pid."""
    import psutil

    tree = [process.pid]
    with suppress(psutil.NoSuchProcess):
        tree += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    for pid in tree:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
    process.wait(timeout=20)

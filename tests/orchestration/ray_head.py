"""A real Ray head on private ports with token authentication, in a process tree that is ended by pid."""

from __future__ import annotations

import json
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
from typing import Any

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
    gcs_address: str


@contextmanager
def ray_head(num_cpus: int = 0, node_types: dict[str, Any] | None = None) -> Iterator[Head]:
    """A head whose token is the one in RAY_AUTH_TOKEN_PATH; nothing of the real home is touched.

    With `node_types` (of Ray's cluster configuration) an autoscaler adds nodes of these types on this machine.
    """
    gcs, dashboard, agent, metrics, client = free_ports(5)
    home = Path(tempfile.mkdtemp(prefix="sg"))  # short: Ray's socket paths are limited to 107 bytes
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={num_cpus}"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--temp-dir={home}"),
        *("--disable-usage-stats", "--include-dashboard=true"),
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # a job's `python` is this one
    environment = {**os.environ, "HOME": str(home), "PATH": path, "RAY_AUTH_MODE": "token"}
    gcs_address = f"{_node_ip()}:{gcs}"
    if node_types is not None:
        (home / "scaling.json").write_text(json.dumps(_scaling(node_types, gcs_address)), encoding="utf-8")
        command.append(f"--autoscaling-config={home}/scaling.json")
        environment |= SCALING_ENVIRONMENT
    log = (home / "start.log").open("wb")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_healthy(head, address, home / "start.log")
        yield Head(address, metrics, gcs_address)
    finally:
        end_tree(head)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


HEAD_NODE_ID = "f" * 51 + "00000"
SCALING_ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
}

COMMAND_LISTS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)


def _scaling(node_types: dict[str, Any], gcs_address: str) -> dict[str, Any]:
    """Ray's cluster configuration with its provider of pretended machines, which starts raylets here."""
    return {
        "cluster_name": "pretended",
        "max_workers": 8,
        "provider": {
            "type": "external",  # as `fake_multinode` it asks for a file that the wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs_address,
            "launch_multiple": True,
            "head_node_id": HEAD_NODE_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, **node_type} for name, node_type in node_types.items()},
        },
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in COMMAND_LISTS},
    }


def _node_ip() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


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

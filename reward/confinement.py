"""What a child process of the verifier may do: limits for all, isolation for programs written by a model.

Level 1, every child: own process group, address-space, CPU, file and core limits, no new privileges, scrubbed
environment, death with its parent. It bounds what trusted parsers do with hostile text.
Level 2, model-written programs: a system-call filter (`reward.seccomp`, required), no capabilities and, where the
kernel allows it, read access to libraries only (`reward.landlock`) and user, process, network, mount and IPC namespaces
of their own with a read-only file system.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from dataclasses import dataclass

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_NAMESPACES = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWUSER | _CLONE_NEWPID | _CLONE_NEWNET
_MS_NOSUID_NODEV_NOEXEC_RDONLY = 1 | 2 | 4 | 8
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_CAPABILITY_VERSION_3 = 0x20080522
_SPARE_CPU_S = 2
MAX_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one child."""

    memory_mb: int
    """Address space beyond what an idle child maps."""
    deadline_s: float
    """Wall clock per answer; the CPU limit follows it."""

    def memory_bytes(self) -> int:
        """Room in bytes."""
        return self.memory_mb * 2**20


def import_path() -> list[str]:
    """Where a process of ours finds modules: as this one does, and in its working directory, as Ray's actors do."""
    path = [entry or os.getcwd() for entry in sys.path]
    return path if os.getcwd() in path else [*path, os.getcwd()]


def scrubbed_environment() -> dict[str, str]:
    """All that a child sees of the environment: nothing of the parent's, so no token, key or password."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/nonexistent",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the (single-threaded) parent goes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)


def adopt_orphans() -> None:
    """Become the parent of what is left of dead children, so that it can be reaped: PID 1 of a container may not."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def apply_limits(limits: Limits, *, may_write: bool = False) -> int:
    """Level 1 for this process; the address-space limit in bytes is returned.

    `may_write` is for a process that hands files in memory to a program, which then loses that right itself.
    """
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    address_space = address_space_bytes() + limits.memory_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    if not may_write:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return address_space


def limit_cpu(limits: Limits) -> None:
    """Let this process use CPU for one more answer."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + limits.deadline_s) + _SPARE_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def address_space_bytes() -> int:
    """What this process maps now."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def peak_address_space_bytes() -> int:
    """The most this process ever mapped."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmPeak:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmPeak")


def enter_namespaces() -> bool:
    """Move this process's future children into namespaces of their own; False where the kernel does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_NAMESPACES):
        return False
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)
    return True


def seal_file_system() -> None:
    """In a mount namespace of one's own: everything read-only, and a /proc that shows only the own processes.

    Best effort: a container that masks parts of /proc forbids the second, and then only other limits hide them.
    """

    class MountAttributes(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace"))

    libc = ctypes.CDLL(None, use_errno=True)
    read_only = MountAttributes(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(read_only), ctypes.sizeof(read_only))
    libc.mount(b"proc", b"/proc", b"proc", _MS_NOSUID_NODEV_NOEXEC_RDONLY, None)


def drop_capabilities() -> None:
    """Give up root's powers; without them even root may not read another process's environment in /proc."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")
    hide_memory()


def hide_memory() -> None:
    """Make this process's memory and environment unreadable for others of its user that lack privileges."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def close_all_files(keep: set[int]) -> None:
    """Close every descriptor but these and the standard three, which become /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        if standard not in keep:
            os.dup2(null, standard)
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor not in keep:
            with contextlib.suppress(OSError):
                os.close(descriptor)

"""A system-call filter for programs written by a model: no network, no processes, no signals to others, no writes.

Works without privileges on any kernel with seccomp (containers included), which namespaces do not. A deny list, so
that ordinary library code keeps working; the calls of x86-64 and aarch64 are listed by number because libc is not
asked. Denied calls fail with EPERM, EROFS (writes) or ENOSYS (calls whose arguments a filter cannot see).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_X32_CALLS = 0x40000000
_OWNER_OF_A_FILE = (8, 10, 15)
"""fcntl F_SETOWN, F_SETSIG and F_SETOWN_EX: a file that is ready sends its owner, any process of the user, a signal."""
_OWNER_OF_A_SOCKET = (0x8901, 0x8902)
"""ioctl FIOSETOWN and SIOCSPGRP: the same."""


@dataclass(frozen=True, slots=True)
class _Calls:
    """System-call numbers of one architecture."""

    audit: int
    forbidden: tuple[int, ...]
    """Network, processes, other processes' memory and limits, namespaces, mounts, lasting IPC, tracing."""
    writing: tuple[int, ...]
    """Changes to the file system."""
    opens: tuple[tuple[int, int], ...]
    """(call, index of its flags)"""
    clone: int
    tgkill: int
    prlimit: int
    fcntl: int
    ioctl: int
    sendto: int


_COMMON_FORBIDDEN = (424, 434, 438)  # pidfd_send_signal, pidfd_open, pidfd_getfd
_WITHOUT_VISIBLE_ARGUMENTS = (425, 435, 437)  # io_uring_setup, clone3, openat2
_FCHMODAT2 = 452
_ARCHITECTURES = {
    "x86_64": _Calls(
        audit=0xC000003E,
        # socket connect fork vfork execve kill ptrace setpgid setsid setpriority sched_setscheduler prctl chroot mount
        # umount2 reboot tkill sched_setaffinity mq_open add_key request_key keyctl unshare rt_sigqueueinfo
        # rt_tgsigqueueinfo perf_event_open setns process_vm_readv process_vm_writev bpf execveat userfaultfd
        # shmget semget msgget sched_setparam sched_setattr ioprio_set migrate_pages move_pages bind sendmsg sendmmsg
        forbidden=(
            *(41, 42, 57, 58, 59, 62, 101, 109, 112, 141, 144, 157, 161, 165, 166, 169, 200, 203, 240, 248, 249, 250),
            *(272, 129, 297, 298, 308, 310, 311, 321, 322, 323, 29, 64, 68),
            *(142, 314, 251, 256, 279),
            *(49, 46, 307),
        ),
        # truncate ftruncate rename mkdir rmdir creat link unlink symlink chmod fchmod chown fchown lchown utime mknod
        # setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr utimes mkdirat mknodat fchownat futimesat
        # unlinkat renameat linkat symlinkat fchmodat utimensat renameat2
        writing=(
            *(76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 132, 133, 188, 189, 190, 197, 198, 199, 235),
            *(258, 259, 260, 261, 263, 264, 265, 266, 268, 280, 316),
        ),
        opens=((2, 1), (257, 2)),
        clone=56,
        tgkill=234,
        prlimit=302,
        fcntl=72,
        ioctl=16,
        sendto=44,
    ),
    "aarch64": _Calls(
        audit=0xC00000B7,
        # as above, without the calls that this architecture never had
        forbidden=(
            *(198, 203, 221, 129, 117, 154, 157, 140, 119, 167, 51, 40, 39, 142, 130, 122, 180, 217, 218, 219, 97),
            *(138, 240, 241, 268, 270, 271, 280, 281, 282, 194, 190, 186),
            *(118, 274, 30, 238, 239),
            *(200, 211, 269),
        ),
        writing=(45, 46, 38, 34, 33, 35, 36, 37, 52, 53, 54, 55, 5, 6, 7, 14, 15, 16, 88, 276),
        opens=((56, 2),),
        clone=220,
        tgkill=131,
        prlimit=261,
        fcntl=25,
        ioctl=29,
        sendto=206,
    ),
}


def is_supported() -> bool:
    """Whether this machine's architecture and kernel can run the filter."""
    return platform.machine() in _ARCHITECTURES and os.path.exists("/proc/sys/kernel/seccomp/actions_avail")


def install() -> None:
    """Filter this process and everything it starts, for good. Raises OSError where the kernel refuses."""
    calls = _ARCHITECTURES.get(platform.machine())
    if calls is None:
        raise OSError(errno.ENOSYS, f"no system-call filter for {platform.machine()}")
    program = _program(calls, os.getpid())
    code = ctypes.create_string_buffer(b"".join(program), len(program) * 8)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    described = Program(len(program), ctypes.cast(code, ctypes.c_void_p))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(described), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


def _program(calls: _Calls, own_pid: int) -> list[bytes]:
    """Classic BPF: architecture, then call by call, then allow; jumps are relative to the next instruction."""
    lines = [
        _line(_LOAD, _ARCHITECTURE),
        _line(_JUMP_EQUAL, calls.audit, 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
        _line(_JUMP_AT_LEAST, _X32_CALLS, 0, 1),
        _line(_RETURN, _KILL),
    ]
    lines += _deny((*calls.forbidden, *_COMMON_FORBIDDEN), errno.EPERM)
    lines += _deny((*calls.writing, _FCHMODAT2), errno.EROFS)
    lines += _deny(_WITHOUT_VISIBLE_ARGUMENTS, errno.ENOSYS)
    for call, index in calls.opens:
        lines += _deny_by_argument(call, index, [_line(_JUMP_BITS, _WRITING, 0, 1)], errno.EROFS)
    lines += _deny_by_argument(calls.clone, 0, [_line(_JUMP_BITS, _CLONE_THREAD, 1, 0)], errno.EPERM)
    lines += _deny_by_argument(calls.tgkill, 0, [_line(_JUMP_EQUAL, own_pid, 1, 0)], errno.EPERM)
    lines += _deny_by_argument(calls.prlimit, 0, [_line(_JUMP_EQUAL, 0, 1, 0)], errno.EPERM)
    lines += _deny_by_argument(calls.sendto, 5, [_line(_JUMP_EQUAL, 0, 1, 0)], errno.EPERM)
    for call, requests in ((calls.fcntl, _OWNER_OF_A_FILE), (calls.ioctl, _OWNER_OF_A_SOCKET)):
        lines += _deny_by_argument(call, 1, [_line(_JUMP_EQUAL, request, 0, 1) for request in requests], errno.EPERM)
    return [*lines, _line(_RETURN, _ALLOW)]


def _line(operation: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, operand)


def _deny(numbers: tuple[int, ...], code: int) -> list[bytes]:
    refusal = _line(_RETURN, _ERRNO | code)
    return [line for number in numbers for line in (_line(_JUMP_EQUAL, number, 0, 1), refusal)]


def _deny_by_argument(number: int, index: int, conditions: list[bytes], code: int) -> list[bytes]:
    """Refuse the call where one of the conditions on the low half of an argument falls through to the next line."""
    refusal = _line(_RETURN, _ERRNO | code)
    return [
        _line(_JUMP_EQUAL, number, 0, 2 + 2 * len(conditions)),
        _line(_LOAD, _FIRST_ARGUMENT + 8 * index),
        *(line for condition in conditions for line in (condition, refusal)),
        _line(_RETURN, _ALLOW),
    ]

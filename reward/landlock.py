"""Path restrictions for programs written by a model: they may read Python and the system's libraries, nothing else.

Needs Linux 5.13 and no privileges, so it also works in containers without namespaces, where the environment of other
processes of the same user, mounted secrets and the run's own files would otherwise be readable.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_PR_SET_NO_NEW_PRIVS = 38
_PATH_BENEATH = 1
_ALL_OF_FIRST_VERSION = (1 << 13) - 1
_READ_FILE, _READ_DIRECTORY = 1 << 2, 1 << 3
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom")


def is_supported() -> bool:
    """Whether the kernel offers it."""
    return bool(ctypes.CDLL(None).syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG) >= 1)


def readable_paths() -> list[str]:
    """The interpreter, its packages and the system's libraries; not the working directory, /proc or /tmp."""
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    return [path for path in dict.fromkeys((sys.prefix, sys.base_prefix, *packages, *_SYSTEM)) if os.path.exists(path)]


def restrict(paths: list[str]) -> None:
    """Let this process read beneath `paths` only, and write nowhere, for good. Raises OSError where that fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    handled = ctypes.create_string_buffer(struct.pack("=Q", _ALL_OF_FIRST_VERSION), 8)
    ruleset = libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(8), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for path in paths:
        allowed = _READ_FILE | (_READ_DIRECTORY if os.path.isdir(path) else 0)
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, descriptor), 12)
        failed = libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
        os.close(descriptor)
        if failed:
            raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(_RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)

"""Does `reward.user_rule` exist? Asked of a process of its own, before any actor starts.

The module is the user's: the driver never imports it, and what it prints or breaks stays in that process. Secrets of
this process are not in its environment, as they are not in that of a verifier's child.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

from orchestration.config import ConfigError
from reward.confinement import import_path, scrubbed_environment

LOAD_DEADLINE_S = 120.0
MAX_REASON_CHARS = 300
_FORM = re.compile(r"\w+(\.\w+)*:\w+")
_LOAD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from reward.child import load_user_rule
if not callable(load_user_rule(sys.argv[2])):
    raise TypeError("it is no function")
"""


def check_user_rule(name: str) -> None:
    """Load `module:function` once; raises `ConfigError` where that fails."""
    if not _FORM.fullmatch(name):
        raise ConfigError(f"reward.user_rule={name}: write it as module:function")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, json.dumps(import_path()), name],
            env=scrubbed_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LOAD_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"reward.user_rule={name}: was not loaded within {LOAD_DEADLINE_S:.0f} s") from None
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ConfigError(
            f"reward.user_rule={name}: cannot be loaded ({reason[-MAX_REASON_CHARS:]}); correct the name, or put its "
            "module where Python finds it (PYTHONPATH, or the directory of the run)"
        )

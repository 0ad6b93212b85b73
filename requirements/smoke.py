"""The last step of `make install`: import what is hard to install, and say what to do where that fails."""

from __future__ import annotations

import importlib
import os
import sys

CPU_HELP = """
These locks name `torch==2.13.0` without a build. On a machine without CUDA pip must find a CPU build of it: the
ordinary Linux build needs CUDA libraries that the CPU lock leaves out. Point pip at the index of CPU builds that
pytorch.org's installation page names for your platform, for example

    export PIP_EXTRA_INDEX_URL=<index of CPU builds>     (or PIP_FIND_LINKS=<folder with a torch +cpu wheel>)
    make clean install

On a machine with CUDA use `make clean install LOCK=requirements/cuda.lock`.
"""


def main() -> int:
    """0 where torch and vllm import, 1 with advice where they do not."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for name in ("torch", "vllm"):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name} was installed but does not import: {error}\n{CPU_HELP}", file=sys.stderr)
            return 1
        print(f"{name} {module.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

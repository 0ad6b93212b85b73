"""`python -m orchestration` is the `softgrpo` command: a submitted job needs nothing of ours installed."""

from __future__ import annotations

import sys

from orchestration.cli import main

if __name__ == "__main__":
    sys.exit(main())

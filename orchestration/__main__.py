"""`python -m orchestration` is the `softgrpo` command: a submitted job needs nothing of ours installed."""

from __future__ import annotations

import sys

from orchestration.cli import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        error.add_note(
            f"{sys.executable} has no {error.name}: install the dependencies there. A submitted job takes the first "
            "`python` on the PATH that `ray start` saw: activate the environment before you start Ray"
        )
        raise

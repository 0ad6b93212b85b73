"""Start-up without what others import on the off chance: it costs an actor seconds of processor time and memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("mlflow", "sklearn")
"""DeepSpeed imports MLflow for its autotuner, transformers imports scikit-learn for assisted generation; both do
without where it is not installed."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Inside, importing an `UNUSED` package fails as if it were not installed, unless it has been imported before.

    For a process of our own while it imports its engine: it holds for all threads.
    """
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: the import system's own sign for absent
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]

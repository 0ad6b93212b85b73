"""Start-up without what others import on the off chance, and without looking for garbage in what stays for good.

Both cost an actor seconds of processor time: a third of the imports of a learner rank, a fifth of an engine's.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("mlflow", "sklearn")
"""DeepSpeed imports MLflow for its autotuner, transformers imports scikit-learn for assisted generation; both do
without where it is not installed."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Inside, importing an `UNUSED` package fails as if it were not installed, unless it has been imported before.

    For an actor while it starts: it holds for all threads, and the garbage collector rests.
    """
    collects = gc.isenabled()
    gc.disable()
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: the import system's own sign for absent
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if collects:
            gc.enable()

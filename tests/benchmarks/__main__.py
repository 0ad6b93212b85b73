"""`python -m tests.benchmarks [NAME ...] --json FILE`: run benchmarks and print their ratios.

NAME is a benchmark (`head`) or a row (`head/soft`); none runs all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import tests.benchmarks
from tests.benchmarks.row import Row

NOT_BENCHMARKS = {"row", "__main__"}


def benchmark_names() -> list[str]:
    """Modules of this package that measure something."""
    found = (module.name for module in pkgutil.iter_modules(tests.benchmarks.__path__))
    return sorted(name for name in found if name not in NOT_BENCHMARKS and not name.startswith("_"))


def main() -> int:
    """Run, print, write; exit code 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    known = benchmark_names()
    wanted = arguments.names or known
    unknown = [name for name in wanted if name.split("/")[0] not in known]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(known)}")
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported, by whichever benchmark is first
    rows: list[Row] = []
    for benchmark in known:
        names = {name for name in wanted if name.split("/")[0] == benchmark}
        if names:
            module = importlib.import_module(f"tests.benchmarks.{benchmark}")
            before, started = len(rows), time.monotonic()
            rows += module.run(None if benchmark in names else names)
            for row in rows[before:]:
                verdict, sign = "ok  " if row.ok else "MISS", "<=" if row.at_most else ">="
                print(f"{verdict} {row.name}: {row.ratio:.3g} (target {sign} {row.target:g}) {row.detail}")
            print(f"{benchmark}: {(time.monotonic() - started) / 60:.1f} minutes")
            if arguments.json:
                listing = [{**asdict(row), "ok": row.ok} for row in rows]
                arguments.json.write_text(json.dumps(listing, indent=2), encoding="utf-8")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

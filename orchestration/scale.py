"""`softgrpo scale`: change the size of a running run's rollout pool.

    scale --> control.json in the run directory --> the driver looks once a second --> RolloutPool.resize

A file needs no port and works wherever the run directory is shared; the driver answers in its log.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestration.config import ConfigError
from orchestration.run_state import write_atomically

logger = logging.getLogger(__name__)

CONTROL = "control.json"
LOOK_EVERY_S = 1.0
MAX_ACTORS = 1024


def main(arguments: Sequence[str]) -> int:
    """Ask the driver of a run for another number of rollout actors."""
    parser = argparse.ArgumentParser(prog="softgrpo scale", description="Change the rollout pool of a running run.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run directory, e.g. outputs/demo")
    parser.add_argument("--rollout", type=int, required=True, metavar="N", help="number of rollout actors")
    options = parser.parse_args(arguments)
    if not 1 <= options.rollout <= MAX_ACTORS:
        raise ConfigError(f"--rollout={options.rollout}: give a number from 1 to {MAX_ACTORS}")
    if not _is_running(options.run):
        raise ConfigError(f"--run={options.run}: no driver runs there; set rollout.num_actors when you start it")
    write_atomically(options.run / CONTROL, json.dumps({"rollout_actors": options.rollout}).encode())
    print(f"asked the driver of {options.run} for {options.rollout} rollout actors; its driver.log says when")
    return 0


async def follow_requests(run_dir: Path, resize: Callable[[int], None]) -> None:
    """Call `resize` for every new request; a malformed one is logged and ignored. Runs until cancelled."""
    path = run_dir / CONTROL
    path.unlink(missing_ok=True)  # a request to an earlier attempt
    seen = b""
    readable = True
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            if readable:  # once per outage
                logger.error("%s: cannot be read (%s), trying again", path, error)
            readable = False
            continue
        readable = True
        if text != seen:
            seen = text
            _follow(path, text, resize)


def _follow(path: Path, text: bytes, resize: Callable[[int], None]) -> None:
    try:
        size = int(json.loads(text)["rollout_actors"])
    except (ValueError, KeyError, TypeError) as error:
        logger.error("%s is not a request: %s", path, error)
        return
    if not 1 <= size <= MAX_ACTORS:
        logger.error("%s is not a request: rollout_actors=%d; give a number from 1 to %d", path, size, MAX_ACTORS)
        return
    logger.info("rollout pool: %d actors were asked for", size)
    resize(size)


def _is_running(run_dir: Path) -> bool:
    try:
        with (run_dir / "driver.lock").open("r", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False

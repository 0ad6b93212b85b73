"""What a person sees of a run: one line on a terminal that is renewed, one line per step elsewhere."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from orchestration.progress import Progress

METRICS = {
    "reward/mean": 0.625,
    "rollout/length_mean": 12.25,
    "staleness/mean": 0.5,
    "staleness/max": 2,
    "throughput/tokens_per_s": 1234.4,
    "idle/rollout": 0.1,
    "idle/verifier": 0.9,
    "idle/learner": 0.25,
    "queue/rollout": 3,
    "queue/verifier": 0,
    "queue/learner": 5,
}


class Terminal(io.StringIO):
    """A standard error that a person looks at."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_with_the_state_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress("my run", 3, 40)
    progress.advance(4, METRICS)
    progress.close()
    last = next(line for line in reversed(terminal.getvalue().splitlines()) if "my run" in line)
    for part in ("4/40", "staleness 0.5 (max 2)", "idle rollout 10% verifier 90% learner 25%", "3/0/5"):
        assert part in last


def test_elsewhere_every_step_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress("my run", 3, 40)
    with caplog.at_level(logging.INFO):
        progress.advance(4, METRICS | {"failures/rollout_restarts": 2, "groups/dropped/age": 1})
    progress.close()
    (line,) = caplog.messages
    assert line.startswith("step 4/40  reward 0.625  length 12.2")
    assert line.endswith("2 restarts  1 dropped")

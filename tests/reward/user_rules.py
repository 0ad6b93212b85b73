"""Rules as a user would write them."""

from __future__ import annotations

import os
import time
from typing import Any

from reward.extraction import Answer


def length_of_answer(answer: Answer, gold: Any) -> float:
    """Reward by length; raises on request."""
    if "fail" in answer.answer_text:
        raise KeyError("the user's own mistake")
    return len(answer.answer_text) / float(gold)


def double(answer: Answer, gold: Any) -> float:
    """Do what the answer says, badly."""
    commands = {
        "exit": lambda: os._exit(3),
        "kill": lambda: os.kill(os.getpid(), 9),
        "nan": lambda: float("nan"),
        "sleep": lambda: time.sleep(60),
    }
    action = commands.get(answer.answer_text)
    return float(action()) if action else 2.0 * float(gold)


def show_environment(answer: Answer, gold: Any) -> float:
    """Fail with everything that a child can see of secrets."""
    raise ValueError(f"env={dict(os.environ)} files={os.listdir('/proc/self/fd')}")

"""The model that a run starts from, where that is not the recipe's as it is."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import ray

from orchestration.model_facts import read_model_facts
from orchestration.prompt_tokenizer import PromptTokenizer
from orchestration.validate import Resolved

logger = logging.getLogger(__name__)


def with_end_of_thinking(resolved: Resolved, prepared: Path) -> Resolved:
    """The same run from a copy of the model that has the end-of-thinking token, where the recipe asks to add it."""
    model, tokenizer = resolved.config.model, resolved.tokenizer
    if not model.add_end_of_thinking or tokenizer is None or tokenizer.token_id(str(model.end_of_thinking)) is not None:
        return resolved
    if not (prepared / "config.json").is_file():
        from learner.add_token import add_token

        logger.info("adding %s to the model's vocabulary", model.end_of_thinking)
        task = ray.remote(num_cpus=1)(add_token).remote(resolved.model_dir, str(model.end_of_thinking), prepared)
        ray.get(task, timeout=resolved.config.learner.startup_timeout_s)
    facts = read_model_facts(prepared)
    return replace(resolved, model_dir=prepared, model=facts, tokenizer=PromptTokenizer(prepared))

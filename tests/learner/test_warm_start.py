"""Warm start: learns a toy, continues until its gate is passed, and leaves a loadable checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.warm_start import IGNORED, Gate, WarmStartError, collate, warm_start


def successor_examples(count: int, offset: int = 0) -> list[tuple[list[int], list[int]]]:
    """From a token, count up by three: learnable by looking at the previous token only."""
    starts = [10 + (offset + i) % 40 for i in range(count)]
    return [([1, start], [start + 3, start + 6, start + 9, 2]) for start in starts]


def gate(min_accuracy: float, **options: int) -> Gate:
    judged = [(prompt, response, [True, True, True, False]) for prompt, response in successor_examples(40)]
    return Gate(judged, min_accuracy, **options)


def test_learns_a_toy_and_saves_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = warm_start(tiny_model_dir, tmp_path, successor_examples(40), 60, 32, 1e-2, 0, gate(0.9))
    assert report.accuracy is not None and report.accuracy >= 0.9
    assert report.loss < 0.5
    assert report.steps >= 60
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert model(torch.tensor([[1, 20]])).logits[0, -1].argmax().item() == 23
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_same_seed_same_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    runs = [warm_start(tiny_model_dir, tmp_path / str(i), successor_examples(40), 3, 8, 1e-2, 7) for i in range(2)]
    weights = [load_file(Path(run.path) / "model.safetensors") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_goes_on_in_blocks_and_then_gives_up(tiny_model_dir: Path, tmp_path: Path) -> None:
    examples = successor_examples(40)
    going_on = warm_start(tiny_model_dir, tmp_path, examples, 5, 32, 1e-2, 0, gate(0.9, block_steps=40, max_steps=400))
    assert going_on.steps > 5 and (going_on.steps - 5) % 40 == 0
    with pytest.raises(WarmStartError, match="after 8 updates"):
        warm_start(tiny_model_dir, tmp_path, examples, 2, 8, 1e-9, 0, gate(0.9, block_steps=3, max_steps=8))


def test_an_iterator_that_ends_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(WarmStartError, match="ran out"):
        warm_start(tiny_model_dir, tmp_path, iter(successor_examples(10)), 2, 8, 1e-3, 0)


def test_only_responses_are_labelled() -> None:
    ids, mask, labels = collate([([1, 5], [6, 7, 8]), ([1], [9])])
    assert labels.tolist() == [[IGNORED, IGNORED, 6, 7, 8], [IGNORED, 9, IGNORED, IGNORED, IGNORED]]
    assert mask.sum(-1).tolist() == [5, 2]
    assert ids[1].tolist() == [1, 9, 0, 0, 0]

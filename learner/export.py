"""The policy's weights under their Hugging Face names: for publishing to the rollout and for export to disk.

A tied output matrix is left out, as in a safetensors checkpoint; low-rank adapters are merged into the layer they
adapt; partitioned parameters (ZeRO-3) are gathered one by one, so these iterators are collective.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learner.model import PolicyModel, causal_model
from learner.spec import LearnerError

BASE_LAYER = ".base_layer"
ADAPTER = "default"


def named_weights(policy: PolicyModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the checkpoint once, whole, in the compute type; valid until the next training step.

    A gathered one is freed when its tensor is dropped: a shard holds several of them, never all.
    """
    model = causal_model(policy.language_model)
    adapted = {f"{name}{BASE_LAYER}.weight": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        layer = adapted.get(name)
        adapters = [] if layer is None else [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
        with torch.no_grad(), whole([parameter, *adapters]):
            weight = parameter.detach()
            if layer is not None:
                low, high = (adapter.detach().float() for adapter in adapters)
                weight = (weight.float() + layer.scaling[ADAPTER] * (high @ low)).to(weight.dtype)
            yield name.replace(BASE_LAYER, ""), weight


def finite(version: int, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights; raises `LearnerError` after the last one, with its name, if one has a NaN or an infinity.

    At the end, because it is the end that makes a version visible, and one look costs a GPU less than one per tensor.
    """
    names, extremes = [], []
    for name, weight in weights:
        if weight.numel():
            names.append(name)
            extremes.append(torch.stack(weight.aminmax()).float())  # one pass, and a NaN wins
        yield name, weight
    if not extremes:
        return
    sound = torch.stack(extremes).isfinite().all(dim=1).tolist()
    if not all(sound):
        raise LearnerError(
            f"version {version} is not published: {names[sound.index(False)]} and {sound.count(False) - 1} more of "
            f"{len(sound)} tensors are not finite; look at learner/grad_norm_max and objective/ratio_max, and lower "
            "learner.learning_rate"
        )


def whole(parameters: list[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """Context in which partitioned parameters have their full values; nothing to do for ordinary ones."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
    return context


def export_checkpoint(policy: PolicyModel, model_path: str, directory: Path, *, writes: bool) -> None:
    """Write config, tokenizer and safetensors that `transformers` and vLLM load; collective, one rank `writes`."""
    weights = _copied(named_weights(policy), writes)
    if not writes:
        return
    from transformers import AutoTokenizer

    model = causal_model(policy.language_model)
    model.save_pretrained(directory, state_dict=weights)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(directory)
    sync_directory(directory)


def save_weights(weights: Iterator[tuple[str, Tensor]], path: Path, *, writes: bool) -> None:
    """Write named weights as one safetensors file; collective, one rank `writes`."""
    copied = _copied(weights, writes)
    if writes:
        from safetensors.torch import save_file

        save_file(copied, path)


def _copied(weights: Iterator[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """CPU copies on the rank that keeps them; the others only take part in the gathering."""
    copied = {}
    for name, weight in weights:
        if keep:
            copied[name] = weight.to("cpu", copy=True).contiguous()
    return copied


def sync_directory(directory: Path) -> None:
    """fsync every file below `directory` and the folders themselves."""
    for path in [directory, *directory.rglob("*")]:
        if path.is_file() or path.is_dir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

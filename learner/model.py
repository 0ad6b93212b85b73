"""The policy as the learner runs it: a Hugging Face causal model fed with packed rows and soft tokens.

    ReplayBatch --PolicyInput--> embeddings [L, d] --body--> hidden [L, d] --rows--> [N, d] --PolicyHead--> scores

The embedding table and the output matrix are read by two small modules that own them (also when they are tied, and
under ZeRO-3, where a parameter is only whole inside the forward and backward of a module that owns it).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learner.attention import attention_inputs, use_packed_attention
from learner.embedding import replay_embeddings
from learner.packing import ReplayBatch
from learner.spec import LearnerError, LearnerSpec

HeadFunction = Callable[[Tensor, Tensor], Any]
"""(hidden [N, d], output weight [V, d]) -> anything made of tensors."""


class PolicyInput(nn.Module):
    """Input embeddings of packed rows: ordinary tokens, and mixtures where the input was a soft token."""

    def __init__(self, weight: nn.Parameter, differentiate_mixtures: bool) -> None:
        super().__init__()
        self.weight = weight
        self.differentiate_mixtures = differentiate_mixtures
        self.vocab_size = weight.shape[0]

    def forward(self, batch: ReplayBatch) -> Tensor:
        """-> [L, d] in the model's dtype; no gradient reaches the table through mixtures unless asked for."""
        return replay_embeddings(
            self.weight,
            batch.input_ids,
            batch.mixture_rows,
            batch.mixture_ids,
            batch.mixture_weights,
            differentiable_mixtures=self.differentiate_mixtures,
        )


class PolicyHead(nn.Module):
    """Runs a head function on the output matrix inside a module that owns it."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, score: HeadFunction) -> Any:
        return score(hidden, self.weight)


class PolicyModel(nn.Module):
    """A causal language model that scores packed replay batches."""

    def __init__(self, language_model: nn.Module, *, differentiate_soft_inputs: bool = False) -> None:
        super().__init__()
        self.language_model = language_model
        self.inputs = PolicyInput(language_model.get_input_embeddings().weight, differentiate_soft_inputs)
        self.head = PolicyHead(language_model.get_output_embeddings().weight)

    def forward(self, batch: ReplayBatch, score: HeadFunction) -> Any:
        """Hidden states of the scored rows [N, d], handed to `score` with the output matrix."""
        body = causal_model(self.language_model).base_model
        hidden = body(
            inputs_embeds=self.inputs(batch).unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
            **attention_inputs(batch.cu_seqlens),
        )[0].squeeze(0)
        return self.head(hidden.index_select(0, batch.rows), score)


def causal_model(language_model: nn.Module) -> Any:
    """The transformers model itself, also inside a peft wrapper."""
    return language_model.get_base_model() if hasattr(language_model, "peft_config") else language_model


def load_policy(spec: LearnerSpec, *, trainable: bool = True) -> PolicyModel:
    """The checkpoint of `spec` as a policy on the spec's device, in the spec's compute type.

    The policy is in evaluation mode, also where it is trained: without dropout, as the engine runs it. Raises
    `LearnerError` if the embedding is smaller than the vocabulary that the rollout engine uses, if the head has a bias
    (which candidate-only scoring leaves out), or if packed sequences would attend to each other.
    """
    from transformers import AutoModelForCausalLM

    path = spec.model_path if not Path(spec.model_path).is_dir() else str(Path(spec.model_path).resolve())
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code
    )
    rows = model.get_input_embeddings().weight.shape[0]
    if spec.expected_vocab_size is not None and rows < spec.expected_vocab_size:
        raise LearnerError(
            f"{spec.model_path}: the embedding has {rows} rows, the tokenizer and engine use {spec.expected_vocab_size}"
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise LearnerError(f"{spec.model_path}: an output layer with a bias is not supported")
    use_packed_attention(model.to(spec.device))
    if trainable and spec.gradient_checkpointing:
        _checkpoint_activations(model, spec.model_path)
    if trainable and spec.lora_rank:
        model = add_lora(model, spec.lora_rank)
    policy = PolicyModel(model, differentiate_soft_inputs=spec.differentiate_soft_inputs)
    if not trainable:
        policy.requires_grad_(False).eval()
    return policy.to(spec.device)  # adapters were made on the CPU


def _checkpoint_activations(model: Any, model_path: str) -> None:
    """Keep only the inputs of the layers for the backward pass, which runs them again.

    Transformers does so in training mode alone. Only what checkpoints is set to it, the modules inside stay in
    evaluation mode; as a layer may drop out by itself, a model with dropout is refused.
    """
    settings = model.config.get_text_config().to_dict()
    dropouts = [
        f"{name}={value}"
        for name, value in settings.items()
        if "drop" in name and not name.startswith(("classifier", "summary")) and value
    ]
    if dropouts:
        raise LearnerError(
            f"{model_path}: its config.json has {', '.join(dropouts)}, with which learner.gradient_checkpointing would "
            "score a policy that the engine does not run; set them to 0 there, or the checkpointing to false"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """Low-rank adapters on every linear layer of the body; alpha is twice the rank, dropout is off."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)

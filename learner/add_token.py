"""Give a model a single end-of-thinking token that its tokenizer lacks (Llama has none)."""

from __future__ import annotations

from pathlib import Path


def add_token(model_dir: Path, token: str, out_dir: Path) -> int:
    """Write the checkpoint with `token` added to the tokenizer and the embeddings resized; returns the token's id.

    The new row starts as the mean of the embeddings of the token's former pieces, so that the model writes it where it
    would have written the first of them. An embedding that has spare rows is not resized.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    pieces = tokenizer.encode(token, add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", use_safetensors=True)
    tokenizer.add_tokens([token], special_tokens=True)
    new_id = int(tokenizer.convert_tokens_to_ids(token))
    if new_id >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(new_id + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight[new_id] = layer.weight[pieces].mean(dim=0)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return new_id

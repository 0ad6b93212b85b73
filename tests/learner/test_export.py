"""A checkpoint that the learner exports is an ordinary one: stock vLLM serves it and scores as transformers does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learner.trainer import Trainer
from tests.learner.handmade import learner_spec, make_group

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.usefixtures("single_rank")]

PROMPT = [6, 17, 40, 9]
NUM_TOKENS = 12
STOCK_VLLM = """
import json, os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
from vllm import LLM, SamplingParams
limits = {"max_model_len": 64, "max_num_seqs": 2, "enforce_eager": True, "skip_tokenizer_init": True}
model = LLM(model=sys.argv[1], dtype="float32", **limits)
settings = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), logprobs=1, detokenize=False, ignore_eos=True)
(answer,) = model.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], settings)[0].outputs
scores = [position[token].logprob for token, position in zip(answer.token_ids, answer.logprobs)]
print("RESULT", json.dumps([list(answer.token_ids), scores]))
"""


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_stock_vllm_serves_an_export(lora_rank: int | None, tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = Trainer(learner_spec(tiny_model_dir, lora_rank=lora_rank, learning_rate=1e-2), rank=0)
    trainer.train([make_group(0)], 0)
    trainer.export(tmp_path)
    command = [sys.executable, "-c", STOCK_VLLM, str(tmp_path), json.dumps(PROMPT), str(NUM_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    tokens, scores = json.loads(done.stdout.split("RESULT ")[1])
    assert len(tokens) == NUM_TOKENS

    def log_probs(path: str | Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            rows = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        return rows.gather(-1, torch.tensor(tokens)[:, None])[:, 0]

    torch.testing.assert_close(torch.tensor(scores), log_probs(tmp_path), rtol=0, atol=1e-4)
    assert (torch.tensor(scores) - log_probs(tiny_model_dir)).abs().max() > 1e-2, "what was served is the trained model"

"""Fixtures shared by all tests: a tiny model, a private Ray cluster, the optional shared folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    VLLM_NO_USAGE_STATS="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_AUTH_MODE="token",  # read once, when ray is imported, which may be while tests are collected
)

import pytest

ROOT = Path(__file__).resolve().parent.parent


TOGETHER = {
    **{"chaos": "runs", "end_to_end": "runs", "learner": "learner"},
    **dict.fromkeys(("test_doctor.py", "test_metrics_export.py", "test_submit.py"), "head"),
}
"""Folders and files of which one process of `make test` runs all tests: whole runs, two at a time, starve each other
into their deadlines; those of the learner share two ranks, some of the driver's a Ray head. Of other folders it takes a
file at a time."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests of `pytest -n 2` stay together; the order is that of a run in one process."""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.split("::", 1)[0])
            return TOGETHER.get(path.name) or TOGETHER.get(path.parent.name, str(path))

    config.option.loadscopereorder = False  # most tests first would leave the longest, whole runs, for the end
    return Lanes(config, log)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Golden vectors, schemas and data that are not part of the product; tests that need them skip without."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("../shared is absent: golden vectors, schemas and benchmark questions cannot be read")
    return path


@pytest.fixture(scope="session", autouse=True)
def private_ray_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray's token authentication on, with a token of our own: tests neither read nor leave one in the real home."""
    token = tmp_path_factory.mktemp("ray-token") / "auth_token"
    token.write_text("softgrpo-tests-" + os.urandom(16).hex(), encoding="utf-8")
    saved = {key: os.environ.get(key) for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    yield
    for key, value in saved.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A private local Ray cluster with 8 logical CPUs for the whole session."""
    import ray

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=512 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 Llama-layout model (V=64, d=32, 2 layers, tied embeddings) with tokenizer and chat template."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny-model"))


def build_tiny_model(directory: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Write the model of `tiny_model_dir`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.tiny_models import spread_weights, tiny_llama

    special = ["<pad>", "<bos>", "<eos>", "<think>", "</think>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(64 - len(special)))])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    torch.manual_seed(seed)
    # Heads of 32 are the smallest that attention on a CPU supports in vLLM.
    model = LlamaForCausalLM(tiny_llama(head_dim=32, tie_word_embeddings=tied)).to(torch.float32)
    spread_weights(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

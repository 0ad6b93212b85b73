"""A vLLM that does not fit is refused with the name of what is missing; a silent discrete fall-back is impossible."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout import vllm_soft
from rollout.engine import EngineError, SoftEngine
from rollout.vllm_soft import SeamError
from tests.conftest import ROOT
from tests.rollout.conftest import EngineFactory, base_spec

pytestmark = pytest.mark.slow


def test_the_installed_vllm_fits() -> None:
    vllm_soft.probe_seams()


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.1")
    with pytest.raises(SeamError, match=r"vLLM 0\.99\.1 is not among the tested versions 0\.32\.x"):
        vllm_soft.probe_seams()


def test_every_missing_seam_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.request import Request
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    monkeypatch.setattr(DefaultModelState, "add_request", lambda self, index: None)
    monkeypatch.setattr(Sampler, "__call__", lambda self, logits, batch, extra: None)
    monkeypatch.setattr(Request, "update_block_hashes", lambda self: None)
    monkeypatch.setattr(
        vllm_soft, "_MEMBERS", (*vllm_soft._MEMBERS, ("vllm.v1.outputs", "LogprobsTensors", ("renamed",)))
    )
    with pytest.raises(SeamError) as caught:
        vllm_soft.probe_seams()
    message = str(caught.value)
    assert "DefaultModelState.add_request takes (index), expected (req_index, new_req_data)" in message
    assert "Sampler.__call__ takes (logits, batch, extra), expected (logits, input_batch)" in message
    assert "_block_hasher is gone" in message
    assert "LogprobsTensors has no renamed" in message


def test_the_v1_runner_is_refused(parity_model_dir: Path) -> None:
    """In its own process, with the variable that a user might have set for other models."""
    code = (
        "from rollout.engine import SoftEngine\n"
        "from tests.rollout.conftest import base_spec\n"
        f"SoftEngine(base_spec({str(parity_model_dir)!r}))\n"
    )
    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "VLLM_USE_V2_MODEL_RUNNER=0 in the environment: this engine needs 1; unset it" in done.stderr


def test_the_model_itself_refuses_the_v1_runner() -> None:
    model = vllm_soft._soft_class("LlamaForCausalLM")
    with pytest.raises(SeamError, match="V1, which would silently roll out discrete tokens"):
        model(vllm_config=SimpleNamespace(use_v2_model_runner=False))


def configuration(**changes: Any) -> SimpleNamespace:
    parallel = {"pipeline_parallel_size": 1, "enable_batch_sharded_sampling": False}
    top = {"speculative_config": None, "lora_config": None}
    top |= {name: value for name, value in changes.items() if name in top}
    parallel |= {name: value for name, value in changes.items() if name not in top}
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **top)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA adapters .publish merged weights instead"),
        ({"enable_batch_sharded_sampling": True}, "batch-sharded sampling"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
    ],
)
def test_unsupported_engine_features_are_refused(changes: dict[str, Any], message: str) -> None:
    vllm_soft.refuse_unsupported(configuration())
    with pytest.raises(SeamError, match=message):
        vllm_soft.refuse_unsupported(configuration(**changes))


def test_a_real_engine_with_adapters_does_not_start(parity_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SoftEngine._engine_arguments
    monkeypatch.setattr(
        SoftEngine, "_engine_arguments", lambda self, name: arguments(self, name) | {"enable_lora": True}
    )
    with pytest.raises(SeamError, match="LoRA adapters"):
        SoftEngine(base_spec(parity_model_dir))


@pytest.mark.parametrize(
    "parameters",
    [{"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"logit_bias": {3: 1.0}}, {"bad_words": ["x"]}, {"n": 2}],
    ids=lambda value: next(iter(value)),
)
def test_logit_processing_while_thinking_is_refused(parameters: dict[str, Any]) -> None:
    from vllm import SamplingParams

    vllm_soft.refuse_parameters("r", SamplingParams())
    with pytest.raises(ValueError, match=f"request r: {next(iter(parameters))}=.* cannot be applied while thinking"):
        vllm_soft.refuse_parameters("r", SamplingParams(**parameters))


def test_transformed_embeddings_are_caught(start_engine: EngineFactory) -> None:
    """Gemma-like models scale what they look up: a mixture of raw rows would be a wrong input."""
    with start_engine() as engine:
        state = engine._core.engine_core.model_executor.driver_worker.worker.model_runner.model_state
        state.check_embedding()
        lookup = state.model.embed_input_ids
        state.model.embed_input_ids = lambda ids: lookup(ids) * 8.0
        with pytest.raises(SeamError, match="a one-hot mixture differs from embed_input_ids"):
            state.check_embedding()
        del state.model.embed_input_ids
        assert torch.equal(state.model.embed_input_ids(torch.tensor([3])), lookup(torch.tensor([3])))


def test_a_discrete_fall_back_does_not_start(parity_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If soft requests came back discrete for whatever reason, the start-up probe would refuse to serve."""
    sampling_params = SoftEngine._sampling_params

    def discrete(self: SoftEngine, request: Any, *rest: Any) -> Any:
        params = sampling_params(self, request, *rest)
        params.extra_args[vllm_soft.REQUEST_KEY]["soft"] = False
        return params

    monkeypatch.setattr(SoftEngine, "_sampling_params", discrete)
    with pytest.raises(EngineError, match="came back with discrete tokens: the soft path is not active"):
        SoftEngine(base_spec(parity_model_dir))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    import json

    from tests.conftest import build_tiny_model

    directory = build_tiny_model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="MambaForCausalLM is not supported; known: LlamaForCausalLM, Qwen2"):
        SoftEngine(base_spec(directory))

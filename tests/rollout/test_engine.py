"""The engine's contract: phases, continuation, determinism, refusals, weights under running requests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import rollout.vllm_sampler
from rollout.engine import EngineError, EngineSpec, RequestError, RequestSettings, SoftEngine, engine_environment
from rollout.engine_spec import MIN_ANSWER_TEMPERATURE
from rollout.request import RolloutRequest
from rollout.trajectory import Kind, Trajectory, pack, unpack
from tests.rollout.conftest import (
    END_OF_SEQUENCE,
    END_OF_THINKING,
    MAX_CANDIDATES,
    Case,
    EngineFactory,
    base_spec,
    reference_case,
    reference_model,
    run,
)
from tests.rollout.test_engine_weights import bundle, changed
from tests.rollout.test_soft_parity import assert_parity

pytestmark = pytest.mark.slow

ARRAYS = tuple(field.name for field in dataclasses.fields(Trajectory) if field.type == "np.ndarray")


def request(index: int, thinking: str = "soft", prompt_len: int = 20) -> RolloutRequest:
    prompt = tuple(5 + (7 * index + 3 * position) % 59 for position in range(prompt_len))
    return RolloutRequest(f"e{index}/0", f"e{index}", f"e{index}", 0, 500 + index, prompt, thinking)  # type: ignore[arg-type]


def generate(engine: SoftEngine, requests: list[RolloutRequest], **settings: Any) -> list[Trajectory]:
    cases = [Case(each, RequestSettings(**settings), ()) for each in requests]
    found = run(engine, cases)
    return [found[each.request_id] for each in requests]


def assert_same(first: Trajectory, second: Trajectory, *, exact: bool = True) -> None:
    for name in ARRAYS:
        left, right = getattr(first, name), getattr(second, name)
        if exact or left.dtype.kind != "f":
            np.testing.assert_array_equal(left, right, err_msg=name)
        else:
            np.testing.assert_allclose(left, right, atol=2e-4, err_msg=name)


# --- phases ---------------------------------------------------------------------------------------------------------


def test_greedy_thinking_is_greedy_decoding(engine: SoftEngine) -> None:
    """Temperature 0 in both phases: one candidate of weight 1, so the tokens are those of discrete greedy decoding."""
    settings = {"temperature": 0.0, "answer_temperature": 0.0, "max_new_tokens": 40, "thinking_budget": 40}
    soft = generate(engine, [request(index) for index in range(8)], **settings)
    discrete = generate(engine, [request(index, "discrete") for index in range(8)], **settings)
    other_seed = [dataclasses.replace(request(index), seed=9) for index in range(8)]
    again = generate(engine, other_seed, **settings)
    for thought, plain, repeated in zip(soft, discrete, again, strict=True):
        assert thought.response_ids.tolist() == plain.response_ids.tolist() == repeated.response_ids.tolist()
        assert (thought.weights.max(axis=1) == 1.0).all()
        assert (plain.kinds == Kind.DISCRETE).all()


def test_budget_closes_the_thinking_phase(engine: SoftEngine) -> None:
    settings = {"thinking_budget": 3, "max_new_tokens": 10, "temperature": 0.5}
    forced = [
        t for t in generate(engine, [request(index) for index in range(10)], **settings) if Kind.FORCED in t.kinds
    ]
    assert len(forced) >= 3
    for trajectory in forced:
        assert trajectory.kinds[:4].tolist() == [Kind.SOFT] * 3 + [Kind.FORCED]
        assert trajectory.response_ids[3] == END_OF_THINKING
        assert trajectory.log_density[3] == 0.0
        assert (trajectory.kinds[4:] == Kind.DISCRETE).all()
        text, answer = engine.decode(trajectory)
        assert answer and text.endswith(answer)


def test_end_of_sequence_while_thinking(start_engine: EngineFactory, engine: SoftEngine, parity_model: Any) -> None:
    """`stop` ends the response inside its thinking; `forbid` never draws it there, and draws what is left exactly."""
    settings = RequestSettings(thinking_budget=40, max_new_tokens=44, top_k=8, top_p=1.0, temperature=1.6)
    requests = [request(index) for index in range(24)]
    stopped = generate(engine, requests, **{k: v for k, v in dataclasses.asdict(settings).items() if v is not None})
    inside = [t for t in stopped if t.kinds[-1] == Kind.SOFT and t.response_ids[-1] == END_OF_SEQUENCE]
    assert inside, "no response ended inside its thinking: the test needs another model"
    assert all(t.finish_reason == "stop" and engine.decode(t)[1] == "" for t in inside)
    with start_engine(eos_while_thinking="forbid") as forbidding:
        cases = [reference_case(parity_model, forbidding.spec, each, settings) for each in requests]
        found = run(forbidding, cases)
    assert_parity(cases, found)
    for trajectory in found.values():
        assert END_OF_SEQUENCE not in trajectory.response_ids[trajectory.kinds == Kind.SOFT]
        assert not (trajectory.candidate_ids[trajectory.candidate_logprobs > -np.inf] == END_OF_SEQUENCE).any()


def test_low_entropy_closes_the_thinking_phase(start_engine: EngineFactory, parity_model: Any) -> None:
    """Also across cache resets, which drop positions and draw them again, and from a recorded prefix."""
    settings = RequestSettings(thinking_budget=40, max_new_tokens=44, top_k=8, top_p=1.0, temperature=0.8)
    with start_engine(entropy_stop=1.8, entropy_stop_steps=3) as engine:
        cases = [reference_case(parity_model, engine.spec, request(index), settings) for index in range(24)]

        def reset(number: int) -> None:
            if number in (5, 9, 13):
                assert engine._llm.reset_prefix_cache(reset_running_requests=True)

        found = run(engine, cases, between_steps=reset)
        assert_parity(cases, found)
        early = [t for t in found.values() if Kind.FORCED in t.kinds and (t.kinds == Kind.SOFT).sum() < 40]
        assert len(early) >= 3
        for case in cases[:8]:
            engine.add(case.request, settings=case.settings)
        for _ in range(3):
            engine.step()
        partial = engine.abort([case.request.request_id for case in cases[:8]])
        by_id = {case.request.request_id: case for case in cases}
        for prefix in partial:
            engine.add(by_id[prefix.request_id].request, prefix=prefix, settings=settings)
        continued: dict[str, Trajectory] = {}
        while engine.num_unfinished:
            continued |= {trajectory.request_id: trajectory for trajectory in engine.step()}
    assert_parity([by_id[name] for name in continued], continued)


# --- determinism and continuation -----------------------------------------------------------------------------------


def test_alone_and_in_company(engine: SoftEngine) -> None:
    """The same trajectory whoever else decodes, in either phase, with drawn answers."""
    requests = [request(index, thinking) for index, thinking in enumerate(["soft", "discrete"] * 6)]
    settings = {"thinking_budget": 12, "max_new_tokens": 30, "answer_top_p": 0.9}
    together = generate(engine, requests, **settings)
    for index in (0, 1, 6, 11):
        assert_same(generate(engine, [requests[index]], **settings)[0], together[index], exact=False)


def test_another_engine_gives_the_same_trajectories(engine: SoftEngine, start_engine: EngineFactory) -> None:
    requests = [request(index) for index in range(6)]
    first = generate(engine, requests, max_new_tokens=30, thinking_budget=12)
    with start_engine(max_num_batched_tokens=512, block_size=64, max_num_seqs=4) as other:
        second = generate(other, requests, max_new_tokens=30, thinking_budget=12)
    for left, right in zip(first, second, strict=True):
        assert_same(left, right, exact=False)


@pytest.mark.parametrize("num_steps", [1, 9, 20])
def test_a_recorded_prefix_goes_on_as_if_never_interrupted(
    num_steps: int, engine: SoftEngine, start_engine: EngineFactory
) -> None:
    """Cut inside the thinking phase (1, 9) and inside the answer (20), packed, unpacked, continued elsewhere."""
    requests = [request(index, prompt_len=40) for index in range(6)]
    settings = RequestSettings(thinking_budget=14, max_new_tokens=30)
    whole = run(engine, [Case(each, settings, ()) for each in requests])
    for each in requests:
        engine.add(each, settings=settings)
    finished: dict[str, Trajectory] = {}
    for _ in range(num_steps + 4):  # four steps of chunked prefill
        finished |= {trajectory.request_id: trajectory for trajectory in engine.step()}
    partial = {t.request_id: t for t in engine.abort([each.request_id for each in requests])}
    travelled = {t.request_id: t for t in unpack(pack(list(partial.values()), MAX_CANDIDATES))}
    assert travelled and engine.num_unfinished == 0
    for each in requests:
        if each.request_id in travelled:
            engine.add(each, prefix=travelled[each.request_id], settings=settings)
    while engine.num_unfinished:
        finished |= {trajectory.request_id: trajectory for trajectory in engine.step()}
    for each in requests:
        assert_same(finished[each.request_id], whole[each.request_id], exact=False)
        assert finished[each.request_id].finish_reason == whole[each.request_id].finish_reason


def test_a_prefix_that_does_not_fit_is_refused(engine: SoftEngine) -> None:
    (recorded,) = generate(engine, [request(2)], max_new_tokens=12, thinking_budget=12)
    num_soft = int((recorded.kinds == Kind.SOFT).sum())
    assert num_soft >= 2
    narrow = dataclasses.replace(recorded, candidate_ids=recorded.candidate_ids[:, :3])
    for prefix, settings, message in (
        (recorded, {"max_new_tokens": len(recorded.response_ids)}, "leaves nothing of max_new_tokens"),
        (recorded, {"thinking_budget": num_soft - 1}, "more than thinking_budget"),
        (narrow, {}, "3 candidates per soft position, this engine max_candidates=8"),
        (dataclasses.replace(recorded, seed=1), {}, "another prompt or seed"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.add(request(2), prefix=prefix, settings=RequestSettings(**settings))
    assert engine.num_unfinished == 0


def test_the_engine_draws_with_the_one_sampler(engine: SoftEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sampler = rollout.vllm_sampler.sample_soft_tokens

    def counting(logits: Any, params: Any, noise: Any) -> Any:
        drawn = sampler(logits, params, noise)
        calls.append(drawn)
        return drawn

    monkeypatch.setattr(rollout.vllm_sampler, "sample_soft_tokens", counting)
    (trajectory,) = generate(engine, [request(3)], max_new_tokens=8, thinking_budget=8)
    num_soft = int((trajectory.kinds == Kind.SOFT).sum())
    assert num_soft >= 1
    drawn = calls[-len(trajectory.kinds) :]
    for index in range(num_soft):
        np.testing.assert_array_equal(trajectory.candidate_ids[index], drawn[index].ids[0].numpy())
        np.testing.assert_array_equal(trajectory.weights[index], drawn[index].weights[0].numpy())
        np.testing.assert_array_equal(trajectory.noise[index], drawn[index].noise[0].numpy())


def test_weights_change_under_running_requests(start_engine: EngineFactory, parity_model_dir: Any) -> None:
    """Requests survive, no position is lost, and versions change once, at the swap."""
    model = changed(reference_model(parity_model_dir), seed=11)
    with start_engine() as engine:
        requests = [request(index, thinking) for index, thinking in enumerate(["soft"] * 10 + ["discrete"] * 4)]
        for each in requests:
            engine.add(each, settings=RequestSettings(max_new_tokens=40, thinking_budget=20))
        finished = []
        for _ in range(12):
            finished += engine.step()
        engine.load_weights(*bundle(model, 7))
        assert engine.version == 7
        while engine.num_unfinished:
            finished += engine.step()
    assert len(finished) == len(requests)
    crossing = [t for t in finished if len(set(t.versions)) == 2]
    assert len(crossing) >= 8
    for trajectory in crossing:
        assert set(np.unique(trajectory.versions)) == {0, 7}
        assert (np.diff(trajectory.versions) >= 0).all()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"seed": -1}, {}, r"seed=-1: needs an integer in \[0, 2\^63\)"),
        ({"seed": None}, {}, "seed=None"),
        ({"prompt_ids": ()}, {}, "prompt is empty"),
        ({"prompt_ids": (3, 64)}, {}, "outside the vocabulary of 64"),
        ({"prompt_ids": (5,) * 180}, {}, "exceeds max_model_len=192"),
        ({}, {"thinking_budget": 65}, "thinking_budget=65: 1 to 64"),
        ({}, {"top_k": 9}, "top_k=9: 1 to max_candidates=8"),
        ({}, {"temperature": -0.5}, "temperature=-0.5: must be >= 0"),
        ({}, {"gumbel_temperature": -0.1}, "gumbel_temperature=-0.1: must be >= 0"),
        ({"seed": 1.5}, {}, r"seed=1.5: needs an integer in \[0, 2\^63\)"),
        ({"thinking": "Soft"}, {}, "thinking='Soft': soft or discrete"),
        ({}, {"temperature": float("inf")}, "temperature=inf: must be >= 0"),
        ({}, {"temperature": float("nan")}, "temperature=nan: must be >= 0"),
        ({}, {"answer_temperature": -0.5}, r"answer_temperature=-0.5: must be 0 \(greedy\) or at least 0.01"),
        ({}, {"answer_temperature": 0.0099}, r"answer_temperature=0.0099: must be 0 \(greedy\) or at least 0.01"),
        ({"thinking": "discrete"}, {"answer_temperature": 1e-6}, r"answer_temperature=1e-06: must be 0 \(greedy\)"),
        ({}, {"answer_temperature": float("nan")}, "answer_temperature=nan: must be 0"),
        ({}, {"answer_top_k": -2}, "answer_top_k=-2: at least 1, or -1"),
        ({}, {"answer_top_p": 0.0}, r"answer_top_p=0.0: must be in \(0, 1\]"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens=0: at least 1"),
    ],
)
def test_a_bad_request_is_refused_alone(
    engine: SoftEngine, changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    good = request(0)
    engine.add(good, settings=RequestSettings(max_new_tokens=4))
    with pytest.raises(RequestError, match=message):
        engine.add(dataclasses.replace(request(1), **changes), settings=RequestSettings(**settings))
    finished = []
    while engine.num_unfinished:
        finished += engine.step()
    assert [trajectory.request_id for trajectory in finished] == [good.request_id]


@pytest.mark.parametrize("temperature", [0.0, MIN_ANSWER_TEMPERATURE, 1.0])
def test_vllm_draws_at_every_temperature_that_is_let_through(temperature: float) -> None:
    from vllm import SamplingParams

    assert SamplingParams(temperature=temperature).temperature == temperature
    assert SamplingParams(temperature=MIN_ANSWER_TEMPERATURE / 2).temperature == MIN_ANSWER_TEMPERATURE


def test_a_running_request_is_not_added_twice(engine: SoftEngine) -> None:
    engine.add(request(0), settings=RequestSettings(max_new_tokens=4))
    with pytest.raises(RequestError, match="already running"):
        engine.add(request(0))
    assert len(engine.abort([request(0).request_id, "unknown"])) == 1


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    from tests.conftest import build_tiny_model

    directory = build_tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(EngineError, match="65 tokens but the model only 64 embeddings; use the tokenizer"):
        SoftEngine(base_spec(directory))


def test_an_end_of_thinking_outside_the_vocabulary_is_refused(parity_model_dir: Any) -> None:
    with pytest.raises(EngineError, match="end_of_thinking_id=64 is outside the vocabulary"):
        SoftEngine(base_spec(parity_model_dir, end_of_thinking_id=64))


def test_environment_of_a_process() -> None:
    spec = EngineSpec(model_path="some/hub-name", enforce_eager=True, num_threads=3)
    environment = engine_environment(spec)
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["TORCHDYNAMO_DISABLE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment, "a hub name may have to be looked up"
    on_gpu = engine_environment(dataclasses.replace(spec, device="cuda"))
    assert "OMP_NUM_THREADS" not in on_gpu
    assert on_gpu["VLLM_USE_FLASHINFER_SAMPLER"] == "0", "it would be compiled, where there may be no nvcc"

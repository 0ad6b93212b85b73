"""Stored evaluations: rows and parts, resuming, refusal to mix, statistics, comparison, arms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from orchestration.config import Config, ConfigError, parse_config
from orchestration.dataset import PromptRow
from orchestration.evaluate import EvaluationSettings, FinishedCall, evaluation_requests
from orchestration.evaluate_command import evaluation_config, model_digest
from orchestration.evaluation_arms import make_arms
from orchestration.evaluation_results import compare_results, summarise
from orchestration.evaluation_store import PartWriter, ResultDirectory, missing_calls
from orchestration.evaluation_summary import arm_statistics
from reward.verdict import Grade, Verdict
from rollout.request import RolloutRequest
from rollout.trajectory import Kind, Trajectory, pack
from tests.orchestration.test_evaluate import prompt_set

END = 5
PROMPTS = prompt_set("a", "b", "c")
SHARED = {"model": "digest", "samples": 4, "seed": 0}
ARM = {"thinking": "soft", "temperature": 1.0}
BENCHMARK = {"questions": 3, "digest": "d", "rules": ["math"]}


def trajectory(request: RolloutRequest, num_soft: int = 3) -> Trajectory:
    kinds = np.array([Kind.SOFT] * num_soft + [Kind.ENDED, Kind.DISCRETE], np.uint8)
    probabilities = np.tile(np.array([0.75, 0.25, 0, 0, 0], np.float32), (num_soft, 1))
    with np.errstate(divide="ignore"):
        logprobs = np.log(probabilities)
    return Trajectory(
        request_id=request.request_id,
        group_id=request.group_id,
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        seed=request.seed,
        prompt_ids=np.array(request.prompt_ids, np.int32),
        response_ids=np.array([10 + request.sample_index % 2, 11, 12, END, 7][-(num_soft + 2) :], np.int32),
        kinds=kinds,
        versions=np.zeros(len(kinds), np.int64),
        log_density=np.zeros(len(kinds), np.float32),
        candidate_ids=np.tile(np.arange(5, dtype=np.int32), (num_soft, 1)),
        candidate_logprobs=logprobs,
        noise=np.zeros((num_soft, 5), np.float32),
        weights=np.tile(np.array([0.9, 0.1, 0, 0, 0], np.float32), (num_soft, 1)),
        censor_threshold=np.zeros(num_soft, np.float32),
        finish_reason="length" if request.sample_index == 3 else "stop",
        response_text=f"thought</think>{request.sample_index}",
        answer_text=str(request.sample_index),
    )


def finished(row: PromptRow, requests: Sequence[RolloutRequest], num_correct: int) -> tuple[FinishedCall, Any]:
    from rollout.actor import summarise as summarise_group

    trajectories = [trajectory(request) for request in requests]
    grades = tuple(
        Grade(Verdict.CORRECT if r.sample_index < num_correct else Verdict.INCORRECT, 1.0, str(r.sample_index))
        for r in requests
    )
    summary = summarise_group(trajectories, 0.1, version=0)
    return FinishedCall(row, tuple(requests), None, summary, grades), pack(trajectories)


def calls(samples: int = 4) -> list[Any]:
    settings = EvaluationSettings(samples=samples)
    return [(row, part) for row in PROMPTS.rows for part in evaluation_requests(row, PROMPTS, settings)]


def fill(path: Path, correct: dict[str, int], arm: str = "soft", traces: int = 1) -> ResultDirectory:
    result = ResultDirectory(path)
    result.open(SHARED, {arm: ARM}, {"toy": BENCHMARK})
    writer = PartWriter(path / "toy" / arm, traces, END)
    for row, requests in missing_calls(calls(), result.done("toy", arm)):
        writer.add(*finished(row, requests, correct[row.prompt_id]))
    writer.flush()
    return result


def test_rows_hold_what_statistics_and_the_browser_need(tmp_path: Path) -> None:
    result = fill(tmp_path, {"a": 4, "b": 1, "c": 0}, traces=2)
    samples = result.samples("toy", "soft")
    assert list(samples) == ["a", "b", "c"]
    assert [sample.correct for sample in samples["b"]] == [True, False, False, False]
    first = samples["a"][0]
    assert (first.length, first.soft_length, first.truncated) == (5, 3, False)
    assert samples["a"][3].truncated
    assert first.entropy == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), abs=1e-6)
    assert first.top_weight == pytest.approx(0.9)
    assert first.active == 2
    assert first.trace == samples["a"][2].trace != samples["a"][1].trace
    table = pq.read_table(result.parts("toy", "soft")[0])
    assert {"question", "gold", "response_text", "answer_text", "seed", "reward"} <= set(table.column_names)
    kept = [weights is not None for weights in table["weights"].to_pylist()]
    assert kept == [index < 2 for index in table["sample_index"].to_pylist()]


def test_statistics(tmp_path: Path) -> None:
    found = arm_statistics(fill(tmp_path, {"a": 4, "b": 1, "c": 0}).samples("toy", "soft"))
    assert (found.num_questions, found.num_samples) == (3, 4)
    assert set(found.pass_at) == {1}
    assert found.pass_at[1].mean == pytest.approx((1 + 0.25 + 0) / 3)
    assert found.first == {1: pytest.approx(2 / 3), 2: pytest.approx(2 / 3), 4: pytest.approx(2 / 3)}
    assert found.truncated == 0.25
    assert found.distinct_traces == 0.5
    assert found.never_solved == pytest.approx(1 / 3)
    assert found.verdicts == {"correct": 5, "incorrect": 7}
    assert found.active == 2
    json.dumps(found.to_json())


def test_an_interrupted_evaluation_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    result = ResultDirectory(tmp_path)
    result.open(SHARED, {"soft": ARM}, {"toy": BENCHMARK})
    directory = tmp_path / "toy" / "soft"
    writer = PartWriter(directory, 1, END)
    (row, requests), *_ = calls()
    writer.add(*finished(row, requests, 1))
    writer.flush()
    (directory / ".part-000001.parquet").write_bytes(b"torn")
    left = missing_calls(calls(), result.done("toy", "soft"))
    assert [row.prompt_id for row, _ in left] == ["b", "c"]
    with pytest.raises(ValueError, match="not finished"):
        arm_statistics({**result.samples("toy", "soft"), "b": []})
    again = PartWriter(directory, 1, END)
    for row, requests in left:
        again.add(*finished(row, requests, 1))
    again.flush()
    assert [path.name for path in result.parts("toy", "soft")] == ["part-000000.parquet", "part-000001.parquet"]
    assert not missing_calls(calls(), result.done("toy", "soft"))
    assert not list(directory.glob(".part*"))


def test_one_result_holds_one_setting(tmp_path: Path) -> None:
    result = fill(tmp_path, {"a": 1, "b": 1, "c": 1})
    with pytest.raises(ConfigError, match="samples was 4 and is now 8"):
        result.open({**SHARED, "samples": 8}, {"soft": ARM}, {"toy": BENCHMARK})
    with pytest.raises(ConfigError, match=r"arm soft: temperature was 1.0 and is now 0.6"):
        result.open(SHARED, {"soft": {**ARM, "temperature": 0.6}}, {"toy": BENCHMARK})
    with pytest.raises(ConfigError, match="benchmark toy: digest"):
        result.open(SHARED, {"soft": ARM}, {"toy": {**BENCHMARK, "digest": "e"}})
    result.open(SHARED, {"discrete": {"thinking": "discrete"}}, {"other": BENCHMARK})
    assert set(result.settings()["arms"]) == {"soft", "discrete"}
    with pytest.raises(ConfigError, match="names of arms"):
        result.open(SHARED, {"../escape": ARM}, {})
    with pytest.raises(ConfigError, match="no evaluation result"):
        ResultDirectory(tmp_path / "nothing").settings()


def test_tables_of_one_result(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 4, "b": 1, "c": 0})
    result = fill(tmp_path, {"a": 4, "b": 1, "c": 0}, arm="argmax")
    text = "\n".join(summarise(result))
    assert "argmax - soft" in text
    assert "nothing is significant" in text
    record = json.loads((tmp_path / "results.json").read_text())
    assert [(entry["benchmark"], entry["arm"]) for entry in record["results"]] == [("toy", "soft"), ("toy", "argmax")]


def test_an_unfinished_arm_is_in_no_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither where the numbers of samples differ, nor where whole questions are missing."""
    result = fill(tmp_path, {"a": 4, "b": 1, "c": 0})
    result.open(SHARED, {"cut": ARM, "few": ARM}, {"toy": BENCHMARK})
    (row, requests), *_ = calls()
    for arm, part in (("few", requests), ("cut", requests[:2])):
        writer = PartWriter(tmp_path / "toy" / arm, 1, END)
        writer.add(*finished(row, part, 1))
        writer.flush()
    assert [line.split()[1] for line in summarise(result) if line.startswith("toy")] == ["soft"]
    record = json.loads((tmp_path / "results.json").read_text())
    assert [entry["arm"] for entry in record["results"]] == ["soft"]
    assert "toy, few is left out: 1 of 3 questions" in caplog.text
    assert "toy, cut is left out: 0 of 3 questions" in caplog.text


def test_comparison_of_two_results(tmp_path: Path) -> None:
    a = fill(tmp_path / "a", {"a": 0, "b": 0, "c": 0})
    b = fill(tmp_path / "b", {"a": 4, "b": 3, "c": 2})
    text = "\n".join(compare_results((a, None), (b, None)))
    assert "b:soft - a:soft" in text
    assert "+75.00" in text
    with pytest.raises(ConfigError, match="no arm 'greedy'"):
        compare_results((a, "greedy"), (b, None))
    other = ResultDirectory(tmp_path / "c")
    other.open(SHARED, {"soft": ARM}, {"toy": {**BENCHMARK, "digest": "e"}})
    with pytest.raises(ConfigError, match="different questions"):
        compare_results((a, None), (other, None))
    halves = []
    for name, (row, requests) in zip(("d", "e"), calls(), strict=False):
        halves.append(ResultDirectory(tmp_path / name))
        halves[-1].open(SHARED, {"soft": ARM}, {"toy": BENCHMARK})
        writer = PartWriter(tmp_path / name / "toy" / "soft", 1, END)
        writer.add(*finished(row, requests, 1))
        writer.flush()
    with pytest.raises(ConfigError, match="share no benchmark and arm with answers"):
        compare_results((halves[0], None), (halves[1], None))


def config(**sampling: Any) -> Config:
    tree = {
        "name": "run",
        "model": {"path": "base"},
        "data": {"train": {"path": "train.jsonl"}, "evaluation": [{"path": "aime.json"}]},
        "sampling": {"temperature": 0.9, "top_k": 5, "answer": {"temperature": 0.6, "top_k": 30}, **sampling},
    }
    return parse_config(tree, "test")


def test_matched_decoding_gives_every_arm_the_same_settings() -> None:
    arms = make_arms(["soft", "discrete", "argmax", "mean"], config(), "matched")
    for arm in arms:
        settings = arm.settings
        assert (settings.temperature, settings.top_k, settings.top_p) == (0.9, 5, 0.95)
        assert (settings.answer_temperature, settings.answer_top_k, settings.answer_top_p) == (0.9, 5, 0.95)
    assert [arm.thinking for arm in arms] == ["soft", "discrete", "soft", "soft"]
    mixtures = [(arm.settings.gumbel_temperature, arm.settings.noise_scale) for arm in arms]
    assert mixtures == [(0.1, 1.0), (0.1, 1.0), (0.0, 1.0), (1.0, 0.0)]
    records = [arm.record(config()) for arm in arms]
    assert records[0]["censor_delta"] == 1e-3
    assert (records[0]["noise_scale"], records[3]["noise_scale"]) == (1.0, 0.0), "what the rows were drawn with"
    stopping = [arm.record(config(entropy_stop=0.2, entropy_stop_steps=3)) for arm in arms]
    assert [record.get("entropy_stop") for record in stopping] == [[0.2, 3], None, [0.2, 3], [0.2, 3]]
    assert [record.get("entropy_stop") for record in records] == [None] * 4, "as in results that were stored without it"
    dirichlet = config(thinking="discrete", noise="dirichlet")
    with pytest.raises(ConfigError, match="only gumbel noise can be left out"):
        make_arms(["mean"], dirichlet, "matched")


def test_own_decoding_and_temperature_sweeps() -> None:
    _, discrete = make_arms(["soft", "discrete"], config(), "own")
    assert (discrete.settings.answer_temperature, discrete.settings.answer_top_k) == (0.6, 30)
    arms = make_arms(["soft", "discrete"], config(), "matched", [0.6, 1.0])
    assert [arm.name for arm in arms] == ["soft@0.6", "discrete@0.6", "soft@1", "discrete@1"]
    assert arms[1].settings.answer_temperature == 0.6
    with pytest.raises(ConfigError, match="choose from"):
        make_arms(["soft", "greedy"], config(), "matched")
    with pytest.raises(ConfigError, match=r"arm soft@0\.005: .* vLLM draws as at 0\.01; set"):
        make_arms(["soft"], config(), "own", [0.0, 0.01, 0.005])


def test_the_recipe_of_an_evaluation_needs_no_training_data(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    changed = evaluation_config(config(thinking="discrete"), run, ["amc=amc.json"], ["soft", "discrete"])
    assert changed.model.path == str(run / "model")
    assert [dataset.name for dataset in changed.data.evaluation] == ["amc"]
    assert changed.data.train.path == "amc.json"
    assert changed.sampling.thinking == "soft"
    assert evaluation_config(config(), run / "model", [], ["soft"]).model.path == str(run / "model")


def test_the_recipe_of_an_evaluation_trains_nothing() -> None:
    """Settings of a learner and of what it trains neither stand in the way nor ask anything of the model."""
    tree = config().model_dump(mode="json")
    tree |= {"rollout": {"num_gpus": 1}, "learner": {"num_gpus": 1}, "pipeline": {"transport": "nccl"}}
    tree["sampling"] |= {"thinking": "discrete", "noise_clip": [-1.5, 3.0], "log_epsilon": 1e-6}
    tree["algorithm"] = {"likelihood": "reference", "old_log_density": "behaviour"}
    changed = evaluation_config(parse_config(tree, "test"), None, [], ["soft"])
    assert (changed.pipeline.transport, changed.learner.num_gpus, changed.rollout.num_gpus) == ("object_store", 0, 1)
    assert evaluation_config(config(), None, [], ["discrete"]).sampling.thinking == "discrete"
    assert evaluation_config(config(), None, [], ["discrete", "mean"]).sampling.thinking == "soft"


def test_model_digest_sees_weights_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1000))
    before = model_digest(tmp_path)
    assert before == model_digest(tmp_path)
    weights.write_bytes(bytes(999) + b"1")
    changed = model_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert len({before, changed, model_digest(tmp_path)}) == 3

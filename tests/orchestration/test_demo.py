"""The demo without engines: assets and their cache, arms, the run directory, the table; the picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from orchestration import demo, demo_assets
from orchestration.chain_task import ChainTask
from orchestration.config import ConfigError, dump_config, load_config
from orchestration.demo import COMPARED, SOFT, arm_config, clear_earlier_run, results_table
from orchestration.demo_assets import DemoRecipe, WarmStartRecipe, build_assets, ensure_assets, ensure_assets_of
from orchestration.plots import plot_curves, series
from orchestration.tiny_model import TinyModelShape

SMALL = DemoRecipe(
    seed=0,
    task=ChainTask(num_digits=3, modulus=3),
    shape=TinyModelShape(hidden_size=32, num_heads=1, intermediate_size=64),
    warm_start=WarmStartRecipe(batch=8, steps=2, habits_steps=2, min_accuracy=0.0),
)


def fake_build(recipe: DemoRecipe, directory: Path) -> dict[str, Any]:
    (directory / "model").mkdir()
    return {"seconds": 1.0, "steps": recipe.warm_start.steps, "accuracy": 0.98}


def test_a_build_makes_an_ordinary_checkpoint_and_dataset(tmp_path: Path) -> None:
    made = build_assets(SMALL, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"held_out.jsonl", "model", "traces.jsonl", "train.jsonl"}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in (tmp_path / "model").iterdir()
    }
    assert made["steps"] == 4
    assert json.loads((tmp_path / "held_out.jsonl").read_text().splitlines()[0]).keys() == {"question", "answer"}


def test_assets_are_built_once_and_again_when_the_recipe_changes(tmp_path: Path) -> None:
    directory = tmp_path / "assets" / "seed-0"
    first = ensure_assets(SMALL, directory, fake_build)
    assert not first["reused"]
    (directory / "model" / "kept").touch()
    again = ensure_assets(SMALL, directory, fake_build)
    assert again == {**first, "reused": True}
    assert (directory / "model" / "kept").exists()
    changed = ensure_assets(dataclasses.replace(SMALL, seed=1), directory, fake_build)
    assert not changed["reused"]
    assert not (directory / "model" / "kept").exists()
    assert not list(directory.parent.glob(".*")), "nothing half-made stays behind"


def test_digest_covers_the_recipe_and_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = DemoRecipe(0).digest()
    assert digest == DemoRecipe(0).digest()
    assert digest != DemoRecipe(0, warm_start=WarmStartRecipe(batch=64)).digest()
    monkeypatch.setattr(demo_assets, "_source", lambda module: b"changed")
    assert digest != DemoRecipe(0).digest()


def test_a_failed_build_leaves_the_old_assets_alone(tmp_path: Path) -> None:
    directory = tmp_path / "seed-0"
    ensure_assets(SMALL, directory, fake_build)
    before = (directory / "assets.json").read_text()
    hopeless = dataclasses.replace(SMALL, warm_start=WarmStartRecipe(batch=8, steps=2, max_steps=2, min_accuracy=1.0))
    with pytest.raises(RuntimeError, match="teacher-forced accuracy"):
        ensure_assets(hopeless, directory, build_assets)
    assert (directory / "assets.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["seed-0"]


def test_train_builds_the_assets_that_its_recipe_names(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[int, Path]] = []
    monkeypatch.setattr(demo_assets, "ensure_assets", lambda recipe, directory: built.append((recipe.seed, directory)))
    config = arm_config(SOFT, 7)
    ensure_assets_of(config)
    assert built == [(7, Path("outputs/demo-assets/seed-7"))]
    other = config.model_copy(update={"model": config.model.model_copy(update={"path": "some/where/model"})})
    ensure_assets_of(other)
    assert len(built) == 1


def test_the_recipe_is_the_one_that_is_documented() -> None:
    config = arm_config(SOFT, 0)
    assert config.run_dir == Path("outputs/demo")
    assert config.algorithm.likelihood == "censored"
    assert config.censor_delta == 1e-3
    assert (config.sampling.noise, config.sampling.noise_clip) == ("gumbel", None)
    assert (config.sampling.top_k, config.sampling.top_p, config.sampling.gumbel_temperature) == (5, 0.95, 0.1)
    assert config.pipeline.max_staleness == 1
    assert config == load_config("configs/demo.yaml", ["rollout.num_actors=" + str(config.rollout.num_actors)])


def test_arms_differ_from_the_demo_in_what_they_say_only() -> None:
    base = arm_config(SOFT, 0).model_dump()
    changed = {}
    for arm in COMPARED:
        tree = arm_config(arm, 0).model_dump()
        changed[arm.name] = {
            f"{section}.{key}"
            for section in ("sampling", "algorithm", "learner", "pipeline", "model", "data", "rollout", "evaluation")
            for key in tree[section]
            if tree[section][key] != base[section][key]
        }
    assert changed == {
        "demo-discrete": {"sampling.thinking"},
        "demo-reference": {
            "algorithm.likelihood",
            "algorithm.old_log_density",
            "sampling.noise_clip",
            "sampling.log_epsilon",
        },
        "demo-control": {"algorithm.likelihood"},
    }


def test_an_earlier_demo_is_cleared_and_anything_else_is_refused(tmp_path: Path) -> None:
    config = arm_config(SOFT, 0, [f"output_dir={tmp_path / 'demo'}"])
    clear_earlier_run(config)
    run = tmp_path / "demo"
    (run / "plots").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    (run / "metrics.jsonl").write_text("{}")
    clear_earlier_run(config)
    assert [path.name for path in run.iterdir()] == ["driver.lock"]
    (run / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="not a run of the demo"):
        clear_earlier_run(config)
    assert (run / "thesis.tex").read_text() == "precious"


def summary(before: float, after: float) -> dict[str, Any]:
    return {
        "before": {"pass@1": before, "pass@16": 1.0, "mean_length": 7.0},
        "after": {"pass@1": after, "pass@16": 0.984, "mean_length": 10.0},
        "seconds": 123.4,
    }


def test_table_and_closing_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = results_table([("soft", summary(0.41, 0.99)), ("a longer name", summary(0.41, 0.3))])
    assert len({len(line) for line in table}) == 1, "columns line up"
    assert "0.410 -> 0.990" in table[1]
    assert "1.000 -> 0.984" in table[1]

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(demo, "ensure_assets", lambda *_: {"reused": True, "steps": 1, "accuracy": 0.98, "seconds": 1})
        patch.setattr(demo, "_train", fake_training)
        assert demo.main(["--compare"]) == 0
        assert demo.main([]) == 0, "a second demo replaces the first"
    printed = capsys.readouterr().out
    assert "SofT-GRPO, censored likelihood" in printed
    assert "control: answer tokens only" in printed
    assert "mlflow ui --backend-store-uri sqlite:///" in printed
    assert "which arm is better on real problems" in printed
    assert (tmp_path / "outputs/demo/plots/curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_password_of_a_tracking_server_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s3cret@mlflow.example")
    command = demo.mlflow_command(demo.arm_config(demo.SOFT, 0))
    assert command == "MLflow: https://<redacted>@mlflow.example"


def test_mistakes_are_told_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ensure_assets", None)  # calling it would fail
    with pytest.raises(ConfigError, match="seed=-1"):
        demo.main(["--seed", "-1"])


def fake_training(config: Any) -> int:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    (config.run_dir / "summary.json").write_text(json.dumps(summary(0.4, 0.9)))
    (config.run_dir / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 0.6}\n')
    return 0


def test_curves_leave_out_what_was_not_logged(tmp_path: Path) -> None:
    records = [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": None}, {"step": 3, "rollout/entropy": 0.1}]
    assert series(records, "reward/mean") == ([1], [0.5])
    assert series(records, "staleness/mean") == ([], [])
    plot_curves({"a": records, "b": []}, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").stat().st_size > 5000

"""The report: charts, alarm, paper's numbers, escaping; and the page in a real headless browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchestration.charts import Axes, Line, line_chart, nice_ticks
from orchestration.collapse import REWARD, WARNING, Alarm, collapse_alarm
from orchestration.config import ConfigError, dump_config, parse_config
from orchestration.published import BENCHMARKS, TABLE, benchmark_of, rows_for
from orchestration.report import gather, main, make_page
from orchestration.report_page import json_for_script, published_section, render
from orchestration.report_traces import MAX_POSITIONS, TraceSource, read_traces, token_texts
from orchestration.tiny_model import build_tokenizer
from tests.orchestration.test_evaluation_store import END, calls, fill, finished

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;\u2028"


def records(entropy: Any, kl: Any, reward: Any, steps: int = 200) -> list[dict[str, Any]]:
    """Metrics of a run as functions of its progress from 0 to 1."""
    return [
        {
            "step": step + 1,
            REWARD: reward(step / steps),
            "objective/entropy_thinking": entropy(step / steps),
            "objective/kl_thinking": kl(step / steps),
            "objective/positions_thinking": 100.0,
        }
        for step in range(steps)
    ]


def test_alarm_sees_the_published_signature_and_not_a_healthy_run() -> None:
    healthy = records(lambda t: 0.5 - 0.3 * t, lambda t: 0.01 + t, lambda t: 0.3 + 0.3 * t)
    assert collapse_alarm(healthy) is None

    def turning(reward: Any) -> list[dict[str, Any]]:
        return records(
            lambda t: 0.5 - 0.3 * t if t < 0.6 else 0.32 + 2 * (t - 0.6), lambda t: 0.02 + 0.5 * max(0, t - 0.6), reward
        )

    alarm = collapse_alarm(turning(lambda t: 0.5))
    assert alarm is not None
    assert 120 < alarm.step < 180
    assert alarm.collapsed_step is None
    fallen = collapse_alarm(turning(lambda t: 0.5 if t < 0.9 else 0.3))
    assert fallen is not None
    assert fallen.collapsed_step is not None
    assert 180 < fallen.collapsed_step < 190


def test_alarm_believes_the_warning_that_the_learner_logged() -> None:
    logged = [
        {**record, WARNING: float(record["step"] == 50)}
        for record in records(lambda t: 0.3, lambda t: 0.1, lambda t: 0.5)
    ]
    assert collapse_alarm(logged) == Alarm(50, None)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 40, [0, 10, 20, 30, 40]), (3, 3, [3]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_chart_places_points_and_escapes_labels() -> None:
    axes = Axes((1, 16), (0, 1), log_x=True)
    left, bottom = axes.place(1, 0)
    middle, _ = axes.place(4, 0.5)
    right, top = axes.place(16, 1)
    assert middle == pytest.approx((left + right) / 2)
    assert bottom > top
    chart = line_chart(HOSTILE, [Line(HOSTILE, [1, 2], [0, 1]), Line("b", [1], [0.5])])
    assert "<script" not in chart
    assert chart.count("<polyline") == 2
    assert line_chart("empty", [Line("nothing", [], [])]) == ""
    long = line_chart("long", [Line("x", list(range(10_000)), [0.0] * 10_000)])
    assert len(long) < 20_000


PRINTED_AVERAGES = {
    ("1.5B", "GRPO, discrete"): (61.28, 80.16, 82.39),
    ("1.5B", "SofT-GRPO"): (61.39, 83.54, 85.18),
    ("3B", "SofT-GRPO"): (32.83, 54.96, 57.06),
    ("3B", "base, discrete"): (25.79, 51.21, 58.06),
    ("7B", "base, soft"): (73.44, 88.08, 89.38),
    ("7B", "SofT-GRPO"): (73.74, 86.66, 90.18),
}


def test_published_rows_have_the_published_averages() -> None:
    rows = {(row.size, row.method): row for row in TABLE}
    assert len(rows) == 15
    for key, averages in PRINTED_AVERAGES.items():
        for place, average in enumerate(averages):
            mean = sum(rows[key].scores[name][place] for name in BENCHMARKS) / len(BENCHMARKS)
            assert mean == pytest.approx(average, abs=0.05), key


def test_names_of_benchmarks_and_models() -> None:
    assert [benchmark_of(name) for name in ("math500", "AIME-2024", "gsm8k_test", "held-out")] == [
        "MATH-500",
        "AIME24",
        "GSM8K",
        None,
    ]
    assert {row.size for row in rows_for("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")} == {"1.5B"}
    assert {row.size for row in rows_for("meta-llama/Llama-3.2-3B-Instruct")} == {"3B"}
    assert len(rows_for("outputs/demo/model")) == 15


def interval(value: float) -> dict[str, float]:
    return {"mean": value, "low": value - 0.01, "high": value + 0.01}


def test_our_row_counts_as_the_paper_does_and_says_what_is_unbiased() -> None:
    result = {
        "benchmark": "aime2024",
        "arm": "soft",
        "pass_at": {"1": interval(0.32), "8": interval(0.6)},
        "first": {"1": 0.3, "16": 0.7, "32": 0.8},
    }
    section = published_section([result], "qwen-1.5B")
    assert "32.0 / 70.0 / 80.0" in section
    assert "32.6 / 76.7 / 80.0" in section
    assert "not matched" in section
    assert published_section([{**result, "benchmark": "chain"}], "qwen-1.5B") == ""


def make_run(path: Path) -> Path:
    """A run directory with hostile texts everywhere."""
    tree = {
        "name": "run",
        "output_dir": str(path),
        "model": {"path": "x<script>"},
        "data": {"train": {"path": f"data{HOSTILE}.jsonl"}},
    }
    (path / "trajectories").mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(parse_config(tree, "test")), encoding="utf-8")
    lines = [{"step": i + 1, REWARD: i / 40, "rollout/entropy": 0.3, "rollout/length_mean": 7} for i in range(40)]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    fill(path / "evaluation", {"a": 4, "b": 1, "c": 0}, traces=4)
    (path / "model").mkdir()
    build_tokenizer().save_pretrained(path / "model")
    (row, requests), *_ = calls()
    call, batch = finished(row, requests, 1)
    from orchestration.evaluation_store import call_table

    table = call_table(call, batch, 4, END)
    for name in ("question", "answer_text"):
        table = table.set_column(table.column_names.index(name), name, [[HOSTILE] * table.num_rows])
    pq.write_table(table, path / "trajectories" / "step_000010.parquet")
    return path


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    page = make_page(gather(make_run(tmp_path / "run"), []), 60)
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts == ['<script type="application/json" id="traces">', "<script>"]
    assert "onerror=alert(1)>" not in page.replace("&lt;", "<").split("<pre>")[0]
    embedded = re.search(r'id="traces">(.*?)</script>', page, re.DOTALL)
    assert embedded is not None
    traces = json.loads(embedded[1])
    assert traces[0]["question"] == HOSTILE
    assert not re.search(
        r"(?:src|href)\s*=",
        re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL).split("<pre>")[0],
    )
    assert json.loads(json_for_script([HOSTILE])) == [HOSTILE]
    assert "<" not in json_for_script([HOSTILE])


def test_a_text_that_looks_like_a_placeholder_is_not_filled_in() -> None:
    page = render("@@body@@", "s", ["section @@traces@@"], [])
    assert page.count("section @@traces@@") == 1
    assert "<h1>@@body@@</h1>" in page


def test_page_has_its_sections(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    for text in ("Training", "No collapse alarm", "Pass@k", "toy: unbiased Pass@k", "Trajectories", "Configuration"):
        assert text in page, text
    assert (run / "plots" / "curves.png").is_file()
    assert main([str(run), "--evaluation", str(run / "evaluation")]) == 0
    assert (run / "report.html").read_text(encoding="utf-8") == page, "the run's own evaluation counts once"
    with pytest.raises(ConfigError, match="not a run directory"):
        main([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"o\.html: cannot be written .*give another --output"):
        main([str(run), "--output", str(tmp_path / "absent" / "o.html")])
    part = run / "evaluation" / "toy" / "soft" / "part-000000.parquet"
    pq.write_table(pq.read_table(part)[1:], part)
    assert main([str(run)]) == 0, "an evaluation that is still running does not stop a report"
    assert "toy: unbiased Pass@k" not in (run / "report.html").read_text(encoding="utf-8")


def test_traces_are_cut_in_the_middle_and_show_removed_candidates(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    texts = token_texts(run / "model")
    assert texts(5) == "</think>"
    assert token_texts(tmp_path)(5) == "[5]"
    (trace, *_) = read_traces([TraceSource("here", run / "trajectories" / "step_000010.parquet")], texts, 10)
    assert [position[0] for position in trace["positions"]] == ["soft", "soft", "soft", "ended", "token"]
    assert [candidate[1] for candidate in trace["positions"][0][2]] == [0.9, 0.1]
    assert MAX_POSITIONS % 2 == 0
    many = [TraceSource(f"step {i}", run / "trajectories" / "step_000010.parquet") for i in range(100)]
    labels = [trace["source"] for trace in read_traces(many, texts, 5)]
    assert labels == ["step 0", "step 24", "step 49", "step 74", "step 99"]


@pytest.mark.slow
def test_the_page_draws_in_a_browser_without_running_what_it_shows(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (run / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    dom = done.stdout
    assert "<title>run</title>" in dom, "a text of the run was executed"
    assert dom.count('class="position soft"') == 3
    assert 'class="candidate"' in dom
    assert "gold answer" in dom
    assert dom.count("<button") >= 5

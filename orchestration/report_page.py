"""The report as one HTML page: sections of text, tables and charts, filled into a template.

Everything that comes from a run (names, prompts, tokens, answers, settings) is text: escaped here, or carried as JSON
with `<` written as an escape and put into the page by `textContent`. The page loads nothing and its policy forbids it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from orchestration.charts import Line, line_chart
from orchestration.collapse import Alarm
from orchestration.plots import series
from orchestration.published import BENCHMARKS, CAVEATS, CORRECTIONS, KS, benchmark_of, rows_for

Records = Sequence[Mapping[str, Any]]
Result = Mapping[str, Any]
"""One entry of `results.json`: a benchmark, an arm and its statistics."""

CURVES: tuple[tuple[str, tuple[str, ...], tuple[float | None, float | None]], ...] = (
    ("reward", ("reward/mean",), (0.0, 1.0)),
    ("response length, tokens", ("rollout/length_mean",), (0.0, None)),
    ("entropy of thinking tokens, nats", ("rollout/entropy",), (0.0, None)),
    ("KL to the reference", ("objective/kl_thinking", "objective/kl_answer"), (0.0, None)),
    ("staleness, versions", ("staleness/mean", "staleness/max"), (0.0, None)),
    ("clipped share of the loss", ("objective/clip_fraction_thinking", "objective/clip_fraction_answer"), (0.0, None)),
    ("gradient norm", ("learner/grad_norm",), (0.0, None)),
    ("heaviest weight of a soft token", ("rollout/top_weight",), (None, None)),
    ("responses cut off, verifier failures", ("rollout/truncated", "reward/failures"), (0.0, None)),
    ("tokens per second", ("throughput/tokens_per_s",), (0.0, None)),
    ("groups with signal", ("reward/groups_with_signal",), (0.0, 1.0)),
    ("idle share of each pool", ("idle/rollout", "idle/verifier", "idle/learner"), (0.0, 1.0)),
)


def render(title: str, subtitle: str, sections: Sequence[str], traces: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    template = files("orchestration").joinpath("report_template.html").read_text(encoding="utf-8")
    values = {
        "title": escape(title),
        "subtitle": escape(subtitle),
        "body": "\n".join(section for section in sections if section),
        "traces": json_for_script(traces),
    }
    head, *pieces = template.split("@@")
    # Odd pieces are names, even ones text: a value may hold any characters without being read as a name.
    return head + "".join(values[piece] if place % 2 == 0 else piece for place, piece in enumerate(pieces))


def json_for_script(value: Any) -> str:
    """JSON that cannot end its script element, whatever the texts in it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def summary_section(summary: Mapping[str, Any] | None) -> str:
    """Before and after, per dataset."""
    if not summary:
        return ""
    rows = []
    for name, result in (summary.get("datasets") or {}).items():
        before, after = result.get("before"), result.get("after")
        cells = [
            f"{_plain(before, key, scale)} &rarr; {_plain(after, key, scale)}"
            for key, scale in (("pass@1", 100), ("pass@16", 100), ("mean_length", 1))
        ]
        rows.append([escape(name), *cells])
    if not rows:
        return ""
    table = html_table(["dataset", "Pass@1, %", "Pass@16, %", "mean length"], rows)
    return (
        f"<h2>Before and after</h2>{table}<p class='quiet'>{summary.get('steps', 0)} steps, {summary['seconds']} s</p>"
    )


def curves_section(records: Records, alarm: Alarm | None) -> str:
    """Training curves, with the collapse alarm in words and as a mark."""
    if not records:
        return ""
    marks = [] if alarm is None else [(float(alarm.step), "alarm")]
    charts = [
        line_chart(title, [Line(metric, *series(records, metric)) for metric in metrics], y_range=y_range, marks=marks)
        for title, metrics, y_range in CURVES
    ]
    state = (
        f'<p class="alarm">{escape(str(alarm))}</p>'
        if alarm
        else '<p class="calm">No collapse alarm: entropy and KL to the reference did not rise together.</p>'
    )
    charts.append(_evaluation_chart(records))
    return f'<h2>Training</h2>{state}<div class="charts">{"".join(charts)}</div>'


def _evaluation_chart(records: Records) -> str:
    """Pass@1 of evaluations during training, by dataset."""
    names = sorted(
        {key for record in records for key in record if key.startswith("evaluation/") and key.endswith("/pass@1")}
    )
    lines = [
        Line(
            name.split("/")[1],
            *series(records, name),
            low=series(records, f"{name}_low")[1],
            high=series(records, f"{name}_high")[1],
        )
        for name in names
    ]
    return line_chart("Pass@1 during training (band: 95 % over questions)", lines, y_range=(0.0, 1.0))


def pass_at_k_section(results: Sequence[Result]) -> str:
    """Pass@k curves per benchmark, one line per arm, with intervals over questions."""
    charts = []
    for benchmark in dict.fromkeys(result["benchmark"] for result in results):
        lines = []
        for result in results:
            if result["benchmark"] == benchmark:
                points = sorted((int(k), interval) for k, interval in result["pass_at"].items())
                lines.append(
                    Line(
                        str(result["arm"]),
                        [float(k) for k, _ in points],
                        [interval["mean"] for _, interval in points],
                        [interval["low"] for _, interval in points],
                        [interval["high"] for _, interval in points],
                    )
                )
        charts.append(line_chart(f"{benchmark}: unbiased Pass@k", lines, y_range=(0.0, 1.0), log_x=True))
    if not charts:
        return ""
    return f'<h2>Pass@k</h2><div class="charts">{"".join(charts)}</div>{_results_table(results)}'


def _results_table(results: Sequence[Result]) -> str:
    header = [
        "benchmark",
        "arm",
        "questions x n",
        "Pass@1, %",
        "majority, %",
        "length",
        "cut off, %",
        "distinct traces, %",
    ]
    header += ["entropy", "heaviest weight", "candidates"]
    rows = [
        [
            escape(str(result["benchmark"])),
            escape(str(result["arm"])),
            f"{result['num_questions']} x {result['num_samples']}",
            _interval(result["pass_at"]["1"]),
            _interval(result["majority"]),
            f"{result['mean_length']['mean']:.1f}",
            f"{100 * result['truncated']:.1f}",
            f"{100 * result['distinct_traces']:.0f}",
            *(_optional(result[name]) for name in ("entropy", "top_weight", "active")),
        ]
        for result in results
    ]
    return html_table(header, rows)


def published_section(results: Sequence[Result], model_path: str) -> str:
    """Our scores beside the paper's, where a benchmark is one of the paper's."""
    ours = [(benchmark_of(str(result["benchmark"])), result) for result in results]
    columns = [name for name in BENCHMARKS if any(found == name for found, _ in ours)]
    if not columns:
        return ""
    rows = []
    for row in rows_for(model_path):
        cells = [" / ".join(f"{value:.1f}" for value in row.scores[name]) for name in columns]
        rows.append([f"paper, {escape(row.size)}", escape(row.method), *cells])
    for arm in dict.fromkeys(str(result["arm"]) for _, result in ours):
        by_name = {found: result for found, result in ours if str(result["arm"]) == arm}
        rows.append(["this result", escape(arm), *(_our_cell(by_name.get(name)) for name in columns)])
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*CAVEATS, *CORRECTIONS))
    keys = " / ".join(f"@{k}" for k in KS)
    return (
        f"<h2>Beside the paper</h2><p>Percent, {keys}; ours as the paper counts (first k samples), with the unbiased "
        f"Pass@k below it where it can be estimated.</p>{html_table(['', 'method', *columns], rows)}"
        f'<ul class="quiet">{notes}</ul>'
    )


def _our_cell(result: Result | None) -> str:
    if result is None:
        return "-"
    first = [result["first"].get(str(k)) for k in KS]
    shown = [
        f"{100 * result['pass_at']['1']['mean']:.1f}",
        *("-" if v is None else f"{100 * v:.1f}" for v in first[1:]),
    ]
    unbiased = [f"@{k} {_interval(result['pass_at'][str(k)])}" for k in KS if str(k) in result["pass_at"]]
    return f"{' / '.join(shown)}<br><span class='quiet'>{'<br>'.join(unbiased)}</span>"


def browser_section(traces: Sequence[Mapping[str, Any]]) -> str:
    """Where the script puts the trajectories."""
    if not traces:
        return '<h2>Trajectories</h2><p class="quiet">No stored trajectory with soft tokens was found.</p>'
    return (
        "<h2>Trajectories</h2><p class='quiet'>A soft token is a mixture: bars show its candidates' weights; pale "
        "ones were drawn but left out of the mixture. Framed: the end of thinking.</p>"
        '<div id="browser"><div id="list"></div><div id="view"></div></div>'
        "<noscript>The browser of trajectories needs JavaScript; it loads nothing.</noscript>"
    )


def config_section(text: str) -> str:
    """The resolved configuration, folded away."""
    return (
        f"<h2>Configuration</h2><details><summary>resolved recipe</summary><pre>{escape(text)}</pre></details>"
        if text
        else ""
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are escaped already; the header is plain text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _interval(interval: Mapping[str, float]) -> str:
    return f"{100 * interval['mean']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _plain(summary: Mapping[str, float] | None, key: str, scale: float) -> str:
    return "-" if summary is None else f"{scale * summary[key]:.1f}"


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

"""The report: one HTML file that shows a whole run and needs nothing but itself.

Everything is read from the run's folder, so a report can be written at any time; what a run has not made yet
is shown as missing. What models wrote is untrusted text: the template escapes all of it, and the page forbids
itself scripts and any network (Content-Security-Policy).
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from . import report_charts as charts
from .comparisons import Comparison, Comparisons, compare, lessons
from .report_data import Run, rollout_rows
from .statistics import wilson

KINDS = {
    "base": "the model that everything starts from",
    "pretrain": "next-token training from random weights",
    "sft": "supervised fine-tuning on demonstrations",
    "grpo": "reinforcement learning on verified answers",
    "average": "uniform average of the experts' weights",
    "distill": "on-policy distillation from the experts",
}
CURVES_SHOWN = 6  # per stage; the others fold away
# The order of a stage's curves by what their names contain: the telling ones, any others, bookkeeping.
TELLING = ("held_out", "reward", "correct", "part_", "kl", "loss", "entropy", "response", "unfinished")
BOOKKEEPING = ("load", "drop", "clip", "grad_norm", "lr", "tokens", "seconds")
SAMPLES = 2  # right ones, wrong ones, and ungraded ones, per model and domain
TEXT_LIMIT = 4000  # characters of one prompt or response


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and return its path. Raises UserError where a file of the run cannot be read."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    run = Run(Path(run_dir))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"visible": visible, "duration": duration}
    page = environment.get_template("report.html").render(view(run))
    path = run.folder / "report.html"
    beside = path.with_suffix(".html.new")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return path


# What the page shows


def view(run: Run) -> dict[str, Any]:
    """The template's variables."""
    finished = [name for name in run.stages if name in run.done]
    evaluated = {name for name, stage in run.stages.items() if stage.get("evaluate", True)}
    comparisons = compare([run])
    return {
        "name": run.recipe.get("name", run.folder.resolve().name),
        "finished": len(finished),
        "complete": bool(run.stages) and len(finished) == len(run.stages) and evaluated <= run.scores.keys(),
        "stages": {name: stage["kind"] for name, stage in run.stages.items()},
        "domains": run.domains,
        "kinds": KINDS,
        "headlines": list(_headlines(comparisons, run)),
        "table": _table(run),
        "graph": _graph(run),
        "comparisons": _forests(comparisons),
        "curves": [{"stage": name, "kind": run.kind(name), **_curves(rows)} for name, rows in run.metrics.items()],
        "samples": [*_evaluation_samples(run), *_rollout_samples(run)],
        "failures": list(_failures(run)),
        "timings": _timings(run),
        "recipe": run.recipe_text,
        "versions": _flat(run.versions),
    }


def _table(run: Run) -> list[dict[str, Any]]:
    """A row a model: a cell for each domain and one for their mean; None where it was not evaluated."""
    means = {
        model: sum(correct / total for correct, total in scores.values()) / len(scores)
        for model, scores in run.scores.items()
        if len(scores) == len(run.domains)
    }
    shares = {d: [s[d][0] / s[d][1] for s in run.scores.values() if d in s] for d in run.domains}
    experts = {teacher: domain for domain, teacher, _ in lessons(run)}
    table = []
    for model, scores in run.scores.items():
        cells = []
        for domain in run.domains:
            correct, total = scores.get(domain, (0, 0))
            cells.append(total and {
                "correct": correct, "total": total,
                "share": correct / total, "interval": wilson(correct, total),
                "best": correct / total == max(shares[domain]), "home": experts.get(model) == domain,
            })  # fmt: skip
        mean = means.get(model)
        table.append({
            "model": model, "kind": run.kind(model), "cells": cells, "mean": mean,
            "best": mean is not None and mean == max(means.values()),
        })  # fmt: skip
    return table


def _forests(comparisons: Comparisons) -> dict[str, list[dict[str, Any]]]:
    """The comparisons as the page draws them: each with its color, and its place on an axis."""
    gains, kept, merged = ([each._asdict() for each in found] for found in comparisons)
    for row in [*gains, *merged]:
        row["sign"] = "above" if row["estimate"][1] > 0 else "below" if row["estimate"][2] < 0 else "open"
    for row in kept:
        row["sign"] = "kept"
    _place_on_axis([*gains, *merged], mark=0.0)
    _place_on_axis(kept, mark=1.0)
    return {"gains": gains, "kept": kept, "merged": merged}


def _place_on_axis(rows: Sequence[dict[str, Any]], mark: float) -> None:
    """Add where each interval lies on one axis of all rows, in percent of it; it holds 0 and `mark`."""
    ends = [0.0, mark, *(end for row in rows for end in row["estimate"] if end < float("inf"))]
    low, high = min(ends), max(ends)
    margin = (high - low) * 0.05 or 1.0

    def place(value: float) -> float:
        return 100 * (min(value, high) - low + margin) / (high - low + 2 * margin)

    for row in rows:
        value, start, end = row["estimate"]
        row |= {"value": place(value), "start": place(start), "end": place(end), "mark": place(mark)}


def _headlines(comparisons: Comparisons, run: Run) -> Iterator[dict[str, Any]]:
    """The few numbers that say how the run went: a title, and rows of (value, what it belongs to)."""

    def points(comparison: Comparison) -> str:
        return f"{100 * comparison.estimate[0]:+.1f}".replace("-", "−")

    if gains := [(points(each), f"points, {each.on}") for each in comparisons.gains if each.b != run.base]:
        yield {"title": "Reinforcement learning adds to fine-tuning", "rows": gains}
    if kept := [(f"{100 * each.estimate[0]:.1f} %", each.on) for each in comparisons.kept]:
        yield {"title": "The merged model keeps of each expert", "rows": kept}
    if merged := [(points(each), "points, mean") for each in comparisons.merged]:
        yield {"title": "Distillation against averaging the weights", "rows": merged}
    if run.done:
        wall = duration(sum(done["wall_seconds"] for done in run.done.values()))
        peak = max(done["peak_rss_bytes"] for done in run.done.values()) / 2**30
        yield {"title": "All stages took", "rows": [(wall, "summed"), (f"{peak:.1f} GiB", "memory at most")]}


def _graph(run: Run) -> str:
    edges = [charts.Edge(start, name, teaches) for name in run.stages for start, teaches in run.inputs(name)]
    inputs = {name: [start for start, _ in run.inputs(name)] for name in run.stages}
    nodes = [_node(run, name) for name in TopologicalSorter(inputs).static_order()]
    return charts.stage_graph(nodes, edges)


def _node(run: Run, name: str) -> charts.Node:
    kind, done = run.kind(name), run.done.get(name)
    if name not in run.stages:
        return charts.Node(name, "base", str(run.recipe.get("base", "")), True)
    if done:
        return charts.Node(name, kind, f"{kind} · {duration(done['wall_seconds'])}", True)
    state = f"at step {run.metrics[name][-1]['step']}" if name in run.metrics else "not yet"
    return charts.Node(name, kind, f"{kind} · {state}", False)


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A stage's charts, the telling ones first, and the rest to fold away."""
    points: dict[str, list[charts.Point]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("stage", "kind", "step", "time"):
                points.setdefault(key, []).append((row["step"], value))
    drawn = []
    for key in sorted(points, key=_curve_rank):
        label = key.replace("_", " ").replace("/", " / ")
        last = next((value for _, value in reversed(points[key]) if value is not None), None)
        chart = charts.line_chart(charts.Curve(label, points[key]))
        shown = "–" if last is None else f"{last:.4g}".replace("-", "−")
        drawn.append({"label": label, "last": shown, "svg": chart})
    return {"steps": rows[-1]["step"], "shown": drawn[:CURVES_SHOWN], "folded": drawn[CURVES_SHOWN:]}


def _curve_rank(key: str) -> tuple[int, str]:
    told = [rank for rank, part in enumerate(TELLING) if part in key]
    kept = [rank for rank, part in enumerate(BOOKKEEPING, len(TELLING) + 1) if part in key]
    return min(told or kept, default=len(TELLING)), key


# Samples


def _evaluation_samples(run: Run) -> Iterator[dict[str, Any]]:
    """Held-out problems with the last model's answers: the one that the run is for."""
    model = next((model for model in reversed(run.scores) if model in run.evaluations), None)
    if model is None:
        return
    picked = []
    for domain, answers in run.evaluations[model]["domains"].items():
        for row in _some_of_each(answers, "question"):
            picked.append({**row, "domain": domain, "prompt": row["question"], "expected": row["answer"]})
    what = "answers to held-out problems"
    yield {"title": model, "kind": run.kind(model), "what": what, "rows": picked}


def _rollout_samples(run: Run) -> Iterator[dict[str, Any]]:
    """What each stage sampled in the last step that it kept; distillation's samples have no reward."""
    for stage in run.stages:
        files = run.folder.glob(f"stages/{stage}/rollouts/*.parquet")
        last = max(files, key=lambda path: (len(path.stem), path.stem), default=None)  # 9 before 10
        if last is None:
            continue
        rows, picked = rollout_rows(last), []
        for domain in dict.fromkeys(row["domain"] for row in rows):
            for row in _some_of_each([row for row in rows if row["domain"] == domain], "prompt"):
                found = {key.removeprefix("part_"): row[key] for key in row if key.startswith("part_")}
                parts = {name: value for name, value in found.items() if value is not None}  # each domain has its own
                picked.append({**row, "parts": parts, "expected": None})
        what = f"samples of step {rows[0]['step']}" if rows else "no samples"
        yield {"title": stage, "kind": run.kind(stage), "what": what, "rows": picked}


def _some_of_each(rows: Sequence[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
    """The first SAMPLES right, wrong and ungraded rows, each sort on different prompts."""
    picked: list[dict[str, Any]] = []
    for correct in (True, False, None):
        fresh: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row.get("correct") == correct:
                fresh.setdefault(row[prompt], {"correct": None, "note": "", **row})
        picked += list(fresh.values())[:SAMPLES]
    return picked


def _failures(run: Run) -> Iterator[tuple[str, str, int]]:
    """(stage or evaluation, what happened, how often) of grades that failed and so counted as wrong."""
    records = {**run.done, **{f"evaluation of {model}": found for model, found in run.evaluations.items()}}
    for name, record in records.items():
        for note, number in record.get("failures", {}).items():
            yield name, note, number


def visible(text: str) -> str:
    """Text as a page can show it: control and other invisible characters spelt out, and not too long."""

    def hidden(char: str) -> bool:
        return char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co")

    shown = "".join(f"\\u{ord(char):04x}" if hidden(char) else char for char in text[:TEXT_LIMIT])
    return shown + (f"\n[{len(text) - TEXT_LIMIT} more characters]" if len(text) > TEXT_LIMIT else "")


# Timings and versions


def _timings(run: Run) -> list[dict[str, Any]]:
    """A row a stage, and one for the evaluation of each model whose time is there."""
    took = [*run.done.values(), *run.evaluation_times.values()]
    longest = max((record["wall_seconds"] for record in took), default=0) or 1
    rows = []
    for name, stage in run.stages.items():
        done = run.done.get(name)
        rows.append({
            "stage": name, "kind": stage["kind"], "evaluation": None,
            "done": done, "share": done and done["wall_seconds"] / longest,
            "step": run.metrics[name][-1]["step"] if name in run.metrics else None,
        })  # fmt: skip
    for model in run.scores:
        if model in run.evaluation_times:
            seconds = run.evaluation_times[model]["wall_seconds"]
            row = {"stage": f"evaluation of {model}", "kind": run.kind(model), "share": seconds / longest}
            rows.append({**row, "evaluation": seconds})
    return rows


def duration(seconds: float) -> str:
    """8.2 s, 41 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"torch": "2.13", "machine.cores": "2"} of nested mappings."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat

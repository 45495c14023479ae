"""The report of a made-up run: whole, partial, and full of hostile text."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from amalgam.errors import UserError
from amalgam.pipelines.report import duration, visible, write_report
from amalgam.pipelines.report_charts import (
    Curve,
    Edge,
    Node,
    line_chart,
    nice_ticks,
    running_mean,
    stage_graph,
)

from .made_run import DOMAINS, RECIPE, STAGES

SKILL = {
    "base": (0.17, 0.11), "sft-arithmetic": (0.58, 0.09), "sft-strings": (0.14, 0.52),
    "grpo-arithmetic": (0.81, 0.08), "grpo-strings": (0.11, 0.74), "average": (0.41, 0.39),
    "merged": (0.80, 0.73),
}  # fmt: skip
METRICS = {
    "sft": ("loss", "held_out_loss", "tokens", "grad_norm", "lr"),
    "grpo": ("reward", "correct", "part_task", "part_format", "dropped_groups", "loss", "clipped",
             "entropy_estimate", "response_tokens", "unfinished", "grad_norm", "lr", "tokens_per_second"),
    "distill": ("kl", "response_tokens", "unfinished", "grad_norm", "lr", "tokens_per_second"),
}  # fmt: skip


def fake_run(folder, problems=64, steps=60, finished=tuple(STAGES), hostile="<answer>42</answer>"):
    """A run's folder as the pipeline writes it, with `finished` stages done and the next one under way."""
    rng = np.random.default_rng(0)
    write(folder / "recipe.yaml", yaml.safe_dump(RECIPE, sort_keys=False))
    write(folder / "versions.json", json.dumps({"amalgam": "0.1.0", "torch": "2.13.0", "machine": {"cores": 2}}))
    results = []
    luck = rng.random((len(DOMAINS), problems))  # the same problems are hard for every model
    for model in ("base", *(name for name in finished if name != "start")):
        answers = {}
        for domain, skill, hard in zip(DOMAINS, SKILL[model], luck, strict=True):
            correct = 0.8 * hard + 0.2 * rng.random(problems) < skill
            answers[domain] = [answer(index, bool(right), hostile) for index, right in enumerate(correct)]
            results.append({"model": model, "domain": domain, "correct": int(correct.sum()), "total": problems})
        evaluation = {"model": model, "failures": {}, "domains": answers}
        write(folder / "evaluations" / f"{model}.json", json.dumps(evaluation))
    write(folder / "results.json", json.dumps(results))
    started = list(STAGES)[: len(finished) + 1]
    lines = []
    for name in started:
        kind = STAGES[name]["kind"]
        for step in range(1, 1 + (steps if name in finished else steps // 3)):
            values = {metric: curve(metric, step / steps, rng) for metric in METRICS.get(kind, ())}
            if step % (steps // 10):
                values.pop("held_out_loss", None)  # once an epoch
            if values:
                lines.append(json.dumps({"stage": name, "kind": kind, "step": step, "time": 1.7e9 + step, **values}))
    write(folder / "metrics.jsonl", "".join(line + "\n" for line in lines))
    for name in finished:
        done = {
            "stage": name, "kind": STAGES[name]["kind"], "inputs": [], "steps": steps,
            "wall_seconds": float(rng.integers(20, 200)), "cpu_seconds": 71.5, "peak_rss_bytes": 1.4e9,
            "failures": {"timeout after 5 s": 3} if name == "grpo-strings" else {},
        }  # fmt: skip
        write(folder / "stages" / name / "done.json", json.dumps(done))
        if STAGES[name]["kind"] in ("grpo", "distill"):
            graded = STAGES[name]["kind"] == "grpo"
            rollouts(folder / "stages" / name / "rollouts", STAGES[name]["domains"], steps, hostile, graded)
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def answer(index, right, hostile):
    return {
        "task": "chain_sum", "index": index,
        "question": f"What is {index} + 2 - 17?", "answer": str(index - 15),
        "response": f"<answer>{index - 15}</answer>" if right else hostile, "correct": right,
        "parts": {"task": float(right), "format": 1.0}, "note": "",
        "finish": "stop" if index % 3 else "length",
    }  # fmt: skip


def curve(metric, done, rng):
    noise = rng.normal() * 0.03
    if metric in ("reward", "correct") or "part_" in metric:
        return 0.45 + 0.4 * (1 - np.exp(-4 * done)) + noise
    if metric == "lr":
        return 1e-4 * (1 - done)
    if metric == "tokens_per_second":
        return 1200 + 900 * noise
    if metric == "response_tokens":
        return 18 - 6 * done + 20 * noise
    return 1.6 * float(np.exp(-3 * done)) + 0.2 + noise


def rollouts(folder, domains, step, hostile, graded):
    rows = []
    for domain in domains:
        for r in range(12):
            row = {
                "step": step, "request": r, "group": r // 4, "domain": domain,
                "prompt": f"Problem {r // 2} of {domain}",
                "response": hostile if r % 2 else "<answer>7</answer>",
                "finish": "stop", "tokens": 9, "response_ids": np.arange(9, dtype=np.int32),
            }  # fmt: skip
            right = r % 2 == 0
            parts = {"part_task": float(right), "part_format": 1.0}
            score = {
                "value": float(right),
                "correct": right,
                "note": "" if r != 1 else "timeout after 5 s",
                **parts,
            }
            rows.append({**row, **score} if graded else row)
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{step:06}.parquet")
    pq.write_table(pa.Table.from_pylist([{**rows[0], "prompt": "an older step"}]), folder / f"{step - 1:06}.parquet")


class Page(HTMLParser):
    """Tags with their attributes, and each element's text by the class it stands in."""

    VOID = frozenset({"meta", "path", "line", "rect", "circle"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs).get("class", "")))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else ("", ""), data))

    def of(self, tag, style=None):
        return [text for (name, given), text in self.text if name == tag and (style is None or style in given.split())]


def page(run):
    parsed = Page(write_report(run).read_text())
    assert parsed.open == []  # every element is closed
    return parsed


def test_a_whole_run(tmp_path):
    parsed = page(fake_run(tmp_path, problems=64))
    results = json.loads((tmp_path / "results.json").read_text())
    assert parsed.of("h1") == ["quickstart"] and parsed.of("span", "state") == ["complete"]
    shares = [f"{100 * row['correct'] / row['total']:.1f}" for row in results]
    means = [f"{50 * (a['correct'] + b['correct']) / 64:.1f}" for a, b in zip(results[::2], results[1::2], strict=True)]
    rows = zip(shares[::2], shares[1::2], means, strict=True)
    shown = [text for text in parsed.of("b") if re.fullmatch(r"\d+\.\d", text)]
    assert shown[: 3 * 7] == [number for row in rows for number in row]
    assert len(parsed.of("span", "tag")) == 3  # the best of each domain and of the mean
    drawings = [given["aria-label"] for tag, given in parsed.tags if tag == "svg"]
    per_stage = {name: len(METRICS.get(stage["kind"], ())) for name, stage in STAGES.items()}
    assert len(drawings) == 1 + sum(per_stage.values())
    assert drawings[1:6] == ["held out loss", "loss", "grad norm", "lr", "tokens"]
    assert any("2.13.0" in text for text in parsed.of("dd"))
    assert any("grpo-arithmetic:" in text for text in parsed.of("pre"))  # the recipe


def test_comparisons_are_paired_and_named(tmp_path):
    parsed = page(fake_run(tmp_path, problems=256))
    numbers = [text for (tag, given), text in parsed.text if tag == "b" and re.match(r"[+−]|\d+\.\d %", text)]
    results = {
        (row["model"], row["domain"]): row["correct"] for row in json.loads((tmp_path / "results.json").read_text())
    }

    def points(a, b, domain):
        return f"{100 * (results[a, domain] - results[b, domain]) / 256:+.1f}".replace("-", "−")

    merged = sum(results["merged", d] - results["average", d] for d in DOMAINS) / 2
    assert numbers == [
        points("grpo-arithmetic", "sft-arithmetic", "arithmetic"),
        points("grpo-arithmetic", "base", "arithmetic"),
        points("grpo-strings", "sft-strings", "strings"),
        points("grpo-strings", "base", "strings"),
        f"{100 * merged / 256:+.1f}",
        *(f"{100 * results['merged', d] / results[f'grpo-{d}', d]:.1f} %" for d in DOMAINS),
    ]  # fmt: skip


def test_an_interval_is_green_where_it_lies_right_of_the_mark(tmp_path):
    axes = write_report(fake_run(tmp_path, problems=256)).read_text().split('<div class="axis">')[1:]
    seen = set()
    for axis in axes:
        mark, start, value = (float(each) for each in re.findall(r'style="left: ([\d.]+)%', axis))
        (sign, width) = re.findall(r'class="range (\w+)" style="left: [\d.]+%; width: ([\d.]+)%', axis)[0]
        assert 0 < start <= value <= start + float(width) < 100
        assert (sign == "above") == (start > mark and sign != "kept")
        seen.add(sign)
    assert len(axes) == 7 and seen == {"above", "kept"}


def test_a_partial_run_shows_what_is_there(tmp_path):
    done = ("sft-arithmetic", "sft-strings", "grpo-arithmetic")
    run = fake_run(tmp_path, finished=done)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "grpo-strings", "ki')  # being written
    parsed = page(run)
    assert parsed.of("span", "state") == ["3 of 7 stages done"]
    notes = parsed.of("text", "note")
    assert "grpo · at step 20" in notes and "distill · not yet" in notes and "average · not yet" in notes
    missing = parsed.of("td", "missing")
    assert missing == ["not finished yet", "not started yet", "not started yet", "not started yet"]


def test_timings_name_evaluations_and_peaks_that_are_not_a_stages_own(tmp_path):
    run = fake_run(tmp_path)
    write(run / "evaluations" / "times" / "merged.json", json.dumps({"wall_seconds": 83.0}))
    write(run / "evaluations" / "times" / "not-done.json", json.dumps({"wall_seconds": 1.0}))
    file = run / "stages" / "merged" / "done.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peak_since_start": True}))
    parsed = page(run)
    cells = parsed.of("td")
    assert "evaluation of merged" in cells
    assert "1 min 23 s" in parsed.of("span")
    assert "evaluation of not-done" not in cells
    assert [cell for cell in cells if "GiB" in cell].count("1.30 GiB since start") == 1


def test_a_folder_with_nothing_in_it_yet(tmp_path):
    parsed = page(tmp_path)
    assert parsed.of("span", "state") == ["nothing done yet"]
    assert len(parsed.of("p", "missing")) == 7 and all(
        text.endswith("not there yet.") for text in parsed.of("p", "missing")
    )


def test_a_run_without_its_recipe_is_still_drawn(tmp_path):
    run = fake_run(tmp_path)
    (run / "recipe.yaml").unlink()
    (run / "results.json").unlink()  # the scores come from the evaluations
    parsed = page(run)
    assert parsed.of("text", "name")[:2] == ["sft-arithmetic", "sft-strings"]
    assert len(parsed.of("span", "tag")) == 3


HOSTILE = "</pre><script>alert(1)</script><img src=//evil/x onerror=alert(1)>\"'><svg onload=alert(1)> {{ 7*7 }}"


def test_hostile_text_stays_text_and_the_page_loads_nothing(tmp_path):
    run = fake_run(tmp_path, hostile=HOSTILE)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"stage": "merged", "kind": "distill", "step": 61, "time": 0, HOSTILE: 1.0}) + "\n")
    write(run / "versions.json", json.dumps({HOSTILE: HOSTILE}))
    write(run / "recipe.yaml", (run / "recipe.yaml").read_text() + f"# {HOSTILE}\n")
    parsed = page(run)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "foreignobject",
        "use",
    }
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") or name in ("src", "srcset", "xlink:href") for name in attributes), (
            tag,
            attributes,
        )
        assert attributes.get("href", "#").startswith("#")
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"},
    ) in parsed.tags
    assert not re.search(r"url\(|@import|@font-face", "".join(parsed.of("style")))
    assert HOSTILE in parsed.of("pre", "said") and HOSTILE in parsed.of("dt") and HOSTILE in parsed.of("dd")
    assert any(HOSTILE in text for text in parsed.of("pre")[-1:])  # the recipe
    label = HOSTILE.replace("/", " / ")
    assert label in parsed.of("span") and f"step 61: {label} 1" in parsed.of("title")


def test_characters_that_hide_or_turn_text_are_spelt_out():
    assert visible("a\n\tb é 漢 <｜User｜>") == "a\n\tb é 漢 <｜User｜>"
    assert visible("\u202eab\u200b\x00\x1b[1m\ud800") == r"\u202eab\u200b\u0000\u001b[1m\ud800"
    assert visible("x" * 5000) == "x" * 4000 + "\n[1000 more characters]"


def test_samples_show_right_and_wrong_ones_of_the_last_step(tmp_path):
    parsed = page(fake_run(tmp_path, hostile="wrong answer"))
    cards = [given["class"] for tag, given in parsed.tags if tag == "article"]
    # Two of a sort: the merged model's answers in 2 domains, 2 experts' rollouts, distillation's in 2.
    assert cards.count("sample right") == cards.count("sample wrong") == 2 * (2 + 2)
    assert cards.count("sample ungraded") == 2 * 2
    prompts = parsed.of("pre")
    assert "Problem 0 of strings" in prompts and "Problem 1 of strings" in prompts
    assert "an older step" not in prompts
    assert "timeout after 5 s" in parsed.of("span")


def test_failed_grades_are_listed(tmp_path):
    parsed = page(fake_run(tmp_path))
    assert parsed.of("td", "happened") == ["timeout after 5 s"]
    assert parsed.of("h3")[-1] == "Grades that failed"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", "[{", r"results\.json: not JSON"),
        ("recipe.yaml", "a: [1", r"recipe\.yaml: not YAML"),
        (
            "metrics.jsonl",
            '{"stage": "a", "kind": "sft", "step": 1}\n{"stage"\n',
            r"metrics\.jsonl:2: not JSON",
        ),
        ("stages/merged/rollouts/000060.parquet", "PAR1", r"000060\.parquet: not a Parquet file"),
    ],
)
def test_a_spoilt_file_is_named_and_the_old_report_stays(tmp_path, name, content, message):
    run = fake_run(tmp_path)
    (run / "report.html").write_text("old")
    (run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report(run)
    assert (run / "report.html").read_text() == "old"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="none: no such folder"):
        write_report(tmp_path / "none")


# Drawings


def numbers(svg, pattern):
    return [tuple(map(float, found)) for found in re.findall(pattern, svg)]


def test_a_curve_is_where_its_axes_say():
    svg = line_chart(Curve("loss", [(1, 0.0), (2, 5.0), (3, 10.0)]))
    (path,) = re.findall(r'class="curve" d="([^"]*)"', svg)
    points = numbers(path, r"([\d.]+),([\d.]+)")
    ticks = {text: float(y) for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">(\d+)</text>', svg)}
    assert [y for _, y in points] == pytest.approx(
        [ticks["0"] - 3.5, (ticks["0"] + ticks["10"]) / 2 - 3.5, ticks["10"] - 3.5], abs=0.1
    )
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.11)
    assert "<title>step 2: loss 5</title>" in svg


def test_a_curve_has_gaps_dots_and_few_points():
    gap = line_chart(Curve("kl", [(1, 1.0), (2, None), (3, 2.0), (4, 3.0)]))
    assert re.search(r'd="M[\d.,]+h0M[\d.,]+L[\d.,]+"', gap)
    assert "no finite value" in line_chart(Curve("kl", [(1, None)]))
    assert "NaN" not in line_chart(Curve("one", [(5, 0.0)])) and "h0" in line_chart(Curve("one", [(5, 0.0)]))
    rng = np.random.default_rng(0)
    noisy = line_chart(Curve("reward", [(step, float(value)) for step, value in enumerate(rng.random(10_000))]))
    assert 'class="raw"' in noisy and len(noisy) < 20_000
    assert 'class="raw"' not in line_chart(Curve("lr", [(step, 1 - step / 100) for step in range(100)]))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.412, 0.83), (-3e-6, 2e-5), (1, 20000), (7, 7), (0, 0), (-1, -0.1)]
)
def test_ticks_are_round_and_enclose_the_values(low, high):
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 7
    step = ticks[1] - ticks[0]
    assert np.allclose(np.diff(ticks), step)
    assert f"{step:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")


def test_running_mean_of_a_line_is_the_line():
    points = [(float(x), 2.0 * x) for x in range(50)]
    means = running_mean(points, 5)
    assert np.allclose(means[2:-2], points[2:-2])
    assert means[0] == (0.0, 2.0)  # of the first three


def test_the_graph_goes_from_left_to_right():
    nodes = [Node(name, "sft", "", True) for name in ("base", "a", "b", "ab")]
    edges = [Edge("base", "a", False), Edge("base", "b", False), Edge("a", "ab", True), Edge("b", "ab", True)]
    boxes = numbers(stage_graph(nodes, edges), r'<rect x="([\d.]+)" y="([\d.]+)"')
    (base_x, base_y), (a_x, a_y), (b_x, b_y), (ab_x, ab_y) = boxes
    assert base_x < a_x == b_x < ab_x and a_y < b_y
    assert base_y == ab_y == (a_y + b_y) / 2
    assert stage_graph([], []) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.21, "8.2 s"),
        (41, "41 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text

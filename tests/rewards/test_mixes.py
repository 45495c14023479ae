"""Mixes of rewards through the grader: ours, a user's, a judge's; failures, code, and damaged outputs."""

import json
import random
from pathlib import Path

import pytest

from amalgam.errors import UserError
from amalgam.rewards.code import same
from amalgam.rewards.grader import MAX_TEXT, Grader
from amalgam.rewards.problem import Problem, Score
from amalgam.rewards.registry import REWARDS

ADD = {"inputs": ["1 2\n", "3 4\n", "-1 1\n"], "outputs": ["3\n", "7\n", "0\n"]}
UNIT = {"tests": ["assert f(2) == 4", "assert f(-3) == 9"], "entry_point": "f", "prompt": "def f(x):\n"}


def problem(rewards: dict, answer: str = "", question: str = "What?", **entry) -> Problem:
    return Problem("d", "rows", 1, question, answer, entry, {}, rewards)


@pytest.fixture
def grader(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with Grader(deadline=1.0) as grader:
        yield grader


def test_a_mix_travels_with_its_problem(grader):
    rewards = {"own": {"reward": "own_rewards:contains", "weight": 3, "word": "cat"}, "format": {"style": "any"}}
    scores = grader.grade(
        [
            (problem(rewards), "a cat", True, "chat"),
            (problem(rewards), "a cat", False, "chat"),
            (problem({"math": 1}, "1/2"), "\\boxed{0.5}", True, "chat"),
            (problem({"length": {"free": 2, "limit": 4}}), "x", True, "chat", 3),
            (problem({"own": {"reward": "own_rewards:contains"}}, "dog"), "a cat", True, "chat"),
        ]
    )
    assert scores == [
        Score(1.0, True, {"own": 1.0, "own.characters": 0.5, "format": 1.0}),
        Score(0.75, False, {"own": 1.0, "own.characters": 0.5, "format": 0.0}),
        Score(1.0, True, {"math": 1.0}),
        Score(0.5, False, {"length": 0.5}, "3 tokens"),
        Score(0.0, False, {"own": 0.0, "own.characters": 0.5}, "not in it"),
    ]
    assert (grader.graded, grader.failures) == (5, {})
    assert grader.seconds > 0


@pytest.mark.parametrize(
    ("text", "kind", "note"),
    [
        ("hang", "timeout", "timeout after 1 s: rows"),
        ("raise", "raised", "KeyError: 'x'"),
        ("exit", "died", "grader died: exit code 9"),
        ("memory", "raised", "MemoryError"),
        ("number", "raised", "TypeError: own_rewards:misbehaves returned float and not a Score"),
        ("nan", "raised", "ValueError: the value of own_rewards:misbehaves is nan"),
        ("text", "raised", "ValueError: the value of own_rewards:misbehaves is '1'"),
        ("part", "raised", "ValueError: the x of own_rewards:misbehaves is inf"),
    ],
)
def test_a_users_reward_that_misbehaves_costs_its_own_sample(grader, text, kind, note):
    mix = problem({"own": {"reward": "own_rewards:misbehaves"}, "format": {"style": "any"}})
    right, failed, after = grader.grade([(mix, each, True, "chat") for each in ("fine", text, "many")])
    assert (right.value, after.value) == (0.75, 1.0)
    assert failed == Score(0.0, False, {"own": 0.0, "format": 0.0}, note)
    assert grader.failures == {kind: 1}


def test_a_response_that_is_too_long_fails_unread(grader):
    (score,) = grader.grade([(problem({"format": 1}), "x" * (MAX_TEXT + 1), True, "chat")])
    assert score.note == f"a response of {MAX_TEXT + 1} characters; at most {MAX_TEXT}"
    assert grader.failures == {"too long": 1}


def test_a_power_tower_costs_its_deadline_and_an_evil_answer_runs_nothing(grader, tmp_path):
    breach = tmp_path / "breach"
    evil = [f"__import__('os').system('touch {breach}')", f"Symbol('x').func.__globals__['open']('{breach}','w')"]
    texts = ["\\boxed{9^{9^{9^{9^9}}}}", *[f"\\boxed{{{each}}}" for each in evil], *evil, "\\boxed{4}"]
    scores = grader.grade([(problem({"math": 1}, "4"), text, True, "chat") for text in texts])
    assert [score.correct for score in scores] == [False] * 5 + [True]
    assert not breach.exists()


def test_a_judge_is_asked_once_for_a_batch(monkeypatch):
    asked = []

    def generate(prompts):
        asked.append(len(prompts))
        return ["Grade: 5"] * len(prompts)

    with Grader(judge=generate) as grader:
        items = [(problem({"judge": 1, "format": {"style": "any"}}), "x", True, "chat")] * 2
        items.append((problem({"judge": 1}), "y", True, "chat"))
        assert grader.grade(items) == [
            Score(0.75, True, {"judge": 0.5, "format": 1.0}),
            Score(0.75, True, {"judge": 0.5, "format": 1.0}),
            Score(0.5, False, {"judge": 0.5}),
        ]
        assert asked == [3]
    with Grader() as grader, pytest.raises(UserError, match="nobody handed in a generator"):
        grader.grade([(problem({"judge": 1}), "y", True, "chat")])


RIGHT = "Here:\n```python\na, b = map(int, input().split())\nprint(a + b)\n```\nDone."


@pytest.mark.parametrize(
    ("text", "entry", "value", "partial", "note"),
    [
        (RIGHT, ADD, 1, 1, ""),
        ("<answer>print(sum(map(int, input().split())))</answer>", ADD, 1, 1, ""),
        ("print(3)", ADD, 0, 1 / 3, "1 of 3: printed '3'"),
        (
            "```py\nx = input()\nassert x != '3 4'\nprint(eval(x.replace(' ', '+')))\n```",
            ADD,
            0,
            2 / 3,
            "exit 1 AssertionError",
        ),
        ("print(", ADD, 0, 0, "SyntaxError"),
        ("while True: pass", ADD, 0, 0, "0 of 3: timeout"),
        ("", ADD, 0, 0, "0 of 3: printed ''"),
        ("```python\ndef f(x):\n    return x * x\n```", UNIT, 1, 1, ""),
        ("```python\n    return x * x\n```", UNIT, 1, 1, ""),
        ("```python\ndef f(x): return 4\n```", UNIT, 0, 1 / 2, "1 of 2: AssertionError"),
        ("def f(x): return y", UNIT, 0, 0, "NameError"),
        ("def f(x): import os; os._exit(0)", UNIT, 0, 0, "the run ended"),
        ("x", {"inputs": [], "outputs": []}, 0, 0, "no tests"),
    ],
)
def test_code(text, entry, value, partial, note):
    for wants, share in ((False, value), (True, partial)):
        score = _code_grader().grade([(problem({"code": {"partial": wants, "wall": 1}}, **entry), text, True, "chat")])[
            0
        ]
        assert score.value == pytest.approx(share), score
        assert score.correct is (value == 1)
        assert note in score.note
    assert not _code_grader().failures


_kept: list[Grader] = []


def _code_grader() -> Grader:
    if not _kept:
        _kept.append(Grader())
    return _kept[0]


@pytest.fixture(scope="module", autouse=True)
def _no_grader_stays():
    yield
    for each in _kept:
        each.close()


@pytest.mark.parametrize(
    ("given", "wanted", "how", "equal"),
    [
        ("1 2 \n3\n\n", "1 2\n3", "lines", True),
        ("1  2", "1 2", "lines", False),
        ("1  2\n3", "1 2 3", "words", True),
        ("0.3333333", "0.33333333", "words", False),
        ("0.3333333 a", "0.33333333 a", "numbers", True),
        ("0.34", "0.33", "numbers", False),
        ("1 2", "1", "numbers", False),
        ("nan", "1", "numbers", False),
    ],
)
def test_outputs_are_compared(given, wanted, how, equal):
    assert same(given, wanted, how) is equal


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
EVERY = {
    "math": problem({"math": 1}, "\\frac{1}{2}"),
    "choice": problem({"choice": 1}, "B", choices=["x", "y"]),
    "json": problem({"json": 1}, schema=SCHEMA),
    "tool-call": problem({"tool-call": {"partial": True}}, calls=[{"name": "f", "arguments": {"x": 1}}]),
    "instruction": problem(
        {"instruction": {"partial": True}},
        instruction_id_list=["punctuation:no_comma", "detectable_format:json_format", "startend:quotation"],
        kwargs=[{}, {}, {}],
    ),
    "format": problem({"format": {"style": "boxed"}}),
    "length": problem({"length": {"free": 10, "limit": 100, "unit": "characters"}}),
    "language": problem({"language": 1}),
    "reasoning-gym": Problem("d", "chain_sum", 1, "1 + 1 =", "2", {"answer": "2", "metadata": {}}),
    "code": Problem("d", "rows", 1, "", "", dict(ADD), {}, {"code": {"wall": 1}}),
    "judge": problem({"judge": 1}),
}
GOOD = [
    "\\boxed{\\frac{1}{2}}", "<answer>B</answer>", '{"a": 1}', '{"name": "f", "arguments": {"x": 1}}', "hm</think>ok",
    RIGHT, "\\boxed{\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}}", "$x = \\sqrt[3]{\\frac{a}{b}} + \\int_0^1 f$",
    "The answer is (C).",
]  # fmt: skip
NOISE = [
    *"\0\ud800\u202eé{}\\$[<\n1^_🎲\",", "\\frac", "\\boxed{", "```", "｜DSML｜", "</think>", "9" * 50,
]  # fmt: skip


def damaged(seed: int) -> str:
    """A good output with pieces cut, doubled, swapped and replaced by noise; or noise alone."""
    chance = random.Random(seed)
    text = chance.choice([*GOOD, "".join(chance.choices(NOISE, k=chance.randrange(60)))])
    for _ in range(chance.randrange(6)):
        a, b = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        cut, noise = text[a:b], chance.choice(NOISE)
        text = text[:a] + chance.choice(["", cut + cut, cut[::-1], noise]) + text[b:]
    return text[:5000]


def test_every_reward_is_in_the_fuzz():
    assert set(EVERY) == set(REWARDS)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"code"}))
def test_damaged_outputs_crash_no_reward(name):
    items = [(EVERY[name], damaged(seed), seed % 2 == 0, "high" if seed % 5 == 0 else "chat") for seed in range(60)]
    with Grader(deadline=5.0, judge=lambda prompts: [damaged(len(prompt)) for prompt in prompts]) as grader:
        scores = grader.grade(items)
    assert all(0 <= score.value <= 1 for score in scores)
    assert not set(grader.failures) - {"raised", "timeout"}
    assert grader.failures["timeout"] <= 1, [score.note for score in scores if score.note.startswith("timeout")]
    assert all(json.dumps(score.note) and "\n" not in score.note for score in scores)


def test_damaged_programs_crash_no_grader():
    scores = _code_grader().grade([(EVERY["code"], damaged(seed), True, "chat") for seed in range(25)])
    assert all((score.value == 1.0) is (score.note == "") for score in scores)
    assert not _code_grader().failures

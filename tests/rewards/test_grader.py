"""Grading: answers, formats, every task's scorer, and scorers that misbehave."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from amalgam.rewards import grader as grader_module
from amalgam.rewards.answers import parse
from amalgam.rewards.domains import CODE_SCORED, make_dataset, task_names
from amalgam.rewards.grader import Grader
from amalgam.rewards.problem import Problem, Score, decode, encode

BAD = (sys.executable, "-P", str(Path(__file__).with_name("bad_grader.py")))
# Tasks that take over .1 s to build, to draw from or to score.
SLOW = (
    "advanced_geometry arc_agi codeio figlet_font futoshiki group_anagrams knight_swap rearc rubiks_cube "
    "word_ladder zebra_puzzles"
).split()
# Tasks that store no answer.
OPEN = set("boxnet graph_color propositional_logic rubiks_cube rush_hour".split())


def quick_tasks() -> list[str]:
    return sorted(set(task_names()) - {*SLOW, *CODE_SCORED})


def problem_of(task: str, **parameters) -> Problem:
    entry = make_dataset(task, parameters, seed=3, size=1)[0]
    return Problem("d", task, 3, entry["question"], entry["answer"] or "", entry, parameters)


def misbehave(*answers: str) -> list[grader_module.Item]:
    problem = Problem("d", "misbehave", 0, "?", "right", {"question": "?", "answer": "right", "metadata": {}})
    return [(problem, f"<answer>{answer}</answer>", True, "chat") for answer in answers]


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


@pytest.fixture(scope="module")
def bad_grader():
    with Grader(deadline=0.3, command=BAD) as grader:
        yield grader


@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        ("<answer>5</answer>", "chat", ("5", True)),
        (" \n<answer> 5\n</answer>\n", "chat", ("5", True)),
        ("<answer>5\n6</answer>", "chat", ("5\n6", True)),
        ("<answer></answer>", "chat", ("", True)),
        ("It is <answer>5</answer>", "chat", ("5", False)),
        ("<answer>5</answer>.", "chat", ("5", False)),
        ("5", "chat", (None, False)),
        ("", "chat", (None, False)),
        ("<answer>5", "chat", (None, False)),
        ("</answer>5<answer>", "chat", (None, False)),
        ("<answer>5</answer><answer>5</answer>", "chat", (None, False)),
        ("<answer><answer>5</answer>", "chat", (None, False)),
        ("<answer>5</answer></think>", "chat", (None, False)),
        ("think</think><answer>5</answer>", "chat", (None, False)),
        ("think</think><answer>5</answer>", "high", ("5", True)),
        ("<answer>4</answer> no</think><answer>5</answer>", "high", ("5", True)),
        ("</think><answer>5</answer>", "high", ("5", True)),
        ("think</think>so <answer>5</answer>", "high", ("5", False)),
        ("think</think>", "high", (None, False)),
        ("<answer>5</answer>", "high", (None, False)),
        ("a</think>b</think><answer>5</answer>", "high", (None, False)),
        ("a</think><think><answer>5</answer>", "high", (None, False)),
    ],
)
def test_parse(text, mode, expected):
    assert parse(text, mode) == expected


def test_parse_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="unknown mode 'max'"):
        parse("<answer>5</answer>", "max")


def test_scores_combine_the_tasks_own_score_and_the_format(grader):
    problem = problem_of("chain_sum")
    right, wrong = f"<answer>{problem.answer}</answer>", "<answer>x</answer>"
    own = make_dataset("chain_sum", {}, seed=0, size=1).score_answer("x", problem.entry)
    assert grader.grade(
        [
            (problem, right, True, "chat"),
            (problem, "hm</think>" + right, True, "high"),
            (problem, right, False, "chat"),
            (problem, "It is " + right, True, "chat"),
            (problem, wrong, True, "chat"),
            (problem, problem.answer, True, "chat"),
        ]
    ) == [
        Score(1.0, True, {"task": 1.0, "format": 1.0}),
        Score(1.0, True, {"task": 1.0, "format": 1.0}),
        Score(0.9, False, {"task": 1.0, "format": 0.0}),
        Score(0.9, False, {"task": 1.0, "format": 0.0}),
        Score(0.9 * own + 0.1, False, {"task": own, "format": 1.0}),
        Score(0.0, False, {"task": 0.0, "format": 0.0}),
    ]


def test_weights_are_arguments():
    problem = problem_of("chain_sum")
    with Grader(weights={"task": 0.5, "format": 0.5}) as grader:
        (score,) = grader.grade([(problem, f"<answer>{problem.answer}</answer>", False, "chat")])
    assert score == Score(0.5, False, {"task": 1.0, "format": 0.0})


def test_scorers_know_the_tasks_parameters(grader):
    """decimal_arithmetic tolerates one unit of the last place that its parameters ask for."""
    problem = Problem("d", "decimal_arithmetic", 0, "?", "1.25", {"answer": "1.25"})
    coarse = replace(problem, parameters={"min_num_decimal_places": 1, "max_num_decimal_places": 1})
    scores = grader.grade([(item, "<answer>1.2</answer>", True, "chat") for item in (problem, coarse)])
    assert [score.correct for score in scores] == [False, True]


def test_scores_keep_their_places_among_many_items_and_workers():
    problems = [problem_of("chain_sum"), problem_of("gcd"), problem_of("leg_counting")]
    items = [
        (problems[i % 3], f"<answer>{problems[i % 3].answer if i % 7 else '?'}</answer>", True, "chat")
        for i in range(500)
    ]
    with Grader(workers=2) as grader:
        assert [score.correct for score in grader.grade(items)] == [i % 7 > 0 for i in range(500)]
        assert grader.grade([]) == []
        assert not grader.failures


def test_every_tasks_own_answer_gets_full_marks(grader):
    problems = [problem_of(task) for task in quick_tasks()]
    assert len(problems) > 80
    scores = grader.grade([(item, f"<answer>{item.answer}</answer>", True, "chat") for item in problems])
    assert {item.task for item, score in zip(problems, scores, strict=True) if not score.correct} <= OPEN
    assert not {score.note for score in scores} - {""}


def test_every_tasks_scorer_survives_nonsense_and_runs_none(grader, tmp_path):
    code = f"open({str(tmp_path / 'breach')!r}, 'w')"
    answers = [code, f"[{code}]", f"1 + {code}", "", "nonsense", "1\n2", "[[1]]", "{}", "é→×", "9" * 5000]
    problems = [problem_of(task) for task in quick_tasks()]
    items = [(item, f"<answer>{answer}</answer>", True, "chat") for item in problems for answer in answers]
    scores = grader.grade(items)
    assert set(grader.failures) <= {"raised"}
    assert all(score.value == 0 for score in scores if score.note)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answer", "kind", "note"),
    [
        ("hang", "timeout", "timeout after 0.3 s: misbehave"),
        ("raise", "raised", "ValueError: one line!!!"),
        ("sys.exit", "raised", "SystemExit: 4"),
        ("memory", "raised", "MemoryError"),
        ("eval", "raised", "PermissionError: a scorer may not compile code"),
        ("nan", "raised", "ValueError: its score is nan"),
        ("exit", "died", "grader died: exit code 3"),
        ("crash", "died", "grader died: signal 11"),
    ],
)
def test_a_scorer_that_misbehaves_costs_its_own_sample(bad_grader, answer, kind, note):
    before = bad_grader.failures[kind]
    scores = bad_grader.grade(misbehave("right", "wrong", answer, "right", "over", "under"))
    assert [score.parts["task"] for score in scores] == [1, 0, 0, 1, 1, 0]
    assert [bool(score.note) for score in scores] == [False, False, True, False, False, False]
    assert scores[2] == Score(0.0, False, {"task": 0.0, "format": 0.0}, scores[2].note)
    assert scores[2].note.startswith(note)
    assert len(scores[2].note) <= 200
    assert bad_grader.failures[kind] == before + 1


def test_a_scorers_output_and_input_are_not_the_parents(bad_grader):
    scores = bad_grader.grade(misbehave("print", "read", "right"))
    assert [score.parts["task"] for score in scores] == [0, 1, 1]


def test_a_child_that_died_between_two_calls_is_replaced(bad_grader):
    bad_grader.grade(misbehave("right"))
    process = bad_grader._children[0]._process
    process.kill()
    process.wait(timeout=10)
    assert bad_grader.grade(misbehave("right"))[0].correct


def test_long_answers_fail_unread(bad_grader):
    (score,) = bad_grader.grade(misbehave("x" * 20_001))
    assert score == Score(0.0, False, {"task": 0.0, "format": 0.0}, "an answer of 20001 characters; at most 20000")
    assert bad_grader.failures["too long"] == 1


def test_threads_have_a_grader_each(grader, bad_grader):
    problem = problem_of("chain_sum")
    results = {}
    jobs = {
        "good": lambda: grader.grade([(problem, f"<answer>{problem.answer}</answer>", True, "chat")] * 200),
        "bad": lambda: bad_grader.grade(misbehave(*["right", "raise"] * 100)),
    }
    threads = [threading.Thread(target=lambda name=name: results.update({name: jobs[name]()})) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [score.correct for score in results["good"]] == [True] * 200
    assert [score.correct for score in results["bad"]] == [True, False] * 100


def test_a_task_without_a_scorer_is_an_error_with_the_childs_words(grader):
    misspelt = replace(problem_of("chain_sum"), task="chain_sums")
    with pytest.raises(RuntimeError, match="was prepared .*UserError: chain_sums: reasoning-gym has no task"):
        grader.grade([(misspelt, "<answer>1</answer>", True, "chat")])


def test_a_child_that_cannot_start_is_an_error_with_its_words():
    command = (sys.executable, "-c", "raise ImportError('no pycosat')")
    with (
        Grader(command=command) as grader,
        pytest.raises(RuntimeError, match=r"was started .*exit code 1.*ImportError: no pycosat"),
    ):
        grader.grade(misbehave("right"))


def test_no_child_outlives_its_grader():
    with Grader(workers=2, command=BAD) as grader:
        pids = [child._process.pid for child in grader._children if child._process]
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_child_imports_no_torch():
    code = (
        "import sys; from amalgam.rewards import domains, grader; early = set(sys.modules);"
        "domains.task_names(); print('reasoning_gym' in early, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, check=True, timeout=60)
    assert run.stdout.split() == [b"False", b"False"]


def test_problems_survive_json():
    entry = {"board": ((1, 2), [3.5, None]), "graph": {1: {"$tuple": [1]}, (2, 3): True}, "": {}}
    problem = Problem("d", "chain_sum", 3, "é?", "1", entry, {"min_terms": 2})
    assert Problem.from_json(json.loads(json.dumps(problem.to_json()))) == problem
    assert decode(json.loads(json.dumps(encode(entry)))) == entry


def test_entries_hold_what_json_can_carry():
    with pytest.raises(TypeError, match="an entry holds a set"):
        encode({"metadata": {1, 2}})

"""Domains: which problems a split holds, and what is refused."""

import datetime
import subprocess
import sys
import threading
from typing import get_args

import pytest

from amalgam.errors import UserError
from amalgam.rewards import domains
from amalgam.rewards.domains import BLOCK, POSITIONS, RANGES, TRIES, Domain, Split, make_scorer, task_names

SUM = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
SPLITS: tuple[Split, ...] = get_args(Split)


def domain(tasks=SUM, heldout=64, seed=0, demonstrations=64, mode="chat") -> Domain:
    return Domain("d", mode, tasks, demonstrations, heldout, seed)


def questions(problems) -> list[str]:
    return [problem.question for problem in problems]


def test_problems_are_the_same_whenever_and_wherever_asked():
    tasks = {**SUM, "gsm_symbolic": {}, "spell_backward": {"min_word_len": 3}}
    first = domain(tasks)
    for split in SPLITS:
        problems = first.problems(split, 0, 60)
        assert domain(tasks).problems(split, 50, 10) == problems[50:]
        assert first.problems(split, 7, 1) == problems[7:8]
    program = (
        "from amalgam.rewards.domains import Domain\n"
        f"d = Domain('d', 'chat', {tasks!r}, 64, 64, 0)\n"
        "print([p.question for p in d.problems('train', 55, 5)])"
    )
    run = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60)
    assert run.stdout == f"{questions(first.problems('train', 55, 5))}\n", run.stderr


def test_threads_that_share_a_domain_draw_one_after_the_other(monkeypatch):
    """Another thread's call does not end, or reach the generator, while one is in it."""
    shared, inside, others = domain(), [], []

    def make_dataset(*arguments, **options):
        inside.append(threading.current_thread())
        if len(inside) == 1:
            others.append(threading.Thread(target=shared.problems, args=("train", 0, 4)))
            others[0].start()
            others[0].join(timeout=0.2)
            assert len(inside) == 1 and others[0].is_alive()
        return original(*arguments, **options)

    original = domains.make_dataset
    shared.problems("heldout", 0, 4)
    monkeypatch.setattr(domains, "make_dataset", make_dataset)
    found = shared.problems("train", 0, 4)
    others[0].join(timeout=60)
    assert found == domain().problems("train", 0, 4)
    assert inside.count(others[0]) == 0, "what one thread has built serves the other"


def test_tasks_take_turns():
    tasks = {**SUM, "gcd": {}, "lcm": {}}
    names = [problem.task for problem in domain(tasks).problems("train", 1, 5)]
    assert names == ["gcd", "lcm", "chain_sum", "gcd", "lcm"]


def test_the_index_is_the_generators_seed():
    (problem,) = domain().problems("train", 300, 1)
    dataset = domains.make_dataset("chain_sum", SUM["chain_sum"], seed=problem.index, size=1)
    assert dataset[0]["question"] == problem.question
    first, end = RANGES["train"]
    assert first <= problem.index < end


def test_ranges_of_seeds_are_disjoint_whole_blocks_below_numpys_limit():
    assert set(RANGES) == set(SPLITS)
    ends = sorted(RANGES.values())
    assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:], strict=False))
    assert ends[-1][1] <= 2**32
    assert all(edge % BLOCK == 0 for pair in ends for edge in pair)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**40])
def test_splits_share_no_problem_and_no_question_with_heldout(seed):
    """Of 16,400 questions 2,000 are held out, so that plain draws would meet them hundreds of times."""
    numbers = domain(heldout=2000, seed=seed, demonstrations=1000)
    problems = {split: numbers.problems(split, 0, 1000) for split in SPLITS}
    problems["heldout"] = numbers.problems("heldout", 0, 2000)
    identities = [(problem.task, problem.index) for split in problems.values() for problem in split]
    assert len(set(identities)) == len(identities)
    held_out = set(questions(problems["heldout"]))
    assert len(held_out) == 2000
    for split in SPLITS[1:]:
        assert held_out.isdisjoint(questions(problems[split])), split
    assert set(questions(problems["validation"])).isdisjoint(questions(problems["demonstrations"]))
    replaced = [p for p in problems["train"] if p.index % BLOCK >= POSITIONS]
    assert len(replaced) > 50


def test_a_replacement_does_not_move_the_other_problems():
    few, many = (domain(heldout=heldout).problems("train", 0, 300) for heldout in (1, 500))
    moved = [a.index != b.index for a, b in zip(few, many, strict=True)]
    assert 0 < sum(moved) < 150


def test_only_the_fixed_splits_are_the_same_for_every_seed():
    for split in SPLITS:
        same = domain(seed=0).problems(split, 0, 20) == domain(seed=1).problems(split, 0, 20)
        assert same == (split in ("heldout", "corpus")), split


def test_no_question_is_held_out_twice_across_tasks():
    tasks = {"chain_sum": {"max_digits": 1, "max_terms": 2}, **SUM}
    with pytest.raises(UserError, match="too small"):
        domain({"chain_sum": {"max_digits": 1, "max_terms": 2}}, heldout=201).problems("heldout", 0, 1)
    assert len(set(questions(domain(tasks, heldout=100).problems("heldout", 0, 100)))) == 100


def test_heldout_ends_where_the_recipe_says():
    with pytest.raises(ValueError, match="d has 64 held-out problems, not 65"):
        domain().problems("heldout", 60, 5)


def test_a_space_too_small_is_refused_with_its_numbers():
    coins = {"chain_sum": {"max_digits": 1, "min_terms": 1, "max_terms": 1}}
    with pytest.raises(UserError, match=rf"d\.tasks\.chain_sum: .*too small: {TRIES} draws .* 10 different"):
        domain(coins, heldout=11).problems("heldout", 0, 1)
    with pytest.raises(UserError, match=r"problem 0 of train .* 10 different .*lower heldout from 10"):
        domain(coins, heldout=10).problems("train", 0, 1)


def test_demonstrations_get_full_marks():
    words = domain({**SUM, "spell_backward": {}}, mode="high")
    for problem in words.problems("demonstrations", 0, 10):
        answer = words.demonstration(problem).removeprefix("<answer>").removesuffix("</answer>")
        assert make_scorer(problem.task, problem.parameters)(answer, problem.entry) == 1.0
        assert words.messages(problem) == [{"role": "user", "content": problem.question}]


def test_a_task_without_right_answers_trains_but_does_not_demonstrate():
    logic = domain({"propositional_logic": {}}, heldout=2)
    assert len(logic.problems("train", 0, 2)) == 2
    for split in ("demonstrations", "validation"):
        with pytest.raises(UserError, match="propositional_logic: cannot be demonstrated: .*'', scores 0"):
            logic.problems(split, 0, 1)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"chain_sums": {}}, ".chain_sums: reasoning-gym has no task 'chain_sums'; did you mean"),
        ({"composite": {}}, ".composite: reasoning-gym has no task 'composite'"),
        ({"zzz": {}}, ".zzz: reasoning-gym has no task 'zzz'; it has ab, acre,"),
        ({}, "domains.d.tasks: names no task"),
        (
            {"chain_sum": {"min_term": 2}},
            ".min_term: chain_sum has no such parameter; did you mean min_terms? it takes min_terms,"
            " max_terms, min_digits, max_digits, allow_negation",
        ),
        ({"chain_sum": {"seed": 2}}, ".chain_sum.seed: chain_sum has no such parameter"),
        ({"chain_sum": {"min_terms": "two"}}, ".chain_sum.min_terms: 'two' does not fit; Input should be"),
        ({"chain_sum": {"min_terms": 9}}, ".chain_sum: chain_sum refuses {'min_terms': 9}: max_terms must"),
        ({"spell_backward": {"min_word_len": 80, "max_word_len": 90}}, ": reasoning-gym draws no problem"),
        ({"countdown": {}}, ".countdown: its scorer runs Python code"),
        ({"ransom_note": {}}, ".ransom_note: its problems depend on Python's hash seed"),
    ],
)
def test_what_is_refused(tasks, message):
    with pytest.raises(UserError) as error:
        domain(tasks)
    assert str(error.value).startswith("domains.d.tasks")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match=r"domains\.d\.mode: 'max' is not one of chat, high"):
        domain(mode="max")


def test_parameters_take_the_types_that_the_task_declares():
    """YAML gives a date, and a list where the task wants a tuple; a problem carries both as JSON."""
    parameters = {"min_date": datetime.date(2000, 1, 1), "task_types": ["date"]}
    (problem,) = domain({"time_intervals": parameters}, heldout=2).problems("train", 0, 1)
    assert problem.parameters == {"min_date": "2000-01-01", "task_types": ["date"]}
    assert make_scorer(problem.task, problem.parameters)(problem.answer, problem.entry) == 1.0


def test_task_names():
    names = task_names()
    assert names == sorted(names)
    assert len(names) > 100
    assert {"chain_sum", "spell_backward"} < set(names)


def test_a_missing_dependency_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("reasoning_gym", "pycosat")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycosat", None)
    with pytest.raises(UserError, match=r"reasoning-gym cannot be imported: .*pycosat.* needs a C compiler"):
        task_names()

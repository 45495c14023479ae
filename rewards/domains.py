"""Domains: problems from reasoning-gym's generators (Apache-2.0), in splits that share no problem.

reasoning-gym draws item i of a dataset from the seed (dataset's seed + i), and a few tasks from the dataset's
seed too (gsm_symbolic). So a dataset is always one block of `BLOCK` seeds that starts at a multiple of
`BLOCK`, and a problem's own seed tells everything. Each split owns a range of seeds, and each of its problems
`TRIES` of them: the first draw, and those that replace a question which is taken. The layout is our choice.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import threading
import typing
from collections.abc import Callable, Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from .problem import Problem

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

Split = Literal["heldout", "corpus", "demonstrations", "validation", "train"]

MODES = ("chat", "high")
TRIES = 64  # draws for one position until it counts as impossible
POSITIONS = 256  # positions in a block: building a dataset takes up to a second, drawing from it microseconds
BLOCK = POSITIONS * TRIES
GOLDEN = (5**0.5 - 1) / 2

# A split's range of seeds, first and one past the last. They stay below numpy's limit of 2**32.
RANGES: dict[Split, tuple[int, int]] = {
    "heldout": (0, 2**28),
    "corpus": (2**28, 2 * 2**28),
    "demonstrations": (2 * 2**28, 3 * 2**28),
    "validation": (3 * 2**28, 4 * 2**28),
    "train": (2**31, 2**32),
}
FIXED: tuple[Split, ...] = ("heldout", "corpus")  # the same problems whatever the run's seed

# Generators of reasoning-gym 0.1.25 that iterate over sets of strings: their problems vary by process.
HASH_SEEDED = (
    "codeio isomorphic_strings knight_swap list_functions polynomial_multiplication ransom_note word_ladder"
).split()
# Those whose scorers call `eval` (some on the answer, through sympy), which a grading process forbids.
CODE_SCORED = (
    "bitwise_arithmetic countdown intermediate_integration number_sorting polynomial_multiplication puzzle24 "
    "simple_integration"
).split()


def task_names() -> list[str]:
    """reasoning-gym's tasks, sorted; not its `composite`, as a domain mixes tasks itself."""
    return sorted(set(_factory().DATASETS) - {"composite"})


def make_dataset(task: str, parameters: dict[str, Any], seed: int, size: int) -> ProceduralDataset:
    """reasoning-gym's dataset of `size` items, with the parameters checked as `check_parameters` does."""
    typed = check_parameters(task, parameters, task)
    dataset, config = _factory().DATASETS[task]
    return dataset(config=config(**typed, seed=seed, size=size))


def make_scorer(task: str, parameters: dict[str, Any]) -> Callable[[str, dict[str, Any]], float]:
    """The task's own `score_answer(answer, entry)`. Raises: UserError for those of `CODE_SCORED`."""
    _check_scorer(task, task)
    return make_dataset(task, parameters, seed=0, size=1).score_answer


def check_parameters(task: str, parameters: dict[str, Any], where: str) -> dict[str, Any]:
    """The parameters in the types that the task's config declares (a YAML list as a tuple, say).

    Raises: UserError, starting with `where`, for an unknown task or parameter, a wrong type, or a combination
    that the task itself refuses.
    """
    from pydantic import TypeAdapter, ValidationError

    if task not in (names := task_names()):
        near = " or ".join(difflib.get_close_matches(task, names, n=3, cutoff=0.5))
        hint = f"did you mean {near}?" if near else f"it has {', '.join(names)}"
        raise UserError(f"{where}: reasoning-gym has no task {task!r}; {hint}")
    config = _factory().DATASETS[task][1]
    types = typing.get_type_hints(config)
    valid = [field.name for field in dataclasses.fields(config) if field.name not in ("seed", "size")]
    typed = {}
    for key, value in parameters.items():
        if key not in valid:
            near = "".join(f"did you mean {name}? " for name in difflib.get_close_matches(key, valid, n=1))
            raise UserError(f"{where}.{key}: {task} has no such parameter; {near}it takes {', '.join(valid)}")
        try:
            typed[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"{where}.{key}: {value!r} does not fit; {reason}") from error
    try:
        checked = config(**typed)
        if hasattr(checked, "validate"):
            checked.validate()
    except (AssertionError, TypeError, ValueError) as error:
        text = f"{where}: {task} refuses {parameters}: {error}; it takes {', '.join(valid)}"
        raise UserError(text) from error
    return typed


class Domain:
    """The problems of one domain of a recipe; its tasks take turns. Threads may share one.

    Args:
        name: the recipe's name of the domain.
        mode: "chat" or "high", how its problems are answered.
        tasks: reasoning-gym's names, each with its parameters.
        demonstrations: how many SFT trains on.
        heldout: how many problems evaluation may use.
        seed: the run's.
        rewards: as for `registry.mix`; None for the tasks' own scorers and the format.

    Raises: UserError for an unknown task or a parameter that the task does not take.
    """

    def __init__(
        self,
        name: str,
        mode: str,
        tasks: dict[str, dict[str, Any]],
        demonstrations: int,
        heldout: int,
        seed: int,
        rewards: dict[str, Any] | None = None,
    ) -> None:
        from pydantic_core import to_jsonable_python

        where = f"domains.{name}"
        if mode not in MODES:
            raise UserError(f"{where}.mode: {mode!r} is not one of {', '.join(MODES)}")
        if not tasks:
            raise UserError(f"{where}.tasks: names no task; reasoning-gym has {', '.join(task_names())}")
        for task, parameters in tasks.items():
            check_parameters(task, parameters, f"{where}.tasks.{task}")
            _check_scorer(task, f"{where}.tasks.{task}")
            if task in HASH_SEEDED and sys.flags.hash_randomization:
                raise UserError(
                    f"{where}.tasks.{task}: its problems depend on Python's hash seed and vary by process; "
                    "choose another task, or set PYTHONHASHSEED=0 in the environment"
                )
        self.name, self.mode, self.tasks = name, mode, to_jsonable_python(tasks)
        self.demonstrations, self.heldout, self.seed = demonstrations, heldout, seed
        self._rewards = rewards or {}
        self._names = list(tasks)
        self._blocks: dict[tuple[str, Split], tuple[int, ProceduralDataset]] = {}
        self._demonstrable = False
        self._lock = threading.RLock()  # stages draw side by side in threads, and reasoning-gym promises them nothing
        for i in range(len(tasks)):  # only drawing shows that the parameters leave something to draw
            self._draw("heldout", i, ())

    def problems(self, split: Split, start: int, count: int) -> list[Problem]:
        """Problems `start` to `start + count - 1` of a split, the same whenever asked.

        No question of `heldout` occurs twice, or in another split. `heldout` and `corpus` (for pretraining)
        do not depend on the run's seed; the others do. `validation` is for SFT's held-out loss and shares no
        question with the first `self.demonstrations` of `demonstrations`.

        Raises: UserError where a task has too few different questions for this, where reasoning-gym cannot
        draw from it, or where demonstrations are asked of a task whose stored answers do not get full marks.
        """
        with self._lock:
            if split == "heldout":
                if start + count > self.heldout:
                    raise ValueError(f"{self.name} has {self.heldout} held-out problems, not {start + count}")
                return self._heldout[start : start + count]
            if split in ("demonstrations", "validation") and not self._demonstrable:
                self._check_stored_answers()
                self._demonstrable = True
            taken = self._heldout_questions
            if split == "validation":
                taken |= self._demonstration_questions
            return [self._draw(split, i, taken) for i in range(start, start + count)]

    def demonstration(self, problem: Problem) -> str:
        """What the assistant should have said."""
        return f"<answer>{problem.answer}</answer>"

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return [{"role": "user", "content": problem.question}]

    @cached_property
    def _heldout(self) -> list[Problem]:
        problems: dict[str, Problem] = {}
        for i in range(self.heldout):
            problem = self._draw("heldout", i, problems)
            problems[problem.question] = problem
        return list(problems.values())

    @cached_property
    def _heldout_questions(self) -> frozenset[str]:
        return frozenset(problem.question for problem in self._heldout)

    @cached_property
    def _demonstration_questions(self) -> frozenset[str]:
        problems = self.problems("demonstrations", 0, self.demonstrations)
        return frozenset(problem.question for problem in problems)

    def _draw(self, split: Split, i: int, taken: Collection[str]) -> Problem:
        """The i-th problem of a split: the first of its draws whose question is not taken."""
        position, turn = divmod(i, len(self._names))
        block, offset = divmod(position, POSITIONS)
        first, end = RANGES[split]
        blocks = (end - first) // BLOCK
        # Steps of the golden ratio keep the starting points of any few seeds far apart.
        start = 0 if split in FIXED else self.seed * round(blocks * GOLDEN)
        seed = first + (start + block) % blocks * BLOCK
        for attempt in range(TRIES):
            problem = self._generate(self._names[turn], split, seed, attempt * POSITIONS + offset)
            if problem.question not in taken:
                return problem
        drawn = len(range(turn, i if split == "heldout" else self.heldout, len(self._names)))
        raise UserError(
            f"domains.{self.name}.tasks.{self._names[turn]}: its space of problems is too small: {TRIES} "
            f"draws for problem {i} of {split} gave questions that are taken, {drawn} different ones of this "
            f"task by heldout; lower heldout from {self.heldout} or widen the task's parameters"
        )

    def _generate(self, task: str, split: Split, seed: int, offset: int) -> Problem:
        """Item `offset` of the task's dataset at `seed`; the last dataset of each task and split is kept."""
        try:
            kept, dataset = self._blocks.get((task, split), (None, None))
            if dataset is None or kept != seed:
                dataset = make_dataset(task, self.tasks[task], seed, BLOCK)
                self._blocks[task, split] = seed, dataset
            entry = dataset[offset]
        except Exception as error:  # anything may be raised where the parameters leave nothing to draw
            raise UserError(
                f"domains.{self.name}.tasks.{task}: reasoning-gym draws no problem with {self.tasks[task]}: "
                f"{type(error).__name__}: {error}; widen its parameters"
            ) from error
        answer = "" if entry["answer"] is None else entry["answer"]
        parameters = self.tasks[task]
        return Problem(self.name, task, seed + offset, entry["question"], answer, entry, parameters, self._rewards)

    def _check_stored_answers(self) -> None:
        """UserError unless three problems of each task get full marks for their own answers."""
        for i in range(3 * len(self._names)):
            problem = self._draw("demonstrations", i, self._heldout_questions)
            dataset = self._blocks[problem.task, "demonstrations"][1]
            if (score := dataset.score_answer(problem.answer.strip(), problem.entry)) != 1.0:
                raise UserError(
                    f"domains.{self.name}.tasks.{problem.task}: cannot be demonstrated: the answer that it "
                    f"stores, {problem.answer!r:.60}, scores {score:g} and not 1; choose another task"
                )


def _check_scorer(task: str, where: str) -> None:
    if task in CODE_SCORED:
        raise UserError(f"{where}: its scorer runs Python code, which is forbidden; choose another task")


def _factory() -> Any:
    """reasoning-gym's registry, full."""
    try:
        import reasoning_gym  # noqa: F401 (fills the registry)
        from reasoning_gym import factory
    except ImportError as error:
        raise UserError(
            f"reasoning-gym cannot be imported: {error}; `pip install reasoning-gym` builds its dependency "
            "pycosat from source, which needs a C compiler and Python's headers (Debian: gcc and python3-dev)"
        ) from error
    return factory

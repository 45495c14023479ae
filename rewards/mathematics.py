"""Mathematical answers, compared as values by math-verify: fractions, sets, intervals, matrices, equations, units."""

import re
from typing import Any

from .answers import bounded, boxed, tagged
from .problem import Problem, Response, Score

# sympy's parser evaluates Python that it makes from numbers and names. This is all that it may make of an answer: calls
# of its own constructors on numbers and on words in quotes, put together by operators.
_MADE = re.compile(
    r"(?:\b(?:Integer|Float|Rational|Symbol|Function|factorial|pi|[eEI])\b|\d+(?:\.\d+)?(?!\d)"
    r"|'[\w. +-]*'|[-+*/%(),\s])*+"
)


def compiles(source: str) -> bool:
    """Whether math-verify may compile this: nothing that an answer could have written into it runs."""
    return source == "from sympy import *" or bool(_MADE.fullmatch(source))


def math(trajectory: Response, problem: Problem, *, boxed_only: bool = False) -> Score:
    r"""1 if the answer has the value of the problem's, by math-verify, else 0.

    The answer is what `<answer>` holds, else the last `\boxed{}`, else (unless `boxed_only`) the last number or formula
    of the content.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    content = trajectory.content
    if content is None:
        return Score(0.0, False, note="no content to grade")
    found = tagged(trajectory)
    inner = boxed(found if found is not None else content)
    given = inner if inner is not None else found
    if given is None:
        if boxed_only:
            return Score(0.0, False, note="no \\boxed{} answer")
        given = content[-2000:]  # the last sentences
    bounded(given)
    if same_text(given, problem.answer):
        return Score(1.0, True)
    limits: dict[str, Any] = {"parsing_timeout": None}  # the grader's own deadline kills this process instead
    readers = [LatexExtractionConfig(), ExprExtractionConfig()]
    wanted = parse(_latex(problem.answer), [*readers, StringExtractionConfig()], **limits)
    if not wanted:
        return Score(0.0, False, note="not the same text, and the problem's answer is no formula")
    whole = inner is not None or found is not None
    value = parse(_latex(given) if whole else given, readers, **limits)
    right = bool(verify(wanted, value, timeout_seconds=None)) if value else False
    return Score(float(right), right, note="" if right else f"{given!r:.80} is not {problem.answer!r:.80}")


def prepare(problem: Problem) -> None:
    """Imports and warms what a first grade would wait for."""
    math(Response("\\boxed{\\frac{1}{2}}"), Problem("", "", 0, "", "0.5", {}))


def same_text(one: str, other: str) -> bool:
    """Equal but for white space and dollar signs: `\\text{(B)}`, or what no parser reads."""
    return re.sub(r"[\s$]+", "", one) == re.sub(r"[\s$]+", "", other) != ""


def _latex(answer: str) -> str:
    return answer if "$" in answer or "\\boxed" in answer or "\\[" in answer else f"${answer}$"

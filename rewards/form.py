"""How a response looks, whatever it says: its format, its length, its language."""

from typing import Literal

from . import language as languages
from .answers import boxed, parse
from .problem import Problem, Response, Score


def format(trajectory: Response, problem: Problem, *, style: Literal["answer", "boxed", "any"] = "answer") -> Score:
    r"""1 if the response ended with the end token and is formed as asked, else 0.

    Args:
        style: `answer`: its content is one `<answer>...</answer>` and nothing else. `boxed`: its content has exactly
            one `\boxed{}`. `any`: it has a content (in mode "high" one `</think>`, and no think tag after it).
    """
    content = trajectory.content
    formed = {
        "answer": lambda: parse(trajectory.text, trajectory.mode)[1],
        "boxed": lambda: content is not None and content.count("\\boxed{") == 1 and boxed(content) is not None,
        "any": lambda: content is not None,
    }[style]()
    right = trajectory.ended and formed
    return Score(float(right), right)


def length(
    trajectory: Response, problem: Problem, *, free: int, limit: int, unit: Literal["tokens", "characters"] = "tokens"
) -> Score:
    """1 for a response of up to `free` tokens, 0 from `limit` on, a straight line between (as DAPO punishes length)."""
    if free < 0 or limit <= free:
        raise ValueError(f"length: limit ({limit}) has to be above free ({free})")
    count = trajectory.tokens if unit == "tokens" else len(trajectory.text)
    if count is None:
        raise ValueError("length: nobody counted this response's tokens; use unit: characters")
    value = min(1.0, max(0.0, (limit - count) / (limit - free)))
    return Score(value, note="" if value == 1.0 else f"{count} {unit}")


def language(trajectory: Response, problem: Problem, *, language: str = "") -> Score:
    """The share of the response's words that are written in the script of a language (as in DeepSeek-R1, 2.3.2).

    Args:
        language: an ISO 639-1 code; the question's own language where it is empty. Words without letters (numbers,
            formulas) do not count; a response without words scores 1.
    """
    code = language or languages.detect(problem.question)
    if code is None:
        return Score(1.0, note="the question's language is not known")
    share = languages.share(trajectory.text, code)
    return Score(share, note="" if share == 1.0 else f"{share:.0%} of its words are in the script of {code}")

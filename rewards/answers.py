"""Answers in a model's words: between tags, in a box, in a block of code."""

import re

from .problem import Response

MAX_ANSWER = 20_000  # characters of an answer that is compared, parsed or searched (our choice)

_BLOCK = re.compile(r"^```[ \t]*([\w+-]*)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


class TooLong(ValueError):
    """An answer that is over `MAX_ANSWER` characters."""


def parse(text: str, mode: str) -> tuple[str | None, bool]:
    """The answer in a response, and whether its content is nothing but the answer.

    There is no answer without a content (see `Response.content`), or unless the content has exactly one
    `<answer>...</answer>` (our choice; reasoning-gym takes the last of several). White space around the answer is
    dropped.
    """
    content = Response(text, mode=mode).content
    if content is None or content.count("<answer>") != 1 or content.count("</answer>") != 1:
        return None, False
    before, _, rest = content.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not closed:
        return None, False
    return answer.strip(), not (before.strip() or after.strip())


def tagged(response: Response) -> str | None:
    """What `parse` finds. Raises: TooLong."""
    answer = parse(response.text, response.mode)[0]
    return None if answer is None else bounded(answer)


def answer(response: Response) -> str | None:
    """What the tags hold, else all of the content; None without a content. Raises: TooLong."""
    found = tagged(response)
    if found is None and (content := response.content) is not None:
        return bounded(content.strip())
    return found


def boxed(text: str) -> str | None:
    r"""What the last `\\boxed{...}` (or `\\fbox`) holds, braces in it matched; None without one that ends."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    first = text.index("{", start) + 1
    depth, place = 1, first
    while place < len(text) and depth:
        if text[place] == "\\":
            place += 1  # an escaped brace
        else:
            depth += {"{": 1, "}": -1}.get(text[place], 0)
        place += 1
    return text[first : place - 1].strip() if not depth else None


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of code in these languages, or in none that is named."""
    return [code for language, code in _BLOCK.findall(text) if language.lower() in ("", *languages)]


def bounded(text: str) -> str:
    """The text. Raises: TooLong."""
    if len(text) > MAX_ANSWER:
        raise TooLong(f"an answer of {len(text)} characters; at most {MAX_ANSWER}")
    return text
